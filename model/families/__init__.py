"""The architectures that can be run: a file for each, with all that is special about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from model.config import ModelConfig
from model.errors import ConfigError
from model.families.aft import AFTForCausalLM
from model.families.rwkv4 import RWKV4ForCausalLM
from model.language_model import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {
    family.config_class.family: family for family in (AFTForCausalLM, RWKV4ForCausalLM)
}
ELSEWHERE = "llama.cpp and vLLM run others"


def family_of(config: ModelConfig) -> type[LanguageModel]:
    return FAMILIES[config.family]


def architectures() -> dict[str, tuple[type[LanguageModel], dict[str, Any]]]:
    """By name: a family, and the fields that make it that architecture."""
    return {
        name: (family, fields)
        for family in FAMILIES.values()
        for name, fields in family.config_class.architectures().items()
    }


def fields_to_choose(defaults: Mapping[str, Any] | None = None) -> dict[str, tuple[Any, None, str]]:
    """Of all families, those that who makes a new model chooses: type, None, and what it is.

    defaults: what a field is that is not given, to be told.
    """
    chosen = {}
    for family in FAMILIES.values():
        types = get_type_hints(family.config_class)
        for field in dataclasses.fields(family.config_class):
            if text := field.metadata.get("text"):
                default = (defaults or {}).get(field.name)
                text = text if default is None else f"{text} {default} if left out."
                chosen[field.name] = (types[field.name] | None, None, text)
    return chosen


def config_of(architecture: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> ModelConfig:
    """A new model's. defaults: of fields that are not given, where the family has them. Raises ConfigError."""
    family, own = architectures()[architecture]
    known = {field.name: field for field in dataclasses.fields(family.config_class)}
    if other := sorted(fields.keys() - known.keys()):
        options = ", ".join(name for name, field in known.items() if "text" in field.metadata)
        raise ConfigError(f"{other[0]} means nothing to {architecture}, whose options are {options}; leave it out.")
    kept = {name: value for name, value in defaults.items() if name in known}
    return family.config_class.from_dict({**kept, **fields, **own})


def config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """The configuration that config.json holds; "model_type" names its family. Raises ConfigError."""
    for family in FAMILIES.values():
        if config := family.older_config(fields):
            return config
    name = fields.get("model_type")
    if not isinstance(name, str):
        raise ConfigError(f'"model_type" must be one of {", ".join(FAMILIES)}, not {name!r}.')
    if any(name == family.foreign_type for family in FAMILIES.values()):
        raise ConfigError(f'this is a "{name}" model of Hugging Face transformers: run `aft convert` first.')
    if name not in FAMILIES:
        raise ConfigError(f'this is a "{name}" model; only {" and ".join(FAMILIES)} can be run here: {ELSEWHERE}.')
    return FAMILIES[name].config_class.from_dict({k: v for k, v in fields.items() if k != "model_type"})
