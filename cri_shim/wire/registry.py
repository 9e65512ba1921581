"""The pull conversation with a registry: which request comes next, and what an answer means.

Sans-IO: requests and answers are values, no socket, no clock. Not the bytes of a blob: the body of an answer that
carries content is read by whoever drives this. Invariant: credentials go only to the host that they are for and to the
token service that this host names, and no error text contains any.

    content request ──200──▶ Accepted
          │ 401 + challenge, not yet answered ─▶ [token request ─200─▶] the same again with Authorization
          │ 30x ─▶ the same at the new place, without credentials when it is another origin
          └ anything else ─▶ RegistryError

Sources: OCI distribution-spec 1.1; distribution "Token Authentication Specification"; RFC 9110 and 7235.
"""

from __future__ import annotations

import base64
import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlencode, urljoin, urlsplit

import msgspec

from cri_shim.model.errors import InvalidArgument, PullError
from cri_shim.model.ids import Digest
from cri_shim.model.refs import ImageRef
from cri_shim.wire.oci_image import MANIFEST_TYPES
from cri_shim.wire.registry_hosts import RegistryHost

MAX_REDIRECTS: Final = 10
MAX_TOKEN_ANSWER: Final = 1 << 20
MAX_WAIT: Final = 60.0
"""Seconds within one pull; who asks for more is asked again by the kubelet, later."""
UNAVAILABLE_PREFIX: Final = "RegistryUnavailable: "
"""The kubelet looks for it at the start of a message (cri-api `pkg/errors`)."""
_CLIENT_ID = "cri-shim"
_SHOWN = 300  # characters of a registry's own words in an error


@dataclass(frozen=True, slots=True)
class Credentials:
    """What proves who asks. Hashable: pulls with different credentials never share work."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """Exchanged at the token service (OAuth2 refresh token)."""
    registry_token: str = field(default="", repr=False)
    """Sent to the registry as it is."""
    server: str = ""
    """The only host that gets them; empty: whichever the image's registry is configured to be."""

    @property
    def basic(self) -> str:
        """The value of an Authorization header, or nothing."""
        if not self.username and not self.password:
            return ""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class Request:
    """What to send. `body` makes it a POST of a form."""

    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Header names are lower case; `body` is only looked at where `wants_body` said so."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


class Accepted(enum.Enum):
    """The answer carries the content."""

    ACCEPTED = 1


class Failure(enum.Enum):
    """What an error means for the next host and for the user."""

    UNAVAILABLE = enum.auto()
    NOT_FOUND = enum.auto()
    DENIED = enum.auto()
    OTHER = enum.auto()


class RegistryError(PullError):
    """A host refused or failed; another one may do better."""

    def __init__(self, failure: Failure, cause: str, *, hint: str = "", retry_after: float = 0) -> None:
        prefix = UNAVAILABLE_PREFIX if failure is Failure.UNAVAILABLE else ""
        super().__init__(prefix + cause, hint=hint)
        self.failure = failure
        self.retry_after = retry_after
        """Seconds that the host wants to be left alone, where it says so."""


class RangeError(RegistryError):
    """The host does not give the part that was asked for; it may give the whole."""


class Retries:
    """When the same is asked again: soon after a transfer that got on before it broke, else later and later, then no
    more. Only what may pass by itself is tried again, and nobody waits longer than MAX_WAIT for a host that says when.
    """

    def __init__(self, delays: Sequence[float]) -> None:
        self._delays = tuple(delays)
        self._failed = 0

    def delay(self, error: RegistryError, *, progressed: bool) -> float | None:
        """Seconds to wait; None: give up."""
        if progressed:
            self._failed = 0
        if error.failure is not Failure.UNAVAILABLE or self._failed >= len(self._delays):
            return None
        delay = max(self._delays[self._failed], error.retry_after)
        self._failed += 1
        return delay if delay <= MAX_WAIT else None


def parse_credentials(
    *, username: str, password: str, auth: str, identity_token: str, registry_token: str, server_address: str
) -> Credentials | None:
    """CRI `AuthConfig`; None when it says nothing.

    `auth` is base64 of `user:password`, padded with NULs by some clients; InvalidArgument when it is not.
    """
    if auth and not username and not password:
        try:
            text = base64.b64decode(auth, validate=True).decode().strip("\0")
        except ValueError:  # not base64, not ASCII, not UTF-8
            raise InvalidArgument("auth.auth is not base64 of user:password") from None
        username, colon, password = text.partition(":")
        if not colon:
            raise InvalidArgument("auth.auth is not base64 of user:password")
        password = password.strip("\0")
    if not (username or password or identity_token or registry_token):
        return None
    server = urlsplit(server_address if "://" in server_address else f"//{server_address}").netloc
    return Credentials(username, password, identity_token, registry_token, server)


