"""Which handler runs a container: decided for each one, from the pod's handler, image, annotations and entry file.

Not a parser of images or files: the caller reads those facts before. Invariant: a pod cannot leave what its
RuntimeClass allows; every decision has a reason in words, every refusal names the rule and a way out.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from cri_shim.model.entry import EntryKind
from cri_shim.model.errors import FailedPrecondition, InvalidArgument, NotFound
from cri_shim.model.handler import Kind

ANNOTATION_PREFIX = "cri-shim.io/"
HANDLER_ANNOTATION = "cri-shim.io/handler."
ISOLATION_ANNOTATION = "cri-shim.io/isolation"
LISTEN_ANNOTATION = "cri-shim.io/listen"
STOP_ANNOTATION = "cri-shim.io/stop"
_VALUES = {"isolation": ("in-process", "process"), "stop": ("graceful",)}
"""Of the annotations with a few values only."""
_PER_CONTAINER = ("isolation", "listen", "stop")
"""Annotations that a pod may have for one of its containers: with `.CONTAINER` at the end."""
WASM_VARIANT = "module.wasm.image/variant"
OCI_HANDLER = "run.oci.handler"

DEFAULT_ALLOWED_ANNOTATIONS = ("listen", "stop", "isolation: process", "shm-size")


class WasmMode(enum.Enum):
    """What an OCI handler does with a Wasm image (option `wasm`)."""

    EXECUTOR = "executor"
    NATIVE = "native"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class HandlerRules:
    """The part of a handler's configuration that is for others than the handler."""

    name: str
    kind: Kind
    wasm: WasmMode = WasmMode.OFF
    linux_containers: str = ""
    container_handlers: tuple[str, ...] = ()
    allowed_annotations: tuple[str, ...] = DEFAULT_ALLOWED_ANNOTATIONS
    default_env: Mapping[str, str] = field(default_factory=dict)
    """Of every container; what the image says wins."""
    default_sysctls: Mapping[str, str] = field(default_factory=dict)
    """Of every pod with the namespaces for them; what the pod says wins."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The facts about one container. `image_wasm`: the image is a Wasm artifact, it has no root file system.

    `named_wasm`: the command is named as Wasm files are, whatever it is.
    """

    name: str
    container_annotations: Mapping[str, str]
    pod_annotations: Mapping[str, str]
    image_annotations: Mapping[str, str]
    image_wasm: bool
    platform_wasm: bool
    entry: EntryKind
    named_wasm: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The handler's name, and why in one clause."""

    handler: str
    wasm: bool
    reason: str


def pod_handler(handlers: Mapping[str, HandlerRules], default: str, asked: str) -> HandlerRules:
    """The handler of a pod: `runtime_handler` of the request, or the default one."""
    name = asked or default
    rules = handlers.get(name)
    if rules is None:
        msg = f"no runtime handler {name!r} is configured"
        raise NotFound(msg, hint=f"there are: {', '.join(sorted(handlers))}")
    return rules


def decide(handlers: Mapping[str, HandlerRules], pod: HandlerRules, subject: Subject) -> Decision:
    """Pick the handler of one container. Raises what the client can act on; see the module's invariant."""
    check_annotations(pod, subject)
    wasm, why = _is_wasm(pod, subject)
    forced = _forced_handler(handlers, pod, subject)
    if forced is not None:
        runs_wasm = forced.kind is Kind.WASM or forced.wasm is WasmMode.NATIVE
        if (forced.kind is Kind.WASM and not wasm) or (wasm and not runs_wasm):
            kind = "Wasm" if wasm else "no Wasm"
            msg = f"{HANDLER_ANNOTATION}{subject.name} names {forced.name!r}, but the container is {kind}: {why}"
            raise InvalidArgument(msg)
        return Decision(forced.name, wasm, f"annotation {HANDLER_ANNOTATION}{subject.name}; {why}")
    if wasm:
        return _wasm_handler(handlers, pod, why)
    return _linux_handler(handlers, pod, why)


def check_annotations(pod: HandlerRules, subject: Subject) -> None:
    """Refuse every `cri-shim.io/` annotation that is unknown, not allowed by the handler, or not supported."""
    for key, value in subject.pod_annotations.items():
        if key.startswith(ANNOTATION_PREFIX) and not key.startswith(HANDLER_ANNOTATION):
            name, dot, container = key.removeprefix(ANNOTATION_PREFIX).partition(".")
            known = not dot or (container and name in _PER_CONTAINER)
            _check_annotation(pod, key, name if known else key, value)
    for key, value in subject.container_annotations.items():
        if key.startswith(ANNOTATION_PREFIX) and not key.startswith(HANDLER_ANNOTATION):
            name = key.removeprefix(ANNOTATION_PREFIX)
            _check_annotation(pod, key, name, value)
            if name == "shm-size":
                msg = f"annotation {key} is for pods: the containers of a pod share its /dev/shm"
                raise InvalidArgument(msg)
    if ports := subject.image_annotations.get(LISTEN_ANNOTATION):
        _check_annotation(pod, LISTEN_ANNOTATION, "listen", ports)


