"""Generation: a planted rule is continued exactly, with and without the cache; futures end, are MEDS, and tell risks."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
from meds import DataSchema

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import Batch, BatchDataset
from ehr_embed.data.samples import build_samples
from ehr_embed.data.store import STATIC_TIME, EventStore, SplitEvents
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.inference.trajectories import TRAJECTORY_SCHEMA, as_events
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.models.heads import EventHead, time_bin
from ehr_embed.models.sampling import (
    Sampling,
    Trajectories,
    _draw_event,
    _Sequences,
    check_generates,
    draw_gap,
    draw_token,
    generate,
)
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.zero_shot import ZeroShot
from tests.helpers.planted_events import WAYS, planted, pretrained
from tests.helpers.prompts import prompts
from tests.helpers.refusals import refused

__all__ = ["planted", "pretrained"]  # the fixtures


def codes_of(store: EventStore, trajectories: Trajectories) -> list[list[str]]:
    names = store.vocabulary.tokens["str"].to_list()
    n = int(trajectories.prompt.max()) + 1
    return [[names[t] for t in trajectories.token_ids[trajectories.prompt == i].tolist()] for i in range(n)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_planted_sequence_is_continued_exactly(planted, pretrained, use_cache):
    store, root = planted
    model, embedding, _ = pretrained
    batch, samples = prompts(planted, max_length=6)
    sampling = Sampling(temperature=0, horizon_days=1e4, max_new_events=10)
    found = codes_of(store, generate(model, embedding, batch, sampling, torch.Generator(), use_cache=use_cache))
    held_out = pl.read_parquet(root / "data" / "held_out" / "0.parquet")
    for subject, codes in zip(samples.subject_ids.tolist(), found, strict=True):
        record = held_out.filter(subject_id=subject)["code"].to_list()
        way = WAYS[record[0]]
        start = way.index(record[-1]) + 1
        assert codes == [way[(start + i) % 4] for i in range(10)]


def test_cache_and_full_pass_agree_when_sampling(planted, pretrained):
    model, embedding, _ = pretrained
    batch, _ = prompts(planted)
    sampling = Sampling(n_samples=3, temperature=2.0, horizon_days=30, max_new_events=12)
    drawn = [
        generate(model, embedding, batch, sampling, torch.Generator().manual_seed(s), use_cache=c)
        for s, c in ((1, True), (1, False), (2, True))
    ]
    assert torch.equal(drawn[0].token_ids, drawn[1].token_ids)
    torch.testing.assert_close(drawn[0].days, drawn[1].days)
    torch.testing.assert_close(drawn[0].values, drawn[1].values, equal_nan=True)
    assert drawn[0].token_ids.tolist() != drawn[2].token_ids.tolist()


def test_a_future_ends_at_horizon_stop_code_or_length(planted, pretrained):
    store, _ = planted
    model, embedding, _ = pretrained
    batch, samples = prompts(planted)
    greedy = {"temperature": 0, "max_new_events": 16}
    far = generate(model, embedding, batch, Sampling(**greedy, horizon_days=1e4), torch.Generator())
    assert len(far.days) == 16 * len(samples)
    assert far.is_cut.all()
    near = generate(model, embedding, batch, Sampling(**greedy, horizon_days=3.5), torch.Generator())
    assert near.days.max() <= 3.5
    assert not near.is_cut.any()
    assert (near.days > 0).all(), "an event at or before the prediction time would be no future"
    token = store.vocabulary.tokens["str"].to_list().index("C")
    stopped = codes_of(
        store, generate(model, embedding, batch, Sampling(**greedy, stop_tokens=(token,)), torch.Generator())
    )
    assert all(codes[-1] == "C" and "C" not in codes[:-1] for codes in stopped)


def test_the_silence_before_the_prediction_time_counts():
    wait = torch.tensor([0.0, 50.0], dtype=torch.float64)
    scores = torch.zeros(2, 64)
    scores[:, time_bin(torch.tensor(1.0))] = 9
    scores[:, time_bin(torch.tensor(100.0))] = 5
    first = draw_gap(scores, wait, Sampling(temperature=0), torch.Generator())
    assert 0.5 < first[0] < 1.5
    assert first[1] > 90
    assert 0.5 < draw_gap(scores, None, Sampling(temperature=0), torch.Generator())[1] < 1.5


def test_a_gap_beyond_the_silence_has_the_distribution_it_would_have_had():
    """Rejection is the oracle: draws without a wait, those above it kept."""
    generator = torch.Generator().manual_seed(0)
    scores, wait = torch.randn(1, 64, generator=generator), 400.0
    many = scores.expand(200_000, 64)
    free = draw_gap(many, None, Sampling(), generator)
    expected = free[free > wait].log()
    found = draw_gap(many[:40_000], torch.full((40_000,), wait, dtype=torch.float64), Sampling(), generator).log()
    assert (found > math.log(wait)).all()
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert found.quantile(share).item() == pytest.approx(expected.quantile(share).item(), abs=0.05)


def two_tokens() -> tuple[Decoder, EventEmbedding]:
    """A decoder for which tokens 2 and 3 are equally probable, 2 with no gap and 3 after 70 days, whatever came before."""
    model = Decoder(
        embedding_dim=2, vocab_size=4, model_dim=4, n_heads=2, n_layers=1, max_length=8, vocabulary_head="linear"
    )
    head = model.head
    assert isinstance(head, EventHead)
    with torch.no_grad():
        for parameter in (*model.body.norm.parameters(), *head.parameters()):
            parameter.zero_()
        head.given[0].weight.fill_(1.0)
        head.given[1].weight[0], head.given[1].weight[1] = torch.tensor([10.0, -10.0]), torch.tensor([-10.0, 10.0])
        head.time[1].weight[0, 0] = 5.0
        head.time[1].weight[time_bin(torch.tensor(70.0)), 1] = 5.0
    return model.eval(), EventEmbedding(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))


def silent_prompts(silence_days: float) -> Batch:
    """Two records of token 2 with a day between their events, silent for so long at the prediction time."""
    days, microseconds = np.arange(3), 86_400_000_000
    times = np.tile(days * microseconds, 2)
    events = SplitEvents(
        np.full(6, 2, np.int32), times, None, np.arange(2), np.array([0, 3, 6]), np.full(2, STATIC_TIME)
    )
    when = pl.DataFrame({"subject_id": [0, 1], "prediction_time": [int((2 + silence_days) * microseconds)] * 2})
    when = when.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))
    samples = build_samples(events, when, np.zeros(2, np.int64), max_length=4)
    return BatchDataset(events, samples)[np.arange(2)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_after_a_silence_no_token_comes_first_whose_time_has_passed(use_cache):
    model, embedding = two_tokens()
    sampling = Sampling(n_samples=500, max_new_events=1, horizon_days=1000)
    drawn = generate(
        model, embedding, silent_prompts(30), sampling, torch.Generator().manual_seed(0), use_cache=use_cache
    )
    assert drawn.token_ids.tolist() == [3] * 1000  # p(token) alone gives 2 half of the draws
    gaps = 30 + drawn.days
    assert ((gaps > 50) & (gaps < 95)).all()  # the bin of 70 days
    greedy = Sampling(temperature=0, max_new_events=1, horizon_days=1000)
    assert generate(model, embedding, silent_prompts(30), greedy, torch.Generator()).token_ids.tolist() == [3, 3]


@pytest.mark.parametrize("kind", ["text_tied", "linear"])
def test_the_first_event_has_the_distribution_that_rejection_gives(kind, monkeypatch):
    """The oracle draws token and gap without knowing of the silence, and keeps those whose gap exceeds it."""
    torch.manual_seed(1)
    n_tokens, silence = 9, 40.0
    model = Decoder(
        embedding_dim=6, vocab_size=n_tokens, model_dim=8, n_heads=2, n_layers=1, max_length=8, vocabulary_head=kind
    ).eval()
    head = model.head
    assert isinstance(head, EventHead)
    with torch.no_grad():
        head.given[1].weight.mul_(8)
        head.time[1].weight.mul_(8)  # gaps depend on the token
    embedding, batch = EventEmbedding(torch.randn(n_tokens, 6)), silent_prompts(silence)
    monkeypatch.setattr("ehr_embed.models.heads.LOGITS_AT_ONCE", 500)  # blocks of a few tokens
    sampling = Sampling(n_samples=20_000, max_new_events=1, horizon_days=1e6)
    generator = torch.Generator().manual_seed(0)
    found = generate(model, embedding, batch, sampling, generator)

    with torch.inference_mode():
        hidden_D = model.hidden(embedding.inputs(batch))[0, 2]
        many_ND = hidden_D.expand(200_000, -1)
        token_N = draw_token(head.logits(many_ND, embedding.table), Sampling(), generator)
        time_NQ, _ = head.time_and_value(many_ND, embedding(token_N))
    gap_N = draw_gap(time_NQ, None, Sampling(), generator)
    is_kept = gap_N > silence
    assert 0.02 < is_kept.float().mean() < 0.8

    def shares(token_ids: torch.Tensor) -> torch.Tensor:
        return torch.bincount(token_ids, minlength=n_tokens) / len(token_ids)

    expected = shares(token_N[is_kept])
    assert (expected - shares(token_N)).abs().max() > 0.05, "the silence tells something"
    torch.testing.assert_close(shares(found.token_ids), expected, atol=0.012, rtol=0)
    for share in (0.25, 0.5, 0.75):
        assert (found.days + silence).log().quantile(share).item() == pytest.approx(
            gap_N[is_kept].log().quantile(share).item(), abs=0.08
        )


@pytest.mark.parametrize("n_samples", [1, 3])
def test_no_event_of_a_future_waits_for_the_device(planted, pretrained, n_samples):
    """Tensors without data: whoever reads a number gets an error; prompts, draws and the cache read none."""
    meta = torch.device("meta")
    model, embedding = (copy.deepcopy(part).to(meta) for part in pretrained[:2])
    sampling = Sampling(n_samples=n_samples, max_new_events=4, top_k=2, top_p=0.9)
    batch, generator = prompts(planted)[0].to(meta), cast("torch.Generator", None)
    head = model.head
    with torch.inference_mode():
        weights = head.token_weights(embedding.table)
        sequences = _Sequences(model, embedding, batch, sampling, use_cache=True)
        for number in range(3):
            _draw_event(sequences, head, embedding, weights, sampling, generator, is_first=number == 0)
            sequences.go_on(sequences.goes_on_R & (sequences.days_R <= 9))
    assert sequences.hidden().shape == (len(batch.labels) * n_samples, weights[0].shape[1])


def test_futures_that_have_ended_are_no_longer_computed(planted, pretrained, monkeypatch):
    """Half of the futures or more are dropped once they have ended, which changes no event of the others."""
    store, _ = planted
    model, embedding, _ = pretrained
    stop = store.vocabulary.tokens["str"].to_list().index("C")
    sampling = Sampling(n_samples=4, temperature=0, horizon_days=1e4, max_new_events=12, stop_tokens=(stop,))
    drop, n_computed, found = _Sequences.drop_ended, [0, 0], []
    for way in (0, 1):

        def counted(sequences: _Sequences, way: int = way) -> bool:
            n_computed[way] += len(sequences.goes_on_R)
            return drop(sequences) if way == 0 else bool(sequences.goes_on_R.any())

        monkeypatch.setattr(_Sequences, "drop_ended", counted)
        found.append(generate(model, embedding, prompts(planted)[0], sampling, torch.Generator()))
    assert n_computed[0] < n_computed[1]
    for name in ("token_ids", "prompt", "sample", "days", "is_cut"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), msg=name)


def test_with_autocast_the_body_is_in_half_precision_and_the_head_is_not(planted, pretrained, monkeypatch):
    """Eight bits of a score would make many tokens equally probable."""
    model, embedding, _ = pretrained
    sampling, dtypes = Sampling(n_samples=2, max_new_events=3), set()

    def watched(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        dtypes.add(logits.dtype)
        return draw_token(logits, *others)

    def watched_gap(scores: torch.Tensor, *others: Any) -> torch.Tensor:
        dtypes.add(scores.dtype)
        return draw_gap(scores, *others)

    caches = []
    new_cache = Decoder.new_cache
    monkeypatch.setattr(Decoder, "new_cache", lambda *args: caches.append(new_cache(*args)) or caches[-1])
    monkeypatch.setattr("ehr_embed.models.sampling.draw_token", watched)
    monkeypatch.setattr("ehr_embed.models.sampling.draw_gap", watched_gap)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, embedding, prompts(planted)[0], sampling, torch.Generator().manual_seed(0))
    assert dtypes == {torch.float32}
    assert {x.dtype for pair in (*caches[0].prompts, *caches[0].own) for x in pair} == {torch.bfloat16}


def test_top_k_and_top_p_leave_the_rest_out():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]]).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(draw_token(scores, Sampling(temperature=3), generator).tolist()) == {0, 1, 2, 3}
    assert set(draw_token(scores, Sampling(temperature=3, top_k=2), generator).tolist()) == {0, 1}
    share = scores[0].softmax(-1).cumsum(0)
    assert set(draw_token(scores, Sampling(top_p=float(share[1]) - 0.01), generator).tolist()) == {0, 1}
    assert set(draw_token(scores, Sampling(top_p=0.01), generator).tolist()) == {0}
    drawn = draw_token(scores, Sampling(), generator)
    assert (drawn == 0).float().mean().item() == pytest.approx(float(scores[0].softmax(-1)[0]), abs=0.04)


def test_futures_are_meds_events(planted, pretrained):
    store, _ = planted
    model, embedding, _ = pretrained
    batch, samples = prompts(planted)
    drawn = generate(model, embedding, batch, Sampling(n_samples=2, max_new_events=8), torch.Generator().manual_seed(0))
    frame = as_events(drawn, samples, store.vocabulary)
    one = frame.filter(sample=1).drop("sample")
    DataSchema.validate(DataSchema.align(one.to_arrow()))
    assert dict(one.schema) == TRAJECTORY_SCHEMA
    assert (one["time"] > one["prediction_time"]).all()
    assert one["subject_id"].rle().struct.field("value").is_unique().all(), "a subject is contiguous"
    for (_, _), future in one.group_by("subject_id", "prediction_time"):
        assert future["time"].is_sorted()
    assert frame["numeric_value"].drop_nulls().is_between(2, 4).all()
    assert set(frame["code"]) <= {"A", "B", "C", "D"}


def test_what_cannot_generate_is_refused(planted, pretrained):
    model, embedding, _ = pretrained
    batch, _ = prompts(planted)
    small = {"embedding_dim": 12, "model_dim": 16, "n_heads": 2, "n_layers": 1}
    with refused("Encoder", "model=decoder task=next_event"):
        check_generates(Encoder(**small, vocab_size=9))
    with pytest.raises(UserError, match="Generate from a run of task=next_event"):
        check_generates(Decoder(**small, num_classes=2))
    with refused("12 events", "max_new_events=30", "max_length=32"):
        generate(model, embedding, batch, Sampling(max_new_events=30), torch.Generator())
    for wrong, message in (
        ({"horizon_days": 0}, "horizon_days=0"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
    ):
        with pytest.raises(UserError, match=message):
            Sampling(**wrong)


def test_risks_from_futures_are_the_planted_outcome(planted, pretrained):
    store, root = planted
    model, embedding, trainer = pretrained
    task = ZeroShot(codes=["B"], n_samples=4, horizon_days=2.0, max_new_events=8, monitor="auroc")
    task.setup(store, root / "labels", 32)
    trainer.task = task
    outputs = trainer.predict(model, embedding, "held_out")
    metrics = task.evaluate("held_out", outputs, n_bootstrap=0)
    assert metrics["auroc"]["value"] > 0.95
    assert metrics["cut_share"] == 0
    assert np.array_equal(outputs, trainer.predict(model, embedding, "held_out")), "the seed repeats them"
    assert set(np.unique(outputs[:, 1] * 4)) <= {0, 1, 2, 3, 4}
    for nothing in ({}, {"codes": []}):
        with pytest.raises(UserError, match=r"task=zero_shot .*Type: task\.codes=\[CODE,CODE\]"):
            ZeroShot(**nothing)
    definition = root / "definition.yaml"
    definition.write_text("code_pattern: ^B$\n")
    by_file = ZeroShot(codes=[], definition=str(definition), max_new_events=8)
    by_file.setup(store, root / "labels", 32)
    assert torch.equal(by_file._tokens, task._tokens)
    wrong = ZeroShot(codes=["nowhere"])
    with pytest.raises(UserError, match=r"-32 events.*model\.max_length=32.*Type: a smaller max_new_events"):
        wrong.setup(store, root / "labels", 32)
    wrong = ZeroShot(codes=["nowhere"], max_new_events=8)
    with refused("code nowhere"):
        wrong.setup(store, root / "labels", 32)
    wrong = ZeroShot(text_pattern="nowhere", max_new_events=8)
    with refused("EventSet"):
        wrong.setup(store, root / "labels", 32)
    with refused("codes=B", "[B]"):
        ZeroShot(codes="B")


def test_many_events_a_day_are_reported_as_cut(planted, pretrained, caplog):
    store, root = planted
    model, embedding, trainer = pretrained
    before, cut = trainer.task, []
    for code in ("SEX//F", "B"):  # the first never follows, and the second follows soon
        trainer.task = task = ZeroShot(codes=[code], n_samples=2, horizon_days=30.0, max_new_events=4, monitor="auroc")
        task.setup(store, root / "labels", 32)
        found = task.evaluate("tuning", trainer.predict(model, embedding, "tuning"), n_bootstrap=0)
        cut.append(found["cut_share"])
    trainer.task = before
    assert cut[0] > 0.9
    assert cut[1] < 0.1, "a future ends with the event that is asked for"
    assert "of the futures were cut at task.max_new_events=4" in caplog.text


def test_offsets_count_wherever_the_vectors_do(pretrained, planted):
    """A text's vector and its offset are read, predicted and generated from as their sum."""
    (model, whole, _), task = pretrained, NextEvent()
    offsets = EventEmbedding(whole.table - 1, "residual")
    assert offsets.learned is not None
    torch.nn.init.ones_(offsets.learned)
    batch, _ = prompts(planted)
    sampling, drawn = Sampling(n_samples=2, max_new_events=6, horizon_days=100.0), []
    for embedding in (whole, offsets):
        inputs = task.inputs(embedding, batch, task.is_target(batch))
        with torch.inference_mode():
            scores = model(inputs)
        drawn.append((scores, generate(model, embedding, batch, sampling, torch.Generator().manual_seed(0))))
    torch.testing.assert_close(drawn[0][0], drawn[1][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(drawn[0][1].token_ids, drawn[1][1].token_ids)
