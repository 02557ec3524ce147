"""Training Unigram vocabularies (Kudo 2018) in a time that does not depend on the language.

The library's trainer looks at each place of each distinct word in each of its rounds, so its time
and memory grow with the bytes of the distinct words. Text without spaces has several times as many
of these as English: 11 MB of Japanese have 1.7 MB if cut at changes of script, and 11 MB if not. So
it is trained on the most frequent words only, as often as they are in the text, in proportion.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import tokenizers
from tokenizers import trainers

from gptchat.data.scripts import WORDS

DISTINCT_BYTES = 800_000  # of distinct words that are kept
OCCURRENCES = 300_000  # of all words together, about, that the library is given


def frequent_words(texts: Iterable[str], pattern: str) -> list[tuple[str, int]]:
    """(word, number) of the most frequent words of the texts, DISTINCT_BYTES of them.

    The numbers are in proportion to those in the texts, but none is below 1.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORDS[pattern].findall(text))
    ranked = counts.most_common()
    ends = accumulate(len(word.encode()) for word, _ in ranked)
    kept = ranked[: max(1, sum(end <= DISTINCT_BYTES for end in ends))]
    share = min(1.0, OCCURRENCES / max(1, sum(count for _, count in kept)))
    return [(word, max(1, round(count * share))) for word, count in kept]


def train_unigram(
    empty: tokenizers.Tokenizer, words: Sequence[tuple[str, int]], options: dict[str, Any]
) -> tokenizers.Tokenizer:
    """The tokenizer `empty` with a vocabulary of the words, whose numbers stand beside them.

    On a terminal the library shows how far it is.
    """
    shown = {"show_progress": sys.stderr.isatty()}
    trainer = trainers.UnigramTrainer(unk_token="[UNK]", **options | shown)
    empty.train_from_iterator(([word] * count for word, count in words), trainer)
    return _round_scores(empty)


def _round_scores(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Round Unigram's scores to 6 digits.

    The library does not read longer ones back exactly, so the hash would change with a reload.
    """
    state = json.loads(backend.to_str())
    model = state["model"]
    model["vocab"] = [[entry, round(score, 6)] for entry, score in model["vocab"]]
    return tokenizers.Tokenizer.from_str(json.dumps(state))
