"""Text and token ids while an answer grows: streaming decode, stop strings, forbidden words.

Token boundaries fall anywhere, also inside a character, so both classes work on the tokens' bytes.
`StreamDecoder` turns the ids of one answer into text, and gives out only what later ids cannot
change. `WordFilter` says which ids must not come next; it has no state between calls.
"""

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from gptchat.data.tokenizer import Tokenizer


class StreamDecoder:
    """The text of a growing list of ids, in pieces.

    A piece holds no half character and no part of a stop string. The joined pieces are the decoded
    text up to the stop string that is complete first (the longest, if several end there); `stopped`
    is then true. The end of the text is held back as long as it may become a stop string. Raises
    ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self.stop = tuple(stop)
        self.stopped = False
        self._held = ""
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that is certain once `id` is known, often empty; nothing after a stop string."""
        return self._release(self._decoder.decode(self._token_bytes[id]))

    def finish(self) -> str:
        """The text that was held back, now that the stream has ended."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        """Add `new` to the text; return what is certain of it."""
        text = self._held + new
        if self.stopped or not text:
            return ""
        stop_start = self._first_stop(text)
        if stop_start is not None:
            self.stopped = True
            self._held = ""
            return text[:stop_start]
        certain = len(text) - self._begun_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first; of two that end there the longer."""
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
        """How many characters at the end of the text may be the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(longest + 1, len(stop)):
                if text.endswith(stop[:n]):
                    longest = n
        return longest


class WordFilter:
    """The ids that must not come next if none of `words` may ever be completed.

    A word is forbidden as exact bytes, also inside of longer words. A token may contain a word, or
    complete one that the text has begun: both are looked up in tables made once. A special token
    ends the text, so no word reaches across turns. Raises ValueError for an empty word.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]):
        if "" in words:
            raise ValueError("a forbidden word must not be empty")
        self._token_bytes = tokenizer.token_bytes
        pieces, ids, joined, ends = tokenizer.pieces  # all tokens, sorted by their bytes
        after_all = b"\xff" * (max(map(len, pieces)) + 1)  # sorts behind whatever may follow
        self._containing: set[int] = set()  # the ids of tokens that contain a word
        # Beginning of a word -> for each such word, the ids of tokens that begin with its rest.
        self._completing: dict[bytes, list[list[int]]] = {}
        beginning_with: dict[bytes, list[int]] = {}  # end of a word -> ids that begin with it
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
        """The ids that would complete a word after `ids`; only the end of their text is read."""
        tail = self._tail(ids)
        banned = set(self._containing)
        for n in self._lengths:
            if n > len(tail):
                break
            for completing in self._completing.get(tail[-n:], ()):
                banned.update(completing)
        return list(banned)

    def _tail(self, ids: Sequence[int]) -> bytes:
        """The last bytes of the text of `ids`, as many as the longest beginning of a word."""
        longest = self._lengths[-1] if self._lengths else 0
        tail = b""
        for id in reversed(ids):
            if len(tail) >= longest or not self._token_bytes[id]:
                break
            tail = self._token_bytes[id] + tail
        return tail
