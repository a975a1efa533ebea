"""The most bytes that a micro-batch's forward and backward have alive at once, counted from sizes alone.

For trunks of Llama's shape this follows `fastppo_kernels.decoder_layer` step by step: a tensor is added where that makes it and
taken away where it lets it go, so that what comes out is a peak and not a sum. A change of one is a change of the other. Rows
are tokens of the packed tree; all results are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastppo.model.llama_trunk import FEWEST_PADDED
from fastppo_kernels import AttentionMemory
from fastppo_kernels.attention_memory import Walk
from fastppo_kernels.linear_logprob import chosen_chunk_rows

# A layer's projections, those of one input together.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
BORDER = 8  # columns that borders are rounded up to, as `LoRAWeightBuffer` does
# Of so many bytes; float16 takes what bfloat16 does.
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Machine:
    """What decides how the same operations are done.

    cuda: by Triton's kernels, else by torch's. itemsize: bytes of the base's numbers. multiple: of rows, to which tokens are
    padded (`fastppo_kernels.row_multiple`).
    """

    cuda: bool
    itemsize: int
    multiple: int = 1

    @property
    def folds(self) -> bool:
        """Whether adapters may be folded into the weights for a product."""
        return not self.cuda and self.itemsize >= 4

    def borders(self, layer: Layer) -> bool:
        """Whether its frozen weights lie in bordered buffers, with the adapters in the same products (`LlamaTrunk.border`).

        By the bytes that are not moved: see "decoder_layer" in csrc_notes.md. On a CPU adapters are folded into the weights,
        which takes fewer products; float32 products on a GPU take so long that those bytes are nothing beside them; and weights
        in 4 bits are no matrix that an adapter could lie beside.
        """
        return self.cuda and self.itemsize == 2 and layer.fused

    def padded(self, rows: int, least: int) -> int:
        return rows if rows < least else rows + -rows % self.multiple


@dataclass(frozen=True)
class Layer:
    """Widths of a decoder layer; ranks: of its seven projections' adapters, by name (`GROUPS`), 0 for none.

    fused: whether it runs as `decoder_layer`; else part by part, and what that makes again is kept.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    ranks: Mapping[str, int]
    qk_norm: bool = False
    fused: bool = True

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    def columns(self, group: Sequence[str]) -> int:
        """Of S in a bordered buffer of these projections: those of the first before X, the others' behind it."""
        of_others = sum(self.ranks[name] for name in group[1:])
        return sum(rank + -rank % BORDER for rank in (self.ranks[group[0]], of_others))

    def widths(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of a projection."""
        out = {"q": self.queries, "k": self.keys, "v": self.keys, "o": self.hidden, "down": self.hidden}.get(name, self.inner)
        return {"o": self.queries, "down": self.inner}.get(name, self.hidden), out


def borders(layer: Layer, machine: Machine) -> int:
    """What the bordered buffers of a layer hold besides its weights."""
    more = 0
    for group in GROUPS:
        width, rank = layer.widths(group[0])[0], layer.columns(group)
        rows = sum(layer.widths(name)[1] for name in group)
        more += (rows + rank) * (width + rank) - rows * width
    return more * machine.itemsize


@dataclass(frozen=True)
class Batch:
    """tokens: of the tree. rows: of them, those whose hidden state the head reads. actions: targets of those rows."""

    tokens: int
    rows: int
    actions: int
    attention: AttentionMemory = AttentionMemory()


@dataclass(frozen=True)
class Head:
    """The frozen language-model head: rows, and bytes of its numbers."""

    vocab: int
    itemsize: int

    def chunk_rows(self, cuda: bool) -> int:
        return chosen_chunk_rows(self.vocab, DTYPES[self.itemsize], not cuda)

    def chunk_bytes(self, cuda: bool, rows: int) -> int:
        """Of so many rows of logits with what is made of them."""
        if cuda:  # their gradient is made where they are
            return rows * self.vocab * self.itemsize
        return rows * self.vocab * (8 if self.itemsize == 4 else 10)


class _Trunk:
    """A layer's forward and backward on a walk."""

    def __init__(self, walk: Walk, layer: Layer, machine: Machine, batch: Batch, last: bool):
        self.walk, self.layer, self.machine, self.batch = walk, layer, machine, batch
        self.rows_asked = last
        self.tokens = batch.tokens
        self.padded = machine.padded(batch.tokens, FEWEST_PADDED)
        # Behind the last layer's attention only the rows go on that somebody reads.
        self.rows = self.padded
        if last:
            self.rows = batch.rows if self.tokens < FEWEST_PADDED else machine.padded(batch.rows, 0)

    def size(self, rows: int, width: int) -> int:
        return rows * width * self.machine.itemsize

    # -- parts ---------------------------------------------------------------------------------------------------------

    def norm(self, rows: int, width: int, wider: int = 8) -> int:
        """The bytes of a norm's result, which stays. wider: bytes an entry of what is float32 beside it in half precision."""
        out = self.size(rows, width)
        self.walk.take(out)
        if not self.machine.cuda:
            # The quotient before the weight; in half precision also a float32 copy and the quotient in float32.
            self.walk.use(out if self.machine.itemsize == 4 else wider * rows * width)
        return out

    def norm_backward(self, rows: int, width: int) -> int:
        return self.norm(rows, width, wider=12)

    def _weights(self, group: int, rows: int) -> tuple[int, int]:
        """(folded weights of a group's product, what is alive besides while they are made); 0 where there are none."""
        names = GROUPS[group]
        sizes = {name: self.size(*self.layer.widths(name)) for name in names}
        if not self.folds(group, rows):
            return 0, 0
        adapted = sum(size for name, size in sizes.items() if self.layer.ranks[name])
        return (adapted, 0) if len(names) == 1 else (sum(sizes.values()), adapted)

    def folds(self, group: int, rows: int) -> bool:
        widths = (self.layer.widths(name) for name in GROUPS[group])
        return self.machine.folds and self.layer.fused and all(rows * (k + n) > k * n for k, n in widths)

    def kept_s(self, group: int, rows: int) -> int:
        """S = x A^T of a group's adapters, where it is kept for backward."""
        rank = sum(self.layer.ranks[name] for name in GROUPS[group])
        return 0 if self.folds(group, rows) else self.size(rows, rank)

    def project(self, group: int, rows: int) -> int:
        """The bytes of a group's outputs, which stay, as does S."""
        weights, beside = self._weights(group, rows)
        self.walk.take(weights, beside)
        self.walk.drop(beside)
        out = sum(self.size(rows, self.layer.widths(name)[1]) for name in GROUPS[group])
        self.walk.take(out, self.kept_s(group, rows))
        if not self.machine.cuda and not self.folds(group, rows):  # B S, before it is added
            self.walk.use(max(self.size(rows, self.layer.widths(name)[1]) for name in GROUPS[group]))
        self.walk.drop(weights)
        return out

    def project_back(self, group: int, rows: int, need_x: bool) -> int:
        """The bytes of the input's gradient, which stays; those of the adapters stay too, see `gradients`."""
        names = GROUPS[group]
        rank = sum(self.layer.ranks[name] for name in names)
        s = self.size(rows, rank)
        grad_x = self.size(rows, self.layer.widths(names[0])[0]) if need_x else 0
        if not self.folds(group, rows):
            self.walk.take(s, s)
            self.walk.take(grad_x, self.gradients(group))
            self.walk.drop(s, s)
            return grad_x
        weights, beside = self._weights(group, rows) if need_x else (0, 0)
        self.walk.take(weights, beside)
        self.walk.drop(beside)
        if need_x:
            side_by_side = sum(self.size(rows, self.layer.widths(name)[1]) for name in names) if len(names) > 1 else 0
            self.walk.take(side_by_side, grad_x)
            self.walk.drop(side_by_side)
        # S, dS of each adapter and, where there are several, dS side by side.
        self.walk.take(self.gradients(group))
        self.walk.use(s, s, s if len(names) > 1 else 0)
        self.walk.drop(weights)
        return grad_x

    def gradients(self, group: int) -> int:
        return sum(4 * self.layer.ranks[name] * sum(self.layer.widths(name)) for name in GROUPS[group])

    # -- the layer -----------------------------------------------------------------------------------------------------

    def forward(self, record: bool) -> int:
        """Without its input, which is there before. Returns what is kept for backward; the result stays too."""
        walk, layer, tokens, padded, rows = self.walk, self.layer, self.tokens, self.padded, self.rows
        size, before = self.size, self.walk.now
        n = self.norm(padded, layer.hidden)
        qkv = self.project(0, padded)
        walk.drop(n if layer.fused else 0)
        both, v = size(tokens, layer.queries + layer.keys), size(tokens, layer.keys)
        before_norms = both if layer.qk_norm else 0
        if layer.qk_norm:
            walk.take(before_norms)
            walk.take(both)
        walk.take(both)
        if not self.machine.cuda:
            walk.use(size(tokens, max(layer.queries, layer.keys)) // 2)
        if layer.qk_norm:
            walk.drop(both)
        copied_v = v if self.folds(0, padded) else 0  # else it is a tensor of its own already
        walk.take(copied_v)
        walk.drop(0 if layer.fused else n, qkv if copied_v else size(padded, layer.queries + layer.keys))
        attended = size(tokens, layer.queries)
        lse = 4 * tokens * layer.heads
        walk.take(attended, lse)
        walk.use(self.batch.attention.recorded if record else self.batch.attention.forward)
        walk.take(self.batch.attention.kept if record else 0)
        inputs = both + (copied_v or size(padded, layer.keys))
        if not record:
            walk.drop(inputs, lse)
        seen = self._seen()
        walk.take(seen)
        o = self.project(1, rows)
        walk.drop(seen)
        y = size(rows, layer.hidden)
        walk.use(y, y if self.rows_asked else 0)  # with it the rows of x
        walk.take(y)
        m = self.norm(rows, layer.hidden)
        gate_up = self.project(2, rows)
        walk.drop(m)
        h = size(rows, layer.inner)
        walk.take(h)
        if not self.machine.cuda:
            walk.use(h)
        down = self.project(3, rows)
        walk.drop(h)
        z = size(rows, layer.hidden)
        walk.take(z)
        walk.drop(o, down)
        s = sum(self.kept_s(group, padded if group == 0 else rows) for group in range(4))
        parts = 0 if layer.fused else n + size(rows, layer.hidden) + h * (1 if self.machine.cuda else 2)  # with torch's silu(g)
        walk.take(parts)
        kept = before_norms + inputs + attended + lse + self.batch.attention.kept + y + gate_up + s + parts
        if not record:
            walk.drop(walk.now - before - z)
            return 0
        assert walk.now - before == kept + z, (walk.now - before, kept + z)
        return kept

    def _seen(self) -> int:
        """The output projection's input, where it is a copy of the attention's result."""
        copied = self.rows_asked or self.padded != self.tokens
        return self.size(self.rows, self.layer.queries) if copied else 0

    def backward(self, need_x: bool) -> int:
        """From the result's gradient, which is there before, to that of the input, whose bytes are returned and stay."""
        walk, layer, tokens, padded, rows, size = self.walk, self.layer, self.tokens, self.padded, self.rows, self.size
        before, inner, hidden = walk.now, self.size(rows, layer.inner), self.size(rows, layer.hidden)
        gated = inner if self.machine.cuda else 2 * inner  # silu(g) u, and torch's silu(g)
        gated = gated if layer.fused else 0
        walk.take(gated)
        grad_h = self.project_back(3, rows, True)
        walk.take(inner)
        if not self.machine.cuda:
            walk.use(inner)
        walk.take(inner)
        walk.drop(gated, grad_h)
        if not layer.fused:  # part by part what was kept is let go: gate, up, silu(g) u, and torch's silu(g)
            walk.drop(inner * (3 if self.machine.cuda else 4))
        m = self.norm(rows, layer.hidden) if layer.fused else 0
        grad_m = self.project_back(2, rows, True)
        walk.drop(2 * inner, m)
        of_norm = self.norm_backward(rows, layer.hidden)
        walk.take(hidden)  # dy
        walk.drop(of_norm)
        seen = self._seen()
        walk.take(seen)
        self.project_back(1, rows, True)
        walk.drop(seen, grad_m)
        attended, of_qkv = size(tokens, layer.queries), size(tokens, layer.queries + 2 * layer.keys)
        walk.take(attended if self.rows_asked else 0)
        walk.take(of_qkv)
        walk.use(self.batch.attention.backward)
        both = size(tokens, layer.queries + layer.keys)
        walk.take(both)
        if not self.machine.cuda:
            walk.use(size(tokens, 2 * layer.head_dim), size(tokens, layer.keys) // 2)
        walk.drop(both)
        if layer.qk_norm:
            walk.use(both, both)
        walk.drop(attended if self.rows_asked and layer.fused else 0)
        walk.take(size(padded, layer.queries + 2 * layer.keys) if padded != tokens else 0)
        if layer.fused:
            walk.drop(of_qkv if padded != tokens else 0)
            self.norm(padded, layer.hidden)
        self.project_back(0, padded, need_x)
        grad_x = self.norm_backward(padded, layer.hidden) if need_x else 0
        walk.drop(walk.now - before - grad_x)
        return grad_x


class _Bordered(_Trunk):
    """The same through bordered buffers (`fastppo_kernels._bordered_layer`)."""

    def s(self, group: int) -> int:
        return self.size(self.padded if group == 0 else self.rows, self.layer.columns(GROUPS[group]))

    def through(self, group: int, rows: int, *inside: int) -> int:
        """The bytes of a group's outputs, which stay, as does S. inside: alive while what the product reads is written."""
        width = self.layer.widths(GROUPS[group][0])[0]
        x_buffer = self.size(rows, width) + self.s(group)
        self.walk.take(x_buffer)
        self.walk.use(*inside)
        out = sum(self.size(rows, self.layer.widths(name)[1]) for name in GROUPS[group])
        self.walk.take(self.s(group), out)
        self.walk.drop(x_buffer)
        return out

    def forward(self, record: bool) -> int:
        walk, layer, tokens, padded, rows, size = self.walk, self.layer, self.tokens, self.padded, self.rows, self.size
        before = walk.now
        qkv = self.through(0, padded)
        both, v = size(tokens, layer.queries + layer.keys), size(tokens, layer.keys)
        before_norms = both if layer.qk_norm else 0
        walk.take(before_norms, before_norms, both)
        walk.drop(before_norms)
        walk.take(v)
        walk.drop(qkv)
        attended, lse = size(tokens, layer.queries), 4 * tokens * layer.heads
        walk.take(attended, lse)
        walk.use(self.batch.attention.recorded if record else self.batch.attention.forward)
        walk.take(self.batch.attention.kept if record else 0)
        if not record:
            walk.drop(both, v, lse)
        y = self.through(1, rows, size(rows, layer.queries) if self.rows_asked else 0)
        walk.use(y if self.rows_asked else 0)
        gate_up = self.through(2, rows)
        z = self.through(3, rows)
        s = sum(map(self.s, range(4)))
        kept = before_norms + both + v + attended + lse + self.batch.attention.kept + y + gate_up + s
        if not record:
            walk.drop(walk.now - before - z)
            return 0
        assert walk.now - before == kept + z, (walk.now - before, kept + z)
        return kept

    def backward(self, need_x: bool) -> int:
        walk, layer, tokens, padded, rows, size = self.walk, self.layer, self.tokens, self.padded, self.rows, self.size
        before, inner, hidden = walk.now, size(rows, layer.inner), size(rows, layer.hidden)
        of_down = hidden + self.s(3)
        walk.take(of_down)
        walk.take(inner)  # that of h, then h
        of_gate_up = 2 * inner + self.s(2)
        walk.take(of_gate_up, self.gradients(3))
        walk.drop(of_down, inner)
        walk.take(hidden)  # of m
        walk.take(hidden + self.s(1), hidden)  # dy with its dS, and m again
        walk.take(self.gradients(2))
        walk.drop(of_gate_up, hidden, hidden)
        walk.take(self.gradients(1))
        seen = size(rows, layer.queries)
        walk.use(seen if self.rows_asked or padded != tokens else 0)
        walk.take(seen)  # its gradient
        of_qkv = size(padded, layer.queries + 2 * layer.keys)
        walk.take(of_qkv + self.s(0))
        walk.take(size(tokens, layer.queries) if self.rows_asked else 0)
        walk.take(of_qkv)
        walk.use(self.batch.attention.backward)
        if layer.qk_norm:
            walk.use(size(tokens, 3 * (layer.queries + layer.keys)))
        walk.drop(of_qkv, seen, size(tokens, layer.queries) if self.rows_asked else 0)
        n = size(padded, layer.hidden)
        walk.take(*[n, n, n] if need_x else [n])  # n again, dn and dx
        walk.use(self.gradients(0))
        grad_x = size(padded, layer.hidden) if need_x else 0
        walk.drop(walk.now - before - grad_x)
        return grad_x


def _trunk(walk: Walk, layer: Layer, machine: Machine, batch: Batch, last: bool) -> _Trunk:
    return (_Bordered if machine.borders(layer) else _Trunk)(walk, layer, machine, batch, last)


def layer_forward(layer: Layer, machine: Machine, batch: Batch) -> int:
    """The most that is alive in one layer's forward without gradients."""
    walk = Walk()
    _trunk(walk, layer, machine, batch, False).forward(False)
    return walk.most


def micro_batch(
    layer: Layer, layers: int, head: Head, machine: Machine, batch: Batch, *,
    activations: str = "keep", passes: int = 1, chunk: bool = True,
) -> int:  # fmt: skip
    """The most bytes alive in forward and backward of one micro-batch, besides parameters and their gradients.

    Args:
        activations: "keep", "recompute" or "offload", see `fastppo.settings.Config.activations`.
        passes: 2 where the critic has a trunk of its own adapters.
        chunk: with the head's chunk of logits; without, what the trunk takes is left.
    """
    walk = Walk()
    again = activations != "keep"
    trunks = [_trunk(walk, layer, machine, batch, i == layers - 1) for i in range(layers)]
    x = trunks[0].size(trunks[0].padded, layer.hidden)
    tables = 2 * trunks[0].size(trunks[0].padded, layer.head_dim)
    kept: list[list[int]] = []
    hidden = trunks[0].size(batch.rows, layer.hidden)
    for _ in range(passes):
        kept.append([])
        walk.take(x, tables)
        for i, trunk in enumerate(trunks):
            kept[-1].append(trunk.forward(not again or i == layers - 1))
            if activations == "offload" and machine.cuda and i < layers - 1:
                walk.drop(x)
        trunks[-1].norm(batch.rows, layer.hidden)
    _head(walk, trunks[-1], head, machine, batch, chunk)
    walk.take(hidden * (passes - 1))  # the gradient of the critic's own trunk
    for of_pass in reversed(kept):
        last = trunks[-1]
        grad = last.size(last.rows, layer.hidden)
        walk.drop(hidden)  # the norm's result
        last.norm_backward(batch.rows, layer.hidden)
        walk.drop(hidden, grad)  # the gradient of its result, and the result of the last layer
        walk.take(grad)
        walk.drop(hidden)
        for i in range(layers - 1, -1, -1):
            trunk = trunks[i]
            result = 0
            if activations == "offload" and machine.cuda and i < layers - 1:
                walk.take(x)
            if again and i < layers - 1:
                of_pass[i] = trunk.forward(True)
                result = trunk.size(trunk.rows, layer.hidden)
            grad_x = trunk.backward(need_x=i > 0)
            walk.drop(grad, of_pass[i], result, x)
            grad = grad_x
        walk.drop(tables)
    return walk.most


def _head(walk: Walk, last: _Trunk, head: Head, machine: Machine, batch: Batch, chunk: bool) -> None:
    """Log-probs, loss, and the gradient of the hidden state, which stays."""
    hidden = last.size(batch.rows, last.layer.hidden)
    all_rows = machine.padded(batch.rows, machine.multiple)
    padded = last.size(all_rows, last.layer.hidden)
    rows = min(head.chunk_rows(machine.cuda), all_rows) if chunk else 0
    logits = head.chunk_bytes(machine.cuda, rows)
    if machine.cuda:
        walk.take(hidden, 4 * batch.rows * last.layer.hidden)
        walk.use(logits, last.size(rows, last.layer.hidden))
        walk.drop(4 * batch.rows * last.layer.hidden)
        return
    if machine.itemsize == 4:  # the mean of the head's rows, made in the forward
        copied = padded if padded != hidden else 0
        walk.take(copied, padded)
        walk.use(logits, last.size(rows, last.layer.hidden))
        walk.take(hidden)
        walk.use(last.size(batch.actions, last.layer.hidden), hidden)
        walk.drop(copied, padded)
        return
    walk.use(logits, last.size(rows, last.layer.hidden))
    walk.take(hidden)


# -- attention ------------------------------------------------------------------------------------------------------------


def library_attention(paths: int, tokens: int, layer: Layer, machine: Machine) -> AttentionMemory:
    """Of FlashAttention over gathered keys and values (`fastppo_kernels._attention_varlen`); never measured.

    paths: rows of all segments' root paths together.
    """
    keys, wide = paths * layer.keys * machine.itemsize, paths * layer.queries * machine.itemsize
    gathered = 0 if paths == tokens else keys  # without a shared prefix they are read where they are
    grouped = 2 * wide if layer.kv_heads < layer.heads else 0  # gradients by query head, before they are added up
    sums = 4 * tokens * layer.queries  # of dQ, float32
    return AttentionMemory(0, 2 * gathered, 2 * gathered, 2 * gathered + 2 * keys + grouped + sums)
