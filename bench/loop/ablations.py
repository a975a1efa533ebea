"""Our own loop with each of its ideas switched off in turn, side by side in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.memory import peak
from bench.record import Figure, Record
from fastppo import trainer
from fastppo.algorithms import ppo
from fastppo.batch.rollout import Rollout, Sample
from fastppo.batch.token_tree import TokenTree
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.attention import NAME
from fastppo.model.backbone import Backbone
from fastppo.rollout.sampler import Sampling
from fastppo_kernels import ppo_policy_loss, unpatch_peft

from .compare import FEWEST, WARM_UP
from .ours import FastppoLoop
from .workloads import Workload

FULL = "full"


@contextmanager
def without_tree(loop: FastppoLoop) -> Iterator[None]:
    """The update computes a padded batch, a row for each sample."""
    backbone = loop.model.backbone
    with mock.patch.object(backbone, "hidden", partial(_padded_hidden, backbone)), _own_attention(loop, "sdpa"):
        yield


def _padded_hidden(backbone: Backbone, tree: TokenTree, rows_R: Tensor | None = None, recompute: None = None) -> Tensor:
    """recompute: as in `Backbone.hidden`; here everything is kept."""
    rows = torch.as_tensor(np.maximum(tree.paths, 0), device=tree.token_ids.device)
    real = torch.as_tensor(tree.paths >= 0, device=rows.device)
    ids = torch.where(real, tree.token_ids[rows], 0)
    out = backbone.trunk(input_ids=ids, attention_mask=real.long(), use_cache=False).last_hidden_state
    # Rows of the tree are read from the first sample that passes through them; the others have equal ones.
    places = np.nonzero(tree.paths >= 0)
    _, first = np.unique(tree.paths[places], return_index=True)
    flat = torch.as_tensor(places[0][first] * tree.paths.shape[1] + places[1][first], device=out.device)
    return out.flatten(0, 1)[flat if rows_R is None else flat[rows_R]]


@contextmanager
def _own_attention(loop: FastppoLoop, name: str) -> Iterator[None]:
    """The sampler sets it back for itself: it always decodes over its own cache."""
    model = loop.model.base.model
    sampler = trainer.generate

    def generate(*args: Any, **kwargs: Any) -> Rollout:
        model.set_attn_implementation(NAME)
        try:
            return sampler(*args, **kwargs)
        finally:
            model.set_attn_implementation(name)

    try:
        with mock.patch.object(trainer, "generate", generate):
            yield
    finally:
        model.set_attn_implementation(NAME)


@contextmanager
def with_whole_logits(_: FastppoLoop) -> Iterator[None]:
    """The logits of all tokens at once, differentiated by autograd, instead of `linear_ppo_loss`."""
    with mock.patch.object(ppo, "linear_ppo_loss", _plain_ppo_loss):
        yield


def _plain_ppo_loss(
    hidden_RH: Tensor, weight: Tensor, targets: Tensor, old_logprob: Tensor, advantages: Tensor, *, rows_A: Tensor,
    bias: Tensor | None, temperature: float, softcap: float | None, logit_scale: float, **loss: Any,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
    logits = torch.nn.functional.linear(hidden_RH, weight, bias).float() * logit_scale / temperature
    all_logprobs = logits.log_softmax(-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)[rows_A]
    logprob = all_logprobs[rows_A].gather(1, targets[:, None])[:, 0]
    value, metrics = ppo_policy_loss(logprob, old_logprob, advantages, entropy=entropy, **loss)
    return value, metrics, logprob.detach(), entropy.detach()


@contextmanager
def without_kernels(loop: FastppoLoop) -> Iterator[None]:
    """transformers' and peft's own layers, and the torch form of every op; attention by its definition (SDPA on a GPU)."""
    attention = "torch" if loop.device.type == "cpu" else "sdpa"
    with mock.patch.dict(os.environ, {"FASTPPO_KERNELS": "torch", "FASTPPO_ATTENTION": attention}):
        with mock.patch.object(loop.model.backbone, "llama", None):
            yield


@contextmanager
def without_reuse(_: FastppoLoop) -> Iterator[None]:
    """The first optimizer step computes again what the estimates computed."""
    estimate = ppo.estimate
    with mock.patch.object(ppo, "estimate", lambda *args, **kwargs: estimate(*args, **kwargs | {"before_update": False})):
        yield


@contextmanager
def without_sampler(loop: FastppoLoop) -> Iterator[None]:
    """transformers' ``generate`` on left-padded prompts, in the place of our sampler."""
    with mock.patch.object(trainer, "generate", _transformers_generate):
        yield


