"""Pods with a user namespace: what a process in one sees, and whose its things are at the node.

With a runtime that is able to; what becomes of such pods with others is here too. Asked of processes and of the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cri_shim.kernel import mounts
from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.e2e.test_semantics import tmpfs
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config, whole_lines
from tests.support.expect import eventually, refused
from tests.support.new_runtime import is_able, new_runtime
from tests.support.scale import count, seeded
from tests.support.world import settle, unchanged

pytestmark = pytest.mark.root

FIRST = 300_000
LENGTH = 65_536
OLD = "runc"
OTHERS = ("/dev/null", "/dev/zero", "/dev/tty")


@pytest.fixture(scope="module")
def userns_lab(make_shared_daemon: MakeDaemon, busybox: str, registry: images.Registry) -> Iterator[Lab]:
    runtime = new_runtime()
    if runtime is None:
        pytest.skip("no runtime here knows user namespaces: run scripts/fetch-crun .runtimes")
    daemon = make_shared_daemon(handlers(runtime))
    daemon.stop()
    # As /run is on a node: who maps ids may not take away what the mount forbids.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,noexec", "run", str(daemon.state)], check=True)
    daemon.start()
    with daemon.client() as cri:
        cri.pull(busybox)
        wasm = registry.push_wasm("test/userns:1", guests.HELLO)
        cri.pull(wasm)
        yield Lab(daemon, cri, busybox, wasm)


def handlers(runtime: str) -> dict[str, object]:
    new = {"kind": "oci", "path": runtime, "wasm": "executor", "min_memory": 512_000}
    wasm = {"kind": "wasmtime", "linux_containers": "new"}
    return {"default_handler": "new", "handlers": {"new": new, OLD: {"kind": "oci", "path": OLD}, "wasm": wasm}}


@pytest.fixture
def lab(userns_lab: Lab) -> Iterator[Lab]:
    before = {name: os.stat(name).st_uid for name in OTHERS}
    yield userns_lab
    userns_lab.cri.remove_all_pods()
    assert {name: os.stat(name).st_uid for name in before} == before


def mapping(first: int = FIRST, length: int = LENGTH) -> pb.IDMapping:
    return pb.IDMapping(host_id=first, container_id=0, length=length)


def userns(first: int = FIRST, length: int = LENGTH, *, gids: int | None = None) -> pb.UserNamespace:
    other = mapping(first if gids is None else gids, length)
    return pb.UserNamespace(mode=pb.POD, uids=[mapping(first, length)], gids=[other])


def pod_config(
    lab: Lab, options: pb.UserNamespace | None = None, *, pid: pb.NamespaceMode.ValueType = pb.CONTAINER
) -> pb.PodSandboxConfig:
    config = lab.pod_config(network=pb.POD, pid=pid)
    config.linux.security_context.namespace_options.userns_options.CopyFrom(options or userns())
    return config


def run_pod(lab: Lab, options: pb.UserNamespace | None = None, handler: str = "new") -> Pod:
    return lab.pod(handler, config=pod_config(lab, options))


def volume(path: Path, target: str, ids: pb.UserNamespace | None = None) -> pb.Mount:
    """As the kubelet asks for one in such a pod."""
    ids = ids or userns()
    return pb.Mount(host_path=str(path), container_path=target, uidMappings=ids.uids, gidMappings=ids.gids)


def pid_of(lab: Lab, container: str) -> int:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])["pid"])


def ids_of(pid: int) -> tuple[int, int]:
    """The effective uid and gid of a process, at the node."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    uid, gid = (int(next(line for line in lines if line.startswith(word)).split()[2]) for word in ("Uid:", "Gid:"))
    return uid, gid


def owner_of(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def unconfined(config: pb.ContainerConfig) -> None:
    """By AppArmor, which forbids mounts and traces where the node has it."""
    config.linux.security_context.apparmor.profile_type = pb.SecurityProfile.Unconfined


def test_features_say_which_handlers_are_able(lab: Lab) -> None:
    answer = lab.cri.runtime.Status(pb.StatusRequest())
    features = {handler.name: handler.features.user_namespaces for handler in answer.runtime_handlers}
    assert features == {"": True, "new": True, OLD: is_able(OLD), "wasm": False}
    assert answer.features.user_namespaces_host_network


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        pytest.param(
            OLD, "has no idmapped mounts", marks=pytest.mark.skipif(is_able(OLD), reason="this runc is able to")
        ),
        ("wasm", "with the users of the node"),
    ],
)
def test_a_handler_that_is_not_able_is_refused_by_name(lab: Lab, handler: str, why: str) -> None:
    words = f"userns_options: handler {handler!r} is not able to: "
    with unchanged(lab.daemon), refused(grpc.StatusCode.FAILED_PRECONDITION, words):
        run_pod(lab, handler=handler)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, why):
        run_pod(lab, handler=handler)


