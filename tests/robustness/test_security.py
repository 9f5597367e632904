"""Nothing of a foreign file is run, and nothing of a record leaves the machine unasked."""

from __future__ import annotations

import ast
import getpass
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
import wandb
from omegaconf import OmegaConf

import ehr_embed
from ehr_embed.comparison.report import write_report
from ehr_embed.config.instantiate import instantiate
from ehr_embed.core.errors import UserError
from ehr_embed.core.outcome import message_of, outcome_of
from ehr_embed.core.secrets import masked, without_private
from ehr_embed.experiment.run import run
from ehr_embed.explain import explain
from ehr_embed.search.tracking import log_search
from ehr_embed.trackers.wandb import WandbTracker
from tests.helpers.configs import composed
from tests.helpers.no_account import no_account  # noqa: F401 (a fixture for all)
from tests.helpers.pickles import Call
from tests.helpers.small_meds import ROOT
from tests.helpers.wandb_offline import read_offline_runs
from tests.helpers.ward import SMALL, SUBJECTS, TEXTS, stored, trained, ward  # noqa: F401 (fixtures)

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("ehr_embed/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
MAY_UNPICKLE = ("ehr_embed/core/plain_pickle.py", "ehr_embed/search/worker.py", "ehr_embed/training/processes.py")
"""The restricted unpickler, a job of a search, which reads its parent's pipe, and a process of a run, which its parent called."""
MAY_INSTANTIATE = ("ehr_embed/config/instantiate.py", "ehr_embed/config/targets.py")
CODE_RUNNERS = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "runpy.run_path",
    "torch.hub.load",
    "torch.jit.load",
)
UNPICKLERS = (
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "dill.load",
)
UNPICKLERS += ("shelve.open", "marshal.load", "marshal.loads", "pd.read_pickle", "pandas.read_pickle")
UNSAFE_YAML = ("yaml.load", "yaml.unsafe_load", "yaml.full_load")


def dangers(code: str, name: str = "ehr_embed/x.py") -> list[str]:
    """Return the calls in a module that would run a foreign file's code, with their lines."""
    tree = ast.parse(code)
    renamed = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            continue  # a field may be called `compile`
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in renamed:
            what = renamed[ast.unparse(node)]
        elif isinstance(node, ast.Attribute | ast.Name):
            what = ast.unparse(node)
        elif isinstance(node, ast.Call):
            what = ""
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            called = ast.unparse(node.func)
            called = renamed.get(called, called)
            if called == "torch.load" and arguments.get("weights_only") != "True":
                found.append(f"{node.lineno}: torch.load without weights_only=True")
            if (
                arguments.get("allow_pickle", "False") != "False"
                or arguments.get("trust_remote_code", "False") != "False"
            ):
                found.append(f"{node.lineno}: allow_pickle or trust_remote_code")
            if arguments.get("shell", "False") != "False":
                found.append(f"{node.lineno}: a shell")
        else:
            continue
        # `re.compile` and methods of that name are no builtins: those stand alone.
        if what in (*CODE_RUNNERS, *UNSAFE_YAML) or (what in UNPICKLERS and name not in MAY_UNPICKLE):
            found.append(f"{node.lineno}: {what}")
        if what.startswith("hydra.utils") and name not in MAY_INSTANTIATE:
            found.append(f"{node.lineno}: {what} past the allowlist")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_a_file_says(path):
    assert dangers(path.read_text(), str(path.relative_to(ROOT))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import pickle\npickle.load(file)",
        "from pickle import loads\nloads(data)",
        "import pickle\nclass A(pickle.Unpickler): pass",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import hydra\nhydra.utils.instantiate(config)",
        "from hydra.utils import instantiate\ninstantiate(config)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_for_dangers_finds_them(code):
    assert dangers(code)


PWN = "touch pwned"


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "os.system", "command": PWN},
        {"_target_": "torch.load", "f": "evil.pt", "weights_only": False},
        {"_target_": "torch.hub.load", "repo_or_dir": "."},
        {"_target_": "torch.os.system", "command": PWN},
        {"_target_": "ehr_embed.core.files.os.system", "command": PWN},
        {"_target_": "ehr_embed.core.files.shutil.rmtree", "path": "."},
        {"_target_": "torch.nn.Identity", "inner": [{"_target_": "torch.load", "f": "evil.pt", "weights_only": False}]},
        {"_target_": "torch.nn.Identity", "inner": "${evil}"},
        {"_target_": "torch.nn.Identity", "inner": "${oc.create:'{_target_: torch.load, f: evil.pt, weights_only: false}'}"},
        {"_target_": "torch.nn.Identity", "inner": r"\${oc.create:'{_target_: torch.load, f: evil.pt, weights_only: false}'}"},
    ],
    ids=str,
)  # fmt: skip
def test_no_config_builds_more_than_is_trusted(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    torch.save(Call(os.system, PWN), "evil.pt")
    whole = OmegaConf.create(
        {"node": config, "evil": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False}}
    )
    with pytest.raises(UserError, match=r"_target_=\S+ .*\bclass\b|_target_ .*Write the|Check _target_"):
        instantiate(whole.node)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


