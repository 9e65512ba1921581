"""Mounts: bind, tmpfs, overlay, unmount, propagation, and the mount table.

Not a place for decisions about what to mount. All functions act in the mount namespace of the calling thread and may
block: call them in a thread. Invariant: a mount that is not there is never an error of an unmount.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from cri_shim.kernel import libc, threads

T = TypeVar("T")

_OPTIONS_PAGE: Final = 4095
"""Bytes of options that mount(2) takes."""
_FSCONFIG_STRING: Final = 255
"""Bytes of one value that fsconfig(2) takes."""


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5)), escapes decoded.

    `propagation` holds the tags as written (`shared:7`, `master:3`); empty is private.
    """

    mount_id: int
    parent_id: int
    device: str
    root: str
    target: Path
    options: tuple[str, ...]
    propagation: tuple[str, ...]
    fstype: str
    source: str
    super_options: tuple[str, ...]


def bind(source: Path, target: Path, *, readonly: bool = False, recursive: bool = False) -> None:
    """Bind `source` onto `target`; `readonly` is in force before the mount appears."""
    if not readonly:
        libc.mount(source, target, None, libc.MS_BIND | (libc.MS_REC if recursive else 0))
        return
    tree = libc.open_tree(source, libc.OPEN_TREE_CLONE | (libc.AT_RECURSIVE if recursive else 0))
    try:
        libc.mount_setattr(tree, set_attributes=libc.MOUNT_ATTR_RDONLY, recursive=recursive)
        libc.move_mount(tree, target)
    finally:
        os.close(tree)


_OPTIONS: Final = {
    "nosuid": (libc.MOUNT_ATTR_NOSUID, 0),
    "nodev": (libc.MOUNT_ATTR_NODEV, 0),
    "noexec": (libc.MOUNT_ATTR_NOEXEC, 0),
    "nodiratime": (libc.MOUNT_ATTR_NODIRATIME, 0),
    "noatime": (libc.MOUNT_ATTR_NOATIME, libc.MOUNT_ATTR_ATIME),
    "relatime": (libc.MOUNT_ATTR_RELATIME, libc.MOUNT_ATTR_ATIME),
    "strictatime": (libc.MOUNT_ATTR_STRICTATIME, libc.MOUNT_ATTR_ATIME),
}
"""Attributes to set, and to clear before that."""


def view(source: Path, target: Path | int, *, readonly: bool = False, options: Sequence[str] = ()) -> None:
    """Show at `target`, a path or a descriptor, what is at `source`, with the mounts below it, now and later.

    What is mounted or unmounted in the view does not reach the source. `readonly` holds at every depth, the `options`
    (as of mount(8), `_OPTIONS`) for the mount itself. All is in force before it appears.
    """
    tree = libc.open_tree(source, libc.OPEN_TREE_CLONE | libc.AT_RECURSIVE)
    try:
        everywhere = libc.MOUNT_ATTR_RDONLY if readonly else 0
        libc.mount_setattr(tree, set_attributes=everywhere, propagation=libc.MS_SLAVE, recursive=True)
        come, go = 0, 0
        for option in options:
            come, go = come | _OPTIONS[option][0], go | _OPTIONS[option][1]
        libc.mount_setattr(tree, set_attributes=come, clear_attributes=go, recursive=False)
        libc.move_mount(tree, target)
    finally:
        os.close(tree)


def without_devices(source: str | os.PathLike[str]) -> int:
    """A descriptor of what is at `source`, with the mounts below it now, through which no device can be opened.

    It is mounted nowhere, and gone when that descriptor and all that was opened through it are closed.
    """
    tree = libc.open_tree(source, libc.OPEN_TREE_CLONE | libc.AT_RECURSIVE)
    try:
        libc.mount_setattr(tree, set_attributes=libc.MOUNT_ATTR_NODEV, recursive=True)
    except BaseException:
        os.close(tree)
        raise
    return tree


def tmpfs(target: Path, *, size: int, mode: int, uid: int = 0, gid: int = 0, label: str = "") -> None:
    """Mount a tmpfs of `size` bytes; nothing in it is executed, is a device or gains rights. `label` is SELinux's."""
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    libc.mount("tmpfs", target, "tmpfs", flags, f"size={size},mode={mode:o},uid={uid},gid={gid}{_labelled(label)}")


def overlay(
    target: Path,
    lowers: Sequence[Path],
    upper: Path | None,
    work: Path | None,
    *,
    options: Sequence[str] = (),
    label: str = "",
) -> None:
    """Mount an overlay of `lowers` (top first) at `target`; read-only when `upper` and `work` are None.

    `options` are overlayfs options as `key=value` or `flag`; `label` is SELinux's, of every file in it. The kernel
    takes up to 500 lower directories.
    """
    if upper is None and len(lowers) == 1:
        bind(lowers[0], target, readonly=True)  # overlayfs wants two lower directories when there is no upper one
    elif _has_lowerdir_append():
        labelled = [*options, f"context={label}"] if label else options
        _overlay_by_fsconfig(target, lowers, upper, work, labelled)
    else:
        threads.call_in_new_thread(lambda: _overlay_by_mount(target, lowers, upper, work, options, label))


