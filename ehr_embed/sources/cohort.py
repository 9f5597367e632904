"""Write a synthetic cohort in MEDS layout whose outcome follows a known risk, so that the best possible AUROC is known.

No data of patients are used: prevalences, values and weights are invented; only the names of conditions, drugs and
laboratory tests are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from meds import CodeMetadataSchema, DataSchema, LabelSchema, SubjectSplitSchema
from pydantic import Field

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import write_json
from ehr_embed.core.settings import DrawSeed, Told, check_setting
from ehr_embed.sources.cohort_codes import (
    AGE_BANDS,
    AGE_WEIGHT,
    CONDITIONS,
    DEMOGRAPHICS,
    INJURY,
    LABS,
    OUTCOMES,
    RARE,
    VISITS,
)
from ehr_embed.sources.meds_writer import dataset_facts, write_parquet
from ehr_embed.sources.protocol import SPLITS

LABELS = "hospitalisation_1y"
RISKS, BAYES = Path("extra") / "bayes_risk.parquet", Path("extra") / "bayes.json"
SPLIT_SHARES = (0.7, 0.15, 0.15)
Subjects = Annotated[
    int, Field(ge=100, le=8_000_000), Told("100 to 8000000", remedy="Fewer would leave a split without an outcome.")
]
"""Largest cohort: the subjects' ids are drawn from 9 million numbers."""
PREVALENCE = 0.25
START = np.datetime64("2015-01-01", "us")
DAY = np.timedelta64(86_400_000_000, "us")
MINUTE = np.timedelta64(60_000_000, "us")


def write_demo_cohort(*, root: Path, n_subjects: int, seed: int) -> None:
    """Write the cohort to `root`, a folder that is made if it is missing.

    A subject's log-odds of the outcome are the sum of three terms of the record up to the prediction time: for each
    condition, its weight times a third of the number of diagnoses (at most 4); for each laboratory test, its weight
    times the mean of its values in standard deviations; and a term for age. `extra/bayes_risk.parquet` holds the
    resulting risks, and `extra/bayes.json` their AUROC in each split, which no model can exceed in expectation.

    Args:
        root: the folder of the dataset.
        n_subjects: subjects of all splits together.
        seed: seed of the cohort.

    Raises:
        UserError: there are too few subjects for three splits with both outcomes, or the folder is not empty.
    """
    if root.is_dir() and any(root.iterdir()):
        raise UserError(
            f"{root} is not empty, and the demo cohort would mix with what it holds. Choose another folder."
        )
    check_setting("data.n_subjects", n_subjects, Subjects)
    check_setting("data.cohort_seed", seed, DrawSeed)
    rng = np.random.default_rng(seed)
    events, prediction_S, log_odds_S, subject_S = _draw(rng, n_subjects)
    risk_S = _with_prevalence(log_odds_S)
    label_S = rng.random(n_subjects) < risk_S
    split_S = np.array(SPLITS)[
        np.searchsorted(np.cumsum(SPLIT_SHARES[:-1]), rng.permutation(n_subjects) / n_subjects, "right")
    ]
    for split in SPLITS:
        if (n_positive := int(label_S[split_S == split].sum())) in (0, n := int((split_S == split).sum())):
            raise UserError(
                f"data.n_subjects={n_subjects} data.cohort_seed={seed}: {n_positive} of the {n} subjects drawn for {split} have "
                "the outcome, expected some with it and some without, since AUROC is undefined for one class. Type: "
                f"data.n_subjects={max(500, 2 * n_subjects)}, or another data.cohort_seed"
            )
    events = pl.concat([events, _outcome_events(rng, label_S, prediction_S)])
    events = events.with_columns(
        subject_id=pl.Series(subject_S)[events["subject"]], split=pl.Series(split_S)[events["subject"]]
    )
    events = events.sort("subject_id", "time", "order", nulls_last=False)
    people = pl.DataFrame(
        {
            "subject_id": subject_S,
            "prediction_time": prediction_S,
            "boolean_value": label_S,
            "risk": risk_S,
            "split": split_S,
        }
    ).sort("subject_id")

    for split in SPLITS:
        write_parquet(
            root / "data" / split / "0.parquet",
            events.filter(split=split).select("subject_id", "time", "code", "numeric_value"),
            DataSchema,
        )
        write_parquet(
            root / "labels" / LABELS / split / "0.parquet",
            people.filter(split=split).drop("risk", "split"),
            LabelSchema,
        )
    write_parquet(
        root / "metadata" / "subject_splits.parquet", people.select("subject_id", "split"), SubjectSplitSchema
    )
    write_parquet(root / "metadata" / "codes.parquet", _code_metadata(), CodeMetadataSchema)
    write_json(root / "metadata" / "dataset.json", dataset_facts("ehr_embed demo"))
    write_parquet(root / RISKS, people.select("subject_id", "risk", "split"))
    auroc = {str(split): auroc_of(part) for (split,), part in people.group_by("split")}
    write_json(root / BAYES, {"auroc": auroc, "n_subjects": n_subjects, "seed": seed})


