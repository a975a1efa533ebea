"""Linear maps with LoRA adapters: the adapter's small product is kept, and the frozen weight has no gradient."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lora_fold, _lora_ops
from ._checks import check_both, check_device, check_float, check_number, check_shape
from ._dispatch import VARIABLE, Backend, use_triton
from ._eager import is_eager
from ._products import no_autocast


class LoRAProjection(NamedTuple):
    """One linear map of an input with its adapter, for `lora_linear_group`.

    weight: [N, K]. lora_A: [R, K] and lora_B: [N, R], or both None for no adapter. scale: what the adapter's product is
    multiplied by (lora_alpha / R, or lora_alpha / sqrt(R) for rsLoRA). bias: [N] or None.
    """

    weight: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None


# On the CPU, up to so many multiplications of a base product, autograd's own steps cost less than a function in Python.
_SMALL_WORK = 1 << 25


def _is_small(x_MK: Tensor, mask_MG: Tensor | None, projections: Sequence[LoRAProjection]) -> bool:
    """Whether plain torch is faster and as exact: on the CPU, with one dtype throughout. Not asked while compiling."""
    if torch.compiler.is_compiling() or x_MK.is_cuda or mask_MG is not None:
        return False
    parts = [part for each in projections for part in each if isinstance(part, Tensor)]
    return all(part.dtype == x_MK.dtype for part in parts) and all(
        x_MK.numel() * len(each.weight) <= _SMALL_WORK for each in projections
    )


def _compose(x_MK: Tensor, projection: LoRAProjection) -> Tensor:
    """The definition, differentiated by autograd; peft's arithmetic."""
    weight, lora_A, lora_B, scale, bias = projection
    y_MN = F.linear(x_MK, weight, bias)
    if lora_A is None or lora_B is None:
        return y_MN
    added_MN = F.linear(F.linear(x_MK, lora_A), lora_B)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return y_MN + added_MN * scale
    return y_MN.add_(added_MN.mul_(scale))


class _LoRAGroup(torch.autograd.Function):
    """Autograd of all projections of an input; a function, for autograd of a custom operator costs far more host time."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, mask_MG: Tensor | None, scales: tuple[float, ...], choice: str, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        needs = _needs(ctx, len(scales))
        keep = any(need.lora_B for need in needs)
        outputs, kept = _lora_ops.run_forward(x_MK, mask_MG, _lora_ops.projections_of(flat, scales), keep, choice)
        # What no gradient needs is not kept alive: x is for W and A, S for B.
        saved_x = x_MK if any(need.weight or need.lora_A for need in needs) else None
        ctx.save_for_backward(saved_x, mask_MG, *flat, *(kept if keep else []))
        ctx.scales, ctx.choice = scales, choice
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        x_MK, mask_MG, *others = ctx.saved_tensors
        tensors = len(ctx.scales) * _lora_ops.FIELDS
        projections, kept = _lora_ops.projections_of(others[:tensors], ctx.scales), others[tensors:]
        needs = _needs(ctx, len(projections))
        grad_x_MK, found = _lora_ops.run_backward(
            grads, x_MK, mask_MG, projections, kept, ctx.needs_input_grad[0], needs, ctx.choice
        )
        return grad_x_MK, None, None, None, *(gradient for each in found for gradient in each)


class _FoldedGroup(torch.autograd.Function):
    """The same with each adapter folded into its weight, which is made again in backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, scales: tuple[float, ...], *flat: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_MK, *flat)
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        with no_autocast(x_MK.device):
            outputs = _lora_fold.forward(x_MK, _lora_ops.projections_of(flat, scales))
            return tuple(y_MN.contiguous() for y_MN in outputs)  # not views of one tensor, which callers may change in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_MK, *flat = ctx.saved_tensors
        needs = _needs(ctx, len(ctx.scales))
        projections = _lora_ops.projections_of(flat, ctx.scales)
        with no_autocast(x_MK.device):
            grad_x_MK, found = _lora_fold.backward(grads, x_MK, projections, ctx.needs_input_grad[0], needs)
        return grad_x_MK, None, *(gradient for grad_A, grad_B in found for gradient in (None, grad_A, grad_B, None))


def can_fold(x_MK: Tensor, mask_MG: Tensor | None, projections: Sequence[LoRAProjection]) -> bool:
    """Whether W + B A is exact enough and less work than the adapter by itself: x has more rows than K N / (K + N)."""
    if not is_eager(x_MK) or mask_MG is not None or x_MK.dtype not in (torch.float32, torch.float64):
        return False
    rows, width = x_MK.shape
    for weight, lora_A, lora_B, _, bias in projections:
        if weight.requires_grad or (bias is not None and bias.requires_grad) or weight.dtype != x_MK.dtype:
            return False
        if lora_A is not None and lora_B is not None and not lora_A.dtype == lora_B.dtype == x_MK.dtype:
            return False
        if rows * (width + weight.shape[0]) <= width * weight.shape[0]:
            return False
    return True


