"""The manifests in deploy/kubernetes: what Kubernetes accepts, and what the server understands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import typer
import yaml

from model import load_checkpoint
from server.api.app import create_app
from server.commands.main import app
from server.config import ServerConfig, server_config
from server.engine import LLMEngine
from server.options import from_environment

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUSTOMIZATION = FOLDER / "base" / "kustomization.yaml"
KUBERNETES = ("1.30", kubernetes_validate.latest_version())  # the oldest that knows preStop's sleep, and the newest


def rendered(name: str) -> dict[tuple[str, str], Any]:
    """The objects of a folder, by kind and name, as `kubectl kustomize` gives them but for the names of images."""
    folder = FOLDER / name
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    objects: dict[tuple[str, str], Any] = {}
    for resource in kustomization["resources"]:
        path = folder / resource
        if path.is_dir():
            objects |= rendered(resource.removeprefix("../"))
        else:
            documents = yaml.safe_load_all(path.read_text())
            objects |= {(document["kind"], document["metadata"]["name"]): document for document in documents}
    for generated in kustomization.get("configMapGenerator", []):
        files = {file: (folder / file).read_text() for file in generated["files"]}
        metadata = {"name": generated["name"]}
        objects["ConfigMap", generated["name"]] = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": files,
        }
    for patch in kustomization.get("patches", []):
        key = (patch["target"]["kind"], patch["target"]["name"])
        objects[key] = jsonpatch.apply_patch(objects[key], yaml.safe_load((folder / patch["path"]).read_text()))
    return objects


@pytest.fixture(params=["base", "gpu"])
def objects(request: pytest.FixtureRequest) -> dict[tuple[str, str], Any]:
    return rendered(request.param)


def pod_of(objects: dict[tuple[str, str], Any]) -> Any:
    return objects["Deployment", "aft"]["spec"]["template"]["spec"]


def variables_of(objects: dict[tuple[str, str], Any]) -> dict[str, str]:
    """Those of the pods' own, not of the ConfigMap."""
    return {entry["name"]: entry.get("value", "") for entry in pod_of(objects)["containers"][0]["env"]}


