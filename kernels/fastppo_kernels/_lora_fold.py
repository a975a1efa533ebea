"""LoRA projections of one input with each adapter folded into its weight, W + scale B A, as one product: for the CPU.

    [y_1 | y_2 | ..] = x [W_1'; W_2'; ..]^T + bias        W_i' = W_i + scale_i B_i A_i
    dX = [dY_1 | dY_2 | ..] [W_1'; W_2'; ..]
    dS_i = scale_i dY_i B_i        dA_i = dS_i^T x        dB_i = scale_i dY_i^T S_i

The weights are made again in backward rather than kept, and so is S_i = x A_i^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._lora_ops import Needs, Projection
from .frozen_linear import frozen_linear, onednn_linear, row_multiple


def fold(projections: Sequence[Projection]) -> Tensor:
    """[N, K], the folded weights on top of each other."""
    folded = [
        weight_NK if lora_A is None or lora_B is None else torch.addmm(weight_NK, lora_B, lora_A, alpha=scale)
        for weight_NK, lora_A, lora_B, _, scale in projections
    ]
    return folded[0] if len(folded) == 1 else torch.cat(folded)


def fold_bias(projections: Sequence[Projection]) -> Tensor | None:
    """[N], or None where no projection has a bias."""
    if all(projection.bias_N is None for projection in projections):
        return None
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias.to(w.dtype) for w, _, _, bias, _ in projections])


def forward(x_MK: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The outputs, side by side in one tensor."""
    y_MN = frozen_linear(x_MK, fold(projections), fold_bias(projections))
    return y_MN.split([len(projection.weight_NK) for projection in projections], 1)


def backward(
    grads: Sequence[Tensor | None], x_MK: Tensor, projections: Sequence[Projection], need_x: bool, needs: Sequence[Needs]
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """(dX, (dA, dB) of each projection); a gradient None adds nothing."""
    used = [i for i, grad_MN in enumerate(grads) if grad_MN is not None]
    if not used:
        return None, [(None, None)] * len(grads)
    parts = [grads[i].contiguous() for i in used]  # type: ignore[union-attr]
    grad_x_MK: Tensor | None = None
    if need_x:
        weight_NK = fold([projections[i] for i in used])
        grad_x_MK = frozen_linear(parts[0] if len(used) == 1 else torch.cat(parts, 1), weight_NK.t())
    found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(grads)
    adapted = [(i, part) for i, part in zip(used, parts, strict=True) if needs[i].lora_A or needs[i].lora_B]
    if not adapted:
        return grad_x_MK, found
    A_of = [projections[i].lora_A_RK for i, _ in adapted]
    ranks = [len(lora_A_RK) for lora_A_RK in A_of]  # type: ignore[arg-type]
    times = _thin_product(x_MK)
    s_RM = times(A_of[0] if len(adapted) == 1 else torch.cat(A_of), x_MK)  # type: ignore[arg-type]
    grad_s_RM = [times(projections[i].lora_B_NR.t(), part).mul_(projections[i].scale) for i, part in adapted]  # type: ignore[union-attr]
    grad_A_RK = times(grad_s_RM[0] if len(adapted) == 1 else torch.cat(grad_s_RM), x_MK.t()).split(ranks)
    for (i, part), s_part, grad_A in zip(adapted, s_RM.split(ranks), grad_A_RK, strict=True):
        grad_B = times(s_part, part.t()).mul_(projections[i].scale).t().contiguous() if needs[i].lora_B else None
        # Copies, so that no two gradients share memory.
        found[i] = (grad_A.clone() if len(adapted) > 1 else grad_A) if needs[i].lora_A else None, grad_B
    return grad_x_MK, found


def _thin_product(x_MK: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """few many^T for a few rows; M, the number of tokens, is the other size of one or the other.

    oneDNN takes two thirds of MKL's time, but makes code for each number of tokens: only where they are padded.
    """
    multiple = row_multiple(x_MK.device, x_MK.dtype)
    if multiple > 1 and len(x_MK) % multiple == 0:
        return lambda few, many: onednn_linear(few.contiguous(), many)
    return lambda few, many: few @ many.t()
