"""RMS normalisation and the buffer it writes for LoRA: torch form, Triton kernels, plain float64."""

import helpers
import pytest
import torch
from exactness import assert_as_good, assert_rounded_once
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels.rms_norm import residual_backward, rms_norm, rms_norm_lora

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]


def plain(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def with_gradients(function, x: Tensor, weight: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), slope.to(y.dtype))


def compare(x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    slope = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    ours = with_gradients(lambda x, w: rms_norm(x, w, eps, offset=offset, backend="triton"), x, weight, slope)
    twins = with_gradients(lambda x, w: rms_norm(x, w, eps, offset=offset, backend="torch"), x, weight, slope)
    exact = with_gradients(lambda x, w: plain(x, w, eps, offset), x.double(), weight.double(), slope)
    # dx = rstd (m - n mean(m n)) may be next to nothing, and is nothing but for eps where a row has one entry.
    rstd_M = (x.double().pow(2).mean(-1) + eps).rsqrt()
    units = 1.0, float((slope * (weight + offset) * rstd_M[:, None]).abs().max()) if x.numel() else 1.0, 1.0
    for result, twin, truth, unit in zip(ours, twins, exact, units, strict=True):
        assert_as_good(result, twin, truth, unit=unit)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    columns=st.sampled_from([1, 7, 48, 256, 257, 528, 1024, 1500, 1520, 4096, 5008]),  # multiples of 16 have their own tiles
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, torch.float32]),
    offset=st.sampled_from([0.0, 1.0]),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_as_good_as_torch(rows, columns, dtype, weight_dtype, offset, size, seed):
    torch.manual_seed(seed)
    x = (torch.randn(rows, columns, device=DEVICE) * size).to(dtype)
    compare(x, torch.randn(columns, device=DEVICE).to(weight_dtype or dtype), 1e-6, offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns, programs", [(5, 9001, 2), (5, 9008, 2), (70, 40, 3), (70, 48, 3)])
def test_rows_wider_than_a_tile_and_more_of_them_than_programs(rows, columns, programs, dtype, monkeypatch):
    from fastppo_kernels import _triton_norm

    monkeypatch.setattr(_triton_norm, "_PROGRAMS", programs)
    compare(torch.randn(rows, columns, device=DEVICE).to(dtype), torch.randn(columns, device=DEVICE).to(dtype), 1e-5, 0.0)


def residual_case(rows: int, columns: int, dtype: torch.dtype, stride: int, monkeypatch) -> None:
    """dx + residual and y, in the memory that is given, between others' numbers; rounded once, for the sum is."""
    x, slope, beside = (torch.randn(rows, stride, device=DEVICE).to(dtype)[:, :columns] for _ in range(3))
    weight = torch.randn(columns, device=DEVICE).to(dtype)
    exact = x.detach().double().requires_grad_()
    y = plain(exact, weight.double(), 1e-5)
    truth = torch.autograd.grad(y, exact, slope.double())[0] + beside.double()
    found = {}
    for backend in ("triton", "torch"):
        monkeypatch.setenv("FASTPPO_KERNELS", backend)
        around = torch.full((rows, columns + 32), 7.0, device=DEVICE, dtype=dtype)
        grad, again = residual_backward(slope, x, weight, 1e-5, beside, around[:, 16 : 16 + columns])
        assert grad.data_ptr() == around[:, 16:].data_ptr() or not rows
        assert (around[:, :16] == 7).all() and (around[:, 16 + columns :] == 7).all()
        assert torch.equal(residual_backward(slope, x, weight, 1e-5, beside)[0], grad)
        assert torch.equal(again, rms_norm(x, weight, 1e-5, backend=backend))
        found[backend] = grad.clone()
    assert_as_good(found["triton"], found["torch"], truth, unit=float(truth.abs().max()) if rows else 1.0)
    assert_rounded_once(found["triton"], truth, slack=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 40, 256, 1024, 1500, 4096, 5008, 9008])
