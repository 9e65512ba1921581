"""Who the first process runs as: from the request, the image, and the image's own user database.

Not a reader of files: the caller brings the bytes of `/etc/passwd` and `/etc/group`. Invariant: a name is only ever
looked up in the image, never on the host, and the primary group is always among the groups, so that a program that
drops it by setgroups(2) is seen to drop it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cri_shim.model.container import User
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.user_namespace import UserNamespace
from cri_shim.pb import api_pb2 as pb

MAX_ID = 2**32 - 2
"""The highest id; 2^32 - 1 means "no change" to the kernel."""
MAX_GROUPS = 65536
"""NGROUPS_MAX (setgroups(2))."""


@dataclass(frozen=True, slots=True)
class Account:
    """A line of /etc/passwd (passwd(5))."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class Group:
    """A line of /etc/group (group(5))."""

    name: str
    gid: int
    members: frozenset[str]


@dataclass(frozen=True, slots=True)
class UserDatabase:
    """What an image knows of users; empty for an image without a root file system."""

    accounts: tuple[Account, ...] = ()
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """The answer: numeric ids, and the value of HOME."""

    user: User
    home: str


@dataclass(frozen=True, slots=True)
class _Wanted:
    """`user` and `group` are names or numbers, empty = not said."""

    user: str
    group: str


def parse_user_database(passwd: bytes, group: bytes) -> UserDatabase:
    """Parse both files; lines that do not parse are skipped, as libc does."""
    return UserDatabase(tuple(_accounts(passwd)), tuple(_groups(group)))


def resolve(
    security: pb.LinuxContainerSecurityContext, image_user: str, database: UserDatabase, image_name: str
) -> Identity:
    """The identity of a container's first process.

    `run_as_user` wins over `run_as_username`, both over the image's `User`. InvalidArgument for a group without a user,
    for a name that the image does not have, and for ids out of range; the error names the image.
    """
    wanted = _wanted(security, image_user)
    account = _account(database, wanted.user, image_name)
    if wanted.group:
        account = Account(account.name, account.uid, _group_id(database, wanted.group, image_name), account.home)
    groups = _supplemental(security, database, account)
    return Identity(User(account.uid, account.gid, groups), account.home)


def check_mapped(user: User, ids: UserNamespace | None) -> None:
    """InvalidArgument for an id that the pod's user namespace does not have; without one there is every id."""
    if ids is None:
        return
    for what, number, known in (
        ("user", user.uid, ids.uids),
        *(("group", gid, ids.gids) for gid in (user.gid, *user.groups)),
    ):
        if not known.holds(number):
            msg = f"{what} {number} is not in the pod's user namespace, which has the ids 0 to {known.length - 1}"
            raise InvalidArgument(
                msg, hint="look at run_as_user, run_as_group, supplemental_groups and the image's USER"
            )


def _wanted(security: pb.LinuxContainerSecurityContext, image_user: str) -> _Wanted:
    group = ""
    if security.HasField("run_as_group"):
        group = str(_checked(security.run_as_group.value, "run_as_group"))
    if security.HasField("run_as_user"):
        return _Wanted(str(_checked(security.run_as_user.value, "run_as_user")), group)
    if security.run_as_username:
        return _Wanted(security.run_as_username, group)
    if group:
        msg = "linux.security_context.run_as_group is set without run_as_user or run_as_username"
        raise InvalidArgument(msg)
    user, _, group = image_user.partition(":")
    return _Wanted(user, group)


def _account(database: UserDatabase, user: str, image_name: str) -> Account:
    """The account of a name or number. A number needs no entry: its group is 0 then."""
    number = _number(user or "0")
    for account in database.accounts:
        if account.uid == number if number is not None else account.name == user:
            return account
    if number is None:
        msg = f"user {user!r} is not in /etc/passwd of image {image_name}"
        raise InvalidArgument(msg, hint="name a user that the image has, or a numeric run_as_user")
    return Account("", _checked(number, "user"), 0, "/root" if number == 0 else "/")


def _group_id(database: UserDatabase, group: str, image_name: str) -> int:
    number = _number(group)
    if number is not None:
        return _checked(number, "group")
    for candidate in database.groups:
        if candidate.name == group:
            return candidate.gid
    msg = f"group {group!r} is not in /etc/group of image {image_name}"
    raise InvalidArgument(msg, hint="name a group that the image has, or a numeric run_as_group")


def _supplemental(
    security: pb.LinuxContainerSecurityContext, database: UserDatabase, account: Account
) -> tuple[int, ...]:
    """Merge (the default) takes the memberships from the image too, Strict only the request's (CRI v1)."""
    listed = [_checked(gid, "supplemental_groups") for gid in security.supplemental_groups]
    strict = security.supplemental_groups_policy == pb.SupplementalGroupsPolicy.Strict
    known = () if strict else database.groups
    memberships = [group.gid for group in known if account.name and account.name in group.members]
    groups = tuple(dict.fromkeys([account.gid, *memberships, *listed]))
    if len(groups) > MAX_GROUPS:
        msg = f"supplemental_groups: {len(groups)} groups, Linux takes {MAX_GROUPS}"
        raise InvalidArgument(msg)
    return groups


def _checked(number: int, what: str) -> int:
    if not 0 <= number <= MAX_ID:
        msg = f"{what} {number} is not between 0 and {MAX_ID}"
        raise InvalidArgument(msg)
    return number


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _lines(content: bytes, fields: int) -> Iterator[list[str]]:
    for line in content.decode(errors="surrogateescape").splitlines():
        parts = line.strip().split(":")
        if len(parts) >= fields:
            yield parts


def _accounts(content: bytes) -> Iterator[Account]:
    for parts in _lines(content, 6):
        uid, gid = _number(parts[2]), _number(parts[3])
        if parts[0] and uid is not None and gid is not None and max(uid, gid) <= MAX_ID:
            yield Account(parts[0], uid, gid, parts[5] or "/")


def _groups(content: bytes) -> Iterator[Group]:
    for parts in _lines(content, 4):
        gid = _number(parts[2])
        if parts[0] and gid is not None and gid <= MAX_ID:
            yield Group(parts[0], gid, frozenset(parts[3].split(",")) - {""})