FOREIGN: list[dict[str, Any]] = [
    {"model": {"_target_": "os.system", "command": PWN}, "trusted_packages": ["os", "posix"]},
    {"model": {"_target_": "ehr_embed.trackers.jsonl.JsonlTracker", "run_dir": "pwned"}},
    {"task": {"_target_": "ehr_embed.sources.demo.demo_source", "root": "pwned", "n_subjects": 200, "seed": 0}},
    {"task": {"_target_": "ehr_embed.core.files.write_json", "path": "pwned", "value": 1}},
    {"embedder": {"_target_": "ehr_embed.exports.vocab_pt.VocabularyExport", "dir": "pwned"}},
    {"data": {"source": {"_target_": "ehr_embed.core.files.write_json", "path": "pwned", "value": 1}}},
]


@pytest.mark.parametrize("groups", FOREIGN, ids=str)
def test_a_foreign_run_builds_members_of_its_groups_only(trained, tmp_path, monkeypatch, groups):
    monkeypatch.chdir(tmp_path)
    folder = stored(trained, tmp_path, **groups)

    def use() -> None:
        ehr_embed.load(folder).predict_proba([["a text that it never saw"]])
        explain(composed(f"run={folder}", name="explain"))

    with pytest.raises(UserError, match=r"_target_=\S+ .*nothing else"):
        use()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_is_only_copied_loads(trained, tmp_path):
    assert ehr_embed.load(stored(trained, tmp_path)).class_names == ["false", "true"]


def test_a_source_of_ones_own_does_not_keep_a_run_from_predicting(trained, tmp_path):
    folder = stored(trained, tmp_path, data={"source": {"_target_": "my_package.MySource"}})
    assert ehr_embed.load(folder).predict_proba([["Okapi cough at night"]]).shape == (1, 2)


def test_a_checkpoint_that_runs_code_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = stored(trained, tmp_path)
    torch.save({"model_state_dict": Call(os.system, PWN)}, folder / "best_checkpoint.pt")
    with pytest.raises(UserError, match=r"best_checkpoint\.pt: .*Train it again, or use another"):
        ehr_embed.load(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def secrets(ward, monkeypatch) -> Iterator[list[str]]:
    """Texts that must not leave the machine."""
    wandb.teardown()  # a key is read once a process: neither one of before, nor this one in later tests
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 6 + "beef")
    monkeypatch.setenv("HF_TOKEN", "hf_notforeveryone")
    paths = [str(ward), ward.parent.name, os.environ["HOME"], str(ROOT), str(Path.cwd())]
    people = [
        name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4
    ]  # shorter ones are found in any image
    texts = [word for text in TEXTS.values() for word in (text, *text.split()) if len(word) > 4]
    yield ["c0ffee" * 6, "hf_notforeveryone", *paths, *people, *map(str, SUBJECTS), *TEXTS, *texts]
    wandb.teardown()


def sent(run_dir: Path) -> Iterator[tuple[Path, bytes]]:
    """The files that `wandb sync` reads: all but W&B's own logs of this machine."""
    read_offline_runs(run_dir)  # waits for the end of the file
    for path in sorted(run_dir.glob("wandb/offline-run-*/**/*")):
        if path.is_file() and "logs" not in path.parts:
            yield path, path.read_bytes()


def tracked(ward: Path, folder: Path, *overrides: str) -> Path:
    where = (f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}")
    run(composed("data=meds", f"data.root={ward}", *SMALL, *where, "tracker=wandb", "tracker.mode=offline", *overrides))
    return folder / "run"


def test_no_record_path_or_token_is_sent(ward, secrets, tmp_path):
    files = list(sent(tracked(ward, tmp_path)))
    assert any(b"tuning/auroc" in data for _, data in files), "the run itself is there"
    leaks = [(path.name, secret) for path, data in files for secret in secrets if secret.encode() in data]
    assert leaks == []
    print(
        f"\n{len(files)} files, {sum(len(data) for _, data in files)} bytes, {len(secrets)} secrets looked for, none found"
    )


def test_records_are_sent_when_asked(ward, secrets, tmp_path):
    files = list(sent(tracked(ward, tmp_path, "tracker.log_examples=true")))
    (table,) = [json.loads(data) for path, data in files if path.name.startswith("examples") and path.suffix == ".json"]
    columns = table["columns"]
    assert columns == ["subject_id", "prediction_time", "label", "events", "probability_false", "probability_true"]
    assert len(table["data"]) == 20
    assert {row[columns.index("subject_id")] for row in table["data"]} <= set(SUBJECTS)
    assert table["data"][0][columns.index("events")] == "Equine; Quagga fever of the left hoof; Okapi cough at night"
    assert {row[columns.index("label")] for row in table["data"]} == {"false", "true"}
    # W&B notes where its own copy of a table lies, for its upload: below HOME, here.
    unasked = [
        secret for secret in secrets if secret in (str(ward), ward.parent.name) or secret.startswith(("c0ffee", "hf_"))
    ]
    assert [secret for _, data in files for secret in unasked if secret.encode() in data] == []