def test_the_gradient_of_a_residual_stream(columns, dtype, monkeypatch):
    """Every tile; rows that begin at multiples of 16 and others."""
    for rows in (0, 1, 5):
        residual_case(rows, columns, dtype, columns, monkeypatch)
    residual_case(3, columns, dtype, columns + 7, monkeypatch)


def test_the_torch_form_is_hugging_faces_to_the_bit():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    for module, offset in ((llama.LlamaRMSNorm(96, eps=1e-5), 0.0), (gemma.GemmaRMSNorm(96, eps=1e-5), 1.0)):
        torch.nn.init.normal_(module.weight)
        for x_dtype in DTYPES:
            for weight_dtype in (torch.float32, x_dtype):
                module.to(weight_dtype)
                x = torch.randn(2, 5, 96).to(x_dtype)
                theirs, ours = module(x), rms_norm(x, module.weight, 1e-5, offset=offset, backend="torch")
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_gradcheck():
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, offset=1.0), (x, weight))


def test_rows_of_any_stride_are_read_where_they_lie():
    wide, weight = torch.randn(2, 6, 50, device=DEVICE), torch.randn(24, device=DEVICE)
    for x in (wide[:, :, 10:34], wide[:, ::2, 3:27], wide[..., :48:2], wide[:1].expand(3, 6, 50)[..., :24]):
        slope = torch.randn(x.shape, device=DEVICE)
        ours = with_gradients(lambda x, w: rms_norm(x, w, 1e-6, backend="triton"), x, weight, slope)
        twins = with_gradients(lambda x, w: rms_norm(x, w, 1e-6, backend="torch"), x, weight, slope)
        torch.testing.assert_close(ours, twins, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_costs_no_gradient(monkeypatch):
    from fastppo_kernels import _triton_norm

    seen, launch = [], _triton_norm.backward
    monkeypatch.setattr(_triton_norm, "backward", lambda *arguments: seen.append(arguments[-1]) or launch(*arguments))
    x, weight = torch.randn(3, 8, device=DEVICE, requires_grad=True), torch.randn(8, device=DEVICE)
    rms_norm(x, weight, 1e-6, backend="triton").sum().backward()
    assert seen == [False] and weight.grad is None and x.grad.isfinite().all()


def test_compiles_once_for_every_length_and_gives_the_same_bits_each_time():
    weight = torch.randn(16, device=DEVICE, requires_grad=True)
    calls = [(torch.randn(rows, 16, device=DEVICE, requires_grad=True), weight) for rows in (5, 9, 30, 12)]
    assert_compiles_once(lambda x, w: (rms_norm(x, w, 1e-6, backend="triton"),), calls)


def test_operators_keep_torchs_rules():
    x, weight = torch.randn(5, 16, device=DEVICE, requires_grad=True), torch.randn(16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.fastppo_kernels.rms_norm, (x, weight, 1e-6, 0.0))
    scale, out, rstd = torch.rand(8, device=DEVICE), torch.zeros(5, 24, device=DEVICE), torch.zeros(5, device=DEVICE)
    stacked = torch.randn(8, 16, device=DEVICE)
    arguments = (x.detach(), weight.detach(), 1e-6, 0.0, stacked, 8, scale, None, None, out, rstd)
    torch.library.opcheck(torch.ops.fastppo_kernels.rms_norm_lora, arguments)
    slope, beside, grad, again = (torch.randn(5, 16, device=DEVICE) for _ in range(4))
    arguments = (slope, x.detach(), weight.detach(), 1e-6, beside, grad, again)
    torch.library.opcheck(torch.ops.fastppo_kernels.rms_norm_residual_backward, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x must have one of the dtypes"),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(0)}, "K >= 1"),
        ({"weight": torch.zeros(4)}, r"weight must have shape \[3\]"),
        ({"eps": -1.0}, "eps must be a finite number >= 0"),
        ({"offset": float("nan")}, "offset must be a finite number"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(3), "eps": 1e-6} | change
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)


# The buffer.


def force_tile(monkeypatch, tile: tuple[int, int] | None) -> None:
    from fastppo_kernels import _triton_producer

    monkeypatch.setattr(_triton_producer, "producer_tile", lambda tiles, *_: tile if tile in tiles else None)


def tiles() -> list[tuple[int, int] | None]:
    return [None, (16, 16), (16, 32), (32, 16), (32, 32), (32, 64), (64, 16), (64, 32), (64, 64), (64, 128)]


def lora_arguments(rows: int, columns: int, rank: int, groups: int = 0) -> dict[str, Tensor]:
    arguments = {
        "lora_A_stacked": torch.randn(rank, columns, device=DEVICE) / columns**0.5,  # float32, as peft keeps it
        "column_scale": torch.rand(rank, device=DEVICE) * 2,
    }
    if groups:
        mask = torch.rand(rows, groups, device=DEVICE)
        arguments["mask"] = torch.where(mask < 0.4, 0.0, mask)
        arguments["column_group"] = torch.randint(groups, (rank,), device=DEVICE, dtype=torch.int32)
    return arguments


def plain_columns(x_MK: Tensor, stacked: Tensor, scale: Tensor, mask=None, group=None) -> Tensor:
    """S in float64 of the X that lies in the buffer and of A as it is used."""
    s_MR = x_MK.double() @ stacked.to(x_MK.dtype).double().t() * scale.double()
    return s_MR if mask is None else s_MR * mask.double()[:, group.long()]


def check_buffer(ours: Tensor, twin: Tensor, x_exact: Tensor, left: int, how: dict[str, Tensor]) -> None:
    """X is as good as torch's; S is what float64 makes of that X, rounded once."""
    for buffer in (ours, twin):
        x_MK = buffer[:, left : left + x_exact.shape[1]]
        s_MR = torch.cat((buffer[:, :left], buffer[:, left + x_exact.shape[1] :]), 1)
        settings = (how["column_scale"], how.get("mask"), how.get("column_group"))
        assert_rounded_once(s_MR, plain_columns(x_MK, how["lora_A_stacked"], *settings))
    middle = slice(left, left + x_exact.shape[1])
    assert_as_good(ours[:, middle], twin[:, middle], x_exact)


@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("dtype", HALF)
def test_the_buffer_in_every_tile(tile, dtype, monkeypatch):
    force_tile(monkeypatch, tile)
    rank = 24 if tile is None else tile[1]
    for rows, columns, left, groups in ((70, 264, 8, 2), (1, 128, rank // 8 * 8, 0)):
        x, weight = torch.randn(rows, columns, device=DEVICE).to(dtype), torch.randn(columns, device=DEVICE).to(dtype)
        how = lora_arguments(rows, columns, rank, groups)
        ours, rstd = rms_norm_lora(x, weight, 1e-5, left=left, backend="triton", **how)
        twin, twin_rstd = rms_norm_lora(x, weight, 1e-5, left=left, backend="torch", **how)
        torch.testing.assert_close(rstd, twin_rstd, rtol=1e-6, atol=0)
        check_buffer(ours, twin, plain(x.double(), weight.double(), 1e-5), left, how)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.sampled_from([8, 40, 96, 300]),
    left=st.sampled_from([0, 8, 24]),
    right=st.sampled_from([0, 8, 16]),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, 1.0]),
    fused=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_border(rows, columns, left, right, dtype, offset, fused, seed):
    from fastppo_kernels import _triton_producer

    torch.manual_seed(seed)
    x, weight = torch.randn(rows, columns, device=DEVICE).to(dtype), torch.randn(columns, device=DEVICE).to(dtype)
    how = lora_arguments(rows, columns, left + right, 3)
    with pytest.MonkeyPatch.context() as patch:
        if fused:
            patch.setattr(_triton_producer, "_FEWEST_BLOCKS", 1)
        ours, _ = rms_norm_lora(x, weight, 1e-5, left=left, offset=offset, backend="triton", **how)
    twin, _ = rms_norm_lora(x, weight, 1e-5, left=left, offset=offset, backend="torch", **how)
    check_buffer(ours, twin, plain(x.double(), weight.double(), 1e-5, offset), left, how)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_rows_without_the_adapter_are_zero_even_if_it_is_broken_and_out_is_written_in_place(backend, tile, monkeypatch):
    force_tile(monkeypatch, tile)
    x, weight = torch.randn(6, 16, device=DEVICE).bfloat16(), torch.ones(16, device=DEVICE).bfloat16()
    stacked = torch.randn(16, 16, device=DEVICE)
    stacked[8:] = float("nan")
    group = torch.tensor([0] * 8 + [1] * 8, device=DEVICE)
    mask = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 0.0]] * 3, device=DEVICE)
    around = torch.full((6, 48), 7.0, device=DEVICE).bfloat16()
    out, _ = rms_norm_lora(
        x, weight, 1e-6, stacked, 8, torch.ones(16, device=DEVICE), mask=mask, column_group=group, out=around[:, 8:40],
        backend=backend,
    )  # fmt: skip
    assert out.data_ptr() == around[:, 8:].data_ptr()
    assert (around[:, :8] == 7).all() and (around[:, 40:] == 7).all()
    assert (out[:, 24:] == 0).all() and (out[3:, :8] == 0).all() and (out[:3, :8] != 0).any() and not out.isnan().any()


