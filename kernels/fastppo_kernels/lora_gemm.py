"""A linear map with its LoRA adapter as one product, for few rows (decoding) and for 4-bit weights."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import (
    FLOAT_DTYPES,
    accumulate_dtype,
    check_both,
    check_device,
    check_float,
    check_integer,
    check_number,
    check_shape,
)
from ._dispatch import Backend, use_triton
from ._products import ROWS_WITH_S, masked, no_autocast, product

# NormalFloat4: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Entries of a weight that are dequantised at a time: bounds the float32 values before they are rounded.
_ENTRIES = 1 << 24


class NF4Weight(NamedTuple):
    """A frozen weight in 4 bits, in the layout of bitsandbytes.

    packed: uint8, ceil(N K / 2) entries of any shape, contiguous: the codes of the weight row by row, two in a byte, the first
    in the high half. absmax: float32 [ceil(N K / blocksize)], what the `NF4_CODE` of a block of `blocksize` (even) neighbouring
    entries are multiplied by; quantised absmax is to be dequantised before. shape: (N, K).
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K]: code times absmax in float32, rounded once to `dtype`.

        Raises:
            ValueError: fields that do not fit together, or another dtype than float32, bfloat16, float16 and float64.
        """
        _check_nf4(self)
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be one of float32, bfloat16, float16, float64, got {dtype}")
        return _dequantise(self.packed, self.absmax, self.shape, self.blocksize, dtype)

    @classmethod
    def from_bitsandbytes(cls, weight: Any) -> "NF4Weight":
        """Of a quantised `bitsandbytes.nn.Params4bit`, without a copy of the codes. Doubly quantised absmax is dequantised.

        Raises:
            ValueError: not such a parameter, not quantised yet, or not of type nf4.
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError(f"weight must be a quantised bitsandbytes Params4bit, got {type(weight).__name__}")
        if state.quant_type != "nf4":
            raise ValueError(f"weight must have quant_type 'nf4', got {state.quant_type!r}")
        absmax = state.absmax
        if state.state2 is not None:
            inner = state.state2
            scale = inner.absmax.float().repeat_interleave(inner.blocksize)[: absmax.numel()]
            absmax = inner.code.float()[absmax.reshape(-1).long()] * scale + state.offset
        rows, columns = state.shape
        return cls(weight.data.view(torch.uint8), absmax.float().reshape(-1), (int(rows), int(columns)), int(state.blocksize))


