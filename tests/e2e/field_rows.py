"""What a process inside a Linux container sees of each field of its request: a row is a request and what it leads to.

Configurations are text protos: what differs from a plain one. Words in `@` stand for things of the test: `@dir@` is a
directory of the node with the files of `FILES`, `@other@` an image with those of `IMAGE`, `@net@` the node's namespace
of that kind. Invariant: without its fields a row is seen otherwise, except where it says that this cannot be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NO_MKDIR = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}
FILES: Mapping[str, str] = {
    "name": "of the node\n",
    "profile.json": json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [_NO_MKDIR]}),
}
IMAGE: Mapping[str, str] = {
    "which": "the other image\n",
    "sub/which": "its directory\n",
    "etc/passwd": "root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\n",
    "etc/group": "root:x:0:\napp:x:1001:\nmember:x:2000:app\n",
}


@dataclass(frozen=True, slots=True)
class Row:
    """`seen` is what the shell script says in a container of `config`, in a pod of `pod`."""

    fields: tuple[str, ...]
    """As docs/conformance.md names them, with the message in front."""
    script: str
    seen: str
    config: str = ""
    pod: str = ""
    same_without: bool = False


def _container(fields: str, config: str, script: str, seen: str, *, pod: str = "", same_without: bool = False) -> Row:
    return Row(tuple(f"ContainerConfig.{name}" for name in fields.split()), script, seen, config, pod, same_without)


def _pod(fields: str, pod: str, script: str, seen: str, *, config: str = "") -> Row:
    return Row(tuple(f"PodSandboxConfig.{name}" for name in fields.split()), script, seen, config, pod)


def _resources(fields: str, values: str, v1: str, v2: str, seen: str, *, same_without: bool = False) -> Row:
    """From the file of the container's own cgroup, whichever version; `v2` may be a shell command on its file."""
    names = " ".join(f"linux.resources.{name}" for name in fields.split())
    script = f"cat /sys/fs/cgroup/{v1} 2>/dev/null || (cd /sys/fs/cgroup && {v2})"
    return _container(names, f"linux {{ resources {{ {values} }} }}", script, seen, same_without=same_without)


def _security(fields: str, values: str, script: str, seen: str, *, more: str = "", pod: str = "") -> Row:
    names = " ".join(f"linux.security_context.{name}" for name in fields.split())
    return _container(names, f"linux {{ security_context {{ {values} }} }} {more}", script, seen, pod=pod)


def _mount(fields: str, values: str, script: str, seen: str) -> Row:
    names = " ".join(f"mounts.{name}" for name in fields.split())
    return _container(names, f"mounts {{ container_path: '/m' {values} }}", script, seen)


def _namespace(kind: str, mode: str) -> str:
    return f"linux {{ security_context {{ namespace_options {{ {kind}: {mode} }} }} }}"


def _status(*names: str) -> str:
    return "; ".join(f"awk '$1 == \"{name}:\" {{ print $2 }}' /proc/self/status" for name in names)


_CAPABILITIES = _status("CapPrm", "CapEff", "CapBnd", "CapAmb")
_NET_RAW, _NET_BIND, _NONE = "0000000000002000", "0000000000000400", "0000000000000000"
_USER = "run_as_user { value: 7 }"
_OPTIONS_OF_M = "awk '$5 == \"/m\" { print $6 }' /proc/self/mountinfo | tr , '\\n'"

