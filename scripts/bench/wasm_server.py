"""Web servers as Wasm containers in a pod with an address of its own: requests a second, the first one, the stop.

One is `tests/guests/server`, Go's `net/http` built by the stock toolchain for WASI preview 1, whose listener is its
descriptor 3, in both placements; the other a component of `wasi:http/proxy`, with a fresh instance for each request.
Through the pod's address and through a port of the host. Every answer is looked at. A stop is a call of StopContainer,
with 30 s of grace, of a server that has just answered; memory is the working set after all requests. As root, inside
`scripts/private-ns` (`scripts/bench/wasm-server` does that).
"""

from __future__ import annotations

import argparse
import os
import selectors
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from cri_shim.pb import api_pb2 as pb
from scripts.bench.bed import bed
from scripts.bench.report import percentile
from scripts.bench.wasm import HANDLERS, PLACEMENTS
from tests.support import go_guests, images
from tests.support.cri import Cri, Pod, container_config, pod_config
from tests.support.daemon import Daemon
from tests.support.wasm import assemble
from tests.support.wasm_http import PROXY

HTTP = "wasi:http"
PORT = 8080
HOST_PORT = 18097
GRACE = 30
OK = b"HTTP/1.1 200 "
REQUEST = b"GET /hello HTTP/1.1\r\nHost: pod\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Server:
    """`image`: where it was pushed; `body`: how its answer ends; `ready`: what it prints first, if anything."""

    title: str
    handler: str
    image: str
    body: bytes
    ready: str


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="wasm-server", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--seconds", type=float, default=5, help="of requests per round and way (%(default)s)")
    add("--connections", type=int, default=16, help="that are kept and always have a request under way (%(default)s)")
    add("--stops", type=int, default=20, help="per round (%(default)s)")
    add("--only", choices=(*PLACEMENTS, HTTP), help="one kind of server (all)")
    options = parser.parse_args(argv)
    with bed("server", handlers=HANDLERS) as ground:
        daemon, push = ground.daemon, ground.registry.push
        servers = []
        if options.only in {None, HTTP}:
            component = push("bench/proxy:1", images.wasm_artifact(assemble(PROXY)))
            servers.append(Server(HTTP, "wasm", component, b"hello from a component\n\r\n0\r\n\r\n", ""))
        if options.only != HTTP:
            built = go_guests.find("server", ground.base)
            if built is None:
                raise SystemExit("wasm-server: needs Go (https://go.dev), in PATH or in /usr/local/go")
            module = push("bench/server:1", images.wasm_artifact(built))
            servers += [
                Server(title, handler, module, b"hello /hello\n", "serving")
                for title, handler in PLACEMENTS.items()
                if options.only in {None, title}
            ]
        daemon.start()
        with Cri(daemon.socket, timeout=300) as cri:
            for server in servers:
                cri.pull(server.image)
                _report(server.title, [_round(cri, daemon, server, options) for _ in range(options.rounds)])
    return 0


def _round(cri: Cri, daemon: Daemon, server: Server, options: argparse.Namespace) -> dict[str, list[float]]:
    print(f"{server.title}: load {os.getloadavg()[0]:.2f}", file=sys.stderr, flush=True)
    config = pod_config("server", network=pb.POD, cgroup_parent=daemon.cgroup_parent)
    config.log_directory = str(daemon.pod_logs)
    config.annotations["cri-shim.io/listen"] = str(PORT)
    config.port_mappings.add(container_port=PORT, host_port=HOST_PORT)
    pod = cri.run_pod(config, server.handler)
    address = (cri.pod_status(pod).network.ip, PORT)
    container = _serving(cri, pod, server, 0)
    ways = {"pod": address, "host port": ("127.0.0.1", HOST_PORT)}
    found = {}
    for way, to in ways.items():
        found[f"requests/s, {way}"] = [_rate(to, server, options.connections, options.seconds)]
    found["one at a time, us"] = [1e6 / _rate(address, server, 1, options.seconds)]
    stats = cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
    found["memory, KiB"] = [stats.memory.working_set_bytes.value / 1024]
    cri.stop(container, grace=GRACE)
    times = [_stop(cri, pod, server, address, number) for number in range(1, options.stops + 1)]
    found["first answer, ms"], found["stop, ms"] = ([each[at] for each in times] for at in (0, 1))
    cri.remove_all_pods()
    return found


def _serving(cri: Cri, pod: Pod, server: Server, attempt: int) -> str:
    config = container_config(server.image, name="server")
    config.metadata.attempt = attempt
    container = cri.run(pod, config)
    if server.ready:
        cri.wait_log(container, server.ready)
    return container


def _stop(cri: Cri, pod: Pod, server: Server, address: tuple[str, int], attempt: int) -> tuple[float, float]:
    """Milliseconds from the first request to its answer, and from the call of StopContainer to its."""
    container = _serving(cri, pod, server, attempt)
    begin = time.monotonic()
    _rate(address, server, 1, 0)
    answered = time.monotonic()
    cri.stop(container, grace=GRACE)
    return (answered - begin) * 1e3, (time.monotonic() - answered) * 1e3


def _rate(address: tuple[str, int], server: Server, connections: int, seconds: float) -> float:
    """Answers a second. SystemExit when one is wrong."""
    with ExitStack() as clean_up, selectors.DefaultSelector() as waiting:
        for _ in range(connections):
            connection = clean_up.enter_context(closing(socket.create_connection(address, 10)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(REQUEST)
            waiting.register(connection, selectors.EVENT_READ, bytearray())
        begin, answers = time.monotonic(), 0
        while not answers or time.monotonic() - begin < seconds:
            events = waiting.select(10)
            if not events:
                raise SystemExit(f"wasm-server: no answer within 10 s, after {answers}")
            for key, _ in events:
                answers += _take(key, server.body)
        return answers / (time.monotonic() - begin)


def _take(key: selectors.SelectorKey, body: bytes) -> int:
    """The next bytes of a connection; at the end of an answer the next request. Returns the number of answers."""
    connection, received = key.fileobj, key.data
    assert isinstance(connection, socket.socket)
    received += connection.recv(1 << 16)
    if not received.startswith(OK[: len(received)]):
        raise SystemExit(f"wasm-server: not the answer: {bytes(received[:200])!r}")
    if not received.endswith(body):
        return 0
    received.clear()
    connection.sendall(REQUEST)
    return 1


def _report(title: str, rounds: Sequence[dict[str, list[float]]]) -> None:
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        if name.endswith(", ms"):
            p50 = statistics.median(percentile(each, 50) for each in values)
            print(f"{title:12}{name:24}p50 {p50:8.2f}  max {max(map(max, values)):8.2f}", flush=True)
        else:
            print(f"{title:12}{name:24}{statistics.median(each[0] for each in values):12.0f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
