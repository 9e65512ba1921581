"""The tests of this folder: what only a machine with systemd and cgroup v2 can show. `scripts/test-vm` runs them.

What is the same everywhere is in `tests/e2e`, which runs in that machine too when it is asked to. Invariant: every file
here is marked `vm`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cri_shim.spec.cgroup_plan import Driver
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab, lab_on
from tests.support import images
from tests.support.daemon import Daemon


@pytest.fixture(scope="module", params=Driver, ids=lambda driver: driver.value)
def driver(request: pytest.FixtureRequest) -> Driver:
    """Each test of a file with both cgroup drivers."""
    found: Driver = request.param
    return found


@pytest.fixture(scope="module")
def driven_daemon(make_shared_daemon: MakeDaemon, driver: Driver) -> Daemon:
    """One daemon for all tests of a file with this driver."""
    return make_shared_daemon({"cgroup_driver": driver.value})


@pytest.fixture
def lab(driven_daemon: Daemon, busybox: str, registry: images.Registry) -> Iterator[Lab]:
    with driven_daemon.client() as cri:
        yield lab_on(driven_daemon, cri, busybox, registry)
        cri.remove_all_pods()