class Conversation:
    """One host, one repository: keeps what the host has asked to be authorised with.

    `manifest` and `blob` begin a request; `receive` says what follows from each answer.
    """

    def __init__(self, host: RegistryHost, ref: ImageRef, credentials: Credentials | None) -> None:
        self.host = host
        self._ref = ref
        self._credentials = credentials if _are_for(credentials, host, ref) else None
        token = self._credentials.registry_token if self._credentials else ""
        self._authorization = f"Bearer {token}" if token else ""

    def manifest(self, reference: str) -> Exchange:
        """Ask for a manifest or index by tag or digest."""
        accept = ", ".join((*MANIFEST_TYPES, "*/*;q=0.1"))
        return self._begin(f"manifests/{reference}", accept, f"manifest {self._ref.text}")

    def blob(self, digest: Digest, offset: int = 0, etag: str = "") -> Exchange:
        """Ask for a blob, or for what follows its first `offset` bytes; `etag` is what they came with."""
        span: tuple[tuple[str, str], ...] = (("Range", f"bytes={offset}-"),) if offset else ()
        if offset and etag.startswith('"'):  # a weak one says nothing of bytes (RFC 9110, 13.1.5)
            span = (*span, ("If-Range", etag))
        return self._begin(f"blobs/{digest}", "*/*", f"blob {digest}", span)

    def _begin(self, resource: str, accept: str, what: str, span: tuple[tuple[str, str], ...] = ()) -> Exchange:
        url = f"{self.host.url}/{self._ref.path}/{resource}"
        if self.host.is_mirror:
            url += "?" + urlencode({"ns": self._ref.domain})
        # A compressed answer would be hashed as it is on the wire, not as the digest says.
        headers = (("Accept", accept), ("Accept-Encoding", "identity"), *span, *self.host.headers)
        return Exchange(self, Request(url, headers), what)

    @property
    def authorization(self) -> str:
        """The header value that content requests to the host carry; empty for none."""
        return self._authorization

    def authorise(self, value: str) -> None:
        """From now on requests to the host carry this."""
        self._authorization = value

    @property
    def credentials(self) -> Credentials | None:
        """Those that are meant for this host."""
        return self._credentials

    @property
    def scope(self) -> str:
        """The access that a token is asked for."""
        return f"repository:{self._ref.path}:pull"


class Exchange:
    """One piece of content: send `request`, hand the answer to `receive`, until it says Accepted."""

    def __init__(self, conversation: Conversation, content: Request, what: str) -> None:
        self._conversation = conversation
        self._content = content
        self._what = what
        self._redirects = 0
        self._challenged = False
        self._token_request: Request | None = None
        self.request = self._authorised(content)

    @property
    def wants_body(self) -> bool:
        """True when the answer to `request` is for `receive` as a whole, whatever its status."""
        return self._token_request is not None

    def receive(self, answer: Answer) -> Accepted | None:
        """None: send the new `request`. Raises RegistryError.

        The body of an answer with an error status is used for the error's text.
        """
        if self._token_request is not None:
            self._take_token(answer)
            return None
        if answer.status in {301, 302, 303, 307, 308}:
            self._follow(answer)
            return None
        if answer.status == 401 and not self._challenged and self._redirects == 0:
            self._challenged = True
            self._meet_challenge(answer)
            return None
        if answer.status in {200, 206}:
            return Accepted.ACCEPTED
        raise self._error(answer)

    def _authorised(self, content: Request) -> Request:
        value = self._conversation.authorization
        if not value or _origin(content.url) != _origin(self._conversation.host.url):
            return content
        return replace(content, headers=(*content.headers, ("Authorization", value)))

    def _follow(self, answer: Answer) -> None:
        self._redirects += 1
        place = urljoin(self._content.url, answer.headers.get("location", ""))
        parts = urlsplit(place)
        if self._redirects > MAX_REDIRECTS or parts.scheme not in {"http", "https"} or not parts.netloc:
            raise self._failed(Failure.OTHER, "redirects without end or to nowhere")
        if self._content.url.startswith("https:") and parts.scheme == "http":
            raise self._failed(Failure.OTHER, f"redirects from https to plain http at {parts.netloc}")
        same = _origin(place) == _origin(self._conversation.host.url)
        own = {name for name, _ in self._conversation.host.headers}
        headers = tuple(pair for pair in self._content.headers if same or pair[0] not in own)
        self._content = Request(place, headers)
        self.request = self._authorised(self._content)

    def _meet_challenge(self, answer: Answer) -> None:
        challenges = parse_challenges(answer.headers.get("www-authenticate", ""))
        credentials = self._conversation.credentials
        if "bearer" in challenges:
            self._token_request = self.request = self._ask_token(challenges["bearer"], credentials)
            return
        if "basic" in challenges and credentials is not None and credentials.basic:
            self._conversation.authorise(credentials.basic)
            self.request = self._authorised(self._content)
            return
        raise self._error(answer)

    def _ask_token(self, challenge: Mapping[str, str], credentials: Credentials | None) -> Request:
        realm = challenge.get("realm", "")
        parts = urlsplit(realm)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise self._failed(Failure.OTHER, "asks for a token but names no service to get it from")
        has_secret = credentials is not None and (credentials.basic or credentials.identity_token)
        if has_secret and parts.scheme == "http" and self._conversation.host.url.startswith("https:"):
            raise self._failed(Failure.OTHER, f"wants credentials sent over plain http to {parts.netloc}")
        scope = challenge.get("scope") or self._conversation.scope
        fields = {"service": challenge.get("service", ""), "scope": scope}
        if credentials is not None and credentials.identity_token:
            form = {**fields, "grant_type": "refresh_token", "refresh_token": credentials.identity_token}
            body = urlencode({**form, "client_id": _CLIENT_ID}).encode()
            return Request(realm, (("Content-Type", "application/x-www-form-urlencoded"),), body)
        query = urlencode({key: value for key, value in fields.items() if value})
        headers = (("Authorization", credentials.basic),) if credentials is not None and credentials.basic else ()
        return Request(f"{realm}{'&' if parts.query else '?'}{query}", headers)

    def _take_token(self, answer: Answer) -> None:
        asked, self._token_request = self._token_request, None
        service = urlsplit(asked.url).netloc if asked is not None else ""
        if answer.status != 200:
            raise self._error(answer, at=f"the token service {service}")
        try:
            token = msgspec.json.decode(answer.body, type=_Token)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._failed(Failure.OTHER, f"sent us to {service}, whose token cannot be read") from None
        value = token.token or token.access_token
        if not value or not value.isprintable():
            raise self._failed(Failure.OTHER, f"sent us to {service}, which gave no token")
        self._conversation.authorise(f"Bearer {value}")
        self.request = self._authorised(self._content)

    def _error(self, answer: Answer, at: str = "") -> RegistryError:
        where = at or f"registry {urlsplit(self._content.url).netloc}"
        said = _words(answer.body)
        detail = f" ({said})" if said else ""
        match answer.status:
            case 404 if not at:
                return RegistryError(Failure.NOT_FOUND, f"{self._what} not found at {where}{detail}")
            case 401 | 403:
                return RegistryError(
                    Failure.DENIED,
                    f"{where} refuses {self._what}: HTTP {answer.status}{detail}",
                    hint="give credentials that may pull it (an imagePullSecret)"
                    if self._conversation.credentials is None
                    else "the credentials given are wrong or do not allow it",
                )
            case 416:
                return RangeError(Failure.OTHER, f"{where} does not give a part of {self._what}{detail}")
            case status if status == 429 or status >= 500:
                reason = ": too many requests" if status == 429 else ""
                wait = retry_after(answer.headers)
                return RegistryError(
                    Failure.UNAVAILABLE,
                    f"{where} answers {self._what} with HTTP {status}{reason}{detail}",
                    hint=f"it asks to wait {wait:.0f} s" if wait else "",
                    retry_after=wait,
                )
            case status:
                return RegistryError(Failure.OTHER, f"{where} answers {self._what} with HTTP {status}{detail}")

    def _failed(self, failure: Failure, reason: str) -> RegistryError:
        return RegistryError(failure, f"registry {self._conversation.host.authority} {reason} ({self._what})")


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""


