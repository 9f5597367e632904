"""A run loaded again predicts what it predicted: on vectors, on texts, on a MEDS dataset; and the README's snippets run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.data.store import encode_split
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.experiment.run import run
from ehr_embed.inference import records as records_module
from ehr_embed.inference.predictor import Predictor
from ehr_embed.sources.meds import MedsSource
from tests.helpers.homonyms import BAD, GOOD, KINDS, config, write_homonyms
from tests.helpers.refusals import refused
from tests.helpers.small_meds import ROOT, write_labels, write_meds

SPLIT_SIZE, N_EVENTS = 50, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the dataset `set` and the run `runs/mine` on it."""
    folder = tmp_path_factory.mktemp("place")
    root = write_homonyms(folder / "set")
    run(config(root, folder / "runs" / "mine", *KINDS["residual"], "trainer.epochs=6"))
    run(config(root, folder / "runs" / "decoder", *KINDS["frozen"], "model=decoder_small", "trainer.epochs=1"))
    return folder


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    return ehr_embed.load(folder / "runs" / "mine")


@pytest.fixture(scope="module")
def expected(folder) -> pl.DataFrame:
    return pl.read_parquet(folder / "runs" / "mine" / "predictions" / "held_out.parquet")


def token_ids(folder: Path, predictor) -> np.ndarray:
    """(50, 5) of held_out, in the order of its subjects."""
    source = MedsSource(root=str(folder / "set"))
    return encode_split(source, predictor.run.vocabulary, "held_out").token_ids.reshape(SPLIT_SIZE, N_EVENTS)


def test_a_meds_dataset_gets_the_predictions_of_the_run(folder, predictor, expected):
    found = predictor.predict_proba(folder / "set", labels="case")
    assert found.columns == ["subject_id", "prediction_time", "probability_false", "probability_true"]
    assert found.select("subject_id", "prediction_time").equals(expected.select("subject_id", "prediction_time"))
    np.testing.assert_allclose(found["probability_true"], expected["predicted_boolean_probability"], atol=1e-6)
    np.testing.assert_allclose(found["probability_true"] + found["probability_false"], 1, atol=1e-6)
    last = predictor.predict_proba(str(folder / "set"), split="tuning")
    assert last["prediction_time"].dt.year().max() == 2020
    assert len(last) == SPLIT_SIZE


def test_decoders_too(folder):
    predictor = ehr_embed.load(folder / "runs" / "decoder")
    expected = pl.read_parquet(folder / "runs" / "decoder" / "predictions" / "held_out.parquet")
    found = predictor.predict_proba(folder / "set", labels="case")
    np.testing.assert_allclose(found["probability_true"], expected["predicted_boolean_probability"], atol=1e-6)
    assert predictor.predict_proba(["Result of the test", "N1"]).shape == (1, 2)


def test_several_labels_each_have_their_own_probability(folder):
    labels = pl.read_parquet(folder / "set" / "labels" / "case" / "0.parquet")
    (folder / "set" / "labels" / "control").mkdir()
    labels.with_columns(~pl.col("boolean_value")).write_parquet(folder / "set" / "labels" / "control" / "0.parquet")
    run_dir = folder / "runs" / "several"
    run(config(folder / "set", run_dir, *KINDS["full"], "trainer.epochs=1", task=["task=multilabel"]))
    expected = pl.read_parquet(run_dir / "predictions" / "held_out.parquet")
    found = ehr_embed.load(run_dir).predict_proba(folder / "set", labels="case")
    for name in ("case", "control"):
        np.testing.assert_allclose(found[f"probability_{name}"], expected[f"{name}/probability"], atol=1e-6)


def test_vectors_and_texts_get_the_predictions_of_the_run(folder, predictor, expected):
    tokens, true = token_ids(folder, predictor), expected["predicted_boolean_probability"].to_numpy()
    vectors = predictor.run.embedding.table[torch.from_numpy(tokens).long()]
    found = predictor.predict_proba(vectors)
    np.testing.assert_allclose(found[:, 1], true, atol=1e-6)
    np.testing.assert_array_equal(predictor.predict_proba(list(vectors.numpy())), found)
    np.testing.assert_allclose(predictor.predict_proba(vectors[0]), found[:1], atol=1e-6)
    texts = predictor.run.vocabulary.texts
    records = [[texts[token] for token in row] for row in tokens]
    is_good = (tokens == predictor.run.vocabulary.strings.index(GOOD)).any(1)
    is_bad = (tokens == predictor.run.vocabulary.strings.index(BAD)).any(1)
    by_text = predictor.predict_proba(records)[:, 1]
    # The two codes with one text are the first of them to whoever has the text alone.
    first = (
        is_good
        if predictor.run.vocabulary.strings.index(GOOD) < predictor.run.vocabulary.strings.index(BAD)
        else is_bad
    )
    np.testing.assert_allclose(by_text[first], true[first], atol=1e-6)
    assert not np.allclose(by_text[~first], true[~first], atol=1e-3)
    np.testing.assert_allclose(predictor.predict_proba(records[0]), predictor.predict_proba(records)[:1], atol=1e-6)


