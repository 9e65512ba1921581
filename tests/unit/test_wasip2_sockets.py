"""`wasi:sockets` on real sockets: states, and which error is which code of network.wit."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from handlers.wasmtime.sockets import Stopped
from handlers.wasmtime.wasip2 import descriptors, sockets_lookup, sockets_network, sockets_tcp, sockets_udp
from handlers.wasmtime.wasip2.interface import Failure, Trap
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.sockets_lookup import Lookup
from handlers.wasmtime.wasip2.sockets_network import Network
from handlers.wasmtime.wasip2.sockets_tcp import TcpInput, TcpOutput, TcpSocket
from handlers.wasmtime.wasip2.sockets_udp import IncomingDatagrams, OutgoingDatagrams, UdpSocket
from handlers.wasmtime.wasip2.streams import PERMIT, IoError
from handlers.wasmtime.wasip2.waiter import Timer
from handlers.wasmtime.wasip2.world import World, new_world
from tests.unit.test_wasip2 import Guest, spec

NETWORK = Network()
Value = tuple[str, dict[str, Any]]


def v4(host: str = "127.0.0.1", port: int = 0) -> Value:
    return "ipv4", {"port": port, "address": tuple(socket.inet_aton(host))}


def v6(host: str = "::1", port: int = 0) -> Value:
    words = struct.unpack(">8H", socket.inet_pton(socket.AF_INET6, host))
    return "ipv6", {"port": port, "flow-info": 0, "address": words, "scope-id": 0}


class Bench:
    """What a guest would do, without one."""

    def __init__(self, resources: contextlib.ExitStack) -> None:
        self.resources = resources
        self.numbers: dict[Resource, int] = {}
        self.world: World = new_world(Guest(spec()), resources)
        self.create_tcp = sockets_tcp.creation(self.world).functions["create-tcp-socket"]
        self.create_udp = sockets_udp.creation(self.world).functions["create-udp-socket"]
        self.resolve = sockets_lookup.interface(self.world).functions["resolve-addresses"]

    def kept(self, made: Any) -> Any:
        """Dropped at the end, or by `drop`."""
        self.numbers[made] = self.world.table.add(made)
        return made

    def drop(self, made: Resource) -> None:
        """As a guest does."""
        self.world.table.drop(self.numbers.pop(made))

    def is_ready_soon(self, pollable: Pollable) -> bool:
        """Within a time that is long for a connection to oneself."""
        over = Timer(time.monotonic_ns() + 300_000_000)
        return 0 in self.world.waiter.wait((pollable.source, over))

    def tcp(self, family: str = "ipv4") -> TcpSocket:
        made: TcpSocket = self.kept(self.create_tcp(family))
        return made

    def bound(self, address: Value | None = None) -> TcpSocket:
        value = address or v4()
        made = self.tcp(value[0])
        made.start_bind(NETWORK, value)
        made.finish_bind()
        return made

    def listening(self, address: Value | None = None) -> TcpSocket:
        made = self.bound(address)
        made.start_listen()
        made.finish_listen()
        return made

    def connecting(self, address: Value) -> TcpSocket:
        made = self.tcp(address[0])
        made.start_connect(NETWORK, address)
        return made

    def connected(self, address: Value) -> tuple[TcpSocket, TcpInput, TcpOutput]:
        made = self.connecting(address)
        made.subscribe().block()
        source, sink = made.finish_connect()
        return made, self.kept(source), self.kept(sink)

    def pair(self) -> tuple[TcpSocket, TcpInput, TcpOutput, socket.socket]:
        """A connection to a plain socket."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            made = self.connected(v4(port=server.getsockname()[1]))
            peer, _ = server.accept()
        self.resources.enter_context(peer)
        return *made, peer

    def udp(self, family: str = "ipv4") -> UdpSocket:
        made: UdpSocket = self.kept(self.create_udp(family))
        return made

    def datagrams(self, remote: Value | None = None) -> tuple[UdpSocket, IncomingDatagrams, OutgoingDatagrams]:
        made = self.udp()
        made.start_bind(NETWORK, v4())
        made.finish_bind()
        incoming, outgoing = made.stream(remote)
        return made, self.kept(incoming), self.kept(outgoing)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.ExitStack() as resources:
        yield Bench(resources)


