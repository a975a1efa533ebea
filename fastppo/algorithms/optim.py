"""The optimizer and its schedule, with a state that safetensors can hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastppo.algorithms.adafactor import Adafactor


def make_optimizer(parameters: list[nn.Parameter], lr: float, eps: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW (``eps`` is its) or ``adafactor``, without weight decay: adapters start at zero effect, need no pull towards it."""
    if kind == "adafactor":
        return Adafactor(parameters, lr)
    # Fused: all parameters in one launch, no temporaries, no word from the host.
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.0, fused=True)
    # Its memory is taken now rather than in the first step, which could not be done again if there were none left.
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Factor on the learning rate at ``step`` of ``total`` (from 0): a linear warm-up, then ``schedule``."""
    rising = math.ceil(total * warmup)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    progress = (step - rising) / max(1, total - rising)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by ``place/name``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{i}/{name}": value.detach().cpu().contiguous().clone()
        for i, p in enumerate(parameters)
        for name, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        place, name = key.split("/")
        optimizer.state[parameters[int(place)]][name].copy_(value)  # to where it lies: a count may be the host's
