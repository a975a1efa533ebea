"""The library back ends of attention with stand-ins for the libraries: what they are handed, and what becomes of it."""

import inspect
import random
from importlib import import_module

import attention_libraries as libraries
import pytest
import torch
from test_attention import dense, inputs, make_layout, seen
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo_kernels import _attention_varlen as varlen
from fastppo_kernels.attention import TreeLayout, attention, attention_backends, chosen_attention_backend, tree_attention

module = import_module("fastppo_kernels.attention")  # the package's attribute of this name is the function
NAMES = ("flash-attn", "varlen", "xformers")


@pytest.fixture(params=NAMES)
def name(request, monkeypatch):
    """A library back end whose library is a stand-in."""
    libraries.install(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=[*NAMES, "sdpa"])
def any_name(request, monkeypatch):
    if request.param != "sdpa":
        libraries.install(monkeypatch, request.param)
    return request.param


def check(layout, tensors, backend, tolerance=1e-5, **options):
    """Forward and gradients equal a dense reference's in float64."""
    wide = [x.detach().double().requires_grad_() for x in tensors]
    wanted = dense(*wide, seen(layout, options.get("window")), options.get("scale"), options.get("softcap"))
    got = tree_attention(*tensors, layout, backend=backend, **options)
    assert got.dtype == tensors[0].dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(got, tensors, weight.to(got.dtype)), torch.autograd.grad(wanted, wide, weight)
    for label, ours, theirs in zip("qkv", *grads, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=5 * tolerance, atol=5 * tolerance, msg=lambda m, n=label: f"d{n}: {m}"
        )  # fmt: skip


@pytest.mark.parametrize(("root", "past"), [(0, 0), (1, 0), (5, 0), (3, 3), (5, 3), (0, 2)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_forward_and_gradients(any_name, root, past, heads):
    for seed in range(2):
        rng = random.Random(seed)
        layout = make_layout(rng, root=root, segments=rng.randint(1, 9), longest=rng.choice([1, 3, 8]), past=past)
        check(layout, inputs(layout, *heads, dtype=torch.float32, seed=seed), any_name)


@pytest.mark.parametrize("dims", [(6, 6), (16, 16), (8, 3), (5, 12)])
def test_head_sizes_that_are_no_multiple_of_8(any_name, dims):
    layout = make_layout(random.Random(2), root=3, segments=6, longest=4)
    check(layout, inputs(layout, dim=dims[0], v_dim=dims[1], dtype=torch.float32), any_name, scale=0.7)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_windows(any_name, window):
    if any_name == "xformers":
        pytest.skip("has none: see test_what_a_library_cannot_do")
    for seed in range(3):
        layout = make_layout(random.Random(seed), root=4, segments=7, longest=4, past=seed)
        check(layout, inputs(layout, dtype=torch.float32, seed=seed), any_name, window=window)


def test_softcap(monkeypatch):
    libraries.install(monkeypatch, "flash-attn")
    layout = make_layout(random.Random(3), root=4, segments=7, longest=4)
    check(layout, inputs(layout, dtype=torch.float32), "flash-attn", softcap=1.5, window=3)


def test_one_query_a_segment(any_name):
    """max_q of 1 would make the kernels regroup heads, for which no segment may be without a query: they are told 2."""
    layout = make_layout(random.Random(5), root=0, segments=9, longest=1)
    assert layout.bounds[0] == 1
    check(layout, inputs(layout, 4, 2, dim=8, dtype=torch.float32), any_name)


@pytest.mark.parametrize("root", [0, 6])
def test_one_segment_only(any_name, root):
    layout = make_layout(random.Random(0), root=6, segments=0, longest=1)
    layout = TreeLayout(layout.cu_q, layout.cu_k, layout.kv_index, root)
    check(layout, inputs(layout, dtype=torch.float32), any_name)


def test_an_empty_tree(any_name):
    layout = TreeLayout(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int64))
    for past in (0, 2):
        layout = TreeLayout(layout.cu_q, layout.cu_k, layout.kv_index, past, past)
        q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (0, past, past))
        out = tree_attention(q, k, v, layout, backend=any_name)
        assert out.shape == (0, 2, 8)
        out.sum().backward()
        assert (k.grad is None or torch.equal(k.grad, torch.zeros_like(k))) and libraries.calls == []


