"""The CPU's attention back end against the plain one and a dense mask in float64, on trees of every shape."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import dense, inputs, make_layout, seen

from fastppo.batch.token_tree import build_tree
from fastppo_kernels import _attention_cpu
from fastppo_kernels.attention import TreeLayout, _choose, attention_backends, decode_attention, tree_attention

HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])
few = settings(max_examples=25, deadline=None, derandomize=True)


def weight_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)


def results(layout, tensors, backend="cpu", weight=None, **options):
    """The output and the gradients of q, k and v."""
    out = tree_attention(*tensors, layout, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight_of(out) if weight is None else weight)]


def exact(layout, tensors, scale=None):
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    out = dense(*tensors, seen(layout), scale)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight_of(out))]


def assert_close(found, wanted, tolerance=1e-10):
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check(layout, heads=(4, 2), dim=4, seed=0, scale=None):
    """In float64: as the dense mask has it, and as the plain form has it."""
    tensors = inputs(layout, *heads, dim=dim, seed=seed)
    found = results(layout, tensors, scale=scale)
    assert_close(found, exact(layout, tensors, scale))
    assert_close(found, results(layout, tensors, "torch", scale=scale))
    return found


def layout_of(paths, root=0, past=0):
    """From the root paths of segments, (path above, number of own rows) each."""
    cu_q, cu_k, keys = [0], [0], []
    for above, own in paths:
        keys += [*above, *range(past + cu_q[-1], past + cu_q[-1] + own)]
        cu_q.append(cu_q[-1] + own)
        cu_k.append(len(keys))
    return TreeLayout(torch.tensor(cu_q), torch.tensor(cu_k), torch.tensor(keys, dtype=torch.int64), root, past)


@st.composite
def token_trees(draw):
    """Sequences of few different tokens: equal ones, prefixes of others and long shared prefixes are common."""
    stem = draw(st.lists(st.integers(0, 2), max_size=9))
    longest = draw(st.sampled_from([1, 3, 24]))
    tails = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=longest), min_size=1, max_size=12))
    past = draw(st.integers(0, len(stem)))
    return build_tree([stem + tail for tail in tails], past=past).layout


@st.composite
def trees(draw):
    """Segments that leave any earlier path anywhere, with a past that is shorter than the root, as long or longer."""
    past, root = draw(st.sampled_from([(0, 0), (0, 5), (2, 5), (3, 3), (6, 2), (4, 0)]))
    known = [list(range(past))]  # where a path can be left
    paths, rows = [], past
    if root > past:
        first = root - past + draw(st.integers(0, 3))
        paths.append((range(past), first))
        known.append(list(range(past + first)))
        rows += first
    for _ in range(draw(st.integers(0 if paths else 1, 10))):
        trunk = draw(st.sampled_from(known))
        if len(trunk) < root:
            trunk = known[-1]
        trunk = trunk[: draw(st.integers(root, len(trunk)))]
        own = draw(st.sampled_from([1, 1, 2, 3, 5, 17]))
        paths.append((trunk, own))
        known.append([*trunk, *range(rows, rows + own)])
        rows += own
    return layout_of(paths, root, past)


@few
@given(token_trees(), HEADS, st.integers(0, 99))
def test_trees_of_sequences(layout, heads, seed):
    check(layout, heads, seed=seed)


@few
@given(trees(), HEADS, st.integers(0, 99))
def test_trees_of_any_shape(layout, heads, seed):
    check(layout, heads, seed=seed)


def test_one_token():
    (out, dq, dk, dv) = check(layout_of([((), 1)]))
    assert not dq.any() and not dk.any() and dv.any()


@pytest.mark.parametrize("past", [1, 4])
def test_a_past_and_no_root(past):
    """Segments that see different parts of what was computed before, one of them nothing of it."""
    check(layout_of([(range(past), 2), (range(past - 1), 3), ((), 2), (range(past), 1)], 0, past))


def test_a_chain_of_segments():
    """Each continues the one before it: what one sees above itself is every earlier segment."""
    check(layout_of([(range(3 * i), 3) for i in range(12)]))
    check(layout_of([(range(3 * i), 3) for i in range(12)], root=3))


def test_many_siblings_of_very_different_lengths_below_several_parents():
    """Queries and keys are padded in several calls, and in none of them does a padded place count."""
    lengths = [1, 2, 1, 40, 3, 1, 9, 1, 30, 2]
    paths, rows = [(range(0), 6), (range(4), 5)], 11
    for i, own in enumerate(lengths):
        paths.append(([*range(6)] if i % 3 else [*range(4), *range(6, 6 + i % 5 + 1)], own))
        rows += own
    layout = layout_of(paths, root=4)
    blocks = _attention_cpu._blocks(layout)
    assert any(block.q_place_M is not None for block in blocks) and any(block.hide_S11K is not None for block in blocks)
    check(layout, seed=3)


@pytest.mark.parametrize("lengths", [[128, 129, 130, 64], [300, 1, 520, 257], [1030]])
@pytest.mark.parametrize("root", [False, True])
def test_long_segments(lengths, root):
    """Longer than the largest square that is one call: rectangles between smaller squares."""
    paths, rows = [(range(0), lengths[0])], lengths[0]
    for own in lengths[1:]:
        paths.append((range(lengths[0] - 1), own))
        rows += own
    layout = layout_of(paths, root=lengths[0] - 1 if root else 0)
    assert any(isinstance(b.q_rows_SQ, slice) or not b.own for b in _attention_cpu._blocks(layout))
    tensors = inputs(layout, 2, 1, 4)
    assert_close(results(layout, tensors), exact(layout, tensors))


@few
@given(st.integers(0, 9999))
def test_squares_are_cut_wherever_they_are_long(seed):
    rng = random.Random(seed)
    layout = make_layout(rng, root=rng.choice([0, 3, 90]), segments=rng.randint(1, 5), longest=rng.choice([30, 200]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attention_cpu, "LARGEST_SQUARE", 24)
        check(layout, (2, 1), seed=seed)


@pytest.mark.parametrize("largest", [24, 1000])
def test_every_key_of_every_query_is_multiplied_once(monkeypatch, largest):
    """As the module says; and every query has its own square in the first call that it is in, and no call has it twice."""
    monkeypatch.setattr(_attention_cpu, "LARGEST_SQUARE", largest)
    layout = make_layout(random.Random(5), root=6, segments=9, longest=60, past=2)
    pairs, begun = torch.zeros_like(seen(layout), dtype=torch.int64), set()
    for block in _attention_cpu._blocks(layout):
        q_rows, k_rows = (
            torch.arange(rows.start, rows.stop)[None] if isinstance(rows, slice) else rows
            for rows in (block.q_rows_SQ, block.k_rows_SK)
        )
        real = torch.ones(q_rows.numel(), dtype=torch.bool)
        if block.q_place_M is not None:
            real = torch.zeros_like(real).index_fill_(0, block.q_place_M, True)
        for group, (queries, keys) in enumerate(zip(q_rows.tolist(), k_rows.tolist(), strict=True)):
            shown = torch.ones(len(keys), dtype=torch.bool) if block.hide_S11K is None else block.hide_S11K[group, 0, 0] == 0
            for i, query in enumerate(queries):
                if real[group * len(queries) + i]:
                    assert (query in begun) != block.own
                    for j, key in enumerate(keys):
                        pairs[query, key] += int(shown[j] and (not block.own or j <= i))
        members = q_rows.flatten()[real].tolist()
        assert len(set(members)) == len(members)
        begun |= set(members)
    assert torch.equal(pairs, seen(layout).long())


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_a_scale(scale):
    check(make_layout(random.Random(2), root=3, segments=7, longest=6), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    layout = make_layout(random.Random(6), root=20, segments=12, longest=12)
    tensors = inputs(layout, dim=16, dtype=dtype)
    found = results(layout, tensors)
    full = results(layout, [x.detach().float().requires_grad_() for x in tensors], weight=weight_of(found[0]).float())
    assert torch.equal(found[0], full[0].to(dtype))
    for x, y, z in zip(found, full, exact(layout, tensors), strict=True):
        assert x.dtype == dtype and y.dtype == torch.float32
        torch.testing.assert_close(x.double(), z, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    for x, y in zip(found[1:], full[1:], strict=True):
        torch.testing.assert_close(x, y.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def _reversed_strides(x):
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def _every_second(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def _of_a_wider_row(x):
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]


def _heads_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("change", [_reversed_strides, _every_second, _of_a_wider_row, _heads_first])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "v", "gradient"])
def test_not_contiguous(change, dtype, which):
    layout = make_layout(random.Random(4), root=3, segments=8, longest=5)
    plain = inputs(layout, dtype=dtype)
    weight = weight_of(plain[0])
    wanted = results(layout, plain, weight=weight)
    tensors = [change(x.detach()).requires_grad_() if name == which else x for name, x in zip("qkv", plain, strict=True)]
    found = results(layout, tensors, weight=change(weight) if which == "gradient" else weight)
    assert which == "gradient" or not tensors["qkv".index(which)].is_contiguous()
    assert_close(found, wanted, 1e-12 if dtype == torch.float64 else 1e-6)


def test_the_gradient_of_a_sum():
    """It is one number, expanded."""
    layout = make_layout(random.Random(4), root=3, segments=8, longest=5)
    tensors = inputs(layout)
    found = torch.autograd.grad(tree_attention(*tensors, layout, backend="cpu").sum(), tensors)
    wanted = torch.autograd.grad(dense(*tensors, seen(layout)).sum(), tensors)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(size, dtype):
    """Up to 1e3 and 1e5: what is left of the softmax is one key, and nothing overflows, in padded places either."""
    paths = [(range(0), 5), (range(5), 2), (range(5), 30), (range(4), 1), ([*range(5), 5, 6], 3)]
    layout = layout_of(paths, root=3)
    assert any(block.q_place_M is not None for block in _attention_cpu._blocks(layout))
    q, k, v = inputs(layout, dtype=dtype)
    tensors = [(size * q.detach()).requires_grad_(), (size * k.detach()).requires_grad_(), v]
    found, wanted = results(layout, tensors), exact(layout, tensors)
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-3 * size / 30)
    if dtype == torch.float32 and size == 30.0:
        assert_close(found, wanted, 0.02)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_row_that_dominates_all_others(sign):
    """The parts of a softmax are put together from denominators that differ by hundreds."""
    layout = make_layout(random.Random(8), root=5, segments=9, longest=6)
    q, k, v = inputs(layout)
    with torch.no_grad():
        k[: layout.root] += sign * 100 * q.mean((0, 1)) / q.mean((0, 1)).norm()
        q += 5 * q.mean((0, 1)) / q.mean((0, 1)).norm()
    found = results(layout, [q, k, v])
    assert all(x.isfinite().all() for x in found)
    assert_close(found, exact(layout, [q, k, v]), 1e-9)


def test_the_same_bits_in_every_run():
    layout = make_layout(random.Random(9), root=10, segments=40, longest=12)
    tensors = inputs(layout, 4, 2, 16, dtype=torch.float32)
    first = results(layout, tensors)
    for _ in range(4):
        layout = TreeLayout(layout.cu_q, layout.cu_k, layout.kv_index, layout.root)
        assert all(torch.equal(x, y) for x, y in zip(results(layout, tensors), first, strict=True))


def test_rows_do_not_reach_who_does_not_see_them():
    """Garbage in one branch, NaN even, leaves the others as they were."""
    layout = layout_of([(range(0), 4), (range(4), 7), (range(4), 2), ([*range(4), 4, 5], 3)], root=4)
    q, k, v = (x.detach() for x in inputs(layout))
    clean = tree_attention(q, k, v, layout, backend="cpu")
    k[11:13] = v[11:13] = torch.nan
    found = tree_attention(q, k, v, layout, backend="cpu")
    assert found[11:13].isnan().all()
    others = [*range(11), *range(13, 16)]
    assert torch.equal(found[others], clean[others])


def test_autocast_changes_no_bit():
    layout = make_layout(random.Random(4), root=3, segments=8, longest=5)
    tensors = inputs(layout, dtype=torch.float32)
    plain = results(layout, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(layout, tensors)
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(inside, plain, strict=True))


def test_gradients_of_some_inputs_only():
    layout = make_layout(random.Random(4), root=3, segments=8, longest=5)
    tensors = inputs(layout)
    whole = results(layout, tensors)
    for i, x in enumerate(tensors):
        chosen = [y if y is x else y.detach() for y in tensors]
        out = tree_attention(*chosen, layout, backend="cpu")
        assert torch.equal(torch.autograd.grad(out, x, weight_of(out))[0], whole[1 + i])


def test_there_is_no_second_derivative_and_it_says_so():
    layout = make_layout(random.Random(4), root=2, segments=3, longest=2)
    tensors = inputs(layout)
    first = torch.autograd.grad(tree_attention(*tensors, layout, backend="cpu").square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


# -- what it refuses, and when it is chosen ------------------------------------------------------------------------------


def qv(n=4, dim=4, v_dim=4, device="cpu"):
    return torch.zeros(n, 2, dim, device=device), torch.zeros(n, 2, v_dim, device=device)


@pytest.mark.parametrize(
    ("tensors", "window", "softcap", "why"),
    [
        (qv(), 3, None, "has no window"),
        (qv(), None, 2.0, "has no softcap"),
        (qv(v_dim=6), None, None, "needs values as wide as keys, not 6 and 4"),
        (qv(0), None, None, "needs a token"),
        (qv(device="meta"), None, None, "is for the CPU, not meta"),
    ],
)
@pytest.mark.parametrize("forced", ["backend", "FASTPPO_ATTENTION"])
def test_what_it_refuses(monkeypatch, tensors, window, softcap, why, forced):
    q, v = tensors
    assert _attention_cpu.refuses(q, v, window, softcap) == why
    monkeypatch.setenv("FASTPPO_ATTENTION", "cpu" if forced == "FASTPPO_ATTENTION" else "torch")
    with pytest.raises(ValueError, match=f"^{forced} 'cpu': {re.escape(why)}$"):
        _choose(q, v, window, softcap, "cpu" if forced == "backend" else None)
    if q.device.type == "cpu":
        assert _choose(q, v, window, softcap, "auto") == "torch"  # whoever asks for nothing gets what can do it


def test_it_is_what_a_cpu_takes(monkeypatch):
    monkeypatch.delenv("FASTPPO_ATTENTION", raising=False)
    assert _choose(*qv(), None, None, None) == _choose(*qv(), None, None, "auto") == "cpu"
    assert attention_backends()["cpu"] == "usable"
    for name in ("torch", "sdpa"):
        monkeypatch.setenv("FASTPPO_ATTENTION", name)
        assert _choose(*qv(), None, None, None) == name
        assert _choose(*qv(), None, None, "cpu") == "cpu"
    with pytest.raises(ValueError, match="backend must be one of .*cpu.*, got 'gpu'"):
        _choose(*qv(), None, None, "gpu")


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 1.5}])
def test_the_chosen_one_is_the_one_that_runs(monkeypatch, options):
    monkeypatch.delenv("FASTPPO_ATTENTION", raising=False)
    ran = []
    real = _attention_cpu.forward
    monkeypatch.setattr(_attention_cpu, "forward", lambda *args: ran.append(1) or real(*args))
    layout = make_layout(random.Random(2), root=2, segments=4, longest=3)
    tensors = [x.detach() for x in inputs(layout)]
    found = tree_attention(*tensors, layout, **options)
    assert bool(ran) == (not options)
    wanted = dense(*tensors, seen(layout, options.get("window")), softcap=options.get("softcap"))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_compiler_sees_the_plain_form_and_gets_the_same():
    layout = make_layout(random.Random(2), root=2, segments=4, longest=3)
    tensors = inputs(layout)
    compiled = torch.compile(lambda *t: tree_attention(*t, layout), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), results(layout, tensors)[0], rtol=1e-10, atol=1e-10)


def test_calls_are_made_once_a_tree(monkeypatch):
    layout = make_layout(random.Random(2), root=2, segments=4, longest=3)
    made, real = [], _attention_cpu._blocks
    monkeypatch.setattr(_attention_cpu, "_blocks", lambda found, taken: made.append(found) or real(found, taken))
    for seed in range(3):
        results(layout, inputs(layout, seed=seed))
    assert made == [layout]


def test_nothing_but_its_inputs_and_sums_is_kept_for_backward():
    layout = make_layout(random.Random(9), root=10, segments=40, longest=12)
    tensors, kept = inputs(layout, 4, 2, 8, dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        tree_attention(*tensors, layout, backend="cpu")
    tokens = layout.n_queries
    assert sum(kept) == sum(x.numel() for x in tensors) + tokens * 4 * 8 + tokens * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 4, 2), (4, 4, 2), (7, 4, 1), (3, 2, 2)])
@pytest.mark.parametrize("root", [0, 1, 90])
def test_decoding_over_a_long_cache(root, batch, heads, kv_heads, dtype):
    """One token a sequence, against one softmax at a time in float64."""
    generator, longest = torch.Generator().manual_seed(batch + root), 73
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    q, k_root, v_root = make(batch, heads, 16), make(root, kv_heads, 16), make(root, kv_heads, 16)
    k_own, v_own = make(batch, kv_heads, longest, 16), make(batch, kv_heads, longest, 16)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    for i, filled in enumerate(lengths.tolist()):
        v_own[i, :, filled:] = 1e4  # nobody looks there
    found = decode_attention(q, k_root, v_root, k_own, v_own, lengths)
    assert found.shape == (batch, heads, 16) and found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for i, filled in enumerate(lengths.tolist()):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            k = torch.cat([k_root[:, kv], k_own[i, kv, :filled]]).double()
            v = torch.cat([v_root[:, kv], v_own[i, kv, :filled]]).double()
            wanted = torch.softmax(k @ q[i, head].double() / 4, 0) @ v
            torch.testing.assert_close(found[i, head].double(), wanted, rtol=tolerance, atol=tolerance)
