"""What a Wasm text is, by how it begins: for who must know before it is parsed, which only the compiler does.

Source: core specification, text format, lexical format; the component model's text format.
"""

from __future__ import annotations

import re
from typing import Final

_PIECE: Final = re.compile(rb"\s+|;;[^\n]*|\(;|;\)|(?P<word>\(\s*[a-z]+)|.", re.DOTALL)


def first_word(head: bytes) -> str:
    """The first word in parentheses, past white space and comments; empty when it does not begin as a text does."""
    depth = 0
    for piece in _PIECE.finditer(head):
        text = piece[0]
        if text == b"(;":
            depth += 1
        elif text == b";)" and depth:
            depth -= 1
        elif not depth and not text.startswith(b";;") and not text.isspace():
            word = piece["word"]
            return word[1:].strip().decode() if word is not None else ""
    return ""