def test_records_of_any_length_do_not_depend_on_their_neighbours(predictor):
    rng = np.random.default_rng(0)
    records = [rng.normal(size=(n, 16)) for n in (3, 40, 1)]
    alone = np.concatenate([predictor.predict_proba(record) for record in records])
    np.testing.assert_allclose(predictor.predict_proba(records), alone, atol=1e-6)
    np.testing.assert_allclose(predictor.predict_proba(records[1][-16:]), alone[1:2], atol=1e-6), "max_length is 16"


def test_codes_and_texts_never_seen_are_embedded(predictor, tmp_path):
    """A code that is new, with a text that the run knows, counts as that text; it would be the unknown event else."""
    events = [(s, 0.0, code, None) for s, code in ((1, "NEW"), (2, "STRANGE"), (3, "N1"))]
    codes = [("NEW", "N2", None), ("STRANGE", "Something else entirely", None)]
    root = write_meds(tmp_path / "other", {"held_out": events}, codes=codes)
    write_labels(root / "labels" / "x", [(s, 1.0, True) for s in (1, 2, 3)])
    found = predictor.predict_proba(root, labels="x")["probability_true"].to_numpy()
    raw = predictor.records.embedder.embed(["N2", "Something else entirely"])
    np.testing.assert_allclose(found[:2], predictor.predict_proba([raw[:1], raw[1:]])[:, 1], atol=1e-3)
    np.testing.assert_allclose(found[1:2], predictor.predict_proba(["Something else entirely"])[:, 1], atol=1e-6)
    np.testing.assert_allclose(found[2:], predictor.predict_proba(["N1"])[:, 1], atol=1e-6)
    assert len(set(found.round(4))) == 3


def write_shards(root: Path, *, n: int) -> Path:
    """A shard for each of `n` subjects of held_out, with a code of its own, in the reverse order of their ids."""
    events = {"held_out": [(s, 0.0, code, None) for s in range(n) for code in ("N1", f"NEW{s}")]}
    codes = [(f"NEW{s}", f"Something new {s}", None) for s in range(n)]
    write_meds(root, events, codes=codes)
    (path,) = (root / "data").rglob("*.parquet")
    every = pl.read_parquet(path)
    path.unlink()
    for part in every.partition_by("subject_id"):
        part.write_parquet(path.with_name(f"{9 - part['subject_id'][0]}.parquet"))
    write_labels(root / "labels" / "x", [(s, 1.0, True) for s in range(n)])
    return root


@pytest.mark.parametrize("labels", ["x", None])
@pytest.mark.parametrize("chunk_events", [1, 5, 1000])
def test_shards_are_read_once_and_a_few_at_a_time(folder, tmp_path, monkeypatch, labels, chunk_events):
    root, read, held = write_shards(tmp_path / "shards", n=6), [], []
    predictor = ehr_embed.load(folder / "runs" / "mine")
    real_read, real_predict = MedsSource.read, Predictor.predict_samples
    monkeypatch.setattr(records_module, "CHUNK_EVENTS", chunk_events)
    monkeypatch.setattr(MedsSource, "read", lambda self, shard: read.append(shard) or real_read(self, shard))
    monkeypatch.setattr(
        Predictor,
        "predict_samples",
        lambda self, data: held.append(len(data.events.token_ids)) or real_predict(self, data),
    )
    found = predictor.predict_proba(root, labels=labels, alignment=AlignmentSettings(aligned_to="none"))
    assert len(read) == len(set(read)) == 6
    assert held == {1: [2] * 6, 5: [6, 6], 1000: [12]}[chunk_events]
    assert found["subject_id"].to_list() == ([5, 4, 3, 2, 1, 0] if labels is None else list(range(6)))
    monkeypatch.setattr(records_module, "CHUNK_EVENTS", 10**9)
    at_once = ehr_embed.load(folder / "runs" / "mine").predict_proba(root, labels=labels)
    np.testing.assert_allclose(found["probability_true"], at_once["probability_true"], atol=1e-6)
    assert found.columns == at_once.columns
    assert found["probability_true"].n_unique() == 6


