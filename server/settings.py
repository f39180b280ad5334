"""Fields of configs: each says once what it is for and what it may be. Command lines are made of them (options.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from server.errors import ConfigurationError

MIB = 2**20
SIZES = {"MiB": MIB}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What `setting` says of a field, and the field's name for people."""

    text: str
    name: str = ""
    unit: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    positive: bool = False
    choices: tuple[str, ...] = ()

    @property
    def scale(self) -> int:
        """What a number of people is multiplied by for the field's."""
        return SIZES[self.unit] if self.unit else 1

    def check(self, value: Any) -> None:
        """Raises ConfigurationError, which names the setting and its range, for a value out of it."""
        low, high = self.at_least, self.at_most
        if self.choices and value not in self.choices:
            allowed = f"one of {', '.join(self.choices)}"
        elif self.positive and not value > 0:
            allowed = "positive"
        elif low is not None and high is not None and not low <= value <= high:
            allowed = f"from {low} to {high}"
        elif low is not None and not low <= value:
            allowed = f"at least {low}"
        else:
            return
        shown = f"{value / self.scale:g} {self.unit}" if self.unit and value else value
        raise ConfigurationError(f"{self.name} must be {allowed}, not {shown}.")


def setting(default: Any, text: str, **more: Any) -> Any:
    """A field of a config, which `check` checks and a command line may have.

    text      what it is; of a size, what follows the unit
    name      for people, if that is not the field's
    unit      of SIZES: what people count in; the field is in bytes
    at_least, at_most, positive, choices   its range; None is always allowed where the type has it
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(text=text, **more)})


def settings_of(config: type) -> dict[str, Setting]:
    """By the names of the fields; those that are no settings are left out."""
    return {
        field.name: dataclasses.replace(told, name=told.name or field.name)
        for field in dataclasses.fields(config)
        if (told := field.metadata.get("setting"))
    }


def check(config: Any) -> None:
    """Raises ConfigurationError, which names the setting and its range, for one that is out of range."""
    for name, told in settings_of(type(config)).items():
        value = getattr(config, name)
        if value is not None:
            told.check(value)