def test_not_contiguous(any_name):
    """As transformers hands them over: [1, heads, tokens, dim], transposed; and every other row."""
    layout = make_layout(random.Random(4), root=3, segments=6, longest=4)
    tensors = inputs(layout, dim=8, dtype=torch.float32)
    strange = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in tensors]
    assert not strange[0].is_contiguous()
    check(layout, strange, any_name)
    doubled = [x.detach().repeat_interleave(2, 2)[..., ::2].requires_grad_() for x in tensors]
    check(layout, doubled, any_name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(any_name, dtype):
    """Gradients of a prefix are sums over many segments: rounded once each, and added up in float32."""
    layout = make_layout(random.Random(6), root=20, segments=30, longest=12)
    tensors = inputs(layout, dim=16, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = dense(*wide, seen(layout))
    weight = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_all = [exact, *torch.autograd.grad(exact, wide, weight.double())]

    def errors(backend):
        out = tree_attention(*tensors, layout, backend=backend)
        ours = [out, *torch.autograd.grad(out, tensors, weight)]
        assert all(x.dtype == dtype for x in ours)
        pairs = [(a.detach().double(), b.detach()) for a, b in zip(ours, exact_all, strict=True)]
        return [float((a - b).norm() / b.norm()) for a, b in pairs]

    for mine, torchs in zip(errors(any_name), errors("torch"), strict=True):
        assert mine <= 1.2 * torchs + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("dims", [(16, 16), (6, 5)])
@pytest.mark.parametrize(("lengths", "past"), [((3, 5, 1), 0), ((4,), 3), ((3, 5, 1), 2)])
def test_nothing_is_gathered_where_no_prefix_is_shared(name, lengths, past, dims, monkeypatch):
    """Sequences by themselves, or one after a prefix of before; several after one share that."""
    paths, rows, start = [], [], past
    for length in lengths:
        paths.append([*range(past), *range(start, start + length)])
        start += length
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths, [len(path) for path in paths]))
    layout = TreeLayout(cu_q, cu_k, torch.tensor(sum(paths, [])), past, past)
    real = varlen.sum_rows
    monkeypatch.setattr(varlen, "sum_rows", lambda *args: rows.append(1) or real(*args))
    tensors = inputs(layout, 4, 2, dim=dims[0], v_dim=dims[1], dtype=torch.float32)
    check(layout, tensors, name)
    doubled = [x.detach().repeat_interleave(2, 2)[..., ::2].requires_grad_() for x in tensors]
    check(layout, doubled, name)
    assert len(rows) == (4 if past and len(lengths) > 1 else 0)


def kept_bytes(run):
    """What autograd keeps for backward of what it was not given."""
    sizes: dict[int, int] = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(sizes.values()), out


def test_gathered_keys_and_values_are_not_kept(any_name):
    """A prefix of 60 rows under 50 segments is gathered 50 times: kept are q, k, v, the output and a number a row and head."""
    rng = random.Random(0)
    layout = make_layout(rng, root=60, segments=50, longest=3)
    tensors = inputs(layout, dim=16, dtype=torch.float32)
    expanded = layout.kv_index.shape[0] * 2 * 16 * 4
    own = sum(x.untyped_storage().nbytes() for x in tensors)
    index_bytes = 8 * (2 * layout.kv_index.shape[0] + 8 * layout.n_queries)
    # xformers keeps its denominators padded to 32 queries a segment.
    lse = 4 * 4 * (layout.cu_q.shape[0] * 64 if any_name == "xformers" else layout.n_queries)
    size, out = kept_bytes(lambda: tree_attention(*tensors, layout, backend=any_name))
    assert 2 * expanded > 5 * own
    assert size <= own + tensors[0].untyped_storage().nbytes() + lse + index_bytes
    libraries.calls.clear()
    out.sum().backward()
    assert any_name == "sdpa" or libraries.calls == ["backward"]  # no second forward


