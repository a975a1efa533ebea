"""Linear maps with LoRA adapters: one, those of one input, all seven of a layer, a whole decoder layer, and decoding."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu_checks.case import randint, randn
from fastppo_kernels import (
    LoRAProjection,
    LoRAWeightBuffer,
    NF4Weight,
    lora_gemm,
    lora_linear_group,
    patch_peft,
)

from ..limits import copy
from .op import OURS, Direction, Form, Inputs, Op, Results, Run, by_device, parameter, size_of

_SCALE = 2.0
_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# (width of the input, widths of the outputs) of each group of projections that share an input.
_Groups = tuple[tuple[int, tuple[int, ...]], ...]


def _layer(hidden: int, inter: int, kv: int) -> _Groups:
    return (hidden, (hidden, kv, kv)), (hidden, (hidden,)), (hidden, (inter, inter)), (inter, (hidden,))


_SMALL, _LARGE = _layer(128, 352, 64), _layer(3584, 18944, 512)


def _linears(device: torch.device, dtype: torch.dtype, *, rows: int, groups: _Groups, rank: int) -> Inputs:
    """All in one dtype, adapters too. The forms share the parameters A and B."""
    found: Inputs = {"groups": []}
    for g, (width, outputs) in enumerate(groups):
        found[f"x {g}"] = parameter(randn(device, 10 * g, rows, width, dtype=dtype))
        projections = []
        for i, size in enumerate(outputs):
            seed = 1000 + 100 * g + 10 * i
            weight = randn(device, seed, size, width, scale=width**-0.5, dtype=dtype)
            lora_A = nn.Parameter(randn(device, seed + 1, rank, width, scale=width**-0.5, dtype=dtype))
            lora_B = nn.Parameter(randn(device, seed + 2, size, rank, scale=rank**-0.5, dtype=dtype))
            found |= {f"A {g} {i}": lora_A, f"B {g} {i}": lora_B}
            projections.append(LoRAProjection(weight, lora_A, lora_B, _SCALE))
        found["groups"].append(projections)
    found["buffers"] = [LoRAWeightBuffer(projections, masked=False) for projections in found["groups"]]
    found["peft"] = _peft_layers(found["groups"])
    return found


def _peft_layers(groups: Sequence[Sequence[LoRAProjection]]) -> list[list[nn.Module]] | None:
    """peft's layers around the same tensors; None where peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    flat = [projection for projections in groups for projection in projections]
    assert all(projection.lora_A is not None for projection in flat)
    rank = len(flat[0].lora_A)  # type: ignore[arg-type]
    with torch.device("meta"):
        shapes = [each.weight.shape for each in flat]
        linears = nn.ModuleDict({str(i): nn.Linear(width, size, bias=False) for i, (size, width) in enumerate(shapes)})
        config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=list(linears), lora_dropout=0.0)
        adapted = get_peft_model(linears, config).base_model.model
    for i, projection in enumerate(flat):
        layer = adapted[str(i)]
        layer.base_layer.weight = nn.Parameter(projection.weight, requires_grad=False)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = projection.lora_A, projection.lora_B
    layers = iter(adapted.values())
    return [[next(layers) for _ in projections] for projections in groups]


def _named(outputs: list[Sequence[Tensor]]) -> Results:
    return {f"y {g} {i}": y for g, group in enumerate(outputs) for i, y in enumerate(group)}


def _grouped(inputs: Inputs) -> Results:
    return _named([lora_linear_group(inputs[f"x {g}"], group) for g, group in enumerate(inputs["groups"])])


def _buffered(inputs: Inputs) -> Results:
    return _named([buffer(inputs[f"x {g}"]) for g, buffer in enumerate(inputs["buffers"])])


def _plain(inputs: Inputs) -> Results:
    def linear(x: Tensor, each: LoRAProjection) -> Tensor:
        assert each.lora_A is not None and each.lora_B is not None
        return F.linear(x, each.weight) + F.linear(F.linear(x, each.lora_A), each.lora_B) * each.scale

    return _named([[linear(inputs[f"x {g}"], each) for each in group] for g, group in enumerate(inputs["groups"])])


