"""Drawing the next token: Gumbel-max with counter-based noise."""

import torch
from torch import Tensor

from ._checks import accumulate_dtype, check_device, check_float, check_index, check_integer, check_number, check_shape
from ._dispatch import Backend, use_triton
from ._philox import philox_4x32_10
from ._rows import normalise_, shift_

_WORD = 0xFFFFFFFF
# Words made at a time. On a CPU the temporaries then stay in its cache (twice as fast); elsewhere they are bounded.
_BLOCK_WORDS_CPU, _BLOCK_WORDS = 1 << 17, 1 << 24


def _uniform(vocab: int, seed: int, sequence_ids_B: Tensor, step_B: Tensor) -> Tensor:
    """Uniform in (0, 1), float32 [B, V]: entry v is word v % 4 of counter (v // 4, step, id low, id high), key seed."""
    block_V = torch.arange((vocab + 3) // 4, device=step_B.device)[None, :]
    counter = (block_V, step_B[:, None], sequence_ids_B[:, None] & _WORD, (sequence_ids_B[:, None] >> 32) & _WORD)
    words = philox_4x32_10(counter, (seed & _WORD, seed >> 32))
    word_BV = torch.stack(words, dim=-1).flatten(1)[:, :vocab]
    # (word + 1/2) / 2^32: near 0, where it decides, all 32 bits count; near 1 float32 would round up, hence the bound.
    return word_BV.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)


def _gumbel(vocab: int, seed: int, sequence_ids_B: Tensor, step_B: Tensor) -> Tensor:
    """Gumbel noise -log(-log(1 - u)), float32 [B, V]: 1 - u, as the large values then come from the fine end of u."""
    noise_BV = torch.empty(len(step_B), vocab, device=step_B.device)
    rows = max(1, (_BLOCK_WORDS_CPU if noise_BV.device.type == "cpu" else _BLOCK_WORDS) // vocab)
    for start in range(0, len(step_B), rows):
        block = slice(start, start + rows)
        u_BV = _uniform(vocab, seed, sequence_ids_B[block], step_B[block])
        noise_BV[block] = u_BV.neg_().log1p_().neg_().log_().neg_()
    return noise_BV


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
    batch, vocab = logits_BV.shape
    for name, tensor in (("sequence_ids_B", sequence_ids_B), ("step_B", step_B)):
        check_index(name, tensor)
        check_shape(name, tensor, (batch,), "one for each row of logits")
        check_device(name, tensor, "logits", logits_BV)
    check_number("temperature", temperature, at_least=0)
    check_number("top_p", top_p, above=0, at_most=1)
    check_integer("top_k", top_k, at_least=0)
    check_integer("seed", seed, at_least=0, at_most=2**64 - 1)

    if use_triton(logits_BV, backend) and logits_BV.dtype != torch.float64:
        from . import _triton_sample

        signed = seed - 2**64 if seed >= 2**63 else seed
        return _triton_sample.sample(
            logits_BV.detach(), sequence_ids_B, step_B, float(temperature), top_k, float(top_p), signed
        )

    z_BV = logits_BV.to(accumulate_dtype(logits_BV.dtype), copy=True)
    if temperature == 0:
        z_BV = shift_(z_BV, 1.0, None)
        token_B = z_BV.argmax(-1)
    else:
        z_BV = shift_(z_BV, temperature, None)
        noise_BV = _gumbel(vocab, seed, sequence_ids_B.long(), step_B.long() & _WORD)
        token_B = noise_BV.add(_restrict(z_BV, top_k, top_p)).argmax(-1)
    z_token_B = z_BV.gather(1, token_B[:, None]).squeeze(1)
    log_sum_B, _ = normalise_(z_BV)
    logprob_B = z_token_B - log_sum_B
    return torch.where(logprob_B.isnan(), 0, token_B), logprob_B
