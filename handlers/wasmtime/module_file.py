"""Finding the module of a container: the blob of an artifact, or a file in the root file system.

Not the compiler. All of it reads files: call it in a thread. Invariant: only Wasm is accepted, as a binary or as
text, and never code that somebody else has compiled.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import posixpath
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.kernel import fs
from cri_shim.model.entry import split_function
from cri_shim.model.errors import CannotExecute, FailedPrecondition, InvalidArgument, NotFound
from cri_shim.model.handler import ContainerPlan
from cri_shim.model.ids import Digest
from cri_shim.model.layout import Layout
from cri_shim.wire.wasm_shape import Shape, Table, parse_shape
from handlers.wasmtime.applets import NAMES, applet
from handlers.wasmtime.guest_spec import DEFAULT_FUNCTION, Entry, GuestSpec
from handlers.wasmtime.wasm_text import first_word

_MAGIC: Final = b"\0asm"
_CORE_MODULE: Final = _MAGIC + b"\x01\0\0\0"
_COMPONENT_LAYER: Final = b"\x01\0"
"""Bytes 6 and 7 of a component (component model, Binary.md); those of a core module are zero."""
_TABLES_OF_TEXT: Final = (Table(0),) * 4
"""Only the compiler parses it: all that a module may have (`handlers.wasmtime.core_module`)."""
_HEAD: Final = 4096
"""Bytes: a text may begin with a licence."""
_NO_FILE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What a word means that names none: links in a circle and what is too long for a name are no error of ours."""
_NO_PROGRAM, _NO_SUCH_PROGRAM = 126, 127
"""As of a shell."""


def split_entry(word: str) -> tuple[str, str]:
    """`path#function` → path and function; without a function it is `_start`."""
    path, function = split_function(word)
    return path, function or DEFAULT_FUNCTION


def find_module(plan: ContainerPlan, layout: Layout) -> tuple[Entry, str]:
    """The module, and argv[0]."""
    word, function = split_entry(plan.process.args[0])
    if plan.image is not None and plan.image.wasm is not None:
        digest = plan.image.wasm.digest
        path = layout.blob(digest)
        try:
            head = read_head(path)
        except FileNotFoundError:
            msg = f"the module {digest} of image {plan.image.id} is not on this node"
            raise FailedPrecondition(msg, hint="remove the image and pull it again") from None
    else:
        if plan.rootfs is None:
            msg = "the image has neither a Wasm module nor a root file system"
            raise InvalidArgument(msg)
        search = next((item.removeprefix("PATH=") for item in plan.process.env if item.startswith("PATH=")), "")
        path, head, digest = _look_up({"/": plan.rootfs}, word, search, plan.process.cwd)
    return Entry(str(path), digest, function, is_component(head, word)), word


def is_component(head: bytes, name: str) -> bool:
    """Whether it is a component, else a core module, by how it begins; anything else is refused."""
    if head.startswith(_CORE_MODULE):
        return False
    if word := first_word(head):
        return word == "component"
    if head.startswith(_MAGIC) and head[6:8] == _COMPONENT_LAYER:
        return True
    hint = "give a module in the binary format, built for wasm32-wasip1 or wasm32-wasip2"
    if head.startswith(_MAGIC):
        version = int.from_bytes(head[4:6], "little")
        msg = f"{name} is of version {version} of the Wasm format, which this version cannot run"
    elif head.startswith(b"\x7fELF"):
        msg = f"{name} is native code; a module that was compiled elsewhere is never loaded"
    else:
        msg = f"{name} is not a Wasm module"
    raise InvalidArgument(msg, hint=hint)


def read_head(path: Path) -> bytes:
    """As much of a file as `is_component` wants."""
    with path.open("rb") as file:
        return file.read(_HEAD)


def shape_of(path: Path) -> Shape:
    """What a core module keeps data in. OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[: len(_MAGIC)] == _MAGIC:
            return parse_shape(content)
        return Shape(tables=_TABLES_OF_TEXT, description=len(content))


def find_further(spec: GuestSpec, word: str) -> Entry | None:
    """The module of a further process, by the first word of its command; None when that means an applet.

    In an artifact it is the one module that there is, under any name of a module. CannotExecute for anything else.
    """
    try:
        return _further_module(spec, word)
    except (NotFound, InvalidArgument) as error:
        if applet(word):
            return None
        status = _NO_SUCH_PROGRAM if isinstance(error, NotFound) else _NO_PROGRAM
        others = f"{error.hint}; besides, there are {', '.join(NAMES)}"
        raise CannotExecute(error.cause, hint=others, exit_status=status) from None


def _further_module(spec: GuestSpec, word: str) -> Entry:
    name, function = split_entry(word)
    variables = dict(spec.env)
    # Not in the node's directories: whether the container's user may read what is in them is not known here.
    images = {p.guest: None if p.host_backed and p.guest != "/" else Path(p.host) for p in spec.preopens}
    try:
        path, head, digest = _look_up(images, name, variables.get("PATH", ""), variables.get("PWD", "/"))
    except NotFound:
        if "/" in images:
            raise
    else:
        return Entry(str(path), digest, function, is_component(head, name))
    if name == spec.argv[0] or name.endswith(".wasm"):
        return msgspec.structs.replace(spec.entry, function=function)
    msg = f"there is no program {name!r}: the image is one Wasm module"
    hint = f"{spec.argv[0]!r}, or a name that ends with .wasm, runs it once more; with #FUNCTION another export of it"
    raise NotFound(msg, hint=hint)


def _look_up(directories: Mapping[str, Path | None], word: str, search: str, cwd: str) -> tuple[Path, bytes, Digest]:
    """The file that a word means, in directories by their places in the container; None = not to be looked into."""
    for candidate in _candidates(word, search, cwd):
        path = "/" + posixpath.normpath(posixpath.join("/", candidate)).lstrip("/")
        place = max(
            (place for place in directories if f"{path}/".startswith(f"{place.rstrip('/')}/")), key=len, default=""
        )
        directory = directories.get(place)
        if directory is None:
            continue
        try:
            handle = fs.open_in_root(directory, posixpath.relpath(path, place), os.O_PATH)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            continue
        try:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return _read(handle)
        finally:
            os.close(handle)
    msg = f"module {word!r} is not in the image"
    raise NotFound(msg, hint="command[0] is a path in the image, or a name on PATH or in the working directory")


def _candidates(word: str, search: str, cwd: str) -> Iterator[str]:
    if "/" not in word:
        yield from (posixpath.join(directory, word) for directory in search.split(":") if directory)
    yield posixpath.join(cwd or "/", word)


def _read(handle: int) -> tuple[Path, bytes, Digest]:
    link = Path(f"/proc/thread-self/fd/{handle}")
    with link.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return link.readlink(), head, Digest(f"sha256:{digest}")
