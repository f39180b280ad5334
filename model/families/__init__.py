"""The architectures that can be run: a file for each, with all that is special about it."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.errors import ConfigError
from model.families.aft import AFTForCausalLM
from model.families.rwkv4 import RWKV4ForCausalLM
from model.language_model import LanguageModel

FAMILIES: dict[str, type[LanguageModel]] = {
    family.config_class.family: family for family in (AFTForCausalLM, RWKV4ForCausalLM)
}


def family_of(config: ModelConfig) -> type[LanguageModel]:
    return FAMILIES[config.family]


def config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """The configuration that config.json holds; "model_type" names its family. Raises ConfigError."""
    for family in FAMILIES.values():
        fields = family.config_fields(fields)
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise ConfigError(f'"model_type" must be one of {", ".join(FAMILIES)}, not {name!r}.')
    return FAMILIES[name].config_class.from_dict({k: v for k, v in fields.items() if k != "model_type"})
