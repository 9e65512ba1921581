"""TLS of outgoing requests: a client's end on a connected socket, checked against the node's authorities.

Loaded by components that send requests, before the worker leaves the host's files behind. Invariant: no certificate is
accepted that does not name the host and lead to one of the authorities.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from typing import Final

from handlers.wasmtime.wasip2.http_errors import Code, HttpError

_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
)


class TlsWire:
    """`http_channel.Wire`."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock

    def shake_hands(self) -> int:
        """Go on with it: what to wait for, with poll(2)'s events; 0 = done. HttpError."""
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLOUT
        except ssl.SSLError as error:
            raise HttpError(_code(error)) from None
        return 0

    def recv(self, size: int, /) -> bytes:
        """`Wire`. HttpError."""
        try:
            return self._sock.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise HttpError(_code(error)) from None

    def send(self, data: memoryview, /) -> int:
        """`Wire`. HttpError."""
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise HttpError(_code(error)) from None

    def fileno(self) -> int:
        """`Wire`."""
        return self._sock.fileno()

    def close(self) -> None:
        """`Wire`."""
        self._sock.close()


class Authorities:
    """Those of the node, which are read at the first use. Any thread."""

    def __init__(self) -> None:
        self._fd = next((fd for fd in map(_opened, _BUNDLES) if fd >= 0), -1)
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def wrap(self, sock: socket.socket, host: str) -> TlsWire:
        """Before the handshake; `sock` is not to be used any more. OSError."""
        with self._lock:
            if self._context is None:
                self._context = self._made()
        return TlsWire(self._context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False))

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["http/1.1"])
        if self._fd >= 0:
            with os.fdopen(self._fd, "rb") as bundle:  # as bytes: text files take a codec, which is a file too
                context.load_verify_locations(cadata=bundle.read().decode("ascii", "ignore"))
        return context


def _code(error: ssl.SSLError) -> Code:
    if isinstance(error, ssl.SSLCertVerificationError):
        return ("TLS-certificate-error", None)
    return ("connection-terminated" if isinstance(error, ssl.SSLEOFError) else "TLS-protocol-error", None)


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
