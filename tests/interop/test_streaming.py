"""Exec, attach and port-forward as Kubernetes' own clients do them: SPDY and WebSocket, runc, crun and wasm."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import socket
import time
import urllib.request
from http.client import HTTPConnection, RemoteDisconnected
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import components, images, wasm
from tests.support.cri import container_config
from tests.support.expect import eventually, refused
from tests.support.interop import Client, Interop
from tests.support.scale import count
from tests.support.wasm_http import PROXY

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]  # the first test builds the clients

TRANSPORTS = pytest.mark.parametrize("transport", ["spdy", "websocket"])
HANDLERS = pytest.mark.parametrize("handler", ["runc", "crun"])
MEGABYTE = os.urandom(1 << 20)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sleeper(lab: Lab, handler: str) -> str:
    return lab.cri.run(lab.pod(handler), lab.shell("exec sleep 1000"))


@HANDLERS
@TRANSPORTS
class TestExec:
    def test_streams_and_statuses(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        container = sleeper(shared_lab, handler)
        script = "echo out; echo err >&2; exit 7"
        (code, _), out, err = clients.exec(transport, container, ["sh", "-c", script])
        assert (code, out, err) == (7, b"out\n", b"err\n")
        for script, status in (("true", 0), ("kill -9 $$", 137), ("exit 255", 255)):
            assert clients.exec(transport, container, ["sh", "-c", script])[0][0] == status
        (code, _), _, err = clients.exec(transport, container, ["not-there"])
        assert code == 127
        assert b"not-there" in err

    def test_a_megabyte_each_way(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        container = sleeper(shared_lab, handler)
        (code, error), out, _ = clients.exec(transport, container, ["cat"], stdin=MEGABYTE)
        assert (code, error, len(out)) == (0, "", len(MEGABYTE))
        assert digest(out) == digest(MEGABYTE)
        (code, _), out, _ = clients.exec(transport, container, ["sh", "-c", "cat | md5sum; exit 3"], stdin=MEGABYTE)
        assert (code, out.split()[0].decode()) == (3, hashlib.md5(MEGABYTE).hexdigest())

    def test_a_terminal(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        container = sleeper(shared_lab, handler)
        script = """until [ "$(stty size 2>/dev/null)" = "40 100" ]; do :; done
            trap 'stty size' WINCH; stty size; tty; echo $TERM; echo err >&2
            until read -r line; do :; done; echo got $line; exit 4"""
        flags = ("-tty", "-stdin", "-sizes=100x40,120x50", f"-container={container}")
        with clients.run("exec", transport, *flags, "--", "sh", "-c", script) as client:
            client.shows(b"err")
            words = client.output().split()
            assert words == [b"40", b"100", b"/dev/pts/0", b"xterm", b"err"]
            client.process.send_signal(signal.SIGWINCH)
            client.shows(b"50 120")
            client.type(b"it\n")
            client.shows(b"got it")
            assert client.end()[0] == 4

    def test_a_client_that_vanishes(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        lab = shared_lab
        container = sleeper(lab, handler)
        command = ["sh", "-c", "echo begun; sleep 876 & sleep 876; true"]
        with clients.run("exec", transport, f"-container={container}", "--", *command) as client:
            client.shows(b"begun")
            client.process.kill()
            eventually(lambda: b"sleep 876" not in lab.cri.exec(container, ["ps"]).stdout)

    def test_a_url_is_good_once(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        lab = shared_lab
        container = sleeper(lab, handler)
        with clients.run("exec", transport, f"-container={container}", "--", "true") as client:
            assert client.end()[0] == 0
            used = client.wait("url")["url"]
        stolen = f"{used.rpartition('/')[0]}/AAAAAAAA"
        for url in (used, stolen, used.replace("/exec/", "/attach/")):
            with clients.run("exec", transport, f"-url={url}", f"-container={container}", "--", "true") as client:
                code, error = client.end()
            assert code == -1
            assert error.startswith("unable to upgrade")
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url)
        token = used.rpartition("/")[2]
        assert token not in lab.daemon.log.read_text()


@HANDLERS
@TRANSPORTS
class TestAttach:
    def test_several_clients(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        lab = shared_lab
        config = lab.shell("echo early; read -r go; echo late; echo err >&2; read -r go; exit 3")
        config.stdin = True
        container = lab.cri.run(lab.pod(handler), config)
        lab.cri.wait_log(container, "early")
        flags = (f"-container={container}", "-stderr")
        before = connections(lab)
        with (
            clients.run("attach", transport, *flags, "-stdin") as writer,
            clients.run("attach", transport, *flags) as reader,
        ):
            for client in (writer, reader):
                client.wait("url")
            eventually(lambda: connections(lab) >= before + 2)
            writer.type(b"go\n")
            for client in (writer, reader):
                client.shows(b"late\n")
                eventually(functools.partial(shows_error, client))
                assert client.output() == b"late\n"
            writer.type(b"go\n")
            assert [client.end() for client in (writer, reader)] == [(0, ""), (0, "")]
        assert lab.cri.wait_exit(container).exit_code == 3

    def test_leaving_and_coming_back(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        lab = shared_lab
        config = lab.shell("stty -echo; echo early; while read -r line; do echo got $line; done")
        config.stdin = config.tty = True
        container = lab.cri.run(lab.pod(handler), config)
        lab.cri.wait_log(container, "early")
        for word in (b"one", b"two"):
            with clients.run("attach", transport, f"-container={container}", "-stdin", "-tty") as client:
                client.type(word + b"\n")
                client.shows(b"got " + word)
                client.process.kill()
        assert lab.cri.status(container).state == pb.CONTAINER_RUNNING

    def test_stdin_once(self, shared_lab: Lab, clients: Interop, handler: str, transport: str) -> None:
        lab = shared_lab
        config = lab.shell("echo early; cat; echo end; sleep 0.2")
        config.stdin = config.stdin_once = True
        container = lab.cri.run(lab.pod(handler), config)
        lab.cri.wait_log(container, "early")
        with clients.run("attach", transport, f"-container={container}", "-stdin") as client:
            client.type(b"hello\n")
            client.shows(b"hello\n")
            client.end_input()
            assert client.end() == (0, "")
            assert client.output() == b"hello\nend\n"


@TRANSPORTS
def test_attach_to_a_module(shared_lab: Lab, clients: Interop, registry: images.Registry, transport: str) -> None:
    lab = shared_lab
    image = registry.push_wasm("io/cat:1", wasm.CAT)
    lab.cri.pull(image)
    config = container_config(image)
    config.stdin = config.stdin_once = True
    container = lab.cri.run(lab.pod("wasm"), config)
    lab.cri.wait_log(container, "ready")
    with clients.run("attach", transport, f"-container={container}", "-stdin", "-stderr") as client:
        client.type(b"hello\n")
        client.shows(b"hello\n")
        client.end_input()
        assert client.end() == (0, "")
        assert (client.output(), client.output("stderr")) == (b"hello\n", b"ready\n")


@TRANSPORTS
def test_the_terminal_of_a_module(shared_lab: Lab, clients: Interop, registry: images.Registry, transport: str) -> None:
    lab = shared_lab
    image = registry.push_wasm("io/cat:1", wasm.CAT)
    lab.cri.pull(image)
    config = container_config(image)
    config.stdin = config.tty = True
    container = lab.cri.run(lab.pod("wasm"), config)
    lab.cri.wait_log(container, "ready")
    with clients.run("attach", transport, f"-container={container}", "-stdin", "-tty") as client:
        client.type(b"hello\n")
        client.shows(b"hello\r\nhello\r\n")
        client.process.kill()
    with clients.run("exec", transport, f"-container={container}", "-stdin", "-tty", "--", "cat") as client:
        client.type(b"to exec\n")
        client.shows(b"to exec\r\nto exec\r\n")
        client.type(b"\x03")
        assert client.end()[0] == 130
    with clients.run("attach", transport, f"-container={container}", "-stdin", "-tty") as client:
        client.type(b"\x03")
        assert client.end()[0] == 0
    assert lab.cri.wait_exit(container).exit_code == 130


@TRANSPORTS
@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_exec_into_a_module(
    shared_lab: Lab, clients: Interop, registry: images.Registry, transport: str, isolation: str
) -> None:
    lab = shared_lab
    image = registry.push_wasm("io/sleep:1", wasm.SLEEP)
    lab.cri.pull(image)
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    container = lab.cri.run(lab.pod("wasm", config=config), container_config(image, "app.wasm"))
    lab.cri.wait_log(container, "going to sleep")
    (code, error), out, _ = clients.exec(transport, container, ["cat"], stdin=MEGABYTE)
    assert (code, error, digest(out)) == (0, "", digest(MEGABYTE))
    (code, _), out, err = clients.exec(transport, container, ["ls", "-d", "/", "/nowhere"])
    assert (code, err) == (2, b"ls: cannot access '/nowhere': No such file or directory\n")
    assert out == b"/\n"
    (code, _), _, err = clients.exec(transport, container, ["sh", "-c", "true"])
    assert code == 127
    assert b"there is no program 'sh'" in err


@TRANSPORTS
@pytest.mark.parametrize(("handler", "network"), [("runc", pb.POD), ("crun", pb.POD), ("runc", pb.NODE)])
class TestForward:
    def test_http(
        self, shared_lab: Lab, clients: Interop, transport: str, handler: str, network: pb.NamespaceMode.ValueType
    ) -> None:
        lab = shared_lab
        pod = lab.pod(handler, network=network)
        port = 8000 + os.getpid() % 1000
        serve(lab, pod.id, lab.cri.run(pod, lab.shell(SERVER.format(port=port))), port)
        with clients.run("forward", transport, f"-pod={pod.id}", f"-ports=0:{port},0:1") as client:
            local = client.wait("ready")["local"]
            for _ in range(count(100, 10)):
                assert digest(fetch(local[str(port)])) == digest(PAGE)
            assert read_to_the_end(local[str(port)]).endswith(PAGE)
            with pytest.raises((RemoteDisconnected, ConnectionError)):
                fetch(local["1"])
            said = client.wait("said")["text"]
            assert said.count("\n") <= 1
            assert "port 1 of the pod" in said
            assert "refused" in said


@TRANSPORTS
def test_forwarding_to_a_component(
    shared_lab: Lab, registry: images.Registry, clients: Interop, transport: str
) -> None:
    lab, port = shared_lab, 9100 + os.getpid() % 800
    image = registry.push_wasm(f"forward/component:{port}", components.echo_server("127.0.0.1", port))
    lab.cri.pull(image)
    pod = lab.pod("wasm", network=pb.POD)
    lab.cri.wait_log(lab.cri.run(pod, container_config(image)), "listening")
    with clients.run("forward", transport, f"-pod={pod.id}", f"-ports=0:{port}") as client:
        local = client.wait("ready")["local"]
        with socket.create_connection(("127.0.0.1", local[str(port)]), 10) as connection:
            connection.sendall(b"hello")
            assert connection.recv(100) == b"hello"


@TRANSPORTS
def test_forwarding_to_an_http_component(
    shared_lab: Lab, registry: images.Registry, clients: Interop, transport: str
) -> None:
    lab = shared_lab
    image = registry.push_wasm("forward/http:1", PROXY)
    lab.cri.pull(image)
    pod = lab.pod("wasm", network=pb.POD)
    lab.cri.run(pod, container_config(image))
    with clients.run("forward", transport, f"-pod={pod.id}", "-ports=0:8080") as client:
        connection = HTTPConnection("127.0.0.1", client.wait("ready")["local"]["8080"], timeout=10)
        for _ in range(3):
            connection.request("GET", "/hello")
            assert connection.getresponse().read() == b"hello from a component\n"
        connection.close()


@TRANSPORTS
@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_forward_to_a_module(
    shared_lab: Lab,
    clients: Interop,
    registry: images.Registry,
    go_server: bytes,
    transport: str,
    isolation: str,
) -> None:
    """An unmodified Go web server for WASI preview 1."""
    lab = shared_lab
    image = registry.push("io/server:1", images.wasm_artifact(go_server))
    lab.cri.pull(image)
    config = lab.pod_config(network=pb.POD)
    config.annotations["cri-shim.io/listen"] = "8080"
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    pod = lab.pod("wasm", config=config)
    lab.cri.wait_log(lab.cri.run(pod, container_config(image)), "serving")
    with clients.run("forward", transport, f"-pod={pod.id}", "-ports=0:8080") as client:
        local = client.wait("ready")["local"]
        for _ in range(count(100, 10)):
            assert fetch(local["8080"]) == b"hello /index.html\n"


PAGE = b"page " * 40_000
SERVER = (
    "mkdir /www; i=0; while [ $i -lt 40000 ]; do echo -n 'page '; i=$((i+1)); done >/www/index.html; "
    "exec httpd -f -p {port} -h /www"
)


def serve(lab: Lab, pod: str, container: str, port: int) -> None:
    del pod
    probe = f"netstat -ltn | grep -q ':{port} '"
    eventually(lambda: lab.cri.exec(container, ["sh", "-c", probe]).exit_code == 0)


def fetch(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=30) as answer:
        data: bytes = answer.read()
    return data


def read_to_the_end(port: int) -> bytes:
    """By a client that does not know how much comes, and leaves when the server has: not before."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def shows_error(client: Client) -> bool:
    return client.output("stderr") == b"err\n"


