"""The annotations that a runtime sees in the spec. Kata, gVisor, runwasi's shims and crun read some of these names.

Not the choice of the client's annotations (`cri_shim.spec.container_request`). Invariant: a client cannot change a
standard one: it reaches the runtime as the daemon knows it.
"""

from __future__ import annotations

from cri_shim.model.handler import ContainerPlan

_PREFIX = "io.kubernetes.cri."


def runtime_annotations(plan: ContainerPlan) -> dict[str, str]:
    """`annotations` (OCI runtime-spec, config): what was let through, and the common ones of CRI runtimes."""
    pod = plan.pod.config.metadata
    standard = {
        "container-type": "sandbox" if plan.infra else "container",
        "sandbox-id": plan.pod.id,
        "sandbox-name": pod.name,
        "sandbox-namespace": pod.namespace,
        "sandbox-uid": pod.uid,
    }
    if not plan.infra:
        standard["container-name"] = plan.config.metadata.name
        standard["image-name"] = plan.config.image.user_specified_image or plan.config.image.image
    return {**plan.annotations, **{_PREFIX + name: value for name, value in standard.items()}}
