"""LoRAWeightBuffer against lora_linear_group and float64: outputs, gradients, corners of NaN, refreshed adapters."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels.lora_buffer import LoRAWeightBuffer
from fastppo_kernels.lora_linear import LoRAProjection, lora_linear_group

QKV = ((24, 4), (10, 3), (10, 5))


def projections_for(
    shapes=QKV, K=16, *, dtype=torch.float64, adapter_dtype=None, bias=False, scales=(0.7, 1.0, 2.0, 0.5)
) -> list[LoRAProjection]:
    found = []
    for (N, R), scale in zip(shapes, scales, strict=False):
        adapter = (None, None)
        if R is not None:
            adapter = tuple(torch.randn(shape, dtype=adapter_dtype or dtype).requires_grad_() for shape in ((R, K), (N, R)))
        weight, bias_N = torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype) if bias else None
        found.append(LoRAProjection(weight, *adapter, scale, bias_N))
    return found


def fill_corners(buffer: LoRAWeightBuffer, value: float) -> int:
    """Writes to every entry of the weight buffer that belongs to no weight and no border; how many those are."""
    belongs = torch.zeros(buffer.weight.shape, dtype=torch.bool)
    first = buffer._rows[0].stop
    belongs[:, buffer.left : buffer.left + buffer.inputs] = True
    belongs[:first, : buffer.left] = True
    belongs[first : buffer.outputs, buffer.left + buffer.inputs :] = True
    buffer.weight.masked_fill_(~belongs.to(buffer.weight.device), value)
    return int((~belongs).sum())


def adapters(projections) -> list[Tensor]:
    return [part for each in projections for part in (each.lora_A, each.lora_B) if part is not None]


def compare(buffer, projections, x, mask=None, **tolerance) -> None:
    ours, theirs = buffer(x, mask), lora_linear_group(x, projections, adapter_mask=mask)
    torch.testing.assert_close(ours, theirs, **tolerance)
    weights = [torch.randn_like(y) for y in theirs]
    inputs = [x, *adapters(projections)]
    found, expected = (
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(each, weights, strict=True)), inputs) for each in (ours, theirs)
    )
    assert [each.dtype for each in found] == [each.dtype for each in inputs]
    torch.testing.assert_close(found, expected, **tolerance)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    K=st.integers(1, 20),
    shapes=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([None, 1, 2, 8, 9])), min_size=1, max_size=4),
    groups=st.sampled_from([None, 0, 1, 2]),
    bias=st.booleans(),
    align=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 1000),
)
def test_equals_the_group_with_nan_in_the_corners(rows, K, shapes, groups, bias, align, seed):
    torch.manual_seed(seed)
    shapes = [(N, R if R is None else R * (groups or 1)) for N, R in shapes]
    shapes[-1] = (shapes[-1][0], shapes[-1][1] or 2)
    projections = projections_for(shapes, K, bias=bias)
    buffer = LoRAWeightBuffer(projections, align=align)
    assert buffer.left % align == buffer.right % align == 0
    fill_corners(buffer, torch.nan)
    x = torch.randn(rows, K, dtype=torch.float64, requires_grad=True)
    mask = None
    if groups is not None:
        mask = torch.rand((rows,) if groups == 0 else (rows, groups), dtype=torch.float64)
        mask = mask > 0.5 if seed % 2 else torch.where(mask > 0.5, mask, 0.0)
    compare(buffer, projections, x, mask, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    K=st.integers(1, 20),
    shapes=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([None, 1, 2, 8, 9])), min_size=1, max_size=4),
    scales=st.lists(st.sampled_from([0.5, 2.0]), min_size=4, max_size=4),
    bias=st.booleans(),
    align=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 1000),
)
def test_equals_the_group_without_masks(rows, K, shapes, scales, bias, align, seed):
    """Columns that are made by one product where scales are the same; and what only rounds up is written."""
    torch.manual_seed(seed)
    projections = projections_for(shapes, K, bias=bias, scales=scales)
    buffer = LoRAWeightBuffer(projections, align=align, masked=False)
    fill_corners(buffer, torch.nan)
    x_buffer, grad_buffer = buffer.new_input(rows).fill_(torch.nan), buffer.new_grad(rows).fill_(torch.nan)
    buffer.x_of(x_buffer).zero_()
    grad_buffer[:, : buffer.outputs].zero_()
    buffer.fill_s(x_buffer)
    buffer.fill_ds(grad_buffer)
    assert not x_buffer.any() and not grad_buffer.any()
    compare(buffer, projections, torch.randn(rows, K, dtype=torch.float64, requires_grad=True), rtol=1e-12, atol=1e-12)


def test_other_adapters_in_the_same_buffer():
    torch.manual_seed(10)
    buffer = LoRAWeightBuffer(projections_for(bias=True), masked=False)
    first = [each._replace(weight=buffer.weight_view(i)) for i, each in enumerate(buffer.projections)]
    new = lambda x: torch.randn_like(x).requires_grad_()  # noqa: E731
    others = [each._replace(lora_A=new(each.lora_A), lora_B=new(each.lora_B)) for each in first]
    others[2] = others[2]._replace(scale=7.0)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    assert not buffer.use(first) and buffer.use(others) and not buffer.use(others)
    compare(buffer, others, x, rtol=1e-12, atol=1e-12)
    assert buffer.use(first)
    compare(buffer, first, x, rtol=1e-12, atol=1e-12)
    changes = {"weight": first[0].weight.clone()}, {"lora_A": None, "lora_B": None}, {"bias": None}
    for projections in (*([first[0]._replace(**change), *first[1:]] for change in changes), first[:2]):
        assert not buffer.holds(projections)
        with pytest.raises(ValueError, match=r"projections must have this buffer's weights and biases, and ranks \[4, 3, 5\]"):
            buffer.use(projections)
    scaled = [first[0]._replace(scale=9.0), *first[1:]]
    assert buffer.use(scaled)
    compare(buffer, scaled, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_without_masks_what_is_not_finite_is_seen(broken):
    projections = projections_for()
    with torch.no_grad():
        projections[1].lora_B[3, 0] = broken
    y = LoRAWeightBuffer(projections, masked=False)(torch.ones(2, 16, dtype=torch.float64))
    assert y[0].isfinite().all() and not y[1][:, 3].isfinite().any() and y[2].isfinite().all()


def test_gradcheck():
    torch.manual_seed(0)
    projections = projections_for(((5, 2), (3, 2)), 4)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)

    def outputs(x, *_):
        return LoRAWeightBuffer(projections)(x, mask)  # a new one each time: gradcheck writes to the parameters' data

    assert torch.autograd.gradcheck(outputs, [x, *adapters(projections)])


def test_the_buffers_by_hand():
    """The same through the methods that a fused layer calls, with one contraction for dX, in poisoned buffers."""
    torch.manual_seed(1)
    projections = projections_for()
    buffer = LoRAWeightBuffer(projections)
    assert (buffer.left, buffer.right, buffer.width, buffer.outputs) == (8, 8, 32, 44)
    assert fill_corners(buffer, torch.nan) == 24 * 8 + 20 * 8 + 16 * 16
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 1.0])[:, None]
    x_buffer, grad_buffer = buffer.new_input(6).fill_(torch.nan), buffer.new_grad(6).fill_(torch.nan)
    buffer.x_of(x_buffer).copy_(x.detach())
    buffer.fill_s(x_buffer, mask)
    outputs = buffer.forward(x_buffer)
    expected = lora_linear_group(x, projections, adapter_mask=mask)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(y) for y in outputs]
    for place, grad in zip(buffer.grads_of(grad_buffer), grads, strict=True):
        place.copy_(grad)
    buffer.fill_ds(grad_buffer, mask)
    grad_x, grad_A, grad_B = buffer.backward(x_buffer, grad_buffer)
    found = [grad_x, *(grad for pair in zip(grad_A, grad_B, strict=True) for grad in pair)]
    torch.testing.assert_close(
        found, list(torch.autograd.grad(expected, [x, *adapters(projections)], grads)), rtol=1e-12, atol=1e-12
    )
    only_x = buffer.backward(x_buffer, grad_buffer, need_A=False, need_B=False)
    torch.testing.assert_close(only_x, (grad_x, (None,) * 3, (None,) * 3))


def test_layout_for_the_producers():
    """Row c of the stacked A makes column c of S; column_scale and column_group are those of that column."""
    torch.manual_seed(2)
    projections = projections_for(((6, 4), (5, 2), (7, 6)))
    buffer = LoRAWeightBuffer(projections)
    rows = [(0, 4, 0), (8, 2, 1), (10, 6, 2)]
    for start, rank, i in rows:
        assert torch.equal(buffer.lora_A_stacked[start : start + rank], projections[i].lora_A)
        assert buffer.column_scale[start : start + rank].tolist() == [projections[i].scale] * rank
        assert buffer.column_group(2)[start : start + rank].tolist() == [0] * (rank // 2) + [1] * (rank // 2)
    assert buffer.column_group(1).tolist() == [0] * 16
    assert buffer.column_group(2).dtype == torch.int32
    assert not buffer.lora_A_stacked[4:8].any() and not buffer.column_scale[4:8].any()
    assert not buffer.border(0)[:, 4:].any()
    border = buffer.border(1)
    assert torch.equal(border[:5, :2], projections[1].lora_B) and torch.equal(border[5:, 2:], projections[2].lora_B)
    assert not border[:5, 2:].any() and not border[5:, :2].any()
    with pytest.raises(ValueError, match="groups must divide every rank, got 4 and a rank of 2"):
        buffer.column_group(4)


def test_float32_is_exact_to_rounding_and_any_shape_of_x():
    torch.manual_seed(3)
    projections = projections_for(dtype=torch.float32, bias=True)
    buffer = LoRAWeightBuffer(projections)
    x = torch.randn(16, 3, 2).permute(1, 2, 0).requires_grad_()
    compare(buffer, projections, x, torch.rand(3, 2) > 0.3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_group(dtype):
    torch.manual_seed(4)
    K, rows = 128, 200
    projections = projections_for(((96, 16), (32, 16), (32, 16)), K, dtype=dtype, adapter_dtype=torch.float32)
    with torch.no_grad():
        for each in projections:
            each.weight.div_(K**0.5)
            each.lora_A.div_(K**0.5)
    buffer = LoRAWeightBuffer(projections)
    x = torch.randn(rows, K).to(dtype).requires_grad_()
    inputs = [x, *adapters(projections)]
    grads = [torch.randn(rows, len(each.weight)).to(dtype) for each in projections]

    def all_of(outputs, inputs, grads):
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    wide = [
        LoRAProjection(*(part.detach().double().requires_grad_() if isinstance(part, Tensor) else part for part in each))
        for each in projections
    ]
    x64 = x.detach().double().requires_grad_()
    exact = all_of(lora_linear_group(x64, wide), [x64, *adapters(wide)], [grad.double() for grad in grads])
    ours = all_of(buffer(x), inputs, grads)
    theirs = all_of(lora_linear_group(x, projections), inputs, grads)
    for found, plain, right in zip(ours, theirs, exact, strict=True):
        assert found.dtype == plain.dtype
        error, allowed = ((each.double() - right).norm() / right.norm() for each in (found, plain))
        assert error <= 1.2 * allowed + 1e-6


def test_refresh_follows_the_optimizer():
    torch.manual_seed(5)
    projections = projections_for(dtype=torch.float32)
    buffer = LoRAWeightBuffer(projections)
    assert not buffer.refresh()
    optimizer = torch.optim.AdamW(adapters(projections), lr=0.1)
    x = torch.randn(4, 16)
    for _ in range(2):
        sum(y.square().sum() for y in buffer(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        compare(buffer, projections, x.clone().requires_grad_(), rtol=1e-4, atol=1e-4)
        assert not buffer.refresh()
    with torch.no_grad():
        projections[1].lora_B.zero_()
    assert buffer.refresh() and not buffer.refresh()

    class WritesToData(torch.optim.Optimizer):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(1)

    WritesToData([projections[0].lora_A], {}).step()
    assert buffer.refresh() and not buffer.refresh()
    projections[0].lora_A.data.add_(1)
    assert not buffer.refresh() and buffer.refresh(force=True)
    projections[2].lora_A.data = torch.randn_like(projections[2].lora_A)  # a new address
    assert buffer.refresh()
    compare(buffer, projections, x.requires_grad_(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_an_address_that_is_used_again_is_not_mistaken_for_the_old(which):
    projections = projections_for()
    buffer, parameter = LoRAWeightBuffer(projections), getattr(projections[0], which)
    address = parameter.data_ptr()
    for _ in range(100):  # until the allocator gives what the first value was in, if that is free
        parameter.data = torch.randn_like(parameter)
        if parameter.data_ptr() == address:
            break
    assert buffer.refresh()
    compare(buffer, projections, torch.randn(4, 16, dtype=torch.float64, requires_grad=True))


def test_an_optimizer_of_other_parameters_changes_nothing():
    projections, critic = projections_for(), torch.nn.Linear(16, 1)
    buffer, x = LoRAWeightBuffer(projections), torch.randn(3, 16, dtype=torch.float64)
    critic(x.float()).sum().backward()
    first = buffer(x)[0].sum()
    torch.optim.SGD(critic.parameters(), lr=0.1).step()
    (first + buffer(x)[0].sum()).backward()
    first = buffer(x)[0].sum()
    torch.optim.SGD([{"params": list(critic.parameters())}, {"params": [projections[2].lora_B]}], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + buffer(x)[0].sum()).backward()


def test_optimizers_are_watched_for_buffers_alone():
    """In a process of its own: nothing is registered before the first buffer, and only its parameters are counted."""
    code = """
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
from fastppo_kernels.lora_buffer import LoRAWeightBuffer
from fastppo_kernels import LoRAProjection
assert not hooks
lora_A, lora_B, other = (torch.nn.Parameter(torch.ones(size)) for size in ((2, 4), (3, 2), (5,)))
buffers = [LoRAWeightBuffer([LoRAProjection(torch.ones(3, 4), lora_A, lora_B)]) for _ in range(2)]
assert len(hooks) == 1
before = len(vars(other))
for parameter in (lora_A, lora_B, other):
    parameter.grad = torch.ones_like(parameter)
