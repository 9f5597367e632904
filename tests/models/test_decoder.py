"""The decoder: nothing sees what comes after it, no sequence sees another, a cache changes nothing; the vocabulary head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ehr_embed.core.errors import UserError
from ehr_embed.models import heads
from ehr_embed.models.decoder import POOLINGS, POSITIONS, Decoder
from ehr_embed.models.heads import EventHead, time_bin, token_scores
from ehr_embed.models.sampling import Sampling, draw_gap
from tests.helpers.refusals import refused


def decoder(**options) -> Decoder:
    torch.manual_seed(0)
    sizes = {"embedding_dim": 12, "num_classes": 3, "model_dim": 16, "n_heads": 4, "n_layers": 2, "max_length": 32}
    return Decoder(**{**sizes, **options}).eval()


def inputs(lengths: list[int], width: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gap = torch.rand(len(lengths), width, generator=generator) * 10
    return {
        "embeddings": torch.randn(len(lengths), width, 12, generator=generator),
        "padding_mask": torch.arange(width) < torch.tensor(lengths)[:, None],
        "gap_days": gap,
        "elapsed_days": gap.cumsum(1),
    }


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_event_sees_none_after_it(positions):
    model, batch = decoder(positions=positions), inputs([8], 8)
    before = model.hidden(batch)
    for place in range(1, 8):
        other = inputs([8], 8, seed=2)
        changed = {name: torch.cat([x[:, :place], other[name][:, place:]], dim=1) for name, x in batch.items()}
        after = model.hidden(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing(positions, pooling):
    model, batch = decoder(positions=positions, pooling=pooling), inputs([3, 8, 5], 8)
    together = model(batch)
    for i, n in enumerate((3, 8, 5)):
        alone = model({name: x[i : i + 1, :n] for name, x in batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_sequences_of_a_packed_row_do_not_see_each_other(positions):
    model, lengths = decoder(positions=positions), [3, 1, 5]
    parts = [inputs([n], n, seed=n) for n in lengths]
    row = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    row["segments"] = torch.repeat_interleave(torch.tensor([1, 2, 3]), torch.tensor(lengths))[None]
    row["event_index"] = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model.hidden(row).split(lengths, dim=1)
    for part, hidden in zip(parts, packed, strict=True):
        torch.testing.assert_close(hidden, model.hidden(part), atol=1e-5, rtol=1e-4)
    leaky = {name: x for name, x in row.items() if name != "segments"}
    assert not torch.allclose(model.hidden(leaky).split(lengths, dim=1)[2], packed[2], atol=1e-3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_cache_gives_the_same_vectors(positions):
    model, lengths, width = decoder(positions=positions), torch.tensor([2, 5, 3]), 5
    batch = inputs([9, 9, 9], 9)
    whole = model.hidden(batch)
    cache = model.new_cache(4)
    prompt = {name: x[:, :width] for name, x in batch.items()}
    prompt["padding_mask"] = torch.arange(width) < lengths[:, None]
    first = model.hidden(prompt, cache)
    rows = torch.arange(3)
    torch.testing.assert_close(first[rows, lengths - 1], whole[rows, lengths - 1], atol=1e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [2, 5, 3]
    cache.share(1)
    for step in range(4):
        place = lengths + step
        new = {name: x[rows, place][:, None] for name, x in batch.items()}
        hidden = model.hidden(new, cache)[:, 0]
        torch.testing.assert_close(hidden, whole[rows, place], atol=1e-5, rtol=1e-4)
        if step == 1:  # the middle sequence ends, the others swap places
            rows, lengths = torch.tensor([2, 0]), lengths[[2, 0]]
            cache.select(torch.tensor([2, 0]), torch.tensor([2, 0]))


@pytest.mark.parametrize("positions", ["sinusoidal", "rope_time"])
def test_futures_that_share_a_prompt_have_the_vectors_of_their_own_sequences(positions):
    model, lengths, n, n_new = decoder(positions=positions), torch.tensor([2, 5]), 3, 3
    batch = inputs([5 + n_new] * 2 * n, 5 + n_new)
    rows, prompt_R = torch.arange(2 * n), torch.arange(2 * n) // n
    for x in batch.values():  # the futures of a prompt differ only after it
        for row in rows:
            first = int(prompt_R[row]) * n
            x[row, : lengths[prompt_R[row]]] = x[first, : lengths[prompt_R[row]]]
    whole, cache = model.hidden(batch), model.new_cache(n_new)
    prompt = {name: x[::n, :5] for name, x in batch.items()}
    model.hidden(prompt | {"padding_mask": torch.arange(5) < lengths[:, None]}, cache)
    cache.share(n)
    kept = rows
    for step in range(n_new):
        place = lengths[prompt_R[kept]] + step
        hidden = model.hidden({name: x[kept, place][:, None] for name, x in batch.items()}, cache)[:, 0]
        torch.testing.assert_close(hidden, whole[kept, place], atol=1e-5, rtol=1e-4)
        if step == 1:  # the first prompt loses its first future, the second prompt its last
            kept = torch.tensor([1, 2, 3, 4])
            cache.select(torch.tensor([0, 1]), kept)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_vectors_of_a_few_places_are_those_among_all(positions):
    model, batch = decoder(positions=positions), inputs([3, 9, 5], 9)
    places = torch.tensor([2, 9 + 0, 9 + 4, 9 + 8])  # one of the first row, three of the second, none of the third
    torch.testing.assert_close(
        model.hidden_at(batch, places), model.hidden(batch).flatten(0, 1)[places], atol=1e-5, rtol=1e-4
    )
    assert model.hidden_at(batch, places[:0]).shape == (0, model.hidden(batch).shape[-1])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model.hidden_at(batch, places), model.hidden(batch).flatten(0, 1)[places]
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_a_few_places_are_computed_by_calling_the_blocks_and_never_compiled_once_more():
    """Sharding gathers a block's parameters when the block is called, and not when a method of it is."""
    model, batch, called = decoder(), inputs([3, 9, 5], 9), []
    for block in model.body.blocks:
        block.register_forward_hook(lambda block, given, out: called.append(out.shape[1]))
    model.hidden_at(batch, torch.tensor([2, 9]))
    assert called == [*[9] * (len(model.body.blocks) - 1), 1]
    called.clear()
    model.body.blocks[0]._compiled_call_impl = model.body.blocks[0]._call_impl
    model.hidden_at(batch, torch.tensor([2, 9]))
    assert called == [9] * len(model.body.blocks)


