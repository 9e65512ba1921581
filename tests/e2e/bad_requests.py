"""Requests that are wrong, one per row: a name, what differs from a good request (a text proto), the code, the words.

`RUNTIME_REFUSALS` are about the image or the node, so that no one can tell before the runtime tries.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import pytest

INVALID = grpc.StatusCode.INVALID_ARGUMENT
MISSING = grpc.StatusCode.NOT_FOUND
UNMET = grpc.StatusCode.FAILED_PRECONDITION
LATER = grpc.StatusCode.UNIMPLEMENTED
TAKEN = grpc.StatusCode.ALREADY_EXISTS
NO_ID = "ab" * 32

POD_REQUESTS = [
    ("no metadata", "metadata { name: '' }", INVALID, "metadata.name is empty"),
    ("no namespace", "metadata { namespace: '' }", INVALID, "metadata.namespace is empty"),
    ("no uid", "metadata { uid: '' }", INVALID, "metadata.uid is empty"),
    ("long name", f"metadata {{ name: '{'n' * 254}' }}", INVALID, "metadata.name is 254 bytes"),
    ("long namespace", f"metadata {{ namespace: '{'n' * 254}' }}", INVALID, "metadata.namespace is 254"),
    ("slash in the name", "metadata { name: 'a/b' }", INVALID, "metadata.name 'a/b'"),
    ("control character", r"metadata { name: 'a\nb' }", INVALID, "metadata.name"),
    ("relative log directory", "log_directory: 'logs'", INVALID, "log_directory 'logs'"),
    ("log directory below a file", "log_directory: '/etc/passwd/x'", UNMET, "log_directory /etc/passwd/x"),
    ("long log directory", f"log_directory: '/{'d' * 300}'", INVALID, "log_directory"),
    ("long hostname", f"hostname: '{'h' * 65}'", INVALID, "hostname"),
    ("bad hostname", "hostname: 'a b'", INVALID, "hostname 'a b'"),
    ("white space in dns", "dns_config { servers: '10.0.0.1 10.0.0.2' }", INVALID, "dns_config.servers"),
    ("line break in dns", r"dns_config { options: 'a\nnameserver 6.6.6.6' }", INVALID, "dns_config.options"),
    ("port too high", "port_mappings { host_port: 65536 }", INVALID, "port_mappings.host_port: 65536"),
    ("negative port", "port_mappings { container_port: -1 }", INVALID, "port_mappings.container_port: -1"),
    ("host port to nothing", "port_mappings { host_port: 8080 }", INVALID, "port_mappings.container_port: 0"),
    ("bad host address", "port_mappings { host_ip: 'x' }", INVALID, "port_mappings.host_ip: 'x'"),
    ("sysctl of the node", "linux { sysctls { key: 'kernel.panic' value: '1' } }", INVALID, "kernel.panic"),
    ("sysctl upwards", "linux { sysctls { key: 'net/../kernel/panic' value: '1' } }", INVALID, "net/../kernel/panic"),
    ("sysctl of another namespace", "linux { sysctls { key: 'net.core.x' value: '1' } }", INVALID, "net.core.x"),
    ("cgroup parent upwards", "linux { cgroup_parent: '/a/../../b' }", INVALID, "linux.cgroup_parent"),
    ("cgroup parent of systemd", "linux { cgroup_parent: '/a.slice' }", INVALID, "linux.cgroup_parent"),
    ("long cgroup parent", f"linux {{ cgroup_parent: '/{'c' * 300}' }}", INVALID, "linux.cgroup_parent"),
    ("windows", "windows { }", INVALID, "windows"),
    ("target", "linux { security_context { namespace_options { pid: TARGET } } }", INVALID, "TARGET"),
    (
        "user namespace of a container",
        "linux { security_context { namespace_options { userns_options { mode: CONTAINER } } } }",
        INVALID,
        "userns_options.mode",
    ),
    (
        "user namespace",
        "linux { security_context { namespace_options { userns_options { mode: POD } } } }",
        INVALID,
        "userns_options.uids",
    ),
    ("selinux", "linux { security_context { selinux_options { type: 't' } } }", UNMET, "selinux_options"),
    (
        "apparmor",
        "linux { security_context { apparmor { profile_type: Localhost localhost_ref: 'p' } } }",
        UNMET,
        "apparmor",
    ),
]

CONTAINER_REQUESTS = [
    ("no name", "metadata { name: '' }", INVALID, "metadata.name is empty"),
    ("long name", f"metadata {{ name: '{'n' * 254}' }}", INVALID, "metadata.name is 254 bytes"),
    ("no image", "image { image: '' }", INVALID, "image.image is empty"),
    ("missing image", "image { image: 'no/such:1' }", MISSING, "'no/such:1' is not on this node"),
    ("missing image by id", f"image {{ image: 'sha256:{NO_ID}' }}", MISSING, "is not on this node"),
    ("bad reference", "image { image: 'up/CASE' }", INVALID, "must be lower case"),
    ("empty command", "command: ''", INVALID, "no command specified"),
    ("long working directory", f"working_dir: '/{'w' * 300}'", INVALID, "working_dir"),
    ("variable without a name", "envs { value: 'x' }", INVALID, "envs: ''"),
    ("variable with =", "envs { key: 'a=b' }", INVALID, "envs: 'a=b'"),
    ("variable that is not UTF-8", r"envs { key: 'a' value: '\377' }", INVALID, "envs: the value of a"),
    ("variable with NUL", r"envs { key: 'a' value: 'x\000' }", INVALID, "envs: the value of a"),
    ("log path upwards", "log_path: '../../x.log'", INVALID, "log_path '../../x.log'"),
    ("absolute log path", "log_path: '/x.log'", INVALID, "log_path '/x.log'"),
    ("long log path", f"log_path: '{'l' * 300}'", INVALID, "log_path"),
    ("relative host path", "mounts { container_path: '/m' host_path: 'tmp' }", INVALID, "host_path 'tmp'"),
    ("relative container path", "mounts { container_path: 'm' host_path: '/tmp' }", INVALID, "container_path 'm'"),
    ("mount over the root", "mounts { container_path: '/' host_path: '/tmp' }", INVALID, "container_path '/'"),
    ("mount of nothing", "mounts { container_path: '/m' }", INVALID, "neither host_path nor image"),
    ("long host path", f"mounts {{ container_path: '/m' host_path: '/{'x' * 5000}' }}", INVALID, "host_path"),
    ("long name in a host path", f"mounts {{ container_path: '/m' host_path: '/{'x' * 300}' }}", INVALID, "host_path"),
    ("long mount point", f"mounts {{ container_path: '/{'x' * 300}' host_path: '/tmp' }}", INVALID, "container_path"),
    ("host path below a file", "mounts { container_path: '/m' host_path: '/etc/passwd/x' }", UNMET, "/etc/passwd/x"),
    (
        "propagation of a private mount",
        "mounts { container_path: '/m' host_path: '/proc' propagation: PROPAGATION_BIDIRECTIONAL }",
        UNMET,
        "PROPAGATION_BIDIRECTIONAL of /m",
    ),
    (
        "recursive and not read-only",
        "mounts { container_path: '/m' host_path: '/tmp' recursive_read_only: true }",
        INVALID,
        "recursive_read_only of /m",
    ),
    ("image volume", "mounts { container_path: '/m' image { image: 'x' } readonly: true }", MISSING, "image 'x' of /m"),
    ("writable image volume", "mounts { container_path: '/m' image { image: 'x' } }", INVALID, "readonly of /m"),
    ("mount options", "mounts { container_path: '/m' host_path: '/tmp' mount_options: 'x' }", INVALID, "mount_options"),
    (
        "idmapped mount",
        "mounts { container_path: '/m' host_path: '/tmp' uidMappings { length: 1 } }",
        INVALID,
        "uidMappings and gidMappings of /m",
    ),
    ("missing device", "devices { host_path: '/dev/no-such' }", UNMET, "devices: /dev/no-such"),
    ("device that is none", "devices { host_path: '/etc/passwd' }", INVALID, "devices: /etc/passwd"),
    ("relative device", "devices { host_path: 'null' }", INVALID, "devices: host_path 'null'"),
    ("device rights", "devices { host_path: '/dev/null' permissions: 'rx' }", INVALID, "permissions 'rx'"),
    (
        "relative device in the container",
        "devices { host_path: '/dev/null' container_path: 'x' }",
        INVALID,
        "container_path 'x'",
    ),
    ("cdi device", "CDI_devices { name: 'vendor/class=x' }", UNMET, "CDI_devices"),
    ("windows", "windows { }", INVALID, "windows"),
    ("negative shares", "linux { resources { cpu_shares: -1 } }", INVALID, "cpu_shares"),
    ("huge shares", "linux { resources { cpu_shares: 9223372036854775807 } }", INVALID, "cpu_shares"),
    ("negative period", "linux { resources { cpu_period: -1 } }", INVALID, "cpu_period"),
    ("short period", "linux { resources { cpu_period: 999 cpu_quota: 5000 } }", INVALID, "cpu_period"),
    ("long period", "linux { resources { cpu_period: 1000001 cpu_quota: 5000 } }", INVALID, "cpu_period"),
    ("small quota", "linux { resources { cpu_period: 100000 cpu_quota: 999 } }", INVALID, "cpu_quota"),
    ("negative quota", "linux { resources { cpu_quota: -2 } }", INVALID, "cpu_quota"),
    ("huge quota", "linux { resources { cpu_quota: 9223372036854775807 } }", INVALID, "cpu_quota"),
    ("negative memory", "linux { resources { memory_limit_in_bytes: -1 } }", INVALID, "memory_limit_in_bytes"),
    ("negative swap", "linux { resources { memory_swap_limit_in_bytes: -2 } }", INVALID, "memory_swap_limit_in_bytes"),
    (
        "swap below memory",
        "linux { resources { memory_limit_in_bytes: 50000000 memory_swap_limit_in_bytes: 40000000 } }",
        INVALID,
        "memory_swap_limit_in_bytes",
    ),
    ("low score", "linux { resources { oom_score_adj: -1001 } }", INVALID, "oom_score_adj"),
    ("high score", "linux { resources { oom_score_adj: 1001 } }", INVALID, "oom_score_adj"),
    ("huge score", "linux { resources { oom_score_adj: 9223372036854775807 } }", INVALID, "oom_score_adj"),
    ("no list of CPUs", "linux { resources { cpuset_cpus: 'abc' } }", INVALID, "cpuset_cpus"),
    ("page size", "linux { resources { hugepage_limits { page_size: '3TB' limit: 1 } } }", UNMET, "huge"),
    ("file upwards", "linux { resources { unified { key: '../x' } } }", INVALID, "unified: '../x'"),
    ("file of cgroup v2", "linux { resources { unified { key: 'memory.high' value: 'x' } } }", UNMET, "memory.high"),
    ("unknown capability", "linux { security_context { capabilities { add_capabilities: 'FLY' } } }", INVALID, "'FLY'"),
    (
        "unknown dropped capability",
        "linux { security_context { capabilities { drop_capabilities: '' } } }",
        INVALID,
        "drop_capabilities",
    ),
    ("privileged", "linux { security_context { privileged: true } }", INVALID, "privileged"),
    ("negative user", "linux { security_context { run_as_user { value: -1 } } }", INVALID, "run_as_user -1"),
    ("huge user", "linux { security_context { run_as_user { value: 4294967295 } } }", INVALID, "run_as_user"),
    ("unknown user", "linux { security_context { run_as_username: 'nobody-here' } }", INVALID, "'nobody-here'"),
    ("group alone", "linux { security_context { run_as_group { value: 5 } } }", INVALID, "run_as_group"),
    (
        "negative group",
        "linux { security_context { run_as_user { value: 1 } run_as_group { value: -5 } } }",
        INVALID,
        "run_as_group -5",
    ),
    ("huge groups", "linux { security_context { supplemental_groups: 4294967296 } }", INVALID, "supplemental_groups"),
    (
        "too many groups",
        "linux { security_context { " + "".join(f"supplemental_groups: {n} " for n in range(1, 65538)) + "} }",
        INVALID,
        "supplemental_groups",
    ),
    ("relative masked path", "linux { security_context { masked_paths: 'proc' } }", INVALID, "masked_paths"),
    ("relative read-only path", "linux { security_context { readonly_paths: 'proc' } }", INVALID, "readonly_paths"),
    (
        "relative profile",
        "linux { security_context { seccomp { profile_type: Localhost localhost_ref: 'x' } } }",
        INVALID,
        "localhost_ref 'x'",
    ),
    (
        "no such profile",
        "linux { security_context { seccomp { profile_type: Localhost localhost_ref: '/no/such' } } }",
        UNMET,
        "localhost_ref /no/such",
    ),
    (
        "a profile that is none",
        "linux { security_context { seccomp { profile_type: Localhost localhost_ref: '/etc/passwd' } } }",
        INVALID,
        "localhost_ref /etc/passwd",
    ),
    (
        "a profile that is a directory",
        "linux { security_context { seccomp { profile_type: Localhost localhost_ref: '/etc' } } }",
        UNMET,
        "localhost_ref /etc",
    ),
    (
        "a profile without an end",
        "linux { security_context { seccomp { profile_type: Localhost localhost_ref: '/dev/zero' } } }",
        INVALID,
        "localhost_ref /dev/zero",
    ),
    ("old profile", "linux { security_context { seccomp_profile_path: 'x' } }", INVALID, "seccomp_profile_path 'x'"),
    ("apparmor", "linux { security_context { apparmor_profile: 'localhost/x' } }", UNMET, "apparmor"),
    ("selinux", "linux { security_context { selinux_options { level: 's0' } } }", UNMET, "selinux_options"),
    (
        "network unlike the pod's",
        "linux { security_context { namespace_options { network: CONTAINER pid: CONTAINER } } }",
        INVALID,
        "namespace_options.network: CONTAINER, but the pod sandbox has NODE",
    ),
    (
        "ipc unlike the pod's",
        "linux { security_context { namespace_options { ipc: CONTAINER pid: CONTAINER } } }",
        INVALID,
        "namespace_options.ipc: CONTAINER, but the pod sandbox has POD",
    ),
    (
        "shared pid namespace that is not there",
        "linux { security_context { namespace_options { pid: POD } } }",
        INVALID,
        "namespace_options.pid",
    ),
    (
        "target without an id",
        "linux { security_context { namespace_options { pid: TARGET } } }",
        INVALID,
        "target_id",
    ),
    (
        "unknown target",
        f"linux {{ security_context {{ namespace_options {{ pid: TARGET target_id: '{NO_ID}' }} }} }}",
        UNMET,
        "target_id",
    ),
    ("unknown annotation", "annotations { key: 'cri-shim.io/x' value: 'y' }", INVALID, "'cri-shim.io/x'"),
    ("annotation that needs more", "annotations { key: 'cri-shim.io/isolation' value: 'none' }", INVALID, "isolation"),
    ("wasm that is none", "annotations { key: 'run.oci.handler' value: 'wasm' }", INVALID, "run.oci.handler"),
]

RUNTIME_REFUSALS = [
    ("working directory is a file", "working_dir: '/etc/passwd'", "working_dir"),
    ("file onto a directory", "mounts { container_path: '/etc' host_path: '/etc/hostname' }", "directory"),
    ("directory onto a file", "mounts { container_path: '/etc/passwd' host_path: '/tmp' }", "directory"),
    ("mount point below a file", "mounts { container_path: '/etc/passwd/x' host_path: '/tmp' }", "container_path"),
    ("missing program", "command: '/no/such'", "/no/such"),
    ("a directory as program", "command: '/etc'", "/etc"),
    ("no program", "command: '/etc/passwd'", "/etc/passwd"),
    ("long program", f"command: '{'x' * 300}'", "xxx"),
    ("huge argument", f"command: 'sh' args: '{'x' * (1 << 18)}'", "args"),
    ("too little memory", "linux { resources { memory_limit_in_bytes: 1 } }", "memory_limit_in_bytes"),
    ("CPUs that the node has not", "linux { resources { cpuset_cpus: '5000' } }", "cpuset_cpus"),
    ("memory nodes that there are not", "linux { resources { cpuset_mems: '900' } }", "cpuset_mems"),
]


def cases(names: str, table: Sequence[tuple[object, ...]]) -> pytest.MarkDecorator:
    """One test for each row; its first word is the test's."""
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=str(row[0])) for row in table])
