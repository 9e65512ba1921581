"""Our AppArmor profile as the real parser compiles it, and its way into a kernel.

The kernel of a development machine may have no AppArmor: a file stands for its list of profiles, and a program that
has the real parser compile everything writes the names there. `tests/vm` has the real thing.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from cri_shim.adapters.apparmor import AppArmor
from cri_shim.spec.apparmor import DEFAULT_PROFILE, default_profile

pytestmark = pytest.mark.root

PARSER = "/usr/sbin/apparmor_parser"
ABOUT_THE_KERNEL = b"Cache read/write disabled"
FEATURES = Path("/etc/apparmor.d/abi/3.0")


def compiled(*options: str, text: str = "") -> bytes:
    command = [PARSER, "--skip-kernel-load", "--skip-cache", *options]
    done = subprocess.run(command, input=(text or default_profile()).encode(), check=True, capture_output=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith(ABOUT_THE_KERNEL)] == []
    return done.stdout


@pytest.mark.parametrize("features", [(), (f"--features-file={FEATURES}",)], ids=["of-the-node", "all"])
def test_the_parser_takes_it_without_a_warning(features: tuple[str, ...]) -> None:
    binary = compiled("--stdout", *features)
    assert DEFAULT_PROFILE.encode() in binary
    assert len(binary) > 1000


def test_it_is_one_profile() -> None:
    assert compiled("--names").decode().split() == [DEFAULT_PROFILE]
    assert compiled("--names", text=default_profile("daemon//child")).decode().split() == [DEFAULT_PROFILE]


class Kernel:
    """Stands for securityfs and for what the parser does to it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.profiles = directory / "profiles"
        self.calls = directory / "calls"
        self.program = directory / "apparmor_parser"
        enabled = directory / "enabled"
        enabled.write_text("Y\n")
        self.profiles.write_text("other (enforce)\n")
        monkeypatch.setattr("cri_shim.kernel.apparmor._ENABLED", enabled)
        monkeypatch.setattr("cri_shim.kernel.apparmor._PROFILES", self.profiles)
        monkeypatch.setenv("PATH", str(directory), prepend=":")
        self.parse(f'"{PARSER}" --skip-kernel-load --skip-cache --names | sed "s/$/ (enforce)/" >>{self.profiles}')

    def parse(self, script: str) -> None:
        self.program.write_text(f'#!/bin/sh\nset -e\necho "$*" >>{self.calls}\n{script}\n')
        self.program.chmod(0o755)

    @property
    def loads(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


async def test_loaded_once_for_all(kernel: Kernel) -> None:
    apparmor = AppArmor()
    await asyncio.gather(*(apparmor.load() for _ in range(3)))
    assert await apparmor.profiles() == {"other", DEFAULT_PROFILE}
    assert kernel.calls.read_text() == "--replace --skip-cache\n"
    assert not apparmor.problem


async def test_loaded_again_when_somebody_took_it_away(kernel: Kernel) -> None:
    apparmor = AppArmor()
    await apparmor.profiles()
    kernel.profiles.write_text("")
    assert await apparmor.profiles() == {DEFAULT_PROFILE}
    assert kernel.loads == 2


async def test_a_parser_that_fails_is_a_problem_until_it_works(kernel: Kernel) -> None:
    kernel.parse("cat >/dev/null; echo 'no such feature' >&2; exit 1")
    apparmor = AppArmor()
    assert await apparmor.profiles() == {"other"}
    assert apparmor.problem == "apparmor_parser: no such feature"
    kernel.parse(f"cat >/dev/null; echo '{DEFAULT_PROFILE} (enforce)' >>{kernel.profiles}")
    assert DEFAULT_PROFILE in await apparmor.profiles()
    assert not apparmor.problem


async def test_without_a_parser(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri_shim.adapters.apparmor._PARSER", "no-such-parser")
    apparmor = AppArmor()
    assert await apparmor.profiles() == {"other"}
    assert apparmor.problem == "AppArmor is on, but no-such-parser is not installed"
    assert kernel.loads == 0


@pytest.mark.parametrize("missing", ["_ENABLED", "_PROFILES"])
async def test_off(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(f"cri_shim.kernel.apparmor.{missing}", kernel.profiles.with_name("not-there"))
    apparmor = AppArmor()
    await apparmor.load()
    assert await apparmor.profiles() == frozenset()
    assert kernel.loads == 0
    assert not apparmor.problem
