"""What the configuration of a handler gives its containers, as a process inside sees it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_shim.adapters import blockio
from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support.cri import whole_lines
from tests.support.expect import eventually, refused

pytestmark = [pytest.mark.root, pytest.mark.parametrize("runtime", ["runc", "crun"])]

TUNED: dict[str, Any] = {
    "default_capabilities": ["KILL", "CHOWN"],
    "default_env": {"PROXY": "http://proxy", "PATH": "/bin:/opt", "HOME": "/default"},
    "default_sysctls": {"net.core.somaxconn": "99", "kernel.shm_rmid_forced": "1"},
    "default_ulimits": ["nofile=100:200", "core=0"],
}


DISKS = "/dev/[sv]d*"
CGROUP_V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
BASE = {
    "process": {
        "args": ["never"],
        "env": ["BASE=1"],
        "rlimits": [{"type": "RLIMIT_SIGPENDING", "soft": 5, "hard": 6}],
    },
    "mounts": [{"destination": "/base", "type": "tmpfs", "source": "base", "options": ["size=4k"]}],
    "linux": {"resources": {"pids": {"limit": 77}}},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As /usr/share/containers/oci/hooks.d and /etc/containers/oci/hooks.d."""
    base = tmp_path_factory.mktemp("hooks")
    usr, etc = base / "usr", base / "etc"
    usr.mkdir()
    etc.mkdir()
    return usr, etc


@pytest.fixture(scope="module")
def option_lab(
    make_shared_daemon: MakeDaemon,
    busybox: str,
    directories: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Lab]:
    base = tmp_path_factory.mktemp("base") / "base.json"
    base.write_text(json.dumps(BASE))
    classes = base.with_name("classes.yaml")
    throttled = {"Devices": [DISKS], "ThrottleReadBps": "2M", "ThrottleWriteIOPS": 7}
    classes.write_text(json.dumps({"Classes": {"slow": [throttled], "heavy": [{"Weight": 200}]}}))
    handlers: dict[str, Any] = {}
    for runtime in ("runc", "crun"):
        plain = {"kind": "oci", "path": runtime}
        handlers |= {
            runtime: plain,
            f"{runtime}-tuned": {**plain, **TUNED},
            f"{runtime}-strict": {**plain, "allowed_annotations": []},
            f"{runtime}-hooked": {**plain, "hooks_dirs": [str(directory) for directory in directories]},
            f"{runtime}-based": {**plain, "base_spec": str(base)},
            f"{runtime}-classes": {**plain, "blockio_config_file": str(classes)},
            f"{runtime}-other": {
                "kind": "oci",
                "path": str(_other_runtime(base.parent, runtime)),
                "root": str(base.parent / f"{runtime}-root"),
                "allowed_annotations": ["acme.io/*"],
            },
            f"{runtime}-bare": {**plain, "privileged_without_host_devices": True},
            f"{runtime}-any": {
                **plain,
                "privileged_without_host_devices": True,
                "privileged_without_host_devices_all_devices_allowed": True,
            },
        }
    daemon = make_shared_daemon({"default_handler": "runc", "handlers": handlers})
    with daemon.client() as cri:
        cri.pull(busybox)
        yield Lab(daemon, cri, busybox, "")


