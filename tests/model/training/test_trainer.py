from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from model import Tokenizer
from model.errors import CheckpointError, ConfigError, TrainingError
from model.training.config import TrainingConfig
from model.training.data import PackedBatches, Source, encode_documents
from model.training.trainer import STATE_FILE, Record, Trainer, parameter_groups, stored_step
from tests.conftest import STORIES, new_model, tiny_config

CONFIG = TrainingConfig(
    data=(Source(Path("unused.txt")),),
    steps=12,
    batch_size=4,
    context=16,
    learning_rate=1e-2,
    warmup_steps=2,
    evaluate_every=4,
    checkpoint_every=5,
)


def trainer(tokenizer: Tokenizer, folder: Path, config: TrainingConfig = CONFIG) -> Trainer:
    torch.manual_seed(config.seed)
    stream = encode_documents(STORIES * 4, tokenizer)
    batches = PackedBatches([(stream, 1.0)], batch_size=config.batch_size, context=config.context, seed=config.seed)
    return Trainer(new_model(tiny_config()), batches, config, folder)


class StoppedError(Exception):
    pass


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Same losses and same weights, bit for bit, although it was stopped between two checkpoints."""
    whole = trainer(tokenizer, tmp_path / "whole")
    whole.run(validate=lambda: 1.0)

    interrupted = trainer(tokenizer, tmp_path / "parts")

    def stop_at_8(record: object) -> None:
        if interrupted.step == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        interrupted.run(validate=lambda: 1.0, report=stop_at_8)
    resumed = trainer(tokenizer, tmp_path / "parts")
    resumed.resume()
    assert resumed.step == 5
    resumed.run(validate=lambda: 1.0)
    assert resumed.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_run_that_is_asked_to_stop_ends_after_a_step_and_loses_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole, stopped = trainer(tokenizer, tmp_path / "whole"), trainer(tokenizer, tmp_path / "parts")
    whole.run()
    saved: list[int] = []
    stopped.run(on_save=lambda: saved.append(stopped.step), should_stop=lambda: stopped.step == 7)
    assert saved == [5, 7]
    assert stored_step(tmp_path / "parts") == 7
    resumed = trainer(tokenizer, tmp_path / "parts")
    resumed.resume()
    resumed.run(on_save=lambda: saved.append(resumed.step))
    assert saved == [5, 7, 10, 12]
    assert resumed.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_slow_steps_are_saved_more_often(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.training.trainer.SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    saved: list[int] = []
    run = trainer(tokenizer, tmp_path, dataclasses.replace(CONFIG, steps=3))
    run.run(on_save=lambda: saved.append(run.step))
    assert saved == [1, 2, 3]


def test_a_run_that_diverges_ends_and_keeps_what_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = trainer(
        tokenizer, tmp_path, dataclasses.replace(CONFIG, learning_rate=1e3, warmup_steps=0, checkpoint_every=1)
    )
    with pytest.raises(TrainingError, match=r"^The loss of step \d+ is (nan|inf): a lower learning_rate"):
        run.run()
    assert stored_step(tmp_path) == run.step


def test_no_state_is_no_step(tmp_path: Path) -> None:
    assert stored_step(tmp_path) is None
    (tmp_path / STATE_FILE).write_bytes(b"garbage")
    assert stored_step(tmp_path) is None


def test_a_run_of_a_version_with_more_fields_can_go_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = trainer(tokenizer, tmp_path)
    identity = run._identity()
    with mock.patch.object(Trainer, "_identity", return_value={**identity, "without_effect": 16}):
        run.save()
    trainer(tokenizer, tmp_path).resume()


def test_it_learns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = trainer(tokenizer, tmp_path, dataclasses.replace(CONFIG, steps=150, checkpoint_every=1000))
    run.run()
    assert run.history[0].loss == pytest.approx(math.log(400), abs=0.2)
    assert run.history[-1].loss < 2.0


def test_history_has_what_a_step_reports(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = trainer(tokenizer, tmp_path)
    seen: list[Record] = []
    run.run(validate=lambda: 2.5, report=seen.append)
    assert seen == run.history
    assert [record.step for record in seen] == list(range(1, 13))
    assert [record.step for record in seen if record.validation == 2.5] == [4, 8, 12]
    assert seen[-1].tokens == 12 * 4 * 16
    assert (tmp_path / STATE_FILE).is_file()


def test_resume_refuses_another_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trainer(tokenizer, tmp_path).save()
    other = trainer(tokenizer, tmp_path, dataclasses.replace(CONFIG, learning_rate=0.5))
    with pytest.raises(CheckpointError, match=r"was written with learning_rate = 0\.01, not 0\.5"):
        other.resume()
    with pytest.raises(CheckpointError, match=r"no training_state\.safetensors in .*nowhere to resume from"):
        trainer(tokenizer, tmp_path / "nowhere").resume()


def test_resume_refuses_other_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = trainer(tokenizer, tmp_path)
    run.save()
    run.batches.streams[0][0][5] += 1
    with pytest.raises(CheckpointError, match="was written with tokens = "):
        run.resume()


def test_a_batch_must_divide_among_the_processes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (
        mock.patch("model.training.trainer.process_count", return_value=3),
        pytest.raises(ConfigError, match="batch_size must be a multiple of the 3 processes, not 4"),
    ):
        trainer(tokenizer, tmp_path)


def test_gradients_are_clipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = trainer(tokenizer, tmp_path, dataclasses.replace(CONFIG, steps=1, gradient_clip=1e-3))
    run.run()
    norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    config = dataclasses.replace(CONFIG, steps=101, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [config.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55, abs=0.02)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_only_matrices_decay() -> None:
    model = new_model(tiny_config())
    decayed, free = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.1))
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert names["blocks.0.attention.qkv.weight"] in decayed
    for name in ("blocks.0.attention.bias.weight", "blocks.0.attention.bias.gamma", "norm.weight", "norm.bias"):
        assert names[name] in free
    assert decayed | free == set(names.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 2**31),
        ("context", 10**400),
        ("warmup_steps", 10**400),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", 1e38),
        ("final_learning_rate", 1e38),
        ("warmup_steps", -1),
        ("weight_decay", math.nan),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be "):
        dataclasses.replace(CONFIG, **{field: value})  # type: ignore[arg-type]
