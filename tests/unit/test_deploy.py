"""Holds what `deploy/` offers against the program: the configuration, RuntimeClasses and pods go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cri_shim import config as configuration
from cri_shim.loader import HandlerOptions, handler_options
from cri_shim.model.entry import EntryKind
from cri_shim.spec import dispatch

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CLASSES = {item["metadata"]["name"]: item for item in yaml.safe_load_all((DEPLOY / "runtimeclasses.yaml").read_text())}
PODS = {item["metadata"]["name"]: item for item in yaml.safe_load_all((DEPLOY / "pods.yaml").read_text())}


@pytest.fixture
def handlers() -> dict[str, HandlerOptions]:
    return handler_options(*configuration.load(DEPLOY / "config.yaml"))


def test_every_handler_has_a_class(handlers: dict[str, HandlerOptions]) -> None:
    assert {item["handler"] for item in CLASSES.values()} == set(handlers)
    assert all((item["apiVersion"], item["kind"]) == ("node.k8s.io/v1", "RuntimeClass") for item in CLASSES.values())
    # Labels and taints as documents of Wasm on Kubernetes name them.
    placed = [item["scheduling"] for item in CLASSES.values() if "scheduling" in item]
    assert {next(iter(each["nodeSelector"].items())) for each in placed} == {("wasm-runtime", "enabled")}
    assert {toleration["key"] for each in placed for toleration in each["tolerations"]} == {"wasm-workload"}


@pytest.mark.parametrize("pod", PODS.values(), ids=list(PODS))
def test_pods_ask_for_what_their_handler_allows(handlers: dict[str, HandlerOptions], pod: dict[str, Any]) -> None:
    rules = {name: each.rules for name, each in handlers.items()}
    of_pod = rules[CLASSES[pod["spec"]["runtimeClassName"]]["handler"]]
    decided = set()
    for container in pod["spec"]["containers"]:
        is_module = container["command"] == ["app.wasm"]
        subject = dispatch.Subject(
            name=container["name"],
            container_annotations={},
            pod_annotations=pod["metadata"].get("annotations", {}),
            image_annotations={},
            image_wasm=False,
            platform_wasm=False,
            entry=EntryKind.WASM if is_module else EntryKind.ELF,
        )
        decided.add(dispatch.decide(rules, of_pod, subject).wasm is is_module)
    assert decided == {True}
