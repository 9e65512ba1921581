"""The bucket of CPU time: what is in debt, and for how long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from handlers.wasmtime.quota import Allowance, CpuLimit

MS = 1_000_000


def test_the_first_quota_may_be_used_at_once_and_no_more() -> None:
    bucket = Allowance(CpuLimit(5_000, 100_000), at=0, used=0)
    assert bucket.debt(5 * MS, 5 * MS) == 0
    # 5 ms more, and 0.25 filled since: 4.75 ms at 5 % take 95 ms.
    assert abs(bucket.debt(10 * MS, 10 * MS) - 95 * MS) <= MS
    assert bucket.debt(105 * MS, 10 * MS) == 0


def test_rest_is_not_saved_beyond_one_quota() -> None:
    bucket = Allowance(CpuLimit(10_000, 100_000), at=0, used=0)
    assert bucket.debt(10_000 * MS, 0) == 0
    assert abs(bucket.debt(10_020 * MS, 20 * MS) - 100 * MS) <= MS


@given(st.lists(st.tuples(st.integers(0, 50 * MS), st.integers(0, 50 * MS)), max_size=60), st.integers(1000, 200_000))
def test_who_waits_for_its_debts_stays_within_the_quota(steps: list[tuple[int, int]], quota: int) -> None:
    limit = CpuLimit(quota, 100_000)
    bucket = Allowance(limit, at=0, used=0)
    now = used = last = 0
    for time_passed, cpu in steps:
        last = min(cpu, time_passed)
        now, used = now + time_passed, used + last
        now += bucket.debt(now, used)
    assert used <= now * limit.quota / limit.period + limit.quota * 1000 + 1
