"""Compose, the proxy before the servers, and what the image is made of."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import typer
import yaml
from packaging.requirements import Requirement

from server.commands.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def locked() -> list[tuple[Requirement, list[str]]]:
    """What the image installs, with the hashes that it may have."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (Requirement(line.split("--hash")[0]), re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)) for line in lines
    ]


def test_the_variables_of_compose_are_options_of_the_server() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {f"AFT_{option.name.upper()}" for option in serve.params}
    assert compose()["services"]["server"]["environment"].keys() <= options


def test_only_the_proxy_is_reached_from_outside() -> None:
    services = compose()["services"]
    assert "ports" not in services["server"]
    assert "ports" not in services["redis"]
    assert services["server"]["networks"] == services["redis"]["networks"] == ["inside"]
    assert compose()["networks"]["inside"] == {"internal": True}
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published == ["443:8443", "80:8080", "127.0.0.1:9090:9090"]


def test_compose_and_kubernetes_say_the_same() -> None:
    services = compose()["services"]
    manifests = {name: list(yaml.safe_load_all((BASE / name).read_text())) for name in ("redis.yaml", "proxy.yaml")}
    (redis,) = manifests["redis.yaml"][1]["spec"]["template"]["spec"]["containers"]
    (proxy,) = manifests["proxy.yaml"][0]["spec"]["template"]["spec"]["containers"]
    for service, container in (("redis", redis), ("proxy", proxy)):
        assert services[service]["image"].endswith(f"/{container['image']}}}")
    for option in ("--appendonly yes", "--appendfsync always", "--maxmemory 1gb", "--maxmemory-policy noeviction"):
        assert option in services["redis"]["command"][2]
        assert option in " ".join(redis["args"])
    assert services["proxy"]["environment"].keys() == {entry["name"] for entry in proxy["env"]}
    mounted = [volume.split(":")[0] for volume in services["proxy"]["volumes"]]
    assert (DEPLOY / mounted[0]).samefile(BASE / "haproxy.cfg")
    tag = compose()["services"]["server"]["image"].removesuffix("}").split(":")[-1]
    assert tag == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_all_that_the_image_installs_is_locked_by_its_content() -> None:
    """If this fails after a change of pyproject.toml: `make lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [*project["project"]["dependencies"], *extras["redis"], *extras["tracing"]]
    assert all(hashes for _, hashes in locked())
    for requirement in (Requirement(line) for line in [*needed, *project["build-system"]["requires"]]):
        versions = [
            str(one.specifier).removeprefix("==") for one, _ in locked() if one.name == requirement.name.lower()
        ]
        assert versions, requirement
        assert all(requirement.specifier.contains(version, prereleases=True) for version in versions), requirement
