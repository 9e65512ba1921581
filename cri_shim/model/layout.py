"""Where everything lives below `root` (survives a reboot) and `state` (does not).

Pure names, no I/O. Invariant: every path of a pod or container follows from its id alone, so that clean-up by id
works with an empty database.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cri_shim.model.ids import ContainerId, Digest, ImageId, PodId, digest_hex


@dataclass(frozen=True, slots=True)
class Layout:
    """The directory tree of one daemon."""

    root: Path
    state: Path

    @property
    def database(self) -> Path:
        return self.root / "state.db"

    @property
    def lock(self) -> Path:
        return self.root / "daemon.lock"

    @property
    def inflight_lock(self) -> Path:
        return self.state / "inflight.lock"

    @property
    def images(self) -> Path:
        """An OCI image layout."""
        return self.root / "images"

    def blob(self, digest: Digest) -> Path:
        return self.images / "blobs" / "sha256" / digest_hex(digest)

    @property
    def partials(self) -> Path:
        """The beginnings of blobs, as far as they have come; nothing here has been verified."""
        return self.root / "partial"

    def partial(self, digest: Digest) -> Path:
        return self.partials / digest_hex(digest)

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    def layer(self, number: int) -> Path:
        """One unpacked layer, an overlayfs lower directory; short, since mount(2) takes one page of options."""
        return self.layers / str(number)

    @property
    def wasm_cache(self) -> Path:
        return self.root / "wasm"

    @property
    def pods(self) -> Path:
        return self.state / "pods"

    def pod(self, pod_id: PodId) -> Path:
        return self.pods / pod_id

    def namespace(self, pod_id: PodId, kind: str) -> Path:
        """The pin of a pod's namespace; `kind` is user, net, ipc, uts or pid."""
        return self.pod(pod_id) / "ns" / kind

    def image_volumes(self, pod_id: PodId) -> Path:
        return self.pod(pod_id) / "image-volumes"

    def image_volume(self, pod_id: PodId, image_id: ImageId) -> Path:
        """The files of an image, mounted once for all containers of the pod that have it as a volume."""
        return self.image_volumes(pod_id) / digest_hex(image_id)

    @property
    def bundles(self) -> Path:
        return self.state / "containers"

    def bundle(self, container_id: ContainerId | PodId) -> Path:
        """OCI bundle, monitor sockets, pid and exit files of a container (or of a pod's infra container)."""
        return self.bundles / container_id

    def rootfs(self, container_id: ContainerId | PodId) -> Path:
        return self.bundle(container_id) / "rootfs"

    @property
    def writables(self) -> Path:
        return self.root / "containers"

    def writable(self, container_id: ContainerId | PodId) -> Path:
        """Holds `upper` and `work`, the writable layer."""
        return self.writables / container_id

    def runtime_root(self, handler: str) -> Path:
        """The `--root` of an OCI runtime."""
        return self.state / "runtime" / handler

    @property
    def mount_namespaces(self) -> Path:
        return self.state / "mntns"
