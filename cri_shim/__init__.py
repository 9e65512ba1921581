"""cri-shim: a CRI daemon for Linux containers and WebAssembly modules on one node."""

from __future__ import annotations

VERSION = "0.1.0"
RUNTIME_NAME = "cri-shim"
