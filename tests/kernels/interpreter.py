"""What triton's interpreter needs to be held to the same limits as a GPU, and the limits."""

import pytest
import torch
from helpers import DEVICE
from torch import Tensor


@pytest.fixture(autouse=True)
def exact_bfloat16(monkeypatch):
    """The interpreter cuts float32 off to bfloat16 where a GPU rounds, and its dot multiplies bfloat16 as if their bits were
    integers: mend both, so that bfloat16 can be tested as strictly as float16.

    For the tests of a module: `exact_bfloat16 = interpreter.exact_bfloat16`.
    """
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
            return TensorHandle(bits, dst_type.scalar)
        return cast(self, src, dst_type)

    def widened(self, x):
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def float_dot(self, a, b, d, *others):
        return dot(self, widened(self, a), widened(self, b), d, *others)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", float_dot)


def assert_as_good(ours: Tensor, twin: Tensor, exact: Tensor, tiny: float = 1e-6, unit: float = 1.0) -> None:
    """The largest error is at most 1.2 times the torch form's and a little: tiny times the largest entry, or times `unit`, the
    size of what was subtracted to get the entries, where that is more.

    In half precision half of the dtype's epsilon of the largest entry is added, at most a unit in the last place: what even the
    right rounding of rounded factors is off by where the torch form, rounded more often, happens to hit the number.
    """
    assert ours.dtype == twin.dtype and ours.shape == twin.shape == exact.shape
    if exact.numel():
        error, allowed = ((x.detach().double() - exact.detach()).abs().max() for x in (ours, twin))
        largest = exact.detach().abs().max()
        little = tiny * max(largest, unit) + (torch.finfo(ours.dtype).eps / 2 * largest if ours.element_size() == 2 else 0)
        assert error <= 1.2 * allowed + little, (float(error), float(allowed))


def assert_rounded_once(ours: Tensor, exact: Tensor, slack: float = 1e-6) -> None:
    """Every entry is within half a unit in its last place, and the slack of a float32 sum, of the exact one.

    For columns made of what was itself rounded before: held to these, rather than to the torch form, which may be lucky.
    """
    assert ours.shape == exact.shape
    limits = torch.finfo(ours.dtype)
    ulp = torch.exp2(exact.abs().clamp(min=limits.smallest_normal).log2().floor()) * limits.eps
    error = (ours.double() - exact).abs() - 0.5 * ulp
    if exact.numel():
        assert ours.isfinite().all() and error.max() <= slack * exact.abs().max().clamp(min=1), float(error.max())
