"""Reads what the limits of a container depend on: the same for a runtime's containers and for workers of modules.

Not the limits (`cri_shim.spec.resources`). Invariant: nothing here decides.
"""

from __future__ import annotations

from cri_shim.adapters.cgroups import Version
from cri_shim.adapters.context import HandlerContext
from cri_shim.spec.facts import LimitFacts


def limit_facts(context: HandlerContext, *, min_memory: int = 0) -> LimitFacts:
    """`min_memory` is the handler's own, in bytes."""
    host = context.cgroups.host
    return LimitFacts(
        lowest_oom_score_adj=context.limits.get("oom_score_adj", -1000),
        cgroup_version=2 if host.version is Version.V2 else 1,
        cgroup_driver=context.cgroups.driver,
        swap_controller=context.cgroups.accounts_for_swap(),
        hugetlb_controller="hugetlb" in host.controllers,
        min_memory=min_memory,
    )