@torch.no_grad()
def _transformers_generate(
    model: ActorCritic, prompts: list[list[int]], samples: int, sampling: Sampling, *, seed: int, first_id: int = 0,
    answers: None = None, roots: None = None, finished: None = None,
) -> Rollout:  # fmt: skip
    base = model.base.model
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    torch.manual_seed(seed + first_id)
    base.set_attn_implementation("sdpa")
    try:
        out = base.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens, num_return_sequences=samples, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    finally:
        base.set_attn_implementation(NAME)
    tokens = out.sequences[:, longest:]
    logprobs = [
        (logits.float() / sampling.temperature).log_softmax(-1).gather(1, tokens[:, i : i + 1])[:, 0]
        for i, logits in enumerate(out.logits)
    ]
    return Rollout(prompts, [
        Sample(i // samples, row, of_row, "length", "")
        for i, (row, of_row) in enumerate(zip(tokens.tolist(), torch.stack(logprobs, 1).tolist(), strict=True))
    ])  # fmt: skip


@contextmanager
def without_trunk(loop: FastppoLoop) -> Iterator[None]:
    """transformers' modules instead of our own forward of the trunk, with our LoRA layers and attention."""
    with mock.patch.object(loop.model.backbone, "llama", None):
        yield


Idea = tuple[str, str, Callable[[FastppoLoop], AbstractContextManager[None]] | None, dict[str, str]]
IDEAS: list[Idea] = [
    ("own trunk", "transformers' modules, with our LoRA layers and attention", without_trunk, {}),
    ("tree", "a row for each sample in estimates and update; without own trunk as well", without_tree, {}),
    ("shared critic", "the critic has an adapter and a pass of its own", None, {"value.trunk": "own"}),
    ("chunked head", "all logits of the update at once, through autograd", with_whole_logits, {}),
    ("kernels", "transformers' and peft's layers, the plain form of every op", without_kernels, {}),
    ("sampler", "transformers' generate on padded prompts", without_sampler, {}),
    ("reused forward", "the first step computes again what the estimates computed", without_reuse, {}),
]


def measure(
    record: Record, out: Path, workload: Workload, model: str, device: torch.device, dtype: torch.dtype, deadline: float,
    prompts: list[list[list[int]]],
) -> None:  # fmt: skip
    """Rounds of one iteration each, the full engine and each idea's absence in turn; the order rotates."""
    loops = {FULL: FastppoLoop(model, workload, len(prompts), device, dtype)}
    contexts: dict[str, Callable[[FastppoLoop], AbstractContextManager[None]] | None] = {FULL: None}
    for name, _, context, settings in IDEAS:
        loops[name] = FastppoLoop(model, workload, len(prompts), device, dtype, settings)
        contexts[name] = context
    unpatch_peft(loops["kernels"].model.peft)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)

    def run(name: str, i: int) -> float:
        with ExitStack() as stack:
            if contexts[name] is not None:
                stack.enter_context(contexts[name](loops[name]))  # type: ignore[misc]
            return loops[name].iterate(prompts[i])

    for i in range(len(prompts)):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(run(name, i))
        print(f"round {i + 1}: " + ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items()), flush=True)
        if time.monotonic() > deadline and i >= WARM_UP + FEWEST - 1:
            if i + 1 < len(prompts):
                record.notes.append(f"stopped after {i + 1} of {len(prompts)} rounds: no more time")
            break
    counted = {name: times[WARM_UP:] for name, times in seconds.items()}
    record.data["rows"] = rows = []
    for name in names:
        tensors = peak(lambda name=name: run(name, -1), device) / 2**20  # type: ignore[misc]
        rates = Figure.of([workload.batch / s for s in counted[name]], "samples/s", "higher" if name == FULL else None)
        ratios = [off / full for off, full in zip(counted[name], counted[FULL], strict=True)]
        if name == FULL:
            record.figures["full samples/s"], record.figures["full: MiB"] = rates, Figure(tensors, "MiB", "lower")
        else:
            record.figures[f"without {name}: ratio"] = Figure.of(ratios, "ratio")
            record.figures[f"without {name}: MiB"] = Figure(tensors, "MiB")
        note = next((text for idea, text, *_ in IDEAS if idea == name), "")
        ratio = Figure.of(ratios, "ratio").value
        rows.append({"idea": name, "samples_per_s": rates.value, "ratio": ratio, "peak_MiB": tensors, "note": note})
        record.save(out)
