"""Numbers and permutations that a key determines, so that no generator has a state to keep."""

from hashlib import blake2b

import numpy as np

N_ROUNDS = 6  # of the Feistel network
# The increment and the first multiplier of splitmix64: odd numbers whose bits are well mixed.
FIRST_FACTOR = np.uint64(0x9E3779B97F4A7C15)
SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9)


def draw_key(*parts: object) -> int:
    """A number from 0 to 2**64 - 1, drawn by the arguments: the project's keyed random draw.

    The same arguments give the same number in every process and version of Python; different ones
    give independent numbers. It is the BLAKE2b hash of their `repr`, so they should be plain ints
    and strings: `draw_key(seed, epoch, "offset")`.
    """
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of range(n), drawn by `key`, takes each of `values`; nothing is stored.

    A Feistel network permutes the numbers of an even number of bits: each round exchanges the two
    halves of a number and adds (XOR) a hash of one to the other, which can be undone whatever the
    hash is. It is applied again to results outside range(n) until they are inside (cycle walking;
    Black and Rogaway 2002).
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