def test_a_loaded_run_embeds_a_new_text_once_and_keeps_its_tables(folder, tmp_path, monkeypatch):
    root, embedded = write_shards(tmp_path / "shards", n=4), []
    predictor = ehr_embed.load(folder / "runs" / "mine")
    real = type(predictor.records.embedder).embed
    monkeypatch.setattr(
        type(predictor.records.embedder), "embed", lambda self, texts: embedded.extend(texts) or real(self, texts)
    )
    first = predictor.predict_proba(root, labels="x")
    tables = predictor.read(str(root), labels="x", split="held_out", lookups=())
    assert predictor.predict_proba(root, labels="x").equals(first)
    again = predictor.read(str(root), labels="x", split="held_out", lookups=())
    assert again.vocabulary is tables.vocabulary
    assert again.embedding is tables.embedding
    assert again.vocabulary.texts is again.vocabulary.texts, "no list of all tokens per sample"
    one = predictor.predict_proba(["N1", "Something new 3", "Something newer"])
    np.testing.assert_array_equal(predictor.predict_proba(["N1", "Something new 3", "Something newer"]), one)
    assert sorted(embedded) == [*(f"Something new {s}" for s in range(4)), "Something newer"]


def test_texts_of_another_state_of_a_dataset_are_read_again(folder, tmp_path):
    root = write_shards(tmp_path / "shards", n=2)
    predictor = ehr_embed.load(folder / "runs" / "mine")
    before = predictor.predict_proba(root)
    codes = root / "metadata" / "codes.parquet"
    pl.read_parquet(codes).with_columns(description=pl.lit("Result of the test")).write_parquet(codes)
    assert not predictor.predict_proba(root).equals(before)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "^no record .*root of a MEDS dataset"),
        ([[]], {}, r"record 0\b"),
        ([np.zeros((2, 16)), np.zeros((0, 16))], {}, r"record 1\b"),
        (np.zeros((2, 7)), {}, r"width 7, .* 16: .*Use the embedder of the model's config\.yaml"),
        ([np.zeros(16)], {}, r"as \(N, E\), got \(16,\)"),
        (["N1", " "], {}, "1 texts .*Leave the event out"),
        ("nowhere", {}, "nowhere: .*MEDS dataset"),
        ("SET", {"split": "test"}, r"unknown split 'test'"),
        ("SET", {"labels": "csae"}, r"did you mean 'case'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_predicted_is_refused(records, options, message, folder, predictor):
    records = folder / "set" if isinstance(records, str) and records == "SET" else records
    with pytest.raises(UserError, match=message):
        predictor.predict_proba(records, **options)


def test_a_run_without_texts_takes_its_own_only(folder):
    run(config(folder / "set", folder / "runs" / "learned", *KINDS["learned"], "trainer.epochs=1"))
    predictor = ehr_embed.load(folder / "runs" / "learned")
    assert predictor.predict_proba(["N1", "N2"]).shape == (1, 2)
    with refused("'N9'", "embedder=learned"):
        predictor.predict_proba(["N1", "N9"])


def test_a_run_that_predicts_events_has_no_classes(folder):
    run_dir, small = folder / "runs" / "events", [*KINDS["frozen"], "model=decoder_small", "trainer.epochs=1"]
    run(config(folder / "set", run_dir, *small, task=["task=next_event"]))
    with pytest.raises(UserError, match=r"predicts events.*init_from="):
        ehr_embed.load(folder / "runs" / "events")


def test_the_package_is_imported_without_torch():
    program = "import sys, ehr_embed; assert 'torch' not in sys.modules and 'polars' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def readme_snippets() -> list[str]:
    """Those of README.md, and the one of docs/predicting.md that needs no more than torch."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    page = (ROOT / "docs" / "predicting.md").read_text()
    return found + [text for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "torch.load" in text]


def test_the_snippets_of_the_readme_run(folder, monkeypatch, expected):
    """The README's lines run in a folder with the run runs/mine."""
    monkeypatch.chdir(folder)
    place: dict = {"DIR": str(folder / "set"), "NAME": "case"}
    predictor = ehr_embed.load("runs/mine")
    tokens = torch.from_numpy(token_ids(folder, predictor)).long()
    place["embeddings"] = predictor.run.embedding.table[tokens[0]]
    snippets = readme_snippets()
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet.replace('"DIR"', "DIR").replace('"NAME"', "NAME"), place)
    p = expected["predicted_boolean_probability"][0]
    assert int(place["predicted"]) == int(p >= 0.5)
    np.testing.assert_allclose(place["by_vectors"][0, 1], p, atol=1e-6)
    np.testing.assert_allclose(place["by_dataset"]["probability_true"][0], p, atol=1e-6)