def test_time_is_seen_and_may_be_left_out():
    batch = inputs([6], 6)
    later = batch | {"gap_days": batch["gap_days"] * 3}
    assert not torch.allclose(decoder()(batch), decoder()(later), atol=1e-4)
    timeless = {name: x for name, x in batch.items() if not name.endswith("_days")}
    torch.testing.assert_close(decoder(times=[])(batch), decoder(times=[])(timeless))
    with refused("model.times=[gap,elapsed]", "gap_days", "elapsed_days"):
        decoder()(timeless)


def test_what_a_causal_model_cannot_do_is_refused():
    with refused("model.positions 'time'", "none, rope, rope_time, sinusoidal"):
        decoder(positions="time")
    with pytest.raises(UserError, match=r"unknown model\.pooling 'cls'"):
        decoder(pooling="cls")
    with pytest.raises(UserError, match=r"unknown model\.vocabulary_head 'tied': did you mean 'text_tied'"):
        decoder(vocabulary_head="tied")
    with pytest.raises(UserError, match=r"num_classes=\w+, vocab_size=\w+"):
        decoder(vocab_size=5)


def event_head(kind: str, vocab_size: int = 40, **options) -> EventHead:
    torch.manual_seed(0)
    sizes = {"model_dim": 16, "embedding_dim": 12, "vocab_size": vocab_size, "has_values": False}
    return EventHead(kind=kind, **{**sizes, **options})


