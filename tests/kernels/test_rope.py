"""Rotary embedding: torch form, Triton kernel (interpreted without a GPU), Hugging Face's functions, plain float64."""

import helpers
import pytest
import torch
from exactness import assert_as_good
from helpers import DEVICE, TRITON_MARKS, assert_compiles_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels.rope import rope

pytestmark = TRITON_MARKS
poisoned = helpers.poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(shape: tuple[int, ...], rotary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """As Hugging Face makes them, of random positions."""
    positions = torch.randint(5000, shape, device=DEVICE)
    frequencies = 10000.0 ** -(torch.arange(0, rotary, 2, device=DEVICE) / rotary)
    angles = positions[..., None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, T, D] as complex numbers a + ib of the two halves, times cos + i sin."""
    half = cos.shape[-1] // 2
    turn = torch.complex(cos[..., :half].double(), sin[..., :half].double()).unsqueeze(1)
    out = []
    for x in (q, k):
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        out.append(torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1))
    return out[0], out[1]


def with_gradients(function, q: Tensor, k: Tensor, slopes: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k)
    grads = torch.autograd.grad(out, (q, k), [slope.to(x.dtype) for slope, x in zip(slopes, out, strict=True)])
    return *(x.detach() for x in out), *grads


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (14, 2), (20, 20)]),
    head_and_rotary=st.sampled_from([(2, 2), (16, 16), (64, 64), (64, 16), (80, 20), (128, 128), (96, 96), (256, 64)]),
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from([None, torch.float32]),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_as_good_as_torch(batch, tokens, heads, head_and_rotary, dtype, table_dtype, shared, seed):
    torch.manual_seed(seed)
    head, rotary = head_and_rotary
    q, k, *slopes = (torch.randn(batch, h, tokens, head, device=DEVICE).to(dtype) for h in heads * 2)
    cos, sin = tables((1 if shared else batch, tokens), rotary, table_dtype or dtype)
    ours = with_gradients(lambda q, k: rope(q, k, cos, sin, backend="triton"), q, k, slopes)
    twins = with_gradients(lambda q, k: rope(q, k, cos, sin, backend="torch"), q, k, slopes)
    exact = with_gradients(lambda q, k: plain(q, k, cos, sin), q.double(), k.double(), slopes)
    for result, twin, truth in zip(ours, twins, exact, strict=True):
        assert_as_good(result, twin, truth)


def test_the_torch_form_is_hugging_faces_to_the_bit():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    for dtype in DTYPES:
        q, k = (torch.randn(2, 7, h, 32).to(dtype).transpose(1, 2) for h in (4, 2))
        for theirs, rotary in ((llama.apply_rotary_pos_emb, 32), (neox.apply_rotary_pos_emb, 8)):
            cos, sin = (x.cpu() for x in tables((2, 7), rotary, dtype))
            for ours, expected in zip(rope(q, k, cos, sin, backend="torch"), theirs(q, k, cos, sin), strict=True):
                assert torch.equal(ours, expected) and ours.stride() == expected.stride()


def test_gradcheck_also_of_tables_whose_halves_differ():
    q, k = (torch.randn(2, h, 3, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    q, k, cos, sin = (x.detach().float().to(DEVICE) for x in (q, k, cos, sin))
    slopes = torch.randn_like(q), torch.randn_like(k)
    ours, twins = (
        with_gradients(lambda q, k: rope(q, k, cos, sin, backend=b), q, k, slopes)  # noqa: B023
        for b in ("triton", "torch")
    )
    torch.testing.assert_close(ours, twins, rtol=1e-5, atol=1e-6)


def test_packed_tokens_are_a_batch_of_one_and_slices_are_read_where_they_lie():
    fused = torch.randn(5, 8 * 16, device=DEVICE)
    q, k = fused[:, :64].view(5, 4, 16), fused[:, 64:96].view(5, 2, 16)
    cos, sin = tables((5,), 16)
    before, slopes = fused.clone(), (torch.randn_like(q), torch.randn_like(k))
    for backend in ("triton", "torch"):
        packed = with_gradients(lambda q, k: rope(q, k, cos, sin, backend=backend), q, k, slopes)  # noqa: B023
        as_batch = [x.transpose(0, 1)[None].double() for x in (q, k)]
        expected = with_gradients(
            lambda q, k: plain(q, k, cos[None], sin[None]), *as_batch, [x.transpose(0, 1)[None] for x in slopes]
        )
        for ours, truth in zip(packed, expected, strict=True):
            torch.testing.assert_close(ours.double(), truth[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(fused, before)
    assert rope(q, k, cos, sin, backend="triton")[0].is_contiguous()
    skipped = torch.randn(2, 3, 5, 32, device=DEVICE)[..., ::2]
    a, b = (rope(skipped, skipped, cos, sin, backend=backend)[1] for backend in ("triton", "torch"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiles_once_for_every_length_and_gives_the_same_bits_each_time():
    calls = []
    for tokens in (5, 9, 30, 12):
        q, k = (torch.randn(2, h, tokens, 16, device=DEVICE, requires_grad=True) for h in (4, 2))
        calls.append((q, k, *tables((2, tokens), 16)))
    assert_compiles_once(lambda q, k, cos, sin: rope(q, k, cos, sin, backend="triton"), calls)


def test_operator_keeps_torchs_rules():
    q, k = (torch.randn(2, 5, h, 16, device=DEVICE).transpose(1, 2).requires_grad_() for h in (4, 2))
    torch.library.opcheck(torch.ops.fastppo_kernels.rope, (q, k, *tables((2, 5), 16), False))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(5, 16)}, "q must have shape"),
        ({"k": torch.zeros(5, 2, 8)}, "k must have the shape of q"),
        ({"k": torch.zeros(5, 2, 16).half()}, "k must have the dtype of q"),
        ({"cos": torch.zeros(4, 16)}, r"cos must have shape \[5, R\]"),
        ({"cos": torch.zeros(5, 18), "sin": torch.zeros(5, 18)}, "R even and at most 16"),
        ({"sin": torch.zeros(5, 8)}, "sin must have shape"),
        ({"sin": torch.zeros(5, 16).half()}, "sin must have the dtype of cos"),
        ({"cos": torch.zeros(5, 16, requires_grad=True)}, "must not require a gradient"),
        ({"q": torch.zeros(5, 4, 16).int()}, "q must have one of the dtypes"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"q": torch.zeros(5, 4, 16), "k": torch.zeros(5, 2, 16), "cos": torch.zeros(5, 16), "sin": torch.zeros(5, 16)}
    with pytest.raises(ValueError, match=message):
        rope(**(arguments | change))
