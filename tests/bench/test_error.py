"""The rule by which a result is as exact as torch's."""

import math

import pytest
import torch

from bench.gpu_checks.error import measure, share

EXACT = torch.linspace(-2, 2, 1000, dtype=torch.float64)


def within(value, theirs, exact=EXACT, **how) -> bool:
    return share(measure(value, theirs, exact, **how)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_is_right_and_more_errors_are_not(dtype):
    once, eps = EXACT.to(dtype), torch.finfo(dtype).eps
    assert within(once, once) and within(once, once + 0)
    for wrong in (once + 4 * eps, once * (1 + 8 * eps), torch.where(torch.arange(1000) == 7, once + 30 * eps, once)):
        assert not within(wrong.to(dtype), once, tiny=1e-7)


def test_the_root_mean_square_sees_what_the_largest_error_does_not():
    """Cut off instead of rounded: at most one unit in the last place, twice the mean error."""
    bits = EXACT.float().view(torch.int32) & -65536
    cut, rounded = bits.view(torch.float32).bfloat16(), EXACT.bfloat16()
    figures = measure(cut, rounded, EXACT)
    assert figures["error"] <= figures["allowed"] and figures["rms_error"] > 1.3 * figures["rms_allowed"] and share(figures) > 1
    assert within(cut, rounded, roundings=3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_wrong_unless_it_is_right(wrong):
    values = torch.where(torch.arange(1000) == 3, wrong, EXACT)
    assert not within(values.float(), EXACT.float()) and within(values.float(), values.float(), values)
    assert not within(EXACT.float(), values.float(), values)
    assert not within(values.float(), values.float())  # nor is a torch form that is wrong a measure


def test_nothing_and_units_and_slack():
    assert within(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))
    one, exact = torch.full((4,), 1e-7), torch.zeros(4, dtype=torch.float64)
    assert not within(one, exact.float(), exact)
    assert within(one, exact.float(), exact, unit=1.0) and within(one, exact.float(), exact, slack=1e-6)
