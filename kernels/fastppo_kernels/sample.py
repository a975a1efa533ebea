"""Drawing the next token: Gumbel-max with counter-based noise.

There is no generator to seed, to advance or to save: all the state of a draw is (seed, sequence id, step), three numbers that
the caller has. The seed names the run, the id the sequence in it, the step the token in the sequence.
"""

from typing import Any

import torch
from torch import Tensor

from . import _rows
from ._checks import accumulate_dtype, check_device, check_float, check_index, check_integer, check_number, check_shape
from ._dispatch import Backend, use_triton
from ._eager import eager_or
from ._head_ops import _chunks, _Head
from ._philox import philox_4x32_10
from ._rows import Transform, normalise_
from .linear_logprob import checked_head

_WORD = 0xFFFFFFFF
# Words made at a time. On a CPU the temporaries then stay in its cache; elsewhere they are bounded.
_BLOCK_WORDS_CPU, _BLOCK_WORDS = 1 << 17, 1 << 24


def _minus_gumbel(vocab: int, seed: int, sequence_ids_B: Tensor, step_B: Tensor) -> Tensor:
    """Gumbel noise with its sign turned, log(-log(1 - u)), float32 [B, V]: 1 - u, as the large values then come from the fine
    end of u. For entry v, u is made of word v % 4 of counter (v // 4, step, id low, id high) with the seed as the key."""
    device, words = step_B.device, (vocab + 3) // 4
    index_1W, step_B1 = torch.arange(words, device=device)[None, :], step_B[:, None]
    low_B1, high_B1 = sequence_ids_B[:, None] & _WORD, (sequence_ids_B[:, None] >> 32) & _WORD
    if device.type == "cpu" and bool((high_B1 == high_B1[:1]).all()):  # as ever: the first two rounds are then next to nothing
        high_B1 = high_B1[:1].expand_as(high_B1)
    rows = max(1, (_BLOCK_WORDS_CPU if device.type == "cpu" else _BLOCK_WORDS) // vocab)
    noise_BW4 = torch.empty(len(step_B), words, 4, device=device)
    for start in range(0, len(step_B), rows):
        block = slice(start, start + rows)
        counter = (index_1W, step_B1[block], low_B1[block], high_B1[block])
        for place, word_BW in enumerate(philox_4x32_10(counter, (seed & _WORD, seed >> 32))):
            noise_BW4[block, :, place] = word_BW
    # u = (word + 1/2) / 2^32: near 0, where it decides, all 32 bits count; near 1 float32 would round up, hence the bound.
    minus_u_BV = noise_BW4.add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1).flatten(1)[:, :vocab]
    return minus_u_BV.log1p_().neg_().log_()


def _argmax(x_BV: Tensor) -> Tensor:
    """The lowest index of the largest entry in each row, of the first NaN where there is one."""
    # torch's own on a CPU is not vectorised; both take the same entry.
    return torch.from_numpy(x_BV.numpy().argmax(-1)) if x_BV.is_cpu else x_BV.argmax(-1)


