"""Which implementation of an op runs: the Triton kernel or the torch twin.

The choice is made per call (``backend=``), else by the environment variable ``FASTPPO_KERNELS`` (empty: as if not set),
else by what is there: Triton for CUDA tensors where triton is installed, torch for everything else. Under
``TRITON_INTERPRET=1`` the Triton kernels also take CPU tensors, which is how they are tested without a GPU: in float32 and
float16, for the interpreter's matrix products of bfloat16 are wrong unless a test repairs them.
"""

import importlib
import importlib.util
import os
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
VARIABLE = "FASTPPO_KERNELS"


# Without importing it, which takes a moment; found out once, for torch.compile cannot trace the search.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Like(NamedTuple):
    """What the choice looks at in a tensor, without its memory."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def kernel_backends(device: torch.device) -> dict[str, str]:
    """For "triton" and "torch", each, "usable" for tensors on this device, or why it is not. Nothing is made on the device, but
    triton is imported for it."""
    like: Any = _Like(device)
    refusal = _refusal(like)
    if not refusal:
        try:
            importlib.import_module("triton")
        except (Exception, SystemExit) as error:  # a build for another system may fail in any way
            refusal = f"triton cannot be imported ({type(error).__name__}: {error})"
    return {"triton": refusal or "usable", "torch": "usable"}


def chosen_kernel_backend(device: torch.device, backend: Backend | None = None) -> str:
    """"triton" or "torch": what an op with a `backend` argument runs for tensors on this device, but for those dtypes and sizes
    that it has no kernel for. Nothing is made on the device.

    Raises:
        ValueError: an unknown back end, or ``triton`` where it cannot run.
    """
    like: Any = _Like(device)
    return "triton" if use_triton(like, backend) else "torch"


def _refusal(tensor: Tensor) -> str:
    """Why Triton's kernels cannot run on this; empty if they can."""
    if not tensor.is_cuda and not interpreting():
        return f"needs CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device}"
    return "" if _TRITON_INSTALLED else "triton is not installed"


def use_triton(tensor: Tensor, backend: Backend | None) -> bool:
    """Whether the op runs as a Triton kernel on this tensor.

    Raises:
        ValueError: an unknown back end, or ``triton`` where it cannot run.
    """
    name, wanted = ("backend", backend) if backend is not None else (VARIABLE, os.environ.get(VARIABLE) or "auto")
    if wanted not in get_args(Backend):
        raise ValueError(f"{name} must be one of {', '.join(get_args(Backend))}, got {wanted!r}")
    if wanted == "torch":
        return False
    if wanted == "auto":
        return tensor.is_cuda and _TRITON_INSTALLED
    if refusal := _refusal(tensor):
        raise ValueError(f"{name} 'triton': {refusal}")
    return True
