"""Autocast changes no bit of attention: scores and sums stay float32, and the result has the dtype of the queries."""

import random

import attention_libraries as libraries
import pytest
import torch
from test_attention import inputs, make_layout

from fastppo_kernels import _attention_torch
from fastppo_kernels import _attention_varlen as varlen
from fastppo_kernels._gather import gather_rows, occurrences
from fastppo_kernels.attention import attention, decode_attention, tree_attention


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def results(run, tensors, forward_inside, backward_inside):
    """The output and the gradients, of which each is made inside or outside of autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_inside):
        out = run(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        return [out, *torch.autograd.grad(out, tensors, weight)]


@pytest.mark.parametrize("backend", ["torch", "sdpa", *varlen.LIBRARIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_back_end(monkeypatch, backend, dtype):
    on = []  # whether autocast was on where a library was called
    if backend in varlen.LIBRARIES:
        libraries.install(monkeypatch, backend)
        library = type(varlen.LIBRARIES[backend])
        for name in ("forward", "backward"):
            original = getattr(library, name)

            def call(*arguments, original=original):
                on.append(torch.is_autocast_enabled("cpu"))
                return original(*arguments)

            monkeypatch.setattr(library, name, call)
    layout = make_layout(random.Random(1), root=4, segments=7, longest=4)
    tensors = inputs(layout, dim=8, dtype=dtype)
    tree = layout.cu_q, layout.cu_k, layout.kv_index
    for run in (
        lambda *t: tree_attention(*t, layout, backend=backend),
        lambda *t: attention(*t, *tree, root=4, backend=backend, **({"window": 3} if backend != "xformers" else {})),
    ):
        wanted = results(run, tensors, False, False)
        assert all(x.dtype == dtype for x in wanted)
        for inside in ((True, True), (True, False), (False, True)):
            for got, plain in zip(results(run, tensors, *inside), wanted, strict=True):
                assert got.dtype == dtype and torch.equal(got, plain)
    assert not any(on) and (on or backend not in varlen.LIBRARIES)


def test_the_operator_and_what_is_compiled():
    layout = make_layout(random.Random(2), root=3, segments=6, longest=4)
    tensors = inputs(layout, dim=8, dtype=torch.float32)
    tree = layout.cu_q, layout.cu_k, layout.kv_index, layout.root, layout.past

    def operator(*t):
        return _attention_torch.tree_attention_op(*t, *tree, 0.3, None, 2.0)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: tree_attention(*t, layout, softcap=2.0), backend="aot_eager", fullgraph=True)
    for run in (operator, compiled):
        wanted = results(run, tensors, False, False)
        for got, plain in zip(results(run, tensors, True, True), wanted, strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_decode(compiled):
    torch.manual_seed(0)
    q, lengths = torch.randn(3, 4, 8), torch.tensor([1, 5, 2])
    k_root, v_root, (k_own, v_own) = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.randn(2, 3, 2, 5, 8)
    torch._dynamo.reset()
    run = torch.compile(decode_attention, backend="eager", fullgraph=True) if compiled else decode_attention
    wanted = decode_attention(q, k_root, v_root, k_own, v_own, lengths, window=4)
    with bf16():
        got = run(q, k_root, v_root, k_own, v_own, lengths, window=4)
    assert got.dtype == torch.float32 and torch.equal(got, wanted)


def test_gathered_rows():
    index = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0))
    x, weight, where = torch.randn(5, 2, 3, requires_grad=True), torch.randn(40, 2, 3), occurrences(index, 5)
    (wanted,) = torch.autograd.grad(gather_rows(x, index, where), x, weight)
    with bf16():
        (got,) = torch.autograd.grad(gather_rows(x, index, where), x, weight)
    assert torch.equal(got, wanted)
