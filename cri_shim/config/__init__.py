"""Configuration: one YAML file, drop-ins beside it, typed sections, an origin for every value.

Read by the composition root and the command line only; everybody else gets values. Invariant: a `Config` that exists
is valid; whatever is wrong has been refused with file, line and hint.
"""

from __future__ import annotations

from cri_shim.config.dump import as_dict, dump
from cri_shim.config.load import Origins, decode, load, load_text
from cri_shim.config.sections import WITHOUT_EFFECT, Config, Streaming

__all__ = ["WITHOUT_EFFECT", "Config", "Origins", "Streaming", "as_dict", "decode", "dump", "load", "load_text"]