def _peft(inputs: Inputs) -> Results:
    return _named([[layer(inputs[f"x {g}"]) for layer in group] for g, group in enumerate(inputs["peft"])])


def _one_launch(inputs: Inputs) -> Results:
    def linear(x: Tensor, each: LoRAProjection) -> Tensor:
        y = lora_gemm(x, each.weight, each.lora_A, each.lora_B, each.scale)
        assert isinstance(y, Tensor)
        return y

    return _named([[linear(inputs[f"x {g}"], each) for each in group] for g, group in enumerate(inputs["groups"])])


def _base_products(inputs: Inputs, direction: Direction) -> Callable[[], Any]:
    """y = x W^T of every linear, as if adapters were merged, and for backward dx = dy W; no weight has a gradient."""
    pairs = [(inputs[f"x {g}"].detach(), each.weight) for g, group in enumerate(inputs["groups"]) for each in group]
    return _products(pairs, direction)


def _products(pairs: list[tuple[Tensor, Tensor]], direction: Direction) -> Callable[[], Any]:
    """The backward's products are of the forward's results: a GPU multiplies zeros faster than numbers."""
    outs = [x.new_empty(len(x), len(weight)) for x, weight in pairs]
    grads = [torch.empty_like(x) for x, _ in pairs] if direction == "fwd+bwd" else []

    def run() -> None:
        for (x, weight), out in zip(pairs, outs, strict=True):
            torch.mm(x, weight.t(), out=out)
        for (_, weight), out, grad in zip(pairs, outs, grads, strict=False):
            torch.mm(out, weight, out=grad)

    return run


# -- a decoder layer -----------------------------------------------------------------------------------------------------


