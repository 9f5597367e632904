"""A model's declarations decide which tasks, weights and vectors it is given; no list elsewhere names a model or its options."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.models.code_encoder import CodeEncoder
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.protocol import Declarations, body_of, check_vectors, declarations
from tests.helpers.first_weights import CONFIG, IDENTITY, saved, start
from tests.helpers.small_meds import ROOT


class Rhythm(nn.Module):
    """A model of one's own, with an option that leaves the shapes as they are."""

    meaning_keys = ("beats",)

    def __init__(self, *, beats: int = 4) -> None:
        super().__init__()
        self.beats, self.body, self.head = beats, nn.Linear(3, 3), nn.Linear(3, 2)


def test_what_is_not_declared_has_a_default_and_what_is_wrong_is_refused():
    assert declarations(nn.Linear(1, 1)) == Declarations()
    assert declarations(Rhythm()) == declarations(Rhythm) == Declarations(meaning_keys=("beats",))
    for name, wrong in (("is_causal", "no"), ("reads_vectors", None), ("meaning_keys", "beats"), ("reads_values", 1)):
        model = Rhythm()
        setattr(model, name, wrong)
        with pytest.raises(UserError, match=rf"Rhythm\.{name}={wrong!r}: expected .*Declarations"):
            declarations(model)


def test_weights_of_another_meaning_are_refused_for_a_model_of_ones_own(tmp_path):
    def config(beats: int) -> dict:
        return {**CONFIG, "model": {"_target_": "my.rhythm.Rhythm", "beats": beats, "dropout": beats / 10}}

    pretrained, model = Rhythm(), Rhythm()
    folder = saved(pretrained, tmp_path, config=config(4))
    start(model, folder, config=config(4))
    assert torch.equal(body_of(model).weight, body_of(pretrained).weight)
    with pytest.raises(UserError, match=r"model\.beats is 4 there and 3 here"):
        start(Rhythm(beats=3), folder, config=config(3))


def test_numbers_that_the_data_give_otherwise_are_refused_where_a_model_reads_them(tmp_path):
    def config(values: str) -> dict:
        return {**CONFIG, "data": {"values": values}}

    reads, counts = Rhythm(), Rhythm()
    reads.reads_values = True
    folder = saved(Rhythm(), tmp_path)
    start(counts, folder, config=config("none"))
    with pytest.raises(UserError, match=r"data\.values .*both .*none"):
        start(reads, folder, config=config("none"))
    for summaries in (["count"], ["count", "values"]):
        model = CodeEncoder(embedding_dim=4, num_classes=2, model_dim=8, n_heads=2, summaries=summaries)
        assert declarations(model).reads_values == ("values" in summaries)


def test_rows_of_tokens_are_refused_with_another_vocabulary(tmp_path):
    model = Rhythm()
    model.body = nn.Embedding(3, 3)
    folder = saved(model, tmp_path)
    start(model, folder, identity={**IDENTITY, "vocab_sha256": "v2"})
    model.token_weights = ("body.",)
    start(model, folder)
    with pytest.raises(UserError, match=r"\(v1, here v2\).*model\.vocabulary_head=text_tied"):
        start(model, folder, identity={**IDENTITY, "vocab_sha256": "v2"})


def test_learned_vectors_are_refused_where_they_reach_no_gradient():
    model = Rhythm()
    check_vectors(model, "full")
    for name in ("reads_vectors", "learns_vectors"):
        model = Rhythm()
        setattr(model, name, False)
        check_vectors(model, "frozen")
        with pytest.raises(UserError, match=r"embedder\.trainable=full.*Type: embedder\.trainable=frozen"):
            check_vectors(model, "full")


def test_no_other_module_reads_what_a_model_declares():
    names = "|".join(Declarations.__dataclass_fields__)
    asked = re.compile(rf'(?:get|has)attr\([^)]*"(?:{names}|body)"')
    found = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "ehr_embed").rglob("*.py")
        if asked.search(path.read_text(encoding="utf-8"))
    ]
    assert found == ["ehr_embed/models/protocol.py"]
    assert declarations(Decoder(embedding_dim=4, num_classes=2, model_dim=8, n_heads=2, n_layers=1)).is_causal
