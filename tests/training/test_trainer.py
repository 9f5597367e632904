"""The loop: repeatable from a seed set first, the best checkpoint kept, accumulation exact, sins caught."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.blocks import Dropout
from ehr_embed.models.encoder import Encoder
from ehr_embed.training.precision import choose_precision
from ehr_embed.training.set_up import compile_blocks
from ehr_embed.training.settings import TrainerSettings
from tests.helpers.planted import (
    planted,  # noqa: F401 (fixtures)
    train,
    without_times,
)
from tests.helpers.refusals import refused


def test_a_planted_signal_is_learned(planted, tmp_path):
    facts, rows, trainer, model, embedding = train(planted, tmp_path / "run")
    held_out = trainer.task.evaluate("held_out", trainer.predict(model, embedding, "held_out"), n_bootstrap=0)
    assert held_out["auroc"]["value"] > 0.95
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert facts["events_per_s"] > 0
    assert 0 <= facts["padding_share"] < 1
    n_events = facts["epochs"] * int(trainer.task.samples["train"].lengths.sum())
    assert facts["events_per_s"] * facts["seconds"] == pytest.approx(n_events)
    assert facts["tokens_per_s"] * (1 - facts["padding_share"]) == pytest.approx(facts["events_per_s"])
    assert facts["mfu"] > 0
    assert {"train/tokens_per_s", "train/padding_share", "train/mfu", "train/peak_memory_mib"} <= set(rows[0])


def test_a_seed_set_before_the_model_is_built_repeats_the_run(planted, tmp_path):
    first = train(planted, tmp_path / "a", epochs=2)[1]
    again = train(planted, tmp_path / "b", epochs=2)[1]
    other = train(planted, tmp_path / "c", epochs=2, seed=1)[1]
    assert without_times(first) == without_times(again)
    assert without_times(first) != without_times(other)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(planted, tmp_path, monkeypatch):
    """Traced, with gradients, for batches of any length; the compiler proper, which takes minutes, is torch's to test."""
    compiled: list[nn.Module] = []

    def with_quick_backend(block: nn.Module, **options: Any) -> None:
        compiled.append(block)
        compile_block(block, backend="aot_eager", **options)

    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", with_quick_backend)
    plain = train(planted, tmp_path / "plain", epochs=2, dropout=0.0)[1]
    assert not compiled
    fast = train(planted, tmp_path / "fast", epochs=2, dropout=0.0, compile=True)[1]
    assert len(compiled) == 1
    for there, here in zip(without_times(plain), without_times(fast), strict=True):
        assert here == pytest.approx(there, rel=1e-4)


def test_a_model_without_blocks_is_not_compiled():
    with refused("Linear", "trainer.compile=false"):
        compile_blocks(nn.Linear(2, 2))


