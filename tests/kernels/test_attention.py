"""Attention over a packed tree against a dense T x T mask in fp64."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastppo_kernels import _attention_layout, _attention_torch
from fastppo_kernels.attention import TreeLayout, attention, decode_attention, tree_attention


def make_layout(rng, *, root, segments, longest, past=0):
    """A random tree: the root, then segments that each leave a random earlier path at a random place."""
    paths, cu_q, cu_k, keys = [list(range(root))], [0], [0], []
    rows = max(root, past)
    if root > past:
        cu_q.append(root - past)
        cu_k.append(root)
        keys += range(root)
    for _ in range(segments):
        trunk = rng.choice(paths)
        trunk = trunk[: rng.randint(root, len(trunk))]
        n = rng.randint(1, longest)
        path = trunk + list(range(rows, rows + n))
        rows += n
        paths.append(path)
        cu_q.append(rows - past)
        keys += path
        cu_k.append(len(keys))
    tensor = lambda x, dtype: torch.tensor(x, dtype=dtype)  # noqa: E731
    return TreeLayout(tensor(cu_q, torch.int32), tensor(cu_k, torch.int32), tensor(keys, torch.int64), root, past)


def seen(layout, window=None):
    """[T, past + T] bool: the keys that each query sees."""
    cu_q, cu_k = layout.cu_q.tolist(), layout.cu_k.tolist()
    mask = torch.zeros(cu_q[-1], layout.past + cu_q[-1], dtype=torch.bool)
    for s in range(len(cu_q) - 1):
        path = layout.kv_index[cu_k[s] : cu_k[s + 1]].tolist()
        n = cu_q[s + 1] - cu_q[s]
        for j in range(n):
            mine = path[: len(path) - n + 1 + j]
            mask[cu_q[s] + j, mine[-window:] if window else mine] = True
    return mask


def dense(q, k, v, mask, scale=None, softcap=None):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def inputs(layout, heads=4, kv_heads=2, dim=6, v_dim=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = int(layout.cu_q[-1])
    shapes = [(tokens, heads, dim), (layout.past + tokens, kv_heads, dim), (layout.past + tokens, kv_heads, v_dim or dim)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def check(layout, tensors, tolerance=1e-10, **options):
    """Forward and gradients equal the dense reference's."""
    window = options.get("window")
    got = tree_attention(*tensors, layout, **options)
    wanted = dense(*tensors, seen(layout, window), options.get("scale"), options.get("softcap"))
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7), dtype=wanted.dtype)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    pairs = zip(torch.autograd.grad(got, tensors, weight), torch.autograd.grad(wanted, tensors, weight), strict=True)
    for name, (ours, theirs) in zip("qkv", pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("root", [0, 1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_forward_and_gradients(root, heads, window, softcap):
    for seed in range(4):
        rng = random.Random(seed)
        layout = make_layout(rng, root=root, segments=rng.randint(1, 9), longest=rng.choice([1, 3, 8]))
        check(layout, inputs(layout, *heads, seed=seed), window=window, softcap=softcap)


@pytest.mark.parametrize(("root", "past"), [(3, 3), (5, 3), (4, 1)])
@pytest.mark.parametrize("window", [None, 2])
def test_past(root, past, window):
    """Rows computed before have keys and values but no queries; they get gradients too."""
    for seed in range(4):
        layout = make_layout(random.Random(seed), root=root, segments=5, longest=4, past=past)
        check(layout, inputs(layout, seed=seed), window=window)


@pytest.mark.parametrize("limit", [1, 20, 60])
@pytest.mark.parametrize("root", [0, 4])
def test_small_buckets(monkeypatch, limit, root):
    monkeypatch.setattr(_attention_layout, "_MAX_BUCKET_SCORES", limit)
    layout = make_layout(random.Random(1), root=root, segments=14, longest=6)
    check(layout, inputs(layout))
    assert len(layout.buckets) > 3


def test_buckets_stay_below_their_limit(monkeypatch):
    """A bucket is a rectangle of its longest queries and keys: one long path must not blow up many short ones."""
    limit = 400
    monkeypatch.setattr(_attention_layout, "_MAX_BUCKET_SCORES", limit)
    # One query at the end of a long path, then many segments of two queries and a short path.
    paths, rows = [list(range(100))], 100
    for n in [1] + [2] * 40:
        trunk = paths[0] if n == 1 else [0, 1]
        paths.append(trunk + list(range(rows, rows + n)))
        rows += n
    cu_q = torch.tensor([0, 100, 101, *range(103, 103 + 80, 2)], dtype=torch.int32)
    cu_k = torch.tensor([0, *torch.tensor([len(p) for p in paths]).cumsum(0).tolist()], dtype=torch.int32)
    layout = TreeLayout(cu_q, cu_k, torch.tensor([r for p in paths for r in p]), 2)
    for bucket in layout.buckets:
        segments, queries = bucket.q_rows_SQ.shape
        assert segments == 1 or segments * queries * (layout.root + bucket.k_rows_SK.shape[1]) <= limit
    check(layout, inputs(layout))


def test_single_token_segments():
    layout = make_layout(random.Random(3), root=2, segments=12, longest=1)
    check(layout, inputs(layout))


def test_root_is_the_whole_tree():
    """K equal sequences: nothing is left besides the root."""
    layout = make_layout(random.Random(0), root=6, segments=0, longest=1)
    assert layout.buckets == []
    check(layout, inputs(layout))
    check(layout, inputs(layout), window=2)


@pytest.mark.parametrize("v_dim", [3, 10])
def test_scale_and_value_dim(v_dim):
    layout = make_layout(random.Random(2), root=3, segments=6, longest=4)
    check(layout, inputs(layout, v_dim=v_dim), scale=0.7)


def test_large_scores_do_not_overflow():
    layout = make_layout(random.Random(4), root=3, segments=6, longest=4)
    q, k, v = (x.detach().float() for x in inputs(layout))
    got = tree_attention(q * 200, k * 200, v, layout)
    torch.testing.assert_close(
        got.double(), dense(q.double() * 200, k.double() * 200, v.double(), seen(layout)), atol=1e-3, rtol=0
    )


def test_gradcheck():
    layout = make_layout(random.Random(5), root=2, segments=3, longest=2)
    tensors = inputs(layout, heads=2, kv_heads=1, dim=3)
    assert torch.autograd.gradcheck(lambda *t: tree_attention(*t, layout, window=3, softcap=2.0), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_sdpa(dtype):
    """Error to fp64, forward and gradients, beside that of torch's own SDPA with the same mask and inputs."""
    layout = make_layout(random.Random(6), root=20, segments=12, longest=12)
    tensors = inputs(layout, dim=16, dtype=dtype)
    mask = seen(layout)
    exact_in = [x.detach().double().requires_grad_() for x in tensors]
    exact = dense(*exact_in, mask)
    weight = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_grads = torch.autograd.grad(exact, exact_in, weight.double())

    ours = tree_attention(*tensors, layout)
    assert ours.dtype == dtype
    q, k, v = (x.transpose(0, 1)[None] for x in tensors)
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    error = lambda x, y: float((x.detach().double() - y.detach()).norm() / y.detach().norm())  # noqa: E731
    slack = 1.2 if dtype == torch.float32 else 1.02
    floor = torch.finfo(dtype).eps
    assert error(ours, exact) <= max(slack * error(theirs, exact), floor)
    grads, their_grads = (torch.autograd.grad(x, tensors, weight) for x in (ours, theirs))
    for mine, other, true in zip(grads, their_grads, exact_grads, strict=True):
        assert mine.dtype == dtype
        assert error(mine, true) <= max(slack * error(other, true), floor)


@pytest.mark.parametrize("root", [0, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_decode_is_the_last_row_of_the_whole_sequence(root, window, softcap):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 4, 2, 6])
    k_root, v_root = torch.randn(2, root, 2, 6, dtype=torch.float64)
    k_own, v_own = torch.randn(2, 4, 2, 8, 6, dtype=torch.float64)
    q = torch.randn(4, 4, 6, dtype=torch.float64)
    got = decode_attention(q, k_root, v_root, k_own, v_own, lengths, window=window, softcap=softcap)
    for i, n in enumerate(lengths.tolist()):
        k, v = (torch.cat([r, x[i, :, :n].transpose(0, 1)]) for r, x in ((k_root, k_own), (v_root, v_own)))
        total = root + n
        layout = TreeLayout(torch.tensor([0, total]), torch.tensor([0, total]), torch.arange(total))
        padded_q = torch.cat([torch.randn(total - 1, 4, 6, dtype=torch.float64), q[i : i + 1]])
        whole = tree_attention(padded_q, k, v, layout, window=window, softcap=softcap)
        torch.testing.assert_close(got[i], whole[-1])


def test_decode_ignores_what_lies_behind_a_sequence():
    torch.manual_seed(0)
    k_own, v_own = torch.randn(2, 2, 1, 5, 4)
    empty, q, lengths = torch.zeros(0, 1, 4), torch.randn(2, 2, 4), torch.tensor([2, 5])
    before = decode_attention(q, empty, empty, k_own, v_own, lengths)
    k_own[0, :, 2:], v_own[0, :, 2:] = 1e4, 1e4
    assert torch.equal(decode_attention(q, empty, empty, k_own, v_own, lengths), before)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3, 4), (3, 2, 6), (3, 2, 6)), {}, r"\[tokens, heads, dim\]"),
        (((3, 4, 6), (3, 2, 6), (3, 1, 6)), {}, "equal tokens and heads"),
        (((3, 4, 6), (3, 2, 5), (3, 2, 6)), {}, "equal dim"),
        (((3, 3, 6), (3, 2, 6), (3, 2, 6)), {}, "no multiple"),
        (((3, 3, 6), (3, 0, 6), (3, 0, 6)), {}, "no multiple"),
        (((3, 4, 6), (4, 2, 6), (4, 2, 6)), {}, "4 keys for 3 queries"),
        (((4, 4, 6), (4, 2, 6), (4, 2, 6)), {}, "layout"),
        (((3, 4, 6), (3, 2, 6), (3, 2, 6)), {"window": 0}, "window"),
    ],
)
def test_errors(shapes, options, message):
    layout = TreeLayout(torch.tensor([0, 3]), torch.tensor([0, 3]), torch.arange(3))
    with pytest.raises(ValueError, match=message):
        tree_attention(*(torch.zeros(s) for s in shapes), layout, **options)


