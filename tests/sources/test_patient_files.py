"""One dense file a patient: written from any dataset, read back, and the same to the model as ids and a table."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.embedders.from_files import FilesEmbedder
from ehr_embed.embedding.table import load_table
from ehr_embed.experiment.inputs import embed
from ehr_embed.experiment.run import run
from ehr_embed.sources.patient_files import TOLERANCE, patient_files_source
from tests.helpers.configs import composed
from tests.helpers.pickles import Call
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds

SPLITS = ("train", "tuning", "held_out")
TINY = (
    "model=encoder_small", "model.n_layers=1", "model.model_dim=16", "model.max_length=16", "model.positions=sinusoidal",
    "trainer=short", "trainer.epochs=2", "trainer.n_bootstrap=0", "trainer.precision=32-true", "trainer.accelerator=cpu",
)  # fmt: skip
Edit = Callable[[dict[str, Any]], Any]


def write_dataset(root: Path) -> Path:
    """Static events, values, records longer than max_length, events after the prediction, a code that train lacks."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[Any]] = {}
    labels, subject = [], 0
    for split, count in (("train", 40), ("tuning", 16), ("held_out", 16)):
        events = splits[split] = []
        for number in range(count):
            events.append((subject, None, "SEX//F" if rng.random() < 0.5 else "SEX//M", None))
            for day in range(int(rng.integers(3, 30))):
                code = "LAB" if rng.random() < 0.5 else "AB"[int(rng.random() < 0.3 + 0.4 * (number % 2))]
                events.append((subject, float(day), code, None if code != "LAB" else float(rng.normal())))
                if split != "train" and day == 2:
                    events.append((subject, float(day), "NEW", None))
            events.append((subject, 100.0, "AFTER", None))
            labels.append((subject, 50.0, number % 2 == 1))
            subject += 1
    codes = [("A", "Fever", None), ("B", "Cough", None), ("LAB", "Sodium", None), ("SEX//F", "Female", None)]
    return write_meds(root, splits, labels={"outcome": labels}, codes=codes)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a dataset `meds` and its export `files`, max_length 16."""
    folder = tmp_path_factory.mktemp("files")
    write_dataset(folder / "meds")
    embed(composed(*table_path(folder), "export=patient_files", f"export.dir={folder}/files", name="embed"))
    return folder


def table_path(folder: Path) -> list[str]:
    values = ("data.values=bins", "data.min_count=1", "embedder=hashing", "embedder.embedding_dim=24")
    return ["data=meds", f"data.root={folder}/meds", f"cache_dir={folder}/cache", *values, *TINY]


def losses(run_dir: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["tuning/loss"]) for row in rows]


def test_an_export_read_back_trains_to_the_same_loss(place):
    run(composed(*table_path(place), f"run_dir={place}/table", "seed=3"))
    files = ("data=patient_files", f"data.data_dir={place}/files", f"cache_dir={place}/other")
    run(composed(*files, *TINY, f"run_dir={place}/read_back", "seed=3"))
    assert len(losses(place / "table")) == 2
    np.testing.assert_allclose(losses(place / "read_back"), losses(place / "table"), rtol=1e-6)
    held_out = [json.loads((place / name / "metrics.json").read_text())["held_out"] for name in ("table", "read_back")]
    assert held_out[0]["auroc"] == held_out[1]["auroc"]
    unknown = [
        json.loads(path.read_text())["splits"]["tuning"]["n_unknown"] for path in place.glob("*/stores/*/manifest.json")
    ]
    assert min(unknown) > 0, "events that train does not know were part of the comparison"


def test_a_corpus_of_files_goes_through_all_stages(place):
    corpus = ("data=patient_files", f"data.data_dir={place}/files", f"cache_dir={place}/stages")
    small = (
        "model.model_dim=16",
        "model.n_layers=1",
        "model.n_heads=2",
        "model.max_length=16",
        "trainer.n_bootstrap=0",
    )
    first = ("task@pretrain.task=next_event", "pretrain.trainer.epochs=1", "pretrain.trainer.n_bootstrap=0")
    stages = (
        "experiment=pretrain_then_finetune",
        *first,
        "trainer=short",
        "trainer.epochs=1",
        f"run_dir={place}/staged",
    )
    assert 0 <= run(composed(*corpus, "model=decoder", *stages, *small)) <= 1
    pretrained = json.loads((place / "staged" / "pretrain" / "metrics.json").read_text())
    assert pretrained["held_out"]["perplexity"]["value"] > 1
    assert (place / "staged" / "best_checkpoint.pt").exists()


def test_an_export_has_the_layout_of_the_original(place):
    out = place / "files"
    samples = pl.read_csv(out / "samples.csv", try_parse_dates=True)
    tokens = pl.read_csv(out / "vocab.csv")
    vectors = torch.load(out / "vocab_embeddings.pt", weights_only=True)
    assert list(vectors) == tokens["token"].to_list()
    string = dict(tokens.iter_rows())
    for split, count in zip(SPLITS, (40, 16, 16), strict=True):
        assert len(list((out / split).glob("patient_*.pt"))) == count == len(samples.filter(split=split))
    events = pl.read_parquet(place / "meds" / "data" / "train" / "0.parquet")
    for row in samples.filter(split="train").head(5).iter_rows(named=True):
        record = torch.load(out / "train" / row["file"], weights_only=True)
        n = len(record["token_ids"])
        assert record["embeddings"].shape == (n, 24)
        assert (record["embeddings"].dtype, record["token_ids"].dtype) == (torch.float32, torch.int64)
        assert record["label"].shape == ()
        assert int(record["label"]) == row["label"] == row["subject_id"] % 2
        assert torch.equal(record["embeddings"], torch.stack([vectors[int(token)] for token in record["token_ids"]]))
        codes = events.filter((pl.col("subject_id") == row["subject_id"]) & (pl.col("code") != "AFTER"))[
            "code"
        ].to_list()
        expected = codes if len(codes) <= 16 else codes[:1] + codes[-15:]
        assert [string[int(token)].split("//bin_")[0] for token in record["token_ids"]] == expected
    assert (out / "classes.csv").read_text().splitlines() == ["label,class", "0,false", "1,true"]


def test_size_is_told_before_and_dtype_and_length_are_chosen(place, caplog, monkeypatch):
    out = place / "half"
    with caplog.at_level(logging.WARNING):
        embed(
            composed(
                *table_path(place),
                "export=patient_files",
                f"export.dir={out}",
                "export.dtype=float16",
                "export.max_length=null",
                name="embed",
            )
        )
    files = list(out.glob("*/*.pt"))
    told = next(message for message in caplog.messages if "the export will take" in message)
    assert f"KiB in {len(files)} files" in told
    size = float(told.split("take ")[1].split(" KiB")[0]) * 1024
    assert size == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)
    records = [torch.load(path, weights_only=True) for path in files]
    assert {record["embeddings"].dtype for record in records} == {torch.float16}
    assert max(len(record["token_ids"]) for record in records) > 16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with refused("100.0 B", "export.dtype=float16"):
        embed(composed(*table_path(place), "export=patient_files", f"export.dir={place}/full", name="embed"))
    assert not (place / "full").exists()


def test_the_table_is_exported_alone(place):
    embed(composed(*table_path(place), "export=vocab_pt", f"export.dir={place}/vocab", name="embed"))
    vectors = torch.load(place / "vocab" / "vocab_embeddings.pt", weights_only=True)
    table_file = next((place / "cache" / "stores").glob("meds-*/table-*.safetensors"))
    table, _ = load_table(table_file, expected={})
    assert torch.equal(torch.stack(list(vectors.values())), table)
    assert {path.name for path in (place / "vocab").iterdir()} == {"vocab.csv", "vocab_embeddings.pt"}
    assert (place / "vocab" / "vocab_embeddings.pt").stat().st_size < 3 * table.numel() * 4 + 500 * len(table)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export=patient_files"], r"Type: python embed\.py export=\.\.\. export\.dir=DIR"),
        (["export=vocab_pt", "export.dir=PLACE/meds"], r"export\.dir=\S*/meds .*Type: export\.dir=ANOTHER"),
        (
            ["export=patient_files", "export.dir=PLACE/x", "export.dtype=float8"],
            r"unknown export\.dtype 'float8': did you mean",
        ),
        (["export=patient_files", "export.dir=PLACE/x", "task.labels=outcom"], r"unknown task\.labels 'outcom'"),
    ],
)
def test_an_export_that_cannot_be_is_refused_and_writes_nothing(place, overrides, message):
    overrides = [override.replace("PLACE", str(place)) for override in overrides]
    with pytest.raises(UserError, match=message):
        embed(composed(*table_path(place), *overrides, name="embed"))
    assert not (place / "x").exists()


def test_numbers_beside_the_tokens_are_missed_with_a_warning(place, caplog):
    overrides = ("data.values=both", "export=patient_files", f"export.dir={place}/both")
    embed(composed(*table_path(place), *overrides, name="embed"))
    assert any("Type: data.values=bins" in message for message in caplog.messages)


def write_files(folder: Path, edit: Edit | None = None) -> Path:
    """Files as the original writes them, ids from an own vocabulary; `edit` changes the second of train, or replaces it."""
    vectors = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        for number in (0, 2, 10):  # 10 before 2 in the order of names, after it by number
            ids = torch.tensor([4, 59, 4, 7 + number])
            record: Any = {"embeddings": vectors[ids], "token_ids": ids, "label": torch.tensor(number % 3)}
            if edit is not None and (split, number) == ("train", 2):
                edited = edit(record)
                record = record if edited is None else edited
            if isinstance(record, bytes):
                (folder / split / f"patient_{number}.pt").write_bytes(record)
            else:
                torch.save(record, folder / split / f"patient_{number}.pt")
    return folder


def imported(folder: Path, **options: Any) -> Any:
    return patient_files_source(data_dir=str(folder), cache_dir=str(folder.parent / "cache"), **options)


def test_tokens_become_codes_in_their_order_and_vectors_become_rows(tmp_path):
    folder = write_files(tmp_path / "files")
    source = imported(folder)
    events = pl.concat([source.read(shard) for shard in source.shards])
    assert events["subject_id"].unique().to_list() == list(range(9))
    second = events.filter(subject_id=1)
    assert second["code"].to_list() == ["TOKEN//4", "TOKEN//59", "TOKEN//4", "TOKEN//9"]
    assert second["time"].is_sorted()
    assert second["time"].n_unique() == 4
    labels = pl.read_parquet(source.labels_dir / "label" / "0.parquet")
    assert labels["integer_value"].to_list() == [0, 2, 1] * 3, "file 10 comes after file 2"
    embedder = FilesEmbedder(data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    vectors = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_array_equal(embedder.embed(["TOKEN//59", "TOKEN//4"]), vectors[[59, 4]])
    np.testing.assert_array_equal(embedder.embed(["Unknown event"]), np.zeros((1, 8)))
    with refused("'fever'", "embedder=minilm_l6"):
        embedder.embed(["fever"])


def test_a_vocabulary_names_the_tokens_and_knows_the_unknown_one(tmp_path):
    folder = write_files(tmp_path / "files")
    strings = {token: f"CODE//{token}" for token in range(60)} | {4: "<unknown>"}
    pl.DataFrame({"token": list(strings), "str": list(strings.values())}).write_csv(folder / "vocab.csv")
    source = imported(folder)
    assert source.read(source.shards[0])["code"].to_list()[:4] == ["<unknown>", "CODE//59", "<unknown>", "CODE//7"]
    embedder = FilesEmbedder(data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(embedder.embed(["Unknown event"]), embedder.embed(["<unknown>"]))
    pl.DataFrame({"token": [4], "str": ["A"]}).write_csv(folder / "vocab.csv")
    with pytest.raises(UserError, match=r"vocab_filepath was \w+, now \w+.*overwrite=true"):
        imported(folder)
    with refused("patient_0.pt", "token 7", "vocab.csv"):
        imported(folder, overwrite=True)


def shifted(share: float) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        record["embeddings"] = record["embeddings"].clone()
        record["embeddings"][2, 3] += share * record["embeddings"].abs().max()

    return edit


def truncated(record: dict[str, Any]) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(record, buffer)
    return buffer.getvalue()[:-300]


BAD: dict[str, tuple[Edit, str]] = {
    "two vectors": (shifted(3 * TOLERANCE), r"patient_2\.pt: token 4 at event 2"),
    "truncated": (truncated, r"patient_2\.pt: .*plain tensors"),
    "empty": (lambda r: b"", r"patient_2\.pt: .*plain tensors"),
    "code": (
        lambda r: r | {"label": Call(os.system, "touch pwned")},
        r"patient_2\.pt: .*plain tensors",
    ),
    "foreign": (lambda r: {"weights": torch.ones(2)}, r"patient_2\.pt: .*label, found weights"),
    "no dict": (lambda r: torch.ones(2), r"patient_2\.pt: .*label, found Tensor"),
    "lengths": (lambda r: r | {"token_ids": torch.arange(3)}, r"patient_2\.pt: embeddings \(4, 8\).*token_ids \(3,\)"),
    "width": (
        lambda r: r | {"embeddings": torch.ones(4, 9)},
        r"patient_2\.pt: embeddings of width 9, .* 8",
    ),
    "nan": (lambda r: r | {"embeddings": r["embeddings"] * float("nan")}, r"patient_2\.pt: .*NaN"),
    "negative": (lambda r: r | {"token_ids": r["token_ids"] - 9}, r"patient_2\.pt: .*token id"),
    "two labels": (lambda r: r | {"label": torch.ones(2)}, r"patient_2\.pt: .*one integer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_nothing_is_left(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    edit, message = BAD[name]
    folder = write_files(tmp_path / "files", edit)
    with pytest.raises(UserError, match=message):
        imported(folder)
    assert not (tmp_path / "pwned").exists()
    assert not list((tmp_path / "cache" / "imported").glob("files-*"))


def test_rounding_is_no_second_vector(tmp_path):
    imported(write_files(tmp_path / "files", shifted(0.5 * TOLERANCE)))


def test_other_files_are_refused_until_imported_again(tmp_path):
    folder = write_files(tmp_path / "files")
    imported(folder)
    torch.save(torch.load(folder / "train" / "patient_0.pt"), folder / "train" / "patient_11.pt")
    with refused("3 files", "4 files", "overwrite=true"):
        imported(folder)
    assert len(imported(folder, overwrite=True).read(imported(folder).shards[0])) > 0
    with refused("nowhere/train", "{train,tuning,held_out}/*.pt"):
        patient_files_source(data_dir="nowhere")
    with pytest.raises(UserError, match=r"Type: python train\.py data=patient_files data\.data_dir=DIR"):
        FilesEmbedder(root=str(tmp_path)).embed(["x"])
