"""Drives the pull conversation over HTTP, with aiohttp: hosts and mirrors, TLS, stall detection, streaming to disk.

What to ask and what an answer means is decided in `cri_shim.wire.registry`. Invariant: what is returned or written has
been verified against its digest, or (a manifest by tag) carries the digest that was computed from its bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from cri_shim.adapters.content import Ingest, WrongContentError
from cri_shim.adapters.registry_auth import RegistryAuth
from cri_shim.adapters.shielded import to_the_end
from cri_shim.kernel.pauses import late_import
from cri_shim.model.errors import FailedPrecondition, PullError
from cri_shim.model.ids import Digest
from cri_shim.model.refs import ImageRef
from cri_shim.wire.oci_image import digest_of
from cri_shim.wire.proxy import Proxies
from cri_shim.wire.registry import (
    MAX_TOKEN_ANSWER,
    UNAVAILABLE_PREFIX,
    Accepted,
    Answer,
    Conversation,
    Credentials,
    Exchange,
    Failure,
    RangeError,
    RegistryError,
    Request,
    Retries,
    content_start,
)
from cri_shim.wire.registry_hosts import (
    FILE_NAME,
    Capability,
    RegistryHost,
    Tls,
    default_host,
    directory_names,
    parse_hosts,
)

if TYPE_CHECKING:
    import ssl

    import aiohttp

T = TypeVar("T")

MAX_MANIFEST: Final = 4 << 20
_BATCH: Final = 1 << 19
"""Bytes that are handed to a thread at once, to be hashed and written."""
_BATCH_SECONDS: Final = 0.5
"""Over a slow line fewer, or a killed daemon would lose much."""
_CONNECT_SECONDS: Final = 30.0
_DELAYS: Final = (0.2, 1.0)
_ERROR_BODY: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as the registry has it."""

    body: bytes
    media_type: str
    digest: Digest


class Registry:
    """One HTTP session for all registries, made at the first pull."""

    def __init__(
        self,
        config_dirs: Sequence[Path],
        *,
        auth: RegistryAuth | None = None,
        proxies: Proxies | None = None,
        stall_seconds: float = 60.0,
        delays: Sequence[float] = _DELAYS,
    ) -> None:
        self.delays = tuple(delays)
        """Seconds before each new attempt at what fails and may pass."""
        self._config_dirs = tuple(config_dirs)
        self._auth = auth or RegistryAuth(None)
        self._proxies = proxies or Proxies({})
        self._stall_seconds = stall_seconds
        self._session: aiohttp.ClientSession | None = None
        self._opening = asyncio.Lock()

    async def repository(self, ref: ImageRef, credentials: Credentials | None) -> Repository:
        """The repository of a reference; without credentials with the node's own ones.

        Reads `hosts.toml` and the node's credentials anew. FailedPrecondition when one of them is broken.
        """
        if credentials is None:
            credentials = await self._auth.credentials(ref)
        hosts = await asyncio.to_thread(_read_hosts, self._config_dirs, ref.domain)
        return Repository(self, tuple(Conversation(host, ref, credentials) for host in hosts), ref)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @contextlib.asynccontextmanager
    async def open(self, exchange: Exchange, host: RegistryHost) -> AsyncGenerator[Body]:
        """Hold the conversation until the content is there; its body is the caller's to read."""
        session = await self._ensure_session()
        tls = await self._tls(host.tls)
        while True:
            with _network_errors(host):
                response = await self._send(session, exchange.request, host, tls)
            async with response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                content = Body(host, response, Answer(response.status, headers))
                words = b""
                if exchange.wants_body or response.status >= 400:
                    words = await content.read(MAX_TOKEN_ANSWER if exchange.wants_body else _ERROR_BODY)
                if exchange.receive(Answer(response.status, headers, words)) is Accepted.ACCEPTED:
                    yield content
                    return

    async def _send(
        self, session: aiohttp.ClientSession, request: Request, host: RegistryHost, tls: ssl.SSLContext | bool
    ) -> aiohttp.ClientResponse:
        import aiohttp  # noqa: PLC0415  10 MiB that only a pull needs

        proxy = self._proxies.for_url(request.url)
        seconds = host.connect_seconds or _CONNECT_SECONDS
        return await session.request(
            "GET" if request.body is None else "POST",
            request.url,
            headers=request.headers,
            data=request.body,
            allow_redirects=False,
            ssl=tls,
            proxy=proxy,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=self._stall_seconds),
        )

    async def _ensure_session(self) -> aiohttp.ClientSession:
        async with self._opening:
            if self._session is None:
                library = await late_import("aiohttp")
                self._session = library.ClientSession(
                    connector=library.TCPConnector(limit=0, limit_per_host=16),
                    cookie_jar=library.DummyCookieJar(),
                    auto_decompress=False,
                    read_bufsize=_BATCH,
                    headers={"User-Agent": "cri-shim"},
                )
            return self._session

    async def _tls(self, tls: Tls) -> ssl.SSLContext | bool:
        """True is aiohttp's own context: the system's certificates."""
        if tls == Tls():
            return True
        # In a thread: reading the system's certificates takes tens of milliseconds. Anew for each request, as the
        # files may have been replaced.
        return await asyncio.to_thread(_tls_context, tls)


