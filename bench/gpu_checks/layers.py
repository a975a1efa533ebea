"""Cases of the ops around the linear maps of a layer: normalisation, SwiGLU, rotary embedding, and their forms that make the
columns of LoRA."""

from functools import partial
from typing import Any

import torch

from fastppo_kernels.rms_norm import rms_norm, rms_norm_lora
from fastppo_kernels.rope import rope
from fastppo_kernels.swiglu import swiglu, swiglu_backward_lora, swiglu_lora

from .case import Case, Inputs, Results, randint, randn

_HALF = (torch.bfloat16, torch.float16)


def _norm_inputs(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, columns: int, rank: int = 8) -> Inputs:
    return {
        "x": randn(device, seed, rows, columns, scale=2.0, dtype=dtype),
        "weight": randn(device, seed + 1, columns, dtype=dtype),
        **_columns(device, dtype, seed, rows=rows, columns=columns, rank=rank),
    }


def _columns(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, columns: int, rank: int) -> Inputs:
    """What LoRA's columns are made of: two adapters' worth of A, the second's rows of some tokens switched off."""
    group = torch.arange(rank, device=device, dtype=torch.int32) // 8 % 2
    return {
        "lora_A": randn(device, seed + 2, rank, columns, scale=columns**-0.5, dtype=dtype),
        "scale": torch.arange(1, rank + 1, device=device) / 8.0,
        "mask": (randint(device, seed, 3, rows, 2) > 0).float(),
        "group": group,
    }


def _rms_norm(inputs: Inputs, backend: Any, **how) -> Results:
    return {"y": rms_norm(inputs["x"], inputs["weight"], 1e-6, backend=backend, **how)}


def _rms_norm_lora(inputs: Inputs, backend: Any) -> Results:
    with torch.no_grad():
        buffer, rstd = rms_norm_lora(
            inputs["x"], inputs["weight"], 1e-6, inputs["lora_A"], 8, inputs["scale"], mask=inputs["mask"],
            column_group=inputs["group"], backend=backend,
        )  # fmt: skip
    right = inputs["lora_A"].shape[0] - 8
    parts = buffer.split([8, inputs["x"].shape[1], right], 1)
    return {"S left": parts[0], "X": parts[1], "S right": parts[2], "rstd": rstd}


def _mlp_inputs(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, columns: int, rank: int = 16) -> Inputs:
    names = ("gate", "up", "grad")
    return {
        **{name: randn(device, seed + place, rows, columns, dtype=dtype) for place, name in enumerate(names)},
        **_columns(device, dtype, seed, rows=rows, columns=columns, rank=rank),
    }


def _swiglu(inputs: Inputs, backend: Any) -> Results:
    return {"h": swiglu(inputs["gate"], inputs["up"], backend=backend)}


def _swiglu_lora(inputs: Inputs, backend: Any) -> Results:
    with torch.no_grad():
        buffer = swiglu_lora(
            inputs["gate"], inputs["up"], inputs["lora_A"], 0, inputs["scale"], mask=inputs["mask"],
            column_group=inputs["group"], backend=backend,
        )  # fmt: skip
    columns = inputs["gate"].shape[1]
    return {"h": buffer[:, :columns], "S": buffer[:, columns:]}


def _swiglu_backward_lora(inputs: Inputs, backend: Any) -> Results:
    half = inputs["lora_A"].shape[0] // 2
    with torch.no_grad():
        buffer = swiglu_backward_lora(
            inputs["grad"], inputs["gate"], inputs["up"], inputs["lora_A"][:half].t().contiguous(),
            inputs["lora_A"][half:].t().contiguous(), inputs["scale"], mask=inputs["mask"], column_group=inputs["group"],
            backend=backend,
        )  # fmt: skip
    columns = inputs["gate"].shape[1]
    return {"dG": buffer[:, :columns], "dU": buffer[:, columns : 2 * columns], "dS": buffer[:, 2 * columns :]}


