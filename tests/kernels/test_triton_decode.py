"""Attention of one new token a sequence in Triton against torch and float64, in the interpreter where there is no GPU."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import assert_as_good
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once
from helpers import poisoned as poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.gpu_checks.case import converted
from fastppo.model.attention import DecodeContext
from fastppo_kernels import decode_attention

pytestmark = TRITON_MARKS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def small_parts() -> Iterator[None]:
    """Parts of 32 keys, tiles of 16 rows and keys: little is then cut as often as much is."""
    from fastppo_kernels import _triton_decode as kernels

    own, root = kernels.own_tile, kernels.root_tile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PART", 32)
        patch.setattr(kernels, "ROOT_PART", 32)
        patch.setattr(kernels, "own_tile", lambda *how: own(*how)._replace(block_n=16))
        patch.setattr(kernels, "root_tile", lambda *how: root(*how)._replace(block_m=16, block_n=16))
        yield


@contextmanager
def row_by_row() -> Iterator[None]:
    """Products of one row at a time in the interpreter: BLAS, not a GPU, sums up a row by where in its tile it lies."""
    if DEVICE != "cpu":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def by_row(self: Any, a: Any, b: Any, acc: Any, *others: Any) -> Any:
        rows = [[TensorHandle(x.data[i : i + 1], x.dtype) for x in (a, acc)] for i in range(len(a.data))]
        found = [dot(self, row, b, sums, *others).data for row, sums in rows]
        return TensorHandle(np.concatenate(found), acc.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", by_row)
        yield


def cache(
    batch: int, root: int, places: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 32, v_dim: int | None = None,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Of lengths from 1 to `places`; what lies behind them is NaN and infinite."""
    generator = torch.Generator().manual_seed(seed)
    width = dim if v_dim is None else v_dim
    shapes = {
        "q": (batch, heads, dim), "k_root": (root, kv_heads, dim), "v_root": (root, kv_heads, width),
        "k_own": (batch, kv_heads, places, dim), "v_own": (batch, kv_heads, places, width),
    }  # fmt: skip
    made = {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name, shape in shapes.items()}
    lengths = torch.randint(1, places + 1, (batch,), generator=generator)
    for i, filled in enumerate(lengths.tolist()):
        made["k_own"][i, :, filled:] = math.nan
        made["v_own"][i, :, filled:] = math.inf
    return made | {"lengths": lengths.to(DEVICE)}


