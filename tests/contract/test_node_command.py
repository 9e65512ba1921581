"""`cri-shim doctor` and `cri-shim version`, with a daemon and without."""

from __future__ import annotations

from pathlib import Path

import pytest

import cri_shim
from cri_shim import cli
from tests.support.command import served
from tests.support.wired import wired


async def test_both_versions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with wired(tmp_path) as flows, served(flows, tmp_path / "s", capsys) as run:
        said = await run("version")
    assert said.lines == [f"cri-shim {cri_shim.VERSION}", f"daemon cri-shim {cri_shim.VERSION}"]


def test_without_a_daemon_the_command_has_a_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--listen", str(tmp_path / "s")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"cri-shim {cri_shim.VERSION}"
    assert second.startswith("daemon: no daemon listens on")


async def test_the_doctor_looks_at_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "handlers: {odd: {kind: oci, path: no-such-runtime}}\n"
        f"network: {{conf_dirs: [{tmp_path}/no-cni]}}\nmonitor: {{conmon: no-such-monitor}}\n"
    )
    async with wired(tmp_path) as flows, served(flows, tmp_path / "s", capsys) as run:
        said = await run("doctor", "--config", str(config))
    assert said.status == 1
    assert f"a daemon that answers: cri-shim {cri_shim.VERSION}" in said.out
    for lacking in ("no program no-such-runtime", "no program no-such-monitor", f"{tmp_path}/no-cni"):
        assert any(line.startswith("LACKS") and lacking in line for line in said.lines), said.out


def test_a_bad_configuration_is_all_the_doctor_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("rooot: /\n")
    assert cli.main(["doctor", "--config", str(config)]) == 1
    assert "did you mean 'root'" in capsys.readouterr().err
