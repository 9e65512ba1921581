"""What a test expects of a call that must fail. Not for tools: it needs pytest."""

from __future__ import annotations

from collections.abc import Iterator
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