@pytest.mark.parametrize("kind", heads.VOCABULARY_HEADS)
@pytest.mark.parametrize("at_once", [40, 130, 10_000])
def test_chunks_give_the_loss_and_gradient_of_the_whole(kind, at_once, monkeypatch):
    head, table = event_head(kind), torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(4), requires_grad=True)
    target = torch.randint(2, 40, (9,), generator=torch.Generator().manual_seed(5))
    logits = head.logits(x, table)
    expected = F.cross_entropy(logits, target, reduction="none")
    expected.sum().backward()
    wanted = [x.grad, *(p.grad for p in head.parameters() if p.grad is not None)]
    x.grad = None
    head.zero_grad()

    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", at_once)
    sizes, linear = [], F.linear
    monkeypatch.setattr(heads.F, "linear", lambda *a: [sizes.append((y := linear(*a)).numel()), y][1])
    weight, bias = head.token_weights(table)
    sizes.clear()
    nll, rank = token_scores(x, weight, bias, target, with_ranks=True)
    torch.testing.assert_close(nll, expected)
    nll.sum().backward()
    assert max(sizes) <= at_once, "a larger tensor of logits was held"
    for found, grad in zip([x.grad, *(p.grad for p in head.parameters() if p.grad is not None)], wanted, strict=True):
        torch.testing.assert_close(found, grad, atol=1e-5, rtol=1e-4)
    assert rank is not None
    better = (logits > logits.gather(1, target[:, None])).sum(1)
    assert rank.tolist() == better.tolist()


def test_a_tie_counts_against_the_target():
    x, weight, bias = torch.ones(1, 2), torch.ones(5, 2), torch.zeros(5)
    rank = token_scores(x, weight, bias, torch.tensor([3]), with_ranks=True)[1]
    assert rank is not None
    assert rank.tolist() == [4]


@pytest.mark.parametrize("kind", heads.VOCABULARY_HEADS)
def test_padding_and_unknown_are_never_predicted(kind):
    logits = event_head(kind).logits(torch.randn(4, 16), torch.randn(40, 12))
    assert torch.isinf(logits[:, :2]).all()
    assert torch.isfinite(logits[:, 2:]).all()


def test_the_tied_head_scores_codes_it_never_saw_and_has_no_parameter_of_its_own_for_a_token():
    small, large = event_head("text_tied", 40), event_head("text_tied", 4000)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in large.parameters())
    table, x = torch.randn(40, 12), torch.randn(3, 16)
    new = torch.randn(2, 12)
    longer = small.logits(x, torch.cat([table, new, table[7:8]]))
    torch.testing.assert_close(longer[:, :40], small.logits(x, table))
    assert longer.shape == (3, 43)
    torch.testing.assert_close(longer[:, 42], longer[:, 7], msg="the same text has the same score")
    assert not torch.allclose(longer[:, 40], longer[:, 41], atol=1e-3)
    with refused("40 tokens", "43"):
        event_head("linear").logits(x, torch.cat([table, new, table[7:8]]))


def test_gaps_fall_into_their_bins():
    days = torch.tensor([0.0, 1e-6, 1 / 1440, 0.5, 1.0, 365.0, 36_000.0])
    bins = time_bin(days)
    assert bins[:2].tolist() == [0, 0]
    assert (bins.diff() >= 0).all()
    scores = F.one_hot(bins, heads.N_TIME_BINS).float() * 99
    for temperature in (0, 1):
        gaps = draw_gap(scores, None, Sampling(temperature=temperature), torch.Generator().manual_seed(0))
        assert time_bin(gaps.float()).tolist() == bins.tolist()


def test_values_enter_the_loss_without_their_gaps():
    head = event_head("text_tied", has_values=True)
    table, x = torch.randn(40, 12), torch.randn(1, 4, 16)
    batch = {
        "table": table,
        "targets": torch.tensor([[5, 6, 0, 7]]),
        "target_gap_days": torch.tensor([[0.0, 1.0, 0.0, 30.0]]),
        "target_values": torch.tensor([[0.5, float("nan"), 1.0, -2.0]]),
    }
    scores = head(x, batch)
    assert isinstance(scores, heads.EventScores)
    assert scores.nll.shape == (3,)
    assert scores.value_nll is not None
    assert torch.isfinite(scores.value_nll).all()
    (scores.nll.sum() + scores.value_nll.sum() + scores.time_nll.sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())
    # The second target has no value: only its absence counts.
    _, value = head.time_and_value(x[0, 1:2], table[6:7])
    assert value is not None
    torch.testing.assert_close(scores.value_nll[1:2], F.softplus(value.present))