def idmapped_overlay(  # noqa: PLR0913  as `overlay`, and two more
    target: Path,
    lowers: Sequence[Path],
    upper: Path | None,
    work: Path | None,
    *,
    base: Path,
    user_namespace: Path,
    label: str = "",
) -> None:
    """The same, where what root owns in lower directories at or below `base` belongs to root of `user_namespace`.

    So it is with every id that is mapped there. `user_namespace` is a pinned one. OSError EINVAL for a file system
    below `base` that cannot be mapped (mount_setattr(2)); overlays of such layers exist since Linux 5.19.
    """

    def make() -> int:
        # In a mount table of this thread's own nobody sees `base` mapped, and nothing of that is left.
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount(None, "/", None, libc.MS_PRIVATE | libc.MS_REC)
        _map_ids(base, user_namespace)
        overlay(target, lowers, upper, work, label=label)
        return libc.open_tree(target, libc.OPEN_TREE_CLONE)

    tree = threads.call_in_new_thread(make)
    try:
        libc.move_mount(tree, target)
    finally:
        os.close(tree)


def looking_at(lowers: Sequence[Path], target: Path, look: Callable[[Path], T]) -> T:
    """What `look` makes of an overlay of `lowers` (top first), which it finds at `target` and nobody else does.

    The mount is in a namespace of its own, and goes with it. Blocks.
    """

    def body() -> T:
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount(None, Path("/"), None, libc.MS_REC | libc.MS_PRIVATE)
        overlay(target, lowers, None, None)
        return look(target)

    return threads.call_in_new_thread(body)


def _map_ids(path: Path, user_namespace: Path) -> None:
    with user_namespace.open("rb") as namespace:
        tree = libc.open_tree(path, libc.OPEN_TREE_CLONE)
        try:
            libc.mount_setattr(
                tree, set_attributes=libc.MOUNT_ATTR_IDMAP, recursive=False, user_namespace=namespace.fileno()
            )
            libc.move_mount(tree, path)
        finally:
            os.close(tree)


@functools.cache
def _has_lowerdir_append() -> bool:
    try:
        context = libc.fsopen("overlay")
    except OSError:
        return False
    try:
        libc.fsconfig(context, libc.FSCONFIG_SET_STRING, "lowerdir+", "/")
    except OSError:
        return False
    finally:
        os.close(context)
    return True


def _overlay_by_fsconfig(
    target: Path, lowers: Sequence[Path], upper: Path | None, work: Path | None, options: Sequence[str]
) -> None:
    with contextlib.ExitStack() as descriptors:
        context = libc.fsopen("overlay")
        descriptors.callback(os.close, context)
        layers = [("lowerdir+", lower) for lower in lowers]
        if upper is not None and work is not None:
            layers += [("upperdir", upper), ("workdir", work)]
        with _kernel_says(context):
            libc.fsconfig(context, libc.FSCONFIG_SET_STRING, "source", "overlay")
            for option in options:
                key, has_value, value = option.partition("=")
                command = libc.FSCONFIG_SET_STRING if has_value else libc.FSCONFIG_SET_FLAG
                libc.fsconfig(context, command, key, value if has_value else None)
            for key, path in layers:
                libc.fsconfig(context, libc.FSCONFIG_SET_STRING, key, _short_name(path, key, descriptors))
            libc.fsconfig(context, libc.FSCONFIG_CMD_CREATE)
            mounted = libc.fsmount(context, 0)
        descriptors.callback(os.close, mounted)
        libc.move_mount(mounted, target)


def _short_name(path: Path, key: str, descriptors: contextlib.ExitStack) -> str:
    # A lower directory is taken literally, the two others are unescaped as in a mount(2) string.
    name = os.fspath(path) if key == "lowerdir+" else _escaped(os.fspath(path), "\\")
    if len(os.fsencode(name)) <= _FSCONFIG_STRING:
        return name
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    descriptors.callback(os.close, fd)
    return f"/proc/self/fd/{fd}"


@contextlib.contextmanager
def _kernel_says(context: int) -> Generator[None]:
    """Add what the file system wrote into its context (`e overlay: …`) to an OSError of fsconfig or fsmount."""
    try:
        yield
    except OSError as error:
        lines = []
        with contextlib.suppress(OSError):  # ENODATA ends the list
            while line := os.read(context, 4096):
                lines.append(line.decode(errors="replace").strip().removeprefix("e "))
        if not lines:
            raise
        raise OSError(error.errno, f"{error.strerror} ({'; '.join(lines)})", error.filename) from error


