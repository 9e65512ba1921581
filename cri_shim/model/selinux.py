"""SELinux labels as values: `user:role:type[:level]` (selinux(8))."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Contexts:
    """What the node's policy says of containers: where every label begins."""

    process: str
    file: str


@dataclass(frozen=True, slots=True)
class Label:
    """Of a container: `process` of what runs in it, `mount` of its files."""

    process: str
    mount: str
