"""How CUDA graphs are made, and of which models they can be: for the update's micro-batches and for steps of decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VARIABLE = "FASTPPO_CUDA_GRAPHS"

# Rotary embeddings that do not ask the host how long the sequences are.
ROPES = ("default", "linear", "llama3", "yarn")


class Maker:
    """Makes graphs that share their memory: only one runs at a time, and what it leaves lies in memory from before."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.aside: Any = None  # one stream for all: each that ever multiplied keeps a workspace

    def make(self, step: Callable[[], None]) -> Callable[[], None]:
        """What runs ``step`` again, which it is once while the graph is made.

        Raises:
            RuntimeError: the step cannot be a graph, or there is no memory for it. Nothing of the attempt is left.
            BaseException: what ``step`` raised.
        """
        here = torch.cuda.current_stream()
        if self.pool is None:
            self.pool, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.aside.wait_stream(here)
        try:
            with torch.cuda.stream(self.aside):  # what is compiled, measured or allocated at a first call must be there before
                step()
        finally:
            here.wait_stream(self.aside)
        graph = torch.cuda.CUDAGraph()
        why: BaseException | None = None
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.aside, capture_error_mode="thread_local"):
                try:
                    step()
                except BaseException as error:
                    why = error
                    raise
        except BaseException as error:
            torch.cuda.set_stream(here)  # which torch does not return to where the end of a capture fails
            _abandon(here.device_index, self.pool)
            self.pool = None
            if why is None or why is error:
                raise
            raise why from None  # the end of a capture says no more than that something failed before it
        finally:
            del why  # or it would hold this frame, which holds it, and what the step had made
        return graph.replay


def _abandon(device: int, pool: Any) -> None:
    """End a capture that CUDA has broken off, as far as torch's allocator is concerned.

    `CUDAGraph::capture_end` ends the capture first and, if that fails, raises: the allocator goes on to send what captures ask
    for to the pool, and counts the graph as one of its users for ever. Both are undone here. If it comes farther, it does that
    itself, or the graph does when it goes; the allocator then says that it sends nothing there.
    """
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return
    torch._C._cuda_releasePool(device, pool)
