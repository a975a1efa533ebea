"""Philox4x32-10, a counter-based random number generator (Salmon et al. 2011, doi 10.1145/2063384.2063405)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


_SMALL_ROUNDS, _ROUNDS = 2, 10


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words for each counter.

    32-bit words are kept in int64 tensors. A product of two words may pass 2^63 and wrap, but its low 64 bits are right
    all the same, and the arithmetic shift followed by the mask takes its high word out of them.

    Args:
        counter: four int64 tensors of words in [0, 2^32) that broadcast; the first two rounds only fill the shapes they
            need, so a counter of a [1, V] and three [B, 1] words costs little more than eight rounds.
        key: two words.

    Returns:
        Four int64 tensors of words, of the broadcast shape.
    """
    word_0, word_1, word_2, word_3 = counter
    keys = [
        tuple((word + i * weyl) & _WORD for word, weyl in zip(key, (_WEYL_0, _WEYL_1), strict=True)) for i in range(_ROUNDS)
    ]
    for key_0, key_1 in keys[:_SMALL_ROUNDS]:
        product_0, product_1 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_1
        word_0 = ((product_1 >> 32) & _WORD) ^ (word_1 ^ key_0)
        word_2 = ((product_0 >> 32) & _WORD) ^ (word_3 ^ key_1)
        word_1, word_3 = product_1 & _WORD, product_0 & _WORD

    # The other rounds in memory of their own, both products in one launch: `even` holds the words 0 and 2, `odd` those that
    # are added to them. Each round exchanges the places of the two, in both. The odd words' high halves are left as they are
    # until the end, for the mask over the even ones takes them away.
    shape = torch.broadcast_shapes(*(word.shape for word in (word_0, word_1, word_2, word_3)))
    even, odd, product = word_0.new_empty(3, 2, *shape)
    for place, word in ((even[0], word_0), (even[1], word_2), (odd[0], word_1), (odd[1], word_3)):
        place.copy_(word)
    pair = (2, *(1 for _ in shape))
    multipliers = word_0.new_tensor([_MULTIPLIER_0, _MULTIPLIER_1, _MULTIPLIER_0]).unfold(0, 2, 1).view(2, *pair)
    # The key of the word that comes to lie first, then of the other.
    added = word_0.new_tensor([keys[i][:: 1 if i % 2 else -1] for i in range(_SMALL_ROUNDS, _ROUNDS)]).view(-1, *pair)
    _large_rounds_(even, odd, product, multipliers, added)
    return even[0], odd[0], even[1], odd[1]


def _large_rounds_(*tensors: Any) -> None:
    """The last rounds, in place in the first two of (even, odd, product, multipliers, added)."""
    on_cpu = tensors[0].is_cpu
    # numpy multiplies 64-bit integers on a CPU in less than half the time that torch takes, and is quicker to start an op.
    even, odd, product, multipliers, added = (tensor.numpy() for tensor in tensors) if on_cpu else tensors
    multiply, shift = (np.multiply, np.right_shift) if on_cpu else (torch.mul, torch.bitwise_right_shift)
    first, second = even
    for i, key_pair in enumerate(added):
        multiply(even, multipliers[i % 2], out=product)
        shift(product, 32, out=even)
        even ^= key_pair
        # The high half of the first product belongs to word 2, which meets word 3, the second of the odd ones.
        first ^= odd[1]
        second ^= odd[0]
        even &= _WORD
        odd, product = product, odd
    odd &= _WORD
