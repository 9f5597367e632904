"""Optimizers and schedules: any class of torch or of one's own by one YAML, older keys alike, warm-up that fits the data."""

from __future__ import annotations

import math
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR

from ehr_embed.config.instantiate import instantiate
from ehr_embed.core import moved
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.provenance import group_choices
from ehr_embed.run_folder.checkpoints import Continuation, read_checkpoint
from ehr_embed.run_folder.resume import differences
from ehr_embed.training.optimizer import build_optimizer, check_optimizer, kind_of, options_of
from ehr_embed.training.protocol import Course, FollowsMetric, Schedule, warmup_steps_of
from ehr_embed.training.schedules import BY_NAME, Constant, Cosine, Linear, Plateau, start
from ehr_embed.training.settings import TrainerSettings
from tests.helpers.configs import CONF, composed
from tests.helpers.planted import planted, train

__all__ = ["planted"]  # the fixture
SCHEDULES = sorted(path.stem for path in (CONF / "trainer" / "schedule").glob("*.yaml"))
OPTIMIZERS = sorted(path.stem for path in (CONF / "trainer" / "optimizer").glob("*.yaml"))
N_STEPS, N_WARMUP = 40, 10


def settings_of(*overrides: str) -> TrainerSettings:
    settings = instantiate(composed("data=meds", *overrides).trainer)
    assert isinstance(settings, TrainerSettings)
    return settings


def rates(schedule: Schedule, *, peaks: tuple[float, ...] = (1.0,), least: float = 0.1) -> list[list[float]]:
    """The rate of each group at each step."""
    course = Course(total_steps=N_STEPS, warmup_steps=N_WARMUP, min_learning_rate=least, is_higher_better=True)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups)
    scheduler, _, _ = start(schedule, optimizer, course)
    found = []
    for _ in range(N_STEPS):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [list(of_group) for of_group in zip(*found, strict=True)]


@pytest.mark.parametrize("option", SCHEDULES)
def test_every_schedule_rises_to_its_peak_and_stays_within_its_bounds(option):
    schedule = settings_of(f"trainer/schedule={option}").schedule
    assert isinstance(schedule, Schedule)
    assert isinstance(schedule, FollowsMetric) == (option == "plateau")
    of_head, of_input = rates(schedule, peaks=(1.0, 0.5))
    assert of_head[:N_WARMUP] == pytest.approx([(1 + step) / (N_WARMUP + 1) for step in range(N_WARMUP)])
    assert of_head[N_WARMUP] == pytest.approx(1.0)
    assert of_input[N_WARMUP] == pytest.approx(0.5)
    assert 0.1 <= min(of_head[N_WARMUP:]) <= max(of_head) <= 1.0 + 1e-9