@dataclass(frozen=True, slots=True)
class Body:
    """The content of an answer, not yet read."""

    host: RegistryHost
    response: aiohttp.ClientResponse
    answer: Answer

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        return self.answer.headers

    @property
    def length(self) -> int | None:
        """Bytes, where the registry says it."""
        return self.response.content_length

    async def chunks(self) -> AsyncGenerator[bytes]:
        """What arrives, as it arrives. RegistryError when the connection breaks."""
        with _network_errors(self.host):
            async for chunk in self.response.content.iter_any():
                yield chunk

    async def read(self, limit: int) -> bytes:
        """At most the first `limit` bytes."""
        data = bytearray()
        async for chunk in self.chunks():
            data += chunk
            if len(data) >= limit:
                break
        return bytes(data[:limit])


class Repository:
    """One image name, over all hosts that are configured for its registry. Keeps the tokens of one pull."""

    def __init__(self, registry: Registry, conversations: Sequence[Conversation], ref: ImageRef) -> None:
        self._registry = registry
        self._conversations = tuple(conversations)
        self._ref = ref
        self._sources: dict[Digest, Conversation] = {}
        """Who has sent the last of a blob."""
        self._liars: set[Conversation] = set()
        """Who has sent a blob that was wrong: the last to be asked."""

    async def resolve(self) -> Document:
        """The manifest or index that the reference stands for. Raises PullError."""
        if self._ref.digest is not None:
            return await self.manifest(self._ref.digest)
        tag = self._ref.tag or ""
        return await self._ask(Capability.RESOLVE, lambda host: self._manifest(host, tag, None))

    async def manifest(self, digest: Digest) -> Document:
        """A manifest or index by digest. Raises PullError."""
        return await self._ask(Capability.PULL, lambda host: self._manifest(host, digest, digest))

    async def blob(self, ingest: Ingest) -> None:
        """Complete and verify a blob, from where `ingest` is. Raises PullError, ResourceExhausted.

        WrongContentError: the ingest is of no more use; a new one may get the right content, from another host or
        over one connection (`worth_another`).
        """
        try:
            if ingest.received < ingest.size or not ingest.size:
                await self._ask(Capability.PULL, lambda host: self._blob(host, ingest), lambda: ingest.received)
            await asyncio.to_thread(ingest.verify)
        except WrongContentError as error:
            source = self._sources.get(ingest.digest)
            if source is not None and not error.pieced:
                self._liars.add(source)
            raise

    def worth_another(self, error: WrongContentError) -> bool:
        """Whether the next attempt at a blob that was wrong will be different."""
        pullable = {each for each in self._conversations if Capability.PULL in each.host.capabilities}
        return error.pieced or bool(pullable - self._liars)

    async def _ask(
        self, capability: Capability, attempt: Callable[[Conversation], Awaitable[T]], received: Callable[[], int] = int
    ) -> T:
        """Ask all hosts in turn, and again as long as that makes sense."""
        retries = Retries(self._registry.delays)
        while True:
            before = received()
            try:
                return await self._ask_hosts(capability, attempt)
            except RegistryError as error:
                delay = retries.delay(error, progressed=received() > before)
                if delay is None:
                    raise
            await asyncio.sleep(delay)

    async def _ask_hosts(self, capability: Capability, attempt: Callable[[Conversation], Awaitable[T]]) -> T:
        """The first host that answers; with none, the error of the last one, which is the registry itself."""
        failed: list[tuple[RegistryHost, RegistryError]] = []
        hosts = [each for each in self._conversations if capability in each.host.capabilities]
        for conversation in [each for each in hosts if each not in self._liars] or hosts:
            try:
                return await attempt(conversation)
            except WrongContentError:
                raise
            except RegistryError as error:
                failed.append((conversation.host, error))
        if not failed:
            msg = f"no host of registry {self._ref.domain} has the capability {capability.value!r}"
            raise PullError(msg, hint=f"look at its {FILE_NAME}")
        *mirrors, (_, last) = failed
        if not mirrors:
            raise last
        others = "; ".join(f"{host.authority}: {error.cause}" for host, error in mirrors)
        hint = f"{last.hint}; " if last.hint else ""
        cause = last.cause.removeprefix(UNAVAILABLE_PREFIX)
        raise RegistryError(
            last.failure, cause, hint=f"{hint}before that, {others}", retry_after=last.retry_after
        ) from last

    async def _manifest(self, conversation: Conversation, reference: str, expected: Digest | None) -> Document:
        async with self._registry.open(conversation.manifest(reference), conversation.host) as content:
            body = await content.read(MAX_MANIFEST + 1)
        media_type = content.headers.get("content-type", "")
        announced = content.headers.get("docker-content-digest", "")
        where = f"the manifest of {self._ref.text} from {conversation.host.authority}"
        if len(body) > MAX_MANIFEST:
            raise RegistryError(Failure.OTHER, f"{where} is larger than {MAX_MANIFEST} bytes")
        digest = await asyncio.to_thread(digest_of, body)
        wanted = expected or announced
        if wanted.startswith("sha256:") and wanted != digest:
            raise RegistryError(Failure.OTHER, f"{where}: expected content with digest {wanted}, got {digest}")
        return Document(body, media_type, digest)

    async def _blob(self, conversation: Conversation, ingest: Ingest) -> None:
        had = ingest.received
        try:
            try:
                await self._transfer(conversation, ingest, ingest.received)
            except RangeError:
                await self._transfer(conversation, ingest, 0)
        except WrongContentError:
            raise
        except RegistryError as error:
            progress = f" after {ingest.received} of {ingest.size} bytes" if ingest.received > had else ""
            cause = f"{ingest.what}: {error.cause.removeprefix(UNAVAILABLE_PREFIX)}{progress}"
            raise RegistryError(error.failure, cause, hint=error.hint, retry_after=error.retry_after) from error

    async def _transfer(self, conversation: Conversation, ingest: Ingest, offset: int) -> None:
        """What is missing, over one connection; a host that knows no ranges sends what is here already once more."""
        host = conversation.host
        known_by, etag = ingest.etag
        etag = etag if known_by == host.url else ""
        async with self._registry.open(conversation.blob(ingest.digest, offset, etag), host) as content:
            start = content_start(content.answer, offset, ingest.size)
            if content.length is not None and content.length != ingest.size - start:
                says = f"registry {host.authority} announces {content.length}"
                raise RegistryError(Failure.OTHER, f"expected {ingest.size - start} bytes, {says}")
            now = content.headers.get("etag", "")
            if etag and now and now != etag and start == 0:
                reason = f"registry {host.authority} has replaced it meanwhile"
                raise await asyncio.to_thread(ingest.wrong, reason, pieced=True)
            ingest.etag = (host.url, now)
            ingest.connections += 1
            self._sources[ingest.digest] = conversation
            await _stream(content, ingest, ingest.received - start)
        if ingest.received < ingest.size:
            raise _unavailable(host, "the connection ended early")


