"""ls, cat, stat, df and test: the files of a container as its module sees them."""

from __future__ import annotations

import os
import posixpath
import stat
import time
from collections.abc import Callable, Sequence
from typing import Final

from handlers.wasmtime.applets.about import describe
from handlers.wasmtime.applets.options import UsageError, options
from handlers.wasmtime.applets.program import Container
from handlers.wasmtime.applets.view import Status

_BLOCK: Final = 1 << 16
_MINOR, _SERIOUS = 1, 2
_SECOND: Final = 1_000_000_000
_MODES: Final = 0o7777


def run_cat(container: Container, words: Sequence[str]) -> int:
    """Files one after the other; `-` and no file at all are standard input."""
    _, names = options(words, "u")
    status = 0
    for name in names or ["-"]:
        try:
            if name == "-":
                _copy(0)
            else:
                _cat(container, name)
        except BrokenPipeError:
            raise
        except OSError as error:
            container.failed(name, error)
            status = 1
    return status


def _cat(container: Container, name: str) -> None:
    if stat.S_ISDIR(container.view.status(name, follow=True).mode):
        raise IsADirectoryError(0, "Is a directory")
    with container.view.opened(name, os.O_RDONLY) as descriptor:
        _copy(descriptor)


def _copy(descriptor: int) -> None:
    while data := os.read(descriptor, _BLOCK):
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(1, rest) :]


def run_ls(container: Container, words: Sequence[str]) -> int:
    """One name a line, sorted by its bytes. Options: -a, -A, -d, -l, -h, -R; -1 and -n are always so."""
    found, names = options(words, "1AadhlnR")
    return _Listing(container, frozenset(found)).run(names or ["."])


