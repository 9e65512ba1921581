"""What a Wasm text is, by how it begins."""

from __future__ import annotations

import pytest

from handlers.wasmtime.wasm_text import first_word


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"(module)", "module"),
        (b"\n ( component $x", "component"),
        (b";; (component\n(module", "module"),
        (b"(; (component (; nested ;) ;)(module", "module"),
        (b"(func", "func"),
        (b"(;" * 2000, ""),
        (b"(;;)" * 1000 + b"x", ""),
        (b";; only a comment", ""),
        (b"#!/bin/sh", ""),
        (b";) (module", ""),
        (b"(1", ""),
        (b"", ""),
    ],
)
def test_the_first_word(head: bytes, word: str) -> None:
    assert first_word(head) == word
