"""Cases of attention over a tree of shared prefixes, through every back end that is usable here."""

from functools import partial
from typing import Any

import torch

from fastppo_kernels.attention import TreeLayout, attention, attention_backends, tree_attention

from .case import Case, Inputs, Results, randn

_HALF = (torch.bfloat16, torch.float16)
# Libraries round the probabilities, and in backward the scores' gradients too; the torch form keeps both in float32.
_ROUNDINGS = 4
# Lengths on the host are what these work with: no graph can hold that.
_LOOKS_AT_LENGTHS = ("xformers", "sdpa")


def _tree(
    device: torch.device, dtype: torch.dtype, seed: int, *, root: int, prompts: int, prompt: int, answers: int, answer: int,
    heads: int = 8, kv_heads: int = 2, dim: int = 64,
) -> Inputs:  # fmt: skip
    """Instruction, prompts, and several answers to each, of ragged lengths; the first answer shares its prompt's segment."""
    rows, queries, paths = root, [], []
    for p in range(prompts):
        prompt_rows = list(range(rows, rows + prompt + 7 * p % 11))
        rows += len(prompt_rows)
        for a in range(answers):
            own = list(range(rows, rows + answer + (5 * a + 3 * p) % 13))
            rows += len(own)
            paths.append([*range(root), *prompt_rows, *own])
            queries.append(len(own) + (len(prompt_rows) if a == 0 else 0) + (root if a == 0 and p == 0 else 0))
    ends = [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (queries, [len(path) for path in paths])]
    return {
        "q": randn(device, seed, rows, heads, dim, dtype=dtype),
        "k": randn(device, seed + 1, rows, kv_heads, dim, dtype=dtype),
        "v": randn(device, seed + 2, rows, kv_heads, dim, dtype=dtype),
        "cu_q": ends[0],
        "cu_k": ends[1],
        "kv_index": torch.tensor([row for path in paths for row in path], device=device),
        "bounds": (max(queries), max(len(path) for path in paths), root),
    }


def _attention(inputs: Inputs, backend: Any, *, name: str, window: int | None = None) -> Results:
    max_q, max_k, root = inputs["bounds"]
    out = attention(
        inputs["q"], inputs["k"], inputs["v"], inputs["cu_q"], inputs["cu_k"], inputs["kv_index"], max_q=max_q, max_k=max_k,
        root=root, window=window, backend=name if backend == "triton" else "torch",
    )  # fmt: skip
    return {"out": out}


def _tree_attention(inputs: Inputs, backend: Any) -> Results:
    """Through the back end that is chosen where none is asked for."""
    max_q, max_k, root = inputs["bounds"]
    layout = TreeLayout(inputs["cu_q"], inputs["cu_k"], inputs["kv_index"], root, 0, max_q, max_k)
    name = "auto" if backend == "triton" else "torch"
    return {"out": tree_attention(inputs["q"], inputs["k"], inputs["v"], layout, backend=name)}


def cases() -> list[Case]:
    large = partial(_tree, root=80, prompts=16, prompt=40, answers=8, answer=30)
    small = partial(_tree, root=5, prompts=2, prompt=3, answers=2, answer=4, heads=4, dim=16)
    found = [
        Case(
            "tree_attention, chosen back end",
            ("tree_attention",),
            large,
            _tree_attention,
            ("q", "k", "v"),
            small,
            checks=("error", "determinism"),
            roundings=_ROUNDINGS,
        ),
    ]
    for name, usable in attention_backends().items():
        if usable != "usable" or name == "torch":
            continue
        dtypes = (torch.float32, *_HALF) if name in _LOOKS_AT_LENGTHS else _HALF
        checks = ("error", "determinism") if name in _LOOKS_AT_LENGTHS else ("error", "determinism", "graph", "compile")
        windows = (None,) if name == "xformers" else (None, 50)
        for window in windows:
            found.append(
                Case(f"attention {name}{f', window {window}' if window else ''}", ("attention",), large,
                     partial(_attention, name=name, window=window), ("q", "k", "v"), small if name == "sdpa" else None,
                     dtypes=dtypes, checks=checks, roundings=_ROUNDINGS)
            )  # fmt: skip
    return found
