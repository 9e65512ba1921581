"""User namespaces of pods: whether this node is able to give them, and the pins of a pod that has one.

Not the mapped mounts (`cri_shim.adapters.rootfs`). Invariant: what a failed `pin` leaves goes with the pod's pins.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from pathlib import Path
from typing import Final

from cri_shim.adapters.zygote import TaskError, Zygote
from cri_shim.kernel import new_namespaces
from cri_shim.kernel.release import kernel_release
from cri_shim.model.errors import CriShimError, InvalidArgument, ResourceExhausted
from cri_shim.model.ids import PodId
from cri_shim.model.layout import Layout
from cri_shim.model.user_namespace import UserNamespace
from cri_shim.spec.pod import SandboxPlan

_TASKS: Final = "cri_shim.kernel.user_namespace"
_SECONDS: Final = 10.0
_OVERLAY_KERNEL: Final = (5, 19)
"""The first Linux with overlays of mapped layers."""


class UserNamespaces:
    """Asks once what the node is able to; makes what a pod needs."""

    def __init__(self, layout: Layout, zygote: Zygote) -> None:
        self._layout = layout
        self._zygote = zygote
        self._asking = asyncio.Lock()
        self._missing: str | None = None

    async def missing(self) -> str:
        """What this node lacks for pods with user namespaces; empty = nothing."""
        async with self._asking:
            if self._missing is None:
                self._missing = await _missing(self._layout.layers)
            return self._missing

    async def pin(self, pod_id: PodId, plan: SandboxPlan, ids: UserNamespace) -> None:
        """Make a user namespace with these ids and the other namespaces of `plan` in it, and pin them for the pod.

        They are set up as `kernel.new_namespaces.enter_new` says. InvalidArgument for a sysctl that is refused,
        ResourceExhausted where the node allows no more namespaces.
        """
        kinds = [kind for kind, wanted in (("net", plan.net), ("ipc", plan.ipc), ("uts", plan.uts)) if wanted]
        new_namespaces.check_sysctls(plan.sysctls, kinds)
        arguments = {
            "directory": str(self._layout.namespace(pod_id, "user").parent),
            "uids": dataclasses.astuple(ids.uids),
            "gids": dataclasses.astuple(ids.gids),
            "kinds": kinds,
            "hostname": plan.hostname,
            "sysctls": dict(plan.sysctls),
        }
        try:
            refused = await self._zygote.run(f"{_TASKS}:pin", arguments, timeout=_SECONDS)
        except TaskError as error:
            if error.errno in {errno.ENOSPC, errno.EUSERS}:
                msg = f"the node allows no more namespaces: {error.text}"
                raise ResourceExhausted(msg, hint="look at the limits in /proc/sys/user") from error
            raise
        if refused:
            raise InvalidArgument(refused["invalid"], hint=refused["hint"])


async def _missing(layers: Path) -> str:
    if kernel_release() < _OVERLAY_KERNEL:
        return "this kernel has no overlays of idmapped layers, which came with Linux 5.19"
    zygote = Zygote()  # of its own: it ends with the question, where an idle one would cost memory
    try:
        await zygote.run(f"{_TASKS}:try_idmapped_mount", {"directory": str(layers)}, timeout=_SECONDS)
    except TaskError as error:
        if error.errno == errno.EINVAL:
            return f"the file system of {layers} has no idmapped mounts"
        return f"an idmapped mount of {layers} failed: {error.text}"
    except CriShimError as error:
        return str(error)
    finally:
        await zygote.aclose()
    return ""
