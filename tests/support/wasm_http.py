"""A component of the world `wasi:http/proxy` in component text, which the engine assembles. Not for other components.

What it answers depends on the first letter of the path: see `PROXY`.
"""

from __future__ import annotations

from typing import Final

from tests.support.wasm import COMPONENT_IMPORTS

_ERROR_CODE: Final = """
    (type $dns (record (field "rcode" (option string)) (field "info-code" (option u16))))
    (export "DNS-error-payload" (type $dns2 (eq $dns)))
    (type $tls (record (field "alert-id" (option u8)) (field "alert-message" (option string))))
    (export "TLS-alert-received-payload" (type $tls2 (eq $tls)))
    (type $field-size (record (field "field-name" (option string)) (field "field-size" (option u32))))
    (export "field-size-payload" (type $field-size2 (eq $field-size)))
    (type $code (variant
      (case "DNS-timeout") (case "DNS-error" $dns2) (case "destination-not-found") (case "destination-unavailable")
      (case "destination-IP-prohibited") (case "destination-IP-unroutable") (case "connection-refused")
      (case "connection-terminated") (case "connection-timeout") (case "connection-read-timeout")
      (case "connection-write-timeout") (case "connection-limit-reached") (case "TLS-protocol-error")
      (case "TLS-certificate-error") (case "TLS-alert-received" $tls2) (case "HTTP-request-denied")
      (case "HTTP-request-length-required") (case "HTTP-request-body-size" (option u64))
      (case "HTTP-request-method-invalid") (case "HTTP-request-URI-invalid") (case "HTTP-request-URI-too-long")
      (case "HTTP-request-header-section-size" (option u32)) (case "HTTP-request-header-size" (option $field-size2))
      (case "HTTP-request-trailer-section-size" (option u32)) (case "HTTP-request-trailer-size" $field-size2)
      (case "HTTP-response-incomplete") (case "HTTP-response-header-section-size" (option u32))
      (case "HTTP-response-header-size" $field-size2) (case "HTTP-response-body-size" (option u64))
      (case "HTTP-response-trailer-section-size" (option u32)) (case "HTTP-response-trailer-size" $field-size2)
      (case "HTTP-response-transfer-coding" (option string)) (case "HTTP-response-content-coding" (option string))
      (case "HTTP-response-timeout") (case "HTTP-upgrade-failed") (case "HTTP-protocol-error") (case "loop-detected")
      (case "configuration-error") (case "internal-error" (option string))))
    (export "error-code" (type $code2 (eq $code)))
"""

