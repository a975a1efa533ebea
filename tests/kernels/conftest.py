"""Fixtures for the tests of the kernels."""

import sys

import pytest

from fastppo_kernels._dispatch import interpreting


@pytest.fixture(autouse=True, scope="module")
def interpreter_as_exact_as_a_gpu():
    """bfloat16 as a GPU has it, wherever kernels run in triton's interpreter."""
    if not interpreting() or sys.platform != "linux":
        yield
        return
    from bench.gpu_checks.interpreter import exact_bfloat16

    with exact_bfloat16():
        yield
