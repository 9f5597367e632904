"""code_tab: summaries are those of a loop, absent and new codes count as they should, both ways to sum agree."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.code_summaries import N_SUMMARIES
from ehr_embed.models.code_tab import MEMBER_WEIGHTS, CodeTab
from ehr_embed.models.members import MemberHead, loss_over_members
from ehr_embed.models.protocol import adapt, check_vectors
from ehr_embed.tasks.classification import Classification
from tests.helpers.code_batches import batch, vocabulary
from tests.helpers.host_waits import count_nothing

NAN = float("nan")
WIDTH = 12
RECORDS = [
    [(6, 23_000.0, NAN), (2, 5.0, 1.0), (3, 3.0, NAN), (2, 2.0, 3.0), (2, 1.0, NAN), (1, 0.5, NAN)],
    [(6, 15_000.0, NAN), (4, 2.0, -40.0)],
    [(3, 1.9, NAN), (3, 0.7, 0.25), (5, 0.0, 2.0)],
]


def counted(words: Vocabulary, known: int = 7) -> Vocabulary:
    """Codes before token `known` occur in train."""
    counts = pl.Series("count", [0, 0] + [9 * (token < known) for token in range(2, len(words))])
    return Vocabulary(words.settings, words.tokens.with_columns(counts), words.codes, {})


def inputs(records=RECORDS, width: int | None = None) -> dict[str, Tensor]:
    found = batch(records, width)
    rows = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3))
    ages = torch.tensor([next((days for token, days, _ in record if token == 6), NAN) for record in records])
    age_days = torch.where(found["padding_mask"], ages[:, None] - found["days"], NAN)
    return found | {"rows": rows, "row_ids": found["token_ids"], "age_days": age_days}


def train_records(n: int = 60) -> list:
    rng = np.random.default_rng(0)
    return [
        [(6, 20_000.0 + n, NAN)]
        + [(int(rng.integers(2, 6)), float(d), float(rng.normal())) for d in np.sort(rng.uniform(0, 3, 6))[::-1]]
        for n in range(n)
    ]


def build(*, known: int = 7, **options) -> CodeTab:
    torch.manual_seed(0)
    sizes = {"embedding_dim": WIDTH, "num_classes": 2, "model_dim": 16, "hidden_dim": 8, "n_gates": 3, "n_members": 4}
    model = CodeTab(**{**sizes, "has_values": True, **options}).eval()
    words = counted(vocabulary(), known)
    model.set_vocabulary(words)
    adapt(model, inputs()["rows"][:7], words)
    model.adapt_to_records([inputs(train_records())])
    return model


@pytest.mark.parametrize("options", [{}, {"member_weights": "text"}, {"feeds_absent": False}, {"age": False}])
def test_padding_neighbours_and_the_order_of_records_change_nothing(options):
    model = build(**options)
    together = model(inputs())
    assert together.shape == (3, 4, 2)
    assert together.std(1).min() > 0, "members differ"
    for row, record in enumerate(RECORDS):
        torch.testing.assert_close(model(inputs([record], 16)), together[row : row + 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(inputs(RECORDS[::-1])), together.flip(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("feeds_absent", [True, False])
@pytest.mark.parametrize("member_weights", MEMBER_WEIGHTS)
def test_code_by_code_and_from_what_occurs_the_sums_are_the_same(member_weights, feeds_absent, monkeypatch):
    model = build(member_weights=member_weights, feeds_absent=feeds_absent)
    found, gradients = [], []
    for is_dense in (True, False):
        monkeypatch.setattr(model.body, "_is_dense_cheaper", lambda *_, is_dense=is_dense: is_dense)
        logits = model(inputs())
        found.append(logits)
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    assert all(gradient.abs().sum() for gradient in gradients[0]), "every parameter counts"


@pytest.mark.parametrize("member_weights", MEMBER_WEIGHTS)
def test_frequent_codes_one_by_one_and_rare_ones_pair_by_pair_sum_up_to_the_same(member_weights, monkeypatch):
    """Pooled hospitals: the reference sums all codes pair by pair, and gradients agree too."""
    records = [*train_records(9), [(5, 1.0, 2.0)]]
    found = []
    for products_of_pair in (0, 450, 10**9):
        model = build(member_weights=member_weights, feeds_absent=False)
        body = model.body
        monkeypatch.setattr(body, "_is_dense_cheaper", lambda *_: False)
        monkeypatch.setattr(body, "_products_of_pair", lambda n=products_of_pair: n)
        ways = []
        for way in ("_dense", "_sparse"):
            own = getattr(body, way)
            monkeypatch.setattr(
                body, way, lambda *given, own=own, way=way, ways=ways: (ways.append(way), own(*given))[1]
            )
        z = body(inputs(records))
        z.square().sum().backward()
        found.append((z, body.weights1.grad, ways))
    for z, gradient, _ in found[1:]:
        torch.testing.assert_close(z, found[0][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-5)
    assert [ways for *_, ways in found] == [["_sparse"], ["_dense", "_sparse"], ["_dense"]]


def hide(model: CodeTab) -> None:
    """Leave a code out of all records, as `code_dropout` does with some."""
    forward, n_codes = model.body.input.forward, model.body.input.n_codes

    def without_one(given):
        pairs = forward(given)
        return pairs.only(pairs.code != n_codes - 1, len(given["padding_mask"]))

    model.body.input.forward = without_one


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, None),
        ({"feeds_absent": False}, hide),
        ({"known": 5}, hide),
        ({"known": 5, "member_weights": "text", "feeds_absent": False}, None),
        ({}, lambda model: model.align({"A": ("B", 1.0), "B": ("A", 0.5), "D": ("A", 1.0)}, {"C": "A", "D": "A"})),
        ({}, lambda model: model.align({"another": ("A", 1.0)})),
        ({"feeds_absent": False}, lambda model: model.pool({c: ("AB"[c in "CD"], 1.0) for c in "ABCD"})),
    ],
)
def test_on_a_gpu_it_computes_the_same_without_counting(options, changed, monkeypatch):
    """Records of other tokens than codes' and hidden events have places too; there are more events than codes, fewer, or none."""
    model, n_tried = build(**options), 0
    for records, is_empty in ((RECORDS, False), (RECORDS, True), (train_records(9), False)):
        given = inputs(records)
        given["padding_mask"] &= not is_empty
        given["places"] = given["padding_mask"].flatten().nonzero().squeeze(1)
        given["padding_mask"][2, 0] = False
        if changed is not None and not n_tried:
            changed(model)
        found: list[tuple[Tensor, list[Tensor]]] = []
        for counts, is_dense in ((True, False), (False, False), (False, True)):
            with monkeypatch.context() as patch:
                count_nothing(patch, counts=counts)
                patch.setattr(model.body, "_is_dense_cheaper", lambda *_, is_dense=is_dense: is_dense)
                model.adapt_to_records([inputs(train_records())])
                model.zero_grad()
                logits = model(given)
                logits.square().sum().backward()
                of = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
                found.append((logits.detach(), of))
        for logits, gradients in found[1:]:
            torch.testing.assert_close(logits, found[0][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(gradients, found[0][1], atol=1e-4, rtol=1e-3)
            n_tried += 1
    assert n_tried == 6
    there = {name: x.to("meta") for name, x in given.items()}  # tensors without numbers: reading one raises an error
    model.train().to("meta")(there).sum().backward()


def test_an_aligned_model_that_is_loaded_reads_codes_as_before():
    """The matches load after the codes, and decide which code a token is."""
    matches = {"A": ("B", 1.0), "B": ("A", 0.5), "D": ("A", 1.0)}
    model, other = build(), build()
    model.align(matches)
    model.adapt_to_records([inputs(train_records())])
    other.align({"C": ("C", 1.0)})
    other.adapt_to_records([inputs(train_records(20))])
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(inputs()), model(inputs()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"feeds_absent": False, "code_dropout": 0.2, "text_noise": 0.1}, {"known": 5}])
def test_a_gpu_computes_what_a_cpu_does_and_the_host_does_not_wait(options):
    model, given = build(**options), inputs(train_records(30))
    given["places"] = given["padding_mask"].flatten().nonzero().squeeze(1)
    expected = model(given).detach()
    model.cuda()
    there = {name: x.cuda() for name, x in given.items()}
    torch.testing.assert_close(model(there).detach().cpu(), expected, atol=1e-4, rtol=1e-3)
    model.train()
    model(there).square().sum().backward()  # keeps what is sent once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(there).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_sum_is_that_of_the_definition():
    """One code at a time, as the class says, with the weights of each code written out."""
    model = build(age=False)
    body, given = model.body, inputs()
    pairs = body.input(given)
    x = {
        (r, c): x for r, c, x in zip(pairs.row.tolist(), pairs.code.tolist(), body.input.normalise(pairs), strict=True)
    }
    e = body.norm(body.vectors)
    for row in range(3):
        total = torch.zeros(4, 16)
        for code in range(body.input.n_codes):
            x_P = x.get((row, code), body.input.absent()[code])
            w1 = body.shared.weight.T + sum(g * w for g, w in zip(body.gates(e[code]), body.weights1, strict=True))
            w2 = sum(g * w for g, w in zip(body.gates2(e[code]), body.weights2, strict=True))
            v = F.gelu(x_P @ w1 + body.shared.bias + body.text(e[code])) @ w2
            total += body.signs[:, code, None] * v
        expected = total * 2 / math.sqrt(body.input.n_codes + 1)
        torch.testing.assert_close(body(given)[row], expected, atol=1e-5, rtol=1e-4)