_IMPORTS: Final = f"""
  {COMPONENT_IMPORTS}
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "input-stream" (type $is (sub resource)))
    (export "output-stream" (type $os (sub resource)))
    (alias outer 1 $err (type $e)) (export "error" (type $e2 (eq $e)))
    (type $se (variant (case "last-operation-failed" (own $e2)) (case "closed")))
    (export "stream-error" (type $se2 (eq $se)))
    (export "[method]input-stream.blocking-read"
      (func (param "self" (borrow $is)) (param "len" u64) (result (result (list u8) (error $se2)))))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $os)) (param "contents" (list u8)) (result (result (error $se2)))))))
  (alias export $streams "input-stream" (type $is))
  (alias export $streams "output-stream" (type $os))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $os (type $o)) (export "output-stream" (type $o2 (eq $o)))
    (export "get-stdout" (func (result (own $o2))))))
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-environment" (func (result (list (tuple string string)))))))
  (import "wasi:cli/exit@0.2.0" (instance $exit (export "exit" (func (param "status" (result))))))
  (import "wasi:http/types@0.2.0" (instance $http
    (alias outer 1 $is (type $i)) (export "input-stream" (type $i2 (eq $i)))
    (alias outer 1 $os (type $o)) (export "output-stream" (type $o2 (eq $o)))
    (alias outer 1 $pollable (type $p)) (export "pollable" (type $p2 (eq $p)))
    (export "fields" (type $fields (sub resource)))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "incoming-body" (type $ib (sub resource)))
    (export "[method]incoming-body.stream" (func (param "self" (borrow $ib)) (result (result (own $i2)))))
    (export "incoming-request" (type $request (sub resource)))
    (export "[method]incoming-request.path-with-query"
      (func (param "self" (borrow $request)) (result (option string))))
    (export "[method]incoming-request.consume" (func (param "self" (borrow $request)) (result (result (own $ib)))))
    {_ERROR_CODE}
    (export "outgoing-body" (type $ob (sub resource)))
    (export "[method]outgoing-body.write" (func (param "self" (borrow $ob)) (result (result (own $o2)))))
    (export "[static]outgoing-body.finish"
      (func (param "this" (own $ob)) (param "trailers" (option (own $fields))) (result (result (error $code2)))))
    (export "outgoing-response" (type $response (sub resource)))
    (export "[constructor]outgoing-response" (func (param "headers" (own $fields)) (result (own $response))))
    (export "[method]outgoing-response.body" (func (param "self" (borrow $response)) (result (result (own $ob)))))
    (type $scheme (variant (case "HTTP") (case "HTTPS") (case "other" string)))
    (export "scheme" (type $scheme2 (eq $scheme)))
    (export "outgoing-request" (type $asked (sub resource)))
    (export "[constructor]outgoing-request" (func (param "headers" (own $fields)) (result (own $asked))))
    (export "[method]outgoing-request.set-scheme"
      (func (param "self" (borrow $asked)) (param "scheme" (option $scheme2)) (result (result))))
    (export "[method]outgoing-request.set-authority"
      (func (param "self" (borrow $asked)) (param "authority" (option string)) (result (result))))
    (export "[method]outgoing-request.set-path-with-query"
      (func (param "self" (borrow $asked)) (param "path-with-query" (option string)) (result (result))))
    (export "request-options" (type (sub resource)))
    (export "incoming-response" (type $got (sub resource)))
    (export "[method]incoming-response.consume" (func (param "self" (borrow $got)) (result (result (own $ib)))))
    (export "future-incoming-response" (type $future (sub resource)))
    (export "[method]future-incoming-response.subscribe" (func (param "self" (borrow $future)) (result (own $p2))))
    (export "[method]future-incoming-response.get"
      (func (param "self" (borrow $future)) (result (option (result (result (own $got) (error $code2)))))))
    (export "response-outparam" (type $out (sub resource)))
    (export "[static]response-outparam.set"
      (func (param "param" (own $out)) (param "response" (result (own $response) (error $code2)))))))
  (alias export $http "incoming-request" (type $request))
  (alias export $http "response-outparam" (type $out))
  (alias export $http "outgoing-request" (type $asked))
  (alias export $http "request-options" (type $options))
  (alias export $http "future-incoming-response" (type $future))
  (alias export $http "error-code" (type $code))
  (import "wasi:http/outgoing-handler@0.2.0" (instance $outgoing
    (alias outer 1 $asked (type $a)) (export "outgoing-request" (type $asked2 (eq $a)))
    (alias outer 1 $options (type $o)) (export "request-options" (type $options2 (eq $o)))
    (alias outer 1 $future (type $f)) (export "future-incoming-response" (type $future2 (eq $f)))
    (alias outer 1 $code (type $c)) (export "error-code" (type $code2 (eq $c)))
    (export "handle" (func (param "request" (own $asked2)) (param "options" (option (own $options2)))
      (result (result (own $future2) (error $code2)))))))
"""

