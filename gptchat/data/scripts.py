"""How text is split into pieces before it is encoded. No token spans two pieces.

- `gpt2`: GPT-2's pattern. A piece is a run of letters, of digits or of other characters, with the
  space before it; or white space; or an English ending such as 's.
- `script`: also suits scripts that are written without spaces. There a piece is a run of Han
  characters with the Hiragana behind it, or a run of Hiragana, of Katakana, or of the letters of
  Thai, Lao, Tibetan, Burmese or Khmer, of at most LONGEST characters. Accents and vowel signs
  belong to the letter before them. No piece but white space is longer than LONGEST_WORD.

On ASCII text without words longer than LONGEST_WORD the two give the same pieces.
"""

import json
import re
import unicodedata
from typing import Any

from tokenizers import Regex, pre_tokenizers

# Ranges of letters and their marks, for the brackets of a pattern.
HAN = (
    "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003fffd\U000e0100-\U000e01ef"  # marks of variants
)
HIRAGANA = "\u3041-\u309f\u30fc"
KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
SOUTH_EAST_ASIAN = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e80-\u0ecf\u0f40-\u0fbc\u1000-\u103f\u1050-\u109f\u1780-\u17d3"
)
UNSPACED = HAN + HIRAGANA + KATAKANA + SOUTH_EAST_ASIAN
LONGEST = 16  # characters of a run of such a script
LONGEST_WORD = 64  # characters of any other piece, white space excepted

# What \s matches in the patterns of `tokenizers`; Python's \s is not quite the same.
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
WHITE_SPACE = rf"[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"

# The pieces of `script`, in the language of `tokenizers` (Oniguruma's, where && intersects sets).
SCRIPT_PATTERN = "|".join(
    [
        "'s|'t|'re|'ve|'m|'ll|'d",
        rf" ?[{HAN}]{{1,{LONGEST}}}[{HIRAGANA}]{{0,{LONGEST}}}",
        rf" ?[{HIRAGANA}]{{1,{LONGEST}}}",
        rf" ?[{KATAKANA}]{{1,{LONGEST}}}",
        rf" ?[{SOUTH_EAST_ASIAN}]{{1,{LONGEST}}}",
        rf" ?[\p{{L}}&&[^{UNSPACED}]][\p{{L}}\p{{M}}&&[^{UNSPACED}]]{{0,{LONGEST_WORD - 1}}}",
        rf" ?[\p{{N}}&&[^{UNSPACED}]]{{1,{LONGEST_WORD}}}",
        rf" ?[^\s\p{{L}}\p{{N}}{UNSPACED}]{{1,{LONGEST_WORD}}}",
        r"\s+(?!\S)|\s+",
    ]
)

# Parts of a text that hold whole pieces of the pattern, one or several.
WORDS = {
    "gpt2": re.compile(rf" ?[^{SPACE}]+|{WHITE_SPACE}"),
    "script": re.compile(
        rf" ?(?:[^{SPACE}{UNSPACED}]+"
        rf"|[{HAN}]+[{HIRAGANA}]*|[{HIRAGANA}]+|[{KATAKANA}]+|[{SOUTH_EAST_ASIAN}]+)"
        rf"|{WHITE_SPACE}"
    ),
}


def pre_tokenizer(pattern: str) -> Any:
    """The library's object that splits by "gpt2" or "script" and writes pieces as bytes."""
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(SCRIPT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def pattern_of(settings: dict[str, Any]) -> str:
    """The pattern by which a parsed `tokenizer.json` splits text: "gpt2", "script", "" for neither.

    One that normalises text, or has added tokens for text, splits otherwise.
    """
    has_text_entries = not all(token["special"] for token in settings["added_tokens"])
    if settings["normalizer"] is not None or has_text_entries:
        return ""
    for pattern in WORDS:
        if settings["pre_tokenizer"] == json.loads(pre_tokenizer(pattern).__getstate__()):
            return pattern
    return ""


# The marks in UNSPACED: vowel signs, tones, voiced kana, variants of Han characters.
_MARKED = "".join(map(chr, [*range(0x0E00, 0x1800), *range(0x3040, 0x3100)]))
MARKS = "".join(c for c in _MARKED if unicodedata.category(c)[0] == "M") + "\U000e0100-\U000e01ef"
UNITS = re.compile(rf"[{UNSPACED}][{MARKS}]*|[^{UNSPACED}\s]+")


def units(text: str) -> list[str]:
    """The words of a text; in scripts without spaces each character, with its marks, is one."""
    return UNITS.findall(text)
