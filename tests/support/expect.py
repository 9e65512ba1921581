"""What a test expects: of a call that must fail, of a state that comes in a moment. Not for tools: it needs pytest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from tests.support.cri import fault


@contextmanager
def refused(code: grpc.StatusCode, words: str = "") -> Iterator[None]:
    """Holds the body to fail with this status code and a message that contains `words`."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    found, message = fault(caught.value)
    assert found is code, f"{found}: {message}"
    assert words in message
    # One sentence for people: kubectl shows it as it is.
    assert "\n" not in message
    assert "Traceback" not in message


def eventually(condition: Callable[[], bool], within: float = 60) -> None:
    """Waits until `condition` holds; fails after `within` seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not so after {within} s"
        time.sleep(0.02)
