"""A decoder layer through bordered buffers, where those are more than another way to the same numbers."""


import pytest
import torch
from exactness import assert_as_good
from helpers import TRITON_MARKS
from test_decoder_layer import (
    NAMES,
    Layer,
    assert_same,
    bordered,
    converted,
    leaves,
    make,
    rows_of,
    run,
    slope_of,
    through_buffers,
)

from bench.gpu_checks.decoder import attend, composed
from fastppo_kernels import decoder_layer


def with_adapters(layer: Layer, of: Layer) -> Layer:
    """Its weights with another layer's adapters."""
    pairs = {name: getattr(of.weights, name) for name in NAMES}
    pairs = {name: {"lora_A": p.lora_A, "lora_B": p.lora_B, "scale": 2 * p.scale} for name, p in pairs.items()}
    found = {name: getattr(layer.weights, name)._replace(**fields) for name, fields in pairs.items()}
    return layer._replace(weights=layer.weights._replace(**found))


def test_buffers_serve_several_adapters_one_after_the_other():
    """Graphs of both are there at once; a step is made with one; without adapters it is the base."""
    layer = make(rank=3, bias=True)
    one = bordered(layer)
    other = with_adapters(one, make(rank=3, seed=1))
    off = {name: getattr(layer.weights, name)._replace(lora_A=None, lora_B=None) for name in NAMES}
    off = {name: projection._replace(weight=getattr(one.weights, name).weight) for name, projection in off.items()}
    base = one._replace(weights=one.weights._replace(**off))
    layers = (one, other, base, one)
    for _ in range(2):
        expected = [run(composed, each) for each in layers]
        results = [decoder_layer(*each, attend) for each in layers]
        for each, z, wanted in zip(layers, results, expected, strict=True):
            assert_same([z, *torch.autograd.grad(z, leaves(each), slope_of(z))], wanted, 1e-12)
        trained = leaves(other)[1:]
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(trained, lr=0.1).step()


def test_buffers_that_do_not_hold_the_projections_are_left():
    layer = bordered(make())
    ranks = {name: getattr(make(rank=5, seed=2).weights, name) for name in ("gate", "up")}
    ranks = {name: p._replace(weight=getattr(layer.weights, name).weight) for name, p in ranks.items()}
    moved = {"q": layer.weights.q._replace(weight=layer.weights.q.weight.clone())}
    for fields in (ranks, moved):
        other = layer._replace(weights=layer.weights._replace(**fields))
        assert_same(run(decoder_layer, other), run(composed, other), 1e-12)


def test_an_adapter_that_was_changed_before_backward_is_not_taken_for_the_old_one_in_buffers_either():
    layer = bordered(make())
    z = decoder_layer(*layer, attend)
    with torch.no_grad():
        layer.weights.up.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_the_result_through_buffers_is_the_same_to_the_bit(dtype):
    layer = bordered(make(bias=True, qk_norm=True, dtype=dtype))
    with torch.no_grad():
        again = decoder_layer(*layer, attend)
    assert torch.equal(decoder_layer(*layer, attend), again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, how", [({}, {}), ({"qk_norm": True, "bias": True}, {"tokens": 9, "rows_R": [8, 0, 3, 0]})])
class TestTriton:
    pytestmark = TRITON_MARKS

    @pytest.mark.parametrize("producers", [False, True])
    def test_the_numbers_of_the_triton_kernels_are_as_good(self, shape, how, dtype, producers, monkeypatch):
        """producers: S and dS are made while X and dY are written, for which there have to be more rows than here."""
        from fastppo_kernels import _triton_norm, _triton_producer, _triton_swiglu

        seen = []
        producers_of = {_triton_norm: ("forward_lora",), _triton_swiglu: ("forward_lora", "backward_lora")}
        for module, name in ((module, name) for module, names in producers_of.items() for name in names):
            launch = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, f=launch, n=name: seen.append(n) or f(*args))
        if producers:
            monkeypatch.setattr(_triton_producer, "_FEWEST_BLOCKS", 1)
        layer, how = make(12, rank=8, dtype=dtype, **shape), rows_of(how)
        monkeypatch.setenv("FASTPPO_KERNELS", "torch")
        twins, exact = run(composed, layer, **how), run(composed, converted(layer, torch.float64), **how)
        monkeypatch.setenv("FASTPPO_KERNELS", "triton")
        assert_as_good(run(through_buffers, layer, fold=True, **how), twins, exact, tiny=1e-5, roundings=2)
        made = producers and dtype != torch.float32
        assert (seen.count("forward_lora"), seen.count("backward_lora")) == ((3, 1) if made else (0, 0))
