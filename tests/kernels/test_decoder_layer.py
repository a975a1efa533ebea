"""A decoder layer as one function: the same numbers as the operations one after the other, with less kept."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_good
from helpers import DEVICE, TRITON_MARKS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.gpu_checks.decoder import attend, composed
from fastppo_kernels import DecoderWeights, LoRAProjection, LoRAWeightBuffer, decoder_layer, lora_linear_group
from fastppo_kernels import _lora_fold as lora_fold

NAMES = ("q", "k", "v", "o", "gate", "up", "down")
EPS = 1e-5


class Layer(NamedTuple):
    x: Tensor
    cos: Tensor
    sin: Tensor
    weights: DecoderWeights


def make(
    tokens: int = 20, hidden: int = 32, inner: int = 80, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, rank: int = 4, *,
    adapted: Sequence[str] = NAMES, bias: bool = False, qk_norm: bool = False, dtype: torch.dtype = torch.float64,
    adapters: torch.dtype | None = None, seed: int = 0,
) -> Layer:  # fmt: skip
    """x and all adapters require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

    def projection(name: str, outputs: int, inputs: int) -> LoRAProjection:
        weight = randn(outputs, inputs, scale=inputs**-0.5)
        added = randn(outputs) if bias and name != "up" else None  # a group of which some have a bias
        if name not in adapted:
            return LoRAProjection(weight, bias=added)
        pair = randn(rank, inputs, scale=inputs**-0.5), randn(outputs, rank, scale=rank**-0.5)
        lora_A, lora_B = (x.to(adapters or dtype).requires_grad_() for x in pair)
        return LoRAProjection(weight, lora_A, lora_B, 0.5 + NAMES.index(name) / 4, added)

    queries, keys = heads * head_dim, kv_heads * head_dim
    sizes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (inner, hidden), (inner, hidden)]
    projections = [projection(name, *size) for name, size in zip(NAMES, [*sizes, (hidden, inner)], strict=True)]
    norms = [1 + randn(size, scale=0.2) for size in (hidden, hidden, *([head_dim] * 2 if qk_norm else []))]
    weights = DecoderWeights(*norms[:2], EPS, *projections, head_dim, *norms[2:])
    angle = torch.arange(tokens)[:, None] / 100 ** (torch.arange(0, head_dim, 2) / head_dim)
    # Two halves that differ, as nothing promises that they do not.
    cos, sin = (torch.cat((f(angle), f(angle * 1.5)), 1).to(DEVICE, dtype) for f in (torch.cos, torch.sin))
    return Layer(randn(tokens, hidden).requires_grad_(), cos, sin, weights)


def converted(layer: Layer, dtype: torch.dtype) -> Layer:
    """With the same numbers."""

    def convert(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().to(dtype).requires_grad_(x.requires_grad)
        return LoRAProjection(*map(convert, x)) if isinstance(x, LoRAProjection) else x

    return Layer(*map(convert, layer[:3]), DecoderWeights(*map(convert, layer.weights)))


def leaves(layer: Layer) -> list[Tensor]:
    adapters = (x for group in layer.weights.groups for each in group for x in (each.lora_A, each.lora_B))
    return [x for x in (layer.x, *adapters) if x is not None and x.requires_grad]


def bordered(layer: Layer) -> Layer:
    """With its weights in bordered buffers."""
    found, buffers = {}, []
    for names in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
        buffers.append(LoRAWeightBuffer([getattr(layer.weights, name) for name in names], masked=False))
        for i, name in enumerate(names):
            found[name] = getattr(layer.weights, name)._replace(weight=buffers[-1].weight_view(i))
    return layer._replace(weights=layer.weights._replace(**found, buffers=tuple(buffers)))


def through_buffers(*layer: Any, **how: Any) -> Tensor:
    """`decoder_layer` of the layer in buffers."""
    return decoder_layer(*bordered(Layer(*layer[:-1])), layer[-1], **how)


def slope_of(z: Tensor) -> Tensor:
    return torch.arange(z.numel(), device=z.device).mul(1.7).cos().view(z.shape).to(z.dtype)


def run(function: Callable[..., Tensor], layer: Layer, **how: Any) -> list[Tensor]:
    """The result, and the gradients of x and the adapters."""
    z = function(*layer, attend, **how)
    return [z.detach(), *torch.autograd.grad(z, leaves(layer), slope_of(z))]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], share: float) -> None:
    """Up to this share of the largest entry."""
    for value, truth in zip(ours, theirs, strict=True):
        assert value.dtype == truth.dtype and value.shape == truth.shape
        assert not truth.numel() or (value - truth).abs().max() <= share * truth.abs().max()


