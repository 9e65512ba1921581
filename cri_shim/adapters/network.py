"""Pod networks: the CNI configuration in force, and the plugins that attach and detach a pod.

Not for `lo` (kernel.namespaces) and not for host-network pods. Invariant: an attachment that failed has been detached
again, and one that succeeded can always be detached: with the configuration that it was made with.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri_shim.kernel import process
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument
from cri_shim.wire import cni
from cri_shim.wire.cni import Attachment, PortMapping, Verb

__all__ = ["Attachment", "Network", "NetworkResult", "NetworkStatus", "PortMapping"]

_FILE_LIMIT: Final = 1 << 20
_PLUGIN_SECONDS: Final = 60.0
_ASKING_SECONDS: Final = 10.0
"""For what changes nothing of a pod: CHECK, STATUS, GC."""
_NOT_READY: Final = "NetworkPluginNotReady"

_Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """The CRI condition NetworkReady; reason and message are empty when it is."""

    ready: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class NetworkResult:
    """An attachment: the pod's addresses, IPv4 first, and what `delete` needs, to be stored with the pod."""

    ips: tuple[str, ...]
    raw: bytes


class Network:
    """The network of this node: the first configuration, in lexical order, of the first directory that has one."""

    def __init__(self, conf_dirs: Sequence[Path], bin_dirs: Sequence[Path]) -> None:
        self._conf_dirs = tuple(conf_dirs)
        self._bin_dirs = tuple(bin_dirs)
        self._signature: _Signature | None = None
        self._loaded: cni.NetworkConfig | CriShimError | None = None

    def status(self) -> NetworkStatus:
        """Whether a pod could be attached now. Some stat calls; a changed file is read again."""
        try:
            network = self._network()
            for plugin in network.plugins:
                self._program(plugin.type)
        except CriShimError as error:
            return NetworkStatus(ready=False, reason=_NOT_READY, message=str(error))
        return NetworkStatus(ready=True, reason="", message="")

    def has_status(self) -> bool:
        """Whether the plugins of the network in force can say themselves how they are: `ask`. As cheap as `status`."""
        try:
            return self._network().has(Verb.STATUS)
        except CriShimError:
            return False

    async def ask(self) -> NetworkStatus:
        """What the plugins say about themselves: STATUS of each one, in order, up to the first that is not ready."""
        try:
            network = self._network()
            for plugin in network.plugins:
                await self._call(Verb.STATUS, network, plugin, cni.stdin_for_status(network, plugin))
        except (CriShimError, OSError) as error:
            return NetworkStatus(ready=False, reason=_NOT_READY, message=str(error))
        return NetworkStatus(ready=True, reason="", message="")

    async def check(self, attachment: Attachment, cached: bytes) -> bool:
        """Have a pod's attachment looked at by the plugins that made it: CHECK of each one, in order.

        False when the network it was made with has no such verb. Internal names the first plugin that is not content.
        """
        network, result = cni.parse_cached(cached)
        if not network.has(Verb.CHECK):
            return False
        for plugin in network.plugins:
            stdin = cni.stdin_for_check(network, plugin, attachment, result)
            await self._call(Verb.CHECK, network, plugin, stdin, attachment)
        return True

    async def collect_garbage(self, attached: Sequence[tuple[str, bytes | None]]) -> bool:
        """Have the plugins of the network in force remove what belongs to no pod: GC of each one.

        `attached` are the ids of the pods that are attached, with what `add` returned; where that is unknown the pod
        counts for every network. Nothing may be attached meanwhile. False when the network has no such verb or there
        is none; Internal, naming every plugin that failed, after all have been called.
        """
        try:
            network = self._network()
        except CriShimError:
            return False
        if not network.has(Verb.GC):
            return False
        valid = [pod_id for pod_id, cached in attached if _is_of(cached, network.name)]
        failures = []
        for plugin in network.plugins:
            try:
                await self._call(Verb.GC, network, plugin, cni.stdin_for_gc(network, plugin, valid))
            except (CriShimError, OSError) as error:
                failures.append(str(error))
        if failures:
            raise Internal("; ".join(failures))
        return True

    async def add(self, attachment: Attachment) -> NetworkResult:
        """Attach a pod: ADD of each plugin in order.

        When one fails, the whole chain is detached again and the error names plugin, network, the plugin's code and
        message, and what the detaching could not undo. FailedPrecondition when there is no usable configuration.
        """
        network = self._network()
        for plugin in network.plugins:
            self._program(plugin.type)
        result: cni.Json | None = None
        try:
            for plugin in network.plugins:
                result = await self._add_by(plugin, network, attachment, result)
            ips = cni.addresses_of(result or {})
            if not ips:
                msg = f"CNI network {network.name} gave the pod no address"
                raise FailedPrecondition(msg, hint="its configuration needs an ipam section")
        except (CriShimError, OSError) as error:
            failures = await self._detach(network, attachment, result)
            if not failures:
                raise
            msg = f"{error}; detaching it again failed too: {'; '.join(failures)}"
            raise Internal(msg) from error
        return NetworkResult(ips, cni.format_cached(network, result or {}))

    async def _add_by(
        self, plugin: cni.Plugin, network: cni.NetworkConfig, attachment: Attachment, previous: cni.Json | None
    ) -> cni.Json:
        stdin = cni.stdin_for_add(network, plugin, attachment, previous)
        printed = await self._call(Verb.ADD, network, plugin, stdin, attachment)
        try:
            return cni.parse_result(printed, plugin.type)
        except InvalidArgument as error:
            msg = f"CNI network {network.name}: {error}"
            raise Internal(msg) from error

    async def delete(self, attachment: Attachment, cached: bytes | None) -> None:
        """Detach a pod: DEL of each plugin in reverse, with what `add` returned. Repeating it is fine.

        Without `cached` (a daemon died during ADD) the configuration in force is used, and where there is none there
        is nothing to do. Internal, naming every plugin that failed, after all have been called.
        """
        network, result = self._attached_by(cached)
        if network is None:
            return
        failures = await self._detach(network, attachment, result)
        if failures:
            raise Internal("; ".join(failures))

    def _attached_by(self, cached: bytes | None) -> tuple[cni.NetworkConfig | None, cni.Json | None]:
        if cached is not None:
            # Damaged: the configuration in force is the best guess, and a pod must not stay for ever.
            with contextlib.suppress(InvalidArgument):
                return cni.parse_cached(cached)
        try:
            network = self._network()
            for plugin in network.plugins:
                self._program(plugin.type)
        except CriShimError:
            return None, None
        return network, None

    async def _detach(self, network: cni.NetworkConfig, attachment: Attachment, result: cni.Json | None) -> list[str]:
        """DEL of the whole chain; what failed, one sentence each."""
        failures = []
        for plugin in reversed(network.plugins):
            stdin = cni.stdin_for_del(network, plugin, attachment, result)
            try:
                await self._call(Verb.DEL, network, plugin, stdin, attachment)
            except (CriShimError, OSError) as error:
                failures.append(str(error))
        return failures

    async def _call(
        self,
        verb: Verb,
        network: cni.NetworkConfig,
        plugin: cni.Plugin,
        stdin: bytes,
        attachment: Attachment | None = None,
    ) -> bytes:
        program = self._program(plugin.type)
        failed = f"CNI plugin {plugin.type} of network {network.name} failed on {verb.value}"
        try:
            done = await process.run(
                [program],
                stdin=stdin,
                timeout=_PLUGIN_SECONDS if verb in {Verb.ADD, Verb.DEL} else _ASKING_SECONDS,
                env=process.inherited_environment() | self._environment(verb, attachment),
                limit=_FILE_LIMIT,
            )
        except DeadlineExceeded as error:
            msg = f"{failed}: {error}"
            raise DeadlineExceeded(msg) from error
        if done.returncode != 0:
            told = cni.parse_error(done.stdout)
            reason = told.text() if told else done.text() or f"exit code {done.returncode}"
            msg = f"{failed}: {reason}"
            raise Internal(msg)
        return done.stdout

    def _environment(self, verb: Verb, attachment: Attachment | None) -> dict[str, str]:
        if attachment is None:
            return cni.network_environment(verb, self._bin_dirs)
        netns = str(attachment.netns) if verb is not Verb.DEL or _is_namespace(attachment.netns) else ""
        return cni.environment(verb, attachment, netns, self._bin_dirs)

    def _program(self, name: str) -> Path:
        for directory in self._bin_dirs:
            if os.access(directory / name, os.X_OK):
                return directory / name
        places = ", ".join(map(str, self._bin_dirs))
        msg = f"CNI plugin {name} is not in {places}"
        raise FailedPrecondition(msg, hint="install it (Debian: containernetworking-plugins)")

    def _network(self) -> cni.NetworkConfig:
        signature = self._look()
        if signature != self._signature or self._loaded is None:
            self._signature, self._loaded = signature, self._load(signature)
        if isinstance(self._loaded, CriShimError):
            raise FailedPrecondition(self._loaded.cause, hint=self._loaded.hint)
        return self._loaded

    def _look(self) -> _Signature:
        """The configuration files of the first directory that has any, with what changes when one is written."""
        for directory in self._conf_dirs:
            with contextlib.suppress(OSError):
                found = tuple(sorted(_configurations(directory)))
                if found:
                    return found
        return ()

    def _load(self, signature: _Signature) -> cni.NetworkConfig | CriShimError:
        if not signature:
            places = ", ".join(map(str, self._conf_dirs))
            return FailedPrecondition(f"no readable CNI configuration in {places}", hint="put a .conflist file there")
        file = signature[0][0]
        try:
            return cni.parse_network(_read(file), file)
        except CriShimError as error:
            return FailedPrecondition(error.cause, hint=error.hint)
        except OSError as error:
            return FailedPrecondition(f"CNI configuration {file} cannot be read: {error.strerror}")


def _configurations(directory: Path) -> Iterator[tuple[str, int, int, int]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if Path(entry.name).suffix in cni.SUFFIXES:
                with contextlib.suppress(FileNotFoundError):  # a dangling link, or a file that is being replaced
                    status = entry.stat()
                    yield entry.path, status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: str) -> bytes:
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hold the daemon
    with os.fdopen(fd, "rb") as opened:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            msg = f"CNI configuration {file} is not a regular file"
            raise InvalidArgument(msg)
        data = opened.read(_FILE_LIMIT + 1)
    if len(data) > _FILE_LIMIT:
        msg = f"CNI configuration {file} is larger than {_FILE_LIMIT} bytes"
        raise InvalidArgument(msg)
    return data


def _is_namespace(path: Path) -> bool:
    """Whether the pin still is a namespace, and not gone or the bare file under a lost bind mount (a reboot)."""
    try:
        return path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False


def _is_of(cached: bytes | None, network: str) -> bool:
    """Whether an attachment is one of this network, as far as that is known."""
    if cached is not None:
        with contextlib.suppress(InvalidArgument):
            return cni.parse_cached(cached)[0].name == network
    return True