def test_ids(lab: Lab) -> None:
    options = userns(FIRST, LENGTH, gids=FIRST + 1000)
    pod = run_pod(lab, options)
    script = """
        cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; id -g
        stat -c '%u:%g %a %n' / /bin/busybox /etc/hosts /etc/resolv.conf /etc/hostname /dev/shm /dev/pts
        cat /proc/sys/net/ipv4/ping_group_range /proc/sys/net/ipv4/ip_unprivileged_port_start; hostname
        touch /new /dev/shm/new && stat -c '%u:%g %n' /new /dev/shm/new
        chown 7:8 /new && stat -c '%u:%g %n' /new; echo 127.0.0.1 more >>/etc/hosts; tail -n 1 /etc/hosts
        echo again >/dev/stdout; exec sleep 1000"""
    container = lab.cri.run(pod, lab.shell(script))
    assert whole_lines(lab.cri.wait_log(container, "again")) == [
        f" 0 {FIRST} {LENGTH}",
        f" 0 {FIRST + 1000} {LENGTH}",
        *("0", "0", "0:0 755 /", "0:0 755 /bin/busybox"),
        *(f"0:0 644 /etc/{name}" for name in ("hosts", "resolv.conf", "hostname")),
        *("0:0 1777 /dev/shm", "0:0 755 /dev/pts"),
        *("0\t65535", "0", pod.config.hostname),
        *("0:0 /new", "0:0 /dev/shm/new", "7:8 /new", "127.0.0.1 more", "again"),
    ]
    pid = pid_of(lab, container)
    assert ids_of(pid) == (FIRST, FIRST + 1000)
    assert owner_of(Path(f"/proc/{pid}/root/new")) == (FIRST + 7, FIRST + 1008)
    assert owner_of(Path(f"/proc/{pid}/root/bin/busybox")) == (FIRST, FIRST + 1000)
    assert lab.cri.pod_status(pod).linux.namespaces.options.userns_options == options
    assert lab.cri.status(container).user.linux.uid == 0


def test_users_of_the_image_and_of_the_request(lab: Lab) -> None:
    def ask(config: pb.ContainerConfig) -> None:
        security = config.linux.security_context
        security.run_as_user.value, security.run_as_group.value = 1000, 2000
        security.supplemental_groups.append(3000)

    script = "id -u; id -g; id -G; echo out >/dev/stdout; echo error >/dev/stderr; cat </dev/stdin; exec sleep 1000"
    config = lab.shell(script)
    ask(config)
    pod = run_pod(lab)
    container = lab.cri.run(pod, config)
    expected = ["1000", "2000", "2000 3000", "out", "error"]
    assert sorted(whole_lines(lab.cri.wait_log(container, "error"))) == sorted(expected)
    pid = pid_of(lab, container)
    assert ids_of(pid) == (FIRST + 1000, FIRST + 2000)
    said = lab.cri.exec(container, ["sh", "-c", script.removesuffix("; exec sleep 1000")])
    assert (said.exit_code, said.stdout, said.stderr) == (0, b"1000\n2000\n2000 3000\nout\n", b"error\n")
    user = lab.cri.status(container).user.linux
    assert (user.uid, user.gid, list(user.supplemental_groups)) == (1000, 2000, [2000, 3000])
    outside = lab.shell("true", name="outside")
    outside.linux.security_context.run_as_user.value = LENGTH
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"user {LENGTH} is not in the pod's user namespace"):
        lab.cri.create(pod, outside)