def assert_right(layer: Layer, function: Callable[..., Tensor] = decoder_layer, **how: Any) -> None:
    """Held to the operations in its own dtype, in half precision to those in float64."""
    dtype = layer.x.dtype
    ours, theirs = run(function, layer, **how), run(composed, layer, **how)
    if dtype in (torch.bfloat16, torch.float16):
        exact = run(composed, converted(layer, torch.float64), **how)
        # Of so few sums chance has these better or those: what is rounded at other places, more often the largest error.
        assert_as_good(ours, theirs, exact, roundings=4 if function is decoder_layer else 8)
    else:
        assert_same(ours, theirs, 1e-12 if dtype == torch.float64 else 1e-5)


def error_of(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Squared relative errors of all results."""
    pairs = [(x, truth) for x, truth in zip(results, exact, strict=True) if truth.any()]
    return sum(float((x.double() - truth).norm() / truth.norm()) ** 2 for x, truth in pairs)


SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "biases": {"bias": True},
    "norms of queries and keys": {"qk_norm": True},
    "norms and biases, one key head": {"qk_norm": True, "bias": True, "kv_heads": 1},
    "a key head a query head": {"kv_heads": 4},
    "heads wider than hidden": {"head_dim": 16},
    "no adapter": {"adapted": ()},
    "queries and values": {"adapted": ("q", "v"), "qk_norm": True},
    "one of each group": {"adapted": ("k", "up")},
    "behind the attention": {"adapted": ("o", "down")},
    "rank 1": {"rank": 1},
    "rank 8": {"rank": 8},
    "rank 16": {"rank": 16},
    "rank 64": {"rank": 64},
    "rank 128": {"rank": 128},
    "one token": {"tokens": 1},
}
ROWS: dict[str, dict[str, Any]] = {
    "all": {},
    "rows": {"rows_R": [19, 3, 7]},
    "padding": {"tokens": 13},
    "rows, padding": {"tokens": 13, "rows_R": [12, 2, 5, 2, 0, 0, 0, 0]},
    "no rows": {"rows_R": []},
    "only padding": {"tokens": 0},
}


def rows_of(how: dict[str, Any]) -> dict[str, Any]:
    return how | {"rows_R": torch.tensor(how["rows_R"], dtype=torch.int64, device=DEVICE)} if "rows_R" in how else how


WAYS = pytest.mark.parametrize("way", [decoder_layer, through_buffers], ids=["plain", "buffers"])


@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_of_the_operations(shape, dtype, way):
    assert_right(make(**SHAPES[shape], dtype=dtype), way)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_that_of_the_operations(dtype):
    """Over many layers, where chance evens out. Through buffers adapters are added up with the base, and rounded with it."""
    errors = [0.0, 0.0, 0.0]
    for seed in range(20):
        layer = make(60, qk_norm=seed % 2 == 0, dtype=dtype, seed=seed)
        exact = run(composed, converted(layer, torch.float64))
        for i, function in enumerate((decoder_layer, composed, through_buffers)):
            errors[i] += error_of(run(function, layer), exact)
    assert errors[0] <= 1.02 * errors[1] < 1
    assert errors[2] <= 0.85 * errors[1]


@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ROWS)
def test_some_rows_and_padding(how, dtype, way):
    for qk_norm in (True, False):
        assert_right(make(bias=True, qk_norm=qk_norm, dtype=dtype), way, **rows_of(ROWS[how]))


@pytest.fixture
def folded(monkeypatch):
    """How many groups are multiplied as one weight, in forward and in backward."""
    seen, both = [], (lora_fold.forward, lora_fold.backward)
    for name, function in zip(("forward", "backward"), both, strict=True):
        monkeypatch.setattr(lora_fold, name, lambda *args, name=name, f=function: seen.append(name) or f(*args))
    return seen


@pytest.mark.skipif(DEVICE != "cpu", reason="only a CPU folds")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens, how", [(192, {}), (192, {"tokens": 150}), (100, {"tokens": 99})])
@pytest.mark.parametrize(
    "shape", ["as it is", "norms and biases, one key head", "biases", "no adapter", "one of each group", "rank 1", "rank 64"]
)
def test_folded(shape, tokens, how, dtype, folded):
    layer = make(**{"hidden": 64, "inner": 176, "head_dim": 16, **SHAPES[shape], "tokens": tokens}, dtype=dtype)
    ours = run(decoder_layer, layer, fold=True, **how)
    assert folded == ["forward"] * 4 + ["backward"] * 4
    assert_same(ours, run(composed, layer, **how), 1e-12 if dtype == torch.float64 else 1e-5)
    assert_same(ours, run(composed, layer, fold=True, **how), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="only a CPU folds")
def test_folded_for_some_groups_alone(folded):
    """Few rows go on behind the attention: what comes after is not worth folding."""
    layer = make(192, qk_norm=True)
    how = rows_of({"rows_R": [150, 3, 3, 0], "tokens": 180})
    assert_same(run(decoder_layer, layer, fold=True, **how), run(composed, layer, **how), 1e-12)
    assert folded == ["forward", "backward"]


@pytest.mark.skipif(DEVICE != "cpu", reason="only a CPU folds")
def test_fold_is_left_where_it_is_no_less_work_or_not_exact_enough(folded):
    for layer in (make(10), make(192, dtype=torch.bfloat16), make(192, adapters=torch.float32)):
        run(decoder_layer, layer, fold=True)
    run(decoder_layer, make(192))
    assert folded == []


@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="only a CPU folds; needs triton's interpreter")
def test_the_triton_kernels_run_where_they_are_asked_for(folded, monkeypatch):
    layer = make(40, 16, 24, 2, 1, dtype=torch.float32)
    with torch.no_grad():
        expected = decoder_layer(*layer, attend, fold=True)
        assert folded == ["forward"] * 4
        monkeypatch.setenv("FASTPPO_KERNELS", "triton")
        assert_same([decoder_layer(*layer, attend, fold=True)], [expected], 1e-5)
        assert folded == ["forward"] * 4


@WAYS
@pytest.mark.parametrize("fold", [False, True])
def test_no_two_gradients_share_memory(fold, way):
    grads = run(way, make(192), fold=fold)
    assert len({x.untyped_storage().data_ptr() for x in grads}) == len(grads)


@pytest.mark.parametrize("fold", [False, True])
def test_biases_may_have_another_dtype(fold):
    layer = make(192, bias=True)
    narrow = {name: getattr(layer.weights, name) for name in NAMES}
    narrow = {name: p._replace(bias=None if p.bias is None else p.bias.float()) for name, p in narrow.items()}
    layer = layer._replace(weights=layer.weights._replace(**narrow))
    assert_same(run(decoder_layer, layer, fold=fold), run(composed, layer), 1e-12)


@WAYS
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_adapters_on_a_half_precision_base(adapters, way):
    layer = make(rank=8, bias=True, dtype=torch.bfloat16, adapters=adapters)
    ours = run(way, layer)
    assert ours[1].dtype == torch.bfloat16 and {x.dtype for x in ours[2:]} == {adapters}
    if way is decoder_layer:
        return assert_right(layer)
    errors = [0.0, 0.0]  # over some layers: of a float32 gradient's few entries the largest error is chance
    for seed in range(5):
        layer = make(60, rank=8, bias=True, dtype=torch.bfloat16, adapters=adapters, seed=seed)
        exact = run(composed, converted(layer, torch.float64))
        for i, function in enumerate((way, composed)):
            errors[i] += error_of(run(function, layer), exact)
    assert errors[0] <= 0.9 * errors[1] < 1


@WAYS
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    "trained",
    [("x",), ("A",), ("B",), ("q.A", "v.B"), ("o.A",), ("gate.B",), ("down.A", "down.B"), ("x", "up.A")],
    ids=" ".join,
)
def test_only_what_is_wanted_has_a_gradient(trained, fold, way):
    layer = make(192 if fold else 20)
    layer.x.requires_grad_("x" in trained)
    for name in NAMES:
        for kind, adapter in zip("AB", getattr(layer.weights, name)[1:3], strict=True):
            adapter.requires_grad_(kind in trained or f"{name}.{kind}" in trained)
    for how in ({}, rows_of({"rows_R": [3, 0, 3], "tokens": 17})):
        ours, theirs = run(way, layer, fold=fold, **how), run(composed, layer, **how)
        assert len(ours) == 1 + len(leaves(layer)) > 1
        assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fold", [False, True])
def test_without_a_gradient_the_result_is_the_same_to_the_bit(fold, dtype, monkeypatch):
    monkeypatch.setenv("FASTPPO_KERNELS", "torch")
    layer = make(192, bias=True, qk_norm=True, dtype=dtype)
    z = decoder_layer(*layer, attend, fold=fold)
    with torch.no_grad():
        again = decoder_layer(*layer, attend, fold=fold)
    frozen = converted(layer, dtype)
    for x in leaves(frozen):
        x.requires_grad_(False)
    third = decoder_layer(*frozen, attend, fold=fold)
    with torch.inference_mode():
        fourth = decoder_layer(*layer, attend, fold=fold)
    assert z.requires_grad and not again.requires_grad and not third.requires_grad
    assert torch.equal(z, again) and torch.equal(z, third) and torch.equal(z, fourth)


def test_the_attention_is_called_once_and_without_a_graph_where_none_is_needed():
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        calls.append(out.requires_grad)
        return out

    layer = make()
    decoder_layer(*layer, counted).sum().backward()
    with torch.no_grad():
        decoder_layer(*layer, counted)
    behind = make(adapted=("o", "up"))
    decoder_layer(behind.x.detach(), *behind[1:], counted).sum().backward()
    assert calls == [True, False, False]
    assert layer.x.grad is not None and behind.weights.o.lora_A.grad.abs().max() > 0


def test_an_attention_that_looks_at_values_alone():
    """Queries and keys have the gradient 0."""
    layer = make(kv_heads=4)
    z = decoder_layer(*layer, lambda q, k, v: v * 2)
    assert_same(
        torch.autograd.grad(z.sum(), leaves(layer)),
        torch.autograd.grad(composed(*layer, lambda q, k, v: v * 2 + 0 * q * k).sum(), leaves(layer)),
        1e-12,
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda q, k, v: q.flatten(1), r"the result of attend must have shape \[20, 4, 8\]"),
        (lambda q, k, v: q.float(), "the result of attend must have the dtype of the queries"),
        (lambda q, k, v: q.detach(), "attend must be differentiable"),
        (lambda q, k, v: None, "the result of attend must be a tensor"),
    ],
)
def test_a_wrong_attention(wrong, message):
    with pytest.raises(ValueError, match=message):
        decoder_layer(*make(), wrong)


def test_one_backward_and_not_twice_differentiable():
    layer = make()
    z = decoder_layer(*layer, attend)
    z.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="decoder_layer: what backward needs is kept for one backward only"):
        z.sum().backward()
    (grad,) = torch.autograd.grad(decoder_layer(*layer, attend).sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_an_adapter_that_was_changed_before_backward_is_not_taken_for_the_old_one():
    layer = make()
    z = decoder_layer(*layer, attend)
    with torch.no_grad():
        layer.weights.up.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="only a CPU folds; needs triton's interpreter")
def test_backward_goes_the_way_of_forward_whatever_is_asked_for_by_then(folded, monkeypatch):
    layer = make(48, 16, 24, 2, 1, dtype=torch.float32)
    z = decoder_layer(*layer, attend, fold=True)
    monkeypatch.setenv("FASTPPO_KERNELS", "triton")
    ours = [z.detach(), *torch.autograd.grad(z, leaves(layer), slope_of(z))]
    assert folded == ["forward"] * 4 + ["backward"] * 4
    monkeypatch.setenv("FASTPPO_KERNELS", "torch")
    assert_same(ours, run(composed, layer), 1e-5)


def test_grad_mode_and_autocast_change_nothing():
    for layer in (make(192, dtype=torch.float32), make(dtype=torch.bfloat16)):
        expected = run(decoder_layer, layer, fold=True)
        kind = torch.device(DEVICE).type
        with torch.autocast(kind, dtype=torch.bfloat16):
            inside = run(decoder_layer, layer, fold=True)
            z = decoder_layer(*layer, attend, fold=True)
        grads = torch.autograd.grad(z, leaves(layer), slope_of(z))
        with torch.no_grad(), torch.enable_grad():
            z = decoder_layer(*layer, attend, fold=True)
        with torch.no_grad():
            also = torch.autograd.grad(z, leaves(layer), slope_of(z))
        for results in (inside, [expected[0], *grads], [expected[0], *also]):
            assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize("fold", [False, True])
def test_x_of_any_strides_and_gradients_of_any_strides(fold):
    layer = make(192)
    wide = torch.randn(192, 70, dtype=torch.float64, device=DEVICE)
    for x in (layer.x.detach().t().contiguous().t(), wide[:, 3:35], wide[:, 2:66:2]):
        strided, packed = (layer._replace(x=y.requires_grad_()) for y in (x.detach(), x.detach().contiguous()))
        assert_same(run(decoder_layer, strided, fold=fold), run(composed, packed), 1e-12)
        z, twin = decoder_layer(*strided, attend, fold=fold), composed(*packed, attend)
        assert_same(torch.autograd.grad(z.sum(), leaves(strided)), torch.autograd.grad(twin.sum(), leaves(packed)), 1e-12)
        z, twin = decoder_layer(*strided, attend, fold=fold), composed(*packed, attend)
        slope = slope_of(z.t()).t()
        ours, theirs = torch.autograd.grad(z, leaves(strided), slope), torch.autograd.grad(twin, leaves(packed), slope)
        assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("fold", [False, True])
def test_no_tokens(fold):
    layer = make(0, bias=True, qk_norm=True)
    for how in ({}, rows_of({"rows_R": []})):
        ours = run(decoder_layer, layer, fold=fold, **how)
        assert ours[0].shape == ours[1].shape == (0, 32) and all((x == 0).all() for x in ours)


def held(call: Callable[[], Any]) -> int:
    """Bytes of tensors that the call leaves allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    events = seen.profiler.kineto_results.events()
    found = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert kept is not None
    return found


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keeps its inputs and its result."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's allocator is asked for")
@pytest.mark.parametrize("fold", [False, True])
def test_a_third_less_is_kept(fold):
    layer = make(256, 48, 128, 6, 6, dtype=torch.float32)
    ours, theirs = (held(lambda f=f: f(*layer, flash, fold=fold)) for f in (decoder_layer, composed))
    one = 256 * 48 * 4
    # The result; y, queries, keys, values, the attention; gate and up; and little besides: S, the attention's sums.
    assert ours <= (6 + 2 * 128 / 48 + 1) * one and ours <= theirs * 2 / 3
    with torch.no_grad():
        assert held(lambda: decoder_layer(*layer, flash, fold=fold)) == one


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's allocator is asked for")
def test_one_key_head_does_not_keep_its_queries_alive():
    """It lies in rows beside them where it is folded."""
    layer = make(256, 48, 128, 6, 1, dtype=torch.float32, qk_norm=True)
    # The result; y, queries twice, the attention; gate and up; a sixth each of keys, twice, and values; and little besides.
    most = (5 + 2 * 128 / 48 + 3 / 6 + 0.25) * 256 * 48 * 4

    def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash(q, k.expand(-1, 6, -1), v.expand(-1, 6, -1))

    assert held(lambda: decoder_layer(*layer, wide, fold=True)) <= most


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's allocator is asked for")
def test_nothing_is_kept_for_an_attention_that_no_gradient_goes_through():
    layer = make(256, 48, 128, 6, 6, dtype=torch.float32, adapted=("o", "down"))
    # The result; y, the attention; gate and up; S.
    assert held(lambda: decoder_layer(layer.x.detach(), *layer[1:], flash)) <= (3 + 2 * 128 / 48 + 0.5) * 256 * 48 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, how", [({}, {}), ({"qk_norm": True, "bias": True}, {"tokens": 9, "rows_R": [8, 0, 3, 0]})])
