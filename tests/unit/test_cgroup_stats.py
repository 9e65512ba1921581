"""The accounting files of cgroups, as the kernel's documentation shows them, and whatever else may stand in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.spec.cgroup_stats import (
    NOTHING,
    V1_FILES,
    V2_FILES,
    Cpu,
    Memory,
    Pressure,
    Swap,
    Usage,
    Waited,
    combined,
    guest_usage,
    parse_pressure,
    parse_v1,
    parse_v2,
)

NO_LIMIT = "9223372036854771712\n"
UINT64 = (1 << 64) - 1

V1 = {
    "cpuacct.usage": "1234567890\n",
    "memory.usage_in_bytes": "10485760\n",
    "memory.limit_in_bytes": "20971520\n",
    "memory.stat": (
        "cache 4096\nrss 8192\npgfault 7\ninactive_file 1\nhierarchical_memory_limit 20971520\n"
        "total_cache 4194304\ntotal_rss 6291456\ntotal_pgfault 2000\ntotal_pgmajfault 3\ntotal_inactive_file 2097152\n"
    ),
    "memory.memsw.usage_in_bytes": "11534336\n",
    "memory.memsw.limit_in_bytes": "31457280\n",
}
PRESSURE = (
    "some avg10=1.50 avg60=0.25 avg300=100.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=18446744073709\n"
)
V2 = {
    "cpu.stat": "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\nnr_periods 0\n",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    "memory.current": "10485760\n",
    "memory.max": "20971520\n",
    "memory.stat": "anon 6291456\nfile 4194304\ninactive_file 2097152\npgfault 2000\npgmajfault 3\n",
    "memory.swap.current": "1048576\n",
    "memory.swap.max": "10485760\n",
    "memory.pressure": PRESSURE,
    "io.pressure": PRESSURE,
}
MEMORY = Memory(
    usage=10 << 20,
    working_set=8 << 20,
    available=12 << 20,
    rss=6 << 20,
    page_faults=2000,
    major_page_faults=3,
)
WAITED = Pressure(Waited(1.5, 0.25, 100.0, 1_234_000), Waited(0.0, 0.0, 0.0, 18_446_744_073_709_000))


def test_v1() -> None:
    assert parse_v1(V1) == Usage(Cpu(1234567890), MEMORY, Swap(1 << 20, (10 << 20) - (1 << 20)), None)


def test_v2() -> None:
    usage = parse_v2(V2)
    assert usage.cpu == Cpu(1_234_567_000, Pressure(Waited(0.0, 0.0, 0.0, 0), None))
    assert usage.memory == Memory(10 << 20, 8 << 20, 12 << 20, 6 << 20, 2000, 3, WAITED)
    assert usage.swap == Swap(1 << 20, 9 << 20)
    assert usage.io == WAITED


def test_without_limits() -> None:
    one = parse_v1(V1 | {"memory.limit_in_bytes": NO_LIMIT, "memory.memsw.limit_in_bytes": NO_LIMIT})
    two = parse_v2(V2 | {"memory.max": "max\n", "memory.swap.max": "max\n"})
    for usage in (one, two):
        assert usage.memory is not None
        assert usage.memory.available == 0
        assert usage.swap == Swap(1 << 20, None)


def test_more_is_used_than_there_is() -> None:
    """The files are read one after the other, so they need not agree."""
    one = parse_v1(V1 | {"memory.limit_in_bytes": "4096\n", "memory.memsw.usage_in_bytes": "0\n"})
    assert one.memory is not None
    assert one.memory.available == 0
    assert one.swap is not None
    assert one.swap.usage == 0
    two = parse_v2(V2 | {"memory.current": "4096\n", "memory.swap.max": "0\n"})
    assert two.memory is not None
    assert two.memory.working_set == 0
    assert two.swap == Swap(1 << 20, 0)


@pytest.mark.parametrize("missing", [name for names in V1_FILES.values() for name in names])
def test_v1_without_one_file(missing: str) -> None:
    assert set(V1) == {name for names in V1_FILES.values() for name in names}
    usage = parse_v1({name: text for name, text in V1.items() if name != missing})
    assert (usage.cpu is None) == (missing == "cpuacct.usage")
    assert (usage.memory is None) == (missing in {"memory.usage_in_bytes", "memory.stat"})
    assert (usage.swap is None) == (missing in {"memory.usage_in_bytes", "memory.memsw.usage_in_bytes"})


@pytest.mark.parametrize("missing", V2_FILES)
def test_v2_without_one_file(missing: str) -> None:
    assert set(V2) == set(V2_FILES)
    usage = parse_v2({name: text for name, text in V2.items() if name != missing})
    assert (usage.cpu is None) == (missing == "cpu.stat")
    assert (usage.memory is None) == (missing in {"memory.current", "memory.stat"})
    assert (usage.swap is None) == (missing == "memory.swap.current")
    assert (usage.io is None) == (missing == "io.pressure")


def test_nothing_is_there() -> None:
    assert parse_v1({}) == parse_v2({}) == Usage()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "some",
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=1",
        "some avg10=nan avg60=0.00 avg300=0.00 total=1",
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=-1",
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=1 more",
    ],
)
def test_what_is_no_pressure(text: str) -> None:
    assert parse_pressure(text) is None


GARBAGE = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["-1", "1e3", "٣", "1 2", "max", "0x10", "1" * 20, "9" * 20, "9" * 30, str(UINT64), NO_LIMIT]),
    st.integers(0, 1 << 70).map(str),
    st.builds("{} {}\n".format, st.sampled_from(["total_rss", "anon", "usage_usec", "pgfault"]), st.integers()),
    st.sampled_from([*V1.values(), *V2.values()]),
)


def numbers_in(value: object) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif is_dataclass(value):
        for each in fields(value):
            yield from numbers_in(getattr(value, each.name))


@given(st.dictionaries(st.sampled_from(sorted({*V1, *V2})), GARBAGE))
def test_every_number_fits_whatever_stands_there(files: dict[str, str]) -> None:
    for usage in (parse_v1(files), parse_v2(files)):
        assert all(0 <= number <= UINT64 for number in numbers_in(usage))
        twice = combined(usage, [usage, usage])
        assert all(0 <= number <= UINT64 for number in numbers_in(twice))


def test_of_a_guest() -> None:
    assert guest_usage(5, 64, 48, 100) == Usage(Cpu(5), Memory(usage=64, working_set=48, available=52, rss=48))
    assert guest_usage(5, 64, 64, 0).memory == Memory(usage=64, working_set=64, available=0, rss=64)


def test_a_pod_and_what_is_not_in_its_cgroup() -> None:
    total = combined(parse_v2(V2), [guest_usage(7, 64, 64, 100), guest_usage(3, 36, 36, 0)])
    assert total.cpu is not None
    assert total.cpu.usage_ns == 1_234_567_010
    assert total.memory == Memory((10 << 20) + 100, (8 << 20) + 100, 12 << 20, (6 << 20) + 100, 2000, 3, WAITED)
    assert combined(NOTHING, []) == NOTHING
    assert combined(NOTHING, [guest_usage(7, 64, 64, 100)]).memory == Memory(64, 64, 0, 64)
    assert combined(Usage(), [guest_usage(7, 64, 64, 0)]) == guest_usage(7, 64, 64, 0)