def test_summaries_are_those_of_a_loop():
    model = build()
    pairs = model.body.input(inputs())
    edges = [0, 12, 24, 36, 48]
    assert len(pairs.row) == 3 + 2 + 2, "birth, A, B; birth, C; B, D; the unknown event has no code"
    for row, code, found in zip(pairs.row.tolist(), pairs.code.tolist(), pairs.summaries.tolist(), strict=True):
        mine = [(24 * days, value) for token, days, value in RECORDS[row] if token == code + 2]
        values = [v for _, v in mine if not math.isnan(v)]
        hours = [h for h, _ in mine]
        numbers = (
            [values[0], values[-1], np.mean(values), min(values), max(values), np.std(values)] if values else [NAN] * 6
        )
        counts, means = [], []
        for low, high in pairwise(edges):
            inside = [v for h, v in mine if low <= h <= high and not (h == low and low)]
            counts.append(len(inside))
            inside = [v for v in inside if not math.isnan(v)]
            means.append(np.mean(inside) if inside else NAN)
        expected = [len(mine), *numbers, max(hours), min(hours), *counts, *means]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_absent_codes_are_fed_or_add_nothing():
    for feeds_absent in (True, False):
        model = build(feeds_absent=feeds_absent, age=False)
        before = model.body(inputs(RECORDS[1:2]))
        with torch.no_grad():
            model.body.signs[:, 1] += 1  # code B, which this record lacks
        changed = (model.body(inputs(RECORDS[1:2])) - before).abs().max()
        assert (changed > 1e-3) == feeds_absent
    assert model.body.input.absent().shape == (5, N_SUMMARIES + 1)
    assert model.body.input.absent()[:, -1].eq(1).all()


