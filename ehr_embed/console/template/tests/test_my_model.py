"""The model reads events only, and the experiment runs from data to a run that can be opened."""

import subprocess
import sys
from pathlib import Path

import torch
from my_project.model import MyModel

import ehr_embed

PROJECT = Path(__file__).resolve().parents[1]


def test_padding_reaches_nothing():
    model = MyModel(embedding_dim=8, num_classes=2).eval()
    events, mask = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    longer = torch.cat([events, torch.randn(1, 3, 8)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], dim=1)
    logits = model({"embeddings": events, "padding_mask": mask})
    torch.testing.assert_close(model({"embeddings": longer, "padding_mask": longer_mask}), logits)


def test_the_experiment_runs(tmp_path):
    arguments = [
        "--config-dir",
        "my_project/conf",
        "experiment=my_experiment",
        "embedder=hashing",
        "data.n_subjects=200",
    ]
    arguments += [
        "trainer.epochs=1",
        "trainer.n_bootstrap=20",
        f"cache_dir={tmp_path}/cache",
        f"run_dir={tmp_path}/run",
    ]
    subprocess.run([sys.executable, "-m", "ehr_embed", "train", *arguments], cwd=PROJECT, check=True)
    run = ehr_embed.load(tmp_path / "run", trusted_packages=["my_project"])
    assert run.class_names == ["false", "true"]
    assert isinstance(run.run.model, MyModel)
