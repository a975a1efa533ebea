"""Ops after (and with) the LM head: log-probs, their PPO loss, drawing tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_checks.case import randint, randn
from fastppo_kernels import linear_logprob, linear_ppo_loss, linear_sample, sample, selective_log_softmax, token_logprob

from ..limits import bare, copy
from .op import OURS, Direction, Form, Inputs, Op, Results, by_device, parameter, size_of

_KL, _CLIP, _TEMPERATURE = 0.05, 0.2, 0.7


# -- log-probs of given logits -------------------------------------------------------------------------------------------


def _logits(device: torch.device, dtype: torch.dtype, *, rows: int, vocab: int) -> Inputs:
    """In 8 sequences: TRL goes through them one by one."""
    return {
        "logits": parameter(randn(device, 1, 8, rows // 8, vocab, scale=3.0, dtype=dtype)),
        "targets": randint(device, 2, vocab, 8, rows // 8),
    }


def _token_logprob(inputs: Inputs) -> Results:
    logprob, entropy = token_logprob(inputs["logits"], inputs["targets"])
    return {"logprob": logprob, "entropy": entropy}


def _plain_token_logprob(inputs: Inputs) -> Results:
    every = inputs["logits"].float().log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    return {"logprob": every.gather(-1, inputs["targets"][..., None]).squeeze(-1), "entropy": entropy}


def _trl_token_logprob(inputs: Inputs) -> Results:
    from trl.trainer.utils import entropy_from_logits

    return _trl_selective(inputs) | {"entropy": entropy_from_logits(inputs["logits"]).float()}


def _selective(inputs: Inputs) -> Results:
    return {"logprob": selective_log_softmax(inputs["logits"], inputs["targets"]).float()}


def _plain_selective(inputs: Inputs) -> Results:
    every = inputs["logits"].float().log_softmax(-1)
    return {"logprob": every.gather(-1, inputs["targets"][..., None]).squeeze(-1)}


def _trl_selective(inputs: Inputs) -> Results:
    from trl.trainer import utils

    return {"logprob": utils.selective_log_softmax(inputs["logits"], inputs["targets"]).float()}


def _passes_over_logits(inputs: Inputs, direction: Direction) -> Callable[[], Any]:
    """Read once; for backward read again, and a gradient written."""
    logits = inputs["logits"]
    return copy(size_of(logits) * (1 if direction == "fwd" else 3), logits.device)


# -- log-probs and the PPO loss from hidden states -----------------------------------------------------------------------


def _head(device: torch.device, dtype: torch.dtype, *, rows: int, hidden: int, vocab: int) -> Inputs:
    """In 8 sequences with an advantage each, as GRPO has it: the losses of others know no other."""
    inputs: Inputs = {
        "hidden": parameter(randn(device, 1, rows, hidden, dtype=dtype)),
        "weight": randn(device, 2, vocab, hidden, scale=3 * hidden**-0.5, dtype=dtype),
        "targets": randint(device, 3, vocab, rows),
        "advantages": randn(device, 4, 8).repeat_interleave(rows // 8),
        "mask": randint(device, 5, 8, rows) > 0,
    }
    with torch.no_grad():
        logprob, _ = linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"])
    # Half of the ratios are clipped, and none is so near to the clip that rounding decides whether it has a gradient.
    steps = torch.full((4, rows), 0.05, device=device) * torch.tensor([[-10.0], [-1.0], [1.0], [10.0]], device=device)
    inputs["old"] = logprob + steps.gather(0, randint(device, 6, 4, rows)[None]).squeeze(0)
    inputs["reference"] = logprob + randn(device, 7, rows, scale=0.1)
    return inputs


def _without_entropy(logprob: Tensor, entropy: Tensor) -> Results:
    """The entropy is reported, not differentiated: TRL's has no gradient."""
    return {"logprob": logprob, "entropy": entropy.detach()}


