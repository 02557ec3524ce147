"""Text and token ids while an answer grows: streaming decode, stop strings, forbidden ids.

A token may end inside a character, so everything works on the tokens' bytes. `StreamDecoder` gives
out only text that later ids cannot change. `CharacterFilter` and `WordFilter` have no state.
"""

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gptchat.data.tokenizer import Tokenizer

CONTINUATION = range(0x80, 0xC0)  # bytes of a UTF-8 character after its first one
# The states of a reader of UTF-8 (Unicode 17.0, table 3-7): which bytes may follow, and the state
# after them. State 0 is between characters, the last one is broken text.
UTF8_STATES: tuple[dict[range, int], ...] = (
    {
        range(0x00, 0x80): 0,
        range(0xC2, 0xE0): 1,
        range(0xE0, 0xE1): 3,
        range(0xE1, 0xED): 2,
        range(0xED, 0xEE): 4,
        range(0xEE, 0xF0): 2,
        range(0xF0, 0xF1): 6,
        range(0xF1, 0xF4): 5,
        range(0xF4, 0xF5): 7,
    },
    {CONTINUATION: 0},  # one byte is missing
    {CONTINUATION: 1},  # two are missing
    {range(0xA0, 0xC0): 1},  # two, after 0xe0, whose characters have no shorter form
    {range(0x80, 0xA0): 1},  # two, after 0xed: no surrogates
    {CONTINUATION: 2},  # three are missing
    {range(0x90, 0xC0): 2},  # three, after 0xf0, whose characters have no shorter form
    {range(0x80, 0x90): 2},  # three, after 0xf4: none above U+10FFFF
    {},
)
BROKEN = len(UTF8_STATES) - 1


def _following() -> list[bytes]:
    """`_following()[state][byte]` is the state after a byte."""
    table = []
    for successors in UTF8_STATES:
        row = bytearray([BROKEN]) * 256
        for allowed, successor in successors.items():
            for byte in allowed:
                row[byte] = successor
        table.append(bytes(row))
    return table


FOLLOWING = _following()


class StreamDecoder:
    """The text of a growing list of ids, in pieces of whole characters.

    The joined pieces are the text up to the stop string that is complete first (the longest, if
    several end there); `stopped` is then true. `held` is an end that may become a stop string. An
    unfinished last character is left out. Raises ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self.stop = tuple(stop)
        self.stopped = False
        self.held = ""
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that becomes certain with `id`, often none; always none after a stop string."""
        return self._release(self._decoder.decode(self._token_bytes[id]))

    def finish(self) -> str:
        """The text held back, when the stream has ended."""
        text = self.held
        self.held = ""
        return text

    def _release(self, new: str) -> str:
        """Add `new` to the text; return what has become certain."""
        text = self.held + new
        if self.stopped or not text:
            return ""
        stop_start = self._first_stop(text)
        if stop_start is not None:
            self.stopped = True
            self.held = ""
            return text[:stop_start]
        certain = len(text) - self._begun_stop(text)
        self.held = text[certain:]
        return text[:certain]

    def _first_stop(self, text: str) -> int | None:
        """The start of the stop string that ends first, of several the longest."""
        places = []  # (end, start)
        for stop in self.stop:
            start = text.find(stop)
            if start >= 0:
                places.append((start + len(stop), start))
        if not places:
            return None
        _, start = min(places)
        return start

    def _begun_stop(self, text: str) -> int:
        """How many characters at the end of the text may begin a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(longest + 1, len(stop)):
                if text.endswith(stop[:n]):
                    longest = n
        return longest


class CharacterFilter:
    """Which ids must not come next if an answer is to be valid UTF-8.

    `forbidden` (states, V), bool, has a row for each of `UTF8_STATES`; that of BROKEN forbids
    nothing. Inside a character, ids without text are forbidden, too. Some id is always allowed,
    since the vocabulary has every byte. V is the model's `vocab_size`.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, device: torch.device | str = "cpu"):
        self._token_bytes = tokenizer.token_bytes
        token_bytes = tokenizer.token_bytes[:vocab_size]
        token_bytes += [b""] * (vocab_size - len(token_bytes))
        forbidden = _end_states(token_bytes) == BROKEN  # (states, V)
        forbidden[1:] |= np.array([not data for data in token_bytes])
        forbidden[BROKEN] = False
        self.forbidden: Tensor = torch.from_numpy(forbidden).to(device)
        self.forbidden_between = self.forbidden[0].nonzero()[:, 0]  # the ids that state 0 forbids

    def state(self, ids: Sequence[int]) -> int:
        """The state after the text of `ids`. Only its last three bytes are read."""
        tail = _tail(self._token_bytes, ids, 3)
        for n in range(1, len(tail) + 1):
            if tail[-n] not in CONTINUATION:  # the first byte of the last character
                state = 0
                for byte in tail[-n:]:
                    state = FOLLOWING[state][byte]
                return state if state != BROKEN else 0
        return 0


