"""Options of applets, as GNU's getopt(3) takes them."""

from __future__ import annotations

import pytest

from handlers.wasmtime.applets.options import UsageError, options


@pytest.mark.parametrize(
    ("words", "found", "operands"),
    [
        ([], {}, []),
        (["a", "-l", "-"], {"-l": ""}, ["a", "-"]),
        (["-la", "x"], {"-l": "", "-a": ""}, ["x"]),
        (["-lfx", "y"], {"-l": "", "-f": "x"}, ["y"]),
        (["-f", "-x", "y"], {"-f": "-x"}, ["y"]),
        (["-l", "--", "-a"], {"-l": ""}, ["-a"]),
        (["--name=v", "--plain"], {"--name": "v", "--plain": ""}, []),
        (["--name", "v"], {"--name": "v"}, []),
    ],
)
def test_options(words: list[str], found: dict[str, str], operands: list[str]) -> None:
    assert options(words, "laf:", ("name=", "plain")) == (found, operands)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-z"], "invalid option -- 'z'"),
        (["-:"], "invalid option -- ':'"),
        (["-f"], "option requires an argument -- 'f'"),
        (["--other"], "unrecognized option '--other'"),
        (["--plain=x"], "unrecognized option '--plain=x'"),
        (["--name"], "option '--name' requires an argument"),
    ],
)
def test_words_that_are_none(words: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=f"^{text}$"):
        options(words, "laf:", ("name=", "plain"))