def test_the_best_checkpoint_is_the_one_evaluated(planted, tmp_path):
    facts, rows, trainer, model, embedding = train(
        planted, tmp_path / "run", learning_rate=0.05, epochs=5, save_every=2
    )
    values = [row["tuning/auroc"] for row in rows]
    assert facts["best_epoch"] == 1 + int(np.argmax(values))
    tuning = trainer.task.evaluate("tuning", trainer.predict(model, embedding, "tuning"), n_bootstrap=0)
    assert tuning["auroc"]["value"] == pytest.approx(max(values))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"best_checkpoint.pt", "latest_checkpoint.pt", "checkpoint_epoch_2.pt", "checkpoint_epoch_4.pt"} == names
    checkpoint = torch.load(tmp_path / "run" / "best_checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == facts["best_epoch"]
    assert checkpoint["config"] == {"seed": 0}
    assert set(checkpoint) >= {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "rng_state"}


def test_mixed_precision_rounds_no_time_and_no_value(planted, tmp_path, monkeypatch):
    seen = []
    forward = Encoder.forward

    def spy(model, inputs):
        seen.append({name: x.dtype for name, x in inputs.items() if x.is_floating_point()})
        return forward(model, inputs)

    monkeypatch.setattr(Encoder, "forward", spy)
    _, rows, trainer, model, embedding = train(planted, tmp_path / "run", epochs=2, precision="bf16-mixed")
    assert {"days", "gap_days", "elapsed_days", "rows"} <= set(seen[0])
    assert {dtype for inputs in seen for dtype in inputs.values()} == {torch.float32}
    tuning = trainer.task.evaluate("tuning", trainer.predict(model, embedding, "tuning"), n_bootstrap=0)
    best = max(row["tuning/auroc"] for row in rows)
    assert tuning["auroc"]["value"] == pytest.approx(best, abs=1e-3), "evaluation repeats what training saw"


def test_training_stops_when_nothing_improves(planted, tmp_path):
    facts, *_ = train(planted, tmp_path / "run", learning_rate=0.0, min_learning_rate=0.0, epochs=20, patience=3)
    assert facts["epochs"] == 4
    assert facts["best_epoch"] == 1


def test_a_small_train_split_is_read_until_there_are_enough_steps(planted, tmp_path):
    facts, rows, *_ = train(planted, tmp_path / "run", epochs=2, batch_size=20, min_steps=8, schedule="cosine", warmup_steps=2,
                            min_learning_rate=0.0)  # fmt: skip
    assert (facts["epochs"], facts["steps"]) == (3, 9), "three steps per epoch"
    rates = [row["train/learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] > 1e-3 > rates[2], "the schedule ends with the last of them"
    facts, *_ = train(planted, tmp_path / "enough", epochs=2, batch_size=20, min_steps=6)
    assert facts["epochs"] == 2


@pytest.mark.parametrize("schedule", ["plateau", "cosine", "constant"])
def test_warm_up_and_schedules(planted, tmp_path, schedule):
    _, rows, *_ = train(planted, tmp_path / "run", schedule=schedule, warmup_steps=10, min_learning_rate=1e-4)
    rates = [row["train/learning_rate"] for row in rows]
    assert rates[0] == pytest.approx(1e-2 * (1 + 8) / 11)  # eight of ten warm-up steps
    assert max(rates) <= 1e-2 + 1e-9
    if schedule == "cosine":
        assert rates[-1] == pytest.approx(1e-4, rel=0.05)
    if schedule == "constant":
        assert rates[-1] == pytest.approx(1e-2)


def test_accumulated_batches_give_the_mean_gradient(planted, tmp_path):
    whole = train(planted, tmp_path / "a", epochs=1, dropout=0, batch_size=60, accumulate=1)[3]
    parts = train(planted, tmp_path / "b", epochs=1, dropout=0, batch_size=20, accumulate=3)[3]
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-3)
    steps = [train(planted, tmp_path / f"s{n}", epochs=1, batch_size=20, accumulate=n)[1][0]["step"] for n in (1, 2, 3)]
    assert steps == [3, 2, 1]


def test_a_constant_table_leaves_the_model_at_chance(planted, tmp_path):
    """The signal is in the vectors alone: an embedder that contributes nothing is seen in the metrics."""
    store, _ = planted
    _, _, trainer, model, _ = train(planted, tmp_path / "run")
    constant = EventEmbedding(torch.ones(len(store.vocabulary), 12))
    blind = trainer.task.evaluate("held_out", trainer.predict(model, constant, "held_out"), n_bootstrap=0)
    assert abs(blind["auroc"]["value"] - 0.5) < 0.15


def test_a_diverging_loss_is_refused(planted, tmp_path):
    with pytest.raises(UserError, match=r"epoch \d+.*Type: resume=overwrite trainer\.learning_rate=LOWER"):
        train(planted, tmp_path / "run", learning_rate=1e30, clip_norm=0, epochs=10, warmup_steps=0)


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"unknown trainer\.schedule 'cosin': did you mean 'cosine'"):
        TrainerSettings(schedule="cosin")
    with pytest.raises(UserError, match=r"trainer\.epochs=-1"):
        TrainerSettings(epochs=-1)
    with pytest.raises(UserError, match=r"trainer\.warmup_steps=-1"):
        TrainerSettings(warmup_steps=-1)
    with pytest.raises(UserError, match=r"unknown trainer\.precision 'bf16'"):
        TrainerSettings(precision="bf16")
    assert choose_precision("32-true", "cpu") == "32-true"
    assert choose_precision("auto", "cpu") in ("bf16-mixed", "32-true")


def test_dropout_has_one_probability_on_every_device(monkeypatch):
    asked = []
    monkeypatch.setattr("ehr_embed.models.blocks.F.dropout", lambda x, p: asked.append(p) or x)
    Dropout(0.1)(torch.ones(4, device="meta"))
    assert asked == [26 / 256]


def test_dropout_keeps_the_mean_and_its_share():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(1000, 100)
    y = dropout(x)
    assert (y == 0).float().mean().item() == pytest.approx(26 / 256, abs=0.005)
    assert y.mean().item() == pytest.approx(1.0, abs=0.005)
    assert math.isclose(y.max().item(), 256 / 230, rel_tol=1e-6)
    assert torch.equal(dropout.eval()(x), x)
    with pytest.raises(UserError, match=r"model\.dropout=1"):
        Dropout(1.0)
