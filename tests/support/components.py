"""Components that use the network, from component text, assembled on the spot. WASI 0.2, no libraries.

Each is a command: `program(body)` has the body of `wasi:cli/run`, whose result is 0 for ok, and what it may call.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

_NETWORK_TYPES: Final = """
        (alias outer 1 $network (type $n)) (export "network" (type $network' (eq $n)))
        (alias outer 1 $error-code (type $e)) (export "error-code" (type $error-code' (eq $e)))
        (alias outer 1 $family (type $f)) (export "ip-address-family" (type $family' (eq $f)))
        (alias outer 1 $socket-address (type $a)) (export "ip-socket-address" (type $address' (eq $a)))
        (alias outer 1 $pollable (type $p)) (export "pollable" (type $pollable' (eq $p)))"""

_STREAM_TYPES: Final = """
        (alias outer 1 $input-stream (type $i)) (export "input-stream" (type $input' (eq $i)))
        (alias outer 1 $output-stream (type $o)) (export "output-stream" (type $output' (eq $o)))"""

_IMPORTS: Final = f"""
      (import "wasi:io/poll@0.2.6" (instance $poll
        (export "pollable" (type $pollable (sub resource)))
        (export "[method]pollable.block" (func (param "self" (borrow $pollable))))))
      (alias export $poll "pollable" (type $pollable))
      (import "wasi:io/error@0.2.6" (instance $error (export "error" (type (sub resource)))))
      (alias export $error "error" (type $io-error))
      (import "wasi:io/streams@0.2.6" (instance $streams
        (export "input-stream" (type $in (sub resource))) (export "output-stream" (type $out (sub resource)))
        (alias outer 1 $io-error (type $e)) (export "error" (type $error' (eq $e)))
        (type $se (variant (case "last-operation-failed" (own $error')) (case "closed")))
        (export "stream-error" (type $stream-error (eq $se)))
        (export "[method]input-stream.blocking-read"
          (func (param "self" (borrow $in)) (param "len" u64) (result (result (list u8) (error $stream-error)))))
        (export "[method]output-stream.blocking-write-and-flush"
          (func (param "self" (borrow $out)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
      (alias export $streams "input-stream" (type $input-stream))
      (alias export $streams "output-stream" (type $output-stream))
      (import "wasi:cli/stdout@0.2.6" (instance $stdout
        (alias outer 1 $output-stream (type $o)) (export "output-stream" (type $o2 (eq $o)))
        (export "get-stdout" (func (result (own $o2))))))
      (import "wasi:cli/exit@0.2.6" (instance $exit (export "exit-with-code" (func (param "status-code" u8)))))
      (import "wasi:sockets/network@0.2.6" (instance $net
        (export "network" (type (sub resource)))
        (type $codes (enum "unknown" "access-denied" "not-supported" "invalid-argument" "out-of-memory" "timeout"
          "concurrency-conflict" "not-in-progress" "would-block" "invalid-state" "new-socket-limit"
          "address-not-bindable" "address-in-use" "remote-unreachable" "connection-refused" "connection-reset"
          "connection-aborted" "datagram-too-large" "name-unresolvable" "temporary-resolver-failure"
          "permanent-resolver-failure"))
        (export "error-code" (type (eq $codes)))
        (type $families (enum "ipv4" "ipv6")) (export "ip-address-family" (type (eq $families)))
        (type $v4 (tuple u8 u8 u8 u8)) (export "ipv4-address" (type $ipv4 (eq $v4)))
        (type $v6 (tuple u16 u16 u16 u16 u16 u16 u16 u16)) (export "ipv6-address" (type $ipv6 (eq $v6)))
        (type $ip (variant (case "ipv4" $ipv4) (case "ipv6" $ipv6))) (export "ip-address" (type (eq $ip)))
        (type $s4 (record (field "port" u16) (field "address" $ipv4)))
        (export "ipv4-socket-address" (type $socket4 (eq $s4)))
        (type $s6 (record
          (field "port" u16) (field "flow-info" u32) (field "address" $ipv6) (field "scope-id" u32)))
        (export "ipv6-socket-address" (type $socket6 (eq $s6)))
        (type $sa (variant (case "ipv4" $socket4) (case "ipv6" $socket6)))
        (export "ip-socket-address" (type (eq $sa)))))
      (alias export $net "network" (type $network))
      (alias export $net "error-code" (type $error-code))
      (alias export $net "ip-address-family" (type $family))
      (alias export $net "ip-address" (type $ip-address))
      (alias export $net "ip-socket-address" (type $socket-address))
      (import "wasi:sockets/instance-network@0.2.6" (instance $instance-network
        (alias outer 1 $network (type $n)) (export "network" (type $network' (eq $n)))
        (export "instance-network" (func (result (own $network'))))))
      (import "wasi:sockets/tcp@0.2.6" (instance $tcp
        (export "tcp-socket" (type $socket (sub resource))) {_NETWORK_TYPES} {_STREAM_TYPES}
        (export "[method]tcp-socket.start-bind" (func (param "self" (borrow $socket))
          (param "network" (borrow $network')) (param "local-address" $address')
          (result (result (error $error-code')))))
        (export "[method]tcp-socket.finish-bind"
          (func (param "self" (borrow $socket)) (result (result (error $error-code')))))
        (export "[method]tcp-socket.start-listen"
          (func (param "self" (borrow $socket)) (result (result (error $error-code')))))
        (export "[method]tcp-socket.finish-listen"
          (func (param "self" (borrow $socket)) (result (result (error $error-code')))))
        (export "[method]tcp-socket.accept" (func (param "self" (borrow $socket))
          (result (result (tuple (own $socket) (own $input') (own $output')) (error $error-code')))))
        (export "[method]tcp-socket.start-connect" (func (param "self" (borrow $socket))
          (param "network" (borrow $network')) (param "remote-address" $address')
          (result (result (error $error-code')))))
        (export "[method]tcp-socket.finish-connect" (func (param "self" (borrow $socket))
          (result (result (tuple (own $input') (own $output')) (error $error-code')))))
        (export "[method]tcp-socket.subscribe" (func (param "self" (borrow $socket)) (result (own $pollable'))))))
      (alias export $tcp "tcp-socket" (type $tcp-socket))
      (import "wasi:sockets/tcp-create-socket@0.2.6" (instance $tcp-create
        (alias outer 1 $error-code (type $e)) (export "error-code" (type $error-code' (eq $e)))
        (alias outer 1 $family (type $f)) (export "ip-address-family" (type $family' (eq $f)))
        (alias outer 1 $tcp-socket (type $t)) (export "tcp-socket" (type $tcp' (eq $t)))
        (export "create-tcp-socket"
          (func (param "address-family" $family') (result (result (own $tcp') (error $error-code')))))))
      (import "wasi:sockets/udp@0.2.6" (instance $udp
        (export "udp-socket" (type $socket (sub resource)))
        (export "incoming-datagram-stream" (type $incoming (sub resource)))
        (export "outgoing-datagram-stream" (type $outgoing (sub resource))) {_NETWORK_TYPES}
        (type $id (record (field "data" (list u8)) (field "remote-address" $address')))
        (export "incoming-datagram" (type $incoming-datagram (eq $id)))
        (type $od (record (field "data" (list u8)) (field "remote-address" (option $address'))))
        (export "outgoing-datagram" (type $outgoing-datagram (eq $od)))
        (export "[method]udp-socket.start-bind" (func (param "self" (borrow $socket))
          (param "network" (borrow $network')) (param "local-address" $address')
          (result (result (error $error-code')))))
        (export "[method]udp-socket.finish-bind"
          (func (param "self" (borrow $socket)) (result (result (error $error-code')))))
        (export "[method]udp-socket.stream" (func (param "self" (borrow $socket))
          (param "remote-address" (option $address'))
          (result (result (tuple (own $incoming) (own $outgoing)) (error $error-code')))))
        (export "[method]incoming-datagram-stream.receive" (func (param "self" (borrow $incoming))
          (param "max-results" u64) (result (result (list $incoming-datagram) (error $error-code')))))
        (export "[method]incoming-datagram-stream.subscribe"
          (func (param "self" (borrow $incoming)) (result (own $pollable'))))
        (export "[method]outgoing-datagram-stream.check-send"
          (func (param "self" (borrow $outgoing)) (result (result u64 (error $error-code')))))
        (export "[method]outgoing-datagram-stream.send" (func (param "self" (borrow $outgoing))
          (param "datagrams" (list $outgoing-datagram)) (result (result u64 (error $error-code')))))))
      (alias export $udp "udp-socket" (type $udp-socket))
      (import "wasi:sockets/udp-create-socket@0.2.6" (instance $udp-create
        (alias outer 1 $error-code (type $e)) (export "error-code" (type $error-code' (eq $e)))
        (alias outer 1 $family (type $f)) (export "ip-address-family" (type $family' (eq $f)))
        (alias outer 1 $udp-socket (type $u)) (export "udp-socket" (type $udp' (eq $u)))
        (export "create-udp-socket"
          (func (param "address-family" $family') (result (result (own $udp') (error $error-code')))))))
      (import "wasi:sockets/ip-name-lookup@0.2.6" (instance $lookup
        (export "resolve-address-stream" (type $stream (sub resource)))
        (alias outer 1 $network (type $n)) (export "network" (type $network' (eq $n)))
        (alias outer 1 $error-code (type $e)) (export "error-code" (type $error-code' (eq $e)))
        (alias outer 1 $ip-address (type $i)) (export "ip-address" (type $ip' (eq $i)))
        (alias outer 1 $pollable (type $p)) (export "pollable" (type $pollable' (eq $p)))
        (export "resolve-addresses" (func (param "network" (borrow $network')) (param "name" string)
          (result (result (own $stream) (error $error-code')))))
        (export "[method]resolve-address-stream.resolve-next-address"
          (func (param "self" (borrow $stream)) (result (result (option $ip') (error $error-code')))))
        (export "[method]resolve-address-stream.subscribe"
          (func (param "self" (borrow $stream)) (result (own $pollable'))))))"""

_ADDRESS: Final = "i32 " * 12
"""An address, flat: its kind and eleven words."""

# Name in the core module, instance, name there, parameters, results. Where there is an i32 more than WIT has, it is
# where the result goes.
_FUNCTIONS: Final = (
    ("block", "poll", "[method]pollable.block", "i32", ""),
    ("read", "streams", "[method]input-stream.blocking-read", "i32 i64 i32", ""),
    ("write", "streams", "[method]output-stream.blocking-write-and-flush", "i32 i32 i32 i32", ""),
    ("stdout", "stdout", "get-stdout", "", "i32"),
    ("exit", "exit", "exit-with-code", "i32", ""),
    ("network", "instance-network", "instance-network", "", "i32"),
    ("tcp", "tcp-create", "create-tcp-socket", "i32 i32", ""),
    ("start_bind", "tcp", "[method]tcp-socket.start-bind", f"i32 i32 {_ADDRESS} i32", ""),
    ("finish_bind", "tcp", "[method]tcp-socket.finish-bind", "i32 i32", ""),
    ("start_listen", "tcp", "[method]tcp-socket.start-listen", "i32 i32", ""),
    ("finish_listen", "tcp", "[method]tcp-socket.finish-listen", "i32 i32", ""),
    ("accept", "tcp", "[method]tcp-socket.accept", "i32 i32", ""),
    ("start_connect", "tcp", "[method]tcp-socket.start-connect", f"i32 i32 {_ADDRESS} i32", ""),
    ("finish_connect", "tcp", "[method]tcp-socket.finish-connect", "i32 i32", ""),
    ("subscribe", "tcp", "[method]tcp-socket.subscribe", "i32", "i32"),
    ("udp", "udp-create", "create-udp-socket", "i32 i32", ""),
    ("udp_start_bind", "udp", "[method]udp-socket.start-bind", f"i32 i32 {_ADDRESS} i32", ""),
    ("udp_finish_bind", "udp", "[method]udp-socket.finish-bind", "i32 i32", ""),
    ("udp_stream", "udp", "[method]udp-socket.stream", f"i32 i32 {_ADDRESS} i32", ""),
    ("receive", "udp", "[method]incoming-datagram-stream.receive", "i32 i64 i32", ""),
    ("incoming", "udp", "[method]incoming-datagram-stream.subscribe", "i32", "i32"),
    ("check_send", "udp", "[method]outgoing-datagram-stream.check-send", "i32 i32", ""),
    ("send", "udp", "[method]outgoing-datagram-stream.send", "i32 i32 i32 i32", ""),
    ("resolve", "lookup", "resolve-addresses", "i32 i32 i32 i32", ""),
    ("next", "lookup", "[method]resolve-address-stream.resolve-next-address", "i32 i32", ""),
    ("resolving", "lookup", "[method]resolve-address-stream.subscribe", "i32", "i32"),
)

_DROPS: Final = {
    "drop_pollable": "pollable",
    "drop_tcp": "tcp-socket",
    "drop_in": "input-stream",
    "drop_out": "output-stream",
}

# try(at, errors): the result at `at` has to be ok, else the guest exits with 100 and the number of the error code.
# say(address, size): to standard output. wait(pollable): until it is ready, and drop it. number(value): say it.
_LIBRARY: Final = """
  (func $try (param $at i32) (param $payload i32)
    (if (i32.load8_u (local.get $at))
      (then (call $exit (i32.add (i32.const 100) (i32.load8_u (i32.add (local.get $at) (local.get $payload))))))))
  (func $say (param $at i32) (param $size i32)
    (call $write (call $stdout) (local.get $at) (local.get $size) (i32.const 0)))
  (func $wait (param $pollable i32)
    (call $block (local.get $pollable)) (call $drop_pollable (local.get $pollable)))
  (func $number (param $value i32) (local $at i32)
    (local.set $at (i32.const 96))
    (loop $next
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (i32.store8 (local.get $at) (i32.add (i32.rem_u (local.get $value) (i32.const 10)) (i32.const 48)))
      (local.set $value (i32.div_u (local.get $value) (i32.const 10)))
      (br_if $next (local.get $value)))
    (call $say (local.get $at) (i32.sub (i32.const 96) (local.get $at))))
  (data (i32.const 96) "listening\\0a") (data (i32.const 112) ".") (data (i32.const 116) "\\0a")
"""


def program(body: str, *, locals_: str = "", data: str = "") -> str:
    """The component. `data` is at 1024; results go below 64."""
    lowered = "".join(
        f'(core func ${name} (canon lower (func ${instance} "{function}")'
        f' (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))\n'
        for name, instance, function, _, _ in _FUNCTIONS
    )
    drops = "".join(f"(core func ${name} (canon resource.drop ${kind}))\n" for name, kind in _DROPS.items())
    imports = "".join(
        f'(import "host" "{name}" (func ${name} (param {parameters}) (result {results})))\n'
        for name, _, _, parameters, results in (*_FUNCTIONS, *((name, "", "", "i32", "") for name in _DROPS))
    )
    exports = "".join(f'(export "{name}" (func ${name}))' for name in (*(row[0] for row in _FUNCTIONS), *_DROPS))
    return f"""(component {_IMPORTS}
      (core module $libc (memory (export "memory") 4)
        (global $next (mut i32) (i32.const 65536))
        ;; What is not needed any more after a while is overwritten.
        (func (export "realloc") (param i32 i32 i32) (param $size i32) (result i32)
          (if (i32.gt_u (i32.add (global.get $next) (local.get $size)) (i32.const 262144))
            (then (global.set $next (i32.const 65536))))
          (global.get $next)
          (global.set $next
            (i32.and (i32.add (i32.add (global.get $next) (local.get $size)) (i32.const 7)) (i32.const -8)))))
      (core instance $libc (instantiate $libc))
      {lowered} {drops}
      (core module $main
        (import "libc" "memory" (memory 1))
        {imports} {_LIBRARY}
        (data (i32.const 1024) "{data}")
        (func (export "run") (result i32) (local $socket i32) {locals_} {body}))
      (core instance $main (instantiate $main
        (with "libc" (instance $libc)) (with "host" (instance {exports}))))
      (func $run (result (result)) (canon lift (core func $main "run")))
      (instance $exported (export "run" (func $run)))
      (export "wasi:cli/run@0.2.6" (instance $exported)))"""


def _address(host: str, port: int) -> str:
    """Flat, as twelve constants."""
    if ":" in host:
        words = [1, port, 0, *struct.unpack(">8H", socket.inet_pton(socket.AF_INET6, host)), 0]
    else:
        words = [0, port, *socket.inet_aton(host), 0, 0, 0, 0, 0, 0]
    return " ".join(f"(i32.const {word})" for word in words)


def _family(host: str) -> str:
    return f"(i32.const {int(':' in host)})"


def _listening(host: str, port: int) -> str:
    """`$socket` listens, and has said so."""
    return f"""
      (call $tcp {_family(host)} (i32.const 0)) (call $try (i32.const 0) (i32.const 4))
      (local.set $socket (i32.load (i32.const 4)))
      (call $start_bind (local.get $socket) (call $network) {_address(host, port)} (i32.const 0))
      (call $try (i32.const 0) (i32.const 1))
      (call $finish_bind (local.get $socket) (i32.const 0)) (call $try (i32.const 0) (i32.const 1))
      (call $start_listen (local.get $socket) (i32.const 0)) (call $try (i32.const 0) (i32.const 1))
      (call $finish_listen (local.get $socket) (i32.const 0)) (call $try (i32.const 0) (i32.const 1))
      (call $say (i32.const 96) (i32.const 10))"""


def echo_server(host: str, port: int) -> str:
    """Sends each connection, one after the other, what comes from it; ends with ok when it cannot accept any more."""
    return program(
        f"""{_listening(host, port)}
        (block $over (loop $next
          (call $wait (call $subscribe (local.get $socket)))
          (call $accept (local.get $socket) (i32.const 0))
          (br_if $over (i32.load8_u (i32.const 0)))
          (local.set $connection (i32.load (i32.const 4)))
          (local.set $in (i32.load (i32.const 8))) (local.set $out (i32.load (i32.const 12)))
          (block $end (loop $more
            (call $read (local.get $in) (i64.const 4096) (i32.const 0))
            (br_if $end (i32.load8_u (i32.const 0)))
            (call $write (local.get $out) (i32.load (i32.const 4)) (i32.load (i32.const 8)) (i32.const 16))
            (br_if $more (i32.eqz (i32.load8_u (i32.const 16))))))
          (call $drop_in (local.get $in)) (call $drop_out (local.get $out)) (call $drop_tcp (local.get $connection))
          (br $next)))
        (i32.const 0)""",
        locals_="(local $connection i32) (local $in i32) (local $out i32)",
    )


def client(host: str, port: int, text: str) -> str:
    """Connects, sends `text`, and prints what comes until as much has come, or the connection ends."""
    return program(
        f"""
        (call $tcp {_family(host)} (i32.const 0)) (call $try (i32.const 0) (i32.const 4))
        (local.set $socket (i32.load (i32.const 4)))
        (call $start_connect (local.get $socket) (call $network) {_address(host, port)} (i32.const 0))
        (call $try (i32.const 0) (i32.const 1))
        (call $wait (call $subscribe (local.get $socket)))
        (call $finish_connect (local.get $socket) (i32.const 0)) (call $try (i32.const 0) (i32.const 4))
        (local.set $in (i32.load (i32.const 4)))
        (call $write (i32.load (i32.const 8)) (i32.const 1024) (i32.const {len(text)}) (i32.const 16))
        (local.set $left (i32.const {len(text)}))
        (block $end (loop $more
          (call $read (local.get $in) (i64.const 4096) (i32.const 0))
          (br_if $end (i32.load8_u (i32.const 0)))
          (call $say (i32.load (i32.const 4)) (i32.load (i32.const 8)))
          (local.set $left (i32.sub (local.get $left) (i32.load (i32.const 8))))
          (br_if $more (i32.gt_s (local.get $left) (i32.const 0)))))
        (i32.const 0)""",
        locals_="(local $in i32) (local $left i32)",
        data=text.replace("\n", "\\0a"),
    )


def udp_echo_server(host: str, port: int) -> str:
    """Sends each datagram back to where it comes from."""
    return program(
        f"""
        (call $udp {_family(host)} (i32.const 0)) (call $try (i32.const 0) (i32.const 4))
        (local.set $socket (i32.load (i32.const 4)))
        (call $udp_start_bind (local.get $socket) (call $network) {_address(host, port)} (i32.const 0))
        (call $try (i32.const 0) (i32.const 1))
        (call $udp_finish_bind (local.get $socket) (i32.const 0)) (call $try (i32.const 0) (i32.const 1))
        (call $udp_stream (local.get $socket) (i32.const 0) {"(i32.const 0) " * 12} (i32.const 0))
        (call $try (i32.const 0) (i32.const 4))
        (local.set $in (i32.load (i32.const 4))) (local.set $out (i32.load (i32.const 8)))
        (call $say (i32.const 96) (i32.const 10))
        (loop $next
          (call $wait (call $incoming (local.get $in)))
          (call $receive (local.get $in) (i64.const 1) (i32.const 0)) (call $try (i32.const 0) (i32.const 4))
          (br_if $next (i32.eqz (i32.load (i32.const 8))))
          (local.set $datagram (i32.load (i32.const 4)))
          ;; Its bytes, and its address behind the word that says that there is one.
          (i64.store (i32.const 2048) (i64.load (local.get $datagram)))
          (i32.store (i32.const 2056) (i32.const 1))
          (memory.copy (i32.const 2060) (i32.add (local.get $datagram) (i32.const 8)) (i32.const 32))
          (call $check_send (local.get $out) (i32.const 16)) (call $try (i32.const 16) (i32.const 8))
          (call $send (local.get $out) (i32.const 2048) (i32.const 1) (i32.const 16))
          (call $try (i32.const 16) (i32.const 8))
          (br $next))
        (i32.const 0)""",
        locals_="(local $in i32) (local $out i32) (local $datagram i32)",
    )


def resolves(name: str) -> str:
    """Prints the IPv4 addresses of a name, each on a line."""
    byte = "(call $number (i32.load8_u (i32.const {})))"
    digits = "(call $say (i32.const 112) (i32.const 1))".join(byte.format(at) for at in (6, 7, 8, 9))
    return program(
        f"""
        (call $resolve (call $network) (i32.const 1024) (i32.const {len(name)}) (i32.const 0))
        (call $try (i32.const 0) (i32.const 4))
        (local.set $socket (i32.load (i32.const 4)))
        (call $wait (call $resolving (local.get $socket)))
        (block $end (loop $more
          (call $next (local.get $socket) (i32.const 0)) (call $try (i32.const 0) (i32.const 2))
          (br_if $end (i32.eqz (i32.load8_u (i32.const 2))))
          (br_if $more (i32.load8_u (i32.const 4)))
          {digits} (call $say (i32.const 116) (i32.const 1))
          (br $more)))
        (i32.const 0)""",
        data=name,
    )


def exits(code: int) -> str:
    """Exits with a code, and would print if that returned."""
    return program(f"(call $exit (i32.const {code})) (call $say (i32.const 96) (i32.const 10)) (i32.const 0)")