def _end_states(token_bytes: Sequence[bytes]) -> np.ndarray:
    """The state (states, V) after each token's bytes, from each state before them."""
    following = np.array([list(row) for row in FOLLOWING], np.uint8)  # (states, 256)
    lengths = np.array([len(data) for data in token_bytes])
    starts = np.cumsum(lengths) - lengths
    joined = np.frombuffer(b"".join(token_bytes), np.uint8)
    states = np.repeat(
        np.arange(len(UTF8_STATES), dtype=np.uint8)[:, None], len(token_bytes), axis=1
    )
    for place in range(lengths.max()):
        longer = np.flatnonzero(lengths > place)
        states[:, longer] = following[states[:, longer], joined[starts[longer] + place]]
    return states


class WordFilter:
    """The ids that must not come next if none of `words` may be completed.

    A word is forbidden as exact bytes, also inside longer words, but not across special tokens. A
    token may contain a word, or complete one that the text has begun; tables of both are made once.
    Raises ValueError for an empty word.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]):
        if "" in words:
            raise ValueError("a forbidden word must not be empty")
        self._token_bytes = tokenizer.token_bytes
        pieces, ids, joined, ends = tokenizer.pieces  # all tokens, sorted by their bytes
        after_all = b"\xff" * (max(map(len, pieces)) + 1)  # sorts after any continuation
        self._containing: set[int] = set()  # the ids of tokens that contain a word
        # Beginning of a word -> for each such word, the ids of tokens that start with its rest
        self._completing: dict[bytes, list[list[int]]] = {}
        beginning_with: dict[bytes, list[int]] = {}  # end of a word -> ids that start with it
        for word in {text.encode() for text in words}:
            for match in re.finditer(re.escape(word), joined):
                self._containing.add(ids[bisect_right(ends, match.start())])
            for n in range(1, len(word)):
                beginning, end = word[:n], word[n:]
                if end not in beginning_with:
                    first = bisect_left(pieces, end)
                    last = bisect_right(pieces, end + after_all)
                    beginning_with[end] = ids[first:last]
                self._completing.setdefault(beginning, []).append(beginning_with[end])
        self._lengths = sorted({len(beginning) for beginning in self._completing})

    def banned(self, ids: Sequence[int]) -> list[int]:
        """The ids that would complete a word after `ids`."""
        tail = _tail(self._token_bytes, ids, self._lengths[-1] if self._lengths else 0)
        banned = set(self._containing)
        for n in self._lengths:
            if n > len(tail):
                break
            for completing in self._completing.get(tail[-n:], ()):
                banned.update(completing)
        return list(banned)


def _tail(token_bytes: Sequence[bytes], ids: Sequence[int], length: int) -> bytes:
    """The last bytes of the text of `ids`, `length` or more; an id without text begins it anew."""
    tail = b""
    for id in reversed(ids):
        if len(tail) >= length or id >= len(token_bytes) or not token_bytes[id]:
            break
        tail = token_bytes[id] + tail
    return tail
