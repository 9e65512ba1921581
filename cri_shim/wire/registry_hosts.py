"""Where a registry is reached: containerd's `hosts.toml` and the defaults without one.

Pure: the text of the file comes in. Settings for pushes are read over. Invariant: a
`RegistryHost` has an http or https URL that ends where the distribution API begins (`…/v2`).

Source: containerd docs/hosts.md.
"""

from __future__ import annotations

import enum
import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.refs import DEFAULT_DOMAIN

FILE_NAME = "hosts.toml"
_DEFAULT_HOSTS = {DEFAULT_DOMAIN: "registry-1.docker.io"}


class Capability(enum.Enum):
    """What a host may be asked for."""

    PULL = "pull"
    """Content by digest."""
    RESOLVE = "resolve"
    """What a tag stands for."""
    PUSH = "push"


@dataclass(frozen=True, slots=True)
class Tls:
    """How the host proves who it is, and how we do. Paths are absolute."""

    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    """Certificate and key; without a key the certificate's file holds both."""
    skip_verify: bool = False


@dataclass(frozen=True, slots=True)
class RegistryHost:
    """One place to ask, in the order of the configuration."""

    url: str
    """Base of the API, without a slash at the end."""
    capabilities: frozenset[Capability] = frozenset({Capability.PULL, Capability.RESOLVE})
    tls: Tls = Tls()
    headers: tuple[tuple[str, str], ...] = ()
    is_mirror: bool = False
    connect_seconds: float = 0
    """How long a connection may take to be there; 0: the default."""

    @property
    def authority(self) -> str:
        """`host[:port]`, for messages and for matching credentials."""
        return urlsplit(self.url).netloc


def directory_names(domain: str) -> tuple[str, ...]:
    """The directories of a registry below a configuration directory, in the order of preference."""
    host, colon, port = domain.rpartition(":")
    if colon and port.isdigit():
        return (f"{host}_{port}_", domain, host, "_default")
    return (domain, "_default")


def default_host(domain: str) -> RegistryHost:
    """The registry itself: TLS, but for loopback names, which speak plain HTTP."""
    scheme = "http" if _is_loopback(domain) else "https"
    return RegistryHost(f"{scheme}://{_DEFAULT_HOSTS.get(domain, domain)}/v2")


def parse_hosts(text: str, domain: str, file: Path) -> tuple[RegistryHost, ...]:
    """The hosts of a file, mirrors first, the registry itself last.

    FailedPrecondition that names the file and the key for what cannot be read.
    """
    try:
        document = tomllib.loads(text)
        mirrors = document.get("host", {})
        if not isinstance(mirrors, dict):
            raise ValueError("'host' must be a table")
        hosts = [_host(url, table, file.parent, is_mirror=True) for url, table in mirrors.items()]
        server = document.get("server")
        if server is None:
            hosts.append(default_host(domain))
        else:
            own = {key: value for key, value in document.items() if key not in {"host", "server"}}
            hosts.append(_host(_string(server, "server"), own, file.parent, is_mirror=False))
    except ValueError as error:  # TOMLDecodeError is one
        msg = f"{file}: {error}"
        raise FailedPrecondition(msg, hint="see containerd's docs/hosts.md for the format") from None
    return tuple(hosts)


def _host(url: str, table: Any, directory: Path, *, is_mirror: bool) -> RegistryHost:
    if not isinstance(table, Mapping):
        msg = f"host {url!r} must be a table"
        raise ValueError(msg)
    capabilities = _strings(table.get("capabilities", ["pull", "resolve", "push"]), f"capabilities of {url!r}")
    tls = Tls(
        ca=tuple(directory / path for path in _strings(table.get("ca", []), f"ca of {url!r}")),
        client=_client_pairs(table.get("client", []), url, directory),
        skip_verify=_boolean(table.get("skip_verify", False), f"skip_verify of {url!r}"),
    )
    return RegistryHost(
        url=_base_url(url, override_path=_boolean(table.get("override_path", False), f"override_path of {url!r}")),
        capabilities=frozenset(Capability(name) for name in capabilities),
        tls=tls,
        headers=_headers(table.get("header", {}), url),
        is_mirror=is_mirror,
        connect_seconds=_seconds(table.get("dial_timeout", "0s"), f"dial_timeout of {url!r}"),
    )


def _base_url(url: str, *, override_path: bool) -> str:
    text = url if "://" in url else f"https://{url}"
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
        msg = f"{url!r} is not an http or https URL of a registry"
        raise ValueError(msg)
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return base if override_path or base.endswith("/v2") else f"{base}/v2"


def _client_pairs(value: Any, url: str, directory: Path) -> tuple[tuple[Path, Path | None], ...]:
    """A file, a list of files, or a list of pairs of certificate and key."""
    pairs: list[tuple[Path, Path | None]] = []
    for item in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        match item:
            case str(certificate):
                pairs.append((directory / certificate, None))
            case [str(certificate), str(key)]:
                pairs.append((directory / certificate, directory / key if key else None))
            case _:
                msg = f"client of {url!r} must be files or pairs of files"
                raise ValueError(msg)
    return tuple(pairs)


def _headers(value: Any, url: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        msg = f"header of {url!r} must be a table"
        raise ValueError(msg)
    pairs = [(name, text) for name, texts in value.items() for text in _strings(texts, f"header {name!r} of {url!r}")]
    if any(not character.isprintable() for pair in pairs for text in pair for character in text):
        msg = f"header of {url!r} has control characters"
        raise ValueError(msg)
    return tuple(pairs)


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"(?:\d+(?:\.\d*)?(?:h|ms|us|ns|m|s))+")


def _seconds(value: Any, what: str) -> float:
    """A duration as Go writes it."""
    if not isinstance(value, str) or _DURATION.fullmatch(value) is None:
        msg = f"{what} must be a duration, such as '10s'"
        raise ValueError(msg)
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([a-z]+)", value))


def _strings(value: Any, what: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        msg = f"{what} must be a string or a list of strings"
        raise ValueError(msg)
    return tuple(items)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        msg = f"{what} must be a string"
        raise ValueError(msg)
    return value


def _boolean(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        msg = f"{what} must be true or false"
        raise ValueError(msg)
    return value


def _is_loopback(domain: str) -> bool:
    host = urlsplit(f"//{domain}").hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
