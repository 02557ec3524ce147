"""Random numbers and permutations that a key determines, without a generator's state."""

from hashlib import blake2b

import numpy as np

N_ROUNDS = 6  # of the Feistel network
# The increment and the first multiplier of splitmix64.
FIRST_FACTOR = np.uint64(0x9E3779B97F4A7C15)
SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9)


def draw_key(*parts: object) -> int:
    """A number from 0 to 2**64 - 1 that the arguments determine, in every version of Python.

    Different arguments give independent numbers. It is the BLAKE2b hash of their `repr`, so they
    should be plain ints and strings: `draw_key(seed, epoch, "offset")`.
    """
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """The images of `values` under the permutation of range(n) that `key` determines.

    A Feistel network permutes all numbers of an even number of bits. It is applied again to results
    outside range(n) until they are inside (cycle walking; Black and Rogaway 2002).
    """
    bits = (n - 1).bit_length()
    half_bits = max(1, (bits + 1) // 2)
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    round_keys = [np.uint64(draw_key(key, i)) for i in range(N_ROUNDS)]

    def feistel(numbers: np.ndarray) -> np.ndarray:
        left = numbers >> half
        right = numbers & mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * FIRST_FACTOR
            mixed ^= mixed >> np.uint64(29)
            mixed *= SECOND_FACTOR
            mixed = (mixed >> np.uint64(32)) & mask
            left, right = right, left ^ mixed
        return (left << half) | right

    moved = feistel(values.astype(np.uint64))
    outside = moved >= n
    while outside.any():
        moved[outside] = feistel(moved[outside])
        outside = moved >= n
    return moved.astype(np.int64)
