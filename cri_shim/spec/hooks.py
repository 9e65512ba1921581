"""OCI hooks that the node gives its containers: files in the format of oci-hooks(5), version 1.0.0.

Not the reading of the files (`cri_shim.adapters.hooks`) and not the running, which the runtime does. Invariant: a file
that is not understood in full is an error, never left out: a hook may be what protects the node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from cri_shim.spec.facts import Json

STAGES: Final = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
Stage = Literal["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A mapping whose keys are all known."""


class Hook(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """As in the OCI runtime spec."""

    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: int | None = None


class When(_Part, frozen=True, kw_only=True):
    """Every condition that is there has to hold, and at least one is there. Texts are regular expressions."""

    always: bool | None = None
    annotations: dict[str, str] = {}
    """For each pair an annotation whose key and value fit."""
    commands: tuple[str, ...] = ()
    """One of them fits the first word of the command."""
    has_bind_mounts: bool | None = None


class HookFile(_Part, frozen=True, kw_only=True):
    """One file."""

    version: str
    hook: Hook
    when: When
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """What the conditions of a hook are about."""

    command: str
    annotations: Mapping[str, str]
    """Those of the container and of its pod, as the client has set them."""
    bind_mounts: bool


def parse_hook(data: bytes) -> HookFile:
    """Parse a file. ValueError says what is wrong with it."""
    file = msgspec.json.decode(data, type=HookFile)
    if file.version != "1.0.0":
        raise ValueError(f"version {file.version!r} is not 1.0.0")
    if not file.hook.path.startswith("/"):
        raise ValueError(f"hook.path {file.hook.path!r} is not an absolute path")
    if file.when == When():
        raise ValueError("when has no condition")
    if not file.stages:
        raise ValueError("stages is empty")
    for pattern in (*file.when.annotations, *file.when.annotations.values(), *file.when.commands):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"when: {pattern!r} is not a regular expression: {error}") from error
    return file


def matches(when: When, subject: Subject) -> bool:
    """Whether the hook is for this container."""
    return (
        when.always is not False
        and when.has_bind_mounts in {None, subject.bind_mounts}
        and all(_annotated(key, value, subject.annotations) for key, value in when.annotations.items())
        and (not when.commands or any(re.search(pattern, subject.command) for pattern in when.commands))
    )


def of_container(files: Iterable[HookFile], subject: Subject) -> dict[str, list[Json]]:
    """`hooks` (OCI runtime-spec, config) by stage: of the files those that fit, in their order."""
    fitting = [file for file in files if matches(file.when, subject)]
    found = {stage: [file.hook for file in fitting if stage in file.stages] for stage in STAGES}
    return {stage: [msgspec.to_builtins(hook) for hook in hooks] for stage, hooks in found.items() if hooks}


def merged(*sources: Mapping[str, Iterable[Json]]) -> dict[str, list[Json]]:
    """Hooks of several sources, stage by stage, earlier sources first."""
    together = {stage: [hook for source in sources for hook in source.get(stage, ())] for stage in STAGES}
    return {stage: hooks for stage, hooks in together.items() if hooks}


def _annotated(key: str, value: str, annotations: Mapping[str, str]) -> bool:
    return any(re.search(key, name) and re.search(value, said) for name, said in annotations.items())