class _Listing:
    def __init__(self, container: Container, flags: frozenset[str]) -> None:
        self._container = container
        self._view = container.view
        self._flags = flags
        self._status = 0
        self._printed = False

    def run(self, names: Sequence[str]) -> int:
        files: list[tuple[str, Status]] = []
        directories: list[tuple[str, Status]] = []
        for name in names:
            try:
                found = self._view.status(name, follow="-l" not in self._flags and "-d" not in self._flags)
                found = self._followed(name, found)
            except OSError as error:
                self._fail(f"cannot access {name!r}", error, _SERIOUS)
                continue
            is_listed = stat.S_ISDIR(found.mode) and "-d" not in self._flags
            (directories if is_listed else files).append((name, found))
        self._print(sorted(files), "")
        self._printed = bool(files)
        pending = [(name, _SERIOUS) for name, _ in sorted(directories, reverse=True)]
        while pending:
            name, blame = pending.pop()
            inner = self._list(name, blame, titled=len(names) > 1)
            pending += [(directory, _MINOR) for directory in reversed(inner)]
        return self._status

    def _followed(self, name: str, found: Status) -> Status:
        """`ls -l link` shows the link, `ls -l link/` what it leads to."""
        return self._view.status(name, follow=True) if name.endswith("/") else found

    def _fail(self, what: str, error: OSError, status: int) -> None:
        self._container.failed(what, error)
        self._status = max(self._status, status)

    def _list(self, directory: str, blame: int, *, titled: bool) -> list[str]:
        """What is still to be listed."""
        try:
            names = self._view.names(directory)
        except OSError as error:
            self._fail(f"cannot open directory {directory!r}", error, blame)
            return []
        if not {"-a", "-A"} & self._flags:
            names = [name for name in names if not name.startswith(".")]
        shown = ([".", ".."] if "-a" in self._flags else []) + names
        entries = [(name, found) for name in shown if (found := self._entry(directory, name)) is not None]
        if titled or "-R" in self._flags:
            self._container.out.write(f"{chr(10) if self._printed else ''}{self._shown(directory)}:\n")
        self._printed = True
        if "-l" in self._flags:
            self._container.out.write(f"total {self._size(sum(found.blocks for _, found in entries) * 512, 1024)}\n")
        self._print(entries, directory)
        if "-R" not in self._flags:
            return []
        inner = (name for name, found in entries if stat.S_ISDIR(found.mode) and name not in {".", ".."})
        return [posixpath.join(directory, name) for name in inner]

    def _entry(self, directory: str, name: str) -> Status | None:
        if not {"-l", "-R"} & self._flags:
            return Status(0)
        path = posixpath.join(directory, name)
        try:
            return self._view.status(path, follow=False)
        except OSError as error:
            self._fail(f"cannot access {path!r}", error, _MINOR)
            return None

    def _print(self, entries: Sequence[tuple[str, Status]], directory: str) -> None:
        if "-l" not in self._flags:
            for name, _ in entries:
                self._container.out.write(f"{self._shown(name)}\n")
            return
        rows = [(*self._columns(found), self._named(directory, name, found)) for name, found in entries]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
        for row in rows:
            columns = (text.rjust(width) for text, width in zip(row[1:5], widths[1:], strict=True))
            self._container.out.write(f"{row[0]} {' '.join(columns)} {row[5]} {row[6]}\n")

    def _columns(self, found: Status) -> tuple[str, str, str, str, str, str]:
        changed = time.strftime("%Y-%m-%d %H:%M", time.gmtime(found.modified_ns // _SECOND))
        mode = stat.filemode(found.mode)
        return mode, str(found.links), str(found.uid), str(found.gid), self._size(found.size), changed

    def _size(self, count: int, unit: int = 1) -> str:
        return human(count) if "-h" in self._flags else str(-(-count // unit))

    def _named(self, directory: str, name: str, found: Status) -> str:
        if not stat.S_ISLNK(found.mode):
            return self._shown(name)
        try:
            return f"{self._shown(name)} -> {self._shown(self._view.link(posixpath.join(directory, name)))}"
        except OSError as error:
            self._fail(f"cannot read symbolic link {name!r}", error, _MINOR)
            return self._shown(name)

    def _shown(self, name: str) -> str:
        """To a terminal nothing goes that would steer it."""
        if not self._container.out.isatty():
            return name
        return "".join(letter if letter.isprintable() else "?" for letter in name)


def human(count: int) -> str:
    """Bytes as `ls -h` has them, rounded up."""
    value, units = float(count), iter("KMGTPE")
    if count < 1024:
        return str(count)
    unit = ""
    while value >= 1024:
        value, unit = value / 1024, next(units)
    tenths = -int(-value * 10 // 1)
    return f"{tenths / 10:.1f}{unit}" if tenths < 100 else f"{-int(-value // 1)}{unit}"


_KINDS: Final = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character special file",
    stat.S_IFBLK: "block special file",
}
_DIRECTIVES: Final[dict[str, Callable[[str, Status], str]]] = {
    "%": lambda _, __: "%",
    "a": lambda _, found: f"{found.mode & _MODES:o}",
    "A": lambda _, found: stat.filemode(found.mode),
    "b": lambda _, found: str(found.blocks),
    "F": lambda _, found: _kind(found),
    "g": lambda _, found: str(found.gid),
    "h": lambda _, found: str(found.links),
    "i": lambda _, found: str(found.inode),
    "n": lambda name, _: name,
    "s": lambda _, found: str(found.size),
    "u": lambda _, found: str(found.uid),
    "X": lambda _, found: str(found.read_ns // _SECOND),
    "Y": lambda _, found: str(found.modified_ns // _SECOND),
    "Z": lambda _, found: str(found.changed_ns // _SECOND),
    "x": lambda _, found: _time(found.read_ns),
    "y": lambda _, found: _time(found.modified_ns),
    "z": lambda _, found: _time(found.changed_ns),
}


def run_stat(container: Container, words: Sequence[str]) -> int:
    """Of files, with -L of what links lead to, with -c FORMAT in this form. Without a file: of the container itself."""
    found, names = options(words, "Lc:", ["format=", "dereference"])
    template = found.get("-c", found.get("--format", ""))
    if not names:
        container.out.write(describe(container))
        return 0
    status = 0
    for name in names:
        try:
            of_file = container.view.status(name, follow=bool({"-L", "--dereference"} & found.keys()))
            text = _formatted(template, name, of_file) if template else _in_full(container, name, of_file)
        except OSError as error:
            container.failed(f"cannot stat {name!r}", error)
            status = 1
        else:
            container.out.write(f"{text}\n")
    return status


def _formatted(template: str, name: str, found: Status) -> str:
    pieces, rest = [], template
    while rest:
        before, percent, rest = rest.partition("%")
        pieces.append(before)
        if percent:
            if rest[:1] not in _DIRECTIVES or not rest:
                msg = f"%{rest[:1]}: unknown directive; there are {' '.join(f'%{letter}' for letter in _DIRECTIVES)}"
                raise UsageError(msg)
            pieces.append(_DIRECTIVES[rest[0]](name, found))
            rest = rest[1:]
    return "".join(pieces)


def _in_full(container: Container, name: str, found: Status) -> str:
    target = f" -> {container.view.link(name)}" if stat.S_ISLNK(found.mode) else ""
    return (
        f"  File: {name}{target}\n"
        f"  Size: {found.size:<15} Blocks: {found.blocks:<10} IO Block: {found.block_size:<6} {_kind(found)}\n"
        f" Inode: {found.inode:<15} Links: {found.links}\n"
        f"Access: ({found.mode & _MODES:04o}/{stat.filemode(found.mode)})  Uid: {found.uid}  Gid: {found.gid}\n"
        f"Access: {_time(found.read_ns)}\n"
        f"Modify: {_time(found.modified_ns)}\n"
        f"Change: {_time(found.changed_ns)}\n"
        f" Mount: {_mount(container, name)}"
    )


def _mount(container: Container, name: str) -> str:
    try:
        guest = container.view.preopen(name)
    except FileNotFoundError:
        return "none; it is on the way to one"
    preopen = next(preopen for preopen in container.spec.preopens if preopen.guest == guest)
    return f"{guest}, {'read-only' if preopen.readonly else 'read-write'}"


def _kind(found: Status) -> str:
    if stat.S_ISREG(found.mode) and not found.size:
        return "regular empty file"
    return _KINDS.get(stat.S_IFMT(found.mode), "unknown")


def _time(at: int) -> str:
    seconds, rest = divmod(at, _SECOND)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{rest:09} +0000"


def run_df(container: Container, words: Sequence[str]) -> int:
    """The file systems of the preopens. Options: -h; -k and -P are always so."""
    found, _ = options(words, "hkP")
    unit = human if "-h" in found else lambda count: str(count // 1024)
    container.out.write(
        f"{'Size' if '-h' in found else '1K-blocks':>12} {'Used':>12} {'Available':>12} Use% Mounted on\n"
    )
    for preopen in container.spec.preopens:
        of = os.fstatvfs(container.view.root(preopen.guest))
        used, available = of.f_blocks - of.f_bfree, of.f_bavail
        percent = f"{-(-100 * used // (used + available))}%" if used + available else "-"
        sizes = (unit(blocks * of.f_frsize) for blocks in (of.f_blocks, used, available))
        container.out.write(f"{' '.join(f'{size:>12}' for size in sizes)} {percent:>4} {preopen.guest}\n")
    return 0


_TESTS: Final[dict[str, Callable[[Status], bool]]] = {
    "-e": lambda _: True,
    "-f": lambda found: stat.S_ISREG(found.mode),
    "-d": lambda found: stat.S_ISDIR(found.mode),
    "-L": lambda found: stat.S_ISLNK(found.mode),
    "-h": lambda found: stat.S_ISLNK(found.mode),
    "-p": lambda found: stat.S_ISFIFO(found.mode),
    "-s": lambda found: found.size > 0,
}


def run_test(container: Container, words: Sequence[str]) -> int:
    """`test -e|-f|-d|-s|-L|-p FILE`, with `!` before it the opposite."""
    wanted = words[:1] != ["!"]
    operands = tuple(words if wanted else words[1:])
    if len(operands) != 2 or operands[0] not in _TESTS:
        msg = f"takes one of {' '.join(_TESTS)} and a file, and maybe ! before them"
        raise UsageError(msg)
    operator, name = operands
    try:
        held = _TESTS[operator](container.view.status(name, follow=operator not in {"-L", "-h"}))
    except OSError:
        held = False
    return 0 if held is wanted else 1
