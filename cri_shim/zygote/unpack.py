"""The task that unpacks one layer: a blob in, while it arrives, a directory in overlayfs format out.

It runs as root, chrooted into that directory, with no descriptor of anything else but the blob. What it makes counts
for nothing until the blob has been verified. Invariant: after the
chroot nothing is imported or looked up by a path of the host, since every path then belongs to the archive.
"""

from __future__ import annotations

import os
from typing import Any

from cri_shim.wire.layer_tar import BLOCK, Entry, EntryReader, LayerFormatError, padded
from cri_shim.zygote.chroot import enter
from cri_shim.zygote.fingerprint import of_tree
from cri_shim.zygote.stream import Growing, LayerStream, StreamError
from cri_shim.zygote.tree import Tree, TreeError

MAX_ENTRIES = 1_000_000


def unpack(_: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Unpack the blob `fds[1]` into the empty directory `fds[0]`, while it grows: `fds[2]` is its pipe of progress.

    The result: `diff_id`; `size` and `inodes`, as made; what only lower layers can tell: `implied` directories, `links`
    to files that are not here, `whiteouts`, and whether the root directory is `root_given` or `root_opaque`. With
    nothing left to tell, the `fingerprint`; else it is empty.
    """
    directory, blob, progress = fds
    stream = LayerStream(Growing(blob, progress))
    enter(directory)
    tree = Tree()
    _apply(stream, tree)
    diff_id = stream.finish()
    tree.finish()
    is_whole = not (tree.implied or tree.links or tree.whiteouts or tree.root_opaque)
    return {
        "fingerprint": of_tree() if is_whole else "",
        "diff_id": diff_id,
        "size": tree.size,
        "inodes": tree.inodes,
        "implied": list(tree.implied),
        "links": [(path, *link) for path, link in tree.links.items()],
        "whiteouts": list(tree.whiteouts),
        "root_given": tree.root_given,
        "root_opaque": tree.root_opaque,
    }


def _apply(stream: LayerStream, tree: Tree) -> None:
    reader = EntryReader()
    count, last = 0, ""
    while not reader.finished:
        try:
            entry = _next_entry(reader, stream)
        except LayerFormatError as error:
            msg = f"after entry {last!r}: {error}" if last else str(error)
            raise LayerFormatError(msg) from None
        if entry is None:
            continue
        count, last = count + 1, entry.name
        if count > MAX_ENTRIES:
            msg = f"entry {entry.name!r}: the layer has more than {MAX_ENTRIES} entries"
            raise LayerFormatError(msg)
        try:
            tree.add(entry, stream)
        except OSError as error:
            raise OSError(error.errno, f"entry {entry.name!r}: {os.strerror(error.errno or 0)}") from None
        except (TreeError, StreamError) as error:
            msg = f"entry {entry.name!r}: {error}"
            raise type(error)(msg) from None
        stream.skip(padded(entry.size) - entry.size)


def _next_entry(reader: EntryReader, stream: LayerStream) -> Entry | None:
    """What the next block says; None: nothing yet, or the archive has ended."""
    wanted = reader.wanted
    block = stream.read(wanted)
    if not block and wanted == BLOCK:
        reader.receive_end()
        return None
    if len(block) < wanted:
        raise LayerFormatError("the archive ends within a header")
    return reader.receive(block)
