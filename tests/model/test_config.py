from __future__ import annotations

import dataclasses
import json
import re

import pytest

from model import AFTConfig, RWKV4Config
from model.errors import ConfigError
from model.families import config_from_dict, config_of, family_of
from tests.conftest import VARIANTS, tiny_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_through_json(variant: str) -> None:
    config = tiny_config(variant, tie_embeddings=False)
    fields = {"model_type": config.family, **config.to_dict()}
    assert config_from_dict(json.loads(json.dumps(fields))) == config


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", "fourier"),
        ("dtype", "int8"),
        ("vocab_size", 0),
        ("d_model", -4),
        ("d_model", "16"),
        ("d_model", 10**30),
        ("vocab_size", 2**28 + 1),
        ("n_layer", 1.5),
        ("n_layer", 1025),
        ("n_layer", 10**9),
        ("n_head", 3),
        ("n_head", True),
        ("window", 0),
        ("d_bias", None),
        ("max_positions", 0),
        ("d_ff", 0),
        ("d_ff", 10**30),
        ("window", 10**30),
        ("norm_eps", 0.0),
        ("position_embeddings", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} must be .*, not {value!r}\.$"):
        tiny_config(**{field: value})  # type: ignore[arg-type]


def test_local_window_fits_the_positions() -> None:
    with pytest.raises(ConfigError, match="window must be at most max_positions = 8, not 9"):
        tiny_config("local", window=9, max_positions=8)


def test_unknown_and_missing_fields_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Unknown configuration field 'n_heads'"):
        AFTConfig.from_dict(tiny_config().to_dict() | {"n_heads": 4})
    fields = tiny_config().to_dict()
    del fields["d_model"]
    with pytest.raises(ConfigError, match="'d_model' is missing"):
        AFTConfig.from_dict(fields)


@pytest.mark.parametrize("field", ["window", "n_head", "position_embeddings", "variant"])
def test_a_field_of_another_family_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown configuration field '{field}'"):
        RWKV4Config.from_dict(tiny_config("rwkv4").to_dict() | {field: 1})


def test_an_option_of_another_family_is_refused_with_those_that_there_are() -> None:
    sentence = "window means nothing to rwkv4, whose options are d_model, n_layer, d_ff; leave it out."
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        config_of("rwkv4", {"vocab_size": 400, "window": 4}, {"d_model": 16, "n_layer": 2})


def test_an_unknown_family_is_refused_by_name() -> None:
    names: list[object] = [3, None, ["aft"], {"aft": 1}]
    for name in names:
        with pytest.raises(ConfigError, match=re.escape(f'"model_type" must be one of aft, rwkv4, not {name!r}.')):
            config_from_dict({"model_type": name})
    with pytest.raises(ConfigError, match='this is a "gpt2" model; only aft and rwkv4 can be run here'):
        config_from_dict({"model_type": "gpt2"})


def test_the_largest_model_has_a_form() -> None:
    """Without memory; sizes beyond those that are allowed would be beyond what PyTorch can count, too."""
    sizes = dict.fromkeys(["vocab_size", "d_model", "d_ff", "n_head", "window", "d_bias", "max_positions"], 2**28)
    for variant in ("conv", "local"):
        config = tiny_config(variant, tie_embeddings=False, position_embeddings=True, n_layer=1, **sizes)
        assert family_of(config).empty(config).num_parameters > 2**58


def test_what_version_0_2_called_a_variant_of_aft_is_its_family() -> None:
    fields = {"model_type": "aft", "variant": "rwkv4", "vocab_size": 400, "d_model": 16, "n_layer": 2, "d_ff": 32}
    old = {**fields, "n_head": 1, "window": 32, "d_bias": 32, "max_positions": 1024, "position_embeddings": False}
    assert config_from_dict(old) == tiny_config("rwkv4")
    with pytest.raises(ConfigError, match="position_embeddings must be false"):
        config_from_dict({**old, "position_embeddings": True})


def test_feed_forward_width_defaults_to_four_times_the_model() -> None:
    assert tiny_config(d_ff=None).to_dict()["d_ff"] == 64


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"variant": "simple"}, None),
        ({"variant": "conv"}, None),
        ({"variant": "local"}, 256),
        ({"variant": "full"}, 256),
        ({"variant": "conv", "position_embeddings": True}, 256),
    ],
)
def test_context_is_bounded_only_where_positions_are_learned(changes: dict[str, object], limit: int | None) -> None:
    assert tiny_config(**changes).context_limit == limit  # type: ignore[arg-type]
