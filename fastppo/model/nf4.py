"""Bases in 4 bits: bitsandbytes' NF4 (Dettmers et al. 2023, QLoRA, arXiv 2305.14314), multiplied by `lora_gemm`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastppo.errors import UserError
from fastppo_kernels import NF4Weight, lora_gemm


def obstacle(device: torch.device) -> str | None:
    """Why no base can be in 4 bits on a device, or None. Makes no context on a GPU.

    Raises:
        Exception: what a bitsandbytes that is there but broken raises.
    """
    try:
        importlib.import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        return "bitsandbytes is not installed"
    library = importlib.import_module("bitsandbytes.cextension").lib
    if device.type != "cuda":
        importlib.import_module("bitsandbytes.functional").quantize_4bit(torch.ones(64, 64), quant_type="nf4")
    elif not getattr(library, "compiled_with_cuda", False):
        said = getattr(library, "error_msg", "it loaded the one for CPUs")
        return f"bitsandbytes has no library for this CUDA: {said}"
    return None


def quantisation(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What makes `from_pretrained` quantise the linear layers, but not the head, and compute in ``dtype``.

    Not doubly quantised: the scales are dequantised once and kept (`patch_peft`), so that nothing would be saved.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=False
    )


def in_4_bits(model: nn.Module) -> bool:
    """Whether transformers has loaded the model in 4 bits, of whatever type."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers in 4 bits of a model that has such, by name."""
    kind = importlib.import_module("bitsandbytes.nn").Linear4bit
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


class _ByLoraGemm:
    """Comes before bitsandbytes' layer in the bases of a layer's class: `lora_gemm` computes, the rest is bitsandbytes'.

    So policy and bare base multiply by the same kernel. And bitsandbytes' own forward on a CPU would be wrong: of weights whose
    rows do not end with a block it dequantises other values, and where the CPU has AVX-512 BF16 it packs the weight anew in the
    first pass without a gradient; from then on no gradient reaches the layer's input.
    """

    computes_by_lora_gemm = True  # `patch_peft` looks for it

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        y = lora_gemm(x.to(layer.compute_dtype), NF4Weight.from_bitsandbytes(layer.weight), None, None, bias=layer.bias)
        assert isinstance(y, Tensor)
        return y.to(x.dtype)


@cache
def _class_of(kind: type) -> type:
    return type(kind.__name__, (_ByLoraGemm, kind), {})


def adopt(model: PreTrainedModel, dtype: torch.dtype, shown: str) -> None:
    """Make a model in 4 bits compute in ``dtype``, and its 4-bit layers through `lora_gemm`.

    Raises:
        UserError: no such layers, layers of another type than NF4, or a head in 4 bits.
    """
    found = list(layers(model)) if in_4_bits(model) else []
    if not found:
        raise UserError(f"{shown}: --dtype nf4 is not possible: no layer of it was put in 4 bits (is it stored quantised?)")
    for name, layer in found:
        kind = layer.weight.quant_state.quant_type
        if kind != "nf4":
            raise UserError(f"{shown}: is stored in 4 bits of type {kind} ({name}); expected nf4")
        if layer is model.get_output_embeddings():
            raise UserError(f"{shown}: its language-model head is stored in 4 bits; expected plain weights")
        plain: Any = type(layer)
        layer.__class__ = _class_of(plain)
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
    if model.hf_quantizer.pre_quantized:  # then transformers leaves the other weights in the dtype of their file
        for parameter in model.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):  # codes may be stored as floats, too
                parameter.data = parameter.data.to(dtype)


def rows_wrong_on_cpu(model: nn.Module) -> list[int]:
    """Lengths of rows in 4 bits that do not end with a block, which bitsandbytes by itself gets wrong on a CPU."""
    if not in_4_bits(model):
        return []
    return sorted({layer.in_features for _, layer in layers(model) if layer.in_features % layer.weight.quant_state.blocksize})


@torch.no_grad()
def copy_dequantised(model: nn.Module, dense: nn.Module) -> None:
    """Give ``dense``, the same architecture with plain weights, the values that the 4 bits of ``model`` stand for."""
    for name, layer in layers(model):
        target: Any = dense.get_submodule(name)
        weight_NK = NF4Weight.from_bitsandbytes(layer.weight).dequantize(layer.compute_dtype)
        target.weight.copy_(weight_NK.t() if isinstance(target, Conv1D) else weight_NK)
