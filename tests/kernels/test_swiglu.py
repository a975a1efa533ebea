"""SwiGLU and the buffers it writes for LoRA: torch form, Triton kernels (interpreted without a GPU), plain float64."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_good, assert_rounded_once
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rms_norm import DTYPES, HALF, check_buffer, force_tile, lora_arguments, plain_columns, tiles
from torch import Tensor

from fastppo_kernels.rms_norm import rms_norm_lora
from fastppo_kernels.swiglu import swiglu, swiglu_backward_lora, swiglu_lora

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned

GRADIENT_TILES = [tile for tile in tiles() if tile is None or tile[1] <= 64]


def with_gradients(function, gate: Tensor, up: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = function(gate, up)
    return h.detach(), *torch.autograd.grad(h, (gate, up), slope.to(h.dtype))


def inputs(rows: int, columns: int, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """grad_h, gate, up."""
    return [(torch.randn(rows, columns, device=DEVICE) * size).to(dtype) for _ in range(3)]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 6),
    columns=st.sampled_from([1, 7, 64, 1024, 1025, 2100]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_as_good_as_torch(rows, columns, dtype, size, seed):
    torch.manual_seed(seed)
    slope, gate, up = inputs(rows, columns, dtype, size)
    ours = with_gradients(lambda g, u: swiglu(g, u, backend="triton"), gate, up, slope)
    twins = with_gradients(lambda g, u: swiglu(g, u, backend="torch"), gate, up, slope)
    exact = with_gradients(lambda g, u: g * torch.sigmoid(g) * u, gate.double(), up.double(), slope)
    for result, twin, truth in zip(ours, twins, exact, strict=True):
        assert_as_good(result, twin, truth)


def test_gates_far_out_have_no_nan():
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    for result, expected in zip(
        with_gradients(lambda g, u: swiglu(g, u, backend="triton"), gate, torch.ones_like(gate), torch.ones_like(gate)),
        ([[0, 0, 0, 0, 90, 1e4]], [[0, 0, 0, 0.5, 1, 1]], [[0, 0, 0, 0, 90, 1e4]]),
        strict=True,
    ):
        torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32, device=DEVICE), rtol=1e-6, atol=1e-30)


def test_gradcheck():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    _, gate, up = inputs(3, 4, torch.float64)
    slope = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    none = torch.zeros(4, 0, device=DEVICE)
    buffer = swiglu_backward_lora(slope, gate, up, none, none, torch.zeros(0, device=DEVICE))
    torch.testing.assert_close((buffer[:, :4], buffer[:, 4:]), with_gradients(swiglu, gate, up, slope)[1:])


def test_halves_of_one_matrix_are_read_where_they_lie():
    both = torch.randn(3, 5, 80, device=DEVICE)
    for gate, up in (both.chunk(2, -1), (both[..., 1:33], both[..., 40:72]), (both[:, ::2, :16], both[:, ::2, :32:2])):
        slope = torch.randn(gate.shape, device=DEVICE)
        ours = with_gradients(lambda g, u: swiglu(g, u, backend="triton"), gate, up, slope)
        twins = with_gradients(lambda g, u: swiglu(g, u, backend="torch"), gate, up, slope)
        torch.testing.assert_close(ours, twins, rtol=1e-5, atol=1e-6)


def test_compiles_once_for_every_length_and_gives_the_same_bits_each_time():
    calls = [tuple(x.requires_grad_() for x in inputs(rows, 16, torch.float32)[1:]) for rows in (5, 9, 30, 12)]
    assert_compiles_once(lambda g, u: (swiglu(g, u, backend="triton"),), calls)


def test_operators_keep_torchs_rules():
    slope, gate, up = inputs(5, 16, torch.float32)
    torch.library.opcheck(torch.ops.fastppo_kernels.swiglu, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    scale, out, matrix = torch.rand(8, device=DEVICE), torch.zeros(5, 24, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    torch.library.opcheck(torch.ops.fastppo_kernels.swiglu_lora, (gate, up, matrix, 0, scale, None, None, out))
    out = torch.zeros(5, 48, device=DEVICE)
    arguments = (slope, gate, up, matrix.t(), matrix.t(), torch.rand(16, device=DEVICE), None, None, out, torch.zeros_like(up))
    torch.library.opcheck(torch.ops.fastppo_kernels.swiglu_backward_lora, arguments)


@pytest.mark.parametrize(
    "gate, up, message",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"up must have shape \[2, 3\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), "up must have the dtype of gate"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), "gate must have one of the dtypes"),
        (torch.zeros(()), torch.zeros(()), "gate must have shape"),
    ],
)
def test_wrong_arguments(gate, up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)


# The buffers.


@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("dtype", HALF)
def test_the_activation_buffer_in_every_tile(tile, dtype, monkeypatch):
    force_tile(monkeypatch, tile)
    rank = 24 if tile is None else tile[1]
    for rows, columns, left, groups in ((70, 264, 8, 2), (1, 128, rank // 8 * 8, 0)):
        _, gate, up = inputs(rows, columns, dtype)
        how = lora_arguments(rows, columns, rank, groups)
        ours = swiglu_lora(gate, up, left=left, backend="triton", **how)
        twin = swiglu_lora(gate, up, left=left, backend="torch", **how)
        check_buffer(ours, twin, F.silu(gate.double()) * up.double(), left, how)


def check_gradients(
    buffers: tuple[Tensor, Tensor], inputs: list[Tensor], matrices: list[Tensor], how: dict[str, Tensor]
) -> None:
    """(ours, torch's): dG and dU are as good as torch's; dS is what float64 makes of those, rounded once."""
    slope, gate, up = inputs
    columns = gate.shape[1]
    _, *exact = with_gradients(lambda g, u: F.silu(g) * u, gate.double(), up.double(), slope)
    for buffer in buffers:
        dg, du, ds_MR = buffer.split([columns, columns, buffer.shape[1] - 2 * columns], 1)
        scales = how["column_scale"].split([b.shape[1] for b in matrices])
        groups = how["column_group"].split([b.shape[1] for b in matrices]) if "mask" in how else (None, None)
        parts = zip((dg, du), matrices, scales, groups, strict=True)
        expected = [plain_columns(grad, b.t(), scale, how.get("mask"), group) for grad, b, scale, group in parts]
        assert_rounded_once(ds_MR, torch.cat(expected, 1))
    assert_as_good(buffers[0][:, : 2 * columns], buffers[1][:, : 2 * columns], torch.cat(exact, 1))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.sampled_from([8, 40, 96, 300]),
    rank_gate=st.sampled_from([0, 8, 16, 40]),
    rank_up=st.sampled_from([0, 8, 24]),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from([None, (16, 32), (32, 64), (64, 64)]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_gradient_buffer(rows, columns, rank_gate, rank_up, dtype, tile, masked, seed):
    torch.manual_seed(seed)
    slope, gate, up = inputs(rows, columns, dtype)
    rank = rank_gate + rank_up
    how = lora_arguments(rows, columns, rank, 3 if masked else 0)
    matrices = how.pop("lora_A_stacked").t().split([rank_gate, rank_up], 1)
    with pytest.MonkeyPatch.context() as patch:
        fits = tile is not None and dtype in HALF and columns % 8 == 0 and 0 < max(rank_gate, rank_up) <= tile[1]
        force_tile(patch, tile if fits else None)
        ours = swiglu_backward_lora(slope, gate, up, *matrices, backend="triton", **how)
    twin = swiglu_backward_lora(slope, gate, up, *matrices, backend="torch", **how)
    check_gradients((ours, twin), [slope, gate, up], matrices, how)


@pytest.mark.parametrize("tile", GRADIENT_TILES)
@pytest.mark.parametrize("dtype", HALF)
def test_the_gradient_buffer_in_every_tile(tile, dtype, monkeypatch):
    force_tile(monkeypatch, tile)
    ranks = [16, 16] if tile is None else [tile[1], tile[1] - 8]
    slope, gate, up = inputs(70, 136, dtype)
    how = lora_arguments(70, 136, sum(ranks), 2)
    matrices = how.pop("lora_A_stacked").t().contiguous().split(ranks, 1)
    expected = swiglu(gate, up, backend="triton")
    for backend in ("triton", "torch"):  # which may be written where its gradient was read
        beside, over = torch.empty_like(gate), slope.clone()
        whole = swiglu_backward_lora(slope, gate, up, *matrices, backend=backend, **how)
        for h, source in ((beside, slope), (over, over)):
            assert torch.equal(swiglu_backward_lora(source, gate, up, *matrices, backend=backend, h=h, **how), whole)
            assert torch.equal(h, expected) if backend == "triton" else torch.equal(h, F.silu(gate) * up)
    buffers = [swiglu_backward_lora(slope, gate, up, *matrices, backend=b, **how) for b in ("triton", "triton", "torch")]
    assert torch.equal(buffers[0], buffers[1])
    check_gradients((buffers[0], buffers[2]), [slope, gate, up], matrices, how)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_rows_without_an_adapter_are_zero_even_if_it_is_broken(backend, tile, monkeypatch):
    force_tile(monkeypatch, tile)
    slope, gate, up = inputs(4, 16, torch.bfloat16)
    broken, whole = torch.full((16, 8), float("nan"), device=DEVICE), torch.ones(16, 8, device=DEVICE)
    mask = torch.tensor([[0.0, 1.0]] * 2 + [[0.0, 0.0]] * 2, device=DEVICE)
    group = torch.tensor([0] * 8 + [1] * 8, device=DEVICE)
    how = {"mask": mask, "column_group": group, "backend": backend}
    around = torch.full((4, 64), 7.0, device=DEVICE).bfloat16()
    buffer = swiglu_backward_lora(
        slope, gate, up, broken, whole, torch.ones(16, device=DEVICE), out=around[:, 8:56], **how
    )
    assert (around[:, :8] == 7).all() and (around[:, 56:] == 7).all() and not buffer.isnan().any()
    assert (buffer[:, 32:40] == 0).all() and (buffer[2:, 40:] == 0).all() and (buffer[:2, 40:] != 0).all()
    forward = swiglu_lora(gate, up, torch.cat((broken, whole), 1).t(), 8, torch.ones(16, device=DEVICE), **how)
    assert not forward.isnan().any() and (forward[:, :8] == 0).all() and (forward[2:, 24:] == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad_h": torch.zeros(2, 8)}, r"grad_h must have shape \[2, 16\]"),
        ({"lora_B_up": torch.zeros(8, 8)}, r"lora_B_up must have shape \[16, R\]"),
        ({"column_scale": torch.zeros(8)}, r"column_scale must have shape \[16\]"),
        ({"out": torch.zeros(2, 40)}, r"out must have shape \[2, 48\]"),
        ({"h": torch.zeros(2, 15)}, r"h must have shape \[2, 16\] \(that of gate\), got \[2, 15\]"),
        ({"h": torch.zeros(2, 16).double()}, "h must have dtype torch.float32 and stride 1 in its rows, got torch.float64"),
        ({"lora_B_up": torch.zeros(16, 8, requires_grad=True)}, "has no gradient of its own"),
    ],
)
def test_wrong_buffer_arguments(change, message):
    arguments = {name: torch.zeros(2, 16) for name in ("grad_h", "gate", "up")} | {"column_scale": torch.zeros(16)}
    arguments |= {name: torch.zeros(16, 8) for name in ("lora_B_gate", "lora_B_up")} | change
    with pytest.raises(ValueError, match=message):
        swiglu_backward_lora(**arguments)


# All three buffers in an MLP with LoRA on gate, up and down, its GEMMs by hand.


class MLP:
    """Weights [N, K] and adapters of a Llama MLP behind its norm, and what a plain autograd graph makes of them."""

    def __init__(self, hidden: int, inner: int, rank: int, dtype: torch.dtype) -> None:
        def matrix(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, device=DEVICE) / columns**0.5).to(dtype)

        self.norm = torch.randn(hidden, device=DEVICE).to(dtype)
        self.weights = {"gate": matrix(inner, hidden), "up": matrix(inner, hidden), "down": matrix(hidden, inner)}
        self.a = {name: matrix(rank, w.shape[1]) for name, w in self.weights.items()}
        self.b = {name: matrix(w.shape[0], rank) for name, w in self.weights.items()}
        self.scale = {"gate": 0.5, "up": 2.0, "down": 1.5}

    def plain(self, x: Tensor, mask_M: Tensor, slope: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {"x": x} | {f"a_{n}": a for n, a in self.a.items()} | {f"b_{n}": b for n, b in self.b.items()}
        leaves = {name: leaf.detach().clone().to(dtype).requires_grad_() for name, leaf in leaves.items()}

        def linear(name: str, x: Tensor) -> Tensor:
            s = self.scale[name] * mask_M.to(dtype)[:, None] * (x @ leaves[f"a_{name}"].t())
            return x @ self.weights[name].to(dtype).t() + s @ leaves[f"b_{name}"].t()

        x = leaves["x"]
        normal = (x.to(torch.promote_types(dtype, torch.float32)).pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt().to(dtype) * x
        normal = normal * self.norm.to(dtype)
        y = linear("down", F.silu(linear("gate", normal)) * linear("up", normal))
        grads = torch.autograd.grad(y, list(leaves.values()), slope.to(dtype))
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))

    def buffered(self, x: Tensor, mask_M: Tensor, slope: Tensor, backend: str) -> dict[str, Tensor]:
        """Layout: activations [ S_gate | X | S_up ] and [ S_down | h ], gradients [ dG | dU | dS_gate | dS_up ]."""
        w, a, b, scale, rank = self.weights, self.a, self.b, self.scale, len(self.a["gate"])
        hidden, inner = x.shape[1], len(w["gate"])
        group = torch.zeros(2 * rank, dtype=torch.int32, device=DEVICE)
        switch = {"mask": mask_M[:, None], "backend": backend}

        def columns(*names: str) -> Tensor:
            return torch.cat([torch.full((rank,), scale[name], device=DEVICE) for name in names])

        both = columns("gate", "up")
        first, rstd = rms_norm_lora(
            x, self.norm, 1e-6, torch.cat((a["gate"], a["up"])), rank, both, column_group=group, **switch
        )
        gate = first[:, : rank + hidden] @ torch.cat((b["gate"], w["gate"]), 1).t()
        up = first[:, rank:] @ torch.cat((w["up"], b["up"]), 1).t()
        second = swiglu_lora(gate, up, a["down"], rank, columns("down"), column_group=group[:rank], **switch)
        y = second @ torch.cat((b["down"], w["down"]), 1).t()

        s_down, h, normal = second[:, :rank], second[:, rank:], first[:, rank : rank + hidden]
        ds_down = scale["down"] * mask_M[:, None].to(x.dtype) * (slope @ b["down"])
        grad_h = torch.cat((slope, ds_down), 1) @ torch.cat((w["down"], a["down"]))
        grads = swiglu_backward_lora(grad_h, gate, up, b["gate"], b["up"], both, column_group=group, **switch)
        grad_normal = grads @ torch.cat((w["gate"], w["up"], a["gate"], a["up"]))
        wide = x.to(rstd.dtype).requires_grad_()
        from fastppo_kernels.rms_norm import rms_norm

        (grad_x,) = torch.autograd.grad(rms_norm(wide, self.norm.to(rstd.dtype), 1e-6), wide, grad_normal.to(rstd.dtype))
        dg, du, ds_gate, ds_up = grads.split([inner, inner, rank, rank], 1)
        return {
            "y": y, "x": grad_x.to(x.dtype), "a_gate": ds_gate.t() @ normal, "a_up": ds_up.t() @ normal,
            "a_down": ds_down.t() @ h, "b_gate": dg.t() @ first[:, :rank], "b_up": du.t() @ first[:, rank + hidden :],
            "b_down": slope.t() @ s_down,
        }  # fmt: skip


@pytest.mark.parametrize("tile", [None, (16, 16), (64, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_mlp_through_the_buffers(dtype, tile, monkeypatch):
    if dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("there is no Triton form of float64")
    force_tile(monkeypatch, tile if dtype in HALF else None)
    rows, hidden, inner, rank = 80, 64, 104, 8
    mlp = MLP(hidden, inner, rank, dtype)
    x, slope = (torch.randn(rows, hidden, device=DEVICE).to(dtype) for _ in range(2))
    mask_M = (torch.rand(rows, device=DEVICE) < 0.6).float()
    exact, twin = (mlp.plain(x, mask_M, slope, d) for d in (torch.float64, dtype))
    ours = mlp.buffered(x, mask_M, slope, "torch" if dtype == torch.float64 else "triton")
    assert ours.keys() == exact.keys()
    # Relative root mean squares over all results: after this many roundings the largest error is a matter of luck.
    errors = [
        torch.stack([(result[name].double() - truth).norm() / truth.norm() for name, truth in exact.items()]).norm()
        for result in (ours, twin)
    ]
    assert errors[0] <= 1.2 * errors[1] + (1e-12 if dtype == torch.float64 else 1e-6), errors
