"""When a result is as exact as torch's: the one rule that the checks on a GPU and the tests of the kernels hold results to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of few errors, chance decides how large their root mean square is.
_FEW = 256


def _difference(value: Tensor, exact: Tensor) -> Tensor:
    """NaN counts as infinitely wrong, unless it is what is expected; so does an infinity."""
    value, exact = value.detach().double(), exact.detach().double()
    right = (value == exact) | (value.isnan() & exact.isnan())
    return torch.where(right, 0.0, value - exact).nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _sizes(x: Tensor) -> tuple[float, float]:
    """(largest magnitude, root mean square)."""
    if not x.numel():
        return 0.0, 0.0
    # Whole, not as a sum of squares of what overflows: an infinity stays one.
    return float(x.abs().max()), float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())


def measure(
    value: Tensor, theirs: Tensor, exact: Tensor, *, tiny: float = 2e-6, unit: float = 0.0, roundings: int = 1,
    slack: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """The errors of `value` and of the torch form's `theirs` against float64, and what `value` is allowed.

    Allowed are 1.2 times the torch form's errors: of their root mean square over all entries, which chance has no say in where
    there are many, and of the largest. What both may be off by beyond that:

    - `tiny` of the largest entry, or of `unit`, the size of what was subtracted to get the entries, where that is more: sums
      in float32 in another order;
    - the largest: in half precision, one rounding (half of the dtype's epsilon) of the largest entry. The right rounding of
      rounded factors is off by that where the torch form, rounded more often, happens to hit the number; and of two largest
      errors of one rounding each, chance has one 1.2 times the other.
    - `roundings` - 1 more of these, and in the root mean square as many of an entry of its size, where the op is known to round
      more often on the way than the torch form; and `slack` for sums whose errors grow with their terms.
    """
    error, rms_error = _sizes(_difference(value, exact))
    torch_error, rms_torch_error = _sizes(_difference(theirs, exact))
    largest, typical = _sizes(exact.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    half = value.element_size() == 2
    rounding = torch.finfo(value.dtype).eps / 2 if half else tiny
    little = tiny * max(largest, unit) + slack
    allowed = 1.2 * torch_error + little + (roundings if half else roundings - 1) * rounding * largest
    found = {"error": error, "torch_error": torch_error, "allowed": allowed, "largest": largest}
    if exact.numel() >= _FEW:
        allowed = 1.2 * rms_torch_error + little + (roundings - 1) * rounding * typical
        found |= {"rms_error": rms_error, "rms_torch_error": rms_torch_error, "rms_allowed": allowed}
    return found


def share(figures: dict[str, float]) -> float:
    """The error over what is allowed, of the largest or the root mean square, whichever is more: right up to 1."""
    pairs = [(figures[f"{kind}error"], figures[f"{kind}allowed"]) for kind in ("", "rms_") if f"{kind}error" in figures]
    # Where torch's own error is infinite there is nothing to hold this one to.
    return max(
        0.0 if error == 0 else error / allowed if 0 < allowed < math.inf and error < math.inf else math.inf
        for error, allowed in pairs
    )
