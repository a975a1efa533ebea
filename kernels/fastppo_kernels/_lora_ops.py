"""LoRA projections of one input as plain matrix products, and the choice between those and the Triton GEMM.

    S = mask * (x A^T)         y = x W^T + bias + scale S B^T
    dS = scale mask * (dY B)   dX = dY W + dS A   dA = dS^T x   dB = scale dY^T S

S is kept for the backward: [M, R] is small. The frozen weight has no gradient unless it asks for one. A row whose mask is 0
gets exactly the base output, whatever the adapter holds: entries of A and B that are not finite are taken as 0 when there is
a mask, and the columns of S (or dS) they would have met become NaN in the rows that do use them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _measure
from ._checks import accumulate_dtype
from ._products import ROWS_WITH_S, masked, no_autocast, product


class Projection(NamedTuple):
    """One linear map with its adapter; `lora_A_RK` and `lora_B_NR` are both None where there is none."""

    weight_NK: Tensor
    lora_A_RK: Tensor | None
    lora_B_NR: Tensor | None
    bias_N: Tensor | None
    scale: float


# Tensors of a projection where they are listed flat: weight, A, B, bias.
FIELDS = 4


def projections_of(flat: Sequence[Tensor | None], scales: Sequence[float]) -> list[Projection]:
    """Projections from `FIELDS` tensors and a scale of each."""
    found = []
    for i, scale in enumerate(scales):
        weight_NK, lora_A_RK, lora_B_NR, bias_N = flat[FIELDS * i : FIELDS * (i + 1)]
        assert weight_NK is not None
        found.append(Projection(weight_NK, lora_A_RK, lora_B_NR, bias_N, scale))
    return found


def _flat(projections: Sequence[Projection]) -> list[Tensor | None]:
    return [tensor for weight, lora_A, lora_B, bias, _ in projections for tensor in (weight, lora_A, lora_B, bias)]


class Needs(NamedTuple):
    """Which gradients of a projection are wanted."""

    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of a projection, None where not wanted."""

    weight_NK: Tensor | None
    lora_A_RK: Tensor | None
    lora_B_NR: Tensor | None
    bias_N: Tensor | None


class Adapter(NamedTuple):
    """A and B in the dtype of the products; `poison_R` is None without a mask, see `_adapter`."""

    lora_A_RK: Tensor
    lora_B_NR: Tensor
    poison_R: Tensor | None


def _adapter(projection: Projection, dtype: torch.dtype, masked: bool) -> Adapter:
    """The adapter for the products; with a mask free of entries that are not finite.

    Where one was, in a row of A or a column of B, `poison_R` is NaN, else 0: added to S before the mask it keeps a broken
    adapter visible in the rows that use it, while those that do not are safe from 0 * NaN in the products.
    """
    assert projection.lora_A_RK is not None and projection.lora_B_NR is not None
    lora_A_RK, lora_B_NR = projection.lora_A_RK.to(dtype), projection.lora_B_NR.to(dtype)
    if not masked:
        return Adapter(lora_A_RK, lora_B_NR, None)
    finite_R = lora_A_RK.isfinite().all(1) & lora_B_NR.isfinite().all(0)
    poison_R = torch.where(finite_R, 0.0, torch.nan).to(dtype)
    return Adapter(lora_A_RK.nan_to_num(0.0, 0.0, 0.0), lora_B_NR.nan_to_num(0.0, 0.0, 0.0), poison_R)


def _adapters(projections: Sequence[Projection], dtype: torch.dtype, masked: bool) -> list[Adapter]:
    return [_adapter(projection, dtype, masked) for projection in projections if projection.lora_A_RK is not None]


