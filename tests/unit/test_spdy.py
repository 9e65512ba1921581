"""SPDY/3.1: every frame whole and byte by byte, both ends joined, and a state machine against a plain model."""

from __future__ import annotations

import hashlib
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cri_shim.model.streams import PIECE_BYTES
from cri_shim.wire.mux import DataReceived, Event, PeerLeaves, ProtocolFailed, StreamEnded, StreamOpened, StreamReset
from cri_shim.wire.spdy import MAX_CONTROL, MAX_STREAMS, Spdy
from cri_shim.wire.spdy_headers import DICTIONARY, MAX_BLOCK, MAX_PAIRS, BadHeaders, Compressor, Decompressor
from tests.support import spdy
from tests.support.events import in_both_ways, joined
from tests.support.spdy import FIN, UNIDIRECTIONAL, SpdyPeer, control

STDIN = {"streamtype": "stdin"}


def both(data: bytes) -> tuple[list[Event], SpdyPeer, Spdy]:
    """The events, what the client is answered, and the server's end."""
    events, answers, end = in_both_ways(Spdy, data)
    peer = SpdyPeer()
    peer.receive(answers)
    assert not peer.held
    assert isinstance(end, Spdy)
    return events, peer, end


def test_the_dictionary_is_that_of_the_specification() -> None:
    assert len(DICTIONARY) == 1423
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2
    assert hashlib.sha256(DICTIONARY).hexdigest() == "51d27341373f923f3cd88e1eb7162aeaa3723d7585ff2399201dc06498407f02"


@given(
    st.lists(
        st.dictionaries(
            st.text("abcdefghijklmnopqrstuvwxyz-:", min_size=1, max_size=20),
            st.text(st.characters(max_codepoint=255), max_size=60),
            max_size=8,
        ),
        max_size=6,
    )
)
def test_header_blocks_through_both_ends(blocks: list[dict[str, str]]) -> None:
    compressor, decompressor = Compressor(), Decompressor()
    for headers in blocks:
        assert decompressor.headers(compressor.block(headers)) == headers


def deflated(plain: bytes) -> bytes:
    compressor = zlib.compressobj(zdict=DICTIONARY)
    return compressor.compress(plain) + compressor.flush(zlib.Z_SYNC_FLUSH)


def word(number: int) -> bytes:
    return struct.pack(">I", number)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (b"nonsense", "incorrect header check"),
        (deflated(b""), "cut short"),
        (deflated(word(1)), "cut short"),
        (deflated(word(1) + word(1) + b"a"), "cut short"),
        (deflated(word(1) + word(1) + b"a" + word(9) + b"b"), "bytes to spare"),
        (deflated(word(0) + b"more"), "bytes to spare"),
        (deflated(word(1) + word(1) + b"A" + word(0)), "lower case"),
        (deflated(word(1) + word(0) + word(0)), "empty"),
        (deflated(word(2) + 2 * (word(1) + b"a" + word(0))), "twice"),
        (deflated(word(MAX_PAIRS + 1)), "101 headers, at most 100"),
        (deflated(bytes(MAX_BLOCK)), "a header block of 65536 bytes or more"),
        (deflated(bytes(1 << 24)), "a header block of 65536 bytes or more"),
        (zlib.compress(word(0)), "the compression has ended"),
    ],
)
def test_header_blocks_that_cannot_be_read(block: bytes, words: str) -> None:
    with pytest.raises(BadHeaders, match=words):
        Decompressor().headers(block)
    events, peer, _ = both(control(1, 0, struct.pack(">IIBB", 1, 0, 0, 0) + block))
    assert len(events) == 1
    assert isinstance(events[0], ProtocolFailed)
    assert peer.goaways == [(0, 1)]


def test_a_stream_from_its_opening_to_its_end() -> None:
    peer = SpdyPeer()
    events, answers, end = both(peer.open(STDIN) + spdy.data(1, b"hello") + spdy.data(1, b"!", FIN))
    assert events == [StreamOpened(1, STDIN), DataReceived(1, b"hello!"), StreamEnded(1)]
    assert not answers.resets
    peer.receive(end.accept(1) + end.accept(1) + end.send_data(1, b"out") + end.send_end(1) + end.send_end(1))
    assert peer.replied == {1}
    assert bytes(peer.received[1]) == b"out"
    assert peer.ended == [1]
    assert end.send_data(1, b"late") == end.send_reset(1) == end.send_end(1) == b""
    peer.receive(end.send_goodbye())
    assert peer.goaways == [(1, 0)]


