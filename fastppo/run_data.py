"""The examples of a run, of one task or several, and what a pass over them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.batch.encode import encode_answer
from fastppo.config import Config
from fastppo.evaluate import LabelledPrompts, encode
from fastppo.model.actor_critic import ActorCritic
from fastppo.streams import PPO_ORDER, SFT_ORDER, SPLIT, rng
from fastppo.tasks import Dataset, Task

EVENED_UP_TO = 30_000
"""Examples up to which small tasks are repeated: Somayajula et al. 2025 (arXiv 2410.11020), released code, multi-task SFT."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on, validates on and is judged by.

    train, valid, dev: examples, task after task, each once. sft_pass, ppo_pass: the examples of one pass, indices of ``train``;
    those of small tasks several times.
    """

    config: Config
    tasks: list[Task]
    sets: list[Dataset]
    train: LabelledPrompts
    valid: LabelledPrompts
    dev: LabelledPrompts
    sft_pass: list[int]
    ppo_pass: list[int]

    @staticmethod
    def encoded(model: ActorCritic, tasks: list[Task], sets: list[Dataset], config: Config) -> RunData:
        """Each task's train split divided as in a run of this task alone. Raises UserError for a prompt that is too long."""
        train: list[LabelledPrompts] = []
        valid: list[LabelledPrompts] = []
        dev: list[LabelledPrompts] = []
        places: list[range] = []  # of each task's examples in train
        for task, data in zip(tasks, sets, strict=True):
            order = rng(config.seed, SPLIT).permutation(len(data.train))[: config.train_examples].tolist()
            held = min(config.valid_examples, len(order) // 10)
            first = places[-1].stop if places else 0
            dev.append(encode(model, task, data.dev))
            valid.append(encode(model, task, [data.train[i] for i in order[:held]]))
            train.append(encode(model, task, [data.train[i] for i in order[held:]]))
            places.append(range(first, first + len(train[-1])))
        warm = [of_task[: config.sft.examples] for of_task in places]
        join = LabelledPrompts.joined
        return RunData(
            config, tasks, sets, join(train), join(valid), join(dev), whole_passes(warm), whole_passes(places)
        )  # fmt: skip

    @property
    def several(self) -> bool:
        return len(self.tasks) > 1

    @property
    def warm(self) -> list[int]:
        """The examples of the supervised warm start, indices of ``train``."""
        return list(dict.fromkeys(self.sft_pass))

    def answers(self, model: ActorCritic) -> dict[int, list[int]]:
        """Token ids of the right answer to each example of the warm start."""
        tokenizer, data, labels = model.base.tokenizer, self.train, self.train.labels
        texts = {i: (data.tasks[i].prompt(data.examples[i]), data.tasks[i].answer(labels[i])) for i in self.warm}
        return {i: encode_answer(tokenizer, prompt, data.prompts[i], answer) for i, (prompt, answer) in texts.items()}

    def sft_batch(self, step: int) -> list[int]:
        """Examples of an SFT step: a shuffled pass is dealt out to its steps."""
        count = self.sft_steps
        order = rng(self.config.seed, SFT_ORDER, step // count).permutation(len(self.sft_pass))
        return [self.sft_pass[i] for i in order[step % count :: count]]

    @property
    def sft_steps(self) -> int:
        """Steps of one pass."""
        return -(-len(self.sft_pass) // self.config.sft.batch_size)

    def ppo_prompts(self, step: int) -> list[int]:
        """Examples of a PPO iteration: consecutive slices of one shuffled pass after another."""
        n, size = len(self.ppo_pass), self.config.ppo.prompts
        places = range(step * size, (step + 1) * size)
        orders = {p: rng(self.config.seed, PPO_ORDER, p).permutation(n) for p in {place // n for place in places}}
        return [self.ppo_pass[orders[place // n][place % n]] for place in places]

    def labels_seen(self) -> int:
        """How many examples' labels both stages use."""
        config = self.config.ppo
        passed = -(-len(self.ppo_pass) // config.prompts)
        rewarded = {i for step in range(min(config.iterations, passed)) for i in self.ppo_prompts(step)}
        return len(rewarded | set(self.sft_pass))

    def named(self, of_tasks: Mapping[str, Mapping[str, float]], of_all: Mapping[str, float]) -> dict[str, float]:
        """Metrics for the records: of the only task its own; of several those of all, and each task's as ``TASK/NAME``."""
        if not self.several:
            return dict(of_tasks[self.tasks[0].name])
        return {**of_all, **{f"{task}/{key}": value for task, row in of_tasks.items() for key, value in row.items()}}

    def setup(self) -> dict[str, Any]:
        """For ``setup.json``: each task's first metric, data, and name and answer of each label id; of several in ``tasks``."""
        of_tasks = {
            task.name: {
                "metric": task.metrics[0],
                "labels": list(task.label_names),
                "answers": [task.answer(label).strip() for label in range(len(task.label_names))],
                "data": data.summary(),
            }
            for task, data in zip(self.tasks, self.sets, strict=True)
        }
        if not self.several:
            return of_tasks[self.tasks[0].name]
        rows = {split: sum(len(getattr(data, split)) for data in self.sets) for split in ("train", "dev")}
        name = self.config.data or "each task's own"
        return {"metric": "score", "tasks": of_tasks, "data": {"name": name, **rows}}

    def counts(self) -> list[str]:
        """What there is, in words: of all, and of each of several tasks."""
        used = [f"{len(self.warm):,} for SFT"] if self.warm else []
        if self.config.ppo.iterations:
            used += [f"{len(self.train):,} for PPO", f"{len(self.valid):,} held out to choose the checkpoint"]
        else:
            used.append(f"{len(self.valid):,} held out")
        rows = sum(len(data.train) for data in self.sets)
        lines = [f"{rows:,} train rows ({', '.join(used)}), {len(self.dev):,} dev rows"]
        if self.several:
            train, dev, passes = self.train.by_task(), self.dev.by_task(), self._passes()
            for name in train:
                times = f", {passes[name]} times in a pass" if passes[name] > 1 else ""
                lines.append(f"{name}: {len(train[name]):,} rows for PPO{times}, {len(dev[name]):,} dev rows")
        lines += [data.note for data in self.sets if data.note]
        return lines

    def _passes(self) -> dict[str, int]:
        """How often each task's examples come in a pass of PPO."""
        first: dict[str, int] = {}
        for i, task in enumerate(self.train.tasks):
            first.setdefault(task.name, i)
        return {name: self.ppo_pass.count(i) for name, i in first.items()}


def whole_passes(parts: Sequence[Sequence[int]]) -> list[int]:
    """All examples of each task (a part), each of a smaller one as often as it takes to have as many examples as the largest,
    or at least `EVENED_UP_TO`."""
    wanted = min(max(map(len, parts)), EVENED_UP_TO)
    return [i for part in parts if part for _ in range(max(1, -(-wanted // len(part)))) for i in part]