def _restrict(z_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for what top-k, and then top-p of what is left, leave out."""
    if 0 < top_k < z_BV.shape[1]:
        smallest_kept_B1 = z_BV.topk(top_k, dim=-1).values[:, -1:]
        z_BV = z_BV.masked_fill(z_BV < smallest_kept_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = z_BV.sort(dim=-1, descending=True, stable=True)
        p_BV = sorted_BV.double().softmax(-1)
        before_BV = p_BV.cumsum(-1) - p_BV
        drop_BV = before_BV >= top_p  # never the first: nothing is before it
        z_BV = z_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -torch.inf)
    return z_BV


def _draw_(
    z_BV: Tensor, sequence_ids_B: Tensor, step_B: Tensor, temperature: float, top_k: int, top_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The torch form, for logits less their row's maximum, in float32 or float64, that are used up."""
    if temperature == 0:
        token_B = _argmax(z_BV)
    else:
        if temperature != 1:
            z_BV.div_(temperature)
        noise_BV = _minus_gumbel(z_BV.shape[1], seed, sequence_ids_B.long(), step_B.long() & _WORD)
        token_B = _argmax(torch.sub(_restrict(z_BV, top_k, top_p), noise_BV))
    z_token_B = z_BV.gather(1, token_B[:, None]).squeeze(1)
    logprob_B = z_token_B - normalise_(z_BV)[0]
    return torch.where(logprob_B.isnan(), 0, token_B), logprob_B


def _sample(
    logits_BV: Tensor,
    sequence_ids_B: Tensor,
    step_B: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    use_triton: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments are checked by the caller; `seed` is its 64 bits as a signed number."""
    if use_triton:
        from . import _triton_sample

        return _triton_sample.sample(
            logits_BV, None, 1.0, None, sequence_ids_B, step_B, temperature, top_k, top_p, seed
        )  # fmt: skip
    x_BV = logits_BV.to(accumulate_dtype(logits_BV.dtype))
    return _draw_(x_BV - x_BV.amax(-1, keepdim=True), sequence_ids_B, step_B, temperature, top_k, top_p, seed % 2**64)


def _outputs(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch = like.shape[0]
    return like.new_empty(batch, dtype=torch.int64), like.new_empty(batch, dtype=accumulate_dtype(dtype))


# Operators: torch.compile would unroll the blocks of noise and the chunks, whose number changes with that of the rows.
_sample_op = torch.library.custom_op("fastppo_kernels::sample", mutates_args=())(_sample)


@_sample_op.register_fake
def _(logits_BV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(logits_BV, logits_BV.dtype)


_call_sample = eager_or(_sample_op, _sample)


def _linear_sample(
    hidden_BH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lora_A_KH: Tensor | None,
    lora_B_VK: Tensor | None,
    lora_scale: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    logits_dtype: torch.dtype,
    sequence_ids_B: Tensor,
    step_B: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    use_triton: bool,
) -> tuple[Tensor, Tensor]:
    """As `_sample`, of the head's logits, a chunk of rows at a time."""
    head = _Head(weight_VH, bias_V, lora_A_KH, lora_B_VK, lora_scale, logits_dtype)
    bias, transform = head.rounded_bias(), Transform(logit_scale, temperature, softcap)
    token_B, logprob_B = _outputs(hidden_BH, weight_VH.dtype)
    for chunk in _chunks(len(hidden_BH), chunk_rows):
        logits_CV = head.logits(hidden_BH[chunk])
        how = (sequence_ids_B[chunk], step_B[chunk], temperature, top_k, top_p)
        if use_triton:
            from . import _triton_sample

            found = _triton_sample.sample(logits_CV, bias, logit_scale, softcap, *how, seed)
        else:
            x_CV = _rows._capped_(logits_CV, bias, transform, logprob_B.dtype)
            found = _draw_(x_CV.sub_(x_CV.amax(-1, keepdim=True)), *how, seed % 2**64)
        token_B[chunk], logprob_B[chunk] = found
        del logits_CV  # before the next chunk is made
    return token_B, logprob_B


_linear_sample_op = torch.library.custom_op("fastppo_kernels::linear_sample", mutates_args=())(_linear_sample)


@_linear_sample_op.register_fake
def _(hidden_BH: Tensor, weight_VH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(hidden_BH, weight_VH.dtype)


_call_linear_sample = eager_or(_linear_sample_op, _linear_sample)


def _check_draw(
    like_name: str,
    like: Tensor,
    vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    sequence_ids_B: Tensor,
    step_B: Tensor,
) -> tuple[Tensor, Tensor, float, int, float, int]:
    """Raise unless these are arguments for a draw; what the operators take from `sequence_ids_B` to `seed`."""
    for name, tensor in (("sequence_ids_B", sequence_ids_B), ("step_B", step_B)):
        check_index(name, tensor)
        check_shape(name, tensor, (like.shape[0],), f"one for each row of {like_name}")
        check_device(name, tensor, like_name, like)
    check_number("temperature", temperature, at_least=0)
    check_number("top_p", top_p, above=0, at_most=1)
    check_integer("top_k", top_k, at_least=0)
    check_integer("seed", seed, at_least=0, at_most=2**64 - 1)
    signed = seed - 2**64 if seed >= 2**63 else seed
    return sequence_ids_B, step_B, float(temperature), min(top_k, vocab), float(top_p), signed


@torch.no_grad()
def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    sequence_ids_B: Tensor,
    step_B: Tensor,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token from softmax(logits / temperature), restricted to top-k and top-p, and give its log-probability.

    The draw is argmax(logits / temperature + Gumbel noise); the noise depends on (seed, sequence id, step, token)
    alone, through Philox4x32-10. So a draw is the same in every batch and at every place in it. The random words are
    also the same on every device, the noise made of them equal up to the rounding of the device's logarithm.
    (seed, sequence_ids_B, step_B) are all the state there is: the same three give the same draw again, and the next
    token of a sequence is drawn with the next step. Two draws of one run must differ in sequence id or step.

    Args:
        logits_BV: [B, V], float32, bfloat16, float16 or float64; any strides. -inf entries are never drawn.
        temperature: >= 0; 0 takes the largest logit, the lowest index of equals.
        top_k: >= 0; keep the k largest logits, and all equal to the k-th; 0 (or >= V): all.
        top_p: in (0, 1]; of what top-k leaves (renormalised), keep the fewest tokens, most probable first, lower index
            first among equals, whose probabilities reach top_p; at least one; 1: all.
        seed: in [0, 2^64).
        sequence_ids_B: [B] int64 or int32; any number that names the sequence.
        step_B: [B] int64 or int32, the number of the token in its sequence (its low 32 bits count).
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. float64 logits always take
            the torch form. The Triton form makes the same draws, but for noise, or a share of top-p, that is equal to
            another to the last digits of float32.

    Returns:
        (token_B int64, logprob_B float32 (float64 for float64 logits)). The log-probability is that of the *full*
        vocabulary at `temperature` (at temperature 1 where it is 0), before top-k and top-p: the same number that
        `token_logprob` and `linear_logprob` give the trainer for these logits.
        A row with NaN or +inf, or of nothing but -inf, has no distribution: token 0 with log-probability NaN, for the
        caller to check when it next looks at the host.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    check_float("logits", logits_BV)
    if logits_BV.dim() != 2 or logits_BV.shape[1] == 0:
        raise ValueError(f"logits must have shape [B, V] with V >= 1, got {list(logits_BV.shape)}")
    vocab = logits_BV.shape[1]
    draw = _check_draw("logits", logits_BV, vocab, temperature, top_k, top_p, seed, sequence_ids_B, step_B)
    triton = use_triton(logits_BV, backend) and logits_BV.dtype != torch.float64
    return _call_sample(logits_BV.detach(), *draw, triton)


@torch.no_grad()
def linear_sample(
    hidden_BH: Tensor,
    weight_VH: Tensor,
    *,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    lora_scale: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    sequence_ids_B: Tensor,
    step_B: Tensor,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample` from hidden states and the LM head, whose logits are made a chunk of rows at a time, as `linear_logprob` does:

        logits = cap(logit_scale (hidden weight^T + lora_scale (hidden lora_A^T) lora_B^T + bias))

    Args:
        hidden_BH: [B, H], float32, bfloat16, float16 or float64; any strides.
        weight_VH, bias, lora_A, lora_B, lora_scale, softcap, logit_scale, chunk_rows, logits_dtype: as in `linear_logprob`.
        temperature, top_k, top_p, seed, sequence_ids_B, step_B: as in `sample`.
        backend: "auto", "triton" or "torch"; None: the environment's choice, see `_dispatch`. A float64 head always takes
            the torch form.

    Returns:
        (token_B int64, logprob_B float32 (float64 for a float64 head)), as in `sample`. The log-probability is the one that
        `linear_logprob` gives the token for the same rows, arguments and back end: in the torch form to the bit (at
        temperature 0: of temperature 1), in the Triton form to the rounding of float32. A product of other rows, or of
        another number of them, may be summed up in another order.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
    """
    check_float("hidden", hidden_BH)
    check_number("temperature", temperature, at_least=0)
    no_targets_B = hidden_BH.new_zeros(hidden_BH.shape[:1], dtype=torch.int64)
    head = checked_head(
        hidden_BH.detach(), weight_VH, no_targets_B, None, bias, lora_A, lora_B, lora_scale, temperature or 1.0, softcap,
        logit_scale, chunk_rows, logits_dtype,
    )  # fmt: skip
    vocab = weight_VH.shape[0]
    draw = _check_draw("hidden", hidden_BH, vocab, temperature, top_k, top_p, seed, sequence_ids_B, step_B)
    return _call_linear_sample(
        *head[:5], head.lora_scale, head.softcap, head.logit_scale, head.chunk_rows, head.logits_dtype, *draw,
        head.use_triton(backend),
    )  # fmt: skip
