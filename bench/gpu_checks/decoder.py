"""Cases of a whole decoder layer as one function, held against the operations that it is made of."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels.decoder_layer import DecoderWeights, decoder_layer
from fastppo_kernels.lora_buffer import LoRAWeightBuffer
from fastppo_kernels.lora_linear import LoRAProjection, lora_linear_group
from fastppo_kernels.rms_norm import rms_norm
from fastppo_kernels.rope import rope
from fastppo_kernels.swiglu import swiglu

from .case import Case, Inputs, Results, randint, randn

_NAMES = ("q", "k", "v", "o", "gate", "up", "down")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, with a softmax in at least float32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(2, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("hqk,khd->qhd", weights.to(q.dtype), v)


def composed(
    x: Tensor, cos: Tensor, sin: Tensor, weights: DecoderWeights, attend: Callable[..., Tensor], *,
    rows_R: Tensor | None = None, tokens: int | None = None, fold: bool = False,
) -> Tensor:  # fmt: skip
    """`decoder_layer` of the public operations, one after the other, differentiated by autograd."""
    tokens = len(x) if tokens is None else tokens
    n = rms_norm(x, weights.input_norm, weights.eps)
    q, k, v = (y.unflatten(1, (-1, weights.head_dim)) for y in lora_linear_group(n, weights.groups[0], fold=fold))
    if weights.q_norm is not None and weights.k_norm is not None:
        q, k = rms_norm(q, weights.q_norm, weights.eps), rms_norm(k, weights.k_norm, weights.eps)
    q, k = rope(q, k, cos, sin)
    seen = attend(q[:tokens], k[:tokens], v[:tokens]).flatten(1)
    seen = F.pad(seen, (0, 0, 0, len(x) - tokens)) if rows_R is None else seen[rows_R]
    y = (x if rows_R is None else x[rows_R]) + lora_linear_group(seen, weights.groups[1], fold=fold)[0]
    gate, up = lora_linear_group(rms_norm(y, weights.post_norm, weights.eps), weights.groups[2], fold=fold)
    return y + lora_linear_group(swiglu(gate, up), weights.groups[3], fold=fold)[0]


def _layer(
    device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, hidden: int, inner: int, heads: int, kv_heads: int,
    head_dim: int, rank: int, read: int | None = None,
) -> Inputs:  # fmt: skip
    """The last eighth of the rows is padding. `read`: of how many rows the result is wanted, some of them repeatedly."""
    queries, keys = heads * head_dim, kv_heads * head_dim
    sizes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (inner, hidden), (inner, hidden)]
    found: Inputs = {"x": randn(device, seed, rows, hidden, dtype=dtype), "head_dim": head_dim, "tokens": rows - rows // 8}
    for place, (name, (n, k)) in enumerate(zip(_NAMES, [*sizes, (hidden, inner)], strict=True)):
        found[f"{name}.weight"] = randn(device, seed + place, n, k, scale=k**-0.5, dtype=dtype)
        found[f"{name}.A"] = randn(device, seed + place + 10, rank, k, scale=k**-0.5, dtype=dtype)
        found[f"{name}.B"] = randn(device, seed + place + 20, n, rank, scale=rank**-0.5, dtype=dtype)
        found[f"{name}.bias"] = randn(device, seed + place + 30, n, dtype=dtype)
    for place, (name, size) in enumerate({"input": hidden, "post": hidden, "q": head_dim, "k": head_dim}.items()):
        found[f"{name}_norm"] = randn(device, seed + place + 40, size, dtype=dtype)
    angle = torch.arange(rows, device=device)[:, None] / 10000 ** (torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.cat((angle, angle), 1)
    found |= {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    found["rows"] = None if read is None else randint(device, seed, rows - rows // 8, read)
    return found | {"slope": randn(device, seed + 50, read or rows, hidden, dtype=dtype)}


@contextmanager
def _kernels(backend: str) -> Iterator[None]:
    """The layer has no argument for that."""
    before = os.environ.get("FASTPPO_KERNELS")
    os.environ["FASTPPO_KERNELS"] = backend
    try:
        yield
    finally:
        os.environ.pop("FASTPPO_KERNELS")
        if before is not None:
            os.environ["FASTPPO_KERNELS"] = before


def _in_buffers(weights: DecoderWeights) -> DecoderWeights:
    """With its weights in bordered buffers."""
    buffers = tuple(LoRAWeightBuffer(group, masked=False) for group in weights.groups)
    views = (buffer.weight_view(i) for buffer, group in zip(buffers, weights.groups, strict=True) for i in range(len(group)))
    moved = {name: getattr(weights, name)._replace(weight=view) for name, view in zip(_NAMES, views, strict=True)}
    return weights._replace(**moved, buffers=buffers)


def _with_gradients(inputs: Inputs, backend: str, *, more: bool = False, buffers: bool = False) -> Results:
    """`more`: biases, and norms of queries and keys. `buffers`: bordered ones. Gradients are made here, for backward has
    to go by the same kernels."""
    adapters = [f"{name}.{kind}" for name in _NAMES for kind in "AB"]
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", *adapters)}
    given = inputs | leaves
    projections = [
        LoRAProjection(
            *(given[f"{name}.{part}"] for part in ("weight", "A", "B")), 2.0, given[f"{name}.bias"] if more else None
        )
        for name in _NAMES
    ]
    norms = (given["q_norm"], given["k_norm"]) if more else ()
    weights = DecoderWeights(given["input_norm"], given["post_norm"], 1e-6, *projections, given["head_dim"], *norms)
    if buffers and backend == "triton":
        weights = _in_buffers(weights)
    with _kernels(backend):
        function = decoder_layer if backend == "triton" else composed
        z = function(given["x"], given["cos"], given["sin"], weights, attend, rows_R=given["rows"], tokens=given["tokens"])
        gradients = torch.autograd.grad(z, list(leaves.values()), inputs["slope"])
    return {"z": z.detach()} | {f"d {name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def cases() -> list[Case]:
    large = partial(_layer, rows=1024, hidden=1024, inner=2816, heads=16, kv_heads=4, head_dim=64, rank=16)
    small = partial(_layer, rows=16, hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, rank=8)
    how: dict[str, Any] = {"checks": ("error", "determinism", "graph"), "roundings": 8}
    return [
        Case("decoder_layer 1024 x 1024", ("decoder_layer",), large, _with_gradients, (), small, **how),
        Case(
            "decoder_layer, biases, norms of queries and keys, some rows",
            ("decoder_layer",),
            partial(large, read=128),
            partial(_with_gradients, more=True),
            (),
            partial(small, read=8),
            **how,
        ),
        *(
            Case(f"decoder_layer in buffers{name}", ("decoder_layer",), large, run, (), small, **how)
            for name, run in (
                ("", partial(_with_gradients, buffers=True)),
                (", biases, norms of queries and keys", partial(_with_gradients, buffers=True, more=True)),
            )
        ),
        # Enough rows for the kernels that make S and dS themselves; and too many columns of S for those.
        *(
            Case(
                f"decoder_layer in buffers 2048 x 1024, rank {rank}",
                ("decoder_layer",),
                partial(large, rows=2048, rank=rank),
                partial(_with_gradients, buffers=True),
                (),
                partial(small, rank=rank),
                **how,
            )
            for rank in (16, 64)
        ),
    ]
