"""The daemon's life: directories and locks, the store, the flows, the socket, recovery; and all of it in reverse.

Not the wiring of the flows (`cri_shim.compose`). Invariant: nothing is served before recovery is done, and a daemon
that cannot start leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from cri_shim import config as configuration
from cri_shim import log
from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.inflight import end_leftovers
from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.adapters.user_namespaces import UserNamespaces
from cri_shim.adapters.zygote import Zygote
from cri_shim.compose import Base, Flows
from cri_shim.config import Config
from cri_shim.kernel import apparmor, fs, mounts, notify, pauses, process, selinux, turns
from cri_shim.kernel.lane import Lane
from cri_shim.loader import HandlerOptions, handler_options
from cri_shim.model.errors import CriShimError, FailedPrecondition
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.selinux import Contexts
from cri_shim.rpc.edge import Gate
from cri_shim.rpc.server import Server
from cri_shim.spec.cgroup_plan import Driver, resolve_driver
from cri_shim.spec.selinux import parse_contexts
from cri_shim.streaming.server import Server as StreamingServer
from cri_shim.streaming.server import Settings
from cri_shim.streaming.ticket import Limits
from cri_shim.streaming.tls import Certificate

DRAIN_SECONDS = 10.0
"""How long calls that are under way may take when the daemon stops."""

logger = log.get_logger()


def check(file: Path | None) -> None:
    """Everything that can be said about a configuration without starting. Raises what is wrong."""
    config, origins = configuration.load(file)
    handler_options(config, origins)


def serve(file: Path | None, listen: str | None) -> int:
    """Run the daemon until SIGTERM or SIGINT."""
    config, origins = configuration.load(file)
    options = handler_options(config, origins)
    log.configure(config.log.level, config.log.format)
    _warn_of_what_has_no_effect(config)
    os.umask(0o022)
    with asyncio.Runner(loop_factory=turns.new_loop) as runner:
        status = runner.run(_run(file, config, options, Path(listen or config.listen)))
    # Threads of the Wasm engine outlive the guests; a normal interpreter exit under them aborts the process.
    os._exit(status)


def _warn_of_what_has_no_effect(config: Config) -> None:
    default = Config()
    for setting in configuration.WITHOUT_EFFECT:
        value, usual = operator.attrgetter(setting)(config), operator.attrgetter(setting)(default)
        if value != usual:
            logger.warning("setting has no effect in this version", setting=setting)


async def _run(file: Path | None, config: Config, options: Mapping[str, HandlerOptions], listen: Path) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(Lane(loop))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, file, config)
    layout = Layout(root=Path(config.root), state=Path(config.state))
    async with contextlib.AsyncExitStack() as stack:
        base = await _base(config, layout, stack)
        gate = Gate()
        flows = Flows.build(base, options)
        server = Server(listen, flows.runtime, flows.image, gate, admin=flows.admin)
        await server.start()
        stack.push_async_callback(flows.aclose)
        await base.streaming.start()
        stack.push_async_callback(base.streaming.stop)
        stack.push_async_callback(server.stop, DRAIN_SECONDS)
        await flows.recover()
        pauses.settle()
        gate.open()
        # Not before: what runtimes can do takes them half a second to say, and only Status needs it.
        probing = asyncio.create_task(flows.handlers.probe())
        stack.push_async_callback(_cancelled, probing)
        notify.notify("READY=1")
        watchdog = asyncio.create_task(_watchdog())
        stack.push_async_callback(_cancelled, watchdog)
        logger.info("serving", listen=str(listen), handlers=sorted(options), default=flows.handlers.default)
        await stop.wait()
        notify.notify("STOPPING=1")
        logger.info("stopping; Linux containers go on running")
    return 0


def _reload(file: Path | None, config: Config) -> None:
    """SIGHUP: take over the log's settings, and say what else has changed and needs a restart.

    CNI configurations and registry hosts are not part of it: those files are looked at whenever they are used.
    """
    try:
        fresh, origins = configuration.load(file)
        handler_options(fresh, origins)
    except CriShimError as error:
        logger.error("the configuration is not reloaded", error=str(error))
        return
    log.configure(fresh.log.level, fresh.log.format)
    before, after = configuration.as_dict(config), configuration.as_dict(fresh)
    changed = sorted(key for key in after if key != "log" and before[key] != after[key])
    logger.info("configuration reloaded", needs_restart=changed)


async def _cancelled(task: asyncio.Task[None]) -> None:
    """End a task and wait until it has cleaned up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _watchdog() -> None:
    """Tell the service manager that the loop turns, as often as it wants to hear it."""
    interval = notify.watchdog_interval()
    while interval is not None:
        notify.notify("WATCHDOG=1")
        await asyncio.sleep(interval)