_LOWERED: Final = {
    # name: (instance, WIT name, signature in core Wasm)
    "block": ("poll", "[method]pollable.block", "(param i32)"),
    "subscribe": ("clock", "subscribe-duration", "(param i64) (result i32)"),
    "read": ("streams", "[method]input-stream.blocking-read", "(param i32 i64 i32)"),
    "put": ("streams", "[method]output-stream.blocking-write-and-flush", "(param i32 i32 i32 i32)"),
    "stdout": ("stdout", "get-stdout", "(result i32)"),
    "environment": ("environment", "get-environment", "(param i32)"),
    "exit": ("exit", "exit", "(param i32)"),
    "fields": ("http", "[constructor]fields", "(result i32)"),
    "stream": ("http", "[method]incoming-body.stream", "(param i32 i32)"),
    "path": ("http", "[method]incoming-request.path-with-query", "(param i32 i32)"),
    "consume": ("http", "[method]incoming-request.consume", "(param i32 i32)"),
    "write": ("http", "[method]outgoing-body.write", "(param i32 i32)"),
    "finish": ("http", "[static]outgoing-body.finish", "(param i32 i32 i32 i32)"),
    "response": ("http", "[constructor]outgoing-response", "(param i32) (result i32)"),
    "body": ("http", "[method]outgoing-response.body", "(param i32 i32)"),
    "request": ("http", "[constructor]outgoing-request", "(param i32) (result i32)"),
    "scheme": ("http", "[method]outgoing-request.set-scheme", "(param i32 i32 i32 i32 i32) (result i32)"),
    "authority": ("http", "[method]outgoing-request.set-authority", "(param i32 i32 i32 i32) (result i32)"),
    "target": ("http", "[method]outgoing-request.set-path-with-query", "(param i32 i32 i32 i32) (result i32)"),
    "send": ("outgoing", "handle", "(param i32 i32 i32 i32)"),
    "coming": ("http", "[method]future-incoming-response.subscribe", "(param i32) (result i32)"),
    "get": ("http", "[method]future-incoming-response.get", "(param i32 i32)"),
    "content": ("http", "[method]incoming-response.consume", "(param i32 i32)"),
    "set": ("http", "[static]response-outparam.set", "(param i32 i32 i32 i32 i64 i32 i32 i32 i32)"),
}

