"""TRL's side of the comparison: its own, unchanged PPOTrainer with LoRA on the same model, prompts and reward.

TRL's last release with PPO is 1.12. Its ``bf16=True`` does nothing on transformers 5, so the models are made in bf16; its
``gradient_checkpointing`` is never switched on, so it is set to off; an optimizer step is taken once an epoch whatever
``num_mini_batches`` is. The critic is a second, whole model, trained in full, as in TRL's own examples; one with LoRA is not
measured.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.models import config_of, random_model

from .ours import synchronize
from .workloads import ALPHA, EPOCHS, LR, RANK, Workload, good_tokens

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class _Reward(nn.Module):
    """The toy rule as TRL wants a reward model: a backbone that gives hidden states, and ``score`` of them."""

    base_model_prefix = "backbone"

    class Backbone(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(hidden_states=[torch.stack([input_ids, attention_mask.long()], -1)])

    def __init__(self, good: Tensor, judged: int):
        super().__init__()
        self.backbone, self.judged = self.Backbone(), judged
        self.register_buffer("good", good)

    def score(self, states: Tensor) -> Tensor:
        good = self.good[states[:, -self.judged :, 0]] * states[:, -self.judged :, 1]  # type: ignore[index]
        share = good.mean(1, keepdim=True).expand(-1, states.shape[1])
        return share[..., None]


class TrlLoop:
    """One run of TRL's PPO, whose loop is inside `run`; between two of its iterations it calls back.

    curve: mean reward of each iteration. phases: seconds of the iterations that were timed, by what TRL was doing. gc_seconds:
    of them, those in ``gc.collect``.
    """

    name = "trl"

    def __init__(
        self, model: str, workload: Workload, prompts: list[list[list[int]]], device: torch.device, dtype: torch.dtype,
        micro_batch: int,
    ):  # fmt: skip
        from peft import LoraConfig
        from transformers import Qwen2ForSequenceClassification
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        self.device, self.workload, self.module = device, workload, ppo_trainer
        self.curve: list[float] = []
        self.seconds: list[float] = []
        self.phases: dict[str, float] = {}
        self._timing = False
        policy = random_model(model, device, dtype)
        config = config_of(model)
        config.num_labels = 1
        with device:
            critic = Qwen2ForSequenceClassification._from_config(config, dtype=dtype)
        critic.model.load_state_dict(policy.model.state_dict())  # as one would begin from the same checkpoint
        nn.init.zeros_(critic.score.weight)
        pad = config.vocab_size  # ids that no model can say: nothing ends early, in both engines
        args = PPOConfig(
            output_dir=tempfile.gettempdir(), per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=workload.batch // micro_batch, num_mini_batches=1, num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=min(64, workload.batch), response_length=workload.response,
            total_episodes=workload.batch * len(prompts), num_sample_generations=0, learning_rate=LR, kl_coef=workload.kl_coef,
            temperature=1.0, stop_token=None, missing_eos_penalty=None, gradient_checkpointing=False, bf16=False,
            use_cpu=device.type == "cpu", report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = [prompt for iteration in prompts for prompt in iteration for _ in range(workload.samples)]
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.trainer = PPOTrainer(
                args=args, processing_class=SimpleNamespace(pad_token_id=pad, eos_token_id=pad + 1), model=policy,
                ref_model=None, reward_model=_Reward(good_tokens(policy), workload.judged), value_model=critic,
                train_dataset=rows, data_collator=lambda batch: _left_padded(batch, pad), peft_config=lora,
            )  # fmt: skip
        # In order, so that both engines see the same prompts in the same iteration.
        self.trainer.dataloader = DataLoader(rows, workload.batch, collate_fn=self.trainer.data_collator)  # type: ignore[arg-type]

    def run(self, between: Callable[[int], bool]) -> None:
        """All iterations. After each, ``between`` gets its number (from 0) outside of the clock; it says whether the next one's
        phases are to be timed."""
        self.trainer.log = lambda metrics, *_, **__: self._finish(metrics, between)
        with self._instruments(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self._begin()
            self.trainer.train()

    def all(self) -> TrlLoop:
        """All iterations, with nothing in between."""
        self.run(lambda _: False)
        return self

    def _begin(self) -> None:
        synchronize(self.device)
        self._start = time.perf_counter()

    def _finish(self, metrics: dict[str, float], between: Callable[[int], bool]) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._start)
        self.curve.append(float(metrics["objective/scores"]))
        with torch.enable_grad(), contextlib.redirect_stdout(sys.__stdout__):  # TRL logs with gradients off
            self._timing = between(len(self.curve) - 1)
        self._begin()

    @contextmanager
    def _instruments(self) -> Iterator[None]:
        """Clocks around the functions that TRL's loop calls; they only run in iterations whose phases are wanted."""
        module, trainer = self.module, self.trainer
        names = {
            "batch_generation": lambda *_, **__: "generation",
            "forward": lambda *_, **__: "update: forward" if torch.is_grad_enabled() else "reference",
            "get_reward": lambda model, *_, **__: "value" if model is trainer.value_model else "reward",
            "empty_cache": lambda *_, **__: "empty_cache",
        }
        kept = {name: getattr(module, name) for name in names}
        gc, backward, step = module.gc, trainer.accelerator.backward, trainer.optimizer.step
        try:
            for name, phase in names.items():
                setattr(module, name, self._clocked(kept[name], phase))
            module.gc = SimpleNamespace(collect=self._clocked(gc.collect, lambda *_, **__: "gc.collect"))
            trainer.accelerator.backward = self._clocked(backward, lambda *_, **__: "update: backward")
            trainer.optimizer.step = self._clocked(step, lambda *_, **__: "update: optimizer")
            yield
        finally:
            for name, function in kept.items():
                setattr(module, name, function)
            module.gc, trainer.accelerator.backward, trainer.optimizer.step = gc, backward, step

    def _clocked(self, function: Callable[..., Any], phase: Callable[..., str]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if not self._timing:
                return function(*args, **kwargs)
            name = phase(*args, **kwargs)
            synchronize(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(self.device)
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
            return result

        return clocked


def _left_padded(batch: list[list[int]], pad: int) -> dict[str, Tensor]:
    longest = max(map(len, batch))
    return {"input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in batch])}
