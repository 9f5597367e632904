"""Tokens read in other words in training: which words, how often, never outside training, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.embedders.synonyms import Synonyms
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.variants import TextVariants, text_variants
from ehr_embed.experiment.run import run
from tests.helpers.configs import composed
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds

TEXTS = ["", "unknown event", "Fracture of hip", "Asthma", "Fever"]


def vectors_of(texts: list[str]) -> np.ndarray:
    return np.array([[float(len(text)), 1.0] for text in texts], np.float32)


def variants(kinds: list[str], table: torch.Tensor | None = None) -> TextVariants:
    table = torch.eye(5) if table is None else table
    return text_variants(
        TEXTS, table, share=0.5, kinds=kinds, synonyms=Synonyms.of_pairs([("fracture of", "broken")]),
        embed=lambda texts: np.pad(vectors_of(texts), ((0, 0), (0, table.shape[1] - 2))),
    )  # fmt: skip


def test_each_kind_gives_its_own_words():
    assert variants(["synonyms"]).starts.tolist() == [0, 0, 0, 1, 1, 1]
    assert variants(["synonyms"]).vectors[0, 0] == len("broken hip")
    assert variants(["words"]).starts.tolist() == [0, 0, 0, 3, 3, 3], "a text of one word loses none"
    table = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    found = variants(["neighbours"], table)
    assert found.starts.tolist() == [0, 0, 0, 1, 2, 2]
    torch.testing.assert_close(found.vectors, table[[3, 2]])
    with pytest.raises(UserError, match=r"nothing would vary.*data\.text_variants=0"):
        variants(["neighbours"])


def test_a_share_of_the_tokens_that_have_variants_is_replaced():
    torch.manual_seed(0)
    found = variants(["synonyms", "words"])
    own = torch.eye(5).repeat(400, 1)
    varied = (found(torch.arange(5).repeat(400), own) != own).any(1).view(400, 5).float().mean(0)
    assert varied[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]
    assert 0.4 < varied[2] < 0.6


def test_a_learned_offset_is_kept_and_nothing_varies_in_evaluation():
    class Batch:
        token_ids = torch.tensor([[2, 3, 4, 2, 2, 2]])

        def __getattr__(self, name: str) -> None:
            return None

    torch.manual_seed(0)
    embedding = EventEmbedding(torch.eye(5), "residual", variants(["synonyms"]))
    with torch.no_grad():
        embedding.learned[2] = 7.0
    assert torch.equal(embedding.inputs(Batch())["rows"], embedding.table), "it begins in evaluation mode"
    embedding.train()
    drawn = {embedding.inputs(Batch())["rows"][2, 0].item() for _ in range(40)}
    assert drawn == {7.0, len("broken hip") + 7.0}
    assert list(embedding.state_dict()) == ["learned"]


def cohort(tmp_path):
    splits = {
        split: [(n * 1000 + i, float(t), "FEVER" if i % 2 else "HIP", None) for i in range(12) for t in range(2)]
        for n, split in enumerate(("train", "tuning", "held_out"))
    }
    labels = [(n * 1000 + i, 5.0, bool(i % 2)) for n in range(3) for i in range(12)]
    codes = [("FEVER", "Fever", None), ("HIP", "Fracture of hip", None)]
    return write_meds(tmp_path / "set", splits, codes=codes, labels={"case": labels})


def test_a_run_trains_with_other_words_and_predicts_with_its_own(tmp_path):
    root = cohort(tmp_path)

    def config(name: str, *overrides: str):
        return composed(
            "data=meds", f"data.root={root}", f"run_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}", "data.min_count=1",
            "model=mean_pool", "trainer.epochs=2", "trainer.n_bootstrap=0", "audit=off", "embedder=hashing",
            "trainer.precision=32-true", "trainer.threads=1", "report=false", *overrides,
        )  # fmt: skip

    run(config("own"))
    run(config("varied", "data.text_variants=0.9"))
    losses = [read_json(tmp_path / name / "metrics.json")["held_out"]["loss"]["value"] for name in ("own", "varied")]
    assert losses[0] != losses[1]
    with refused("data.text_variants=0.9: GBM", "data.text_variants=0"):
        run(config("refused", "data.text_variants=0.9", "model=gbm"))
    with refused("data.text_variants=0.9", "data.text_variants=0"):
        run(config("refused", "data.text_variants=0.9", "embedder.trainable=full"))
    with refused("data.variant_kinds"):
        run(config("refused", "data.text_variants=0.9", "data.variant_kinds=[words,antonyms]"))
    assert not (tmp_path / "refused").exists()


def test_bins_of_one_test_are_no_variants_of_each_other():
    """The vectors of "low" and "high" lie near each other, and mean the opposite."""
    texts = ["", "unknown event", "Serum iron", "Serum iron: low (1st of 2)", "Serum iron: high (2nd of 2)", "Ferritin"]
    table = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.01], [1.0, 0.02], [0.9, 0.1]])
    embedded: list[str] = []

    def embed(new: list[str]) -> np.ndarray:
        embedded.extend(new)
        return vectors_of(new)

    found = text_variants(
        texts, table, share=0.5, kinds=["words", "neighbours"], synonyms=Synonyms.of_pairs([]), embed=embed,
        plain_tokens=np.array([0, 1, 2, 2, 2, 5]),
    )  # fmt: skip
    assert all(("low" in text) == ("1st" in text) and ("high" in text) == ("2nd" in text) for text in embedded)
    of_low = found.vectors[found.starts[3] : found.starts[4]]
    assert len(of_low) == 3, "two with a word less, and Ferritin"
    torch.testing.assert_close(of_low[-1], table[5])