@pytest.mark.parametrize("member_weights", MEMBER_WEIGHTS)
def test_a_code_that_train_never_had_is_read_by_its_text(member_weights):
    model = build(known=5, member_weights=member_weights)  # D and birth are new
    assert model.body.input.n_codes == 3
    given, other = inputs(), inputs()
    before = model(given)
    other["rows"][5] += 1  # the text of D
    changed = (model(other) - before).abs().amax((1, 2))
    assert changed[2] > 1e-4
    assert changed[:2].max() < 1e-6
    torch.testing.assert_close(model(given | {"embeddings": given["rows"][given["row_ids"].long()]}), before)
    vectors = given | {"embeddings": given["rows"][given["row_ids"].long()]}
    torch.testing.assert_close(model({k: x for k, x in vectors.items() if k not in ("rows", "row_ids")}), before)


def test_a_state_dict_gives_back_codes_quantiles_and_vectors():
    model = build()
    copy = CodeTab(
        embedding_dim=WIDTH, num_classes=2, model_dim=16, hidden_dim=8, n_gates=3, n_members=4, has_values=True
    ).eval()
    words = counted(vocabulary())
    copy.set_vocabulary(words)
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy(inputs()), model(inputs()))


def test_a_planted_signal_is_learned_and_heads_are_float32():
    records = train_records(200)
    level = [np.mean([v for t, _, v in record if t == 3] or [0]) for record in records]
    labels = torch.tensor([int(x > 0) for x in level])
    model, given = build(), inputs(records)
    model.adapt_to_records([given])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(given).dtype == torch.float32
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(given).flatten(0, 1), labels.repeat_interleave(4)).backward()
        optimizer.step()
    assert (Classification.probabilities(model(given)).argmax(1) == labels).float().mean() > 0.95


def test_a_task_takes_the_mean_of_losses_and_of_probabilities():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, 2), torch.tensor([0, 1, 1, 0, 1])
    task = Classification()
    task._weights = None
    expected = torch.stack([F.cross_entropy(logits[:, m], labels) for m in range(3)]).mean()  # over samples too
    torch.testing.assert_close(loss_over_members(task.loss, logits, labels).mean(), expected)
    torch.testing.assert_close(Classification.probabilities(logits), logits.double().softmax(-1).mean(1))


def test_members_begin_alike_but_for_what_they_are_given():
    torch.manual_seed(0)
    head = MemberHead(model_dim=6, num_classes=2, n_members=3, n_layers=2, dropout=0.0)
    z = torch.randn(4, 6)
    alike = z[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(head(z), head(alike))
    hidden = head.layers[0](alike)
    torch.testing.assert_close(hidden, hidden[:, :1].expand_as(hidden))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"member_weights": "random"}, "model.member_weights"),
        ({"windows_hours": [12, 6, 24, 48]}, "model.windows_hours"),
        ({"n_gates": 0}, "model.n_gates"),
        ({"num_classes": None, "vocab_size": 9}, "model=code_tab"),
    ],
)
def test_wrong_options_are_refused(options, key):
    with pytest.raises(UserError, match=key):
        build(**options)


@pytest.mark.parametrize("trainable", ["adapter", "full"])
def test_learned_vectors_are_refused_since_known_codes_have_copies(trainable):
    model = CodeTab(embedding_dim=8, num_classes=2)
    check_vectors(model, "frozen")
    with pytest.raises(UserError, match=rf"embedder\.trainable={trainable}: CodeTab.*Type: embedder\.trainable=frozen"):
        check_vectors(model, trainable)
