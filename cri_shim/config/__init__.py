"""
Configuration: one YAML file, drop-ins beside it, typed sections, an origin for every value.

Read by the composition root and the command line only; everybody else gets values. Invariant: a `Config` that exists
is valid; whatever is wrong has been refused with file, line and hint.
"""

from __future__ import annotations

from cri_shim.config.load import load, load_text
from cri_shim.config.sections import Config

__all__ = ["Config", "load", "load_text"]
