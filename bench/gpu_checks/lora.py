"""Cases of the linear maps with LoRA adapters."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels.lora_buffer import LoRAWeightBuffer
from fastppo_kernels.lora_gemm import NF4Weight, lora_gemm
from fastppo_kernels.lora_linear import LoRAProjection, lora_linear, lora_linear_group

from .case import Case, Inputs, Results, randint, randn

_SCALE = 2.0


def _linear(
    device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, inputs: int, outputs: int, rank: int,
    groups: int = 1, wide: bool = False,
) -> Inputs:  # fmt: skip
    """`wide`: adapters in float32 beside a half-precision base, as peft has them, with numbers that the base's dtype has."""
    mask = randint(device, seed, 3, rows, groups) > 0
    adapter = torch.float32 if wide else dtype
    return {
        "x": randn(device, seed, rows, inputs, dtype=dtype),
        "weight": randn(device, seed + 1, outputs, inputs, scale=inputs**-0.5, dtype=dtype),
        "bias": randn(device, seed, outputs, dtype=dtype),
        "lora_A": randn(device, seed + 2, rank, inputs, scale=inputs**-0.5, dtype=dtype).to(adapter),
        "lora_B": randn(device, seed + 3, outputs, rank, scale=rank**-0.5, dtype=dtype).to(adapter),
        "mask": mask[:, 0] if groups == 1 else mask,
    }


def _lora_linear(inputs: Inputs, backend: Any, *, bias: bool = False, mask: bool = False, measured: bool = False) -> Results:
    """`measured`: what the dispatcher takes by itself, rather than the Triton GEMM."""
    y = lora_linear(
        inputs["x"], inputs["weight"], inputs["lora_A"], inputs["lora_B"], _SCALE, bias=inputs["bias"] if bias else None,
        adapter_mask=inputs["mask"] if mask else None, backend="auto" if measured and backend == "triton" else backend,
    )  # fmt: skip
    return {"y": y}


def _shared(
    device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, inputs: int, outputs: tuple[int, ...], rank: int,
    buffer: bool = False,
) -> Inputs:  # fmt: skip
    """Projections of one input, the last without an adapter unless they are to lie in a buffer, where adapters are not inputs:
    a graph that is replayed has those of its capture."""
    found: Inputs = {"x": randn(device, seed, rows, inputs, dtype=dtype), "mask": randint(device, seed, 2, rows)[:, None] > 0}
    fixed = 77 if buffer else seed
    for i, size in enumerate(outputs):
        found[f"weight_{i}"] = randn(device, fixed + i, size, inputs, scale=inputs**-0.5, dtype=dtype)
        if buffer or i + 1 < len(outputs):
            found[f"lora_A_{i}"] = randn(device, fixed + i + 10, rank, inputs, scale=inputs**-0.5, dtype=dtype)
            found[f"lora_B_{i}"] = randn(device, fixed + i + 20, size, rank, scale=rank**-0.5, dtype=dtype)
    if buffer:
        for name, x in found.items():
            x.requires_grad_(name.startswith(("x", "lora")))
        found["buffer"] = LoRAWeightBuffer(_projections(found))
    return found


def _projections(inputs: Inputs) -> list[LoRAProjection]:
    count = sum(name.startswith("weight_") for name in inputs)
    return [
        LoRAProjection(inputs[f"weight_{i}"], inputs.get(f"lora_A_{i}"), inputs.get(f"lora_B_{i}"), _SCALE + i)
        for i in range(count)
    ]


def _group(inputs: Inputs, backend: Any) -> Results:
    outputs = lora_linear_group(inputs["x"], _projections(inputs), adapter_mask=inputs["mask"], backend=backend)
    return {f"y_{i}": y for i, y in enumerate(outputs)}


def _buffer(inputs: Inputs, backend: Any) -> Results:
    if backend == "torch":
        return _group(inputs, backend)
    return {f"y_{i}": y for i, y in enumerate(inputs["buffer"](inputs["x"], inputs["mask"]))}


def _buffer_leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name.startswith(("x", "lora"))}


def _rows_far_out(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, outputs: int) -> Inputs:
    inputs = _linear(device, dtype, seed, rows=rows, inputs=64, outputs=outputs, rank=16)
    inputs["all"] = (inputs["x"],)
    inputs["x"] = inputs["x"][-3:].clone()
    return inputs


def _last_rows(inputs: Inputs, backend: Any) -> Results:
    x = inputs["all"][0] if backend == "triton" else inputs["x"]
    y = lora_linear(x, inputs["weight"], inputs["lora_A"], inputs["lora_B"], _SCALE, backend=backend)
    return {"y": y[-3:].clone()}