def test_the_same_gradients_in_every_run_and_torchs_switch_as_before(any_name):
    layout = make_layout(random.Random(8), root=9, segments=20, longest=5)
    tensors = inputs(layout, dtype=torch.float32)
    runs = []
    for _ in range(3):
        out = tree_attention(*tensors, layout, backend=any_name)
        runs.append(torch.autograd.grad(out.square().sum(), tensors))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("enabled", "warn_only"), [(False, False), (True, True), (True, False)])
def test_the_switch_for_determinism_leaves_inductor_alone(enabled, warn_only):
    from torch._inductor import config

    torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)
    before = config.save_config_portable()
    try:
        with pytest.raises(ZeroDivisionError), varlen.deterministic():
            assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
            assert config.save_config_portable() == before
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled() == enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)


def test_the_plain_call_is_that_with_a_layout(any_name):
    layout = make_layout(random.Random(9), root=4, segments=8, longest=5, past=2)
    tensors = inputs(layout, dim=8, dtype=torch.float32)
    tree = layout.cu_q, layout.cu_k, layout.kv_index
    wanted = tree_attention(*tensors, layout, backend=any_name)
    bounds = {"max_q": layout.bounds[0], "max_k": layout.bounds[1]}
    expected = torch.autograd.grad(wanted.sum(), tensors)
    for options in ({}, bounds, {"max_q": 50, "max_k": 99}):
        got = attention(*tensors, *tree, root=4, past=2, backend=any_name, **options)
        assert torch.equal(got, wanted)
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(got.sum(), tensors), expected, strict=True))