def test_the_choice_between_one_kernel_and_a_gemm(monkeypatch):
    from fastppo_kernels import _triton_norm
    from fastppo_kernels import _triton_producer as kernels

    def choice(rows: int, rank: int, dtype: torch.dtype = torch.bfloat16, columns: int = 16, start: int = 0):
        x = torch.empty(rows * columns + start, dtype=dtype, device=DEVICE)[start:].view(rows, columns)
        return kernels.producer_tile(kernels.PRODUCER_TILES, rank, x)

    assert choice(8192, 16) == (64, 16) and choice(8192, 96) == (64, 128) and choice(4096, 115) == (64, 128)
    assert choice(8192, 116) is None and choice(8192, 0) is None
    assert choice(2048, 48) == (32, 64) and choice(2048, 58) is None and choice(1024, 28) == (16, 32)
    assert choice(1024, 29) is None and choice(1000, 8) is None and choice(0, 8) is None
    assert choice(8192, 16, torch.float32) is None and choice(8192, 16, columns=12) is None
    assert choice(8192, 16, start=1) is None
    # Whatever is chosen has a tile, and the report knows it.
    named = {c.name for c in _triton_norm.configurations()}
    for rows in (1024, 2048, 4096, 10**4):
        for rank in range(8, 130, 8):
            if (tile := choice(rows, rank)) is not None:
                assert f"rms_norm_lora_kernel bf16 {tile[0]}x{kernels.PRODUCER_TILES[tile][0]} R{tile[1]}" in named


