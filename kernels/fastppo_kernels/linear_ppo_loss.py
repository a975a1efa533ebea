"""The LM head, the log-probabilities after it and PPO's policy loss of them in one operation."""

import math
from typing import get_args

import torch
from torch import Tensor

from . import _head_ops
from ._checks import accumulate_dtype, check_device, check_float, check_mask, check_mask_argument, check_shape
from ._dispatch import Backend
from .kl import KLEstimator
from .linear_logprob import Head, checked_head
from .ppo_loss import check_denominator, check_policy_settings, ppo_policy_loss


def _ahead(head: Head, entropy_coef: float) -> int:
    """What the torch form makes for the gradient in its forward, see `_head_ops.linear_logprob`.

    That takes a frozen head and no softcap; in half precision mean and target would lose in their difference what they share.
    """
    hidden_RH, *parameters = head[:5]
    trained = any(parameter is not None and parameter.requires_grad for parameter in parameters)
    exact = hidden_RH.dtype == head.weight_VH.dtype == accumulate_dtype(head.weight_VH.dtype)
    if not (torch.is_grad_enabled() and hidden_RH.requires_grad and exact) or trained or head.softcap is not None:
        return 0
    return 2 if entropy_coef else 1


def linear_ppo_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_A: Tensor,
    old_logprob_A: Tensor,
    advantages_A: Tensor,
    *,
    rows_A: Tensor | None = None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    lora_scale: float = 1.0,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    denominator: float | Tensor | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """`ppo_policy_loss` of what `linear_logprob` gives, entropy included: the torch form is just that, except that with a
    frozen head of float32 (or float64) without softcap backward neither computes the logits again nor any product with them.

    The Triton form makes the gradients in the forward, where a chunk of logits is at hand anyway: GEMM, one kernel that turns
    the logits into their gradient in place, GEMM. So the logits are computed once rather than twice, and backward only
    multiplies. What the loss needs of other tokens (the denominator) has to be known beforehand; everything else is a matter
    of single rows.

    Args:
        hidden_RH, weight_VH, targets_A, rows_A, bias, lora_A, lora_B, lora_scale, temperature, softcap, logit_scale,
            chunk_rows, logits_dtype: as in `linear_logprob`.
        old_logprob_A, advantages_A, and mask, ref_logprob where given: [A]; these and clip_low, clip_high, dual_clip,
            entropy_coef, kl_coef, kl_estimator, denominator: as in `ppo_policy_loss`.
        backend: as in `linear_logprob`.

    Returns:
        (loss, metrics, logprob_A, entropy_A): loss 0-d float32 (float64 for a float64 head), differentiable once, in the
        hidden state, the weight, the bias and the adapter; each gradient is made only where it is required, and none of them
        where gradients are off. metrics as in `ppo_policy_loss`. logprob_A and entropy_A [A] are detached; masked actions
        have theirs, too.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    head = checked_head(
        hidden_RH, weight_VH, targets_A, rows_A, bias, lora_A, lora_B, lora_scale, temperature, softcap, logit_scale,
        chunk_rows, logits_dtype,
    )  # fmt: skip
    constants = {"old_logprob": old_logprob_A, "advantages": advantages_A, "ref_logprob": ref_logprob}
    check_mask_argument(mask, "targets", targets_A)
    for name, tensor in constants.items():
        if tensor is not None:
            check_float(name, tensor)
            check_shape(name, tensor, tuple(targets_A.shape), "that of targets")
            check_device(name, tensor, "targets", targets_A)
    settings = (clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator)
    check_policy_settings(*settings, ref_logprob)
    check_denominator(denominator, targets_A)
    if not head.use_triton(backend):
        ahead = _ahead(head, entropy_coef)
        logprob_A, entropy_A = _head_ops.call_linear_logprob(*head, False, ahead, False)[:2]
        loss, metrics = ppo_policy_loss(
            logprob_A, old_logprob_A, advantages_A, mask=mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
            entropy=entropy_A, entropy_coef=entropy_coef, ref_logprob=ref_logprob, kl_coef=kl_coef, kl_estimator=kl_estimator,
            denominator=denominator, backend="torch",
        )  # fmt: skip
        return loss, metrics, logprob_A.detach(), entropy_A.detach()

    mask_A = check_mask(mask, "targets", targets_A)
    if isinstance(denominator, Tensor):
        count = denominator.detach().float()
    elif denominator is not None:
        count = torch.full((), denominator, dtype=torch.float32, device=targets_A.device)
    else:
        count = mask_A.sum().clamp(min=1).float()
    old, advantages, reference = (None if t is None else t.detach().float().contiguous() for t in constants.values())
    assert old is not None and advantages is not None
    numbers = [float(x) for x in (clip_low, clip_high, math.inf if dual_clip is None else dual_clip, entropy_coef, kl_coef)]
    kl_kind = 1 + get_args(KLEstimator).index(kl_estimator)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in head[:5]]
    loss, sums, logprob_A, entropy_A, *_ = _head_ops.linear_ppo_loss(
        *head, old, advantages, mask_A.contiguous().view(torch.uint8), reference, count, numbers, kl_kind, needs
    )
    metrics = dict(zip(_head_ops.METRICS, sums.detach().unbind(), strict=True))
    if ref_logprob is None:
        del metrics["kl_ref_sum"]
    return loss, metrics, logprob_A.detach(), entropy_A.detach()
