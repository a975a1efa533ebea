"""One way in which a Triton kernel can be compiled: what the dispatcher can choose, for the compile report and its test."""

from typing import Any, NamedTuple


class Configuration(NamedTuple):
    """A kernel with everything that Triton specialises it on.

    name: what the report prints. kernel: the `triton.jit` function. signature: the type of every run-time argument, such as
    ``{"logits": "*bf16", "vocab": "i32"}``, in any order. constants: the value of every `tl.constexpr` argument, and of
    arguments that are None. divisible: names of the run-time arguments taken as multiples of 16 (pointers: of 16 bytes).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
