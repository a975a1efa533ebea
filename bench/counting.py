"""Counts what a computation asks of a GPU, on meta tensors: no GPU, no memory and no time are needed for it.

Every operator that reaches the device is seen below autograd, forward and backward: the FLOPs of matrix products and attention,
the bytes that each other operator reads and writes, how many there are, and what is saved for backward. Bytes are those of the
tensors that an operator is given and makes, each once: what a kernel reads twice, and what a cache spares, is not in them.
An operator counts as one launch, though some are several kernels (backward of attention, split products); views and allocations
are none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo_kernels import LoRAWeightBuffer, _attention_varlen, _head_ops
from fastppo_kernels._dispatch import VARIABLE

aten = torch.ops.aten

# What an operator is counted as.
FROZEN, TRAINED, ATTENTION = "frozen GEMMs", "adapter GEMMs", "attention"
COPIES, OTHER = "copies and casts", "other kernels"
KINDS = (FROZEN, TRAINED, ATTENTION, COPIES, OTHER)

_FACTORS = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1, aten.bmm: 0, aten.baddbmm: 1}  # place of the first factor
_BATCHED = {aten.bmm, aten.baddbmm}
# Place of the queries, and FLOPs for each pair of a query and a key that it sees, head and entry of a head: two products
# forward, five backward, which makes the scores again.
_ATTENTION = {
    aten._scaled_dot_product_flash_attention: (0, 4),
    aten._scaled_dot_product_flash_attention_backward: (1, 10),
    aten._flash_attention_forward: (0, 4),
    aten._flash_attention_backward: (1, 10),
}
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_GATHERS = {aten.index_select, aten.index, aten.gather, aten.embedding}  # read as many rows as they write
_OURS = torch.ops.fastppo_kernels
# Places of the adapters' matrices that a kernel multiplies what it writes with.
_PRODUCERS = {_OURS.rms_norm_lora: (4,), _OURS.swiglu_lora: (2,), _OURS.swiglu_backward_lora: (3, 4)}
_UNREAD = {aten.copy_, aten.fill_, aten.zero_, _OURS.rms_norm_lora, _OURS.swiglu_lora, _OURS.swiglu_backward_lora,
           _OURS.rms_norm_residual_backward, _OURS.rope_into}  # overwrite what they are given  # fmt: skip
_LIKE = {aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like}  # look at shapes alone
_COPIES = {aten._to_copy, aten.clone, aten.copy_, aten.cat, aten.stack, aten.constant_pad_nd, aten.roll} | _GATHERS


@dataclass
class Tally:
    launches: float = 0
    flops: float = 0
    bytes: float = 0

    def add(self, other: Tally, times: float = 1) -> None:
        self.launches += times * other.launches
        self.flops += times * other.flops
        self.bytes += times * other.bytes


@dataclass
class Counts:
    """ops: by kind (one of `KINDS`) and operator. saved: bytes kept for backward."""

    ops: dict[tuple[str, str], Tally] = field(default_factory=dict)
    saved: float = 0

    def add(self, kind: str, name: str, tally: Tally, times: float = 1) -> None:
        self.ops.setdefault((kind, name), Tally()).add(tally, times)

    def plus(self, other: Counts, times: float = 1) -> Counts:
        """These, and those so many times."""
        total = Counts(saved=self.saved + times * other.saved)
        for counts, each in ((self, 1.0), (other, times)):
            for (kind, name), tally in counts.ops.items():
                total.add(kind, name, tally, each)
        return total

    def of(self, *kinds: str) -> Tally:
        """The sum over these kinds; over all without any."""
        total = Tally()
        for (kind, _), tally in self.ops.items():
            if kind in (kinds or KINDS):
                total.add(tally)
        return total


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def size_of(tensor: Tensor) -> int:
    """Bytes of the entries that lie in memory: an expanded dimension counts once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride or not size else 1
    return entries * tensor.element_size()


