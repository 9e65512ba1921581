"""Linux and Wasm containers side by side: which handler a container gets, why, and what they share.

Not the rules one by one (`tests/unit/test_dispatch.py`): here the decision is made from real images and ends in a
container that runs, or in an error that the user can act on.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config, whole_lines
from tests.support.daemon import PROGRAM
from tests.support.expect import eventually, refused

pytestmark = pytest.mark.root

VARIANT = "module.wasm.image/variant"
OCI_HANDLER = "run.oci.handler"


def push_file(lab: Lab, registry: images.Registry, name: str = "file", labels: Mapping[str, str] | None = None) -> str:
    """An ordinary Linux image with a Wasm file as its entrypoint, pulled. The module prints arguments and variables."""
    base = images.busybox_image()
    layer = images.layer([images.directory("app"), images.file("app/echo.wasm", guests.assemble(guests.ECHO), 0o644)])
    config = {"Entrypoint": ["/app/echo.wasm"], "Cmd": ["of-image"], "Env": ["PATH=/bin:/app"], "Labels": labels or {}}
    reference = registry.push(f"mixed/{name}:1", images.image([*base.blobs[1:], layer], config))
    lab.cri.pull(reference)
    return reference


def push_artifact(lab: Lab, registry: images.Registry, name: str, text: str) -> str:
    reference = registry.push_wasm(f"mixed/{name}:1", text)
    lab.cri.pull(reference)
    return reference


def decision(lab: Lab, container: str) -> tuple[str, str]:
    """The handler that the container got, and why."""
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    info = json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])
    return info["handler"], info["handlerReason"]


def annotated(lab: Lab, handler: str, annotations: Mapping[str, str]) -> Pod:
    config = lab.pod_config()
    config.annotations.update(annotations)
    return lab.pod(handler, config=config)


def test_a_linux_sidecar_in_a_wasm_pod(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    sleeper = push_artifact(lab, registry, "sleep", guests.SLEEP)
    pod = lab.pod("wasm", network=pb.POD)
    main = lab.cri.run(pod, container_config(sleeper, name="main"))
    lab.cri.wait_log(main, "going to sleep")
    sidecar = lab.cri.run(pod, lab.shell("exec sleep 1000", name="sidecar"))
    assert decision(lab, main) == ("wasm", "the image is a Wasm artifact")
    handler, why = decision(lab, sidecar)
    assert handler == "runc"
    assert why == "the entrypoint is an ELF binary; handler 'wasm' leaves Linux to 'runc'"
    shown = lab.cri.exec(sidecar, ["ip", "-4", "-o", "address", "show", "dev", "eth0"]).stdout.decode()
    assert f" {lab.cri.pod_status(pod).network.ip}/" in shown
    assert lab.cri.exec(sidecar, ["hostname"]).stdout.decode().strip() == pod.config.hostname

    with refused(grpc.StatusCode.FAILED_PRECONDITION, "one Wasm module"):
        lab.cri.exec(main, ["bash"])
    lab.cri.stop_pod(pod)
    assert [lab.cri.status(container).exit_code for container in (main, sidecar)] == [137, 137]


def test_a_pod_of_modules_gets_ipc_and_shm_with_its_first_linux_container(lab: Lab, registry: images.Registry) -> None:
    pod, other = lab.pod("wasm"), lab.pod("wasm")
    for each in (pod, other):
        lab.cri.wait_exit(lab.cri.run(each, container_config(lab.wasm, name="module")))
    assert not [point for point in lab.daemon.traces().mounts if pod.id in point]
    writer = lab.cri.run(pod, lab.shell("echo shared >/dev/shm/note; exec sleep 1000", name="writer"))
    # Below the pod of the reader nothing is needed: a restart finds both pods as they are to be.
    lab.daemon.kill()
    lab.daemon.start()
    with lab.daemon.client() as cri:
        assert {item.state for item in cri.pods()} == {pb.SANDBOX_READY}
        waits = "while [ ! -s /dev/shm/note ]; do sleep 0.1; done"
        reader = cri.run(pod, lab.shell(f"{waits}; cat /dev/shm/note; readlink /proc/self/ns/ipc", name="reader"))
        assert cri.wait_exit(reader).exit_code == 0
        note, namespace = whole_lines(cri.log(reader))
        assert note == "shared"
        in_writer = cri.exec(writer, ["readlink", "/proc/self/ns/ipc"]).stdout.decode().strip()
        assert namespace == in_writer != os.readlink("/proc/self/ns/ipc")
        assert not [point for point in lab.daemon.traces().mounts if other.id in point]
    lab.daemon.kill()
    subprocess.run(["umount", lab.daemon.state / "pods" / pod.id / "ns" / "ipc"], check=True)
    lab.daemon.start()
    with lab.daemon.client() as cri:
        states = {item.id: item.state for item in cri.pods()}
        assert states == {pod.id: pb.SANDBOX_NOTREADY, other.id: pb.SANDBOX_READY}
        cri.remove_all_pods()


def test_an_ipc_sysctl_of_a_pod_of_modules_is_set_for_its_linux_containers(shared_lab: Lab) -> None:
    lab = shared_lab
    config = lab.pod_config()
    config.linux.sysctls["kernel.shm_rmid_forced"] = "1"
    assert lab.say(lab.pod("wasm", config=config), "cat /proc/sys/kernel/shm_rmid_forced") == ["1"]
    config = lab.pod_config()
    config.linux.sysctls["kernel.shm_rmid_forced"] = "no number"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "kernel.shm_rmid_forced"):
        lab.pod("wasm", config=config)


def test_a_wasm_artifact_in_a_crun_pod_needs_no_annotation(shared_lab: Lab) -> None:
    lab = shared_lab
    pod = lab.pod("crun", network=pb.POD)
    container = lab.cri.run(pod, container_config(lab.wasm, args=["one", "two"], env={"KEY": "value"}))
    status = lab.cri.wait_exit(container)
    lines = whole_lines(lab.cri.log(container))
    assert (status.exit_code, status.reason) == (0, "Completed")
    assert lines[1:3] == ["one", "two"]
    assert {"KEY=value", f"HOSTNAME={pod.config.hostname}"} <= set(lines)
    assert decision(lab, container) == ("wasm", "the image is a Wasm artifact; handler 'crun' leaves Wasm to 'wasm'")


@pytest.mark.parametrize("handler", ["crun", "wasm"])
def test_a_wasm_file_in_a_linux_image_is_found(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    image = push_file(lab, registry)
    pod = lab.pod(handler)
    cases: list[tuple[list[str], str, list[str]]] = [
        ([], "", ["/app/echo.wasm", "of-image"]),
        (["/app/echo.wasm"], "", ["/app/echo.wasm"]),
        (["echo.wasm"], "", ["echo.wasm"]),
        (["./echo.wasm", "x"], "/app", ["./echo.wasm", "x"]),
        (["/app/echo.wasm#_start", "x"], "", ["/app/echo.wasm", "x"]),
    ]
    for number, (command, directory, expected) in enumerate(cases):
        config = container_config(image, *command, name=f"c{number}")
        config.working_dir = directory
        container = lab.cri.run(pod, config)
        assert lab.cri.wait_exit(container).exit_code == 0
        lines = whole_lines(lab.cri.log(container))
        assert lines[: len(expected)] == expected
        assert decision(lab, container)[0] == "wasm"
    # A program of the same image is a Linux container.
    container = lab.cri.run(pod, container_config(image, "echo", "linux", name="linux"))
    assert lab.cri.wait_exit(container).exit_code == 0
    assert decision(lab, container)[0] == {"crun": "crun", "wasm": "runc"}[handler]


def test_wasm_under_runc_is_refused_with_a_way_out(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    file, pod = push_file(lab, registry), lab.pod("runc")
    for image, why in ((lab.wasm, "the image is a Wasm artifact"), (file, "the entrypoint is a Wasm file")):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, f"runs no Wasm, but {why}"):
            lab.cri.create(pod, container_config(image))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "use a RuntimeClass with handler crun or wasm"):
            lab.cri.create(pod, container_config(image))
    assert not lab.cri.containers()


def test_annotations_of_other_runtimes(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    file = push_file(lab, registry)
    labelled = push_file(lab, registry, "labelled", {VARIANT: "compat-smart"})
    for annotation in ({VARIANT: "compat"}, {VARIANT: "compat-smart"}, {OCI_HANDLER: "wasm"}):
        ((key, value),) = annotation.items()
        pod = annotated(lab, "crun", annotation)
        # A word of the pod is a hint: its sidecars stay Linux containers.
        sidecar = lab.cri.create(pod, lab.shell("true", name="sidecar"))
        assert decision(lab, sidecar) == ("crun", "the entrypoint is an ELF binary")
        module = lab.cri.create(pod, container_config(file, name="module"))
        assert decision(lab, module)[0] == "wasm"
        # A word of the container is an order.
        config = container_config(file, name="own")
        config.annotations.update(annotation)
        own = lab.cri.create(lab.pod("crun"), config)
        assert decision(lab, own) == (
            "wasm",
            f"the container's annotation {key}: {value}; handler 'crun' leaves Wasm to 'wasm'",
        )
        config = lab.shell("true", name="forced")
        config.annotations.update(annotation)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, f"annotation {key}: {value} asks for Wasm, but the entrypoint"):
            lab.cri.create(pod, config)
    pod = lab.pod("crun")
    assert decision(lab, lab.cri.create(pod, container_config(labelled, name="module")))[0] == "wasm"
    assert decision(lab, lab.cri.create(pod, container_config(labelled, "true", name="linux")))[0] == "crun"
    # Values that mean other engines change nothing.
    pod = annotated(lab, "crun", {OCI_HANDLER: "krun", VARIANT: "other"})
    assert lab.output(pod, lab.shell("echo runs")) == (0, ["runs"])


def test_a_module_that_is_none_is_told_by_the_wasm_handler(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    image = registry.push("mixed/none:1", images.image([images.layer([images.file("text.wasm", b"no module")])]))
    lab.cri.pull(image)
    pod = lab.pod("wasm")
    for word, code, words in (
        ("/gone.wasm", grpc.StatusCode.NOT_FOUND, "module '/gone.wasm' is not in the image"),
        ("/text.wasm", grpc.StatusCode.INVALID_ARGUMENT, "/text.wasm is not a Wasm module"),
    ):
        with refused(code, words):
            lab.cri.create(pod, container_config(image, word))
    assert not lab.cri.containers()


def test_own_annotations_stay_within_what_the_handler_allows(shared_lab: Lab) -> None:
    lab = shared_lab
    denied = grpc.StatusCode.INVALID_ARGUMENT
    for handler, annotation, code, words in (
        ("runc", {"cri-shim.io/handler.main": "crun"}, denied, "crun is not allowed by handler 'runc'"),
        ("crun", {"cri-shim.io/handler.main": "wasm"}, denied, "wasm is not allowed by handler 'crun'"),
        ("wasm", {"cri-shim.io/handler.main": "crun"}, denied, "allowed: runc, wasm"),
        ("wasm", {"cri-shim.io/handler.main": "wasm"}, denied, "the container is no Wasm"),
        ("crun", {"cri-shim.io/isolation": "in-process"}, denied, "not allowed by handler 'crun'"),
        ("crun", {"cri-shim.io/isolation": "vm"}, denied, "'vm' is not one of in-process, process"),
        ("wasm", {"cri-shim.io/stop": "later"}, denied, "'later' is not one of graceful"),
        ("crun", {"cri-shim.io/other": "x"}, denied, "unknown annotation"),
    ):
        of_pod = annotated(lab, handler, annotation)
        with refused(code, words):
            lab.cri.create(of_pod, lab.shell("true"))
        config = lab.shell("true")
        config.annotations.update(annotation)
        with refused(code, words):
            lab.cri.create(lab.pod(handler), config)
    assert not lab.cri.containers()
    pod = annotated(lab, "wasm", {"cri-shim.io/handler.main": "runc", "cri-shim.io/handler.other": "unheard-of"})
    container = lab.cri.create(pod, lab.shell("true"))
    assert decision(lab, container) == (
        "runc",
        "annotation cri-shim.io/handler.main; the entrypoint is an ELF binary",
    )


def test_a_node_may_let_pods_choose(make_daemon: MakeDaemon, busybox: str) -> None:
    handlers = {
        "runc": {"kind": "oci", "path": "runc", "container_handlers": ["crun"]},
        "crun": {"kind": "oci", "path": "crun", "wasm": "off"},
        "alone": {"kind": "wasmtime", "linux_containers": ""},
    }
    daemon = make_daemon({"handlers": handlers})
    with daemon.client() as cri:
        cri.pull(busybox)
        lab = Lab(daemon, cri, busybox, "")
        pod = annotated(lab, "runc", {"cri-shim.io/handler.main": "crun"})
        assert decision(lab, cri.create(pod, lab.shell("true")))[0] == "crun"
        assert decision(lab, cri.create(pod, lab.shell("true", name="other")))[0] == "runc"
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "runs no Linux containers"):
            cri.create(lab.pod("alone"), lab.shell("true"))


@pytest.mark.parametrize("handler", ["runc", "crun", "wasm"])
def test_a_shared_pid_namespace_with_both_kinds(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    sleeper = push_artifact(lab, registry, "sleep", guests.SLEEP)
    pod = lab.pod(handler, pid=pb.POD)
    if handler != "runc":
        module = lab.cri.run(pod, container_config(sleeper, name="module", pid=pb.POD))
        lab.cri.wait_log(module, "going to sleep")
    one, _ = (
        lab.cri.run(pod, container_config(lab.busybox, "sleep", "1000", name=name, pid=pb.POD))
        for name in ("one", "two")
    )
    listed = lab.cri.exec(one, ["ps", "-o", "pid,comm"]).stdout.decode().split("\n")
    words = [line.split() for line in listed[1:] if line]
    assert ["1", "catatonit"] in words
    assert [command for _, command in words].count("sleep") == 2
    lab.cri.stop_pod(pod)
    assert {container.state for container in lab.cri.containers()} == {pb.CONTAINER_EXITED}


def test_limits_of_a_wasm_container(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    hog = push_artifact(lab, registry, "hog", guests.HOG)
    for handler in ("wasm", "crun"):
        config = container_config(hog)
        config.linux.resources.memory_limit_in_bytes = 8 << 20
        container = lab.cri.run(lab.pod(handler), config)
        status = lab.cri.wait_exit(container)
        assert (status.exit_code, status.reason) == (137, "OOMKilled")
        assert status.resources.linux.memory_limit_in_bytes == 8 << 20


def test_a_wasm_container_stops_at_once(shared_lab: Lab, registry: images.Registry) -> None:
    lab, pod = shared_lab, shared_lab.pod("wasm")
    for name, text in (("sleep", guests.SLEEP), ("spin", guests.SPIN)):
        for grace, code in ((30, 143), (0, 137)):
            image = push_artifact(lab, registry, name, text)
            container = lab.cri.run(pod, container_config(image, name=f"{name}-{grace}"))
            time.sleep(0.05)
            begin = time.monotonic()
            lab.cri.stop(container, grace=grace)
            assert time.monotonic() - begin < 20
            status = lab.cri.status(container)
            assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, code, "Error")


def test_what_a_wasm_container_cannot_have_is_refused_by_name(shared_lab: Lab) -> None:
    lab = shared_lab
    sandbox = lab.pod_config()
    sandbox.linux.security_context.privileged = True
    pod = lab.pod("wasm", config=sandbox)
    security = pb.LinuxContainerSecurityContext
    node = pb.NamespaceOption(pid=pb.NODE)
    for config, words in (
        (pb.ContainerConfig(devices=[pb.Device(host_path="/dev/null", permissions="r")]), "devices"),
        (linux(security(privileged=True)), "privileged"),
        (linux(security(capabilities=pb.Capability(add_capabilities=["NET_ADMIN"]))), "add_capabilities"),
        (linux(security(namespace_options=node)), "hostPID"),
    ):
        wanted = container_config(lab.wasm)
        wanted.MergeFrom(config)
        with pytest.raises(grpc.RpcError, match=words):
            lab.cri.create(pod, wanted)
    assert not lab.cri.containers()


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_debugging_a_module(lab: Lab, registry: images.Registry, isolation: str) -> None:
    """An ephemeral container beside a module: it never gets the node's processes for those of a worker."""
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    pod = lab.pod("wasm", config=config)
    target = lab.cri.run(pod, container_config(push_artifact(lab, registry, "sleep", guests.SLEEP), name="app"))
    debug = lab.shell("true", name="debug")
    options = debug.linux.security_context.namespace_options
    options.pid, options.target_id = pb.TARGET, target
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "Wasm module, which has no PID namespace; leave the target out"):
        lab.cri.create(pod, debug)
    options.pid, options.target_id = pb.CONTAINER, ""
    assert lab.cri.wait_exit(lab.cri.run(pod, debug)).exit_code == 0


