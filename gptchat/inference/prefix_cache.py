"""What the free slots of a KV cache still hold, so that a prompt's beginning is not computed again.

A sequence that ends leaves its keys and values in its slot until the slot is needed. A prompt that
begins with the same ids and types, such as a conversation's next turn, starts from there.

A prompt gets the slot with the longest common prefix if it continues all that the slot holds.
Otherwise the prefix is copied into the slot used least recently, so that other branches of the
conversation are kept.

Invariants: `contents[slot]` describes positions that are right in the cache. Slots in use have
none. When not `enabled`, no slot has any, and `move` is a plain copy.
"""

from dataclasses import dataclass
from typing import NamedTuple

from gptchat.inference.request import Ids
from gptchat.model.kv_cache import KVCache


@dataclass(frozen=True)
class Contents:
    """Ids whose keys and values are in a slot from position 0 on, and their types, if any.

    `last_used` orders the slots by time; 0 is an empty one.
    """

    ids: Ids = ()
    types: Ids = ()
    last_used: int = 0

    def n_common(self, ids: Ids, types: Ids) -> int:
        """The length of the prefix shared with a prompt."""
        n_ids = n_equal(self.ids, ids)
        return min(n_ids, n_equal(self.types, types)) if self.types else n_ids


NOTHING = Contents()


class Prefix(NamedTuple):
    """The first `length` positions of a slot."""

    slot: int
    length: int


class PrefixCache:
    """The slots of a KV cache. The caller knows which are in use: those before a number."""

    def __init__(self, cache: KVCache, slots: int, enabled: bool):
        self.cache = cache
        self.enabled = enabled
        self.contents = [NOTHING] * slots
        self.clock = 0  # sequences remembered so far

    def remember(self, slot: int, ids: Ids, types: Ids) -> None:
        """Note that a sequence has ended, whose slot holds the keys and values of `ids`."""
        if self.enabled and ids:
            self.clock += 1
            self.contents[slot] = Contents(list(ids), list(types), self.clock)

    def find(self, first_free: int, ids: Ids, types: Ids) -> Prefix:
        """The longest prefix of a prompt in a free slot.

        It leaves out the last id, whose hidden state predicts the first new token.
        """
        longest = Prefix(first_free, 0)
        for slot in range(first_free, len(self.contents)):
            length = min(self.contents[slot].n_common(ids, types), len(ids) - 1)
            if length > longest.length:
                longest = Prefix(slot, length)
        return longest

    def take(self, slot: int, prefix: Prefix) -> None:
        """Use `slot`, the first free one, for a prompt that begins with `prefix`."""
        spare = prefix.slot
        if prefix.length < len(self.contents[prefix.slot].ids):
            spare = self.least_recently_used(slot)
        self.move(prefix.slot, slot, prefix.length, spare)

    def least_recently_used(self, first_free: int) -> int:
        """The free slot to give up, an empty one if possible."""
        free = range(first_free, len(self.contents))
        return min(free, key=lambda slot: self.contents[slot].last_used)

    def move(self, source: int, target: int, length: int, spare: int) -> None:
        """Copy `length` positions into `target`, which is in use from then on.

        What `target` held moves to `spare`, which may be `source`; if `spare` is `target`, it is
        forgotten.
        """
        kv = self.cache.kv
        kept = self.contents[target]
        n_kept = len(kept.ids)
        moved = kv[:, :, source, :, :length]
        if n_kept and spare != target:
            if spare == source:  # the two change places
                moved = moved.clone()
            kv[:, :, spare, :, :n_kept] = kv[:, :, target, :, :n_kept]
        if source != target:
            kv[:, :, target, :, :length] = moved
        self.contents[target] = NOTHING
        if spare != target:
            self.contents[spare] = kept


def n_equal(left: Ids, right: Ids) -> int:
    """How many items at the beginning of two sequences are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
