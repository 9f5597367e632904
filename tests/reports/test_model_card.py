"""The model card tells what the run's files hold, small groups excepted, and no subject."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from ehr_embed.core.files import read_json
from ehr_embed.data.store import STATIC_TIME
from ehr_embed.data.vocabulary import FIRST_TOKEN
from ehr_embed.evaluation.subgroups import MAX_CODES, subgroups
from ehr_embed.experiment.run import run
from tests.helpers.configs import composed
from tests.helpers.homonyms import KINDS, config
from tests.helpers.people import FIRST_ID, write_people


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    root = write_people(folder / "people")
    run(
        config(
            root, folder / "run", *KINDS["frozen"], "trainer.epochs=2", "trainer.n_bootstrap=50", "model.max_length=6"
        )
    )
    return folder


@pytest.fixture(scope="module")
def card(folder) -> str:
    return (folder / "run" / "model_card.md").read_text()


def rows(card: str, section: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table of a section."""
    part = card.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")
    ]
    return {cells[0]: cells[1:] for cells in lines}


def test_metrics_and_sizes_are_those_of_the_run(folder, card):
    metrics = read_json(folder / "run" / "metrics.json")
    found = rows(card, "Metrics")
    for name in ("auroc", "brier"):
        entry = metrics["held_out"][name]
        assert found[name][0] == f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
    assert rows(card, "Data")["train"][:3] == ["90", "630", "90"]
    assert "plots/calibration.png" in card
    assert (folder / "run" / "plots" / "calibration.png").exists()


def test_subgroups_are_those_of_the_data(folder, card):
    found = rows(card, "Subgroups of held_out")
    predictions = pl.read_parquet(folder / "run" / "predictions" / "held_out.parquet")
    i = predictions["subject_id"].to_numpy() - FIRST_ID - 2000
    y, p = predictions["boolean_value"].to_numpy(), predictions["predicted_boolean_probability"].to_numpy()
    groups = {"age 18 to 39": i % 3 == 1, "age 65 to 79": i % 3 == 2, "SEX//F": (i >= 3) & (i % 2 == 0)}
    for name, members in groups.items():
        assert found[name][0] == str(members.sum())
        assert found[name][1] == f"{y[members].mean():.3f}"
        assert re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", found[name][2])
        assert float(found[name][2][:5]) == pytest.approx(roc_auc_score(y[members], p[members]), abs=1e-3)
    assert "COUNTRY//A" not in found, "all have it"


def test_small_groups_and_groups_of_one_class_are_not_told(card):
    found = rows(card, "Subgroups of held_out")
    assert found["SEX//X"] == ["fewer than 20 subjects", "", "too few", "too few"]
    assert found["age 0 to 17"] == ["30", "", "too few", "too few"], "none of them is a case"
    assert "2 of 6 subgroups are too small" in card


def test_no_subject_and_no_path_stands_in_it(folder, card):
    assert str(FIRST_ID)[:4] not in card
    assert str(folder) not in card
    assert "2020" not in card, "no date of an event"


def test_limits_are_facts_of_the_run(card):
    limits = card.split("## Limits\n")[1]
    assert "100.0 % of held_out's samples have older events than the model reads (`model.max_length=6`)" in limits
    assert "chosen on 90 samples of tuning" in limits
    assert "Intervals wider than 0.1 on held_out: auroc" in limits
    assert "100.0 % of train's events have no description; their text is their code" in limits


def test_a_run_that_predicts_events_has_a_shorter_card(folder):
    small = [*KINDS["frozen"], "model=decoder_small", "trainer.epochs=1", "audit=off"]
    run(config(folder / "people", folder / "events", *small, task=["task=next_event"]))
    card = (folder / "events" / "model_card.md").read_text()
    assert "perplexity" in rows(card, "Metrics")
    assert "Subgroups" not in card
    assert "No leakage audit was made" in card


def test_leaks_stand_in_it_without_their_subjects(folder):
    root = folder / "copies"
    write_people(root)
    for split in ("train", "tuning"):
        path = root / "data" / split / "0.parquet"
        events = pl.read_parquet(path)
        first = events.filter(pl.col("subject_id") == events["subject_id"][0])
        later = first.tail(4).with_columns(pl.col("time") + pl.duration(days=4))
        longer = pl.concat([first, later])
        fixed = longer.with_columns(
            code=pl.when(pl.col("code").str.starts_with("N")).then(pl.lit("N1")).otherwise("code")
        )
        pl.concat([fixed, events.filter(pl.col("subject_id") != first["subject_id"][0])]).write_parquet(path)
    run(composed("data=meds", f"data.root={root}", f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'leaky'}",
                 "embedder=hashing", "embedder.embedding_dim=16", "model=encoder_small", "model.n_layers=1", "trainer.epochs=1",
                 "trainer.n_bootstrap=0"))  # fmt: skip
    card = (folder / "leaky" / "model_card.md").read_text()
    assert "The leakage audit found 1 possible leaks (duplicate_subjects 1)" in card
    assert str(FIRST_ID)[:4] not in card


def test_of_ten_thousand_static_codes_the_largest_are_evaluated_and_the_rest_counted():
    """Every subject has one frequent code of 60 and one of 10,000 rare ones."""
    rng = np.random.default_rng(0)
    n = 3000
    frequent = rng.integers(60, size=n) // (1 + rng.integers(4, size=n))
    tokens = np.stack([FIRST_TOKEN + frequent, FIRST_TOKEN + 60 + rng.permutation(10_000)[:n]], axis=1)
    samples = SimpleNamespace(
        static_start=2 * np.arange(n), static_stop=2 * np.arange(n) + 2, subject_ids=np.arange(n),
        labels=(rng.random(n) < 0.4).astype(int), birth_times=np.full(n, STATIC_TIME), prediction_times=np.zeros(n, np.int64),
    )  # fmt: skip
    Sized = type("Sized", (SimpleNamespace,), {"__len__": lambda self: n})
    vocabulary = SimpleNamespace(strings=[f"CODE//{number}" for number in range(FIRST_TOKEN + 10_060)])
    events = SimpleNamespace(token_ids=tokens.ravel())
    found, n_left_out = subgroups(
        vocabulary, events, Sized(**vars(samples)), rng.random(n), threshold=0.5, n_bootstrap=0
    )
    assert len(found) == MAX_CODES
    n_codes = len(np.unique(tokens))
    assert n_left_out == n_codes - MAX_CODES
    sizes = np.sort(np.bincount(frequent))[::-1]
    assert sum(group.n or 0 for group in found) == sum(size for size in sizes[:MAX_CODES] if size >= 20)
