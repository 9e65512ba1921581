"""Which proxy a request goes through: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as programs written in Go read them.

Pure: the environment comes in. Not the library's reading of it, which knows no networks in NO_PROXY (nodes have their
pod and service networks there). Invariant: nothing on loopback goes through a proxy.

Source: golang.org/x/net/http/httpproxy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxies:
    """A proxy for each scheme, as a URL, and what goes around them."""

    by_scheme: Mapping[str, str]
    exceptions: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Proxies:
        """Names in capitals go before those in small letters."""

        def value(name: str) -> str:
            return environment.get(name) or environment.get(name.lower(), "")

        proxies = {scheme: value(f"{scheme.upper()}_PROXY").strip() for scheme in _PORTS}
        exceptions = (entry.strip().lower() for entry in value("NO_PROXY").split(","))
        return cls({scheme: _url(proxy) for scheme, proxy in proxies.items() if proxy}, tuple(filter(None, exceptions)))

    def for_url(self, url: str) -> str | None:
        """The URL of the proxy, or None."""
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme)
        proxy = self.by_scheme.get(parts.scheme)
        if proxy is None or host == "localhost" or any(_covers(entry, host, port) for entry in self.exceptions):
            return None
        address = _address(host)
        return None if address is not None and address.is_loopback else proxy


def _url(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _covers(entry: str, host: str, port: int | None) -> bool:
    if entry == "*":
        return True
    address = _address(host)
    if "/" in entry:
        try:
            return address is not None and address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    if _address(entry) is None:
        name, colon, digits = entry.rpartition(":")
        if colon and digits.isdigit():
            if int(digits) != port:
                return False
            entry = name
    entry = entry.strip("[]")
    if address is not None or _address(entry) is not None:
        return address is not None and address == _address(entry)
    domain = entry.removeprefix("*").removeprefix(".")
    return host.endswith(f".{domain}") or (host == domain and domain == entry)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
