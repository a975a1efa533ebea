"""Greedy evaluation of a policy on labelled examples, and ``fastppo eval``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fastppo.errors import UserError, printable
from fastppo.model.actor_critic import POLICY, ActorCritic
from fastppo.model.load import first_line, load_base
from fastppo.rewards.rules import answer_reward
from fastppo.rollout.sampler import Sampling, generate
from fastppo.rollout.trie import TokenTrie
from fastppo.scores import shown
from fastppo.tasks import Example, Task, changed, get_tasks, load_sets
from fastppo.tasks.metrics import mean_interval
from fastppo.tasks.own import names_in, whole_name


@dataclass(frozen=True)
class LabelledPrompts:
    """Examples with known labels, their prompts as token ids, and the task of each."""

    examples: list[Example]
    prompts: list[list[int]]
    tasks: list[Task]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> list[int | float]:
        return [example.label for example in self.examples if example.label is not None]

    def pick(self, places: Iterable[int]) -> LabelledPrompts:
        chosen = list(places)
        examples, prompts = [self.examples[i] for i in chosen], [self.prompts[i] for i in chosen]
        return LabelledPrompts(examples, prompts, [self.tasks[i] for i in chosen])

    def by_task(self) -> dict[str, LabelledPrompts]:
        """The examples of each task, by its name, in the order in which tasks come first."""
        found: dict[str, list[int]] = {}
        for i, task in enumerate(self.tasks):
            found.setdefault(task.name, []).append(i)
        return {name: self.pick(places) for name, places in found.items()}

    @staticmethod
    def joined(parts: Sequence[LabelledPrompts]) -> LabelledPrompts:
        """All of these, one behind the other."""
        examples, prompts = [e for part in parts for e in part.examples], [p for part in parts for p in part.prompts]
        return LabelledPrompts(examples, prompts, [task for part in parts for task in part.tasks])


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
    return LabelledPrompts(examples, prompts, [task] * len(examples))


@dataclass(frozen=True)
class Allowed:
    """What may be sampled: the answers of all tasks, and of each prompt the node where those of its task begin."""

    answers: TokenTrie | None = None
    roots: list[int] | None = None


def allowed_answers(model: ActorCritic, data: LabelledPrompts) -> Allowed:
    """For ``--sample-constrained`` each task's answers, in the tokens that follow its first prompt (all end alike); else
    anything.

    Raises:
        UserError: answers are numbers, the tokenizer has no tokens for one, or ``--sample-max-new-tokens`` is too few.
    """
    if not model.config.sample.constrained or not len(data):
        return Allowed()
    spelled = {}
    for name, part in data.by_task().items():
        task = part.tasks[0]
        if task.span is not None:
            raise UserError(f"--sample-constrained: answers to task {name} are numbers, not one of a few words; leave it off")
        spelled[name] = spell_answers(model, part, range(len(task.labels)))
    try:
        answers = TokenTrie(*spelled.values(), device=model.device)
    except ValueError as error:
        raise UserError(
            f"--sample-constrained: the tokenizer of {model.base.name!r} cannot spell the answers: {error}"
        ) from None
    closing = data.tasks[0].closing  # the same of all, for it is the template's
    longest = answers.longest - bool(closing)  # the closing tag ends an answer before its end token is drawn
    flag, given = _fewest_tokens(model)
    if longest > given:
        raise UserError(
            f"{flag}: {given} is too few for --sample-constrained; expected at least {longest}, the longest answer"
            f"{'' if closing else ' and its end token'}"
        )
    root_of = dict(zip(spelled, answers.roots, strict=True))
    return Allowed(answers, [root_of[task.name] for task in data.tasks])


def spell_answers(model: ActorCritic, data: LabelledPrompts, labels: Sequence[int | float]) -> list[list[int]]:
    """The token ids of these labels' answers behind the first prompt, each with its end token."""
    task, prompt = data.tasks[0], data.prompts[0]
    text = task.prompt(data.examples[0])
    return [encode_answer(model.base.tokenizer, text, prompt, task.answer(label)) for label in labels]


