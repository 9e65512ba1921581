"""`python -m cri_shim` is `cri-shim`."""

from __future__ import annotations

import sys

from cri_shim.cli import main

sys.exit(main())
