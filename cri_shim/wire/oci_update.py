"""What an OCI runtime says when it cannot change a limit, as an error that names the field of the request.

Not the other verbs (`cri_shim.wire.oci_state`). Invariant: the runtime's own words are kept whole.
"""

from __future__ import annotations

import re
from typing import Final

from cri_shim.model.errors import CriShimError, FailedPrecondition, Internal

# By the file that could not be written, of cgroup v1 or v2; runc has words of its own for one of them.
_FIELDS: Final = (
    (re.compile(r"memory\.(memsw|swap)"), "memory_swap_limit_in_bytes", "it includes memory_limit_in_bytes"),
    (
        re.compile(r"memory limit|memory\.(limit_in_bytes|max)"),
        "memory_limit_in_bytes",
        "it cannot be less than what the container uses now",
    ),
    (re.compile(r"cpuset\.cpus"), "cpuset_cpus", "the node and the pod's cgroup must have all of them"),
    (re.compile(r"cpuset\.mems"), "cpuset_mems", "the node and the pod's cgroup must have all of them"),
    (re.compile(r"cpu\.(cfs_quota_us|max)"), "cpu_quota", "the pod's cgroup may have less"),
    (re.compile(r"cpu\.cfs_period_us"), "cpu_period", "the pod's cgroup may have less"),
    (re.compile(r"cpu\.(shares|weight)"), "cpu_shares", ""),
    (re.compile(r"hugetlb"), "hugepage_limits", ""),
    (re.compile(r"\b(?:[a-z]+\.[a-z.]+)\b"), "unified", ""),
)


def update_error(said: str) -> CriShimError:
    """The error for a failed `update`: FailedPrecondition with the field, Internal when the words tell none."""
    words = said or "the runtime failed without a word"
    for file, field, hint in _FIELDS:
        if file.search(words):
            return FailedPrecondition(f"linux.resources.{field} cannot be changed: {words}", hint=hint)
    return Internal(f"cannot update the container: {words}")
