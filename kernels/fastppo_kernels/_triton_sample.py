"""Drawing the next token as one Triton launch: one program sweeps one row of logits a few times.

    sweep 1                 the largest logit
    sweeps for top-k        find the key of the k-th largest logit (11 sweeps, whatever V and k)
    sweeps for top-p        find the key of the last token that belongs to the nucleus (1 + 11 sweeps, 1 for its ties)
    last sweep              the softmax's sum, and argmax(z + Gumbel noise) over what is left

z = (logit - largest) / temperature <= 0, so the bits of |z| as an integer, its *key*, order the tokens: the smaller the key,
the more probable. "The largest key with less than a given weight before it" is found three bits a sweep, by adding up the
weights before 8 candidates at once, with weight 1 for top-k and exp(z) for top-p. Ties are then those of equal keys, exactly.

A row is read from L2 after the first sweep. Sums go by lane and block, in a fixed order: the same inputs give the same bits.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration

# With these nothing spills; a row keeps 256 threads of an SM busy, and its sums and best tokens stay in registers.
BLOCK = 1024
_WARPS = 8
_INFINITE = tl.constexpr(0x7F800000)  # the key of -inf
_SWEEPS = tl.constexpr(11)  # 31 bits, three at a time


@triton.jit
def _z(row_ptr, start, vocab, maximum, temperature, BLOCK: tl.constexpr):
    """A block of (logit - maximum) / temperature, -inf beyond the row."""
    offset = start + tl.arange(0, BLOCK)
    logit = tl.load(row_ptr + offset, mask=offset < vocab, other=-float("inf")).to(tl.float32)
    z = logit - maximum
    # Rounded as IEEE says, so that ties and (but for its logarithms) draws are those of the torch form.
    z = tl.div_rn(z, temperature)
    return tl.where(offset < vocab, z, -float("inf"))


@triton.jit
def _key(z):
    return z.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _last_key(
    row_ptr, vocab, maximum, temperature, last, limit, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest key before which tokens (of keys up to `last`) weigh less than `limit`, and what they weigh."""
    digit = tl.arange(0, 8)
    key = tl.full([], 0, tl.int32)
    before = tl.full([], 0.0, tl.float64)
    for sweep in range(0, _SWEEPS):
        shift = tl.maximum(28 - 3 * sweep, 0)
        candidate = key + (digit << shift)
        lanes = tl.zeros([BLOCK, 8], dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            z = _z(row_ptr, start, vocab, maximum, temperature, BLOCK)
            here = _key(z)
            weight = tl.where((start + tl.arange(0, BLOCK) < vocab) & (here <= last), 1.0, 0.0)
            if BY_MASS:
                weight *= tl.exp(z)
            lanes += tl.where(here[:, None] < candidate[None, :], weight[:, None], 0.0)
        weight_8 = tl.sum(lanes.to(tl.float64), axis=0)
        # Of 8 rising candidates the first has less than the limit before it; take the last that has. The last sweep has one
        # bit left: there larger digits were refused before, or (where everything fits) would overflow.
        fits = (weight_8 < limit) & ((sweep + 1 < _SWEEPS) | (digit < 2))
        chosen_digit = tl.max(tl.where(fits, digit, 0), axis=0)
        key += chosen_digit << shift
        before = tl.sum(tl.where(digit == chosen_digit, weight_8, 0.0), axis=0)
    return key, before


@triton.jit
def _neg_log1m(u):
    """-log(1 - u) to float32 rounding, also of the smallest u, where the largest noise comes from: 2 atanh(u / (2 - u))."""
    s = u / (2.0 - u)
    t = s * s
    tail = 1 / 9.0 + t * (1 / 11.0 + t * (1 / 13.0 + t * (1 / 15.0)))
    series = 2.0 * s * (1.0 + t * (1 / 3.0 + t * (1 / 5.0 + t * (1 / 7.0 + t * tail))))
    return tl.where(u < 0.5, series, -tl.log(1.0 - u))


@triton.jit
def _gumbel(seed, start, step, id_low, id_high, BLOCK: tl.constexpr):
    """The noise of `sample._gumbel` for tokens start, ..., start + BLOCK - 1."""
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(counter)
    word_0, word_1, word_2, word_3 = tl.philox(seed, counter, zero + step, zero + id_low, zero + id_high)
    word = tl.interleave(tl.interleave(word_0, word_2), tl.interleave(word_1, word_3))
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return -tl.log(_neg_log1m(tl.minimum(u, 1.0 - 5.960464477539063e-08)))


# A row begins anywhere in logits that are a slice; steps and seeds change with every call.
@triton.jit(do_not_specialize=["seed", "top_k"], do_not_specialize_on_alignment=["ids_ptr", "step_ptr"])
def _sample_kernel(
    logits_ptr, ids_ptr, step_ptr, token_ptr, logprob_ptr, row_stride, vocab, seed: tl.int64, temperature,
    top_k, top_p: tl.float64, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    lane = tl.arange(0, BLOCK)
    SEARCH_BLOCK: tl.constexpr = BLOCK // 4  # times 8 candidates: a whole block would spill registers

    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        logit = tl.load(row_ptr + start + lane, mask=start + lane < vocab, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, logit)  # without NaN: it comes back in the sum below
    maximum = tl.max(largest, axis=0)

    last = tl.full([], _INFINITE, tl.int32)
    if TOP_K:
        last, _ = _last_key(row_ptr, vocab, maximum, temperature, last, top_k, False, SEARCH_BLOCK)
    edge = last  # tokens of this key are the last that top-p lets in, `ties` of them
    ties = tl.full([], vocab, tl.int32)
    if TOP_P:
        mass_lane = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            z = _z(row_ptr, start, vocab, maximum, temperature, BLOCK)
            mass_lane += tl.where(_key(z) <= last, tl.exp(z), 0.0)
        limit = top_p * tl.sum(mass_lane.to(tl.float64), axis=0)
        edge, before = _last_key(row_ptr, vocab, maximum, temperature, last, limit, True, SEARCH_BLOCK)
        # The fewest n with before + n * mass >= limit, the mass being that of one tie.
        mass = tl.exp(-edge.to(tl.float32, bitcast=True)).to(tl.float64)
        room = tl.where((mass > 0) & (edge <= last), (limit - before) / mass, float("inf"))
        ties = tl.ceil(tl.minimum(room, vocab * 1.0)).to(tl.int32)
        edge = tl.minimum(edge, last)

    if not GREEDY:
        id = tl.load(ids_ptr + row).to(tl.int64)
        step = tl.load(step_ptr + row).to(tl.int64).to(tl.uint32)
        id_low, id_high = id.to(tl.uint32), (id >> 32).to(tl.uint32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    best_z = tl.full([BLOCK], -float("inf"), tl.float32)
    best_token = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    ties_seen = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        z = _z(row_ptr, start, vocab, maximum, temperature, BLOCK)
        token = start + lane
        total += tl.where(token < vocab, tl.exp(z), 0.0)
        score = z
        if TOP_K or TOP_P:
            key = _key(z)
            keep = key <= edge
            if TOP_P:
                tied = (key == edge).to(tl.int32)
                rank = ties_seen + tl.cumsum(tied, axis=0) - tied
                keep = (key < edge) | ((key == edge) & (rank < ties))
                ties_seen += tl.sum(tied, axis=0)
            score = tl.where(keep, z, -float("inf"))
        if not GREEDY:
            score += _gumbel(seed, start, step, id_low, id_high, BLOCK)
        better = score > best  # the earlier of equals stays
        best = tl.where(better, score, best)
        best_z = tl.where(better, z, best_z)
        best_token = tl.where(better, token, best_token)
    winner = tl.min(tl.where(best == tl.max(best, axis=0), best_token, 0x7FFFFFFF), axis=0)
    z_winner = tl.max(tl.where(best_token == winner, best_z, -float("inf")), axis=0)
    # float64 for one number a row: near certainty the logarithm of float32 would be all error.
    logprob = (z_winner.to(tl.float64) - tl.log(tl.sum(total.to(tl.float64), axis=0))).to(tl.float32)
    tl.store(logprob_ptr + row, logprob)
    # NaN, +inf or nothing but -inf in the row have made the sum NaN.
    tl.store(token_ptr + row, tl.where(logprob == logprob, winner, 0).to(tl.int64))


@torch.library.custom_op("fastppo_kernels::sample", mutates_args=())
def sample(
    logits_BV: Tensor,
    sequence_ids_B: Tensor,
    step_B: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The launch; arguments are checked by the caller. `seed` is its 64 bits as a signed number."""
    batch, vocab = logits_BV.shape
    token_B, logprob_B = _outputs(logits_BV)
    if batch == 0:
        return token_B, logprob_B
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    greedy = temperature == 0
    with torch.cuda.device_of(logits_BV):
        _sample_kernel[(batch,)](
            logits_BV, sequence_ids_B.contiguous(), step_B.contiguous(), token_B, logprob_B, logits_BV.stride(0), vocab,
            seed, temperature or 1.0, min(top_k, vocab), top_p, GREEDY=greedy,
            TOP_K=not greedy and 0 < top_k < vocab, TOP_P=not greedy and top_p < 1, BLOCK=BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return token_B, logprob_B


def _outputs(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    batch = logits_BV.shape[0]
    return logits_BV.new_empty(batch, dtype=torch.int64), logits_BV.new_empty(batch, dtype=torch.float32)


@sample.register_fake
def _(logits_BV: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _outputs(logits_BV)


def configurations() -> Iterator[Configuration]:
    """What `sample` can choose where ids and steps have one dtype; with rows that begin at multiples of 16, and without."""
    pointers = ("logits_ptr", "token_ptr", "logprob_ptr")
    for dtype, index in product(("fp32", "bf16", "fp16"), ("i64", "i32")):
        signature = {
            "logits_ptr": f"*{dtype}", "ids_ptr": f"*{index}", "step_ptr": f"*{index}", "token_ptr": "*i64",
            "logprob_ptr": "*fp32", "row_stride": "i32", "vocab": "i32", "seed": "i64", "temperature": "fp32",
            "top_k": "i32", "top_p": "fp64",
        }  # fmt: skip
        for greedy, top_k, top_p in [(True, False, False), *product((False,), (False, True), (False, True))]:
            constants = {"GREEDY": greedy, "TOP_K": top_k, "TOP_P": top_p, "BLOCK": BLOCK}
            how = "greedy" if greedy else " ".join(["random", *(["top-k"] if top_k else []), *(["top-p"] if top_p else [])])
            for divisible in (("row_stride", "vocab"), ()):
                rows = "aligned rows" if divisible else "any rows"
                name = f"sample {dtype} {index} {how}, {rows}"
                yield Configuration(name, _sample_kernel, signature, constants, _WARPS, 3, pointers + divisible)
