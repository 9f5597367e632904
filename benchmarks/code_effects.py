"""Measure how much of what a code says about an outcome its text tells, before a model is trained.

    python -m benchmarks.code_effects --data DIR --labels NAME NAME

The effect of a code is the log of the odds of the outcome among the records of train that have it by the prediction time, less that
among those that lack it. Each code's effect is predicted from its text by ridge regression on all other codes. R² is the share of
the variance of effects that these predictions explain; where it is near 0, texts hardly tell what a code does that train never had
(`data.hidden_codes`). The best of several penalties is shown, which flatters texts a little.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.common import report
from benchmarks.hospital_tables import markdown
from ehr_embed.data.labels import read_labels
from ehr_embed.embedding.aligning import bundled
from ehr_embed.sources.meds import MedsSource

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)


def effects(present_NC: npt.NDArray[np.bool_], is_case_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the log odds ratio (C,) of an outcome with each of C codes, with half a record added to each cell.

    Args:
        present_NC: whether each of N records has each code.
        is_case_N: whether each record has the outcome.

    >>> effects(np.array([[1, 0], [1, 0], [0, 0], [0, 1]], dtype=bool), np.array([1, 1, 0, 0], dtype=bool)).round(2)
    array([ 3.22, -1.61])
    """
    present, absent = present_NC.astype(float), 1.0 - present_NC
    case, other = is_case_N.astype(float), 1.0 - is_case_N
    odds = [(case @ part + 0.5) / (other @ part + 0.5) for part in (present, absent)]
    return np.asarray(np.log(odds[0]) - np.log(odds[1]))


def explained(vectors_CE: npt.NDArray[np.floating], values_C: npt.NDArray[np.float64], penalty: float) -> float:
    """Return the share of the variance of values that ridge regression on vectors explains of a code that it did not see.

    Args:
        vectors_CE: one vector per code; their mean is removed and their lengths are made one.
        values_C: one value per code.
        penalty: of the ridge.

    >>> vectors = np.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]]
    >>> round(explained(vectors, np.array([1.0, 1, -1, -1, 2, 2, -2, -2]), 0.1), 2) > 0.9
    True
    >>> explained(vectors, np.array([1.0, -1, 1, -1, 1, -1, 1, -1]), 0.1) < 0
    True
    """
    centred = vectors_CE - vectors_CE.mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    kernel = centred @ centred.T + 1.0
    rest = values_C - values_C.mean()
    hat = kernel @ np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
    # The residual of a code that is left out, by the hat matrix of all.
    left_out = (rest - hat @ rest) / (1.0 - np.diag(hat))
    return float(1.0 - (left_out**2).sum() / (rest**2).sum())


def of_labels(root: Path, labels: str, *, least_records: int) -> tuple[list[str], npt.NDArray[np.float64], int]:
    """Return the texts (C) and effects (C,) of the codes that enough records of train have, and the number of these records."""
    source = MedsSource(root=str(root))
    found = read_labels(labels, source.labels_dir).frame.with_row_index("record")
    splits = source.split_of_subjects(max_events=2**62)
    assert splits is not None, f"{root}: its subjects are not known"
    found = found.join(splits.filter(pl.col("split") == "train").select("subject_id"), on="subject_id")
    events = pl.concat(
        pl.scan_parquet(path).select("subject_id", "time", "code")
        for path in sorted((root / "data").rglob("*.parquet"))
    )
    pairs = (
        events.join(found.lazy().select("record", "subject_id", "prediction_time"), on="subject_id")
        .filter(pl.col("time").is_null() | (pl.col("time") <= pl.col("prediction_time")))
        .select("record", "code").unique().collect()
    )  # fmt: skip
    kept = pairs.group_by("code").len().filter(pl.col("len").is_between(least_records, len(found) - least_records))
    codes = sorted(kept["code"])
    column = {code: number for number, code in enumerate(codes)}
    line = {record: number for number, record in enumerate(found["record"])}
    present_NC = np.zeros((len(line), len(codes)), dtype=bool)
    for record, code in pairs.filter(pl.col("code").is_in(codes)).iter_rows():
        present_NC[line[record], column[code]] = True
    described = dict(pl.read_parquet(root / "metadata" / "codes.parquet").select("code", "description").iter_rows())
    is_case_N = (found["value"].cast(pl.String).str.to_lowercase() == "true").to_numpy()
    return [described.get(code) or code for code in codes], effects(present_NC, is_case_N), len(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table with one row per label set, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of a MEDS dataset")
    parser.add_argument("--labels", nargs="+", required=True, help="names of its binary label sets")
    parser.add_argument(
        "--least-records", type=int, default=30, help="records of train that must have a code, and must lack it"
    )
    chosen = parser.parse_args(arguments)
    rows = []
    for labels in chosen.labels:
        texts, effect_C, n_records = of_labels(chosen.data, labels, least_records=chosen.least_records)
        with bundled(None) as embed:
            vectors_CE = embed(texts)
        best = max(explained(vectors_CE, effect_C, penalty) for penalty in PENALTIES)
        rows.append([labels, f"{n_records:,}", str(len(texts)), f"{effect_C.std():.2f}", f"{best:.2f}"])
    print(markdown(("labels", "records of train", "codes", "SD of effects", "R² by texts"), rows), flush=True)
    report("code_effects", {"table": rows}, dataset=chosen.data.name, device="cpu")


if __name__ == "__main__":
    main()