class TestTriton:
    pytestmark = TRITON_MARKS

    def test_the_numbers_of_the_triton_kernels_are_as_good(self, shape, how, dtype, monkeypatch):
        from fastppo_kernels import _triton_norm, _triton_swiglu

        seen = []
        for module in (_triton_norm, _triton_swiglu):
            launch = module.backward
            monkeypatch.setattr(module, "backward", lambda *args, f=launch, m=module: seen.append(m) or f(*args))
        layer, how = make(12, rank=8, dtype=dtype, **shape), rows_of(how)
        monkeypatch.setenv("FASTPPO_KERNELS", "torch")
        twins, exact = run(composed, layer, **how), run(composed, converted(layer, torch.float64), **how)
        monkeypatch.setenv("FASTPPO_KERNELS", "triton")
        assert_as_good(run(decoder_layer, layer, fold=True, **how), twins, exact, tiny=1e-5, roundings=2)
        norms = 4 if "qk_norm" in shape else 2
        assert seen.count(_triton_norm) == norms and seen.count(_triton_swiglu) == 1


META = torch.device("meta")


def change(name: str, **fields: Any) -> Callable[[DecoderWeights], DecoderWeights]:
    return lambda weights: weights._replace(**{name: getattr(weights, name)._replace(**fields)})


