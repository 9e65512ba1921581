from __future__ import annotations

import pytest

from cri_shim.model.container import User
from cri_shim.model.errors import InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.users import MAX_ID, UserDatabase, parse_user_database, resolve

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# a comment
broken line
web:x:33:33:www:/var/www:/bin/false
app:x:1000:1001::/home/app
nohome:x:1002:1002:::
toobig:x:99999999999:1::/:
"""
GROUP = b"""root:x:0:root
web:x:33:
app:x:1001:
wheel:x:10:root,app
data:x:50000:app,web
short:x
"""
DATABASE = parse_user_database(PASSWD, GROUP)


def security(
    user: int | None = None,
    group: int | None = None,
    name: str = "",
    groups: tuple[int, ...] = (),
    *,
    strict: bool = False,
) -> pb.LinuxContainerSecurityContext:
    return pb.LinuxContainerSecurityContext(
        run_as_user=None if user is None else pb.Int64Value(value=user),
        run_as_group=None if group is None else pb.Int64Value(value=group),
        run_as_username=name,
        supplemental_groups=groups,
        supplemental_groups_policy=pb.SupplementalGroupsPolicy.Strict if strict else pb.SupplementalGroupsPolicy.Merge,
    )


def who(asked: pb.LinuxContainerSecurityContext, image_user: str = "") -> User:
    return resolve(asked, image_user, DATABASE, "example/image:1").user


def test_lines_that_do_not_parse_are_skipped() -> None:
    assert [account.name for account in DATABASE.accounts] == ["root", "web", "app", "nohome"]
    assert [group.name for group in DATABASE.groups] == ["root", "web", "app", "wheel", "data"]


@pytest.mark.parametrize(
    ("image_user", "expected"),
    [
        ("", User(0, 0, (0, 10))),
        ("app", User(1000, 1001, (1001, 10, 50000))),
        ("1000", User(1000, 1001, (1001, 10, 50000))),
        ("app:web", User(1000, 33, (33, 10, 50000))),
        ("app:7", User(1000, 7, (7, 10, 50000))),
        ("4242", User(4242, 0, (0,))),
        ("4242:4243", User(4242, 4243, (4243,))),
        (":33", User(0, 33, (33, 0, 10))),
    ],
)
def test_user_of_the_image(image_user: str, expected: User) -> None:
    assert who(security(), image_user) == expected


def test_request_wins_over_image_and_number_over_name() -> None:
    assert who(security(user=33), "app").uid == 33
    assert who(security(name="web"), "app").uid == 33
    assert who(security(user=0, name="web"), "app").uid == 0


def test_group_of_the_request() -> None:
    assert who(security(user=1000, group=5)) == User(1000, 5, (5, 10, 50000))
    assert who(security(name="web", group=0)) == User(33, 0, (0, 50000))


def test_group_without_user_is_refused_even_when_the_image_has_one() -> None:
    with pytest.raises(InvalidArgument, match="run_as_group is set without"):
        who(security(group=5), "app")


def test_merge_adds_memberships_and_strict_does_not() -> None:
    assert who(security(user=1000, groups=(1234, 10))).groups == (1001, 10, 50000, 1234)
    assert who(security(user=1000, groups=(1234, 10), strict=True)).groups == (1001, 1234, 10)


@pytest.mark.parametrize("image_user", ["nobody", "app:nogroup"])
def test_unknown_name_is_refused_with_image_and_name(image_user: str) -> None:
    with pytest.raises(InvalidArgument, match=r"(nobody|nogroup).*example/image:1"):
        who(security(), image_user)


@pytest.mark.parametrize("number", [-1, MAX_ID + 1, 2**40])
def test_ids_out_of_range_are_refused(number: int) -> None:
    for asked in (security(user=number), security(user=1, group=number), security(groups=(number,))):
        with pytest.raises(InvalidArgument, match=str(number)):
            who(asked)


def test_home_is_that_of_the_account() -> None:
    homes = {
        user: resolve(security(), user, DATABASE, "i").home for user in ("app", "web", "nohome", "root", "4242", "0")
    }
    assert homes == {
        "app": "/home/app",
        "web": "/var/www",
        "nohome": "/",
        "root": "/root",
        "4242": "/",
        "0": "/root",
    }
    assert resolve(security(), "", UserDatabase(), "i").home == "/root"


def test_names_need_not_be_text() -> None:
    database = parse_user_database(b"\xff\xfe:x:5:5::/h\nok:x:6:6::/k\n", b"\xff:x:7:ok")
    assert resolve(security(), "ok", database, "i").user == User(6, 6, (6, 7))
