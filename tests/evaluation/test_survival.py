"""Metrics of times to events: equal to naive counts, right about censoring and competing events, and with honest intervals."""

from __future__ import annotations

import numpy as np
import pytest

from ehr_embed.data.outcomes import CENSORED, COMPETING, EVENT
from ehr_embed.evaluation.survival import MOST, Times, observed_share, survival_metrics
from ehr_embed.evaluation.survival_plots import plot_risk_curves, plot_risk_groups

GRID = [2.0, 5.0, 10.0, 20.0]


def cohort(n: int = 400, seed: int = 0, rival: float = 0.0):
    """Days, statuses and true incidence of subjects whose rate is known."""
    rng = np.random.default_rng(seed)
    rate = 0.05 * np.exp(rng.normal(size=n))
    event, censor = rng.exponential(1 / rate), rng.uniform(5, 30, n)
    died = rng.exponential(1 / rival, n) if rival else np.full(n, np.inf)
    days = np.minimum(np.minimum(event, censor), died)
    status = np.where(days == event, EVENT, np.where(days == died, COMPETING, CENSORED))
    total = rate[:, None] + rival
    return days, status, rate[:, None] / total * (1 - np.exp(-total * np.array(GRID)))


def measured(days, status, incidence, **changed):
    options = {"grid_days": GRID, "horizons_days": [5.0, 10.0], "subject_ids": np.arange(len(days)), "n_bootstrap": 0}
    return survival_metrics(days, status, incidence, np.zeros(len(days)), **(options | changed))


def naive_concordance(days, status, risk) -> float:
    """Pairs of which the one with the earlier event has the greater risk; who had a competing event never has the outcome."""
    good = total = 0.0
    when = np.where(status == COMPETING, np.inf, days)
    for i in np.flatnonzero(status == EVENT):
        for j in range(len(days)):
            if when[j] > when[i] or (when[j] == when[i] and status[j] == CENSORED):
                total += 1
                good += (risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j])
    return good / total


@pytest.mark.parametrize("rival", [0.0, 0.03])
def test_concordance_equals_a_naive_count_of_pairs(rival):
    days, status, incidence = cohort(120, rival=rival)
    incidence = np.round(incidence, 2)  # ties
    found = measured(days, status, incidence)["concordance"]["value"]
    assert found == pytest.approx(naive_concordance(days, status, incidence[:, -1]))


def test_the_true_risk_is_calibrated_and_beats_wrong_ones():
    days, status, incidence = cohort(3000, rival=0.02)
    true = measured(days, status, incidence)
    for at in true["at_horizons"].values():
        assert at["predicted"] == pytest.approx(at["observed"], abs=0.03)
    raised = measured(days, status, incidence**0.5)
    shuffled = measured(days, status, np.random.default_rng(1).permutation(incidence))
    assert raised["calibration_error"]["value"] > true["calibration_error"]["value"] + 0.05
    assert raised["integrated_brier"]["value"] > true["integrated_brier"]["value"]
    assert raised["concordance"]["value"] == pytest.approx(true["concordance"]["value"], abs=0.01)
    assert abs(shuffled["concordance"]["value"] - 0.5) < 0.03
    assert abs(shuffled["auroc_t"]["value"] - 0.5) < 0.03
    assert true["auroc_t"]["value"] > 0.7 < true["concordance_ipcw"]["value"]


def test_intervals_draw_subjects_with_all_their_samples_and_stay_the_same():
    days, status, incidence = cohort(200)
    first, again = (measured(days, status, incidence, n_bootstrap=30) for _ in range(2))
    assert first == again
    low, value, high = (first["concordance"][key] for key in ("low", "value", "high"))
    assert low < value < high
    # Each sample four times, as four samples of its subject: no more is known, so the interval must not shrink.
    four = [np.repeat(x, 4, axis=0) for x in (days, status, incidence)]
    of_subjects = measured(*four, n_bootstrap=30, subject_ids=np.repeat(np.arange(200), 4))["concordance"]
    assert of_subjects["high"] - of_subjects["low"] > 0.7 * (high - low)
    assert measured(days, status, incidence, n_bootstrap=10_000)["n_replicates"] == MOST


def test_the_observed_share_is_one_minus_kaplan_meier_and_the_plots_are_drawn(tmp_path):
    days, status, incidence = cohort(100)
    assert observed_share(Times.of(days, status), 1e-9) == 0
    plot_risk_groups(tmp_path / "groups.png", days, status, incidence, grid_days=GRID, title="x")
    plot_risk_curves(tmp_path / "curves.png", incidence, grid_days=GRID, title="x")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("groups", "curves"))
