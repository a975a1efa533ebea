"""The GEMM with the LoRA product inside: its definition, its gradients, and the Triton kernel against float64."""

import itertools
import os
import subprocess
import sys

import helpers
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_good
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import lora_linear
from fastppo_kernels.lora_gemm import NF4Weight, lora_gemm

poisoned = helpers.poisoned
PROCESSORS = "fastppo_kernels._triton_lora_gemm._processors"
linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def operands(M, N, K, R, transposed=False, dtype=torch.float32, adapter=None, seed=0):
    """(x, weight, A, B, bias, factor), of which every third factor is 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    x = normal(M, N if transposed else K).to(dtype)
    weight, A, B = normal(N, K) / K**0.5, normal(R, K) / K**0.5, normal(N, R)
    factor = torch.rand(M, R, generator=generator).mul(2).masked_fill(torch.rand(M, R, generator=generator) < 0.3, 0.0)
    bias = normal(K if transposed else N).to(dtype)
    adapter = adapter or dtype
    return x, weight.to(dtype), A.to(adapter), B.to(adapter), bias, factor.to(DEVICE)


def exact(x, weight, A, B, scale, bias=None, factor=None, s=None, transposed=False) -> tuple[Tensor, Tensor]:
    """(y, S) in float64."""
    x, weight, A, B = (tensor.double() for tensor in (x, weight, A, B))
    if transposed:
        weight, A, B = weight.t(), B.t(), A.t()
    s = scale * (1.0 if factor is None else factor.double()) * (x @ A.t()) if s is None else s.double()
    return x @ weight.t() + (0.0 if bias is None else bias.double()) + s @ B.t(), s


@linux
@settings(max_examples=25, deadline=None)
@given(
    M=st.sampled_from([1, 2, 15, 16, 17, 64, 65, 140]),
    N=st.sampled_from([8, 72, 128, 200]),
    K=st.sampled_from([8, 64, 136, 264]),
    R=st.sampled_from([1, 4, 8, 16, 24, 40]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    adapter=st.sampled_from([None, torch.float32]),
    with_bias=st.booleans(),
    with_factor=st.booleans(),
    given_s=st.booleans(),
    processors=st.sampled_from([1, 3, 40]),
    seed=st.integers(0, 1000),
)
def test_the_kernel_is_as_exact_as_torch(
    M, N, K, R, transposed, dtype, adapter, with_bias, with_factor, given_s, processors, seed
):
    x, weight, A, B, bias, factor = operands(M, N, K, R, transposed, dtype, adapter, seed)
    how = {
        "bias": bias if with_bias else None,
        "factor": factor if with_factor and not given_s else None,
        "s": (torch.rand(M, R, device=DEVICE) - 0.5).to(dtype) if given_s else None,
        "transposed": transposed,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PROCESSORS, lambda device: processors)
        ours = lora_gemm(x, weight, A, B, 0.5, **how, with_s=True, backend="triton")
    twin = lora_gemm(x, weight, A, B, 0.5, **how, with_s=True, backend="torch")
    truth = exact(x, weight, A.to(dtype), B.to(dtype), 0.5, **how)
    assert_as_good(ours, twin, truth)


@linux
@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("M", [5, 70])
def test_an_adapter_that_is_off_is_not_there(monkeypatch, backend, M, processors):
    """To the bit, even if it is NaN; where it is on, what is broken in it is seen."""
    monkeypatch.setattr(PROCESSORS, lambda device: processors)
    x, weight, A, B, bias, _ = operands(M, 72, 64, 32)
    factor = torch.ones(M, 32, device=DEVICE)
    factor[:3] = 0.0
    factor[3, 16:] = 0.0
    base = lora_gemm(x, weight, None, None, bias=bias, backend=backend)
    whole = lora_gemm(x, weight, A, B, bias=bias, factor=factor, backend=backend)
    assert torch.equal(whole[:3], base[:3]) and not torch.isclose(whole[3:], base[3:]).all(-1).any()
    for broken_A, broken_B in ((A.index_fill(0, torch.tensor([20], device=DEVICE), torch.nan), B), (A, B.clone())):
        if broken_A is A:
            broken_B[7, 20] = torch.inf
        y, s = lora_gemm(x, weight, broken_A, broken_B, bias=bias, factor=factor, with_s=True, backend=backend)
        assert torch.equal(y[:3], base[:3]) and (s[:3] == 0).all()
        torch.testing.assert_close(y[3], whole[3])
        assert not y[4:, 7].isfinite().any()


@linux
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_the_kernel_are_those_of_torch(monkeypatch, transposed):
    monkeypatch.setattr(PROCESSORS, lambda device: 3)
    for M, given_s in ((20, False), (70, False), (20, True)):
        x, weight, A, B, bias, factor = operands(M, 72, 136, 12, transposed, seed=M)
        s = torch.randn(M, 12, device=DEVICE) if given_s else None
        factor = None if given_s else factor
        results = []
        for backend in ("triton", "torch"):
            leaves = [t.clone().requires_grad_() for t in (x, weight, A, B, bias, *([s] if given_s else []))]
            y = lora_gemm(
                *leaves[:4], 0.5, bias=leaves[4], factor=factor, s=leaves[5] if given_s else None, transposed=transposed,
                backend=backend,
            )  # fmt: skip
            grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
            results.append([y.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
        for ours, twin in zip(*results, strict=True):
            torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)


@linux
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gradients_of_float32_adapters_beside_bfloat16_are_float32(backend):
    """Summed up in float32: not of a bfloat16 product that was widened."""
    x, weight, A, B, bias, _ = operands(40, 64, 128, 16, dtype=torch.bfloat16, adapter=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    y = lora_gemm(x, weight, A, B, 2.0, bias=bias, backend=backend)
    grad_x, grad_A, grad_B = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert (y.dtype, grad_x.dtype, grad_A.dtype, grad_B.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    assert not torch.equal(grad_A, grad_A.bfloat16().float()) and not torch.equal(grad_B, grad_B.bfloat16().float())
    s = 2.0 * x.double() @ A.double().t()
    torch.testing.assert_close(grad_B.double(), s.sum(0).expand(64, -1), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("given_s", [False, True])
def test_gradcheck(transposed, given_s):
    x, weight, A, B, bias, factor = operands(3, 4, 5, 2, transposed, torch.float64)
    s = torch.randn(3, 2, dtype=torch.float64, device=DEVICE)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, A, B, bias, s)]

    def function(x, weight, A, B, bias, s):
        if given_s:
            return lora_gemm(x, weight, A, B, bias=bias, s=s, transposed=transposed)
        return lora_gemm(x, weight, A, B, 0.7, bias=bias, factor=factor, transposed=transposed)

    inputs = leaves if given_s else [*leaves[:5], s.detach()]
    assert torch.autograd.gradcheck(function, inputs)
    for frozen in range(5):  # gradients that are made without that of x
        some = [tensor.detach().requires_grad_(i != frozen) for i, tensor in enumerate(leaves)]
        assert torch.autograd.gradcheck(function, some)


def test_the_torch_form_is_pefts_to_the_bit():
    x, weight, A, B, bias, _ = operands(7, 24, 16, 4)
    y, s = lora_gemm(x, weight, A, B, 0.3, bias=bias, with_s=True, backend="torch")
    assert torch.equal(y, F.linear(x, weight, bias) + F.linear(F.linear(x, A), B) * 0.3)
    assert torch.equal(s, F.linear(x, A) * 0.3)


@linux
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_shapes_and_strides(monkeypatch, backend):
    monkeypatch.setattr(PROCESSORS, lambda device: 3)
    x, weight, A, B, bias, factor = operands(6, 72, 64, 8)
    plain = lora_gemm(x, weight, A, B, bias=bias, factor=factor, backend=backend)
    shaped = lora_gemm(x.view(2, 3, 64), weight, A, B, bias=bias, factor=factor.view(2, 3, 8), backend=backend)
    assert torch.equal(shaped.view(6, 72), plain)
    # Parts of a padded buffer, as in `[S | X]` and `[B | W ; - | A]`, and what has no row of stride 1.
    buffer = torch.full((80, 88), torch.nan, device=DEVICE)
    buffer[:72, :8], buffer[:72, 8:72], buffer[72:, 8:72] = B, weight, A
    wide = torch.full((6, 80), torch.nan, device=DEVICE)
    wide[:, 16:] = x
    for x_view in (wide[:, 16:], x.t().contiguous().t()):
        y = lora_gemm(
            x_view, buffer[:72, 8:72], buffer[72:, 8:72], buffer[:72, :8], bias=bias, factor=factor, backend=backend
        )  # fmt: skip
        torch.testing.assert_close(y, plain)
    y = lora_gemm(x, weight.t().contiguous().t(), A, B, bias=bias, factor=factor, backend=backend)
    torch.testing.assert_close(y, plain)
    ones = lora_gemm(x, weight, A, B, bias=bias, factor=torch.ones(6, 1, dtype=torch.bool, device=DEVICE), backend=backend)
    torch.testing.assert_close(ones, lora_gemm(x, weight, A, B, bias=bias, backend=backend))
    # No rows; and gradients of none.
    none = x[:0].requires_grad_()
    y, s = lora_gemm(none, weight, A.requires_grad_(), B, with_s=True, backend=backend)
    assert y.shape == (0, 72) and s.shape == (0, 8)
    grads = torch.autograd.grad(y.sum(), (none, A))
    assert grads[0].shape == (0, 64) and (grads[1] == 0).all()


@linux
@pytest.mark.parametrize("sizes", [(9, 16), (16, 9), (1, 1)])
def test_sizes_that_the_kernel_does_not_take(sizes):
    N, K = sizes
    x, weight, A, B, bias, factor = operands(5, N, K, 3)
    ours, twin = (lora_gemm(x, weight, A, B, bias=bias, factor=factor, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(ours, twin)


@linux
def test_rows_further_apart_than_32_bits_reach(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(PROCESSORS, lambda device: 1)
    x, weight, A, B, bias, _ = operands(18, 24, 16, 8, dtype=torch.bfloat16)
    stride = 2**27
    memory = torch.empty(24 * stride, dtype=torch.bfloat16, device=DEVICE)  # 6 GiB of addresses
    for which, tensor in (("x", x), ("weight", weight)):
        far = memory.as_strided(tensor.shape, (stride, 1))
        far.copy_(tensor)
        assert (len(tensor) - 1) * stride > 2**31
        arguments = {"x": x, "weight": weight} | {which: far}
        y = lora_gemm(**arguments, lora_A=A, lora_B=B, bias=bias, backend="triton")
        assert torch.equal(y, lora_gemm(x, weight, A, B, bias=bias, backend="triton"))


@linux
@pytest.mark.parametrize("R", [8, 40])
def test_the_same_bits_twice_and_no_row_depends_on_others(monkeypatch, R):
    monkeypatch.setattr(PROCESSORS, lambda device: 20)
    x, weight, A, B, bias, _ = operands(12, 72, 520, R, dtype=torch.bfloat16)
    first, again = (lora_gemm(x, weight, A, B, bias=bias, backend="triton") for _ in range(2))
    x[:4], x[5:] = torch.nan, torch.inf
    other = lora_gemm(x, weight, A, B, bias=bias, backend="triton")
    assert torch.equal(first, again) and torch.equal(first[4], other[4])


@linux
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_once_for_every_number_of_rows(backend):
    _, weight, A, B, bias, _ = operands(1, 24, 16, 4)
    A, B = A.requires_grad_(), B.requires_grad_()

    def function(x, factor):
        return lora_gemm(x, weight, A, B, 0.5, bias=bias, factor=factor, with_s=True, backend=backend)

    calls = []
    for M in (3, 5, 6, 70):
        x, *_, factor = operands(M, 24, 16, 4, seed=M)
        calls.append((x.requires_grad_(), factor))
    helpers.assert_compiles_once(function, calls)


def test_autocast():
    x, weight, A, B, bias, _ = operands(4, 24, 16, 4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = lora_gemm(x, weight, A, B, bias=bias)
    half = lora_gemm(x.bfloat16(), weight.bfloat16(), A, B, bias=bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, half)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes"),
        ({"x": torch.ones(())}, r"x must have shape \[..., K\]"),
        ({"x": torch.ones(3, 9)}, r"x must have 8 columns \(K of weight\), got 9"),
        ({"weight": torch.ones(8)}, r"weight must have shape \[N, K\]"),
        ({"weight": torch.ones(16, 8).double()}, "weight must have the dtype of x"),
        ({"weight": torch.ones(16, 8, device="meta")}, "weight must be on the device of x"),
        ({"lora_A": torch.ones(4, 9)}, r"lora_A must have shape \[4, 8\]"),
        ({"lora_A": torch.ones(4)}, r"lora_A must have shape \[R, K\]"),
        ({"weight": None}, "weight must be a tensor, got NoneType"),
        ({"lora_A": None}, "lora_A must be given with lora_B, got None"),
        ({"lora_B": None}, "lora_B must be given with lora_A, got None"),
        ({"lora_B": torch.ones(16, 5)}, r"lora_B must have shape \[16, 4\]"),
        ({"lora_B": None, "s": torch.ones(3, 4)}, "s needs lora_B, got None"),
        ({"lora_A": None, "lora_B": None, "s": torch.ones(3, 4)}, "s needs lora_B, got None"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"bias": torch.ones(8)}, r"bias must have shape \[16\]"),
        ({"factor": torch.ones(2, 4)}, r"factor must broadcast to \[3, 4\]"),
        ({"factor": torch.ones(3, 4, dtype=torch.int64)}, "factor must be a bool or floating-point tensor"),
        ({"factor": torch.ones(3, 4), "s": torch.ones(3, 4)}, "factor must be None where s is given"),
        ({"s": torch.ones(3, 3)}, r"s must have shape \[3, 4\]"),
        ({"s": torch.ones(3, 4).double()}, "s must have the dtype of x"),
        ({"transposed": True}, r"x must have 16 columns \(N of weight\), got 8"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_wrong_arguments(wrong, message):
    right = {"x": torch.ones(3, 8), "weight": torch.ones(16, 8), "lora_A": torch.ones(4, 8), "lora_B": torch.ones(16, 4)}
    with pytest.raises(ValueError, match=message):
        lora_gemm(**(right | wrong))


@pytest.mark.parametrize("leaf", ["x", "lora_A", "lora_B"])
def test_differentiating_twice_raises(leaf):
    shapes = {"x": (3, 8), "weight": (16, 8), "lora_A": (4, 8), "lora_B": (16, 4)}
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()}
    arguments[leaf].requires_grad_()
    (grad,) = torch.autograd.grad(lora_gemm(**arguments).square().sum(), arguments[leaf], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"absmax": torch.zeros(9)}, r"weight.absmax must have shape \[8\]"),
        ({"absmax": None}, "weight.absmax must be a contiguous float32 tensor"),
        ({"packed": torch.zeros(256)}, "weight.packed must be a contiguous uint8 tensor"),
        ({"shape": 4}, r"weight.shape must be \(N, K\), got 4"),
        ({"blocksize": 48}, "weight.blocksize must be a power of two"),
        ({}, "dtype must be one of float32, bfloat16, float16, float64, got torch.int32"),
    ],
)
def test_wrong_weights_are_not_dequantised(wrong, message):
    right = NF4Weight(torch.zeros(256, dtype=torch.uint8), torch.zeros(8), (8, 64), 64)
    with pytest.raises(ValueError, match=message):
        right._replace(**wrong).dequantize(torch.float32 if wrong else torch.int32)


@linux
def test_every_launch_is_a_listed_configuration(monkeypatch):
    """In the types of its pointers, its constants and its alignment: what was compiled without a GPU is what runs on one."""
    from fastppo_kernels import _triton_lora_gemm as kernels
    from fastppo_kernels.lora_gemm import NF4Weight

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
    listed = list(kernels.configurations())
    launched = set()

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, num_warps, num_stages, **named):
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            for c in listed:
                if c.kernel is not self.kernel or (c.num_warps, c.num_stages) != (num_warps, num_stages):
                    continue
                pointers = {name: types[value.dtype] for name, value in given.items() if isinstance(value, torch.Tensor)}
                if all(given[name] == value for name, value in c.constants.items()) and pointers.items() <= c.signature.items():
                    assert given.keys() == c.signature.keys() | c.constants.keys()
                    assert all(given[name].data_ptr() % 16 == 0 for name in c.divisible)
                    launched.add(c.name)
                    return
            raise AssertionError(f"not listed: {self.kernel.__name__} {given}")

    for name in ("lora_gemm_kernel", "lora_finish_kernel"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))
    for dtype in (torch.float32, torch.bfloat16):
        for M, R, transposed, nf4, given_s, plain, processors in itertools.product(
            (5, 40, 70, 600), (4, 24, 40), *((False, True),) * 4, (1, 40)
        ):
            monkeypatch.setattr(PROCESSORS, lambda device, count=processors: count)
            x, weight, A, B, bias, factor = operands(M, 72, 128, R, transposed, dtype, torch.float32)
            if nf4:
                packed = torch.zeros(72 * 64, dtype=torch.uint8, device=DEVICE)
                weight = NF4Weight(packed, torch.ones(144, device=DEVICE), (72, 128))
            if not plain:  # rows that begin anywhere
                x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
            lora_gemm(
                x, weight, A, B, transposed=transposed, backend="triton", bias=None if plain else bias,
                factor=None if plain or given_s else factor, s=x.new_zeros(M, R) if given_s else None,
            )  # fmt: skip
    assert launched == {c.name for c in listed if " fp16" not in c.name}


def run(code: str) -> str:
    """In a process of its own: in this one the kernels may be those of triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux
def test_every_plan_is_a_listed_configuration_and_fills_the_gpu():
    run("""
from itertools import product
from fastppo_kernels import _triton_lora_gemm as kernels
listed = {}
for c in kernels.configurations():
    k = c.constants
    if "MODE" in k:
        kind = (c.signature["x"] == "*fp32", k["QUANTISED"], k["TRANSPOSED"])
        tile = kernels.Tile(k["BLOCK_M"], k["BLOCK_N"], k["BLOCK_K"], c.num_warps, c.num_stages)
        listed.setdefault(kind, set()).add((tile, k["MODE"], k["BLOCK_R"]))
used = {kind: set() for kind in listed}
sizes = (8, 512, 896, 3584, 18944, 152064)
for processors, rows, columns, contraction, rank, float32, quantised, transposed, given in product(
    (108, 132), (1, 16, 17, 64, 65, 8192), sizes, sizes, (0, 8, 32, 64, 128), *((False, True),) * 4
):
    given = given or rank == 0 or rows > 64
    plan = kernels.plan(rows, columns, contraction, rank, float32, quantised, transposed, given, processors)
    used[float32, quantised, transposed].add((plan.tile, plan.mode, plan.block_r))
    steps = -(-contraction // plan.tile.block_k)
    if plan.mode == 2:
        assert 1 <= plan.parts <= steps and (plan.parts - 1) * plan.span < steps <= plan.parts * plan.span
        tiles = -(-columns // plan.tile.block_n)
        if rows <= 16 and contraction >= 3584 and columns >= 512:  # a q, k or v projection of a 7B model
            assert 4 * tiles * plan.parts >= 3 * processors, (rows, columns, contraction, plan)
    else:
        assert rank <= plan.block_r or plan.mode == 0
assert used == listed, {kind: used[kind] ^ listed[kind] for kind in listed}
""")


