"""The tar format of image layers: ustar, pax and GNU headers in, entries out, and the names of whiteouts.

Sans-IO: it never sees the data of a file, only header blocks, so nothing is copied. Not an archive library:
multi-volume archives and the like are refused by name. Invariant: an `Entry` that comes out has a sane size, no
NUL in a name, and every number within what the kernel takes; where it points to is the caller's to judge
(`contained_path`).

Sources: POSIX.1-2017 pax(1), the GNU tar manual ("Basic Tar Format", "Storing Sparse Files"), OCI image-spec layer.md.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENSION = 1 << 20  # pax records and GNU long names of one entry; a name takes 4 KiB, an xattr 64 KiB
_MAX_PATH = 4096  # PATH_MAX
_MAX_ID = 2**32 - 2  # (uid_t)-1 means "leave as it is" to chown(2)
_MAX_SIZE = 2**63 - 1
_MAX_TIME = 2**55 * 1_000_000_000  # well within time_t, in ns
_MAX_DEVICE = 2**20 - 1  # the kernel's minor numbers have 20 bits
_MAX_PIECES = 1 << 17  # of a file with holes
_XATTR = b"SCHILY.xattr."
_SPARSE_PAIR = frozenset({b"GNU.sparse.offset", b"GNU.sparse.numbytes"})
_NO_RECORDS: dict[bytes, bytes] = {}


class LayerFormatError(ValueError):
    """The archive is malformed or uses what images do not use; the text says what, the caller adds which layer."""


class Kind(enum.Enum):
    """What an entry makes."""

    FILE = "file"
    HARDLINK = "hardlink"
    SYMLINK = "symlink"
    CHAR_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,  # contiguous: a hint that nobody follows
    b"S": Kind.FILE,  # with holes
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR_DEVICE,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


class Sparse(NamedTuple):
    """Where the data of a file with holes goes."""

    size: int
    """Of the file."""
    pieces: tuple[tuple[int, int], ...]
    """Offset and length of each piece of data, in the order of both the file and the archive."""


class Entry(NamedTuple):
    """One member of the archive. A NamedTuple, since a layer has ten thousand of them."""

    name: str
    """As in the archive, without the slashes at the end; bytes that are not UTF-8 are surrogates."""
    kind: Kind
    mode: int
    """Permission bits with setuid, setgid and sticky."""
    uid: int
    gid: int
    size: int
    """Bytes of data that follow, padded to `BLOCK`; 0 for all but FILE. Of a sparse file less than its size."""
    mtime: int
    """Unix time, ns."""
    link: str
    """Target of a HARDLINK (a name of the archive) or SYMLINK (any text)."""
    device: tuple[int, int]
    """Major and minor number."""
    xattrs: dict[str, bytes]
    sparse: Sparse | None = None


class EntryReader:
    """Feed it `wanted` bytes of the stream at a time; it returns an Entry when one is complete.

        header ──x,g,L,K──▶ extension ──▶ header
          │ └─zero block─▶ trailer ─zero block─▶ finished
          ├─a file with holes─▶ map of its pieces ─▶ Entry
          └─any other type─▶ Entry; the caller takes the data and its padding out of the stream

    `receive_end` ends an archive that has no trailer. All errors are LayerFormatError.
    """

    def __init__(self) -> None:
        self.wanted = BLOCK
        self.finished = False
        self._extension: _Extension | None = None
        self._map: _OldMap | _NewMap | None = None
        self._trailer = False
        self._global: dict[bytes, bytes] = {}
        self._local: dict[bytes, bytes] = {}

    def receive(self, block: bytes) -> Entry | None:
        """Take the next `wanted` bytes."""
        if self._extension is not None:
            self._take_extension(self._extension, block)
            return None
        if self._map is not None:
            entry = self._map.take(block)
            self._map = self._map if entry is None else None
            return entry
        if block == _ZEROS:
            self._take_zeros()
            return None
        if self._trailer:
            raise LayerFormatError("data after the end mark of the archive")
        header = _parse_header(block)
        if header.type in b"xgLK":
            self._begin_extension(header)
            return None
        return self._entry(header)

    def receive_end(self) -> None:
        """The stream ended where a header was expected."""
        if self._extension is not None or self._map is not None or self._local:
            raise LayerFormatError("the archive ends within a header")
        self.finished = True

    def _take_zeros(self) -> None:
        if self._local:
            raise LayerFormatError("the archive ends after a header extension")
        self.finished = self._trailer
        self._trailer = True

    def _begin_extension(self, header: _Header) -> None:
        if not 0 <= header.size <= _MAX_EXTENSION:
            msg = f"a header extension of {header.size} bytes, at most {_MAX_EXTENSION} are allowed"
            raise LayerFormatError(msg)
        if header.size:
            self._extension = _Extension(header.type, header.size)
            self.wanted = padded(header.size)

    def _take_extension(self, extension: _Extension, block: bytes) -> None:
        self._extension = None
        self.wanted = BLOCK
        data = block[: extension.size]
        match extension.type:
            case b"x":
                self._local.update(_parse_pax(data))
            case b"g":
                self._global.update(_parse_pax(data))
            case b"L":
                self._local[b"path"] = data.partition(b"\0")[0]
            case _:
                self._local[b"linkpath"] = data.partition(b"\0")[0]

    def _entry(self, header: _Header) -> Entry | None:
        """None: the map of a sparse file follows."""
        records = _NO_RECORDS
        if self._global or self._local:
            # An empty value takes back what the header or a global record said (pax).
            records = {key: value for key, value in {**self._global, **self._local}.items() if value}
            self._local = {}
        name = _text(records.get(b"GNU.sparse.name") or records.get(b"path", header.name), "a name")
        kind = _kind(header, name)
        size = _number(records, b"size", header.size, _MAX_SIZE, name)
        entry = Entry(
            name=name.rstrip("/"),
            kind=kind,
            mode=header.mode & 0o7777,
            uid=_number(records, b"uid", header.uid, _MAX_ID, name),
            gid=_number(records, b"gid", header.gid, _MAX_ID, name),
            size=size if kind is Kind.FILE else 0,
            mtime=_mtime(records, header.mtime, name),
            link=_text(records.get(b"linkpath", header.link), "a link target"),
            device=(header.major, header.minor),
            xattrs=_xattrs(records, name) if records else {},
        )
        if header.type != b"S" and not (records and any(key.startswith(b"GNU.sparse.") for key in records)):
            return entry
        return self._sparse_entry(entry, header, records)

    def _sparse_entry(self, entry: Entry, header: _Header, records: dict[bytes, bytes]) -> Entry | None:
        if header.type == b"S":
            self._map = _OldMap(entry)
            found = self._map.begin(header.block)
            self._map = self._map if found is None else None
            return found
        if b"GNU.sparse.major" in records:
            self._map = _NewMap(entry, _number(records, b"GNU.sparse.realsize", 0, _MAX_SIZE, entry.name))
            return None
        size = _number(records, b"GNU.sparse.size", 0, _MAX_SIZE, entry.name)
        pieces = records.get(b"GNU.sparse.map")
        return _with_pieces(entry, size, _numbers(pieces.split(b","), entry.name) if pieces else [])


class _OldMap:
    """GNU tar's own format: four pieces in the header, then blocks of 21 as long as a flag says so."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._numbers: list[int] = []
        self._size = 0

    def begin(self, header: bytes) -> Entry | None:
        """None: a block follows."""
        self._size = _octal(header[483:495], "size")
        return self._take(header[386:482], header[482])

    def take(self, block: bytes) -> Entry | None:
        if len(block) != BLOCK or len(self._numbers) > _MAX_PIECES:
            msg = f"entry {self._entry.name!r} has a map of holes without an end"
            raise LayerFormatError(msg)
        return self._take(block[:504], block[504])

    def _take(self, fields: bytes, is_continued: int) -> Entry | None:
        for at in range(0, len(fields), 24):
            if fields[at] == 0:
                break
            self._numbers += (_octal(fields[at : at + 12], "offset"), _octal(fields[at + 12 : at + 24], "size"))
        return None if is_continued else _with_pieces(self._entry, self._size, self._numbers)


