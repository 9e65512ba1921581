"""`cri-shim images …`: what a user asks of the images of a node, and how the answers look. No logic of its own."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cri_shim.cli.archives import archive, archive_to_write
from cri_shim.cli.connection import Parsers, add_connection, connect
from cri_shim.cli.progress import shown
from cri_shim.cli.tables import age, columns, size
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import SHORT
from cri_shim.model.refs import familiar

if TYPE_CHECKING:
    from cri_shim.pb import admin_pb2 as pb


def add_commands(parsers: Parsers) -> None:
    """The verbs of `images`."""
    images = parsers.add_parser("images", help="the images of this node")
    verbs = images.add_subparsers(required=True, metavar="VERB")

    verb = _verb(
        verbs, "ls", _list, "list images: what they take, what of it they share, whether they are pinned or used"
    )
    verb.add_argument("image", metavar="IMAGE", nargs="?", default="", help="only what this names")
    verb.add_argument("--output", choices=("table", "json"), default="table")

    verb = _verb(verbs, "rm", _remove, "remove a tag, and the image with its last one; by id or digest the whole image")
    verb.add_argument("images", metavar="IMAGE", nargs="+")
    verb.add_argument("--force", action="store_true", help="also what is pinned or used by containers")

    verb = _verb(verbs, "tag", _tag, "give an image one more tag")
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("tag", metavar="NAME[:TAG]")

    for name, words in (("pin", "keep images from garbage collection and prune"), ("unpin", "end that")):
        verb = _verb(verbs, name, _pin, f"{words}; a pin on a tag goes where the tag goes")
        verb.add_argument("images", metavar="IMAGE", nargs="+")
        verb.set_defaults(pinned=name == "pin")

    verb = _verb(verbs, "pull", _pull, "pull images, with a progress bar for each layer in a terminal")
    verb.add_argument("images", metavar="IMAGE", nargs="+")
    verb.add_argument("--handler", metavar="NAME", default="", help="the runtime handler that they are for")

    verb = _verb(verbs, "load", _load, "load images from an archive: an OCI image layout or what docker save writes")
    verb.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="a tar, also in gzip or zstd; default: stdin"
    )
    verb.add_argument("--name", metavar="NAME[:TAG]", default="", help="for the one image of an archive")
    verb.add_argument("--pin", action="store_true", help="keep what is loaded from garbage collection and prune")

    words = "save images to an archive that docker, containerd, podman, skopeo and load read"
    verb = _verb(verbs, "save", _save, words)
    verb.add_argument("images", metavar="IMAGE", nargs="+")
    verb.add_argument("-o", "--output", metavar="FILE", default="-", help="default: standard output")

    verb = _verb(verbs, "check", _check, "hash every blob again, look at the tree of every layer; 1 for a problem")
    verb.add_argument("--repair", action="store_true", help="remove what is damaged and fetch its images again")

    verb = _verb(verbs, "prune", _prune, "remove every image that no container uses and that is not pinned")
    verb.add_argument("--dry-run", action="store_true", help="only say what would go")


def _verb(verbs: Parsers, name: str, run: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=words, description=words)
    add_connection(parser)
    parser.set_defaults(run=run)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        found = daemon.list_images(arguments.image)
    if arguments.output == "json":
        json.dump([_as_dict(image) for image in found], sys.stdout, indent=2)
        print()
    else:
        print(_table(found), end="")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        return _each(arguments.images, lambda image: _say_removed(daemon.remove_image(image, force=arguments.force)))


def _tag(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        print(daemon.tag_image(arguments.image, arguments.tag))
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    def one(image: str) -> None:
        for name in daemon.pin_image(image, pinned=arguments.pinned):
            print(f"{'pinned' if arguments.pinned else 'unpinned'} {name}")

    with connect(arguments) as daemon:
        return _each(arguments.images, one)


def _prune(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        answer = daemon.prune_images(dry_run=arguments.dry_run)
    if arguments.dry_run:
        print(_table(answer.removed), end="")
        print(f"would free {size(answer.freed)}")
        return 0
    for image in sorted(answer.removed, key=_names):
        print(f"removed {_names(image)[0]}")
    print(f"freed {size(answer.freed)}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    def one(image: str) -> None:
        with shown(sys.stderr) as progress:
            for answer in daemon.pull_image(image, arguments.handler):
                progress.show(answer.layers)
                if answer.id:
                    progress.end()
                    print(answer.id)

    with connect(arguments) as daemon:
        return _each(arguments.images, one)


def _load(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon, archive(arguments.file) as path, shown(sys.stderr) as progress:
        for loaded in daemon.load_images(path, name=arguments.name, pin=arguments.pin):
            if not loaded.id:
                progress.show(loaded.layers)
                continue
            progress.end()
            for tag in loaded.tags:
                print(f"loaded {tag}")
            if not loaded.tags:
                print(f"loaded {loaded.id}; it has no name in the archive: give it one by tag")
    return 0


def _save(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon, archive_to_write(arguments.output) as file:
        for piece in daemon.save_images(arguments.images):
            file.write(piece)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    problems = 0
    with connect(arguments) as daemon:
        for answer in daemon.check_images(repair=arguments.repair):
            match answer.WhichOneof("found"):
                case "problem":
                    print(answer.problem)
                case "repaired":
                    print(answer.repaired)
                case _:
                    what, problems = answer.summary, answer.summary.problems
                    print(f"{what.images} images, {what.layers} layers, {what.blobs} blobs ({size(what.bytes)} hashed)")
                    print(f"{problems} problems" if problems else "no problems")
    return 1 if problems else 0


def _each(images: Iterable[str], act: Callable[[str], None]) -> int:
    """Every image, whatever becomes of the others."""
    status = 0
    for image in images:
        try:
            act(image)
        except CriShimError as error:
            print(f"cri-shim: {error}", file=sys.stderr)
            status = 1
    return status


def _say_removed(answer: pb.RemoveImageResponse) -> None:
    for name in answer.untagged:
        print(f"untagged {name}")
    for image_id in answer.removed:
        print(f"removed {image_id}")


def _table(found: Iterable[pb.Image]) -> str:
    rows = [("IMAGE", "ID", "PLATFORM", "SIZE", "ON DISK", "SHARED", "PULLED", "PINNED", "CONTAINERS")]
    now = time.time()
    for image in sorted(found, key=_names):
        for number, name in enumerate(_names(image)):
            # What an image takes stands once, with its first name.
            taken = ("", "", "") if number else (size(image.size), size(image.disk), size(image.shared))
            rows.append(
                (
                    name,
                    image.id.removeprefix("sha256:")[:SHORT],
                    image.platform,
                    *taken,
                    age(now - image.pulled_at / 1e9),
                    "yes" if image.pinned else "",
                    str(len(image.containers) or ""),
                )
            )
    return columns(rows)


def _names(image: pb.Image) -> list[str]:
    """Tags as people write them; without one a digest, in short."""
    tags = sorted(familiar(tag) for tag in image.tags)
    return tags or [f"{familiar(name.partition('@')[0])}@{name[-64:][:SHORT]}…" for name in image.digests[:1]] or ["-"]


def _as_dict(image: pb.Image) -> dict[str, object]:
    return {
        "id": image.id,
        "tags": list(image.tags),
        "digests": list(image.digests),
        "platform": image.platform,
        "wasm": image.wasm,
        "size": image.size,
        "disk": image.disk,
        "shared": image.shared,
        "pinned": image.pinned,
        "containers": list(image.containers),
        "pulledAt": image.pulled_at,
    }
