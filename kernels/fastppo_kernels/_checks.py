"""Argument checks shared by the ops: one line that names the argument, what came and what is allowed.

Only shapes, dtypes, devices and Python numbers are looked at. Values of tensors are looked at on the CPU alone, where
it costs no synchronisation.
"""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is one."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_float(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a floating-point tensor."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must have one of the dtypes {_names(FLOAT_DTYPES)}, got {tensor.dtype}")


def check_index(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = INDEX_DTYPES) -> None:
    """Raise unless `tensor` is an integer tensor."""
    check_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must have one of the dtypes {_names(dtypes)}, got {tensor.dtype}")


def check_both(name: str, first: Tensor | None, second: Tensor | None) -> None:
    """Raise unless lora_A and lora_B are both given or both None; `name` comes before theirs."""
    if (first is None) != (second is None):
        missing, given = ("lora_A", "lora_B") if first is None else ("lora_B", "lora_A")
        raise ValueError(f"{name}{missing} must be given with {name}{given}, got None")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise unless `tensor` has exactly `shape`; `why` says where that shape comes from."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({why}), got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on the same device."""
    check_tensor(name, tensor)
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def check_number(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    """Raise unless `value` is a finite Python number within the limits."""
    limits = [f"> {above:g}"] if above is not None else []
    limits += [f">= {at_least:g}"] if at_least is not None else []
    limits += [f"<= {at_most:g}"] if at_most is not None else []
    # A comparison rather than math.isfinite, which torch.compile cannot trace.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    if (
        not is_number
        or (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (at_most is not None and value > at_most)
    ):
        raise ValueError(f"{name} must be a finite number {' and '.join(limits)}".rstrip() + f", got {value!r}")


def check_integer(name: str, value: int, *, at_least: int, at_most: int | None = None) -> None:
    """Raise unless `value` is a Python integer within the limits."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < at_least or (at_most is not None and value > at_most):
        allowed = f">= {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")


def check_range(name: str, index: Tensor, size: int, what: str) -> None:
    """On the CPU, raise unless every index is in [0, size).

    Left out on a GPU, where looking would synchronise, and while compiling, where it would break the graph.
    """
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= size:
            raise ValueError(f"{name} must be in [0, {size}) ({what}), got values from {low} to {high}")


def check_mask_argument(mask: Tensor | None, like_name: str, like: Tensor) -> None:
    """Raise unless `mask` is None, or bool or integer with the shape and device of `like`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a bool or integer tensor, got {came}")
    check_shape("mask", mask, tuple(like.shape), f"that of {like_name}")
    check_device("mask", mask, like_name, like)


def check_mask(mask: Tensor | None, like_name: str, like: Tensor) -> Tensor:
    """`mask` as bool, all true for None; raise unless it is bool or integer with the shape and device of `like`."""
    check_mask_argument(mask, like_name, like)
    return torch.ones(like.shape, dtype=torch.bool, device=like.device) if mask is None else mask != 0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
