"""Makes the LoRA layers of a PEFT model compute through `lora_linear`, and back.

Patching swaps the class of each layer for a subclass that overrides ``forward`` and nothing else. So every ``isinstance``
check holds, parameters, their names and all of peft's methods are the layer's own, ``torch.compile`` sees an ordinary method,
and the patch survives ``copy.deepcopy`` and pickling. A replaced ``forward`` attribute would not: pickle turns a bound
method back into the class's, and other tools (accelerate's offloading) put their own ``forward`` in the same place.

What the fast form does not cover is left to peft, call by call, for the state of a layer changes: adapters are switched,
merged, disabled and added, modes change, hooks come and go.
"""

import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import FLOAT_DTYPES
from .lora_gemm import NF4Weight, lora_gemm
from .lora_linear import LoRAProjection, checked_group, lora_linear

Masks = Tensor | Mapping[str, Tensor]


_UNKNOWN = (
    "adapter_mask is active around a backward that computes a checkpointed pass again, whose own mask is not known: enter the "
    "context inside the checkpointed function; if that pass had no mask, call backward outside of the context"
)


class _Patch:
    """What the patched layers of one model share: the masks of the `adapter_mask` that is active, if any."""

    masks: Masks | None = None
    checkpoints = False  # whether what transformers checkpoints under these masks is computed again under them
    backward = -1  # the run of backward that the masks were set in, -1 for none

    def active(self) -> Masks | None:
        """The masks for the pass that a layer is in.

        What backward computes again brings the masks of its own pass with it, see `_checkpoint_under`: those that were in
        force when backward was called are not for it.
        """
        if self.masks is None or torch.compiler.is_compiling() or self.is_current():
            return self.masks
        if self.checkpoints:
            return None  # a pass made outside of `adapter_mask`
        raise ValueError(_UNKNOWN)

    def is_current(self) -> bool:
        return torch._C._current_graph_task_id() == self.backward

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy made inside `adapter_mask` is not under it


# Attributes of a patched layer that are made anew where they are missing.
_CACHES = ("_fastppo_plan", "_fastppo_nf4")


class _FastLayer:
    """Comes before peft's layer class in the bases of a patched layer's class, see `_fast_class`."""

    _peft_class: type
    _fastppo_patch: _Patch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if not torch.compiler.is_compiling():
            plan = self.__dict__.get("_fastppo_plan")
            if plan is not None and not args and not kwargs and self._fastppo_patch.masks is None and plan.holds(layer, x):
                return checked_group(x, plan.projections, None, None)[0]
        masks = self._fastppo_patch.active()
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.merged or (names and not layer.disable_adapters):
            operands = _operands(layer, names, x, args, kwargs)
            if isinstance(operands, _Operands):
                if not torch.compiler.is_compiling():
                    vars(self)["_fastppo_plan"] = _Plan.of(layer, operands, names, x)
                return _compute(operands, names, x, masks)
            if masks is not None:
                raise ValueError(f"adapter_mask cannot switch adapters inside a layer that computes through peft: {operands}")
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        whole: Any = super().__reduce_ex__(2)[2]
        state = {name: value for name, value in whole.items() if name not in _CACHES}
        return _empty_layer, (self._peft_class,), state  # the class itself is made at run time: it cannot be looked up


@cache
def _fast_class(peft_class: type) -> type:
    """The subclass of one of peft's layer classes that patched layers get."""
    return type(f"Fast{peft_class.__name__}", (_FastLayer, peft_class), {"_peft_class": peft_class, "__module__": __name__})


def _empty_layer(peft_class: type) -> Any:
    """A patched layer without state, for copying and unpickling."""
    made: Any = _fast_class(peft_class)
    return made.__new__(made)


# -- what a layer can do -------------------------------------------------------------------------------------------------


class _Adapter(NamedTuple):
    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    scale: float


class _Base(NamedTuple):
    weight: Tensor | NF4Weight  # [N, K]
    bias: Tensor | None
    dtype: torch.dtype  # in which the base computes


class _Operands(NamedTuple):
    base: _Base
    adapters: list[_Adapter]


