"""Ops around the linear maps of a layer: normalisation, SwiGLU, rotary embedding, and their forms that make LoRA's columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_checks.case import randn
from fastppo_kernels import rms_norm, rms_norm_lora, rope, swiglu, swiglu_backward_lora, swiglu_lora

from ..limits import copy
from .op import OURS, Direction, Form, Inputs, Op, Results, by_device, parameter, size_of

_EPS, _LEFT = 1e-6, 16


def _bytes(forward: int, both: int, *names: str) -> Any:
    """A copy that moves the inputs of these names so many times."""

    def limit(inputs: Inputs, direction: Direction) -> Any:
        moved = size_of(*(inputs[name] for name in names)) * (forward if direction == "fwd" else both)
        return copy(moved, inputs[names[0]].device)

    return limit


def _columns(device: torch.device, dtype: torch.dtype, columns: int, rank: int) -> Inputs:
    return {
        "lora_A": randn(device, 5, rank, columns, scale=columns**-0.5, dtype=dtype),
        "scale": torch.full((rank,), 2.0, device=device),
    }


# -- normalisation -------------------------------------------------------------------------------------------------------


def _norm_inputs(device: torch.device, dtype: torch.dtype, *, rows: int, columns: int, rank: int = 0) -> Inputs:
    x = randn(device, 1, rows, columns, scale=2.0, dtype=dtype)
    found: Inputs = {"x": x if rank else parameter(x), "weight": randn(device, 2, columns, dtype=dtype)}
    return found | _columns(device, dtype, columns, rank) if rank else found


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As in transformers' models."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)).to(x.dtype)


def _liger_norm(inputs: Inputs) -> Results:
    from liger_kernel.transformers.functional import liger_rms_norm

    return {"y": liger_rms_norm(inputs["x"], inputs["weight"], _EPS, in_place=False)}


def _norm_lora(inputs: Inputs) -> Results:
    buffer, _ = rms_norm_lora(inputs["x"], inputs["weight"], _EPS, inputs["lora_A"], _LEFT, inputs["scale"])
    return {"buffer": buffer}


def _bordered(x: Tensor, inputs: Inputs) -> Results:
    s = (F.linear(x, inputs["lora_A"]).float() * inputs["scale"]).to(x.dtype)
    return {"buffer": torch.cat([s[:, :_LEFT], x, s[:, _LEFT:]], dim=1)}


# -- SwiGLU --------------------------------------------------------------------------------------------------------------


def _mlp_inputs(device: torch.device, dtype: torch.dtype, *, rows: int, columns: int, rank: int = 0) -> Inputs:
    gate, up = (randn(device, seed, rows, columns, dtype=dtype) for seed in (1, 2))
    if not rank:
        return {"gate": parameter(gate), "up": parameter(up)}
    found: Inputs = {"gate": gate, "up": up, "grad": randn(device, 3, rows, columns, dtype=dtype)}
    for seed, name in enumerate(("B_gate", "B_up"), 6):
        found[name] = randn(device, seed, columns, rank // 2, scale=0.1, dtype=dtype)
    return found | _columns(device, dtype, columns, rank)


def _liger_swiglu(inputs: Inputs) -> Results:
    from liger_kernel.transformers.functional import liger_swiglu

    return {"h": liger_swiglu(inputs["gate"], inputs["up"])}


def _swiglu_backward_lora(inputs: Inputs) -> Results:
    buffer = swiglu_backward_lora(
        inputs["grad"], inputs["gate"], inputs["up"], inputs["B_gate"], inputs["B_up"], inputs["scale"]
    )
    return {"buffer": buffer}


def _plain_swiglu_backward_lora(inputs: Inputs) -> Results:
    gate, up, grad = inputs["gate"].float(), inputs["up"].float(), inputs["grad"].float()
    sigmoid = gate.sigmoid()
    d_gate = (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(inputs["gate"].dtype)
    d_up = (grad * gate * sigmoid).to(inputs["gate"].dtype)
    s = torch.cat([d_gate @ inputs["B_gate"], d_up @ inputs["B_up"]], dim=1)
    return {"buffer": torch.cat([d_gate, d_up, (s.float() * inputs["scale"]).to(s.dtype)], dim=1)}


# -- rotary embedding ----------------------------------------------------------------------------------------------------


def _rotary(
    device: torch.device, dtype: torch.dtype, *, batch: int, tokens: int, heads: int, kv_heads: int, dim: int
) -> Inputs:
    """[B, H, T, D] as views of [B, T, H, D], as attention layers have them."""
    angle = torch.arange(tokens, device=device)[:, None] / 10000 ** (torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.cat((angle, angle), 1)[None]
    q, k = (randn(device, seed, batch, tokens, n, dim, dtype=dtype).transpose(1, 2) for seed, n in ((1, heads), (2, kv_heads)))
    return {"q": parameter(q), "k": parameter(k), "cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def _rope(inputs: Inputs) -> Results:
    q, k = rope(inputs["q"], inputs["k"], inputs["cos"], inputs["sin"])
    return {"q": q, "k": k}


def _plain_rope(inputs: Inputs) -> Results:
    """As in transformers' models."""
    cos, sin = inputs["cos"][:, None], inputs["sin"][:, None]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return {"q": turned(inputs["q"]), "k": turned(inputs["k"])}