def test_the_line_ends_at_the_least_rate_whatever_the_peak():
    of_head, of_input, below = rates(Linear(decay_share=0.5), peaks=(1.0, 0.5, 0.05))
    n_left = N_STEPS - N_WARMUP
    assert of_head[N_WARMUP : N_WARMUP + n_left // 2] == pytest.approx([1.0] * (n_left // 2))
    fall = [1 - 0.9 * step / (n_left / 2) for step in range(n_left // 2)]
    assert of_head[-(n_left // 2) :] == pytest.approx(fall)
    assert of_input[-1] == pytest.approx(0.1 + 0.4 / (n_left / 2))
    assert below[N_WARMUP:] == pytest.approx([0.05] * n_left), "a peak below the least rate stays where it is"


def test_the_rates_are_those_of_the_version_before():
    """Build the schedule as training/optimizer.py did before schedules were members."""

    def before(optimizer: Any, name: str) -> Any:
        warmup = LinearLR(optimizer, start_factor=1 / (N_WARMUP + 1), total_iters=N_WARMUP)
        if name == "constant":
            return warmup
        after = CosineAnnealingLR(optimizer, T_max=max(1, N_STEPS - N_WARMUP), eta_min=0.1)
        return SequentialLR(optimizer, [warmup, after], milestones=[N_WARMUP])

    for name, schedule in (("constant", Constant()), ("cosine", Cosine())):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, expected = before(optimizer, name), []
        for _ in range(N_STEPS):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates(schedule) == [expected], "to the last bit"


def test_plateau_lowers_the_rate_by_its_options():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    course = Course(total_steps=9, warmup_steps=0, min_learning_rate=0.2, is_higher_better=False)
    _, _, plateau = start(Plateau(patience=1, factor=0.3), optimizer, course)
    assert isinstance(plateau, ReduceLROnPlateau)
    found = []
    for loss in (1.0, 2.0, 2.0, 2.0, 2.0):
        plateau.step(loss)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1.0, 1.0, 0.3, 0.3, 0.2])


def test_warm_up_fits_the_data(planted, tmp_path, caplog):
    """60 samples in batches of 8 make 8 steps per epoch, so the preset's warm-up would outlast the training."""
    for asked, rate in ((100, 1e-2), (0.25, 1e-2), (15, 1e-2 * 16 / 16)):
        caplog.clear()
        facts, rows, *_ = train(
            planted, tmp_path / str(asked), epochs=2, warmup_steps=asked, schedule=Constant(), patience=None
        )
        assert facts["steps"] == 16
        assert rows[-1]["train/learning_rate"] == pytest.approx(rate, rel=0.05)
        assert ("trainer.warmup_steps=100" in caplog.text) == (asked == 100)
    assert warmup_steps_of(15, 16) == 15
    with pytest.raises(UserError, match=r"trainer\.warmup_steps=2\.5: .*whole number.*share"):
        TrainerSettings(warmup_steps=2.5)


def test_older_keys_mean_what_they_meant():
    for name, kind in BY_NAME.items():
        by_name, by_option = settings_of(f"trainer.schedule={name}"), settings_of(f"trainer/schedule={name}")
        assert by_name.schedule == by_option.schedule == kind()
        target = moved.renamed({"_target_": moved.TRAINER_SETTINGS, "schedule": name})["schedule"]["_target_"]
        assert target == f"{kind.__module__}.{kind.__qualname__}"
    patient = settings_of("trainer.schedule=plateau", "trainer.scheduler_patience=7")
    assert patient.schedule == settings_of("trainer.schedule.patience=7").schedule == Plateau(patience=7)
    assert settings_of("trainer.schedule=cosine", "trainer.scheduler_patience=7").schedule == Cosine()
    for typed in ("trainer.betas=[0.8,0.9]", "trainer.optimizer.betas=[0.8,0.9]"):
        assert options_of(settings_of(typed).optimizer) == {"betas": (0.8, 0.9)}
    optimizer = build_optimizer(settings_of().optimizer, [{"params": [nn.Parameter(torch.zeros(1))]}])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults | {"betas": (0.9, 0.999), "fused": True} == optimizer.defaults


@pytest.mark.parametrize(
    ("typed", "before"),
    [
        (("trainer.schedule=cosine",), {"schedule": "cosine"}),
        (("trainer/schedule=cosine",), {"schedule": "cosine", "scheduler_patience": 3}),
        ((), {"schedule": "plateau", "scheduler_patience": 3}),
        (("trainer.schedule.patience=5",), {"schedule": "plateau", "scheduler_patience": 5}),
        (("trainer.scheduler_patience=5",), {"schedule": "plateau", "scheduler_patience": 5}),
        (("trainer.optimizer.betas=[0.9,0.99]",), {"betas": [0.9, 0.99], "schedule": "plateau"}),
    ],
)
def test_a_configuration_of_an_earlier_version_is_the_same_settings(typed, before):
    here: Any = OmegaConf.to_container(composed("data=meds", *typed), resolve=True)
    there = {**here, "trainer": {**here["trainer"], **before}}
    del there["trainer"]["optimizer"]
    if "betas" not in before:
        del there["trainer"]["betas"]
    assert differences(there, here) == []
    assert differences(moved.renamed(there), moved.renamed(here)) == []
    built, again = (
        instantiate(OmegaConf.create(config)) for config in (there["trainer"], moved.renamed(there)["trainer"])
    )
    assert built.schedule == again.schedule == instantiate(composed("data=meds", *typed).trainer).schedule
    assert options_of(built.optimizer) | {"betas": (0.9, 0.99)} == options_of(again.optimizer) | {"betas": (0.9, 0.99)}


def test_tags_say_what_was_chosen_and_a_typed_option_is_not_lost_to_a_yaml(monkeypatch):
    def tags(*typed: str, schedule: str | None = None) -> list[str]:
        choices = {"model": "gru", "trainer": "default", "trainer/schedule": "linear", "hydra/sweeper": "basic"}
        told = {"runtime": {"choices": choices}, "overrides": {"task": list(typed)}}
        monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
        monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: OmegaConf.create(told)))
        return group_choices(OmegaConf.create({"trainer": {"schedule": schedule or {"_target_": "x.Y"}}}))

    assert tags("trainer/schedule=linear") == ["model=gru", "trainer=default", "trainer/schedule=linear"]
    assert tags("trainer.schedule=cosine", schedule="cosine")[-1] == "trainer/schedule=cosine"
    assert tags(schedule="cosine")[-1] == "trainer/schedule=cosine", "of an experiment's YAML"
    with pytest.raises(
        UserError,
        match=r"trainer/schedule=linear was typed, .*trainer\.schedule=cosine.*- override /trainer/schedule: cosine",
    ):
        tags("trainer/schedule=linear", schedule="cosine")


def test_another_schedule_or_optimizer_is_another_setting_and_the_message_says_how_to_go_on():
    def config(*typed: str) -> Any:
        return OmegaConf.to_container(composed("data=meds", *typed), resolve=True)

    changed = differences(config(), config("trainer/schedule=cosine"))
    assert changed == [
        "trainer.schedule._target_ was ehr_embed.training.schedules.Plateau, now ehr_embed.training.schedules.Cosine"
    ]
    assert any("torch.optim.SGD" in text for text in differences(config(), config("trainer/optimizer=sgd")))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("trainer.schedule=linear",), r"unknown trainer\.schedule 'linear'.*trainer/schedule=linear"),
        (("trainer.schedule=null",), r"trainer\.schedule=None: expected .*Type: trainer/schedule=cosine"),
        (("trainer.schedule.patience=-1",), r"trainer\.schedule\.patience=-1: expected 0 or more"),
        (("trainer.schedule.patience=many",), r"trainer\.schedule\.patience=many: expected .*got the text 'many'"),
        (("trainer.schedule.factor=2",), r"trainer\.schedule\.factor=2"),
        (("trainer/schedule=linear", "trainer.schedule.decay_share=0"), r"trainer\.schedule\.decay_share=0"),
        (("trainer.optimizer=adam",), r"trainer\.optimizer=adam: .*Type: trainer/optimizer=adamw"),
        (("trainer.optimizer.betas=[0.9]",), r"trainer\.optimizer: AdamW\(betas=\[0\.9\]\) cannot be built"),
        (("trainer.betas=[0.9,1.5]",), r"trainer\.betas=\[0\.9, 1\.5\]"),
        (("+trainer.optimizer.lr=0.1",), r"trainer\.optimizer\.lr=0\.1.*Type: trainer\.learning_rate=RATE"),
        (("+trainer.optimizer.weight_decay=0.1",), r"trainer\.optimizer\.weight_decay=0\.1: .*Type: trainer\.weight_decay=DECAY"),
        (("+trainer.optimizer.momentun=0.1",), r"unknown key of trainer\.optimizer 'momentun"),
        (("~trainer.optimizer.betas", "trainer.optimizer._target_=torch.optim.Rprop"), r"trainer\.weight_decay=0\.01: Rprop"),
        (("trainer.optimizer._target_=ehr_embed.training.schedules.Cosine",), r"unknown key of trainer\.optimizer 'betas'"),
        (("trainer.schedule._target_=torch.nn.Identity",), r"trainer\.schedule=Identity\(\): expected .*after_warmup"),
        (("trainer.optimizer._target_=subprocess.Popen",), r"_target_=subprocess\.Popen is outside the trusted packages"),
        (("trainer.schedule._target_=os.system",), r"_target_=os\.system is outside the trusted packages"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_a_second(typed, message):
    with pytest.raises(UserError, match=f"^(?:{message})"):
        settings_of(*typed)


def test_whatever_an_optimizers_constructor_raises_is_refused():
    """A YAML file may hold a mapping where torch expects two numbers, and torch then raises KeyError."""
    with pytest.raises(UserError, match=r"AdamW\(betas=\{\}\) cannot be built .*KeyError"):
        check_optimizer(partial(torch.optim.AdamW, betas={}), weight_decay=0.0)


@pytest.mark.parametrize("option", OPTIMIZERS)
def test_every_optimizer_learns(planted, tmp_path, option):
    make = settings_of(f"trainer/optimizer={option}").optimizer
    rate = 0.3 if option == "sgd" else 1e-2
    _, _, trainer, model, embedding = train(planted, tmp_path / "run", optimizer=make, learning_rate=rate)
    held_out = trainer.task.evaluate("held_out", trainer.predict(model, embedding, "held_out"), n_bootstrap=0)
    assert held_out["auroc"]["value"] > 0.95
    state = read_checkpoint(tmp_path / "run")[1]["optimizer_state_dict"]
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0, 0.01}
    assert kind_of(make).__module__.startswith("torch.optim")


