"""Which signal asks a container to stop: the request's, the image's, else SIGTERM. Numbers are those of this host."""

from __future__ import annotations

import re
import signal

from cri_shim.model.errors import InvalidArgument
from cri_shim.pb import api_pb2 as pb

_REALTIME = re.compile(r"RTM(IN|AX)(?:([+-])([0-9]{1,2}))?")
_RTMIN_HALF = 15
_ALIASES = {"CLD": "CHLD", "IOT": "ABRT", "POLL": "IO"}


def stop_signal(asked: pb.Signal.ValueType, image: str) -> int:
    """The number of the stop signal. InvalidArgument when the image's text is no signal."""
    if asked not in pb.Signal.values():
        msg = f"stop_signal {asked} is not a value of the CRI's enum"
        raise InvalidArgument(msg)
    if asked != pb.Signal.SIGNAL_RUNTIME_DEFAULT:
        name = pb.Signal.Name(asked).removeprefix("SIGNAL_")
        return parse_signal(name.replace("PLUS", "+").replace("MINUS", "-"))
    return parse_signal(image) if image else int(signal.SIGTERM)


def signal_enum(number: int) -> pb.Signal.ValueType:
    """The CRI's value for a signal number (CRI `ContainerStatus.stop_signal`)."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        above = number - signal.SIGRTMIN
        # The CRI counts the lower half from the minimum, the upper half from the maximum, as signal(7) does.
        edge = f"RTMINPLUS{above}" if above <= _RTMIN_HALF else f"RTMAXMINUS{signal.SIGRTMAX - number}"
        return pb.Signal.Value(f"SIGNAL_SIG{edge}")
    try:
        return pb.Signal.Value(f"SIGNAL_{signal.Signals(number).name}")
    except ValueError:
        return pb.Signal.SIGNAL_RUNTIME_DEFAULT


def parse_signal(text: str) -> int:
    """Parse `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, in any case (OCI image-spec, config, `StopSignal`)."""
    word = text.strip().upper().removeprefix("SIG")
    number = _number(_ALIASES.get(word, word))
    if number is None or not 1 <= number <= signal.SIGRTMAX:
        msg = f"stop signal {text!r} is not a signal of Linux"
        raise InvalidArgument(msg)
    return number


def _number(word: str) -> int | None:
    if word.isascii() and word.isdigit() and len(word) < 4:
        return int(word)
    if realtime := _REALTIME.fullmatch(word):
        edge, sign, offset = realtime.groups()
        base = signal.SIGRTMIN if edge == "IN" else signal.SIGRTMAX
        number = base + int(offset or 0) * (-1 if sign == "-" else 1)
        return number if signal.SIGRTMIN <= number <= signal.SIGRTMAX else None
    known = signal.Signals.__members__.get(f"SIG{word}")
    return None if known is None else int(known)
