"""Structured logs: one line an event on stderr, with the ids of the request, pod and container in hand.

Not a logging policy: errors are logged once, at the edge. Invariant: nothing that came as a credential is ever given to
a logger.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

# structlog loads `rich` where it happens to be installed: 4 MiB for tracebacks that a daemon does not print.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

import structlog  # noqa: E402
from structlog.typing import FilteringBoundLogger, Processor  # noqa: E402

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def get_logger() -> FilteringBoundLogger:
    """The logger; binds the current context's ids to each line."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def configure(level: str, fmt: str, stream: TextIO | None = None) -> None:
    """Set up the process's logs. `level` is a key of LEVELS, `fmt` is auto, console or json."""
    out = stream or sys.stderr
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if fmt == "console" or (fmt == "auto" and out.isatty()):
        processors.append(
            structlog.dev.ConsoleRenderer(
                colors=out.isatty() and "NO_COLOR" not in os.environ,
                exception_formatter=structlog.dev.plain_traceback,
            )
        )
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