@pytest.mark.parametrize("empty", [b"", b"x"])
def test_flags_of_an_opening(empty: bytes) -> None:
    peer = SpdyPeer()
    sent = peer.open(STDIN, FIN) + peer.open(STDIN, UNIDIRECTIONAL) + peer.open(STDIN, FIN | UNIDIRECTIONAL)
    events, _, end = both(sent + spdy.data(3, empty, FIN))
    assert events[:5] == [
        StreamOpened(1, STDIN), StreamEnded(1), StreamOpened(3, STDIN), StreamOpened(5, STDIN), StreamEnded(5)
    ]  # fmt: skip
    assert events[-1] == StreamEnded(3)
    peer.receive(end.accept(1) + end.accept(3) + end.accept(5) + end.send_data(3, b"x"))
    assert peer.replied == {1}


def test_large_frames_come_in_pieces() -> None:
    peer = SpdyPeer()
    content = bytes(range(256)) * 1000
    events = Spdy().receive_data(peer.open(STDIN) + spdy.data(1, content, FIN))
    pieces = [event.data for event in events if isinstance(event, DataReceived)]
    assert b"".join(pieces) == content
    assert {len(piece) for piece in pieces[:-1]} == {PIECE_BYTES}


def test_the_client_resets() -> None:
    peer = SpdyPeer()
    events, answers, end = both(
        peer.open(STDIN) + spdy.reset(1) + spdy.reset(1) + spdy.reset(7) + spdy.data(1, b"late")
    )
    assert events == [StreamOpened(1, STDIN), StreamReset(1)]
    assert not answers.resets
    assert end.send_data(1, b"x") == b""


def test_the_server_refuses_and_drops() -> None:
    peer = SpdyPeer()
    events, _, end = both(peer.open(STDIN) + peer.open(STDIN))
    assert len(events) == 2
    peer.receive(end.send_reset(1) + end.accept(3) + end.send_reset(3))
    assert peer.resets == {1: 3, 3: 5}
    # What was under way is no fault.
    assert end.receive_data(spdy.data(1, b"late") + spdy.data(3, b"late", FIN)) == []
    assert end.data_to_send() == b""


def test_data_for_streams_that_are_none_or_have_ended() -> None:
    peer = SpdyPeer()
    events, answers, _ = both(
        peer.open(STDIN) + spdy.data(1, b"", FIN) + spdy.data(1, b"late") + spdy.data(9, b"x") + spdy.data(2, b"x")
    )
    assert events == [StreamOpened(1, STDIN), StreamEnded(1), StreamReset(1)]
    assert answers.resets == {1: 9, 9: 2, 2: 2}


def test_pings_are_answered_and_answers_are_not() -> None:
    _, answers, _ = both(spdy.ping(1) + spdy.ping(2) + spdy.ping(0xFFFF_FFFF))
    assert answers.pings == [1, 0xFFFF_FFFF]


def test_what_is_ignored() -> None:
    peer = SpdyPeer()
    sent = peer.open(STDIN)
    sent += control(4, 0, struct.pack(">III", 1, 4, 100)) + control(9, 0, struct.pack(">II", 1, 100))
    sent += control(5, 0, b"") + control(77, 255, bytes(100_000))
    sent += control(2, 0, word(2) + peer.block({"a": "b"})) + control(8, 0, word(1) + peer.block({"c": "d"}))
    sent += control(8, FIN, word(9) + peer.block({}))
    sent += peer.open(STDIN) + control(8, FIN, word(3) + peer.block({})) + control(8, FIN, word(3) + peer.block({}))
    events, answers, _ = both(sent + spdy.goaway())
    assert events == [StreamOpened(1, STDIN), StreamOpened(3, STDIN), StreamEnded(3), PeerLeaves()]
    assert not answers.resets
    assert not answers.goaways


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (control(1, 0, b"", version=2), "a control frame of version 2, not 3"),
        (control(6, 0, b"", version=0x7FFF), "a control frame of version 32767, not 3"),
        (struct.pack(">II", 0x8003_0001, MAX_CONTROL + 1), "a control frame of 16385 bytes, at most 16384"),
        (control(1, 0, bytes(3)), "a control frame of type 1 that is cut short"),
        (control(2, 0, b""), "type 2 that is cut short"),
        (control(3, 0, bytes(7)), "type 3 that is cut short"),
        (control(6, 0, b""), "type 6 that is cut short"),
        (control(7, 0, b""), "type 7 that is cut short"),
        (control(8, 0, b""), "type 8 that is cut short"),
        (SpdyPeer().open(STDIN, stream=2), "stream 2 after 0: a client's numbers are odd and grow"),
    ],
)
def test_broken_rules_end_the_connection(frame: bytes, words: str) -> None:
    events, answers, end = both(frame + spdy.ping(1))
    (failed,) = events
    assert isinstance(failed, ProtocolFailed)
    assert words in failed.reason
    assert answers.goaways == [(0, 1)]
    assert not answers.pings
    assert end.receive_data(spdy.ping(1)) == []
    assert end.send_goodbye() == end.data_to_send() == b""


@pytest.mark.parametrize("number", [1, 3])
def test_numbers_of_streams_grow(number: int) -> None:
    peer = SpdyPeer()
    events, answers, _ = both(peer.open(STDIN, stream=3) + peer.open(STDIN, stream=number))
    assert isinstance(events[-1], ProtocolFailed)
    assert answers.goaways == [(3, 1)]