@linux
def test_matrix_instructions_asynchronous_copies_and_64_bit_offsets():
    """sm_90 multiplies by groups of warps, sm_80 by warps; loads of the loop are asynchronous copies."""
    run("""
import re
from fastppo_kernels import _triton_lora_gemm as kernels, compile_report as report
named = {c.name: c for c in kernels.configurations()}
for name in ("bf16 in loop 16 16x64", "bf16 split 16x64", "fp16 given 256x128", "bf16 given 64x128 transposed"):
    configuration = named["lora_gemm_kernel " + name]
    for arch, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
        usage = report.usage(configuration, arch)
        assert usage.spilled == 0 and usage.shared <= report.SHARED_LIMIT[arch], usage
        kernel = report.compiled(configuration, arch)
        ptx = kernel.asm["ptx"]
        assert instruction in ptx and "cp.async.cg.shared.global" in ptx and usage.atomics == 0, (name, arch)
    products = re.findall("arith.muli .* : tensor<([0-9x]+)xi64>", kernel.asm["ttir"])
    assert any(shape.startswith("1x") for shape in products) and any(shape.endswith("x1") for shape in products), name
exact = report.compiled(named["lora_gemm_kernel fp32 given 64x64"], 90).asm
assert "tf32" not in exact["ptx"] and "fma.rn" in exact["ptx"]
""")


@pytest.mark.parametrize("bias", [torch.arange(32.0)[::2], torch.tensor(3.0).expand(16)])
def test_a_bias_of_any_stride(bias):
    x, weight, lora_A, lora_B = torch.randn(3, 16), torch.randn(16, 16), torch.randn(4, 16), torch.randn(16, 4)
    expected = x @ weight.t() + (x @ lora_A.t()) @ lora_B.t() + bias
    for op in (lora_gemm, lora_linear):
        got = op(x, weight, lora_A, lora_B, bias=bias, backend="triton")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_asking_whether_a_weight_fits_copies_nothing(monkeypatch):
    from fastppo_kernels import _triton_lora_gemm as kernels

    monkeypatch.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("a copy"))
    for weight in (torch.zeros(16, 16), torch.zeros(16, 16).t(), torch.zeros(16, 17)[:, 1:]):
        assert kernels.supported(torch.zeros(2, 16), weight, None, (16, 16), 64) == (weight.stride() == (16, 1))
