"""The OCI spec as a whole: what each field of a request does to it, and that none is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from cri_shim.model.capabilities import DEFAULT_CAPABILITIES, NAMES
from cri_shim.model.container import User
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan, ExecRequest, PodContext, ProcessPlan, TerminalRequest
from cri_shim.model.ids import ContainerId, PodId
from cri_shim.model.layout import Layout
from cri_shim.model.selinux import Label
from cri_shim.model.streams import TerminalSize
from cri_shim.model.user_namespace import IdRange, UserNamespace
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import container, infra
from cri_shim.spec.apparmor import DEFAULT_PROFILE
from cri_shim.spec.cgroup_plan import Driver
from cri_shim.spec.facts import ContainerFacts, DeviceNode, HostFacts, Json, MountSource, Propagation

LAYOUT = Layout(Path("/root"), Path("/state"))
HOST = HostFacts(
    oci_version="1.0.2",
    capabilities=frozenset(NAMES) - {"SYS_RESOURCE"},
    lowest_oom_score_adj=-500,
    cgroup_version=2,
    swap_controller=True,
    hugetlb_controller=True,
    recursive_read_only=True,
)
NULL = DeviceNode("", block=False, major=1, minor=3, mode=0o666, uid=0, gid=0)
FOUND = ContainerFacts(
    sources={"/src": MountSource("/real/src", Propagation.SHARED), "/private": MountSource("/private")},
    devices={"/dev/null": (NULL,), "/dev/d": (dataclasses.replace(NULL, path="sub/n"),), "/dev": (NULL,)},
    seccomp={"defaultAction": "SCMP_ACT_ALLOW"},
    apparmor_profiles=frozenset({DEFAULT_PROFILE, "sample", "another"}),
)
POD_CONFIG = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="p", namespace="n", uid="u"))
POD = PodContext(
    id=PodId("p" * 64),
    config=POD_CONFIG,
    hostname="pod",
    cgroup_parent="/kube/pod1",
    net=Path("/ns/net"),
    ipc=Path("/ns/ipc"),
    uts=Path("/ns/uts"),
    pid=Path("/ns/pid"),
    shm=Path("/pod/shm"),
    resolv_conf=Path("/pod/resolv.conf"),
    hosts=Path("/pod/hosts"),
    hostname_file=Path("/pod/hostname"),
)

MAPPED = dataclasses.replace(
    POD, user=Path("/ns/user"), ids=UserNamespace(uids=IdRange(1000, 10), gids=IdRange(2000, 20))
)


def plan(config: pb.ContainerConfig | None = None, pod: PodContext = POD) -> ContainerPlan:
    config = config or pb.ContainerConfig()
    return ContainerPlan(
        id=ContainerId("c" * 64),
        pod=pod,
        config=config,
        process=ProcessPlan(("/bin/app", "x"), ("A=1",), "/srv", User(5, 6, (6, 7)), tty=config.tty),
        image=None,
        rootfs=Path("/rootfs"),
        bundle=Path("/bundle"),
        log_path=None,
        stop_signal=15,
    )


def root_of(pod: PodContext, config: pb.ContainerConfig | None = None) -> ContainerPlan:
    made = plan(config, pod)
    return dataclasses.replace(made, process=dataclasses.replace(made.process, user=User()))


def build(config: pb.ContainerConfig | None = None, host: HostFacts = HOST, found: ContainerFacts = FOUND) -> Json:
    return container.build(plan(config), host, found)


def with_security(**fields: object) -> pb.ContainerConfig:
    security = pb.LinuxContainerSecurityContext(**fields)  # type: ignore[arg-type]
    return pb.ContainerConfig(linux=pb.LinuxContainerConfig(security_context=security))


def with_resources(**fields: object) -> pb.ContainerConfig:
    limits = pb.LinuxContainerResources(**fields)  # type: ignore[arg-type]
    return pb.ContainerConfig(linux=pb.LinuxContainerConfig(resources=limits))


def mounted(spec: Json, target: str) -> Json:
    found: list[Json] = [mount for mount in spec["mounts"] if mount["destination"] == target]
    assert len(found) <= 1
    return found[0] if found else {}


# Every leaf of ContainerConfig must change the spec or be refused by name. These are for others:
OF_THE_CLIENT = {
    *("metadata.name", "metadata.attempt", "image.annotations", "image.runtime_handler", "image.image_ref"),
    # The file that it names is in the facts.
    "linux.security_context.seccomp.localhost_ref",
    *("labels", "annotations", "log_path", "stop_signal", "windows"),
}
OF_THE_PROCESS_PLAN = {
    *("command", "args", "working_dir", "envs.key", "envs.value", "stdin", "stdin_once"),
    *(f"linux.security_context.{name}" for name in ("run_as_user.value", "run_as_group.value", "run_as_username")),
    *(f"linux.security_context.supplemental_groups{rest}" for rest in ("", "_policy")),
    "linux.security_context.namespace_options.target_id",
}
# The flow has put the files at a host path.
OF_THE_VOLUMES = {"mounts.image", "mounts.image_sub_path", "mounts.selinux_relabel"}
# The containers of a pod share these with it; a request that says something else has been refused before.
OF_THE_POD = {f"linux.security_context.namespace_options.{name}" for name in ("network", "ipc")}
SAMPLES: dict[str, object] = {
    "mounts.container_path": "/target",
    "mounts.host_path": "/private",
    "CDI_devices.name": "no/kind",
    "mounts.mount_options": ["noexec"],
    "devices.container_path": "/dev/mine",
    "devices.host_path": "/dev/d",
    "devices.permissions": "r",
    "linux.security_context.apparmor.profile_type": pb.SecurityProfile.Localhost,
    "linux.resources.hugepage_limits.page_size": "2MB",
    "linux.resources.unified": {"memory.high": "1"},
    "linux.security_context.apparmor_profile": "localhost/x",
    "linux.security_context.seccomp_profile_path": "runtime/default",
    "linux.security_context.capabilities.add_capabilities": ["NET_ADMIN"],
    "linux.security_context.capabilities.drop_capabilities": ["CHOWN"],
    "linux.security_context.capabilities.add_ambient_capabilities": ["NET_ADMIN"],
}
TOGETHER: dict[str, Callable[[pb.ContainerConfig], None]] = {
    "mounts": lambda config: config.mounts.extend([pb.Mount(host_path="/src", container_path="/t")]),
    "devices": lambda config: config.devices.extend([pb.Device(host_path="/dev/null", container_path="/dev/x")]),
    "linux.security_context.seccomp": lambda config: config.linux.security_context.seccomp.SetInParent(),
    "linux.security_context.apparmor.localhost_ref": lambda config: config.linux.security_context.apparmor.MergeFrom(
        pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="another")
    ),
    "linux.security_context.namespace_options": lambda config: (
        config.linux.security_context.namespace_options.SetInParent()
    ),
}


def leaves(descriptor: Descriptor, prefix: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    for one in descriptor.fields:
        path = f"{prefix}{one.name}"
        is_map = one.message_type is not None and one.message_type.GetOptions().map_entry
        if one.message_type is not None and not is_map:
            yield from leaves(one.message_type, f"{path}.")
        else:
            yield path, one


def set_sample(message: Message, path: str, sample: object) -> None:
    name, _, rest = path.partition(".")
    value = getattr(message, name)
    if rest:
        if hasattr(value, "add"):
            value = value[0] if len(value) else value.add()
        else:
            value.SetInParent()
        set_sample(value, rest, sample)
    elif hasattr(value, "update"):
        value.update(sample)
    elif hasattr(value, "extend"):
        del value[:]
        value.extend(sample)
    else:
        setattr(message, name, sample)


def default_sample(one: FieldDescriptor) -> object:
    by_type: dict[int, object] = {
        FieldDescriptor.CPPTYPE_STRING: "sample",
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_ENUM: 1,
    }
    sample = by_type.get(one.cpp_type, 7)
    if one.message_type is not None:
        return {"sample": "1"}
    return [sample] if one.is_repeated else sample


LEAVES = [
    (path, one)
    for path, one in leaves(pb.ContainerConfig.DESCRIPTOR)
    if not any(
        path == known or path.startswith(f"{known}.")
        for known in OF_THE_CLIENT | OF_THE_PROCESS_PLAN | OF_THE_VOLUMES | OF_THE_POD
    )
]


@pytest.mark.parametrize(("path", "one"), LEAVES, ids=[path for path, _ in LEAVES])
def test_every_field_changes_the_spec_or_is_refused_by_name(path: str, one: FieldDescriptor) -> None:
    config = pb.ContainerConfig()
    for prefix, prepare in TOGETHER.items():
        if f"{path}.".startswith(f"{prefix}."):
            prepare(config)
    host = dataclasses.replace(HOST, apparmor="apparmor" in path, selinux="selinux" in path)
    before = build(config, host)
    set_sample(config, path, SAMPLES.get(path, default_sample(one)))
    refusal = ""
    try:
        after = build(config, host)
    except CriShimError as error:
        refusal, after = str(error), {}
    assert after != before, f"{path} is ignored"
    assert after or any(name in refusal for name in path.split(".")[-3:]), refusal


def test_a_plain_container() -> None:
    spec = build()
    assert spec["ociVersion"] == "1.0.2"
    assert spec["root"] == {"path": "/rootfs", "readonly": False}
    process = spec["process"]
    assert (process["args"], process["env"], process["cwd"]) == (["/bin/app", "x"], ["A=1"], "/srv")
    assert process["user"] == {"uid": 5, "gid": 6, "additionalGids": [6, 7]}
    assert (process["terminal"], process["noNewPrivileges"], process["oomScoreAdj"]) == (False, False, 0)
    assert "rlimits" not in process
    assert "hostname" not in spec
    linux = spec["linux"]
    assert linux["cgroupsPath"] == f"/kube/pod1/{'c' * 64}"
    assert "seccomp" not in linux
    assert linux["maskedPaths"] == linux["readonlyPaths"] == []
    assert linux["resources"] == {"devices": [{"allow": False, "access": "rwm"}]}


def test_systemd_names_the_scope() -> None:
    pod = dataclasses.replace(POD, cgroup_parent="kube-pod1.slice")
    host = dataclasses.replace(HOST, cgroup_driver=Driver.SYSTEMD)
    spec = container.build(plan(pod=pod), host, FOUND)
    assert spec["linux"]["cgroupsPath"] == f"kube-pod1.slice:cri-shim:{'c' * 64}"
    assert spec["annotations"]["run.oci.systemd.subgroup"] == ""


def test_a_module_for_the_runtimes_own_engine() -> None:
    made = dataclasses.replace(plan(), annotations={"run.oci.handler": "wasm"})
    with pytest.raises(FailedPrecondition, match=r"^the handler has wasm: native, but its runtime was built without"):
        container.build(made, HOST, FOUND)
    host = dataclasses.replace(HOST, wasm_engine=True)
    assert container.build(made, host, FOUND)["annotations"]["run.oci.handler"] == "wasm"
    with pytest.raises(FailedPrecondition, match=r"^image\.image is a Wasm artifact"):
        container.build(dataclasses.replace(made, rootfs=None), host, FOUND)


def test_standard_annotations_cannot_be_forged() -> None:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="c"), image=pb.ImageSpec(image="sha", user_specified_image="busybox")
    )
    made = dataclasses.replace(plan(config), annotations={"io.kubernetes.cri.sandbox-id": "forged", "own": "x"})
    assert container.build(made, HOST, FOUND)["annotations"] == {
        "own": "x",
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": "p" * 64,
        "io.kubernetes.cri.sandbox-name": "p",
        "io.kubernetes.cri.sandbox-namespace": "n",
        "io.kubernetes.cri.sandbox-uid": "u",
        "io.kubernetes.cri.container-name": "c",
        "io.kubernetes.cri.image-name": "busybox",
    }


class TestNamespaces:
    @staticmethod
    def of(config: pb.ContainerConfig, pod: PodContext = POD, **changes: object) -> dict[str, str]:
        made = dataclasses.replace(plan(config, pod), **changes)  # type: ignore[arg-type]
        listed = container.build(made, HOST, FOUND)["linux"]["namespaces"]
        return {entry["type"]: entry.get("path", "own") for entry in listed}

    @staticmethod
    def pid(mode: pb.NamespaceMode.ValueType) -> pb.ContainerConfig:
        return with_security(namespace_options=pb.NamespaceOption(pid=mode))

    def test_the_pods_are_joined(self) -> None:
        assert self.of(pb.ContainerConfig()) == {
            "mount": "own",
            "network": "/ns/net",
            "ipc": "/ns/ipc",
            "uts": "/ns/uts",
            "pid": "/ns/pid",
            "cgroup": "own",
        }

    def test_the_hosts_are_not_listed(self) -> None:
        pod = dataclasses.replace(POD, net=None, ipc=None, uts=None)
        assert self.of(self.pid(pb.NODE), pod) == {"mount": "own", "cgroup": "own"}

    def test_pid_modes(self) -> None:
        assert self.of(self.pid(pb.CONTAINER))["pid"] == "own"
        assert self.of(self.pid(pb.POD))["pid"] == "/ns/pid"
        assert "pid" not in self.of(self.pid(pb.NODE))
        assert self.of(self.pid(pb.TARGET), target_pid=42)["pid"] == "/proc/42/ns/pid"

    def test_a_container_without_options_follows_its_pod(self) -> None:
        private = pb.PodSandboxConfig()
        private.linux.security_context.namespace_options.pid = pb.CONTAINER
        assert self.of(pb.ContainerConfig(), dataclasses.replace(POD, pid=None, config=private))["pid"] == "own"
        private.linux.security_context.namespace_options.pid = pb.NODE
        assert "pid" not in self.of(self.pid(pb.POD), dataclasses.replace(POD, pid=None, config=private))

    def test_what_cannot_be_joined_is_refused(self) -> None:
        with pytest.raises(FailedPrecondition, match="target_id"):
            self.of(self.pid(pb.TARGET))
        with pytest.raises(InvalidArgument, match="without a shared PID namespace"):
            self.of(self.pid(pb.POD), dataclasses.replace(POD, pid=None))

    def test_the_user_namespace_is_the_pods(self) -> None:
        same = pb.UserNamespace(
            mode=pb.POD, uids=[pb.IDMapping(host_id=1000, length=10)], gids=[pb.IDMapping(host_id=2000, length=20)]
        )
        for options in (pb.NamespaceOption(pid=pb.POD, userns_options=same), pb.NamespaceOption(pid=pb.POD)):
            config = with_security(namespace_options=options)
            spec = container.build(plan(config, MAPPED), HOST, FOUND)["linux"]
            assert {"type": "user", "path": "/ns/user"} in spec["namespaces"]
            assert spec["uidMappings"] == [{"containerID": 0, "hostID": 1000, "size": 10}]
            assert spec["gidMappings"] == [{"containerID": 0, "hostID": 2000, "size": 20}]
        assert "uidMappings" not in build()["linux"]

    def test_a_user_namespace_unlike_the_pods_is_refused(self) -> None:
        ten = [pb.IDMapping(host_id=1000, length=10)]
        for pod, mode in ((MAPPED, pb.NODE), (MAPPED, pb.POD), (POD, pb.POD), (POD, pb.CONTAINER), (POD, pb.TARGET)):
            ids = [] if mode == pb.NODE else ten
            options = pb.NamespaceOption(userns_options=pb.UserNamespace(mode=mode, uids=ids, gids=ids))
            with pytest.raises(InvalidArgument, match="userns_options"):
                container.build(plan(with_security(namespace_options=options), pod), HOST, FOUND)
        build(with_security(namespace_options=pb.NamespaceOption(userns_options=pb.UserNamespace(mode=pb.NODE))))
        with pytest.raises(InvalidArgument, match="pid: NODE"):
            container.build(plan(self.pid(pb.NODE), MAPPED), HOST, FOUND)

    @pytest.mark.parametrize("user", [User(10, 0), User(0, 20), User(0, 0, (0, 20))])
    def test_users_that_are_not_mapped_are_refused(self, user: User) -> None:
        made = plan(pod=MAPPED)
        outside = dataclasses.replace(made, process=dataclasses.replace(made.process, user=user))
        with pytest.raises(InvalidArgument, match=r"(user 10|group 20) is not in the pod's user namespace"):
            container.build(outside, HOST, FOUND)


class TestMounts:
    @staticmethod
    def asked(target: str, **fields: object) -> pb.ContainerConfig:
        values = {"host_path": "/src", "container_path": target, **fields}
        return pb.ContainerConfig(mounts=[pb.Mount(**values)])  # type: ignore[arg-type]

    def test_defaults_and_the_pods_files(self) -> None:
        spec = build()
        assert [mount["destination"] for mount in spec["mounts"]] == [
            *("/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup"),
            *("/dev/shm", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"),
        ]
        assert mounted(spec, "/etc/hosts")["options"] == ["rbind", "rprivate", "rw"]
        assert {"ro", "nosuid"} <= set(mounted(spec, "/sys")["options"])

    def test_the_pods_files_follow_a_read_only_root(self) -> None:
        spec = build(with_security(readonly_rootfs=True))
        assert spec["root"]["readonly"] is True
        assert mounted(spec, "/etc/hosts")["options"][-1] == "ro"
        assert mounted(spec, "/dev/shm")["options"][-1] == "rw"

    @pytest.mark.parametrize("target", ["/proc", "/sys", "/etc/hosts", "/dev/shm", "/dev/shm/", "//etc//hosts"])
    def test_a_mount_of_the_request_replaces_the_default(self, target: str) -> None:
        normal = "/" + "/".join(part for part in target.split("/") if part)
        assert mounted(build(self.asked(target)), normal)["source"] == "/real/src"

    def test_idmapped_mounts(self) -> None:
        ids = {"uidMappings": [pb.IDMapping(host_id=7, length=8)], "gidMappings": [pb.IDMapping(host_id=9, length=1)]}
        able = dataclasses.replace(HOST, idmapped_mounts=True)
        mount = mounted(build(self.asked("/m", **ids), able), "/m")
        assert mount["uidMappings"] == [{"containerID": 0, "hostID": 7, "size": 8}]
        assert mount["gidMappings"] == [{"containerID": 0, "hostID": 9, "size": 1}]
        with pytest.raises(FailedPrecondition, match="uidMappings and gidMappings of /m"):
            build(self.asked("/m", **ids))
        for wrong in ({"uidMappings": ids["uidMappings"]}, {**ids, "gidMappings": [pb.IDMapping(host_id=1)]}):
            with pytest.raises(InvalidArgument, match="uidMappings and gidMappings of /m"):
                build(self.asked("/m", **wrong), able)

    def test_image_volumes_have_the_ids_of_the_pod_already(self) -> None:
        able = dataclasses.replace(HOST, idmapped_mounts=True)
        ids = {"uidMappings": [pb.IDMapping(host_id=1000, length=10)]}
        ids["gidMappings"] = [pb.IDMapping(host_id=2000, length=20)]
        config = self.asked("/m", image=pb.ImageSpec(image="i"), readonly=True, **ids)
        assert "uidMappings" not in mounted(container.build(plan(config, MAPPED), able, FOUND), "/m")
        with pytest.raises(InvalidArgument, match="uidMappings and gidMappings of /m"):
            build(config, able)

    def test_nothing_is_mounted_for_the_node_out_of_a_user_namespace(self) -> None:
        config = self.asked("/m", propagation=pb.MountPropagation.PROPAGATION_BIDIRECTIONAL)
        with pytest.raises(InvalidArgument, match="PROPAGATION_BIDIRECTIONAL of /m"):
            container.build(plan(config, MAPPED), HOST, FOUND)

    def test_sys_is_the_nodes_to_look_at_without_a_network_of_the_pods(self) -> None:
        pod = dataclasses.replace(MAPPED, net=None, uts=None)
        sys = mounted(container.build(root_of(pod, with_security(privileged=True)), HOST, FOUND), "/sys")
        assert (sys["type"], sys["source"]) == ("bind", "/sys")
        assert {"rbind", "rro"} <= set(sys["options"])
        assert mounted(container.build(root_of(MAPPED), HOST, FOUND), "/sys")["type"] == "sysfs"

    def test_the_group_of_terminals_needs_to_be_mapped(self) -> None:
        def options(gids: int) -> list[str]:
            pod = dataclasses.replace(MAPPED, ids=UserNamespace(IdRange(1000, 10), IdRange(1000, gids)))
            found: list[str] = mounted(container.build(root_of(pod), HOST, FOUND), "/dev/pts")["options"]
            return found

        assert "gid=5" in options(6)
        assert "gid=5" not in options(5)

    def test_a_mount_at_dev_takes_all_below_away(self) -> None:
        targets = [mount["destination"] for mount in build(self.asked("/dev"))["mounts"]]
        assert "/dev/pts" not in targets
        assert targets.index("/dev") < targets.index("/dev/shm")

    def test_mount_options(self) -> None:
        source = MountSource("/real/src", Propagation.SHARED, ("nosuid", "nodev"))
        found = dataclasses.replace(FOUND, sources={"/src": source})
        asked = self.asked("/t", mount_options=["noexec", "nodev", "noatime", "noexec"], readonly=True)
        options = mounted(build(asked, found=found), "/t")["options"]
        assert options == ["rbind", "rprivate", "nosuid", "nodev", "noexec", "noatime", "ro"]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["exec"], "mount_options 'exec' of /t is not supported; there are noexec"),
            (["nodev", "ro"], "mount_options 'ro' of /t is not supported; use readonly"),
            (["rshared"], "mount_options 'rshared'"),
            (["noexec,suid"], "mount_options 'noexec,suid'"),
            ([""], "mount_options ''"),
            (["relatime", "nodev", "noatime"], "mount_options noatime and relatime of /t exclude each other"),
        ],
    )
    def test_mount_options_that_are_not_given(self, options: list[str], words: str) -> None:
        with pytest.raises(InvalidArgument, match=words):
            build(self.asked("/t", mount_options=options))

    def test_parents_come_first(self) -> None:
        paths = ["/a/b/c", "/a", "/z/y", "/a/b"]
        config = pb.ContainerConfig(mounts=[pb.Mount(host_path="/src", container_path=path) for path in paths])
        targets = [m["destination"] for m in build(config)["mounts"] if m["destination"] in paths]
        assert targets == ["/a", "/z/y", "/a/b", "/a/b/c"]

    @pytest.mark.parametrize(
        ("propagation", "option", "root"),
        [
            (pb.PROPAGATION_PRIVATE, "rprivate", ""),
            (pb.PROPAGATION_HOST_TO_CONTAINER, "rslave", "rslave"),
            (pb.PROPAGATION_BIDIRECTIONAL, "rshared", "rshared"),
        ],
    )
    def test_propagation(self, propagation: pb.MountPropagation.ValueType, option: str, root: str) -> None:
        spec = build(self.asked("/t", propagation=propagation))
        assert mounted(spec, "/t")["options"] == ["rbind", option, "rw"]
        assert spec["linux"].get("rootfsPropagation", "") == root

    @pytest.mark.parametrize("propagation", [pb.PROPAGATION_HOST_TO_CONTAINER, pb.PROPAGATION_BIDIRECTIONAL])
    def test_propagation_from_a_private_mount_is_refused(self, propagation: pb.MountPropagation.ValueType) -> None:
        with pytest.raises(FailedPrecondition, match="private mount"):
            build(self.asked("/t", host_path="/private", propagation=propagation))

    def test_read_only_and_recursive_read_only(self) -> None:
        assert mounted(build(self.asked("/t", readonly=True)), "/t")["options"][-1] == "ro"
        recursive = self.asked("/t", readonly=True, recursive_read_only=True)
        assert mounted(build(recursive), "/t")["options"][-1] == "rro"
        with pytest.raises(CriShimError, match=r"^RROUnsupported"):
            build(recursive, dataclasses.replace(HOST, recursive_read_only=False))
        with pytest.raises(InvalidArgument, match="recursive_read_only"):
            build(self.asked("/t", recursive_read_only=True))
        with pytest.raises(InvalidArgument, match="PROPAGATION_PRIVATE"):
            build(
                self.asked("/t", readonly=True, recursive_read_only=True, propagation=pb.PROPAGATION_HOST_TO_CONTAINER)
            )

    @pytest.mark.parametrize("target", ["", "relative", "/", "//", "/..", "/a\0b"])
    def test_bad_targets_are_refused(self, target: str) -> None:
        with pytest.raises(InvalidArgument, match="container_path"):
            build(self.asked(target))

    def test_missing_source_is_named(self) -> None:
        with pytest.raises(FailedPrecondition, match="/gone"):
            build(self.asked("/t", host_path="/gone"))


class TestSecurity:
    @staticmethod
    def capabilities(**fields: object) -> dict[str, set[str]]:
        sets = build(with_security(**fields))["process"]["capabilities"]
        return {name: {capability.removeprefix("CAP_") for capability in given} for name, given in sets.items()}

    @pytest.mark.parametrize(
        ("add", "drop", "expected"),
        [
            ([], [], DEFAULT_CAPABILITIES),
            (["NET_ADMIN"], [], DEFAULT_CAPABILITIES | {"NET_ADMIN"}),
            (["cap_net_admin"], ["CHOWN"], DEFAULT_CAPABILITIES - {"CHOWN"} | {"NET_ADMIN"}),
            (["ALL"], [], HOST.capabilities),
            (["ALL"], ["CHOWN"], HOST.capabilities - {"CHOWN"}),
            ([], ["ALL"], frozenset()),
            (["KILL"], ["ALL"], frozenset({"KILL"})),
            (["KILL"], ["KILL"], DEFAULT_CAPABILITIES - {"KILL"}),
            (["SYS_RESOURCE"], [], DEFAULT_CAPABILITIES),
        ],
    )
    def test_add_and_drop(self, add: list[str], drop: list[str], expected: frozenset[str]) -> None:
        sets = self.capabilities(capabilities=pb.Capability(add_capabilities=add, drop_capabilities=drop))
        assert sets["bounding"] == sets["effective"] == sets["permitted"] == set(expected)
        assert sets["inheritable"] == sets["ambient"] == set()

    def test_ambient(self) -> None:
        sets = self.capabilities(capabilities=pb.Capability(add_ambient_capabilities=["NET_ADMIN"]))
        assert sets["ambient"] == sets["inheritable"] == {"NET_ADMIN"}
        assert "NET_ADMIN" in sets["bounding"]

    def test_unknown_capability_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="'NOPE'"):
            self.capabilities(capabilities=pb.Capability(add_capabilities=["NOPE"]))

    def test_what_cannot_be_given_is_said(self) -> None:
        config = with_security(capabilities=pb.Capability(add_capabilities=["SYS_RESOURCE", "KILL", "ALL"]))
        config.linux.resources.oom_score_adj = -999
        assert container.clamped(plan(config), HOST) == ["capability SYS_RESOURCE", "oom_score_adj below -500"]
        assert build(config)["process"]["oomScoreAdj"] == -500
        assert container.clamped(plan(), HOST) == []

    def test_privileged(self) -> None:
        config = with_security(
            privileged=True,
            masked_paths=["/proc/kcore"],
            seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
        )
        spec = build(config)
        assert set(spec["process"]["capabilities"]["bounding"]) == {f"CAP_{name}" for name in HOST.capabilities}
        linux = spec["linux"]
        assert linux["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
        assert "maskedPaths" not in linux
        assert "seccomp" not in linux
        assert "cgroup" not in {entry["type"] for entry in linux["namespaces"]}
        assert "rw" in mounted(spec, "/sys")["options"]
        assert "rw" in mounted(spec, "/sys/fs/cgroup")["options"]
        assert [device["path"] for device in linux["devices"]] == ["/dev"]

    def test_seccomp_in_both_forms(self) -> None:
        for text, kind in (("runtime/default", "RuntimeDefault"), ("unconfined", "Unconfined")):
            old = build(with_security(seccomp_profile_path=text))
            new = build(with_security(seccomp=pb.SecurityProfile(profile_type=kind)))  # type: ignore[arg-type]
            assert old == new
        assert build(with_security(seccomp_profile_path="localhost//p.json"))["linux"]["seccomp"] == FOUND.seccomp
        with pytest.raises(InvalidArgument, match="seccomp_profile_path"):
            build(with_security(seccomp_profile_path="what"))

    def test_seccomp_without_kernel_support_is_refused(self) -> None:
        without = dataclasses.replace(HOST, seccomp=False)
        with pytest.raises(FailedPrecondition, match="seccomp"):
            build(with_security(seccomp=pb.SecurityProfile()), without)
        build(with_security(seccomp=pb.SecurityProfile(), privileged=True), without)

    def test_profiles_without_their_module_are_refused(self) -> None:
        profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="mine")
        with pytest.raises(FailedPrecondition, match="AppArmor is off"):
            build(with_security(apparmor=profile))
        with_module = dataclasses.replace(HOST, apparmor=True)
        loaded = dataclasses.replace(FOUND, apparmor_profiles=frozenset({"mine"}))
        assert build(with_security(apparmor=profile), with_module, loaded)["process"]["apparmorProfile"] == "mine"
        assert "apparmorProfile" not in build(with_security(privileged=True), with_module)["process"]
        with pytest.raises(FailedPrecondition, match="selinux_options: SELinux is not enabled"):
            build(with_security(selinux_options=pb.SELinuxOption(level="s0")))

    def test_labels(self) -> None:
        label = Label("u:r:container_t:s0:c1,c2", "u:o:container_file_t:s0:c1,c2")
        made = dataclasses.replace(
            plan(with_security(selinux_options=pb.SELinuxOption(level="s0:c1,c2"))), selinux=label
        )
        spec = container.build(made, HOST, FOUND)
        assert (spec["process"]["selinuxLabel"], spec["linux"]["mountLabel"]) == (label.process, label.mount)
        assert {"selinuxLabel", "mountLabel"}.isdisjoint({*build()["process"], *build()["linux"]})
        # A privileged container is not confined (CRI `privileged`); its files have the pod's label.
        privileged = container.build(
            dataclasses.replace(plan(with_security(privileged=True)), selinux=label), HOST, FOUND
        )
        assert "selinuxLabel" not in privileged["process"]
        assert privileged["linux"]["mountLabel"] == label.mount

    def test_masks_are_verbatim(self) -> None:
        linux = build(with_security(masked_paths=["/a"], readonly_paths=["/b"]))["linux"]
        assert (linux["maskedPaths"], linux["readonlyPaths"]) == (["/a"], ["/b"])


class TestResources:
    @staticmethod
    def of(host: HostFacts = HOST, **fields: object) -> Json:
        limits: Json = build(with_resources(**fields), host)["linux"]["resources"]
        return {name: value for name, value in limits.items() if name != "devices"}

    def test_cpu(self) -> None:
        assert self.of(cpu_shares=2, cpu_quota=5000, cpu_period=100000, cpuset_cpus="0-1", cpuset_mems="0") == {
            "cpu": {"shares": 2, "quota": 5000, "period": 100000, "cpus": "0-1", "mems": "0"}
        }
        assert self.of(cpu_quota=-1) == {}
        with pytest.raises(InvalidArgument, match="cpu_shares"):
            self.of(cpu_shares=-1)

    def test_memory_and_swap(self) -> None:
        without = dataclasses.replace(HOST, swap_controller=False)
        assert self.of(memory_limit_in_bytes=100) == {"memory": {"limit": 100, "swap": 100}}
        assert self.of(memory_limit_in_bytes=100, memory_swap_limit_in_bytes=150) == {
            "memory": {"limit": 100, "swap": 150}
        }
        assert self.of(without, memory_limit_in_bytes=100) == {"memory": {"limit": 100}}
        assert self.of(without, memory_limit_in_bytes=9, memory_swap_limit_in_bytes=9) == {"memory": {"limit": 9}}
        with pytest.raises(FailedPrecondition, match="memory_swap_limit_in_bytes"):
            self.of(without, memory_limit_in_bytes=100, memory_swap_limit_in_bytes=150)
        with pytest.raises(InvalidArgument, match="memory_swap_limit_in_bytes"):
            self.of(memory_limit_in_bytes=100, memory_swap_limit_in_bytes=50)

    def test_oom_score_adj_out_of_range_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="oom_score_adj"):
            build(with_resources(oom_score_adj=1001))

    def test_hugepages(self) -> None:
        limits = [pb.HugepageLimit(page_size="2MB", limit=4), pb.HugepageLimit(page_size="1GB")]
        assert self.of(hugepage_limits=limits) == {
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4}, {"pageSize": "1GB", "limit": 0}]
        }
        without = dataclasses.replace(HOST, hugetlb_controller=False)
        assert self.of(without, hugepage_limits=limits[1:]) == {}
        with pytest.raises(FailedPrecondition, match="hugepage_limits"):
            self.of(without, hugepage_limits=limits)

    def test_unified(self) -> None:
        assert self.of(unified={"memory.high": "max"}) == {"unified": {"memory.high": "max"}}
        with pytest.raises(FailedPrecondition, match="unified"):
            self.of(dataclasses.replace(HOST, cgroup_version=1), unified={"memory.high": "max"})
        with pytest.raises(InvalidArgument, match="unified"):
            self.of(unified={"../memory.high": "max"})


class TestDevices:
    @staticmethod
    def of(*asked: pb.Device) -> tuple[list[Json], list[Json]]:
        linux = build(pb.ContainerConfig(devices=asked))["linux"]
        return linux["devices"], linux["resources"]["devices"]

    def test_a_device_and_its_rule(self) -> None:
        nodes, rules = self.of(pb.Device(host_path="/dev/null", container_path="/dev/mine", permissions="rw"))
        assert nodes == [
            {"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 0, "gid": 0}
        ]
        assert rules[1:] == [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}]

    def test_a_directory_keeps_its_shape(self) -> None:
        nodes, _ = self.of(pb.Device(host_path="/dev/d", container_path="/dev/e"))
        assert [node["path"] for node in nodes] == ["/dev/e/sub/n"]

    def test_bad_permissions_and_paths_are_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="permissions 'x'"):
            self.of(pb.Device(host_path="/dev/null", permissions="x"))
        with pytest.raises(InvalidArgument, match="container_path"):
            self.of(pb.Device(host_path="/dev/null", container_path="dev"))


def test_exec_has_other_arguments_and_no_terminal() -> None:
    process = build(pb.ContainerConfig(tty=True))["process"]
    assert process["terminal"] is True
    further = container.exec_process(process, ExecRequest(("a", "b"), None, 1, 2))
    assert further == {**process, "args": ["a", "b"], "terminal": False}


def test_exec_with_a_terminal_has_its_size_and_a_term() -> None:
    process = build(pb.ContainerConfig())["process"]
    further = container.exec_process(process, TerminalRequest(("a",), TerminalSize(80, 24)))
    given = {"terminal": True, "consoleSize": {"height": 24, "width": 80}, "env": [*process["env"], "TERM=xterm"]}
    assert further == {**process, "args": ["a"], **given}
    own = {**process, "env": ["TERM=vt100"]}
    assert container.exec_process(own, TerminalRequest(("a",), None)) == {**own, "args": ["a"], "terminal": True}


def test_infra_container_holds_its_program_and_no_rights() -> None:
    made = infra.plan(POD, LAYOUT, Path("/usr/bin/catatonit"))
    program = MountSource("/usr/bin/catatonit")
    spec = container.build(made, HOST, ContainerFacts(sources={"/usr/bin/catatonit": program}))
    assert [mount["destination"] for mount in spec["mounts"]] == ["/proc", "/dev", "/catatonit"]
    assert mounted(spec, "/catatonit")["options"][-1] == "ro"
    assert spec["root"] == {"path": f"/state/containers/{'p' * 64}/rootfs", "readonly": True}
    assert spec["process"]["args"] == ["/catatonit", "-P"]
    assert spec["process"]["noNewPrivileges"] is True
    assert spec["process"]["user"]["uid"] != 0
    assert {tuple(given) for given in spec["process"]["capabilities"].values()} == {()}
    assert spec["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "apparmorProfile" not in spec["process"]
    assert {"type": "pid"} in spec["linux"]["namespaces"]
    assert spec["annotations"]["io.kubernetes.cri.container-type"] == "sandbox"


def test_infra_container_is_confined() -> None:
    host = dataclasses.replace(HOST, apparmor=True, apparmor_parser=True)
    sources = {"/usr/bin/catatonit": MountSource("/usr/bin/catatonit")}
    found = ContainerFacts(sources=sources, apparmor_profiles=frozenset({DEFAULT_PROFILE, "mine"}))
    asked = pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="mine")
    for profile, expected in (
        (pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined), DEFAULT_PROFILE),
        (pb.SecurityProfile(), DEFAULT_PROFILE),
        (asked, "mine"),
    ):
        config = pb.PodSandboxConfig()
        config.linux.security_context.apparmor.CopyFrom(profile)
        made = infra.plan(dataclasses.replace(POD, config=config), LAYOUT, Path("/usr/bin/catatonit"))
        assert container.build(made, host, found)["process"]["apparmorProfile"] == expected
