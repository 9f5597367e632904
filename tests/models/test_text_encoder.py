"""The text-based model: records written out by hand and in bulk, what learns, and a finished run on texts it never saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from omegaconf import DictConfig
from transformers import AutoModel, AutoTokenizer, BertConfig, GPT2Config, ModernBertConfig

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.core.pretrained_weights import local_folder
from ehr_embed.data.vocabulary import Vocabulary, VocabularySettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.experiment.run import run
from ehr_embed.models.record_text import GAPS, RecordText, gap_number
from ehr_embed.models.text_encoder import TextEncoder
from ehr_embed.training.optimizer import parameter_groups
from tests.helpers.configs import composed
from tests.helpers.homonyms import write_homonyms
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_labels, write_meds

TEXTS = ["", "Unknown event", "Female", "Fever", "Heart rate, beats per minute: high (8th of 10)", "Cough"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(local_folder("bundled", None, key="model.backbone")))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, tokenizer) -> str:
    """A BERT of two narrow layers with random weights, in a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=128)  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def vocabulary(texts: list[str], values: str = "bins") -> Vocabulary:
    tokens = pl.DataFrame({"token": range(len(texts)), "str": texts, "text": texts, "count": [0] * len(texts)})
    codes: dict[str, Any] = {"code": pl.String, "plain_token": pl.Int32, "bin_token": pl.Int32}
    return Vocabulary(VocabularySettings(values=values), tokens, pl.DataFrame(schema=codes), {})


def encoder(backbone: str, **options: Any) -> TextEncoder:
    torch.manual_seed(0)
    model = TextEncoder(
        **{"embedding_dim": 4, "num_classes": 2, "backbone": backbone, "max_pieces": 64, "times": False} | options
    )
    model.set_vocabulary(vocabulary(TEXTS))
    return model.eval()


def written(
    tokenizer, events: list[list[int]], *, max_pieces: int = 64, times: bool = False, **inputs: Any
) -> list[str]:
    """Records of token ids as text again, without padding."""
    writer = RecordText(tokenizer, max_pieces=max_pieces, times=times)
    writer.set_texts(TEXTS)
    given = {"token_ids": torch.tensor(events, dtype=torch.int32)} | {k: torch.tensor(v) for k, v in inputs.items()}
    pieces_BL, is_piece_BL = writer(given)
    assert pieces_BL.shape[1] % 8 == 0
    assert (pieces_BL[~is_piece_BL] == tokenizer.pad_token_id).all()
    return [tokenizer.decode(row[keep]) for row, keep in zip(pieces_BL, is_piece_BL, strict=True)]