def code(call: Callable[..., Any], *arguments: object) -> Any:
    with pytest.raises(Failure) as caught:
        call(*arguments)
    return caught.value.value


def closed(call: Callable[..., Any], *arguments: object) -> bool:
    return bool(code(call, *arguments) == ("closed", None))


def failed(call: Callable[..., Any], *arguments: object) -> str | None:
    """The network's code of a failed operation of a stream."""
    case, error = code(call, *arguments)
    assert case == "last-operation-failed"
    told = sockets_network.network(None).functions["network-error-code"](error)  # type: ignore[arg-type]
    assert isinstance(told, str)
    return told


def port_of(value: Value) -> int:
    port: int = value[1]["port"]
    return port


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, "access-denied"),
        (errno.EPERM, "access-denied"),
        (errno.EOPNOTSUPP, "not-supported"),
        (errno.EAFNOSUPPORT, "not-supported"),
        (errno.EINVAL, "invalid-argument"),
        (errno.ENOMEM, "out-of-memory"),
        (errno.ENOBUFS, "out-of-memory"),
        (errno.ETIMEDOUT, "timeout"),
        (errno.EALREADY, "concurrency-conflict"),
        (errno.EAGAIN, "would-block"),
        (errno.ENOTCONN, "invalid-state"),
        (errno.EISCONN, "invalid-state"),
        (errno.EMFILE, "new-socket-limit"),
        (errno.ENFILE, "new-socket-limit"),
        (errno.EADDRNOTAVAIL, "address-not-bindable"),
        (errno.EADDRINUSE, "address-in-use"),
        (errno.EHOSTUNREACH, "remote-unreachable"),
        (errno.ENETUNREACH, "remote-unreachable"),
        (errno.ENETDOWN, "remote-unreachable"),
        (errno.ECONNREFUSED, "connection-refused"),
        (errno.ECONNRESET, "connection-reset"),
        (errno.ECONNABORTED, "connection-aborted"),
        (errno.EMSGSIZE, "datagram-too-large"),
        (errno.EIO, "unknown"),
    ],
)
def test_an_errno_has_its_code(number: int, expected: str) -> None:
    assert sockets_network.error_code(OSError(number, "")) == expected


def test_an_error_that_is_not_the_networks_has_none() -> None:
    told = sockets_network.network(None).functions["network-error-code"](IoError("else"))  # type: ignore[arg-type]
    assert told is None


# TCP.


@pytest.mark.parametrize(
    ("family", "address", "expected"),
    [
        ("ipv4", v6(), "invalid-argument"),
        ("ipv6", v4(), "invalid-argument"),
        ("ipv4", v4("224.0.0.1"), "invalid-argument"),
        ("ipv4", v4("255.255.255.255"), "invalid-argument"),
        ("ipv6", v6("ff02::1"), "invalid-argument"),
        ("ipv6", v6("::ffff:127.0.0.1"), "invalid-argument"),
        ("ipv6", v6("::127.0.0.1"), "invalid-argument"),
        ("ipv4", v4("192.0.2.1"), "address-not-bindable"),
    ],
)
def test_addresses_that_cannot_be_bound(bench: Bench, family: str, address: Value, expected: str) -> None:
    assert code(bench.tcp(family).start_bind, NETWORK, address) == expected


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_binding(bench: Bench, family: str) -> None:
    address = v4 if family == "ipv4" else v6
    made = bench.tcp(family)
    assert code(made.local_address) == "invalid-state"
    assert code(made.finish_bind) == "not-in-progress"
    made.start_bind(NETWORK, address())
    for call in (made.start_bind, made.start_connect):
        assert code(call, NETWORK, address()) == "concurrency-conflict"
    assert code(made.start_listen) == "concurrency-conflict"
    made.subscribe().block()
    made.finish_bind()
    port = port_of(made.local_address())
    assert port
    assert code(made.start_bind, NETWORK, address()) == "invalid-state"
    assert (made.address_family(), made.is_listening()) == (family, False)
    made.start_listen()
    made.finish_listen()
    assert code(bench.tcp(family).start_bind, NETWORK, address(port=port)) == "address-in-use"


