"""lora_linear against peft's layer and float64, its masks, its gradients, and torch.compile."""

import importlib

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fastppo_kernels import _lora_ops
from fastppo_kernels._checks import check_device, check_shape
from fastppo_kernels.lora_linear import LoRAProjection, fold_lora, lora_linear, lora_linear_group

# The package exports the function under the module's name.
lora_linear_module = importlib.import_module("fastppo_kernels.lora_linear")


@pytest.fixture(autouse=True, scope="module")
def no_size_is_small():
    """Small products are left to autograd on the CPU; the tests are of small products, and of what the others take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_linear_module, "_SMALL_WORK", -1)
        yield


def peft_layer(K: int, N: int, R: int, *, alpha: int = 16, bias: bool = False, rslora: bool = False) -> PeftLinear:
    config = LoraConfig(r=R, lora_alpha=alpha, use_rslora=rslora)
    layer = PeftLinear(nn.Linear(K, N, bias=bias), "default", config, r=R, lora_alpha=alpha)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer.requires_grad_(False)
    return layer


def parts(layer: PeftLinear) -> LoRAProjection:
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return LoRAProjection(layer.base_layer.weight, lora_A, lora_B, layer.scaling["default"], layer.base_layer.bias)


def call(x: Tensor, projection: LoRAProjection, **how) -> Tensor:
    weight, lora_A, lora_B, scale, bias = projection
    return lora_linear(x, weight, lora_A, lora_B, scale, bias=bias, **how)


def reference(x: Tensor, projection: LoRAProjection, mask: Tensor | None = None) -> Tensor:
    """The formula in float64; `mask` is [M] or [M, G]."""
    weight, lora_A, lora_B, scale, bias = (None if part is None else part for part in projection)
    y = F.linear(x, weight, bias)
    if lora_A is None:
        return y
    factor = torch.ones(len(x), 1, dtype=x.dtype) if mask is None else mask.to(x.dtype)
    factor = factor.unsqueeze(1) if factor.dim() == 1 else factor
    s = (x @ lora_A.t()) * factor.repeat_interleave(len(lora_A) // factor.shape[1], 1)
    return y + scale * s @ lora_B.t()


def random_projection(K: int, N: int, R: int | None, bias: bool, dtype=torch.float64, scale=0.7) -> LoRAProjection:
    def leaf(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    adapter = (None, None) if R is None else (leaf(R, K), leaf(N, R))
    return LoRAProjection(leaf(N, K), *adapter, scale, leaf(N) if bias else None)


def copied(projection: LoRAProjection, **dtypes: torch.dtype) -> LoRAProjection:
    """A copy with leaves of its own, some in another dtype."""
    return LoRAProjection(
        *(
            part.detach().to(dtypes.get(name, part.dtype), copy=True).requires_grad_() if isinstance(part, Tensor) else part
            for name, part in zip(LoRAProjection._fields, projection, strict=True)
        )
    )


def leaves(x: Tensor, projections) -> list[Tensor]:
    return [x] + [part for each in projections for part in each if isinstance(part, Tensor)]


@pytest.mark.parametrize("R", [1, 8, 16, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_peft(R, bias):
    torch.manual_seed(R)
    layer = peft_layer(96, 80, R, alpha=5, bias=bias, rslora=bias)
    projection = parts(layer)
    x = torch.randn(2, 37, 96, requires_grad=True)
    weights = torch.randn(2, 37, 80)
    theirs, ours = layer(x), call(x, projection)
    assert torch.equal(ours, theirs)
    inputs = [x, projection.lora_A, projection.lora_B]
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    found = torch.autograd.grad((ours * weights).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(float(each.abs().max()) for each in expected))
    with torch.no_grad():
        assert torch.equal(call(x, projection), theirs)


@pytest.mark.parametrize("small", [False, True])
def test_a_group_equals_peft(small, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(lora_linear_module, "_SMALL_WORK", 1 << 30 if small else -1)
    layers = [peft_layer(64, N, R, alpha=alpha) for N, R, alpha in ((64, 8, 16), (32, 8, 16), (48, 4, 3))]
    x = torch.randn(50, 64, requires_grad=True)
    theirs = [layer(x) for layer in layers]
    projections = [parts(layer) for layer in layers]
    ours = lora_linear_group(x, projections)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)
        assert ("LoRAGroup" in str(found.grad_fn.next_functions)) != small  # the function is behind a view
    inputs = [x] + [part for each in projections for part in (each.lora_A, each.lora_B)]
    expected = torch.autograd.grad(sum(y.square().sum() for y in theirs), inputs)
    found = torch.autograd.grad(sum(y.square().sum() for y in ours), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(float(each.abs().max()) for each in expected))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    K=st.integers(1, 9),
    shapes=st.lists(st.tuples(st.integers(1, 7), st.sampled_from([None, 1, 2, 3]), st.booleans()), min_size=1, max_size=3),
    groups=st.sampled_from([None, 0, 1, 2]),
    as_bool=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_all_gradients_match_the_formula_in_float64(rows, K, shapes, groups, as_bool, seed):
    torch.manual_seed(seed)
    projections = [random_projection(K, N, R if R is None else R * (groups or 1), bias) for N, R, bias in shapes]
    x = torch.randn(rows, K, dtype=torch.float64, requires_grad=True)
    mask = None
    if groups is not None:
        mask = torch.rand((rows,) if groups == 0 else (rows, groups), dtype=torch.float64)
        mask = mask > 0.5 if as_bool else torch.where(mask > 0.5, mask, 0.0)
    ours = lora_linear_group(x, projections, adapter_mask=mask)
    theirs = [reference(x, projection, mask) for projection in projections]
    torch.testing.assert_close(list(ours), theirs)
    weights = [torch.randn_like(y) for y in theirs]
    inputs = leaves(x, projections)
    found = torch.autograd.grad([(y * w).sum() for y, w in zip(ours, weights, strict=True)], inputs)
    total = sum((y * w).sum() for y, w in zip(theirs, weights, strict=True))
    expected = torch.autograd.grad(total, inputs, materialize_grads=True)
    torch.testing.assert_close(found, expected)


def test_gradcheck():
    torch.manual_seed(1)
    projections = [random_projection(4, 3, 2, True), random_projection(4, 2, 4, False)]
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 1.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)

    def outputs(*tensors):
        rebuilt = iter(tensors[1:])
        fresh = [each._replace(**{name: next(rebuilt) for name in each._fields if isinstance(getattr(each, name), Tensor)})
                 for each in projections]  # fmt: skip
        return lora_linear_group(tensors[0], fresh, adapter_mask=mask)

    assert torch.autograd.gradcheck(outputs, leaves(x, projections))


def test_only_what_requires_a_gradient_gets_one():
    torch.manual_seed(2)
    projection = random_projection(6, 5, 2, True)
    for names in (["weight"], ["lora_A"], ["lora_B"], ["bias"], ["lora_A", "bias"], []):
        fresh = copied(projection)
        for name in ("weight", "lora_A", "lora_B", "bias"):
            getattr(fresh, name).requires_grad_(name in names)
        for x in (torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)):
            y = call(x, fresh)
            wanted = [getattr(fresh, name) for name in names] + ([x] if x.requires_grad else [])
            assert y.requires_grad == bool(wanted)
            if wanted:
                expected = torch.autograd.grad(reference(x, fresh).square().sum(), wanted)
                y.square().sum().backward()
                torch.testing.assert_close([each.grad for each in wanted], list(expected))
            others = [part for part in fresh if isinstance(part, Tensor) and not part.requires_grad]
            assert all(part.grad is None for part in others)
            for part in wanted:
                part.grad = None


def test_an_output_that_is_not_used_adds_nothing():
    torch.manual_seed(3)
    projections = [random_projection(4, 3, 2, False), random_projection(4, 5, 2, False)]
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for used in (0, 1):
        inputs = leaves(x, projections)
        found = torch.autograd.grad(lora_linear_group(x, projections)[used].square().sum(), inputs, allow_unused=True)
        expected = torch.autograd.grad(reference(x, projections[used]).square().sum(), inputs, allow_unused=True)
        assert [each is None for each in found] == [each is None for each in expected]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_policy_reference_and_value_share_one_batch():
    torch.manual_seed(4)
    K, N, r, rows = 24, 20, 4, 12
    weight = torch.randn(N, K)
    policy, value = random_projection(K, N, r, False, torch.float32), random_projection(K, N, r, False, torch.float32)
    x = torch.randn(3 * rows, K)
    mask = torch.zeros(3 * rows, 2, dtype=torch.bool)
    mask[:rows, 0] = mask[2 * rows :, 1] = True
    stacked_A, stacked_B = torch.cat([policy.lora_A, value.lora_A]), torch.cat([policy.lora_B, value.lora_B], 1)
    y = lora_linear(x, weight, stacked_A, stacked_B, 0.5, adapter_mask=mask)
    separate = [
        lora_linear(x[:rows], weight, policy.lora_A, policy.lora_B, 0.5),
        F.linear(x[rows : 2 * rows], weight),
        lora_linear(x[2 * rows :], weight, value.lora_A, value.lora_B, 0.5),
    ]
    torch.testing.assert_close(y, torch.cat(separate), rtol=1e-5, atol=1e-5)
    assert torch.equal(y[rows : 2 * rows], F.linear(x, weight)[rows : 2 * rows])
    inputs = [policy.lora_A, policy.lora_B, value.lora_A, value.lora_B]
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), inputs)
    expected = torch.autograd.grad((torch.cat(separate) * weights).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("as_bool", [True, False])
def test_a_masked_adapter_may_hold_anything(broken, as_bool):
    torch.manual_seed(5)
    good = random_projection(6, 5, 2, False)
    bad_A, bad_B = torch.full((2, 6), broken, dtype=torch.float64), torch.full((5, 2), broken, dtype=torch.float64)
    stacked_A = torch.cat([good.lora_A.detach(), bad_A]).requires_grad_()
    stacked_B = torch.cat([good.lora_B.detach(), bad_B], 1).requires_grad_()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1]], dtype=torch.bool if as_bool else torch.float64)
    y = lora_linear(x, good.weight.detach(), stacked_A, stacked_B, 0.7, adapter_mask=mask)
    expected = reference(x, good._replace(weight=good.weight.detach()), mask[:, 0])
    torch.testing.assert_close(y[:3], expected[:3])
    assert torch.equal(y[1], F.linear(x, good.weight)[1])
    assert y[3].isnan().all()  # a broken adapter that is in use stays visible
    found = torch.autograd.grad(y[:3].square().sum(), [x, stacked_A, stacked_B], retain_graph=True)
    grads = torch.autograd.grad(expected[:3].square().sum(), [x, good.lora_A, good.lora_B])
    torch.testing.assert_close(found[0][:3], grads[0][:3])
    torch.testing.assert_close(found[1][:2], grads[1])
    torch.testing.assert_close(found[2][:, :2], grads[2])


def test_all_rows_masked():
    projection = random_projection(6, 5, 2, True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = call(x, projection, adapter_mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(y, F.linear(x, projection.weight, projection.bias))
    grads = torch.autograd.grad(y.sum(), [x, projection.lora_A, projection.lora_B])
    torch.testing.assert_close(grads[0], torch.autograd.grad(F.linear(x, projection.weight).sum(), x)[0])
    assert not grads[1].any() and not grads[2].any()


def test_shapes_of_x_and_of_the_mask():
    torch.manual_seed(6)
    projection = random_projection(6, 5, 4, True)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    one, two = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, 2, dtype=torch.float64)
    for mask, flat in ((one, one.view(6)), (two, two.view(6, 2))):
        expected = reference(x.view(6, 6), projection, flat).view(2, 3, 5)
        for shaped in (mask, flat):
            torch.testing.assert_close(call(x, projection, adapter_mask=shaped), expected)
    assert call(x[0, 0], projection).shape == (5,)
    assert call(x[0, 0], projection, adapter_mask=torch.tensor(True)).shape == (5,)
    empty = torch.randn(0, 3, 6, dtype=torch.float64, requires_grad=True)
    y = call(empty, projection, adapter_mask=torch.ones(0, 3, dtype=torch.bool))
    assert y.shape == (0, 3, 5)
    grads = torch.autograd.grad(y.sum(), leaves(empty, [projection]))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves(empty, [projection])]
    assert not any(grad.any() for grad in grads)


def test_any_strides():
    torch.manual_seed(7)
    projection = random_projection(6, 5, 4, False)
    x = torch.randn(6, 7, dtype=torch.float64)
    expected = reference(x.t().contiguous(), projection)
    strided = projection._replace(
        weight=torch.randn(5, 12, dtype=torch.float64)[:, ::2].copy_(projection.weight),
        lora_A=projection.lora_A.detach().t().contiguous().t().requires_grad_(),
        lora_B=projection.lora_B.detach().t().contiguous().t().requires_grad_(),
    )
    y = call(x.t(), strided)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(10, 7, dtype=torch.float64).t()[:, ::2]
    found = torch.autograd.grad(y, [strided.lora_A, strided.lora_B], weights)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [projection.lora_A, projection.lora_B], weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_with_float32_adapters_is_as_exact_as_torch(dtype, masked):
    """Error against float64, at most 1.2 times that of torch's own products in this dtype."""
    torch.manual_seed(8)
    K, N, R, rows = 128, 96, 16, 300
    wide = random_projection(K, N, R, True, torch.float32, 2.0)
    with torch.no_grad():
        wide.weight.div_(K**0.5)
        wide.lora_A.div_(K)
    projection = copied(wide, weight=dtype)
    x = torch.randn(rows, K).to(dtype).requires_grad_()
    mask = torch.rand(rows) > 0.3 if masked else None
    grad = torch.randn(rows, N).to(dtype)

    y = call(x, projection, adapter_mask=mask)
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, [x, projection.lora_A, projection.lora_B], grad)]
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, torch.float32]

    def by_formula(dtype: torch.dtype) -> list[Tensor]:
        each = copied(projection, **dict.fromkeys(("weight", "lora_A", "lora_B", "bias"), dtype))
        x_cast = x.detach().to(dtype).requires_grad_()
        y = reference(x_cast, each, mask)
        return [y, *torch.autograd.grad(y, [x_cast, each.lora_A, each.lora_B], grad.to(dtype))]

    expected, plain = by_formula(torch.float64), by_formula(dtype)
    for ours, torchs, right in zip(found, plain, expected, strict=True):
        error, allowed = ((each.double() - right).norm() / right.norm() for each in (ours, torchs))
        assert error <= 1.2 * allowed + 1e-6
    # The gradients of float32 adapters are never rounded to the dtype of the products.
    assert not any(torch.equal(each, each.to(dtype).float()) for each in found[2:])


