"""What does not fit is refused with one line that names it; what is only unusual works."""

import pytest
import torch
from test_attention import dense

from fastppo_kernels import _attention_layout, _attention_torch
from fastppo_kernels.attention import TreeLayout, attention, decode_attention, tree_attention

BACKENDS = ["torch", "sdpa"]


def tree(**change):
    """Three rows, then two that continue the first two."""
    usual = {"cu_q": torch.tensor([0, 3, 5]), "cu_k": torch.tensor([0, 3, 7]), "kv_index": torch.tensor([0, 1, 2, 0, 1, 3, 4])}
    return usual | change


def decode_arguments(**change):
    """Four query heads over two key heads of size 6, values of size 5, a prefix of 3 rows, a cache of 4 places."""
    usual = {
        "q": torch.randn(2, 4, 6), "k_root": torch.randn(3, 2, 6), "v_root": torch.randn(3, 2, 5),
        "k_own": torch.randn(2, 2, 4, 6), "v_own": torch.randn(2, 2, 4, 5), "lengths": torch.tensor([1, 4]),
    }  # fmt: skip
    return usual | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q must be a tensor, got NoneType"),
        ({"v_root": None}, "v_root must be a tensor, got NoneType"),
        ({"lengths": None}, "lengths must be a tensor, got NoneType"),
        ({"lengths": torch.tensor([1.0, 4.0])}, "lengths must have one of the dtypes int64, int32, got torch.float32"),
        ({"lengths": torch.tensor([1, 5])}, r"lengths must be from 1 to 4 \(places of the cache\), got values from 1 to 5"),
        ({"lengths": torch.tensor([0, 4])}, "lengths must be from 1 to 4 .*, got values from 0 to 4"),
        ({"lengths": torch.tensor([4])}, r"lengths must have shape \[2\] \(one a sequence\), got \[1\]"),
        ({"lengths": torch.tensor([[1], [4]])}, r"lengths must have shape \[2\] .*, got \[2, 1\]"),
        ({"lengths": torch.tensor([1, 4], device="meta")}, "lengths must be on the device of q"),
        ({"k_own": torch.randn(2, 2, 4, 6).bfloat16()}, "k_own must have q's dtype torch.float32, got torch.bfloat16"),
        ({"v_root": torch.randn(3, 2, 5).double()}, "v_root must have q's dtype torch.float32, got torch.float64"),
        ({"q": torch.zeros(2, 4, 6, dtype=torch.int64)}, "q must have one of the dtypes float32, .*, got torch.int64"),
        ({"k_root": torch.zeros(3, 2, 6, device="meta")}, "k_root must be on the device of q"),
        ({"q": torch.randn(2, 3, 6)}, "decode_attention: 3 query heads are no multiple of 2 key heads"),
        ({"q": torch.randn(2, 0, 6)}, "q needs at least one head of a size of at least 1, got 0 of size 6"),
        ({"q": torch.randn(2, 6)}, r"q must be \[B, H, D\], .*, got \(2, 6\), \(3, 2, 5\) and \(2, 2, 4, 5\)"),
        ({"v_own": torch.randn(2, 2, 5)}, r"v_own \[B, Hkv, K, Dv\], got .* \(2, 2, 5\)"),
        ({"q": torch.randn(3, 4, 6)}, r"v_own must have shape \[3, 2, 4, 5\]"),
        ({"k_own": torch.randn(2, 2, 3, 6)}, r"k_own must have shape \[2, 2, 4, 6\] .*, got \[2, 2, 3, 6\]"),
        ({"q": torch.randn(2, 4, 7)}, r"k_own must have shape \[2, 2, 4, 7\]"),
        ({"k_root": torch.randn(2, 2, 6)}, r"k_root must have shape \[3, 2, 6\] .*, got \[2, 2, 6\]"),
        ({"v_root": torch.randn(3, 1, 5)}, r"v_root must have shape \[3, 2, 5\] .*, got \[3, 1, 5\]"),
        ({"k_own": torch.randn(2, 2, 0, 6), "v_own": torch.randn(2, 2, 0, 5)}, "v_own must have at least one place"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"softcap": -1.0}, "softcap must be a finite number > 0, got -1.0"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
    ],
)
def test_decode(change, message):
    assert decode_attention(**decode_arguments()).shape == (2, 4, 5)
    with pytest.raises(ValueError, match=message):
        decode_attention(**decode_arguments(**change))


