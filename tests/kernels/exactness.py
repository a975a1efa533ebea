"""What results are held to, in the interpreter and on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.gpu_checks.error import measure, share


def assert_as_good(
    ours: Tensor | Sequence[Tensor],
    twin: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    tiny: float = 1e-6,
    unit: float = 1.0,
    roundings: int = 1,
) -> None:
    """Of the torch form's shape and dtype, and as exact: see `bench.gpu_checks.error.measure` for the rule."""
    for results in zip(*([x] if isinstance(x, Tensor) else x for x in (ours, twin, exact)), strict=True):
        value, theirs, truth = results
        assert value.dtype == theirs.dtype and value.shape == theirs.shape == truth.shape
        figures = measure(value, theirs, truth, tiny=tiny, unit=unit, roundings=roundings)
        assert share(figures) <= 1, figures


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
