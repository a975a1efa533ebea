"""Long segments through oneDNN's products, beside short ones through the fused kernel, against a dense mask in float64."""

import random

import pytest
import torch
from test_attention import inputs
from test_attention_cpu import exact, layout_of, results

from fastppo_kernels import _attention_cpu, _attention_tiles, row_multiple
from fastppo_kernels.attention import tree_attention

pytestmark = pytest.mark.skipif(
    row_multiple(torch.device("cpu"), torch.float32) == 1, reason="oneDNN is no faster than MKL on this CPU"
)


@pytest.fixture(autouse=True)
def from_few_queries_on(monkeypatch):
    monkeypatch.setattr(_attention_tiles, "FEWEST_WORK", 1)


def plan(layout, tensors):
    return _attention_cpu.plan_of(layout, tensors[0], tensors[1])


def assert_exact(layout, tensors, long, scale=None):
    """As many long segments as said, and everything right up to float32's rounding."""
    assert len(plan(layout, tensors).long) == long
    for name, found, wanted in zip(
        ("out", "dq", "dk", "dv"), results(layout, tensors, scale=scale), exact(layout, tensors, scale), strict=True
    ):
        error = float((found.double() - wanted).abs().max() / wanted.abs().max())
        assert error < 3e-6, f"{name}: {error:.2g}"


CASES = {
    "one sequence": ([((), 200)], 0, 0, 1),
    "exactly one tile": ([((), 128)], 0, 0, 1),
    "one more than a tile": ([((), 65)], 0, 0, 1),
    "a long root and long answers": ([(range(0), 90), (range(90), 130), (range(90), 65), (range(90), 3)], 90, 0, 3),
    "a short root, answers of both kinds": ([(range(0), 12), (range(12), 70), (range(12), 5), (range(12), 191)], 12, 0, 2),
    "no root": ([((), 100), ((), 9), (range(100), 80), ([*range(100), *range(109, 150)], 7)], 0, 0, 2),
    "only a part of the path": ([(range(0), 9), (range(4), 150), (range(7), 66)], 4, 0, 2),
    "a past": ([(range(30), 100), (range(30), 8), ([*range(30), *range(30, 60)], 90)], 30, 30, 2),
    "a past that the root goes on from": ([(range(10), 90), (range(100), 70), (range(100), 4)], 100, 10, 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("most_scores", [1, 1 << 18])
def test_trees(case, heads, most_scores, monkeypatch):
    monkeypatch.setattr(_attention_tiles, "MOST_SCORES", most_scores)  # 1: tiles of 64 queries
    paths, root, past, long = CASES[case]
    layout = layout_of(paths, root=root, past=past)
    assert_exact(layout, inputs(layout, *heads, 16, dtype=torch.float32), long)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_kept_or_made_again_is_the_same_to_the_bit(kept, monkeypatch):
    paths, root, past, _ = CASES["a long root and long answers"]
    layout = layout_of(paths, root=root, past=past)
    tensors = inputs(layout, 4, 2, 16, dtype=torch.float32)
    wanted = results(layout, tensors)
    monkeypatch.setattr(_attention_tiles, "KEPT_BYTES", kept)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        tree_attention(*tensors, layout, backend="cpu")
    sums = sum(x.numel() for x in tensors) + layout.n_queries * 4 * 16 + layout.n_queries * 4
    tiles = [tile for each in plan(layout, tensors).long for tile in each.tiles]
    assert sum(saved) == sums + (sum(len(tile.rows) * tile.keys for tile in tiles) if kept else 0)
    assert all(torch.equal(x, y) for x, y in zip(results(layout, tensors), wanted, strict=True))


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_a_scale(scale):
    layout = layout_of([((), 150)])
    tensors = inputs(layout, 2, 1, 8, dtype=torch.float32)
    found, wanted = results(layout, tensors, scale=scale), exact(layout, tensors, scale)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=float(2e-5 * y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    layout = layout_of([(range(0), 70), (range(70), 90), (range(70), 4)], root=70)
    tensors = inputs(layout, 4, 2, 16, dtype=dtype)
    assert plan(layout, tensors).long
    full = results(layout, [x.detach().float().requires_grad_() for x in tensors])
    assert torch.equal(results(layout, tensors)[0], full[0].to(dtype))


def test_float64_is_left_to_the_kernel():
    layout = layout_of([((), 150)])
    assert not plan(layout, inputs(layout, dtype=torch.float64)).long


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_scores_do_not_overflow_in_padded_places_either(size):
    layout = layout_of([(range(0), 70), (range(70), 67)], root=70)
    q, k, v = inputs(layout, 2, 2, 8, dtype=torch.float32)
    found = results(layout, [(size * q.detach()).requires_grad_(), (size * k.detach()).requires_grad_(), v])
    assert all(x.isfinite().all() for x in found)


def test_a_branch_does_not_reach_another():
    layout = layout_of([(range(0), 10), (range(10), 100), (range(10), 80)], root=10)
    q, k, v = (x.detach() for x in inputs(layout, 2, 2, 8, dtype=torch.float32))
    clean = tree_attention(q, k, v, layout, backend="cpu")
    k[110:] = v[110:] = torch.nan
    found = tree_attention(q, k, v, layout, backend="cpu")
    assert torch.equal(found[:110], clean[:110]) and found[110:].isnan().all()


def test_the_same_bits_in_every_run():
    rng = random.Random(1)
    layout = layout_of([(range(0), 20), *((range(20), rng.choice([5, 90, 140])) for _ in range(5))], root=20)
    tensors = inputs(layout, 4, 2, 16, dtype=torch.float32)
    first = results(layout, tensors)
    for _ in range(4):
        assert all(torch.equal(x, y) for x, y in zip(results(layout, tensors), first, strict=True))


def test_strides_and_gradients_of_some_inputs_only():
    layout = layout_of([(range(0), 20), (range(20), 100)], root=20)
    tensors = inputs(layout, 4, 2, 8, dtype=torch.float32)
    wanted = results(layout, tensors)
    turned = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in tensors]
    for x, y in zip(results(layout, turned), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    q, k, v = tensors
    out = tree_attention(q.detach(), k, v.detach(), layout, backend="cpu")
    weight = torch.ones_like(out)
    whole = torch.autograd.grad(tree_attention(q, k, v, layout, backend="cpu"), k, weight)[0]
    assert torch.equal(torch.autograd.grad(out, k, weight)[0], whole)


def test_what_is_long(monkeypatch):
    monkeypatch.undo()
    is_long = _attention_tiles.is_long
    assert is_long(256, 356, 4, 2, 32) and is_long(256, 356, 14, 2, 64)
    assert not is_long(28, 228, 4, 2, 32), "many short ones go into one call of the kernel"
    assert not is_long(64, 100_000, 4, 2, 64)
