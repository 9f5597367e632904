"""Read the original pipeline's labels.csv: the cases, the sites of their cancers, and the dates of the cut-off."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.core.lost_data import ONLY_SAID, say_or_refuse

log = logging.getLogger(__name__)
CONTROL = "Control"
"""Class of a subject that is no case, as the original pipeline names it."""
TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True)
class CaseLabels:
    """The rows of a labels.csv.

    Attributes:
        frame: subject_id Int64, is_case Boolean, site String or null, cancerdate Datetime[us] or null.
        has_site: whether the file has the column `site`.
    """

    frame: pl.DataFrame
    has_site: bool

    def cutoffs(self, months: int | None) -> pl.DataFrame:
        """Return subject_id and cutoff, the time `months` before `cancerdate`, of the subjects that have this date.

        The frame is empty if `months` is None.

        >>> frame = pl.DataFrame({"subject_id": [1, 2], "cancerdate": [datetime(2020, 3, 31), None]})
        >>> CaseLabels(frame, False).cutoffs(1).rows()
        [(1, datetime.datetime(2020, 2, 29, 0, 0))]
        """
        dated = self.frame.filter(pl.col("cancerdate").is_not_null() & (months is not None))
        cutoff = pl.col("cancerdate").cast(pl.Datetime("us")).dt.offset_by(f"-{months or 0}mo")
        return dated.select("subject_id", cutoff=cutoff)

    def label_sets(self, last_times: pl.DataFrame, months: int | None) -> dict[str, pl.DataFrame]:
        """Return the label set `is_case` (boolean) and, if there are sites, `site` (one class per site, and `Control`).

        The prediction time is that of a subject's last event, for cases and controls alike: with any other rule the
        time since the last event would distinguish cases from controls. A subject with static events only is predicted
        for at its cut-off.

        Args:
            last_times: subject_id, last_time of every subject of the corpus.
            months: months before `cancerdate` from which on events were left out; None = all were kept.
        """
        joined = last_times.join(self.frame, on="subject_id", how="inner").join(
            self.cutoffs(months), on="subject_id", how="left"
        )
        time = pl.coalesce("last_time", "cutoff", pl.lit(EPOCH)).cast(pl.Datetime("us"))
        rows = joined.select("subject_id", "is_case", "site", prediction_time=time)
        remedy = "Point data.labels_filepath at the labels.csv of this corpus, or add them there."
        n_labels, n_subjects = len(self.frame), len(last_times)
        # A corpus may be a part of the subjects of labels.csv, and most of a corpus may serve for pretraining alone.
        say_or_refuse(
            n_labels - len(rows),
            n_labels,
            "subjects of labels.csv are not in the corpus, and are left out",
            remedy=remedy,
            refused_from=1.0,
        )
        say_or_refuse(
            n_subjects - len(rows),
            n_subjects,
            "subjects of the corpus are not in labels.csv, and have no label",
            remedy=remedy,
            refused_from=ONLY_SAID,
        )
        sets = {"is_case": rows.select("subject_id", "prediction_time", boolean_value="is_case")}
        if self.has_site:
            value = pl.when("is_case").then("site").otherwise(pl.lit(CONTROL))
            classes = rows.select("subject_id", "prediction_time", categorical_value=value)
            if nameless := classes["categorical_value"].null_count():
                log.warning("labels: %d cases have no site; they are left out of the label set `site`", nameless)
            sets["site"] = classes.drop_nulls()
        return sets


def read_case_labels(path: str | None) -> CaseLabels:
    """Read labels.csv.

    Raises:
        UserError: the file or a column is missing, a subject has two rows, or a value is no truth value or ISO date.
    """
    if path is None or not Path(path).is_file():
        raise UserError(
            f"data.labels_filepath: no such file {path}. Expected the corpus' labels.csv with columns subject_id,is_case and, "
            "where known, site,cancerdate."
        )
    frame = pl.read_csv(path, glob=False, infer_schema=False, encoding="utf8-lossy").with_columns(
        pl.all().str.strip_chars()
    )
    for column in ("subject_id", "is_case"):
        if column not in frame.columns:
            raise UserError(f"{path}: column `{column}` is missing, found {', '.join(frame.columns)}; labels need it.")
    missing = [
        pl.lit(None, dtype=pl.String).alias(name) for name in ("site", "cancerdate") if name not in frame.columns
    ]
    has_site = "site" in frame.columns
    raw = frame.with_columns(missing).with_columns(pl.col("site", "cancerdate").replace("", None))
    parsed = raw.select(
        subject_id=pl.col("subject_id").cast(pl.Float64, strict=False).cast(pl.Int64, strict=False),
        is_case=pl.col("is_case").str.to_lowercase().replace_strict(TRUTH, default=None, return_dtype=pl.Boolean),
        site=pl.col("site"),
        cancerdate=pl.col("cancerdate").str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")),
    )
    _refuse(path, raw, parsed["subject_id"].is_null(), "subject_id", "an integer")
    _refuse(path, raw, parsed["subject_id"].is_duplicated(), "subject_id", "one row per subject; this one has several")
    _refuse(path, raw, parsed["is_case"].is_null(), "is_case", "0 or 1")
    unread = parsed["cancerdate"].is_null() & raw["cancerdate"].is_not_null()
    _refuse(path, raw, unread, "cancerdate", "a date as 2015-03-31 (other orders of day and month are ambiguous)")
    return CaseLabels(parsed, has_site)


def _refuse(path: str, raw: pl.DataFrame, bad: pl.Series, column: str, expected: str) -> None:
    if bad.any():
        row = int(bad.arg_true()[0])
        raise UserError(
            f"{path}, row {row}: {column} is {raw[column][row]!r}, expected {expected} ({int(bad.sum())} such rows). "
            "Labels or the cut-off would be wrong; mend the file."
        )