def check_room(model: ActorCritic, data: LabelledPrompts) -> None:
    """Raises UserError where ``--sample-max-new-tokens`` is too few for the answers of the data."""
    flag, given = _fewest_tokens(model)
    for name, part in data.by_task().items():
        needed = max(len(tokens) - 1 for tokens in spell_answers(model, part, sorted(set(part.labels))))
        if needed > given:
            raise UserError(f"{flag}: {given} is too few for the answers of task {name}; expected at least {needed}")


def _fewest_tokens(model: ActorCritic) -> tuple[str, int]:
    """The flag that says how long every answer may be, and what it says."""
    sample = model.config.sample
    if sample.max_new_tokens_from is None:
        return "--sample-max-new-tokens", sample.max_new_tokens
    return "--sample-max-new-tokens-from", sample.max_new_tokens_from


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to a task's examples: their texts, parsed labels (None: malformed), the labels scored for them, scores
    and mean reward."""

    data: LabelledPrompts
    texts: list[str]
    predicted: list[int | float | None]
    scored: list[int | float | None]
    scores: dict[str, float]
    reward: float

    @property
    def task(self) -> Task:
        return self.data.tasks[0]


def answer(model: ActorCritic, data: LabelledPrompts, check: Callable[[], None] = lambda: None) -> list[str]:
    """Answer every prompt greedily, all at once: the texts. Labels need not be known."""
    allowed = allowed_answers(model, data)
    rollout = generate(
        model, data.prompts, 1, Sampling.greedy(model.config), seed=0, answers=allowed.answers, roots=allowed.roots, check=check
    )
    return [sample.text for sample in rollout.samples]


def evaluate(model: ActorCritic, data: LabelledPrompts, check: Callable[[], None] = lambda: None) -> list[Evaluation]:
    """Answer every prompt greedily, and score each task's answers."""
    texts: dict[str, list[str]] = {}
    for task, text in zip(data.tasks, answer(model, data, check), strict=True):
        texts.setdefault(task.name, []).append(text)
    return [_evaluation(part, texts[name], model.config) for name, part in data.by_task().items()]


def _evaluation(data: LabelledPrompts, texts: list[str], config: Config) -> Evaluation:
    """Of answers to the examples of one task."""
    task = data.tasks[0]
    predicted = [task.parse(text) for text in texts]
    rewards = [
        answer_reward(task, gold, said, text, config.reward)
        for gold, said, text in zip(data.labels, predicted, texts, strict=True)
    ]
    scored = predicted
    if config.fallback == "random":
        draw = random.Random(config.seed)
        scored = [task.guess(text, draw) if said is None else said for said, text in zip(predicted, texts, strict=True)]
    scores = {**task.score(data.examples, scored), "malformed": predicted.count(None) / len(predicted)}
    return Evaluation(data, texts, predicted, scored, scores, sum(rewards) / len(rewards))


def mean_reward(results: Sequence[Evaluation]) -> float:
    """The mean over tasks of their mean rewards: each counts the same, however many examples it has."""
    return sum(result.reward for result in results) / len(results)


def with_interval(results: Sequence[Evaluation], seed: int) -> dict[str, Any]:
    """What a stage's row in ``summary.json`` holds: scores with the bootstrap 95 % intervals of the official metrics.

    Of several tasks: ``score``, the mean of their first official metrics, with its interval; ``malformed`` and ``n`` of all
    answers; and each task's own row in ``tasks``, by name.
    """
    rows = {r.task.name: row_of(r.task, r.data.examples, r.scored, r.scores, seed) for r in results}
    if len(rows) == 1:
        return next(iter(rows.values()))
    mains = [[rows[r.task.name][f"{r.task.metrics[0]}{end}"] for end in ("", "_low", "_high")] for r in results]
    score = sum(value for value, _, _ in mains) / len(mains)
    low, high = mean_interval(mains)
    malformed, n = sum(r.predicted.count(None) for r in results), sum(len(r.predicted) for r in results)
    return {"score": score, "malformed": malformed / n, "score_low": low, "score_high": high, "n": n, "tasks": rows}


