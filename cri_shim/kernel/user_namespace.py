"""A user namespace with others inside of it: made by a child that does nothing else, pinned by its parent.

Tasks of the zygote: unshare(2) makes a user namespace for a process of one thread only, and its ids are written from
outside. Invariant: the child ends with its parent or as soon as it is let go, so that what is left are the pins.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from cri_shim.kernel import libc, new_namespaces
from cri_shim.model.errors import InvalidArgument

_MESSAGE: Final = 1 << 16


def pin(arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Bind new namespaces on `directory`/{user,net,ipc,uts}; `kinds` says which beside the user namespace.

    `uids` and `gids` are (first id at the host, how many); `hostname` and `sysctls` as in `new_namespaces.enter_new`.
    The result is empty, or says what of the request is `invalid`, with a `hint`. What was bound before an error stays.
    """
    del fds
    directory, kinds = arguments["directory"], arguments["kinds"]
    with _child(arguments["uids"], arguments["gids"]) as (pid, channel):
        channel.send(json.dumps({key: arguments[key] for key in ("kinds", "hostname", "sysctls")}).encode())
        if refusal := _answer(channel):
            return refusal
        for kind in ("user", *kinds):
            target = f"{directory}/{kind}"
            os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o400))
            libc.mount(f"/proc/{pid}/ns/{kind}", target, None, libc.MS_BIND)
    return {}


def try_idmapped_mount(arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Map the ids of a detached copy of the mount at `directory`. OSError where that is not possible."""
    del fds
    with _child((1, 1), (1, 1)) as (pid, _):
        namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        tree = libc.open_tree(arguments["directory"], libc.OPEN_TREE_CLONE)
        libc.mount_setattr(tree, set_attributes=libc.MOUNT_ATTR_IDMAP, recursive=False, user_namespace=namespace)
    return {}


@contextlib.contextmanager
def _child(uids: Sequence[int], gids: Sequence[int]) -> Iterator[tuple[int, socket.socket]]:
    """A process in a new user namespace with these ids, which ends with the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _live(theirs)
    theirs.close()
    try:
        with ours:
            _answer(ours)
            for name, (first, length) in (("uid_map", uids), ("gid_map", gids)):
                _write(f"/proc/{pid}/{name}", f"0 {first} {length}")
            yield pid, ours
    finally:
        os.waitpid(pid, 0)


def _live(channel: socket.socket) -> NoReturn:
    """The whole life of the child: it ends when the other end of the channel is closed, also by a kill."""
    try:
        channel.send(_outcome(lambda: libc.unshare(libc.CLONE_NEWUSER)))
        if question := channel.recv(_MESSAGE):
            channel.send(_outcome(lambda: _become_root_of_new(**json.loads(question))))
            channel.recv(_MESSAGE)
    finally:
        os._exit(0)


def _become_root_of_new(kinds: Sequence[str], hostname: str, sysctls: Mapping[str, str]) -> None:
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    new_namespaces.enter_new(kinds, hostname, sysctls)


def _outcome(function: Callable[[], object]) -> bytes:
    try:
        function()
    except InvalidArgument as error:
        return json.dumps({"invalid": error.cause, "hint": error.hint}).encode()
    except OSError as error:
        return json.dumps({"errno": error.errno, "text": error.strerror}).encode()
    return b"{}"


def _answer(channel: socket.socket) -> dict[str, Any]:
    said = channel.recv(_MESSAGE)
    if not said:
        raise ChildProcessError("the process in the new user namespace has ended")
    answer: dict[str, Any] = json.loads(said)
    if "errno" in answer:
        raise OSError(answer["errno"], answer["text"])
    return answer


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
