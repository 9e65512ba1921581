"""Classes of block IO: a file names them, an annotation gives one to a container (the format of goresctrl).

Not the finding of devices (`cri_shim.adapters.blockio`). Invariant: a class that is asked for is applied in full or is
an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from cri_shim.model.errors import FailedPrecondition
from cri_shim.spec.facts import Json
from cri_shim.spec.quantity import parse_quantity

_OF_CONTAINER: Final = "io.kubernetes.cri.blockio-class"
_OF_POD: Final = "blockio.resources.beta.kubernetes.io/pod"
_OF_POD_FOR: Final = "blockio.resources.beta.kubernetes.io/container."
_LEAST_WEIGHT: Final = 10
_MOST_WEIGHT: Final = 1000
_THROTTLES: Final = {
    "throttle_read_bps": "throttleReadBpsDevice",
    "throttle_write_bps": "throttleWriteBpsDevice",
    "throttle_read_iops": "throttleReadIOPSDevice",
    "throttle_write_iops": "throttleWriteIOPSDevice",
}

Amount = int | str | None


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the devices that fit the patterns, or without `Devices` the weight for all."""

    devices: tuple[str, ...] = msgspec.field(name="Devices", default=())
    throttle_read_bps: Amount = msgspec.field(name="ThrottleReadBps", default=None)
    throttle_write_bps: Amount = msgspec.field(name="ThrottleWriteBps", default=None)
    throttle_read_iops: Amount = msgspec.field(name="ThrottleReadIOPS", default=None)
    throttle_write_iops: Amount = msgspec.field(name="ThrottleWriteIOPS", default=None)
    weight: Amount = msgspec.field(name="Weight", default=None)


class Classes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    classes: dict[str, tuple[Parameters, ...]] = msgspec.field(name="Classes")


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device by its numbers."""

    major: int
    minor: int


def asked_class(name: str, container: Mapping[str, str], pod: Mapping[str, str]) -> tuple[str, str]:
    """Annotation and class of the container `name`, both empty for none; by the annotations that the others know."""
    for key, source in ((_OF_CONTAINER, container), (_OF_POD_FOR + name, pod), (_OF_POD, pod)):
        if source.get(key):
            return key, source[key]
    return "", ""


def parse_classes(data: bytes) -> Classes:
    """Parse a file, YAML. ValueError says what is wrong with it."""
    found = msgspec.yaml.decode(data, type=Classes)
    for name, parts in found.classes.items():
        for part in parts:
            try:
                _check(part)
            except ValueError as error:
                raise ValueError(f"class {name!r}: {error}") from error
    return found


def block_io(parts: Sequence[Parameters], disks: Callable[[str], Iterable[Disk]]) -> Json:
    """`linux.resources.blockIO` (OCI runtime-spec, config-linux); of two parts about one device the later one counts.

    `disks` finds the devices of a pattern. FailedPrecondition when one finds none.
    """
    result: Json = {}
    listed: dict[str, dict[Disk, Json]] = {}
    for part in parts:
        if not part.devices:
            result["weight"] = _amount(part.weight)
        for disk in _disks(part, disks):
            numbers = {"major": disk.major, "minor": disk.minor}
            if part.weight is not None:
                listed.setdefault("weightDevice", {})[disk] = {**numbers, "weight": _amount(part.weight)}
            for field, key in _THROTTLES.items():
                if (rate := getattr(part, field)) is not None:
                    listed.setdefault(key, {})[disk] = {**numbers, "rate": _amount(rate)}
    return result | {key: list(entries.values()) for key, entries in listed.items()}


def _disks(part: Parameters, disks: Callable[[str], Iterable[Disk]]) -> dict[Disk, None]:
    found: dict[Disk, None] = {}
    for pattern in part.devices:
        fitting = dict.fromkeys(disks(pattern))
        if not fitting:
            msg = f"block IO: no block device of this node fits {pattern!r}"
            raise FailedPrecondition(msg)
        found |= fitting
    return found


def _check(part: Parameters) -> None:
    amounts: dict[str, Any] = {field: getattr(part, field) for field in (*_THROTTLES, "weight")}
    given = {field: amount for field, amount in amounts.items() if amount is not None}
    for field, amount in given.items():
        number = amount if isinstance(amount, int) else parse_quantity(amount)
        if number is None or number < 0:
            raise ValueError(f"{field} {amount!r} is not a quantity")
        if field == "weight" and not _LEAST_WEIGHT <= number <= _MOST_WEIGHT:
            raise ValueError(f"weight {number} is not between {_LEAST_WEIGHT} and {_MOST_WEIGHT}")
    if not given:
        raise ValueError("a part says neither weight nor throttle")
    for pattern in part.devices:
        if not pattern.startswith("/") or not pattern.strip("/"):
            raise ValueError(f"Devices: {pattern!r} is not an absolute path")
    if not part.devices and set(given) != {"weight"}:
        raise ValueError("a throttle needs Devices")


def _amount(amount: Amount) -> int:
    number = amount if isinstance(amount, int) else parse_quantity(amount or "")
    assert number is not None  # noqa: S101  parsed before
    return number