def test_the_least_rights(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    def ask(config: pb.ContainerConfig) -> None:
        security = config.linux.security_context
        security.readonly_rootfs = security.no_new_privs = True
        security.run_as_user.value = 1000
        security.capabilities.drop_capabilities.append("ALL")
        security.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
        security.masked_paths.extend(("/proc/version", "/proc/acpi", "/sys/firmware"))
        security.readonly_paths.extend(("/proc/sys", "/proc/bus"))
        mount = volume(tmp_path, "/volume")
        mount.readonly = mount.recursive_read_only = True
        config.mounts.append(mount)

    script = """
        grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -s '\\t' ' '; wc -c </proc/version
        cut -d ' ' -f 5,6 /proc/self/mountinfo | grep -c -E '^(/|/proc/sys|/volume|/etc/hosts) ro,'
        echo again >/dev/stdout"""
    assert lab.say(run_pod(lab), script, ask) == [
        *(f"CapBnd: {0:016x}", "NoNewPrivs: 1", "Seccomp: 2", "0", "4", "again"),
    ]


@pytest.mark.parametrize(("stdin", "status"), [(False, 0), (True, 143)])
def test_the_input_is_at_its_end_unless_asked_for(lab: Lab, stdin: bool, status: int) -> None:
    def ask(config: pb.ContainerConfig) -> None:
        config.stdin = stdin
        config.linux.security_context.run_as_user.value = 1000

    script = "timeout 1 cat; echo $?; timeout 1 cat </dev/stdin; echo $?"
    said = lab.say(run_pod(lab), script, ask)
    assert [int(line) for line in said if line != "Terminated"] == [status, status]


@pytest.mark.parametrize("stdin", [False, True])
def test_a_terminal(lab: Lab, stdin: bool) -> None:
    config = lab.shell("tty; stat -c '%u:%g' $(tty); echo end; exec sleep 1000")
    config.tty, config.stdin = True, stdin
    container = lab.cri.run(run_pod(lab), config)
    lines = [line.strip() for line in whole_lines(lab.cri.wait_log(container, "end"))]
    assert lines == ["/dev/pts/0", "0:5", "end"]


def test_namespaces_belong_to_the_root_of_the_pod(lab: Lab) -> None:
    def ask(config: pb.ContainerConfig) -> None:
        config.linux.security_context.capabilities.add_capabilities.extend(("NET_ADMIN", "SYS_ADMIN"))
        unconfined(config)

    script = """
        ip link set lo down && echo network; hostname other && echo uts; ipcmk -M 100 >/dev/null 2>&1
        mount -t tmpfs none /tmp && echo mounts; cat /proc/sys/kernel/shm_rmid_forced
        (echo 1 >/proc/sys/vm/swappiness) 2>/dev/null || echo not the node"""
    sandbox = pod_config(lab)
    sandbox.linux.sysctls["kernel.shm_rmid_forced"] = "1"
    pod = lab.pod("new", config=sandbox)
    assert lab.say(pod, script, ask) == ["network", "uts", "mounts", "1", "not the node"]
    pins = lab.daemon.state / "pods" / pod.id / "ns"
    assert {entry.name for entry in pins.iterdir()} == {"user", "net", "ipc", "uts"}


def test_a_sysctl_that_the_kernel_refuses_leaves_nothing(lab: Lab) -> None:
    for name, value in (("net.ipv4.ping_group_range", "0 70000"), ("net.no.such", "1"), ("kernel.shmmni", "x")):
        config = pod_config(lab)
        config.linux.sysctls[name] = value
        with unchanged(lab.daemon), refused(grpc.StatusCode.INVALID_ARGUMENT, name):
            lab.pod("new", config=config)


def test_layers_are_shared_and_stay_what_they_are(lab: Lab) -> None:
    layers = lab.daemon.root / "layers"
    before = {path.name: owner_of(path) for path in layers.iterdir()}
    pods = [run_pod(lab, userns(first)) for first in (FIRST, FIRST + LENGTH)]
    script = "touch /bin/busybox && chown 3:4 /bin/busybox && stat -c '%u:%g' /bin/busybox /bin; exec sleep 1000"
    containers = [lab.cri.run(pod, lab.shell(script)) for pod in pods]
    for number, container in enumerate(containers):
        first = FIRST + number * LENGTH
        assert whole_lines(lab.cri.wait_log(container, "0:0")) == ["3:4", "0:0"]
        assert owner_of(lab.daemon.root / "containers" / container / "upper/bin/busybox") == (first + 3, first + 4)
    assert {path.name: owner_of(path) for path in layers.iterdir()} == before
    assert {owner_of(path) for path in layers.glob("*/bin/busybox")} == {(0, 0)}
    assert lab.say(lab.pod("new"), "stat -c '%u:%g' /bin/busybox") == ["0:0"]


def test_volumes(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    owned = tmp_path / "owned"
    owned.mkdir()
    (owned / "file").write_text("of 1000\n")
    os.chown(owned / "file", 1000, 2000)
    plain = tmp_path / "plain"
    plain.mkdir()

    def ask(config: pb.ContainerConfig) -> None:
        config.mounts.extend([volume(owned, "/owned"), pb.Mount(host_path=str(plain), container_path="/plain")])
        config.mounts.append(volume(tmp_path / "missing", "/missing"))

    script = """
        stat -c '%u:%g' /owned/file /missing /plain; touch /owned/new /missing/new; chown 7:8 /owned/new
        touch /plain/new 2>/dev/null || echo not mine"""
    pod = run_pod(lab)
    assert lab.say(pod, script, ask) == ["1000:2000", "0:0", "65534:65534", "not mine"]
    assert owner_of(owned / "new") == (7, 8)
    assert owner_of(tmp_path / "missing/new") == (0, 0)


def test_mounts_of_the_node_arrive_and_none_leaves(lab: Lab, tmp_path: Path) -> None:
    with tmpfs(tmp_path, "defaults"):
        subprocess.run(["mount", "--make-shared", str(tmp_path)], check=True)
        config = lab.shell("exec sleep 1000")
        for mount in (volume(tmp_path, "/mapped"), pb.Mount(host_path=str(tmp_path), container_path="/plain")):
            mount.propagation = pb.PROPAGATION_HOST_TO_CONTAINER
            config.mounts.append(mount)
        pod = run_pod(lab)
        container = lab.cri.run(pod, config)
        (tmp_path / "later").mkdir()
        with tmpfs(tmp_path / "later", "defaults"):
            (tmp_path / "later/file").touch()
            said = lab.cri.exec(container, ["ls", "/mapped/later", "/plain/later"])
        assert said.stdout.decode().split() == ["/mapped/later:", "file", "/plain/later:", "file"]
        config.mounts[0].propagation = pb.PROPAGATION_BIDIRECTIONAL
        config.metadata.name = "refused"
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "PROPAGATION_BIDIRECTIONAL of /mapped"):
            lab.cri.create(pod, config)
        lab.cri.stop(container)
        lab.cri.remove(container)


def test_mounts_that_cannot_be_mapped_are_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    pod = run_pod(lab)
    one_sided = volume(tmp_path, "/one-sided")
    del one_sided.gidMappings[:]
    empty = volume(tmp_path, "/empty", userns(FIRST, 0))
    image = volume(Path(), "/image", userns(FIRST + 1))
    image.host_path, image.readonly = "", True
    image.image.image = lab.busybox
    for mount, code, words in (
        (one_sided, grpc.StatusCode.INVALID_ARGUMENT, "gidMappings of /one-sided"),
        (empty, grpc.StatusCode.INVALID_ARGUMENT, "gidMappings of /empty"),
        (image, grpc.StatusCode.INVALID_ARGUMENT, "gidMappings of /image"),
        (volume(Path("/proc/sys"), "/unmapped"), grpc.StatusCode.FAILED_PRECONDITION, "idmapped"),
    ):
        config = lab.shell("true", name="refused")
        config.mounts.append(mount)
        with unchanged(lab.daemon), refused(code, words):
            lab.cri.create(pod, config)


def test_idmapped_mounts_need_a_runtime_that_knows_them(lab: Lab, tmp_path: Path) -> None:
    pod = lab.pod(OLD)
    config = lab.shell("true")
    config.mounts.append(volume(tmp_path, "/volume"))
    if is_able(OLD):
        pytest.skip("this runc is able to")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "uidMappings and gidMappings of /volume"):
        lab.cri.create(pod, config)