def _other_runtime(directory: Path, runtime: str) -> Path:
    """A program of another name with the command line of OCI runtimes, which writes down how it is called."""
    program = directory / f"other-{runtime}"
    program.write_text(f'#!/bin/sh\necho "$*" >>{program}.calls\nexec {runtime} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def lab(option_lab: Lab) -> Iterator[Lab]:
    yield option_lab
    option_lab.cri.remove_all_pods()


def test_limits_of_processes(lab: Lab, runtime: str) -> None:
    script = "grep -E '^Max (open|core)' /proc/self/limits | tr -s ' '"
    config = lab.shell(f"{script}; echo end; exec sleep 1000")
    container = lab.cri.run(lab.pod(f"{runtime}-tuned"), config)
    expected = ["Max core file size 0 0 bytes ", "Max open files 100 200 files "]
    assert whole_lines(lab.cri.wait_log(container, "end")) == [*expected, "end"]
    # runc before 1.2 may leave an exec'ed process the hard limit for both: its own start races with setting them.
    raised = [expected[0], "Max open files 200 200 files "]
    executed = lab.cri.exec(container, ["sh", "-c", script]).stdout.decode().splitlines()
    assert executed in ([expected, raised] if runtime == "runc" else [expected])
    own = [" ".join(line.split()) for line in Path(f"/proc/{lab.daemon.pid}/limits").read_text().splitlines()]
    inherited = lab.say(lab.pod(runtime), "grep '^Max open' /proc/self/limits | tr -s ' '")
    assert [line.strip() for line in inherited] == [line for line in own if line.startswith("Max open")]


def test_variables_give_way_to_image_and_request(lab: Lab, runtime: str) -> None:
    pod = lab.pod(f"{runtime}-tuned")
    assert lab.say(pod, "echo $PROXY $HOME") == ["http://proxy /default"]

    def ask(config: pb.ContainerConfig) -> None:
        config.envs.add(key="PROXY", value=b"own")

    assert lab.say(pod, "echo $PROXY", ask, name="own") == ["own"]


def test_capabilities(lab: Lab, runtime: str) -> None:
    script = "grep CapBnd /proc/self/status"
    mask = (1 << 0) | (1 << 5)  # CHOWN, KILL
    pod = lab.pod(f"{runtime}-tuned")
    assert lab.say(pod, script) == [f"CapBnd:\t{mask:016x}"]

    def ask(config: pb.ContainerConfig) -> None:
        config.linux.security_context.capabilities.drop_capabilities.append("KILL")

    assert lab.say(pod, script, ask, name="less") == [f"CapBnd:\t{1:016x}"]


def test_sysctls(lab: Lab, runtime: str) -> None:
    script = "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shm_rmid_forced"
    assert lab.say(lab.pod(f"{runtime}-tuned", network=pb.POD), script) == ["99", "1"]
    config = lab.pod_config(network=pb.POD)
    config.linux.sysctls["net.core.somaxconn"] = "77"
    assert lab.say(lab.pod(f"{runtime}-tuned", config=config), script) == ["77", "1"]
    # What is the node's stays.
    of_node = Path("/proc/sys/net/core/somaxconn").read_text().strip()
    assert lab.say(lab.pod(f"{runtime}-tuned"), script) == [of_node, "1"]


def test_privileged_without_the_nodes_devices(lab: Lab, runtime: str) -> None:
    """Held by the devices cgroup too: the container could make any node."""
    script = "test -e /dev/kmsg && echo there; mknod /made c 1 11 && (: >/made) 2>/dev/null && echo opened; true"

    def said(handler: str) -> list[str]:
        config = lab.pod_config()
        config.linux.security_context.privileged = True

        def ask(config: pb.ContainerConfig) -> None:
            config.linux.security_context.privileged = True

        return lab.say(lab.pod(handler, config=config), script, ask)

    assert said(runtime) == ["there", "opened"]
    assert said(f"{runtime}-bare") == []
    assert said(f"{runtime}-any") == ["opened"]


def test_the_size_of_shared_memory(lab: Lab, runtime: str) -> None:
    script = "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"
    assert lab.say(lab.pod(runtime), script) == [str(64 << 10)]
    config = lab.pod_config()
    config.annotations["cri-shim.io/shm-size"] = "200Mi"
    assert lab.say(lab.pod(runtime, config=config), script) == [str(200 << 10)]
    config.metadata.attempt += 1
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "shm-size is not allowed by handler"):
        lab.pod(f"{runtime}-strict", config=config)


def test_a_base_spec(lab: Lab, runtime: str) -> None:
    script = """
        echo $BASE; mount | grep -c ' on /base type tmpfs'; grep 'pending' /proc/self/limits | tr -s ' '
        cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max 2>/dev/null; true"""
    assert lab.say(lab.pod(f"{runtime}-based"), script) == ["1", "1", "Max pending signals 5 6 signals ", "77"]


def test_hooks_of_the_node(lab: Lab, runtime: str, directories: tuple[Path, Path], tmp_path: Path) -> None:
    """Each writes its name, and keeps the state that the runtime tells it."""
    usr, etc = directories
    program = tmp_path / "hook"
    program.write_text(f'#!/bin/sh\ncat >{tmp_path}/state; echo "$1 $OF" >>{tmp_path}/ran\n')
    program.chmod(0o755)

    def put(directory: Path, name: str, when: dict[str, Any], *stages: str) -> None:
        hook = {"path": str(program), "args": ["hook", name], "env": [f"OF={directory.name}"]}
        file = {"version": "1.0.0", "hook": hook, "when": when, "stages": stages}
        (directory / f"{name}.json").write_text(json.dumps(file))

    for directory in directories:
        for file in directory.iterdir():
            file.unlink()
    put(usr, "20-second", {"annotations": {"^hooked$": "^yes$"}}, "createRuntime")
    put(usr, "10-first", {"commands": ["^sh$"]}, "createRuntime", "poststop")
    put(usr, "30-masked", {"always": True}, "createRuntime")
    put(etc, "30-masked", {"always": True}, "createRuntime")
    put(usr, "40-other", {"commands": ["^bash$"]}, "createRuntime")
    sandbox = lab.pod_config()
    sandbox.annotations["hooked"] = "yes"
    container = lab.cri.run(lab.pod(f"{runtime}-hooked", config=sandbox), lab.shell("true"))
    lab.cri.wait_exit(container)
    assert (tmp_path / "ran").read_text().splitlines() == ["10-first usr", "20-second usr", "30-masked etc"]
    assert json.loads((tmp_path / "state").read_text())["id"] == container
    lab.cri.remove(container)
    eventually(lambda: (tmp_path / "ran").read_text().endswith("30-masked etc\n10-first usr\n"))
    # Of a handler without the directories there is none.
    lab.say(lab.pod(runtime), "true")
    assert len((tmp_path / "ran").read_text().splitlines()) == 4
    (etc / "50-broken.json").write_text('{"version": "1.0.0"}')
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "50-broken.json cannot be used"):
        lab.cri.create(lab.pod(f"{runtime}-hooked"), lab.shell("true"))
    (etc / "50-broken.json").unlink()


