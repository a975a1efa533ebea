"""Cases of attention over a tree of shared prefixes, through every back end that is usable here."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastppo_kernels.attention import TreeLayout, attention, attention_backends, decode_attention, tree_attention

from .case import Case, Inputs, Results, randint, randn

_HALF = (torch.bfloat16, torch.float16)
# Libraries round the probabilities, and in backward the scores' gradients too; the torch form keeps both in float32.
_ROUNDINGS = 4
# The probabilities alone, which the torch form of decoding keeps in float32.
_PROBABILITIES = 2
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


def _cache(
    device: torch.device, dtype: torch.dtype, seed: int, *, batch: int, root: int, places: int, heads: int, kv_heads: int,
    dim: int,
) -> Inputs:  # fmt: skip
    return {
        "q": randn(device, seed, batch, heads, dim, dtype=dtype),
        "k_root": randn(device, seed + 1, root, kv_heads, dim, dtype=dtype),
        "v_root": randn(device, seed + 2, root, kv_heads, dim, dtype=dtype),
        "k_own": randn(device, seed + 3, batch, kv_heads, places, dim, dtype=dtype),
        "v_own": randn(device, seed + 4, batch, kv_heads, places, dim, dtype=dtype),
        "lengths": randint(device, seed, places, batch) + 1,
    }


def _pages(make: Any, size: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """The same in pages of so many places, in any order; the first of every four sequences' pages is one."""
    inputs = make(device, dtype, seed)
    batch, kv_heads, places, _ = inputs["k_own"].shape
    width = places // size
    pages = randint(device, seed, 2**30, batch * width).argsort().view(batch, width)
    for name in ("k_own", "v_own"):
        lines = inputs[name][:, :, : width * size].unflatten(2, (width, size)).transpose(1, 2)
        inputs[name] = torch.empty_like(lines.flatten(0, 1)).index_copy_(0, pages.flatten(), lines.flatten(0, 1))
    pages[:, 0] = pages[torch.arange(batch, device=device) // 4 * 4, 0]
    return inputs | {"pages": pages.int(), "lengths": inputs["lengths"].clamp(max=width * size)}


def _far_cache(device: torch.device, dtype: torch.dtype, seed: int, *, far: int) -> Inputs:
    """Sequences whose keys, and whose values, begin `far` entries from each other: the third where 32 bits would end."""
    inputs = _cache(device, dtype, seed, batch=3, root=0, places=300, heads=8, kv_heads=2, dim=64)
    size = inputs["k_own"][0].numel()
    memory = torch.empty(2 * far + 2 * size, dtype=dtype, device=device)
    for place, name in enumerate(("k_own", "v_own")):
        x = inputs[name]
        inputs[name] = memory.as_strided(x.shape, (far, *x.stride()[1:]), place * size).copy_(x)
    return inputs


def _decode(inputs: Inputs, backend: Any, **how) -> Results:
    return {"out": decode_attention(**inputs, **how, backend=backend)}


def _alone(inputs: Inputs, backend: Any) -> Results:
    """What every eighth sequence gets beside the others, less what it gets alone with a cache of its length: 0, exactly."""
    some = slice(0, None, 8)
    if backend == "torch":  # whose products are those of a library
        return {"difference": torch.zeros_like(inputs["q"][some])}
    alone = []
    for i, filled in [*enumerate(inputs["lengths"].tolist())][some]:
        own = {name: inputs[name][i : i + 1] for name in ("q", "lengths")}
        if "pages" in inputs:
            own["pages"] = inputs["pages"][i : i + 1, : -(-filled // inputs["k_own"].shape[2])]
        else:
            own |= {name: inputs[name][i : i + 1, :, :filled] for name in ("k_own", "v_own")}
        alone.append(decode_attention(**inputs | own, backend=backend))
    return {"difference": decode_attention(**inputs, backend=backend)[some] - torch.cat(alone)}


def _decoding() -> list[Case]:
    usual = {"heads": 28, "kv_heads": 4, "dim": 128}
    small = {"batch": 3, "heads": 4, "kv_heads": 2, "dim": 16}
    cache, small_cache = partial(_cache, batch=256, root=80, places=128, **usual), partial(_cache, root=5, places=7, **small)
    long, small_long = partial(_cache, batch=9, root=3000, places=5000, **usual), partial(_cache, root=300, places=300, **small)
    wide = partial(_cache, batch=64, root=0, places=700, heads=40, kv_heads=2, dim=256)
    small_wide = partial(_cache, batch=3, root=0, places=7, heads=40, kv_heads=2, dim=24)

    def case(name: str, make: Any, smaller: Any, **how) -> Case:
        return Case(
            f"decode_attention {name}", ("decode_attention",), make, partial(_decode, **how), (), smaller,
            roundings=_PROBABILITIES,
        )  # fmt: skip

    # Small without a root: the interpreter's products sum up a row by where in its tile it lies.
    small_alone = partial(_cache, root=0, places=300, **small | {"batch": 9})
    far = case("more than 2^31 entries", partial(_far_cache, far=2**30), partial(_far_cache, far=2**17))
    return [
        case("256 x (80 + 128)", cache, small_cache),
        case("256 x (80 + 128), window", cache, small_cache, window=5),
        case("9 x (3000 + 5000), window, softcap", long, small_long, window=4000, softcap=10.0),
        case("64 x 700, 20 heads a key", wide, small_wide),
        case("256 x (80 + 128), pages", partial(_pages, cache, 8), partial(_pages, small_cache, 2)),
        case("9 x (3000 + 5000), pages, window", partial(_pages, long, 16), partial(_pages, small_long, 8), window=4000),
        replace(case("256 x (80 + 128), pages beside others", partial(_pages, cache, 8), partial(_pages, small_alone, 4)),
                forward=_alone, checks=("error",)),
        replace(far, dtypes=_HALF, gibibytes=10),
        replace(case("256 x (80 + 128), beside others", cache, small_alone), forward=_alone, checks=("error",)),
    ]


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
        *_decoding(),
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
