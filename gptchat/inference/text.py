"""Ids to text as they come: streaming decode, stop strings, forbidden words."""

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from gptchat.data.tokenizer import Tokenizer


class StreamDecoder:
    """Text of a growing list of ids, in pieces that hold no half code point and no part of a stop string.

    The joined pieces are the decoded text up to the stop string that is complete first (the longest, if several end
    there), whatever the token boundaries; `stopped` is then true. What may yet become a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self.stop, self.stopped, self._held = tuple(stop), False, ""
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that is certain once `id` is known, often empty; nothing after a stop string."""
        return self._release(self._decoder.decode(self._token_bytes[id]))

    def finish(self) -> str:
        """What was held back: the stream has ended."""
        text, held = self._release(self._decoder.decode(b"", final=True)), self._held
        self._held = ""
        return text + held

    def _release(self, new: str) -> str:
        text, held = self._held + new, 0
        if self.stopped or not text:
            return ""
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)[1]]
        else:
            held = max(
                (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
                default=0,
            )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class WordFilter:
    """Ids that must not come next if none of `words` (exact bytes, inside longer words too) may ever be completed.

    A token may contain a word, or begin with what the end of the text lacks of one: both are tables, made once.
    Special tokens end the text: no word reaches across turns.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]):
        if "" in words:
            raise ValueError("a forbidden word must not be empty")
        self._token_bytes = tokenizer.token_bytes
        pieces, ids, joined, after = tokenizer.pieces
        after_all = b"\xff" * (max(map(len, pieces)) + 1)
        targets = [word.encode() for word in dict.fromkeys(words)]
        self._always = {
            ids[bisect_right(after, match.start())]
            for word in targets
            for match in re.finditer(re.escape(word), joined)
        }
        ends = {word[n:] for word in targets for n in range(1, len(word))}
        beginning = {
            end: ids[bisect_left(pieces, end) : bisect_right(pieces, end + after_all)]
            for end in ends
        }
        self._after: dict[bytes, list[list[int]]] = {}  # the end of the text -> lists of ids
        for word in targets:
            for n in range(1, len(word)):
                self._after.setdefault(word[:n], []).append(beginning[word[n:]])
        self._lengths = sorted({len(start) for start in self._after})

    def banned(self, ids: Sequence[int]) -> list[int]:
        """The ids that would complete a word after the text of `ids`, of which only the end is looked at."""
        tail, longest = b"", self._lengths[-1] if self._lengths else 0
        for id in reversed(ids):
            if len(tail) >= longest or not self._token_bytes[id]:
                break
            tail = self._token_bytes[id] + tail
        found = [
            more for n in self._lengths if n <= len(tail) for more in self._after.get(tail[-n:], ())
        ]
        return list(self._always.union(*found))
