"""What the tests of several kernels share."""

import sys
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# For tests of Triton kernels; numpy, in triton's interpreter, warns of the NaN and infinities that they are about.
TRITON_MARKS = [
    pytest.mark.skipif(sys.platform != "linux", reason="there is no triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN and absurd integers, so that a place that no kernel writes is seen.

    For the tests of a module: `poisoned = helpers.poisoned`.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_compiles_once(function: Callable[..., tuple[Tensor, ...]], calls: Iterable[tuple]) -> None:
    """One graph without a break serves every call, forward and backward, with the same bits as without compilation.

    The first two calls may compile: the second is where torch sees what varies.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for arguments in calls:
        leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        outcomes = []
        for run in (function, compiled):
            outputs = run(*arguments)
            differentiable = [x.sum() for x in outputs if x.requires_grad]
            grads = torch.autograd.grad(sum(differentiable), leaves) if differentiable else ()
            outcomes.append((*outputs, *grads))
        for plain, traced in zip(*outcomes, strict=True):
            assert plain.dtype == traced.dtype and torch.equal(plain, traced)
        compilations.append(counter.frame_count)
    assert len(compilations) >= 3 and compilations[1] == compilations[-1], compilations