def test_a_class_of_block_io(lab: Lab, runtime: str) -> None:
    numbers = [f"{disk.major}:{disk.minor}" for disk in blockio.disks(DISKS)]
    if not numbers:
        pytest.skip(f"no disk of this machine fits {DISKS}")
    sandbox = lab.pod_config()
    sandbox.annotations["blockio.resources.beta.kubernetes.io/container.main"] = "slow"
    pod = lab.pod(f"{runtime}-classes", config=sandbox)
    if CGROUP_V2:
        script = "cat /sys/fs/cgroup/io.max"
        expected = [f"{disk} rbps=2000000 wbps=max riops=max wiops=7" for disk in numbers]
    else:
        script = "cd /sys/fs/cgroup/blkio && cat blkio.throttle.read_bps_device blkio.throttle.write_iops_device"
        expected = [f"{disk} {rate}" for disk in numbers for rate in (2000000, 7)]
    assert sorted(lab.say(pod, script)) == sorted(expected)
    assert lab.say(pod, script, name="other") == []
    config = lab.shell("true", name="unknown")
    config.annotations["io.kubernetes.cri.blockio-class"] = "fast"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "there is no class 'fast' of block IO; there are: heavy, slow"):
        lab.cri.create(pod, config)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "this handler has no classes of block IO"):
        lab.cri.create(lab.pod(runtime), config)


@pytest.mark.skipif(CGROUP_V2, reason="its weight is a file of BFQ there, which few kernels have")
def test_a_weight_of_block_io(lab: Lab, runtime: str) -> None:
    pod = lab.pod(f"{runtime}-classes")
    heavy = lab.shell("cat /sys/fs/cgroup/blkio/blkio*weight")
    heavy.annotations["io.kubernetes.cri.blockio-class"] = "heavy"
    if runtime == "crun":  # it knows the file of CFQ only, which newer kernels do not have
        with refused(grpc.StatusCode.INTERNAL, "blkio.weight"):
            lab.cri.create(pod, heavy)
    else:
        assert lab.output(pod, heavy) == (0, ["200"])


def test_any_runtime_by_configuration_alone(lab: Lab, runtime: str) -> None:
    """Another program, name and root, over the whole life of a container and a restart of the daemon."""
    handler = f"{runtime}-other"
    sandbox = lab.pod_config()
    sandbox.annotations["acme.io/device"] = "yes"
    sandbox.annotations["other.io/x"] = "no"
    pod = lab.pod(handler, config=sandbox)
    container = lab.cri.run(pod, lab.shell("echo ready; exec sleep 1000"))
    lab.cri.wait_log(container, "ready")
    info = json.loads(
        lab.cri.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=container, verbose=True)).info["info"]
    )
    program = Path(info["runtime"])
    root = program.parent / f"{runtime}-root"
    assert program.name == f"other-{runtime}"
    assert (root / container).is_dir()
    assert not (lab.daemon.state / "runtime" / handler).exists()
    state = json.loads(subprocess.check_output([runtime, f"--root={root}", "state", container]))
    assert state["annotations"]["acme.io/device"] == "yes"
    assert "other.io/x" not in state["annotations"]
    assert lab.cri.exec(container, ["echo", "in"]).stdout == b"in\n"
    lab.daemon.restart()
    with lab.daemon.client() as cri:
        limits = pb.LinuxContainerResources(cpu_shares=512)
        cri.runtime.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=limits))
        assert cri.exec(container, ["echo", "again"]).stdout == b"again\n"
        cri.remove_all_pods()
    assert list(root.iterdir()) == []
    calls = Path(f"{program}.calls").read_text()
    for verb in ("create", "start", "exec", "update", "delete"):
        assert f" {verb} " in calls
    features = {entry.name: entry.features for entry in lab.cri.runtime.Status(pb.StatusRequest()).runtime_handlers}
    assert features[handler] == features[runtime]