def connections(lab: Lab) -> int:
    """Of the daemon with conmons' attach sockets, and with its zygotes, which are as many before and after."""
    links = [os.readlink(f) for f in Path(f"/proc/{lab.daemon.pid}/fd").iterdir() if f.is_symlink()]
    own = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}
    table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sum(1 for row in table if row[4] == "0005" and row[6] in own)


@TRANSPORTS
@pytest.mark.parametrize("verb", ["exec", "attach"])
def test_a_slow_client_costs_no_memory(shared_lab: Lab, clients: Interop, transport: str, verb: str) -> None:
    lab = shared_lab
    megabytes, seconds = count(1024, 128 if verb == "exec" else 32), count(60, 3)
    script = f"until [ -e /go ]; do sleep 0.1; done; exec dd if=/dev/zero bs=1024k count={megabytes} 2>/dev/null"
    command = ["sh", "-c", script]
    pod = lab.pod("crun")
    container = lab.cri.run(pod, lab.shell("sleep 1000" if verb == "exec" else script))
    client_of = (f"-container={container}",)
    clients.exec(transport, container, ["true"])  # what the first session loads is no cost of the next one's data
    if verb == "attach":
        client_of = (f"-url={lab.cri.runtime.Attach(pb.AttachRequest(container_id=container, stdout=True)).url}",)
    held = connections(lab)
    before = peak = resident(lab.daemon.pid)
    with clients.run("drain", transport, *client_of, f"-hold={seconds}s", "--", *command) as client:
        if verb == "attach":
            eventually(lambda: connections(lab) > held)
        assert lab.cri.exec(container, ["touch", "/go"]).exit_code == 0
        while not (ended := [event for event in client.events if event["event"] == "end"]):
            peak = max(peak, resident(lab.daemon.pid))
            time.sleep(0.05)
    assert ended[0]["bytes"] == megabytes << 20
    assert peak - before < 16 << 20


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