def linux(security: pb.LinuxContainerSecurityContext) -> pb.ContainerConfig:
    return pb.ContainerConfig(linux=pb.LinuxContainerConfig(security_context=security))


def test_of_both_platforms_of_a_tag_each_pod_gets_its_own(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    linux, artifact = images.busybox_image(), images.wasm_artifact(guests.assemble(guests.ECHO))
    both = images.index({f"linux/{images.ARCHITECTURE}": linux, "wasi/wasm": artifact})
    name = registry.push("mixed/both:1", both)
    pods = {handler: lab.pod(handler) for handler in ("crun", "wasm")}
    ids = {}
    for handler, pod in pods.items():
        request = pb.PullImageRequest(image=pb.ImageSpec(image=name), sandbox_config=pod.config)
        ids[handler] = lab.cri.images.PullImage(request).image_ref
    assert ids == {"crun": linux.id, "wasm": artifact.id}
    for handler, pod in pods.items():
        # The kubelet may have the id of either: ImageStatus by tag names one of them.
        for number, reference in enumerate((name, *ids.values())):
            arguments = ("true",) if handler == "crun" else ("of-request",)
            container = lab.cri.create(pod, container_config(reference, *arguments, name=f"main-{number}"))
            assert lab.cri.status(container).image_id == ids[handler]
            assert decision(lab, container)[0] == handler


def test_the_other_platform_of_a_tag_is_not_run_in_its_place(shared_lab: Lab, registry: images.Registry) -> None:
    """What a pod runs must not depend on what was pulled before: the error says what to pull, and then it runs."""
    lab = shared_lab
    linux, artifact = images.busybox_image(), images.wasm_artifact(guests.assemble(guests.ECHO))
    both = images.index({f"linux/{images.ARCHITECTURE}": linux, "wasi/wasm": artifact})
    names = {
        "wasm": (f"linux/{images.ARCHITECTURE}", "wasi/wasm"),
        "crun": ("wasi/wasm", f"linux/{images.ARCHITECTURE}"),
    }
    for handler, other in (("wasm", "crun"), ("crun", "wasm")):
        name = registry.push(f"mixed/only-{handler}:1", both)
        here = lab.cri.images.PullImage(
            pb.PullImageRequest(image=pb.ImageSpec(image=name, runtime_handler=other))
        ).image_ref
        pod = lab.pod(handler)
        there, meant = names[handler]
        words = (
            f"{name} is here for {there} only, and handler '{handler}' runs it for {meant}; pull that: cri-shim images"
        )
        config = container_config(here, "true")
        config.image.user_specified_image = name  # as the kubelet, which asks by the id
        for wanted in (config, container_config(name, "true")):
            with refused(grpc.StatusCode.FAILED_PRECONDITION, words):
                lab.cri.create(pod, wanted)
        # The same image by a name that stands for it alone.
        alone = registry.push("mixed/alone:1", linux)
        lab.cri.pull(alone)
        assert decision(lab, lab.cri.create(lab.pod("wasm"), container_config(alone, "true")))[0] == "runc"
        pulled = subprocess.run(
            [PROGRAM, "images", "pull", "--listen", str(lab.daemon.socket), "--handler", handler, name], check=False
        )
        assert pulled.returncode == 0
        container = lab.cri.create(pod, config)
        assert decision(lab, container)[0] == handler
        lab.cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)))