class Counter(TorchDispatchMode):
    """Counts the operators on tensors of one device.

    Args:
        frozen: weights that make a product one of the frozen base; others are the adapters', batched ones attention's.
        buffers: that hold frozen weights with adapters beside them. A product with a weight in one is the base's; its FLOPs
            with the adapter's columns are counted as the adapters', in no launch of their own.
        pairs: of a query and a key that it sees, in all sequences, for the FLOPs of attention.
    """

    def __init__(
        self, frozen: Iterable[Tensor] = (), pairs: int = 0, device: str = "meta", buffers: Iterable[LoRAWeightBuffer] = ()
    ):
        super().__init__()
        self._buffers = {storage_of(buffer.weight): buffer for buffer in buffers}
        self.counts, self.pairs, self.device = Counts(), pairs, device
        self._frozen = {storage_of(x): x for x in frozen}  # held, so that no other tensor gets their places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BODIES:
            with self:
                return _BODIES[func](*args, **kwargs)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # an operator that is no more than others: below autograd they come here whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten.mm.dtype and args[0].is_meta:  # for CUDA alone
            out = args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
        else:
            out = func(*args, **kwargs)
        self._see(func, args, kwargs, out)
        return out

    def kernel(self, name: str, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """A launch that is no operator. A tensor that is read twice is given twice."""
        self.counts.add(OTHER, name, Tally(1, 0, sum(map(size_of, (*read, *written)))))

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        packet = func.overloadpacket
        inputs: dict[int, Tensor] = {}
        read = written = 0
        seen = set()
        for argument, tensor in _tensors(func, args, kwargs):
            if tensor.device.type != self.device:
                continue
            inputs[storage_of(tensor)] = tensor
            changed = argument.alias_info is not None and argument.alias_info.is_write
            if packet is aten._fused_adamw_ and argument.name == "grads":  # changed only where a scaler is given
                changed = False
            written += size_of(tensor) if changed else 0
            place = storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
            unread = packet in _UNREAD or (packet is aten.addmm_ and kwargs.get("beta") == 0)
            if place not in seen and not (changed and (argument.is_out or unread)):
                seen.add(place)
                read += size_of(tensor)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type == self.device]
        written += sum(size_of(x) for x in made if storage_of(x) not in inputs)
        if packet in _ALLOCATIONS or not written:
            return
        if packet in _LIKE:
            read = 0
        if packet in _GATHERS:
            source = args[0]
            read += sum(map(size_of, made)) - size_of(source)
        kind, flops = OTHER, 0.0
        if packet in _FACTORS:
            first, second = args[_FACTORS[packet] : _FACTORS[packet] + 2]
            kind = FROZEN if any(storage_of(x) in self._frozen for x in (first, second)) else TRAINED
            kind = ATTENTION if packet in _BATCHED else kind
            flops = 2.0 * first.numel() * second.shape[-1]
            buffer = self._buffers.get(storage_of(second))
            if buffer is not None:
                base = _of_base(buffer, second)
                kind = FROZEN if base else TRAINED
                if base:
                    self.counts.add(TRAINED, "beside the base's", Tally(0, 2.0 * first.shape[0] * (second.numel() - base)))
                    flops = 2.0 * first.shape[0] * base
        elif packet in _ATTENTION:
            place, each = _ATTENTION[packet]
            kind, flops = ATTENTION, float(each * self.pairs * args[place].shape[1] * args[place].shape[-1])
        elif packet in _PRODUCERS:
            made_S = sum(args[place].numel() for place in _PRODUCERS[packet])
            self.counts.add(TRAINED, "made by the producers", Tally(0, 2.0 * len(args[0]) * made_S))
        elif packet in _COPIES:
            kind = COPIES
        self.counts.add(kind, str(packet).removeprefix("aten."), Tally(1, flops, read + written))


def _of_base(buffer: LoRAWeightBuffer, factor: Tensor) -> int:
    """Entries of a product's factor, a view of the buffer or its transpose, that are frozen weights'."""
    rows = next(size for size, stride in zip(factor.shape, factor.stride(), strict=True) if stride != 1)
    first, start = divmod(factor.storage_offset(), buffer.weight.stride(0))
    width = factor.numel() // rows
    inside = min(start + width, buffer.left + buffer.inputs) - max(start, buffer.left)
    return max(0, min(first + rows, buffer.outputs) - first) * max(0, inside)


