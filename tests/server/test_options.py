"""From a config's fields to the options of a command, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from server.errors import ConfigurationError
from server.options import BY_ENVIRONMENT, from_environment, make, options_of
from server.settings import check, setting


@dataclass(frozen=True, kw_only=True)
class Inner:
    memory_bytes: int = setting(2**20, "for states.", name="memory", unit="MiB", positive=True)
    cache: int = setting(2**22, "for prefixes.", unit="MiB", at_least=0)
    words: tuple[str, ...] = setting((), "Words.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """`hidden` is no setting, and so no option."""

    name: str | None = setting(None, "A name.")
    port: int = setting(80, "A port.", at_least=0, at_most=65535)
    inner: Inner = field(default_factory=Inner)
    kind: Literal["text", "json"] = setting("text", "A kind.")
    form: str | None = setting(None, "A form.", choices=("round", "flat"))
    exact: bool = setting(False, "Whether.")
    limit: float = setting(3.0, "Seconds.", positive=True, at_most=9)
    weight: float = setting(0.5, "A weight.")
    hidden: int = 3

    def __post_init__(self) -> None:
        check(self)


@options_of(Outer)
def outer(*, loud: Annotated[bool, typer.Option(help="The command's own.")] = False, **options: Any) -> Outer:
    assert not loud
    return make(Outer, options)


@options_of(Outer, only=("memory", "name"))
def some(text: Annotated[str, typer.Argument(help="Not an option.")], *, name: str | None, **options: Any) -> Any:
    return text, name, options


def run(command: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command(context_settings=BY_ENVIRONMENT)(command)
    return app(list(arguments), standalone_mode=False)


def test_without_options_a_config_is_its_defaults() -> None:
    assert run(outer) == from_environment(outer) == Outer()


def test_every_field_has_an_option() -> None:
    given = [
        "--name",
        "a",
        "--port",
        "0",
        "--memory",
        "3",
        "--cache",
        "0",
        "--words",
        "b  c",
        "--kind",
        "json",
        "--form",
        "flat",
        "--exact",
        "--limit",
        "9",
        "--weight",
        "-1",
    ]
    inner = Inner(memory_bytes=3 * 2**20, cache=0, words=("b", "c"))
    assert run(outer, *given) == Outer(
        name="a", port=0, inner=inner, kind="json", form="flat", exact=True, limit=9.0, weight=-1.0
    )


def test_and_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MEMORY": "3", "WORDS": "b c", "EXACT": "1", "PORT": "", "HIDDEN": "4"}.items():
        monkeypatch.setenv(f"AFT_{name}", value)
    expected = Outer(inner=Inner(memory_bytes=3 * 2**20, words=("b", "c")), exact=True)
    assert from_environment(outer) == expected
    assert run(outer, "--memory", "4").inner.memory_bytes == 4 * 2**20  # a flag wins


def test_a_value_that_is_no_choice_is_no_option() -> None:
    with pytest.raises(Exception, match="'bent' is not one of 'round', 'flat'"):
        run(outer, "--form", "bent")


def test_a_command_may_name_those_that_it_takes() -> None:
    assert run(some, "a") == ("a", None, {"memory": 1})
    assert run(some, "a", "--memory", "2", "--name", "b") == ("a", "b", {"memory": 2})
    with pytest.raises(Exception, match="No such option"):
        run(some, "a", "--port", "2")


def test_help_is_the_fields() -> None:
    app = typer.Typer()
    app.command(context_settings=BY_ENVIRONMENT)(outer)
    lines = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.splitlines()
    options = [line for line in lines if " --" in line and "completion" not in line]
    names = [
        word for line in options for word in line.split() if word.startswith("--") and not word.startswith("--no-")
    ]
    assert names == [
        "--name",
        "--port",
        "--memory",
        "--cache",
        "--words",
        "--kind",
        "--form",
        "--exact",
        "--limit",
        "--weight",
        "--loud",
        "--help",
    ]
    assert "MiB for states. [env var: AFT_MEMORY] [default: 1]" in options[2]


@pytest.mark.parametrize(
    ("config", "values", "sentence"),
    [
        (Inner, {"memory_bytes": 0}, "memory must be positive, not 0."),
        (Inner, {"memory_bytes": -3 * 2**20}, "memory must be positive, not -3 MiB."),
        (Inner, {"cache": -(2**19)}, "cache must be at least 0, not -0.5 MiB."),
        (Outer, {"port": 65536}, "port must be from 0 to 65535, not 65536."),
        (Outer, {"form": "bent"}, "form must be one of round, flat, not bent."),
        (Outer, {"port": -1}, "port must be from 0 to 65535, not -1."),
        (Outer, {"limit": 0.0}, "limit must be positive and at most 9, not 0.0."),
        (Outer, {"limit": math.inf}, "limit must be positive and at most 9, not inf."),
        (Outer, {"limit": math.nan}, "limit must be positive and at most 9, not nan."),
        (Outer, {"weight": math.inf}, "weight must be finite, not inf."),
        (Outer, {"weight": math.nan}, "weight must be finite, not nan."),
        (Inner, {"cache": -(10**400)}, "cache must be at least 0, not -9.53674e+393 MiB."),
    ],
)
def test_a_refusal_has_the_name_and_the_unit_that_people_use(config: Any, values: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        config(**values)
    assert str(error.value) == sentence
