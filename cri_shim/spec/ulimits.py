"""Resource limits of processes (setrlimit(2)) as a configuration writes them: `nofile=1024:4096`, as for docker.

Not a field of the CRI: they come from the handler's configuration alone. Invariant: runtimes take what is parsed here.
"""

from __future__ import annotations

from collections.abc import Iterable

from cri_shim.spec.facts import Json

_NAMES = (
    *("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss"),
    *("rtprio", "rttime", "sigpending", "stack"),
)
_UNLIMITED = 2**64 - 1
_WORDS = {"unlimited": _UNLIMITED, "-1": _UNLIMITED}


def parse_ulimits(limits: Iterable[str]) -> tuple[Json, ...]:
    """`process.rlimits` (OCI runtime-spec, config) of `NAME=SOFT[:HARD]`; a number, `unlimited` or -1.

    ValueError says which is none. Of two for one name the later one wins.
    """
    parsed = [_parse(limit) for limit in limits]
    return tuple({rlimit["type"]: rlimit for rlimit in parsed}.values())


def _parse(limit: str) -> Json:
    name, _, values = limit.partition("=")
    soft_text, has_hard, hard_text = values.partition(":")
    if name not in _NAMES:
        raise ValueError(f"default_ulimits: {limit!r} does not begin with one of {', '.join(_NAMES)}")
    soft = _value(soft_text, limit)
    hard = _value(hard_text, limit) if has_hard else soft
    if soft > hard:
        raise ValueError(f"default_ulimits: the soft limit of {limit!r} is above the hard one")
    return {"type": f"RLIMIT_{name.upper()}", "soft": soft, "hard": hard}


def _value(text: str, limit: str) -> int:
    if text in _WORDS:
        return _WORDS[text]
    if not text.isascii() or not text.isdigit() or int(text) > _UNLIMITED:
        raise ValueError(f"default_ulimits: {limit!r} is not of the form NAME=SOFT[:HARD]")
    return int(text)