def _overlay_by_mount(
    target: Path, lowers: Sequence[Path], upper: Path | None, work: Path | None, options: Sequence[str], label: str
) -> None:
    # Own cwd and relative names: a hundred layers fit into the one page of options.
    target, base = target.absolute(), os.path.commonpath([lower.absolute().parent for lower in lowers])
    libc.unshare(libc.CLONE_FS)
    os.chdir(base)
    names = [_escaped(os.path.relpath(lower.absolute(), base), "\\:,") for lower in lowers]
    words = [f"lowerdir={':'.join(names)}"]
    if upper is not None and work is not None:
        words += [
            f"{key}dir={_escaped(os.fspath(at.absolute()), chr(92) + ',')}"
            for key, at in (("upper", upper), ("work", work))
        ]
    data = ",".join([*words, *options]) + _labelled(label)
    if len(os.fsencode(data)) > _OPTIONS_PAGE:
        raise OSError(errno.E2BIG, f"overlay of {len(lowers)} layers needs a kernel with lowerdir+", os.fspath(target))
    libc.mount("overlay", target, "overlay", 0, data)


def _labelled(label: str) -> str:
    """In a mount(2) string, where a label may have commas."""
    return f',context="{label}"' if label else ""


def _escaped(name: str, special: str) -> str:
    return re.sub(f"[{re.escape(special)}]", r"\\\g<0>", name)


def unmount(target: Path, *, detach: bool = True) -> bool:
    """Unmount what is on top at `target`; not mounted or missing is success. Whether there was something."""
    flags = libc.UMOUNT_NOFOLLOW | (libc.MNT_DETACH if detach else 0)
    try:
        libc.umount2(target, flags)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT, errno.ENOTDIR}:
            raise
        return False
    return True


def unmount_all(target: Path) -> None:
    """Unmount whatever is stacked at `target`."""
    while unmount(target):
        pass


def unmount_tree(prefix: Path) -> None:
    """Unmount all mounts at or below `prefix` (an absolute path without symlinks), deepest and latest first."""
    below = [entry.target for entry in mountinfo() if entry.target.is_relative_to(prefix)]
    below.sort(key=lambda target: len(target.parts))
    for target in reversed(below):
        unmount(target)


def make_shared(path: Path) -> None:
    """Make the mount at `path` shared; a plain directory is bound onto itself first."""
    _set_propagation(path, libc.MS_SHARED)


def make_private(path: Path) -> None:
    """Make the mount at `path` private; a plain directory is bound onto itself first."""
    _set_propagation(path, libc.MS_PRIVATE)


def _set_propagation(path: Path, kind: int) -> None:
    if not is_mount_point(path):
        bind(path, path)
    libc.mount(None, path, None, kind)


def mountinfo() -> list[MountEntry]:
    """The mount table of the calling thread's namespace, in the kernel's order."""
    return parse_mountinfo(Path("/proc/thread-self/mountinfo").read_bytes())


def parse_mountinfo(table: bytes) -> list[MountEntry]:
    """Parse the text of a mountinfo file."""
    return [_parse_entry(line) for line in table.splitlines()]


def _parse_entry(line: bytes) -> MountEntry:
    words = [_decoded(word) for word in line.split(b" ")]
    dash = words.index("-", 6)
    fstype, source, super_options = words[dash + 1 : dash + 4]
    return MountEntry(
        mount_id=int(words[0]),
        parent_id=int(words[1]),
        device=words[2],
        root=words[3],
        target=Path(words[4]),
        options=tuple(words[5].split(",")),
        propagation=tuple(words[6:dash]),
        fstype=fstype,
        source=source,
        super_options=tuple(super_options.split(",")),
    )


def _decoded(word: bytes) -> str:
    if b"\\" in word:
        word = re.sub(rb"\\([0-3][0-7]{2})", lambda octal: bytes([int(octal[1], 8)]), word)
    return os.fsdecode(word)


def is_mount_point(path: Path) -> bool:
    """Whether a mount (also a bind of a file) is at `path`; False when nothing is there."""
    try:
        return _mount_id(path) != _mount_id(path.absolute().parent) or path.absolute() == Path("/")
    except (FileNotFoundError, NotADirectoryError):
        return False


def propagation_of(path: Path) -> tuple[str, ...]:
    """The propagation tags of the mount that holds `path`, as in MountEntry; empty is private."""
    mount_id = _mount_id(path)
    return next((entry.propagation for entry in mountinfo() if entry.mount_id == mount_id), ())


def _mount_id(path: Path) -> int:
    # Cheaper than the mount table, which has a line per container.
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        info = Path(f"/proc/thread-self/fdinfo/{fd}").read_bytes()
    finally:
        os.close(fd)
    return next(int(line.split()[1]) for line in info.splitlines() if line.startswith(b"mnt_id:"))