class _NewMap:
    """GNU's format 1.0: before the data, decimal numbers on lines of their own, how many pieces there are first."""

    def __init__(self, entry: Entry, size: int) -> None:
        self._entry = entry
        self._size = size
        self._text = b""
        self._taken = 0

    def take(self, block: bytes) -> Entry | None:
        self._text += block
        self._taken += len(block)
        if len(block) != BLOCK or self._taken > min(self._entry.size, _MAX_EXTENSION):
            msg = f"entry {self._entry.name!r} has a map of holes without an end"
            raise LayerFormatError(msg)
        lines = self._text.split(b"\n")[:-1]
        if not lines or len(lines) <= 2 * _numbers(lines[:1], self._entry.name)[0]:
            return None
        count = _numbers(lines[:1], self._entry.name)[0]
        entry = self._entry._replace(size=self._entry.size - self._taken)
        return _with_pieces(entry, self._size, _numbers(lines[1 : 1 + 2 * count], self._entry.name))


def _numbers(texts: list[bytes], name: str) -> list[int]:
    if not all(text.isdigit() and len(text) < 20 for text in texts):
        msg = f"entry {name!r} has a malformed map of holes"
        raise LayerFormatError(msg)
    return [int(text) for text in texts]


def _with_pieces(entry: Entry, size: int, numbers: list[int]) -> Entry:
    """The pieces must follow each other, lie within the file, and be the data that there is."""
    pieces = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    end, total, fits = 0, 0, len(numbers) % 2 == 0 and entry.kind is Kind.FILE
    for offset, length in pieces:
        fits = fits and offset >= end and length >= 0
        end, total = offset + length, total + length
    if not fits or total != entry.size or not end <= size <= _MAX_SIZE:
        msg = f"entry {entry.name!r} has a map of holes that does not fit its data"
        raise LayerFormatError(msg)
    return entry._replace(sparse=Sparse(size, pieces))


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def contained_path(name: str) -> str:
    """The path of an archive name below the root: no leading slash, no `.`; the root itself is empty.

    A name with `..` is refused: no builder writes one, and it can only be meant to leave the root.
    """
    if "//" not in name and "." not in name and not name.startswith("/"):
        return name
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        msg = f"entry {name!r} has '..' in its path"
        raise LayerFormatError(msg)
    return "/".join(parts)


