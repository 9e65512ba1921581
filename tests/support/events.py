"""Mux events made comparable: how the input was cut may show in the pieces of a stream's data, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cri_shim.model.streams import PIECE_BYTES
from cri_shim.wire.mux import DataReceived, Event, Mux


def joined(events: Iterable[Event]) -> list[Event]:
    """With neighbouring pieces of one stream put together."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, DataReceived):
            assert 0 < len(event.data) <= PIECE_BYTES
            if isinstance(last, DataReceived) and last.stream == event.stream:
                result[-1] = DataReceived(event.stream, last.data + event.data)
                continue
        result.append(event)
    return result


def in_both_ways(make: Callable[[], Mux], data: bytes) -> tuple[list[Event], bytes, Mux]:
    """What comes of `data` and is answered, the same for the whole and for byte after byte; and the end it came to."""
    whole, pieces = make(), make()
    events = joined(whole.receive_data(data))
    answers = whole.data_to_send()
    trickled: list[Event] = []
    trickled_answers = b""
    for byte in data:
        trickled += pieces.receive_data(bytes((byte,)))
        trickled_answers += pieces.data_to_send()
    assert joined(trickled) == events
    assert trickled_answers == answers
    return events, answers, whole