def _check_annotation(pod: HandlerRules, key: str, name: str, value: str) -> None:
    if name not in {*_PER_CONTAINER, "shm-size"}:
        msg = f"unknown annotation {key!r}"
        each = ", ".join(f"{word}[.CONTAINER]" for word in _PER_CONTAINER)
        raise InvalidArgument(msg, hint=f"known: handler.CONTAINER, {each}, shm-size")
    if value not in _VALUES.get(name, (value,)):
        msg = f"annotation {key}: {value!r} is not one of {', '.join(_VALUES[name])}"
        raise InvalidArgument(msg)
    if name not in pod.allowed_annotations and f"{name}: {value}" not in pod.allowed_annotations:
        msg = f"annotation {key}: {value} is not allowed by handler {pod.name!r}"
        raise InvalidArgument(msg, hint="the node's administrator lists it in the handler's allowed_annotations")


def _is_wasm(pod: HandlerRules, subject: Subject) -> tuple[bool, str]:
    """Whether it is Wasm, and why: an artifact, a word of the container itself, the entry's bytes, then hints."""
    entry = f"the entrypoint is {subject.entry.value}"
    own = wasm_annotation(subject.container_annotations)
    hint = _wasm_hint(pod, subject)
    if subject.image_wasm:
        return True, "the image is a Wasm artifact"
    if own and subject.entry is not EntryKind.WASM:
        msg = f"the container's annotation {own} asks for Wasm, but {entry}"
        raise InvalidArgument(msg)
    if own:
        return True, f"the container's annotation {own}"
    if hint and subject.entry in {EntryKind.OTHER, EntryKind.MISSING}:
        return True, hint
    return subject.entry is EntryKind.WASM, entry


def _wasm_hint(pod: HandlerRules, subject: Subject) -> str:
    """What the pod, the image or the name says; an entrypoint that is plainly Linux wins over it."""
    if of_pod := wasm_annotation(subject.pod_annotations):
        return f"the pod's annotation {of_pod}"
    if of_image := wasm_annotation(subject.image_annotations):
        return f"the image's annotation {of_image}"
    if subject.platform_wasm:
        return "the image's platform is Wasm"
    # Who gives a module to a Wasm handler is told what is wrong with it, not what a Linux runtime makes of the name.
    return "the command is named as a Wasm file" if pod.kind is Kind.WASM and subject.named_wasm else ""


def wasm_annotation(annotations: Mapping[str, str]) -> str:
    """The word among these by which crun, too, takes a container for Wasm; empty without one."""
    variant = annotations.get(WASM_VARIANT, "")
    if variant in {"compat", "compat-smart"}:
        return f"{WASM_VARIANT}: {variant}"
    if annotations.get(OCI_HANDLER, "") == "wasm":
        return f"{OCI_HANDLER}: wasm"
    return ""


def _forced_handler(handlers: Mapping[str, HandlerRules], pod: HandlerRules, subject: Subject) -> HandlerRules | None:
    key = HANDLER_ANNOTATION + subject.name
    name = subject.container_annotations.get(key) or subject.pod_annotations.get(key)
    if not name:
        return None
    allowed = {pod.name, pod.linux_containers, *pod.container_handlers} - {""}
    if name not in allowed:
        msg = f"annotation {key}: {name} is not allowed by handler {pod.name!r}"
        raise InvalidArgument(msg, hint=f"allowed: {', '.join(sorted(allowed))}")
    return _existing(handlers, name, f"annotation {key}")


def _wasm_handler(handlers: Mapping[str, HandlerRules], pod: HandlerRules, why: str) -> Decision:
    if pod.kind is Kind.WASM:
        return Decision(pod.name, wasm=True, reason=why)
    if pod.wasm is WasmMode.NATIVE:
        return Decision(pod.name, wasm=True, reason=f"{why}; handler {pod.name!r} runs Wasm in its own engine")
    executor = next((rules for rules in handlers.values() if rules.kind is Kind.WASM), None)
    if pod.wasm is WasmMode.OFF or executor is None:
        names = [r.name for r in handlers.values() if r.kind is Kind.WASM or r.wasm is not WasmMode.OFF]
        msg = f"handler {pod.name!r} runs no Wasm, but {why}"
        raise FailedPrecondition(msg, hint=f"use a RuntimeClass with handler {' or '.join(sorted(names)) or 'wasm'}")
    return Decision(executor.name, wasm=True, reason=f"{why}; handler {pod.name!r} leaves Wasm to {executor.name!r}")


def _linux_handler(handlers: Mapping[str, HandlerRules], pod: HandlerRules, why: str) -> Decision:
    if pod.kind is Kind.LINUX:
        return Decision(pod.name, wasm=False, reason=why)
    if not pod.linux_containers:
        msg = f"handler {pod.name!r} runs no Linux containers, and {why}"
        raise FailedPrecondition(msg, hint="set the handler's linux_containers, or use a RuntimeClass for Linux")
    target = _existing(handlers, pod.linux_containers, f"linux_containers of handler {pod.name!r}")
    return Decision(target.name, wasm=False, reason=f"{why}; handler {pod.name!r} leaves Linux to {target.name!r}")


def _existing(handlers: Mapping[str, HandlerRules], name: str, source: str) -> HandlerRules:
    rules = handlers.get(name)
    if rules is None:
        msg = f"{source} names {name!r}, but no such handler is configured or its program is missing"
        raise FailedPrecondition(msg, hint=f"there are: {', '.join(sorted(handlers))}")
    return rules
