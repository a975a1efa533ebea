"""What the choice between kernels and their torch twins says of itself."""

import sys

import pytest
import torch

from fastppo_kernels import (
    _attention_torch,
    _dispatch,
    chosen_decode_backend,
    chosen_kernel_backend,
    decode_attention,
    kernel_backends,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    for name in ("TRITON_INTERPRET", "FASTPPO_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(not _dispatch._TRITON_INSTALLED, reason="needs triton")
def test_triton_is_for_gpus_and_the_interpreter(monkeypatch):
    assert kernel_backends(CUDA) == {"triton": "usable", "torch": "usable"}
    assert kernel_backends(CPU)["triton"] == "needs CUDA tensors (or TRITON_INTERPRET=1), got cpu"
    assert (chosen_kernel_backend(CUDA), chosen_kernel_backend(CPU)) == ("triton", "torch")
    assert chosen_kernel_backend(CUDA, "torch") == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_backends(CPU)["triton"] == "usable"
    assert (chosen_kernel_backend(CPU), chosen_kernel_backend(CPU, "triton")) == ("torch", "triton")


def test_without_triton_and_with_a_broken_one(monkeypatch):
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", True)
    monkeypatch.setitem(sys.modules, "triton", None)  # what import takes for a package that cannot be imported
    assert kernel_backends(CUDA)["triton"].startswith("triton cannot be imported (ModuleNotFoundError: ")
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", False)
    assert kernel_backends(CUDA)["triton"] == "triton is not installed"
    assert chosen_kernel_backend(CUDA) == "torch"
    with pytest.raises(ValueError, match="^backend 'triton': triton is not installed$"):
        chosen_kernel_backend(CUDA, "triton")


def test_a_wrong_choice_names_where_it_was_made(monkeypatch):
    monkeypatch.setenv("FASTPPO_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"^FASTPPO_KERNELS 'triton': needs CUDA tensors \(or TRITON_INTERPRET=1\), got cpu$"):
        chosen_kernel_backend(CPU)
    monkeypatch.setenv("FASTPPO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="^FASTPPO_KERNELS must be one of auto, triton, torch, got 'cuda'$"):
        chosen_kernel_backend(CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [8, 12, 256, 264])
def test_what_decoding_takes_is_what_it_says(dtype, dim, monkeypatch):
    monkeypatch.setenv("FASTPPO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", True)
    taken = []
    monkeypatch.setattr(_attention_torch, "_decode", lambda q, *_: taken.append("triton") or q)
    q, root, own = (torch.zeros(shape, dtype=dtype) for shape in ((1, 2, dim), (0, 2, dim), (1, 2, 1, dim)))
    decode_attention(q, root, root, own, own, torch.ones(1, dtype=torch.int64))
    assert chosen_decode_backend(CPU, dtype, dim) == (taken or ["torch"])[0]
    assert chosen_decode_backend(CPU, dtype, 8, 12) == chosen_decode_backend(CPU, dtype, dim, backend="torch") == "torch"
    monkeypatch.delenv("FASTPPO_KERNELS")
    assert chosen_decode_backend(CPU, dtype, dim) == "torch"
    assert (chosen_decode_backend(CUDA, dtype, dim) == "triton") is (dtype != torch.float64 and dim in (8, 256))