async def _base(config: Config, layout: Layout, stack: contextlib.AsyncExitStack) -> Base:
    """What everything stands on: directories, locks, the store, the kernel's answers."""
    root = os.geteuid() == 0
    await asyncio.to_thread(_make_directories, layout, root=root)
    stack.callback(os.close, _lock(layout))
    inflight = await asyncio.to_thread(end_leftovers, layout.inflight_lock)
    process.set_inflight_fd(inflight)
    process.set_child_subreaper()
    reaper = process.Reaper()
    reaper.start(asyncio.get_running_loop())
    stack.callback(reaper.stop)
    store = await asyncio.to_thread(Store.open, layout.database)
    stack.callback(store.close)
    zygote = Zygote(held=(inflight,))
    stack.push_async_callback(zygote.aclose)
    node, driver, cgroups = await asyncio.to_thread(_look, config, root=root)
    return Base(
        config=config,
        layout=layout,
        store=store,
        zygote=zygote,
        user_namespaces=UserNamespaces(layout, zygote),
        network=Network([Path(p) for p in config.network.conf_dirs], [Path(p) for p in config.network.bin_dirs]),
        node=node,
        driver=driver,
        cgroups=cgroups,
        streaming=StreamingServer(_streaming(config.streaming)),
    )


def _streaming(section: configuration.Streaming) -> Settings:
    certificate = Certificate(Path(section.tls.cert_file), Path(section.tls.key_file)) if section.tls else None
    return Settings(section.address, section.port, certificate, Limits(idle=section.idle_seconds))


def _look(config: Config, *, root: bool) -> tuple[NodeFacts, Driver, Cgroups]:
    """Read the facts of the node."""
    driver = resolve_driver(config.cgroup_driver, systemd_runs=Path("/run/systemd/system").is_dir())
    node = NodeFacts(
        hostname=socket.gethostname(),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        root=root,
        selinux=selinux.is_enabled(),
        selinux_contexts=_selinux_contexts() if root else None,
        apparmor=apparmor.is_enabled(),
        seccomp=Path("/proc/sys/kernel/seccomp/actions_avail").exists(),
    )
    return node, driver, Cgroups(Cgroups.detect(), driver)


def _selinux_contexts() -> Contexts | None:
    if not selinux.is_enabled():
        return None
    contexts = parse_contexts(selinux.container_contexts())
    if contexts is None or not (selinux.is_valid(contexts.process) and selinux.is_valid(contexts.file)):
        logger.warning("SELinux is on, but its policy has no contexts for containers: nothing is labelled")
        return None
    return contexts


def _make_directories(layout: Layout, *, root: bool) -> None:
    """`root` is for nobody else: layers hold setuid files. `state` can be entered, not listed."""
    layout.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    layout.state.mkdir(mode=0o711, parents=True, exist_ok=True)
    layout.root.chmod(0o700)
    layout.state.chmod(0o711)
    for directory in (layout.images, layout.partials, layout.layers, layout.writables, layout.wasm_cache):
        directory.mkdir(mode=0o700, exist_ok=True)
    for directory in (layout.pods, layout.bundles):
        directory.mkdir(mode=0o711, exist_ok=True)
    if root:
        # What is unmounted here goes from every copy of the mount table, so no monitor keeps a pod's mounts alive.
        mounts.make_shared(layout.state)


def _lock(layout: Layout) -> int:
    fd = fs.lock_exclusive(layout.lock)
    if fd is None:
        msg = f"another cri-shim runs on {layout.root}"
        raise FailedPrecondition(msg, hint="stop it, or set another root and state")
    return fd
