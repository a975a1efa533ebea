"""Triton's interpreter as exact as a GPU in bfloat16, so that both can be held to the same limits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """As it comes, it cuts float32 off to bfloat16 where a GPU rounds, multiplies matrices of bfloat16 as if their bits were
    integers, and has no constants of bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
            return TensorHandle(bits, dst_type.scalar)
        return cast(self, src, dst_type)

    def float_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    def constant(self: Any, value: float) -> Any:
        return rounding_cast(self, self.get_fp32(value), tl.bfloat16)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, float_dot
    InterpreterBuilder.get_bf16 = constant
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
        del InterpreterBuilder.get_bf16