def _heads(device: torch.device, dtype: torch.dtype, seed: int, *, tokens: int, heads: int, kv_heads: int, dim: int) -> Inputs:
    angle = torch.arange(tokens, device=device)[:, None] / 10000 ** (torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.cat((angle, angle), 1)
    return {
        "q": randn(device, seed, tokens, heads, dim, dtype=dtype),
        "k": randn(device, seed + 1, tokens, kv_heads, dim, dtype=dtype),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
    }


def _rope(inputs: Inputs, backend: Any) -> Results:
    q, k = rope(inputs["q"], inputs["k"], inputs["cos"], inputs["sin"], backend=backend)
    return {"q": q, "k": k}


def _norm_far_out(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, columns: int) -> Inputs:
    inputs = _norm_inputs(device, dtype, seed, rows=3, columns=columns)
    everything = torch.ones(rows, columns, dtype=dtype, device=device)
    everything[-3:] = inputs["x"]
    return inputs | {"all": (everything,)}


def _norm_last_rows(inputs: Inputs, backend: Any) -> Results:
    x = (inputs["all"][0] if backend == "triton" else inputs["x"]).detach().requires_grad_()
    y = rms_norm(x, inputs["weight"], 1e-6, backend=backend)
    (grad,) = torch.autograd.grad(y[-3:].sum(), x)
    return {"y": y[-3:].detach().clone(), "grad": grad[-3:].clone()}


def _mlp_far_out(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, columns: int) -> Inputs:
    inputs = _mlp_inputs(device, dtype, seed, rows=3, columns=columns)
    everything = tuple(torch.ones(rows, columns, dtype=dtype, device=device) for _ in range(2))
    everything[0][-3:], everything[1][-3:] = inputs["gate"], inputs["up"]
    return inputs | {"all": everything}


def _mlp_last_rows(inputs: Inputs, backend: Any) -> Results:
    gate, up = inputs["all"] if backend == "triton" else (inputs["gate"], inputs["up"])
    return {"h": swiglu(gate, up, backend=backend)[-3:].clone()}


def _heads_far_out(device: torch.device, dtype: torch.dtype, seed: int, *, tokens: int, heads: int, dim: int) -> Inputs:
    inputs = _heads(device, dtype, seed, tokens=tokens, heads=1, kv_heads=1, dim=dim)
    everything = torch.ones(tokens, heads, dim, dtype=dtype, device=device)
    everything[-3:] = randn(device, seed, 3, heads, dim, dtype=dtype)
    return inputs | {"all": (everything,), "q": everything[-3:].clone()}


def _last_tokens(inputs: Inputs, backend: Any) -> Results:
    q, rows = (inputs["all"][0], slice(None)) if backend == "triton" else (inputs["q"], slice(-3, None))
    out_q, out_k = rope(q, inputs["k"][rows], inputs["cos"][rows], inputs["sin"][rows], backend=backend)
    return {"q": out_q[-3:].clone(), "k": out_k[-3:].clone()}


def cases() -> list[Case]:
    norm, norm_lora, mlp, rotary = ("rms_norm",), ("rms_norm_lora",), ("swiglu",), ("rope",)
    # Where S is made with tensor cores in the same launch: many rows, not too many columns of S.
    producer, small_producer = partial(_norm_inputs, rows=4104, columns=3584), partial(_norm_inputs, rows=1030, columns=64)
    mlp_producer, small_mlp = partial(_mlp_inputs, rows=4104, columns=18944), partial(_mlp_inputs, rows=1030, columns=64)
    return [
        Case(
            "rms_norm 4093 x 3584",
            norm,
            partial(_norm_inputs, rows=4093, columns=3584),
            _rms_norm,
            ("x", "weight"),
            partial(_norm_inputs, rows=9, columns=100),
        ),
        Case(
            "rms_norm 70000 x 896, frozen weight, offset 1",
            norm,
            partial(_norm_inputs, rows=70000, columns=896),
            partial(_rms_norm, offset=1.0),
            ("x",),
            partial(_norm_inputs, rows=9, columns=64),
        ),
        Case(
            "rms_norm past 2^31 entries",
            norm,
            partial(_norm_far_out, rows=70000, columns=32768),
            _norm_last_rows,
            dtypes=(torch.bfloat16,),
            checks=("error",),
            gibibytes=20,
        ),
        Case(
            "rms_norm 0 rows",
            norm,
            partial(_norm_inputs, rows=0, columns=64),
            _rms_norm,
            ("x", "weight"),
            partial(_norm_inputs, rows=0, columns=64),
            checks=("error",),
        ),
        Case(
            "rms_norm_lora 4104 x 3584, 16 columns",
            norm_lora,
            partial(producer, rank=16),
            _rms_norm_lora,
            (),
            partial(small_producer, rank=16),
        ),
        Case("rms_norm_lora 4104 x 3584, 112 columns", norm_lora, partial(producer, rank=112), _rms_norm_lora),
        Case(
            "rms_norm_lora 100 x 3584, a GEMM for S",
            norm_lora,
            partial(_norm_inputs, rows=100, columns=3584, rank=32),
            _rms_norm_lora,
            (),
            partial(_norm_inputs, rows=9, columns=64, rank=32),
        ),
        Case(
            "swiglu 4093 x 18944",
            mlp,
            partial(_mlp_inputs, rows=4093, columns=18944),
            _swiglu,
            ("gate", "up"),
            partial(_mlp_inputs, rows=7, columns=130),
        ),
        Case(
            "swiglu past 2^31 entries",
            mlp,
            partial(_mlp_far_out, rows=70000, columns=32768),
            _mlp_last_rows,
            dtypes=(torch.bfloat16,),
            checks=("error",),
            gibibytes=16,
        ),
        Case(
            "swiglu_lora 4104 x 18944",
            ("swiglu_lora",),
            partial(mlp_producer, rank=16),
            _swiglu_lora,
            (),
            partial(small_mlp, rank=16),
        ),
        Case(
            "swiglu_backward_lora 4104 x 18944",
            ("swiglu_backward_lora",),
            partial(mlp_producer, rank=32),
            _swiglu_backward_lora,
            (),
            partial(small_mlp, rank=32),
        ),
        Case(
            "rope 4093 x (28 + 4) x 128",
            rotary,
            partial(_heads, tokens=4093, heads=28, kv_heads=4, dim=128),
            _rope,
            ("q", "k"),
            partial(_heads, tokens=9, heads=4, kv_heads=2, dim=16),
        ),
        Case(
            "rope past 2^31 entries",
            rotary,
            partial(_heads_far_out, tokens=300_000, heads=64, dim=128),
            _last_tokens,
            dtypes=(torch.bfloat16,),
            checks=("error",),
            gibibytes=14,
        ),
    ]
