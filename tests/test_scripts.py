"""Text is cut into pieces by script, ASCII as GPT-2 cuts it; words are whole pieces."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from gptchat.data.scripts import (
    LONGEST,
    LONGEST_WORD,
    UNSPACED,
    WORDS,
    pattern_of,
    pre_tokenizer,
    units,
)

PROPERTY = settings(derandomize=True, max_examples=200, deadline=None)
MIXED = (
    "a's B 1\u00b2\u00e9\u0301 \u4e00\u6f22\U00020000\U000e0100\u3005\u306f\u304c\u3099\u30fc"
    "\u30b1\u30fb\uff76\uff9e\u3002\u300c\u0e17\u0e35\u0e48\u0e51\u0f40\u0f0b\u1780\u17d2\ud55c"
    "\u0939\u093f\u2764\ufe0f\U0001f600\u200d\u3000\u2028\n\t_-."
)
TEXT = st.text(st.sampled_from(MIXED) | st.characters(exclude_categories=["Cs"]), max_size=30)


SPLITTERS = {pattern: pre_tokenizer(pattern) for pattern in WORDS}
IS_UNSPACED = re.compile(rf" ?[{UNSPACED}]")


def pieces(pattern: str, text: str) -> list[str]:
    split = SPLITTERS[pattern].pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


def test_pieces_are_runs_of_a_script_and_kanji_with_the_kana_that_ends_them() -> None:
    for text, expected in {
        "\u6771\u4eac\u30bf\u30ef\u30fc\u306f333m\u3067\u3059\u3002": [
            "\u6771\u4eac", "\u30bf\u30ef\u30fc", "\u306f", "333", "m", "\u3067\u3059", "\u3002",
        ],
        "\u98df\u3079\u308b\u4eba \u306f Tokyo\u3067": [
            "\u98df\u3079\u308b", "\u4eba", " \u306f", " Tokyo", "\u3067",
        ],
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0e25\u0e32": [
            "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", " \u0e25\u0e32",
        ],
        "\u0939\u093f\u0928\u094d\u0926\u0940 e\u0301x": [
            "\u0939\u093f\u0928\u094d\u0926\u0940", " e\u0301x",
        ],
        "\u2764\ufe0f\u306d": ["\u2764\ufe0f", "\u306d"],
    }.items():  # fmt: skip
        assert pieces("script", text) == expected


@PROPERTY
@given(text=st.text(st.characters(max_codepoint=127), max_size=60))
@example(text="don't we'LL  say 12,000 x_y -- \n\n it's\t ")
@example(text="x" * LONGEST_WORD + " " + "-" * LONGEST_WORD)
def test_ascii_is_cut_as_gpt2_cuts_it(text: str) -> None:
    assert pieces("script", text) == pieces("gpt2", text)


@PROPERTY
@given(text=TEXT)
@example(text="\u6f22" * 40 + "\u306f" * 40 + "\u30b1" * 40 + "\u0e17" * 40)
@example(text=" " + "x" * 200 + "1" * 200 + "." * 200)
def test_no_piece_but_white_space_is_longer_than_the_limit(text: str) -> None:
    for piece in pieces("script", text):
        longest = 2 * LONGEST if IS_UNSPACED.match(piece) else LONGEST_WORD
        assert piece.isspace() or len(piece.removeprefix(" ")) <= longest


@PROPERTY
@given(text=TEXT, pattern=st.sampled_from(sorted(WORDS)))
@example(text="\u6f22" * 40 + "\u306f" * 40 + "'s\u30fc\u30b1", pattern="script")
def test_no_piece_spans_two_words(text: str, pattern: str) -> None:
    words = WORDS[pattern].findall(text)
    assert "".join(words) == text
    assert [piece for word in words for piece in pieces(pattern, word)] == pieces(pattern, text)


@pytest.mark.parametrize("pattern", sorted(WORDS))
def test_a_saved_tokenizer_tells_its_pattern(pattern: str) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(pattern)
    backend = Backend.from_str(backend.to_str())
    assert pattern_of(json.loads(backend.to_str())) == pattern
    backend.add_tokens(["abc"])
    assert pattern_of(json.loads(backend.to_str())) == ""


def test_units_are_words_or_the_characters_of_scripts_without_spaces() -> None:
    assert units("It's 9 o'clock.  Good\n") == ["It's", "9", "o'clock.", "Good"]
    assert units("\u306d\u3053\u306f Neko\u3002") == [
        "\u306d", "\u3053", "\u306f", "Neko\u3002",
    ]  # fmt: skip
    assert units("\u0e17\u0e35\u0e48\u0e19") == ["\u0e17\u0e35\u0e48", "\u0e19"]
    assert units("\u304b\u3099") == ["\u304b\u3099"] and units(" \n") == []
