"""Configs of the original become command lines and YAML that compose here; the table in docs/migration.md is the code's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.experiment.inputs import embed
from ehr_embed.experiment.run import run
from ehr_embed.migrate import KEYS, STAGES, main, migrate
from ehr_embed.sources.protocol import SPLITS
from tests.helpers.configs import CONF, composed
from tests.helpers.corpora import record, write_corpus
from tests.helpers.small_meds import ROOT

CREATE = {
    "name": "embed",
    "model": {"model_name": "sentence-transformers/all-mpnet-base-v2", "device": "cpu", "embedding_dim": 768},
    "data": {
        "data_dir": "/data/to kens/",
        "vocab_filepath": "/data/vocab.csv",
        "labels_filepath": "/data/labels.csv",
        "medical_lookup_filepath": "/data/medical.csv",
        "lab_lookup_filepath": "/data/it's a lab, isn't it.csv",
        "cutoff_months": 6,
        "vocab_embedding_path": "/data/vocab.pt",
        "embedding_output_dir": "/data/files",
    },
}
ENCODER = {
    "model": {"type": "transformer_encoder_embedded", "embedding_dim": 768, "model_dim": 64, "n_heads": 4, "n_layers": 2,
              "dropout": 0.2, "context_length": 2048, "num_classes": 2, "pooling": "max"},
    "training": {"batch_size": 16, "eval_batch_size": 32, "epochs": 30, "learning_rate": 5e-5, "weight_decay": 0.02,
                 "num_workers": 4, "scheduler_patience": 2, "early_stopping_patience": 7, "output_dir": "./out",
                 "class_weights": [0.5, 1.5], "pretrained_checkpoint": None},
    "data": {"embedding_output_dir": "/data/files", "cutoff_months": 12},
    "wandb": {"project": "mine", "enabled": True},
}  # fmt: skip
PRETRAIN = {
    "model": {"type": "transformer_decoder_embedded", "max_length": 512, "vocab_size": 5000},
    "training": {"task": "autoregressive", "min_learning_rate": 1e-6, "save_every": 10, "output_dir": "pre"},
    "data": {"embedding_output_dir": "/data/files"},
}
DECODER = {
    "model": {"type": "transformer_decoder_embedded", "num_classes": 2, "add_classification_head": True},
    "training": {"task": "classification", "pretrained_checkpoint": "pre/best_checkpoint.pt"},
    "data": {"embedding_output_dir": "/data/files"},
}
CONFIGS = {"create": CREATE, "pretrain": PRETRAIN, "encoder": ENCODER, "decoder": DECODER}


def written(tmp_path: Path, config: Any) -> str:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_recognised_and_no_key_is_lost(stage):
    new = migrate(CONFIGS[stage])
    assert new.stage == stage
    assert new.unknown == []


def test_pretraining_and_the_decoder_become_their_tasks():
    pretrain, decoder = migrate(PRETRAIN), migrate(DECODER)
    assert pretrain.command[:3] == ["data=patient_files", "model=decoder", "task=next_event"]
    assert {"trainer.schedule=cosine", "trainer.min_learning_rate=1e-06", "run_dir=pre"} < set(pretrain.command)
    assert {"model.times=[]", "model.vocabulary_head=linear", "task.time_weight=0"} < set(pretrain.command)
    assert "trainer.patience=50" in pretrain.command
    assert {"model.times=[]", "model.pooling=mean"} < set(decoder.command)
    assert decoder.command[:3] == ["data=patient_files", "model=decoder", "task=classification"]
    assert "init_from=pre/best_checkpoint.pt" in decoder.command
    assert "task.monitor=f1" in decoder.command
    assert "task.monitor=f1" in migrate(ENCODER).command
    assert not any("monitor" in word for word in pretrain.command)


@pytest.mark.parametrize("stage", STAGES)
def test_command_and_yaml_compose_to_the_same(stage, tmp_path, capsys):
    assert main([written(tmp_path, CONFIGS[stage])]) == 0
    output = capsys.readouterr().out
    command = shlex.split(next(line for line in output.splitlines() if line.startswith("#   python ")))[2:]
    program, overrides = command[0].removesuffix(".py"), command[1:]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "old.yaml").write_text(output)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        search = f"hydra.searchpath=[file://{tmp_path}]"
        from_yaml = compose(program, overrides=[search, "experiment=old"])
    assert OmegaConf.to_container(composed(*overrides, name=program)) == OmegaConf.to_container(from_yaml)


def test_the_four_configs_run_one_after_the_other(tmp_path):
    """From pickled token lists to files, to a pretrained decoder, to classifiers; and all of it as one command."""
    place, events = tmp_path / "place", [("MEDICAL//asthma", 0.0), ("LAB//CRP", 1.0), ("Q3", 1.0)]
    subjects = {split: range(100 * number, 100 * number + 8) for number, split in enumerate(SPLITS)}
    records = {split: [[record(s, events[s % 2 :]) for s in of_split]] for split, of_split in subjects.items()}
    labels = [(s, s % 2, "", "") for of_split in subjects.values() for s in of_split]
    corpus, files = write_corpus(place / "corpus", records, labels), place / "files"
    tables = {f"{name}_filepath": f"{corpus}/{name}.csv" for name in ("vocab", "labels")}
    small = ["model.n_layers=1", "model.model_dim=16", "model.n_heads=2", "model.max_length=32", "trainer.epochs=1",
             "trainer.save_every=1", "trainer.n_bootstrap=0", "trainer.num_workers=0", "trainer.precision=32-true",
             "trainer.accelerator=cpu", f"cache_dir={place}/cache"]  # fmt: skip
    create = [
        *migrate({"data": {"data_dir": str(corpus), **tables}}).command,
        "embedder=hashing",
        "task.labels=is_case",
    ]
    embed(composed(*create, *small, "export=patient_files", f"export.dir={files}", name="embed"))
    for stage in STAGES[1:]:
        old = {section: keys for section, keys in CONFIGS[stage].items() if section != "wandb"}
        places = [f"data.data_dir={files}", f"run_dir={place}/{stage}"]
        places += [f"init_from={place}/pretrain/checkpoint_epoch_1.pt"] if stage == "decoder" else []
        run(composed(*migrate(old).command, *small, *places))
        names = {path.name for path in (place / stage).iterdir()}
        assert {"best_checkpoint.pt", "latest_checkpoint.pt", "checkpoint_epoch_1.pt", "metrics.json"} <= names
    metrics = [read_json(place / stage / "metrics.json")["held_out"] for stage in ("pretrain", "encoder", "decoder")]
    assert metrics[0].keys() >= {"perplexity"}
    assert all(m.keys() >= {"f1", "auroc"} for m in metrics[1:])

    whole = ["experiment=pretrain_then_finetune", "pretrain.trainer.epochs=1", f"run_dir={place}/whole"]
    run(composed(*create, *whole, *small))
    assert read_json(place / "whole" / "pretrain" / "metrics.json")["held_out"].keys() >= {"perplexity"}
    assert read_json(place / "whole" / "metrics.json")["held_out"].keys() >= {"f1"}


def test_values_arrive():
    cfg = composed(*migrate(ENCODER).command)
    model, trainer = cfg.model, cfg.trainer
    assert (model.model_dim, model.n_heads, model.n_layers, model.dropout, model.max_length) == (64, 4, 2, 0.2, 2048)
    assert (trainer.batch_size, trainer.epochs, trainer.learning_rate, trainer.weight_decay) == (16, 30, 5e-5, 0.02)
    assert (trainer.patience, trainer.scheduler_patience, trainer.warmup_steps, trainer.num_workers) == (7, 2, 0, 4)
    assert trainer.batch_tokens == 16 * 2048, "or batches would be smaller than asked for"
    assert (cfg.data.data_dir, cfg.run_dir, cfg.model.pooling, cfg.task.class_weights) == (
        "/data/files",
        "./out",
        "max",
        [0.5, 1.5],
    )
    assert cfg.tracker._target_.endswith("WandbTracker")
    assert cfg.tracker.project == "mine"
    created = composed(*migrate(CREATE).command, name="embed")
    assert created.embedder.model == "sentence-transformers/all-mpnet-base-v2"
    assert (created.data.data_dir, created.data.cutoff_months) == ("/data/to kens/", 6)
    assert created.data.lab_lookup_filepath == "/data/it's a lab, isn't it.csv"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("intfloat/e5-large-v2", {"embedder=e5_large", "embedder.prompt=null"}),
        ("sentence-transformers/all-MiniLM-L6-v2", {"embedder=minilm_l6"}),
        ("me/other-model", {"embedder=minilm_l6", "embedder.model=me/other-model"}),
    ],
)
def test_the_embedding_model_finds_its_yaml(name, expected):
    command = migrate(CREATE | {"model": {"name": name}}).command
    assert {override for override in command if override.startswith("embedder")} == expected
    composed(*command, name="embed")


def test_unknown_keys_are_listed_and_not_guessed(tmp_path, capsys):
    old = CREATE | {"model": {"model_name": "x", "model_dimm": 3}, "extra": {"a": {"b": 1}}}
    assert main([written(tmp_path, old)]) == 0
    shown = capsys.readouterr()
    assert "model.model_dimm=3" in shown.err
    assert "extra.a.b=1" in shown.err
    assert "#   model.model_dimm=3" in shown.out
    assert "model_dimm" not in str(yaml.safe_load(shown.out))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("a: [", "not readable as YAML"),
        ("- 1", "expected sections model, data, training; found list"),
        ("model: {type: lstm}", "model.type=lstm: expected transformer_encoder_embedded or"),
        ("trainer: {lr: 1}", "none of the original's four configs.*found trainer.lr"),
    ],
)
def test_what_is_no_such_config_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "old.yaml"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(message, shown.err)
    assert "Traceback" not in shown.err


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "ehr_embed.migrate", written(tmp_path, ENCODER)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["max_length"] == 2048


def test_the_table_in_the_docs_is_that_of_the_code():
    text = (ROOT / "docs" / "migration.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w, ]+) \| (`[\w.]+`|—) \| (.*) \|$", text, flags=re.MULTILINE)
    in_docs = {(old, where, new.strip("`"), why.strip()) for old, where, new, why in rows}
    in_code = {
        (key.old, "all" if set(key.stages) == set(STAGES) else ", ".join(key.stages), key.new or "—", key.why)
        for key in KEYS
    }
    assert in_docs == in_code


@pytest.mark.parametrize("key", [key for key in KEYS if key.new is not None], ids=lambda key: key.old)
def test_every_place_exists(key):
    """The keys named in the table are keys of some composition here."""
    groups = ("tracker=wandb",) if key.new.startswith("tracker.") else ()
    cfg = composed(f"data={'tokenized' if key.stages == ('create',) else 'patient_files'}", *groups)
    assert OmegaConf.select(cfg, key.new, default=cfg) is not cfg


def test_unknown_types_raise_where_they_are_called():
    with pytest.raises(UserError, match=r"model\.type .*data\.vocab_filepath .*found nothing"):
        migrate({})