def test_dtypes_and_numbers_that_do_not_fit():
    layout = TreeLayout(torch.tensor([0, 3]), torch.tensor([0, 3]), torch.arange(3))
    q, k, v = torch.zeros(3, 4, 6), torch.zeros(3, 2, 6), torch.zeros(3, 2, 6)
    with pytest.raises(ValueError, match="q, k and v need one dtype, got torch.float32, torch.bfloat16, torch.float32"):
        tree_attention(q, k.bfloat16(), v, layout)
    with pytest.raises(ValueError, match="q must have one of the dtypes .*, got torch.int64"):
        tree_attention(q.long(), k, v, layout)
    with pytest.raises(ValueError, match="k must be on the device of q"):
        tree_attention(q, k.to("meta"), v, layout)
    for options, message in [
        ({"softcap": 0.0}, "softcap must be a finite number > 0, got 0.0"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"window": 2.5}, "window must be an integer >= 1, got 2.5"),
        ({"backend": "cudnn"}, "backend must be one of auto, flash-attn, .*, torch, got 'cudnn'"),
    ]:
        with pytest.raises(ValueError, match=message):
            tree_attention(q, k, v, layout, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_q": torch.tensor([0, 1, 4])}, r"cu_q must go up from 0 to 5, got \[0, 1, 4\]"),
        ({"cu_q": torch.tensor([0, 6, 5])}, "cu_q must go up from 0 to 5"),
        ({"cu_q": torch.tensor([0, 5])}, r"cu_k must have shape \[S \+ 1\], the same for cu_q and cu_k, got \[3\]"),
        ({"cu_q": torch.tensor([0.0, 3.0, 5.0])}, "cu_q must have one of the dtypes int64, int32"),
        ({"cu_k": torch.tensor([0, 3, 6])}, "cu_k must go up from 0 to 7"),
        ({"cu_k": torch.tensor([0, 2, 7])}, "cu_k: a segment has a root path shorter than its queries"),
        ({"kv_index": torch.tensor([0, 1, 2, 0, 1, 3, 5])}, r"kv_index must be in \[0, 5\) \(rows of k\)"),
        ({"kv_index": torch.arange(7, dtype=torch.int32)}, "kv_index must have one of the dtypes int64"),
        ({"kv_index": torch.zeros(7, 1, dtype=torch.int64)}, r"kv_index must have shape \[N\]"),
        ({"root": 3}, "root: not every root path begins with the rows 0 to 2"),
        ({"root": 9}, "root: not every root path begins with the rows 0 to 8"),
        ({"past": -1}, "past must be an integer >= 0, got -1"),
        ({"past": 1}, "5 keys for 5 queries and a past of 1 rows"),
    ],
)
def test_trees_that_do_not_fit(change, message):
    tree = {"cu_q": torch.tensor([0, 3, 5]), "cu_k": torch.tensor([0, 3, 7]), "kv_index": torch.tensor([0, 1, 2, 0, 1, 3, 4])}
    tensors = [torch.randn(5, 2, 4) for _ in range(3)]
    assert attention(*tensors, **tree).shape == (5, 2, 4)
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **tree | change)