def _linear_logprob(inputs: Inputs) -> Results:
    return _without_entropy(*linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"]))


def _plain_linear_logprob(inputs: Inputs) -> Results:
    every = F.linear(inputs["hidden"], inputs["weight"]).float().log_softmax(-1)
    logprob = every.gather(-1, inputs["targets"][:, None]).squeeze(-1)
    return _without_entropy(logprob, -(every.detach().exp() * every.detach()).sum(-1))


def _trl_linear_logprob(inputs: Inputs) -> Results:
    """With the chunk of vocabulary that TRL's own trainer takes."""
    from trl.trainer.utils import _ChunkedLogProbFunction

    chunk = min(8192, len(inputs["weight"]))
    return _without_entropy(*_ChunkedLogProbFunction.apply(inputs["hidden"], inputs["weight"], inputs["targets"], 1.0, chunk))


def _liger_linear_logprob(inputs: Inputs) -> Results:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # Detached: it makes the gradient in its forward, where one is wanted.
    hidden = inputs["hidden"].detach()
    loss = liger_fused_linear_cross_entropy(hidden, inputs["weight"], inputs["targets"], reduction="none")
    return {"logprob": -loss.float()}


def _linear_ppo_loss(inputs: Inputs) -> Results:
    loss, _, logprob, entropy = linear_ppo_loss(
        inputs["hidden"], inputs["weight"], inputs["targets"], inputs["old"], inputs["advantages"], mask=inputs["mask"],
        clip_low=_CLIP, clip_high=_CLIP, ref_logprob=inputs["reference"], kl_coef=_KL,
    )  # fmt: skip
    return {"loss": loss, "logprob": logprob, "entropy": entropy}


def _clipped_loss(inputs: Inputs, found: Results) -> Results:
    logprob, mask = found["logprob"], inputs["mask"]
    ratio, reference = (logprob - inputs["old"]).exp(), inputs["reference"] - logprob
    surrogate = torch.max(-inputs["advantages"] * ratio, -inputs["advantages"] * ratio.clamp(1 - _CLIP, 1 + _CLIP))
    per_token = surrogate + _KL * (reference.exp() - reference - 1)
    loss = (per_token * mask).sum() / mask.sum()
    return {"loss": loss, "logprob": logprob.detach(), "entropy": found["entropy"]}


def _plain_linear_ppo_loss(inputs: Inputs) -> Results:
    return _clipped_loss(inputs, _plain_linear_logprob(inputs))


def _trl_linear_ppo_loss(inputs: Inputs) -> Results:
    return _clipped_loss(inputs, _trl_linear_logprob(inputs))


def _liger_linear_ppo_loss(inputs: Inputs) -> Results:
    """Its GRPO loss, which has an advantage for a sequence, and neither log-probs nor entropy among its results."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    by_sequence = {name: inputs[name].view(8, -1) for name in ("targets", "mask", "advantages", "old", "reference")}
    loss = LigerFusedLinearGRPOLoss(
        beta=_KL, compiled=inputs["hidden"].is_cuda, epsilon_low=_CLIP, epsilon_high=_CLIP, loss_type="bnpo"
    )  # on the CPU torch.compile takes longer than everything else here
    found = loss(
        inputs["hidden"].view(8, -1, inputs["hidden"].shape[1]), inputs["weight"], by_sequence["targets"],
        by_sequence["mask"].float(), by_sequence["advantages"][:, 0], ref_per_token_logps=by_sequence["reference"],
        old_per_token_logps=by_sequence["old"],
    )  # fmt: skip
    return {"loss": found[0]}


def _head_products(inputs: Inputs, direction: Direction) -> Callable[[], Any]:
    """Logits = hidden W^T, and for backward d hidden = d logits W: the frozen weight has no gradient."""
    hidden, weight = inputs["hidden"].detach(), inputs["weight"]
    logits = hidden.new_zeros(len(hidden), len(weight))
    forward = _into(hidden, weight.t(), logits)
    if direction == "fwd":
        return forward
    backward = bare(logits, weight)
    return lambda: (forward(), backward())


def _into(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Any]:
    return lambda: torch.mm(a, b, out=out)


# -- drawing tokens ------------------------------------------------------------------------------------------------------


def _draws(device: torch.device, dtype: torch.dtype, *, rows: int, vocab: int, top_k: int, top_p: float) -> Inputs:
    return {
        "logits": randn(device, 1, rows, vocab, scale=3.0, dtype=dtype),
        "ids": torch.arange(rows, device=device),
        "steps": torch.zeros(rows, dtype=torch.int64, device=device),
        "top_k": top_k,
        "top_p": top_p,
    }


def _rollout(device: torch.device, dtype: torch.dtype, *, rows: int, hidden: int, vocab: int) -> Inputs:
    return {
        "hidden": randn(device, 1, rows, hidden, dtype=dtype),
        "weight": randn(device, 2, vocab, hidden, scale=3 * hidden**-0.5, dtype=dtype),
        "ids": torch.arange(rows, device=device),
        "steps": torch.zeros(rows, dtype=torch.int64, device=device),
        "top_k": 0,
        "top_p": 1.0,
    }


def _draw(inputs: Inputs) -> dict[str, Any]:
    return {"temperature": _TEMPERATURE, "seed": 7, "sequence_ids_B": inputs["ids"], "step_B": inputs["steps"]}


def _sample(inputs: Inputs) -> Results:
    token, logprob = sample(inputs["logits"], top_k=inputs["top_k"], top_p=inputs["top_p"], **_draw(inputs))
    return {"token": token, "logprob": logprob}


def _linear_sample(inputs: Inputs) -> Results:
    token, logprob = linear_sample(inputs["hidden"], inputs["weight"], **_draw(inputs))
    return {"token": token, "logprob": logprob}


def _plain_draw(logits: Tensor, top_k: int, top_p: float) -> Results:
    """As transformers' `generate` does, warper by warper."""
    scaled = logits.float() / _TEMPERATURE
    kept = scaled
    if top_k:
        kept = kept.masked_fill(kept < kept.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, places = kept.sort(descending=False)
        left_out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        left_out[:, -1:] = False
        kept = kept.masked_fill(left_out.scatter(1, places, left_out), -torch.inf)
    token = torch.multinomial(kept.softmax(-1), 1)
    return {"token": token.squeeze(1), "logprob": scaled.log_softmax(-1).gather(1, token).squeeze(1)}


def _plain_sample(inputs: Inputs) -> Results:
    return _plain_draw(inputs["logits"], inputs["top_k"], inputs["top_p"])


def _plain_linear_sample(inputs: Inputs) -> Results:
    return _plain_draw(F.linear(inputs["hidden"], inputs["weight"]), 0, 1.0)


def _of_draw(inputs: Inputs, results: Results) -> Results:
    """Draws differ; that the log-prob is the drawn token's, and that the token may be drawn, is the same for all."""
    logits = inputs["logits"] if "logits" in inputs else F.linear(inputs["hidden"], inputs["weight"])
    scaled = logits.float() / _TEMPERATURE
    token = results["token"][:, None]
    kept = scaled >= scaled.topk(inputs["top_k"] or scaled.shape[1]).values[:, -1:]
    error = results["logprob"] - scaled.log_softmax(-1).gather(1, token).squeeze(1)
    return {"logprob": 1 + error, "allowed": kept.gather(1, token).float()}


def ops() -> list[Op]:
    heads = by_device(
        _head,
        {"T512 V4096 H128": {"rows": 512, "hidden": 128, "vocab": 4096}},
        {"T8192 V152064 H3584": {"rows": 8192, "hidden": 3584, "vocab": 152064}},
    )
    logits = by_device(
        _logits,
        {"T512 V4096": {"rows": 512, "vocab": 4096}},
        {"T8192 V152064": {"rows": 8192, "vocab": 152064}},
    )
    # Liger's fused cross entropy gives a gradient for a summed-up loss only, so that forward alone is compared.
    liger_forward = Form(_liger_linear_logprob, "Liger-Kernel", on_cpu=False, directions=("fwd",))
    rows = {"rows": 16, "vocab": 4096}, {"rows": 256, "vocab": 152064}
    everything, few = {"top_k": 0, "top_p": 1.0}, {"top_k": 50, "top_p": 0.9}
    return [
        Op(
            "linear_ppo_loss",
            "head",
            heads,
            {
                OURS: _linear_ppo_loss,
                "torch": _plain_linear_ppo_loss,
                "TRL": Form(_trl_linear_ppo_loss, "TRL"),
                "Liger-Kernel": Form(_liger_linear_ppo_loss, "Liger-Kernel"),
            },
            _head_products,
            "the two bare GEMMs, hidden W^T and d logits W",
            directions=("fwd+bwd",),
            compiled_on_cpu=True,
        ),
        Op(
            "linear_logprob",
            "head",
            heads,
            {
                OURS: _linear_logprob,
                "torch": _plain_linear_logprob,
                "TRL": Form(_trl_linear_logprob, "TRL"),
                "Liger-Kernel": liger_forward,
            },
            _head_products,
            "the bare GEMMs, hidden W^T and for backward d logits W",
        ),
        Op(
            "token_logprob",
            "logits",
            logits,
            {OURS: _token_logprob, "torch": _plain_token_logprob, "TRL": Form(_trl_token_logprob, "TRL")},
            _passes_over_logits,
            "one read of the logits; for backward one more and a write (a copy of as many bytes)",
            compiled_on_cpu=True,
        ),
        Op(
            "selective_log_softmax",
            "logits",
            logits,
            {OURS: _selective, "torch": _plain_selective, "TRL": Form(_trl_selective, "TRL")},
            _passes_over_logits,
            "one read of the logits; for backward one more and a write (a copy of as many bytes)",
        ),
        Op(
            "sample",
            "sampling",
            by_device(
                _draws,
                {"B16 V4096": rows[0] | everything, "B16 V4096 top-k 50, top-p 0.9": rows[0] | few},
                {"B256 V152064": rows[1] | everything, "B256 V152064 top-k 50, top-p 0.9": rows[1] | few},
            ),
            {OURS: _sample, "torch": _plain_sample},
            lambda inputs, direction: copy(size_of(inputs["logits"]), inputs["logits"].device),
            "one read of the logits (a copy of as many bytes)",
            directions=("fwd",),
            comparable=_of_draw,
        ),
        Op(
            "linear_sample",
            "sampling",
            by_device(
                _rollout,
                {"B16 V4096 H128": {"rows": 16, "hidden": 128, "vocab": 4096}},
                {"B64 V152064 H3584": {"rows": 64, "hidden": 3584, "vocab": 152064}},
            ),
            {OURS: _linear_sample, "torch": _plain_linear_sample},
            _head_products,
            "the bare GEMM hidden W^T",
            directions=("fwd",),
            comparable=_of_draw,
        ),
    ]
