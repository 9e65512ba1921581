"""Docker's `config.json`: which credentials a registry gets, and which helper program has them.

Pure: the text of the file and what a helper said come in. Not a keychain. Invariant: no error text has a secret in it.

Sources: docker/cli `cli/config`, docker-credential-helpers (protocol of `get`), containers-auth.json(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.refs import DEFAULT_DOMAIN, ImageRef
from cri_shim.wire.registry import Credentials, parse_credentials

_DOCKER_HUB: Final = "https://index.docker.io/v1/"
_ALIASES: Final = {"index.docker.io": DEFAULT_DOMAIN, "registry-1.docker.io": DEFAULT_DOMAIN}
_HELPER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN_USER: Final = "<token>"  # noqa: S105  the name by which a helper says that the secret is an identity token
_NOT_FOUND: Final = b"credentials not found in native keychain"


@dataclass(frozen=True, slots=True)
class Helper:
    """Ask `docker-credential-<name> get`, with the server on its standard input."""

    name: str
    server: str

    @property
    def program(self) -> str:
        return f"docker-credential-{self.name}"


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""

    @property
    def is_empty(self) -> bool:
        """As docker leaves it where a helper has the secret."""
        return self == _Entry()


class _File(msgspec.Struct, frozen=True, rename="camel"):
    auths: dict[str, _Entry] = {}
    creds_store: str = ""
    cred_helpers: dict[str, str] = {}


class _Answer(msgspec.Struct, frozen=True, rename="pascal"):
    username: str = ""
    secret: str = ""


class AuthFile:
    """One reading of a file; FailedPrecondition that names it when it cannot be used."""

    def __init__(self, text: bytes, name: str) -> None:
        self._name = name
        try:
            self._file = msgspec.json.decode(text, type=_File)
        except (msgspec.DecodeError, UnicodeDecodeError):  # its text may quote what it read
            raise self._unusable("it is not JSON in the format of docker's config.json") from None

    def find(self, ref: ImageRef) -> Credentials | Helper | None:
        """What the most specific entry says: of the repository, of a part of its path, or of its registry.

        A helper that is named for the registry goes first, one for all registries last.
        """
        helper = {_normalised(key): value for key, value in self._file.cred_helpers.items()}.get(ref.domain)
        if helper:
            return self._helper(helper, ref)
        entries = {_normalised(key): (key, entry) for key, entry in self._file.auths.items() if not entry.is_empty}
        parts = ref.name.split("/")
        for length in range(len(parts), 0, -1):
            found = entries.get("/".join(parts[:length]))
            if found is not None:
                return self._credentials(*found)
        return self._helper(self._file.creds_store, ref) if self._file.creds_store else None

    def _credentials(self, key: str, entry: _Entry) -> Credentials | None:
        try:
            return parse_credentials(
                username=entry.username,
                password=entry.password,
                auth=entry.auth,
                identity_token=entry.identitytoken,
                registry_token=entry.registrytoken,
                server_address="",
            )
        except InvalidArgument:
            raise self._unusable(f"auth of {key!r} is not base64 of user:password") from None

    def _helper(self, name: str, ref: ImageRef) -> Helper:
        if _HELPER_NAME.fullmatch(name) is None:
            raise self._unusable(f"{name!r} is not the name of a credential helper")
        return Helper(name, _DOCKER_HUB if ref.domain == DEFAULT_DOMAIN else ref.domain)

    def _unusable(self, reason: str) -> FailedPrecondition:
        return FailedPrecondition(f"{self._name}: {reason}", hint="look at images.auth_file")


def parse_helper_answer(helper: Helper, returncode: int, stdout: bytes) -> Credentials | None:
    """What a helper has said. FailedPrecondition that names it; what it wrote is not repeated, it may be the secret."""
    if returncode != 0:
        if stdout.strip() == _NOT_FOUND:
            return None
        hint = f"run it by hand: echo {helper.server} | {helper.program} get"
        msg = f"credential helper {helper.program} ended with status {returncode} for {helper.server}"
        raise FailedPrecondition(msg, hint=hint)
    try:
        answer = msgspec.json.decode(stdout, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        msg = f"credential helper {helper.program} gave no JSON for {helper.server}"
        raise FailedPrecondition(msg) from None
    if answer.username == _TOKEN_USER:
        return Credentials(identity_token=answer.secret)
    return Credentials(answer.username, answer.secret) if answer.username or answer.secret else None


def _normalised(key: str) -> str:
    """`https://index.docker.io/v1/` and `docker.io` are one registry."""
    name = key.partition("://")[2] if "://" in key else key
    host, _, path = name.strip("/").partition("/")
    host = _ALIASES.get(host, host)
    return host if path in {"", "v1", "v2"} else f"{host}/{path}"
