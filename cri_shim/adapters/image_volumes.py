"""Image volumes: the files of an image, mounted read-only below a pod's directory for its containers to bind.

Not the bind into a container. Everything blocks and belongs into a thread. Invariant: no mount here can be made
writable by whoever has it (an overlay without an upper directory), and no sub path leads out of its image.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from cri_shim.kernel import fs, mounts
from cri_shim.model.errors import ImageVolumeMountFailed
from cri_shim.model.handler import PodContext
from cri_shim.model.ids import ImageId, PodId, digest_hex
from cri_shim.model.image import LayerRecord
from cri_shim.model.layout import Layout


def mount(layout: Layout, pod: PodContext, image_id: ImageId, layers: Sequence[LayerRecord]) -> Path:
    """Mount `layers` (bottom first, at least one) for the pod, with its ids and its label.

    Mounted already = success.
    """
    target, label = layout.image_volume(pod.id, image_id), pod.selinux.mount if pod.selinux else ""
    if mounts.is_mount_point(target):
        return target
    target.mkdir(mode=0o755, parents=True, exist_ok=True)
    # The empty mount point is the lowest layer: a single one would become a bind, which CAP_SYS_ADMIN can remount
    # writable, and the layer is that of every container of the image.
    lowers = [*(layout.layer(layer.number) for layer in reversed(layers)), target]
    if pod.user is not None:
        mounts.idmapped_overlay(target, lowers, None, None, base=layout.layers, user_namespace=pod.user, label=label)
    else:
        mounts.overlay(target, lowers, None, None, label=label)
    return target


def resolve(root: Path, sub_path: str) -> str:
    """The file or directory that `sub_path` means inside the mounted image, free of symlinks."""
    try:
        handle = fs.open_in_root(root, sub_path, os.O_PATH)
    except OSError as error:
        msg = f"image_sub_path {sub_path!r}: {os.strerror(error.errno or 0)} in the image"
        raise ImageVolumeMountFailed(msg) from error
    try:
        mode = os.fstat(handle).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            msg = f"image_sub_path {sub_path!r} is neither a directory nor a file in the image"
            raise ImageVolumeMountFailed(msg)
        path = str(Path(f"/proc/thread-self/fd/{handle}").readlink())
    finally:
        os.close(handle)
    try:
        path.encode()
    except UnicodeEncodeError:
        msg = f"image_sub_path {sub_path!r} leads to a name in the image that is not UTF-8"
        raise ImageVolumeMountFailed(msg) from None
    return path


def release(layout: Layout, pod_id: PodId, keep: Collection[ImageId] = ()) -> None:
    """Unmount the pod's image volumes but those of the images in `keep`. None = success."""
    directory = layout.image_volumes(pod_id)
    kept = {digest_hex(image_id) for image_id in keep}
    if not directory.exists():
        return
    for target in list(directory.iterdir()):
        if target.name not in kept:
            mounts.unmount_tree(target.resolve())
            fs.remove_tree(target)
    if not kept:
        directory.rmdir()
