"""Fields of configs: each says once what it is for and what it may be. Command lines are made of them (options.py)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from server.errors import ConfigurationError

MIB = 2**20
SIZES = {"MiB": MIB}
LONGEST = 10**9  # seconds that a setting may have, some 30 years: timers and stores cannot count any number


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
        if not self._allows(value):
            shown = f"{Decimal(value) / self.scale:.6g} {self.unit}" if self.unit and value else value
            raise ConfigurationError(f"{self.name} must be {self._range}, not {shown}.")

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low, high = self.at_least, self.at_most
        return (low is None or value >= low) and (high is None or value <= high) and (not self.positive or value > 0)

    @property
    def _range(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        low, high = self.at_least, self.at_most
        if low is not None and high is not None:
            return f"from {low} to {high}"
        bounds = (self.positive and "positive", low is not None and f"at least {low}", high and f"at most {high}")
        return " and ".join(bound for bound in bounds if bound) or "finite"


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
