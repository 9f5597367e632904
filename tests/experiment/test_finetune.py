"""Starting from a checkpoint: the body by name, the head anew, mismatches refused; frozen bodies and layer-wise rates."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.run_folder.checkpoints import initialise, read_checkpoint
from ehr_embed.training.optimizer import parameter_groups
from ehr_embed.training.settings import TrainerSettings
from tests.helpers.first_weights import CONFIG, FROZEN, IDENTITY, NO_VOCABULARY, SIZES, saved, start
from tests.helpers.planted import planted, train
from tests.helpers.refusals import refused

__all__ = ["planted"]  # the fixture


def decoder(**options) -> Decoder:
    return Decoder(**{"embedding_dim": 12, **SIZES, **options})


def test_the_body_is_loaded_by_name_and_the_head_is_new(tmp_path, caplog):
    pretrained, model = decoder(vocab_size=30), decoder(num_classes=2)
    head = model.head.classes.weight.clone()
    with caplog.at_level(logging.INFO):
        start(model, saved(pretrained, tmp_path))
    for name, value in pretrained.body.state_dict().items():
        assert torch.equal(model.body.state_dict()[name], value), name
    assert torch.equal(model.head.classes.weight, head)
    assert "new, to be learned: head.classes.bias, head.classes.weight; left out: head.bias" in caplog.text
    start(decoder(num_classes=2), tmp_path / "best_checkpoint.pt")


def test_a_head_with_the_same_classes_is_kept(tmp_path, caplog):
    first = decoder(num_classes=2)
    folder = saved(first, tmp_path, class_names=["false", "true"])

    def started(classes: list[str], **options) -> Decoder:
        model = decoder(**options)
        initialise(
            model, FROZEN, folder, config=CONFIG, identity=IDENTITY, vocabulary=NO_VOCABULARY, trained_classes=classes
        )
        return model

    with caplog.at_level(logging.INFO):
        kept = started(["false", "true"], num_classes=2)
    assert torch.equal(kept.head.classes.weight, first.head.classes.weight)
    assert "the head is kept, since it answers with the same classes: false, true" in caplog.text
    for classes in (["bone", "heart"], ["a", "b", "c"]):
        new = started(classes, num_classes=len(classes))
        assert torch.equal(next(new.body.parameters()), next(first.body.parameters()))
        assert new.head.classes.weight.shape != first.head.classes.weight.shape or not torch.equal(
            new.head.classes.weight, first.head.classes.weight
        )


def test_a_task_that_does_not_train_takes_the_head_too(tmp_path):
    pretrained, model = (
        decoder(vocab_size=30, vocabulary_head="linear"),
        decoder(vocab_size=30, vocabulary_head="linear"),
    )
    start(model, saved(pretrained, tmp_path), whole=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), pretrained.parameters(), strict=True))
    with refused("another vocabulary", "v1", "v2"):
        start(model, tmp_path, whole=True, identity={**IDENTITY, "vocab_sha256": "v2"})


def test_what_does_not_fit_is_refused_with_both_values(tmp_path):
    folder = saved(decoder(vocab_size=30), tmp_path)
    other = {**CONFIG, "embedder": {"_target_": "x.Y", "model": "m"}}
    with refused("HashingEmbedder (digest e1)", "m (digest e2)"):
        start(decoder(num_classes=2), folder, config=other, identity={**IDENTITY, "embedder": "e2"})
    wide = {**CONFIG, "model": {**CONFIG["model"], "model_dim": 32}}
    with refused("(16,) there", "(32,) here", "model.model_dim=16 there, 32 here"):
        start(decoder(num_classes=2, model_dim=32), folder, config=wide)
    for key, value in (("n_heads", 4), ("positions", "rope")):
        other = {**CONFIG, "model": {**CONFIG["model"], key: value}}
        with pytest.raises(UserError, match=rf"model\.{key} is \S+ there and {value} here"):
            start(decoder(num_classes=2, **{key: value}), folder, config=other)
    encoder = {**CONFIG, "model": {"_target_": "ehr_embed.models.encoder.Encoder", **SIZES}}
    with refused("body.times.project.bias", "Decoder there", "Encoder here"):
        start(Encoder(embedding_dim=12, num_classes=2, **SIZES), folder, config=encoder)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "best_checkpoint.pt"
    if content is None:
        torch.save({"weights": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"best_checkpoint\.pt: .*(Train it again, or use another|class_names.*Use one that train\.py wrote)",
    ):
        read_checkpoint(tmp_path)
    with refused("init_from=", "nowhere", "best_checkpoint.pt"):
        read_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_that_names_code_is_not_loaded(tmp_path):
    torch.save({"model_state_dict": Path("x")}, tmp_path / "best_checkpoint.pt")
    with pytest.raises(UserError, match=r"best_checkpoint\.pt: .*Train it again, or use another"):
        read_checkpoint(tmp_path)


def test_a_frozen_body_stays_as_it_is(planted, tmp_path):
    _, _, _, before, _ = train(planted, tmp_path / "a", epochs=1, learning_rate=1e-30, min_learning_rate=0.0)
    _, _, _, frozen, _ = train(planted, tmp_path / "b", epochs=3, freeze="body")
    for (name, p), q in zip(before.named_parameters(), frozen.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12) == name.startswith("body."), name
    with pytest.raises(UserError, match=r"unknown trainer\.freeze 'bodi': did you mean 'body'"):
        TrainerSettings(freeze="bodi")


def test_lower_layers_learn_more_slowly():
    model = decoder(num_classes=2)
    offsets, vectors = (EventEmbedding(torch.zeros(30, 12), how) for how in ("residual", "full"))
    groups = parameter_groups(model, offsets, learning_rate=1.0, weight_decay=0.01, layer_decay=0.5)
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.named_parameters()}
    assert rates["head.classes.weight"] == rates["body.norm.weight"] == 1.0
    assert rates["body.blocks.1.mlp.0.weight"] == 0.5
    assert rates["body.blocks.0.mlp.0.weight"] == 0.25
    assert rates["body.input.project.weight"] == rates["body.times.project.weight"] == 0.125
    assert rate_of[id(offsets.learned)] == 0.125
    assert groups[0]["lr"] == 1.0, "the rate that is logged is the head's"
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay_of[id(model.head.classes.weight)] == 0.01
    assert decay_of[id(model.body.norm.weight)] == 0.0
    assert decay_of[id(offsets.learned)] == 0.01, "an offset decays towards the text's vector"
    groups = parameter_groups(model, vectors, learning_rate=1.0, weight_decay=0.01, layer_decay=1.0)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay_of[id(vectors.learned)] == 0.0, "a whole vector would decay to nothing"
    with pytest.raises(UserError, match=r"trainer\.layer_decay=1\.5"):
        TrainerSettings(layer_decay=1.5)
