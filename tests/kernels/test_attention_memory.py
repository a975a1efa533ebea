"""What an attention takes, counted from sizes, beside what is measured of it."""

import random

import pytest
import torch

from bench import memory
from fastppo.batch.token_tree import build_tree
from fastppo_kernels import TreeLayout, attention_memory, tree_attention
from fastppo_kernels.attention import AttentionBackend


def layout_of(groups: int, prompt: int, new: int, root: int, samples: int = 4) -> TreeLayout:
    """Of prompts with a common root, each with answers of at most so many tokens."""
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(300) for _ in range(n)]  # noqa: E731
    stem, sequences, starts = ids(root), [], []
    for _ in range(groups):
        of_prompt = stem + ids(rng.randint(prompt // 2, prompt))
        for _ in range(samples):
            sequences.append(of_prompt + ids(rng.randint(max(1, new // 2), new)))
            starts.append(len(of_prompt))
    return build_tree(sequences, starts).layout


LAYOUTS = {
    "short": layout_of(16, 20, 4, 30), "long": layout_of(3, 12, 100, 0), "prefix": layout_of(8, 20, 4, 400),
    "one": layout_of(1, 300, 2, 0, samples=1),
}  # fmt: skip


def measured(layout: TreeLayout, heads: int, kv_heads: int, dtype: torch.dtype, backend: AttentionBackend, window: int | None):
    """Peaks of forward with gradients and without, and of backward, of a layout that was used before."""
    inputs = [torch.randn(layout.n_queries, n, 16).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    made: dict[str, torch.Tensor] = {}

    def forward() -> None:
        made["out"] = tree_attention(*inputs, layout, backend=backend, window=window)

    forward()
    of_out = torch.ones_like(made["out"])
    torch.autograd.grad(made.pop("out"), inputs, of_out)
    of_forward = memory.peak(forward)
    constants = [x.detach() for x in inputs]
    without = memory.peak(lambda: tree_attention(*constants, layout, backend=backend, window=window))
    return of_forward, without, memory.peak(lambda: torch.autograd.grad(made["out"], inputs, of_out))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("backend", "window"), [("cpu", None), ("torch", None), ("torch", 9)])
def test_what_is_taken_is_what_is_counted(backend, window, heads, kv_heads, dtype, name):
    layout = LAYOUTS[name]
    tokens, of_token = layout.n_queries, (heads + 2 * kv_heads) * 16 * dtype.itemsize
    counted = attention_memory(layout, heads, kv_heads, 16, dtype, backend=backend)
    result = tokens * heads * 16 * dtype.itemsize + 4 * tokens * heads
    found = measured(layout, heads, kv_heads, dtype, backend, window)
    wanted = result + max(counted.recorded, counted.kept), result + counted.forward, tokens * of_token + counted.backward
    for step, a, b in zip(("forward", "without gradients", "backward"), found, wanted, strict=True):
        assert abs(b - a) < 0.1 * a, f"{step}: {b:,} counted, {a:,} measured"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "sdpa"}, "backend must be cpu or torch, got 'sdpa'"),
        ({"dtype": torch.int64}, "dtype must be a floating-point one, got torch.int64"),
        ({"kv_heads": 3}, "4 query heads are no multiple of 3 key heads"),
        ({"threads": 0}, "threads must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_counted_is_one_line(arguments, message):
    usual = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        attention_memory(LAYOUTS["one"], **usual | arguments)


def test_a_layout_with_a_past_is_refused():
    with pytest.raises(ValueError, match="layout must have no past, got one of 2 rows"):
        attention_memory(build_tree([[1, 2, 3, 4]], past=2).layout, 4, 2, 8, torch.float32)