@pytest.mark.parametrize("schedule", [Linear(decay_share=0.6), Plateau(patience=0, factor=0.7)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(planted, tmp_path, schedule):
    options = {"schedule": schedule, "optimizer": torch.optim.SGD, "epochs": 4, "save_every": 1, "warmup_steps": 0.2}
    whole = train(planted, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "best_checkpoint.pt").unlink()
    shutil.copy(tmp_path / "part" / "checkpoint_epoch_2.pt", tmp_path / "part" / "latest_checkpoint.pt")
    path, checkpoint = read_checkpoint(tmp_path / "whole" / "checkpoint_epoch_2.pt")
    rest = train(planted, tmp_path / "part", run=Continuation(path, checkpoint), **options)
    for p, q in zip(whole[3].parameters(), rest[3].parameters(), strict=True):
        assert torch.equal(p, q)
    assert [row["train/learning_rate"] for row in whole[1]] == [row["train/learning_rate"] for row in rest[1]]
    assert math.isfinite(rest[1][-1]["train/loss"])


def test_the_state_of_another_optimizer_is_refused(planted, tmp_path):
    train(planted, tmp_path / "run", epochs=1)
    path, checkpoint = read_checkpoint(tmp_path / "run")
    checkpoint["config"] = {"trainer": {"optimizer": {"_target_": "torch.optim.SGD"}}}
    with pytest.raises(
        UserError, match=r"state of torch\.optim\.SGD, from which torch\.optim\.AdamW.*resume=overwrite"
    ):
        train(planted, tmp_path / "other", run=Continuation(path, checkpoint, is_changed=True), epochs=2)
