"""Models that read another dataset's codes as their own."""

import numpy as np
import polars as pl
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.moved import current_state
from ehr_embed.data.vocabulary import Vocabulary, VocabularySettings
from ehr_embed.models.aligned import CodeMatches
from ehr_embed.models.code_features import CodeFeatures
from ehr_embed.models.code_summaries import CodeSummaries
from ehr_embed.models.code_tab import CodeTab
from ehr_embed.models.ensemble import Ensemble
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.protocol import AlignsCodes, AlignsTwins, align_codes
from tests.helpers.host_waits import count_nothing


def vocabulary(codes: list[str]) -> Vocabulary:
    """One token per code, without value bins."""
    n = len(codes) + 2
    counts = [0, 0] + [9] * len(codes)
    tokens = pl.DataFrame(
        {"token": range(n), "str": ["<p>", "<u>", *codes], "text": ["", "?", *codes], "count": counts}
    )
    schema = {"code": pl.String, "plain_token": pl.Int32, "bin_token": pl.Int32, "edges": pl.List(pl.Float32)}
    rows = pl.DataFrame(
        [(code, i + 2, -1, [], 0.0, 1.0) for i, code in enumerate(codes)],
        schema=schema | {"loc": pl.Float64, "scale": pl.Float64},
        orient="row",
    )
    return Vocabulary(VocabularySettings(values="continuous"), tokens, rows, {})


def batch(*, n: int = 60, tokens=(2, 3, 4), seed: int = 0, unit=lambda x: x) -> dict[str, torch.Tensor]:
    """Records of up to 12 events of some tokens, with numbers; the last position is padding."""
    rng = torch.Generator().manual_seed(seed)
    token_BT = torch.tensor(tokens)[torch.randint(len(tokens), (n, 13), generator=rng)]
    mask_BT = torch.rand(n, 13, generator=rng) < 0.7
    mask_BT[:, 0], mask_BT[:, -1] = True, False
    values_BT = unit(torch.randn(n, 13, generator=rng))
    days_BT = torch.rand(n, 13, generator=rng).sort(1, descending=True).values
    return {
        "token_ids": token_BT, "padding_mask": mask_BT, "values": values_BT, "days": days_BT,
        "age_days": torch.full((n, 13), float("nan")), "rows": torch.randn(9, 6, generator=rng), "row_ids": token_BT,
    }  # fmt: skip


KNOWN, HERE = ["A", "B", "C"], ["x", "y", "z"]
ONE_TO_ONE = {"x": ("A", 1.0), "y": ("B", 1.0), "z": ("C", 1.0)}


def trained_tab() -> CodeTab:
    torch.manual_seed(0)
    model = CodeTab(embedding_dim=6, num_classes=2, has_values=True, model_dim=8, hidden_dim=8, n_gates=4, n_members=2)
    model.set_vocabulary(vocabulary(KNOWN))
    model.adapt_to_vectors(torch.randn(3, 6))
    model.adapt_to_records([batch()])
    return model.eval()


def fitted_features() -> CodeFeatures:
    features = CodeFeatures(has_values=True, max_codes=9, times=True)
    features.set_vocabulary(vocabulary(KNOWN))
    features.choose([batch()])
    dense = features(batch()).numpy()
    features.remember(FeatureTable.from_blocks([(np.arange(len(dense)), dense)], len(dense)))
    return features


def test_other_names_and_units_change_nothing():
    model = trained_tab()
    before = model(batch())
    model.set_vocabulary(vocabulary(HERE))
    model.align(ONE_TO_ONE)
    there = batch(unit=lambda x: 50 + 9 * x)
    model.adapt_to_records([there])
    torch.testing.assert_close(model(there), before, rtol=1e-4, atol=1e-5)


def test_features_of_trees_are_in_trains_own_numbers():
    features = fitted_features()
    before = features(batch())
    features.set_vocabulary(vocabulary(HERE))
    features.align(ONE_TO_ONE)
    there = batch(unit=lambda x: 50 + 9 * x)
    features.fit_to_records([there])
    torch.testing.assert_close(features(there), before, rtol=1e-3, atol=2e-2, equal_nan=True)