@pytest.fixture(scope="module")
def declaring(registry: images.Registry) -> str:
    """An image with two VOLUMEs, one of which it has itself."""
    layer = images.layer(
        [
            images.directory("data", 0o750, uid=7, gid=8),
            images.file("data/one", b"of the image\n", 0o640, uid=9, gid=10),
        ]
    )
    busybox = images.busybox_image()
    blobs = [*busybox.blobs[1:], layer]
    return registry.push("userns/volumes:1", images.image(blobs, {"Volumes": {"/data": {}, "/fresh": {}}}))


def test_volumes_of_images(lab: Lab, declaring: str) -> None:
    lab.cri.pull(declaring)
    pod = run_pod(lab)
    script = """
        stat -c '%u:%g %a %n' /data /data/one /fresh /image/data /image/data/one /image/bin/busybox
        cat /image/data/one; touch /data/new /fresh/new; (touch /image/new) 2>/dev/null || echo read-only"""
    config = container_config(declaring, "sh", "-c", script)
    kubelets = volume(Path(), "/image")
    kubelets.host_path, kubelets.readonly = "", True
    kubelets.image.image = declaring
    config.mounts.append(kubelets)
    code, lines = lab.output(pod, config)
    assert (code, lines) == (
        0,
        [
            *("7:8 750 /data", "9:10 640 /data/one", "0:0 755 /fresh"),
            *("7:8 750 /image/data", "9:10 640 /image/data/one", "0:0 755 /image/bin/busybox"),
            *("of the image", "read-only"),
        ],
    )


