"""The zygote: a small, single-threaded Python process that forks one child per request of the daemon.

It knows no task, reads no request and imports next to nothing: a request is a descriptor that the child reads. It does
not outlive the daemon (it ends at end-of-file), its children may. Invariant: nothing here starts a thread or touches a
library that a fork would break.

Started by path, with `-I -S`, so that a child imports only from where its request says. Further arguments, a search
path and names of modules, or `module:function`, are for a zygote whose children all need the same: it imports those,
and calls the functions, before it serves; they must keep to the invariant. Over a SOCK_SEQPACKET socket:

    daemon → zygote   `fork` + descriptors: request (a memfd with JSON), result (a pipe), whatever the task takes
    zygote → daemon   `{"pid": 7}` + a pidfd, or `{"refused": "…"}`, in the order of the requests
    zygote → daemon   `{"exited": 7, "status": 9}`, the status as wait(2) has it

    request           {"path": [sys.path entries], "task": "module:function", "arguments": {…}, "held": n}
    result            {"value": {…}} or {"error": {"type": "…", "text": "…", "errno": n}}

The last `held` descriptors are not the task's: they are only kept open until the child ends (an inherited lock).
"""

from __future__ import annotations

import os
import select
import socket
import sys

TYPE_CHECKING = False  # the typing module costs 1 MiB, a tenth of this process
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_MAX_DESCRIPTORS = 253  # SCM_MAX_FD
_MESSAGE = 4096
_HIGHEST_FD = 1 << 30
_PRELOADS = 3
_decode: Callable[[str, int], tuple[dict[str, Any], int]] | None = None
"""A scanner of JSON: `json.loads` is four functions more, and each page that a child writes to it has a copy of, be it
for the count of references of what it calls."""


def main() -> None:
    """Serve the socket whose descriptor is the first argument, until its other end is closed."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    if len(sys.argv) > _PRELOADS:
        _preload(sys.argv[2].split(":"), sys.argv[_PRELOADS:])
    poller = select.poll()
    poller.register(channel.fileno(), select.POLLIN)
    children: dict[int, int] = {}
    while True:
        for fd, _ in poller.poll():
            if fd != channel.fileno():
                poller.unregister(fd)
                _report_exit(channel, fd, children.pop(fd))
                continue
            started = _serve(channel)
            if started is not None:
                pid, pidfd = started
                children[pidfd] = pid
                poller.register(pidfd, select.POLLIN)


def _preload(path: list[str], modules: list[str]) -> None:
    sys.path[:0] = path
    import gc  # noqa: PLC0415
    import importlib  # noqa: PLC0415

    # Its hook puts the locks of other threads right, which there are none of here, and costs each child half a MiB.
    register, os.register_at_fork = os.register_at_fork, lambda **_hooks: None
    import threading  # noqa: F401, PLC0415

    os.register_at_fork = register
    for name in modules:
        module, _, function = name.partition(":")
        found = importlib.import_module(module)
        if function:
            getattr(found, function)()
    gc.freeze()  # no collection in a child copies the pages of what is shared


def _serve(channel: socket.socket) -> tuple[int, int] | None:
    """Fork for the next request; the pid and pidfd of the child."""
    message, fds, _, _ = socket.recv_fds(channel, _MESSAGE, _MAX_DESCRIPTORS)
    if not message:
        sys.exit(0)  # the daemon is gone; children go on
    global _decode  # noqa: PLW0603  for all children from now on; an idle zygote goes without its 1 MiB
    if _decode is None:
        from json import JSONDecoder  # noqa: PLC0415  likewise
        from json.scanner import make_scanner  # noqa: PLC0415  likewise

        _decode = make_scanner(JSONDecoder())  # type: ignore[arg-type]  # the stub is wrong
    refusal = b""
    try:
        pid = os.fork()
    except OSError as error:
        pid, refusal = -1, os.strerror(error.errno or 0).encode()
    if pid == 0:
        _run_child(fds)
    for fd in fds:
        os.close(fd)
    if refusal:
        channel.send(b'{"refused": "fork: %s"}' % refusal)
        return None
    pidfd = os.pidfd_open(pid)
    socket.send_fds(channel, [b'{"pid": %d}' % pid], [pidfd])
    return pid, pidfd


def _report_exit(channel: socket.socket, pidfd: int, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    os.close(pidfd)
    channel.send(b'{"exited": %d, "status": %d}' % (pid, status))


def _run_child(fds: list[int]) -> NoReturn:
    """The whole life of a child: read the request, run the task, write the result."""
    code = 1
    try:
        _leave_zygote(fds)
        request, result, *rest = fds
        call = _read(request)
        given = rest[: len(rest) - call["held"]]
        try:
            outcome = {"value": _call(call, given)}
        except BaseException as error:  # noqa: BLE001  whatever it is, the daemon is to know
            outcome = {"error": _describe(error)}
        import json  # noqa: PLC0415  loaded before the fork

        data = memoryview(json.dumps(outcome).encode())
        while data:
            data = data[os.write(result, data) :]
        code = 0
    finally:
        os._exit(code)


def _call(call: dict[str, Any], fds: list[int]) -> object:
    name, _, function = call["task"].partition(":")
    module = sys.modules.get(name)  # loaded before the fork
    if module is None:
        sys.path[:0] = call["path"]
        import importlib  # noqa: PLC0415  with the path that the request gives

        module = importlib.import_module(name)
    return getattr(module, function)(call["arguments"], fds)


def _leave_zygote(fds: list[int]) -> None:
    """Keep the standard streams and the request's descriptors, and give up the daemon's shelter from the OOM killer."""
    low = 3
    for fd in sorted(fds):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, _HIGHEST_FD)
    score = os.open("/proc/self/oom_score_adj", os.O_RDWR)
    if int(os.read(score, 16)) < 0:
        os.write(score, b"0")
    os.close(score)


def _read(fd: int) -> dict[str, Any]:
    """The request in a memfd."""
    data = os.pread(fd, os.lseek(fd, 0, os.SEEK_END), 0)
    if _decode is None:
        raise RuntimeError
    return _decode(data.decode(), 0)[0]


def _describe(error: BaseException) -> dict[str, Any]:
    """Where it happened as numbers only.

    The traceback module would read source files by path: after a chroot those belong to a layer.
    """
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}"
        trace = trace.tb_next
    return {
        "type": type(error).__name__,
        "text": (error.strerror if isinstance(error, OSError) else None) or str(error),
        "errno": error.errno if isinstance(error, OSError) else None,
        "where": where,
    }


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the daemon went away in the middle of an answer
