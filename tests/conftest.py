"""Fixtures for all tests, and the rule where tests that need root run.

A test that is marked `root` runs only inside the namespaces that `scripts/test` makes, one that is marked `vm` only in
the machine that `scripts/test-vm` makes; anywhere else it is skipped and says so. Invariant: a test that passed has
left nothing behind, since the end of the `daemon` fixture looks.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hypothesis
import pytest

from tests.support import go_guests, images, leftovers
from tests.support.cri import Cri
from tests.support.daemon import Daemon

PRIVATE_NAMESPACE = "CRI_SHIM_PRIVATE_NS"

# The same examples in every run, so that a change is what makes a test fail; a full run looks for new ones. How long an
# example takes is the machine's affair.
hypothesis.settings.register_profile(
    "steady",
    derandomize="CRI_SHIM_FULL" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("steady")
VIRTUAL_MACHINE = "CRI_SHIM_TEST_VM"
CGROUP_DRIVER = "CRI_SHIM_TEST_CGROUP_DRIVER"
"""For daemons that no test gives another; cgroupfs, which works everywhere, is the default."""

MakeDaemon = Callable[..., Daemon]
"""`make_daemon(settings=None, shared_root=False)`: a further daemon, started, closed at the end of the test."""

_numbers = itertools.count()
_daemons = pytest.StashKey[list[Daemon]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if os.geteuid() != 0 or PRIVATE_NAMESPACE not in os.environ:
        missing["root"] = "needs root in private namespaces: run scripts/test as root"
    if VIRTUAL_MACHINE not in os.environ:
        missing["vm"] = "needs a machine of its own with systemd and cgroup v2: run scripts/test-vm"
    for marker, reason in missing.items():
        for item in items:
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the end of each daemon's log to the report of a test that failed."""
    report = yield
    if report.failed:
        for daemon in [daemon for node in item.listchain() for daemon in node.stash.get(_daemons, [])]:
            report.sections.append((f"cri-shim log, {daemon.log}", daemon.log_tail()))
    return report


@pytest.fixture(scope="session")
def run_name() -> Iterator[str]:
    """The name of this test run, unique on the machine. Its cgroup goes with it."""
    name = os.environ.get(leftovers.RUN_VARIABLE) or f"{os.getpid()}"
    yield name
    leftovers.remove_cgroup(f"/{leftovers.CGROUP_PREFIX}{name}")


@pytest.fixture(scope="session")
def short_directory() -> Iterator[Path]:
    """A directory with a short path: the address of a unix socket has 107 bytes, a container id takes 64 of them."""
    given = os.environ.get("CRI_SHIM_TEST_DIRECTORY")
    directory = Path(given or tempfile.mkdtemp(prefix="cs."))
    directory.chmod(0o711)
    yield directory
    if not given and not any(Path(point).is_relative_to(directory) for point in leftovers.mount_points()):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def registry(short_directory: Path) -> Iterator[images.Registry]:
    """A real registry on loopback, filled by whoever needs an image."""
    with images.registry(short_directory / "registry") as running:
        yield running


@pytest.fixture(scope="session")
def busybox(registry: images.Registry) -> str:
    """The reference of an image with a shell and the usual programs."""
    return registry.push_busybox("test/busybox:1")


@pytest.fixture(scope="session")
def wasm_hello(registry: images.Registry) -> str:
    """The reference of a Wasm artifact that prints one line and ends."""
    return registry.push_wasm("test/hello:1")


@pytest.fixture(scope="session")
def go_server(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A web server that the stock Go toolchain has built for WASI preview 1."""
    module = go_guests.find("server", tmp_path_factory.mktemp("go"))
    if module is None:
        pytest.skip("needs Go (https://go.dev) to build its guest")
    return module


@contextmanager
def _maker(node: pytest.Item | pytest.Collector, directory: Path, run_name: str) -> Iterator[MakeDaemon]:
    daemons = node.stash.setdefault(_daemons, [])
    closing = ExitStack()

    if os.geteuid() == 0 and PRIVATE_NAMESPACE not in os.environ:
        pytest.skip("a daemon with root mounts and links: run scripts/test")

    def make(settings: Mapping[str, object] | None = None, *, shared_root: bool = False) -> Daemon:
        number = next(_numbers)
        settings = {"cgroup_driver": os.environ.get(CGROUP_DRIVER, "cgroupfs"), **(settings or {})}
        below = f"_{number}.slice" if settings["cgroup_driver"] == "systemd" else f"/{number}"
        daemon = Daemon(
            directory / str(number),
            settings=settings,
            number=number,
            cgroup_parent=f"/{leftovers.CGROUP_PREFIX}{run_name}{below}" if os.geteuid() == 0 else "",
            shared_root=shared_root,
        )
        daemons.append(daemon)
        closing.callback(daemon.close)
        daemon.start()
        return daemon

    with closing:
        yield make


@pytest.fixture
def make_daemon(request: pytest.FixtureRequest, short_directory: Path, run_name: str) -> Iterator[MakeDaemon]:
    with _maker(request.node, short_directory, run_name) as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_daemon(request: pytest.FixtureRequest, short_directory: Path, run_name: str) -> Iterator[MakeDaemon]:
    """The same for daemons that all tests of a file use."""
    with _maker(request.node, short_directory, run_name) as make:
        yield make


@pytest.fixture(scope="module")
def shared_daemon(make_shared_daemon: MakeDaemon) -> Daemon:
    """One daemon for all tests of a file that only look at what runs on it."""
    return make_shared_daemon()


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """A daemon of the test's own, serving."""
    return make_daemon()


@pytest.fixture
def cri(daemon: Daemon) -> Iterator[Cri]:
    with daemon.client() as client:
        yield client