def test_a_shared_pid_namespace(lab: Lab) -> None:
    pod = lab.pod("new", config=pod_config(lab, pid=pb.POD))

    def share(config: pb.ContainerConfig) -> None:
        config.linux.security_context.namespace_options.pid = pb.POD
        config.linux.security_context.capabilities.add_capabilities.append("SYS_PTRACE")
        unconfined(config)

    script = "cat /proc/1/comm; stat -c %u /proc/1; tr -s ' ' </proc/1/uid_map; ls /proc/1/root | tr '\\n' ' '"
    lines = lab.say(pod, script, share)
    assert lines == ["catatonit", "65535", f" 0 {FIRST} {LENGTH}", "catatonit dev proc "]


def test_host_side_of_it_all_is_closed(lab: Lab) -> None:
    container = lab.cri.run(run_pod(lab), lab.shell("exec sleep 1000"))
    bundle = lab.daemon.state / "containers" / container
    assert (stat.S_IMODE(bundle.stat().st_mode), owner_of(bundle)) == (0o710, (0, FIRST))
    assert stat.S_IMODE(lab.daemon.root.stat().st_mode) == 0o700


def test_small_mappings(lab: Lab) -> None:
    for length in (1, 5, 6):
        pod = lab.pod("new", config=pod_config(lab, userns(FIRST, length), pid=pb.POD))
        config = lab.shell("cat /proc/sys/net/ipv4/ping_group_range; stat -c %u:%g /")
        assert lab.output(pod, config) == (0, [f"0\t{length - 1}", "0:0"])


def test_it_outlives_the_daemon(lab: Lab) -> None:
    pod = run_pod(lab)
    container = lab.cri.run(pod, lab.shell("readlink /proc/self/ns/user; exec sleep 1000"))
    before = whole_lines(lab.cri.wait_log(container, "user"))
    lab.daemon.kill()
    lab.daemon.start()
    assert lab.cri.status(container).state == pb.CONTAINER_RUNNING
    assert lab.cri.pod_status(pod).state == pb.SANDBOX_READY
    assert lab.say(pod, "readlink /proc/self/ns/user", name="later") == before
    assert lab.cri.exec(container, ["sh", "-c", "echo x >/dev/stdout"]).stdout == b"x\n"
    lab.daemon.stop()
    mounts.unmount(lab.daemon.state / "pods" / pod.id / "ns" / "user")
    lab.daemon.start()
    assert lab.cri.pod_status(pod).state == pb.SANDBOX_NOTREADY


def test_a_kill_in_the_middle_leaves_nothing(make_daemon: MakeDaemon, userns_lab: Lab) -> None:
    daemon = make_daemon(handlers(new_runtime() or ""))
    settle(daemon, {"new": userns_lab.busybox})
    with daemon.client() as cri:  # crun keeps the filter of its first infra container
        cri.run_pod(daemon.pod_config(pid=pb.POD))
        cri.remove_all_pods()
    moments = seeded()

    def make(number: int) -> None:
        config = daemon.pod_config(pid=pb.POD if number % 2 else pb.CONTAINER)
        config.linux.security_context.namespace_options.userns_options.CopyFrom(userns(FIRST + number * LENGTH))
        with daemon.client() as cri, contextlib.suppress(grpc.RpcError):
            cri.run(cri.run_pod(config), container_config(userns_lab.busybox, "sleep", "1000"))

    for _ in range(count(full=20, quick=2)):
        with unchanged(daemon), ThreadPoolExecutor() as pool:
            made = [pool.submit(make, number) for number in range(count(full=20, quick=6))]
            time.sleep(moments.uniform(0.02, 0.8))
            daemon.kill()
            for future in made:
                future.result()
            daemon.start()
            with daemon.client() as cri:
                cri.remove_all_pods()


