"""The three pipelines on the planted set, where only the texts tell what a name means; their sweep and its table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import polars as pl
import pytest

from ehr_embed.core.files import read_json
from ehr_embed.experiment.run import run
from tests.helpers.configs import composed
from tests.helpers.entry_points import write_synonyms
from tests.helpers.searches import train

TRANSFORMER = ("model=encoder_small", "trainer=short", "trainer.epochs=8")
TEXT = ("pipeline=text_based", "model.max_pieces=40", "trainer=short", "trainer.epochs=2", "trainer.learning_rate=1e-4",
        "trainer.batch_size=16", "trainer.warmup_steps=5")  # fmt: skip
KINDS = {
    "embedded": ("pipeline=embedded_based", *TRANSFORMER),
    "token": ("pipeline=token_based", *TRANSFORMER),
    "frozen": ("pipeline=token_based", "embedder.trainable=frozen", *TRANSFORMER),
    "text": TEXT,
    "embedded shuffled": ("pipeline=embedded_based", *TRANSFORMER, "data.lookups=[SHUFFLED]"),
    "text shuffled": (*TEXT, "data.lookups=[SHUFFLED]"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The planted set, and its texts on the wrong codes."""
    place = tmp_path_factory.mktemp("planted")
    root = write_synonyms(place / "synonyms")
    codes = pl.read_parquet(root / "metadata" / "codes.parquet")
    shuffled = codes.select("code", term=pl.col("description").shuffle(seed=1))
    shuffled.write_csv(place / "shuffled.csv")
    return place


def auroc(place: Path, kind: str) -> float:
    """On held-out names, of a run of this kind."""
    overrides = [option.replace("SHUFFLED", str(place / "shuffled.csv")) for option in KINDS[kind]]
    places = [f"data.root={place / 'synonyms'}", f"cache_dir={place / 'cache'}", f"run_dir={place / 'runs' / kind}"]
    run(composed("data=meds", *places, "data.min_count=1", *overrides, "trainer.n_bootstrap=0", "task.monitor=auroc"))
    return read_json(place / "runs" / kind / "metrics.json")["held_out"]["auroc"]["value"]


def test_embedded_texts_carry_over_to_names_without_a_label(place):
    assert auroc(place, "embedded") > 0.9


@pytest.mark.parametrize("kind", ["token", "frozen", "embedded shuffled"])
def test_without_the_right_texts_they_do_not(place, kind):
    assert 0.25 < auroc(place, kind) < 0.75


@pytest.mark.slow
def test_written_texts_carry_over_and_on_the_wrong_codes_do_not(place):
    assert auroc(place, "text") > 0.9
    assert 0.25 < auroc(place, "text shuffled") < 0.75


def test_a_pipeline_is_one_word_and_leaves_the_rest_to_the_data_and_the_command_line():
    def chosen(*overrides: str) -> tuple[str, str]:
        cfg = composed(*overrides)
        return cfg.model._target_.rpartition(".")[2], cfg.embedder._target_.rpartition(".")[2]

    assert chosen("pipeline=token_based") == ("Encoder", "RandomEmbedder")
    assert chosen("pipeline=embedded_based", "embedder=hashing") == ("Encoder", "HashingEmbedder")
    assert chosen("pipeline=token_based", "model=decoder") == ("Decoder", "RandomEmbedder")
    assert chosen("pipeline=text_based", "experiment=gibleed") == ("TextEncoder", "HashingEmbedder")
    assert composed("pipeline=token_based").model.n_layers == 2, "the demo's small model"
    assert composed("pipeline=text_based", "experiment=gibleed").trainer.learning_rate == 5e-5


@pytest.mark.slow
def test_the_sweep_compares_them_in_one_table(tmp_path):
    output = train(
        "sweeps=pipelines", "data.n_subjects=300", "trainer.epochs=1", "trainer.n_bootstrap=20", "hydra.sweeper.seeds=[0,1]",
        "hydra.sweeper.has_plots=false", "model.max_length=4", cwd=tmp_path,
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "multirun" / "pipelines" / "pipelines.csv").set_index("pipeline")
    assert table.index.tolist() == ["token_based", "text_based", "embedded_based"]
    assert table["n_runs"].tolist() == [2, 2, 2]
    assert (table["n_trained"] == table["n_parameters"]).all()
    assert table.loc["text_based", "n_parameters"] > 20e6 > table.loc["token_based", "n_parameters"]
    assert (table["ms_per_step"] > 0).all()
    assert table.loc["embedded_based", "embedding_seconds"] > 0
    # Each run has a process of its own: what an earlier one needed does not count.
    memory = table["peak_memory_mib"]
    assert memory["text_based"] > memory["token_based"] + 200
    assert memory["text_based"] > memory["embedded_based"]
    assert "iteration speed, ms per step" in (tmp_path / "multirun" / "pipelines" / "pipelines.md").read_text()
    assert "text_based" in output
