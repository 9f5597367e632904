"""Open the demo cohort with times to a first stroke, whose hazard is a known function of the record.

The cohort is that of `cohort.py`, drawn from the same numbers. The times come from a random stream of their own, and lie in a
dataset of their own, so that nothing of `data=demo` depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from meds import CodeMetadataSchema, DataSchema

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import DrawSeed
from ehr_embed.sources.cohort import LABELS, MINUTE, RISKS, Subjects, write_demo_cohort
from ehr_embed.sources.imported import import_once
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.meds_writer import write_parquet
from ehr_embed.sources.protocol import SPLITS

OUTCOME, END = "ICD10CM//I63.9", "FOLLOW_UP_END"
TEXTS = {OUTCOME: "Cerebral infarction, unspecified", END: "End of the follow-up"}
HAZARD_WEIGHT = 0.6
"""Change in the log hazard of the outcome per unit of the cohort's log-odds."""
SHAPE, SCALE_DAYS = 1.3, 1800.0
"""Shape and scale of the Weibull distribution of the times of a subject with mean log-odds."""
FOLLOW_UP_DAYS = (400.0, 1500.0)
"""Shortest and longest follow-up. The events of the cohort's label lie within 360 days, so none of them is cut off."""
TIMES = Path("extra") / "bayes_times.parquet"


def demo_times_source(
    *,
    root: str,
    n_subjects: Subjects,
    seed: DrawSeed,
    splits: str | None = None,
    split_column: str = "split",
    overwrite: bool = False,
) -> MedsSource:
    """Write the cohort with times to `root` unless it is there, and open it as a MEDS dataset.

    Args:
        root: the folder of the dataset.
        n_subjects: subjects of all splits together.
        seed: seed of the cohort.
        splits, split_column: as for `MedsSource`.
        overwrite: whether to write the cohort again.

    Raises:
        UserError: as for `import_once`, `write_demo_cohort` and `MedsSource`, or a split has no subject with the outcome.
    """
    import_once(
        Path(root).expanduser(),
        {"n_subjects": n_subjects, "seed": seed, "outcome": OUTCOME},
        lambda folder: write_timed_cohort(root=folder, n_subjects=n_subjects, seed=seed),
        overwrite=overwrite,
    )
    return MedsSource(root=root, name="demo_times", splits=splits, split_column=split_column)


def write_timed_cohort(*, root: Path, n_subjects: int, seed: int) -> None:
    """Write the cohort of `write_demo_cohort` to `root`, and add a first stroke and the end of the follow-up to its records.

    Let z be a subject's log-odds in the cohort, a known function of the record up to the prediction time, minus their mean. Then
    the hazard of the outcome t days after the prediction is

        SHAPE / SCALE_DAYS * (t / SCALE_DAYS) ** (SHAPE - 1) * exp(HAZARD_WEIGHT * z)

    and the follow-up ends after a time that depends on nothing, uniform over `FOLLOW_UP_DAYS`; the record ends there too.
    `extra/bayes_times.parquet` holds log_hazard (HAZARD_WEIGHT * z), days and is_event of each subject.

    Args:
        root: the folder of the dataset.
        n_subjects: subjects of all splits together.
        seed: seed of the cohort and of the times.

    Raises:
        UserError: as for `write_demo_cohort`, or a split has no subject with the outcome.
    """
    write_demo_cohort(root=root, n_subjects=n_subjects, seed=seed)
    people = pl.read_parquet(root / RISKS)  # in order of subject_id
    log_hazard_S = log_hazards(people["risk"].to_numpy())
    rng = np.random.default_rng([seed, 1])  # the cohort's own stream is default_rng(seed)
    outcome_S = SCALE_DAYS * (rng.standard_exponential(n_subjects) / np.exp(log_hazard_S)) ** (1 / SHAPE)
    end_S = rng.uniform(*FOLLOW_UP_DAYS, n_subjects)
    # Times are whole minutes, as all times of the cohort.
    minutes_S = np.maximum(1, np.minimum(outcome_S, end_S) * 1440).astype(np.int64)
    is_event_S = outcome_S <= end_S
    people = people.select("subject_id", "split").with_columns(
        log_hazard=log_hazard_S,
        days=minutes_S / 1440,
        is_event=is_event_S,
        stop=MINUTE * minutes_S,
        end=MINUTE * (end_S * 1440).astype(np.int64),
    )
    for split in SPLITS:
        own = people.filter(split=split)
        if not own["is_event"].any():
            raise UserError(
                f"data.n_subjects={n_subjects} data.cohort_seed={seed}: none of the {len(own)} subjects drawn for {split} has a "
                f"stroke within the follow-up, so nothing can be ranked. Type: data.n_subjects={max(500, 2 * n_subjects)}"
            )
        _add_times(root, split, own)
    codes = pl.read_parquet(root / "metadata" / "codes.parquet")
    added = pl.DataFrame(
        {"code": list(TEXTS), "description": list(TEXTS.values()), "parent_codes": [None] * len(TEXTS)},
        schema=codes.schema,
    )
    write_parquet(root / "metadata" / "codes.parquet", pl.concat([codes, added]), CodeMetadataSchema)
    write_parquet(root / TIMES, people.drop("stop", "end"))