torch.optim.SGD([lora_A, lora_B, other], lr=0.1).step()
assert all(buffer.refresh() and not buffer.refresh() for buffer in buffers)
assert len(vars(other)) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_masks_of_one_dimension_in_the_parts():
    projections = projections_for()
    buffer, mask = LoRAWeightBuffer(projections), torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    x_buffer, grad_buffer = torch.randn(3, buffer.width).double(), torch.randn(3, len(buffer.weight)).double()
    for fill, rows in ((buffer.fill_s, x_buffer), (buffer.fill_ds, grad_buffer)):
        column = rows.clone()
        fill(rows, mask)
        fill(column, mask[:, None])
        assert torch.equal(rows, column)
        with pytest.raises(ValueError, match="adapter_mask must have the leading shape"):
            fill(rows, torch.ones(4))
        with pytest.raises(ValueError, match="_buffer must be a tensor, got NoneType"):
            fill(None)


def test_a_refresh_between_forward_and_backward_raises():
    projections = projections_for()
    buffer = LoRAWeightBuffer(projections)
    y = buffer(torch.randn(3, 16, dtype=torch.float64))
    with torch.no_grad():
        projections[0].lora_A.add_(1)
    buffer.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y[0].sum().backward()


def test_a_model_can_share_the_weights():
    torch.manual_seed(6)
    projections = projections_for(((6, 2), (5, 2)))
    linear = torch.nn.Linear(16, 5, bias=False, dtype=torch.float64)
    linear.weight.requires_grad_(False).copy_(projections[1].weight)
    buffer = LoRAWeightBuffer(projections)
    x = torch.randn(3, 16, dtype=torch.float64)
    before = linear(x)
    linear.weight.data = buffer.weight_view(1)
    assert linear.weight.untyped_storage().data_ptr() == buffer.weight.untyped_storage().data_ptr()
    torch.testing.assert_close(linear(x), before)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_masked_adapter_may_hold_anything(broken):
    torch.manual_seed(7)
    projections = projections_for(((6, 4), (5, 4)))
    with torch.no_grad():
        projections[0].lora_A[2:] = broken
        projections[1].lora_B[:, 2:] = broken
    buffer = LoRAWeightBuffer(projections)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 0], [0, 1]], dtype=torch.bool)
    ours, theirs = buffer(x, mask), lora_linear_group(x, projections, adapter_mask=mask)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert all(y[:2].isfinite().all() and y[2].isnan().all() for y in ours)
    grads = torch.autograd.grad(sum(y[:2].sum() for y in ours), [x, *adapters(projections)])
    assert grads[0][:2].isfinite().all()
    assert all(grad.isfinite().all() for grad in (grads[1][:2], grads[2][:, :2], grads[3][:2], grads[4][:, :2]))


