"""Options of commands, made of the fields of configs: names, types, defaults and help texts stand there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from server.settings import Setting, settings_of

Config = TypeVar("Config")
Command = TypeVar("Command", bound=Callable[..., Any])

# Every option of a command can be given as a variable: --max-num-seqs as AFT_MAX_NUM_SEQS.
BY_ENVIRONMENT = {"auto_envvar_prefix": "AFT"}
WORDS = tuple[str, ...]  # on a command line one text, separated by spaces


def options_of(
    source: Callable[..., Any], *, only: Sequence[str] = (), more: Sequence[Parameter] = ()
) -> Callable[[Command], Command]:
    """Give a command the options of `source`: a config with those in it, or a function that has been given some.

    They are its `**options`, in their order, before the command's own; a keyword of one's name is that option, too.
    only: names of those that it takes; more: further options, before the others.
    """
    found = {given.name: given for given in (*more, *_options(source))}
    options = {name: found[name] for name in only} if only else found

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        arguments = [p for p in own if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        others = [p for p in own if p.kind is Parameter.KEYWORD_ONLY and p.name not in options]
        command.__signature__ = Signature([*arguments, *options.values(), *others])  # type: ignore[attr-defined]
        return command

    return decorate


def make(config: type[Config], values: Mapping[str, Any]) -> Config:
    """A config, and those in it, of options by their names. What is not among them has its default."""
    types = get_type_hints(config)
    given: dict[str, Any] = {name: make(kind, values) for name, kind in types.items() if _is_config(kind)}
    for name, told in settings_of(config).items():
        value = values.get(told.name)
        if value is not None and types[name] == WORDS:
            given[name] = tuple(value.split())
        elif isinstance(value, Path):
            given[name] = value.resolve()  # for processes that work in another folder
        elif value is not None:
            given[name] = value * told.scale if told.unit else value
    return config(**given)


def from_environment(command: Callable[..., Config]) -> Config:
    """What a command with options returns if they are given as variables only."""
    app = typer.Typer()
    app.command(context_settings=BY_ENVIRONMENT)(command)
    made: Config = app([], standalone_mode=False)
    return made


def _is_config(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _options(source: Any) -> Iterator[Parameter]:
    if not _is_config(source):
        yield from inspect.signature(source, eval_str=True).parameters.values()
        return
    types, settings = get_type_hints(source), settings_of(source)
    for field in dataclasses.fields(source):
        kind = types[field.name]
        if _is_config(kind):
            yield from _options(kind)
        elif told := settings.get(field.name):
            yield option_of(told, kind, field.default)
        elif text := field.metadata.get("text"):  # of a config of the model's
            yield option(field.name, kind, field.default, text)


def option_of(setting: Setting, kind: Any, default: Any) -> Parameter:
    if kind == WORDS:
        return option(setting.name, str | None, " ".join(default) or None, setting.text)
    if setting.unit:
        return option(setting.name, kind, default // setting.scale, f"{setting.unit} {setting.text}")
    return option(setting.name, kind, default, setting.text, setting.choices)


def option(name: str, kind: Any, default: Any, text: str, choices: Sequence[str] = ()) -> Parameter:
    """An option of a command. choices: the values that it may have besides None, if not all of `kind`."""
    if choices:
        kind = Literal[tuple(choices)]
        kind = kind if default is not None else kind | None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typer.Option(help=text)])