def test_bounds_are_those_of_the_tree():
    layout = TreeLayout(torch.tensor([0, 2, 2, 7]), torch.tensor([0, 2, 6, 12]), torch.arange(12))
    assert layout.bounds == (5, 6)
    assert TreeLayout(layout.cu_q, layout.cu_k, layout.kv_index, max_q=8, max_k=9).bounds == (8, 9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_for_xformers_are_looked_up_once_a_tree(monkeypatch, dtype):
    libraries.install(monkeypatch, "xformers")
    monkeypatch.setattr(libraries.CausalFromBottomRight, "made", 0)
    trees = [make_layout(random.Random(i), root=2, segments=4, longest=3) for i in range(2)]
    trees = [TreeLayout(tree.cu_q.to(dtype), tree.cu_k.to(dtype), tree.kv_index, tree.root, tree.past) for tree in trees]
    for layout in trees:
        tensors = inputs(layout, dtype=torch.float32)
        for _ in range(3):
            tree_attention(*tensors, layout, backend="xformers").sum().backward()
    assert libraries.CausalFromBottomRight.made == 2


@pytest.mark.parametrize("backend", ["flash-attn", "torch"])
@pytest.mark.parametrize("plain", [False, True])
def test_compiles_without_a_break_and_once_for_all_trees(monkeypatch, backend, plain):
    if backend != "torch":
        libraries.install(monkeypatch, backend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(q, k, v, layout):
        if plain:
            tree = layout.cu_q, layout.cu_k, layout.kv_index
            return attention(q * 2, k, v, *tree, max_q=layout.max_q, max_k=layout.max_k, window=5, backend=backend) + 1
        return tree_attention(q * 2, k, v, layout, window=5, backend=backend) + 1

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for seed in range(4):
        tree = make_layout(random.Random(seed), root=3, segments=5 + seed, longest=4)
        layout = TreeLayout(tree.cu_q, tree.cu_k, tree.kv_index, 3, max_q=9 + seed, max_k=40 + seed)
        tensors = inputs(layout, dim=8, dtype=torch.float32)
        got = compiled(*tensors, layout)
        grads = torch.autograd.grad(got.square().sum(), tensors)
        wanted = run(*tensors, layout)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(grads, torch.autograd.grad(wanted.square().sum(), tensors), strict=True):
            torch.testing.assert_close(a, b)
        assert counter.frame_count <= 2  # the second tree shows that max_q and max_k change


def test_sdpa_breaks_the_graph_and_is_right():
    torch._dynamo.reset()
    layout = make_layout(random.Random(1), root=3, segments=5, longest=4)
    tensors = inputs(layout, dim=8, dtype=torch.float32)
    compiled = torch.compile(lambda q: tree_attention(q * 2, *tensors[1:], layout, backend="sdpa"), backend="aot_eager")
    wanted = tree_attention(tensors[0] * 2, *tensors[1:], layout, backend="torch")
    torch.testing.assert_close(compiled(tensors[0]), wanted)


def test_looking_for_libraries_does_not_break_the_graph(monkeypatch):
    """Also where nothing was looked for before: imports cannot be traced."""
    monkeypatch.setattr(module, "_found", {})
    monkeypatch.setattr(varlen.Library, "device_types", ("cpu",))
    torch._dynamo.reset()

    def run(q):
        return q + len(module._refusal("flash-attn", q, q, None, None))

    q = torch.zeros(3, 2, 8, dtype=torch.float16)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(q), run(q))


def test_operators_are_what_they_say(name):
    layout = make_layout(random.Random(1), root=3, segments=5, longest=4)
    q, k, v = inputs(layout, dim=8, dtype=torch.float32)
    where = layout.occurrences(k.shape[0])
    tree = layout.cu_q, layout.cu_k, layout.kv_index, *where
    for bounds in (layout.bounds, (50, 99)):
        arguments = (q, k, v, *tree, *bounds, 0.3, None, None, name)
        torch.library.opcheck(varlen.varlen_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_a_library_cannot_do(monkeypatch):
    layout = make_layout(random.Random(1), root=3, segments=5, longest=4)
    for each in NAMES:
        libraries.install(monkeypatch, each)
    monkeypatch.setattr(module, "_missing", lambda name: "")
    q, k, v = inputs(layout, dtype=torch.float32)
    for backend, options, message in [
        ("varlen", {"softcap": 2.0}, "backend 'varlen': has no kernel for a softcap"),
        ("xformers", {"softcap": 2.0}, "backend 'xformers': has no kernel for a softcap"),
        ("xformers", {"window": 2}, "backend 'xformers': has no kernel for a window"),
        ("sdpa", {"softcap": 2.0}, "backend 'sdpa': has no softcap"),
    ]:
        with pytest.raises(ValueError, match=message):
            tree_attention(q, k, v, layout, backend=backend, **options)
    wide = [torch.zeros(*x.shape[:2], 264) for x in (q, k, v)]
    with pytest.raises(ValueError, match="no kernel for a head size over 256, got 264"):
        tree_attention(*wide, layout, backend="flash-attn")
    with pytest.raises(ValueError, match="no kernel for float64"):
        tree_attention(*(x.double() for x in (q, k, v)), layout, backend="flash-attn")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="backend 'flash-attn': needs cuda tensors, got cpu"):
        tree_attention(q, k, v, layout, backend="flash-attn")


def test_the_choice(monkeypatch):
    """On CUDA the first that can; on the CPU torch's kernel for it, or plain torch."""
    monkeypatch.setattr(module, "_missing", lambda name: "")
    choose = lambda like, **options: chosen_attention_backend(*like, **options)  # noqa: E731
    cuda = torch.device("cuda")
    half, single, double = ((cuda, dtype, 64) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    here = torch.device("cpu"), torch.float32, 8
    assert choose(here) == "cpu"
    assert choose(here, window=3) == choose(here, softcap=3.0) == "torch"
    assert choose(half) == "flash-attn" and choose(single) == "xformers"
    assert choose(single, window=3) == "sdpa" and choose(single, softcap=3.0) == "torch"
    assert choose((cuda, torch.float16, 512)) == "xformers" and choose(double) == "torch"
    monkeypatch.setattr(module, "_missing", lambda name: "missing" if name == "flash-attn" else "")
    assert choose(half) == "varlen" and choose(half, window=3) == "varlen" and choose(half, softcap=3.0) == "torch"
    monkeypatch.setattr(module, "_missing", lambda name: "missing")
    assert choose(half) == "sdpa"


def test_the_environment_variable(monkeypatch):
    layout = make_layout(random.Random(1), root=3, segments=5, longest=4)
    tensors = inputs(layout, dtype=torch.float32)
    monkeypatch.setenv("FASTPPO_ATTENTION", "varlen")
    with pytest.raises(ValueError, match="FASTPPO_ATTENTION 'varlen': needs cuda tensors, got cpu"):
        tree_attention(*tensors, layout)
    tree_attention(*tensors, layout, backend="torch")
    monkeypatch.setenv("FASTPPO_ATTENTION", "fast")
    with pytest.raises(ValueError, match="FASTPPO_ATTENTION must be one of auto, flash-attn, varlen, .*, got 'fast'"):
        tree_attention(*tensors, layout)


def test_what_is_usable_here(monkeypatch):
    monkeypatch.setattr(module, "_found", {})
    found = attention_backends()
    assert list(found) == ["flash-attn", "varlen", "xformers", "sdpa", "cpu", "torch"]
    assert found["torch"] == found["cpu"] == found["sdpa"] == "usable"
    if not torch.cuda.is_available():
        assert found["varlen"] == "needs a CUDA GPU"
    monkeypatch.setattr(module, "_found", {})
    assert attention_backends("cpu", "sdpa") == {"cpu": "usable", "sdpa": "usable"}
    assert set(module._found) == {"cpu", "sdpa"}  # no other was looked for
    with pytest.raises(ValueError, match="a back end must be one of flash-attn, .*, torch, got 'auto'"):
        attention_backends("auto")


def test_torchs_functions_are_those_that_are_called():
    """The operators under `torch.nn.attention.varlen`, and the arguments that it itself hands them."""
    assert not isinstance(varlen._torch_flash(), str), varlen._torch_flash()
    for function, stand_in in zip(varlen._torch_flash(), (libraries.torch_forward, libraries.torch_backward), strict=True):
        arguments = {argument.name: argument.kwarg_only for argument in function.default._schema.arguments}
        ours = inspect.signature(stand_in).parameters.values()
        positional = [p.name for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert positional == [name for name, kwarg_only in arguments.items() if not kwarg_only]
        assert {p.name for p in ours if p.kind == p.KEYWORD_ONLY} <= arguments.keys()


@pytest.mark.parametrize(
    ("library", "theirs", "ours"),
    [
        ("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", libraries.flash_forward),
        ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward", libraries.flash_backward),
        ("xformers.ops", "memory_efficient_attention_forward_requires_grad", libraries.xformers_forward),
        ("xformers.ops", "memory_efficient_attention_backward", libraries.xformers_backward),
    ],
)
def test_the_installed_library_has_the_arguments_of_its_stand_in(library, theirs, ours):
    function = getattr(pytest.importorskip(library, reason="not installed: it needs a GPU"), theirs)
    real = list(inspect.signature(getattr(function, "_init_fn", function)).parameters)
    known = list(inspect.signature(ours).parameters)
    shared = min(len(real), len(known))  # releases add arguments at the end
    assert real[:shared] == known[:shared] and shared >= 8


def test_an_unknown_version_is_reported(monkeypatch):
    """Not called with arguments that it may understand otherwise."""
    from types import SimpleNamespace

    def other(q, k, v, lengths):
        raise AssertionError

    fake = SimpleNamespace(_flash_attn_varlen_forward=other, _flash_attn_varlen_backward=other)
    monkeypatch.setattr(varlen, "import_module", lambda name: fake)
    varlen._flash_attn.cache_clear()
    assert "this flash-attn is not known here (no " in varlen._flash_attn()
    varlen._flash_attn.cache_clear()
    monkeypatch.setattr(varlen, "import_module", lambda name: SimpleNamespace())
    assert "has no attribute '_flash_attn_varlen_forward'" in varlen._flash_attn()
    varlen._flash_attn.cache_clear()
