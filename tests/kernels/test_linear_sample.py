"""linear_sample: the draws of `sample` from the head's logits, with the log-probabilities that the trainer computes."""

import sys

import pytest
import torch
from torch import Tensor

from fastppo_kernels import linear_logprob, linear_sample, sample

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no triton"))]


def head(rows: int = 7, width: int = 16, vocab: int = 301, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"hidden": new(rows, width), "weight": new(vocab, width), "bias": new(vocab), "A": new(4, width), "B": new(vocab, 4)}


def where(rows: int) -> dict[str, Tensor]:
    return {"sequence_ids_B": torch.arange(rows) + 2**40, "step_B": torch.arange(rows)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}])
@pytest.mark.parametrize("extras", [{}, {"softcap": 4.0, "logit_scale": 0.5}])
def test_draws_are_those_of_sample_and_logprobs_those_of_the_trainer(backend, how, extras):
    h = head()
    own = {"bias": h["bias"], "lora_A": h["A"], "lora_B": h["B"], "lora_scale": 0.5, **extras}
    token, logprob = linear_sample(
        h["hidden"], h["weight"], **own, **how, seed=3, **where(7), chunk_rows=3, backend=backend
    )
    logits = extras.get("logit_scale", 1.0) * (h["hidden"] @ (h["weight"] + 0.5 * h["B"] @ h["A"]).t() + h["bias"])
    if "softcap" in extras:
        logits = extras["softcap"] * torch.tanh(logits / extras["softcap"])
    expected, _ = sample(logits, **how, seed=3, **where(7), backend="torch")
    assert torch.equal(token, expected)
    temperature = how.get("temperature", 1.0) or 1.0
    trained, _ = linear_logprob(
        h["hidden"], h["weight"], token, **own, temperature=temperature, chunk_rows=3, backend=backend
    )
    torch.testing.assert_close(logprob, trained, rtol=0 if backend == "torch" else 3e-7, atol=0 if backend == "torch" else 1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no triton")
def test_a_row_gives_the_same_bits_in_parts_and_whole(monkeypatch):
    """Few rows are split over several programs, many are not: a draw may not depend on the batch it is in."""
    from fastppo_kernels import _triton_sample

    h = head(rows=2, width=8, vocab=2 * _triton_sample.PART + 77)
    run = lambda: linear_sample(h["hidden"], h["weight"], bias=h["bias"], seed=5, **where(2), backend="triton")  # noqa: E731
    parts = run()
    monkeypatch.setattr(_triton_sample, "FEW_ROWS", 0)
    monkeypatch.setattr(_triton_sample._largest_kernel, "run", None)  # split rows would fail here
    whole = run()
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_half_precision(backend):
    h = head()
    token, logprob = linear_sample(h["hidden"][:0], h["weight"], seed=1, **where(0), backend=backend)
    assert token.shape == logprob.shape == (0,) and token.dtype == torch.int64 and logprob.dtype == torch.float32
    half = {name: tensor.bfloat16() for name, tensor in h.items()}
    token, logprob = linear_sample(half["hidden"], half["weight"], seed=1, **where(7), backend=backend)
    trained, _ = linear_logprob(half["hidden"], half["weight"], token, backend=backend)
    torch.testing.assert_close(logprob, trained, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend):
    h = head()
    draw = lambda hidden, ids, step: linear_sample(  # noqa: E731
        hidden, h["weight"], seed=2, sequence_ids_B=ids, step_B=step, top_k=5, backend=backend
    )
    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 3, 5):
        inputs = (h["hidden"][:rows], *where(rows).values())
        for ours, eager in zip(compiled(*inputs), draw(*inputs), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_k": -1}, "top_k"), ({"seed": -1}, "seed"),
        ({"sequence_ids_B": torch.arange(3)}, "sequence_ids_B"), ({"step_B": torch.zeros(7)}, "step_B"),
        ({"chunk_rows": 0}, "chunk_rows"), ({"softcap": 0.0}, "softcap"), ({"bias": torch.zeros(3)}, "bias"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(wrong, message):
    h = head()
    with pytest.raises(ValueError, match=message):
        linear_sample(h["hidden"], h["weight"], **({"seed": 1, **where(7)} | wrong))
