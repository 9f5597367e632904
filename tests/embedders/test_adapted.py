"""An adapter brings synonyms together, keeps lengths and unrelated texts, and is the same in every process."""

from __future__ import annotations

import numpy as np
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.embedders.adapted import AdaptedEmbedder
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.embedders.random_vectors import RandomEmbedder
from ehr_embed.embedders.synonyms import SHIPPED, Synonyms

PAIRS = [
    ("fever", "pyrexia"),
    ("stroke", "apoplexy"),
    ("broken bone", "fracture"),
    ("jaundice", "icterus"),
    ("asthma", "wheeze"),
]


@pytest.fixture
def table(tmp_path) -> str:
    (tmp_path / "words.csv").write_text("term,synonym\n" + "".join(f"{one},{other}\n" for one, other in PAIRS))
    return str(tmp_path / "words.csv")


def embedder(table: str, **options) -> AdaptedEmbedder:
    return AdaptedEmbedder(inner=HashingEmbedder(embedding_dim=64), synonyms=table, rank=8, **options)


def cosines(own: AdaptedEmbedder, pairs: list[tuple[str, str]]) -> np.ndarray:
    one, other = (own.embed([pair[side] for pair in pairs]) for side in (0, 1))
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_synonyms_come_together_also_inside_other_texts(table):
    before, after = embedder(table, steps=0), embedder(table, penalty=0.1)
    near = [("high fever", "high pyrexia"), ("stroke", "apoplexy")]
    far = [("high fever", "high icterus"), ("stroke", "wheeze")]
    assert (cosines(after, near) > cosines(before, near) + 0.2).all()
    assert (cosines(after, near) > cosines(after, far) + 0.2).all()
    texts = ["fever", "a text of which the table knows nothing"]
    np.testing.assert_allclose(
        np.linalg.norm(after.embed(texts), axis=1), np.linalg.norm(before.embed(texts), axis=1), rtol=1e-5
    )


def test_no_steps_change_nothing_and_two_processes_agree(table):
    inner = HashingEmbedder(embedding_dim=64)
    np.testing.assert_allclose(embedder(table, steps=0).embed(["fever"]), inner.embed(["fever"]), atol=1e-6)
    one, other = embedder(table), embedder(table)
    np.testing.assert_array_equal(one.embed(["fever"]), other.embed(["fever"]))
    assert one.fingerprint == other.fingerprint
    assert embedder(table, seed=1).fingerprint != one.fingerprint
    assert AdaptedEmbedder(inner=inner).fingerprint["synonyms"] != one.fingerprint["synonyms"]


def test_what_has_no_meaning_or_no_table_is_refused(tmp_path, table):
    with pytest.raises(UserError, match=r"embedder@embedder\.inner=minilm_l6"):
        AdaptedEmbedder(inner=RandomEmbedder(embedding_dim=8), synonyms=table)
    for text, match in (
        ("term\nfever\n", "expected columns term,synonym"),
        ("term,synonym\nfever,\n", "row 2 lacks a term or a synonym"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=match):
            embedder(str(tmp_path / "bad.csv"))
    with pytest.raises(UserError, match="no such file"):
        embedder(str(tmp_path / "none.csv"))


def test_the_shipped_table_is_well_formed():
    table = Synonyms.read(SHIPPED)
    assert len(table.of) > 500
    assert "heart attack" in table.of["myocardial infarction"]
    assert "myocardial infarction" in table.of["heart attack"]
    assert table.restated("history of myocardial infarction")[0] == "past heart attack"