def paged_arguments(**change):
    """The same, a sequence's places in two of three pages of two each."""
    pools = {"k_own": torch.randn(3, 2, 2, 6), "v_own": torch.randn(3, 2, 2, 5)}
    return decode_arguments(**pools | {"pages": torch.tensor([[2, 0], [2, 1]])} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": 3}, "pages must be a tensor, got int"),
        ({"pages": torch.zeros(2, 2)}, "pages must have one of the dtypes int64, int32, got torch.float32"),
        ({"pages": torch.zeros(2, 2, dtype=torch.int32, device="meta")}, "pages must be on the device of q"),
        ({"pages": torch.tensor([2, 0])}, r"pages must be \[2, N\], at least one for each row of q, got \[2\]"),
        ({"pages": torch.tensor([[2, 0]])}, r"pages must be \[2, N\], .* got \[1, 2\]"),
        ({"pages": torch.zeros(2, 0, dtype=torch.int64)}, r"pages must be \[2, N\], .* got \[2, 0\]"),
        ({"pages": torch.tensor([[2, 0], [3, 1]])}, r"pages must be from 0 to 2 \(of the cache\), got values from 0 to 3"),
        ({"pages": torch.tensor([[2, 0], [-1, 1]])}, "pages must be from 0 to 2 .*, got values from -1 to 2"),
        ({"lengths": torch.tensor([1, 5])}, r"lengths must be from 1 to 4 \(places of the cache\), got values from 1 to 5"),
        ({"k_own": torch.randn(4, 2, 2, 6)}, r"k_own must have shape \[3, 2, 2, 6\]"),
        ({"k_own": torch.randn(3, 2, 3, 6), "v_own": torch.randn(3, 2, 3, 5)}, "a page must have a power of two of places"),
    ],
)
def test_decode_with_pages(change, message):
    assert decode_attention(**paged_arguments()).shape == (2, 4, 5)
    with pytest.raises(ValueError, match=message):
        decode_attention(**paged_arguments(**change))


def test_decode_with_nothing_or_little():
    assert decode_attention(**decode_arguments(lengths=torch.tensor([1, 4], dtype=torch.int32))).shape == (2, 4, 5)
    nobody = {name: torch.zeros(0, *x.shape[1:]) for name, x in decode_arguments().items() if name in ("q", "k_own", "v_own")}
    none = decode_attention(**decode_arguments(**nobody, lengths=torch.zeros(0, dtype=torch.int64)))
    assert none.shape == (0, 4, 5)
    no_values = decode_arguments(v_root=torch.zeros(3, 2, 0), v_own=torch.zeros(2, 2, 4, 0))
    assert decode_attention(**no_values).shape == (2, 4, 0)


def test_decode_looks_at_no_value_on_a_gpu_and_while_compiling(monkeypatch):
    """Meta tensors have none to look at; a graph would break there."""
    arguments = {name: x.to("meta") for name, x in decode_arguments().items()}
    _attention_torch._check_decode(**arguments)
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, backend="eager", fullgraph=True)
    for arguments in (decode_arguments(), paged_arguments()):
        assert torch.equal(compiled(**arguments), decode_attention(**arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 0, 4), (5, 2, 0)])
def test_no_heads_or_heads_of_no_size(backend, shape):
    q, k, v = torch.zeros(shape), torch.zeros(5, 2, shape[2]), torch.zeros(5, 2, 4)
    message = rf"attention: q needs at least one head of a size of at least 1, got {shape[1]} of size {shape[2]}"
    for options in ({}, {"scale": 1.0}):
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, **tree(), backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("root", [0, 2])
def test_values_of_no_size(backend, root):
    q, k, v = (torch.randn(5, 2, n, requires_grad=True) for n in (4, 4, 0))
    out = attention(q, k, v, **tree(), root=root, backend=backend)
    assert out.shape == (5, 2, 0)
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q)) and torch.equal(k.grad, torch.zeros_like(k)) and v.grad.shape == (5, 2, 0)