def paged(inputs: dict[str, Tensor], size: int, spare: float = math.nan) -> dict[str, Tensor]:
    """The same cache in pages of so many places, in any order; pages that nobody has, one of which stands in the table behind
    what is filled, hold `spare`."""
    batch, kv_heads, places, _ = inputs["k_own"].shape
    width = -(-places // size)
    order = torch.randperm(batch * width + 2, generator=torch.Generator().manual_seed(0))[: batch * width].to(DEVICE)
    used = order.view(batch, width)
    behind = torch.arange(width, device=DEVICE) * size >= inputs["lengths"][:, None]
    made = inputs | {"pages": used.masked_fill(behind, min(set(range(batch * width + 2)) - set(order.tolist()))).int()}
    for name in ("k_own", "v_own"):
        line = inputs[name].new_full((batch, kv_heads, width * size, inputs[name].shape[3]), spare)
        line[:, :, :places] = inputs[name]
        made[name] = line.new_full((batch * width + 2, kv_heads, size, line.shape[3]), spare)
        made[name][used] = line.view(batch, kv_heads, width, size, line.shape[3]).transpose(1, 2)
    return made


def clean(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With zeros behind the lengths: in the torch form 0 times infinity would count."""
    hidden = torch.arange(inputs["k_own"].shape[2], device=DEVICE)[None] >= inputs["lengths"][:, None]
    return inputs | {name: inputs[name].masked_fill(hidden[:, None, :, None], 0) for name in ("k_own", "v_own")}


def triton(inputs: dict[str, Tensor], **how: Any) -> Tensor:
    return decode_attention(**inputs, **how, backend="triton")


def assert_right(inputs: dict[str, Tensor], page: int | None = None, **how: Any) -> Tensor:
    """In lines, or pages of so many places: as exact as the torch form but for probabilities, which are rounded once more."""
    ours = triton(inputs, **how) if page is None else triton(paged(inputs, page), **how)
    twin = decode_attention(**clean(inputs), **how, backend="torch")
    exact = decode_attention(**converted(clean(inputs), torch.float64), **how, backend="torch")
    assert_as_good(ours, twin, exact, roundings=2)
    return ours


@settings(max_examples=30, deadline=None)
@given(
    batch=st.sampled_from([0, 1, 2, 5, 13]),
    root=st.sampled_from([0, 1, 16, 33, 64, 200]),
    places=st.sampled_from([1, 2, 16, 31, 33, 100]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 17]),
    dim=st.sampled_from([8, 32, 40, 64, 80]),
    v_dim=st.sampled_from([None, 8, 72]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.0, -0.3, 1]),
    window=st.sampled_from([None, 1, 3, 20, 48, 2**40]),
    softcap=st.sampled_from([None, 0.7, 30]),
    page=st.sampled_from([None, 1, 2, 8, 16, 128]),
    seed=st.integers(0, 100),
)
def test_odd_shapes(batch, root, places, kv_heads, group, dim, v_dim, dtype, scale, window, softcap, page, seed):
    inputs = cache(
        batch, root, places, heads=kv_heads * group, kv_heads=kv_heads, dim=dim, v_dim=v_dim, dtype=dtype, seed=seed
    )
    with small_parts():
        out = assert_right(inputs, page, scale=scale, window=window, softcap=softcap)
    assert out.shape == (batch, kv_heads * group, dim if v_dim is None else v_dim) and out.isfinite().all()


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (32, torch.bfloat16), (64, torch.float16), (64, torch.float32), (80, torch.bfloat16), (128, torch.bfloat16),
        (128, torch.float32), (256, torch.float16), (256, torch.float32),
    ],
)  # fmt: skip
@pytest.mark.parametrize("page", [None, 8])
def test_parts_and_tiles_of_the_size_used(dim, dtype, page):
    """Two parts of the cache, two of the root, and a last tile of each that is not full."""
    assert_right(cache(2, 270, 300, heads=7, kv_heads=1, dim=dim, dtype=dtype), page)
    assert_right(cache(3, 20, 7, heads=2, kv_heads=2, dim=dim, dtype=dtype), window=9, softcap=5.0)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_pages_hold_what_lines_hold(index, window, backend):
    """To the bit, wherever pages lie, with values of another size, and where one page is that of several sequences."""
    inputs = clean(cache(5, 20, 70, dim=16, v_dim=24, dtype=torch.float16))
    inputs["k_own"][1:3, :, :32], inputs["v_own"][1:3, :, :32] = inputs["k_own"][:1, :, :32], inputs["v_own"][:1, :, :32]
    inputs["lengths"] = torch.tensor([40, 33, 70, 1, 64], device=DEVICE)
    with small_parts(), row_by_row():
        wanted = decode_attention(**inputs, window=window, backend=backend)
        for size in (1, 4, 16, 32, 128):
            made = paged(inputs, size, spare=0.0 if backend == "torch" else math.nan)
            made["pages"] = made["pages"].to(index)
            shared = 32 // size
            made["pages"][1:3, :shared] = made["pages"][:1, :shared]
            out = decode_attention(**made, window=window, backend=backend)
            torch.testing.assert_close(out, wanted, rtol=0, atol=0 if backend == "triton" else 2e-3)


def test_pages_that_nothing_has_looked_at_do_not_lead_out_of_the_cache():
    from fastppo_kernels import _triton_decode

    inputs = paged(clean(cache(2, 5, 9)), 4, spare=0.0)
    first, last = 0, len(inputs["k_own"]) - 1
    tables = [torch.tensor([[a, b, b], [1, a, b]], device=DEVICE) for a, b in ((first, last), (-9, 10**6))]
    inputs["lengths"] = torch.tensor([9, 10], device=DEVICE)
    known = [x for name, x in inputs.items() if name != "pages"]
    assert torch.equal(*(_triton_decode.decode(*known, 0.3, None, None, table) for table in tables))


def test_a_long_root_is_cut_in_few_parts_and_a_tile_holds_many_sequences():
    with small_parts():
        assert_right(cache(9, 900, 5, heads=6, kv_heads=2, dim=16), window=600)


@pytest.mark.parametrize("window", [1, 17, 40, 75])
def test_a_window_that_ends_in_the_cache_or_in_the_root(window):
    inputs = cache(4, 48, 70, heads=3, kv_heads=1, dim=16)
    inputs["lengths"] = torch.tensor([1, 33, 64, 70], device=DEVICE)
    inputs["k_own"], inputs["v_own"] = torch.randn(2, *inputs["k_own"].shape, device=DEVICE)
    with small_parts():
        assert_right(inputs, window=window)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("root", "window"), [(0, None), (40, None), (40, 30)])
def test_what_lies_behind_the_lengths_changes_no_bit(root, window, index):
    inputs = cache(4, root, 70)
    inputs["lengths"] = inputs["lengths"].to(index)
    with small_parts():
        garbage, zeros = triton(inputs, window=window), triton(clean(inputs), window=window)
    assert garbage.isfinite().all() and torch.equal(garbage, zeros)


@pytest.mark.parametrize(
    ("window", "softcap", "dtype"), [(None, None, torch.float32), (50, 3.0, torch.bfloat16), (None, None, torch.float16)]
)
def test_a_sequence_does_not_depend_on_the_others_and_is_the_same_twice(window, softcap, dtype):
    """Alone, with a cache of just its length; in another order; beside sequences that are broken."""
    how = {"window": window, "softcap": softcap}
    inputs = cache(9, 70, 80, heads=6, kv_heads=2, dim=16, dtype=dtype)
    with small_parts(), row_by_row():
        together = triton(inputs, **how)
        assert torch.equal(triton(inputs, **how), together)
        for i in (0, 4, 8):
            filled = int(inputs["lengths"][i])
            alone = {name: x if "root" in name else x[i : i + 1] for name, x in inputs.items()}
            alone |= {name: alone[name][:, :, :filled] for name in ("k_own", "v_own")}
            assert torch.equal(triton(alone, **how)[0], together[i])
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        shuffled = {name: x if "root" in name else x[order] for name, x in inputs.items()}
        assert torch.equal(triton(shuffled, **how), together[order])
        broken = {name: x.clone() for name, x in inputs.items()}
        broken["k_own"][2, :, 0], broken["v_own"][5, 0, 0], broken["q"][7, 1] = math.nan, math.inf, math.inf
        out = triton(broken, window=None, softcap=softcap)
        twin = decode_attention(**clean(broken), softcap=softcap, backend="torch")
        whole = triton(inputs, window=None, softcap=softcap)
    torch.testing.assert_close(out.isfinite(), twin.isfinite(), rtol=0, atol=0)
    assert not out[2].isfinite().any() and not out[5, :3].isfinite().any()
    fine = out.isfinite().all(2)
    assert fine.sum() == 9 * 6 - 6 - 3 - 1 and torch.equal(out[fine], whole[fine])


def test_a_cache_with_room_to_grow_and_tensors_that_lie_otherwise():
    """As the sampler has it: the first places of the first slots, queries that are a view."""
    inputs = cache(3, 20, 40, dim=24)
    wanted = triton(inputs)
    roomy = dict(inputs)
    for name in ("k_own", "v_own"):
        large = torch.full((5, 2, 64, 24), math.nan, device=DEVICE)
        large[:3, :, :40] = inputs[name]
        roomy[name] = large[:3, :, :40]
    roomy["q"] = inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(triton(roomy), wanted)
    turned = {name: x.movedim(-1, 0).contiguous().movedim(0, -1) for name, x in inputs.items() if x.ndim > 1}
    assert torch.equal(triton(inputs | turned), wanted)
    shifted = {
        name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for name, x in inputs.items() if x.ndim > 1
    }
    assert torch.equal(triton(inputs | shifted), wanted)


def test_a_cache_of_more_than_2_to_the_31_entries():
    """Two sequences so far apart, in memory of which nothing else is touched."""
    inputs = cache(2, 0, 4, kv_heads=1, dim=8, dtype=torch.float16)
    wanted, far = triton(inputs), 2**31
    memory = torch.UntypedStorage(2 * (far + 64), device=DEVICE)
    for place, name in enumerate(("k_own", "v_own")):
        view = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(memory, 32 * place, (2, 1, 4, 8), (far, 32, 8, 1))
        inputs[name] = view.copy_(inputs[name])
    assert torch.equal(triton(inputs), wanted)


def test_lengths_that_nothing_has_looked_at_do_not_lead_out_of_the_cache():
    from fastppo_kernels import _triton_decode

    inputs = clean(cache(2, 5, 4))
    full, beyond = (inputs | {"lengths": torch.tensor([4, n], device=DEVICE)} for n in (4, 2**40))
    assert torch.equal(*(_triton_decode.decode(*x.values(), 0.3, None, None) for x in (full, beyond)))


@pytest.mark.parametrize("how", [{"dim": 12}, {"dim": 264}, {"v_dim": 4}, {"dtype": torch.float64}])
def test_what_there_is_no_kernel_for_takes_the_torch_form(how):
    inputs = clean(cache(2, 5, 9, **how))
    assert torch.equal(triton(inputs), decode_attention(**inputs, backend="torch"))


def test_a_gradient_that_is_wanted_is_that_of_the_torch_form():
    inputs = clean(cache(2, 5, 9))
    inputs["q"].requires_grad_()
    outs = [decode_attention(**inputs, backend=name).square().sum() for name in ("triton", "torch")]
    grads = [torch.autograd.grad(out, inputs["q"])[0] for out in outs]
    assert torch.equal(*grads) and grads[0].abs().max() > 0
    with torch.no_grad():
        assert not triton(inputs).requires_grad


def test_no_values():
    assert triton(clean(cache(2, 3, 4, v_dim=0))).shape == (2, 4, 0)


def test_the_sampler_decodes_through_it(monkeypatch):
    inputs = clean(cache(3, 11, 9))
    own = [(inputs["k_own"], inputs["v_own"])]
    new_k, new_v = torch.randn(2, 3, 2, 32, device=DEVICE)
    found = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("FASTPPO_KERNELS", backend)
        longest = int(inputs["lengths"].max())
        context = DecodeContext([(inputs["k_root"], inputs["v_root"])], own, inputs["lengths"], longest)
        found.append(context.attend(0, inputs["q"], new_k, new_v, scale=0.2, window=12))
    assert not torch.equal(*found)  # or both are one form
    torch.testing.assert_close(*found)


def test_compiles_without_a_break_and_once_for_all_sizes():
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (decode_attention(*tensors, window=6, softcap=2.0, backend="triton"),)

    assert_compiles_once(function, [tuple(cache(n, n + 3, n + 7).values()) for n in (2, 5, 9)])

    def in_pages(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (decode_attention(*tensors[:-1], pages=tensors[-1], backend="triton"),)

    assert_compiles_once(in_pages, [tuple(paged(cache(n, n + 3, n + 7), 8).values()) for n in (2, 5, 9)])


def test_an_unknown_back_end():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"):
        decode_attention(**clean(cache(1, 0, 1)), backend="cuda")


def test_keys_come_16_bytes_at_a_time_while_others_are_multiplied():
    """What a kernel that is bound by memory stands or falls with: nothing in the loop waits for what it loads."""
    code = """
import re
from fastppo_kernels import compile_report as report
names = [f"decode_{part}_kernel bf16 D{size}" for part in ("own", "root") for size in (64, 128)]
names += [f"decode_own_kernel bf16 D{size}, pages" for size in (64, 128)]
found = [configuration for configuration in report.every_configuration() if configuration.name in names]
assert len(found) == len(names)
for configuration in found:
    for arch in (80, 90):
        kernel = report.compiled(configuration, arch)
        sizes = re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global [^;]*?, (\\w+),", kernel.asm["ptx"])
        loop = kernel.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
        table = {"0x4"} if "pages" in configuration.name else set()
        assert set(sizes) == {"0x10"} | table and "dot" in loop and "tt.load" not in loop, (configuration.name, arch, sizes)
        assert sizes.count("0x10") >= 4 * sizes.count("0x4")
"""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
