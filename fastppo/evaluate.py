"""Greedy evaluation of a policy on labelled examples, and ``fastppo eval``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
from rich.text import Text
from safetensors.torch import load_file
from torch import Tensor

from fastppo import config as config_module
from fastppo.batch.encode import encode_answer, encode_prompts
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model.actor_critic import POLICY, ActorCritic
from fastppo.model.load import first_line, load_base
from fastppo.rewards.rules import answer_reward
from fastppo.rollout.sampler import Sampling, generate
from fastppo.rollout.trie import TokenTrie
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
    def labels(self) -> list[int]:
        return [example.label for example in self.examples if example.label is not None]


def encode(model: ActorCritic, task: Task, examples: list[Example]) -> LabelledPrompts:
    """Tokenise; a prompt that leaves no room for its answer is the user's to know of."""
    limit, name = model.config.max_prompt_tokens, "--max-prompt-tokens"
    positions = getattr(model.base.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions - model.config.sample.max_new_tokens < limit:
        limit, name = (
            positions - model.config.sample.max_new_tokens,
            "the model's positions less --sample-max-new-tokens",
        )
    if limit < 1:
        raise UserError(
            f"--sample-max-new-tokens: {model.config.sample.max_new_tokens} leaves no room for a prompt in the model's "
            f"{positions} positions"
        )
    prompts = encode_prompts(model.base.tokenizer, task, examples, limit=limit, limit_name=name)
    rows = model.base.model.get_input_embeddings().weight.shape[0]
    for example, prompt in zip(examples, prompts, strict=True):
        if max(prompt) >= rows:
            raise UserError(
                f"model {model.base.name!r}: its tokenizer gives token {max(prompt)} ({example.origin}), its embedding has "
                f"{rows} rows: they do not belong together"
            )
    return LabelledPrompts(examples, prompts)


def allowed_answers(model: ActorCritic, task: Task, data: LabelledPrompts) -> TokenTrie | None:
    """For ``--sample-constrained`` the task's answers, in the tokens that follow its first prompt (all end alike); else None.

    Raises:
        UserError: the tokenizer has no tokens for an answer, or ``--sample-max-new-tokens`` is too few.
    """
    if not model.config.sample.constrained or not len(data):
        return None
    tokenizer, text, prompt = model.base.tokenizer, task.prompt(data.examples[0]), data.prompts[0]
    spelled = [encode_answer(tokenizer, text, prompt, task.answer(label)) for label in range(len(task.labels))]
    try:
        answers = TokenTrie(spelled, model.device)
    except ValueError as error:
        raise UserError(
            f"--sample-constrained: the tokenizer of {model.base.name!r} cannot spell the answers: {error}"
        ) from None
    if answers.longest > model.config.sample.max_new_tokens:
        raise UserError(
            f"--sample-max-new-tokens: {model.config.sample.max_new_tokens} is too few for --sample-constrained; expected at "
            f"least {answers.longest}, the longest answer and its end token"
        )
    return answers


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers: their texts, parsed labels (None: malformed), scores and mean reward."""

    texts: list[str]
    predicted: list[int | None]
    scores: dict[str, float]
    reward: float


def evaluate(
    model: ActorCritic, task: Task, data: LabelledPrompts, check: Callable[[], None] = lambda: None
) -> Evaluation:
    """Answer every prompt greedily and score the answers."""
    answers = allowed_answers(model, task, data)
    rollout = generate(model, data.prompts, 1, Sampling.greedy(model.config), seed=0, answers=answers, check=check)
    texts = [s.text for s in rollout.samples]
    predicted = [task.parse(text) for text in texts]
    rewards = [answer_reward(g, p, model.config.reward) for g, p in zip(data.labels, predicted, strict=True)]
    return Evaluation(texts, predicted, task.score(data.labels, predicted), sum(rewards) / len(rewards))


def with_interval(task: Task, data: LabelledPrompts, result: Evaluation, seed: int) -> dict[str, Any]:
    """Scores with the bootstrap 95 % interval of MCC: what a stage's row in ``summary.json`` holds."""
    low, high = task.interval(data.labels, result.predicted, seed)
    return {**result.scores, "mcc_low": low, "mcc_high": high, "n": len(data)}


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
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])


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
    run: Path, data: str | None, split: str, limit: int | None, console: rich.console.Console
) -> dict[str, Any]:
    """``fastppo eval``: the run's adapter on its own data or another set; prints one line and returns the scores."""
    config, adapter = open_run(run, console)
    task = get_task(config.task)
    dataset = load_data(task, data if data is not None else config.data, config.seed)
    examples = (dataset.dev if split == "dev" else dataset.train)[:limit]
    model = ActorCritic(load_base(config), config)
    load_adapter(model, adapter)
    encoded = encode(model, task, examples)
    row = with_interval(task, encoded, evaluate(model, task, encoded), config.seed)
    line = (
        f"{dataset.name} {split}: MCC {row['mcc']:z.3f} [{row['mcc_low']:z.3f}, {row['mcc_high']:z.3f}]  "
        f"accuracy {row['accuracy']:.1%}  malformed {row['malformed']:.1%}  n {row['n']}"
    )
    console.print(Text(line), soft_wrap=True)
    return row
