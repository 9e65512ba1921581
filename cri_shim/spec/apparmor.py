"""AppArmor: the text of our default profile, and which profile a container gets.

Not the loading of it (`cri_shim.adapters.apparmor`). Invariant: a container runs under a profile that is in the kernel,
or it was said to be unconfined; a name that is not loaded is an error here and not one of the runtime.
"""

from __future__ import annotations

from typing import Final

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import ContainerFacts, HostFacts
from cri_shim.spec.security import named_profile

DEFAULT_PROFILE: Final = "cri-shim-default"
"""Name of our own profile in the kernel."""

_FIELD: Final = "linux.security_context.apparmor"
_LOCALHOST: Final = "localhost/"
_PROFILE: Final = """\
# Made by cri-shim when it starts. Capabilities, mounts and seccomp say what a container may do; this takes away what
# reaches the node past them, also from a container with CAP_SYS_ADMIN.
profile {name} flags=(attach_disconnected, mediate_deleted) {{
  capability,
  network,
  unix,
  dbus,
  file,
  umount,

  # From the node, and among the containers that have this profile, also on top of another one: crun stacks it on its
  # own for a process that may gain no privileges.
  signal (receive) peer={{{peers}}},
  signal (send, receive) peer={{,**//&}}{name}{{,//&**}},
  ptrace (trace, read, tracedby, readby) peer={{,**//&}}{name}{{,//&**}},

  deny mount,

  # In /proc only processes, and of sysctls those of the IPC namespace, can be written to.
  deny /proc/[^1-9s]** wkl,
  deny /proc/s[^y]** wkl,
  deny /proc/sy[^s]** wkl,
  deny /proc/sys[^/]** wkl,
  deny /proc/sys/[^k]** wkl,
  deny /proc/sys/k[^e]** wkl,
  deny /proc/sys/kernel/[^ms]** wkl,
  deny /proc/sys/kernel/m[^s]** wkl,
  deny /proc/sys/kernel/s[^eh]** wkl,
  deny /proc/sys/kernel/se[^m]** wkl,
  deny /proc/sys/kernel/sh[^m]** wkl,
  deny /proc/sysrq-trigger rwkl,
  deny /proc/kcore rwkl,

  # In /sys only cgroups.
  deny /sys/[^f]** wkl,
  deny /sys/f[^s]** wkl,
  deny /sys/fs[^/]** wkl,
  deny /sys/fs/[^c]** wkl,
  deny /sys/fs/c[^g]** wkl,
  deny /sys/firmware/** rwkl,
  deny /sys/kernel/security/** rwkl,
  deny /sys/devices/virtual/powercap/** rwkl,
}}
"""
# Runtimes have profiles of their own on some distributions, under which the node's signals come then.
_PEERS: Final = ("unconfined", "runc", "crun", "conmon")


def default_profile(own_label: str = "") -> str:
    """The profile as apparmor_parser(8) reads it. `own_label` is the daemon's: its signals have to arrive."""
    peers = dict.fromkeys((*_PEERS, *([own_label] if own_label else [])))
    return _PROFILE.format(name=DEFAULT_PROFILE, peers=",".join(peers))


def profile_name(security: pb.LinuxContainerSecurityContext, host: HostFacts, found: ContainerFacts) -> str:
    """`process.apparmorProfile`, empty for none. FailedPrecondition for what this node does not have."""
    if security.privileged:
        return ""
    asked = asked_profile(security)
    if asked is not None and asked.profile_type != pb.SecurityProfile.Unconfined and not host.apparmor:
        msg = f"{_FIELD}: AppArmor is off on this node, so that the profile cannot be applied"
        raise FailedPrecondition(msg)
    if not host.apparmor or (asked is not None and asked.profile_type == pb.SecurityProfile.Unconfined):
        return ""
    if asked is not None and asked.profile_type == pb.SecurityProfile.Localhost:
        return _localhost(asked, found)
    if DEFAULT_PROFILE in found.apparmor_profiles:
        return DEFAULT_PROFILE
    if asked is None and not host.apparmor_parser:
        return ""  # as the other CRI runtimes: a node without the tool has no default
    msg = f"{_FIELD}: RuntimeDefault: the profile {DEFAULT_PROFILE} is not loaded"
    raise FailedPrecondition(msg, hint=found.apparmor_problem)


def asked_profile(security: pb.LinuxContainerSecurityContext) -> pb.SecurityProfile | None:
    """The profile asked for, in the new form or else in the old one; None when nothing is said."""
    if security.HasField("apparmor"):
        return security.apparmor
    if not security.apparmor_profile:
        return None
    return named_profile(security.apparmor_profile, "apparmor_profile")


def _localhost(asked: pb.SecurityProfile, found: ContainerFacts) -> str:
    name = asked.localhost_ref.removeprefix(_LOCALHOST)
    if not name:
        msg = f"{_FIELD}: a profile_type of Localhost needs a localhost_ref"
        raise InvalidArgument(msg)
    if name not in found.apparmor_profiles:
        msg = f"{_FIELD}.localhost_ref: no profile {name[:200]!r} is loaded on this node"
        raise FailedPrecondition(msg, hint="load it with apparmor_parser(8)")
    return name