def _dequantise(packed: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int, dtype: torch.dtype) -> Tensor:
    size = math.prod(shape)
    # Filled in on the device: a copy from the host would wait for it, and cannot be in a CUDA graph.
    code = torch.stack([torch.full((), value, dtype=torch.float32, device=packed.device) for value in NF4_CODE])
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # both codes of each byte
    packed = packed.reshape(-1)
    weight = torch.empty(size, dtype=dtype, device=packed.device)
    step = max(1, _ENTRIES // blocksize) * blocksize
    for start in range(0, size, step):
        stop = min(start + step, size)
        codes = pairs[packed[start // 2 : (stop + 1) // 2].int()].view(-1)[: stop - start]
        scale = absmax[start // blocksize : -(-stop // blocksize)].repeat_interleave(blocksize)[: stop - start]
        weight[start:stop] = codes * scale
    return weight.view(shape)


def _make_s(x_MK: Tensor, first_KR: Tensor, factor_MR: Tensor | None, scale: float) -> Tensor:
    """scale * factor * (x A^T), rounded once; 0 where the factor is, whatever the product is."""
    s_MR = product(x_MK, first_KR.to(x_MK.dtype), accumulate_dtype(x_MK.dtype)) * scale
    return (s_MR if factor_MR is None else masked(s_MR, factor_MR)).to(x_MK.dtype)


def _add(s_MR: Tensor, second_RN: Tensor) -> Tensor:
    """S B^T. A column of S that is 0 in a row meets nothing that is not finite in B: an adapter that is off may hold NaN."""
    finite_R1 = second_RN.isfinite().all(1, keepdim=True)
    s_MR = torch.where(~finite_R1.t() & (s_MR != 0), torch.nan, s_MR)
    return s_MR @ second_RN.nan_to_num(0.0, 0.0, 0.0)


def reference(
    x_MK: Tensor,
    weight_NK: Tensor,
    lora_A_RK: Tensor | None,
    lora_B_NR: Tensor | None,
    bias: Tensor | None,
    factor_MR: Tensor | None,
    s_MR: Tensor | None,
    scale: float,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, (y, S). Without a factor and with S to be made the arithmetic is peft's, to the bit."""
    dtype = x_MK.dtype
    y = F.linear(x_MK, weight_NK.t() if transposed else weight_NK, None if bias is None else bias.to(dtype))
    first_RK, second_NR = (lora_A_RK, lora_B_NR)
    if transposed:
        first_RK = None if lora_B_NR is None else lora_B_NR.t()
        second_NR = None if lora_A_RK is None else lora_A_RK.t()
    if second_NR is None:
        return y, x_MK.new_empty(x_MK.shape[0], 0)
    second_NR = second_NR.to(dtype)
    if s_MR is None and first_RK is not None:
        if factor_MR is None:
            s_MR = F.linear(x_MK, first_RK.to(dtype))
            return y + F.linear(s_MR, second_NR) * scale, s_MR * scale
        s_MR = _make_s(x_MK, first_RK.t(), factor_MR, scale)
    assert s_MR is not None
    return y + _add(s_MR, second_NR.t()), s_MR


@torch.library.custom_op("fastppo_kernels::lora_gemm", mutates_args=())
def _lora_gemm(
    x_MK: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    shape: list[int],
    blocksize: int,
    lora_A_RK: Tensor | None,
    lora_B_NR: Tensor | None,
    bias: Tensor | None,
    factor_MR: Tensor | None,
    s_MR: Tensor | None,
    scale: float,
    transposed: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """(y, S); S is [M, 0] where it is given. `triton`: the kernel is wanted, and runs if the layout suits it."""
    whole = (shape[0], shape[1])
    with no_autocast(x_MK.device):
        if triton:
            from . import _triton_lora_gemm as kernels

            if kernels.supported(x_MK, weight, absmax, whole, blocksize):
                made = s_MR
                first_KR = None
                if lora_A_RK is not None and lora_B_NR is not None and s_MR is None:
                    first_KR = lora_B_NR if transposed else lora_A_RK.t()
                if first_KR is not None and x_MK.shape[0] > ROWS_WITH_S:
                    made = _make_s(x_MK, first_KR, factor_MR, scale)
                y, s = kernels.lora_gemm(
                    x_MK, weight, absmax, whole, blocksize, lora_A_RK, lora_B_NR, None if bias is None else bias.to(x_MK.dtype),
                    None if factor_MR is None else factor_MR.float(), made, scale, transposed,
                )  # fmt: skip
                return y, x_MK.new_empty(x_MK.shape[0], 0) if s_MR is not None else s.contiguous()
        weight_NK = weight if absmax is None else _dequantise(weight, absmax, whole, blocksize, x_MK.dtype)
        y, s = reference(x_MK, weight_NK, lora_A_RK, lora_B_NR, bias, factor_MR, s_MR, scale, transposed)
    return y, x_MK.new_empty(x_MK.shape[0], 0) if s_MR is not None else s


@_lora_gemm.register_fake
def _(
    x_MK: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    shape: list[int],
    blocksize: int,
    lora_A_RK: Tensor | None,
    lora_B_NR: Tensor | None,
    bias: Tensor | None,
    factor_MR: Tensor | None,
    s_MR: Tensor | None,
    scale: float,
    transposed: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    rank = 0 if s_MR is not None or lora_A_RK is None else lora_A_RK.shape[0]
    return x_MK.new_empty(x_MK.shape[0], shape[1 if transposed else 0]), x_MK.new_empty(x_MK.shape[0], rank)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_MK, weight, absmax, shape, blocksize, lora_A_RK, lora_B_NR, bias, factor_MR, s_MR, scale, transposed, triton = inputs
    made = output[1]
    ctx.mark_non_differentiable(made)
    ctx.given = s_MR is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.settings = shape, blocksize, scale, transposed, triton
    ctx.save_for_backward(x_MK, weight, absmax, lora_A_RK, lora_B_NR, factor_MR, s_MR if ctx.given else made)


def _backward(ctx: Any, grad_MN: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    # What was saved is passed on, so that differentiating again raises whatever of it requires a gradient.
    return _gradients(ctx, grad_MN, *ctx.saved_tensors)


@once_differentiable
def _gradients(
    ctx: Any,
    grad_MN: Tensor,
    x_MK: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    lora_A_RK: Tensor,
    lora_B_NR: Tensor,
    factor_MR: Tensor | None,
    s_MR: Tensor,
) -> tuple[Tensor | None, ...]:
    """dX = dY W + dS A is the same op the other way round; dS = scale factor * (dY B), dA = dS^T x, dB = dY^T S."""
    shape, blocksize, scale, transposed, triton = ctx.settings
    base = (weight, absmax, shape, blocksize)
    grads: list[Tensor | None] = [None] * 13
    # The factor that x meets first, and the one that S meets: with `transposed` they, and their gradients, trade places.
    first, second = (lora_B_NR, lora_A_RK) if transposed else (lora_A_RK, lora_B_NR)
    place_first, place_second = (6, 5) if transposed else (5, 6)
    need_first = not ctx.given and ctx.needs_input_grad[place_first]

    def gradient(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return product(right.t(), left, dtype) if transposed else product(left.t(), right, dtype)

    with no_autocast(x_MK.device):
        grad_s_MR: Tensor | None = None
        if ctx.needs_input_grad[0]:
            adapter = (None, None, None, None) if ctx.given else (lora_A_RK, lora_B_NR, None, factor_MR)
            grads[0], grad_s_MR = _lora_gemm(grad_MN, *base, *adapter, None, scale, not transposed, triton)
        elif need_first:
            grad_s_MR = _make_s(grad_MN, second.t() if transposed else second, factor_MR, scale)
        if need_first and grad_s_MR is not None:
            grads[place_first] = gradient(grad_s_MR, x_MK, first.dtype)
        if ctx.needs_input_grad[place_second]:
            grads[place_second] = gradient(grad_MN, s_MR, second.dtype)
        if ctx.needs_input_grad[9]:
            grads[9] = product(grad_MN, (second.t() if transposed else second).to(grad_MN.dtype), s_MR.dtype)
        if ctx.needs_input_grad[1]:
            grads[1] = gradient(grad_MN, x_MK, weight.dtype)
        if ctx.needs_input_grad[7]:
            grads[7] = grad_MN.sum(0, dtype=accumulate_dtype(grad_MN.dtype)).to(ctx.bias_dtype)
    return tuple(grads)


_lora_gemm.register_autograd(_backward, setup_context=_setup)


def _check_nf4(weight: NF4Weight) -> None:
    packed, absmax, shape, blocksize = weight
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ValueError(f"weight.shape must be (N, K), got {shape!r}")
    check_integer("weight.shape[0]", shape[0], at_least=1)
    check_integer("weight.shape[1]", shape[1], at_least=1)
    check_integer("weight.blocksize", blocksize, at_least=2)
    if blocksize & (blocksize - 1):
        raise ValueError(f"weight.blocksize must be a power of two, got {blocksize}")
    size = math.prod(shape)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError("weight.packed must be a contiguous uint8 tensor")
    if packed.numel() != (size + 1) // 2:
        raise ValueError(f"weight.packed must have {(size + 1) // 2} entries (two weights in each), got {packed.numel()}")
    if not isinstance(absmax, Tensor) or absmax.dtype != torch.float32 or not absmax.is_contiguous():
        raise ValueError("weight.absmax must be a contiguous float32 tensor")
    check_shape("weight.absmax", absmax, (-(-size // blocksize),), "one for each block of weights")
    check_device("weight.absmax", absmax, "weight.packed", packed)


def _check_adapter(
    lora_A: Tensor | None, lora_B: Tensor | None, x: Tensor, shape: tuple[int, int], only_second: bool, transposed: bool
) -> int:
    """The rank; raise unless both factors, or (S is given) at least the one that is applied to it, fit."""
    needed = lora_A if transposed else lora_B
    if not only_second:
        check_both("", lora_A, lora_B)
    if only_second and needed is None:
        raise ValueError(f"s needs {'lora_A' if transposed else 'lora_B'}, got None")
    rank = 0
    for name, lora, dim in (("lora_A", lora_A, 0), ("lora_B", lora_B, 1)):
        if lora is None:
            continue
        check_float(name, lora)
        if lora.dim() != 2 or lora.shape[dim] == 0:
            raise ValueError(f"{name} must have shape {'[R, K]' if dim == 0 else '[N, R]'}, R >= 1, got {list(lora.shape)}")
        rank = rank or lora.shape[dim]
        expected = (rank, shape[1]) if dim == 0 else (shape[0], rank)
        check_shape(name, lora, expected, "[R, K]: K of weight" if dim == 0 else "[N, R]: N of weight, R of lora_A")
        check_device(name, lora, "x", x)
    return rank


def lora_gemm(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    s: Tensor | None = None,
    transposed: bool = False,
    with_s: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear map and its LoRA adapter in one accumulator, differentiable once in x, lora_A, lora_B, bias, s, a dense weight:

        y = x weight^T + bias + S lora_B^T,    S = scale * factor * (x lora_A^T)
        y = x weight + bias + S lora_A,        S = scale * factor * (x lora_B)      with `transposed`, the gradient of the input

    The Triton kernel reads the weight once, in one launch (two where there are few outputs), and y never; S is added up beside
    it for up to 64 rows, and made by a product of its own for more. It takes N and K that are multiples of 8, a dense weight
    whose rows have stride 1 and begin at multiples of 16 bytes, and NF4 with K a multiple of 64 and blocks of at least 64;
    others take the torch form.

    Args:
        x: [..., K] (transposed: [..., N]), float32, bfloat16, float16 or float64; any strides.
        weight: [N, K] in the dtype of `x`, any strides; or a frozen `NF4Weight`, dequantised on the way in (in the torch form,
            before). Under autocast x and a dense weight are cast.
        lora_A: [R, K]. lora_B: [N, R]. Any of these dtypes: they are rounded to that of `x`, their gradients are summed up in
            float32 and given in their own dtype. Both None: no adapter.
        scale: a finite number.
        bias: [N] (transposed: [K]) or None.
        factor: [..., R] with the leading shape of `x`, or broadcast to it; floating point or bool: what each column of S is
            multiplied by in each row. Where it is 0, S is 0 and nothing of that column's adapter is seen, even if it is NaN.
            No gradient. None: 1.
        s: [..., R] in the dtype of `x`: S, where it is known already, with scale and factor in it. Then `scale` and lora_A
            (transposed: lora_B) are not used, and `factor` must be None.
        with_s: also return S, for a backward of the caller's own; it has no gradient.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 always takes the torch
            form.

    Returns:
        y [..., N] (transposed: [..., K]) in the dtype of `x`; with `with_s` (y, S [..., R]).

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., K], K >= 1, got {list(x.shape)}")
    if not isinstance(weight, NF4Weight):
        check_float("weight", weight)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = weight if isinstance(weight, NF4Weight) else weight.to(x.dtype)
    absmax, blocksize = None, 0
    if isinstance(weight, NF4Weight):
        _check_nf4(weight)
        shape = (weight.shape[0], weight.shape[1])
        values, absmax, blocksize = weight.packed, weight.absmax, weight.blocksize
    else:
        if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
            raise ValueError(f"weight must have shape [N, K], N, K >= 1, got {list(weight.shape)}")
        if weight.dtype != x.dtype:
            raise ValueError(f"weight must have the dtype of x ({x.dtype}), got {weight.dtype}")
        shape, values = (weight.shape[0], weight.shape[1]), weight
    check_device("weight", values, "x", x)
    width, height = shape if transposed else shape[::-1]
    if x.shape[-1] != width:
        raise ValueError(f"x must have {width} columns ({'N' if transposed else 'K'} of weight), got {x.shape[-1]}")
    check_number("scale", scale)
    leading = x.shape[:-1]
    x_MK = x.reshape(-1, width)
    rank = _check_adapter(lora_A, lora_B, x, shape, s is not None, transposed)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (height,), "one for each column of y")
        check_device("bias", bias, "x", x)
    factor_MR, s_MR = None, None
    if s is not None:
        if factor is not None:
            raise ValueError("factor must be None where s is given, which has it in it already")
        check_float("s", s)
        check_shape("s", s, (*leading, rank), "the leading shape of x, and R")
        check_device("s", s, "x", x)
        if s.dtype != x.dtype:
            raise ValueError(f"s must have the dtype of x ({x.dtype}), got {s.dtype}")
        s_MR = s.reshape(-1, rank)
    elif factor is not None:
        factor_MR = _flatten_factor(factor, x, rank)
    triton = use_triton(x, backend) and x.dtype != torch.float64
    y, made = _lora_gemm(
        x_MK, values, absmax, list(shape), blocksize, lora_A, lora_B, bias, factor_MR, s_MR, float(scale), transposed, triton
    )
    y = y.view(*leading, height)
    if not with_s:
        return y
    return y, made.view(*leading, rank) if s is None else s


def _flatten_factor(factor: Tensor, x: Tensor, rank: int) -> Tensor:
    if not isinstance(factor, Tensor) or not (factor.is_floating_point() or factor.dtype == torch.bool):
        came = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
        raise ValueError(f"factor must be a bool or floating-point tensor, got {came}")
    check_device("factor", factor, "x", x)
    shape = (*x.shape[:-1], rank)
    try:
        factor = factor.detach().expand(shape)
    except RuntimeError:
        raise ValueError(
            f"factor must broadcast to {list(shape)} (the leading shape of x, and R), got {list(factor.shape)}"
        ) from None
    return factor.reshape(-1, rank).to(accumulate_dtype(x.dtype))