class Whiteout(NamedTuple):
    """An entry that hides what lower layers have (OCI image-spec, layer.md, "Whiteouts")."""

    directory: str
    name: str
    """The name that is gone; empty: everything that lower layers have in the directory."""


_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_AUFS = ".wh..wh."  # other marks of aufs, which mean nothing outside of it


def parse_whiteout(path: str) -> Whiteout | None:
    """What the path hides, or None for an ordinary path; marks that mean nothing hide nothing (empty directory)."""
    directory, _, name = path.rpartition("/")
    if not name.startswith(_WHITEOUT):
        return None
    if name == _OPAQUE:
        return Whiteout(directory, "")
    hidden = name.removeprefix(_WHITEOUT)
    if hidden in {"", ".", ".."}:
        msg = f"entry {path!r} is a whiteout of nothing"
        raise LayerFormatError(msg)
    return Whiteout(directory, hidden)


def is_aufs_mark(path: str) -> bool:
    """True for aufs' own files, which are to be skipped."""
    name = path.rpartition("/")[2]
    return name.startswith(_AUFS) and name != _OPAQUE


class _Extension(NamedTuple):
    type: bytes
    size: int


class _Header(NamedTuple):
    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link: bytes
    major: int
    minor: int
    block: bytes


_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s64s8s8s155s12s")
"""name, mode, uid, gid, size, mtime, checksum, type, link, magic, names of the owners, device, prefix, padding."""


def _parse_header(block: bytes) -> _Header:
    if len(block) != BLOCK:
        raise LayerFormatError("the archive ends within a header")
    name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _, major, minor, prefix, _ = _FIELDS.unpack(block)
    _check_sum(block, checksum)
    if block.endswith(b"tar\0"):
        prefix = prefix[:131]  # star keeps times behind a shorter prefix
    elif not magic.startswith(b"ustar\0"):
        prefix = b""
    name, prefix = _until_nul(name), _until_nul(prefix)
    has_device = kind in b"34"
    return _Header(
        name=prefix + b"/" + name if prefix else name,
        type=kind,
        mode=_octal(mode, "mode"),
        uid=_octal(uid, "uid"),
        gid=_octal(gid, "gid"),
        size=_octal(size, "size"),
        mtime=_octal(mtime, "mtime"),
        link=_until_nul(link),
        major=_device_number(major) if has_device else 0,
        minor=_device_number(minor) if has_device else 0,
        block=block,
    )


