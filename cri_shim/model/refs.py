"""Image references as users write them, normalised as docker does, and the search for an image by any of them.

Pure values; nothing here knows a registry. Invariant: an `ImageRef` is valid and complete: it has a domain, a path, and
a tag or a digest or both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.ids import Digest, ImageId, parse_digest
from cri_shim.model.image import ImageRecord

DEFAULT_DOMAIN = "docker.io"
_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library"
_DEFAULT_TAG = "latest"
_MAX_NAME = 255  # distribution: RepositoryNameTotalLengthMax
_MAX_REFERENCE = 1024  # far above name + tag + digest; bounds the work and what an error repeats
_SHOWN = 100  # characters of a bad reference that an error repeats

_HOST_PART = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?")
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_ID_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{1,64})")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """`domain/path[:tag][@digest]`. With both, the digest decides and the tag is only what the user wrote."""

    domain: str
    path: str
    tag: str | None
    digest: Digest | None

    @property
    def name(self) -> str:
        """The repository with its domain, without tag and digest."""
        return f"{self.domain}/{self.path}"

    @property
    def repo_tag(self) -> str | None:
        """`name:tag` where the tag is what was asked for; None when a digest decides."""
        return f"{self.name}:{self.tag}" if self.digest is None else None

    @property
    def repo_digest(self) -> str | None:
        """`name@digest` where a digest is part of the reference."""
        return self.at(self.digest) if self.digest is not None else None

    def at(self, digest: Digest) -> str:
        """`name@digest`, an entry of `repo_digests`."""
        return f"{self.name}@{digest}"

    @property
    def text(self) -> str:
        """The full reference, as `parse_reference` takes it."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


@functools.lru_cache(maxsize=256)
def parse_reference(text: str) -> ImageRef:
    """Parse what a user or the kubelet wrote; `busybox` is `docker.io/library/busybox:latest`.

    Raises InvalidArgument that names the reference and the part that is wrong.
    """
    if len(text) > _MAX_REFERENCE:
        raise _invalid(text, f"it is longer than {_MAX_REFERENCE} characters")
    rest, at, digest_text = text.partition("@")
    digest = _parse_digest(text, digest_text) if at else None
    name, tag = _split_tag(rest)
    if tag is not None and _TAG.fullmatch(tag) is None:
        raise _invalid(text, f"the tag {tag[:_SHOWN]!r} is not 1 to 128 letters, digits, '_', '.' or '-'")
    domain, path = _split_domain(name)
    _check_name(text, domain, path)
    if tag is None and digest is None:
        tag = _DEFAULT_TAG
    return ImageRef(domain=domain, path=path, tag=tag, digest=digest)


def familiar(name: str) -> str:
    """A full name as people write it: without docker's domain and its `library`."""
    domain, _, path = name.partition("/")
    return path.removeprefix(f"{_OFFICIAL}/") if domain == DEFAULT_DOMAIN else name


def find_images(records: Iterable[ImageRecord], text: str) -> tuple[ImageRecord, ...]:
    """All images that `text` names: an id, `name:tag`, `name@digest`, `name:tag@digest`, or an id prefix.

    A name goes before an id prefix (an image called `cafe` stays reachable). More than one record is returned only
    where one name stands for several platforms. Raises InvalidArgument for a prefix that fits several images and for
    text that is no reference at all.
    """
    records = tuple(records)
    prefix = _ID_PREFIX.fullmatch(text)
    if prefix is not None and len(prefix[1]) == 64:
        image_id = ImageId(f"sha256:{prefix[1]}")
        return tuple(record for record in records if record.id == image_id)
    # `sha256:abc` also reads as the repository `sha256` with a tag; the id is what is meant.
    named = () if text.startswith("sha256:") else _find_named(records, parse_reference(text))
    if named or prefix is None:
        return named
    found = tuple(record for record in records if record.id.startswith(f"sha256:{prefix[1]}"))
    if len(found) > 1:
        msg = f"image id prefix {text!r} is ambiguous, it fits {len(found)} images"
        raise InvalidArgument(msg, hint="give more characters of the id")
    return found


def find_image(records: Iterable[ImageRecord], text: str) -> ImageRecord | None:
    """The image that `text` names, or None. Errors as in `find_images`."""
    found = find_images(records, text)
    return found[0] if found else None


def tag_of(text: str, found: Sequence[ImageRecord]) -> str | None:
    """The tag by which `text` names the images found; None when it is an id or has a digest."""
    try:
        tag = parse_reference(text).repo_tag
    except InvalidArgument:  # an id
        return None
    return tag if tag is not None and all(tag in record.repo_tags for record in found) else None


def _find_named(records: tuple[ImageRecord, ...], ref: ImageRef) -> tuple[ImageRecord, ...]:
    if ref.digest is not None:
        repo_digest = ref.at(ref.digest)
        return tuple(record for record in records if repo_digest in record.repo_digests)
    return tuple(record for record in records if ref.repo_tag in record.repo_tags)


def _split_tag(rest: str) -> tuple[str, str | None]:
    """Cut the tag off; a colon before the last slash belongs to the port."""
    colon = rest.rfind(":")
    if colon > rest.rfind("/"):
        return rest[:colon], rest[colon + 1 :]
    return rest, None


def _split_domain(name: str) -> tuple[str, str]:
    """Docker's rule: the first part is a host if it could be nothing else."""
    first, slash, remainder = name.partition("/")
    is_host = slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first)
    domain, path = (first, remainder) if is_host else (DEFAULT_DOMAIN, name)
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"{_OFFICIAL}/{path}"
    return domain, path


def _check_name(text: str, domain: str, path: str) -> None:
    if _DOMAIN.fullmatch(domain) is None:
        raise _invalid(text, f"{domain[:_SHOWN]!r} is not a registry host")
    if _PATH.fullmatch(path) is None:
        if path != path.lower():
            raise _invalid(text, "the repository name must be lower case")
        raise _invalid(text, "the repository name is empty or has characters that are not allowed")
    if len(domain) + 1 + len(path) > _MAX_NAME:
        raise _invalid(text, f"the repository name is longer than {_MAX_NAME} characters")
    if _HEX64.fullmatch(path.removeprefix(f"{_OFFICIAL}/")) is not None:
        raise _invalid(text, "64 hex characters are an image id, not a name")


def _parse_digest(text: str, digest: str) -> Digest:
    try:
        return parse_digest(digest)
    except InvalidArgument as error:
        raise _invalid(text, error.cause) from None


def _invalid(text: str, reason: str) -> InvalidArgument:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return InvalidArgument(f"invalid image reference {shown!r}: {reason}")
