"""The check of what no request may hold, over every field of every request that there is."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from cri_shim.model.errors import InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import wellformed
from tests.support.fields import Path, leaves, name_of, put

REQUESTS = [method.input_type for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]
OF_THE_CLIENT = {"labels", "annotations", "label_selector"}
ENUMS = [
    pytest.param(request, path, id=f"{request.name}.{name_of(path)}")
    for request in REQUESTS
    for path in leaves(request)
    if path[-1].enum_type is not None
]
TEXTS = [
    pytest.param(request, path, id=f"{request.name}.{name_of(path)}")
    for request in REQUESTS
    for path in leaves(request)
    if path[-1].type == FieldDescriptor.TYPE_STRING or path[-1].message_type is not None
]


@pytest.mark.parametrize(("kind", "path"), ENUMS)
def test_an_unknown_value_of_an_enum_is_named(kind: Descriptor, path: Path) -> None:
    request = GetMessageClass(kind)()
    put(request, path, 99)
    with pytest.raises(InvalidArgument, match=f"^{re.escape(name_of(path))}: 99 is not a value of"):
        wellformed.check(request)


@pytest.mark.parametrize(("kind", "path"), TEXTS)
def test_a_nul_is_named_unless_the_text_is_the_clients_own(kind: Descriptor, path: Path) -> None:
    request = GetMessageClass(kind)()
    put(request, path, "a\0b")
    if path[-1].name in OF_THE_CLIENT:
        wellformed.check(request)
        return
    with pytest.raises(InvalidArgument, match=f"^{re.escape(name_of(path))}: 'a.x00b' contains a NUL"):
        wellformed.check(request)


def test_what_is_well_formed_passes() -> None:
    config = pb.ContainerConfig(command=["a", "b"], envs=[pb.KeyValue(key="k", value=b"\0")])
    config.mounts.add(propagation=pb.MountPropagation.PROPAGATION_BIDIRECTIONAL)
    config.labels["\0"] = "\0"
    wellformed.check(pb.CreateContainerRequest(config=config))
    wellformed.check(pb.VersionRequest())


def test_the_keys_of_a_map_are_texts_too() -> None:
    config = pb.PodSandboxConfig()
    config.linux.sysctls["a\0"] = "1"
    with pytest.raises(InvalidArgument, match=r"^config\.linux\.sysctls: 'a"):
        wellformed.check(pb.RunPodSandboxRequest(config=config))


FIRST = """
import sys
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import wellformed
wellformed.check(pb.PullImageRequest(image=pb.ImageSpec(image="a", annotations={"a": "b"}, image_ref="c")))
assert "google.protobuf.descriptor_pb2" not in sys.modules
"""


def test_the_first_request_loads_nothing() -> None:
    """It is looked at on the event loop, and that module takes more than a millisecond."""
    subprocess.run([sys.executable, "-c", FIRST], check=True)