@TRANSPORTS
def test_many_sessions_at_once(shared_lab: Lab, clients: Interop, transport: str) -> None:
    container = sleeper(shared_lab, "crun")
    sessions = count(100, 20)
    with clients.run("load", transport, f"-container={container}", f"-count={sessions}", "--", "cat") as client:
        assert not client.wait("end", within=110)["failures"]


def test_requests_that_cannot_be(shared_lab: Lab) -> None:
    lab = shared_lab
    runtime = lab.cri.runtime
    pod = lab.pod("crun")
    container = lab.cri.create(pod, lab.shell("exec sleep 1000"))
    true: dict[str, Any] = {"container_id": container, "cmd": ["true"], "stdout": True}
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not running"):
        runtime.Exec(pb.ExecRequest(**true))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not running"):
        runtime.Attach(pb.AttachRequest(container_id=container, stdout=True))
    lab.cri.start(container)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"cmd": []}, "cmd"),
        ({"tty": True, "stderr": True}, "tty and stderr"),
        ({"stdout": False}, "at least one"),
        ({"container_id": ""}, "container id is empty"),
    ]
    for change, words in changes:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
            runtime.Exec(pb.ExecRequest(**{**true, **change}))
    for field in ("stdin", "tty"):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, field):
            runtime.Attach(pb.AttachRequest(container_id=container, stdout=True, **{field: True}))
    with refused(grpc.StatusCode.NOT_FOUND, "does not exist"):
        runtime.Attach(pb.AttachRequest(container_id="ab" * 32, stdout=True))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "port 70000"):
        runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod.id, port=[80, 70000]))
    lab.cri.stop_pod(pod)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not ready"):
        runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod.id))