def row_of(
    task: Task, examples: list[Example], predicted: Sequence[int | float | None], scores: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """These scores of these predictions with their intervals."""
    row: dict[str, Any] = dict(scores)
    for name, (low, high) in task.intervals(examples, predicted, seed).items():
        row |= {f"{name}_low": low, f"{name}_high": high}
    return {**row, "n": len(examples)}


def write_answers(run: Path, stage: str, results: Sequence[Evaluation]) -> None:
    """Write ``answers/STAGE.jsonl``, one object an example, in their order: its ``task`` where there are several, where it
    stands (``origin``), its ``fields`` and ``label``, the ``answer`` as the policy wrote it, and what that says
    (``predicted``, null: malformed)."""
    folder = run / "answers"
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.write_json_lines(
        folder / f"{stage}.jsonl",
        (
            ({"task": r.task.name} if len(results) > 1 else {})
            | {"origin": e.origin, "fields": e.fields, "label": e.label, "answer": text, "predicted": predicted}
            for r in results
            for e, text, predicted in zip(r.data.examples, r.texts, r.predicted, strict=True)
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


def _trained_on(run: Path) -> str | None:
    """`sources` of a run's tasks; None where they are not known."""
    try:
        found = json.loads((run / "setup.json").read_bytes()).get("task_file")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def evaluate_run(
    run: Path, data: str | None, split: str, limit: int | None, console: rich.console.Console, name: str | None = None
) -> dict[str, Any]:
    """``fastppo eval``: the run's adapter on its own data or another set; prints a line for each task and returns the scores.

    data: as in ``fastppo train``, of the tasks that are evaluated. limit: examples of each task. name: of some of the run's
    tasks, or of others, or their files, for their own data.
    """
    config, adapter = open_run(run, console)
    own = get_tasks(config.task, config.template)
    names = config.task if name is None else whole_name(name)
    tasks = get_tasks(names, config.template)
    known = names_in(config.task)
    others = [task.name for task, asked in zip(tasks, names_in(names), strict=True) if asked not in known]
    if others and data is None:
        what = "the run's task" if len(own) == 1 else "one of the run's tasks"
        raise UserError(f"--task {others[0]}: is not {what} {config.task}; give its data with --data")
    recorded = _trained_on(run)
    of_run = [file for file in changed(config.task, own, recorded) if file in names_in(names)] if recorded is not None else []
    for file in of_run:
        said = f"the task's file {file} changed since the run began: what follows is of the task as it is now"
        console.print(Text(printable(said)), soft_wrap=True)
    given = (config.data, own) if data is None else (data, tasks)
    sets = load_sets(tasks, given[0], config.seed, of_several=len(given[1]) > 1)
    chosen = [(dataset.dev if split == "dev" else dataset.train)[:limit] for dataset in sets]
    for task, examples in zip(tasks, chosen, strict=True):
        if not examples:
            raise UserError(f"--split {split}: task {task.name} has no {split} split")
    model = ActorCritic(load_base(config), config)
    load_adapter(model, adapter)
    encoded = [encode(model, task, examples) for task, examples in zip(tasks, chosen, strict=True)]
    row = with_interval(evaluate(model, LabelledPrompts.joined(encoded)), config.seed)
    rows = row.get("tasks", {tasks[0].name: row})
    for task, dataset in zip(tasks, sets, strict=True):
        of_task = rows[task.name]
        if "parity" in task.metrics and "parity" not in of_task:
            console.print("no gender parity: no two of these examples differ in the gender of a pronoun alone", soft_wrap=True)
        console.print(Text(f"{dataset.name} {split}: {shown(of_task)}  n {of_task['n']}"), soft_wrap=True)
    if len(tasks) > 1:
        console.print(Text(f"{len(tasks)} tasks {split}: {shown(row)}  n {row['n']}"), soft_wrap=True)
    return row