def test_only_what_is_needed_is_computed():
    torch.manual_seed(8)
    projections = projections_for()
    projections[1].lora_A.requires_grad_(False)
    buffer = LoRAWeightBuffer(projections)
    x = torch.randn(3, 16, dtype=torch.float64)
    sum(y.sum() for y in buffer(x)).backward()
    assert projections[1].lora_A.grad is None and projections[0].lora_A.grad is not None
    storages = {part.grad.untyped_storage().data_ptr() for part in adapters(projections) if part.grad is not None}
    assert len(storages) == 5
    with torch.no_grad():
        assert not any(y.requires_grad for y in buffer(x))


def test_compiles_whole_and_once_for_all_lengths():
    torch.manual_seed(9)
    torch._dynamo.reset()
    projections = projections_for(dtype=torch.float32)
    buffer = LoRAWeightBuffer(projections)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, mask: buffer(x, mask), fullgraph=True, backend=counter)
    compilations = set()
    for rows in (3, 5, 64):
        x, mask = torch.randn(rows, 16, requires_grad=True), torch.rand(rows) > 0.5
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(mask, 0)
        inputs = [x, *adapters(projections)]
        ours, theirs = compiled(x, mask), buffer(x, mask)
        torch.testing.assert_close(ours, theirs)
        found, expected = (torch.autograd.grad(sum(y.square().sum() for y in each), inputs) for each in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_wrong_arguments():
    good = projections_for()
    with pytest.raises(ValueError, match="projections must be 1 to 4, got 0"):
        LoRAWeightBuffer([])
    for wrong, message in [
        (None, "projections must be a sequence of LoRAProjection, got NoneType"),
        (good[0], "projections must be a sequence of LoRAProjection, got LoRAProjection"),
        ([good[0].weight], r"projections\[0\] must be a LoRAProjection, got Tensor"),
        ([tuple(good[0])], r"projections\[0\] must be a LoRAProjection, got tuple"),
    ]:
        with pytest.raises(ValueError, match=message):
            LoRAWeightBuffer(wrong)
    with pytest.raises(ValueError, match=r"projections\[0\].weight must be frozen"):
        LoRAWeightBuffer([good[0]._replace(weight=torch.randn(24, 16, dtype=torch.float64, requires_grad=True))])
    with pytest.raises(ValueError, match=r"projections\[0\].bias must be frozen"):
        LoRAWeightBuffer([good[0]._replace(bias=torch.randn(24, dtype=torch.float64, requires_grad=True))])
    with pytest.raises(ValueError, match=r"projections\[1\].weight must have shape \[N, 16\]"):
        LoRAWeightBuffer([good[0], LoRAProjection(torch.randn(4, 15, dtype=torch.float64))])
    with pytest.raises(ValueError, match=r"projections\[1\].weight must have the dtype of projections\[0\].weight"):
        LoRAWeightBuffer([good[0], LoRAProjection(torch.randn(4, 16))])
    with pytest.raises(ValueError, match="align must be an integer"):
        LoRAWeightBuffer(good, align=0)
    with pytest.raises(ValueError, match="adapter_mask must be None: the buffer was made with masked=False"):
        LoRAWeightBuffer(good, masked=False)(torch.randn(3, 16, dtype=torch.float64), torch.ones(3))
    buffer = LoRAWeightBuffer(good)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 16\]"):
        buffer(torch.randn(3, 15, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must have the dtype of the weights"):
        buffer(torch.randn(3, 16))
    with pytest.raises(ValueError, match="x must be on the device of the weights"):
        buffer(torch.randn(3, 16, dtype=torch.float64, device="meta"))
    with pytest.raises(ValueError, match="adapter_mask must have the leading shape"):
        buffer(torch.randn(3, 16, dtype=torch.float64), torch.ones(4))
    with pytest.raises(ValueError, match=r"x_buffer must have shape \[3, 32\]"):
        buffer.forward(torch.randn(3, 31, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"grad_buffer must have shape \[3, 60\]"):
        buffer.backward(buffer.new_input(3), buffer.new_grad(2))