BACKBONES = {
    "bert": BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=128
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128),
    "modernbert": ModernBertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=128,
        global_attn_every_n_layers=3, local_attention=4, pad_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_a_gpu_gives_a_backbone_the_attention_that_a_cpu_gives_it(name, tokenizer, tmp_path, monkeypatch):
    """A causal backbone stays causal, and a layer that sees the neighbours only goes on to do so."""
    torch.manual_seed(0)
    BACKBONES[name].vocab_size = len(tokenizer)
    AutoModel.from_config(BACKBONES[name]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, found = encoder(str(tmp_path)), []
    assert not model.learns_all
    given = {"token_ids": torch.tensor([[2, 4, 5, 4, 3], [5, 3, 0, 0, 0]], dtype=torch.int32)}
    for counts in (True, False):
        monkeypatch.setattr("ehr_embed.models.text_encoder.reads_freely", lambda device, counts=counts: counts)
        found.append(model(given))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_a_record_is_the_texts_of_its_events_in_order(tokenizer):
    assert written(tokenizer, [[2, 4, 1], [5, 0, 0]]) == [
        "[CLS] female ; heart rate, beats per minute : high ( 8th of 10 ) ; unknown event ; [SEP]",
        "[CLS] cough ; [SEP]",
    ]


def test_time_stands_between_events_from_a_day_on(tokenizer):
    gaps = [[0.0, 0.5, 3.2, 800.0]]
    assert written(tokenizer, [[2, 3, 5, 3]], times=True, gap_days=gaps) == [
        "[CLS] female ; fever ; 3 days later : cough ; 2 years later : fever ; [SEP]"
    ]
    numbers = gap_number(torch.linspace(0, 60_000, 100_001))
    assert (numbers.diff() >= 0).all(), "a longer gap is never written as a shorter one"
    assert numbers.unique().tolist() == list(range(len(GAPS)))


def test_beyond_the_budget_static_events_and_the_last_ones_stay_whole(tokenizer):
    events, static = [[2, 3, 4, 5, 3]], [[True, False, False, False, False]]
    # "female ;" takes 2 pieces, "fever ;" and "cough ;" too, the heart rate 14; two more are special.
    assert written(tokenizer, events, max_pieces=8, is_static=static) == ["[CLS] female ; cough ; fever ; [SEP]"]
    assert written(tokenizer, events, max_pieces=8) == ["[CLS] cough ; fever ; [SEP]"]
    assert written(tokenizer, [[4]], max_pieces=8) == ["[CLS] heart rate, beats per minute [SEP]"], "one text too long"


def test_the_gathers_write_what_a_loop_writes(tokenizer):
    rng = np.random.default_rng(0)
    events = rng.integers(1, len(TEXTS), (20, 12)) * (np.arange(12) < rng.integers(1, 13, 20)[:, None])
    gaps = rng.exponential(5.0, (20, 12)).astype(np.float32)
    static = np.arange(12) < rng.integers(0, 3, 20)[:, None]
    found = written(
        tokenizer, events.tolist(), max_pieces=40, times=True, gap_days=gaps.tolist(), is_static=static.tolist()
    )
    for row in range(20):
        parts = [
            tokenizer(
                f" {GAPS[int(gap_number(torch.tensor(gap)))]} {TEXTS[token]};", add_special_tokens=False
            ).input_ids
            for token, gap in zip(events[row], gaps[row], strict=True)
            if token
        ]
        n_static = int(static[row, : len(parts)].sum())
        kept = parts[:n_static]
        timed: list[list[int]] = []
        for part in reversed(parts[n_static:]):
            if sum(map(len, [*kept, *timed, part])) > 38:
                break
            timed.insert(0, part)
        pieces = [
            tokenizer.cls_token_id,
            *(piece for part in [*kept, *timed] for piece in part),
            tokenizer.sep_token_id,
        ]
        assert found[row] == tokenizer.decode(pieces), row


def test_padding_and_neighbours_change_nothing(backbone):
    model = encoder(backbone, times=True)
    token_ids, gaps = torch.tensor([[2, 3, 5, 0, 0], [4, 4, 4, 4, 5]]), torch.rand(2, 5) * 9
    both = model({"token_ids": token_ids, "gap_days": gaps})
    alone = model({"token_ids": token_ids[:1, :3], "gap_days": gaps[:1, :3]})
    torch.testing.assert_close(both[:1], alone)
    torch.testing.assert_close(model({"token_ids": token_ids.flip(0), "gap_days": gaps.flip(0)}), both.flip(0))
    assert not torch.allclose(both[0], both[1], atol=1e-4)


def test_another_vocabulary_is_read_at_once(backbone):
    model = encoder(backbone)
    cough = model({"token_ids": torch.tensor([[5]])})
    assert "text.texts" not in model.state_dict(), "weights do not depend on the vocabulary"
    model.set_vocabulary(vocabulary(["", "Unknown event", "Cough"]))
    torch.testing.assert_close(model({"token_ids": torch.tensor([[2]])}), cough)


def test_the_head_and_lora_come_from_the_seed_and_the_backbone_from_its_file(backbone):
    pytest.importorskip("peft")
    one, same = encoder(backbone, lora_rank=2), encoder(backbone, lora_rank=2)
    torch.manual_seed(1)
    other = TextEncoder(embedding_dim=4, num_classes=2, backbone=backbone, max_pieces=64, lora_rank=2)
    for (name, p), q, r in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        is_new = "lora_A" in name or name.startswith("head.")
        assert torch.equal(p, r) != is_new, name


def test_lora_trains_its_updates_and_the_head_only(backbone):
    pytest.importorskip("peft")
    model = encoder(backbone, lora_rank=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 0.1 * sum(
        p.numel() for p in model.parameters()
    )


def groups_of(model: TextEncoder, **options: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    settings = {"learning_rate": 1.0, "weight_decay": 0.1, "layer_decay": 0.5} | options
    groups = parameter_groups(model, EventEmbedding(torch.eye(3)), **settings)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_layers_decay_as_those_of_other_models(backbone):
    found = groups_of(encoder(backbone))
    assert found["head.classes.weight"] == (1.0, 0.1)
    assert found["body.encoder.layer.1.output.dense.weight"] == (0.5, 0.1)
    assert found["body.encoder.layer.0.output.dense.bias"] == (0.25, 0.0)
    assert found["body.embeddings.word_embeddings.weight"] == (0.125, 0.1)
    frozen = encoder(backbone)
    frozen.body.requires_grad_(False)
    with refused("trainer.layer_decay=0.5", "TextEncoder", "trainer.layer_decay=1"):
        groups_of(frozen)
    assert set(groups_of(frozen, layer_decay=1.0)) == {"head.classes.weight", "head.classes.bias"}


def test_what_it_cannot_do_is_refused(backbone, monkeypatch, caplog):
    with pytest.raises(UserError, match=r"model=text_encoder predicts classes.*model=decoder.*model=encoder"):
        TextEncoder(embedding_dim=4, vocab_size=9, backbone=backbone)
    with pytest.raises(UserError, match=r"unknown model\.pooling 'max'.*cls, mean"):
        encoder(backbone, pooling="max")
    with pytest.raises(UserError, match=r"model\.max_pieces=256, but .* has 128 positions"):
        encoder(backbone, max_pieces=256)
    with pytest.raises(UserError, match=r"model\.max_pieces=4 .*16 word pieces"):
        encoder(backbone, max_pieces=4, times=True)
    with refused("model.backbone=a/b", "model.backbone=bundled"):
        encoder("a/b")
    with pytest.raises(UserError, match=r"Give the token ids of its vocabulary, or texts to ehr_embed\.load"):
        encoder(backbone)({"embeddings": torch.zeros(1, 2, 4), "padding_mask": torch.ones(1, 2, dtype=torch.bool)})
    with pytest.raises(UserError, match=r"Call set_vocabulary"):
        TextEncoder(embedding_dim=4, num_classes=2, backbone=backbone, max_pieces=64)(
            {"token_ids": torch.ones(1, 2), "gap_days": torch.ones(1, 2)}
        )
    encoder(backbone).set_vocabulary(vocabulary(TEXTS, "continuous"))
    assert "it sees no number" in caplog.text
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.lora_rank=2: peft .*Type: pip install"):
        encoder(backbone, lora_rank=2)


SMALL = (
    "pipeline=text_based", "model.max_pieces=64", "model.max_length=16", "trainer.epochs=2", "trainer.batch_size=8",
    "trainer.n_bootstrap=0", "trainer.learning_rate=1e-2", "trainer.warmup_steps=0", "trainer.accelerator=cpu",
    "task.labels=case", "task.monitor=auroc",
)  # fmt: skip


def config(folder: Path, backbone: str, name: str, *overrides: str) -> DictConfig:
    places = [f"data.root={folder / 'set'}", f"run_dir={folder / name}", f"cache_dir={folder / 'cache'}"]
    return composed("data=meds", *places, *SMALL, f"model.backbone={backbone}", *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, backbone) -> Path:
    """A folder with a dataset and a run in mixed precision, whose whole backbone was trained."""
    folder = tmp_path_factory.mktemp("text")
    write_homonyms(folder / "set")
    run(config(folder, backbone, "run", "trainer.precision=bf16-mixed"))
    return folder


def test_a_run_loads_again_and_reads_codes_and_texts_it_never_saw(folder, tmp_path):
    predictor = ehr_embed.load(folder / "run")
    expected = pl.read_parquet(folder / "run" / "predictions" / "held_out.parquet")["predicted_boolean_probability"]
    found = predictor.predict_proba(folder / "set", labels="case")["probability_true"]
    np.testing.assert_allclose(found, expected, atol=0.02)  # bfloat16 there, float32 here
    codes = [("NEW", "N2", None), ("STRANGE", "Something else entirely", None)]
    root = write_meds(
        tmp_path / "other",
        {"held_out": [(s, 0.0, code, None) for s, code in ((1, "NEW"), (2, "STRANGE"), (3, "N2"))]},
        codes=codes,
    )
    write_labels(root / "labels" / "x", [(s, 1.0, True) for s in (1, 2, 3)])
    new, strange, known = predictor.predict_proba(root, labels="x")["probability_true"]
    assert new == pytest.approx(known, abs=1e-6), "its text is one of the run's"
    assert strange != pytest.approx(known, abs=1e-4)
    by_text = predictor.predict_proba([["N2"], ["Something else entirely"]])[:, 1]
    np.testing.assert_allclose(by_text, [known, strange], atol=1e-6)
    again = predictor.predict_proba(folder / "set", labels="case")["probability_true"]
    assert again.equals(found), "the run's own vocabulary is in place again"
    with refused("TextEncoder", "Give texts, or the root of a MEDS dataset"):
        predictor.predict_proba(torch.zeros(3, predictor.run.embedding.table.shape[1]))


def test_freezing_the_body_leaves_the_backbone_as_published(folder, backbone):
    run(config(folder, backbone, "frozen", "trainer.freeze=body", "trainer.epochs=1"))
    published = AutoModel.from_pretrained(backbone).state_dict()
    for name, is_same in (("frozen", True), ("run", False)):
        state = torch.load(folder / name / "best_checkpoint.pt", weights_only=True)["model_state_dict"]
        body = {key.removeprefix("body."): value for key, value in state.items() if key.startswith("body.")}
        assert all(torch.equal(value, published[key]) for key, value in body.items()) == is_same


def test_token_vectors_that_nothing_reads_are_not_learned(folder, backbone):
    with refused("embedder.trainable=full", "TextEncoder"):
        run(config(folder, backbone, "refused", "embedder=learned"))
    assert not (folder / "refused").exists()


def test_a_fine_tuned_backbone_starts_another_task(folder, backbone):
    start = [f"init_from={folder / 'run'}", "trainer.freeze=body", "trainer.epochs=1", "task.shuffle_labels=1"]
    run(config(folder, backbone, "second", *start))
    first, second = (
        torch.load(folder / name / "best_checkpoint.pt", weights_only=True)["model_state_dict"]
        for name in ("run", "second")
    )
    assert all(torch.equal(second[key], first[key]) for key in first if key.startswith("body."))
    assert not torch.equal(second["head.classes.weight"], first["head.classes.weight"])


def test_a_lora_run_says_what_it_trained_and_loads_again(folder, backbone):
    pytest.importorskip("peft")
    run(config(folder, backbone, "lora", "model.lora_rank=2", "trainer.layer_decay=0.5"))
    facts = read_json(folder / "lora" / "metrics.json")["train"]
    assert 0 < facts["n_trained"] < 0.1 * facts["n_parameters"]
    assert facts["steps"] == 2 * 7, "50 subjects in batches of 8, two epochs"
    expected = pl.read_parquet(folder / "lora" / "predictions" / "held_out.parquet")["predicted_boolean_probability"]
    found = ehr_embed.load(folder / "lora").predict_proba(folder / "set", labels="case")["probability_true"]
    np.testing.assert_allclose(found, expected, atol=0.02)