def _check_sum(block: bytes, field: bytes) -> None:
    """The sum over the block with its own field as spaces; old writers summed signed characters."""
    expected = _octal(field, "checksum")
    unsigned = sum(block) - sum(field) + 8 * 0x20
    if expected == unsigned:
        return
    high = sum(1 for byte in block if byte > 127) - sum(1 for byte in field if byte > 127)
    if expected != unsigned - 256 * high:
        raise LayerFormatError("a header with a wrong checksum")


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes, what: str) -> int:
    """Octal text, or GNU's base 256 where the first bit is set (two's complement)."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if value >> (bits - 1) else value
    text = field.partition(b"\0")[0].strip()
    if not text:
        return 0
    try:
        if text.isdigit():  # int() alone would also take signs and underscores
            return int(text, 8)
    except ValueError:  # an 8 or a 9
        pass
    msg = f"a header whose {what} {text!r} is not a number"
    raise LayerFormatError(msg)


def _device_number(field: bytes) -> int:
    number = _octal(field, "device number")
    if not 0 <= number <= _MAX_DEVICE:
        msg = f"a header with the device number {number}"
        raise LayerFormatError(msg)
    return number


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Records of the form `<length> <key>=<value>\\n`, the length counting the whole record."""
    records: dict[bytes, bytes] = {}
    rest = data
    while rest.rstrip(b"\0"):
        digits, space, _ = rest[:20].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 3 < int(digits) <= len(rest):
            raise LayerFormatError("a malformed pax record")
        record, rest = rest[: int(digits)], rest[int(digits) :]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if not equals or not key or not value.endswith(b"\n"):
            raise LayerFormatError("a malformed pax record")
        if key in _SPARSE_PAIR:
            # Format 0.0 repeats a record for each piece; 0.1 has them all in one.
            so_far = records.get(b"GNU.sparse.map")
            records[b"GNU.sparse.map"] = so_far + b"," + value[:-1] if so_far else value[:-1]
        else:
            records[key] = value[:-1]
    return records


def _kind(header: _Header, name: str) -> Kind:
    if header.type == b"\0" and name.endswith("/"):
        return Kind.DIRECTORY  # V7 had no type for it
    kind = _KINDS.get(header.type)
    if kind is None:
        msg = f"entry {name!r} is of type {header.type!r}, which is not supported"
        raise LayerFormatError(msg)
    return kind


def _text(value: bytes, what: str) -> str:
    if b"\0" in value:
        msg = f"{what} with a NUL in it"
        raise LayerFormatError(msg)
    if len(value) >= _MAX_PATH:
        msg = f"{what} of {len(value)} bytes, the kernel takes {_MAX_PATH - 1}"
        raise LayerFormatError(msg)
    return value.decode("utf-8", "surrogateescape")


def _number(records: dict[bytes, bytes], key: bytes, from_header: int, highest: int, name: str) -> int:
    value = from_header
    text = records.get(key)
    if text is not None:
        if not text.isdigit() or len(text) > 20:
            msg = f"entry {name!r} has the {key.decode()} {text[:20]!r}"
            raise LayerFormatError(msg)
        value = int(text)
    if not 0 <= value <= highest:
        msg = f"entry {name!r} has the {key.decode()} {value}"
        raise LayerFormatError(msg)
    return value


def _mtime(records: dict[bytes, bytes], from_header: int, name: str) -> int:
    """Nanoseconds; pax has decimal fractions, which a float would round."""
    text = records.get(b"mtime")
    if text is None:
        return _clamped_time(from_header * 1_000_000_000)
    whole, _, fraction = text.partition(b".")
    digits = whole.removeprefix(b"-")
    if not digits.isdigit() or (fraction and not fraction.isdigit()) or len(text) > 40:
        msg = f"entry {name!r} has the mtime {text[:20]!r}"
        raise LayerFormatError(msg)
    nanoseconds = int(digits) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return _clamped_time(-nanoseconds if whole.startswith(b"-") else nanoseconds)


def _clamped_time(nanoseconds: int) -> int:
    """A time that no file system holds is no reason to refuse an image: the kernel takes the nearest it can."""
    return max(-_MAX_TIME, min(nanoseconds, _MAX_TIME))


def _xattrs(records: dict[bytes, bytes], name: str) -> dict[str, bytes]:
    found = {}
    for key, value in records.items():
        if key.startswith(_XATTR):
            found[_text(key.removeprefix(_XATTR), f"an xattr name of {name!r}")] = value
    return found
