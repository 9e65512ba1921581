"""One-time tokens: each stands for one thing that a client may do once, soon.

Not authentication beyond that: who knows a token has it. Invariant: a token is good for one use within its time, there
are never more than MAX_OUTSTANDING, and none is ever logged.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from cri_shim.model.errors import ResourceExhausted

T = TypeVar("T")

TTL_SECONDS: Final = 60.0
MAX_OUTSTANDING: Final = 1000
TOKEN_BYTES: Final = 24
"""192 bits of randomness."""


class Tokens(Generic[T]):
    """Things that wait to be fetched."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        self._waiting: dict[str, tuple[float, T]] = {}

    def issue(self, thing: T) -> str:
        """A new token. ResourceExhausted when too many have not been used."""
        now = self._clock()
        # In the order of their issue, so the first that is still good ends the search.
        while self._waiting:
            token, (until, _) = next(iter(self._waiting.items()))
            if until > now:
                break
            del self._waiting[token]
        if len(self._waiting) >= MAX_OUTSTANDING:
            msg = f"{MAX_OUTSTANDING} streaming requests wait for their client"
            raise ResourceExhausted(msg, hint=f"each gives up after {TTL_SECONDS:g} s")
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self._waiting[token] = now + TTL_SECONDS, thing
        return token

    def redeem(self, token: str) -> T | None:
        """What the token stands for; None if it is unknown, used or too old."""
        until, thing = self._waiting.pop(token, (0.0, None))
        return thing if until > self._clock() else None
