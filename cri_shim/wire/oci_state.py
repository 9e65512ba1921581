"""What an OCI runtime prints: `features`, `--version`, the lines of its JSON log.

Not the calls (`cri_shim.adapters.oci_runtime`). Invariant: unknown fields are fine, runtimes add them; a text that
is not of the form at all is an error or, in a log, skipped.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cri_shim.model.errors import CannotExecute, CriShimError, FailedPrecondition, Internal


@dataclass(frozen=True, slots=True)
class _Cause:
    """What is wrong with the image or the request rather than with the node; runc and crun have words of their own.

    `status` is that of a shell when a program cannot be executed, 0 for anything else.
    """

    words: re.Pattern[str]
    hint: str
    status: int = 0


_CAUSES = (
    _Cause(
        re.compile(r"exec format error", re.IGNORECASE),
        "{program} is for another CPU, or no program at all; a Wasm module needs a RuntimeClass of a Wasm handler",
        126,
    ),
    _Cause(
        re.compile(
            r"executable file .*not found|exec: .*no such file or directory|executable: file name too long",
            re.IGNORECASE,
        ),
        "the image has no {program}; check command, args and PATH",
        127,
    ),
    _Cause(
        re.compile(r"exec (/|container process ).*no such file or directory", re.IGNORECASE),
        "the image lacks what {program} is run by: the interpreter of its first line, or its dynamic loader",
        127,
    ),
    _Cause(
        re.compile(r"(exec: |open executable: ).*(permission denied|not permitted)", re.IGNORECASE),
        "{program} must be a file that the container's user may execute",
        126,
    ),
    _Cause(
        re.compile(r"(exec: |executable: ).*too many levels of symbolic links", re.IGNORECASE),
        "{program} is a symbolic link in a circle",
        126,
    ),
    _Cause(
        re.compile(r"argument list too long", re.IGNORECASE),
        "command, args and envs are more than the kernel hands to a program",
        126,
    ),
    _Cause(
        re.compile(r"(mount_setattr|MOUNT_ATTR_IDMAP).*support idmap mounts", re.IGNORECASE),
        "the file system of the volume has no idmapped mounts, which a pod with a user namespace needs",
    ),
    _Cause(
        re.compile(r"mount.*: not a directory", re.IGNORECASE),
        "container_path must lead through directories, to a directory for a directory and to a file for a file",
    ),
    _Cause(
        re.compile(r"(chdir|mkdir) .*: not a directory", re.IGNORECASE),
        "working_dir and every container_path must lead through directories of the image",
    ),
    _Cause(
        re.compile(r"cpuset\.(cpus|mems)"),
        "cpuset_cpus and cpuset_mems can only name what the node and the pod's cgroup have",
    ),
    _Cause(
        re.compile(r"memory limit could be too low|memory limit too low|unable to set memory limit", re.IGNORECASE),
        "raise memory_limit_in_bytes",
    ),
    _Cause(
        re.compile(
            r"(/sys/fs/cgroup/|writing file `)\S+: "
            r"(invalid argument|numerical result out of range|no such file or directory|device or resource busy)",
            re.IGNORECASE,
        ),
        "linux.resources asks for what this kernel, or the cgroup of the pod, does not allow",
    ),
)

_ERROR_LEVELS = frozenset({"error", "fatal", "panic"})


@dataclass(frozen=True, slots=True)
class Version:
    """The answer to `--version`. `tags` are what crun was built with (`+WASM:wasmedge`)."""

    name: str
    version: str
    spec: str
    tags: frozenset[str]


def parse_version(text: str) -> Version:
    """Parse `NAME version X`, `spec: Y` and a line of `+TAG`s (runc, crun, youki). Internal when there is no name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = lines[0].split() if lines else []
    if len(words) < 3 or words[1] != "version":
        msg = f"the runtime's --version is {text[:100]!r}, which does not say `NAME version NUMBER`"
        raise Internal(msg)
    spec = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("spec:")), "1.0.0")
    tags = frozenset(word[1:] for line in lines if line.startswith("+") for word in line.split())
    return Version(words[0], words[2], spec, tags)


class _Idmap(msgspec.Struct):
    enabled: bool | None = None


class _MountExtensions(msgspec.Struct):
    idmap: _Idmap | None = None


class _Linux(msgspec.Struct, rename="camel"):
    namespaces: tuple[str, ...] = ()
    mount_extensions: _MountExtensions | None = None


class _Features(msgspec.Struct, rename="camel"):
    """OCI runtime-spec, features."""

    oci_version_max: str = ""
    mount_options: tuple[str, ...] = ()
    linux: _Linux | None = None


@dataclass(frozen=True, slots=True)
class RuntimeFeatures:
    """What decides fields of a request. The kernel has a word in both as well."""

    recursive_read_only: bool
    user_namespaces: bool


def parse_features(document: bytes) -> RuntimeFeatures:
    """Parse the output of `features`. Internal when it is not that document."""
    try:
        said = msgspec.json.decode(document, type=_Features)
    except msgspec.DecodeError as error:
        msg = f"the runtime's features cannot be read: {error}"
        raise Internal(msg) from error
    extensions = said.linux.mount_extensions if said.linux else None
    idmap = extensions.idmap if extensions else None
    return RuntimeFeatures(
        recursive_read_only="rro" in said.mount_options,
        user_namespaces=bool(said.linux and "user" in said.linux.namespaces and idmap and idmap.enabled),
    )


class _State(msgspec.Struct):
    """OCI runtime-spec, runtime, state."""

    status: str


def parse_state(document: bytes) -> str:
    """The `status` in the output of `state`: creating, created, running, stopped. Internal when it is not that."""
    try:
        return msgspec.json.decode(document, type=_State).status
    except msgspec.DecodeError as error:
        msg = f"the runtime's state cannot be read: {error}"
        raise Internal(msg) from error


class _LogLine(msgspec.Struct):
    level: str = ""
    msg: str = ""


def last_error(log: bytes) -> str:
    """The message of the last error in a JSON log, empty when there is none. Broken lines are skipped."""
    for line in reversed(log.splitlines()):
        try:
            entry = msgspec.json.decode(line, type=_LogLine)
        except msgspec.DecodeError:
            continue
        if entry.level in _ERROR_LEVELS and entry.msg:
            return entry.msg
    return ""


_EXECUTE = re.compile(r"exec (?:container process (?:\(missing[^)]*\) )?`)?(?P<program>[^`:]+)`?: [^\"\n]+")


def execute_error(last_words: str, program: str) -> str:
    """What a runtime's init wrote when the kernel refused to execute `program`; empty when it wrote nothing of it.

    It happens after `start` has returned, so that runc and crun tell it on the container's own stderr.
    """
    last_line = last_words.rpartition("\n")[2]
    found = _EXECUTE.search(last_line)
    if found is None or posixpath.basename(found["program"]) != posixpath.basename(program):
        return ""
    return found[0]


def runtime_error(what: str, said: str, args: Sequence[str] = ()) -> CriShimError:
    """The error for a failed call: what the runtime said, and a hint where the cause is known."""
    program = args[0] if args else "the command"
    text = f"{what}: {said or 'the runtime failed without a word'}"
    cause = next((cause for cause in _CAUSES if cause.words.search(said)), None)
    if cause is None:
        return Internal(text)
    hint = cause.hint.format(program=program)
    if cause.status:
        return CannotExecute(text, hint=hint, exit_status=cause.status)
    return FailedPrecondition(text, hint=hint)
