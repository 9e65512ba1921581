"""Proxies from the environment: which requests take them, and which go around."""

from __future__ import annotations

import pytest

from cri_shim.wire.proxy import Proxies

PROXY = "http://proxy.example:3128"


def proxies(no_proxy: str = "") -> Proxies:
    return Proxies.from_environment({"HTTPS_PROXY": PROXY, "http_proxy": "proxy.example:80", "NO_PROXY": no_proxy})


def test_each_scheme_has_its_own() -> None:
    assert proxies().for_url("https://registry.example/v2/") == PROXY
    assert proxies().for_url("http://registry.example/v2/") == "http://proxy.example:80"
    assert Proxies.from_environment({}).for_url("https://registry.example/") is None


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1", "127.8.0.1:80", "[::1]:5000"])
def test_nothing_on_loopback_takes_one(host: str) -> None:
    assert proxies().for_url(f"https://{host}/v2/") is None


@pytest.mark.parametrize(
    ("no_proxy", "host", "around"),
    [
        ("*", "registry.example", True),
        ("registry.example", "registry.example", True),
        ("registry.example", "a.registry.example", True),
        ("registry.example", "aregistry.example", False),
        ("REGISTRY.example", "registry.EXAMPLE", True),
        (".registry.example", "a.registry.example", True),
        (".registry.example", "registry.example", False),
        ("*.registry.example", "a.registry.example", True),
        ("registry.example:443", "registry.example", True),
        ("registry.example:5000", "registry.example", False),
        ("registry.example:5000", "registry.example:5000", True),
        ("a.example, ,10.0.0.0/8", "10.96.0.1:5000", True),
        ("10.0.0.0/8", "11.0.0.1", False),
        ("10.0.0.0/8", "registry.example", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.10", False),
        ("fd00::/8", "[fd00::1]:5000", True),
        ("fd00::1", "[fd00::1]", True),
        ("10.0.0.0/x", "10.0.0.1", False),
    ],
)
def test_what_goes_around(no_proxy: str, host: str, around: bool) -> None:
    assert (proxies(no_proxy).for_url(f"https://{host}/v2/") is None) == around