@pytest.mark.parametrize(
    "address", [v6(port=1), v4(port=0), v4("0.0.0.0", 1), v4("224.0.0.1", 1), v4("255.255.255.255", 1)]
)
def test_addresses_that_cannot_be_connected_to(bench: Bench, address: Value) -> None:
    assert code(bench.tcp("ipv4").start_connect, NETWORK, address) == "invalid-argument"


def test_a_connection_that_fails(bench: Bench) -> None:
    made = bench.tcp()
    assert code(made.finish_connect) == "not-in-progress"
    port = port_of(bench.bound().local_address())  # nobody listens there
    made.start_connect(NETWORK, v4(port=port))
    assert code(made.start_connect, NETWORK, v4(port=port)) == "concurrency-conflict"
    assert code(made.local_address) == "invalid-state"
    made.subscribe().block()
    assert code(made.finish_connect) == "connection-refused"
    assert code(made.finish_connect) == "not-in-progress"
    for call in (made.hop_limit, made.keep_alive_enabled, made.local_address, made.remote_address):
        assert code(call) == "connection-refused"
    assert code(made.start_connect, NETWORK, v4(port=port)) == "invalid-state"
    assert code(made.shutdown, "both") == "invalid-state"


def test_a_connection_that_is_not_there_yet(bench: Bench) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = v4(port=server.getsockname()[1])
        made = bench.connecting(address)
        while bench.is_ready_soon(made.subscribe()):  # until the queue is full, and the kernel answers no more
            for stream in made.finish_connect():
                bench.kept(stream)
            made = bench.connecting(address)
        assert code(made.finish_connect) == "would-block"


def test_listening(bench: Bench) -> None:
    made = bench.tcp()
    assert code(made.start_listen) == "invalid-state"  # not bound
    assert code(made.accept) == "invalid-state"
    made = bench.bound()
    assert code(made.finish_listen) == "not-in-progress"
    made.set_listen_backlog_size(1 << 40)
    made.start_listen()
    assert code(made.accept) == "invalid-state"
    made.finish_listen()
    assert made.is_listening()
    assert code(made.accept) == "would-block"
    assert not made.subscribe().ready()
    assert code(made.start_listen) == "invalid-state"
    assert code(made.start_connect, NETWORK, v4(port=1)) == "invalid-state"
    assert code(made.remote_address) == "invalid-state"
    assert code(made.set_listen_backlog_size, 0) == "invalid-argument"
    made.set_listen_backlog_size(2)


@pytest.mark.parametrize("address", [v4(), v6()])
def test_a_connection(bench: Bench, address: Value) -> None:
    server = bench.listening(address)
    there = server.local_address()
    client, source, sink = bench.connected(there)
    server.subscribe().block()
    accepted, incoming, outgoing = (bench.kept(made) for made in server.accept())
    assert client.remote_address() == accepted.local_address() == there
    assert accepted.remote_address() == client.local_address()
    assert not source.subscribe().ready()
    assert source.read(10) == b""
    sink.blocking_write_and_flush(b"ping")
    assert incoming.blocking_read(100) == b"ping"
    assert outgoing.check_write() == PERMIT
    outgoing.write(b"pong")
    outgoing.flush()
    assert source.blocking_read(2) + source.read(100) == b"pong"
    for call in (client.start_listen, accepted.start_listen):
        assert code(call) == "invalid-state"
    assert code(client.start_connect, NETWORK, there) == "invalid-state"
    assert code(client.set_listen_backlog_size, 1) == "invalid-state"
    # The streams do not need the socket any more.
    bench.drop(client)
    sink.blocking_write_and_flush(b"more")
    assert incoming.blocking_read(100) == b"more"


def test_each_direction_ends_by_itself(bench: Bench) -> None:
    made, source, sink, peer = bench.pair()
    sink.blocking_write_and_flush(b"last")
    made.shutdown("send")
    made.shutdown("send")
    assert closed(sink.check_write)
    assert (peer.recv(10), peer.recv(10)) == (b"last", b"")
    peer.sendall(b"still")
    assert source.blocking_read(10) == b"still"
    made.shutdown("receive")
    assert source.subscribe().ready()
    assert closed(source.read, 10)
    assert sink.subscribe().ready()


