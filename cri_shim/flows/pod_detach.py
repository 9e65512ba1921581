"""Detaching a pod from its network. A failure fails the stop of the pod, which the client repeats; but not for ever.

    networked ──DEL──▶ detached
        └──fails──▶ counted in the record ──ATTEMPTS or SECONDS──▶ given up: told, written down, detached for the record

A plugin or a configuration that never comes back must not hold a pod that nobody can use (contract: StopPodSandbox).
Invariant: what is given up is said three times: in the log, as the pod's `problem`, and with what may be left behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.flows.attachment import attachment
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import SHORT
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodRecord
from cri_shim.pb import api_pb2 as pb

ATTEMPTS = 5
"""So many failures in a row are enough, however fast they come."""
SECONDS = 60
"""A failure so long after the first one is the last."""

log = get_logger()


@dataclass(slots=True)
class DetachPod:
    """The flow. For the one that stops the pod: two at a time for one pod would count twice."""

    store: Store
    layout: Layout
    network: Network
    clock: Clock

    async def __call__(self, pod: PodRecord) -> None:
        """Detach a pod; one that is detached is success. Raises what the plugins said while there is hope."""
        if not pod.networked:
            return
        config = pb.PodSandboxConfig.FromString(pod.config)
        problem = pod.problem
        try:
            await self.network.delete(attachment(pod.id, config, self.layout), pod.attachment)
        except (CriShimError, OSError) as error:
            failed = await self.store.pods.update(pod.id, self._counted)
            if failed is None or not self._is_enough(failed):
                raise
            problem = self._give_up(failed, error)
        await self.store.pods.update(pod.id, lambda old: _detached(old, problem))

    def _counted(self, pod: PodRecord) -> PodRecord:
        first = pod.detach_failed_at or self.clock.now()
        return msgspec.structs.replace(pod, detach_failures=pod.detach_failures + 1, detach_failed_at=first)

    def _is_enough(self, pod: PodRecord) -> bool:
        return pod.detach_failures >= ATTEMPTS or self._since_first(pod) >= SECONDS

    def _since_first(self, pod: PodRecord) -> float:
        return (self.clock.now() - pod.detach_failed_at) / 1e9

    def _give_up(self, pod: PodRecord, error: Exception) -> str:
        """Say so; what is to be remembered as the pod's problem."""
        tries = f"{pod.detach_failures} attempts in {self._since_first(pod):.0f} s"
        problem = f"its network was given up after {tries}: {error}; may be left behind: {_what_is_left(pod)}"
        log.error("pod is not detached from its network", pod=pod.id[:SHORT], name=pod.name, problem=problem)
        return f"{pod.problem}; {problem}" if pod.problem else problem


def _what_is_left(pod: PodRecord) -> str:
    # The interfaces go with the pod's network namespace; what plugins keep outside of it does not.
    leases = f"the lease of {' and '.join(pod.ips)}" if pod.ips else "a lease of an address"
    return f"{leases}, packet filter rules and traffic shaping of container id {pod.id}"


def _detached(pod: PodRecord, problem: str) -> PodRecord:
    return msgspec.structs.replace(
        pod, networked=False, attachment=None, detach_failures=0, detach_failed_at=0, problem=problem
    )
