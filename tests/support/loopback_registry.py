"""A registry in memory on loopback, in pure Python: takes pushes, serves pulls, and misbehaves on request.

    with LoopbackRegistry() as registry:
        registry.add("demo/app:1", image)
        registry.fail("blobs/", Fault.TRUNCATE)     # or, at random: registry.misbehave(dice)

As a program (`python -m tests.support.loopback_registry PORT`) it is the registry of machines without docker-registry.
Invariant: without a fault it serves exactly what it was given, and it records every request.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import itertools
import json
import random
import re
import ssl
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qs, urlsplit

from tests.support.images import Image, digest

_PATH: Final = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)")
_UPLOAD: Final = re.compile(r"/v2/(?P<name>.+)/blobs/uploads/(?P<id>[0-9]*)")


class Fault(enum.Enum):
    """What to do instead of answering well."""

    TRUNCATE = "say the whole length, send half, close"
    SHORT = "send half without saying a length"
    LONG = "send more than there is, without saying a length"
    CORRUPT = "change a byte"
    NOT_FOUND = "404"
    ERROR = "500"
    DENIED = "401 with no challenge"
    FORBIDDEN = "403"
    LIMITED = "429"
    CLOSE = "close the connection without an answer"
    STALL = "send half, then nothing"
    HTML = "200 with something that is no manifest"
    WHOLE = "200 with all of it, although a part was asked for"
    ELSEWHERE = "206 with another part than was asked for"
    REFUSE = "416, although a part was asked for that there is"
    OVERSTATE = "say a length that is too large, then close"
    UNDERSTATE = "say a length that is too small"


ALL_FAULTS: Final = tuple(Fault)
CLEAN_BREAKS: Final = (Fault.TRUNCATE, Fault.SHORT, Fault.CLOSE, Fault.ERROR, Fault.LIMITED, Fault.DENIED)
"""After which what has come is right."""


@dataclass(slots=True)
class _State:
    manifests: dict[tuple[str, str], tuple[bytes, str]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    faults: list[tuple[str, Fault, int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    proxy_authorizations: set[str] = field(default_factory=set)
    identity: str = ""
    basic: str = ""
    token: str = ""
    redirect: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    delay: threading.Event | None = None
    sent: Counter[str] = field(default_factory=Counter)
    starts: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    dice: random.Random | None = None
    odds: float = 0
    at_random: tuple[Fault, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)
    replaces: bool = False
    retry_after: str = ""
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))


class LoopbackRegistry:
    """`address` is `127.0.0.1:port`."""

    def __init__(self, port: int = 0, *, tls: ssl.SSLContext | None = None) -> None:
        self._state = _State()
        state = self._state

        class Handler(_Handler):
            shared = state

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._scheme = "http"
        if tls is not None:
            self._scheme = "https"
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self.address}"

    @property
    def requests(self) -> list[str]:
        """`METHOD path` of every request so far."""
        return self._state.requests

    @property
    def sent(self) -> Counter[str]:
        """Bytes of content that went out, by digest or tag."""
        return self._state.sent

    @property
    def starts(self) -> defaultdict[str, list[int]]:
        """Of each request for content the first byte that was asked for, by digest or tag."""
        return self._state.starts

    @property
    def authorizations(self) -> list[str]:
        """Every Authorization header that was sent."""
        return self._state.authorizations

    @property
    def proxy_authorizations(self) -> set[str]:
        """Every Proxy-Authorization header that was sent."""
        return self._state.proxy_authorizations

    def add(self, name: str, image: Image) -> str:
        """Serve an image as `repository:tag`, and by digest. Returns the reference to pull."""
        repository, _, tag = name.rpartition(":")
        for blob in image.blobs:
            self._state.blobs[blob.digest] = blob.data
        for manifest in (image.manifest, *image.manifests):
            self._state.manifests[repository, manifest.digest] = (manifest.data, manifest.media_type)
        self._state.manifests[repository, tag] = (image.manifest.data, image.manifest.media_type)
        return f"{self.address}/{name}"

    def add_manifest(self, name: str, body: bytes, media_type: str) -> str:
        """Serve any bytes as a manifest."""
        repository, _, tag = name.rpartition(":")
        self._state.manifests[repository, tag] = (body, media_type)
        return f"{self.address}/{name}"

    def forget_blob(self, digest: str) -> None:
        """A blob that a manifest names and the registry has lost."""
        del self._state.blobs[digest]

    def fail(self, part: str, fault: Fault, times: int = 1_000_000) -> None:
        """Requests whose path contains `part` fail, so many times."""
        self._state.faults.append((part, fault, times))

    def heal(self) -> None:
        """No more faults."""
        self._state.faults.clear()
        self._state.dice = None

    def misbehave(self, dice: random.Random, odds: float, faults: Sequence[Fault] = ALL_FAULTS) -> None:
        """Let every answer that carries content fail with this probability, in one of these ways and at any byte."""
        self._state.dice, self._state.odds, self._state.at_random = dice, odds, tuple(faults)

    def replace_etags(self) -> None:
        """Say at each request that the content is another than it was; otherwise the digest is the ETag."""
        self._state.replaces = True

    def ask_to_wait(self, retry_after: str) -> None:
        """What a 429 says in Retry-After."""
        self._state.retry_after = retry_after

    def require_basic(self, user: str, password: str) -> None:
        """Refuse requests without these credentials."""
        self._state.basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def require_token(self, user: str, password: str) -> None:
        """The same by a bearer token, from a token service at `/token`."""
        self.require_basic(user, password)
        self._state.token = "the-token"

    def require_identity(self, token: str) -> None:
        """The same for who has this identity token, which the token service exchanges."""
        self._state.token, self._state.identity = "the-token", token

    def corrupt_blobs(self) -> None:
        """All content is wrong from now on."""
        self.fail("blobs/", Fault.CORRUPT)

    def redirect_blobs(self, to: LoopbackRegistry) -> None:
        """Send requests for blobs elsewhere."""
        self._state.redirect = to.url

    def hold_blobs(self) -> threading.Event:
        """Blob requests wait until the event is set."""
        self._state.delay = threading.Event()
        return self._state.delay

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        self._state.released.set()
        if self._state.delay is not None:
            self._state.delay.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve(self) -> None:
        """Serve in this thread, for ever."""
        self._server.serve_forever()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    shared: _State
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # type: ignore[explicit-override]  # noqa: A002
        """Quiet."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        if urlsplit(self.path).path == "/token":
            self._exchange(parse_qs(self._body().decode()))
            return
        match = _UPLOAD.fullmatch(urlsplit(self.path).path)
        body = self._body()
        if match is None:
            self._error(404, "NOT_FOUND")
            return
        number = str(next(self.shared.numbers))
        self.shared.uploads[number] = bytearray(body)
        self._answer(202, b"", {"Location": f"/v2/{match['name']}/blobs/uploads/{number}"})

    def do_PATCH(self) -> None:
        match = _UPLOAD.fullmatch(urlsplit(self.path).path)
        body = self._body()
        if match is None or match["id"] not in self.shared.uploads:
            self._error(404, "BLOB_UPLOAD_UNKNOWN")
            return
        self.shared.uploads[match["id"]] += body
        self._answer(202, b"", {"Location": self.path})

    def do_PUT(self) -> None:
        parts = urlsplit(self.path)
        body = self._body()
        upload = _UPLOAD.fullmatch(parts.path)
        if upload is not None:
            data = bytes(self.shared.uploads.pop(upload["id"], bytearray())) + body
            if parse_qs(parts.query).get("digest") != [digest(data)]:
                self._error(400, "DIGEST_INVALID")
                return
            self.shared.blobs[digest(data)] = data
            self._answer(201, b"", {"Location": f"/v2/{upload['name']}/blobs/{digest(data)}"})
            return
        match = _PATH.fullmatch(parts.path)
        if match is None:
            self._error(404, "NOT_FOUND")
            return
        for reference in (match["reference"], digest(body)):
            media_type = self.headers.get("Content-Type", "")
            self.shared.manifests[match["name"], reference] = (body, media_type)
        self._answer(201, b"", {"Location": self.path})

    def _serve(self) -> None:
        state = self.shared
        state.requests.append(f"{self.command} {self.path}")
        path = urlsplit(self.path).path
        if path == "/token":
            self._token()
            return
        fault = self._fault(path)
        if not self._is_allowed() or self._failed_at_once(fault):
            return
        if path in {"/v2", "/v2/"}:
            self._answer(200, b"{}", {"Content-Type": "application/json"})
            return
        match = _PATH.fullmatch(path)
        if match is None:
            self._error(404, "NOT_FOUND")
        elif match["kind"] == "blobs":
            self._serve_blob(match["reference"], fault)
        else:
            self._serve_manifest(match["name"], match["reference"], fault)

    def _serve_blob(self, reference: str, fault: Fault | None) -> None:
        state = self.shared
        if state.redirect:
            self._answer(307, b"", {"Location": f"{state.redirect}{self.path}"})
            return
        if state.delay is not None:
            state.delay.wait(30)
        data = state.blobs.get(reference)
        if data is None:
            self._error(404, "BLOB_UNKNOWN", "blob unknown to registry")
            return
        self._content(data, {"Content-Type": "application/octet-stream"}, fault)

    def _serve_manifest(self, name: str, reference: str, fault: Fault | None) -> None:
        found = self.shared.manifests.get((name, reference))
        if found is None:
            self._error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            return
        body, media_type = found
        headers = {"Content-Type": media_type, "Docker-Content-Digest": digest(body)}
        self._content(body, headers, fault)

    def _content(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        status, start = 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.shared.starts[urlsplit(self.path).path.rpartition("/")[2]].append(int(asked[1]) if asked else 0)
        etag = f'"{next(self.shared.numbers) if self.shared.replaces else digest(data)}"'
        headers = {**headers, "ETag": etag, "Accept-Ranges": "bytes"}
        if asked and fault is not Fault.WHOLE and self.headers.get("If-Range", etag) == etag:
            status, start = 206, int(asked[1]) - (fault is Fault.ELSEWHERE)
            if start >= len(data) or fault is Fault.REFUSE:
                self._error(416, "RANGE_INVALID")
                return
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(status, data[start:], headers, fault)

    def _send(self, status: int, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        place = self._some_place(data)
        match fault:
            case Fault.TRUNCATE | Fault.STALL | Fault.OVERSTATE:
                surplus = 7 if fault is Fault.OVERSTATE else 0
                self._head(status, {**headers, "Content-Length": str(len(data) + surplus)})
                self._write(data if surplus else data[:place])
                self.wfile.flush()
                if fault is Fault.STALL:
                    self.shared.released.wait(60)
                self.close_connection = True
            case Fault.SHORT | Fault.LONG:
                self._head(status, {**headers, "Connection": "close"})
                self._write(data[:place] if fault is Fault.SHORT else data + b"more")
                self.close_connection = True
            case Fault.UNDERSTATE:
                self._answer(status, data[:place], headers)
            case Fault.CORRUPT:
                self._answer(status, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], headers)
            case Fault.HTML:
                self._answer(200, b"<html>log in to the network first</html>", {"Content-Type": "text/html"})
            case _:
                self._answer(status, data, headers)

    def _some_place(self, data: bytes) -> int:
        """The middle, or any byte."""
        dice = self.shared.dice
        if dice is None:
            return len(data) // 2
        with self.shared.lock:
            return dice.randrange(len(data))

    def _write(self, data: bytes) -> None:
        self.shared.sent[urlsplit(self.path).path.rpartition("/")[2]] += len(data)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def _failed_at_once(self, fault: Fault | None) -> bool:
        match fault:
            case Fault.NOT_FOUND:
                self._error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            case Fault.ERROR:
                self._error(500, "UNKNOWN", "the disk is on fire")
            case Fault.DENIED:
                self._error(401, "UNAUTHORIZED", "authentication required")
            case Fault.FORBIDDEN:
                self._error(403, "DENIED", "requested access to the resource is denied")
            case Fault.LIMITED:
                wait = {"Retry-After": self.shared.retry_after} if self.shared.retry_after else {}
                self._error(429, "TOOMANYREQUESTS", "slow down", wait)
            case Fault.CLOSE:
                self.close_connection = True
            case _:
                return False
        return True

    def _fault(self, path: str) -> Fault | None:
        faults = self.shared.faults
        for position, (part, fault, times) in enumerate(faults):
            if part in path and times > 0:
                faults[position] = (part, fault, times - 1)
                return fault
        state = self.shared
        with state.lock:
            fails = state.dice is not None and _PATH.fullmatch(path) and state.dice.random() < state.odds
            return state.dice.choice(state.at_random) if state.dice is not None and fails else None

    def _is_allowed(self) -> bool:
        state = self.shared
        given = self.headers.get("Authorization", "")
        if given:
            state.authorizations.append(given)
        if "Proxy-Authorization" in self.headers:
            state.proxy_authorizations.add(self.headers["Proxy-Authorization"])
        wanted = f"Bearer {state.token}" if state.token else state.basic
        if not wanted or given == wanted:
            return True
        host = self.headers.get("Host", "")
        challenge = 'Basic realm="registry"'
        if state.token:
            challenge = f'Bearer realm="http://{host}/token",service="registry",scope="repository:x:pull"'
        self._error(401, "UNAUTHORIZED", "authentication required", {"WWW-Authenticate": challenge})
        return False

    def _token(self) -> None:
        given = self.headers.get("Authorization", "")
        if given != self.shared.basic:
            self._error(401, "UNAUTHORIZED", "incorrect username or password")
            return
        self._answer(200, json.dumps({"token": self.shared.token}).encode(), {"Content-Type": "application/json"})

    def _exchange(self, form: dict[str, list[str]]) -> None:
        self.shared.requests.append(f"POST {self.path}")
        if form.get("grant_type") != ["refresh_token"] or form.get("refresh_token") != [self.shared.identity]:
            self._error(401, "UNAUTHORIZED", "no such identity")
            return
        body = json.dumps({"access_token": self.shared.token}).encode()
        self._answer(200, body, {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        headers = {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(body))}
        self._head(status, headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self._write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))


if __name__ == "__main__":
    LoopbackRegistry(int(sys.argv[1])).serve()
