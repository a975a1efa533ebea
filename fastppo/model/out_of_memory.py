"""Out of memory is no end: what failed is done again with half the micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import first_line

T = TypeVar("T")

# Of what torch raises as a plain RuntimeError: its allocator on the CPU, and cuBLAS where its workspace does not fit.
_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def with_less_memory(model: ActorCritic, phase: str, attempt: Callable[[], T]) -> T:
    """``attempt()``, and where memory runs out again with half the micro-batch, until it fits.

    Args:
        phase: what it does, for the notice: "sampling".
        attempt: begins anew each time and reads ``model.micro_batch_tokens`` then.

    Raises:
        UserError: the micro-batch is as small as it can be.
    """
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # Behind the handler: the error's traceback held the frames, and they the tensors, that filled the memory.
        model.halve_micro_batch(phase, reason)