def config_of(objects: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    """What `aft serve` makes of the ConfigMap."""
    store = {"AFT_STORE": variables_of(objects)["AFT_STORE"].replace("$(REDIS_PASSWORD)", "secret")}
    for name, value in (objects["ConfigMap", "aft"]["data"] | store).items():
        monkeypatch.setenv(name, value)
    return from_environment(server_config)


@pytest.mark.parametrize("release", KUBERNETES)
def test_kubernetes_accepts_them(objects: dict[tuple[str, str], Any], release: str) -> None:
    assert len(objects) == 12
    for document in objects.values():
        kubernetes_validate.validate(document, release, strict=True)


def test_variables_are_options_of_the_server(objects: dict[tuple[str, str], Any]) -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {f"AFT_{option.name.upper()}" for option in serve.params}
    assert objects["ConfigMap", "aft"]["data"].keys() <= options - {"AFT_API_KEYS", "AFT_STORE"}  # of Secrets
    assert variables_of(objects).keys() == {"REDIS_PASSWORD", "AFT_STORE"}
    sources = pod_of(objects)["containers"][0]["envFrom"]
    assert sources == [{"configMapRef": {"name": "aft"}}, {"secretRef": {"name": "aft"}}]
    assert pod_of(objects)["enableServiceLinks"] is False  # else the Service named aft sets AFT_PORT


def test_a_pod_has_time_to_drain(objects: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pod = pod_of(objects)
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = config_of(objects, monkeypatch).drain_timeout
    assert pod["terminationGracePeriodSeconds"] >= before + drain + 20


def test_probes_and_services_reach_the_server(
    objects: dict[tuple[str, str], Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container,) = pod_of(objects)["containers"]
    routes = create_app(LLMEngine(*load_checkpoint(checkpoint))).openapi()["paths"]
    for probe, path in (("startupProbe", "/health"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert "get" in routes[path]
    config = config_of(objects, monkeypatch)
    assert config.host == "0.0.0.0"
    assert container["ports"] == [{"name": "http", "containerPort": config.port}]
    labels = objects["Deployment", "aft"]["spec"]["template"]["metadata"]["labels"]
    service = objects["Service", "aft"]["spec"]
    assert (service["selector"], service["ports"][0]["targetPort"]) == (labels, "http")
    assert config.store == f"redis://:secret@redis:{objects['Service', 'redis']['spec']['ports'][0]['port']}/0"
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    assert container["image"] == f"aft-server:{project['version']}"


def test_pods_fit_the_image(objects: dict[tuple[str, str], Any]) -> None:
    lines = (FOLDER.parents[1] / "Dockerfile").read_text().splitlines()
    dockerfile = dict(line.split(" ", 1) for line in lines if line.startswith(("USER ", "VOLUME ", "EXPOSE ")))
    pod = pod_of(objects)
    (container,) = pod["containers"]
    context = pod["securityContext"]
    assert dockerfile["USER"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert dockerfile["EXPOSE"] == str(container["ports"][0]["containerPort"])
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", dockerfile["VOLUME"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_nobody_is_reached_but_by_those_who_need_it(objects: dict[tuple[str, str], Any]) -> None:
    servers, store = (objects["NetworkPolicy", name]["spec"] for name in ("aft", "redis"))
    labels = {
        kind: objects[kind_of, kind]["spec"]["template"]["metadata"]["labels"]
        for kind_of, kind in (("Deployment", "aft"), ("Deployment", "aft-proxy"), ("StatefulSet", "redis"))
    }
    assert servers["podSelector"] == {"matchLabels": labels["aft"]}
    assert servers["policyTypes"] == ["Ingress", "Egress"]
    assert servers["ingress"][0]["from"][0] == {"podSelector": {"matchLabels": labels["aft-proxy"]}}
    assert servers["egress"][0]["to"] == [{"podSelector": {"matchLabels": labels["redis"]}}]
    assert store["podSelector"] == {"matchLabels": labels["redis"]}
    assert store["ingress"][0]["from"] == [{"podSelector": {"matchLabels": labels["aft"]}}]


def test_redis_asks_for_the_password_that_the_server_has(objects: dict[tuple[str, str], Any]) -> None:
    (redis,) = objects["StatefulSet", "redis"]["spec"]["template"]["spec"]["containers"]
    (server,) = pod_of(objects)["containers"]
    secrets = [entry["valueFrom"]["secretKeyRef"] for entry in (redis["env"][0], server["env"][0])]
    assert secrets == [{"name": "redis", "key": "password"}] * 2
    assert redis["args"][:2] == ["--requirepass", "$(REDIS_PASSWORD)"]


def test_redis_has_room_for_the_quotas_of_some_keys(
    objects: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (redis,) = objects["StatefulSet", "redis"]["spec"]["template"]["spec"]["containers"]
    maxmemory = redis["args"][redis["args"].index("--maxmemory") + 1]
    assert maxmemory.endswith("gb")
    room, config = int(maxmemory.removesuffix("gb")) * 2**30, config_of(objects, monkeypatch)
    assert 3 * 1.1 * config.sessions.session_quota + config.prefix_store <= room
    limit = redis["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Mi")) * 2**20 >= 2 * room  # it writes its log anew by a copy of itself


def test_the_proxy_finds_the_servers(objects: dict[tuple[str, str], Any]) -> None:
    (proxy,) = objects["Deployment", "aft-proxy"]["spec"]["template"]["spec"]["containers"]
    name, port = next(entry["value"] for entry in proxy["env"] if entry["name"] == "AFT_SERVERS").split(":")
    service = objects["Service", name]["spec"]
    assert service["clusterIP"] == "None"  # the addresses of the pods, which the proxy looks at one by one
    assert service["ports"][0]["port"] == int(port)
    assert service["selector"] == objects["Service", "aft"]["spec"]["selector"]
    bound = {int(found) for found in re.findall(r"bind :(\d+)", objects["ConfigMap", "haproxy"]["data"]["haproxy.cfg"])}
    assert bound == {entry["containerPort"] for entry in proxy["ports"]}
    ports = [entry["targetPort"] for entry in objects["Service", "aft-proxy"]["spec"]["ports"]]
    assert ports == [entry["name"] for entry in proxy["ports"]]


def test_images_have_one_version(objects: dict[tuple[str, str], Any]) -> None:
    images = {entry["name"]: entry.get("newTag") for entry in yaml.safe_load(KUSTOMIZATION.read_text())["images"]}
    workloads = [objects[key] for key in (("StatefulSet", "redis"), ("Deployment", "aft-proxy"))]
    for workload in workloads:
        name, tag = workload["spec"]["template"]["spec"]["containers"][0]["image"].split(":")
        assert images[name] == tag


def test_a_gpu_for_each_pod_of_that_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = rendered("gpu")
    assert pod_of(objects)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert config_of(objects, monkeypatch).device == "cuda"
