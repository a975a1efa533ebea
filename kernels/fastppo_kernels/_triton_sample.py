"""Drawing the next token with Triton: one program sweeps one row of logits a few times, in one launch.

    sweep 1                 the largest logit
    sweeps for top-k        find the key of the k-th largest logit (11 sweeps, whatever V and k)
    sweeps for top-p        find the key of the last token that belongs to the nucleus (1 + 11 sweeps, 1 for its ties)
    last sweep              the softmax's sum, and argmax(z + Gumbel noise) over what is left

z = (logit - largest) / temperature <= 0, so the bits of |z| as an integer, its *key*, order the tokens: the smaller the key,
the more probable. "The largest key with less than a given weight before it" is found three bits a sweep, by adding up the
weights before 8 candidates at once, with weight 1 for top-k and exp(z) for top-p. Ties are then those of equal keys, exactly.

One program a row leaves most of a GPU idle where the rows are few. Without top-k and top-p a row is then split into parts of a
fixed length, each with programs of its own, in three small launches: largest logits, draws, and which draw wins. The one
program of an undivided row goes through the same parts, so that token and log-probability are the same bits either way.

A row is read from L2 after the first sweep. Sums go by lane, block and part, in a fixed order: equal inputs give equal bits.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configuration import Configuration
from ._triton_head import _tanh

# With these nothing spills; a row keeps 256 threads of an SM busy, and its sums and best tokens stay in registers.
BLOCK, _WARPS = 1024, 8
RESTRICTED_BLOCK, _RESTRICTED_WARPS = 512, 16  # with top-k or top-p
# A program's worth where a row is split: eight blocks, so that 32 rows of 152,064 logits are 608 programs.
PART = 8192
# More rows fill a GPU of 108 or 132 SMs by themselves: twice as many as its SMs, after which splitting gains little.
FEW_ROWS = 256
_PARTS = 64  # parts that `_winner_kernel` looks at a time
_INFINITE = tl.constexpr(0x7F800000)  # the key of -inf
_NONE = tl.constexpr(0x7FFFFFFF)  # a token after all others
_SWEEPS = tl.constexpr(11)  # 31 bits, three at a time


@triton.jit
def _logit(row_ptr, bias_ptr, has_bias, logit_scale, softcap, start, stop, BLOCK: tl.constexpr):
    """A block of cap(logit_scale (logit + bias)) in float32, -inf from `stop` on."""
    offset = start + tl.arange(0, BLOCK)
    inside = offset < stop
    x = tl.load(row_ptr + offset, mask=inside, other=-float("inf")).to(tl.float32)
    # A load that no thread makes and a branch that no program takes cost less than twice as many kernels to compile.
    x += tl.load(bias_ptr + offset, mask=inside & (has_bias != 0), other=0.0)
    x *= logit_scale
    if softcap != 0:
        x = tl.where(inside, softcap * _tanh(x * (1.0 / softcap)), -float("inf"))
    return x


@triton.jit
def _z(
    row_ptr, bias_ptr, has_bias, logit_scale, softcap, start, stop, maximum, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of (logit - maximum) / temperature, -inf from `stop` on."""
    z = _logit(row_ptr, bias_ptr, has_bias, logit_scale, softcap, start, stop, BLOCK) - maximum
    # Rounded as IEEE says, so that ties and (but for its logarithms) draws are those of the torch form.
    z = tl.div_rn(z, temperature)
    return tl.where(start + tl.arange(0, BLOCK) < stop, z, -float("inf"))


@triton.jit
def _largest(row_ptr, bias_ptr, has_bias, logit_scale, softcap, first, stop, BLOCK: tl.constexpr):
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(first, stop, BLOCK):
        logit = _logit(row_ptr, bias_ptr, has_bias, logit_scale, softcap, start, stop, BLOCK)
        largest = tl.maximum(largest, logit)  # without NaN: it comes back in the sum of exponentials
    return tl.max(largest, axis=0)