def _stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def apply_mask(rows_MR: Tensor, mask_MG: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """mask * S for the S of `adapters` side by side; exactly 0 where the mask is.

    Each adapter's columns are split evenly over the G columns of the mask.
    """
    if mask_MG is None:
        return rows_MR
    rows, groups = mask_MG.shape
    if groups > 1 and len(adapters) > 1:
        parts = rows_MR.split([adapter.lora_A_RK.shape[0] for adapter in adapters], 1)
        return torch.cat([apply_mask(part, mask_MG, [each]) for part, each in zip(parts, adapters, strict=True)], 1)
    poison_R = _stack([adapter.poison_R for adapter in adapters if adapter.poison_R is not None], 0)
    columns = rows_MR.shape[1] // groups
    rows_MGC = (rows_MR + poison_R).view(rows, groups, columns)
    return masked(rows_MGC, mask_MG.unsqueeze(2)).view(rows_MR.shape)


def forward(x_MK: Tensor, mask_MG: Tensor | None, projections: Sequence[Projection]) -> tuple[list[Tensor], list[Tensor]]:
    """(y of each projection, S): on CUDA one S of all adapters side by side, else one of each."""
    dtype = x_MK.dtype
    adapters = _adapters(projections, dtype, mask_MG is not None)
    if x_MK.is_cuda:
        kept = [_shared_s(x_MK, mask_MG, adapters)] if adapters else []
    else:  # as peft multiplies, to the bit
        kept = [apply_mask(F.linear(x_MK, adapter.lora_A_RK), mask_MG, [adapter]) for adapter in adapters]
    parts = iter(zip(adapters, _parts(kept, adapters), strict=True))
    outputs = []
    for projection in projections:
        y_MN = F.linear(x_MK, projection.weight_NK.to(dtype), _bias(projection, dtype))
        if projection.lora_A_RK is not None:
            adapter, s_MR = next(parts)
            if x_MK.is_cuda:
                y_MN.addmm_(s_MR, adapter.lora_B_NR.t(), alpha=projection.scale)
            else:  # peft rounds the scaled product before it adds it
                y_MN.add_(F.linear(s_MR, adapter.lora_B_NR).mul_(projection.scale))
        outputs.append(y_MN)
    return outputs, kept


def _bias(projection: Projection, dtype: torch.dtype) -> Tensor | None:
    return None if projection.bias_N is None else projection.bias_N.to(dtype)


def _shared_s(x_MK: Tensor, mask_MG: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """S of all adapters side by side: one product reads x once."""
    return apply_mask(x_MK @ _stack([adapter.lora_A_RK for adapter in adapters], 0).t(), mask_MG, adapters)


def _parts(kept: Sequence[Tensor], adapters: Sequence[Adapter]) -> list[Tensor]:
    """S of each adapter, from what `forward` kept."""
    if len(kept) == len(adapters):
        return list(kept)
    return list(kept[0].split([adapter.lora_A_RK.shape[0] for adapter in adapters], 1))


def backward(
    grads: Sequence[Tensor | None],
    x_MK: Tensor | None,
    mask_MG: Tensor | None,
    projections: Sequence[Projection],
    kept: Sequence[Tensor],
    need_x: bool,
    needs: Sequence[Needs],
    choice: str,
) -> tuple[Tensor | None, list[Gradients]]:
    """(dX, the gradients of each projection). A projection whose output was not used has the gradient None and adds nothing.

    `x_MK` may be None where no weight and no A needs a gradient, `kept` empty where no B does.
    """
    dtype = next(grad_MN.dtype for grad_MN in grads if grad_MN is not None)
    adapters = _adapters(projections, dtype, mask_MG is not None)
    parts = iter(_parts(kept, adapters)) if kept else None
    each_adapter = iter(adapters)
    of_weight: dict[int, Tensor] = {}
    of_A: dict[int, Tensor] = {}
    of_B: dict[int, Tensor] = {}
    of_bias: dict[int, Tensor] = {}
    factors: list[tuple[Tensor, Tensor]] = []  # dY and W of each output that was used
    used: list[tuple[int, Adapter, Tensor]] = []  # (projection, adapter, dY B) of each that has an adapter
    for i, (projection, grad_MN, need) in enumerate(zip(projections, grads, needs, strict=True)):
        adapter = next(each_adapter) if projection.lora_A_RK is not None else None
        s_MR = next(parts) if adapter is not None and parts is not None else None
        if grad_MN is None:
            continue
        factors.append((grad_MN, projection.weight_NK.to(dtype)))
        if need.weight and x_MK is not None:
            of_weight[i] = product(grad_MN.t(), x_MK, projection.weight_NK.dtype)
        if need.bias and projection.bias_N is not None:
            of_bias[i] = grad_MN.sum(0, dtype=accumulate_dtype(dtype)).to(projection.bias_N.dtype)
        if need.lora_B and s_MR is not None and projection.lora_B_NR is not None:
            of_B[i] = product(grad_MN.t(), s_MR, projection.lora_B_NR.dtype).mul_(projection.scale)
        if adapter is not None and (need.lora_A or need_x):
            used.append((i, adapter, (grad_MN @ adapter.lora_B_NR).mul_(projection.scale)))
    grad_s_MR: Tensor | None = None
    if used:
        grad_s_MR = apply_mask(_stack([part for _, _, part in used], 1), mask_MG, [adapter for _, adapter, _ in used])
        of_A = _grad_A(grad_s_MR, x_MK, [(i, adapter, projections[i], needs[i]) for i, adapter, _ in used])
    grad_x_MK = _chosen_grad_x(factors, grad_s_MR, [adapter for _, adapter, _ in used], choice) if need_x else None
    return grad_x_MK, [Gradients(of_weight.get(i), of_A.get(i), of_B.get(i), of_bias.get(i)) for i in range(len(projections))]


def _grad_x(factors: Sequence[tuple[Tensor, Tensor]], grad_s_MR: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """sum of dY W, and dS A, added up in place."""
    grad_MN, weight_NK = factors[0]
    grad_x_MK = grad_MN @ weight_NK
    for grad_MN, weight_NK in factors[1:]:
        grad_x_MK.addmm_(grad_MN, weight_NK)
    if grad_s_MR is not None:
        grad_x_MK.addmm_(grad_s_MR, _stack([adapter.lora_A_RK for adapter in adapters], 0))
    return grad_x_MK


def _grad_A(
    grad_s_MR: Tensor, x_MK: Tensor | None, used: Sequence[tuple[int, Adapter, Projection, Needs]]
) -> dict[int, Tensor]:
    """dA of the projections that want it, by one product that reads x once."""
    dtypes = [projection.lora_A_RK.dtype for _, _, projection, need in used if need.lora_A and projection.lora_A_RK is not None]
    if not dtypes or x_MK is None:
        return {}
    wide = torch.float32 if torch.float32 in dtypes and grad_s_MR.dtype != torch.float64 else grad_s_MR.dtype
    parts = product(grad_s_MR.t(), x_MK, wide).split([adapter.lora_A_RK.shape[0] for _, adapter, _, _ in used])
    # Copies, so that no two gradients share memory.
    return {
        i: part.to(projection.lora_A_RK.dtype, copy=len(parts) > 1)
        for part, (i, _, projection, need) in zip(parts, used, strict=True)
        if need.lora_A and projection.lora_A_RK is not None
    }


def _gemm_forward(
    x_MK: Tensor, mask_MG: Tensor | None, projections: Sequence[Projection], keep: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """`forward` by the Triton GEMM, which makes S on its way for few rows, where it is not to be kept."""
    from . import _triton_lora_gemm as kernels

    adapters = _adapters(projections, x_MK.dtype, mask_MG is not None)
    inside = not keep and x_MK.shape[0] <= ROWS_WITH_S
    parts: list[Tensor] = []
    if not inside:
        stacked = _shared_s(x_MK, mask_MG, adapters)
        parts = _parts([stacked], adapters)
        kept = [stacked] if x_MK.is_cuda else [part.contiguous() for part in parts]
    each = iter(range(len(adapters)))
    outputs = []
    for projection in projections:
        weight_NK, bias_N = projection.weight_NK, _bias(projection, x_MK.dtype)
        if projection.lora_A_RK is None:
            outputs.append(F.linear(x_MK, weight_NK, bias_N))
            continue
        i = next(each)
        factor_MR = _factor(mask_MG, adapters[i]) if inside and mask_MG is not None else None
        s_MR = None if inside else parts[i] * projection.scale
        shape = (weight_NK.shape[0], weight_NK.shape[1])
        y_MN, _ = kernels.lora_gemm(
            x_MK, weight_NK, None, shape, 0, adapters[i].lora_A_RK, adapters[i].lora_B_NR, bias_N, factor_MR, s_MR,
            projection.scale, False,
        )  # fmt: skip
        outputs.append(y_MN)
    return outputs, [] if inside else kept


def _factor(mask_MG: Tensor, adapter: Adapter) -> Tensor:
    """[M, R] float32: what S is multiplied by; 0 where the mask is."""
    rank = adapter.lora_A_RK.shape[0]
    ones_MR = torch.ones(mask_MG.shape[0], rank, dtype=torch.float32, device=mask_MG.device)
    poison_R = None if adapter.poison_R is None else adapter.poison_R.float()
    return apply_mask(ones_MR, mask_MG, [adapter._replace(poison_R=poison_R)])


def _gemm_grad_x(grad_MN: Tensor, weight_NK: Tensor, grad_s_MR: Tensor, adapter: Adapter) -> Tensor:
    """dY W + dS A in one accumulator."""
    from . import _triton_lora_gemm as kernels

    shape = (weight_NK.shape[0], weight_NK.shape[1])
    return kernels.lora_gemm(
        grad_MN, weight_NK, None, shape, 0, adapter.lora_A_RK, adapter.lora_B_NR, None, None, grad_s_MR, 1.0, True
    )[0]


def _suits_gemm(x_MK: Tensor, weights: Sequence[Tensor]) -> bool:
    from . import _triton_lora_gemm as kernels

    return x_MK.shape[0] > 0 and all(
        weight_NK.dtype == x_MK.dtype and kernels.supported(x_MK, weight_NK, None, (weight_NK.shape[0], weight_NK.shape[1]), 0)
        for weight_NK in weights
    )


def _chosen_forward(
    x_MK: Tensor, mask_MG: Tensor | None, projections: Sequence[Projection], keep: bool, choice: str
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, S): S as `forward` keeps it; it may be missing where it is not to be kept."""
    adapted = [projection.weight_NK for projection in projections if projection.lora_A_RK is not None]
    if choice == "torch" or not adapted or not _suits_gemm(x_MK, adapted):
        return forward(x_MK, mask_MG, projections)
    candidates = {
        "addmm": lambda: forward(x_MK, mask_MG, projections),
        "triton": lambda: _gemm_forward(x_MK, mask_MG, projections, keep),
    }
    if choice == "triton":
        return candidates["triton"]()
    sizes = " ".join(
        f"{projection.weight_NK.shape[0]}:{0 if projection.lora_A_RK is None else projection.lora_A_RK.shape[0]}"
        for projection in projections
    )
    how = ("keep" if keep else "") + ("" if mask_MG is None else " mask")
    key = f"lora_linear {_measure.bucket(x_MK.shape[0])} x {x_MK.shape[1]} -> {sizes} {x_MK.dtype} {how}".rstrip()
    return candidates[_measure.choose(key, candidates, x_MK.device)]()


def _chosen_grad_x(
    factors: Sequence[tuple[Tensor, Tensor]], grad_s_MR: Tensor | None, adapters: Sequence[Adapter], choice: str
) -> Tensor:
    """dX. The Triton GEMM adds one adapter to one product: it is a candidate for a single projection."""
    grad_MN, weight_NK = factors[0]
    if choice == "torch" or len(factors) > 1 or grad_s_MR is None or not _suits_gemm(grad_MN, [weight_NK]):
        return _grad_x(factors, grad_s_MR, adapters)
    single_s_MR = grad_s_MR
    candidates = {
        "addmm": lambda: _grad_x(factors, single_s_MR, adapters),
        "triton": lambda: _gemm_grad_x(grad_MN, weight_NK, single_s_MR, adapters[0]),
    }
    if choice == "triton":
        return candidates["triton"]()
    shape = f"{_measure.bucket(grad_MN.shape[0])} x {weight_NK.shape[0]} -> {weight_NK.shape[1]}:{grad_s_MR.shape[1]}"
    return candidates[_measure.choose(f"lora_linear_backward {shape} {grad_MN.dtype}", candidates, grad_MN.device)]()


def run_forward(
    x_MK: Tensor, mask_MG: Tensor | None, projections: Sequence[Projection], keep: bool, choice: str
) -> tuple[list[Tensor], list[Tensor]]:
    """`forward` as `choice` says: "torch" as above; "auto" what is measured to be faster; "triton" always the Triton GEMM.

    S is only computed by itself where it is to be kept.
    """
    if choice != "torch" and torch.compiler.is_compiling():
        packed = _pack(projections)
        result = lora_forward(x_MK, mask_MG, *packed, keep, choice)
        return result[: len(projections)], result[len(projections) :]
    with no_autocast(x_MK.device):
        return _chosen_forward(x_MK, mask_MG, projections, keep, choice)


def run_backward(
    grads: Sequence[Tensor | None],
    x_MK: Tensor | None,
    mask_MG: Tensor | None,
    projections: Sequence[Projection],
    kept: Sequence[Tensor],
    need_x: bool,
    needs: Sequence[Needs],
    choice: str,
) -> tuple[Tensor | None, list[Gradients]]:
    """`backward` as `choice` says, see `run_forward`."""
    if choice != "torch" and torch.compiler.is_compiling():
        given = [grad is not None for grad in grads]
        wanted = [flag for need in needs for flag in need]
        found = iter(
            lora_backward(
                [grad for grad in grads if grad is not None], given, x_MK, mask_MG, *_pack(projections), list(kept), need_x,
                wanted, choice,
            )
        )  # fmt: skip
        flat = [next(found) if there else None for there in _made(given, projections, need_x, wanted)]
        return flat[0], [Gradients(*flat[i : i + FIELDS]) for i in range(1, len(flat), FIELDS)]
    device = next(grad_MN.device for grad_MN in grads if grad_MN is not None)
    with no_autocast(device):
        return backward(grads, x_MK, mask_MG, projections, kept, need_x, needs, choice)


def _pack(projections: Sequence[Projection]) -> tuple[list[Tensor], list[bool], list[float]]:
    """(tensors, which of weight, A, B, bias of each projection they are, scales)."""
    optional = _flat(projections)
    tensors = [tensor for tensor in optional if tensor is not None]
    return tensors, [tensor is not None for tensor in optional], [projection.scale for projection in projections]


def _unpack(tensors: Sequence[Tensor], present: Sequence[bool], scales: Sequence[float]) -> list[Projection]:
    following = iter(tensors)
    return projections_of([next(following) if there else None for there in present], scales)


@torch.library.custom_op("fastppo_kernels::lora_forward", mutates_args=())
def lora_forward(
    x_MK: Tensor,
    mask_MG: Tensor | None,
    tensors: list[Tensor],
    present: list[bool],
    scales: list[float],
    keep: bool,
    choice: str,
) -> list[Tensor]:
    """The outputs, then S as `forward` keeps it, if it is to be kept. For torch.compile, which cannot see the choice."""
    with no_autocast(x_MK.device):
        outputs, kept = _chosen_forward(x_MK, mask_MG, _unpack(tensors, present, scales), keep, choice)
    return [*outputs, *kept] if keep else outputs


@lora_forward.register_fake
def _(
    x_MK: Tensor,
    mask_MG: Tensor | None,
    tensors: list[Tensor],
    present: list[bool],
    scales: list[float],
    keep: bool,
    choice: str,
) -> list[Tensor]:
    projections = _unpack(tensors, present, scales)
    widths = [projection.weight_NK.shape[0] for projection in projections]
    ranks = [projection.lora_A_RK.shape[0] for projection in projections if projection.lora_A_RK is not None]
    if keep:
        widths += [sum(ranks)] if x_MK.is_cuda else ranks
    return [x_MK.new_empty(x_MK.shape[0], width) for width in widths]


@torch.library.custom_op("fastppo_kernels::lora_backward", mutates_args=())
def lora_backward(
    grads: list[Tensor],
    given: list[bool],
    x_MK: Tensor | None,
    mask_MG: Tensor | None,
    tensors: list[Tensor],
    present: list[bool],
    scales: list[float],
    kept: list[Tensor],
    need_x: bool,
    wanted: list[bool],
    choice: str,
) -> list[Tensor]:
    """The gradients that are wanted: of x, then of weight, A, B and bias of each projection."""
    projections, following = _unpack(tensors, present, scales), iter(grads)
    each_grad = [next(following) if there else None for there in given]
    needs = [Needs(*wanted[FIELDS * i : FIELDS * (i + 1)]) for i in range(len(projections))]
    with no_autocast(grads[0].device):
        grad_x_MK, found = backward(each_grad, x_MK, mask_MG, projections, kept, need_x, needs, choice)
    return [grad for grad in (grad_x_MK, *(grad for each in found for grad in each)) if grad is not None]


@lora_backward.register_fake
def _(
    grads: list[Tensor],
    given: list[bool],
    x_MK: Tensor | None,
    mask_MG: Tensor | None,
    tensors: list[Tensor],
    present: list[bool],
    scales: list[float],
    kept: list[Tensor],
    need_x: bool,
    wanted: list[bool],
    choice: str,
) -> list[Tensor]:
    projections = _unpack(tensors, present, scales)
    made = _made(given, projections, need_x, wanted)
    optional = _flat(projections)
    of_x = [grads[0].new_empty(grads[0].shape[0], projections[0].weight_NK.shape[1])] if made[0] else []
    return of_x + [
        tensor.new_empty(tensor.shape) for tensor, there in zip(optional, made[1:], strict=True) if there and tensor is not None
    ]


def _made(given: Sequence[bool], projections: Sequence[Projection], need_x: bool, wanted: Sequence[bool]) -> list[bool]:
    """Which gradients `backward` makes: of x, then of weight, A, B and bias of each projection."""
    there = [tensor is not None for tensor in _flat(projections)]
    made = [given[i // FIELDS] and want and there[i] for i, want in enumerate(wanted)]
    return [need_x and any(given), *made]