def _liger_rope(inputs: Inputs) -> Results:
    from liger_kernel.transformers.functional import liger_rope

    q, k = liger_rope(inputs["q"], inputs["k"], inputs["cos"], inputs["sin"])
    return {"q": q, "k": k}


def ops() -> list[Op]:
    passes = "one read or write of every input, output and gradient (a copy of as many bytes)"
    norm, norm_large = {"rows": 512, "columns": 128}, {"rows": 8192, "columns": 3584}
    mlp, mlp_large = {"rows": 512, "columns": 352}, {"rows": 8192, "columns": 18944}
    rotary = {"batch": 4, "tokens": 128, "heads": 4, "kv_heads": 2, "dim": 32}
    rotary_large = {"batch": 4, "tokens": 2048, "heads": 28, "kv_heads": 4, "dim": 128}
    rank = {"rank": 32}
    return [
        Op(
            "rms_norm",
            "layers",
            by_device(_norm_inputs, {"M512 K128": norm}, {"M8192 K3584": norm_large}),
            {
                OURS: lambda inputs: {"y": rms_norm(inputs["x"], inputs["weight"], _EPS)},
                "torch": lambda inputs: {"y": _plain_norm(inputs["x"], inputs["weight"])},
                "Liger-Kernel": Form(_liger_norm, "Liger-Kernel", on_cpu=False),
            },
            _bytes(2, 5, "x"),
            passes,
            compiled_on_cpu=True,
        ),
        Op(
            "rms_norm_lora",
            "layers",
            by_device(_norm_inputs, {"M512 K128 r32": norm | rank}, {"M8192 K3584 r32": norm_large | rank}),
            {OURS: _norm_lora, "torch": lambda inputs: _bordered(_plain_norm(inputs["x"], inputs["weight"]), inputs)},
            _bytes(2, 2, "x"),
            passes,
            directions=("fwd",),
        ),
        Op(
            "swiglu",
            "layers",
            by_device(_mlp_inputs, {"M512 N352": mlp}, {"M8192 N18944": mlp_large}),
            {
                OURS: lambda inputs: {"h": swiglu(inputs["gate"], inputs["up"])},
                "torch": lambda inputs: {"h": F.silu(inputs["gate"]) * inputs["up"]},
                "Liger-Kernel": Form(_liger_swiglu, "Liger-Kernel", on_cpu=False),
            },
            _bytes(3, 8, "gate"),
            passes,
        ),
        Op(
            "swiglu_lora",
            "layers",
            by_device(_mlp_inputs, {"M512 N352 r32": mlp | rank}, {"M8192 N18944 r32": mlp_large | rank}),
            {
                OURS: lambda inputs: {
                    "buffer": swiglu_lora(inputs["gate"], inputs["up"], inputs["lora_A"], _LEFT, inputs["scale"])
                },
                "torch": lambda inputs: _bordered(F.silu(inputs["gate"]) * inputs["up"], inputs),
            },
            _bytes(3, 3, "gate"),
            passes,
            directions=("fwd",),
        ),
        Op(
            "swiglu_backward_lora",
            "layers",
            by_device(_mlp_inputs, {"M512 N352 r32": mlp | rank}, {"M8192 N18944 r32": mlp_large | rank}),
            {OURS: _swiglu_backward_lora, "torch": _plain_swiglu_backward_lora},
            _bytes(5, 5, "gate"),
            passes,
            directions=("fwd",),
        ),
        Op(
            "rope",
            "layers",
            by_device(_rotary, {"B4 T128 H4+2 D32": rotary}, {"B4 T2048 H28+4 D128": rotary_large}),
            {
                OURS: _rope,
                "torch": _plain_rope,
                # Last: it writes over its inputs.
                "Liger-Kernel": Form(_liger_rope, "Liger-Kernel", on_cpu=False),
            },
            _bytes(2, 4, "q", "k"),
            passes,
        ),
    ]