# Results are stored at 16, what the host allocates is at 65536.
_MAIN: Final = """
  (data (i32.const 1024) "hello from a component\\n")
  (global $body (mut i32) (i32.const 0))
  (func $answer (param $out i32) (local $response i32) ;; with 200, and leaves the stream of the body
    (local.set $response (call $response (call $fields)))
    (call $body (local.get $response) (i32.const 16))
    (global.set $body (i32.load (i32.const 20)))
    (call $write (global.get $body) (i32.const 16))
    (call $set (local.get $out) (i32.const 0) (local.get $response) (i32.const 0)
      (i64.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))
  (func $end (param $stream i32)
    (call $drop-output (local.get $stream))
    (call $finish (global.get $body) (i32.const 0) (i32.const 0) (i32.const 16)))
  (func $whole (param $out i32) (param $at i32) (param $size i32) (local $stream i32)
    (call $answer (local.get $out))
    (local.set $stream (i32.load (i32.const 20)))
    (call $put (local.get $stream) (local.get $at) (local.get $size) (i32.const 16))
    (call $end (local.get $stream)))
  (func $echo (param $request i32) (param $out i32)
    (call $consume (local.get $request) (i32.const 16))
    (call $copy (i32.load (i32.const 20)) (local.get $out)))
  (func $ask (param $out i32) (param $scheme i32) (param $at i32) (param $end i32) ;; at: HOST:PORT/PATH, to its end
    (local $request i32) (local $slash i32) (local $future i32)
    (local.set $slash (local.get $at))
    (block $found (loop $next
      (br_if $found (i32.eq (i32.load8_u (local.get $slash)) (i32.const 47)))
      (local.set $slash (i32.add (local.get $slash) (i32.const 1)))
      (br $next)))
    (local.set $request (call $request (call $fields)))
    (drop (call $scheme (local.get $request) (i32.const 1) (local.get $scheme) (i32.const 0) (i32.const 0)))
    (drop (call $authority (local.get $request) (i32.const 1) (local.get $at)
      (i32.sub (local.get $slash) (local.get $at))))
    (drop (call $target (local.get $request) (i32.const 1) (local.get $slash)
      (i32.sub (local.get $end) (local.get $slash))))
    (call $send (local.get $request) (i32.const 0) (i32.const 0) (i32.const 512))
    (if (i32.load8_u (i32.const 512)) (then
      (call $refuse (local.get $out) (i32.load8_u (i32.const 520))) (return)))
    (local.set $future (i32.load (i32.const 520)))
    (call $block (call $coming (local.get $future)))
    (call $get (local.get $future) (i32.const 512))
    (if (i32.load8_u (i32.const 528)) (then
      (call $refuse (local.get $out) (i32.load8_u (i32.const 536))) (return)))
    (call $content (i32.load (i32.const 536)) (i32.const 16))
    (call $copy (i32.load (i32.const 20)) (local.get $out)))
  (func $refuse (param $out i32) (param $code i32)
    (call $set (local.get $out) (i32.const 1) (local.get $code) (i32.const 0)
      (i64.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))
  (func $copy (param $body i32) (param $out i32) (local $from i32) (local $to i32) (local $at i32) (local $left i32)
    (call $stream (local.get $body) (i32.const 16))
    (local.set $from (i32.load (i32.const 20)))
    (call $answer (local.get $out))
    (local.set $to (i32.load (i32.const 20)))
    (block $done (loop $more
      (call $read (local.get $from) (i64.const 16384) (i32.const 16))
      (br_if $done (i32.load8_u (i32.const 16)))
      (local.set $at (i32.load (i32.const 20))) (local.set $left (i32.load (i32.const 24)))
      (block $written (loop $piece
        (br_if $written (i32.eqz (local.get $left)))
        (call $put (local.get $to) (local.get $at) (call $least (local.get $left) (i32.const 4096)) (i32.const 16))
        (br_if $done (i32.load8_u (i32.const 16)))
        (local.set $at (i32.add (local.get $at) (call $least (local.get $left) (i32.const 4096))))
        (local.set $left (i32.sub (local.get $left) (call $least (local.get $left) (i32.const 4096))))
        (br $piece)))
      (br $more)))
    (call $end (local.get $to)))
  (func $least (param $a i32) (param $b i32) (result i32)
    (select (local.get $a) (local.get $b) (i32.lt_u (local.get $a) (local.get $b))))
  (func $deeper unreachable)
  (func (export "handle") (param $request i32) (param $out i32) (local $letter i32) (local $at i32) (local $end i32)
    (call $path (local.get $request) (i32.const 16))
    (local.set $at (i32.load (i32.const 20)))
    (local.set $end (i32.add (local.get $at) (i32.load (i32.const 24))))
    (local.set $letter (i32.load8_u offset=1 (local.get $at)))
    (if (i32.eq (local.get $letter) (i32.const 97)) (then ;; ask/HOST:PORT/PATH: another server, by HTTP
      (call $ask (local.get $out) (i32.const 0) (i32.add (local.get $at) (i32.const 5)) (local.get $end))))
    (if (i32.eq (local.get $letter) (i32.const 98)) (then ;; bid/HOST:PORT/PATH: by HTTPS
      (call $ask (local.get $out) (i32.const 1) (i32.add (local.get $at) (i32.const 5)) (local.get $end))))
    (if (i32.eq (local.get $letter) (i32.const 104)) (then ;; hello
      (call $whole (local.get $out) (i32.const 1024) (i32.const 23))))
    (if (i32.eq (local.get $letter) (i32.const 101)) (then ;; echo
      (call $echo (local.get $request) (local.get $out))))
    (if (i32.eq (local.get $letter) (i32.const 112)) (then ;; print
      (call $put (call $stdout) (i32.const 1024) (i32.const 23) (i32.const 16))
      (call $whole (local.get $out) (i32.const 1024) (i32.const 23))))
    (if (i32.eq (local.get $letter) (i32.const 118)) (then ;; variable: the value of the first one
      (call $environment (i32.const 16))
      (call $whole (local.get $out)
        (i32.load offset=8 (i32.load (i32.const 16))) (i32.load offset=12 (i32.load (i32.const 16))))))
    (if (i32.eq (local.get $letter) (i32.const 116)) (then (call $deeper))) ;; trap
    (if (i32.eq (local.get $letter) (i32.const 102)) (then ;; fail: internal-error without a text
      (call $refuse (local.get $out) (i32.const 38))))
    (if (i32.eq (local.get $letter) (i32.const 105)) (then ;; incomplete
      (call $answer (local.get $out))
      (call $put (i32.load (i32.const 20)) (i32.const 1024) (i32.const 23) (i32.const 16))
      (call $deeper)))
    (if (i32.eq (local.get $letter) (i32.const 111)) (then ;; open: the same, but it returns
      (call $answer (local.get $out))
      (call $put (i32.load (i32.const 20)) (i32.const 1024) (i32.const 23) (i32.const 16))))
    (if (i32.eq (local.get $letter) (i32.const 120)) (then (call $exit (i32.const 1)))) ;; x: exit
    (if (i32.eq (local.get $letter) (i32.const 115)) (then (loop $forever (br $forever)))) ;; spin
    (if (i32.eq (local.get $letter) (i32.const 103)) (then (loop $more ;; grow: without end
      (memory.fill (i32.mul (memory.grow (i32.const 16)) (i32.const 65536)) (i32.const 1) (i32.const 1048576))
      (br $more))))
    (if (i32.eq (local.get $letter) (i32.const 108)) (then ;; late: after a while
      (call $block (call $subscribe (i64.const 100000000)))
      (call $whole (local.get $out) (i32.const 1024) (i32.const 23))))
    (if (i32.eq (local.get $letter) (i32.const 119)) (then ;; wait: for an hour
      (call $block (call $subscribe (i64.const 3600000000000))))))
"""


