"""Logits are float32 whatever the layers are: different records have different probabilities, and `predict` finds the run's."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.experiment.run import run
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.heads import EventHead
from ehr_embed.models.sampling import Sampling, generate
from ehr_embed.predict import predict
from ehr_embed.tasks import protocol
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.training.precision import autocast_of_run
from tests.helpers.configs import composed
from tests.helpers.planted_events import planted
from tests.helpers.prompts import prompts
from tests.helpers.small_meds import Event, write_meds

__all__ = ["planted"]  # the fixture
MODELS = ("encoder_small", "decoder_small", "gru", "mean_pool", "code_encoder")
N = 300


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Records that all differ, and labels that tell little: probabilities lie close together."""
    rng, labels = np.random.default_rng(0), []
    splits: dict[str, list[Event]] = {}
    for number, split in enumerate(("train", "tuning", "held_out")):
        n, splits[split] = (N if split == "held_out" else 40), []
        for subject in range(1000 * number, 1000 * number + n):
            codes = rng.integers(0, 40, rng.integers(20, 30))
            splits[split] += [(subject, float(day), f"N{code}", None) for day, code in enumerate(codes)]
            labels.append((subject, 99.0, bool(rng.random() < 0.4)))
    return write_meds(tmp_path_factory.mktemp("precise") / "set", splits, labels={"case": labels})


@pytest.mark.parametrize("model", MODELS)
def test_each_record_has_a_probability_of_its_own_and_predict_finds_it(dataset, model):
    run_dir = dataset.parent / model
    place = (f"data.root={dataset}", f"cache_dir={dataset.parent / 'cache'}", f"run_dir={run_dir}")
    short = ("trainer.epochs=1", "trainer.n_bootstrap=0", "trainer.precision=bf16-mixed", "trainer.accelerator=cpu")
    run(composed("data=meds", *place, f"model={model}", "embedder=hashing", *short))
    name = "predicted_boolean_probability"
    written = pl.read_parquet(run_dir / "predictions" / "held_out.parquet")[name].to_numpy()
    assert len(np.unique(written)) == N
    given = (f"run={run_dir}", f"data.root={dataset}", "task.labels=case", "split=held_out")
    found = pl.read_parquet(predict(composed(*given, f"output={run_dir / 'p.parquet'}", name="predict")))
    np.testing.assert_allclose(found[name].to_numpy(), written, atol=1e-6)


def test_token_logits_are_float32_in_evaluation_and_generation(planted, monkeypatch):
    store, _ = planted
    torch.manual_seed(0)
    sizes = {"embedding_dim": 12, "has_values": True, **{"vocab_size": len(store.vocabulary)}}
    model = Decoder(**sizes, model_dim=32, n_heads=2, n_layers=1, max_length=32).eval()
    embedding, (batch, _) = EventEmbedding(torch.randn(len(store.vocabulary), 12)), prompts(planted)
    seen: list[Tensor] = []

    def kept(logits_RV: Tensor, *_: object) -> Tensor:
        seen.append(logits_RV)
        return logits_RV.argmax(-1)

    monkeypatch.setattr("ehr_embed.models.sampling.draw_token", kept)
    task = NextEvent()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = embedding.inputs(batch)
        seen.append(model(inputs | {"table": embedding.table}))
        generate(model, embedding, batch, Sampling(max_new_events=2), torch.Generator())
        targets = task.inputs(embedding, batch, task.is_target(batch))
        scores = model(targets)
        assert isinstance(model.head, EventHead)
        time_NQ, value = model.head.time_and_value(torch.randn(5, 32).bfloat16(), torch.randn(5, 12))
    assert value is not None
    assert scores.value_nll is not None
    assert len(seen) == 3
    for x in (*seen, scores.nll, scores.time_nll, scores.value_nll, time_NQ, value.mean):
        finite = x[x.isfinite()]
        assert x.dtype == torch.float32
        assert (finite != finite.bfloat16().float()).float().mean() > 0.9  # not merely cast afterwards


class Foreign(nn.Module):
    """A model of somebody's own whose logits come out as autocast makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(3, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.classes(inputs["x"])


def test_rounded_logits_of_a_foreign_model_are_said_once(caplog):
    protocol.warn_of_rounded.cache_clear()
    model, inputs = Foreign(), {"x": torch.randn(4, 3)}
    protocol.logits_of(model, inputs)
    assert not caplog.records
    with torch.autocast("cpu", dtype=torch.bfloat16):
        protocol.logits_of(model, inputs)
        protocol.logits_of(model, inputs)
    assert len(caplog.records) == 1
    assert "Foreign gives its logits in bfloat16" in caplog.text
    assert "ehr_embed.api.LogitLinear" in caplog.text


def test_a_run_predicts_in_its_own_precision():
    cpu = torch.device("cpu")
    for wanted, used, expected in (
        ("bf16-mixed", "bf16-mixed", True),
        ("bf16-mixed", None, True),
        ("32-true", "32-true", False),
        ("auto", "32-true", False),
        ("16-mixed", "16-mixed", False),  # a GPU's alone
    ):
        with autocast_of_run(wanted, used, cpu):
            assert torch.is_autocast_enabled("cpu") == expected, (wanted, used)