@TRANSPORTS
def test_a_container_that_ends_before_its_client_comes(shared_lab: Lab, clients: Interop, transport: str) -> None:
    lab = shared_lab
    pod = lab.pod("crun")
    container = lab.cri.run(pod, lab.shell("exec sleep 1000"))
    request = pb.AttachRequest(container_id=container, stdout=True)
    attach = lab.cri.runtime.Attach(request).url
    forward = lab.cri.runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod.id)).url
    lab.cri.stop_pod(pod)
    for verb, url in (("exec", attach), ("forward", forward)):
        with clients.run(verb, transport, f"-url={url}", "-ports=0:80") as client:
            code, error = client.end()
        assert code == -1
        assert error


@TRANSPORTS
def test_the_daemon_stops_while_a_client_is_there(shared_lab: Lab, clients: Interop, transport: str) -> None:
    lab = shared_lab
    container = sleeper(lab, "crun")
    with clients.run("exec", transport, f"-container={container}", "--", "sh", "-c", "echo begun; sleep 765") as client:
        client.shows(b"begun")
        lab.daemon.signal(signal.SIGTERM)
        code, error = client.end()
        assert (code, "stopping" in error or bool(error)) == (-1, True)
        assert lab.daemon.wait() == 0
    lab.daemon.start()
    assert b"sleep 765" not in lab.cri.exec(container, ["ps"]).stdout