def _few_rows(
    device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, inputs: int, outputs: int, rank: int, nf4: bool = False,
    transposed: bool = False,
) -> Inputs:  # fmt: skip
    """For `lora_gemm`; `transposed`: x has the width of the outputs."""
    found: Inputs = {
        "x": randn(device, seed, rows, outputs if transposed else inputs, dtype=dtype),
        "weight": randn(device, seed + 1, outputs, inputs, scale=inputs**-0.5, dtype=dtype),
        "lora_A": randn(device, seed + 2, rank, inputs, scale=inputs**-0.5, dtype=dtype),
        "lora_B": randn(device, seed + 3, outputs, rank, scale=rank**-0.5, dtype=dtype),
        "bias": randn(device, seed, inputs if transposed else outputs, dtype=dtype),
        "factor": randint(device, seed, 3, rows, rank) / 2.0,
        "s": randn(device, seed + 4, rows, rank, dtype=dtype),
    }
    if nf4:
        packed = randint(device, 99, 256, outputs * inputs // 2).to(torch.uint8)
        absmax = (0.5 + randint(device, 99, 100, outputs * inputs // 64) / 100.0) * inputs**-0.5
        found["weight"] = NF4Weight(packed, absmax, (outputs, inputs))
    return found


def _gemm(
    inputs: Inputs, backend: Any, *, bias: bool = False, factor: bool = False, given: bool = False, transposed: bool = False
) -> Results:
    y = lora_gemm(
        inputs["x"], inputs["weight"], inputs["lora_A"], inputs["lora_B"], _SCALE, bias=inputs["bias"] if bias else None,
        factor=inputs["factor"] if factor else None, s=inputs["s"] if given else None, transposed=transposed, backend=backend,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return {"y": y}


def _gemm_cases() -> list[Case]:
    """Few rows, few outputs (whose contraction is split), many rows, 4-bit weights, and each of these the other way round."""
    adapter, dense = ("x", "lora_A", "lora_B"), ("x", "weight", "bias", "lora_A", "lora_B")
    small = partial(_few_rows, rows=5, inputs=64, outputs=96, rank=8)
    large = {"inputs": 3584, "outputs": 18944, "rank": 16}
    found = [
        ("1 row", {"rows": 1}, {}, adapter, {}),
        ("64 rows, factor, trained weight and bias", {"rows": 64}, {"bias": True, "factor": True}, dense, {}),
        ("16 rows, few outputs, rank 64", {"rows": 16, "inputs": 18944, "outputs": 512, "rank": 64}, {}, adapter, {}),
        ("100 rows, S given", {"rows": 100}, {"given": True}, ("x", "s", "lora_B"), {}),
        ("4093 rows", {"rows": 4093}, {}, adapter, {}),
        ("64 rows, transposed", {"rows": 64}, {"transposed": True, "factor": True}, adapter, {"transposed": True}),
        ("16 rows, NF4", {"rows": 16}, {"bias": True}, adapter, {"nf4": True}),
        ("1024 rows, NF4", {"rows": 1024}, {}, adapter, {"nf4": True}),
        ("16 rows, NF4, transposed", {"rows": 16}, {"transposed": True}, adapter, {"nf4": True, "transposed": True}),
    ]
    return [
        Case(
            f"lora_gemm {name}",
            ("lora_gemm",),
            partial(_few_rows, **(large | sizes), **kind),
            partial(_gemm, **how),
            leaves,
            partial(small, **kind),
        )
        for name, sizes, how, leaves, kind in found
    ]


def cases() -> list[Case]:
    linear, group, buffer = ("lora_linear",), ("lora_linear_group",), ("LoRAWeightBuffer",)
    square = partial(_linear, rows=4093, inputs=3584, outputs=3584, rank=16)
    small = partial(_linear, rows=40, inputs=64, outputs=48, rank=8)
    adapter = ("x", "lora_A", "lora_B")
    gate_up, small_gate_up = (
        partial(_shared, rows=2048, inputs=3584, outputs=(18944, 18944), rank=16, buffer=True),
        partial(_shared, rows=20, inputs=64, outputs=(40, 48), rank=8, buffer=True),
    )
    return [
        Case("lora_linear 4093 x 3584 x 3584, rank 16", linear, square, _lora_linear, adapter, small),
        Case("lora_linear, chosen by measuring", linear, square, partial(_lora_linear, measured=True), adapter, small),
        Case(
            "lora_linear, float32 adapters, adapter mask, bias",
            linear,
            partial(_linear, rows=1000, inputs=3584, outputs=512, rank=64, wide=True),
            partial(_lora_linear, bias=True, mask=True),
            adapter,
            partial(_linear, rows=40, inputs=64, outputs=48, rank=8, wide=True),
        ),
        Case(
            "lora_linear, trained weight and bias, 2 stacked adapters",
            linear,
            partial(_linear, rows=1000, inputs=1536, outputs=1000, rank=32, groups=2),
            partial(_lora_linear, bias=True, mask=True),
            ("x", "weight", "bias", "lora_A", "lora_B"),
            partial(_linear, rows=40, inputs=64, outputs=48, rank=8, groups=2),
        ),
        Case("lora_linear 1 row", linear, partial(_linear, rows=1, inputs=3584, outputs=18944, rank=16), _lora_linear, adapter),
        Case(
            "lora_linear 64 rows", linear, partial(_linear, rows=64, inputs=18944, outputs=3584, rank=64), _lora_linear, adapter
        ),
        Case(
            "lora_linear 0 rows",
            linear,
            partial(_linear, rows=0, inputs=64, outputs=48, rank=8),
            _lora_linear,
            adapter,
            partial(_linear, rows=0, inputs=64, outputs=48, rank=8),
            checks=("error",),
        ),
        Case(
            "lora_linear past 2^31 outputs",
            linear,
            partial(_rows_far_out, rows=70000, outputs=32768),
            _last_rows,
            dtypes=(torch.bfloat16,),
            checks=("error",),
            gibibytes=12,
        ),
        Case(
            "lora_linear_group q, k, v",
            group,
            partial(_shared, rows=2048, inputs=3584, outputs=(3584, 512, 512), rank=16),
            _group,
            ("x", "lora_A_0", "lora_B_0", "lora_A_1", "lora_B_1"),
            partial(_shared, rows=20, inputs=64, outputs=(48, 16, 16), rank=8),
        ),
        Case("LoRAWeightBuffer gate, up", buffer, gate_up, _buffer, _buffer_leaves, small_gate_up),
        Case(
            "LoRAWeightBuffer q, k, v",
            buffer,
            partial(_shared, rows=2048, inputs=3584, outputs=(3584, 512, 512), rank=24, buffer=True),
            _buffer,
            _buffer_leaves,
            partial(_shared, rows=20, inputs=64, outputs=(48, 16, 16), rank=3, buffer=True),
        ),
        *_gemm_cases(),
    ]
