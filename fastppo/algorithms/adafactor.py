"""Adafactor without a step size of its own, for all parameters of a shape at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Shazeer and Stern 2018, section 9 and algorithms 4 and 5: what squares of gradients are raised by, the exponent of the decay
# of their averages, and the root mean square that an update is clipped to.
EPS, DECAY, CLIP = 1e-30, 0.8, 1.0


class Adafactor(Optimizer):
    """Adafactor of Shazeer and Stern 2018 (arXiv 1804.04235), algorithms 4 (matrices) and 5 (vectors), with the given learning
    rate in place of relative steps; the same as transformers' ``Adafactor(scale_parameter=False, relative_step=False,
    warmup_init=False)``.

    A matrix [R, C] has means of its squared gradients by row [R] and by column [C] where Adam has two moments [R, C].
    Parameters of one shape are stepped together: launches are for each shape, not for each of hundreds of small matrices.

    Args:
        parameters: floating point, float32 where nothing else is wanted of them: averages have the dtype of the parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})
        # Its memory is taken now rather than in the first step, which could not be done again if there were none left.
        for p in parameters:
            # The count stays with the host, which computes with it: on the device each step would wait for it.
            self.state[p] = {"step": torch.zeros((), dtype=torch.int64)}
            if p.ndim >= 2:
                self.state[p] |= {"rows": p.new_zeros(p.shape[:-1]), "columns": p.new_zeros((*p.shape[:-2], p.shape[-1]))}
            else:
                self.state[p] |= {"squares": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[object, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:  # of what has none, as the policy while only the critic learns, nothing moves
                    self.state[p]["step"] += 1
                    alike.setdefault((p.shape, p.dtype, p.device, int(self.state[p]["step"])), []).append(p)
            for parameters in alike.values():
                self._step(parameters, group["lr"])
        return loss

    def _step(self, parameters: list[Tensor], lr: float) -> None:
        """Of N parameters of one shape that have had as many steps."""
        states = [self.state[p] for p in parameters]
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])  # [N, ..., R, C] or [N, L]
        new = float(states[0]["step"]) ** -DECAY  # of the averages: all of them in the first step
        squares = gradients.square().add_(EPS)

        def average(name: str, of: Tensor) -> Tensor:
            kept = torch.stack([state[name] for state in states]).lerp_(of, new)
            torch._foreach_copy_([state[name] for state in states], list(kept.unbind()))
            return kept

        if "rows" in states[0]:
            rows, columns = average("rows", squares.mean(-1)), average("columns", squares.mean(-2))
            update = gradients.mul_((rows / rows.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1))
            update.mul_(columns.rsqrt().unsqueeze(-2))
        else:
            update = gradients.mul_(average("squares", squares).rsqrt())
        each = tuple(range(1, update.ndim))
        size = update.square().mean(each, keepdim=True).sqrt_()  # the root mean square of each parameter's
        update.div_(size.div_(CLIP).clamp_(min=1.0))
        torch._foreach_add_(parameters, list(update.unbind()), alpha=-lr)