async def _stream(content: Body, ingest: Ingest, skip: int) -> None:
    """Write each batch in a thread while the next one arrives, but for the first `skip` bytes."""
    writing: asyncio.Future[None] | None = None
    try:
        async for batch in _batches(content, skip):
            if writing is not None:
                await asyncio.shield(writing)
            writing = asyncio.ensure_future(asyncio.to_thread(ingest.write, batch))
    finally:
        if writing is not None:
            # Also when cancelled: the thread uses the file that is closed next.
            await to_the_end(_ended(writing))
    if writing is not None:
        writing.result()


async def _batches(content: Body, skip: int) -> AsyncGenerator[list[bytes]]:
    """What arrives, in portions that are worth a thread, or once in a while; also what came before it broke off."""
    clock = asyncio.get_running_loop().time
    batch: list[bytes] = []
    size, since = 0, clock()
    try:
        async for chunk in content.chunks():
            if skip:
                chunk, skip = chunk[skip:], max(0, skip - len(chunk))  # noqa: PLW2901
            batch.append(chunk)
            size += len(chunk)
            if size >= _BATCH or clock() - since > _BATCH_SECONDS:
                yield batch
                batch, size, since = [], 0, clock()
    except (RegistryError, asyncio.CancelledError):
        if batch:
            yield batch
        raise
    if batch:
        yield batch


