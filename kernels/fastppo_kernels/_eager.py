"""Operators as plain functions where nothing is traced: on a CPU the dispatch of a custom operator costs 20 to 100 us of host
time, more than the arithmetic of a small call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Other classes (fake, functional, distributed tensors, user's own) are for the dispatcher.
_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(like: Tensor) -> bool:
    """Whether an op on this tensor may run as a plain function: an ordinary CPU tensor, nothing traced or transformed."""
    return (
        not torch.compiler.is_compiling()
        and type(like) in _PLAIN
        and like.is_cpu
        and not torch._C._are_functorch_transforms_active()
    )


def eager_or(
    operator: Callable[..., Any],
    function: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A call of `function` where `is_eager` says so of the first argument, of `operator`, which is made of it, elsewhere.

    Args:
        setup_context: as for `register_autograd`. None: the op has no gradient.
        gradients: (ctx, saved tensors, gradients of the outputs) -> those of the inputs; once differentiable.
    """
    if setup_context is None or gradients is None:
        return lambda *inputs: function(*inputs) if is_eager(inputs[0]) else operator(*inputs)

    setup: Callable[..., None] = setup_context

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = function(*inputs)
            setup(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            # What was saved is passed on, so that differentiating again raises whatever of it requires a gradient.
            return once(ctx, len(grads), *grads, *ctx.saved_tensors)

    @once_differentiable
    def once(ctx: Any, count: int, *tensors: Tensor) -> Any:
        return gradients(ctx, tensors[count:], tensors[:count])

    def call(*inputs: Any) -> Any:
        if not is_eager(inputs[0]):
            return operator(*inputs)
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
            return Eager.apply(*inputs)
        return function(*inputs)

    return call
