"""Philox4x32-10, a counter-based random number generator (Salmon et al. 2011, doi 10.1145/2063384.2063405)."""

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


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
    key_0, key_1 = key
    for _ in range(10):
        product_0, product_1 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_1
        word_0 = ((product_1 >> 32) & _WORD) ^ (word_1 ^ key_0)
        word_2 = ((product_0 >> 32) & _WORD) ^ (word_3 ^ key_1)
        word_1, word_3 = product_1 & _WORD, product_0 & _WORD
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return tuple(torch.broadcast_tensors(word_0, word_1, word_2, word_3))
