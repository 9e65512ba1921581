"""Printing the configuration in force: YAML again, each value with the file and line that set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from cri_shim.config.load import Origins
from cri_shim.config.sections import Config


def as_dict(config: Config) -> dict[str, Any]:
    """Plain values, defaults included. The configuration holds no secret: `auth_file` is a path."""
    result: dict[str, Any] = msgspec.to_builtins(config)
    return result


def dump(config: Config, origins: Origins) -> str:
    """YAML text; `# default` where no file says anything."""
    return "".join(f"{line}\n" for line in _lines(as_dict(config), (), origins))


def _lines(values: Mapping[str, Any], path: tuple[str, ...], origins: Origins) -> list[str]:
    indent = "  " * len(path)
    lines = []
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:")
            lines += _lines(value, here, origins)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
            lines.append(f"{indent}{key}: {text}  # {origins.get(here, 'default')}")
    return lines
