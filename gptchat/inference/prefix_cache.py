"""What the free slots of a KV cache still hold, so that a prompt's beginning is not computed again.

A sequence that ends leaves its keys and values in its slot until the slot is needed. A prompt that
begins with the same ids and token types, such as the next turn of a conversation, starts from
there. If a conversation has lost its oldest turns, nothing is shared: what follows is at other
positions.

A prompt gets the slot with the longest common prefix, if it goes on where that ends. Otherwise it
gets the slot used least recently, into which the common prefix is copied: a conversation's other
branches are not lost. If the target slot holds cached data, it moves to the evicted slot.

Invariants: `contents[slot]` describes positions that are right in the cache. Slots in use have
none. When not `enabled`, no slot has any, and `move` is a plain copy.
"""

from dataclasses import dataclass
from typing import NamedTuple

from gptchat.inference.request import Ids
from gptchat.model.kv_cache import KVCache


@dataclass(frozen=True)
class Contents:
    """Ids whose keys and values are in a slot from position 0 on.

    `types` are as many, or () where the engine's requests have no token types. `last_used` orders
    the slots by time; 0 is that of an empty one.
    """

    ids: Ids = ()
    types: Ids = ()
    last_used: int = 0

    def n_common(self, ids: Ids, types: Ids) -> int:
        """How many tokens at the beginning are also those of a prompt."""
        n_ids = n_equal(self.ids, ids)
        return min(n_ids, n_equal(self.types, types)) if self.types else n_ids


NOTHING = Contents()


class Prefix(NamedTuple):
    """The first `length` positions of a slot."""

    slot: int
    length: int


class PrefixCache:
    """The slots of a KV cache; the caller says which of them are in use: those before a number."""

    def __init__(self, cache: KVCache, slots: int, enabled: bool):
        self.cache = cache
        self.enabled = enabled
        self.contents = [NOTHING] * slots
        self.clock = 0  # sequences remembered so far

    def remember(self, slot: int, ids: Ids, types: Ids) -> None:
        """A sequence has ended; the slot holds the keys and values of `ids`."""
        if self.enabled and ids:
            self.clock += 1
            self.contents[slot] = Contents(list(ids), list(types), self.clock)

    def find(self, first_free: int, ids: Ids, types: Ids) -> Prefix:
        """The longest beginning of a prompt in a free slot, at most all of it but its last id.

        The last id is computed in any case, since the first new token follows from it.
        """
        longest = Prefix(first_free, 0)
        for slot in range(first_free, len(self.contents)):
            length = min(self.contents[slot].n_common(ids, types), len(ids) - 1)
            if length > longest.length:
                longest = Prefix(slot, length)
        return longest

    def take(self, slot: int, prefix: Prefix) -> None:
        """Begin to use a slot, the first free one, for a prompt that begins with `prefix`."""
        spare = prefix.slot
        if prefix.length < len(self.contents[prefix.slot].ids):
            spare = self.least_recently_used(slot)
        self.move(prefix.slot, slot, prefix.length, spare)

    def least_recently_used(self, first_free: int) -> int:
        """The free slot to give up: an empty one if there is one."""
        free = range(first_free, len(self.contents))
        return min(free, key=lambda slot: self.contents[slot].last_used)

    def move(self, source: int, target: int, length: int, spare: int) -> None:
        """Copy `length` positions into another slot, which is in use from then on.

        What `target` held moves to `spare`, which may be `source`, and replaces what is there; if
        `spare` is `target`, it is forgotten.
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