def test_a_search_sends_neither_paths_nor_what_went_wrong(ward, tmp_path):
    (tmp_path / "study.json").write_text(
        json.dumps(
            {
                "storage": f"sqlite:///{ward}/journal",
                "command": f"train.py -m data.root={ward}",
                "fixed": [f"data.root={ward}"],
                "n_by_state": {"failed": 1},
                "best": [],
            }
        )
    )
    table = pd.DataFrame(
        {
            "run": ["0"],
            "host": ["gnu-meadow-17"],
            "data.root": [str(ward)],
            "tracker.api_key": ["h0ofbeat"],
            "storage": ["postgresql://db/x?password=h0ofbeat"],
            "error": [f"{ward}: subject 770012001, Quagga fever"],
        }
    )
    tracker = OmegaConf.load(ROOT / "conf" / "tracker" / "wandb.yaml")
    tracker.mode = "offline"
    log_search(OmegaConf.create({"tracker": tracker}), optuna.create_study(study_name="s"), tmp_path, table)
    files = list(sent(tmp_path))
    assert any(b"hospital_export" in data for _, data in files)
    assert [
        s
        for _, data in files
        for s in (ward.parent.name, "770012001", "Quagga", "gnu-meadow", "h0ofbeat")
        if s.encode() in data
    ] == []


URLS = (
    "postgresql://ann:{}@db:5432/optuna",
    "postgresql+psycopg://ann:{}@db/optuna",
    "postgresql://ann:a/b@{}@db/optuna",
    "postgresql://ann:a {}@db/optuna",
    "postgresql://:{}@db/optuna",
    "postgresql://db/optuna?user=ann&password={}",
    "postgresql://db/optuna?password={}&sslmode=require",
    "postgresql://db/optuna?PASSWORD={}",
    "postgresql://db/optuna?pass%77ord={}",
    "postgresql://db/optuna?sslpassword={}",
    "postgresql://db/optuna?passfile=/home/{}/.pgpass",
    "postgresql://ann@db/optuna?x=1;password={}",
    "sqlite:///study.db?password={}",
    "host=db user=ann password={} dbname=optuna",
    "host=db user=ann password='{} more' dbname=optuna",
)


@pytest.mark.parametrize("url", URLS)
def test_no_form_of_a_password_is_shown(url):
    filled = url.format("h0ofbeat")
    for text in (filled, f"cannot open {filled}: it is away", f"train.py -m 'hydra.sweeper.storage={filled}' seed=0,1"):
        assert "h0ofbeat" not in masked(text), masked(text)
        assert "h0ofbeat" not in str(without_private({"anything": text, "list": [text]}))
        assert "h0ofbeat" not in message_of(ValueError(text))
        assert "h0ofbeat" not in str(asdict(outcome_of(1.0, seconds=1.0, overrides=[f"+note={text}"])))


def test_the_files_of_a_search_show_no_password(tmp_path):
    url = "sqlite:///study.db?password=h0ofbeat"
    facts = {"storage": masked(url), "command": masked(f"train.py -m hydra.sweeper.storage={url}")}
    rows = [{"run": "0", "state": "finished", "objective": 0.5, "tracker.api_key": "h0ofbeat", "note": url}]
    write_report(
        [*rows, {**rows[0], "run": "1", "note": "x"}], tmp_path, directions=["maximize"], facts=facts, has_plots=False
    )
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} == {"summary.csv", "study.json"}
    assert [path.name for path in written if "h0ofbeat" in path.read_text()] == []


def test_the_table_is_sent_when_asked_and_holds_no_text(ward, tmp_path):
    run_dir = tracked(ward, tmp_path, "tracker.log_table=true")
    (file,) = run_dir.glob("vocabulary/table.safetensors")
    assert [text for text in (*TEXTS, *TEXTS.values()) if text.encode() in file.read_bytes()] == []


def test_jsonl_keeps_nothing_but_numbers(trained):
    data = (trained / "metrics.jsonl").read_text() + (trained / "summary.json").read_text()
    assert [secret for secret in (*TEXTS, *TEXTS.values(), *map(str, SUBJECTS)) if secret in data] == []


def test_wandb_takes_no_examples_unasked(tmp_path):
    def make() -> pd.DataFrame:
        raise AssertionError("patient text was made for nobody")

    with WandbTracker(run_dir=tmp_path, config={}, mode="disabled") as tracker:
        tracker.add_examples(make)
