"""fastppo's side of the comparison: the engine's own iteration, on given prompts and a toy reward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from bench.models import keep_micro_batch, random_base
from fastppo.algorithms import optim
from fastppo.batch.rollout import Rollout
from fastppo.model.actor_critic import ActorCritic
from fastppo.trainer import Iteration, make_torch_repeatable, ppo_iteration

from .workloads import Workload, engine_config, good_tokens


class FastppoLoop:
    """One run of PPO, with torch as repeatable as ``fastppo train`` makes it. ``curve``: mean reward of each iteration.
    ``phases``: seconds of those of the iterations that were timed. ``tree_tokens``, ``padded_tokens``: of the last batch.
    """

    name = "fastppo"

    def __init__(
        self, model: str, workload: Workload, iterations: int, device: torch.device, dtype: torch.dtype,
        settings: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.config = engine_config(workload, iterations, str(device), dtype, settings)
        base = random_base(model, device, dtype)
        vocab = base.model.config.vocab_size
        # No token ends an answer: every sample has the same number of tokens, in both engines.
        self.model = keep_micro_batch(ActorCritic(replace(base, eos_ids=(vocab,)), self.config))
        self.optimizer = optim.make_optimizer(self.model.trainable(), 0.0, self.config.ppo.adam_eps)
        self.good, self.judged = good_tokens(base.model).cpu(), workload.judged
        self.device, self.step = device, 0
        self.curve: list[float] = []
        self.phases: dict[str, float] = {}

    def iterate(self, prompts: list[list[int]], *, timed: bool = False) -> float:
        """One iteration; the seconds that it took."""
        before = torch.are_deterministic_algorithms_enabled()
        make_torch_repeatable()
        try:
            synchronize(self.device)
            start = time.perf_counter()
            done = self.run(prompts, timed)
            synchronize(self.device)
            seconds = time.perf_counter() - start
        finally:
            torch.use_deterministic_algorithms(before)  # TRL does not ask for it
        self.step += 1
        self.curve.append(sum(done.rewards) / len(done.rewards))
        trees = [part.tree for mini in done.minibatches for part in mini.parts]
        self.tree_tokens = sum(tree.n_tokens for tree in trees)
        self.padded_tokens = sum(tree.padded_tokens for tree in trees)
        return seconds

    def run(self, prompts: list[list[int]], timed: bool) -> Iteration:
        return ppo_iteration(
            self.model, self.optimizer, prompts, self.rewards, self.config.ppo.kl_coef, self.config, step=self.step,
            timed=self._timed if timed else nullcontext,
        )  # fmt: skip

    def rewards(self, rollout: Rollout) -> list[float]:
        return self.good[torch.tensor([sample.tokens[-self.judged :] for sample in rollout.samples])].mean(1).tolist()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
