"""Training leaves the token vectors frozen, or learns them: as residual, full, or without any text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.data.store import encode_split
from ehr_embed.embedders.random_vectors import RandomEmbedder
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.table import load_table
from ehr_embed.embedding.vector_cache import check_informative
from ehr_embed.experiment.run import run
from ehr_embed.inference.trained_run import TrainedRun, open_run
from ehr_embed.run_folder.checkpoints import initialise
from ehr_embed.sources.meds import MedsSource
from tests.helpers.homonyms import BAD, GOOD, KINDS, config, write_homonyms


class Runs(NamedTuple):
    folder: Path
    auroc: dict[str, float]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """One run of each kind on the homonyms."""
    folder = tmp_path_factory.mktemp("homonyms")
    root, auroc = write_homonyms(folder / "set"), {}
    for kind, overrides in KINDS.items():
        run(config(root, folder / kind, *overrides))
        auroc[kind] = read_json(folder / kind / "metrics.json")["held_out"]["auroc"]["value"]
    return Runs(folder, auroc)


def vectors(opened: TrainedRun, codes: list[str]) -> torch.Tensor:
    """Vectors of codes as the run has them, (len(codes), E)."""
    rows = [opened.vocabulary.strings.index(code) for code in codes]
    return opened.embedding(torch.tensor(rows))


def test_only_learned_vectors_tell_apart_what_has_one_text(runs):
    assert abs(runs.auroc["frozen"] - 0.5) < 0.2
    assert all(runs.auroc[kind] > 0.95 for kind in ("residual", "full", "learned")), runs.auroc


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_and_where_it_is_kept(runs, kind):
    opened = open_run(runs.folder / kind)
    checkpoint = torch.load(runs.folder / kind / "best_checkpoint.pt", weights_only=True)
    start, _ = load_table(runs.folder / kind / "vocabulary" / "table.safetensors", expected={})
    if kind == "frozen":
        assert "embedding_state_dict" not in checkpoint
        assert torch.equal(opened.embedding.table, start)
        return
    learned = checkpoint["embedding_state_dict"]["learned"]
    assert torch.equal(opened.embedding.table, start + learned if kind == "residual" else learned)
    moved = (opened.embedding.table - start).abs().amax(1)
    assert moved[2:].min() > 0, "every token that occurs"
    assert moved[0] == 0, "padding"
    good, bad = vectors(opened, [GOOD, BAD])
    assert not torch.allclose(good, bad)
    n_vectors = read_json(runs.folder / kind / "metrics.json")["train"]["n_parameters"]
    n_frozen = read_json(runs.folder / "frozen" / "metrics.json")["train"]["n_parameters"]
    assert n_vectors - n_frozen == start.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_opened_again_predicts_what_it_predicted(runs, kind):
    """Predict again, with the events encoded anew, and through the model's other face."""
    opened = open_run(runs.folder / kind)
    events = encode_split(MedsSource(root=str(runs.folder / "set")), opened.vocabulary, "held_out")
    tokens = torch.from_numpy(np.array(events.token_ids)).long().view(50, 5)
    with torch.inference_mode():
        logits = opened.model({"embeddings": opened.embedding(tokens), "padding_mask": torch.ones_like(tokens) > 0})
    expected = predictions(runs.folder / kind)
    np.testing.assert_allclose(logits.softmax(-1)[:, 1].numpy(), expected, atol=1e-5)


def predictions(run_dir: Path) -> np.ndarray:
    return pl.read_parquet(run_dir / "predictions" / "held_out.parquet")["predicted_boolean_probability"].to_numpy()


@pytest.mark.parametrize("kind", ["residual", "learned"])
def test_a_run_that_starts_from_another_starts_from_its_vectors(runs, kind, tmp_path):
    """Learned vectors also stay as they are while the body is frozen."""
    start = f"init_from={runs.folder / kind}"
    run(config(runs.folder / "set", tmp_path / "probe", *KINDS[kind], start, "trainer.freeze=body"))
    before, after = (open_run(folder).embedding.table for folder in (runs.folder / kind, tmp_path / "probe"))
    assert torch.equal(before, after)


def test_pretraining_hands_on_what_it_learned(runs, tmp_path):
    """Both stages of one command have one `embedder.trainable`; what the second does not train is the first's."""
    stages = ["experiment=pretrain_then_finetune", "model=decoder_small", "pretrain.trainer.epochs=1"]
    run(config(runs.folder / "set", tmp_path / "run", *KINDS["residual"], *stages, "trainer.freeze=body"))
    first, second = (open_run(folder).embedding for folder in (tmp_path / "run" / "pretrain", tmp_path / "run"))
    assert first.learned is not None
    assert first.learned.abs().max() > 0
    assert torch.equal(first.table, second.table)


def test_vectors_that_have_no_place_are_refused(runs):
    identity = torch.load(runs.folder / "residual" / "best_checkpoint.pt", weights_only=True)["identity"]
    opened = open_run(runs.folder / "residual")
    config = {"model": dict(opened.config["model"]), "embedder": {"_target_": "x"}, "data": {"values": "bins"}}
    start = {"config": config, "vocabulary": opened.vocabulary}
    table = torch.zeros_like(opened.embedding.table)
    with pytest.raises(UserError, match=r"trainable=residual, .* frozen.*Type: embedder\.trainable=residual"):
        initialise(opened.model, EventEmbedding(table), runs.folder / "residual", identity=identity, **start)
    other = {**identity, "vocab_sha256": "other"}
    # A body that was trained on the texts' vectors reads those of any vocabulary, and they may be learned from there on.
    embedding = EventEmbedding(torch.ones(3, 16), "residual")
    initialise(opened.model, embedding, runs.folder / "frozen", identity=other, **start)
    assert torch.equal(embedding.table, torch.ones(3, 16))


def test_an_unknown_way_is_refused():
    with pytest.raises(UserError, match=r"unknown embedder\.trainable 'residul': did you mean 'residual'"):
        EventEmbedding(torch.zeros(2, 2), "residul")


def test_random_vectors_belong_to_names_and_are_as_long_as_text_vectors():
    names = [f"LAB//{i}" for i in range(50)]
    embedder = RandomEmbedder(embedding_dim=64)
    drawn = embedder.embed(names)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=0.35)
    check_informative(drawn, names)
    np.testing.assert_array_equal(embedder.embed(names[::-1]), drawn[::-1])
    assert abs(np.corrcoef(drawn)[np.triu_indices(50, 1)]).mean() < 0.2, "no two are alike"
    other = RandomEmbedder(embedding_dim=64, seed=1)
    assert other.fingerprint != embedder.fingerprint
    assert not np.array_equal(other.embed(names), drawn)


def test_tokens_with_one_text_start_apart_where_no_text_is_read(runs):
    table, _ = load_table(runs.folder / "learned" / "vocabulary" / "table.safetensors", expected={})
    rows = [open_run(runs.folder / "learned").vocabulary.strings.index(code) for code in (GOOD, BAD)]
    assert not torch.equal(*table[rows])
