"""Options of applets, as GNU's getopt(3) takes them: mixed with operands, letters together, `--` before operands only.

Not the standard library's getopt: importing that takes longer than most applets run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class UsageError(Exception):
    """The words are not what the applet takes."""


def options(words: Sequence[str], short: str, long: Collection[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Options (by name, as `-l` or `--format`, with their values) and operands. UsageError.

    `short` has the letters, each with a colon behind it when it takes a value; long names that take one end with `=`.
    """
    found: dict[str, str] = {}
    operands: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return found, operands + rest
        if word.startswith("--"):
            _take_long(word, rest, long, found)
        elif word.startswith("-") and word != "-":
            _take_letters(word[1:], rest, short, found)
        else:
            operands.append(word)
    return found, operands


def _take_long(word: str, rest: list[str], long: Collection[str], found: dict[str, str]) -> None:
    name, equals, value = word.partition("=")
    takes_value = f"{name[2:]}=" in long
    if not takes_value and (equals or name[2:] not in long):
        msg = f"unrecognized option {word!r}"
        raise UsageError(msg)
    if takes_value and not equals:
        value = _next(rest, f"option {name!r} requires an argument")
    found[name] = value


def _take_letters(letters: str, rest: list[str], short: str, found: dict[str, str]) -> None:
    while letters:
        letter, letters = letters[0], letters[1:]
        at = short.find(letter)
        if at < 0 or letter == ":":
            msg = f"invalid option -- {letter!r}"
            raise UsageError(msg)
        found[f"-{letter}"] = ""
        if short[at + 1 : at + 2] == ":":
            found[f"-{letter}"] = letters or _next(rest, f"option requires an argument -- {letter!r}")
            return


def _next(rest: list[str], otherwise: str) -> str:
    if not rest:
        raise UsageError(otherwise)
    return rest.pop(0)
