"""What an applet is told of its container (`handlers.wasmtime.applets`), from the spec. Decisions, no effects."""

from __future__ import annotations

from collections.abc import Sequence

from handlers.wasmtime.applets.facts import Facts, Process
from handlers.wasmtime.guest_spec import GuestSpec
from handlers.wasmtime.run import Run


def facts(spec: GuestSpec, command: Sequence[str], processes: tuple[Process, ...]) -> Facts:
    """Of the container with this spec, for an applet with these words."""
    # The limits of a worker are in its cgroup, those of a thread in the engine.
    limits = spec.identity.limits if spec.identity is not None else {}
    memory, cpu = limits.get("memory", {}).get("limit", 0), limits.get("cpu", {})
    quota, period = cpu.get("quota", 0), cpu.get("period", 0)
    if spec.cpu is not None:
        quota, period = spec.cpu.quota, spec.cpu.period
    return Facts(
        command=tuple(command),
        placement="in-process" if spec.worker is None else "process",
        why=spec.identity.why if spec.identity is not None else "",
        module=f"{spec.argv[0]}, {spec.entry.digest}, function {spec.entry.function}",
        listen=spec.listen.ports if spec.listen is not None else (),
        memory_limit=max(0, spec.memory_limit or memory),
        cpu_limit=f"{quota} of {period} µs" if quota > 0 else "",
        processes=processes,
    )


def first_process(spec: GuestSpec, run: Run | None) -> Process:
    """The module itself, which measures itself where it is a thread."""
    command = " ".join(spec.argv)
    stats = run.stats() if run is not None else None
    if stats is not None:
        return Process(pid=1, command=command, cpu_ns=stats.cpu_ns, memory=stats.memory)
    pid = run.info().get("pid", "") if run is not None else ""
    return Process(pid=1, command=command, proc=str(pid))
