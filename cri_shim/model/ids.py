"""Identifiers of pods, containers and content. A value of these types is valid; `str` enters through `parse_*` only."""

from __future__ import annotations

import os
import re
from typing import NewType

from cri_shim.model.errors import InvalidArgument

PodId = NewType("PodId", str)
"""64 lower-case hex characters."""

ContainerId = NewType("ContainerId", str)
"""64 lower-case hex characters."""

Digest = NewType("Digest", str)
"""`sha256:` and 64 lower-case hex characters (OCI image-spec, descriptor)."""

ImageId = NewType("ImageId", str)
"""A Digest: of the image config, or of the manifest where the config says nothing (Wasm artifacts)."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SHORT = 13
"""Characters of an id that are shown to people."""


def new_pod_id() -> PodId:
    """A fresh random id."""
    return PodId(os.urandom(32).hex())


def new_container_id() -> ContainerId:
    """A fresh random id."""
    return ContainerId(os.urandom(32).hex())


def parse_digest(text: str, what: str = "digest") -> Digest:
    """Parse `sha256:<hex>`; any other algorithm or form is an InvalidArgument that names `what`."""
    if _DIGEST.fullmatch(text) is None:
        msg = f"{what} {text[:100]!r} is not of the form sha256:<64 hex characters>"
        raise InvalidArgument(msg)
    return Digest(text)


def digest_hex(digest: Digest | ImageId) -> str:
    """The 64 hex characters, fit for a file name."""
    return digest.removeprefix("sha256:")
