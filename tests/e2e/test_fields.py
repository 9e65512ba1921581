"""Each field of the conformance page that is about a Linux container, as a process in the container sees it.

One field at a time, next to a container without it; how fields work together is in the tests that the page names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.protobuf import text_format

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.e2e.field_rows import FILES, IMAGE, ROWS, Row
from tests.support import images, markdown
from tests.support.cri import Cri, Pod
from tests.support.daemon import Daemon

HERE = "e2e/test_fields.py::test_what_a_process_sees"
PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
TABLES = {"PodSandboxConfig": "Pods: `PodSandboxConfig`", "ContainerConfig": "Linux containers"}
NOT_FROM_INSIDE = ("unit/", "kernel/", "e2e/test_bad_input.py")

NOT_TO_BE_SEEN = {
    **dict.fromkeys(
        ("metadata.name", "metadata.namespace", "metadata.uid", "metadata.attempt", "labels"),
        "names for the client, which get them back",
    ),
    "image.user_specified_image": "an annotation for the runtime",
}
"""Supported fields that no test in a container looks at, and why."""


@dataclass(slots=True)
class Site:
    """A daemon with what the words of the rows stand for, a plain pod, and what a plain container sees of each row."""

    lab: Lab
    handler: str
    words: dict[str, str]
    pod: Pod
    plain: dict[int, str] = field(default_factory=dict)

    def replaced(self, text: str) -> str:
        return re.sub(r"@(\w+)@", lambda match: self.words[match[1]], text)

    def seen(self, number: int, row: Row) -> str:
        """What the script of a row says in its container."""
        pod = self.pod
        if row.pod:
            sandbox = self.lab.pod_config(network=pb.POD)
            text_format.Merge(self.replaced(row.pod), sandbox)
            pod = self.lab.pod(self.handler, config=sandbox)
        config = self.lab.shell(row.script, name=f"row-{number}")
        text_format.Merge(self.replaced(row.config), config)
        return _said(self.lab.cri, self.lab.cri.run(pod, config))

    def look(self) -> None:
        """Let a container without any field go through all scripts."""
        script = "\n".join(f"({row.script}) 2>/dev/null; echo '@{number}'" for number, row in enumerate(ROWS))
        rest = _said(self.lab.cri, self.lab.cri.run(self.pod, self.lab.shell(script)))
        for number in range(len(ROWS)):
            self.plain[number], _, rest = rest.partition(f"@{number}")


def _said(cri: Cri, container: str) -> str:
    cri.wait_exit(container)
    return "\n".join(line.text.rstrip("\r") for line in cri.log(container) if line.stream == "stdout").strip()


@pytest.fixture(scope="module", params=["runc", "crun"])
def site(
    request: pytest.FixtureRequest,
    shared_daemon: Daemon,
    busybox: str,
    registry: images.Registry,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("node")
    for name, content in FILES.items():
        (directory / name).write_text(content)
    layer = images.layer([images.file(name, content.encode()) for name, content in IMAGE.items()])
    other = registry.push("fields/other:1", images.image([*images.busybox_image().blobs[1:], layer], {}))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    words = {"dir": str(directory), "other": other, "capabilities": status["CapEff"].strip()}
    words |= {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "ipc", "uts", "pid")}
    with shared_daemon.client() as cri:
        for image in (busybox, other):
            cri.pull(image)
        lab = Lab(shared_daemon, cri, busybox, "")
        site = Site(lab, request.param, words, lab.pod(request.param, network=pb.POD))
        site.look()
        yield site
        cri.remove_all_pods()


@pytest.mark.root
@pytest.mark.parametrize(
    ("number", "row"), list(enumerate(ROWS)), ids=[row.fields[0].partition(".")[2] for row in ROWS]
)
def test_what_a_process_sees(site: Site, number: int, row: Row) -> None:
    expected = site.replaced(row.seen).strip()
    assert site.seen(number, row) == expected
    assert (site.plain[number].strip() == expected) is row.same_without


def test_each_supported_field_is_seen_from_inside() -> None:
    """By a row here, or by another test with a container that the page names: not by the specification alone."""
    here = {name for row in ROWS for name in row.fields}
    for message, heading in TABLES.items():
        for row in markdown.rows(PAGE):
            if not row.headings[-1].startswith(heading):
                continue
            names, tests = row.codes(0), row.codes(2)
            rows = {name for name in names if f"{message}.{name}" in here}
            assert bool(rows) is (HERE in tests), f"{names}: {HERE}"
            others = [test for test in tests if test != HERE and not test.startswith(NOT_FROM_INSIDE)]
            if row.cells[1].startswith("supported"):
                assert others or set(names) - rows <= NOT_TO_BE_SEEN.keys(), names


def test_rows_set_what_they_are_about() -> None:
    for row in ROWS:
        for name in row.fields:
            message, *_, field_name = name.split(".")
            text = row.pod if message == "PodSandboxConfig" else row.config
            assert re.search(rf"\b{field_name}\b", text), name