def _is_plain(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether calling the module is nothing but ``forward``: what the fast form leaves out may not be missed."""
    return (
        type(module).forward is forward
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def _is_dense(tensor: Any) -> bool:
    """Whether it is an ordinary floating-point tensor, not a quantised, sharded or otherwise special one."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOAT_DTYPES


def _is_conv1d(base: nn.Module) -> bool:
    # GPT-2's linear layer, which keeps its weight as [K, N]. By name: the class belongs to transformers.
    return type(base).__name__ == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils"


def _base(layer: Any) -> _Base | str:
    """What the fast form needs of a layer's base, or why it cannot use it."""
    base: Any = layer.base_layer
    weight: Any = base.weight
    bias: Any = base.bias
    if _is_plain(base, nn.Linear.forward):
        transposed = False
    elif _is_conv1d(base) and _is_plain(base, type(base).forward):
        transposed = True
    elif _is_4bit(base) and _is_plain(base, type(base).forward):
        return _base_4bit(layer, base, weight, bias)
    else:
        return f"base layer {type(base).__name__} (with hooks or a forward of its own)"
    if not _is_dense(weight):
        return f"base weight {_describe(weight)}"
    return _Base(weight.t() if transposed else weight, bias, weight.dtype)


def _is_4bit(base: nn.Module) -> bool:
    """bitsandbytes' layer, or one in its place whose class says that its forward is the same by `lora_gemm`."""
    kind = type(base)
    return (kind.__name__, kind.__module__) == ("Linear4bit", "bitsandbytes.nn.modules") or _is_by_lora_gemm(base)


def _is_by_lora_gemm(base: nn.Module) -> bool:
    # Of a fastppo model in 4 bits, see `fastppo.model.nf4`.
    return hasattr(type(base), "computes_by_lora_gemm")


def _nf4(layer: Any, weight: Any) -> NF4Weight:
    """The 4-bit weight, made once: dequantising the scales of a doubly quantised one takes several launches.

    It is made again when the parameter, what it points at, or its quantisation state is another than before.
    """
    if torch.compiler.is_compiling():
        return NF4Weight.from_bitsandbytes(weight)
    state = weight.quant_state
    inner = state.state2
    scales = [state.absmax] if inner is None else [state.absmax, state.offset, inner, inner.absmax]
    source = [weight, state, *scales]
    versions = [weight.data_ptr(), *(part._version for part in scales if isinstance(part, Tensor) and not part.is_inference())]
    kept = vars(layer).get("_fastppo_nf4")
    if kept is not None and kept[1] == versions and all(map(operator.is_, kept[0], source)):
        return kept[2]
    made = NF4Weight.from_bitsandbytes(weight)
    vars(layer)["_fastppo_nf4"] = source, versions, made
    return made


def _base_4bit(layer: Any, base: Any, weight: Any, bias: Tensor | None) -> _Base | str:
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return "4-bit weight in a layout of its own"
    if state.quant_type != "nf4":
        return f"4-bit weight of type {state.quant_type}"
    # bitsandbytes computes in the dtype of its first input, where none is set, and rounds to that of the state before.
    dtype = base.compute_dtype or state.dtype
    if state.dtype not in (dtype, torch.float32) and not _is_by_lora_gemm(base):
        return f"4-bit weight of {state.dtype}, computed in {dtype}"
    return _Base(_nf4(layer, weight), bias, dtype)


def _adapter(layer: Any, name: str, *, now: bool) -> _Adapter | str:
    """One adapter of a layer, or why the fast form cannot use it now or (``now`` false) in training mode."""
    if name in layer.lora_variant:
        return "DoRA" if layer.use_dora.get(name) else type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
    dropout = layer.lora_dropout[name]
    if not _is_plain(dropout, type(dropout).forward):
        return "lora_dropout with hooks or a forward of its own"
    if type(dropout) is nn.Dropout:
        if dropout.p > 0 and (dropout.training or not now):
            return "lora_dropout > 0 (in training mode)"
    elif type(dropout) is not nn.Identity:
        return f"dropout {type(dropout).__name__}"
    down, up = layer.lora_A[name], layer.lora_B[name]
    if not (_is_plain(down, nn.Linear.forward) and _is_plain(up, nn.Linear.forward)):
        return "lora_A or lora_B with hooks or a forward of its own"
    if down.bias is not None or up.bias is not None:
        return "lora_bias"
    lora_A, lora_B = down.weight, up.weight
    for weight in (lora_A, lora_B):
        if not _is_dense(weight):
            return f"adapter weight {_describe(weight)}"
    scale = layer.scaling[name]
    if isinstance(scale, Tensor):  # reading it would wait for the GPU
        return "scaling in a tensor (prepared for hotswapping)"
    return _Adapter(lora_A, lora_B, float(scale))


def _describe(weight: Tensor) -> str:
    return f"{type(weight).__name__} ({str(weight.dtype).removeprefix('torch.')})"


def _operands(layer: Any, names: list[str], x: Tensor, args: Any, kwargs: dict[str, Any]) -> _Operands | str:
    """What the fast form computes with, or why this call is peft's."""
    if layer.merged:
        return "its adapters are merged"
    if args or any(value is not None for value in kwargs.values()):
        return f"it got {', '.join(kwargs) or 'more arguments than x'}"
    base = _base(layer)
    if isinstance(base, str):
        return base
    adapters = []
    for name in names:
        adapter = _adapter(layer, name, now=True)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    quantised = isinstance(base.weight, NF4Weight)
    if quantised and not layer.base_layer.compute_type_is_set:
        return "the compute dtype of bitsandbytes is not set yet"  # its first call does that
    if not torch.is_autocast_enabled(x.device.type) or torch.float64 in (base.dtype, x.dtype):
        # An error of torch, or, with 4 bits, an adapter that peft computes in the wider dtype of x.
        if x.dtype != base.dtype or (base.bias is not None and base.bias.dtype != base.dtype and not quantised):
            return f"x in {x.dtype}, the base in {base.dtype}"
    if not layer.cast_input_dtype_enabled and any(adapter.lora_A.dtype != x.dtype for adapter in adapters):
        return "peft's casting of inputs is switched off"
    return _Operands(base, adapters)


# Of peft's layers, where `_Plan` finds them without their properties.
_LOOKED_AT = {"merged_adapters", "_disable_adapters", "_active_adapter", "scaling", "lora_variant", "cast_input_dtype_enabled"}


class _Plan:
    """What a layer with one adapter computes with, for as long as nothing that was looked at for it has changed.

    Looking at a layer takes peft's properties and torch's `nn.Module.__getattr__` some 15 us, as much as a small layer's
    products; looking whether it is as before takes 4.
    """

    def __init__(self, layer: Any, projection: LoRAProjection, name: str, x: Tensor) -> None:
        self.name, self.active, self.scale = name, layer.active_adapter, layer.scaling[name]
        modules = layer.base_layer, layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
        self.modules = [(module, vars(module), type(module), type(module).forward) for module in modules]
        self.base, self.dropout, self.down, self.up = modules
        self.projections = (projection,)
        self.weight, self.bias, self.width = self.base.weight, self.base.bias, projection.weight.shape[1]
        self.dtypes = x.dtype, projection.lora_A.dtype, projection.lora_B.dtype  # type: ignore[union-attr]

    @classmethod
    def of(cls, layer: Any, operands: _Operands, names: list[str], x: Tensor) -> "_Plan | None":
        """None for what is rare: several adapters, 4 bits, autocast, base layers other than `nn.Linear`."""
        (weight, bias, _), adapters = operands
        rare = len(adapters) != 1 or layer.active_adapters != names or isinstance(weight, NF4Weight)
        if rare or weight is not layer.base_layer.weight or torch.is_autocast_enabled(x.device.type):
            return None
        if not vars(layer).keys() >= _LOOKED_AT:
            return None
        lora_A, lora_B, scale = adapters[0]
        return cls(layer, LoRAProjection(weight, lora_A, lora_B, scale, bias), names[0], x)

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether the layer is as it was and computes `x` as it did, with shapes that `lora_linear` has seen."""
        own, name = vars(layer), self.name
        children = own["_modules"]
        lora_A, lora_B = self.projections[0][1:3]
        (_, base, *_), (_, dropout, *_), (_, down, *_), (_, up, *_) = self.modules
        base, down, up = base["_parameters"], down["_parameters"], up["_parameters"]
        if (
            own["merged_adapters"]
            or own["_disable_adapters"]
            or own["_active_adapter"] != self.active
            or own["scaling"].get(name) is not self.scale
            or own["lora_variant"]
            or not own["cast_input_dtype_enabled"]
            or children["base_layer"] is not self.base
            or vars(children["lora_dropout"])["_modules"].get(name) is not self.dropout
            or vars(children["lora_A"])["_modules"].get(name) is not self.down
            or vars(children["lora_B"])["_modules"].get(name) is not self.up
            or base.get("weight") is not self.weight
            or base.get("bias") is not self.bias
            or down.get("weight") is not lora_A
            or up.get("weight") is not lora_B
            or down.get("bias") is not None
            or up.get("bias") is not None
            or (self.weight.dtype, lora_A.dtype, lora_B.dtype) != self.dtypes
            or x.dtype is not self.dtypes[0]
            or x.dim() == 0
            or x.shape[-1] != self.width
            or x.device != self.weight.device
            or (dropout["training"] and dropout.get("p"))
            or torch.is_autocast_enabled(x.device.type)
        ):
            return False
        for module, state, kind, forward in self.modules:
            if (
                type(module) is not kind
                or kind.forward is not forward
                or "forward" in state
                or state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
            ):
                return False
        return True


# -- the fast form -------------------------------------------------------------------------------------------------------


def _compute(operands: _Operands, names: list[str], x: Tensor, masks: Masks | None) -> Tensor:
    (weight, bias, dtype), adapters = operands
    mask = None if masks is None else _layer_mask(masks, names, [len(adapter.lora_A) for adapter in adapters], x)
    lora_A, lora_B, scale = adapters[0] if len(adapters) == 1 else _stack(adapters)
    if not isinstance(weight, NF4Weight):
        return lora_linear(x, weight, lora_A, lora_B, scale, bias=bias, adapter_mask=mask)
    if mask is not None:
        mask = mask[..., None] if mask.dim() < x.dim() else mask.repeat_interleave(len(lora_A) // mask.shape[-1], dim=-1)
    with torch.autocast(x.device.type, enabled=False):  # bitsandbytes has a compute dtype of its own
        y = lora_gemm(x.to(dtype), weight, lora_A, lora_B, scale, bias=bias, factor=mask)
    assert isinstance(y, Tensor)
    return y.to(x.dtype)


def _stack(adapters: list[_Adapter]) -> _Adapter:
    """Several active adapters as one of the sum of their ranks."""
    lora_A = torch.cat([adapter.lora_A for adapter in adapters])
    lora_B = torch.cat([adapter.lora_B * adapter.scale for adapter in adapters], dim=1)
    return _Adapter(lora_A, lora_B, 1.0)


def _layer_mask(masks: Masks, names: list[str], ranks: list[int], x: Tensor) -> Tensor | None:
    """The mask as `lora_linear` wants it: of x's leading shape, with a last dimension of groups for several adapters."""
    leading = x.shape[:-1]
    if isinstance(masks, Tensor):
        return _fit(masks, leading)
    fitted = [_fit(masks[name], leading) if name in masks else None for name in names]
    if all(mask is None for mask in fitted):
        return None
    # Groups are of equal rank: an adapter of rank r takes r / (greatest common divisor) of them.
    group = math.gcd(*ranks)
    ones = torch.ones(leading, dtype=torch.float32, device=x.device)
    columns = [
        (ones if mask is None else mask.to(torch.float32))[..., None].expand(*leading, rank // group)
        for mask, rank in zip(fitted, ranks, strict=True)
    ]
    return torch.cat(columns, dim=-1)


def _fit(mask: Tensor, leading: torch.Size) -> Tensor:
    """The mask for activations of this leading shape: broadcast, or flattened as they are."""
    if mask.shape == leading:
        return mask
    if len(leading) == 1 and mask.numel() == leading[0]:
        return mask.reshape(leading)
    padded = (1,) * (len(leading) - mask.dim()) + tuple(mask.shape)
    if len(padded) == len(leading) and all(size in (1, wanted) for size, wanted in zip(padded, leading, strict=True)):
        return mask.expand(leading)
    raise ValueError(
        f"adapter_mask must broadcast to the tokens of every adapted layer ({list(leading)}), got shape {list(mask.shape)}"
    )


# -- the model -----------------------------------------------------------------------------------------------------------


def _lora_layers(model: Any) -> list[Any]:
    """Every layer of the model that holds LoRA adapters, of whatever kind."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        from peft.tuners.adalora import AdaLoraLayer
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ValueError("patch_peft needs peft, which cannot be imported here") from error
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in tuned if isinstance(layer, LoraLayer) and not isinstance(layer, AdaLoraLayer)]
    if not layers:
        kinds = sorted({f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}" for layer in tuned})
        raise ValueError(f"model must have LoRA layers made by peft, got {', '.join(kinds) or 'none of peft'}")
    return layers


def _can_patch(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    is_4bit = type(layer).__name__ == "Linear4bit" and type(layer).__module__ == "peft.tuners.lora.bnb"
    return is_4bit or type(layer).forward is Linear.forward


def _obstacle(layer: Any) -> str | None:
    """Why the layer, as it is now, computes through peft in some mode, or None."""
    if not isinstance(layer, _FastLayer):
        return f"layer {type(layer).__name__}"
    found: Any = layer
    parts = [_base(found), *(_adapter(found, name, now=False) for name in found.lora_A)]
    return next((part for part in parts if isinstance(part, str)), None)


def patch_peft(model: Any) -> Any:
    """Make the LoRA layers of a PEFT model compute through `lora_linear`; outputs and gradients stay the same.

    Works in place on whatever peft has put LoRA into: a ``PeftModel``, a transformers model after ``add_adapter`` or
    ``load_adapter``, a module of your own. Parameters, their names, ``state_dict``, saving, loading, switching, disabling,
    merging, adapter names in a batch, gradient checkpointing, autocast and ``torch.compile`` work as before. Call it again
    after an ``add_adapter`` that adapts layers which had no adapter before; the others stay patched.

    A layer computes through peft's own code, with the same results, wherever the fast form does not apply: ``lora_dropout``
    in training mode, DoRA and peft's other variants, ``lora_bias``, adapters on embeddings and convolutions, sharded base
    weights and quantised ones other than bitsandbytes' NF4, base layers with hooks or a forward of their own. One warning
    counts such layers. Merged layers and batches with ``adapter_names`` are peft's as well.

    Where adapters are in float32 and the base in half precision, peft computes the adapters in float32; `lora_linear` rounds
    them to the dtype of the activations, as peft does under autocast, and sums up in float32.

    Args:
        model: a module with LoRA layers made by peft.

    Returns:
        The same model.

    Raises:
        ValueError: no module, no LoRA layers in it (other tuners than LoRA are not supported), or no peft.
    """
    layers = _lora_layers(model)
    patch = next((layer._fastppo_patch for layer in layers if isinstance(layer, _FastLayer)), None) or _Patch()
    for layer in layers:
        if not isinstance(layer, _FastLayer) and _can_patch(layer):
            peft_class: type = type(layer)
            layer.__class__ = _fast_class(peft_class)
        if isinstance(layer, _FastLayer):
            layer._fastppo_patch = patch
    obstacles = Counter(obstacle for obstacle in map(_obstacle, layers) if obstacle)
    if obstacles:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(obstacles.items()))
        warnings.warn(
            f"patch_peft: {obstacles.total()} of {len(layers)} LoRA layers compute through peft ({reasons})", stacklevel=2
        )
    return model


def unpatch_peft(model: Any) -> Any:
    """Undo `patch_peft` in place; a model that is not patched stays as it is.

    Returns:
        The same model.

    Raises:
        ValueError: as `patch_peft`, or something else changed the class of a patched layer (FSDP2 does).
    """
    patched: list[Any] = [layer for layer in _lora_layers(model) if isinstance(layer, _FastLayer)]
    for layer in patched:
        if "_peft_class" not in vars(type(layer)):
            raise ValueError(f"model has a patched layer whose class was changed since, to {type(layer).__name__}")
    for layer in patched:
        layer.__class__ = layer._peft_class
        del layer._fastppo_patch
        for name in _CACHES:
            vars(layer).pop(name, None)
    return model


@contextmanager
def adapter_mask(model: Any, mask: Masks) -> Iterator[None]:
    """Inside, the adapters of a patched model act on some tokens only: policy and reference rows in one batch.

        with adapter_mask(model, is_policy):           # [B, T] or [B, 1]: rows of ones and rows of zeros
            logits = model(input_ids).logits           # the rows of zeros are the base model's, without a second pass

    The gradient of a token is that of what acted on it; no gradient goes to the mask. A token whose mask is 0 gets the base
    layer's output exactly, whatever the adapter holds. Not switched: ``modules_to_save`` and trained biases, which have no
    adapter form. Backward may run inside the context or after it, for passes made with other masks or none as well, under
    transformers' gradient checkpointing too (switched on before the context is entered). Around a ``torch.utils.checkpoint``
    of your own, enter the context inside the checkpointed function: what its backward computes again would have no mask.
    Layers that are compiled one by one under gradient checkpointing want backward outside of the context.

    Args:
        model: a model after `patch_peft`.
        mask: bool, or a finite factor for each token (any, negative ones too), of a shape that broadcasts to the tokens of
            every adapted layer: [T], [B, T], [B, 1], or 0-d for all of them. One dimension is always the tokens: a mask of
            rows is [B, 1], never [B], which would be taken for [T] where B is T. Integers are refused, for they might be
            meant as numbers of adapters: `mask.bool()` makes a mask of zeros and ones. For several active adapters it switches
            them together; a mapping from adapter names to masks switches them one by one, and those it does not name act on
            every token.

    Raises:
        ValueError: a model with LoRA layers that are not patched, a wrong mask or adapter name, and, when the model is
            called, a mask that does not fit its tokens or a layer that falls back to peft (see `patch_peft`).
    """
    layers = _lora_layers(model)
    others = Counter(type(layer).__name__ for layer in layers if not isinstance(layer, _FastLayer))
    if others:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(others.items()))
        raise ValueError(f"adapter_mask needs patch_peft(model) first; LoRA layers that are not patched: {kinds}")
    given = mask if isinstance(mask, Mapping) else {"": mask}
    for name, value in given.items():
        if not isinstance(value, Tensor) or not (value.dtype == torch.bool or value.dtype in FLOAT_DTYPES):
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"mask {name!r} must be a bool or floating-point tensor, got {came}".replace("mask ''", "mask"))
    if isinstance(mask, Mapping):
        known = {name for layer in layers for name in layer.lora_A}
        if unknown := sorted(set(mask) - known):
            raise ValueError(f"mask must name adapters of the model ({', '.join(sorted(known))}), got {', '.join(unknown)}")
    patches = {id(layer._fastppo_patch): layer._fastppo_patch for layer in layers}.values()
    checkpointed = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    functions = [module._gradient_checkpointing_func for module in checkpointed]
    try:
        for module, function in zip(checkpointed, functions, strict=True):
            module._gradient_checkpointing_func = _checkpoint_under(function, list(patches), mask)
        with _masked(patches, mask, any(getattr(module, "gradient_checkpointing", False) for module in checkpointed)):
            yield
    finally:
        for module, function in zip(checkpointed, functions, strict=True):
            module._gradient_checkpointing_func = function


@contextmanager
def _masked(patches: Any, masks: Masks, checkpoints: bool) -> Iterator[None]:
    before = [(patch.masks, patch.checkpoints, patch.backward) for patch in patches]
    now = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
    try:
        for patch in patches:
            patch.masks, patch.checkpoints, patch.backward = masks, checkpoints, now
        yield
    finally:
        for patch, state in zip(patches, before, strict=True):
            patch.masks, patch.checkpoints, patch.backward = state


def _checkpoint_under(checkpoint: Callable[..., Any], patches: list[_Patch], masks: Masks) -> Callable[..., Any]:
    """The checkpoint function, with the masks of this forward pass in force when backward computes a layer again."""

    def checkpoint_under(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiled graph holds the masks and is not traced again
            return checkpoint(function, *args, **kwargs)
        if not all(patch.is_current() for patch in patches):  # one checkpoint inside another
            raise ValueError(_UNKNOWN)

        def again(*inner: Any, **inner_kwargs: Any) -> Any:
            with _masked(patches, masks, True):
                return function(*inner, **inner_kwargs)

        return checkpoint(again, *args, **kwargs)

    return checkpoint_under