@pytest.mark.parametrize("wrong", [None, (torch.tensor([0, 5]),) * 3])
def test_what_is_no_layout(wrong):
    with pytest.raises(ValueError, match=f"layout must be a TreeLayout, got {type(wrong).__name__}"):
        tree_attention(*torch.zeros(3, 5, 2, 4), wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_q": [0, 3, 5]}, "cu_q must be a tensor, got list"),
        ({"kv_index": None}, "kv_index must be a tensor, got NoneType"),
        ({"kv_index": torch.arange(7, dtype=torch.int32)}, "kv_index must have one of the dtypes int64"),
        ({"cu_k": torch.tensor(7)}, r"cu_k must have shape \[S \+ 1\], the same for cu_q and cu_k, got \[\]"),
        ({"cu_k": torch.tensor([0, 3, 7], device="meta")}, "cu_k must be on the device of kv_index"),
        ({"root": -1}, "root must be an integer >= 0, got -1"),
        ({"max_q": "a"}, "max_q must be an integer >= 0, got 'a'"),
        ({"max_k": 2.5}, "max_k must be an integer >= 0, got 2.5"),
    ],
)
def test_no_layout_is_made_of(change, message):
    with pytest.raises(ValueError, match=message):
        TreeLayout(**tree(**change))
    with pytest.raises(ValueError, match=message):
        attention(*torch.zeros(3, 5, 2, 4), **tree(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_k": torch.tensor([0, 3, 6])}, r"cu_k must go up from 0 to 7, got \[0, 3, 6\]"),
        ({"cu_k": torch.tensor([0, 2, 7])}, "cu_k: a segment has a root path shorter than its queries, 2 < 3"),
        ({"kv_index": torch.tensor([0, 1, 2, 0, 9, 3, 4])}, r"kv_index must be in \[0, 5\) .*, got values from 0 to 9"),
        ({"kv_index": torch.tensor([2, 1, 0, 0, 1, 3, 4])}, "the path of segment 0 must end with its own rows 0 to 2"),
        ({"kv_index": torch.tensor([0, 1, 2, 0, 1, 3, 3])}, "the path of segment 1 must end with its own rows 3 to 4"),
        ({"root": 3}, "root: not every root path begins with the rows 0 to 2"),
        ({"max_q": 2}, "max_q must be at least 3, the most of a segment, got 2"),
        ({"max_k": 3}, "max_k must be at least 4, the most of a segment, got 3"),
    ],
)
def test_trees_that_are_none(change, message):
    tensors = torch.zeros(3, 5, 2, 4)
    layout = TreeLayout(**tree(**change))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            tree_attention(*tensors, layout)
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **tree(**change))


def test_own_rows_after_a_past():
    """Row i of the queries is row past + i of the keys."""
    past = {"root": 2, "past": 2, "kv_index": torch.tensor([0, 1, 2, 0, 1, 3, 4]), "cu_q": torch.tensor([0, 1, 3])}
    q, k, v = torch.randn(3, 2, 4), torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]).bool()
    torch.testing.assert_close(tree_attention(q, k, v, TreeLayout(**tree(**past))), dense(q, k, v, seen))
    past["kv_index"] = torch.tensor([0, 1, 0, 0, 1, 3, 4])
    with pytest.raises(ValueError, match="the path of segment 0 must end with its own rows 2 to 2"):
        tree_attention(q, k, v, TreeLayout(**tree(**past)))


def test_values_are_looked_at_once_a_layout(monkeypatch):
    looks = []
    check = _attention_layout.check_values
    monkeypatch.setitem(tree_attention.__globals__, "check_values", lambda *a: looks.append(check(*a)))
    layout = TreeLayout(**tree())
    for _ in range(3):
        tree_attention(*torch.zeros(3, 5, 2, 4), layout)
    assert len(looks) == 1


@pytest.mark.parametrize("value", ["", "auto", "torch"])
def test_the_environment_variable_set_to_nothing(monkeypatch, value):
    monkeypatch.setenv("FASTPPO_ATTENTION", value)
    assert attention(*torch.zeros(3, 5, 2, 4), **tree()).shape == (5, 2, 4)
    with pytest.raises(ValueError, match="backend must be one of .*, got ''"):
        attention(*torch.zeros(3, 5, 2, 4), **tree(), backend="")
