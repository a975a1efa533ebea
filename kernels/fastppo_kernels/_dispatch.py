"""Which implementation of an op runs: the Triton kernel or the torch twin.

The choice is made per call (``backend=``), else by the environment variable ``FASTPPO_KERNELS`` (empty: as if not set),
else by what is there: Triton for CUDA tensors where triton is installed, torch for everything else. Under
``TRITON_INTERPRET=1`` the Triton kernels also take CPU tensors, which is how they are tested without a GPU: in float32 and
float16, for the interpreter's matrix products of bfloat16 are wrong unless a test repairs them.
"""

import importlib.util
import os
from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
VARIABLE = "FASTPPO_KERNELS"


# Without importing it, which takes a moment; found out once, for torch.compile cannot trace the search.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    if not tensor.is_cuda and not interpreting():
        raise ValueError(f"{name} 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device}")
    if not _TRITON_INSTALLED:
        raise ValueError(f"{name} 'triton': triton is not installed")
    return True
