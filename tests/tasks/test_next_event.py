"""Tasks that predict events: targets, baselines, metrics; a planted rule is learned, continued exactly and judged from futures."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.bootstrap import SubjectBootstrap
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.models.heads import EventScores
from ehr_embed.tasks.event_outputs import Families, event_metrics, sum_by_sample
from ehr_embed.tasks.masked_event import MaskedEvent
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.ngrams import NgramCounts
from ehr_embed.tasks.protocol import check_causality
from tests.helpers.planted_events import WAYS, planted, pretrained, random_table, train  # noqa: F401 (fixtures)
from tests.helpers.refusals import refused


def test_the_planted_rule_is_learned_and_the_bigrams_are_beaten(pretrained):
    model, embedding, trainer = pretrained
    metrics = trainer.task.evaluate("held_out", trainer.predict(model, embedding, "held_out"), n_bootstrap=20)
    assert metrics["perplexity"]["value"] < 1.1
    assert metrics["perplexity"]["low"] <= metrics["perplexity"]["value"] <= metrics["perplexity"]["high"]
    assert metrics["top1_accuracy"]["value"] > 0.99
    baselines = trainer.task.baselines("held_out")
    assert baselines["bigram"]["perplexity"] > 1.5
    assert baselines["unigram"]["perplexity"] > 3.5
    assert metrics["by_family"].keys() == {"A", "B", "C", "D"}
    assert sum(family["n_events"] for family in metrics["by_family"].values()) == metrics["n_events"]
    assert metrics["time_loss"]["value"] < 0.1
    assert metrics["value_loss"]["value"] < 0.5


def test_packed_rows_teach_the_same_rule(planted, tmp_path):
    model, embedding, trainer = train(planted[0], tmp_path / "packed", NextEvent(windows="packed"))
    metrics = trainer.task.evaluate("held_out", trainer.predict(model, embedding, "held_out"), n_bootstrap=0)
    assert metrics["perplexity"]["value"] < 1.2


def test_a_masked_event_is_told_by_its_neighbours(planted, tmp_path):
    task, encoder = MaskedEvent(mask_share=0.3), partial(Encoder, positions="rope")
    model, embedding, trainer = train(planted[0], tmp_path / "masked", task, encoder, epochs=60, rate=3e-3)
    metrics = trainer.task.evaluate("held_out", trainer.predict(model, embedding, "held_out"), n_bootstrap=0)
    assert metrics["top1_accuracy"]["value"] > 0.8
    assert metrics["top1_accuracy"]["value"] > trainer.task.baselines("held_out")["bigram"]["top1_accuracy"]


def test_a_model_that_sees_the_answer_is_refused():
    small = {"embedding_dim": 12, "model_dim": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 9}
    with refused("Encoder (is_causal=False)", "model=decoder"):
        check_causality(NextEvent(), Encoder(**small))
    with pytest.raises(UserError, match=r"Decoder \(is_causal=True\).*Type: model=encoder"):
        check_causality(MaskedEvent(), Decoder(**small))
    with pytest.raises(UserError, match=r"Linear \(is_causal=None\)"):
        check_causality(NextEvent(), torch.nn.Linear(1, 1))
    check_causality(NextEvent(), Decoder(**small))
    check_causality(MaskedEvent(), Encoder(**small))


def test_baselines_equal_counting_by_hand(planted):
    store, _ = planted
    events, n = store.split("train"), len(store.vocabulary)
    ngrams = NgramCounts.fit(events, n)
    static = {store.vocabulary.tokens["str"].to_list().index(sex) for sex in WAYS}
    pairs: Counter[tuple[int, int]] = Counter()
    ones: Counter[int] = Counter()
    for first, last in zip(events.offsets[:-1], events.offsets[1:], strict=True):
        record = events.token_ids[first:last].tolist()
        ones.update(token for token in record if token not in static)
        pairs.update((a, b) for a, b in pairwise(record) if b not in static)
    uni = {b: (ones[b] + 1) / (sum(ones.values()) + n - 2) for b in range(2, n)}
    assert ngrams.unigram_probabilities.sum() == pytest.approx(1)
    for a in range(2, n):
        total = sum(count for (before, _), count in pairs.items() if before == a)
        kinds = sum(1 for before, _ in pairs if before == a)
        for b in range(2, n):
            expected = (pairs[a, b] + kinds * uni[b]) / (total + kinds) if total else uni[b]
            assert ngrams.bigram_probabilities(a)[b] == pytest.approx(expected)
        assert ngrams.bigram_probabilities(a).sum() == pytest.approx(1)
    previous, targets = np.array([2, 2, 3]), np.array([4, 5, 2])
    scores = ngrams.score(previous * n + targets, np.ones(3, np.int64))["bigram"]
    by_hand = [ngrams.bigram_probabilities(a) for a in previous]
    assert scores["loss"] == pytest.approx(-np.mean([math.log(p[t]) for p, t in zip(by_hand, targets, strict=True)]))
    ranks = [(p >= p[t]).sum() - 1 for p, t in zip(by_hand, targets, strict=True)]
    assert scores["top1_accuracy"] == pytest.approx(np.mean([rank < 1 for rank in ranks]))


def test_metrics_equal_sums_by_hand(planted):
    families = Families.of(planted[0].vocabulary)
    generator = torch.Generator().manual_seed(0)
    is_target = torch.rand(6, 5, generator=generator) < 0.6
    n = int(is_target.sum())
    scores = EventScores(
        nll=torch.rand(n, generator=generator) * 3,
        rank=torch.randint(0, 14, (n,), generator=generator),
        time_nll=torch.rand(n, generator=generator),
        value_nll=None,
    )
    targets = torch.randint(2, len(planted[0].vocabulary), is_target.shape, generator=generator) * is_target
    outputs = sum_by_sample(scores, targets, families).numpy()
    subjects = np.array([0, 0, 1, 1, 2, 3])
    metrics = event_metrics(outputs, families, subject_ids=subjects, n_bootstrap=30)
    assert scores.rank is not None
    assert metrics["loss"]["value"] == pytest.approx(float(scores.nll.mean()), rel=1e-6)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(float(scores.nll.mean())), rel=1e-6)
    assert metrics["top5_accuracy"]["value"] == pytest.approx(float((scores.rank < 5).float().mean()))
    assert metrics["time_loss"]["value"] == pytest.approx(float(scores.time_nll.mean()), rel=1e-6)
    assert "value_loss" not in metrics
    assert metrics["n_events"] == n
    # The interval redraws subjects: the ratio of the sums of a draw, not the mean of the samples' ratios.
    bootstrap = SubjectBootstrap.of(subjects, n_samples=6, n_bootstrap=30, seed=0)
    sample = is_target.nonzero()[:, 0].numpy()
    weights = np.concatenate(list(bootstrap.weights()))[1:, subjects][:, sample]
    losses = (weights @ scores.nll.numpy()) / weights.sum(axis=1)
    assert metrics["loss"]["low"] == pytest.approx(np.nanquantile(losses, 0.025), rel=1e-5)


def test_targets_by_hand(planted):
    store, _ = planted
    task = NextEvent()
    task.setup(store, Path(), 32)
    batch = task.dataset("tuning")[np.arange(3)]
    inputs = task.inputs(EventEmbedding(torch.zeros(len(store.vocabulary), 4)), batch, task.is_target(batch))
    for row in range(3):
        tokens = batch.token_ids[row][batch.is_event[row]].tolist()
        assert inputs["targets"][row][: len(tokens)].tolist() == [*tokens[1:], 0], (
            "the static event's next one included"
        )
    has_target = inputs["targets"] > 0
    assert inputs["target_gap_days"][has_target].unique().tolist() == [0.0, 1.0]
    assert torch.isfinite(inputs["target_values"][has_target]).all()


def test_there_is_room_for_all_targets_of_a_task_of_ones_own(planted):
    """On a GPU the targets are looked for in a bounded number of places, and the bound of random masks holds for those only."""

    class MasksAll(MaskedEvent):
        def is_target(self, batch, *, is_training=False):
            return batch.is_next

    found = {}
    for kind in (MaskedEvent, MasksAll):
        task = kind(mask_share=0.05)
        task.setup(planted[0], Path(), 32)
        dataset = task.dataset("tuning")
        batch = dataset[np.arange(len(dataset))]
        targets = batch.token_ids * task.is_target(batch, is_training=True)
        places = task.target_places(batch, targets)
        assert set(targets.flatten().nonzero().flatten().tolist()) <= set(places.tolist())
        found[kind] = len(places)
    assert found[MaskedEvent] < found[MasksAll]


def test_a_blanked_event_is_gone_and_evaluation_does_not_depend_on_the_batch(planted):
    store, _ = planted
    task = MaskedEvent(mask_share=0.5)
    task.setup(store, Path(), 32)
    embedding = EventEmbedding(random_table(store, 4))
    dataset = task.dataset("tuning")
    batch = dataset[np.arange(6)]
    is_target = task.is_target(batch)
    inputs = task.inputs(embedding, batch, is_target)
    assert torch.equal(inputs["targets"] > 0, is_target)
    vectors = inputs["rows"][inputs["row_ids"]]
    assert 0.3 < (is_target.sum() / batch.is_next.sum()).item() < 0.7
    assert (vectors[is_target] == 0).all()
    assert inputs["values"][is_target].isnan().all()
    assert (vectors[batch.is_event & ~is_target] != 0).any(-1).all()
    alone = task.is_target(dataset[np.array([4])])[0]
    n = int(batch.is_event[4].sum())
    assert alone[:n].tolist() == is_target[4, :n].tolist()
    drawn = [task.is_target(batch, is_training=True) for _ in range(2)]
    assert (drawn[0] != drawn[1]).any(), "training draws anew"


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match=r"unknown task\.windows 'rando': did you mean 'random'"):
        NextEvent(windows="rando")
    with pytest.raises(UserError, match=r"unknown task\.monitor 'auroc'"):
        NextEvent(monitor="auroc")
    with pytest.raises(UserError, match=r"task\.windows=packed .*Type: task\.windows=random"):
        MaskedEvent(windows="packed")
    with pytest.raises(UserError, match=r"task\.mask_share=1"):
        MaskedEvent(mask_share=1.0)
