"""Every YAML opens with what it is, composes, and builds what it names."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ehr_embed.config.check import check_config
from ehr_embed.config.instantiate import instantiate, instantiate_embedder
from ehr_embed.config.keys import RunKeys
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.models.members import over_members
from ehr_embed.models.protocol import FitsAtOnce, ReadsVocabulary
from tests.helpers.code_batches import vocabulary
from tests.helpers.configs import CONF, composed

YAMLS = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
# Options of conf/hydra/ are composed with the searches of docs/search.md.
OPTIONS = [(path.parent.name, path.stem) for path in YAMLS if len(path.parts) == 2]
MODELS = [option for group, option in OPTIONS if group == "model"]
PIPELINES = [option for group, option in OPTIONS if group == "pipeline"]
PREDICTS_CLASSES = r"model={} predicts classes.*Type: model=(\w+) for .*model=(\w+) for "


@pytest.mark.parametrize("path", YAMLS, ids=str)
def test_every_yaml_says_what_it_is_and_how_to_run_it(path: Path):
    lines = (CONF / path).read_text().splitlines()
    head = list(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert any(line.startswith("#   python ") for line in head), "the head comment names no command"
    assert len(head[0]) > 10


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    cfg = composed(f"{group}={option}", name="embed")  # which takes everything that train takes
    OmegaConf.resolve(cfg)


@pytest.mark.parametrize("option", MODELS)
def test_every_model_builds_and_runs(option):
    """A model predicts classes or says that it predicts numbers, and either predicts events too or names the models that do."""
    import torch

    cfg = composed(f"model={option}", "data=meds")
    mask = torch.ones(2, 5, dtype=torch.bool)
    inputs = {name: torch.rand(2, 5) for name in ("days", "gap_days", "elapsed_days")}
    inputs |= {"embeddings": torch.randn(2, 5, 24), "padding_mask": mask, "table": torch.randn(9, 24)}
    inputs |= {"token_ids": torch.randint(2, 7, (2, 5))}
    build = partial(instantiate, cfg.model, embedding_dim=24, has_values=False)
    classifier, refusal = built(build, num_classes=3)
    if classifier is None:
        assert "task=regression" in refusal
        classifier, _ = built(build, num_classes=1)
    if isinstance(classifier, ReadsVocabulary):
        classifier.set_vocabulary(vocabulary())
    if isinstance(classifier, FitsAtOnce):  # which need a fit: tests/models/test_baselines.py, test_cox.py
        assert isinstance(classifier, ReadsVocabulary)
    else:
        assert over_members(classifier(inputs)).shape == (2, 3)
    predictor, refusal = built(build, vocab_size=9)
    if predictor is None:
        named = re.search(PREDICTS_CLASSES.format(option), refusal)
        assert named, refusal
        assert option not in named.groups()
        assert set(named.groups()) <= set(MODELS)
    else:
        assert predictor(inputs).shape == (2, 5, 9)


def test_every_model_goes_with_every_pipeline():
    with initialize_config_dir(str(CONF), version_base="1.3"):  # one for all: it keeps the files that it has read
        for option in MODELS:
            alone = compose("train", overrides=[f"model={option}"]).model
            for pipeline in PIPELINES:
                cfg = compose("train", overrides=[f"pipeline={pipeline}", f"model={option}"])
                check_config(cfg, RunKeys)
                assert cfg.model._target_ == alone._target_
                assert set(cfg.model) == set(alone), "a pipeline gives a model no key that its own YAML lacks"


def test_a_pipeline_reaches_the_models_whose_files_take_its_setting_and_no_other():
    def whitened(*overrides: str) -> tuple[bool | str, float]:
        model = composed(*overrides).model
        return model.get("whiten"), model.shrinkage

    for option in ("encoder", "decoder", "gru", "mean_pool"):
        assert whitened("pipeline=embedded_based", f"model={option}") == ("lift", 1.0)
        assert whitened(f"model={option}") == (False, 0.1)
    assert whitened("pipeline=embedded_based", "model=code_tab") == (None, 0.1)
    assert whitened("pipeline=embedded_based", "model.whiten=false") == (False, 1.0)
    member = composed("pipeline=embedded_based", "+model@ensemble.members.own.model=gru").ensemble.members.own.model
    assert member.whiten == "lift"
    with pytest.raises(UserError, match=r"shrinkage.*event_vectors|event_vectors.*shrinkage"):
        check_config(composed("pipeline=embedded_based", "+event_vectors.shrink=1"), RunKeys)


def built(build, **sizes):
    """Return what is built, or None, and why it was refused."""
    try:
        return build(**sizes), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("group", "option"),
    [pair for pair in OPTIONS if pair[0] in ("calibration", "embedder", "export", "task", "trainer")],
)
def test_every_member_builds(group, option):
    needed = {
        "zero_shot": ["task.codes=[A]"],
        "query": ["task.codes=[A]"],
        "time_to_event": ["task.outcomes=auto"],
    }.get(option, [])
    build = instantiate_embedder if group == "embedder" else instantiate
    build(composed(f"{group}={option}", *needed, name="embed")[group])


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "embedder"])
def test_every_embedder_says_what_training_does_with_its_vectors(option):
    assert composed(f"embedder={option}").embedder.trainable == ("full" if option == "learned" else "frozen")


def test_the_demo_brings_its_small_model_unless_told_otherwise():
    assert composed().model.n_layers == 2
    assert composed("model=encoder").model.n_layers == 6
    assert composed("data=meds").model.n_layers == 6
    assert composed("data=meds").trainer.epochs == 50
    assert composed("data=demo", "trainer=default").trainer.epochs == 50
    assert composed().task.monitor == "auroc"
    assert composed("data=meds").task.monitor == "auroc"
    assert composed("data=meds", "task=multilabel").task.monitor == "auroc"
    assert composed("task=next_event").task.monitor == "perplexity"


def test_defaults_are_those_of_the_original():
    cfg = composed("data=meds")
    model, trainer = cfg.model, cfg.trainer
    assert (model.model_dim, model.n_heads, model.n_layers, model.dropout, model.max_length) == (256, 8, 6, 0.1, 512)
    assert (trainer.batch_size, trainer.epochs, trainer.learning_rate, trainer.weight_decay) == (32, 50, 1e-4, 0.01)
    assert (trainer.patience, trainer.schedule.patience, trainer.schedule.factor) == (10, 3, 0.5)
    assert (trainer.min_learning_rate, trainer.save_every) == (1e-6, 10)


def test_targets_outside_the_trusted_packages_are_refused():
    with pytest.raises(UserError, match=r"_target_=os\.system .*class of ehr_embed"):
        instantiate(OmegaConf.create({"_target_": "os.system", "command": "true"}))
    nested = OmegaConf.create({"_target_": "torch.nn.Identity", "inner": [{"_target_": "subprocess.run"}]})
    with pytest.raises(UserError, match=r"subprocess\.run"):
        instantiate(nested)
    assert instantiate(OmegaConf.create({"_target_": "fractions.Fraction", "numerator": 3}), trusted=["fractions"]) == 3


def test_unknown_keys_of_a_target_are_refused():
    with pytest.raises(UserError, match=r"Encoder 'n_head': did you mean 'n_heads'"):
        instantiate(OmegaConf.create({"_target_": "ehr_embed.models.encoder.Encoder", "n_head": 2}))


STRANGE = """
from ehr_embed.api import Count, OneOf, checked
from typing import Annotated
from torch import nn