def test_the_end_of_the_peer_is_the_end_of_the_stream(bench: Bench) -> None:
    _, source, _, peer = bench.pair()
    peer.sendall(b"bye")
    peer.close()
    assert source.blocking_read(10) == b"bye"
    assert closed(source.blocking_read, 10)
    assert closed(source.read, 10)
    assert closed(source.read, 0)


def test_a_reset_is_told_once_and_the_address_is_known_after_it(bench: Bench) -> None:
    made, source, sink, peer = bench.pair()
    address = made.remote_address()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    assert failed(source.blocking_read, 10) == "connection-reset"
    assert closed(source.read, 10)
    assert closed(sink.blocking_write_and_flush, b"x")
    assert closed(sink.check_write)
    assert made.remote_address() == address


def test_who_does_not_read_holds_the_writer_up_and_nothing_is_lost(bench: Bench) -> None:
    _, _, sink, peer = bench.pair()
    sent = 0
    while (size := sink.check_write()) > 0:
        sink.write(bytes(size))
        sent += size
    pollable = sink.subscribe()
    assert not pollable.ready()
    with pytest.raises(Trap, match="permitted 0"):
        sink.write(b"x")
    received = bytearray()
    reader = threading.Thread(target=lambda: received.extend(b"".join(iter(lambda: peer.recv(1 << 16), b""))))
    reader.start()
    pollable.block()
    assert sink.check_write()
    bench.drop(sink)  # what was taken goes out first
    reader.join(30)
    assert len(received) == sent


def test_a_wait_that_is_stopped(bench: Bench) -> None:
    _, source, _, _ = bench.pair()
    threading.Timer(0.05, bench.world.stop).start()
    with pytest.raises(Stopped):
        source.blocking_read(10)
    with pytest.raises(Stopped):
        source.subscribe().ready()


def test_one_wait_for_many(bench: Bench) -> None:
    pairs = [bench.pair() for _ in range(4)]
    pairs[2][3].sendall(b"x")
    sources = [source.subscribe() for _, source, _, _ in pairs]
    assert bench.world.waiter.wait([pollable.source for pollable in sources]) == [2]
    sinks: list[Pollable] = [sink.subscribe() for _, _, sink, _ in pairs]
    both = [pollable.source for pollable in (*sources, *sinks)]
    assert bench.world.waiter.wait(both) == [2, 4, 5, 6, 7]


def test_options(bench: Bench) -> None:
    made = bench.tcp()
    assert not made.keep_alive_enabled()
    made.set_keep_alive_enabled(True)
    assert made.keep_alive_enabled()
    made.set_keep_alive_idle_time(5_000_000_000)
    made.set_keep_alive_interval(1)  # a second is the least
    made.set_keep_alive_count(1000)  # and so many are the most
    read = (made.keep_alive_idle_time(), made.keep_alive_interval(), made.keep_alive_count())
    assert read == (5_000_000_000, 1_000_000_000, 127)
    made.set_keep_alive_idle_time((1 << 64) - 1)
    made.set_hop_limit(42)
    assert made.hop_limit() == 42
    made.set_receive_buffer_size(65536)
    made.set_send_buffer_size(65536)
    assert (made.receive_buffer_size(), made.send_buffer_size()) == (65536, 65536)
    made.set_send_buffer_size(1 << 60)
    six = bench.tcp("ipv6")
    six.set_hop_limit(7)
    assert six.hop_limit() == 7
    for call in (
        *(made.set_keep_alive_idle_time, made.set_keep_alive_interval, made.set_keep_alive_count),
        *(made.set_hop_limit, made.set_receive_buffer_size, made.set_send_buffer_size),
    ):
        assert code(call, 0) == "invalid-argument"


def test_a_guest_cannot_have_the_last_descriptors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server = bench.listening()
    client, _, _ = bench.connected(server.local_address())
    monkeypatch.setattr(descriptors, "_limit", lambda: 64)
    before = len(os.listdir("/proc/self/fd"))
    assert code(lambda: [bench.tcp() for _ in range(64)]) == "new-socket-limit"
    for call in (bench.udp, server.accept, lambda: bench.resolve(NETWORK, "localhost")):
        assert code(call) == "new-socket-limit"
    assert len(os.listdir("/proc/self/fd")) - before < 64
    assert client.address_family() == "ipv4"