class _ErrorItem(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct, frozen=True):
    errors: tuple[_ErrorItem, ...] = ()


_CHALLENGE = re.compile(
    r"([A-Za-z][A-Za-z0-9-]*)\s+(?=[A-Za-z]+\s*=)|([A-Za-z_]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,]+))"
)
_BARE_SCHEME = re.compile(r"^\s*([A-Za-z][A-Za-z0-9-]*)\s*$")


def parse_challenges(header: str) -> dict[str, dict[str, str]]:
    """`WWW-Authenticate`: the parameters of each scheme, all names in lower case (RFC 7235)."""
    bare = _BARE_SCHEME.match(header)
    if bare:
        return {bare[1].lower(): {}}
    challenges: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for found in _CHALLENGE.finditer(header[:8192]):
        scheme, name, quoted, plain = found.groups()
        if scheme is not None:
            current = challenges.setdefault(scheme.lower(), {})
        else:
            current[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
    return challenges


_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def content_start(answer: Answer, asked: int, size: int) -> int:
    """Where the content of an accepted answer begins in a blob of `size` bytes. RangeError for another part."""
    if answer.status == 200:
        return 0
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", "").strip())
    if found is None or int(found[1]) != asked or found[2] not in {"*", str(size)}:
        raise RangeError(Failure.OTHER, f"expected the bytes from {asked} of {size}, the registry sent others")
    return asked


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait (RFC 9110, 10.2.3); 0 when it does not say.

    A date counts from the answer's own date, so that no clock has to be right.
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        then, now = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (then - now).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _are_for(credentials: Credentials | None, host: RegistryHost, ref: ImageRef) -> bool:
    if credentials is None or not credentials.server:
        return True
    aliases = {"index.docker.io": "docker.io", "registry-1.docker.io": "docker.io"}
    wanted = aliases.get(credentials.server, credentials.server)
    there = aliases.get(host.authority, host.authority)
    return wanted in ({there} if host.is_mirror else {there, ref.domain})


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _words(body: bytes) -> str:
    """The registry's own error text, on one line, or nothing."""
    try:
        items = msgspec.json.decode(body, type=_Errors).errors
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    said = "; ".join(": ".join(part for part in (item.code, item.message) if part) for item in items)
    return "".join(character if character.isprintable() else " " for character in said)[:_SHOWN]
