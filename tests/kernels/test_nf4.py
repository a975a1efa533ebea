"""Weights in 4 bits: their layout is that of bitsandbytes, and the kernel dequantises them as the torch form does."""

import os
import subprocess
import sys

import helpers
import pytest
import torch
from exactness import assert_as_good
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_gemm import PROCESSORS, exact, operands

from fastppo_kernels.lora_gemm import NF4_CODE, NF4Weight, lora_gemm

poisoned = helpers.poisoned
linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random_weight(N, K, blocksize, seed=0) -> NF4Weight:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((N * K + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-N * K // blocksize), generator=generator) / K**0.5 + 0.01
    return NF4Weight(packed.to(DEVICE), absmax.to(DEVICE), (N, K), blocksize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "blocksize"), [(3, 64, 64), (5, 7, 16), (1, 1, 2), (4, 100, 32), (2, 96, 128)])
def test_dequantisation_is_its_definition(monkeypatch, N, K, blocksize, dtype):
    monkeypatch.setattr(sys.modules["fastppo_kernels.lora_gemm"], "_ENTRIES", 130)  # a few pieces
    weight = random_weight(N, K, blocksize)
    expected = torch.empty(N * K)
    for i in range(N * K):
        byte = int(weight.packed[i // 2])
        expected[i] = torch.tensor(NF4_CODE[byte >> 4 if i % 2 == 0 else byte & 15]) * weight.absmax[i // blocksize].cpu()
    found = weight.dequantize(dtype)
    assert found.dtype == dtype and torch.equal(found.cpu(), expected.view(N, K).to(dtype))


def test_the_code_is_that_of_quantiles_of_the_normal_distribution():
    """Appendix E of the paper: 8 and 9 quantiles of either sign, 0 in both, the largest 1."""
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(offset, 0.5, 9).double())[:-1]
    lower = -normal.icdf(torch.linspace(offset, 0.5, 8).double())[:-1]
    code = torch.cat([lower, torch.zeros(1), upper]).sort().values / upper.max()
    torch.testing.assert_close(torch.tensor(NF4_CODE).double(), code, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("N", "K", "blocksize"), [(48, 128, 64), (7, 128, 128), (300, 64, 64)])
def test_the_layout_is_that_of_bitsandbytes(N, K, blocksize, nested, dtype):
    """Where blocks end with rows: bitsandbytes' own CPU kernel is wrong for those that do not."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    torch.manual_seed(N)
    original = torch.randn(N, K, dtype=dtype)
    theirs = Params4bit(original, requires_grad=False, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    with pytest.raises(ValueError, match="must be a quantised bitsandbytes Params4bit"):
        NF4Weight.from_bitsandbytes(theirs)
    theirs = theirs.to("cpu")
    assert theirs.quant_state.nested == nested
    ours = NF4Weight.from_bitsandbytes(theirs)
    assert ours.shape == (N, K) and ours.blocksize == blocksize and ours.absmax.shape == (-(-N * K // blocksize),)
    assert ours.packed.data_ptr() == theirs.data.data_ptr()
    expected = dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(ours.dequantize(dtype), expected)
    x = torch.randn(3, K, dtype=dtype)
    assert torch.equal(lora_gemm(x, ours, None, None), x @ expected.t())


def test_other_4_bit_types_are_refused():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(torch.randn(8, 64), requires_grad=False, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="weight must have quant_type 'nf4', got 'fp4'"):
        NF4Weight.from_bitsandbytes(weight)
    with pytest.raises(ValueError, match="must be a quantised bitsandbytes Params4bit, got Tensor"):
        NF4Weight.from_bitsandbytes(torch.randn(8, 64))


@linux
@settings(max_examples=20, deadline=None)
@given(
    M=st.sampled_from([1, 16, 33, 70]),
    N=st.sampled_from([8, 72, 136]),
    K=st.sampled_from([64, 192, 320]),
    R=st.sampled_from([0, 4, 16, 40]),
    blocksize=st.sampled_from([64, 128, 1024]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    processors=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_the_kernel_is_as_exact_as_torch(M, N, K, R, blocksize, transposed, dtype, processors, seed):
    x, _, A, B, bias, factor = operands(M, N, K, R, transposed, dtype, seed=seed)
    weight = random_weight(N, K, blocksize, seed)
    how = {"bias": bias, "transposed": transposed}
    adapter = (A, B) if R else (None, None)
    factor = factor if R else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PROCESSORS, lambda device: processors)
        ours = lora_gemm(x, weight, *adapter, 0.5, factor=factor, **how, with_s=True, backend="triton")
    twin = lora_gemm(x, weight, *adapter, 0.5, factor=factor, **how, with_s=True, backend="torch")
    truth = exact(x, weight.dequantize(dtype), A, B, 0.5, factor=factor, **how)
    assert_as_good(ours, twin, truth)


@linux
def test_gradients(monkeypatch):
    monkeypatch.setattr(PROCESSORS, lambda device: 3)
    for M, transposed in ((10, False), (70, True)):
        x, _, A, B, bias, factor = operands(M, 72, 128, 8, transposed)
        weight = random_weight(72, 128, 64)
        results = []
        for kind, backend in ((weight, "triton"), (weight, "torch"), (weight.dequantize(torch.float32), "torch")):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B, bias)]
            y = lora_gemm(
                leaves[0], kind, leaves[1], leaves[2], bias=leaves[3], factor=factor, transposed=transposed, backend=backend
            )
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for ours, twin, dense in zip(*results, strict=True):
            torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
            assert torch.equal(twin, dense)


@linux
@pytest.mark.parametrize(("N", "K", "blocksize"), [(16, 96, 64), (16, 64, 32), (9, 64, 64)])
def test_layouts_that_the_kernel_does_not_take(N, K, blocksize):
    x, _, A, B, bias, _ = operands(5, N, K, 4)
    weight = random_weight(N, K, blocksize)
    ours, twin = (lora_gemm(x, weight, A, B, bias=bias, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(ours, twin)


@linux
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_once_for_every_number_of_rows(backend):
    weight = random_weight(24, 64, 64)
    _, _, A, B, bias, _ = operands(1, 24, 64, 4)

    def function(x):
        return (lora_gemm(x, weight, A, B, 0.5, bias=bias, backend=backend),)

    helpers.assert_compiles_once(function, [(torch.randn(M, 64, device=DEVICE).requires_grad_(),) for M in (3, 5, 6, 70)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"packed": torch.zeros(256)}, "weight.packed must be a contiguous uint8 tensor"),
        ({"packed": torch.zeros(512, dtype=torch.uint8)[::2]}, "weight.packed must be a contiguous uint8 tensor"),
        ({"packed": torch.zeros(255, dtype=torch.uint8)}, "weight.packed must have 256 entries .*, got 255"),
        ({"absmax": torch.zeros(8).double()}, "weight.absmax must be a contiguous float32 tensor"),
        ({"absmax": torch.zeros(9)}, r"weight.absmax must have shape \[8\]"),
        ({"absmax": torch.zeros(8, device="meta")}, "weight.absmax must be on the device of weight.packed"),
        ({"shape": (8, 64, 1)}, r"weight.shape must be \(N, K\)"),
        ({"shape": (0, 64)}, r"weight.shape\[0\] must be an integer >= 1"),
        ({"blocksize": 48}, "weight.blocksize must be a power of two, got 48"),
        ({"blocksize": 1}, "weight.blocksize must be an integer >= 2"),
    ],
)
def test_wrong_weights(wrong, message):
    right = NF4Weight(torch.zeros(256, dtype=torch.uint8), torch.zeros(8), (8, 64), 64)
    with pytest.raises(ValueError, match=message):
        lora_gemm(torch.ones(3, 64), right._replace(**wrong), None, None)


@linux
def test_codes_are_looked_up_on_the_chip():
    """Not in memory; what is copied ahead are the bytes, not weights."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = """
from fastppo_kernels import _triton_lora_gemm as kernels, compile_report as report
named = {c.name: c for c in kernels.configurations()}
for name in ("in loop 16 16x64", "given 128x128 transposed"):
    configuration = named["lora_gemm_kernel bf16 nf4 " + name]
    for arch, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
        usage = report.usage(configuration, arch)
        assert usage.spilled == 0 and usage.shared <= report.SHARED_LIMIT[arch], usage
        ptx = report.compiled(configuration, arch).asm["ptx"]
        assert instruction in ptx and "ld.global.b8" not in ptx and "cp.async" in ptx, (name, arch)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