def auroc_of(rows: pl.DataFrame) -> float:
    """Return the AUROC of `risk` for `boolean_value`; NaN where one class is missing.

    >>> auroc_of(pl.DataFrame({"boolean_value": [False, True, False], "risk": [0.1, 0.9, 0.5]}))
    1.0
    """
    from sklearn.metrics import roc_auc_score  # here, since it takes a second, and few runs need it

    has_both = rows["boolean_value"].n_unique() == 2
    return float(roc_auc_score(rows["boolean_value"], rows["risk"])) if has_both else np.nan


def _draw(
    rng: np.random.Generator, n_subjects: int
) -> tuple[pl.DataFrame, npt.NDArray[np.datetime64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Draw the events, and the prediction time, the log-odds and the subject_id of each subject."""
    subject_S = rng.choice(9_000_000, n_subjects, replace=False) + 1_000_000
    decade_S = rng.choice(len(AGE_BANDS), n_subjects, p=[0.15, 0.22, 0.28, 0.22, 0.13])
    static = [
        _events(np.arange(n_subjects), None, np.where(rng.random(n_subjects) < 0.5, "SEX//F", "SEX//M")),
        _events(np.arange(n_subjects), None, np.array([f"AGE//{band}" for band in AGE_BANDS])[decade_S]),
    ]

    # Visits: irregular, weeks to months apart; the prediction is made an hour after one of the later ones.
    n_visits_S = 4 + rng.poisson(5, n_subjects)
    visit_subject = np.repeat(np.arange(n_subjects), n_visits_S)
    first_visit_S = np.cumsum(n_visits_S) - n_visits_S
    gap_days = rng.lognormal(3.6, 0.9, len(visit_subject))
    gap_days[first_visit_S] = rng.uniform(0, 700, n_subjects)
    days = np.cumsum(gap_days)
    days -= np.repeat(days[first_visit_S] - gap_days[first_visit_S], n_visits_S)
    visit_time = START + (days * 1440).astype(int) * MINUTE
    last_seen_S = first_visit_S + np.maximum(2, (n_visits_S * rng.uniform(0.6, 0.9, n_subjects)).astype(int))
    prediction_S = visit_time[last_seen_S] + 60 * MINUTE
    is_seen = visit_time <= prediction_S[visit_subject]

    kinds = rng.choice([code for code, _ in VISITS], len(visit_subject), p=[0.8, 0.2])
    parts = [_events(visit_subject, visit_time, kinds)]
    log_odds_S = (AGE_WEIGHT * (decade_S - 2.0)).astype(np.float64)
    has: dict[str, npt.NDArray[np.bool_]] = {}
    for condition in CONDITIONS:
        has_S = rng.random(n_subjects) < condition.prevalence * (0.6 + 0.2 * decade_S)
        has[condition.name] = has_S
        is_diagnosed = has_S[visit_subject] & (rng.random(len(visit_subject)) < 0.6)
        parts.append(_some(rng, is_diagnosed, visit_subject, visit_time, [code for code, _ in condition.diagnoses]))
        is_treated = has_S[visit_subject] & (rng.random(len(visit_subject)) < 0.5)
        parts.append(_some(rng, is_treated, visit_subject, visit_time, [code for code, _ in condition.drugs]))
        n_diagnoses_S = np.bincount(visit_subject[is_diagnosed & is_seen], minlength=n_subjects)
        log_odds_S += condition.weight * np.minimum(n_diagnoses_S, 4) / 3

    for lab in LABS:
        level_S = rng.normal(size=n_subjects) + sum(shift * has[name] for name, shift in lab.shifts)
        is_measured = rng.random(len(visit_subject)) < 0.3
        who = visit_subject[is_measured]
        standard = level_S[who] + 0.4 * rng.normal(size=len(who))
        values = np.round(lab.mean + lab.sd * np.maximum(standard, -0.95 * lab.mean / lab.sd), 2)
        parts.append(_events(who, visit_time[is_measured], np.full(len(who), lab.code), values))
        seen = is_seen[is_measured]
        total_S = np.bincount(who[seen], standard[seen], minlength=n_subjects)
        count_S = np.bincount(who[seen], minlength=n_subjects)
        log_odds_S += lab.weight * np.clip(total_S / np.maximum(count_S, 1), -3, 3)

    is_injured = rng.random(len(visit_subject)) < 0.01
    parts.append(_some(rng, is_injured, visit_subject, visit_time, [code for code, _ in (*RARE, INJURY)]))
    # Within a visit the events are seconds to minutes apart.
    events = pl.concat(parts)
    jitter = np.round(rng.uniform(0, 30 * 60, len(events))).astype(int) * 1_000_000
    events = events.with_columns(time=pl.col("time") + pl.Series(jitter).cast(pl.Duration("us")))
    return pl.concat([*static, events]), prediction_S, log_odds_S, subject_S


def _events(
    subject: npt.NDArray[np.int64],
    time: npt.NDArray[np.datetime64] | None,
    codes: npt.NDArray[np.str_],
    values: npt.NDArray[np.float64] | None = None,
) -> pl.DataFrame:
    schema: dict[str, Any] = {
        "subject": pl.Int64,
        "time": pl.Datetime("us"),
        "code": pl.String,
        "numeric_value": pl.Float32,
        "order": pl.Int64,
    }
    order = np.arange(len(subject))
    return pl.DataFrame(
        {"subject": subject, "time": time, "code": codes, "numeric_value": values, "order": order}, schema=schema
    )


def _some(
    rng: np.random.Generator,
    chosen: npt.NDArray[np.bool_],
    subject: npt.NDArray[np.int64],
    time: npt.NDArray[np.datetime64],
    codes: list[str],
) -> pl.DataFrame:
    """Return an event at each chosen visit, with one of the codes at random."""
    return _events(subject[chosen], time[chosen], rng.choice(codes, int(chosen.sum())))


def _outcome_events(
    rng: np.random.Generator, label_S: npt.NDArray[np.bool_], prediction_S: npt.NDArray[np.datetime64]
) -> pl.DataFrame:
    """Draw the events that record the outcome, 1 to 360 days after the prediction time."""
    positive = np.flatnonzero(label_S)
    time = prediction_S[positive] + (rng.uniform(1, 360, len(positive)) * 1440).astype(int) * MINUTE
    codes = rng.choice([code for code, _ in OUTCOMES], len(positive), p=[0.8, 0.15, 0.05])
    return _events(positive, time, codes)


def _with_prevalence(log_odds_S: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return risks whose mean is `PREVALENCE`, by adding an intercept to the log-odds; bisection finds it."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(log_odds_S + middle).mean() < PREVALENCE else (low, middle)
    return _sigmoid(log_odds_S + low)


def _sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def _code_metadata() -> pl.DataFrame:
    """Return code, description and parents of every code; each rare injury has the common parent code for injuries."""
    named = [*DEMOGRAPHICS, *VISITS, *OUTCOMES, INJURY, *((lab.code, lab.text) for lab in LABS)]
    for condition in CONDITIONS:
        named += [*condition.diagnoses, *condition.drugs]
    rows = [(code, text, None) for code, text in named] + [(code, text, [INJURY[0]]) for code, text in RARE]
    schema: dict[str, Any] = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}
    return pl.DataFrame(rows, schema=schema, orient="row")