def _component() -> str:
    imports = "\n".join(f'(import "wasi" "{name}" (func ${name} {kind}))' for name, (_, _, kind) in _LOWERED.items())
    options = '(memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))'
    lowered = "\n".join(
        f'(core func ${name} (canon lower (func ${instance} "{function}") {options}))'
        for name, (instance, function, _) in _LOWERED.items()
    )
    given = " ".join(f'(export "{name}" (func ${name}))' for name in (*_LOWERED, "drop-output"))
    return f"""(component {_IMPORTS}
      (core module $libc (memory (export "memory") 4)
        (func (export "realloc") (param i32 i32 i32 i32) (result i32) (global.get $top)
          (global.set $top (i32.add (global.get $top) (i32.and (i32.add (local.get 3) (i32.const 7)) (i32.const -8))))
          (if (i32.gt_u (global.get $top) (i32.const 200000)) (then (global.set $top (i32.const 65536)))))
        (global $top (mut i32) (i32.const 65536)))
      (core instance $libc (instantiate $libc))
      {lowered}
      (core func $drop-output (canon resource.drop $os))
      (core module $main
        (import "libc" "memory" (memory 4))
        {imports} (import "wasi" "drop-output" (func $drop-output (param i32)))
        {_MAIN})
      (core instance $main (instantiate $main (with "libc" (instance $libc)) (with "wasi" (instance {given}))))
      (func $handle (param "request" (own $request)) (param "response-out" (own $out))
        (canon lift (core func $main "handle")))
      (instance $exported (export "handle" (func $handle)))
      (export "wasi:http/incoming-handler@0.2.0" (instance $exported)))"""


PROXY: Final = _component()
"""Serves `/hello`, `/late` (after 0.1 s), `/echo` (the body), `/print` (on standard output too), `/variable`, and what
other servers say: `/ask/HOST:PORT/PATH` by HTTP, `/bid/HOST:PORT/PATH` by HTTPS. `/open` returns with an unfinished
body. Does wrong at `/trap`, `/nothing`, `/fail`, `/incomplete`, `/x` (exits); does not come back from `/spin`, `/grow`
and `/wait`."""
