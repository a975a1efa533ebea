"""Greedy evaluation of a policy on labelled examples, and ``fastppo eval``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.text import Text
from safetensors.torch import load_file
from torch import Tensor

from fastppo import config as config_module
from fastppo import files
from fastppo.batch.encode import encode_answer, encode_prompts, prompt_limit
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model.actor_critic import POLICY, ActorCritic
from fastppo.model.load import first_line, load_base
from fastppo.rewards.rules import answer_reward
from fastppo.rollout.sampler import Sampling, generate
from fastppo.rollout.trie import TokenTrie
from fastppo.scores import shown
from fastppo.tasks import Example, Task, get_task, load_data


@dataclass(frozen=True)
class LabelledPrompts:
    """Examples with known labels, and their prompts as token ids."""

    examples: list[Example]
    prompts: list[list[int]]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, part: slice) -> LabelledPrompts:
        return LabelledPrompts(self.examples[part], self.prompts[part])

    @property
    def labels(self) -> list[int | float]:
        return [example.label for example in self.examples if example.label is not None]


def encode(model: ActorCritic, task: Task, examples: list[Example]) -> LabelledPrompts:
    """Tokenise; a prompt that leaves no room for its answer is the user's to know of."""
    positions = getattr(model.base.model.config.get_text_config(), "max_position_embeddings", None)
    limit, name = prompt_limit(model.config, positions)
    prompts = encode_prompts(model.base.tokenizer, task, examples, limit=limit, limit_name=name)
    rows = model.base.model.get_input_embeddings().weight.shape[0]
    for example, prompt in zip(examples, prompts, strict=True):
        if max(prompt) >= rows:
            raise UserError(
                f"model {model.base.name!r}: its tokenizer gives token {max(prompt)} ({example.where}), its embedding has "
                f"{rows} rows: they do not belong together"
            )
    return LabelledPrompts(examples, prompts)


def allowed_answers(model: ActorCritic, task: Task, data: LabelledPrompts) -> TokenTrie | None:
    """For ``--sample-constrained`` the task's answers, in the tokens that follow its first prompt (all end alike); else None.

    Raises:
        UserError: the answers are numbers, the tokenizer has no tokens for one, or ``--sample-max-new-tokens`` is too few.
    """
    if not model.config.sample.constrained or not len(data):
        return None
    if task.span is not None:
        raise UserError(f"--sample-constrained: answers to task {task.name} are numbers, not one of a few words; leave it off")
    spelled = spell_answers(model, task, data, range(len(task.labels)))
    try:
        answers = TokenTrie(spelled, model.device)
    except ValueError as error:
        raise UserError(
            f"--sample-constrained: the tokenizer of {model.base.name!r} cannot spell the answers: {error}"
        ) from None
    longest = answers.longest - bool(task.closing)  # the closing tag ends an answer before its end token is drawn
    flag, given = _fewest_tokens(model)
    if longest > given:
        raise UserError(
            f"{flag}: {given} is too few for --sample-constrained; expected at least {longest}, the longest answer"
            f"{'' if task.closing else ' and its end token'}"
        )
    return answers


def spell_answers(model: ActorCritic, task: Task, data: LabelledPrompts, labels: Sequence[int | float]) -> list[list[int]]:
    """The token ids of these labels' answers behind the first prompt, each with its end token."""
    text, prompt = task.prompt(data.examples[0]), data.prompts[0]
    return [encode_answer(model.base.tokenizer, text, prompt, task.answer(label)) for label in labels]


def check_room(model: ActorCritic, task: Task, data: LabelledPrompts) -> None:
    """Raises UserError where ``--sample-max-new-tokens`` is too few for the answers of the data."""
    if not len(data):
        return
    flag, given = _fewest_tokens(model)
    needed = max(len(tokens) - 1 for tokens in spell_answers(model, task, data, sorted(set(data.labels))))
    if needed > given:
        raise UserError(
            f"{flag}: {given} is too few for the answers of task {task.name}; expected at least {needed}"
        )