def test_too_many_streams() -> None:
    peer, end = SpdyPeer(), Spdy()
    end.receive_data(b"".join(peer.open(STDIN) for _ in range(MAX_STREAMS)))
    assert end.receive_data(peer.open(STDIN)) == []
    peer.receive(end.data_to_send())
    assert peer.resets == {2 * MAX_STREAMS + 1: 3}
    peer.receive(end.send_reset(1))
    assert end.receive_data(peer.open({"a": "b"})) == [StreamOpened(2 * MAX_STREAMS + 3, {"a": "b"})]


class TwoEnds(RuleBasedStateMachine):
    """The client of the tests and the server joined; the model is what each has been told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.client, self.server = SpdyPeer(), Spdy()
        self.wire = b""
        self.events: list[Event] = []
        self.expected: list[Event] = []
        self.sending: set[int] = set()
        """Streams on which the client may send."""
        self.writing: set[int] = set()
        """Streams on which the server may."""
        self.accepted: set[int] = set()
        self.written: dict[int, bytes] = {}
        self.pings = 0

    def some(self, streams: set[int], pick: int) -> int:
        return sorted(streams)[pick % len(streams)]

    @rule(flags=st.sampled_from([0, 0, FIN, UNIDIRECTIONAL]), value=st.text("abc", max_size=9))
    def open(self, flags: int, value: str) -> None:
        self.wire += self.client.open({"streamtype": value}, flags)
        stream = self.client.opened
        self.expected.append(StreamOpened(stream, {"streamtype": value}))
        if flags & FIN:
            self.expected.append(StreamEnded(stream))
        else:
            self.sending.add(stream)
        if not flags & UNIDIRECTIONAL:
            self.writing.add(stream)

    @precondition(lambda self: self.sending)
    @rule(pick=st.integers(0, 99), content=st.binary(max_size=99), ends=st.booleans())
    def send(self, pick: int, content: bytes, *, ends: bool) -> None:
        stream = self.some(self.sending, pick)
        self.wire += spdy.data(stream, content, FIN if ends else 0)
        if content:
            self.expected.append(DataReceived(stream, content))
        if ends:
            self.expected.append(StreamEnded(stream))
            self.sending.discard(stream)

    @precondition(lambda self: self.sending | self.writing)
    @rule(pick=st.integers(0, 99))
    def reset(self, pick: int) -> None:
        stream = self.some(self.sending | self.writing, pick)
        self.wire += spdy.reset(stream)
        self.expected.append(StreamReset(stream))
        self.sending.discard(stream)
        self.writing.discard(stream)

    @rule()
    def ping(self) -> None:
        self.wire += spdy.ping(1)
        self.pings += 1

    @rule(cut=st.integers(1, 60))
    def deliver(self, cut: int) -> None:
        """In pieces of one size, all of it: what the server does next knows of it."""
        for start in range(0, len(self.wire), cut):
            self.events += self.server.receive_data(self.wire[start : start + cut])
            self.client.receive(self.server.data_to_send())
        self.wire = b""
        assert joined(self.events) == joined(self.expected)

    @precondition(lambda self: self.writing and not self.wire)
    @rule(pick=st.integers(0, 99))
    def accept(self, pick: int) -> None:
        stream = self.some(self.writing, pick)
        self.client.receive(self.server.accept(stream))
        self.accepted.add(stream)

    @precondition(lambda self: self.writing & self.accepted and not self.wire)
    @rule(pick=st.integers(0, 99), content=st.binary(max_size=99), ends=st.booleans())
    def write(self, pick: int, content: bytes, *, ends: bool) -> None:
        stream = self.some(self.writing & self.accepted, pick)
        self.client.receive(self.server.send_data(stream, content))
        self.written[stream] = self.written.get(stream, b"") + content
        if ends:
            self.client.receive(self.server.send_end(stream))
            self.writing.discard(stream)
            assert stream in self.client.ended

    @invariant()
    def the_client_has_what_was_written(self) -> None:
        assert {stream: bytes(got) for stream, got in self.client.received.items() if got} == {
            stream: content for stream, content in self.written.items() if content
        }
        assert self.client.replied == self.accepted
        assert not self.client.resets
        assert not self.client.goaways

    def teardown(self) -> None:  # type: ignore[explicit-override]
        self.deliver(7)
        assert len(self.client.pings) == self.pings


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_cut_anywhere_mean_the_same(data: bytes, cut: int) -> None:
    whole, cut_up = Spdy(), Spdy()
    events = joined(whole.receive_data(data))
    pieces: list[Event] = []
    for start in range(0, len(data), cut):
        pieces += cut_up.receive_data(data[start : start + cut])
    assert joined(pieces) == events
    assert cut_up.data_to_send() == whole.data_to_send()