def test_a_tree_without_rows():
    empty = torch.zeros(1, dtype=torch.int32)
    q, k, v = (torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, empty, empty, torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 2, 4)


@pytest.mark.parametrize(("root", "past"), [(0, 0), (3, 0), (4, 2)])
def test_without_a_known_root(root, past):
    """`root` only says what may be shared; 0 is always right."""
    layout = make_layout(random.Random(8), root=root, segments=6, longest=4, past=past)
    tensors = inputs(layout)
    unknown = TreeLayout(layout.cu_q, layout.cu_k, layout.kv_index, 0, past)
    torch.testing.assert_close(tree_attention(*tensors, unknown), tree_attention(*tensors, layout))
    plain = attention(*tensors, layout.cu_q, layout.cu_k, layout.kv_index, root=root, past=past)
    assert torch.equal(plain, tree_attention(*tensors, layout))


def test_operator_for_the_compiler():
    """Finds the denominators again in backward instead of keeping them."""
    layout = make_layout(random.Random(8), root=3, segments=6, longest=4, past=1)
    tensors = inputs(layout)
    tree = layout.cu_q, layout.cu_k, layout.kv_index, layout.root, layout.past
    for options in ((0.4, None, None), (0.4, 3, 2.0)):
        got = _attention_torch.tree_attention_op(*tensors, *tree, *options)
        wanted = tree_attention(*tensors, layout, scale=0.4, window=options[1], softcap=options[2], backend="torch")
        assert torch.equal(got, wanted)
        grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (got, wanted)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    single = [x.detach().float().requires_grad_() for x in tensors]
    torch.library.opcheck(
        _attention_torch.tree_attention_op, (*single, *tree, 0.4, 3, None), test_utils=("test_schema", "test_faketensor")
    )  # fmt: skip
    # A layout is found again by its tensors, and only by the very same.
    assert _attention_layout.layout_of(*tree) is layout
    assert _attention_layout.layout_of(*tree[:3], 0, 1) is not layout
    assert _attention_layout.layout_of(tree[0].clone(), *tree[1:]) is not layout