def _tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """The tensors among the arguments, each with what the operator's schema says of it."""
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield argument, leaf


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Notes what is saved for backward: each storage once, without those of `given`, which would be there anyway."""

    def __init__(self, given: Iterable[Tensor] = ()):
        self._given = {storage_of(x): x for x in given}
        self._kept: dict[int, Tensor] = {}  # held, so that no other tensor gets their places
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in self._given:
            self._kept[storage_of(tensor)] = tensor.detach()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self._kept.values())


# Operators that are made of others: what is in them is counted.
_BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.fastppo_kernels.varlen_attention.default: _attention_varlen.varlen_attention._init_fn,
    torch.ops.fastppo_kernels.varlen_attention_backward.default: _attention_varlen._varlen_attention_backward._init_fn,
    torch.ops.fastppo_kernels.linear_ppo_loss.default: _head_ops.linear_ppo_loss._init_fn,
}


def _flash(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `scaled_dot_product_attention` calls on a GPU where there is no mask; it takes grouped heads as they are."""
    assert attn_mask is None and dropout_p == 0 and (enable_gqa or k.shape[1] == q.shape[1])
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]


@contextmanager
def as_on_cuda(counter: Counter) -> Iterator[None]:
    """Meta tensors within are computed as CUDA tensors would be; kernels that are no operators are counted, not launched."""
    from fastppo_kernels import _triton_gather, _triton_head

    autocast, is_cuda = torch.is_autocast_enabled, Tensor.is_cuda.__get__

    def sum_rows(x: Tensor, where: Any, dtype: torch.dtype) -> Tensor:
        out = x.new_empty(len(where.start_R1) - 1, *x.shape[1:], dtype=dtype)
        counter.kernel("sum_rows", (x, *where), (out,))
        return out

    def ppo(logits_CV: Tensor, grad_CV: Tensor, *_: Any) -> None:
        counter.kernel("ppo", (logits_CV, logits_CV), (grad_CV,))  # one sweep for the statistics, one for the gradient

    def no_autocast_on_meta(*kind: str) -> bool:
        return kind != ("meta",) and autocast(*kind)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {VARIABLE: "auto"}))
        stack.enter_context(mock.patch.object(_triton_gather, "sum_rows", sum_rows))
        stack.enter_context(mock.patch.object(_triton_head, "ppo", ppo))
        # Which knows no meta device.
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", no_autocast_on_meta))
        # Nor do the optimizer's, which checks for the device, and the functions on lists of tensors, which a GPU has.
        stack.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused", lambda _: None))
        stack.enter_context(mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", lambda device: True))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash))
        stack.enter_context(mock.patch.object(Tensor, "is_cuda", property(lambda x: x.is_meta or is_cuda(x))))
        yield


def observe(
    forward: Callable[[], Tensor], leaves: Iterable[Tensor], *, frozen: Iterable[Tensor] = (), given: Iterable[Tensor] = (),
    pairs: int = 0, buffers: Iterable[LoRAWeightBuffer] = (),
) -> Counts:  # fmt: skip
    """What forward and backward cost, on meta tensors taken for CUDA tensors.

    Args:
        leaves: what gradients are wanted of.
        frozen, pairs, buffers: as for `Counter`. given: as for `Saved`, besides the frozen weights.
    """
    leaves, frozen, buffers = list(leaves), list(frozen), list(buffers)
    counter = Counter(frozen, pairs, buffers=buffers)
    saved = Saved([*frozen, *given, *(buffer.weight for buffer in buffers)])
    with as_on_cuda(counter), counter:
        with saved:
            result = forward()
        torch.autograd.grad(result, leaves, torch.empty_like(result))
    counter.counts.saved = saved.bytes
    return counter.counts
