"""Adafactor against transformers', against the formulas of its paper, and what it does where there is no gradient."""

import math

import pytest
import torch
from transformers import Adafactor as TransformersAdafactor

from fastppo.algorithms.adafactor import Adafactor
from fastppo.algorithms.optim import make_optimizer, optimizer_state

# Those of adapters (twice, as in two layers, and transposed), of the value head and its bias, and one of three dimensions.
SHAPES = [(4, 7), (4, 7), (7, 4), (1, 9), (1,), (5,), (2, 3, 4)]


def parameters_of(shapes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step, shape, i):
    generator = torch.Generator().manual_seed(100 * step + i)
    return torch.randn(shape, generator=generator) * 10.0 ** torch.randn((), generator=generator)


@pytest.mark.parametrize("late", [(), (1, 4)], ids=["all at once", "some without gradients at first"])
def test_the_same_as_transformers(late):
    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    optimizer = Adafactor(ours, 1e-2)
    reference = TransformersAdafactor(theirs, lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False)
    for step in range(30):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = None
            if i not in late or step >= 3:
                p.grad, q.grad = gradients(step, p.shape, i), gradients(step, p.shape, i)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        mine, other = optimizer.state[p], reference.state[q]
        assert int(mine["step"]) == other["step"]
        names = {"rows": "exp_avg_sq_row", "columns": "exp_avg_sq_col"} if p.ndim > 1 else {"squares": "exp_avg_sq"}
        for name, its in names.items():
            torch.testing.assert_close(mine[name], other[its], rtol=1e-5, atol=0)


def test_two_steps_of_a_matrix_by_the_formulas():
    """Algorithm 4 of the paper with a fixed rate, written out."""
    (p,) = parameters_of([(3, 2)])
    start, optimizer = p.detach().double(), Adafactor([p], 0.1)
    rows, columns, expected = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), start
    for step in (1, 2):
        p.grad = gradients(step, p.shape, 0)
        g = p.grad.double()
        beta = 1 - step**-0.8
        rows = beta * rows + (1 - beta) * (g**2 + 1e-30).mean(1)
        columns = beta * columns + (1 - beta) * (g**2 + 1e-30).mean(0)
        update = g / (rows[:, None] * columns[None, :] / rows.mean()).sqrt()
        expected = expected - 0.1 * update / max(1.0, math.sqrt((update**2).mean()))
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_no_update_is_larger_than_the_rate():
    """However large a gradient after small ones: the root mean square of what a matrix moves by is the rate at most."""
    (p,) = parameters_of([(6, 5)])
    optimizer = Adafactor([p], 1e-3)
    for step, size in enumerate((1e-3, 1e-3, 1e6)):
        before = p.detach().clone()
        p.grad = size * gradients(step, p.shape, 0)
        optimizer.step()
    assert float((p.detach() - before).square().mean().sqrt()) == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_of_zero_moves_nothing():
    """That of every A in the first step, where all B are zero."""
    (p,) = parameters_of([(4, 3)])
    before, optimizer = p.detach().clone(), Adafactor([p], 0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), before) and optimizer.state[p]["rows"].isfinite().all()


def test_it_keeps_rows_and_columns():
    matrix, vector = parameters_of([(4, 7), (5,)])
    optimizer = make_optimizer([matrix, vector], 1e-3, 1e-5, "adafactor")
    sizes = {name: tensor.numel() for name, tensor in optimizer_state(optimizer).items()}
    assert sizes == {"0/step": 1, "0/rows": 4, "0/columns": 7, "1/step": 1, "1/squares": 5}


def test_the_rate_is_that_of_the_step():
    (p,) = parameters_of([(4, 3)])
    before, optimizer = p.detach().clone(), make_optimizer([p], 0.0, 1e-5, "adafactor")
    p.grad = gradients(0, p.shape, 0)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert not torch.equal(p.detach(), before)