def test_autocast_computes_in_its_dtype():
    torch.manual_seed(9)
    layer = peft_layer(32, 24, 4)
    projection = parts(layer)
    x = torch.randn(10, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = call(x, projection), layer(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)
    grads = torch.autograd.grad(ours.float().sum(), [x, projection.lora_A, projection.lora_B])
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_what_no_gradient_needs_is_not_kept():
    projection = random_projection(6, 5, 2, False)
    frozen = projection._replace(**{name: getattr(projection, name).detach() for name in ("weight", "lora_A", "lora_B")})
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x, frozen)
        assert {tuple(each.shape) for each in saved} == {(5, 6), (2, 6), (5, 2)}
        saved.clear()
        call(x, frozen._replace(lora_B=projection.lora_B))
        assert {tuple(each.shape) for each in saved} == {(5, 6), (2, 6), (5, 2), (3, 2)}
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(reference(x, frozen).sum(), x))


def check_compiled(backend: str, how: dict, lengths=(3, 5, 9, 64)) -> None:
    """Compares the compiled op with the eager one at each length; nothing may be compiled again after the first."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    projections = [random_projection(16, 8, 4, True, torch.float32), random_projection(16, 24, 4, False, torch.float32)]
    projections = [each._replace(weight=each.weight.detach()) for each in projections]

    def step(x, mask):
        return lora_linear_group(x, projections, adapter_mask=mask, **how)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = set()
    for rows in lengths:
        x = torch.randn(rows, 16, requires_grad=True)
        mask = torch.rand(rows) > 0.5
        inputs = [x, *(part for each in projections for part in each if isinstance(part, Tensor) and part.requires_grad)]
        ours, theirs = compiled(x, mask), step(x, mask)
        torch.testing.assert_close(ours, theirs)
        found, expected = (torch.autograd.grad(sum(y.square().sum() for y in each), inputs) for each in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_compiles_whole_and_once_for_all_lengths():
    check_compiled("aot_eager", {"backend": "torch"})


def test_the_opaque_operators_compile_once_for_all_lengths():
    check_compiled("aot_eager", {"backend": "triton"})


def test_the_opaque_operators_keep_their_promises():
    torch.manual_seed(10)
    projections = [_lora_ops.Projection(torch.randn(5, 6), torch.randn(r, 6), torch.randn(5, r), None, 0.5) for r in (2, 4)]
    projections.append(_lora_ops.Projection(torch.randn(3, 6), None, None, torch.randn(3), 1.0))
    x, mask = torch.randn(7, 6), torch.rand(7, 2)
    packed = _lora_ops._pack(projections)
    for keep in (False, True):
        torch.library.opcheck(_lora_ops.lora_forward, (x, mask, *packed, keep, "auto"))
    grads, kept = [torch.randn(7, 5), torch.randn(7, 3)], [torch.randn(7, 2), torch.randn(7, 4)]
    wanted = [True, True, True, False] * 2 + [True, False, False, True]
    torch.library.opcheck(_lora_ops.lora_backward, (grads, [True, False, True], x, mask, *packed, kept, True, wanted, "auto"))


@settings(max_examples=10, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 64, 70]),
    shapes=st.lists(st.tuples(st.sampled_from([8, 24]), st.sampled_from([None, 1, 8, 10])), min_size=1, max_size=2),
    groups=st.sampled_from([None, 1, 2]),
    with_grad=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_triton_form_equals_the_torch_form(rows, shapes, groups, with_grad, seed):
    torch.manual_seed(seed)
    projections = [random_projection(16, N, R if R is None else R * (groups or 1), True, torch.float32) for N, R in shapes]
    x = torch.randn(rows, 16, requires_grad=True)
    mask = None if groups is None else torch.rand(rows, groups) > 0.5
    with torch.set_grad_enabled(with_grad):
        found, expected = (lora_linear_group(x, projections, adapter_mask=mask, backend=each) for each in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if with_grad:
        grads = [torch.randn_like(y) for y in expected]
        inputs = leaves(x, projections)
        ours, theirs = (torch.autograd.grad(each, inputs, grads) for each in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [4, 70])
def test_the_triton_form_hides_a_masked_adapter_too(rows):
    torch.manual_seed(11)
    weight, good_A, good_B = torch.randn(8, 16), torch.randn(8, 16), torch.randn(8, 8)
    stacked_A = torch.cat([good_A, torch.full_like(good_A, torch.nan)])
    stacked_B = torch.cat([good_B, torch.full_like(good_B, torch.inf)], 1)
    x = torch.randn(rows, 16)
    mask = torch.zeros(rows, 2, dtype=torch.bool)
    mask[:2, 0] = mask[-1, 1] = True
    for keep in (False, True):
        stacked_B.requires_grad_(keep)
        y = lora_linear(x, weight, stacked_A, stacked_B, 0.5, adapter_mask=mask, backend="triton").detach()
        torch.testing.assert_close(y[:2], lora_linear(x[:2], weight, good_A, good_B, 0.5), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[2:-1], F.linear(x[2:-1], weight), rtol=1e-4, atol=1e-4)
        assert y[-1].isnan().all()


@pytest.mark.parametrize("chosen", ["addmm", "triton"])
def test_auto_takes_what_was_measured_to_be_faster(monkeypatch, chosen):
    """On a GPU; here the choice is asked for on the CPU, in the interpreter."""
    keys = []

    def choose(key, candidates, device):
        keys.append(key)
        results = {name: candidate() for name, candidate in candidates.items()}
        assert list(results) == ["addmm", "triton"]
        return chosen

    monkeypatch.setattr(_lora_ops._measure, "choose", choose)
    torch.manual_seed(12)
    projection = _lora_ops.Projection(torch.randn(8, 16), torch.randn(4, 16), torch.randn(8, 4), None, 0.5)
    x, grad = torch.randn(5, 16), torch.randn(5, 8)
    expected, kept = _lora_ops.forward(x, None, [projection])
    for keep in (False, True):
        found, _ = _lora_ops.run_forward(x, None, [projection], keep, "auto")
        torch.testing.assert_close(found, expected)
    needs = [_lora_ops.Needs(False, True, True, False)]
    grads = [_lora_ops.run_backward([grad], x, None, [projection], kept, True, needs, choice) for choice in ("auto", "torch")]
    torch.testing.assert_close(*grads)
    assert keys == [
        "lora_linear 8 x 16 -> 8:4 torch.float32",
        "lora_linear 8 x 16 -> 8:4 torch.float32 keep",
        "lora_linear_backward 8 x 8 -> 16:4 torch.float32",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 6, dtype=torch.int64)}, "x must have one of the dtypes"),
        ({"x": torch.tensor(1.0)}, r"x must have shape \[..., K\]"),
        ({"weight": torch.randn(5, 7)}, r"weight must have shape \[N, 6\]"),
        ({"weight": torch.randn(5, 6).bfloat16()}, "weight must have the dtype of x"),
        ({"weight": torch.randn(5, 6, device="meta")}, "weight must be on the device of x"),
        ({"lora_A": torch.randn(2, 5)}, r"lora_A must have shape \[R, 6\]"),
        ({"x": None}, "x must be a tensor, got NoneType"),
        ({"weight": None}, "weight must be a tensor, got NoneType"),
        ({"bias": 1.0}, "bias must be a tensor, got float"),
        ({"lora_A": None}, "lora_A must be given with lora_B, got None"),
        ({"lora_B": None}, "lora_B must be given with lora_A, got None"),
        ({"lora_B": torch.randn(5, 3)}, r"lora_B must have shape \[5, 2\]"),
        ({"lora_B": torch.ones(5, 2, dtype=torch.int32)}, "lora_B must have one of the dtypes"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": "2"}, "scale must be a finite number"),
        ({"bias": torch.randn(4)}, r"bias must have shape \[5\]"),
        ({"adapter_mask": torch.ones(4)}, "adapter_mask must have the leading shape"),
        ({"adapter_mask": torch.ones(3, dtype=torch.int64)}, "adapter_mask must be a bool or floating-point"),
        ({"adapter_mask": torch.ones(3, 4)}, "must be a multiple of that"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"x": torch.randn(3, 6), "weight": torch.randn(5, 6), "lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**arguments, **change})


def test_wrong_arguments_of_a_group_name_the_projection():
    x = torch.randn(3, 6)
    good = LoRAProjection(torch.randn(5, 6))
    with pytest.raises(ValueError, match="projections must not be empty"):
        lora_linear_group(x, [])
    for projections, came in [(None, "NoneType"), (good, "LoRAProjection"), (x, "Tensor")]:
        with pytest.raises(ValueError, match=f"projections must be a sequence of LoRAProjection, got {came}"):
            lora_linear_group(x, projections)
    for projection, came in [((good.weight,), "tuple"), (good.weight, "Tensor"), (None, "NoneType")]:
        with pytest.raises(ValueError, match=rf"projections\[1\] must be a LoRAProjection, got {came}"):
            lora_linear_group(x, [good, projection])
    with pytest.raises(ValueError, match=r"projections\[1\].lora_B must be given with projections\[1\].lora_A, got None"):
        lora_linear_group(x, [good, good._replace(lora_A=torch.randn(2, 6))])
    with pytest.raises(ValueError, match=r"projections\[1\].weight must have shape"):
        lora_linear_group(x, [good, LoRAProjection(torch.randn(5, 7))])


def test_checks_refuse_what_is_no_tensor():
    for check in (check_shape, check_device):
        with pytest.raises(ValueError, match="mask must be a tensor, got NoneType"):
            check("mask", None, *(((3,), "that of x") if check is check_shape else ("x", torch.ones(3))))


def test_without_an_adapter_it_is_the_plain_map():
    x, weight, bias = torch.randn(3, 6), torch.randn(5, 6), torch.randn(5)
    assert torch.equal(lora_linear(x, weight, None, None, bias=bias), F.linear(x, weight, bias))


def test_an_empty_variable_is_as_if_not_set(monkeypatch):
    monkeypatch.setenv("FASTPPO_KERNELS", "")
    assert lora_linear(torch.randn(3, 6), torch.randn(5, 6), None, None).shape == (3, 5)


def test_folded_projections_are_one_linear_map():
    layers = [peft_layer(12, 7, 3, bias=True), peft_layer(12, 4, 2, rslora=True)]
    projections = [*map(parts, layers), LoRAProjection(torch.randn(5, 12))]
    weight, bias = fold_lora(projections)
    assert not weight.requires_grad and bias is not None and not bias[7:].any()
    x = torch.randn(6, 12)
    wanted = torch.cat([*(layer(x) for layer in layers), x @ projections[2].weight.t()], 1)
    torch.testing.assert_close(F.linear(x, weight, bias), wanted)
    assert fold_lora(projections[1:])[1] is None
    assert fold_lora(projections[2:])[0] is projections[2].weight


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        ([], "projections must not be empty"),
        ([LoRAProjection(torch.zeros(2, n)) for n in (3, 4)], r"projections\[1\].weight must have shape \[N, 3\]"),
        ([LoRAProjection(torch.zeros(3))], r"projections\[0\].weight must have shape \[N, K\], got \[3\]"),
        (
            [LoRAProjection(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(1, 3), torch.zeros(2, 1))],
            r"projections\[0\].lora_A must have the weight's dtype torch.bfloat16, got torch.float32",
        ),
    ],
)
def test_what_cannot_be_folded_is_one_line(projections, message):
    with pytest.raises(ValueError, match=message):
        fold_lora(projections)
