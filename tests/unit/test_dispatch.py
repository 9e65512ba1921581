"""Dispatch as a table: every rule of the decision, and every refusal by its words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cri_shim.model.entry import EntryKind, entry_kind
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument, NotFound
from cri_shim.model.handler import Kind
from cri_shim.spec.dispatch import HandlerRules, Subject, WasmMode, decide, pod_handler

HANDLERS = {
    rules.name: rules
    for rules in (
        HandlerRules("runc", Kind.LINUX),
        HandlerRules("crun", Kind.LINUX, wasm=WasmMode.EXECUTOR),
        HandlerRules("native", Kind.LINUX, wasm=WasmMode.NATIVE),
        HandlerRules("wasm", Kind.WASM, linux_containers="runc"),
        HandlerRules("lonely", Kind.WASM),
        HandlerRules("free", Kind.LINUX, container_handlers=("wasm", "gone"), allowed_annotations=("isolation",)),
    )
}
LINUX = Subject("app", {}, {}, {}, image_wasm=False, platform_wasm=False, entry=EntryKind.ELF)
ARTIFACT = replace(LINUX, image_wasm=True, entry=EntryKind.MISSING)
FILE = replace(LINUX, entry=EntryKind.WASM)
COMPAT = {"module.wasm.image/variant": "compat-smart"}


@pytest.mark.parametrize(
    ("pod", "subject", "handler", "wasm"),
    [
        ("runc", LINUX, "runc", False),
        ("crun", LINUX, "crun", False),
        ("wasm", LINUX, "runc", False),
        ("wasm", replace(LINUX, entry=EntryKind.SCRIPT), "runc", False),
        ("wasm", ARTIFACT, "wasm", True),
        ("wasm", FILE, "wasm", True),
        ("crun", ARTIFACT, "wasm", True),
        ("crun", FILE, "wasm", True),
        ("native", FILE, "native", True),
        # a hint of the pod or the image yields to an entrypoint that is plainly Linux
        ("crun", replace(LINUX, pod_annotations=COMPAT), "crun", False),
        ("crun", replace(LINUX, image_annotations={"run.oci.handler": "wasm"}), "crun", False),
        ("crun", replace(LINUX, platform_wasm=True, entry=EntryKind.OTHER), "wasm", True),
        ("crun", replace(LINUX, pod_annotations=COMPAT, entry=EntryKind.MISSING), "wasm", True),
        # and so does a name; without an entrypoint the Wasm handler says what is wrong with the module
        ("wasm", replace(LINUX, named_wasm=True), "runc", False),
        ("wasm", replace(LINUX, named_wasm=True, entry=EntryKind.MISSING), "wasm", True),
        ("wasm", replace(LINUX, named_wasm=True, entry=EntryKind.OTHER), "wasm", True),
        ("wasm", replace(LINUX, entry=EntryKind.MISSING), "runc", False),
        ("crun", replace(LINUX, named_wasm=True, entry=EntryKind.MISSING), "crun", False),
        ("crun", replace(FILE, container_annotations=COMPAT), "wasm", True),
        ("runc", replace(LINUX, container_annotations={"cri-shim.io/handler.app": "runc"}), "runc", False),
        ("wasm", replace(LINUX, pod_annotations={"cri-shim.io/handler.app": "runc"}), "runc", False),
        ("free", replace(FILE, pod_annotations={"cri-shim.io/handler.app": "wasm"}), "wasm", True),
        ("free", replace(FILE, pod_annotations={"cri-shim.io/handler.other": "wasm"}), None, True),
        ("free", replace(LINUX, pod_annotations={"cri-shim.io/isolation": "in-process"}), "free", False),
        ("runc", replace(LINUX, pod_annotations={"cri-shim.io/shm-size": "1Gi"}), "runc", False),
        ("wasm", replace(FILE, pod_annotations={"cri-shim.io/listen.app": "80"}), "wasm", True),
        ("wasm", replace(FILE, image_annotations={"cri-shim.io/listen": "80"}), "wasm", True),
    ],
)
def test_decision(pod: str, subject: Subject, handler: str | None, wasm: bool) -> None:
    if handler is None:
        with pytest.raises(FailedPrecondition):
            decide(HANDLERS, HANDLERS[pod], subject)
        return
    decision = decide(HANDLERS, HANDLERS[pod], subject)
    assert (decision.handler, decision.wasm) == (handler, wasm)
    assert decision.reason


@pytest.mark.parametrize(
    ("pod", "subject", "error", "words"),
    [
        ("runc", ARTIFACT, FailedPrecondition, "RuntimeClass with handler"),
        ("lonely", LINUX, FailedPrecondition, "linux_containers"),
        ("crun", replace(LINUX, container_annotations=COMPAT), InvalidArgument, "an ELF binary"),
        ("runc", replace(LINUX, pod_annotations={"cri-shim.io/handler.app": "wasm"}), InvalidArgument, "not allowed"),
        ("free", replace(LINUX, pod_annotations={"cri-shim.io/handler.app": "wasm"}), InvalidArgument, "no Wasm"),
        ("free", replace(FILE, pod_annotations={"cri-shim.io/handler.app": "gone"}), FailedPrecondition, "'gone'"),
        ("runc", replace(FILE, pod_annotations={"cri-shim.io/handler.app": "runc"}), InvalidArgument, "is Wasm"),
        ("runc", replace(LINUX, pod_annotations={"cri-shim.io/nonsense": "1"}), InvalidArgument, "nonsense"),
        ("runc", replace(LINUX, pod_annotations={"cri-shim.io/isolation": "in-process"}), InvalidArgument, "allowed"),
        ("runc", replace(LINUX, container_annotations={"cri-shim.io/shm-size": "1Gi"}), InvalidArgument, "for pods"),
        ("free", replace(LINUX, pod_annotations={"cri-shim.io/shm-size": "1Gi"}), InvalidArgument, "allowed"),
        ("free", replace(FILE, image_annotations={"cri-shim.io/listen": "80"}), InvalidArgument, "allowed"),
        ("wasm", replace(FILE, pod_annotations={"cri-shim.io/isolation": "in-process"}), InvalidArgument, "allowed"),
        ("wasm", replace(FILE, pod_annotations={"cri-shim.io/isolation.app": "vm"}), InvalidArgument, "not one of"),
        ("wasm", replace(FILE, pod_annotations={"cri-shim.io/isolation.": "process"}), InvalidArgument, "unknown"),
        ("wasm", replace(FILE, pod_annotations={"cri-shim.io/shm-size.": "1Gi"}), InvalidArgument, "unknown"),
        ("wasm", replace(FILE, pod_annotations={"cri-shim.io/shm-size.app": "1Gi"}), InvalidArgument, "unknown"),
        ("wasm", replace(FILE, container_annotations={"cri-shim.io/stop.app": "graceful"}), InvalidArgument, "unknown"),
        (
            "wasm",
            replace(FILE, pod_annotations={"cri-shim.io/stop": "later"}),
            InvalidArgument,
            "is not one of graceful",
        ),
    ],
)
def test_refusal(pod: str, subject: Subject, error: type[CriShimError], words: str) -> None:
    with pytest.raises(error, match=words):
        decide(HANDLERS, HANDLERS[pod], subject)


def test_unknown_handler_names_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"'nope'.*crun.*runc"):
        pod_handler(HANDLERS, "runc", "nope")
    assert pod_handler(HANDLERS, "runc", "").name == "runc"


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x7fELF", EntryKind.ELF),
        (b"#!/b", EntryKind.SCRIPT),
        (b"\0asm", EntryKind.WASM),
        (b"MZ\0\0", EntryKind.OTHER),
        (b"", EntryKind.OTHER),
    ],
)
def test_entry_kind(head: bytes, kind: EntryKind) -> None:
    assert entry_kind(head) is kind


def test_text_is_told_by_its_name() -> None:
    assert entry_kind(b"(mod", "/app.wat") is EntryKind.WASM
    assert entry_kind(b"  ;;", "app.wat") is EntryKind.WASM
    assert entry_kind(b"(mod", "/app.scm") is EntryKind.OTHER
    assert entry_kind(b"#!/b", "/app.wat") is EntryKind.SCRIPT
