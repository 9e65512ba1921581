"""SELinux labels: what a policy says, a level per pod, and what requests change."""

from __future__ import annotations

import pytest

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.ids import PodId
from cri_shim.model.selinux import Contexts, Label
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import selinux

POLICY = """
# of the policy
process = "system_u:system_r:container_t:s0"
content = "system_u:object_r:virt_var_lib_t:s0"
file = "system_u:object_r:container_file_t:s0"
ro_file="system_u:object_r:container_ro_file_t:s0"
"""
CONTEXTS = Contexts("system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0")
NOTHING = pb.SELinuxOption()


def test_the_contexts_of_a_policy() -> None:
    assert selinux.parse_contexts(POLICY) == CONTEXTS
    assert selinux.parse_contexts("") is None
    assert selinux.parse_contexts('process = "system_u:system_r:container_t:s0"\n#file = "a:b:c"\n') is None


def test_every_pod_has_a_level_of_its_own() -> None:
    used: set[str] = set()
    for number in range(2000):
        level = selinux.choose_level(CONTEXTS, NOTHING, PodId(f"pod{number}"), used)
        assert level not in used
        first, second = (int(category.removeprefix("c")) for category in level.removeprefix("s0:").split(","))
        assert 0 <= first < second < 1024
        used.add(level)
    # A restart, or a second daemon, begins at the same place: what is taken is gone round.
    taken = selinux.choose_level(CONTEXTS, NOTHING, PodId("one"), ())
    assert selinux.choose_level(CONTEXTS, NOTHING, PodId("one"), {taken}) not in {taken, ""}


def test_a_level_that_is_asked_for_is_taken_and_without_levels_there_is_none() -> None:
    assert selinux.choose_level(CONTEXTS, pb.SELinuxOption(level="s0:c1"), PodId("p"), {"s0:c1"}) == "s0:c1"
    assert not selinux.choose_level(Contexts("u:r:t", "u:o:f"), NOTHING, PodId("p"), ())
    ranged = Contexts("u:r:t:s0-s0:c0.c1023", "u:o:f:s0")
    assert selinux.choose_level(ranged, NOTHING, PodId("p"), ()).startswith("s0:c")


def test_when_every_level_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "_CATEGORIES", 3)
    used = {"s0:c0,c1", "s0:c1,c2"}
    used.add(selinux.choose_level(CONTEXTS, NOTHING, PodId("p"), used))
    assert used == {"s0:c0,c1", "s0:c0,c2", "s0:c1,c2"}
    with pytest.raises(FailedPrecondition, match="selinux_options: every pair of SELinux categories"):
        selinux.choose_level(CONTEXTS, NOTHING, PodId("p"), used)


def test_labels_of_pods_and_of_their_containers() -> None:
    plain = selinux.pod_label(CONTEXTS, NOTHING, "s0:c1,c2")
    assert plain == Label("system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2")
    assert selinux.with_options(plain, NOTHING) == plain
    typed = selinux.with_options(plain, pb.SELinuxOption(type="spc_t", role="r"))
    assert typed == Label("system_u:r:spc_t:s0:c1,c2", plain.mount)
    everything = pb.SELinuxOption(user="u", role="r", type="t", level="s0-s0:c0.c3")
    assert selinux.with_options(plain, everything) == Label(
        "u:r:t:s0-s0:c0.c3", "u:object_r:container_file_t:s0-s0:c0.c3"
    )
    assert selinux.pod_label(Contexts("u:r:t", "u:o:f"), NOTHING, "") == Label("u:r:t", "u:o:f")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "a:b"),
        ("role", "a b"),
        ("type", 't",context="x'),
        ("level", "s0 c1"),
        ("level", 's0"'),
        ("type", "t,x"),
    ],
)
def test_what_is_no_part_of_a_label(field: str, value: str) -> None:
    label = Label(CONTEXTS.process, CONTEXTS.file)
    with pytest.raises(InvalidArgument, match=rf"selinux_options\.{field}: .* cannot be a part of a label"):
        selinux.with_options(label, pb.SELinuxOption(**{field: value}))


def test_options_need_labels() -> None:
    asked = pb.SELinuxOption(level="s0")
    selinux.check_options(NOTHING, None, enabled=False)
    selinux.check_options(asked, Label("a", "b"), enabled=True)
    with pytest.raises(FailedPrecondition, match="selinux_options: SELinux is not enabled on this node"):
        selinux.check_options(asked, None, enabled=False)
    with pytest.raises(FailedPrecondition, match="selinux_options: this node's SELinux policy has no contexts"):
        selinux.check_options(asked, None, enabled=True)


def test_what_belongs_to_the_node_is_not_relabeled() -> None:
    selinux.check_relabel("/var/lib/kubelet/pods/x", "/data")
    for path in ("/", "/etc", "/usr", "/var/lib"):
        with pytest.raises(InvalidArgument, match=r"mounts: selinux_relabel of /data: .* belongs to the node"):
            selinux.check_relabel(path, "/data")
