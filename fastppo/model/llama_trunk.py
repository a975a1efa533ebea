"""The trunk of Llama-shaped models over packed tokens, layer by layer: the same numbers as transformers', with less done.

- Projections of one input (q, k, v; gate, up) are one operation, which shares what their adapters have in common.
- Behind the last layer's attention only the rows go on that somebody reads.
- Norms, rotary embedding and SwiGLU are the kernels' operations; no masks or caches are prepared that nobody uses.

Parameters stay where transformers and peft have them, but for frozen weights on a GPU in half precision: those move into
bordered buffers, and their parameters become views (`LlamaTrunk.border`). Nothing else is copied, but for the sampler on a CPU
(`_fold`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.models.llama import LlamaModel
from transformers.models.mistral import MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2 import Qwen2Model
from transformers.models.qwen3 import Qwen3Model

from fastppo.model.attention import DecodeContext
from fastppo.model.recompute import Recompute, again
from fastppo_kernels import (
    DecoderWeights,
    LoRAProjection,
    LoRAWeightBuffer,
    decoder_layer,
    fold_lora,
    frozen_linear,
    lora_linear_group,
    rms_norm,
    rope,
    row_multiple,
    swiglu,
)

FEWEST_PADDED = 256  # tokens: below, the rows that padding adds would be too many

SHAPES = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


class LlamaTrunk:
    """Hidden states of packed tokens; ``context`` says what each layer's queries attend to (``fastppo.model.attention``)."""

    def __init__(self, trunk: nn.Module):
        self.trunk: Any = trunk
        self.layers: list[Any] = list(trunk.layers)[: trunk.config.num_hidden_layers]  # type: ignore[arg-type,index,union-attr]
        self.buffers: dict[Any, tuple[LoRAWeightBuffer, ...]] = {}  # by layer

    @staticmethod
    def suits(trunk: nn.Module) -> bool:
        """Whether this is such a trunk, with nothing in it that a forward of its own would miss."""
        return type(trunk) in SHAPES and trunk.config.hidden_act == "silu" and not any(map(_is_altered, trunk.modules()))  # type: ignore[union-attr]

    def border(self) -> None:
        """Move the frozen weights of layers that `decoder_layer` computes into bordered buffers, sized for the active adapter.

        The weights are there once: each parameter becomes a view of its buffer. Adapters stay peft's parameters; any of the
        same ranks can be active later.
        """
        for layer in self.layers:
            weights = _weights(layer, self.trunk.embed_tokens.weight.dtype)
            if weights is None or layer in self.buffers:
                continue
            buffers = []
            for group in weights.groups:  # one after the other, so that no more than one is there twice
                buffers.append(LoRAWeightBuffer(group, masked=False))
                for i, projection in enumerate(group):
                    projection.weight.data = buffers[-1].weight_view(i)
            self.buffers[layer] = tuple(buffers)
            if buffers[0].weight.is_cuda:  # what the weights were in is too small for the next buffers: torch would keep it
                torch.cuda.empty_cache()

    def run(
        self, token_ids_T: Tensor, positions_T: Tensor, context: Any, rows_R: Tensor | None = None,
        recompute: Recompute | None = None,
    ) -> Tensor:  # fmt: skip
        """[T, H], or [R, H] of ``rows_R``. recompute: how layers are computed again in backward; None: not at all."""
        context.calls += len(self.layers)
        tokens, wanted = len(token_ids_T), None if rows_R is None else len(rows_R)
        multiple = row_multiple(token_ids_T.device, self.trunk.embed_tokens.weight.dtype)
        if tokens >= FEWEST_PADDED:  # with rows that nobody looks at: products of many different sizes would be slow
            token_ids_T, positions_T = (F.pad(x, (0, -tokens % multiple)) for x in (token_ids_T, positions_T))
            rows_R = None if rows_R is None else F.pad(rows_R, (0, -len(rows_R) % multiple))
        x_TH = self.trunk.embed_tokens(token_ids_T)
        cos, sin = self.trunk.rotary_emb(x_TH[None], positions_T[None])
        for layer in self.layers[:-1]:
            run = partial(self._layer, layer, cos=cos[0], sin=sin[0], context=context, tokens=tokens, rows=None)
            x_TH = run(x_TH) if recompute is None else again(run, x_TH, list(layer.parameters()), recompute)
        # Of the last layer all is kept: backward begins with it.
        x_TH = self._layer(self.layers[-1], x_TH, cos[0], sin[0], context, tokens, rows_R)
        return _norm(self.trunk.norm, x_TH[: tokens if wanted is None else wanted])

    def _layer(
        self, layer: Any, x_TH: Tensor, cos: Tensor, sin: Tensor, context: Any, tokens: int, rows: Tensor | None
    ) -> Tensor:
        """The first ``tokens`` rows are real."""
        attention, mlp = layer.self_attn, layer.mlp
        window = window_of(attention)
        attend = partial(context.attend, attention.layer_idx, scale=attention.scaling, window=window, softcap=None)
        weights = _weights(layer, x_TH.dtype) if context.folded is None else None
        # A captured step is run again without Python, where nobody would copy changed adapters into the buffers.
        if weights is not None and not isinstance(context, DecodeContext):
            weights = weights._replace(buffers=self.buffers.get(layer))
        if weights is not None and not torch.is_autocast_enabled(x_TH.device.type):
            return decoder_layer(x_TH, cos, sin, weights, attend, rows_R=rows, tokens=tokens, fold=True)
        heads = (x_TH.shape[0], -1, attention.head_dim)
        project = partial(_project, context.folded)
        q, k, v = project(_norm(layer.input_layernorm, x_TH), attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = q.view(heads), k.view(heads), v.view(heads)
        if hasattr(attention, "q_norm"):  # Qwen3
            q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
        q, k = rope(q, k, cos, sin)
        seen = attend(*(x[:tokens] for x in (q, k, v)))
        if rows is None:
            seen = F.pad(seen, (0, 0, 0, 0, 0, len(x_TH) - tokens))
        else:
            seen, x_TH = seen[rows], x_TH[rows]
        x_TH = x_TH + project(seen.flatten(1), attention.o_proj)[0]
        gate, up = project(_norm(layer.post_attention_layernorm, x_TH), mlp.gate_proj, mlp.up_proj)
        return x_TH + project(swiglu(gate, up), mlp.down_proj)[0]


def _weights(layer: Any, dtype: torch.dtype) -> DecoderWeights | None:
    """What `decoder_layer` computes with; None where the layer has something that it does not know, or that is not frozen."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = {"input_norm": layer.input_layernorm, "post_norm": layer.post_attention_layernorm}
    if hasattr(attention, "q_norm"):  # Qwen3
        norms |= {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
    if any(norm.weight.requires_grad or norm.weight.dtype != dtype for norm in norms.values()):
        return None
    if len({norm.variance_epsilon for norm in norms.values()}) > 1:
        return None
    projections: dict[str, Any] = {}
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        module = getattr(attention if name in "qkvo" else mlp, f"{name}_proj")
        projection = _projection(module)
        if projection is None or projection.weight.dtype != dtype or projection.weight.requires_grad:
            return None
        if projection.bias is not None and projection.bias.requires_grad:
            return None
        projections[name] = projection
    weights = {name: norm.weight for name, norm in norms.items()}
    return DecoderWeights(eps=norms["input_norm"].variance_epsilon, head_dim=attention.head_dim, **weights, **projections)


def _is_altered(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def window_of(attention: Any) -> int | None:
    if isinstance(attention, MistralAttention):  # the same for all layers
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)  # Qwen2 and Qwen3 have layers of both kinds, Llama has none


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _project(folded: dict[Any, Any] | None, x_TK: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """Linear layers of one input, each with peft's adapter on it or without.

    folded: what earlier calls with the same adapter made of the layers, where that is wanted: one weight with all in it.
    """
    if folded is not None:
        if modules[0] not in folded:
            folded[modules[0]] = _fold(x_TK, modules)
        if folded[modules[0]] is not None:
            weight, bias, sizes = folded[modules[0]]
            return frozen_linear(x_TK, weight, bias).split(sizes, -1)
    projections = [_projection(module) for module in modules]
    if all(projection is not None and projection.weight.dtype == x_TK.dtype for projection in projections):
        return lora_linear_group(x_TK, projections, fold=True)  # type: ignore[arg-type]
    return tuple(module(x_TK) for module in modules)


def _fold(x_TK: Tensor, modules: tuple[nn.Module, ...]) -> tuple[Tensor, Tensor | None, list[int]] | None:
    """Weight + scale B A of the layers on top of each other, their biases, their sizes; None where one is no plain layer."""
    projections = []
    for projection in map(_projection, modules):
        if projection is None or any(t is not None and t.dtype != x_TK.dtype for t in (projection.weight, projection.lora_A)):
            return None
        projections.append(projection)
    return *fold_lora(projections), [len(projection.weight) for projection in projections]


def _projection(module: Any) -> LoRAProjection | None:
    """None for what is more than a linear layer with at most one plain adapter: quantised weights, for example."""
    if type(module) is nn.Linear:
        return LoRAProjection(module.weight, bias=module.bias)
    if not isinstance(module, LoraLinear) or type(module.base_layer) is not nn.Linear or module.merged or module.lora_variant:
        return None
    base = module.base_layer
    names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return LoRAProjection(base.weight, bias=base.bias)
    if len(names) > 1 or not isinstance(module.lora_dropout[names[0]], nn.Identity):
        return None
    lora_A, lora_B = module.lora_A[names[0]], module.lora_B[names[0]]
    if lora_B.bias is not None:
        return None
    return LoRAProjection(base.weight, lora_A.weight, lora_B.weight, module.scaling[names[0]], base.bias)