async def _ended(writing: asyncio.Future[None]) -> None:
    await asyncio.wait((writing,))


@contextlib.contextmanager
def _network_errors(host: RegistryHost) -> Generator[None]:
    import aiohttp  # noqa: PLC0415  10 MiB that only a pull needs

    try:
        yield
    except (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError) as error:
        hint = "name its CA in hosts.toml (ca), or fix its certificate"
        raise RegistryError(Failure.OTHER, f"TLS with registry {host.authority} failed: {error}", hint=hint) from error
    except TimeoutError as error:
        raise _unavailable(host, "it sends nothing") from error
    except aiohttp.ClientPayloadError as error:
        raise _unavailable(host, "the connection broke within an answer") from error
    except aiohttp.ClientHttpProxyError as error:  # its text has the proxy's URL in it, and that may have a password
        raise _unavailable(host, f"the proxy answers with HTTP {error.status}") from None
    except aiohttp.ClientConnectorError as error:
        raise _unavailable(host, f"cannot connect: {error.os_error.strerror or error.os_error}") from error
    except (aiohttp.ClientConnectionError, OSError) as error:
        raise _unavailable(host, str(error) or "the connection broke") from error
    except (aiohttp.ClientError, ValueError) as error:
        msg = f"registry {host.authority} does not speak HTTP as expected: {error}"
        raise RegistryError(Failure.OTHER, msg) from error


def _unavailable(host: RegistryHost, reason: str) -> RegistryError:
    return RegistryError(Failure.UNAVAILABLE, f"registry {host.authority}: {reason}")


def _read_hosts(directories: Sequence[Path], domain: str) -> tuple[RegistryHost, ...]:
    """The first `hosts.toml` there is, else the registry itself."""
    for directory in directories:
        for name in directory_names(domain):
            file = directory / name / FILE_NAME
            try:
                text = file.read_text()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, UnicodeDecodeError) as error:
                msg = f"cannot read {file}: {error}"
                raise FailedPrecondition(msg) from error
            return parse_hosts(text, domain, file)
    return (default_host(domain),)


def _tls_context(tls: Tls) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415  comes with aiohttp, at the first pull

    try:
        context = ssl.create_default_context()
        for path in tls.ca:
            context.load_verify_locations(path)
        for certificate, key in tls.client:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(path) for path in (*tls.ca, *(path for pair in tls.client for path in pair if path)))
        msg = f"cannot load {files} for TLS with a registry: {error}"
        raise FailedPrecondition(msg, hint=f"look at its {FILE_NAME}") from error
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