@pytest.mark.parametrize(
    "change, message",
    [
        ({"left": 4}, "left must be a multiple of 8"),
        ({"left": 24}, "lora_A_stacked must have 24 "),
        ({"lora_A_stacked": torch.zeros(16, 5)}, r"lora_A_stacked must have shape \[R, 16\]"),
        ({"column_scale": torch.zeros(8)}, r"column_scale must have shape \[16\]"),
        ({"mask": torch.zeros(2, 1)}, "mask and column_group go together"),
        ({"mask": torch.zeros(3, 1), "column_group": torch.zeros(16).int()}, r"mask must have shape \[2, G\]"),
        ({"mask": torch.zeros(2, 1), "column_group": torch.zeros(16)}, "column_group must have one of the dtypes"),
        ({"out": torch.zeros(2, 16)}, r"out must have shape \[2, 32\]"),
        ({"out": torch.zeros(32, 2).t()}, "out must have dtype"),
        ({"x": torch.zeros(2, 16, requires_grad=True)}, "has no gradient of its own"),
    ],
)
def test_wrong_buffer_arguments(change, message):
    arguments = {"x": torch.zeros(2, 16), "weight": torch.zeros(16), "eps": 1e-6, "left": 8}
    arguments |= {"lora_A_stacked": torch.zeros(16, 16), "column_scale": torch.zeros(16)} | change
    with pytest.raises(ValueError, match=message):
        rms_norm_lora(**arguments)
