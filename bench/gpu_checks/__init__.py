"""Checks of every op of `fastppo_kernels` on a GPU: the cases, a file for each kind of op, and what is checked of each."""

from .case import Case


def cases() -> list[Case]:
    """Every case, in the order in which they are checked."""
    from . import heads, layers, lora, losses, models, trees

    return [case for module in (heads, losses, lora, layers, trees, models) for case in module.cases()]


__all__ = ["Case", "cases"]
