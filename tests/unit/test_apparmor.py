"""Which AppArmor profile a container gets, and the names that the kernel tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from cri_shim.kernel.apparmor import parse_profiles
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.apparmor import DEFAULT_PROFILE, default_profile, profile_name
from cri_shim.spec.facts import ContainerFacts, HostFacts

OFF = HostFacts(oci_version="1.0.2", capabilities=frozenset(), lowest_oom_score_adj=0, cgroup_version=1)
ON = dataclasses.replace(OFF, apparmor=True, apparmor_parser=True)
WITHOUT_PARSER = dataclasses.replace(ON, apparmor_parser=False)
LOADED = ContainerFacts(apparmor_profiles=frozenset({DEFAULT_PROFILE, "mine"}))
NOT_LOADED = ContainerFacts(apparmor_problem="apparmor_parser: it broke")

DEFAULT = {"apparmor": pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)}
UNCONFINED = {"apparmor": pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)}


def localhost(name: str) -> dict[str, object]:
    return {"apparmor": pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=name)}


def name(fields: Mapping[str, object], host: HostFacts = ON, found: ContainerFacts = LOADED) -> str:
    return profile_name(pb.LinuxContainerSecurityContext(**fields), host, found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, DEFAULT_PROFILE),
        (DEFAULT, DEFAULT_PROFILE),
        (UNCONFINED, ""),
        (localhost("mine"), "mine"),
        (localhost("localhost/mine"), "mine"),
        ({"apparmor_profile": "runtime/default"}, DEFAULT_PROFILE),
        ({"apparmor_profile": "unconfined"}, ""),
        ({"apparmor_profile": "localhost/mine"}, "mine"),
        # The new form wins, whatever the old one says.
        ({**localhost("mine"), "apparmor_profile": "localhost/not-there"}, "mine"),
        ({**UNCONFINED, "apparmor_profile": "runtime/default"}, ""),
        # A privileged container is never confined (CRI `privileged`).
        ({"privileged": True}, ""),
        ({"privileged": True, **DEFAULT}, ""),
        ({"privileged": True, **localhost("mine")}, ""),
    ],
)
def test_the_profile(fields: Mapping[str, object], expected: str) -> None:
    assert name(fields) == expected


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (localhost("other"), FailedPrecondition, "localhost_ref: no profile 'other' is loaded on this node"),
        ({"apparmor_profile": "localhost/other"}, FailedPrecondition, "no profile 'other' is loaded"),
        (localhost(""), InvalidArgument, "needs a localhost_ref"),
        ({"apparmor_profile": "what"}, InvalidArgument, "apparmor_profile 'what' is not runtime/default"),
    ],
)
def test_what_is_not_there_is_named(fields: Mapping[str, object], error: type[CriShimError], words: str) -> None:
    with pytest.raises(error, match=words):
        name(fields)


def test_without_the_module_only_what_asks_for_none_runs() -> None:
    for fields in ({}, UNCONFINED, {"apparmor_profile": "unconfined"}, {"privileged": True, **DEFAULT}):
        assert not name(fields, OFF)
    for fields in (DEFAULT, localhost("mine"), {"apparmor_profile": "runtime/default"}):
        with pytest.raises(FailedPrecondition, match="apparmor: AppArmor is off on this node"):
            name(fields, OFF)


def test_a_default_that_could_not_be_loaded_is_not_left_out() -> None:
    for fields in ({}, DEFAULT):
        with pytest.raises(FailedPrecondition, match=r"RuntimeDefault: .* is not loaded; apparmor_parser: it broke"):
            name(fields, found=NOT_LOADED)
    assert not name(UNCONFINED, found=NOT_LOADED)


def test_a_node_without_the_parser_has_no_default() -> None:
    assert not name({}, WITHOUT_PARSER, NOT_LOADED)
    with pytest.raises(FailedPrecondition, match="is not loaded"):
        name(DEFAULT, WITHOUT_PARSER, NOT_LOADED)


def test_signals_of_a_confined_daemon_arrive() -> None:
    assert "peer={unconfined,runc,crun,conmon,/usr/bin/daemon}" in default_profile("/usr/bin/daemon")
    assert "peer={unconfined,runc,crun,conmon}" in default_profile()


def test_names_of_loaded_profiles() -> None:
    table = "docker-default (enforce)\n/usr/bin/man (complain)\nwith space (x) (unconfined)\n"
    assert parse_profiles(table) == {"docker-default", "/usr/bin/man", "with space (x)"}
    assert parse_profiles("") == frozenset()
