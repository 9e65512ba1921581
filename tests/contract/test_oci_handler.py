"""The handlers of OCI runtimes, with real runc, crun and conmon, in the private namespaces of the run."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cri_shim.adapters.exec_session import kill_tree
from cri_shim.kernel import caps, mounts, process
from cri_shim.model import capabilities
from cri_shim.model.container import Exit, Reason, User
from cri_shim.model.errors import CriShimError, FailedPrecondition
from cri_shim.model.handler import ContainerPlan, ExecRequest, Started
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import infra
from tests.contract.handler_suite import Bench, ExecSuite, HandlerSuite, until
from tests.contract.oci_bench import oci_bench

pytestmark = pytest.mark.root


@pytest.fixture(params=["runc", "crun"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path, run_name: str) -> AsyncIterator[Bench]:
    async with oci_bench(request.param, tmp_path, run_name) as made:
        yield made


def script(bench: Bench, text: str) -> ContainerPlan:
    return bench.plan(("sh", "-c", text))


async def output(bench: Bench, plan: ContainerPlan) -> list[str]:
    """What the container says on stdout; it must end with 0."""
    await bench.create_and_start(plan)
    ended = await bench.end_of(plan)
    assert ended.code == 0, bench.log(plan, "stderr")
    return bench.log(plan, "stdout")


def pids_of(bench: Bench, plan: ContainerPlan) -> tuple[int, int]:
    """The first process and its monitor."""
    info = bench.handler.info(plan.id)
    first, monitor = info["pid"], info["monitorPid"]
    assert isinstance(first, int)
    assert isinstance(monitor, int)
    return first, monitor


class TestOciHandler(HandlerSuite):
    pass


class TestOciExec(ExecSuite):
    nested = ("sh", "-c", "sh -c 'sleep 1000 & sleep 1000' & sleep 1000")

    async def test_what_an_earlier_daemon_left_is_killed(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        before = bench.cgroups.processes(bench.cgroup_parent, plan.id)
        await bench.handler.exec(plan.id, ExecRequest(("sleep", "1000"), None, 1, 2))
        assert len(bench.cgroups.processes(bench.cgroup_parent, plan.id)) == len(before) + 1
        await bench.restart()
        assert await bench.handler.adopt(bench.record(plan, started_at=1), plan) is None
        assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == before

    async def test_a_process_that_has_just_ended_needs_no_kill(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        session = await bench.handler.exec(plan.id, ExecRequest(("sh", "-c", "exit 3"), None, 1, 2))
        assert await session.wait() == 3
        await session.kill()
        assert not list((plan.bundle / "exec").iterdir())


class TestEnds:
    async def test_oom_is_seen(self, bench: Bench) -> None:
        plan = bench.plan(("dd", "if=/dev/zero", "of=/dev/null", "bs=64M"))
        plan.config.linux.resources.memory_limit_in_bytes = 16 << 20
        await bench.create_and_start(plan)
        ended = await bench.end_of(plan)
        assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)

    async def test_without_its_monitor_a_container_is_killed_and_its_end_unknown(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        _, monitor = pids_of(bench, plan)
        os.kill(monitor, signal.SIGKILL)
        ended = await bench.end_of(plan)
        assert (ended.code, ended.reason) == (255, Reason.UNKNOWN)
        assert "monitor" in ended.message
        assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == []

    async def test_the_exit_file_has_the_truth_of_what_no_daemon_saw(self, bench: Bench) -> None:
        plan = await bench.run(("sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"))
        await bench.is_ready(plan)
        first, _ = pids_of(bench, plan)
        await bench.handler.aclose()
        assert bench.ends == {}
        os.kill(first, signal.SIGTERM)
        await until((plan.bundle / "exit").exists)
        seen = time.time_ns()
        await asyncio.sleep(0.3)
        await bench.restart()
        found = await bench.handler.adopt(bench.record(plan, started_at=1), plan)
        assert isinstance(found, Exit)
        assert (found.code, found.reason) == (7, Reason.ERROR)
        assert found.at <= seen

    async def test_nothing_left_of_a_container_is_an_unknown_end(self, bench: Bench) -> None:
        plan = bench.plan(bench.guest.waits())
        found = await bench.handler.adopt(bench.record(plan, started_at=1), plan)
        assert isinstance(found, Exit)
        assert (found.code, found.reason) == (255, Reason.UNKNOWN)

    async def test_created_but_running_is_found_started(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        await bench.is_ready(plan)
        first, _ = pids_of(bench, plan)
        await bench.restart()
        found = await bench.handler.adopt(bench.record(plan, started_at=0), plan)
        assert isinstance(found, Started)
        assert found.pid == first

    async def test_created_is_found_created_and_can_be_started(self, bench: Bench) -> None:
        plan = bench.plan(bench.guest.exits(4))
        await bench.handler.create(plan)
        await bench.restart()
        assert await bench.handler.adopt(bench.record(plan, started_at=0), plan) is None
        await bench.handler.start(plan.id)
        assert (await bench.end_of(plan)).code == 4

    async def test_a_daemon_that_knows_nothing_can_delete(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        first, monitor = pids_of(bench, plan)
        await bench.restart()
        (plan.bundle / "conmon.pid").unlink()  # then it is found by its command line
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        assert not Path(f"/proc/{monitor}/exe").exists()
        assert process.process_start_time(first) is None
        assert not list(Path("/sys/fs/cgroup").glob(f"*{bench.cgroup_parent}/*{plan.id}"))

    async def test_program_that_the_kernel_refuses_is_a_start_error_with_a_hint(self, bench: Bench) -> None:
        plan = bench.plan(("/bin/garbage",))
        await bench.handler.create(plan)
        with pytest.raises(FailedPrecondition, match=r"(?i)exec format error.*RuntimeClass"):
            await bench.handler.start(plan.id)
        assert bench.ends == {}

    async def test_a_failed_create_leaves_nothing(self, bench: Bench) -> None:
        plan = bench.plan(("nowhere",))
        with pytest.raises(FailedPrecondition, match="the image has no nowhere"):
            await bench.handler.create(plan)
        assert not list(Path("/sys/fs/cgroup").glob(f"*{bench.cgroup_parent}/*{plan.id}"))
        assert not list(bench.layout.runtime_root(bench.handler.name).iterdir())
        words = f"-c\0{plan.id}"
        assert process.find_processes(lambda line: words in "\0".join(line)) == []

    async def test_failed_reopen_leaves_no_file(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        assert plan.log_path is not None
        (plan.bundle / "ctl").unlink()
        plan.log_path.rename(plan.log_path.with_suffix(".1"))
        with pytest.raises(CriShimError, match="does not listen"):
            await bench.handler.reopen_log(plan.id)
        assert not plan.log_path.exists()


class TestInside:
    """What a process sees, not what the spec says."""

    async def test_identity_capabilities_and_seccomp(self, bench: Bench) -> None:
        plan = script(bench, "id; grep -E '^(CapEff|CapBnd|Seccomp|NoNewPrivs):' /proc/self/status; umask")
        plan = dataclasses.replace(plan, process=dataclasses.replace(plan.process, user=User(0, 7, (7, 8))))
        security = plan.config.linux.security_context
        security.no_new_privs = True
        security.capabilities.add_capabilities.append("NET_ADMIN")
        security.capabilities.drop_capabilities.append("CHOWN")
        security.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
        said = await output(bench, plan)
        assert said[0].startswith("uid=0")
        assert "gid=7" in said[0]
        assert "groups=7,8" in said[0]
        status = dict(line.split(":\t", 1) for line in said[1:5])
        names = {name for bit, name in enumerate(capabilities.NAMES) if int(status["CapEff"], 16) >> bit & 1}
        assert "NET_ADMIN" in names
        assert "CHOWN" not in names
        assert status["CapBnd"] == status["CapEff"]
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")

    async def test_default_profile_refuses_new_namespaces_even_to_root(self, bench: Bench) -> None:
        plan = script(bench, "unshare -U true || echo refused; sh -c 'sleep 0 & wait' && echo forks")
        plan.config.linux.security_context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
        assert await output(bench, plan) == ["refused", "forks"]

    async def test_files_of_the_pod_and_a_read_only_root(self, bench: Bench) -> None:
        touch = "touch /new || echo read-only; touch /dev/shm/x && echo shm"
        plan = script(bench, f"cat /etc/hosts /etc/hostname /etc/resolv.conf; {touch}")
        plan.config.linux.security_context.readonly_rootfs = True
        assert await output(bench, plan) == ["hosts", "hostname", "resolv.conf", "read-only", "shm"]
        assert (bench.pod.shm / "x").exists()

    async def test_mounts_masks_and_symlinked_sources(self, bench: Bench, tmp_path: Path) -> None:
        real = tmp_path / "real"
        real.mkdir()
        (real / "file").write_text("found\n")
        (tmp_path / "link").symlink_to(real)
        plan = script(bench, "cat /data/file /etc/masked; touch /data/x || echo read-only; touch /tmp/x || echo no")
        assert plan.rootfs is not None
        (plan.rootfs / "etc/masked").write_text("secret")
        plan.config.mounts.add(host_path=str(tmp_path / "link"), container_path="/data", readonly=True)
        plan.config.linux.security_context.masked_paths.append("/etc/masked")
        plan.config.linux.security_context.readonly_paths.append("/tmp")
        assert await output(bench, plan) == ["found", "read-only", "no"]

    async def test_recursive_read_only_reaches_the_mounts_below(self, bench: Bench, tmp_path: Path) -> None:
        await bench.handler.probe()
        assert (
            bench.handler.features.recursive_read_only_mounts
        )  # both binaries are able to, crun 1.8 without saying so
        outer, inner = tmp_path / "outer", tmp_path / "outer/inner"
        inner.mkdir(parents=True)
        mounts.tmpfs(inner, size=1 << 20, mode=0o755)
        plan = script(
            bench, "touch /plain/x || echo no; touch /plain/inner/x && echo yes; touch /all/inner/y || echo no"
        )
        plan.config.mounts.add(host_path=str(outer), container_path="/plain", readonly=True)
        plan.config.mounts.add(host_path=str(outer), container_path="/all", readonly=True, recursive_read_only=True)
        assert await output(bench, plan) == ["no", "yes", "no"]

    async def test_propagation_in_both_directions(self, bench: Bench, tmp_path: Path) -> None:
        shared = tmp_path / "shared"
        (shared / "from_host").mkdir(parents=True)
        mounts.make_shared(shared)
        plan = script(bench, "mount -t tmpfs x /data/inside && echo mounted; sleep 1000")
        (shared / "inside").mkdir()
        plan.config.linux.security_context.privileged = True
        plan.config.mounts.add(
            host_path=str(shared), container_path="/data", propagation=pb.MountPropagation.PROPAGATION_BIDIRECTIONAL
        )
        await bench.create_and_start(plan)
        await bench.is_ready(plan, "mounted")
        assert mounts.is_mount_point(shared / "inside")
        mounts.tmpfs(shared / "from_host", size=1 << 20, mode=0o755)
        first, _ = pids_of(bench, plan)
        assert "/data/from_host" in Path(f"/proc/{first}/mountinfo").read_text()

    async def test_oom_score_and_cgroup(self, bench: Bench) -> None:
        memory = "/sys/fs/cgroup/memory/memory.limit_in_bytes"
        plan = script(bench, f"cat /proc/self/oom_score_adj; grep :memory: /proc/self/cgroup; cat {memory}")
        plan.config.linux.resources.oom_score_adj = 500
        plan.config.linux.resources.memory_limit_in_bytes = 64 << 20
        said = await output(bench, plan)
        assert said[0] == "500"
        assert said[1].endswith(f"{bench.cgroup_parent}/{plan.id}")
        assert said[2] == str(64 << 20)

    async def test_privileged_has_the_hosts_devices_and_writable_sys(self, bench: Bench) -> None:
        plan = script(bench, "ls /dev; mount | grep ' /sys '; cat /proc/self/status | grep CapBnd")
        plan.config.linux.security_context.privileged = True
        said = await output(bench, plan)
        assert {"null", "full", "random"} <= set(said)
        assert any("/sys" in line and "rw" in line for line in said)
        mask = sum(1 << bit for bit, name in enumerate(capabilities.NAMES) if name in caps.effective())
        assert int(said[-1].split()[1], 16) == mask

    async def test_devices(self, bench: Bench) -> None:
        plan = script(bench, "ls /dev/mine; dd if=/dev/mine bs=1 count=1 2>/dev/null; touch /dev/mine || echo refused")
        plan.config.devices.add(host_path="/dev/zero", container_path="/dev/mine", permissions="r")
        assert (await output(bench, plan))[0] == "/dev/mine"

    async def test_missing_source_is_an_error_by_name(self, bench: Bench) -> None:
        plan = script(bench, "true")
        plan.config.mounts.add(host_path="/nowhere", container_path="/data")
        with pytest.raises(FailedPrecondition, match="host_path '/nowhere'"):
            await bench.handler.create(plan)

    async def test_monitor_has_a_cgroup_beside_the_container(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.waits())
        first, monitor = pids_of(bench, plan)
        assert f"{bench.cgroup_parent}/{plan.id}" in Path(f"/proc/{first}/cgroup").read_text()
        assert f"{bench.cgroup_parent}/cri-shim-conmon-{plan.id}" in Path(f"/proc/{monitor}/cgroup").read_text()

    async def test_the_hosts_unified_hierarchy_stays_mounted(self, bench: Bench) -> None:
        table = [entry.target for entry in mounts.mountinfo() if entry.fstype == "cgroup2"]
        await bench.run(bench.guest.waits())
        assert [entry.target for entry in mounts.mountinfo() if entry.fstype == "cgroup2"] == table


class TestSharedPid:
    @staticmethod
    async def with_infra(bench: Bench) -> ContainerPlan:
        """Makes the pod share the PID namespace of its infra container."""
        program = shutil.which("catatonit")
        assert program is not None
        plan = infra.plan(bench.pod, bench.layout, Path(program))
        assert plan.rootfs is not None
        plan.rootfs.mkdir(parents=True)
        bench.plans.append(plan)
        await bench.handler.create(plan)
        started = await bench.handler.start(plan.id)
        bench.pod = dataclasses.replace(bench.pod, pid=Path(f"/proc/{started.pid}/ns/pid"))
        return plan

    @staticmethod
    def shared(plan: ContainerPlan) -> ContainerPlan:
        plan.config.linux.security_context.namespace_options.pid = pb.NamespaceMode.POD
        return plan

    async def test_first_process_shows_nothing_of_the_host(self, bench: Bench) -> None:
        await self.with_infra(bench)
        plan = self.shared(script(bench, "ls /proc/1/root; cat /proc/1/cmdline; echo; grep Cap /proc/1/status"))
        plan.config.linux.security_context.capabilities.add_capabilities.append("ALL")
        said = await output(bench, plan)
        assert {"catatonit", "dev", "proc"} >= set(said[: said.index("/catatonit\0-P\0")])
        assert all(line.endswith("0000000000000000") for line in said if line.startswith("Cap"))

    async def test_children_do_not_outlive_their_container(self, bench: Bench) -> None:
        await self.with_infra(bench)
        plan = self.shared(script(bench, "sleep 1000 & sleep 1001 & exit 5"))
        await bench.create_and_start(plan)
        assert (await bench.end_of(plan)).code == 5
        assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == []

    async def test_infra_ends_with_its_handlers_kill(self, bench: Bench) -> None:
        plan = await self.with_infra(bench)
        # Not SIGTERM: the first process of a namespace ignores what it has no handler for, as this one at its start.
        await bench.handler.kill(plan.id, signal.SIGKILL)
        assert (await bench.end_of(plan)).code == 137


async def test_kill_tree_ends_a_tree_that_keeps_forking() -> None:
    sleeper = f"sleep 1000.{os.getpid()}"  # another run on this machine has another
    fork = f"while :; do {sleeper} & sleep 0.01; done"
    child = process.spawn(["/bin/busybox", "sh", "-c", f"sh -c '{fork}' & {fork}"])
    await asyncio.sleep(0.2)
    await asyncio.to_thread(kill_tree, child.pid)
    assert await child.wait() == -signal.SIGKILL
    left = process.find_processes(lambda words: sleeper in " ".join(words))
    assert left == []
