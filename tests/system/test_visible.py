"""Characters that act without being seen are shown, and all others stay as they are."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from megatron_vppo.system.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b", "a␀b"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x07\x08\r\x0b\x0c\x1f\x7f", "␇␈␍␋␌␟␡"),
        ("\x85\x9b2J", "<U+0085><U+009B>2J"),
        ("photo_\u202egnp.exe", "photo_<U+202E>gnp.exe"),
        ("\u2066a\u2069\u200e\u200f\u061c", "<U+2066>a<U+2069><U+200E><U+200F><U+061C>"),
        ("1\u200b2\ufeff\u2060", "1<U+200B>2<U+FEFF><U+2060>"),
        ("half a pair \ud83d, \udcff", "half a pair <U+D83D>, <U+DCFF>"),
        ("\U000e0061 tag", "<U+E0061> tag"),
        ("a\u2028b\u2029c", "a<U+2028>b<U+2029>c"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "lines\nand\ttabs",
        "x² ≤ √π, ∅, ␀",
        "日本語 العربية עברית हिन्दी",
        "می\u200cخواهم",  # Persian is spelled with the zero-width non-joiner,
        "👨\u200d👩\u200d👧 ❤\ufe0f",  # and emoji of several people with the joiner
        "<U+202E>",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert visible(text) == text


def test_every_control_character_surrogate_and_direction_is_shown() -> None:
    """By Python's table of characters: general categories, and the classes of the bidirectional algorithm."""
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}
    kept = set("\n\t\u200c\u200d")
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        acts = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        acts = acts or (unicodedata.category(character) == "Cf" and unicodedata.bidirectional(character) in directions)
        if acts and character not in kept:
            assert visible(character) != character, f"U+{code:04X}"
        elif unicodedata.category(character)[0] in "LMNPS":
            assert visible(character) == character, f"U+{code:04X}"