def test_limits_and_figures(lab: Lab) -> None:
    pod = run_pod(lab)
    config = lab.shell("exec sleep 1000")
    config.linux.resources.MergeFrom(pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20, oom_score_adj=321))
    container = lab.cri.run(pod, config)
    assert lab.cri.exec(container, ["cat", "/proc/1/oom_score_adj"]).stdout == b"321\n"
    request = pb.ContainerStatsRequest(container_id=container)
    eventually(lambda: lab.cri.runtime.ContainerStats(request).stats.memory.working_set_bytes.value > 0)
    traffic = lab.cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats.linux.network
    assert traffic.default_interface.name == "eth0"
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=96 << 20, oom_score_adj=321)
    lab.cri.runtime.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=limits))
    assert lab.cri.status(container).resources.linux.memory_limit_in_bytes == 96 << 20
    lab.cri.stop(container, grace=1)
    assert lab.cri.status(container).state == pb.CONTAINER_EXITED


def test_the_network(lab: Lab) -> None:
    pod = run_pod(lab)
    container = lab.cri.run(pod, lab.shell("echo hello | nc -l -p 80; exec sleep 1000"))
    address = lab.cri.pod_status(pod).network.ip
    other = run_pod(lab, userns(FIRST + LENGTH))
    del container
    assert lab.say(other, f"for n in $(seq 50); do nc {address} 80 </dev/null && break; sleep 0.1; done") == ["hello"]


@pytest.mark.parametrize("privileged", [False, True])
def test_the_nodes_network_without_a_right_in_it(lab: Lab, privileged: bool) -> None:
    sandbox = lab.pod_config(network=pb.NODE)
    security = sandbox.linux.security_context
    security.namespace_options.userns_options.CopyFrom(userns())
    security.privileged = privileged

    def ask(config: pb.ContainerConfig) -> None:
        config.linux.security_context.privileged = privileged
        config.linux.security_context.capabilities.add_capabilities.append("NET_ADMIN")

    script = """
        readlink /proc/self/ns/net; stat -c %u /sys; ls /sys/class/net >/dev/null && ls -d /sys/fs/cgroup
        ip link set lo down 2>/dev/null || echo no network
        (echo 0 >/sys/kernel/mm/ksm/run) 2>/dev/null || echo no sys"""
    own = os.readlink("/proc/self/ns/net")
    lines = lab.say(lab.pod("new", config=sandbox), script, ask)
    assert lines == [own, "65534", "/sys/fs/cgroup", "no network", "no sys"]


def test_privileged_within_its_namespace(lab: Lab) -> None:
    sandbox = pod_config(lab)
    sandbox.linux.security_context.privileged = True

    def ask(config: pb.ContainerConfig) -> None:
        config.linux.security_context.privileged = True

    script = """
        mount -t tmpfs none /tmp && echo mounted; test -e /dev/kmsg && echo devices
        (echo 1 >/proc/sys/vm/swappiness) 2>/dev/null || echo not the node"""
    assert lab.say(lab.pod("new", config=sandbox), script, ask) == ["mounted", "devices", "not the node"]


def test_a_module_in_such_a_pod_is_refused_by_name(lab: Lab) -> None:
    pod = run_pod(lab)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "userns_options: handler 'wasm' is not able to"):
        lab.cri.create(pod, container_config(lab.wasm))


@pytest.mark.parametrize(
    ("pod_has", "asked"),
    [
        (userns(), pb.UserNamespace(mode=pb.NODE)),
        (userns(), userns(FIRST + 1)),
        (pb.UserNamespace(mode=pb.NODE), userns()),
    ],
)
def test_a_container_says_the_same_as_its_pod(lab: Lab, pod_has: pb.UserNamespace, asked: pb.UserNamespace) -> None:
    pod = run_pod(lab, pod_has)

    def ask(config: pb.ContainerConfig, options: pb.UserNamespace = pod_has) -> None:
        config.linux.security_context.namespace_options.userns_options.CopyFrom(options)

    config = lab.shell("true", name="refused")
    ask(config, asked)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "userns_options"):
        lab.cri.create(pod, config)
    assert len(lab.say(pod, "cat /proc/self/uid_map", ask)) == 1


def test_target_of_a_pid_namespace(lab: Lab) -> None:
    pod = run_pod(lab)
    target = lab.cri.run(pod, lab.shell("exec sleep 1234", name="target"))

    def join(config: pb.ContainerConfig) -> None:
        options = config.linux.security_context.namespace_options
        options.pid, options.target_id = pb.TARGET, target

    assert "sleep 1234" in lab.say(pod, "tr '\\0' ' ' </proc/1/cmdline; echo", join, name="debug")[0]