def test_what_has_no_match_contributes_nothing():
    for model in (trained_tab(), fitted_features()):
        model.set_vocabulary(vocabulary([*HERE, "noise"]))
        model.align(ONE_TO_ONE)
        fit = model.adapt_to_records if isinstance(model, CodeTab) else model.fit_to_records
        fit([batch()])
        one = batch(tokens=(2, 3, 5), seed=3)
        other = {**one, "values": torch.where(one["token_ids"] == 5, 1e6, one["values"])}
        torch.testing.assert_close(model(one), model(other), equal_nan=True)
        hidden = {**one, "padding_mask": one["padding_mask"] & (one["token_ids"] != 5)}
        torch.testing.assert_close(model(one), model(hidden), equal_nan=True)


@pytest.mark.parametrize("build", [trained_tab, fitted_features])
def test_a_twin_takes_the_events_of_the_code_that_says_the_same(build):
    """What the run knows as B and as its twin C comes from one code of the other hospital, and two codes would say the same."""
    model = build()
    fit = model.adapt_to_records if isinstance(model, CodeTab) else model.fit_to_records
    one = batch(tokens=(2, 3), seed=3)
    is_y = one["token_ids"] == 3
    # The same events once more, under the code z.
    both = {
        name: torch.cat([x, x], dim=1) if x.ndim == 2 and len(x) == len(is_y) and name != "rows" else x
        for name, x in one.items()
    }
    both["token_ids"] = torch.cat([one["token_ids"], torch.where(is_y, 4, one["token_ids"])], dim=1)
    both["row_ids"] = both["token_ids"]
    both["padding_mask"] = torch.cat([one["padding_mask"], one["padding_mask"] & is_y], dim=1)
    model.set_vocabulary(vocabulary(HERE))
    model.align(ONE_TO_ONE)
    fit([both])
    expected = model(both)
    model.align({code: ONE_TO_ONE[code] for code in "xy"}, {"C": "B", "unknown": "A"})
    fit([one])
    torch.testing.assert_close(model(one), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    model.align({code: ONE_TO_ONE[code] for code in "xy"})
    fit([one])
    assert not torch.allclose(model(one).nan_to_num(), expected.nan_to_num(), atol=1e-4), (
        "without its twin it is missing"
    )


def test_features_on_a_gpu_are_the_same_without_counting(monkeypatch):
    found = []
    for counts in (True, False):
        with monkeypatch.context() as patch:
            count_nothing(patch, counts=counts)
            features = fitted_features()
            found.append([features(batch(seed=7, n=9))])
            features.set_vocabulary(vocabulary(HERE))
            features.align({code: ONE_TO_ONE[code] for code in "xy"}, {"C": "B"})
            features.fit_to_records([batch(unit=lambda x: 3 * x)])
            found[-1].append(features(batch(seed=7)))
    torch.testing.assert_close(found[0], found[1], equal_nan=True)


def test_twins_are_found_as_by_comparing_all_pairs():
    known, generator = [f"c{i}" for i in range(40)], torch.Generator().manual_seed(0)
    matches = CodeMatches(known, n_summaries=1, counts=())
    # Several twins of one code, in no order; codes from c10 on are twins.
    leads = torch.randint(10, (30,), generator=generator).tolist()
    matches.match(
        {f"x{i}": (f"c{i}", 1.0) for i in range(10)}, twins={f"c{10 + i}": f"c{to}" for i, to in enumerate(leads)}
    )
    key_K = torch.randperm(200, generator=generator)[:80].sort().values
    row_K, code_K = key_K // 10, key_K % 10
    row_L, code_L, of_L = matches.with_twins(row_K, code_K, 20)
    expected = [(int(r), int(c), k) for k, (r, c) in enumerate(zip(row_K, code_K, strict=True))]
    expected += [(r, 10 + i, k) for r, c, k in expected for i, to in enumerate(leads) if to == c]
    assert list(zip(row_L.tolist(), code_L.tolist(), of_L.tolist(), strict=True)) == sorted(expected)


def test_a_known_twin_takes_the_place_of_a_matched_code_that_was_not_chosen():
    matches = CodeMatches(["A", "B", "C"], n_summaries=1, counts=())
    matches.match({"x": ("rare", 0.5), "y": ("A", 1.0)}, twins={"B": "rare", "C": "rare", "gone": "A"})
    assert matches.codes == ["x", "y"]
    assert (matches.known_of.tolist(), matches.gates.tolist()) == ([1, 0], [0.5, 1.0])
    assert matches.twins.tolist() == [[1, 2]]


def test_a_model_whose_align_knows_no_twins_is_aligned_without_them():
    class Foreign(torch.nn.Module):
        def align(self, matches):
            self.found = matches

        def adapt_to_records(self, train):
            pass

    model = Foreign()
    assert isinstance(model, AlignsCodes)
    align_codes(model, {"x": ("A", 1.0)}, {"B": "A"})
    assert model.found == {"x": ("A", 1.0)}
    assert isinstance(trained_tab(), AlignsTwins)
    assert isinstance(Ensemble(embedding_dim=6, num_classes=2, members=[trained_tab()], max_length=9), AlignsTwins)


def test_several_codes_of_one_share_its_place_by_their_gates():
    matches = CodeMatches(["A", "B"], n_summaries=2, counts=(0,))
    matches.match({"x": ("A", 1.0), "y": ("A", 0.25), "z": ("B", 0.5), "w": ("gone", 1.0), "v": ("B", 0.0)})
    assert matches.codes == ["x", "y", "z"]
    row = torch.arange(41).repeat(3)
    code = torch.arange(3).repeat_interleave(41)
    numbers = torch.arange(41.0).repeat(3)[:, None].repeat(1, 2)
    numbers[code == 1, 1] = float("nan")
    matches.fit([(row, code, numbers, 41)])
    nan = float("nan")
    numbers = torch.tensor([[40.0, 40], [0, nan], [20, 20], [20, nan]])
    rows, known, z, parts = matches.merged(torch.tensor([7, 7, 7, 8]), torch.tensor([0, 1, 2, 1]), numbers, 9)
    assert rows.tolist() == [7, 7, 8]
    assert known.tolist() == [0, 1, 0]
    assert parts.group_N.tolist() == [0, 0, 1, 2]
    top = 2.25  # Phi^-1 of the mid-rank of the greatest of 41
    torch.testing.assert_close(z[0], torch.tensor([(1 - 0.25) / 1.25 * top, top]), atol=0.01, rtol=0)
    torch.testing.assert_close(z[1], torch.zeros(2), atol=1e-5, rtol=0)
    assert z[2].isnan().tolist() == [False, True]


def test_a_record_lacks_codes_of_its_own_dataset_only():
    """Counts of a code of the second dataset are ranked among its 41 records, not among those of the first."""
    found = []
    for dataset_of in ({"x": 0, "y": 1}, None):
        matches = CodeMatches(["A"], n_summaries=1, counts=(0,))
        matches.match({"x": ("A", 1.0), "y": ("A", 1.0)}, dataset_of)
        few, many = torch.arange(41), torch.arange(41, 441)
        row, code = torch.cat([few, many]), torch.cat([torch.ones(41), torch.zeros(400)]).long()
        matches.fit([(row, code, torch.cat([torch.arange(1.0, 42.0), torch.arange(400.0)])[:, None], 441)])
        found.append(float(matches.merged(torch.tensor([0]), torch.tensor([1]), torch.tensor([[21.0]]), 1)[2]))
    assert found[0] == pytest.approx(0.0, abs=1e-4), "the middle of its own"
    assert found[1] > 1.5, "with the zeros of all records it would seem large"


def test_aligned_and_back():
    model = trained_tab()
    before = model(batch(seed=5))
    model.set_vocabulary(vocabulary(HERE))
    model.align({"x": ("A", 0.5)})
    model.adapt_to_records([batch()])
    assert not torch.allclose(model(batch(seed=5)), before)
    model.align(None)
    model.set_vocabulary(vocabulary(KNOWN))
    torch.testing.assert_close(model(batch(seed=5)), before)


def test_an_aligned_model_is_loaded_as_it_was():
    model = trained_tab()
    model.set_vocabulary(vocabulary([*HERE, "more", "codes"]))
    model.align(ONE_TO_ONE)
    model.adapt_to_records([batch(unit=lambda x: 3 * x)])
    expected = model(batch(seed=4))
    again = CodeTab(embedding_dim=6, num_classes=2, has_values=True, model_dim=8, hidden_dim=8, n_gates=4, n_members=2)
    again.set_vocabulary(vocabulary([*HERE, "more", "codes"]))
    again.align(ONE_TO_ONE)
    again.load_state_dict(model.state_dict())
    again.set_vocabulary(vocabulary([*HERE, "more", "codes"]))
    torch.testing.assert_close(again.eval()(batch(seed=4)), expected)


def test_pooled_features_are_loaded_as_they_were_and_as_earlier_versions_kept_them():
    def built() -> torch.nn.Module:
        features = CodeFeatures(has_values=True, max_codes=9, times=True)
        features.set_vocabulary(vocabulary(HERE))
        features.pool({"x": ("x", 1.0), "y": ("x", 0.5), "z": ("z", 1.0)})
        return torch.nn.ModuleDict({"features": features})

    model = built()
    model["features"].choose([batch()])
    model["features"].fit_to_records([batch()])
    expected, earlier = model["features"](batch(seed=5)), model.state_dict()
    earlier["features._of_matches._extra_state"] = {"codes": HERE, "valued": HERE}
    for state in (model.state_dict(), current_state(earlier)):
        again = built()
        again.load_state_dict(state)
        torch.testing.assert_close(again["features"](batch(seed=5)), expected, rtol=0, atol=0, equal_nan=True)


def test_dropped_codes_and_noise_are_of_training_alone():
    model = trained_tab()
    model.body.code_dropout, model.body.text_noise = 0.5, 0.2
    torch.testing.assert_close(model(batch()), model(batch()))
    model.train()
    model.body.dropout.p = 0.0
    assert not torch.allclose(model(batch()), model(batch()))
    with pytest.raises(UserError, match=r"model\.code_dropout=1"):
        CodeTab(embedding_dim=6, num_classes=2, code_dropout=1.0)


def test_boosting_of_an_earlier_version_is_refused_in_words():
    features = CodeFeatures(has_values=True, max_codes=9, times=True)
    features.set_vocabulary(vocabulary(KNOWN))
    features.set_extra_state({"codes": KNOWN, "valued": KNOWN})
    with pytest.raises(UserError, match=r"earlier version.*data\.aligned_to=none"):
        features.align(ONE_TO_ONE)


def test_summaries_know_which_codes_are_matched():
    summaries = CodeSummaries(has_values=True, windows_hours=(12, 24, 36, 48))
    summaries.set_vocabulary(vocabulary(KNOWN))
    summaries.set_vocabulary(vocabulary(HERE))
    summaries.align({"y": ("C", 0.5)})
    assert summaries.code_of_token.tolist() == [-1, -1, -1, 0, -1]
    pairs = summaries(batch())
    assert set(pairs.code.tolist()) == {2}


def test_a_number_that_train_never_varied_says_nothing_there():
    """Train's records are of half a day, so that its later windows are empty; those of the other hospital last for two."""
    model = trained_tab()
    summaries = (
        model.body.input if hasattr(model, "body") else next(m for m in model.modules() if isinstance(m, CodeSummaries))
    )
    longer = batch(seed=3)
    longer["days"] = longer["days"] * 2
    summaries.set_vocabulary(vocabulary(HERE))
    summaries.align(ONE_TO_ONE)
    summaries.fit([longer])
    found = summaries.normalise(summaries(longer))
    later = [*range(11, 13), *range(15, 17)]  # counts and means of the third and fourth window
    assert found[:, later].abs().max() == 0
    assert found[:, :9].abs().max() > 1
    assert found[:, 9:11].abs().max() > 0.5


@pytest.mark.parametrize("windows_hours", [None, (12, 24)])
def test_the_table_of_chosen_codes_holds_the_summaries_of_the_pairs(windows_hours):
    """The summaries of matched codes before they become scores are those of a model that chose these codes."""
    features = CodeFeatures(has_values=True, max_codes=9, times=True, windows_hours=windows_hours)
    features.set_vocabulary(vocabulary(HERE))
    features.choose([batch()])
    there = batch(n=7, seed=5)
    there["days"] = torch.linspace(2, 0, there["days"].shape[1]).expand_as(there["days"])
    there["values"][0, :2] = float("nan")
    table, names = features(there), features.names
    features.pool({code: (code, 1.0) for code in HERE})
    row, code, found = features._pairs(there)
    n = 0
    for r, c, summaries in zip(row.tolist(), code.tolist(), found, strict=True):
        mine = [i for i, name in enumerate(names) if name.startswith(f"{HERE[c]}/")]
        torch.testing.assert_close(summaries, table[r, mine], rtol=0, atol=0, equal_nan=True)
        n += summaries[0] > 0
    assert n == sum(table[:, [names.index(f"{code}/count") for code in HERE]].flatten() > 0)
