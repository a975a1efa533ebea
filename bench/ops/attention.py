"""Attention over a tree of shared prefixes against padded attention of the same sequences, and of one new token each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu_checks.case import randint, randn
from fastppo_kernels import TreeLayout, decode_attention, tree_attention

from ..limits import copy, gemm
from .op import OURS, Direction, Form, Inputs, Op, Results, by_device, parameter, size_of

# -- a tree --------------------------------------------------------------------------------------------------------------


def _tree(
    device: torch.device, dtype: torch.dtype, *, root: int, prompts: int, prompt: int, answers: int, answer: int, heads: int,
    kv_heads: int, dim: int,
) -> Inputs:  # fmt: skip
    """A template, prompts, and several answers to each; and the same sequences as a batch padded on the right."""
    rows, queries, paths = root, [], []
    for p in range(prompts):
        own_prompt = list(range(rows, rows + prompt))
        rows += prompt
        for a in range(answers):
            own = list(range(rows, rows + answer - (a + p) % (answer // 2)))
            rows += len(own)
            paths.append([*range(root), *own_prompt, *own])
            queries.append(len(own) + (prompt if a == 0 else 0) + (root if a == p == 0 else 0))
    longest = max(len(path) for path in paths)
    # Rows of the tree by their place in the padded batch, whose places past the end hold the first row again.
    padded = torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=device)
    place = {row: i * longest + j for i, path in reversed([*enumerate(paths)]) for j, row in enumerate(path)}
    ends = [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (queries, [len(path) for path in paths])]
    index = torch.tensor([row for path in paths for row in path], device=device)
    flat = {
        name: randn(device, seed, rows, count, dim, dtype=dtype)
        for seed, (name, count) in enumerate({"q": heads, "k": kv_heads, "v": kv_heads}.items())
    }
    return {
        **{f"padded {name}": parameter(x[padded].transpose(1, 2)) for name, x in flat.items()},
        **{name: parameter(x) for name, x in flat.items()},
        "layout": TreeLayout(ends[0], ends[1], index, root, 0, max(queries), longest),
        "place": torch.tensor([place[row] for row in range(rows)], device=device),
        # Products of a query and a key, each of `dim` multiplications, in every head.
        "pairs": heads * sum((2 * len(path) - n + 1) * n // 2 for path, n in zip(paths, queries, strict=True)),
    }


def _tree_attention(inputs: Inputs, backend: Any = None) -> Results:
    return {"tree": tree_attention(inputs["q"], inputs["k"], inputs["v"], inputs["layout"], backend=backend)}


def _padded(inputs: Inputs) -> Results:
    """Places past the end come after all that counts, so that a causal kernel needs no mask."""
    q, k, v = (inputs[f"padded {name}"] for name in "qkv")
    return {"padded": F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)}


def _by_row(inputs: Inputs, results: Results) -> Results:
    """The outputs by row of the tree. Gradients have no counterpart: a padded batch has one for each copy."""
    if "tree" in results:
        return {"out": results["tree"]}
    return {"out": results["padded"].transpose(1, 2).flatten(0, 1)[inputs["place"]]}


def _as_many_flops(inputs: Inputs, direction: Direction) -> Callable[[], Any]:
    """A square GEMM: two products of a pair in the forward, five in a backward that keeps no probabilities."""
    q = inputs["q"]
    multiplications = inputs["pairs"] * q.shape[2] * (2 if direction == "fwd" else 7)
    side = max(16, 8 * round(multiplications ** (1 / 3) / 8))
    return gemm(side, side, side, q.dtype, q.device)


# -- decoding ------------------------------------------------------------------------------------------------------------


def _cache(
    device: torch.device, dtype: torch.dtype, *, batch: int, root: int, places: int, heads: int, kv_heads: int, dim: int
) -> Inputs:
    return {
        "q": randn(device, 1, batch, heads, dim, dtype=dtype),
        "k_root": randn(device, 2, root, kv_heads, dim, dtype=dtype),
        "v_root": randn(device, 3, root, kv_heads, dim, dtype=dtype),
        "k_own": randn(device, 4, batch, kv_heads, places, dim, dtype=dtype),
        "v_own": randn(device, 5, batch, kv_heads, places, dim, dtype=dtype),
        "lengths": places - randint(device, 6, places // 2, batch),
    }


def _decode(inputs: Inputs, backend: Any = None) -> Results:
    return {"out": decode_attention(**inputs, backend=backend)}


def _plain_decode(inputs: Inputs) -> Results:
    """A cache that every sequence has the whole of, root included, as in a model of transformers."""
    batch, root, places = len(inputs["q"]), len(inputs["k_root"]), inputs["k_own"].shape[2]
    keys, values = (
        torch.cat([inputs[f"{name}_root"].transpose(0, 1)[None].expand(batch, -1, -1, -1), inputs[f"{name}_own"]], dim=2)
        for name in "kv"
    )
    seen = torch.arange(root + places, device=inputs["q"].device) < root + inputs["lengths"][:, None]
    out = F.scaled_dot_product_attention(inputs["q"][:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=True)
    return {"out": out.squeeze(2)}


def _read_once(inputs: Inputs, direction: Direction) -> Callable[[], Any]:
    """The root and the filled places."""
    k_own, v_own = inputs["k_own"], inputs["v_own"]
    filled = int(inputs["lengths"].sum()) * size_of(k_own[0, :, 0], v_own[0, :, 0])
    return copy(filled + size_of(inputs["k_root"], inputs["v_root"]), k_own.device)


def ops() -> list[Op]:
    small = {"root": 32, "prompts": 4, "prompt": 12, "answers": 4, "answer": 16, "heads": 4, "kv_heads": 2, "dim": 32}
    heads = {"heads": 28, "kv_heads": 4, "dim": 128}
    # Many short answers after a template; few-shot; few long answers after a prompt.
    large = {
        "80 + 64 x (24 + 4 x 8), H28+4 D128": {"root": 80, "prompts": 64, "prompt": 24, "answers": 4, "answer": 8} | heads,
        "600 + 32 x (24 + 4 x 8), H28+4 D128": {"root": 600, "prompts": 32, "prompt": 24, "answers": 4, "answer": 8} | heads,
        "8 x (100 + 4 x 256), H28+4 D128": {"root": 0, "prompts": 8, "prompt": 100, "answers": 4, "answer": 256} | heads,
    }
    forms: dict[str, Any] = {OURS: _tree_attention, "torch": _padded}
    forms |= {f"fastppo {peer}": Form(_through(peer), peer, on_cpu=False) for peer in ("flash-attn", "xformers")}
    cache = {"batch": 16, "root": 32, "places": 16, "heads": 4, "kv_heads": 2, "dim": 32}
    return [
        Op(
            "tree_attention",
            "attention",
            by_device(_tree, {"32 + 4 x (12 + 4 x 16), H4+2 D32": small}, large),
            forms,
            _as_many_flops,
            "a bare GEMM of as many multiplications as the tree's pairs of query and key need",
            compiled=False,
            comparable=_by_row,
        ),
        Op(
            "decode_attention",
            "decoding",
            by_device(
                _cache,
                {"B16 32 + 16 H4+2 D32": cache},
                {
                    "B256 80 + 128 H28+4 D128": {"batch": 256, "root": 80, "places": 128} | heads,
                    "B64 600 + 2048 H28+4 D128": {"batch": 64, "root": 600, "places": 2048} | heads,
                },
            ),
            {OURS: _decode, "fastppo torch": partial(_decode, backend="torch"), "torch": _plain_decode},
            _read_once,
            "one read of the keys and values that are seen (a copy of as many bytes)",
            directions=("fwd",),
        ),
    ]


def _through(backend: str) -> Callable[[Inputs], Results]:
    return lambda inputs: _tree_attention(inputs, backend)