class Strange(nn.Module):
    @checked("model")
    def __init__(
        self, *, embedding_dim: int, max_length: int, width: Count = 1, kind: Annotated[str, OneOf("a", "b")] = "a"
    ) -> None:
        super().__init__()
"""


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("width", 0, r"model\.width=0: expected 1 or more"),
        ("kind", "c", r"model\.kind 'c': Valid: a, b"),
        ("widht", 3, "model 'widht': did you mean 'width'"),
    ],
)
def test_the_settings_of_a_member_of_ones_own_are_checked_before_work(tmp_path, monkeypatch, key, value, told):
    (tmp_path / "strange.py").write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = composed("data=meds", "data.root=nowhere", "trusted_packages=[strange]")
    node = {"_target_": "strange.Strange", "max_length": 8}
    OmegaConf.update(cfg, "model", node, merge=False)
    check_config(cfg, RunKeys)
    OmegaConf.update(cfg, "model", node | {key: value}, merge=False)
    with pytest.raises(UserError, match=told):  # and not that data.root is nowhere
        run(cfg)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.n_layers=0", r"model\.n_layers=0: expected 1 to 1024"),
        ("trainer.keep=bset", r"trainer\.keep 'bset': did you mean 'best'"),
        ("embedder.trainable=yes", r"embedder\.trainable"),
        ("+pretrain.trainer={_target_:ehr_embed.trainer.TrainerSettings,epochs:-1}", r"pretrain\.trainer\.epochs=-1"),
        ("data.n_subjects=50", r"data\.n_subjects=50: expected 100 to"),
        ("task.fraction_seed=-1", r"task\.fraction_seed=-1"),
        ("tracker.mode=x", r"tracker\.mode 'x'.*Type: tracker\.mode=auto"),
    ],
)
def test_settings_are_refused_before_work(tmp_path, monkeypatch, override, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        run(composed("cache_dir=cache", "run_dir=run", "tracker=wandb", override))
    assert list(tmp_path.iterdir()) == []