@triton.jit
def _key(z):
    return z.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _last_key(
    row_ptr, bias_ptr, has_bias, logit_scale, softcap, vocab, maximum, temperature, last, limit,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
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
            z = _z(row_ptr, bias_ptr, has_bias, logit_scale, softcap, start, vocab, maximum, temperature, BLOCK)
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


@triton.jit
def _draw(
    row_ptr, bias_ptr, has_bias, logit_scale, softcap, first, stop, maximum, temperature, random, seed, id, step, edge, ties,
    RESTRICT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of a row: (sum of exp(z), largest of z + noise, z and number of the token that has it, ties left to let in).

    RESTRICT: only tokens of keys below `edge`, and the first `ties` of those that have it, may win.
    """
    id_low, id_high = id.to(tl.uint32), (id >> 32).to(tl.uint32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    best_z = tl.full([BLOCK], -float("inf"), tl.float32)
    best_token = tl.full([BLOCK], _NONE, tl.int32)
    for start in range(first, stop, BLOCK):
        z = _z(row_ptr, bias_ptr, has_bias, logit_scale, softcap, start, stop, maximum, temperature, BLOCK)
        token = start + tl.arange(0, BLOCK)
        total += tl.where(token < stop, tl.exp(z), 0.0)
        score = z
        if RESTRICT:
            key = _key(z)
            tied = (key == edge).to(tl.int32)
            let_in = tl.cumsum(tied, axis=0) <= ties  # of those that are tied
            ties -= tl.sum(tied, axis=0)
            score = tl.where((key < edge) | ((key == edge) & let_in), z, -float("inf"))
        if random != 0:
            score += _gumbel(seed, start, step.to(tl.uint32), id_low, id_high, BLOCK)
        better = score > best  # the earlier of equals stays
        best = tl.where(better, score, best)
        best_z = tl.where(better, z, best_z)
        best_token = tl.where(better, token, best_token)
    largest = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == largest, best_token, _NONE), axis=0)
    z_winner = tl.max(tl.where(best_token == winner, best_z, -float("inf")), axis=0)
    return tl.sum(total.to(tl.float64), axis=0), largest, z_winner, winner, ties


@triton.jit
def _store(token_ptr, logprob_ptr, row, total, z, token):
    # float64 for one number a row: near certainty the logarithm of float32 would be all error.
    logprob = (z.to(tl.float64) - tl.log(total)).to(tl.float32)
    tl.store(logprob_ptr + row, logprob)
    # NaN, +inf or nothing but -inf in the row have made the sum NaN.
    tl.store(token_ptr + row, tl.where(logprob == logprob, token, 0).to(tl.int64))


# A row begins anywhere in logits that are a slice; steps and seeds change with every call.
@triton.jit(
    do_not_specialize=["has_bias", "random", "seed", "top_k"],
    do_not_specialize_on_alignment=["bias_ptr", "ids_ptr", "step_ptr"],
)
def _sample_kernel(
    logits_ptr, row_stride, bias_ptr, has_bias, logit_scale, softcap, vocab, temperature, random, seed: tl.int64,
    ids_ptr, step_ptr, token_ptr, logprob_ptr, top_k, top_p: tl.float64,
    RESTRICT: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All of one row. RESTRICT: by top_k (0: by none) and top_p (1: by none)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    SEARCH_BLOCK: tl.constexpr = BLOCK // 8  # times 8 candidates: a whole block would spill registers
    maximum = _largest(row_ptr, bias_ptr, has_bias, logit_scale, softcap, 0, vocab, BLOCK)

    edge = tl.full([], _INFINITE, tl.int32)  # tokens of this key are the last that are let in, `ties` of them
    ties = tl.full([], vocab, tl.int32)
    if RESTRICT:
        if top_k > 0:
            edge, _ = _last_key(
                row_ptr, bias_ptr, has_bias, logit_scale, softcap, vocab, maximum, temperature, edge, top_k.to(tl.float64),
                False, SEARCH_BLOCK,
            )  # fmt: skip
        if top_p < 1:
            last = edge
            mass_lane = tl.zeros([BLOCK], dtype=tl.float32)
            for start in range(0, vocab, BLOCK):
                z = _z(row_ptr, bias_ptr, has_bias, logit_scale, softcap, start, vocab, maximum, temperature, BLOCK)
                mass_lane += tl.where(_key(z) <= last, tl.exp(z), 0.0)
            limit = top_p * tl.sum(mass_lane.to(tl.float64), axis=0)
            edge, before = _last_key(
                row_ptr, bias_ptr, has_bias, logit_scale, softcap, vocab, maximum, temperature, last, limit, True, SEARCH_BLOCK
            )
            # The fewest n with before + n * mass >= limit, the mass being that of one tie.
            mass = tl.exp(-edge.to(tl.float32, bitcast=True)).to(tl.float64)
            room = tl.where((mass > 0) & (edge <= last), (limit - before) / mass, float("inf"))
            ties = tl.ceil(tl.minimum(room, vocab * 1.0)).to(tl.int32)
            edge = tl.minimum(edge, last)

    id = tl.load(ids_ptr + row)
    step = tl.load(step_ptr + row)
    total = tl.full([], 0.0, tl.float64)
    best = tl.full([], -float("inf"), tl.float32)
    best_z = best
    best_token = tl.full([], _NONE, tl.int32)
    for first in range(0, vocab, PART):
        part_total, score, z, token, ties = _draw(
            row_ptr, bias_ptr, has_bias, logit_scale, softcap, first, tl.minimum(first + PART, vocab), maximum, temperature,
            random, seed, id, step, edge, ties, RESTRICT, BLOCK,
        )  # fmt: skip
        total += part_total
        better = score > best
        best = tl.where(better, score, best)
        best_z = tl.where(better, z, best_z)
        best_token = tl.where(better, token, best_token)
    _store(token_ptr, logprob_ptr, row, total, best_z, best_token)


@triton.jit(do_not_specialize=["has_bias", "parts"], do_not_specialize_on_alignment=["bias_ptr"])
def _largest_kernel(
    logits_ptr, row_stride, bias_ptr, has_bias, logit_scale, softcap, vocab, parts, largest_ptr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PART
    stop = tl.minimum(first + PART, vocab)
    largest = _largest(logits_ptr + row * row_stride, bias_ptr, has_bias, logit_scale, softcap, first, stop, BLOCK)
    tl.store(largest_ptr + row * parts + tl.program_id(1), largest)


@triton.jit(
    do_not_specialize=["has_bias", "random", "seed", "parts"],
    do_not_specialize_on_alignment=["bias_ptr", "ids_ptr", "step_ptr"],
)
def _draw_kernel(
    logits_ptr, row_stride, bias_ptr, has_bias, logit_scale, softcap, vocab, temperature, random, seed: tl.int64,
    ids_ptr, step_ptr, parts, largest_ptr, total_ptr, score_ptr, z_ptr, part_token_ptr,
    PART: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PART
    maximum = tl.full([], -float("inf"), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        largest = tl.load(largest_ptr + row * parts + part, mask=part < parts, other=-float("inf"))
        maximum = tl.maximum(maximum, tl.max(largest, axis=0))
    nothing = tl.full([], 0, tl.int32)
    total, score, z, token, _ = _draw(
        logits_ptr + row * row_stride, bias_ptr, has_bias, logit_scale, softcap, first, tl.minimum(first + PART, vocab),
        maximum, temperature, random, seed, tl.load(ids_ptr + row), tl.load(step_ptr + row), nothing, nothing, False,
        BLOCK,
    )  # fmt: skip
    place = row * parts + tl.program_id(1)
    tl.store(total_ptr + place, total)
    tl.store(score_ptr + place, score)
    tl.store(z_ptr + place, z)
    tl.store(part_token_ptr + place, token)


@triton.jit(do_not_specialize=["parts"])
def _winner_kernel(
    total_ptr, score_ptr, z_ptr, part_token_ptr, parts, token_ptr, logprob_ptr, PARTS: tl.constexpr
):  # fmt: skip
    """The best of the parts of one row, in their order, as `_sample_kernel` goes through them."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.full([], 0.0, tl.float64)
    best = tl.full([], -float("inf"), tl.float32)
    best_z = best
    best_token = tl.full([], _NONE, tl.int32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < parts
        place = row * parts + part
        totals = tl.load(total_ptr + place, mask=inside, other=0.0)
        scores = tl.load(score_ptr + place, mask=inside, other=-float("inf"))
        zs = tl.load(z_ptr + place, mask=inside, other=-float("inf"))
        tokens = tl.load(part_token_ptr + place, mask=inside, other=_NONE)
        for i in range(start, tl.minimum(start + PARTS, parts)):
            total += tl.sum(tl.where(part == i, totals, 0.0), axis=0)
        score = tl.max(scores, axis=0)
        token = tl.min(tl.where(scores == score, tokens, _NONE), axis=0)
        z = tl.max(tl.where(tokens == token, zs, -float("inf")), axis=0)
        better = score > best
        best = tl.where(better, score, best)
        best_z = tl.where(better, z, best_z)
        best_token = tl.where(better, token, best_token)
    _store(token_ptr, logprob_ptr, row, total, best_z, best_token)


def sample(
    logits_BV: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    sequence_ids_B: Tensor,
    step_B: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The launches; arguments are checked by the caller. `bias_V` is float32, `seed` its 64 bits as a signed number."""
    batch, vocab = logits_BV.shape
    token_B, logprob_B = logits_BV.new_empty(batch, dtype=torch.int64), logits_BV.new_empty(batch, dtype=torch.float32)
    if batch == 0:
        return token_B, logprob_B
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    random, parts = int(temperature > 0), triton.cdiv(vocab, PART)
    top_k = top_k if random and top_k < vocab else 0
    top_p = top_p if random else 1.0
    head = (
        logits_BV, logits_BV.stride(0), logprob_B if bias_V is None else bias_V, int(bias_V is not None), logit_scale,
        softcap or 0.0, vocab,
    )  # fmt: skip
    draw = (temperature or 1.0, random, seed, sequence_ids_B.long().contiguous(), step_B.long().contiguous())
    with torch.cuda.device_of(logits_BV):
        if top_k or top_p < 1 or parts == 1 or batch > FEW_ROWS:
            restrict = bool(top_k) or top_p < 1
            _sample_kernel[(batch,)](
                *head, *draw, token_B, logprob_B, top_k, top_p, RESTRICT=restrict, PART=PART,
                BLOCK=RESTRICTED_BLOCK if restrict else BLOCK, num_warps=_RESTRICTED_WARPS if restrict else _WARPS,
            )  # fmt: skip
            return token_B, logprob_B
        largest, score, z = logits_BV.new_empty(3, batch, parts, dtype=torch.float32)
        total = logits_BV.new_empty(batch, parts, dtype=torch.float64)
        part_token = logits_BV.new_empty(batch, parts, dtype=torch.int32)
        _largest_kernel[(batch, parts)](*head, parts, largest, PART=PART, BLOCK=BLOCK, num_warps=_WARPS)
        _draw_kernel[(batch, parts)](
            *head, *draw, parts, largest, total, score, z, part_token, PART=PART, BLOCK=BLOCK, PARTS=_PARTS,
            num_warps=_WARPS,
        )  # fmt: skip
        _winner_kernel[(batch,)](total, score, z, part_token, parts, token_B, logprob_B, PARTS=_PARTS, num_warps=1)
    return token_B, logprob_B


_TYPES = {
    "row_stride": "i32", "bias_ptr": "*fp32", "has_bias": "i32", "logit_scale": "fp32", "softcap": "fp32", "vocab": "i32",
    "temperature": "fp32", "random": "i32", "seed": "i64", "ids_ptr": "*i64", "step_ptr": "*i64", "token_ptr": "*i64",
    "logprob_ptr": "*fp32", "top_k": "i32", "top_p": "fp64", "parts": "i32", "largest_ptr": "*fp32", "total_ptr": "*fp64",
    "score_ptr": "*fp32", "z_ptr": "*fp32", "part_token_ptr": "*i32",
}  # fmt: skip
_ALIGNED = ("logits_ptr", "row_stride", "vocab")


def configurations() -> Iterator[Configuration]:
    """What `sample` can choose, with rows that begin at multiples of 16, and without."""
    constants = {"PART": PART, "BLOCK": BLOCK}
    kernels = [
        ("all of a row", _sample_kernel, constants | {"RESTRICT": False}),
        ("top-k, top-p", _sample_kernel, constants | {"RESTRICT": True, "BLOCK": RESTRICTED_BLOCK}),
        ("part, largest", _largest_kernel, constants),
        ("part, draw", _draw_kernel, constants | {"PARTS": _PARTS}),
    ]
    for (what, kernel, of_kernel), dtype, aligned in product(kernels, ("fp32", "bf16", "fp16"), (True, False)):
        types = _TYPES | {"logits_ptr": f"*{dtype}"}
        signature = {name: types[name] for name in kernel.arg_names if name not in of_kernel}
        name = f"sample {dtype} {what}, {'aligned' if aligned else 'any'} rows"
        warps = _RESTRICTED_WARPS if of_kernel.get("RESTRICT") else _WARPS
        yield Configuration(name, kernel, signature, of_kernel, warps, 3, _ALIGNED if aligned else ())
    signature = {name: _TYPES[name] for name in _winner_kernel.arg_names if name != "PARTS"}
    yield Configuration("sample, best part", _winner_kernel, signature, {"PARTS": _PARTS}, 1, 3)