ROWS: Sequence[Row] = [
    # The pod.
    _pod("hostname", "hostname: 'a.name'", "hostname; cat /etc/hostname /proc/sys/kernel/hostname", "a.name\n" * 3),
    _pod("dns_config.servers", "dns_config { servers: '192.0.2.1' }", "cat /etc/resolv.conf", "nameserver 192.0.2.1"),
    _pod("dns_config.searches", "dns_config { searches: 'a.test' }", "cat /etc/resolv.conf", "search a.test"),
    _pod("dns_config.options", "dns_config { options: 'ndots:5' }", "cat /etc/resolv.conf", "options ndots:5"),
    _pod(
        "linux.sysctls",
        "linux { sysctls { key: 'kernel.shm_rmid_forced' value: '1' } }",
        "cat /proc/sys/kernel/shm_rmid_forced",
        "1",
    ),
    _pod(
        "linux.security_context.namespace_options.network",
        _namespace("network", "NODE") + "hostname: ''",
        "readlink /proc/self/ns/net; readlink /proc/self/ns/uts",
        "@net@\n@uts@",
    ),
    _pod(
        "linux.security_context.namespace_options.ipc", _namespace("ipc", "NODE"), "readlink /proc/self/ns/ipc", "@ipc@"
    ),
    _pod(
        "linux.security_context.namespace_options.pid",
        _namespace("pid", "POD"),
        "cat /proc/1/comm",
        "catatonit",
        config=_namespace("pid", "POD"),
    ),
    # What the process is.
    _container("image.image", "image { image: '@other@' }", "cat /which", "the other image"),
    _container("args", "args: 'sh' args: 'a' args: 'b c'", 'for word; do echo "[$word]"; done', "[a]\n[b c]"),
    _container("working_dir", "working_dir: '/made/here'", "pwd", "/made/here"),
    _container("envs.key envs.value", "envs { key: 'A' value: ' b=c ' }", 'echo "[$A]"', "[ b=c ]"),
    _container("tty", "tty: true", "test -t 0 && test -t 1 && test -t 2 && echo terminal", "terminal"),
    _container("stdin", "stdin: true", "readlink /proc/self/fd/0 | cut -d: -f1", "pipe"),
    # Files and devices.
    _mount("container_path host_path", "host_path: '@dir@'", "cat /m/name", "of the node"),
    _mount(
        "readonly", "host_path: '@dir@' readonly: true", f"{_OPTIONS_OF_M} | head -1; touch /m/x || echo no", "ro\nno"
    ),
    _mount("mount_options", "host_path: '@dir@' mount_options: 'noexec'", f"{_OPTIONS_OF_M} | grep noexec", "noexec"),
    _mount("image", "image { image: '@other@' } readonly: true", "cat /m/which", "the other image"),
    _mount(
        "image_sub_path",
        "image { image: '@other@' } image_sub_path: 'sub' readonly: true",
        "ls /m; cat /m/which",
        "which\nits directory",
    ),
    _container(
        "devices.container_path devices.host_path devices.permissions",
        "devices { host_path: '/dev/kmsg' container_path: '/dev/of/kernel' permissions: 'w' }",
        "stat -c %t:%T /dev/of/kernel; (: >/dev/of/kernel) && echo write; (: </dev/of/kernel) || echo no more",
        "1:b\nwrite\nno more",
    ),
    # Limits.
    _resources("cpu_shares", "cpu_shares: 512", "cpu/cpu.shares", "awk '{ print 512 }' cpu.weight", "512"),
    _resources(
        "cpu_quota", "cpu_quota: 30000 cpu_period: 100000", "cpu/cpu.cfs_quota_us", "cut -d' ' -f1 cpu.max", "30000"
    ),
    _resources(
        "cpu_period", "cpu_quota: 30000 cpu_period: 50000", "cpu/cpu.cfs_period_us", "cut -d' ' -f2 cpu.max", "50000"
    ),
    _container(
        "linux.resources.cpuset_cpus",
        "linux { resources { cpuset_cpus: '1' } }",
        f"{_status('Cpus_allowed_list')}; nproc",
        "1\n1",
    ),
    # Many nodes have but one memory node.
    _resources("cpuset_mems", "cpuset_mems: '0'", "cpuset/cpuset.mems", "cat cpuset.mems", "0", same_without=True),
    _resources(
        "memory_limit_in_bytes",
        f"memory_limit_in_bytes: {64 << 20}",
        "memory/memory.limit_in_bytes",
        "cat memory.max",
        str(64 << 20),
    ),
    _resources(
        "memory_swap_limit_in_bytes",
        f"memory_limit_in_bytes: {64 << 20} memory_swap_limit_in_bytes: {96 << 20}",
        "memory/memory.memsw.limit_in_bytes",
        f"awk '{{ print $1 + {64 << 20} }}' memory.swap.max",
        str(96 << 20),
    ),
    _container(
        "linux.resources.oom_score_adj",
        "linux { resources { oom_score_adj: 321 } }",
        "cat /proc/self/oom_score_adj /proc/1/oom_score_adj",
        "321\n321",
    ),
    # Rights.
    _security(
        "capabilities.add_capabilities capabilities.drop_capabilities",
        "capabilities { drop_capabilities: 'ALL' add_capabilities: 'NET_RAW' }",
        _CAPABILITIES,
        "\n".join((_NET_RAW, _NET_RAW, _NET_RAW, _NONE)),
    ),
    _security(
        "capabilities.add_ambient_capabilities",
        f"{_USER} capabilities {{ drop_capabilities: 'ALL' add_ambient_capabilities: 'NET_BIND_SERVICE' }}",
        _CAPABILITIES,
        "\n".join((_NET_BIND,) * 4),
    ),
    _security(
        "privileged",
        "privileged: true",
        "awk '$5 == \"/sys\" { print substr($6, 1, 2) }' /proc/self/mountinfo; test -c /dev/kmsg && echo devices; "
        + _status("CapEff"),
        "rw\ndevices\n@capabilities@",
        pod="linux { security_context { privileged: true } }",
    ),
    _security(
        "namespace_options.pid",
        "namespace_options { pid: NODE }",
        "readlink /proc/self/ns/pid",
        "@pid@",
        pod=_namespace("pid", "NODE"),
    ),
    _security("run_as_user", _USER, "id -u; id -g", "7\n0"),
    _security("run_as_group", f"{_USER} run_as_group {{ value: 8 }}", "id -u; id -g", "7\n8"),
    _security(
        "run_as_username", "run_as_username: 'app'", "id -u; id -g", "1000\n1001", more="image { image: '@other@' }"
    ),
    _security("supplemental_groups", f"{_USER} supplemental_groups: 9", "id -G", "0 9"),
    _security(
        "supplemental_groups_policy",
        "run_as_username: 'app' supplemental_groups: 9 supplemental_groups_policy: Strict",
        "id -G | tr ' ' '\\n' | sort -n",
        "9\n1001",
        more="image { image: '@other@' }",
    ),
    _security(
        "readonly_rootfs",
        "readonly_rootfs: true",
        "awk '$5 == \"/\" { print substr($6, 1, 2) }' /proc/self/mountinfo; touch /file || echo no",
        "ro\nno",
    ),
    _security(
        "masked_paths",
        "masked_paths: '/proc/version' masked_paths: '/proc/sys'",
        "wc -c </proc/version; ls /proc/sys",
        "0",
    ),
    _security("readonly_paths", "readonly_paths: '/tmp'", "touch /x && echo yes; touch /tmp/x || echo no", "yes\nno"),
    _security("no_new_privs", "no_new_privs: true", _status("NoNewPrivs"), "1"),
    _security(
        "seccomp.profile_type",
        "seccomp { profile_type: RuntimeDefault }",
        f"{_status('Seccomp')}; unshare -U true || echo no",
        "2\nno",
    ),
    _security(
        "seccomp.localhost_ref",
        "seccomp { profile_type: Localhost localhost_ref: '@dir@/profile.json' }",
        f"{_status('Seccomp')}; mkdir /d || echo no",
        "2\nno",
    ),
    _security(
        "seccomp_profile_path",
        "seccomp_profile_path: 'localhost/@dir@/profile.json'",
        f"{_status('Seccomp')}; mkdir /d || echo no",
        "2\nno",
    ),
]
