"""Rotary position embedding of queries and keys (Su et al. 2021), in the half-rotation form of Hugging Face's models."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_device, check_float, check_shape
from ._dispatch import Backend, use_triton
from ._eager import is_eager

# Rotated entries of a head for which there is a kernel; no known model has more than 256.
_WIDEST = 256


def _rotated(x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin over the first R entries of a head, in the arithmetic of Hugging Face's models."""
    rotary = cos_BTR.shape[-1]
    turned, rest = x_BHTD[..., :rotary], x_BHTD[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos_BTR.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_BTR.unsqueeze(1)
    turned = turned.to(x_BHTD.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _halves(*tensors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for tensor in tensors:
        half = tensor.shape[-1] // 2
        yield tensor[..., :half], tensor[..., half:]


def _turned(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """The same to the bit, half by half, of whole heads in the dtype of the tables."""
    out = torch.empty_like(x_BHTD)
    (x1, x2), (c1, c2), (s1, s2), (out1, out2) = _halves(x_BHTD, cos_BTD.unsqueeze(1), sin_BTD.unsqueeze(1), out)
    torch.mul(x1, c1, out=out1).sub_(x2 * s1)
    torch.mul(x2, c2, out=out2).add_(x1 * s2)
    return out


class _Turn(torch.autograd.Function):
    """`_turned` on the CPU: few passes each way, and only the tables kept."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _turned(x_BHTD, cos_BTD, sin_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        cos_BTD, sin_BTD = ctx.saved_tensors
        grad_x = torch.empty_like(grad_BHTD)
        (g1, g2), (c1, c2), (s1, s2), (grad1, grad2) = _halves(grad_BHTD, cos_BTD.unsqueeze(1), sin_BTD.unsqueeze(1), grad_x)
        torch.mul(g1, c1, out=grad1).addcmul_(g2, s2)
        torch.mul(g2, c2, out=grad2).addcmul_(g1, s1, value=-1)
        return grad_x, None, None


@torch.library.custom_op("fastppo_kernels::rope", mutates_args=())
def _rope(q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotated q and k, in the memory order of q and k; `inverse` applies the transposed matrix, which is the gradient."""
    from . import _triton_rope

    out = torch.empty_like(q_BHTD), torch.empty_like(k_BHTD)
    if q_BHTD.shape[0] and q_BHTD.shape[2]:
        _triton_rope.rotate(q_BHTD, k_BHTD, cos_BTR, sin_BTR, inverse, *out)
    return out


@_rope.register_fake
def _(q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BHTD), torch.empty_like(k_BHTD)


@torch.library.custom_op("fastppo_kernels::rope_into", mutates_args=("q_out", "k_out"))
def _rope_into(
    q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, inverse: bool, q_out: Tensor, k_out: Tensor
) -> None:
    """`_rope` into memory that is there; only the entries of a head need to lie side by side."""
    from . import _triton_rope

    if q_BHTD.shape[0] and q_BHTD.shape[2]:
        _triton_rope.rotate(q_BHTD, k_BHTD, cos_BTR, sin_BTR, inverse, q_out, k_out)


@_rope_into.register_fake
def _(*_: Any) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos_BTR, sin_BTR, ctx.inverse = inputs
    ctx.save_for_backward(cos_BTR, sin_BTR)


def _backward(ctx: Any, grad_q_BHTD: Tensor, grad_k_BHTD: Tensor) -> tuple[Tensor | None, ...]:
    grads = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_q_BHTD, grad_k_BHTD))
    return *_rope(*grads, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope.register_autograd(_backward, setup_context=_setup)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions: x cos + rotate_half(x) sin, rotate_half((a, b)) = (-b, a) for halves a, b.

    Args:
        q, k: [T, H, D] and [T, Hkv, D] (packed), or [B, H, T, D] and [B, Hkv, T, D] (as Hugging Face's attention has them, also
            as transposed views); one float dtype, any strides.
        cos, sin: [T, R], or for the four-dimensional form [B or 1, T, R]; R even and at most D: entries from R on are handed
            through (GPT-NeoX). float32, or any other float dtype. Tables, without gradient.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 always takes the torch
            form.

    Returns:
        The rotated (q, k), shapes and dtypes unchanged, nothing of the inputs overwritten, differentiable in q and k; backward
        keeps cos and sin alone. The Triton form computes in float32 and rounds once; torch rounds as Hugging Face does, each
        product too, and in the wider dtype where cos is wider than q.

    Raises:
        ValueError: a wrong shape, dtype or device, or cos or sin require a gradient.
    """
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_float(name, tensor)
        check_device(name, tensor, "q", q)
    if q.dim() not in (3, 4):
        raise ValueError(f"q must have shape [T, H, D] or [B, H, T, D], got {list(q.shape)}")
    if k.dtype != q.dtype:
        raise ValueError(f"k must have the dtype of q ({q.dtype}), got {k.dtype}")
    packed, head = q.dim() == 3, q.shape[-1]
    if k.dim() != q.dim() or k.shape[:1] + k.shape[2:] != q.shape[:1] + q.shape[2:]:  # the heads are dimension 1 in either form
        raise ValueError(f"k must have the shape of q ({list(q.shape)}) but for its number of heads, got {list(k.shape)}")
    tokens = q.shape[0] if packed else q.shape[2]
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None] if sin.dim() == 2 else sin
    batches = (1,) if packed else (1, q.shape[0])
    if cos.dim() != 3 or cos.shape[0] not in batches or cos.shape[1] != tokens or cos.shape[2] % 2 or cos.shape[2] > head:
        wanted = f"[{tokens}, R]" if packed else f"[{tokens}, R] or [1 or {q.shape[0]}, {tokens}, R]"
        raise ValueError(f"cos must have shape {wanted} with R even and at most {head}, got {list(cos.shape)}")
    check_shape("sin", sin, tuple(cos.shape), "that of cos")
    if sin.dtype != cos.dtype:
        raise ValueError(f"sin must have the dtype of cos ({cos.dtype}), got {sin.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin must not require a gradient: they are tables")
    # One token's heads are what a program works on, so that the packed form is the other one with a batch of one.
    q_BHTD, k_BHTD = (x.transpose(0, 1)[None] if packed else x for x in (q, k))
    if use_triton(q, backend) and torch.float64 not in (q.dtype, cos.dtype) and cos.shape[2] <= _WIDEST:
        q_BHTD, k_BHTD, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTD, k_BHTD, cos, sin))
        out = _rope(q_BHTD, k_BHTD, cos, sin, False)
    elif is_eager(q) and cos.dtype == q.dtype and cos.shape[2] == head:
        # Without a gradient to come, as in each step of the sampler, what autograd keeps would cost as much as the rotation.
        turn = _Turn.apply if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad) else _turned
        out = turn(q_BHTD, cos, sin), turn(k_BHTD, cos, sin)
    else:
        out = _rotated(q_BHTD, cos, sin), _rotated(k_BHTD, cos, sin)
    return (out[0][0].transpose(0, 1), out[1][0].transpose(0, 1)) if packed else out


def turn_back(
    grad_q_THD: Tensor, grad_k_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, places: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of what `rope` gave, in the packed form, without autograd.

    places: where to write them, of any strides but within a head; None: in tensors of their own.
    """
    if use_triton(grad_q_THD, None) and torch.float64 not in (grad_q_THD.dtype, cos_TR.dtype) and cos_TR.shape[1] <= _WIDEST:
        if places is None:
            places = torch.empty_like(grad_q_THD), torch.empty_like(grad_k_THD)
        tensors = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_q_THD, grad_k_THD))
        q_BHTD, k_BHTD, q_out, k_out = (x.transpose(0, 1)[None] for x in (*tensors, *places))
        _rope_into(q_BHTD, k_BHTD, cos_TR[None], sin_TR[None], True, q_out, k_out)
        return places[0], places[1]
    # The transposed rotation: the other sign, and the sine of the other half.
    found = rope(grad_q_THD, grad_k_THD, cos_TR, -sin_TR.roll(sin_TR.shape[1] // 2, 1))
    if places is None:
        return found
    return places[0].copy_(found[0]), places[1].copy_(found[1])
