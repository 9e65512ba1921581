"""Lists and statuses, from records to replies: every field that clients get, and the filters in every combination."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from cri_shim.adapters.store import Store
from cri_shim.flows.container_query import QueryContainers
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.infra import Infra
from cri_shim.flows.pod_query import QueryPods
from cri_shim.model.container import ContainerName, ContainerRecord, Exit, Reason, User
from cri_shim.model.ids import ContainerId, Digest, ImageId, PodId, new_container_id, new_pod_id
from cri_shim.model.pod import PodName, PodRecord
from cri_shim.pb import api_pb2 as pb

IMAGE = ImageId(Digest("sha256:" + "1" * 64))
POD = pb.PodSandboxConfig(
    metadata=pb.PodSandboxMetadata(name="p", namespace="n", uid="u", attempt=3),
    labels={"app": "x", "tier": "1"},
    annotations={"note": "\0any"},
    linux=pb.LinuxPodSandboxConfig(
        security_context=pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(pid=pb.CONTAINER))
    ),
)
CONTAINER = pb.ContainerConfig(
    metadata=pb.ContainerMetadata(name="c", attempt=2),
    image=pb.ImageSpec(image=IMAGE, user_specified_image="app:1", annotations={"a": "b"}, runtime_handler="crun"),
    labels={"app": "x", "tier": "1"},
    annotations={"note": "\0any"},
    mounts=[pb.Mount(container_path="/m/", host_path="/link", readonly=True)],
    linux=pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(cpu_shares=7, oom_score_adj=-998)),
)


def pod_record(**changes: object) -> PodRecord:
    facts: dict[str, object] = {
        "id": new_pod_id(),
        "name": PodName("p_n_u_3"),
        "config": POD.SerializeToString(),
        "runtime_handler": "crun",
        "handler": "crun",
        "created_at": 11,
        "ready_at": 12,
    }
    return PodRecord(**{**facts, **changes})  # type: ignore[arg-type]


def container_record(**changes: object) -> ContainerRecord:
    facts: dict[str, object] = {
        "id": new_container_id(),
        "pod_id": new_pod_id(),
        "name": ContainerName("c_2_p"),
        "config": CONTAINER.SerializeToString(),
        "handler": "crun",
        "decision": "because",
        "image_id": IMAGE,
        "image_ref": "app@sha256:2",
        "image_name": "docker.io/library/app:1",
        "created_at": 21,
        "committed": True,
        "log_path": "/logs/c.log",
        "stop_signal": 3,
        "user": User(5, 6, (6, 7)),
    }
    return ContainerRecord(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "state.db")
    yield opened
    opened.close()


@pytest.fixture
def pods(store: Store) -> QueryPods:
    # Only verbose status asks for the infra container.
    return QueryPods(store, cast("Infra", None))


@pytest.fixture
def containers(store: Store) -> QueryContainers:
    return QueryContainers(store, Handlers(live={}, rules={}, default=""))


async def test_a_pod_in_full(store: Store, pods: QueryPods) -> None:
    record = pod_record(ips=("10.0.0.2", "fd00::2"))
    await store.pods.put(record)
    (listed,) = (await pods.list(pb.ListPodSandboxRequest())).items
    common = {"id": record.id, "metadata": POD.metadata, "created_at": 11, "runtime_handler": "crun"}
    common |= {"labels": POD.labels, "annotations": POD.annotations, "state": pb.SANDBOX_READY}
    assert listed == pb.PodSandbox(**common)  # type: ignore[arg-type]
    answer = await pods.status(pb.PodSandboxStatusRequest(pod_sandbox_id=record.id))
    options = POD.linux.security_context.namespace_options
    assert answer == pb.PodSandboxStatusResponse(
        status=pb.PodSandboxStatus(
            **common,  # type: ignore[arg-type]
            network=pb.PodSandboxNetworkStatus(ip="10.0.0.2", additional_ips=[pb.PodIP(ip="fd00::2")]),
            linux=pb.LinuxPodSandboxStatus(namespaces=pb.Namespace(options=options)),
        )
    )


@pytest.mark.parametrize(
    ("record", "state"),
    [
        (container_record(), pb.CONTAINER_CREATED),
        (container_record(started_at=22, pid=9), pb.CONTAINER_RUNNING),
        (
            container_record(started_at=22, exit=Exit(code=137, at=23, reason=Reason.OOM_KILLED, message="why")),
            pb.CONTAINER_EXITED,
        ),
    ],
    ids=["created", "running", "exited"],
)
async def test_a_container_in_full(
    store: Store, containers: QueryContainers, record: ContainerRecord, state: pb.ContainerState.ValueType
) -> None:
    await store.containers.put(record)
    (listed,) = (await containers.list(pb.ListContainersRequest())).containers
    common = {"id": record.id, "metadata": CONTAINER.metadata, "state": state, "created_at": 21, "image_id": IMAGE}
    common |= {"image_ref": "app@sha256:2", "labels": CONTAINER.labels, "annotations": CONTAINER.annotations}
    assert listed == pb.Container(pod_sandbox_id=record.pod_id, image=CONTAINER.image, **common)  # type: ignore[arg-type]
    image = pb.ImageSpec()
    image.CopyFrom(CONTAINER.image)
    image.image = "docker.io/library/app:1"
    expected = pb.ContainerStatus(
        **common,  # type: ignore[arg-type]
        started_at=record.started_at,
        image=image,
        mounts=CONTAINER.mounts,
        log_path="/logs/c.log",
        resources=pb.ContainerResources(linux=CONTAINER.linux.resources),
        user=pb.ContainerUser(linux=pb.LinuxContainerUser(uid=5, gid=6, supplemental_groups=[6, 7])),
        stop_signal=pb.SIGNAL_SIGQUIT,
    )
    if record.exit is not None:
        expected.finished_at, expected.exit_code, expected.reason, expected.message = 23, 137, "OOMKilled", "why"
    answer = await containers.status(pb.ContainerStatusRequest(container_id=record.id))
    assert answer == pb.ContainerStatusResponse(status=expected)


async def test_verbose_says_who_runs_it_and_why(store: Store, containers: QueryContainers) -> None:
    record = container_record(started_at=22, pid=9)
    await store.containers.put(record)
    answer = await containers.status(pb.ContainerStatusRequest(container_id=record.id, verbose=True))
    told = json.loads(answer.info["info"])
    assert (told["sandboxID"], told["pid"], told["handler"], told["handlerReason"]) == (
        record.pod_id,
        9,
        "crun",
        "because",
    )
    # A handler that is no longer configured is said, and costs nobody the status.
    assert "no longer configured" in told["handlerProblem"]


async def test_what_is_being_made_and_what_is_ours_is_not_listed(
    store: Store, pods: QueryPods, containers: QueryContainers
) -> None:
    await store.pods.put(pod_record(ready_at=0))
    await store.containers.put(container_record(committed=False))
    await store.containers.put(container_record(infra=True))
    assert not (await pods.list(pb.ListPodSandboxRequest())).items
    assert not (await containers.list(pb.ListContainersRequest())).containers


async def test_pod_filters_all_have_to_match(store: Store, pods: QueryPods) -> None:
    record = pod_record(id=PodId("a" * 64))
    await store.pods.put(record)
    await store.pods.put(
        pod_record(id=PodId("b" * 64), stopped_at=13, config=pb.PodSandboxConfig().SerializeToString())
    )
    ready = pb.PodSandboxStateValue(state=pb.SANDBOX_READY)
    fits: dict[str, object] = {"id": "aaa", "state": ready, "label_selector": {"app": "x"}}
    misses: dict[str, object] = {
        "id": "c",
        "state": pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY),
        "label_selector": {"app": "x", "tier": "2"},
    }

    async def found(fields: dict[str, object]) -> list[str]:
        wanted = pb.PodSandboxFilter(**fields)  # type: ignore[arg-type]
        return [pod.id for pod in (await pods.list(pb.ListPodSandboxRequest(filter=wanted))).items]

    assert len(await found({})) == 2
    for fields in _subsets(fits):
        assert await found(fields) == [record.id], fields
    for name, wrong in misses.items():
        assert await found({**fits, name: wrong}) == [], name


async def test_container_filters_all_have_to_match(store: Store, containers: QueryContainers) -> None:
    record = container_record(id=ContainerId("a" * 64), pod_id=PodId("d" * 64))
    await store.containers.put(record)
    other = container_record(id=ContainerId("b" * 64), pod_id=PodId("e" * 64), started_at=5, config=b"")
    await store.containers.put(other)
    created = pb.ContainerStateValue(state=pb.CONTAINER_CREATED)
    fits: dict[str, object] = {"id": "aaa", "state": created, "pod_sandbox_id": "dd", "label_selector": {"app": "x"}}
    misses: dict[str, object] = {
        "id": "c",
        "state": pb.ContainerStateValue(state=pb.CONTAINER_RUNNING),
        "pod_sandbox_id": "e",
        "label_selector": {"app": "x", "tier": "2"},
    }

    async def found(fields: dict[str, object]) -> list[str]:
        wanted = pb.ContainerFilter(**fields)  # type: ignore[arg-type]
        return [one.id for one in (await containers.list(pb.ListContainersRequest(filter=wanted))).containers]

    assert len(await found({})) == 2
    for fields in _subsets(fits):
        assert await found(fields) == [record.id], fields
    for name, wrong in misses.items():
        assert await found({**fits, name: wrong}) == [], name


def _subsets(fields: dict[str, object]) -> Iterator[dict[str, object]]:
    """All but the empty one."""
    for size in range(1, len(fields) + 1):
        for names in itertools.combinations(fields, size):
            yield {name: fields[name] for name in names}
