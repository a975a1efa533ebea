"""What a measured op is: inputs of some sizes, the forms that compute the same of them, and what none of them can beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Inputs = dict[str, Any]
Results = dict[str, Tensor]
Direction = Literal["fwd", "fwd+bwd"]
Make = Callable[[torch.device, torch.dtype], Inputs]
Run = Callable[[Inputs], Results]

OURS, COMPILED, LIMIT = "fastppo", "torch.compile", "limit"


@dataclass(frozen=True)
class Form:
    """One way to compute an op.

    run: inputs -> outputs by name; what of them requires a gradient is differentiated. Outputs that the reference does not
        have are not compared.
    peer: of `bench.peers`, where a package is needed. on_cpu: False for Triton kernels of others.
    directions: a form without a backward has the first only.
    """

    run: Run
    peer: str | None = None
    on_cpu: bool = True
    directions: tuple[Direction, ...] = ("fwd", "fwd+bwd")


@dataclass(frozen=True)
class Op:
    """One op of `fastppo_kernels`, and what it is measured against.

    sizes: device -> makers of inputs by the name of the size: those of DESIGN section 9 on a GPU, small ones on the CPU. Inputs
        that require a gradient are what backward gives gradients of.
    forms: by name, `OURS` among them, each a `Form` or its `run` alone. Those that overwrite inputs come last.
    limit: (inputs, direction) -> a call that does no more than the op has to: its bare matrix products, or a copy that moves as
        many bytes as it has to move. limit_is: that in words.
    reference: the form that the others' results are compared with.
    compiled: whether torch.compile of the reference is a form; on_cpu: on the CPU too, where a compilation takes long.
    comparable: (inputs, results) -> what of the results is compared, where that is not all of them as they are.
    tolerance: of the largest entry; more in half precision.
    """

    name: str
    family: str
    sizes: Callable[[torch.device], Mapping[str, Make]]
    forms: Mapping[str, Form | Run]
    limit: Callable[[Inputs, Direction], Callable[[], Any]]
    limit_is: str
    directions: tuple[Direction, ...] = ("fwd", "fwd+bwd")
    reference: str = "torch"
    compiled: bool = True
    compiled_on_cpu: bool = False
    comparable: Callable[[Inputs, Results], Results] | None = None
    tolerance: float = 5e-3

    @cached_property
    def all_forms(self) -> dict[str, Form]:
        """Every form, ours first, torch.compile of the reference included."""
        found = {name: form if isinstance(form, Form) else Form(form) for name, form in self.forms.items()}
        if self.compiled:
            plain = found[self.reference]
            found[COMPILED] = Form(torch.compile(plain.run, dynamic=False), plain.peer, self.compiled_on_cpu, plain.directions)
        return found


@dataclass(frozen=True)
class Entry:
    """One measurement: an op of one size in one direction, all forms side by side."""

    op: Op
    size: str
    direction: Direction
    make: Make

    def name(self, dtype: torch.dtype) -> str:
        return f"{self.op.name} {self.direction} {self.size} {DTYPE_NAMES[dtype]}"


DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def entries_of(op: Op, device: torch.device) -> Iterator[Entry]:
    for size, make in op.sizes(device).items():
        for direction in op.directions:
            yield Entry(op, size, direction, make)


def leaves(inputs: Inputs) -> list[Tensor]:
    """The inputs that backward gives gradients of, modules' parameters included, each once."""
    found: dict[int, Tensor] = {}
    for value in inputs.values():
        tensors = value.parameters() if isinstance(value, torch.nn.Module) else [value]
        found |= {id(x): x for x in tensors if isinstance(x, Tensor) and x.requires_grad}
    return list(found.values())


def call(run: Run, inputs: Inputs, direction: Direction) -> Callable[[], Results]:
    """What is timed. With backward: the outputs' gradients are ones that are there beforehand; returns the leaves' by place."""
    if direction == "fwd":

        def forward() -> Results:
            with torch.no_grad():
                return run(inputs)

        return forward
    wanted = leaves(inputs)
    starts: dict[str, Tensor] = {}

    def both() -> Results:
        outputs = run(inputs)
        ends = {name: out for name, out in outputs.items() if out.requires_grad}
        for name, out in ends.items():
            if name not in starts:
                starts[name] = _cotangent(out)
        gradients = torch.autograd.grad(list(ends.values()), wanted, [starts[name] for name in ends], allow_unused=True)
        found = {name: out.detach() for name, out in outputs.items()}
        return found | {f"gradient {i}": grad for i, grad in enumerate(gradients) if grad is not None}

    return both


def _cotangent(out: Tensor) -> Tensor:
    """Of all signs, so that errors do not hide in a sum."""
    with torch.no_grad():
        return torch.arange(out.numel(), device=out.device, dtype=torch.float32).mul_(1.7).cos_().to(out.dtype).view(out.shape)


def parameter(x: Tensor) -> Tensor:
    """x, of which a gradient is wanted."""
    return x.requires_grad_()


def by_device(
    make: Callable[..., Inputs], small: Mapping[str, dict[str, Any]], large: Mapping[str, dict[str, Any]]
) -> Callable[[torch.device], Mapping[str, Make]]:
    """`Op.sizes` from the arguments of one maker, by name, on the CPU and on a GPU."""

    def sizes(device: torch.device) -> Mapping[str, Make]:
        chosen = large if device.type == "cuda" else small
        return {name: _bind(make, arguments) for name, arguments in chosen.items()}

    return sizes


def _bind(make: Callable[..., Inputs], arguments: dict[str, Any]) -> Make:
    return lambda device, dtype: make(device, dtype, **arguments)


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)
