"""The process to run: arguments, environment, working directory and identity.

Not the security settings (`cri_shim.spec.security`). Invariant: what this returns is final; neither the handler nor the
runtime adds a variable or an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import ProcessPlan
from cri_shim.model.image import ImageRecord
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import users
from cri_shim.spec.paths import check_length, rooted

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MODULE_NAME = "module.wasm"
"""argv[0] of a Wasm artifact that names no entry point."""


def process_plan(
    config: pb.ContainerConfig,
    hostname: str,
    image: ImageRecord,
    database: users.UserDatabase,
    default_env: Mapping[str, str],
) -> ProcessPlan:
    """Resolve request, image and user database into one process (contract: CreateContainer).

    InvalidArgument when there is no command, a variable cannot be passed on, or the user cannot be resolved.
    """
    identity = users.resolve(
        config.linux.security_context, image.config.user, database, image.repo_tags[0] if image.repo_tags else image.id
    )
    cwd = rooted(config.working_dir or image.config.working_dir)
    check_length("working_dir", cwd)
    return ProcessPlan(
        args=process_args(config, image),
        env=_environment(config, image, {"HOSTNAME": hostname, "HOME": identity.home, **default_env}),
        cwd=cwd,
        user=identity.user,
        tty=config.tty,
        stdin=config.stdin,
        stdin_once=config.stdin_once,
    )


def process_args(config: pb.ContainerConfig, image: ImageRecord) -> tuple[str, ...]:
    """`command` replaces the image's entrypoint and cmd, `args` the cmd only."""
    args = tuple(config.args) or (() if config.command else image.config.cmd)
    command = tuple(config.command) or image.config.entrypoint
    if image.wasm is not None and not command:
        command = (MODULE_NAME,)
    words = (*command, *args)
    if not words or not words[0]:
        msg = "no command specified: neither the container nor the image has one"
        raise InvalidArgument(msg, hint="set the container's command, or ENTRYPOINT or CMD in the image")
    for word in words:
        if "\0" in word:
            msg = f"command or args: {word!r} contains a NUL character"
            raise InvalidArgument(msg)
    return words


def _environment(config: pb.ContainerConfig, image: ImageRecord, given: Mapping[str, str]) -> tuple[str, ...]:
    """Later ones win: defaults, what is `given`, the image's, the request's."""
    merged = {"PATH": DEFAULT_PATH, **({"TERM": "xterm"} if config.tty else {}), **given}
    merged.update(_image_variables(image))
    for variable in config.envs:
        name, value = _checked_variable(variable)
        merged[name] = value
    return tuple(f"{name}={value}" for name, value in merged.items())


def _image_variables(image: ImageRecord) -> Iterator[tuple[str, str]]:
    for variable in image.config.env:
        name, _, value = variable.partition("=")
        if name:
            yield name, value


def _checked_variable(variable: pb.KeyValue) -> tuple[str, str]:
    """config.json is JSON, hence UTF-8; a value that is not cannot reach the process unchanged."""
    name = variable.key
    if not name or "=" in name or "\0" in name:
        msg = f"envs: {name!r} is not a name for an environment variable"
        raise InvalidArgument(msg)
    try:
        value = variable.value.decode()
    except UnicodeDecodeError:
        msg = f"envs: the value of {name} is not UTF-8, which an OCI runtime cannot pass on"
        raise InvalidArgument(msg) from None
    if "\0" in value:
        msg = f"envs: the value of {name} contains a NUL character"
        raise InvalidArgument(msg)
    return name, value