def log_hazards(risk_S: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the log hazard of each subject, relative to that of a subject with mean log-odds.

    >>> log_hazards(np.array([0.2, 0.8])).round(3).tolist()
    [-0.832, 0.832]
    """
    log_odds_S = np.log(risk_S) - np.log1p(-risk_S)
    return HAZARD_WEIGHT * (log_odds_S - log_odds_S.mean())


def _add_times(root: Path, split: str, people: pl.DataFrame) -> None:
    """Add the outcome and the end of the follow-up to the records of a split, and cut the records off there."""
    path = root / "data" / split / "0.parquet"
    events = pl.read_parquet(path)
    predicted = pl.read_parquet(root / "labels" / LABELS / split / "0.parquet").select("subject_id", "prediction_time")
    people = people.join(predicted, on="subject_id", how="left", maintain_order="left")
    ends = people.select("subject_id", end=pl.col("prediction_time") + pl.col("end"))
    seen = events.join(ends, on="subject_id", how="left", maintain_order="left").filter(
        pl.col("time").is_null() | (pl.col("time") <= pl.col("end"))
    )
    happened = people.filter("is_event").select("subject_id", time=pl.col("prediction_time") + pl.col("stop"))
    added = [happened.with_columns(code=pl.lit(OUTCOME)), ends.select("subject_id", time="end", code=pl.lit(END))]
    frames = [seen.drop("end"), *(frame.with_columns(numeric_value=pl.lit(None, pl.Float32)) for frame in added)]
    whole = pl.concat([frame.select(events.columns) for frame in frames])
    write_parquet(path, whole.sort("subject_id", "time", nulls_last=False, maintain_order=True), DataSchema)


def bayes_concordance(root: Path, keys: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> float | None:
    """Return Harrell's concordance of the true hazards on samples, which no model can exceed in expectation.

    It needs scikit-survival, as task=time_to_event does.

    Args:
        root: the folder of the dataset.
        keys: subject_id and prediction_time, (n,) each, of the samples.
        labels: (n, 2) the days to the outcome or the end of the observation, and 1 for the outcome, as that task has them.

    Returns:
        None where no true hazard is known: the dataset is no such cohort, or a sample is asked at another time, for another
        outcome or for another follow-up.
    """
    if not (root / TIMES).exists() or labels.ndim != 2 or labels.shape[1] != 2:
        return None
    times = pl.concat(pl.read_parquet(root / "labels" / LABELS / split / "0.parquet") for split in SPLITS)
    people = pl.read_parquet(root / TIMES).join(times.select("subject_id", "prediction_time"), on="subject_id")
    asked = pl.DataFrame(dict(keys)).with_columns(asked_days=labels[:, 0], asked_event=labels[:, 1] == 1)
    found = asked.join(people, on=["subject_id", "prediction_time"], how="inner")
    same_days = np.allclose(found["asked_days"], found["days"], rtol=1e-5)  # labels are float32
    if len(found) != len(asked) or not same_days or not found["asked_event"].equals(found["is_event"]):
        return None
    from sksurv.metrics import concordance_index_censored

    is_event, days, log_hazard = (found[name].to_numpy() for name in ("is_event", "days", "log_hazard"))
    return float(concordance_index_censored(is_event, days, log_hazard)[0])
