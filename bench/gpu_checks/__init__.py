"""Checks of every op of `fastppo_kernels` on a GPU: the cases, a file for each kind of op, and what is checked of each."""

from .case import Case


def cases() -> list[Case]:
    """Every case, in the order in which they are checked: what must work first, each op once before any comes again."""
    from . import decoder, heads, layers, lora, losses, models, trees

    found = [case for module in (heads, losses, lora, layers, trees, decoder, models) for case in module.cases()]
    first = {case.ops: case for case in reversed(found)}
    return sorted(found, key=lambda case: case is not first[case.ops])


__all__ = ["Case", "cases"]
