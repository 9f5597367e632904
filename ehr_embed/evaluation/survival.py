"""Evaluation of times to an outcome: concordance, Brier score, AUROC and calibration at horizons, by scikit-survival.

A sample with a competing event is known never to have the outcome. Its time is set to the end of the longest follow-up, without
an event (Wolbers et al. 2009, doi:10.1097/EDE.0b013e3181a39056), so that all metrics compare the cumulative incidence with what
happened. Without competing events these are the usual metrics of right-censored times.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.data.outcomes import CENSORED, COMPETING, EVENT
from ehr_embed.evaluation.bootstrap import Booleans, Floats, SubjectBootstrap, draw_counts
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import summaries

log = logging.getLogger(__name__)
SURVIVAL_METRICS = (
    *(Metric(name, is_higher_better=True, is_ranking=True) for name in ("concordance", "concordance_ipcw", "auroc_t")),
    *(Metric(name, is_higher_better=False) for name in ("integrated_brier", "calibration_error", "loss")),
)
PAIRS_PER_INTERVAL = 2e9
"""Comparisons of a sample with an event that all replicates of a split may cost; the bootstrap draws fewer replicates of large
splits, at least `FEWEST`."""
FEWEST, MOST = 50, 200
"""Fewest and most replicates: each computes every metric anew, in about 50 ms for 1,750 samples with 150 events."""
N_GROUPS = 10
"""Groups of equal size, by predicted risk, whose mean risk is compared with the observed share."""


@dataclass(frozen=True)
class Times:
    """Right-censored times of the n samples that an outcome is evaluated on, competing events resolved.

    Attributes:
        days: (n,) to the event or to censoring.
        is_event: (n,).
    """

    days: Floats
    is_event: Booleans

    @classmethod
    def of(cls, days: npt.NDArray[Any], status: npt.NDArray[Any]) -> Times:
        """Build the times from days and statuses (n,) of `ehr_embed.data.outcomes`, none of them excluded."""
        days = np.asarray(days, np.float64)
        return cls(np.where(status == COMPETING, days.max() + 1, days), status == EVENT)

    @property
    def surv(self) -> npt.NDArray[Any]:
        """Return the structured array that scikit-survival takes."""
        found = np.empty(len(self.days), [("event", bool), ("days", np.float64)])
        found["event"], found["days"] = self.is_event, self.days
        return found

    def take(self, index: npt.NDArray[np.intp]) -> Times:
        """Return the times at `index`."""
        return Times(self.days[index], self.is_event[index])


def survival_metrics(
    days: npt.NDArray[Any],
    status: npt.NDArray[Any],
    incidence: Floats,
    nll: Floats,
    *,
    grid_days: Sequence[float],
    horizons_days: Sequence[float],
    subject_ids: npt.ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return the metrics of one outcome, each with a subject-level bootstrap interval.

    `concordance` is Harrell's index of the incidence at the last time of the grid; `concordance_ipcw` is Uno's, up to the last
    horizon. `integrated_brier` is the Brier score under inverse-probability-of-censoring weights, averaged over the grid's
    times within the follow-up. `auroc_t` is the mean over horizons of the cumulative/dynamic AUROC. `calibration_error` is the
    mean over horizons, and over ten groups of equal size, of the gap between mean predicted and observed incidence. `loss` is
    the mean negative log likelihood.

    Args:
        days: (n,) to the event, the competing event or censoring.
        status: (n,) of `ehr_embed.data.outcomes`, none of them EXCLUDED.
        incidence: (n, G) probability that the outcome has happened by each time of the grid.
        nll: (n,) negative log likelihoods.
        grid_days: (G,) ascending; it holds all horizons.
        horizons_days: times at which risks are judged.
        subject_ids: (n,).
        n_bootstrap: replicates, of which at most 200 are drawn, and of a large split at least 50, since concordance costs (events
            x samples) each; `n_replicates` says how many.
        seed, confidence: as in `binary_metrics`.

    Returns:
        Each of `SURVIVAL_METRICS` -> {"value", "low", "high"}; "n", "n_subjects", "n_events", "n_competing", "n_replicates"; and
        "at_horizons", days -> auroc, predicted, observed and calibration_error. A replicate that does not define a metric, such as
        the AUROC at a horizon before its first event, is left out of the metric's interval.
    """
    times, grid = Times.of(days, status), np.asarray(grid_days, np.float64)
    bootstrap = SubjectBootstrap.of(subject_ids, n_samples=len(times.days), n_bootstrap=n_bootstrap, seed=seed)
    cost = max(1, int(times.is_event.sum())) * len(times.days)
    n_replicates = min(bootstrap.n_bootstrap, MOST, max(FEWEST, int(PAIRS_PER_INTERVAL // cost)))
    horizons = [int(np.flatnonzero(grid == horizon)[0]) for horizon in horizons_days]
    rng, replicates = np.random.default_rng(seed), []
    for number in range(1 + n_replicates):
        index = np.arange(len(times.days))
        if number:
            index = np.repeat(index, draw_counts(bootstrap.n_subjects, rng)[bootstrap.subject])
        found, at_horizons = _metrics(times.take(index), incidence[index], grid, horizons)
        if not number:
            told = at_horizons
        replicates.append(found | {"loss": float(nll[index].mean())})
    arrays = {name: np.array([found[name] for found in replicates]) for name in replicates[0]}
    facts = {
        "n": len(times.days),
        "n_subjects": bootstrap.n_subjects,
        "n_events": int(times.is_event.sum()),
        "n_replicates": n_replicates,
        "n_competing": int((status == COMPETING).sum()),
        "at_horizons": {f"{grid[at]:g}": {k: none_if_nan(v) for k, v in told[at].items()} for at in horizons},
    }
    return summaries(arrays, confidence) | facts


def none_if_nan(value: float) -> float | None:
    """Return None for NaN, since JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _metrics(
    times: Times, incidence: Floats, grid: Floats, horizons: Sequence[int]
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Return the metrics of one replicate but its loss, and its facts at each horizon."""
    # Imported here: only tasks with times need the library.
    from sksurv.metrics import (
        brier_score,
        concordance_index_censored,
        concordance_index_ipcw,
        cumulative_dynamic_auc,
    )

    surv, risk = times.surv, incidence[:, -1]
    names = ("concordance", "concordance_ipcw", "integrated_brier", "auroc_t", "calibration_error")
    found = dict.fromkeys(names, np.nan)
    at_horizons = {
        at: dict.fromkeys(("auroc", "predicted", "observed", "calibration_error"), np.nan) for at in horizons
    }
    first_event = times.days[times.is_event].min(initial=np.inf)
    if not (first_event < times.days.max()):
        return found, at_horizons  # no event that comes before another sample's time, so nothing can be ranked
    found["concordance"] = concordance_index_censored(times.is_event, times.days, risk)[0]
    inside = np.flatnonzero((grid > times.days.min()) & (grid < times.days.max()))
    within = [at for at in horizons if at in set(inside.tolist())]
    if len(inside):
        _, brier = brier_score(surv, surv, 1 - incidence[:, inside], grid[inside])
        width = float(np.ptp(grid[inside]))
        found["integrated_brier"] = float(np.trapezoid(brier, grid[inside]) / width if width else brier[0])
    if within and first_event < grid[within[-1]]:
        found["concordance_ipcw"] = concordance_index_ipcw(surv, surv, incidence[:, within[-1]], tau=grid[within[-1]])[
            0
        ]
    weights = _event_weights(times)
    for at in within:
        seen = times.is_event & (times.days <= grid[at])
        told = at_horizons[at]
        told["predicted"] = float(incidence[:, at].mean())
        told["observed"] = float((weights * seen).mean())
        groups = np.array_split(np.argsort(incidence[:, at], kind="stable"), min(N_GROUPS, len(seen)))
        gaps = [abs(float((weights * seen)[g].mean() - incidence[g, at].mean())) * len(g) for g in groups]
        told["calibration_error"] = sum(gaps) / len(seen)
        if seen.any() and (times.days > grid[at]).any():
            told["auroc"] = float(cumulative_dynamic_auc(surv, surv, incidence[:, at], [grid[at]])[0][0])
    for name, key in (("auroc_t", "auroc"), ("calibration_error", "calibration_error")):
        values = [told[key] for told in at_horizons.values() if np.isfinite(told[key])]
        found[name] = float(np.mean(values)) if values else np.nan
    return found, at_horizons


def _event_weights(times: Times) -> Floats:
    """Return one over the probability that each sample was not censored before its event, (n,); 0 for a censored sample."""
    from sksurv.nonparametric import CensoringDistributionEstimator

    return CensoringDistributionEstimator().fit(times.surv).predict_ipcw(times.surv)


def observed_share(times: Times, at_days: float) -> float:
    """Return the share of samples with the event by a time, (1 - Kaplan-Meier).

    >>> observed_share(Times(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, False])), 3.5)
    0.625
    """
    from sksurv.nonparametric import kaplan_meier_estimator

    days, survival = kaplan_meier_estimator(times.is_event, times.days)
    return 1 - float(np.r_[1.0, survival][np.searchsorted(days, at_days, side="right")])


def is_evaluated(status: npt.NDArray[Any]) -> Booleans:
    """Return which samples an outcome is evaluated on, (n,): those that are not excluded."""
    return (status == EVENT) | (status == CENSORED) | (status == COMPETING)