# UDP.


def test_datagrams(bench: Bench) -> None:
    first, incoming, outgoing = bench.datagrams()
    _, others, other = bench.datagrams()
    there = first.local_address()
    assert incoming.receive(5) == []
    assert not incoming.subscribe().ready()
    assert other.check_send() == 16
    assert other.send([{"data": bytes([n]), "remote-address": there} for n in range(3)]) == 3
    incoming.subscribe().block()
    received = incoming.receive(2)
    assert [datagram["data"] for datagram in received] == [b"\0", b"\1"]
    assert incoming.receive(0) == []
    assert [datagram["data"] for datagram in incoming.receive(100)] == [b"\2"]
    outgoing.check_send()
    assert outgoing.send([{"data": b"", "remote-address": received[0]["remote-address"]}]) == 1
    others.subscribe().block()
    assert others.receive(1) == [{"data": b"", "remote-address": there}]


def test_binding_of_udp(bench: Bench) -> None:
    made = bench.udp()
    assert code(made.local_address) == "invalid-state"
    assert code(made.stream, None) == "invalid-state"
    assert code(made.finish_bind) == "not-in-progress"
    assert code(made.start_bind, NETWORK, v6()) == "invalid-argument"
    assert code(made.start_bind, NETWORK, v4("192.0.2.1")) == "address-not-bindable"
    made.start_bind(NETWORK, v4())
    assert code(made.start_bind, NETWORK, v4()) == "concurrency-conflict"
    made.subscribe().block()
    made.finish_bind()
    assert code(made.start_bind, NETWORK, v4()) == "invalid-state"
    assert code(bench.udp().start_bind, NETWORK, made.local_address()) == "address-in-use"
    assert (made.address_family(), bench.udp("ipv6").address_family()) == ("ipv4", "ipv6")
    made.set_unicast_hop_limit(9)
    made.set_receive_buffer_size(8192)
    made.set_send_buffer_size(8192)
    assert (made.unicast_hop_limit(), made.receive_buffer_size(), made.send_buffer_size()) == (9, 8192, 8192)
    assert code(made.set_unicast_hop_limit, 0) == "invalid-argument"


def test_datagrams_of_one_peer(bench: Bench) -> None:
    peer, _, to_us = bench.datagrams()
    _, _, stranger = bench.datagrams()
    made, incoming, outgoing = bench.datagrams(peer.local_address())
    ours = made.local_address()
    assert made.remote_address() == peer.local_address()
    for sender, data in ((stranger, b"no"), (to_us, b"yes")):
        sender.check_send()
        assert sender.send([{"data": data, "remote-address": ours}]) == 1
    incoming.subscribe().block()
    assert [datagram["data"] for datagram in incoming.receive(10)] == [b"yes"]
    outgoing.check_send()
    assert outgoing.send([{"data": b"a", "remote-address": None}]) == 1
    outgoing.check_send()
    assert code(outgoing.send, [{"data": b"b", "remote-address": v4(port=9)}]) == "invalid-argument"
    with pytest.raises(Trap, match="streams of an earlier call"):
        made.stream(None)
    left = incoming.subscribe()
    bench.drop(incoming)
    bench.drop(outgoing)
    # And of anybody again.
    anybody, sink = (bench.kept(stream) for stream in made.stream(None))
    assert code(made.remote_address) == "invalid-state"
    stranger.check_send()
    assert stranger.send([{"data": b"now", "remote-address": made.local_address()}]) == 1
    anybody.subscribe().block()
    assert [datagram["data"] for datagram in anybody.receive(10)] == [b"now"]
    for thing in (made, anybody, sink):
        assert not left.ready()
        bench.drop(thing)
    assert left.ready()  # and nobody waits for another one's descriptor


def test_of_one_peer_means_also_what_has_come_already(bench: Bench) -> None:
    made = bench.udp()
    made.start_bind(NETWORK, v4())
    made.finish_bind()
    here = made.local_address()
    friend, _, to_us = bench.datagrams(here)
    _, _, stranger = bench.datagrams(here)
    for sender, data in ((stranger, b"no"), (to_us, b"yes"), (stranger, b"no")):
        sender.check_send()
        sender.send([{"data": data, "remote-address": None}])
    incoming, _ = (bench.kept(stream) for stream in made.stream(friend.local_address()))
    assert [datagram["data"] for datagram in incoming.receive(10)] == [b"yes"]