def _needs(ctx: Any, projections: int) -> list[_lora_ops.Needs]:
    flags = ctx.needs_input_grad[-projections * _lora_ops.FIELDS :]
    return [_lora_ops.Needs(*flags[i : i + _lora_ops.FIELDS]) for i in range(0, len(flags), _lora_ops.FIELDS)]


def check_projections(projections: Sequence[LoRAProjection]) -> None:
    """Raise unless it is a sequence of `LoRAProjection`, which are tuples themselves."""
    if not isinstance(projections, Sequence) or isinstance(projections, (LoRAProjection, str)):
        raise ValueError(f"projections must be a sequence of LoRAProjection, got {type(projections).__name__}")
    for i, projection in enumerate(projections):
        if not isinstance(projection, LoRAProjection):
            raise ValueError(f"projections[{i}] must be a LoRAProjection, got {type(projection).__name__}")


def check_projection(name: str, projection: LoRAProjection, x: Tensor, autocast: bool, like_name: str = "x") -> None:
    """Raise unless the projection fits `x` [..., K], in dtype too unless autocast casts it; `like_name` names x."""
    weight, lora_A, lora_B, scale, bias = projection
    check_float(f"{name}weight", weight)
    width = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        why = f"N >= 1 (K is that of {like_name})"
        raise ValueError(f"{name}weight must have shape [N, {width}], {why}, got {list(weight.shape)}")
    check_device(f"{name}weight", weight, like_name, x)
    if weight.dtype != x.dtype and not autocast:
        raise ValueError(f"{name}weight must have the dtype of {like_name} ({x.dtype}), got {weight.dtype}")
    check_number(f"{name}scale", scale)
    check_both(name, lora_A, lora_B)
    if lora_A is not None and lora_B is not None:
        check_float(f"{name}lora_A", lora_A)
        check_float(f"{name}lora_B", lora_B)
        if lora_A.dim() != 2 or lora_A.shape[1] != width or lora_A.shape[0] == 0:
            why = f"R >= 1 (K is that of {like_name})"
            raise ValueError(f"{name}lora_A must have shape [R, {width}], {why}, got {list(lora_A.shape)}")
        check_shape(f"{name}lora_B", lora_B, (weight.shape[0], lora_A.shape[0]), "[N, R]: N of weight, R of lora_A")
        check_device(f"{name}lora_A", lora_A, like_name, x)
        check_device(f"{name}lora_B", lora_B, like_name, x)
    if bias is not None:
        check_float(f"{name}bias", bias)
        check_shape(f"{name}bias", bias, (weight.shape[0],), "one for each row of weight")
        check_device(f"{name}bias", bias, like_name, x)


def flatten_mask(adapter_mask: Tensor | None, x: Tensor, ranks: Sequence[int]) -> Tensor | None:
    """The adapter mask as [M, G]; raise unless it fits the rows of `x` and divides every rank."""
    if adapter_mask is None:
        return None
    if not isinstance(adapter_mask, Tensor) or not (adapter_mask.is_floating_point() or adapter_mask.dtype == torch.bool):
        came = adapter_mask.dtype if isinstance(adapter_mask, Tensor) else type(adapter_mask).__name__
        raise ValueError(f"adapter_mask must be a bool or floating-point tensor, got {came}")
    check_device("adapter_mask", adapter_mask, "x", x)
    leading, shape = tuple(x.shape[:-1]), tuple(adapter_mask.shape)
    rows = x.shape[:-1].numel()
    if shape in (leading, (rows,)):
        mask_MG = adapter_mask.reshape(rows, 1)
    elif shape[:-1] in (leading, (rows,)) and shape[-1] > 0:
        mask_MG = adapter_mask.reshape(rows, shape[-1])
    else:
        raise ValueError(
            f"adapter_mask must have the leading shape of x {list(leading)}, or that with a column for each stacked adapter, "
            f"got {list(shape)}"
        )
    for rank in ranks:
        if rank % mask_MG.shape[1]:
            raise ValueError(
                f"adapter_mask has {mask_MG.shape[1]} columns, one for each stacked adapter: lora_A's {rank} rows must be a "
                "multiple of that"
            )
    return mask_MG.detach()


