"""The entry of MEDS-DEV: its own command line extracts a task, trains this package, predicts, and evaluates what was predicted."""

from __future__ import annotations

import json
import shutil
import venv
from pathlib import Path

import polars as pl
import pytest
import yaml

import ehr_embed
from tests.helpers.configs import composed
from tests.helpers.small_meds import ROOT
from tests.helpers.wheels import call, source, wheel  # noqa: F401  (fixtures)

ENTRY = ROOT / "ehr_embed" / "console" / "meds_dev"
TASK = "readmission/general_hospital/30d"


def test_the_entry_is_of_this_version_and_its_commands_compose():
    assert (ENTRY / "requirements.txt").read_text() == f"ehr_embed=={ehr_embed.__version__}\n"
    text = (ENTRY / "model.yaml").read_text()
    assert "${" not in text, "OmegaConf, with which MEDS-DEV reads the file, would take it for an interpolation"
    commands = yaml.safe_load(text)["commands"]["supervised"]
    filled = {"dataset_dir": "a [b],c=d", "labels_dir": "labels/x", "output_dir": "out", "demo": True}
    words = commands["train"].format(**filled)
    overrides = [word for word in words.split('"') if word.startswith(("data.", "task.", "run_dir=", "cache_dir="))]
    size = words.split('SIZE="')[2].split('"')[0].split()
    cfg = composed("data=meds", *overrides, *size)
    assert (cfg.data.root, cfg.task.labels, cfg.run_dir, cfg.trainer.epochs) == ("a [b],c=d", "labels/x", "out/run", 4)
    predict = commands["predict"].format(model_initialization_dir="out", split="held_out", **filled)
    overrides = [word for word in predict.split('"') if "=" in word]
    cfg = composed(*overrides, name="predict")
    assert (cfg.run, cfg.split, cfg.output) == ("out/run", "held_out", "out/predictions.parquet")


@pytest.mark.slow
def test_meds_devs_own_command_line_runs_from_task_extraction_to_a_packed_result(real_data, wheel, tmp_path):
    data = real_data("mimic_iv_demo")
    venv.create(tmp_path / "meds_dev", with_pip=True)
    bin_ = tmp_path / "meds_dev" / "bin"
    call(bin_ / "python", "-m", "pip", "install", "--quiet", "MEDS-DEV==0.0.14", cwd=tmp_path, timeout=1800)
    models = Path(
        call(
            bin_ / "python",
            "-c",
            "from importlib.resources import files; print(files('MEDS_DEV.models'))",
            cwd=tmp_path,
        ).strip()
    )
    shutil.copytree(ENTRY, models / "ehr_embed")
    variables = {
        # MEDS-DEV starts the programs of its environment by name, and pip for the entry's requirements.
        "PATH": f"{bin_}:/usr/local/bin:/usr/bin:/bin",
        "PIP_FIND_LINKS": str(wheel.parent),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "EHR_EMBED_OVERRIDES": "embedder=hashing trainer.threads=1",
    }

    def meds_dev(program: str, *words: str, timeout: float = 600) -> None:
        call(bin_ / f"meds-dev-{program}", *words, cwd=tmp_path, variables=variables, timeout=timeout)

    meds_dev("task", f"task={TASK}", "dataset=MIMIC-IV", f"dataset_dir={data}", "output_dir=labels")
    meds_dev(
        "model", "model=ehr_embed", "mode=full", "dataset_type=supervised", f"dataset_dir={data}", "labels_dir=labels",
        "dataset_name=MIMIC-IV", f"task_name={TASK}", "output_dir=out", "demo=True", timeout=3000,
    )  # fmt: skip
    folder = tmp_path / "out" / "MIMIC-IV" / TASK
    meds_dev("evaluation", f"predictions_dir={folder / 'predict'}", "output_dir=evaluation")
    meds_dev(
        "pack-result", "dataset=MIMIC-IV", f"task={TASK}", "model=ehr_embed", "evaluation_fp=evaluation/results.json",
        "result_fp=result.json",
    )  # fmt: skip
    meds_dev("validate-result", "result_fp=result.json")

    assert (
        pl.read_parquet_schema(folder / "predict" / "predictions.parquet")["predicted_boolean_probability"]
        == pl.Float64
    )
    theirs = json.loads((tmp_path / "result.json").read_text())["result"]["samples_equally_weighted"]
    ours = json.loads((folder / "train" / "run" / "metrics.json").read_text())["held_out"]
    assert ours["n"] > 20
    for their_name, name in (("roc_auc_score", "auroc"), ("average_precision_score", "auprc"),
                             ("binary_accuracy", "accuracy"), ("f1_score", "f1")):  # fmt: skip
        assert theirs[their_name] == pytest.approx(ours[name]["value"], abs=1e-6), their_name
