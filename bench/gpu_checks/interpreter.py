"""Triton's interpreter as exact as a GPU in bfloat16, so that both can be held to the same limits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """As it comes, it cuts float32 off to bfloat16 where a GPU rounds, multiplies matrices of bfloat16 as if their bits were
    integers, and has no constants of bfloat16."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert, dot = interpreter._convert_float, builder.create_dot

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16) or str(mode).endswith("RTZ"):
            return convert(data, source, target, mode)
        return torch.tensor(data).bfloat16().view(torch.uint16).numpy()  # a copy: what is broadcast has no memory of its own

    def float_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    def constant(self: Any, value: float) -> Any:
        return self.cast_impl(self.get_fp32(value), tl.bfloat16)

    with (
        patch.object(interpreter, "_convert_float", rounded),
        patch.object(builder, "create_dot", float_dot),
        patch.object(builder, "get_bf16", constant, create=True),
    ):
        yield