def _decoder_layer(
    device: torch.device, dtype: torch.dtype, *, batch: int, tokens: int, hidden: int, inter: int, heads: int, kv_heads: int,
    rank: int,
) -> Inputs:  # fmt: skip
    """A layer of Qwen2 as peft adapts it: adapters in float32, whatever the base's dtype."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inter, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    layer = Qwen2DecoderLayer(config, 0).to(device, dtype)
    lora = LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=list(_NAMES), init_lora_weights=False)
    model = get_peft_model(layer, lora).train()
    # The copy has the parameters themselves.
    patched = patch_peft(copying.deepcopy(model, {id(x): x for x in model.parameters()}))
    x = randn(device, 1, batch, tokens, hidden, dtype=dtype)
    with torch.no_grad():
        positions = Qwen2RotaryEmbedding(config).to(device)(x, torch.arange(tokens, device=device)[None])
    return {"x": parameter(x), "positions": positions, "peft": model, "patched": patched}


def _through(inputs: Inputs, which: str) -> Results:
    found = inputs[which](inputs["x"], attention_mask=None, position_embeddings=inputs["positions"])
    return {"y": found[0] if isinstance(found, tuple) else found}


def _layer_products(inputs: Inputs, direction: Direction) -> Callable[[], Any]:
    weights = [module.base_layer.weight for module in inputs["peft"].modules() if hasattr(module, "base_layer")]
    x = inputs["x"].detach().flatten(0, 1)
    wide = randn(x.device, 2, len(x), max(weight.shape[1] for weight in weights), dtype=x.dtype)
    pairs = [(x if weight.shape[1] == x.shape[1] else wide, weight.detach()) for weight in weights]
    return _products(pairs, direction)


# -- 4-bit weights -------------------------------------------------------------------------------------------------------


def _nf4(device: torch.device, dtype: torch.dtype, *, rows: int, inputs: int, outputs: int, rank: int) -> Inputs:
    packed = randint(device, 1, 256, outputs * inputs // 2).to(torch.uint8)
    absmax = (0.5 + randint(device, 2, 100, outputs * inputs // 64) / 100.0) * inputs**-0.5
    return {
        "x": randn(device, 3, rows, inputs, dtype=dtype),
        "weight": NF4Weight(packed, absmax, (outputs, inputs)),
        "lora_A": randn(device, 4, rank, inputs, scale=inputs**-0.5, dtype=dtype),
        "lora_B": randn(device, 5, outputs, rank, scale=rank**-0.5, dtype=dtype),
    }


def _nf4_gemm(inputs: Inputs) -> Results:
    y = lora_gemm(inputs["x"], inputs["weight"], inputs["lora_A"], inputs["lora_B"], _SCALE)
    assert isinstance(y, Tensor)
    return {"y": y}


def _plain_nf4(inputs: Inputs) -> Results:
    x, weight = inputs["x"], inputs["weight"].dequantize(inputs["x"].dtype)
    return {"y": F.linear(x, weight) + F.linear(F.linear(x, inputs["lora_A"]), inputs["lora_B"]) * _SCALE}


def _nf4_bytes(inputs: Inputs, direction: Direction) -> Callable[[], Any]:
    packed, absmax, *_ = inputs["weight"]
    return copy(size_of(packed, absmax), packed.device)


def ops() -> list[Op]:
    base = "the bare GEMMs of the frozen base, y = x W^T and for backward dx = dy W"
    peft = Form(_peft, "peft")
    forms: dict[str, Form | Run] = {OURS: _grouped, "fastppo buffer": _buffered, "torch": _plain, "peft": peft}
    small, large = {"rows": 512, "rank": 8}, {"rows": 8192, "rank": 16}
    decoding = {f"M{rows} 7B r16": {"rows": rows, "groups": _LARGE, "rank": 16} for rows in (1, 16, 64)}
    layer_large = {"batch": 4, "tokens": 2048, "hidden": 3584, "inter": 18944, "heads": 28, "kv_heads": 4, "rank": 16}
    layer_small = {"batch": 4, "tokens": 128, "hidden": 128, "inter": 352, "heads": 4, "kv_heads": 2, "rank": 8}

    def linear(name: str, places: slice, *, on_cpu: bool = False) -> Op:
        ranks = {f"M8192 7B r{rank}": {"rows": 8192, "rank": rank, "groups": _LARGE[places]} for rank in (16, 64)}
        sizes = by_device(_linears, {"M512 H128 r8": small | {"groups": _SMALL[places]}}, ranks)
        return Op(name, "LoRA", sizes, forms, _base_products, base, compiled_on_cpu=on_cpu)

    return [
        linear("lora layer (7 linears)", slice(None)),
        Op(
            "decoder layer (patch_peft)",
            "LoRA",
            by_device(_decoder_layer, {"B4 T128 H128 r8": layer_small}, {"B4 T2048 7B r16": layer_large}),
            {
                OURS: Form(lambda inputs: _through(inputs, "patched"), "peft"),
                "peft": Form(lambda inputs: _through(inputs, "peft"), "peft"),
            },
            _layer_products,
            "the bare GEMMs of the frozen base alone; attention and all between the linear maps come on top",
            directions=("fwd+bwd",),
            reference="peft",
        ),
        Op(
            "lora_gemm, decoding (7 linears)",
            "decoding",
            by_device(_linears, {"M16 H128 r8": {"rows": 16, "groups": _SMALL, "rank": 8}}, decoding),
            {OURS: _one_launch, "torch": _plain, "peft": peft},
            _base_products,
            "the same linear maps with merged weights",
            directions=("fwd",),
        ),
        Op(
            "lora_gemm, NF4",
            "decoding",
            by_device(
                _nf4,
                {"M16 128x384 r8": {"rows": 16, "inputs": 128, "outputs": 384, "rank": 8}},
                {
                    f"M{rows} 3584x18944 r16": {"rows": rows, "inputs": 3584, "outputs": 18944, "rank": 16}
                    for rows in (1, 16, 64, 1024)
                },
            ),
            {OURS: _nf4_gemm, "torch": _plain_nf4},
            _nf4_bytes,
            "one read of the 4-bit weight (a copy of as many bytes)",
            directions=("fwd",),
        ),
        Op(
            "lora_linear",
            "LoRA",
            by_device(
                _linears,
                {"M512 128x128 r8": small | {"groups": _SMALL[1:2]}},
                {"M8192 3584x3584 r16": large | {"groups": _LARGE[1:2]}},
            ),
            forms,
            _base_products,
            base,
            compiled_on_cpu=True,
        ),
        linear("lora_linear_group q, k, v", slice(0, 1)),
        linear("lora_linear_group gate, up", slice(2, 3)),
    ]