def _fewest_tokens(model: ActorCritic) -> tuple[str, int]:
    """The flag that says how long every answer may be, and what it says."""
    sample = model.config.sample
    if sample.max_new_tokens_from is None:
        return "--sample-max-new-tokens", sample.max_new_tokens
    return "--sample-max-new-tokens-from", sample.max_new_tokens_from


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers: their texts, parsed labels (None: malformed), the labels scored for them, scores and mean reward."""

    texts: list[str]
    predicted: list[int | float | None]
    scored: list[int | float | None]
    scores: dict[str, float]
    reward: float


def answer(
    model: ActorCritic, task: Task, data: LabelledPrompts, check: Callable[[], None] = lambda: None
) -> tuple[list[str], list[int | float | None]]:
    """Answer every prompt greedily: the texts, and the labels that they say (None: malformed). Labels need not be known."""
    answers = allowed_answers(model, task, data)
    rollout = generate(model, data.prompts, 1, Sampling.greedy(model.config), seed=0, answers=answers, check=check)
    texts = [s.text for s in rollout.samples]
    return texts, [task.parse(text) for text in texts]


def evaluate(
    model: ActorCritic, task: Task, data: LabelledPrompts, check: Callable[[], None] = lambda: None
) -> Evaluation:
    """Answer every prompt greedily and score the answers."""
    config, (texts, predicted) = model.config, answer(model, task, data, check)
    rewards = [
        answer_reward(task, gold, said, text, config.reward)
        for gold, said, text in zip(data.labels, predicted, texts, strict=True)
    ]
    scored = predicted
    if config.fallback == "random":
        draw = random.Random(config.seed)
        scored = [task.guess(text, draw) if said is None else said for said, text in zip(predicted, texts, strict=True)]
    scores = {**task.score(data.examples, scored), "malformed": predicted.count(None) / len(predicted)}
    return Evaluation(texts, predicted, scored, scores, sum(rewards) / len(rewards))


def with_interval(task: Task, data: LabelledPrompts, result: Evaluation, seed: int) -> dict[str, Any]:
    """Scores with the bootstrap 95 % intervals of the official metrics: what a stage's row in ``summary.json`` holds."""
    return row_of(task, data.examples, result.scored, result.scores, seed)


def row_of(
    task: Task, examples: list[Example], predicted: Sequence[int | float | None], scores: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """These scores of these predictions with their intervals."""
    row: dict[str, Any] = dict(scores)
    for name, (low, high) in task.intervals(examples, predicted, seed).items():
        row |= {f"{name}_low": low, f"{name}_high": high}
    return {**row, "n": len(examples)}


def write_answers(run: Path, stage: str, data: LabelledPrompts, result: Evaluation) -> None:
    """Write ``answers/STAGE.jsonl``, one object an example, in their order: where the example stands (``origin``), its
    ``fields`` and ``label``, the ``answer`` as the policy wrote it, and what that says (``predicted``, null: malformed)."""
    folder = run / "answers"
    with files.disk_errors(folder):
        folder.mkdir(exist_ok=True)
    rows = zip(data.examples, result.texts, result.predicted, strict=True)
    files.write_json_lines(
        folder / f"{stage}.jsonl",
        (
            {"origin": e.origin, "fields": e.fields, "label": e.label, "answer": text, "predicted": predicted}
            for e, text, predicted in rows
        ),
    )


def read_adapter(adapter: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter folder, by PEFT's names."""
    try:
        return load_file(adapter / "adapter_model.safetensors")
    except Exception as error:  # safetensors raises kinds of its own
        raise UserError(f"{adapter}: the adapter cannot be read: {first_line(error)}") from None


def load_adapter(model: ActorCritic, adapter: Path) -> None:
    """Read a PEFT adapter folder into the policy."""
    tensors = read_adapter(adapter)
    own = model.adapter_tensors(POLICY)
    wrong = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape] + [
        n for n in tensors if n not in own
    ]
    if wrong:
        raise UserError(f"{adapter}: the adapter does not fit the model and settings, first at {wrong[0]!r}")
    with torch.no_grad():  # not through `data`, past which nobody would see the change
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def open_run(run: Path, console: rich.console.Console) -> tuple[Config, Path]:
    """Settings and adapter folder of a run that has one; says so if the run is not finished."""
    config = config_module.load_config({}, run / "config.yaml")
    adapter = run / "adapter"
    if not adapter.is_dir():
        raise UserError(f"run folder {run}: has no adapter yet; finish it with: fastppo train --resume {run}")
    if not (run / "summary.json").is_file():
        console.print(Text(f"run {run} is not finished: this is the best adapter so far"), soft_wrap=True)
    return config, adapter


def evaluate_run(
    run: Path, data: str | None, split: str, limit: int | None, console: rich.console.Console, name: str | None = None
) -> dict[str, Any]:
    """``fastppo eval``: the run's adapter on its own data or another set; prints one line and returns the scores.

    name: of another task than the run's, for its own data.
    """
    config, adapter = open_run(run, console)
    task = get_task(config.task if name is None else name, config.template)
    if task.name != config.task and data is None:
        raise UserError(f"--task {task.name}: is not the run's task {config.task}; give its data with --data")
    dataset = load_data(task, data if data is not None else config.data, config.seed)
    examples = (dataset.dev if split == "dev" else dataset.train)[:limit]
    if not examples:
        raise UserError(f"--split {split}: task {task.name} has no {split} split")
    model = ActorCritic(load_base(config), config)
    load_adapter(model, adapter)
    encoded = encode(model, task, examples)
    row = with_interval(task, encoded, evaluate(model, task, encoded), config.seed)
    if "parity" in task.metrics and "parity" not in row:
        console.print("no gender parity: no two of these examples differ in the gender of a pronoun alone", soft_wrap=True)
    console.print(Text(f"{dataset.name} {split}: {shown(row)}  n {row['n']}"), soft_wrap=True)
    return row
