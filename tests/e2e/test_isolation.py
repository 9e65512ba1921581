"""How a Linux container is kept apart: namespaces, cgroups and their limits, devices, system calls.

Not what the process is given (`test_semantics`). Asked of the process and of the kernel, never of the spec.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support.cri import Pod, whole_lines
from tests.support.expect import refused

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun"])]


def test_sysctls(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    sandbox = lab.pod_config(network=pb.POD)
    asked = {"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100", "net.ipv4.ip_local_port_range": "2000 3000"}
    sandbox.linux.sysctls.update(asked)
    pod = lab.pod(handler, config=sandbox)
    names = [*asked, "net.ipv4.ip_unprivileged_port_start"]
    files = " ".join(f"/proc/sys/{name.replace('.', '/')}" for name in names)
    assert lab.say(pod, f"cat {files}") == ["1", "100", "2000\t3000", "0"]
    for name, words, network in (
        ("kernel.panic", "not namespaced", pb.POD),
        ("net.ipv4.ip_forward", "network namespace", pb.NODE),
    ):
        config = lab.pod_config(network=network)
        config.linux.sysctls[name] = "1"
        with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
            lab.pod(handler, config=config)


def test_namespaces(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    kinds = ("net", "ipc", "uts", "pid", "mnt")
    script = (
        f"for kind in {' '.join(kinds)}; do readlink /proc/self/ns/$kind; done; test -e /proc/{os.getpid()}; echo $?"
    )
    host = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]

    def shares(pod: Pod, pid: pb.NamespaceMode.ValueType, name: str = "main") -> tuple[list[str], bool]:
        lines = lab.say(pod, script, lambda c: set_pid(c, pid), name=name)
        return [kind for kind, own, seen in zip(kinds, host, lines, strict=False) if own == seen], lines[-1] == "0"

    def set_pid(config: pb.ContainerConfig, mode: pb.NamespaceMode.ValueType) -> None:
        config.linux.security_context.namespace_options.pid = mode

    assert shares(lab.pod(handler, network=pb.POD), pb.CONTAINER) == ([], False)
    assert shares(lab.pod(handler), pb.CONTAINER) == (["net", "uts"], False)
    of_node = lab.pod_config(pid=pb.NODE)
    of_node.linux.security_context.namespace_options.ipc = pb.NODE
    pod = lab.pod(handler, config=of_node)
    assert shares(pod, pb.NODE) == (["net", "ipc", "uts", "pid"], True)
    assert shares(pod, pb.CONTAINER, name="own") == (["net", "ipc", "uts"], False)
    mark = Path(f"/dev/shm/cri-shim-test-{os.getpid()}")
    mark.touch()
    try:
        assert lab.say(pod, f"ls {mark}", name="shm") == [str(mark)]
    finally:
        mark.unlink()


def test_the_pid_namespace_of_another_container(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    target = lab.cri.run(pod, lab.shell("exec sleep 1234", name="target"))

    def join(config: pb.ContainerConfig) -> None:
        options = config.linux.security_context.namespace_options
        options.pid, options.target_id = pb.TARGET, target

    assert "sleep 1234" in lab.say(pod, "tr '\\0' ' ' </proc/1/cmdline; echo", join, name="debug")[0]


def test_a_shared_pid_namespace_has_a_reaper_and_nothing_of_the_host(
    shared_lab: Lab, tmp_path: Path, handler: str
) -> None:
    """Whoever may look into the first process finds a program in an empty root, and nothing that leads elsewhere."""
    lab = shared_lab
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW"}))
    sandbox = lab.pod_config(pid=pb.POD)
    seccomp = sandbox.linux.security_context.seccomp
    seccomp.profile_type, seccomp.localhost_ref = pb.SecurityProfile.Localhost, str(profile)
    script = """
        sh -c 'sleep 0.01 & exit'; sleep 0.1; cat /proc/1/comm
        while cat /proc/[0-9]*/stat 2>/dev/null | grep -q ') Z'; do sleep 0.1; done; echo reaped
        awk '/^(Uid|CapPrm|CapBnd|NoNewPrivs|Seccomp):/ {print $1 $2}' /proc/1/status
        cd /proc/1/root/ 2>/dev/null || exit 0
        ls -A; find . -path ./proc -prune -o -type f -print; readlink /proc/1/cwd
        for file in /proc/1/fd/*; do readlink $file | cut -d: -f1; done | sort -u
        (touch x || : >catatonit || : >/proc/1/exe) 2>/dev/null || echo unchanged"""
    head = ["catatonit", "reaped", "Uid:65535", f"CapPrm:{0:016x}", f"CapBnd:{0:016x}", "NoNewPrivs:1", "Seccomp:2"]
    root = ["catatonit", "dev", "proc", "./catatonit", "/", "/dev/null", "anon_inode", "pipe", "unchanged"]
    nobody, context = pb.Int64Value(value=65535), pb.LinuxContainerSecurityContext
    for attempt, (asked, may_look) in enumerate(
        (
            (context(capabilities=pb.Capability(drop_capabilities=["ALL"])), False),
            (context(), False),
            (
                context(run_as_user=nobody, run_as_group=nobody, capabilities=pb.Capability(drop_capabilities=["ALL"])),
                True,
            ),
            (context(capabilities=pb.Capability(add_capabilities=["SYS_PTRACE"])), True),
            (context(capabilities=pb.Capability(add_capabilities=["ALL"])), True),
        )
    ):
        sandbox.metadata.attempt = attempt
        config = lab.shell(script, name=f"c{attempt}")
        config.linux.security_context.CopyFrom(asked)
        config.linux.security_context.namespace_options.pid = pb.POD
        code, lines = lab.output(lab.pod(handler, config=sandbox), config)
        assert (code, lines) == (0, [*head, *(root if may_look else [])])


def test_limits(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    config = lab.shell("exec sleep 1000")
    config.linux.resources.MergeFrom(
        pb.LinuxContainerResources(
            cpu_shares=512,
            cpu_quota=50_000,
            cpu_period=100_000,
            cpuset_cpus="0",
            memory_limit_in_bytes=64 << 20,
            oom_score_adj=321,
        )
    )
    container = lab.cri.run(pod, config)
    assert lab.cri.status(container).resources.linux == config.linux.resources
    assert lab.cri.exec(container, ["cat", "/proc/1/oom_score_adj"]).stdout == b"321\n"
    assert lab.cri.exec(container, ["cat", "/proc/self/oom_score_adj"]).stdout == b"321\n"
    assert limits_of(lab, container) == {"cpu": "50000 100000", "shares": 512, "cpus": "0", "memory": 64 << 20}


def pid_of(lab: Lab, container: str) -> int:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])["pid"])


def cgroups_of(pid: int) -> dict[str, Path]:
    """The cgroup of a process by controller, "" in the unified hierarchy."""
    found: dict[str, Path] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), Path(path))
    return found


def limits_of(lab: Lab, container: str) -> dict[str, object]:
    """What the kernel enforces, from the files of either cgroup version; CPU shares where it has only a weight."""
    groups = cgroups_of(pid_of(lab, container))

    def read(controller: str, name: str) -> str:
        legacy = f"{controller}/" if controller in groups else ""
        group = str(groups.get(controller, groups.get("", Path()))).lstrip("/")
        return Path(f"/sys/fs/cgroup/{legacy}{group}/{name}").read_text().strip()

    if "memory" not in groups:
        shares = round((int(read("cpu", "cpu.weight")) - 1) * 262142 / 9999) + 2
        return {
            "cpu": read("cpu", "cpu.max"),
            "shares": shares,
            "cpus": read("cpuset", "cpuset.cpus"),
            "memory": int(read("memory", "memory.max")),
        }
    return {
        "cpu": f"{read('cpu', 'cpu.cfs_quota_us')} {read('cpu', 'cpu.cfs_period_us')}",
        "shares": int(read("cpu", "cpu.shares")),
        "cpus": read("cpuset", "cpuset.cpus"),
        "memory": int(read("memory", "memory.limit_in_bytes")),
    }


def test_cgroups_below_the_pods(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("exec sleep 1000"))
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    info = json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])
    parent = Path(lab.daemon.cgroup_parent)
    of_container, of_monitor = cgroups_of(info["pid"]), cgroups_of(info["monitorPid"])
    for name in {"memory", "cpu", "pids"} & set(of_container) or {""}:
        assert of_container[name].is_relative_to(parent / container)
        assert of_monitor[name] == parent / f"cri-shim-conmon-{container}"


def test_devices(shared_lab: Lab, tmp_path: Path, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    directory = tmp_path / "devices"
    directory.mkdir()
    os.mknod(directory / "log", 0o620 | stat.S_IFCHR, os.makedev(1, 11))
    (directory / "log").chmod(0o620)

    def ask(config: pb.ContainerConfig) -> None:
        config.devices.add(host_path="/dev/kmsg", container_path="/dev/of/kernel", permissions="w")
        config.devices.add(host_path=str(directory), container_path="/dev/more", permissions="w")

    script = """
        stat -c '%F %t:%T %a' /dev/of/kernel /dev/more/log
        (: >/dev/of/kernel) && (: >/dev/more/log) && echo writable
        (: </dev/of/kernel) 2>/dev/null || echo not readable"""
    kernel_mode = stat.S_IMODE(Path("/dev/kmsg").stat().st_mode)
    assert lab.say(pod, script, ask) == [
        f"character special file 1:b {kernel_mode:o}",
        "character special file 1:b 620",
        *("writable", "not readable"),
    ]
    (tmp_path / "file").touch()
    for path, code in (
        ("/dev/not-there", grpc.StatusCode.FAILED_PRECONDITION),
        (str(tmp_path / "file"), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        config = lab.shell("true", name="refused")
        config.devices.add(host_path=path, permissions="rwm")
        with refused(code, path):
            lab.cri.create(pod, config)


def test_seccomp(shared_lab: Lab, tmp_path: Path, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    file = tmp_path / "profile.json"
    denied = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}
    file.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]}))
    profile = pb.SecurityProfile
    script = "grep ^Seccomp: /proc/self/status; mkdir /d && echo made; unshare -U true && echo unshared; true"
    expected = [
        (profile(profile_type=profile.Unconfined), ["Seccomp:\t0", "made", "unshared"]),
        (
            profile(profile_type=profile.RuntimeDefault),
            ["Seccomp:\t2", "made", "unshare: unshare(0x10000000): Operation not permitted"],
        ),
        (
            profile(profile_type=profile.Localhost, localhost_ref=str(file)),
            ["Seccomp:\t2", "mkdir: can't create directory '/d': Operation not permitted", "unshared"],
        ),
    ]
    for number, (asked, found) in enumerate(expected):

        def ask(config: pb.ContainerConfig, asked: pb.SecurityProfile = asked) -> None:
            config.linux.security_context.seccomp.CopyFrom(asked)

        assert sorted(lab.say(pod, script, ask, name=f"c{number}")) == sorted(found)
    for reference, code in (
        (str(tmp_path / "missing"), grpc.StatusCode.FAILED_PRECONDITION),
        ("relative.json", grpc.StatusCode.INVALID_ARGUMENT),
        ("/etc/passwd", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        config = lab.shell("true", name="refused")
        config.linux.security_context.seccomp.MergeFrom(
            profile(profile_type=profile.Localhost, localhost_ref=reference)
        )
        with refused(code, reference):
            lab.cri.create(pod, config)


def test_nothing_of_the_daemon_comes_along_or_changes_hands(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    script = """
        echo written >/dev/stdout; ls -1 /proc/$$/fd
        umask; grep -E '^(Sig(Blk|Ign|Cgt)|Cpus_allowed_list):' /proc/self/status; cat; wc -c </dev/stdin"""
    config = lab.shell(f"{script}; echo end; exec sleep 1000")
    config.linux.security_context.run_as_user.value = 4711
    before = {name: os.stat(name).st_uid for name in ("/dev/null", "/dev/zero", "/dev/tty")}
    container = lab.cri.run(lab.pod(handler), config)
    signals = [f"Sig{kind}:\t{0:016x}" for kind in ("Blk", "Ign", "Cgt")]
    status = Path("/proc/self/status").read_text().splitlines()
    cpus = next(line for line in status if line.startswith("Cpus_allowed_list:"))
    expected = ["written", "0", "1", "2", "0022", *signals, cpus, "0"]
    assert lab.cri.exec(container, ["sh", "-c", script]).stdout.decode().splitlines() == expected
    assert whole_lines(lab.cri.wait_log(container, "end")) == [*expected, "end"]
    assert {name: os.stat(name).st_uid for name in before} == before
