"""Blocks of a trunk computed again in backward, so that of each only what it starts from is kept (Chen et al. 2016, arXiv
1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


class Recompute(NamedTuple):
    """active: makes a context in which a block runs as it did before, with the adapter of then. offload: whether what blocks
    start from waits for backward in the host's memory."""

    active: Callable[[], AbstractContextManager[Any]]
    offload: bool = False

    def kept_on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Where tensors that are saved within are kept."""
        return save_on_cpu(pin_memory=device.type == "cuda") if self.offload else nullcontext()


class _Again(torch.autograd.Function):
    """Not `torch.utils.checkpoint`: `decoder_layer` keeps the graph of its attention by itself, out of reach of hooks."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], active: Callable[[], Any], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.active, ctx.parameters = run, active, parameters
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        with torch.enable_grad(), ctx.active():
            x = ctx.saved_tensors[0].detach().requires_grad_(needs[0])
            out = ctx.run(x)
        wanted = [tensor for tensor, need in zip((x, *ctx.parameters), needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad_out, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needs)


def again(run: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], how: Recompute) -> Tensor:
    """run(x), of which x alone is kept; run is called once more in backward, and gives the same bits if it does so twice.

    Args:
        parameters: all tensors besides x that run is to be differentiated in.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (trained or x.requires_grad):
        return run(x)
    with how.kept_on(x.device):  # when the function is applied, not within its forward, are tensors saved
        return _Again.apply(run, how.active, x, *trained)


@contextmanager
def modules_again(blocks: Sequence[nn.Module], how: Recompute | None, device: torch.device) -> Iterator[None]:
    """Within, the forward of these modules keeps only their inputs; without blocks, or None for how, nothing changes but
    where tensors are kept."""
    if how is None:
        yield
        return
    for block in blocks:
        block.forward = partial(_block_again, block, how)
    try:
        with how.kept_on(device):
            yield
    finally:
        for block in blocks:
            del block.forward


def _block_again(block: nn.Module, how: Recompute, *args: Any, **kwargs: Any) -> Any:
    run = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    return checkpoint(
        run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), how.active()), **kwargs
    )
