"""An HTTP proxy on loopback that knows CONNECT alone: whatever host is asked for, the bytes go to one address.

    with ConnectProxy("127.0.0.1:5000", user="u", password="p") as proxy:
        proxy.url                       # with the credentials in it
        proxy.break_after(100_000)      # the first tunnel through which so many bytes come back

Invariant: it sees what a proxy sees: the CONNECT requests and their headers, and bytes that it passes on as they are.
"""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Self

_NEVER = 1 << 60
_IDLE_SECONDS = 30


class ConnectProxy:
    """`target` is `host:port`. With `tls` the proxy itself is reached by TLS."""

    def __init__(self, target: str, *, user: str = "", password: str = "", tls: ssl.SSLContext | None = None) -> None:
        proxy = self
        self.tunnels: list[str] = []
        """What was asked for, `host:port`, of tunnels that were made."""
        self.passed = b""
        """All that clients have sent through the tunnels."""
        self._target = target
        self._credentials = f"{user}:{password}" if user else ""
        self._limit = _NEVER

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._scheme = "http" if tls is None else "https"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        user = f"{self._credentials}@" if self._credentials else ""
        return f"{self._scheme}://{user}localhost:{self._server.server_port}"

    def break_after(self, number: int) -> None:
        """End the first tunnel through which so many bytes have come back."""
        self._limit = number

    def breaks(self, number: int) -> bool:
        """Whether a tunnel ends now, through which so many bytes have come back."""
        if number < self._limit:
            return False
        self._limit = _NEVER
        return True

    def admits(self, authorization: str | None) -> bool:
        wanted = "Basic " + base64.b64encode(self._credentials.encode()).decode()
        return not self._credentials or authorization == wanted

    def connect(self, asked: str) -> socket.socket:
        """To the target."""
        self.tunnels.append(asked)
        host, _, port = self._target.rpartition(":")
        return socket.create_connection((host, int(port)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: ConnectProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # type: ignore[explicit-override]  # noqa: A002
        """Quiet."""

    def do_CONNECT(self) -> None:
        self.close_connection = True
        if not self.owner.admits(self.headers.get("Proxy-Authorization")):
            self.send_response(407)
            self.send_header("Proxy-Authenticate", 'Basic realm="proxy"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with self.owner.connect(self.path) as upstream:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                self._pass_on(upstream)

    def _pass_on(self, upstream: socket.socket) -> None:
        """Both ways, until one end is closed."""
        others = {self.connection: upstream, upstream: self.connection}
        returned = 0
        while ready := select.select(list(others), [], [], _IDLE_SECONDS)[0]:
            for source in ready:
                data = source.recv(1 << 14)
                if source is upstream:
                    returned += len(data)
                else:
                    self.owner.passed += data
                if not data or self.owner.breaks(returned):
                    return
                others[source].sendall(data)