def lora_linear_group(
    x: Tensor,
    projections: Sequence[LoRAProjection],
    *,
    adapter_mask: Tensor | None = None,
    fold: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of several projections that share their input, such as q, k, v or gate, up.

    The adapters' first products are one (on CUDA), and the gradient of the input is summed up in place.

    Args:
        x: [..., K], as in `lora_linear`.
        projections: one `LoRAProjection` for each output; those without an adapter are plain linear maps.
        adapter_mask: as in `lora_linear`, for all projections; every rank must be a multiple of its number of columns.
        fold: multiply by weight + scale B A, made for this call, where that is less work: on the CPU in float32 and float64,
            for enough rows, without a mask. The result is that of the two products up to rounding; nothing is kept.
        backend: as in `lora_linear`.

    Returns:
        [..., N] for each projection, in their order.

    Raises:
        ValueError: no projection, or a wrong shape, dtype, device or number.
    """
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., K], K >= 1, got {list(x.shape)}")
    check_projections(projections)
    if len(projections) == 0:
        raise ValueError("projections must not be empty")
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    for i, projection in enumerate(projections):
        check_projection("" if len(projections) == 1 else f"projections[{i}].", projection, x, autocast)
    mask_MG = None
    if adapter_mask is not None:
        ranks = [projection.lora_A.shape[0] for projection in projections if projection.lora_A is not None]
        mask_MG = flatten_mask(adapter_mask, x, ranks)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return checked_group(x, projections, mask_MG, backend, fold)


@torch.no_grad()
def fold_lora(projections: Sequence[LoRAProjection]) -> tuple[Tensor, Tensor | None]:
    """Projections of one input as one linear map: W + scale B A of each on top of each other, and their biases.

    Args:
        projections: at least one, of one number of inputs, dtype and device; those without an adapter are as they are.

    Returns:
        (weight [N, K], bias [N] in the weight's dtype, 0 where a projection has none; None where none has): without gradient.
        Of one projection without an adapter the weight itself, else tensors of their own.

    Raises:
        ValueError: no projection, or a wrong shape, dtype, device or number.
    """
    check_projections(projections)
    if len(projections) == 0:
        raise ValueError("projections must not be empty")
    first = projections[0].weight
    check_float("projections[0].weight", first)
    if first.dim() != 2:
        raise ValueError(f"projections[0].weight must have shape [N, K], got {list(first.shape)}")
    for i, projection in enumerate(projections):
        check_projection(f"projections[{i}].", projection, first, False, "projections[0].weight")
        if projection.lora_A is not None and projection.lora_B is not None:
            for name, tensor in (("lora_A", projection.lora_A), ("lora_B", projection.lora_B)):
                if tensor.dtype != first.dtype:
                    raise ValueError(f"projections[{i}].{name} must have the weight's dtype {first.dtype}, got {tensor.dtype}")
    plain = [_lora_ops.Projection(w, lora_A, lora_B, bias, float(scale)) for w, lora_A, lora_B, scale, bias in projections]
    return _lora_fold.fold(plain), _lora_fold.fold_bias(plain)


def choice_of(x: Tensor, backend: Backend | None) -> str:
    """What `_lora_ops` is to choose from: "torch", "triton", or "auto", the faster of both."""
    if use_triton(x, backend) and x.dtype != torch.float64:
        return "triton" if (backend or os.environ.get(VARIABLE)) == "triton" else "auto"
    return "torch"


def checked_group(
    x: Tensor, projections: Sequence[LoRAProjection], mask_MG: Tensor | None, backend: Backend | None, fold: bool = False
) -> tuple[Tensor, ...]:
    """`lora_linear_group` of arguments that are checked, cast for autocast, with the mask as `flatten_mask` gives it."""
    leading = x.shape[:-1]
    x_MK = x.reshape(-1, x.shape[-1])
    scales = tuple(float(projection.scale) for projection in projections)
    choice = choice_of(x, backend)
    flat = [tensor for weight, lora_A, lora_B, _, bias in projections for tensor in (weight, lora_A, lora_B, bias)]
    if fold and choice == "torch" and can_fold(x_MK, mask_MG, projections):
        outputs = _FoldedGroup.apply(x_MK, scales, *flat)
    elif choice == "torch" and _is_small(x_MK, mask_MG, projections):
        outputs = tuple(_compose(x_MK, projection) for projection in projections)
    elif torch.is_grad_enabled():
        outputs = _LoRAGroup.apply(x_MK, mask_MG, scales, choice, *flat)
    else:
        outputs = tuple(_lora_ops.run_forward(x_MK, mask_MG, _lora_ops.projections_of(flat, scales), False, choice)[0])
    return tuple(y_MN.view(*leading, y_MN.shape[-1]) for y_MN in outputs)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    adapter_mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """A linear map with a LoRA adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1):

        y = x weight^T + bias + scale * mask * (x lora_A^T) lora_B^T

    The first product of the adapter, [M, R], is kept for the backward. Gradients are computed for what requires them, the
    weight and the bias included. On the CPU in float32 the result is that of peft's layer, to the bit.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; any strides. M is the number of its rows.
        weight: [N, K] in the dtype of `x`, any strides. Under autocast both are cast.
        lora_A: [R, K]. lora_B: [N, R]. Of any of these dtypes: they are rounded to that of `x` for the products, and their
            gradients are summed up in float32 and given in their own dtype. Both None: the plain linear map, no adapter.
        scale: a finite number, lora_alpha / R, or lora_alpha / sqrt(R) for rsLoRA.
        bias: [N] or None.
        adapter_mask: which rows use the adapter: bool, or a factor for each; [M] or the leading shape of `x`. With one more
            dimension of G columns, lora_A and lora_B are G adapters of R / G rows (columns) each, stacked, and column g
            belongs to adapter g. Rows where it is 0 get exactly the base output, whatever that adapter holds. It has no
            gradient. None: all rows.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. With "auto" on CUDA, what is
            measured to be faster, see `_measure`. float64 always takes the torch form.

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    projection = LoRAProjection(weight, lora_A, lora_B, scale, bias)
    return lora_linear_group(x, [projection], adapter_mask=adapter_mask, backend=backend)[0]
