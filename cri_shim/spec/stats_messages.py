"""The CRI messages of figures that have been read. Pure.

Invariant: what was not measured is absent from the message, and not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_stats import Cpu, Memory, Pressure, Reading, Swap, Waited
from cri_shim.spec.net_dev import Interface


@dataclass(frozen=True, slots=True)
class LayerUsage:
    """A writable layer, measured at a time (Unix ns) before the rest."""

    at: int
    used_bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class PodReading:
    """What a pod uses as a whole. `network` is None where it has no network namespace of its own."""

    total: Reading
    processes: int
    network: Sequence[Interface] | None


def container_stats(
    attributes: pb.ContainerAttributes, reading: Reading | None, layer: LayerUsage | None, mountpoint: str
) -> pb.ContainerStats:
    """One container; without a reading it does not run, and has attributes only.

    `mountpoint`: a directory on the file system of the writable layers, which clients know from ImageFsInfo.
    """
    stats = pb.ContainerStats(attributes=attributes)
    if reading is None:
        return stats
    at, usage = reading.at, reading.usage
    if usage.cpu is not None:
        stats.cpu.CopyFrom(_cpu(reading, usage.cpu))
    if usage.memory is not None:
        stats.memory.CopyFrom(_memory(at, usage.memory))
    if usage.swap is not None:
        stats.swap.CopyFrom(_swap(at, usage.swap))
    if usage.io is not None:
        stats.io.CopyFrom(pb.IoUsage(timestamp=at, psi=_psi(usage.io)))
    if layer is not None:
        stats.writable_layer.CopyFrom(
            pb.FilesystemUsage(
                timestamp=layer.at,
                fs_id=pb.FilesystemIdentifier(mountpoint=mountpoint),
                used_bytes=pb.UInt64Value(value=layer.used_bytes),
                inodes_used=pb.UInt64Value(value=layer.inodes),
            )
        )
    return stats


def pod_stats(
    attributes: pb.PodSandboxAttributes, reading: PodReading, containers: Sequence[pb.ContainerStats]
) -> pb.PodSandboxStats:
    """One pod with its containers."""
    at, usage = reading.total.at, reading.total.usage
    linux = pb.LinuxPodSandboxStats(
        containers=containers,
        process=pb.ProcessUsage(timestamp=at, process_count=pb.UInt64Value(value=reading.processes)),
    )
    if usage.cpu is not None:
        linux.cpu.CopyFrom(_cpu(reading.total, usage.cpu))
    if usage.memory is not None:
        linux.memory.CopyFrom(_memory(at, usage.memory))
    if usage.io is not None:
        linux.io.CopyFrom(pb.IoUsage(timestamp=at, psi=_psi(usage.io)))
    if reading.network:
        first, *others = (_interface(interface) for interface in reading.network)
        linux.network.CopyFrom(pb.NetworkUsage(timestamp=at, default_interface=first, interfaces=others))
    return pb.PodSandboxStats(attributes=attributes, linux=linux)


def _cpu(reading: Reading, cpu: Cpu) -> pb.CpuUsage:
    return pb.CpuUsage(
        timestamp=reading.at,
        usage_core_nano_seconds=pb.UInt64Value(value=cpu.usage_ns),
        usage_nano_cores=_optional(reading.nano_cores),
        psi=_psi(cpu.pressure),
    )


def _memory(at: int, memory: Memory) -> pb.MemoryUsage:
    return pb.MemoryUsage(
        timestamp=at,
        working_set_bytes=pb.UInt64Value(value=memory.working_set),
        available_bytes=pb.UInt64Value(value=memory.available),
        usage_bytes=pb.UInt64Value(value=memory.usage),
        rss_bytes=pb.UInt64Value(value=memory.rss),
        page_faults=_optional(memory.page_faults),
        major_page_faults=_optional(memory.major_page_faults),
        psi=_psi(memory.pressure),
    )


def _swap(at: int, swap: Swap) -> pb.SwapUsage:
    return pb.SwapUsage(
        timestamp=at,
        swap_usage_bytes=pb.UInt64Value(value=swap.usage),
        swap_available_bytes=_optional(swap.available),
    )


def _interface(interface: Interface) -> pb.NetworkInterfaceUsage:
    return pb.NetworkInterfaceUsage(
        name=interface.name,
        rx_bytes=pb.UInt64Value(value=interface.rx_bytes),
        rx_errors=pb.UInt64Value(value=interface.rx_errors),
        tx_bytes=pb.UInt64Value(value=interface.tx_bytes),
        tx_errors=pb.UInt64Value(value=interface.tx_errors),
    )


def _psi(pressure: Pressure | None) -> pb.PsiStats | None:
    if pressure is None:
        return None
    return pb.PsiStats(Some=_waited(pressure.some), Full=_waited(pressure.full))


def _waited(waited: Waited | None) -> pb.PsiData | None:
    if waited is None:
        return None
    return pb.PsiData(Total=waited.total_ns, Avg10=waited.avg10, Avg60=waited.avg60, Avg300=waited.avg300)


def _optional(number: int | None) -> pb.UInt64Value | None:
    return None if number is None else pb.UInt64Value(value=number)