def test_datagrams_that_cannot_be_sent(bench: Bench) -> None:
    made, incoming, outgoing = bench.datagrams()
    with pytest.raises(Trap, match="check-send permitted 0"):
        outgoing.send([{"data": b"", "remote-address": None}])
    for remote in (None, v6(port=1), v4(port=0), v4("0.0.0.0", 1)):
        outgoing.check_send()
        assert code(outgoing.send, [{"data": b"x", "remote-address": remote}]) == "invalid-argument"
    outgoing.check_send()
    large = {"data": bytes(65508), "remote-address": made.local_address()}
    assert code(outgoing.send, [large]) == "datagram-too-large"
    outgoing.check_send()
    assert outgoing.send([{"data": b"x", "remote-address": made.local_address()}, large]) == 1
    assert outgoing.send([]) == 0
    incoming.subscribe().block()
    for remote in (v6(port=1), v4(port=0)):
        assert code(bench.udp().stream, remote) == "invalid-state"


def test_a_peer_that_is_not_there(bench: Bench) -> None:
    gone = bench.udp()
    gone.start_bind(NETWORK, v4())
    address = gone.local_address()
    bench.drop(gone)
    _, incoming, outgoing = bench.datagrams(address)
    outgoing.check_send()
    outgoing.send([{"data": b"x", "remote-address": None}])
    incoming.subscribe().block()
    assert code(incoming.receive, 1) == "connection-refused"


# Names.


def found(lookup: Lookup) -> list[tuple[str, tuple[int, ...]]]:
    lookup.subscribe().block()
    return list(iter(lookup.resolve_next_address, None))


def test_addresses_are_their_own_names(bench: Bench) -> None:
    assert found(bench.kept(bench.resolve(NETWORK, "192.0.2.7"))) == [("ipv4", (192, 0, 2, 7))]
    assert found(bench.kept(bench.resolve(NETWORK, "::1"))) == [("ipv6", (0, 0, 0, 0, 0, 0, 0, 1))]


def test_names_are_looked_up(bench: Bench) -> None:
    lookups = [bench.kept(bench.resolve(NETWORK, "localhost")) for _ in range(30)]
    assert all(("ipv4", (127, 0, 0, 1)) in found(lookup) for lookup in lookups)
    assert lookups[0].resolve_next_address() is None


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "a b", "a/b", "a:80", "x" * 64, "a." * 127 + "abc", "ü" * 64, "a\0b"]
)
def test_what_cannot_be_a_name(bench: Bench, name: str) -> None:
    assert code(bench.resolve, NETWORK, name) == "invalid-argument"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (socket.gaierror(socket.EAI_NONAME, ""), "name-unresolvable"),
        (socket.gaierror(socket.EAI_NODATA, ""), "name-unresolvable"),
        (socket.gaierror(socket.EAI_AGAIN, ""), "temporary-resolver-failure"),
        (socket.gaierror(socket.EAI_FAIL, ""), "permanent-resolver-failure"),
        (socket.gaierror(socket.EAI_MEMORY, ""), "out-of-memory"),
        (OSError(errno.EMFILE, ""), "new-socket-limit"),
    ],
)
def test_a_lookup_that_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch, error: OSError, expected: str) -> None:
    begun = threading.Event()
    go = threading.Event()

    def fail(*_: object, **__: object) -> None:
        begun.set()
        go.wait(30)
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    lookup = bench.kept(bench.resolve(NETWORK, "name.example"))
    begun.wait(30)
    assert code(lookup.resolve_next_address) == "would-block"
    assert not lookup.subscribe().ready()
    go.set()
    lookup.subscribe().block()
    assert code(lookup.resolve_next_address) == expected


def test_a_lookup_that_is_dropped_ends_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    go, over = threading.Event(), threading.Event()

    def late(*_: object, **__: object) -> list[object]:
        go.wait(30)
        over.set()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", late)
    lookup: Resource = bench.resolve(NETWORK, "name.example")
    lookup.close()
    go.set()
    assert over.wait(30)
