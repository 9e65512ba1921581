"""The typed sections of the configuration. The names are fixed: tools outside of the repository write them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

_SECONDS = {"h": 3600, "m": 60, "s": 1}
_PARTS = re.compile(r"([0-9]+)([hms])")
Duration = Annotated[str, msgspec.Meta(pattern=r"^(0|([0-9]+h)?([0-9]+m)?([0-9]+s)?)$", min_length=1)]
"""As in `4h`, `90s` or `1h30m`."""
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping whose keys are all known."""


class Log(Section, frozen=True, kw_only=True):
    """`auto`: console on a terminal, else JSON lines."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class NetworkSection(Section, frozen=True, kw_only=True):
    """CNI: where conflists and plugins are, first match wins."""

    conf_dirs: tuple[str, ...] = ("/etc/cni/net.d",)
    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    check: bool = False
    """Ask the plugins at start whether the pods that run are still attached as they should be (CNI CHECK)."""


class Images(Section, frozen=True, kw_only=True):
    """Registries and the image store."""

    registry_config: tuple[str, ...] = ("/etc/cri-shim/certs.d", "/etc/containerd/certs.d")
    auth_file: str = ""
    max_parallel_downloads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 3
    pinned: tuple[str, ...] = ()
    keep_blobs: bool = False
    offline: Literal["error", "serve-local"] = "error"
    import_dir: str = ""


class Tls(Section, frozen=True, kw_only=True):
    """PEM files: a certificate with its chain, and its key."""

    cert_file: str
    key_file: str


class Streaming(Section, frozen=True, kw_only=True):
    """The HTTP server of Exec, Attach and PortForward."""

    address: str = "127.0.0.1"
    port: Port = 0
    tls: Tls | None = None
    idle_timeout: Duration = "4h"

    @property
    def idle_seconds(self) -> float:
        """0 = no limit."""
        return sum(float(number) * _SECONDS[unit] for number, unit in _PARTS.findall(self.idle_timeout))


class Monitor(Section, frozen=True, kw_only=True):
    """Programs that hold a container or a shared PID namespace: names on PATH or absolute paths."""

    conmon: str = "conmon"
    infra: str = "catatonit"


class Metrics(Section, frozen=True, kw_only=True):
    """`host:port` or a socket path; empty = off."""

    listen: str = ""


class Tracing(Section, frozen=True, kw_only=True):
    """An OTLP endpoint; empty = off."""

    endpoint: str = ""


WITHOUT_EFFECT = ("metrics", "tracing")
"""Settings that are known and checked, and that this version does nothing with."""


class Config(Section, frozen=True, kw_only=True):
    """The whole configuration of one daemon."""

    listen: str = "/run/cri-shim/cri-shim.sock"
    root: str = "/var/lib/cri-shim"
    state: str = "/run/cri-shim"
    log: Log = Log()
    default_handler: str = ""
    handlers: dict[str, dict[str, Any]] = {}
    cgroup_driver: Literal["auto", "cgroupfs", "systemd"] = "auto"
    missing_mount_source: Literal["create", "error"] = "create"
    network: NetworkSection = NetworkSection()
    images: Images = Images()
    streaming: Streaming = Streaming()
    monitor: Monitor = Monitor()
    metrics: Metrics = Metrics()
    tracing: Tracing = Tracing()