def test_a_container_may_name_the_handler_for_the_platform_that_is_here(
    shared_lab: Lab, registry: images.Registry
) -> None:
    lab = shared_lab
    linux, artifact = images.busybox_image(), images.wasm_artifact(guests.assemble(guests.ECHO))
    both = images.index({f"linux/{images.ARCHITECTURE}": linux, "wasi/wasm": artifact})
    name = registry.push("mixed/named:1", both)
    lab.cri.images.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image=name, runtime_handler="runc")))
    pod = annotated(lab, "wasm", {"cri-shim.io/handler.main": "runc"})
    container = lab.cri.create(pod, container_config(name, "true", name="main"))
    assert decision(lab, container)[0] == "runc"
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "handler 'wasm' runs it for wasi/wasm"):
        lab.cri.create(pod, container_config(name, "true", name="other"))


def compiled(lab: Lab) -> dict[str, int]:
    """Digest and inode of what is compiled."""
    return {path.stem: path.stat().st_ino for path in (lab.daemon.root / "wasm").glob("*/*.cwasm")}


def test_the_module_of_an_ordinary_image_is_compiled_when_the_image_comes(lab: Lab, registry: images.Registry) -> None:
    """It goes with the image, or with the last container that was made from it."""
    lab.cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=lab.wasm)))
    eventually(lambda: not compiled(lab))
    reference = push_file(lab, registry, "ahead")
    eventually(lambda: len(compiled(lab)) == 1)
    ahead = compiled(lab)
    pod = lab.pod("wasm")
    made = lab.cri.create(pod, container_config(reference))
    other = lab.cri.create(pod, container_config(reference, name="other"))
    assert compiled(lab) == ahead
    lab.cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)))
    lab.daemon.restart()
    with lab.daemon.client() as cri:
        assert compiled(lab) == ahead
        cri.start(made)
        assert cri.wait_exit(made).exit_code == 0
        cri.remove(made)
        assert compiled(lab) == ahead
        cri.remove(other)
        assert compiled(lab) == {}


def test_the_one_module_of_an_image_without_a_command(lab: Lab, registry: images.Registry) -> None:
    """As of `FROM scratch`, with the command in the pod."""
    module = guests.assemble(guests.SLEEP)
    files = [images.file("app.wasm", module), images.file("data", guests.assemble(guests.HELLO))]
    name = registry.push("mixed/scratch:1", images.image([images.layer(files)]))
    lab.cri.pull(name)
    digest = images.digest(module).removeprefix("sha256:")
    eventually(lambda: digest in compiled(lab))
    ahead = compiled(lab)[digest]
    for handler in ("wasm", "crun"):
        pod = annotated(lab, handler, {VARIANT: "compat-smart"})
        container = lab.cri.run(pod, container_config(name, "app.wasm"))
        lab.cri.wait_log(container, "going to sleep")
    assert compiled(lab)[digest] == ahead
