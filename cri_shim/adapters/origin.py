"""Where the content of an image comes from: a registry, or an archive. What a pull needs of either."""

from __future__ import annotations

from typing import Protocol

from cri_shim.adapters.content import Ingest, WrongContentError
from cri_shim.adapters.registry import Document
from cri_shim.model.ids import Digest


class Origin(Protocol):
    """One image there. All methods raise PullError for what is not there or not right."""

    async def resolve(self) -> Document:
        """The manifest or index of the image."""

    async def manifest(self, digest: Digest) -> Document:
        """A manifest that an index names."""

    async def blob(self, ingest: Ingest) -> None:
        """Complete and verify a blob, from where `ingest` is."""

    def worth_another(self, error: WrongContentError) -> bool:
        """Whether the next attempt at a blob that was wrong will be different."""
