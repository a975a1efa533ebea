"""The loop: sample, score, estimate, update, report. A run is a folder, and any checkpoint in it continues to the same bits."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import torch

from fastppo import __version__, checkpoint, files, report
from fastppo import config as config_module
from fastppo.algorithms import optim, ppo
from fastppo.algorithms.ppo import Estimates
from fastppo.algorithms.sft import sft_step
from fastppo.batch.rollout import MiniBatch, Rollout, Sample, pack_rollout
from fastppo.budget import Prompts
from fastppo.config import Config, RewardConfig
from fastppo.errors import Interrupted, UserError
from fastppo.evaluate import allowed_answers, check_room, evaluate, mean_reward, with_interval, write_answers
from fastppo.interrupt import Interruptible
from fastppo.machine import cpu_name
from fastppo.model.actor_critic import POLICY, ActorCritic
from fastppo.model.load import load_base
from fastppo.model.nf4 import in_4_bits
from fastppo.model.out_of_memory import shrink_micro_batch, with_less_memory
from fastppo.rewards.marks import Marks
from fastppo.rewards.stream import RewardStream
from fastppo.rollout.sampler import Sampling, generate
from fastppo.rollout.trie import TokenTrie
from fastppo.run_data import RunData
from fastppo.scores import shown
from fastppo.streams import PPO_LENGTH, PPO_UPDATE, rng
from fastppo.tasks import changed, get_tasks, load_sets, sources
from fastppo.track import Tracker

PPO_PHASES = ("sample", "score", "estimate", "update")  # of ``seconds``: what samples_per_s counts


@dataclass
class State:
    """Where a run stands: what a checkpoint holds besides tensors."""

    stage: str = "zero_shot"  # then sft, ppo, done
    step: int = 0  # steps of the stage that are done
    kl_coef: float = 0.0
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    tokens_tree: int = 0
    tokens_padded: int = 0
    sampler_gap_max: float = 0.0
    first_kl: float | None = None
    first_log_ratio: float | None = None
    best_step: int = 0
    best_reward: float | None = None
    checkpoints: int = 0
    records: dict[str, int] = field(default_factory=dict)
    most_tokens: int | None = None  # of a micro-batch, and
    most_slots: int | None = None  # of sequences sampled at a time, since memory ran out
    fingerprint: str = ""
    task_file: str = ""  # what `Task.source` was


@dataclass(frozen=True)
class Iteration:
    """What one PPO iteration did: ``metrics`` are those of ``ppo.update``."""

    rollout: Rollout
    rewards: list[float]
    minibatches: list[MiniBatch]
    estimates: Estimates
    metrics: dict[str, float]


def ppo_iteration(
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    score: Callable[[Rollout], list[float]],
    kl_coef: float,
    config: Config,
    *,
    step: int,
    check: Callable[[Estimates], None] = lambda _: None,
    critic_only: bool = False,
    answers: TokenTrie | None = None,
    roots: Sequence[int] | None = None,
    finished: Callable[[int, Sample], None] | None = None,
    timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Iteration:
    """Sample, score, estimate, update: one iteration of PPO, number ``step``, on these prompts (token ids).

    Args:
        score: the reward of each sample of a rollout.
        check: called before the update; it may raise to stop.
        critic_only: only the critic learns.
        answers, roots, finished: as in ``generate``; with a `RewardStream` as ``score``, its ``finished``.
        timed: a context around each of `PPO_PHASES`, for a clock.
    """
    with timed("sample"):
        rollout = generate(
            model, prompts, config.ppo.samples, Sampling.drawn(config, rng(config.seed, PPO_LENGTH, step)),
            seed=config.seed, first_id=step * len(prompts) * config.ppo.samples,
            answers=answers, roots=roots, finished=finished,
        )  # fmt: skip
    with timed("score"):
        rewards = score(rollout)
    with timed("estimate"):  # the first iteration shares no forward with the update: its first ratio is a check
        minibatches = pack_rollout(
            rollout, minibatches=config.ppo.minibatches, budget=model.micro_batch_tokens,
            padded=not model.backbone.packed, device=model.device, rng=rng(config.seed, PPO_UPDATE, step),
        )  # fmt: skip
        estimates = with_less_memory(
            model,
            "estimating advantages",
            partial(
                ppo.estimate, model, minibatches, rollout, rewards, kl_coef, config,
                before_update=step > 0 and not critic_only,
            ),
            partial(shrink_micro_batch, model, minibatches),
        )  # fmt: skip
    check(estimates)
    with timed("update"):
        factor = optim.lr_factor(step, config.ppo.iterations, config.ppo.warmup, config.ppo.schedule)
        optim.set_lr(optimizer, config.ppo.lr * factor)
        metrics = ppo.update(
            model, optimizer, minibatches, kl_coef, config, rng(config.seed, PPO_UPDATE, step, 1), critic_only=critic_only
        )
    return Iteration(rollout, rewards, minibatches, estimates, metrics)


def train(config: Config, run: Path, console: rich.console.Console) -> dict[str, Any]:
    """Begin a run in the folder ``run``; returns what ``summary.json`` holds.

    Raises:
        UserError: a mistake in settings, data or model. Interrupted: after a signal, at a point that ``resume`` continues.
    """
    config_module.check(config)
    with Interruptible() as stop:
        trainer = Trainer(config, run, console, stop)
        with files.lock_run(run):
            if not files.is_unused(run):  # another process may have begun there while this one loaded its model
                raise UserError(f"run folder {run}: exists and is not empty; choose another folder")
            config_module.save(config, run / "config.yaml")  # first of all files: with it, the run can be resumed
            with Tracker(run, console) as tracker:
                return trainer.go(tracker)


def resume(run: Path, overrides: Mapping[str, str], console: rich.console.Console) -> dict[str, Any]:
    """Continue an interrupted run with its own settings, to the same bits as if it had never stopped.

    Raises:
        UserError: other settings than the run's, data or a model that changed since, a damaged checkpoint.
    """
    config = config_module.load_config({}, run / "config.yaml")
    other = config_module.differences(config, config_module.load_config(overrides, run / "config.yaml"))
    if other:
        raise UserError(f"run folder {run}: was begun with other settings ({'; '.join(other)}); resume without them")
    with Interruptible() as stop, files.lock_run(run):
        latest = checkpoint.load_latest(run)
        trainer = Trainer(config, run, console, stop)
        with Tracker(run, console) as tracker:
            if latest is None:
                tracker.restore({"metrics": 0, "samples": 0})
            else:
                trainer.restore(latest, tracker)
            return trainer.go(tracker)


class Trainer:
    """One run: its model, data and state, and the three stages."""

    def __init__(self, config: Config, run: Path, console: rich.console.Console, stop: Interruptible):
        self.config, self.run, self.console, self.stop = config, run, console, stop
        make_torch_repeatable()
        tasks = get_tasks(config.task, config.template, to_train=True)
        sets = load_sets(tasks, config.data, config.seed, of_several=len(tasks) > 1)
        self.model = ActorCritic(load_base(config), config)
        stop.check()
        self.data = data = RunData.encoded(self.model, tasks, sets, config)
        self.model.choose(Prompts.of([*data.train.prompts, *data.valid.prompts, *data.dev.prompts]))
        self.allowed = allowed_answers(self.model, data.train)
        check_room(self.model, data.train)
        self.state = State(kl_coef=config.ppo.kl_coef, fingerprint=self._fingerprint(), task_file=sources(tasks))
        self._new_optimizer()
        self.best = self.model.state()

    def go(self, tracker: Tracker) -> dict[str, Any]:
        """Run the stages that are not done; write and show the summary."""
        self.tracker = tracker
        self.model.notify = tracker.note
        if self.state.stage == "done" and all(files.read_json(self.run / name) for name in ("setup.json", "summary.json")):
            self.tracker.note(f"run {self.run}: is finished already, nothing to do")
            if not (self.run / "adapter").is_dir():
                self._save_adapter()
            if not (self.run / report.NAME).is_file():
                report.write_report(self.run, self.run / report.NAME)
            summary = self.summary()
            self.tracker.table(summary)
            return summary
        files.write_json(self.run / "setup.json", self.setup())
        self._announce()
        if self.state.stage == "zero_shot":
            self._finish_stage("zero_shot", "sft", labels=0)
        if self.state.stage == "sft":
            self.sft()
            self._finish_stage("sft", "ppo", labels=len(self.data.warm), skipped=not self.data.warm)
        if self.state.stage == "ppo":
            self.ppo()
            self._finish_stage("ppo", "done", labels=self.data.labels_seen(), skipped=self.config.ppo.iterations == 0)
        summary = self.summary()
        files.write_json(self.run / "summary.json", summary)
        report.write_report(self.run, self.run / report.NAME)
        self._show(summary)
        return summary

    # -- the stages ---------------------------------------------------------------------------------------------------

    def sft(self) -> None:
        """Cross-entropy on the answers of the warm-start examples."""
        config, data = self.config.sft, self.data
        total = data.sft_steps * config.epochs
        if self.state.step == total:
            return
        answers = data.answers(self.model)
        self.tracker.stage("SFT", total, self.state.step)
        while self.state.step < total:
            step = self.state.step
            chosen = data.sft_batch(step)
            with self._timed("sft"):
                optim.set_lr(self.optimizer, config.lr * optim.lr_factor(step, total, config.warmup, "linear"))
                metrics = sft_step(
                    self.model,
                    self.optimizer,
                    self.config,
                    [data.train.prompts[i] for i in chosen],
                    [answers[i] for i in chosen],
                )
            self._end_step(metrics, last=step + 1 == total)

    def ppo(self) -> None:
        """Sample, score, estimate, update; validate and keep the best."""
        config, train, state, model = self.config.ppo, self.data.train, self.state, self.model
        if config.iterations == 0:
            return
        if state.step == 0:
            if ppo.needs_reference(self.config) and config.reference == "start":
                model.freeze_reference()
            self._validate()
        labels, allowed = train.labels, self.allowed
        self.tracker.stage("PPO", config.iterations, state.step)
        while state.step < config.iterations:
            step, critic_only = state.step, state.step < self.config.value.warmup
            chosen = self.data.ppo_prompts(step)
            samples = [i for i in chosen for _ in range(config.samples)]
            marks = Marks([train.tasks[i] for i in samples], [labels[i] for i in samples], self.config.reward)
            score = RewardStream(marks.reward)
            done = ppo_iteration(
                model, self.optimizer, [train.prompts[i] for i in chosen], score, state.kl_coef, self.config, step=step,
                check=self._check_gap, critic_only=critic_only, answers=allowed.answers,
                roots=allowed.roots and [allowed.roots[i] for i in chosen], finished=score.finished, timed=self._timed,
            )  # fmt: skip
            rewards, estimates = done.rewards, done.estimates
            trees = [part.tree for mini in done.minibatches for part in mini.parts]
            metrics = done.metrics | {
                **self.data.named(*marks.metrics(rewards)),
                "length": float(np.mean([len(s.tokens) for s in done.rollout.samples])),
                "sampler_gap": estimates.sampler_gap,
                "tokens_tree": sum(tree.n_tokens for tree in trees),
                "tokens_padded": sum(tree.padded_tokens for tree in trees),
            }  # fmt: skip
            if allowed.answers is not None:
                metrics["constrained_mass"] = float(np.mean([s.mass for s in done.rollout.samples]))
            if estimates.kl is not None:
                metrics |= {"kl": estimates.kl, "kl_coef": state.kl_coef}
                if not critic_only:  # the policy stands still while the critic warms up
                    state.kl_coef = ppo.adapt_kl_coef(state.kl_coef, estimates.kl, len(rewards), self.config)
            if step == 0:
                state.first_kl, state.first_log_ratio = estimates.kl, metrics.get("first_log_ratio")
            state.samples += len(rewards)
            metrics["samples_per_s"] = state.samples / sum(state.seconds[k] for k in PPO_PHASES)
            self._record_samples(done.rollout, rewards, chosen)
            self._end_step(metrics, last=step + 1 == config.iterations)

    # -- what the stages share ----------------------------------------------------------------------------------------

    def _end_step(self, metrics: dict[str, float], *, last: bool) -> None:
        state, ppo_stage = self.state, self.state.stage == "ppo"
        if not torch.stack([p.isfinite().all() for p in self.model.trainable()]).all():
            raise UserError(
                "the adapter is no longer finite: training has diverged; what was saved is intact; begin anew with a lower "
                + ("--ppo-lr" if ppo_stage else "--sft-lr")
            )
        state.step += 1
        if ppo_stage:
            state.tokens_tree += int(metrics["tokens_tree"])
            state.tokens_padded += int(metrics["tokens_padded"])
            if last or state.step % self.config.eval_every == 0:
                metrics |= self._validate()
        self.tracker.step(state.step, metrics)
        try:
            self.stop.check()
        except Interrupted:
            self._save()
            raise
        # Where memory ran out, a run that is resumed must compute in the same pieces from here on.
        shrunk = (state.most_tokens, state.most_slots) != (self.model.most_tokens, self.model.most_slots)
        if last or shrunk or state.step % self.config.checkpoint_every == 0:
            self._save()

    def _validate(self) -> dict[str, float]:
        """Score the policy on the examples held out of train; keep it if its mean reward is the best so far."""
        if not len(self.data.valid):  # nothing to choose by: the newest is kept
            self._keep_best()
            return {}
        with self._timed("evaluate"):
            results = evaluate(self.model, self.data.valid)
        reward = mean_reward(results)
        if self.state.best_reward is None or reward > self.state.best_reward:
            self.state.best_reward = reward
            self._keep_best()
        of_tasks = {r.task.name: {"reward": r.reward, **r.scores} for r in results}
        score = float(np.mean([r.scores[r.task.metrics[0]] for r in results]))
        return self.data.named(
            {name: {f"valid_{key}": of[key] for key in of if key not in ("malformed", "n")} for name, of in of_tasks.items()},
            {"valid_reward": reward, "valid_score": score},
        )

    def _keep_best(self) -> None:
        self.best, self.state.best_step = self.model.state(), self.state.step
        self._save_adapter()

    def _save_adapter(self) -> None:
        adapter = {n: p.detach().cpu().contiguous() for n, p in self.model.adapter_tensors(POLICY).items()}
        checkpoint.save_adapter(self.run, adapter, self.model.peft_config)

    def _finish_stage(self, name: str, following: str, labels: int, *, skipped: bool = False) -> None:
        """Evaluate on dev, write the adapter, go on to the following stage. A stage without steps gets no row."""
        if not skipped:
            if name == "ppo":
                self.model.load_state(self.best)
            with self._timed("evaluate"):
                results = evaluate(self.model, self.data.dev, self.stop.check)
                row = with_interval(results, self.config.seed)
            self.state.stages[name] = {**row, "labels": labels}
            self.tracker.note(f"{name}: {shown(row)}")
            write_answers(self.run, name, results)
        if name == "sft" or following == "done":
            self._save_adapter()
        self.state.stage, self.state.step = following, 0
        self._new_optimizer()
        self._save()

    def _save(self) -> None:
        self.state.checkpoints += 1
        self.state.records = self.tracker.state()
        self.state.most_tokens, self.state.most_slots = self.model.most_tokens, self.model.most_slots
        moments = optim.optimizer_state(self.optimizer)
        saved = checkpoint.Checkpoint(asdict(self.state), self.model.state(), moments, self.best)
        checkpoint.save_checkpoint(self.run, self.state.checkpoints, saved)

    def restore(self, saved: checkpoint.Checkpoint, tracker: Tracker) -> None:
        """Stand where a checkpoint stood."""
        fingerprint = self.state.fingerprint
        other = changed(self.config.task, self.data.tasks, saved.state.get("task_file", ""))
        if other:
            raise UserError(f"run folder {self.run}: the task's file {other[0]} changed since it began; put it back")
        if saved.state.get("fingerprint") != fingerprint:
            raise UserError(
                f"run folder {self.run}: settings, data, base model, device or the versions of fastppo, torch, transformers, "
                "peft or bitsandbytes changed since the run began; it cannot go on to the same result"
            )
        self.state = State(**saved.state)
        tracker.restore(self.state.records)
        self.model.load_state(saved.model)
        self.model.most_tokens, self.model.most_slots = self.state.most_tokens, self.state.most_slots
        self.best = saved.best
        self._new_optimizer()
        optim.load_optimizer_state(self.optimizer, saved.optimizer)

    def _new_optimizer(self) -> None:
        """Each stage has its own moments; the learning rate is set step by step."""
        kind = "adamw" if self.state.stage == "sft" and self.config.sft.examples else self.config.ppo.optimizer
        self.optimizer = optim.make_optimizer(self.model.trainable(), 0.0, self.config.ppo.adam_eps, kind)

    def _check_gap(self, estimates: Estimates) -> None:
        gap = estimates.sampler_gap
        limit = self.config.sample.gap_limit
        if limit is None:
            limit = 1e-3 if self.model.backbone.head.weight.dtype == torch.float32 else 0.3
        self.state.sampler_gap_max = max(self.state.sampler_gap_max, gap)
        if gap > limit:
            raise UserError(
                f"the sampler's and the trainer's log-probs differ by {gap:.2g} nats, more than --sample-gap-limit {limit:g}: "
                "what is sampled is not what is trained; checkpoints are intact"
            )

    def _record_samples(self, rollout: Rollout, rewards: list[float], chosen: list[int]) -> None:
        """A few of the iteration's answers, for ``samples.jsonl``, as in ``answers/`` with the example's ``fields``."""
        k = self.config.ppo.samples
        for i in range(0, min(len(rewards), 4 * k), k):
            sample = rollout.samples[i]
            place = chosen[sample.prompt]
            example, task = self.data.train.examples[place], self.data.train.tasks[place]
            named = {"task": task.name} if self.data.several else {}
            self.tracker.samples(
                [{"step": self.state.step + 1, **named, "fields": example.fields, "label": example.label, "answer": sample.text,
                  "finish": sample.finish, "reward": rewards[i]}]
            )  # fmt: skip

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.state.seconds[phase] = self.state.seconds.get(phase, 0.0) + time.perf_counter() - start

    def _fingerprint(self) -> str:
        """Of everything that decides this run's numbers: settings, versions, device, prompts, labels, base weights."""
        settings = config_module.to_dict(self.config) | {"out": None}
        versions = _versions(self.model)
        digest = hashlib.sha256(repr((settings, versions, str(self.model.device), self.model.base.eos_ids)).encode())
        for part in (self.data.train, self.data.valid, self.data.dev):
            digest.update(repr((part.prompts, part.labels)).encode())
        digest.update(repr(list(self.data.answers(self.model).values())).encode())
        for name, parameter in self.model.base.model.named_parameters():
            if "lora_" not in name:
                digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(repr(_first_numbers(parameter)).encode())
                if getattr(parameter, "quant_state", None) is not None:  # 4 bits without their scales are half of the weight
                    digest.update(repr(parameter.quant_state.absmax.flatten()[:64].tolist()).encode())
        return digest.hexdigest()

    # -- what the user sees -------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        note = self.tracker.note
        first, *more = self.data.counts()
        note(f"run {self.run}: {first}")
        for line in more:
            note(line)
        if self.config.reward != RewardConfig():
            for task in self.data.tasks:
                if task.reward is not None:
                    note(f"rewards of task {task.name} are its own: --reward-preset and its like change nothing about them")
        if self.model.backbone.modules_because:
            note(f"{self.model.backbone.modules_because}; running transformers' modules, with the same results")
        if not self.model.backbone.packed:
            kind = type(self.model.base.model).__name__
            note(f"{kind}: {self.model.backbone.padded_because}; running padded, with the same results")
        for line in self.model.plan_notices:
            note(line)

    def setup(self) -> dict[str, Any]:
        """What ``setup.json`` holds from the first step on: what is trained, on what, and name and answer of each label id."""
        device, dtype = self.model.device, str(self.model.backbone.head.weight.dtype).removeprefix("torch.")
        facts = self.data.setup()
        data = facts.pop("data")
        return {
            "task": ",".join(task.name for task in self.data.tasks),
            "task_file": sources(self.data.tasks),
            **facts,
            "model": self.config.model or "built-in",
            "data": data,
            "seed": self.config.seed,
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "dtype": f"nf4, computed in {dtype}" if in_4_bits(self.model.base.model) else dtype,
            "packed": self.model.backbone.packed,
            "versions": {"python": platform.python_version(), **_versions(self.model)},
        }

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds: the set-up and the results."""
        state, seconds = self.state, self.state.seconds
        ppo_seconds = sum(seconds.get(k, 0.0) for k in PPO_PHASES)
        return {
            **self.setup(),
            "stages": state.stages,
            "best_step": state.best_step,
            "samples": state.samples,
            "samples_per_s": state.samples / ppo_seconds if ppo_seconds else None,
            "seconds": seconds,
            "tokens_tree": state.tokens_tree,
            "tokens_padded": state.tokens_padded,
            "tokens_ratio": state.tokens_tree / state.tokens_padded if state.tokens_padded else None,
            "sampler_gap_max": state.sampler_gap_max,
            "first_kl": state.first_kl,
            "first_log_ratio": state.first_log_ratio,
        }

    def _show(self, summary: Mapping[str, Any]) -> None:
        self.tracker.table(summary)
        if summary["tokens_ratio"] is not None:
            tree, padded = f"{summary['tokens_tree']:,}", f"{summary['tokens_padded']:,}"
            if summary["packed"]:
                computed = f"{tree} of {padded} padded ({summary['tokens_ratio']:.3f})"
            else:
                computed = f"{padded}, all padded"
            self.tracker.note(
                f"tokens computed {computed}  {summary['samples_per_s']:.0f} samples/s  "
                f"sampler gap at most {summary['sampler_gap_max']:.1e} nats"
            )
            first = (("KL", summary["first_kl"]), ("largest |log ratio|", summary["first_log_ratio"]))
            shown = ", ".join(f"{name} {value:g}" for name, value in first if value is not None)
            if shown:
                self.tracker.note(f"at the first PPO step: {shown}")
        self.tracker.note(f"wrote {self.run}; open {self.run / report.NAME} in a browser")


def _first_numbers(weight: torch.Tensor) -> list[float]:
    """Up to 64. Of the first rows alone: to flatten a weight that is a view between borders would copy all of it."""
    return torch.atleast_1d(weight.detach())[:64].flatten()[:64].float().tolist()


def _versions(model: ActorCritic) -> dict[str, str]:
    packages = ["torch", "transformers", "peft", "numpy"]
    if in_4_bits(model.base.model):
        packages.append("bitsandbytes")
    return {"fastppo": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def make_torch_repeatable() -> None:
    """The same bits on the same machine: what resuming rests on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over every new tensor
