"""A micro-batch's forward, loss and backward as one CUDA graph for each bucket of shapes: thousands of launches become one.

A graph reads what lies where it lay when it was made: the micro-batch is copied to tensors of its own first; weights and
adapters stay. Gradients are added to tensors that stay too, and that the parameters' ``grad`` is for the while. The buckets are
`fastppo.batch.buckets`; the sampler does the same with steps of decoding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastppo.batch.buckets import Padded, Shape
from fastppo.batch.rollout import MicroBatch
from fastppo.errors import is_out_of_memory
from fastppo.model.backbone import Backbone
from fastppo.model.cuda_graphs import ROPES, VARIABLE, Maker
from fastppo.model.llama_trunk import window_of
from fastppo.model.nf4 import in_4_bits
from fastppo_kernels import LoRAWeightBuffer, TreeLayout, chosen_attention_backend

# The time a bucket is seen at which its graph is made: that runs the micro-batch twice more. A guess.
MAKE_AT = 3
MOST = 16  # graphs; each has a node for each of its launches, in the GPU's memory
SEEN = 64  # buckets without a graph, those seen last, of which it is known how often that was

# Loss and metrics of a micro-batch; the second argument is the number of actions that losses are divided by.
Loss = Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]


def usable(backbone: Backbone) -> bool:
    """Whether a micro-batch of this model is known to leave the host alone.

    Attention has to be by flash-attn or torch's own FlashAttention: what the others prepare of a tree depends on its numbers.
    4-bit layers are bitsandbytes', of which this is not known.
    """
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    weight = backbone.head.weight
    if backbone.llama is None or not weight.is_cuda or in_4_bits(backbone.model):
        return False
    if getattr(backbone.llama.trunk.rotary_emb, "rope_type", None) not in ROPES:
        return False
    attentions = [layer.self_attn for layer in backbone.llama.layers]
    of = {(attention.head_dim, window_of(attention)) for attention in attentions}
    chosen = {chosen_attention_backend(weight.device, weight.dtype, dim, window=window) for dim, window in of}
    return chosen <= {"flash-attn", "varlen"}


class _Made(NamedTuple):
    """replay: runs the graph on what lies in ``inputs``, adds to the gradients and fills ``metrics`` [M], whose names these
    are."""

    replay: Callable[[], None]
    inputs: MicroBatch
    denominator: Tensor
    metrics: Tensor
    names: tuple[str, ...]


class UpdateGraphs:
    """Gradients of padded micro-batches, replayed.

    borders: the buffers that the model's adapters are copied into where they changed, which is found out on the host.
    """

    def __init__(self, borders: Sequence[LoRAWeightBuffer] = ()) -> None:
        self.borders = borders
        self.on = True  # until one could not be made, or memory ran out
        self.made: dict[Hashable, _Made] = {}  # the last is the one used last
        self.asked: dict[Hashable, int] = {}  # how often a bucket without a graph was seen; the last is the one seen last
        self.maker = Maker()
        self.sums: list[Tensor] = []

    def replays(self, part: MicroBatch, settings: Hashable) -> bool:
        """Whether the part's gradients come from a graph that is there already."""
        return _key(part, settings) in self.made

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the gradients be 0, at the place where graphs add to them. parameters: the same each time."""
        if not self.on:
            return
        if not self.sums:
            self.sums = [torch.zeros_like(p) for p in parameters]
        torch._foreach_zero_(self.sums)
        for p, total in zip(parameters, self.sums, strict=True):
            p.grad = total

    def add_gradients(
        self, part: MicroBatch, n_actions: int, loss: Loss, parameters: Sequence[nn.Parameter], settings: Hashable
    ) -> dict[str, Tensor] | None:
        """Metrics of a part whose gradients are added; None where it has no graph, or its forward is done, and nothing is.

        loss: reads of the part nothing but tensors, and nothing else that changes but parameters. settings: all numbers that
            it computes with. parameters: those of ``begin``.
        """
        if not self.on or part.padded is None:
            return None
        key = _key(part, settings)
        seen = 0 if key in self.made else self._see(key)
        if part.states is not None:
            return None
        if key not in self.made:
            if seen < MAKE_AT or not self._make(key, part, loss, parameters):
                return None
            del self.asked[key]
            if len(self.made) > MOST:  # none of them runs: a capture begins when the GPU has done all before
                del self.made[next(iter(self.made))]
        made = self.made[key] = self.made.pop(key)
        for to, of in zip(_tensors(made.inputs), _tensors(part), strict=True):
            to.copy_(of)
        made.denominator.fill_(n_actions)
        made.replay()
        self._forget_borders()
        return dict(zip(made.names, made.metrics.clone().unbind(), strict=True))

    def _forget_borders(self) -> None:
        for buffer in self.borders:
            buffer.forget()

    def _see(self, key: Hashable) -> int:
        """How often it has been seen, this time included."""
        seen = self.asked[key] = self.asked.pop(key, 0) + 1
        if len(self.asked) > SEEN:
            del self.asked[next(iter(self.asked))]
        return seen

    def drop(self) -> bool:
        """Free what graphs hold, for good; whether there were any."""
        had, self.on = bool(self.made), False
        self.made.clear()
        self.asked.clear()
        self.sums = []
        return had

    def _make(self, key: Hashable, part: MicroBatch, loss: Loss, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it could be made. The gradients are as before."""
        sums, before = self.sums, [total.clone() for total in self.sums]
        names: list[str] = []
        found: list[Tensor] = []  # at the end what the captured step leaves; read before another graph can overwrite it
        inputs = _copy(part)
        denominator = torch.ones((), device=inputs.computed.token_ids.device)

        def step() -> None:
            self._forget_borders()  # so that it copies the adapters each time it is run again
            value, metrics = loss(_with_new_layout(inputs), denominator)
            # Not `backward`: gradients are to be added where they lie, on the stream that is captured.
            torch._foreach_add_(sums, torch.autograd.grad(value, parameters))
            names[:] = metrics
            found[:] = [torch.stack(list(metrics.values()))]

        try:
            replay = self.maker.make(step)
            self.made[key] = _Made(replay, inputs, denominator, found[0], tuple(names))
        except RuntimeError as error:  # whatever CUDA does not let a graph do
            self.drop()
            first = "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]
            warnings.warn(f"updates go on without CUDA graphs: {first}", RuntimeWarning, stacklevel=2)
        finally:
            for total, old in zip(sums, before, strict=True):
                total.copy_(old)
        return key in self.made


