"""What the composition root hands to every handler, in-tree or not. A value, no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cri_shim.adapters.apparmor import AppArmor
from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.pace import Pace
from cri_shim.adapters.user_namespaces import UserNamespaces
from cri_shim.adapters.zygote import Zygote
from cri_shim.model.container import Exit
from cri_shim.model.ids import ContainerId
from cri_shim.model.layout import Layout


@dataclass(frozen=True, slots=True)
class HandlerContext:
    """A handler module offers `OPTIONS` (a frozen msgspec.Struct) and `make(name, options, context) -> Handler`."""

    layout: Layout
    cgroups: Cgroups
    zygote: Zygote
    user_namespaces: UserNamespaces
    modules: CompiledModules
    conmon: str
    """The monitor program, a name on PATH or an absolute path."""
    limits: Mapping[str, int]
    """What the kernel allows this daemon: `oom_score_adj` is the lowest value that it may give to a container."""
    capabilities: frozenset[str]
    """The daemon's own set, names without CAP_: no container can be given more."""
    apparmor: AppArmor
    """The default profile and those that are loaded."""
    starts: Pace
    """Turns for calling a runtime: to create, start or delete a container, and for a further process in one."""
    exited: Callable[[ContainerId, Exit], None]
    """Called in the event loop when a started container has ended, exactly once."""
