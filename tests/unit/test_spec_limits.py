"""Values at the edges of what the kernel takes: the last good one passes, the first bad one is named."""

from __future__ import annotations

import pytest

from cri_shim.model.errors import InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import users
from cri_shim.spec.facts import HostFacts
from cri_shim.spec.paths import check_path
from cri_shim.spec.resources import resources

HOST = HostFacts(
    oci_version="1.0.2", capabilities=frozenset(), lowest_oom_score_adj=0, cgroup_version=1, swap_controller=True
)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("cpu_shares", (0, 2, 262144), (-1, 1, 262145)),
        ("cpu_period", (0, 1000, 1_000_000), (-1, 999, 1_000_001)),
        ("cpu_quota", (-1, 0, 1000, (1 << 44) - 1), (-2, 999, 1 << 44)),
        ("memory_limit_in_bytes", (0, 1, (1 << 63) - 1), (-1,)),
        ("memory_swap_limit_in_bytes", (0,), (-2,)),
        ("cpuset_cpus", ("", "0", "0-3,8", "1,2"), ("a", "0-", "0,,1", " 0", "0;1", "-1")),
        ("cpuset_mems", ("", "0"), ("x",)),
    ],
)
def test_resources(field: str, good: tuple[object, ...], bad: tuple[object, ...]) -> None:
    for value in good:
        resources(pb.LinuxContainerResources(**{field: value}), HOST)  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(InvalidArgument, match=f"linux.resources.{field}"):
            resources(pb.LinuxContainerResources(**{field: value}), HOST)  # type: ignore[arg-type]


def test_groups() -> None:
    def resolve(count: int) -> users.Identity:
        security = pb.LinuxContainerSecurityContext(supplemental_groups=range(1, count))
        return users.resolve(security, "", users.UserDatabase(), "image")

    assert len(resolve(65536).user.groups) == 65536  # with the primary one
    with pytest.raises(InvalidArgument, match="65537 groups"):
        resolve(65537)


@pytest.mark.parametrize("path", ["/", "/" + "n" * 255, "/n" * 2047, "/" + "ü" * 127])
def test_paths_that_a_file_system_can_hold(path: str) -> None:
    check_path("field", path)


@pytest.mark.parametrize("path", ["", "a", "./a", "/" + "n" * 256, "/n" * 2048, "/" + "ü" * 128])
def test_paths_that_it_cannot(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^field "):
        check_path("field", path)