def _key(part: MicroBatch, settings: Hashable) -> Hashable:
    return Shape.of(part.computed), settings


def _tensors(part: MicroBatch) -> list[Tensor]:
    """All that a loss reads of a padded part."""
    tree = part.computed
    assert part.mask is not None
    of_tree = [tree.token_ids, tree.positions, tree.action_targets, tree.action_rows, tree.head_rows]
    return [*of_tree, tree.layout.cu_q, tree.layout.cu_k, tree.layout.kv_index, part.mask, *part.known.values()]


def _copy(part: MicroBatch) -> MicroBatch:
    """The same part in tensors of its own."""
    token_ids, positions, targets, rows, head_rows, cu_q, cu_k, kv_index, mask, *known = (x.clone() for x in _tensors(part))
    layout = TreeLayout(cu_q, cu_k, kv_index, max_q=part.computed.layout.max_q, max_k=part.computed.layout.max_k)
    tree = replace(
        part.computed, token_ids=token_ids, positions=positions, action_targets=targets, action_rows=rows, head_rows=head_rows,
        layout=layout,
    )  # fmt: skip
    return MicroBatch(part.tree, [], dict(zip(part.known, known, strict=True)), padded=Padded(tree, mask))


def _with_new_layout(part: MicroBatch) -> MicroBatch:
    """With nothing prepared of the tree yet: that would be of the one that the graph is made with."""
    layout = part.computed.layout
    fresh = TreeLayout(layout.cu_q, layout.cu_k, layout.kv_index, max_q=layout.max_q, max_k=layout.max_k)
    assert part.mask is not None
    return replace(part, padded=Padded(replace(part.computed, layout=fresh), part.mask))
