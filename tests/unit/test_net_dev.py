"""What `proc(5)` shows of /proc/net/dev."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cri_shim.spec.net_dev import Interface, parse_net_dev

HEAD = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
"""  # noqa: E501  as the kernel writes it
LO = "    lo: 9876 54 0 0 0 0 0 0 9876 54 0 0 0 0 0 0\n"
NET1 = (
    "  net1:       1       2    3    4    5     6          7         8        9      10   11   12   13   14   15   16\n"
)
ETH0 = (
    "  eth0: 1215645    2751    1    0    0     0          0         0  1782404    4324    2    0    0  427    0    0\n"
)


def test_the_usual_one_comes_first_and_the_loopback_not_at_all() -> None:
    assert parse_net_dev(HEAD + LO + NET1 + ETH0) == (
        Interface("eth0", 1215645, 1, 1782404, 2),
        Interface("net1", 1, 3, 9, 11),
    )


def test_without_eth0_the_kernels_order_stays() -> None:
    names = [each.name for each in parse_net_dev(HEAD + NET1 + LO + NET1.replace("net1", "net0"))]
    assert names == ["net1", "net0"]


def test_nothing_but_loopback() -> None:
    assert parse_net_dev(HEAD + LO) == ()


@given(st.text(st.sampled_from("eth0:1 \n|-9"), max_size=300))
def test_anything(text: str) -> None:
    for interface in parse_net_dev(text):
        assert 0 <= interface.rx_bytes < 1 << 64


def test_a_name_and_its_number_may_touch() -> None:
    assert parse_net_dev(ETH0.replace("eth0: 1215645", "eth0:1215645"))[0].rx_bytes == 1215645
