"""What the checks (and measurements) of an op run: how inputs are made, what is called, and what it is held against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Results = dict[str, Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_CHECK = ("error", "determinism", "graph", "compile")


@dataclass(frozen=True)
class Case:
    """One op with inputs of one kind.

    name: what is printed. ops: the public names of `fastppo_kernels` that it runs.
    make: (device, dtype, seed) -> inputs by name. Shapes, and everything that is no tensor, are those of any other seed.
    forward: (inputs, backend) -> outputs by name; `backend` is "triton" or "torch".
    leaves: names of the inputs whose gradients belong to the results; or (inputs) -> those tensors by name, where they lie
        deeper than that.
    small: as `make`, of a size for triton's interpreter and for compute-sanitizer; None: there is no point in a small one.
    dtypes: of the inputs. checks: which of EVERY_CHECK apply.
    roundings: how often the op rounds to its dtype on the way where the torch form does not; or where rounding is the same
        only in distribution.
    slack: (name of a result, inputs) -> an error allowed on top, for sums whose rounding grows with their terms.
    keyed_by: an integer output; where its entries are not those of float64, other outputs are not compared.
    ties: share of the entries of an integer output that may be another (equal to the last digit) one.
    gibibytes: GPU memory that it needs, where that is much.
    """

    name: str
    ops: tuple[str, ...]
    make: Callable[[torch.device, torch.dtype, int], Inputs]
    forward: Callable[[Inputs, str], Results]
    leaves: tuple[str, ...] | Callable[[Inputs], Results] = ()
    small: Callable[[torch.device, torch.dtype, int], Inputs] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    checks: tuple[str, ...] = EVERY_CHECK
    roundings: int = 1
    slack: Callable[[str, Inputs], float] | None = None
    keyed_by: str | None = None
    ties: float = 0.0
    gibibytes: float = 0.0

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int, *, small: bool) -> Inputs:
        make = self.small if small else self.make
        assert make is not None, self.name
        return make(device, dtype, seed)

    @property
    def main_dtype(self) -> torch.dtype:
        return torch.bfloat16 if torch.bfloat16 in self.dtypes else self.dtypes[0]


def randn(device: torch.device, seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed and the shape, drawn in float32."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + sum(place * size for place, size in enumerate(shape, 7)))
    return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)


def randint(device: torch.device, seed: int, high: int, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + 17 * high + sum(shape))
    return torch.randint(high, shape, generator=generator, device=device)


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Inputs with every floating-point tensor as `dtype`; modules are copied; what lies in a tuple is left as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).to(dtype)
    if isinstance(value, dict):
        return {name: converted(item, dtype) for name, item in value.items()}
    return value


def _cotangent(out: Tensor, dtype: torch.dtype) -> Tensor:
    """What an output's gradient is started with: made on the device without random numbers, so that a graph can hold it.

    Rounded to `dtype` whatever the output's own is, so that all implementations start with the same numbers.
    """
    wave = torch.arange(out.numel(), device=out.device, dtype=torch.float32).mul_(1.7).cos_()
    return wave.to(dtype).to(out.dtype).view(out.shape)


def evaluate(case: Case, inputs: Inputs, backend: str, dtype: torch.dtype, forward: Any = None) -> Results:
    """Outputs, and gradients as "d NAME", all detached. `dtype`: of the case, also where these inputs are the float64 ones."""
    if callable(case.leaves):
        leaves = case.leaves(inputs)
    else:
        leaves = {name: inputs[name].detach().requires_grad_() for name in case.leaves}
        inputs = inputs | leaves
    outputs = (forward or case.forward)(inputs, backend)
    results = {name: out.detach() for name, out in outputs.items()}
    started = [out for out in outputs.values() if out.requires_grad]
    if leaves and started:
        cotangents = [_cotangent(out, dtype) for out in started]
        gradients = torch.autograd.grad(started, list(leaves.values()), cotangents, allow_unused=True)
        results |= {f"d {name}": grad for name, grad in zip(leaves, gradients, strict=True) if grad is not None}
    return results
