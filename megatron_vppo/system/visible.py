"""Characters that are not seen but act, as symbols: text of others, on its way to a terminal or to a page.

A model, a row of a data set or the name of a file may hold such characters. A terminal obeys escape sequences, and text
after U+202E is drawn from right to left, so that what is read is not what is there.
"""

from __future__ import annotations

import re

UNSEEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but line feed and tab
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # direction of the text
    "\u00ad\u180e\u200b\u2060-\u2064\ufeff"  # no width
    "\u2028\u2029"  # line and paragraph separators
    "\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # annotations and layout of rare scripts
    "\U000e0000-\U000e007f"  # tags: a hidden copy of ASCII
    "\ud800-\udfff"  # halves of a pair, which UTF-8 cannot hold
    "]"
)
"""The characters that are shown as symbols. The joiners U+200C and U+200D are left: scripts and emoji need them."""


def visible(text: str) -> str:
    """Returns the text with a symbol in place of each character of UNSEEN: '␛' for an escape, '<U+202E>' for others."""
    return UNSEEN.sub(lambda found: symbol(found[0]), text)


def symbol(character: str) -> str:
    """Returns Unicode's symbol for an ASCII control character, and the number of any other character: '<U+202E>'."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the symbols from U+2400 on are in the order of ASCII
    return "␡" if code == 0x7F else f"<U+{code:04X}>"
