"""Summaries per code: what a loop over events finds, whatever stands beside a sample in its batch, found again by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meds import birth_code

from ehr_embed.core.errors import UserError
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.code_features import CodeFeatures
from tests.helpers.code_batches import CODES, NAN, batch, event, vocabulary

WINDOWS = [24.0, 240.0, 24_000.0]


def fitted(records, *, words: Vocabulary | None = None, values: bool = True, **options) -> CodeFeatures:
    features = CodeFeatures(**{"has_values": values, "max_codes": 10, "times": True, **options})
    features.set_vocabulary(words or vocabulary())
    inputs = batch(records)
    features.choose([inputs if values else {name: x for name, x in inputs.items() if name != "values"}])
    return features


def by_hand(record, name: str) -> float:
    """One feature by a loop over the events."""
    code, summary = name.rsplit("/", 1)
    mine = [event for event in record if event[0] == CODES.index(code) + 2]
    values = [value for _, _, value in mine if not math.isnan(value)]
    days = [days for _, days, _ in mine]
    if summary == "count":
        return len(mine)
    if summary.startswith("years"):
        return (days[0] if summary == "years_since_first" else days[-1]) / 365.25 if days else NAN
    if "_" in summary:
        what, hours = summary.rsplit("_", 1)
        end = float(hours.removesuffix("h"))
        start = max([0.0, *(h for h in WINDOWS if h < end)])
        inside = [(d, v) for _, d, v in mine if (start < d * 24 <= end) or (start == 0 and d == 0)]
        there = [v for _, v in inside if not math.isnan(v)]
        return len(inside) if what == "count" else sum(there) / len(there) if there else NAN
    if not values:
        return NAN
    if summary == "sd":
        return math.sqrt(sum((v - sum(values) / len(values)) ** 2 for v in values) / len(values))
    return {
        "first": values[0],
        "last": values[-1],
        "mean": sum(values) / len(values),
        "min": min(values),
        "max": max(values),
    }[summary]


# Events in order of time: days before the prediction fall; static ones come first and have those of the first timed one.
one_record = st.lists(event, min_size=1, max_size=12).map(
    lambda events: [
        (token, days, value)
        for (token, _, value), days in zip(events, sorted((e[1] for e in events), reverse=True), strict=True)
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(one_record, min_size=1, max_size=5))
def test_features_are_those_of_a_loop(records):
    if all(token == 1 for record in records for token, _, _ in record):
        return
    features = fitted(records)
    found = features(batch(records))
    assert found.shape == (len(records), len(features.names))
    expected = [[by_hand(record, name) for name in features.names] for record in records]
    np.testing.assert_allclose(found.numpy(), np.array(expected, np.float32), rtol=1e-5, atol=1e-5)
    has_value = {CODES[token - 2] for r in records for token, _, value in r if token > 1 and not math.isnan(value)}
    assert set(features.valued) == has_value, "only codes with values in train have summaries of them"
    # Neither padding nor the neighbours change anything, not in the last digit.
    for row, record in enumerate(records):
        assert torch.equal(features(batch([record], 16))[0].nan_to_num(-99), found[row].nan_to_num(-99))


@settings(max_examples=40, deadline=None)
@given(st.lists(one_record, min_size=1, max_size=4))
def test_windows_are_those_of_a_loop(records):
    if all(token == 1 for record in records for token, _, _ in record):
        return
    features = fitted(records, windows_hours=WINDOWS)
    assert features.names[: len(fitted(records).names)] == fitted(records).names, "windows come on top"
    found = features(batch(records))
    expected = [[by_hand(record, name) for name in features.names] for record in records]
    np.testing.assert_allclose(found.numpy(), np.array(expected, np.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hours", [[24, 12], [0, 12], [12, 12]])
def test_windows_that_do_not_follow_each_other_are_refused(hours):
    with pytest.raises(UserError, match=r"model\.windows_hours=\[12,24,36,48\]"):
        fitted([[(2, 1.0, 1.0)]], windows_hours=hours)


def test_static_events_count_and_padding_and_unknown_do_not():
    features = fitted([[(2, 9.0, 1.0), (3, 9.0, NAN), (1, 4.0, 7.0), (2, 2.0, NAN)]])
    row = dict(zip(features.names, features(batch([[(2, 9.0, 1.0), (1, 1.0, 3.0)]], 8))[0].tolist(), strict=True))
    assert (row["A/count"], row["A/first"], row["A/last"], row["B/count"]) == (1, 1, 1, 0)
    assert row["A/years_since_last"] == pytest.approx(9 / 365.25)
    assert math.isnan(row["B/years_since_first"])
    assert set(features.codes) == {"A", "B"}


def test_the_most_frequent_codes_are_chosen_and_the_birth_always():
    records = [[(6, 9000.0, NAN), (3, 3.0, NAN), (3, 2.0, NAN), (2, 1.0, NAN)]]
    assert fitted(records, max_codes=2).codes == [birth_code, "B"]
    age = fitted(records, times=False)
    assert [name for name in age.names if "years" in name] == [
        f"{birth_code}/years_since_first",
        f"{birth_code}/years_since_last",
    ]
    assert age(batch(records))[0, -1].item() == pytest.approx(9000 / 365.25)


def test_without_numbers_a_value_is_that_of_its_bin():
    words = vocabulary(bins={"A": [0.5, 1.5]})  # tokens 7, 8, 9
    assert words.token_codes[7:] == ["A"] * 3
    records = [[(9, 3.0, NAN), (2, 2.0, NAN), (7, 1.0, NAN), (3, 0.0, NAN)]]
    features = fitted(records, words=words, values=False)
    inputs = {name: x for name, x in batch(records).items() if name != "values"}
    row = dict(zip(features.names, features(inputs)[0].tolist(), strict=True))
    assert features.valued == ["A"]
    assert (row["A/count"], row["A/first"], row["A/last"], row["A/mean"], row["A/max"]) == (3, 3, 1, 2, 3)


def test_another_vocabulary_is_matched_by_name():
    records = [[(2, 3.0, 1.0), (3, 2.0, 2.0), (2, 1.0, 4.0), (4, 0.0, NAN)]]
    features = fitted(records)
    before, names = features(batch(records)), features.names
    features.set_vocabulary(vocabulary(("NEW", "C", "B", "A")))  # A is token 5, B 4, C 3
    moved = [[({2: 5, 3: 4, 4: 3}[token], days, value) for token, days, value in record] for record in records]
    assert torch.equal(features(batch(moved)).nan_to_num(-9), before.nan_to_num(-9))
    with_new = [moved[0] + [(2, 0.0, 9.0)]]
    assert torch.equal(features(batch(with_new)).nan_to_num(-9), before.nan_to_num(-9)), "no column, no effect"
    features.set_vocabulary(vocabulary(("B", "C")))
    row = dict(zip(names, features(batch([[(2, 1.0, 5.0)]]))[0].tolist(), strict=True))
    assert (row["A/count"], row["B/count"], row["B/last"]) == (0, 1, 5)
    assert math.isnan(row["A/mean"])
    again = CodeFeatures(has_values=True, max_codes=10, times=True)
    again.set_vocabulary(vocabulary())
    again.load_state_dict(features.state_dict())
    assert torch.equal(again(batch(records)).nan_to_num(-9), before.nan_to_num(-9))


def test_what_cannot_be_summarised_is_refused():
    with pytest.raises(UserError, match=r"model\.max_codes=0"):
        CodeFeatures(has_values=True, max_codes=0, times=True)
    with pytest.raises(UserError, match="code of the vocabulary"):
        fitted([[(1, 1.0, NAN)]])
    features = CodeFeatures(has_values=True, max_codes=5, times=True)
    features.set_vocabulary(vocabulary())
    with pytest.raises(UserError, match="Type: run=RUN_DIR"):
        features(batch([[(2, 1.0, NAN)]]))
    with pytest.raises(UserError, match="Give texts or a MEDS dataset to predict on"):
        fitted([[(2, 1.0, NAN)]])({"embeddings": torch.zeros(1, 1, 4), "padding_mask": torch.ones(1, 1) > 0})


def test_codes_of_few_records_get_no_features_but_the_birth_does():
    records = [[(6, 9000.0, NAN), (2, 3.0, 1.0)], [(2, 1.0, 1.0), (3, 2.0, 5.0), (3, 1.0, 5.0), (3, 0.5, 5.0)]]
    assert fitted(records, min_records=2).codes == [birth_code, "A"], "three events of one record are no three records"
    assert fitted(records, min_records=3).codes == [birth_code]
    assert fitted(records[1:], min_records=3).codes == ["B"], "something is left to be constant"
