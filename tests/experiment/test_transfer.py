"""A trained model on other data: under other names, with codes it never saw, unchanged, and its vectors by name."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from omegaconf import DictConfig

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.data.vocabulary import FIRST_TOKEN, UNKNOWN
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.embedders.shuffled_text import ShuffledTextEmbedder, deranged
from ehr_embed.embedding.table import load_table
from ehr_embed.experiment.inputs import open_source
from ehr_embed.experiment.run import run
from ehr_embed.inference.trained_run import open_run
from ehr_embed.run_folder.checkpoints import by_name
from ehr_embed.sources.code_texts import read_lookups
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.sources.renamed import SHIPPED, RenamedSource, shipped
from tests.helpers.configs import composed
from tests.helpers.refusals import refused
from tests.helpers.renamed_cohort import events_of, fitted
from tests.helpers.small_meds import write_labels, write_meds

WORDS = {
    "A": ("Sodium, mmol/L", "Serum Na+"),
    "B": ("Fever", "High temperature"),
    "SEX//F": ("Female", "Woman"),
    "SEX//M": (None, "Man"),
    "C": (None, "Shaking from fever"),
}


def write_table(path: Path, rows: dict[str, str]) -> str:
    pl.DataFrame({"code": list(rows), "term": list(rows.values())}).write_csv(path)
    return str(path)


@pytest.fixture
def words(tmp_path) -> str:
    return write_table(tmp_path / "words.csv", {code: after for code, (_, after) in WORDS.items()})


def test_renaming_destroys_every_id_and_keeps_the_rest(tiny, words):
    inner = MedsSource(root=str(tiny))
    source = RenamedSource(inner, table=words)
    before, after = events_of(inner), events_of(source)
    assert before.drop("code").equals(after.drop("code"))
    assert source.labels_dir == inner.labels_dir
    assert not set(before["code"]) & set(after["code"])
    pairs = pl.DataFrame({"before": before["code"], "after": after["code"]}).unique()
    assert len(pairs) == pairs["before"].n_unique() == pairs["after"].n_unique(), "one new id a code"
    assert not any(word in code for code in after["code"].unique() for word in ("SEX", "A", "B", "F", "M"))
    metadata = {row["code"]: row for row in source.code_metadata().to_dicts()}
    new = dict(pairs.iter_rows())
    assert {code: metadata[new[code]]["description"] for code in WORDS} == {code: w for code, (_, w) in WORDS.items()}
    assert metadata[new["C"]]["parent_codes"] == [new["B"]]
    assert source.fingerprint() != inner.fingerprint()


def test_renamed_subjects_keep_their_birth(tiny, words):
    """Without MEDS_BIRTH a model would lose the age, and the loss would pass for one of words."""
    born = pl.DataFrame({"code": ["MEDS_BIRTH", "MEDS_DEATH", "A"]})

    class Born(MedsSource):
        def read(self, shard: Path) -> pl.DataFrame:
            return born

    table = write_table(Path(words).with_name("born.csv"), {"MEDS_BIRTH": "Born", "MEDS_DEATH": "Died", "A": "Other"})
    found = RenamedSource(Born(root=str(tiny)), table=table).read(Path("any"))["code"].to_list()
    assert found[:2] == ["MEDS_BIRTH", "MEDS_DEATH"]
    assert found[2] != "A"


def test_a_vocabulary_under_other_names_is_the_same_but_for_names(tiny, words):
    inner = MedsSource(root=str(tiny))
    one, other = fitted(inner), fitted(RenamedSource(inner, table=words))
    assert not set(one.strings[FIRST_TOKEN:]) & set(other.strings)
    assert not set(one.texts[FIRST_TOKEN:]) & set(other.texts)
    assert one.codes["edges"].sort().to_list() == other.codes["edges"].sort().to_list()
    assert "Serum Na+: low (1st of 4)" in other.texts, "bins are worded with the new description"


def test_what_a_table_lacks_is_refused_or_keeps_its_description(tiny, tmp_path):
    inner = MedsSource(root=str(tiny))
    some = write_table(tmp_path / "some.csv", {"A": "Serum Na+", "SEX//M": "Man", "C": "Shaking"})
    with refused("some.csv", "2 of 5 codes", "B, SEX//F", "data.renamed_missing=keep"):
        events_of(RenamedSource(inner, table=some))
    kept = RenamedSource(inner, table=some, missing="keep")
    events_of(kept)
    assert set(kept.code_metadata()["description"]) == {"Serum Na+", "Man", "Shaking", "Fever", "Female"}
    bare = write_table(tmp_path / "bare.csv", {"A": "Serum Na+"})
    with refused("2 of 5 codes", "C, SEX//M", "Add rows code,term"):
        events_of(RenamedSource(inner, table=bare, missing="keep"))
    other = write_table(tmp_path / "other.csv", {"Z": "Zinc"})
    with refused("other.csv", "tiny"):
        events_of(RenamedSource(inner, table=other, missing="keep"))
    with refused("data.renamed 'dem'", "'demo'", "code,term"):
        RenamedSource(inner, table="dem")
    with pytest.raises(UserError, match=r"unknown data\.renamed_missing 'kep': did you mean 'keep'"):
        RenamedSource(inner, table=some, missing="kep")


@pytest.mark.parametrize("table", shipped())
def test_shipped_tables_say_every_code_in_words_of_its_own(table):
    terms = read_lookups([str(SHIPPED / f"{table}.csv")])
    assert len(terms) == len(pl.read_csv(SHIPPED / f"{table}.csv"))
    assert terms["term"].n_unique() == len(terms), "two codes would become one text"


@pytest.mark.parametrize("table", ["gibleed", "physionet2012"])
def test_shipped_tables_reword_all_of_their_dataset(table, real_data):
    inner = MedsSource(root=str(real_data(table)))
    source = RenamedSource(inner, table=table)
    events_of(source)
    before, after = (x.code_metadata()["description"].str.to_lowercase() for x in (inner, source))
    assert not set(before) & set(after)


def test_the_demo_table_rewords_all_of_the_demo(tmp_path):
    cfg = composed("experiment=transfer", "data.n_subjects=300", f"cache_dir={tmp_path}")
    source = open_source(cfg)
    assert len(events_of(source)) > 0
    inner = MedsSource(root=cfg.data.root).code_metadata()["description"].str.to_lowercase()
    assert not set(inner) & set(source.code_metadata()["description"].str.to_lowercase())


def test_right_vectors_lie_on_wrong_tokens(tiny):
    vocabulary = fitted(MedsSource(root=str(tiny)))
    inner = HashingEmbedder(embedding_dim=16)
    shuffled, other = (ShuffledTextEmbedder(inner=inner, seed=seed) for seed in (0, 1))
    names = shuffled.names(vocabulary)
    assert names[:FIRST_TOKEN] == vocabulary.texts[:FIRST_TOKEN], "padding and unknown stay"
    assert sorted(names) == sorted(vocabulary.texts)
    assert all(a != b for a, b in zip(names[FIRST_TOKEN:], vocabulary.texts[FIRST_TOKEN:], strict=True))
    assert names != other.names(vocabulary)
    np.testing.assert_array_equal(shuffled.embed(names), inner.embed(names))
    fingerprints = [shuffled.fingerprint, other.fingerprint, inner.fingerprint]
    fingerprints += [ShuffledTextEmbedder(inner=HashingEmbedder(embedding_dim=8)).fingerprint]
    assert len({str(f) for f in fingerprints}) == 4
    assert deranged(["x"] * 3 + ["y"], 0).count("x") == 3, "where it cannot be done, nothing is lost"


# One planted question: the label is whether a subject has heart disease or an injury, under many names.
CARDIAC = {
    "Heart failure": "Cardiac insufficiency",
    "Myocardial infarction": "Heart attack",
    "Coronary artery disease": "Narrowed arteries of the heart",
    "Angina pectoris": "Chest pain from the heart",
    "Congestive cardiomyopathy": "Weak, enlarged heart muscle",
    "Atrial fibrillation": "Irregular heart rhythm",
}
INJURY = {
    "Fracture of the ankle": "Broken ankle bone",
    "Sprained knee ligament": "Twisted knee",
    "Torn shoulder tendon": "Ruptured sinew in the shoulder",
    "Dislocated elbow": "Elbow out of joint",
    "Bruised rib": "Contusion of the chest wall",
    "Strain of the neck muscles": "Pulled neck",
}
SMALL = ("model.model_dim=32", "model.n_layers=1", "model.n_heads=2", "model.max_length=8", "trainer.n_bootstrap=0")
TRAINING = ("epochs=6", "batch_size=16", "learning_rate=3e-3", "warmup_steps=2", "n_bootstrap=0", "precision=32-true")


def write_kinds(root: Path) -> Path:
    code = {text: f"D{i}" for i, text in enumerate([*CARDIAC, *INJURY])}
    rng, splits, labels = np.random.default_rng(0), {}, []
    for n, split in enumerate(SPLITS):
        splits[split] = []
        for subject in range(1000 * n, 1000 * n + 80):
            is_cardiac = subject % 2 == 0
            drawn = rng.choice(list(CARDIAC if is_cardiac else INJURY), 2)
            splits[split] += [(subject, float(day), code[text], None) for day, text in enumerate(drawn)]
            labels.append((subject, 5.0, is_cardiac))
    root = write_meds(root, splits, codes=[(c, text, None) for text, c in code.items()], labels={"kind": labels})
    write_table(root / "words.csv", {code[text]: after for text, after in (CARDIAC | INJURY).items()})
    return root


def config(root: Path, run_dir: Path, *overrides: str) -> DictConfig:
    return composed(
        "data=meds", f"data.root={root}", "data.min_count=1", "data.aligned_to=none",
        "model=encoder_small", "task.monitor=auroc", *SMALL,
        f"run_dir={run_dir}", f"cache_dir={root.parent / 'cache'}", *overrides,
    )  # fmt: skip


def training(prefix: str = "trainer") -> list[str]:
    return [f"{prefix}.{option}" for option in TRAINING]


EMBEDDERS = {
    "text": ["embedder=minilm_l6"],
    "residual": ["embedder=minilm_l6", "embedder.trainable=residual"],
    "learned": ["embedder=learned", "embedder.embedding_dim=32"],
    "shuffled": ["embedder=shuffled_text"],
}


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """Each kind of vectors, trained and evaluated under other names, in one command each."""
    folder = tmp_path_factory.mktemp("kinds")
    root = write_kinds(folder / "set")
    for kind, embedder in EMBEDDERS.items():
        run(config(
            root, folder / kind, "experiment=transfer", f"data.renamed={root / 'words.csv'}", *embedder,
            *training("pretrain.trainer"),
        ))  # fmt: skip
    return folder


def test_texts_survive_other_names_and_ids_do_not(moved):
    metrics = {kind: read_json(moved / kind / "metrics.json") for kind in EMBEDDERS}
    for kind in EMBEDDERS:
        before, here = (read_json(moved / kind / part / "metrics.json")["held_out"]["auroc"]["value"]
                        for part in ("pretrain", "."))  # fmt: skip
        assert before > 0.95, kind
        assert metrics[kind]["transfer"]["auroc"] == {"before": before, "here": here, "kept": here / before}
    kept = {kind: of["transfer"]["auroc"]["kept"] for kind, of in metrics.items()}
    assert kept["text"] > 0.95
    assert kept["residual"] > 0.95, "without a namesake it reads the text"
    assert abs(metrics["learned"]["held_out"]["auroc"]["value"] - 0.5) < 0.1, "every event is unknown"
    assert kept["shuffled"] < 0.8
    assert "epochs" not in metrics["text"]["train"]
    files = {path.name for path in (moved / "text").iterdir()}
    assert {"metrics.json", "predictions", "plots", "pretrain", "config.yaml"} <= files
    assert "best_checkpoint.pt" not in files, "nothing was trained"


@pytest.mark.parametrize("kind", EMBEDDERS)
def test_an_evaluation_on_the_same_data_repeats_the_run(moved, tmp_path, kind):
    start = [f"init_from={moved / kind / 'pretrain'}", "trainer=evaluate", "data.describe_unseen=true"]
    run(config(moved / "set", tmp_path / "again", *EMBEDDERS[kind], *start, "trainer.precision=32-true"))
    before, again = (
        read_json(moved / kind / "pretrain" / "metrics.json"),
        read_json(tmp_path / "again" / "metrics.json"),
    )
    for split in ("tuning", "held_out"):
        assert before[split] == again[split]
    assert again["transfer"]["auroc"]["kept"] == 1.0


@pytest.mark.parametrize("kind", ["residual", "learned"])
def test_learned_vectors_follow_their_names(moved, tmp_path, kind, caplog):
    """A dataset that shares half of its codes, in another order, with one that the run never saw."""
    held = {f"D{i}": f"D{i}" for i in range(0, 12, 2)} | {f"D{i}": f"NEW{i}" for i in range(1, 12, 2)}
    root = shutil.copytree(moved / "set", tmp_path / "half")
    for path in [*(root / "data").rglob("*.parquet"), root / "metadata" / "codes.parquet"]:
        frame = pl.read_parquet(path)
        frame.with_columns(pl.col("code").replace_strict(held)).write_parquet(path)
    start = [f"init_from={moved / kind / 'pretrain'}", "trainer.freeze=body", *training(), "trainer.epochs=1"]
    with caplog.at_level(logging.INFO):
        run(config(root, tmp_path / "run", *EMBEDDERS[kind], *start))
    assert "learned vectors matched by name: 6 of 12 tokens" in caplog.text
    before, after = open_run(moved / kind / "pretrain"), open_run(tmp_path / "run")
    names, table = after.vocabulary.strings, after.embedding.table
    texts, _ = load_table(tmp_path / "run" / "vocabulary" / "table.safetensors", expected={})
    for row, name in enumerate(names[FIRST_TOKEN:], FIRST_TOKEN):
        if name.startswith("D"):
            expected = before.embedding.table[before.vocabulary.strings.index(name)]
        else:
            expected = texts[row] if kind == "residual" else before.embedding.table[UNKNOWN]
        assert torch.equal(table[row], expected), name


def test_no_namesake_at_all_is_a_warning(tiny, words, caplog):
    inner = MedsSource(root=str(tiny))
    one, other = fitted(inner), fitted(RenamedSource(inner, table=words))
    other = other.with_counts(np.ones(len(other), np.int64) * (np.arange(len(other)) >= FIRST_TOKEN))
    learned = torch.randn(len(one), 4)
    learned[0] = 0
    with caplog.at_level(logging.INFO):
        vectors = by_name(learned, one.strings, other, unknown_as_known=True)
    assert (caplog.records[0].levelname, "0.0% of train's" in caplog.text) == ("WARNING", True)
    assert torch.equal(vectors[1:], learned[UNKNOWN].expand(len(other) - 1, 4))
    assert not vectors[0].any()
    offsets = by_name(learned, one.strings, other, unknown_as_known=False)
    assert not offsets[FIRST_TOKEN:].any()
    assert torch.equal(offsets[UNKNOWN], learned[UNKNOWN])


def test_what_cannot_be_evaluated_is_refused(moved, tmp_path):
    start = ["trainer=evaluate", f"init_from={moved / 'text' / 'pretrain'}"]
    root = shutil.copytree(moved / "set", tmp_path / "other")
    frame = pl.read_parquet(root / "labels" / "kind" / "0.parquet")
    sites = [(row["subject_id"], 99.0, "heart" if row["boolean_value"] else "bone") for row in frame.to_dicts()]
    write_labels(root / "labels" / "site", sites)
    with refused("false, true", "bone, heart", "task.labels"):
        run(config(root, tmp_path / "run", *start, "task.labels=site"))
    with pytest.raises(UserError, match=r"HashingEmbedder .*Use the same embedder options"):
        run(config(moved / "set", tmp_path / "run", *start, "embedder=hashing", "embedder.embedding_dim=384"))
    with refused("Type: init_from=RUN_DIR"):
        run(config(moved / "set", tmp_path / "run", "trainer=evaluate"))
    with pytest.raises(UserError, match=r"trainer\.epochs=-1: expected 0"):
        run(config(moved / "set", tmp_path / "run", "trainer.epochs=-1"))
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(moved / "learned" / "pretrain" / "best_checkpoint.pt", lone)
    with refused("vocabulary/vocab.csv", "whole folder"):
        run(config(
            moved / "set", tmp_path / "run", *EMBEDDERS["learned"], "trainer=evaluate", f"init_from={lone}",
            f"data.renamed={moved / 'set' / 'words.csv'}",
        ))  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["trainer=evaluate", "trainer.epochs=1"])
def test_from_one_hospital_to_another(real_data, tmp_path, end):
    """PhysioNet 2012 to MIMIC-IV: other codes, other labels, one model."""
    small = ["embedder=hashing", "model.max_length=64", "trainer.n_bootstrap=0", "task.monitor=auroc"]
    small += ["trainer.precision=32-true", f"cache_dir={tmp_path / 'cache'}", "model=encoder_small", "data=meds"]
    first = [f"data.root={real_data('physionet2012')}", "task.labels=in_hospital_mortality_48h", "trainer.epochs=1"]
    run(composed(*small, *first, "task.label_fraction=0.2", f"run_dir={tmp_path / 'p12'}"))
    second = [f"data.root={real_data('mimic_iv_demo')}", "task.labels=long_stay_7d_at_24h", end]
    run(composed(*second[-1:], *small, *second[:2], f"init_from={tmp_path / 'p12'}", f"run_dir={tmp_path / 'demo'}"))
    metrics = read_json(tmp_path / "demo" / "metrics.json")
    assert 0 <= metrics["held_out"]["auroc"]["value"] <= 1
    assert ("transfer" in metrics) == (end == "trainer=evaluate")
