"""Out of memory is no end: what failed is done again, smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastppo.batch.rollout import MiniBatch
from fastppo.errors import UserError, is_out_of_memory
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import first_line

T = TypeVar("T")


def with_less_memory(model: ActorCritic, phase: str, attempt: Callable[[], T], shrink: Callable[[], str | None]) -> T:
    """``attempt()``, and where memory runs out again with less at a time, until it fits; a line of notice each time.

    Args:
        phase: what it does, for the notice: "sampling".
        attempt: begins anew each time.
        shrink: makes the next attempt, and all that comes later in the run, smaller and says how; None: it cannot.

    Raises:
        UserError: it cannot be made smaller.
    """
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # Behind the handler: the error's traceback held the frames, and they the tensors, that filled the memory.
        # First what is there for speed alone goes; the next attempt is then no smaller.
        how = "no CUDA graphs of the update" if model.graphs is not None and model.graphs.drop() else shrink()
        if how is None:
            raise UserError(
                f"out of memory while {phase}, even one sample at a time ({reason}); "
                "lower --max-prompt-tokens, --sample-max-new-tokens or --lora-rank, or take a smaller --model"
            )
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        model.notify(f"out of memory while {phase}: done again, and the run goes on, with {how}")


def shrink_micro_batch(model: ActorCritic, minibatches: Sequence[MiniBatch]) -> str | None:
    """Half of the largest micro-batch of these that can be cut."""
    parts = [part for mini in minibatches for part in mini.parts]
    sizes = [model.tokens_of(part.tree) for part in parts if len(part.samples) > 1]
    if not sizes:
        return None
    model.most_tokens = max(sizes) // 2
    return f"micro-batches of {model.most_tokens:,} tokens instead of {max(sizes):,}"
