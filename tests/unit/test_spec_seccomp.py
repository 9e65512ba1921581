from __future__ import annotations

import pytest

from cri_shim.model.capabilities import DEFAULT_CAPABILITIES
from cri_shim.spec.facts import Json
from cri_shim.spec.seccomp_default import default_profile

NEVER = {"kexec_load", "io_uring_setup", "keyctl", "add_key", "userfaultfd", "swapon", "nfsservctl", "move_pages"}


def allowed(profile: Json) -> set[str]:
    """Allowed whatever the arguments are."""
    return {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    }


def rules(profile: Json, name: str) -> list[Json]:
    return [rule for rule in profile["syscalls"] if name in rule["names"]]


def test_what_is_not_listed_fails_with_eperm() -> None:
    profile = default_profile(DEFAULT_CAPABILITIES, "x86_64")
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 1)
    assert profile["architectures"][0] == "SCMP_ARCH_X86_64"
    assert not NEVER & allowed(default_profile(frozenset({"SYS_ADMIN"}), "x86_64"))


@pytest.mark.parametrize(
    ("capability", "call"),
    [
        ("SYS_ADMIN", "mount"),
        ("SYS_ADMIN", "setns"),
        ("SYS_MODULE", "init_module"),
        ("SYS_TIME", "clock_settime"),
        ("SYS_BOOT", "reboot"),
        ("DAC_READ_SEARCH", "open_by_handle_at"),
        ("BPF", "bpf"),
        ("SYS_PTRACE", "process_vm_readv"),
    ],
)
def test_guarded_calls_come_with_their_capability(capability: str, call: str) -> None:
    assert call not in allowed(default_profile(DEFAULT_CAPABILITIES - {capability}, "x86_64"))
    assert call in allowed(default_profile(DEFAULT_CAPABILITIES | {capability}, "x86_64"))


def test_default_capabilities_allow_chroot_and_no_names_twice() -> None:
    profile = default_profile(DEFAULT_CAPABILITIES, "x86_64")
    assert "chroot" in allowed(profile)
    names = [name for rule in profile["syscalls"] if "args" not in rule for name in rule["names"]]
    assert len(names) == len(set(names))


def test_new_namespaces_need_sys_admin() -> None:
    plain = default_profile(DEFAULT_CAPABILITIES, "x86_64")
    assert rules(plain, "clone")[0]["args"][0]["value"] == 0x7E020000
    assert rules(plain, "clone3") == [{"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
    assert rules(default_profile(DEFAULT_CAPABILITIES, "s390x"), "clone")[0]["args"][0]["index"] == 1
    assert {"clone", "clone3"} <= allowed(default_profile(frozenset({"SYS_ADMIN"}), "x86_64"))


def test_sockets_of_the_hypervisor_are_out() -> None:
    (rule,) = rules(default_profile(DEFAULT_CAPABILITIES, "x86_64"), "socket")
    assert rule["args"] == [{"index": 0, "value": 40, "valueTwo": 0, "op": "SCMP_CMP_NE"}]


def test_other_machines_have_their_own_calls() -> None:
    assert "arch_prctl" in allowed(default_profile(frozenset(), "x86_64"))
    assert "arch_prctl" not in allowed(default_profile(frozenset(), "aarch64"))
    assert "architectures" not in default_profile(frozenset(), "loongarch64")