def zeros(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False, device: Any = DEVICE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"x_TH": [1.0]}, "x must be a tensor, got list"),
        ({"x_TH": zeros(20, 32, dtype=torch.int64)}, "x must have one of the dtypes .*, got torch.int64"),
        ({"x_TH": zeros(2, 10, 32)}, r"x must have shape \[T, H\] with H >= 1, got \[2, 10, 32\]"),
        ({"x_TH": zeros(20, 0)}, "x must have shape"),
        ({"x_TH": zeros(20, 31)}, r"input_norm must have shape \[31\] \(the width of x\), got \[32\]"),
        ({"x_TH": zeros(20, 32, dtype=torch.float32)}, "input_norm must have the dtype of x .torch.float32., got"),
        ({"tokens": 21}, "tokens must be an integer from 0 to 20, got 21"),
        ({"tokens": 3.0}, "tokens must be an integer"),
        ({"cos_TD": zeros(19, 8)}, r"cos must have shape \[20, 8\] .*, got \[19, 8\]"),
        ({"sin_TD": zeros(20, 4)}, r"sin must have shape \[20, 8\] .*, got \[20, 4\]"),
        ({"sin_TD": None}, "sin must be a tensor"),
        ({"cos_TD": zeros(20, 8, grad=True)}, "cos and sin must not require a gradient"),
        ({"cos_TD": zeros(20, 8, dtype=torch.int64)}, "cos must have one of the dtypes"),
        ({"sin_TD": zeros(20, 8, dtype=torch.float32)}, "sin must have the dtype of cos"),
        ({"sin_TD": zeros(20, 8, device=META)}, "sin must be on the device of q"),
        ({"rows_R": [1, 2]}, "rows must be a tensor, got list"),
        ({"rows_R": torch.tensor([0], dtype=torch.int32, device=DEVICE)}, "rows must have one of the dtypes int64, got"),
        ({"rows_R": torch.tensor([[0]], device=DEVICE)}, r"rows must have shape \[R\], got \[1, 1\]"),
        ({"rows_R": torch.tensor([0], device=META)}, "rows must be on the device of x"),
        ({"weights": (1, 2)}, "weights must be DecoderWeights, got tuple"),
        (lambda w: w._replace(eps=-1.0), "eps must be a finite number >= 0, got -1.0"),
        (lambda w: w._replace(head_dim=0), "head_dim must be an integer >= 2, got 0"),
        (lambda w: w._replace(head_dim=8.0), "head_dim must be an integer >= 2, got 8.0"),
        (lambda w: w._replace(post_norm=None), "post_norm must be a tensor, got NoneType"),
        (lambda w: w._replace(post_norm=zeros(31)), r"post_norm must have shape \[32\]"),
        (lambda w: w._replace(input_norm=zeros(32, grad=True)), "input_norm must not require a gradient: all but the adapters"),
        (lambda w: w._replace(input_norm=zeros(32, device=META)), "input_norm must be on the device of x"),
        (lambda w: w._replace(q_norm=zeros(8)), "q_norm and k_norm go together"),
        (lambda w: w._replace(q_norm=zeros(8), k_norm=zeros(4)), r"k_norm must have shape \[8\] \(head_dim\), got \[4\]"),
        (lambda w: w._replace(q_norm=zeros(8, dtype=torch.float32), k_norm=zeros(8)), "q_norm must have the dtype of x"),
        (lambda w: w._replace(q_norm=zeros(8), k_norm=zeros(8, grad=True)), "k_norm must not require a gradient"),
        (lambda w: w._replace(buffers=(1, 2)), "buffers must be None, or a LoRAWeightBuffer for each of the 4 groups"),
        (lambda w: w._replace(o=zeros(32, 32)), "o must be a LoRAProjection, got Tensor"),
        (change("gate", weight=None), "gate.weight must be a tensor"),
        (change("q", weight=zeros(32, 31)), r"q.weight must have shape \[N, 32\], N >= 1 \(K is that of x\), got \[32, 31\]"),
        (change("k", weight=zeros(16, 32, dtype=torch.float32)), "k.weight must have the dtype of x"),
        (change("v", weight=zeros(16, 32, device=META)), "v.weight must be on the device of x"),
        (change("up", weight=zeros(80, 32, grad=True)), "up.weight must not require a gradient"),
        (change("down", bias=zeros(32, grad=True)), "down.bias must not require a gradient"),
        (change("down", bias=zeros(31)), r"down.bias must have shape \[32\]"),
        (change("q", weight=zeros(33, 32), lora_A=None, lora_B=None), "q.weight must have a multiple of 8 rows .*, got 33"),
        (change("k", weight=zeros(12, 32), lora_A=None, lora_B=None), "k.weight must have a multiple of 8 rows .*, got 12"),
        (change("v", weight=zeros(8, 32), lora_A=None, lora_B=None), "v.weight must have 16 rows .those of k.weight., got 8"),
        (change("o", weight=zeros(32, 24)), r"o.weight must have shape \[N, 32\], .* the attention's result"),
        (change("o", weight=zeros(31, 32), lora_A=None, lora_B=None), "o.weight must have 32 rows .the width of x., got 31"),
        (change("up", weight=zeros(79, 32), lora_A=None, lora_B=None), "up.weight must have 80 rows .those of gate.weight"),
        (change("down", weight=zeros(32, 79)), r"down.weight must have shape \[N, 80\]"),
        (change("down", weight=zeros(1, 80), lora_A=None, lora_B=None), "down.weight must have 32 rows"),
        (change("up", lora_A=None), "up.lora_A must be given with up.lora_B"),
        (change("up", lora_B=zeros(80, 5)), r"up.lora_B must have shape \[80, 4\]"),
        (change("gate", lora_A=zeros(4, 31)), r"gate.lora_A must have shape \[R, 32\]"),
        (change("gate", scale=float("nan")), "gate.scale must be a finite number, got nan"),
    ],
)  # fmt: skip
def test_wrong_arguments(wrong, message):
    arguments = dict(zip(("x_TH", "cos_TD", "sin_TD", "weights"), make(), strict=True))
    arguments |= {"weights": wrong(arguments["weights"])} if callable(wrong) else wrong
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(ValueError, match=message):
            decoder_layer(attend=attend, **arguments)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU alone")
@pytest.mark.parametrize("rows", [[0, 5], [-1]])
def test_rows_that_are_not_there(rows):
    with pytest.raises(ValueError, match=r"rows must be in \[0, 5\) \(rows of x that are real\), got values from"):
        decoder_layer(*make(), attend, rows_R=torch.tensor(rows), tokens=5)


def test_a_folded_group_whose_results_nothing_depends_on_has_no_gradient():
    class Ignore(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *xs: Tensor) -> Tensor:
            return xs[0].clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
            return (None, None)

    layer = make(192)
    outputs = lora_linear_group(layer.x, layer.weights.groups[2], fold=True)
    Ignore.apply(*outputs).sum().backward()
    assert layer.x.grad is None or (layer.x.grad == 0).all()
