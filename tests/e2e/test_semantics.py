"""What a process in a Linux container really sees of its request: asked of the process and the kernel, not of the spec.

Not exec, logs and stop (`test_process_io`). One pod for several questions: a container costs more than a question.
"""

from __future__ import annotations

import json
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support.cri import container_config, whole_lines
from tests.support.expect import refused

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun"])]

DEFAULT_CAPABILITIES = 0xA80425FB
"""The 14 that CRI runtimes give when nothing is said, as /proc/self/status prints them."""
NET_BIND_SERVICE, NET_ADMIN, NET_RAW, SYS_RESOURCE = (1 << bit for bit in (10, 12, 13, 24))


def own_status() -> dict[str, str]:
    return fields(Path("/proc/self/status").read_text().splitlines())


def fields(lines: Sequence[str]) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def push(lab: Lab, registry: images.Registry, name: str, config: Mapping[str, object], *more: images.Blob) -> str:
    """Busybox with another configuration and further layers, pulled."""
    base = images.busybox_image()
    image = images.image([*base.blobs[1:], *more], {"Env": ["PATH=/bin"], **config})
    reference = registry.push(f"semantics/{name}:1", image)
    lab.cri.pull(reference)
    return reference


def test_arguments(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    image = push(lab, registry, "arguments", {"Entrypoint": ["echo", "entry"], "Cmd": ["cmd"]})
    pod = lab.pod(handler)
    expected: list[tuple[str, Sequence[str], Sequence[str], str]] = [
        (image, [], [], "entry cmd"),
        (image, [], ["a", "b c"], "entry a b c"),
        (image, ["echo", "own"], [], "own"),
        (image, ["echo", "own"], ["a"], "own a"),
        (lab.busybox, [], ["echo", "instead of cmd"], "instead of cmd"),
    ]
    for number, (reference, command, args, line) in enumerate(expected):
        config = container_config(reference, *command, args=args, name=f"c{number}")
        assert lab.output(pod, config) == (0, [line])


def test_environment(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    image = push(lab, registry, "environment", {"Env": ["PATH=/bin:/here", "A=image", "B=image", "EMPTY="]})
    bare = push(lab, registry, "bare", {"Env": []})
    pod = lab.pod(handler, network=pb.POD)
    hostname = pod.config.metadata.name
    config = container_config(image, "env", env={"B": "request", "C": "first", "SPACED": " a=b "})
    config.envs.add(key="C", value=b"second")
    variables = {"PATH": "/bin:/here", "HOSTNAME": hostname, "HOME": "/root", "A": "image", "EMPTY": ""}
    variables |= {"B": "request", "C": "second", "SPACED": " a=b "}
    code, lines = lab.output(pod, config)
    assert code == 0
    assert dict(line.split("=", 1) for line in lines) == variables
    code, lines = lab.output(pod, container_config(bare, "/bin/env", env={"HOSTNAME": "mine"}, name="bare"))
    assert code == 0
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert sorted(lines) == ["HOME=/root", "HOSTNAME=mine", f"PATH={path}"]


def test_working_directory(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    image = push(lab, registry, "cwd", {"WorkingDir": "/made/of/image"})
    pod = lab.pod(handler)
    expected = {"": "/made/of/image", "/made/of/request": "/made/of/request", "/tmp/": "/tmp"}
    for number, (asked, found) in enumerate(expected.items()):
        config = container_config(image, "pwd", name=f"c{number}")
        config.working_dir = asked
        assert lab.output(pod, config) == (0, [found])
    assert lab.say(pod, "pwd") == ["/"]


def test_users_and_groups(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    database = images.layer(
        [
            images.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\n"),
            images.file("etc/group", b"root:x:0:\napp:x:1001:\nextra:x:2000:app,other\nother:x:2500:other\n"),
        ]
    )
    image = push(lab, registry, "users", {"User": "app"}, database)
    pod = lab.pod(handler)
    strict = pb.SupplementalGroupsPolicy.Strict
    number, name, group = pb.Int64Value(value=4711), "app", pb.Int64Value(value=5000)
    root = pb.Int64Value(value=0)
    context = pb.LinuxContainerSecurityContext
    expected = [
        (context(), (1000, 1001, {1001, 2000}, "/home/app")),
        (context(run_as_user=root), (0, 0, {0}, "/root")),
        (context(run_as_user=number), (4711, 0, {0}, "/")),
        (context(run_as_username=name, run_as_group=group), (1000, 5000, {5000, 2000}, "/home/app")),
        (context(supplemental_groups=[7000]), (1000, 1001, {1001, 2000, 7000}, "/home/app")),
        (
            context(supplemental_groups=[7000], supplemental_groups_policy=strict),
            (1000, 1001, {1001, 7000}, "/home/app"),
        ),
    ]
    for index, (security, found) in enumerate(expected):
        config = container_config(image, "sh", "-c", 'cat /proc/self/status; echo "HOME: $HOME"', name=f"c{index}")
        config.linux.security_context.MergeFrom(security)
        container = lab.cri.run(pod, config)
        told = lab.cri.wait_exit(container).user.linux
        seen = fields(whole_lines(lab.cri.log(container)))
        uid, gid = int(seen["Uid"].split()[1]), int(seen["Gid"].split()[1])
        groups = {int(word) for word in seen["Groups"].split()}
        assert (uid, gid, groups, seen["HOME"]) == found
        assert (told.uid, told.gid, set(told.supplemental_groups)) == found[:3]
    for security, words in (
        (context(run_as_group=group), "run_as_group"),
        (context(run_as_username="nobody-knows"), "nobody-knows"),
    ):
        config = container_config(image, "true", name="refused")
        config.linux.security_context.MergeFrom(security)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
            lab.cri.create(pod, config)


def test_capabilities(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    everything = int(own_status()["CapEff"], 16)
    default, nobody = DEFAULT_CAPABILITIES, pb.Int64Value(value=65534)
    capability, context = pb.Capability, pb.LinuxContainerSecurityContext
    asked = {
        "default": (capability(), default),
        "more": (capability(add_capabilities=["NET_ADMIN"]), default | NET_ADMIN),
        "less": (capability(drop_capabilities=["NET_RAW"]), default & ~NET_RAW),
        "all": (capability(add_capabilities=["ALL"]), everything),
        "none": (capability(drop_capabilities=["ALL"]), 0),
        "one": (capability(drop_capabilities=["ALL"], add_capabilities=["CAP_NET_RAW"]), NET_RAW),
        "all-but-one": (capability(add_capabilities=["ALL"], drop_capabilities=["NET_RAW"]), everything & ~NET_RAW),
    }
    for name, (wanted, mask) in asked.items():
        config = lab.shell("cat /proc/self/status", name=name)
        config.linux.security_context.MergeFrom(context(capabilities=wanted))
        code, lines = lab.output(pod, config)
        found = {key: int(value, 16) for key, value in fields(lines).items() if key.startswith("Cap")}
        assert code == 0
        assert found == {"CapInh": 0, "CapPrm": mask, "CapEff": mask, "CapBnd": mask, "CapAmb": 0}, name
    # Who is not root has none of them in effect, but for the ambient ones.
    for wanted, ambient in ((capability(), 0), (capability(add_ambient_capabilities=["NET_BIND_SERVICE"]), 1 << 10)):
        config = lab.shell("cat /proc/self/status", name=f"ambient-{ambient}")
        config.linux.security_context.MergeFrom(context(capabilities=wanted, run_as_user=nobody))
        _, lines = lab.output(pod, config)
        found = {key: int(value, 16) for key, value in fields(lines).items() if key.startswith("Cap")}
        assert (found["CapEff"], found["CapAmb"], found["CapBnd"]) == (ambient, ambient, default)
    config = lab.shell("true", name="unknown")
    config.linux.security_context.capabilities.add_capabilities.append("FLY")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "'FLY'"):
        lab.cri.create(pod, config)


def test_what_the_daemon_lacks_is_left_out_and_said_once(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    has_it = bool(int(own_status()["CapEff"], 16) & SYS_RESOURCE)
    own = int(Path("/proc/self/oom_score_adj").read_text())

    def ask(config: pb.ContainerConfig) -> None:
        config.linux.security_context.capabilities.add_capabilities.append("SYS_RESOURCE")
        config.linux.resources.oom_score_adj = -900

    for name in ("one", "two"):
        lines = lab.say(pod, "cat /proc/self/oom_score_adj /proc/self/status", ask, name=name)
        assert int(lines[0]) == (-900 if has_it else max(-900, own))
        assert bool(int(fields(lines)["CapBnd"], 16) & SYS_RESOURCE) == has_it
    log = [json.loads(line) for line in lab.daemon.log.read_text().splitlines() if line.startswith("{")]
    told = sorted(line["what"] for line in log if "given less" in line["event"])
    assert told == ([] if has_it else ["capability SYS_RESOURCE", f"oom_score_adj below {own}"])


def test_new_privileges(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    files = [
        images.directory("setuid"),
        images.file("setuid/busybox", Path("/bin/busybox").read_bytes(), 0o4755),
        images.file("etc/passwd", b"root::0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"),
    ]
    image = push(lab, registry, "setuid", {"User": "user"}, images.layer(files))
    pod = lab.pod(handler)
    for forbidden, uid in ((False, "0"), (True, "1000")):
        script = "grep NoNewPrivs /proc/self/status; /setuid/busybox su -c 'id -u' 2>/dev/null || id -u"
        config = container_config(image, "sh", "-c", script, name=f"forbidden-{forbidden}")
        config.linux.security_context.no_new_privs = forbidden
        assert lab.output(pod, config) == (0, [f"NoNewPrivs:\t{int(forbidden)}", uid])


def test_protected_files(shared_lab: Lab, tmp_path: Path, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)

    def protect(config: pb.ContainerConfig) -> None:
        security = config.linux.security_context
        security.readonly_rootfs = True
        security.masked_paths.extend(["/etc/passwd", "/usr", "/proc/version", "/not/there"])
        security.readonly_paths.extend(["/proc/sys", "/tmp", "/not/there"])
        config.mounts.add(host_path=str(tmp_path), container_path="/data")

    script = """
        try() { if "$@" 2>/dev/null; then echo "$* yes"; else echo "$* no"; fi; }
        try touch /file; try touch /tmp/file; try touch /etc/hosts; try touch /data/file; try touch /dev/shm/file
        try test -s /etc/passwd; try ls -A /usr/bin; try grep -q Linux /proc/version
        try dd if=/proc/sys/kernel/hostname of=/proc/sys/kernel/hostname
        ls -A /usr"""
    assert lab.say(pod, script, protect) == [
        *("touch /file no", "touch /tmp/file no", "touch /etc/hosts no", "touch /data/file yes"),
        *("touch /dev/shm/file yes", "test -s /etc/passwd no", "ls -A /usr/bin no", "grep -q Linux /proc/version no"),
        "dd if=/proc/sys/kernel/hostname of=/proc/sys/kernel/hostname no",
    ]
    assert (tmp_path / "file").exists()
    # Empty lists hide nothing.
    script = "touch /file /etc/hosts && test -w /proc/sys && ! grep ' /proc/' /proc/self/mounts && echo open"
    assert lab.say(pod, script, name="open") == ["open"]


def test_privileged(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    sandbox = lab.pod_config()
    sandbox.linux.security_context.privileged = True
    pod = lab.pod(handler, config=sandbox)

    def privileged(config: pb.ContainerConfig) -> None:
        config.linux.security_context.privileged = True
        config.linux.security_context.masked_paths.append("/proc/version")
        config.linux.security_context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault

    script = """
        cat /proc/self/status
        echo "sys: $(awk '$2 == "/sys" {print substr($4, 1, 2)}' /proc/self/mounts)"
        grep -q Linux /proc/version && echo "version: open"
        mknod /null2 c 1 11 && head -c 0 /null2 && echo "kmsg: open"
        cd /dev; find . -type c -o -type b | sed 's/^/device: /'"""
    lines = lab.say(pod, script, privileged)
    seen = fields(lines)
    assert int(seen["CapEff"], 16) == int(own_status()["CapEff"], 16)
    assert seen["Seccomp"] == "0"
    assert (seen["sys"], seen["version"], seen["kmsg"]) == ("rw", "open", "open")
    devices = {line.removeprefix("device: ./") for line in lines if line.startswith("device: ")}
    host = {path.name for path in Path("/dev").iterdir() if not path.is_symlink() and is_device(path)}
    assert host - {"console", "ptmx"} <= devices

    ordinary = lab.say(pod, "ls /dev; mknod /null2 c 1 11; head -c 0 /null2 2>&1 || true", name="ordinary")
    assert {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "fd", "stdout"} <= set(ordinary)
    assert not {"kmsg", "loop0", "vda"} & set(ordinary)
    assert "not permitted" in ordinary[-1]

    with refused(grpc.StatusCode.INVALID_ARGUMENT, "privileged"):
        config = lab.shell("true")
        privileged(config)
        lab.cri.create(lab.pod(handler), config)


def is_device(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def test_mounts(shared_lab: Lab, tmp_path: Path, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    for name in ("rw", "ro", "outer", "inner", "real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "hosts").write_text("192.0.2.7 only\n")
    mounts = [
        pb.Mount(container_path="/m/rw", host_path=str(tmp_path / "rw")),
        pb.Mount(container_path="/m/ro", host_path=str(tmp_path / "ro"), readonly=True),
        pb.Mount(container_path="/m/outer/deep/inner", host_path=str(tmp_path / "inner")),
        pb.Mount(container_path="/m/outer", host_path=str(tmp_path / "outer")),
        pb.Mount(container_path="/m/link", host_path=str(tmp_path / "link")),
        pb.Mount(container_path="/m/missing", host_path=str(tmp_path / "not" / "there")),
        pb.Mount(container_path="/etc/hosts", host_path=str(tmp_path / "hosts")),
    ]
    config = lab.shell(
        "cd /m; cat rw/name ro/name outer/name outer/deep/inner/name link/name /etc/hosts;"
        "touch rw/new missing/new link/new outer/deep/inner/new && ! touch ro/new 2>/dev/null && cat /etc/hostname"
    )
    config.mounts.extend(mounts)
    container = lab.cri.run(pod, config)
    status = lab.cri.wait_exit(container)
    lines = whole_lines(lab.cri.log(container))
    assert lines == ["rwroouterinnerreal192.0.2.7 only", socket.gethostname()]
    assert status.exit_code == 0
    assert list(status.mounts) == mounts
    assert {path.parent.name for path in tmp_path.rglob("new")} == {"rw", "there", "real", "inner"}
    assert stat.S_IMODE((tmp_path / "not" / "there").stat().st_mode) == 0o755


def test_mounts_keep_the_restrictions_of_their_source(shared_lab: Lab, tmp_path: Path, handler: str) -> None:
    lab = shared_lab
    with tmpfs(tmp_path, "nosuid,nodev,noexec"):

        def ask(config: pb.ContainerConfig) -> None:
            config.mounts.add(host_path=str(tmp_path), container_path="/m/rw")
            config.mounts.add(host_path=str(tmp_path), container_path="/m/ro", readonly=True)

        lines = lab.say(lab.pod(handler), "grep -E ' (/m/r.|/dev/shm) ' /proc/self/mounts", ask)
    options = {line.split()[1]: set(line.split()[3].split(",")) for line in lines}
    assert {target: "ro" in found for target, found in options.items()} == {
        "/m/rw": False,
        "/m/ro": True,
        "/dev/shm": False,
    }
    assert all(found >= {"nosuid", "nodev", "noexec"} for found in options.values())


def test_one_source_with_several_propagations(shared_lab: Lab, tmp_path: Path, handler: str) -> None:
    lab = shared_lab
    with tmpfs(tmp_path, "defaults"):
        subprocess.run(["mount", "--make-shared", str(tmp_path)], check=True)
        (group,) = propagation_tags(Path("/proc/self/mountinfo").read_text().splitlines())[str(tmp_path)]

        def ask(config: pb.ContainerConfig) -> None:
            for name in ("BIDIRECTIONAL", "HOST_TO_CONTAINER", "PRIVATE"):
                mode = pb.MountPropagation.Value(f"PROPAGATION_{name}")
                config.mounts.add(host_path=str(tmp_path), container_path=f"/m/{name}", propagation=mode)

        tags = propagation_tags(lab.say(lab.pod(handler), "grep ' /m/' /proc/self/mountinfo", ask))
    master = group.replace("shared", "master")
    assert group in tags["/m/BIDIRECTIONAL"]
    assert master in tags["/m/HOST_TO_CONTAINER"]
    assert not {group, master} & tags["/m/PRIVATE"]


def propagation_tags(mountinfo: Sequence[str]) -> dict[str, set[str]]:
    """`shared:N` and `master:N` by mount point (proc_pid_mountinfo(5))."""
    return {line.split()[4]: set(line.partition(" - ")[0].split()[6:]) for line in mountinfo}


@contextmanager
def tmpfs(directory: Path, options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "test", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_missing_mount_source_is_refused_where_the_node_says_so(
    make_daemon: MakeDaemon, busybox: str, tmp_path: Path, handler: str
) -> None:
    daemon = make_daemon({"missing_mount_source": "error"})
    missing = tmp_path / "not" / "there"
    with daemon.client() as cri:
        cri.pull(busybox)
        pod = cri.run_pod(daemon.pod_config(network=pb.NODE), handler)
        config = container_config(busybox, "true")
        config.mounts.add(container_path="/m", host_path=str(missing))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, str(missing)):
            cri.create(pod, config)
    assert not missing.parent.exists()


def test_files_of_the_pod(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    sandbox = lab.pod_config(network=pb.POD)
    sandbox.hostname = "a.name"
    sandbox.dns_config.MergeFrom(
        pb.DNSConfig(servers=["192.0.2.1", "192.0.2.2"], searches=["a.test", "b.test"], options=["ndots:5"])
    )
    pod, other = lab.pod(handler, config=sandbox), lab.pod(handler)
    script = """
        hostname; cat /etc/hostname /etc/resolv.conf; echo $HOSTNAME
        stat -c '%a %T' /dev/shm; df -m /dev/shm | awk 'NR == 2 {print $2}'; echo shared >/dev/shm/file"""
    resolv = ["search a.test b.test", "nameserver 192.0.2.1", "nameserver 192.0.2.2", "options ndots:5"]
    assert lab.say(pod, script) == [
        "a.name",
        "a.name",
        *resolv,
        "a.name",
        "1777 0",
        "64",
    ]
    assert lab.say(pod, "cat /dev/shm/file", name="second") == ["shared"]
    nameless = lab.pod_config(network=pb.POD)
    nameless.hostname = ""
    assert lab.say(lab.pod(handler, config=nameless), "hostname; echo $HOSTNAME") == [socket.gethostname()] * 2
    assert lab.say(other, "ls /dev/shm; hostname; cat /etc/resolv.conf") == [
        socket.gethostname(),
        *Path("/etc/resolv.conf").read_text().splitlines(),
    ]
