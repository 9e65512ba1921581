"""Which images garbage collection has to leave alone: by the configuration's globs, or because a user said so. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from cri_shim.model.image import ImageRecord
from cri_shim.model.refs import familiar


def is_pinned(record: ImageRecord, globs: Iterable[str]) -> bool:
    """True when a user has pinned the image, or one of its names matches a glob."""
    return bool(record.pins) or is_configured(record, globs)


def is_configured(record: ImageRecord, globs: Iterable[str]) -> bool:
    """True when one of the image's names matches a glob, which may be written as people write names."""
    names = [spelling for name in (*record.repo_tags, *record.repo_digests) for spelling in (name, familiar(name))]
    return any(fnmatchcase(name, glob) for glob in globs for name in names)
