"""Compare runs: one table, plots, and paired bootstrap tests on the held-out subjects they share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from ehr_embed.comparison.paired_bootstrap import METRICS, Difference, difference, holm, replicates
from ehr_embed.comparison.report import best_first, wide_console, write_report
from ehr_embed.comparison.results import find_runs, read_rows
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation.bootstrap import Floats
from ehr_embed.evaluation.predictions import Predictions, read_predictions
from ehr_embed.run_folder.layout import predictions_file

MAX_PAIRS_SHOWN = 20


def compare(
    paths: Sequence[Path],
    output: Path,
    *,
    split: str = "held_out",
    reference: Path | None = None,
    n_bootstrap: int = 1000,
) -> pd.DataFrame:
    """Write summary.csv, study.json, plots/ and comparisons.csv of all runs under `paths` into `output`.

    Args:
        paths: run folders, or folders with runs below them.
        split: whose predictions are tested.
        reference: the run the others are shown against; None = the best by its objective on tuning, which
            `split` had no part in choosing.
        n_bootstrap: draws of subjects.

    Returns:
        One row a pair of runs and metric: difference, 95 % interval, p and Holm's p over all pairs of that metric.

    Raises:
        UserError: fewer than two runs with predictions, or runs on different subjects, times or labels.
    """
    folders = find_runs(paths)
    rows, direction = read_rows(folders)
    if reference is not None and reference not in folders:
        raise UserError(f"--reference {reference} is not among the runs: {', '.join(map(str, folders))}")
    table = best_first(pd.DataFrame(rows), [direction])
    write_report(rows, output, directions=[direction], facts={"runs": [str(folder) for folder in folders]})
    tested = [name for name in table["run"] if predictions_file(Path(name), split).exists()]
    if len(tested) < 2:
        raise UserError(
            f"{len(tested)} of {len(folders)} runs have predictions/{split}.parquet; a paired test needs two. "
            f"The table is in {output / 'summary.csv'}"
        )
    if reference is not None:
        tested.insert(0, tested.pop(tested.index(str(reference))))
    predictions = {name: read_predictions(predictions_file(Path(name), split)) for name in tested}
    pairs = paired_tests(predictions, n_bootstrap=n_bootstrap)
    with atomic_path(output / "comparisons.csv") as path:
        pairs.to_csv(path, index=False)
    print_tests(pairs, tested[0], split, output)
    return pairs


def paired_tests(predictions: Mapping[str, Predictions], *, n_bootstrap: int) -> pd.DataFrame:
    """Every pair of runs, under the same draws of subjects; the first run of a pair is the one named earlier.

    Raises:
        UserError: the runs do not predict for the same subjects, times and labels.
    """
    first = next(iter(predictions))
    for name, other in predictions.items():
        predictions[first].refuse_other_samples(other, first, name)
    values: dict[str, dict[str, Floats]] = {
        name: replicates(one, n_bootstrap=n_bootstrap) for name, one in predictions.items()
    }
    rows = []
    for metric in METRICS:
        found: list[tuple[str, str, Difference]] = [
            (one, other, difference(values[one][metric], values[other][metric]))
            for one, other in itertools.combinations(predictions, 2)
        ]
        adjusted = holm([result.p for _, _, result in found])
        rows += [
            {"metric": metric, "run": one, "other": other} | vars(result) | {"p_holm": p}
            for (one, other, result), p in zip(found, adjusted, strict=True)
        ]
    return pd.DataFrame(rows)


def print_tests(pairs: pd.DataFrame, reference: str, split: str, output: Path) -> None:
    """The reference against each other run."""
    shown = Table(
        title=f"{reference} minus each other run on {split}, paired over subjects, {output / 'comparisons.csv'}",
        title_justify="left",
    )
    for name in ("metric", "other"):
        shown.add_column(name)
    for name in ("difference [95 %]", "p", "p (Holm, all pairs)"):
        shown.add_column(name, justify="right")
    for row in pairs[pairs["run"] == reference].head(MAX_PAIRS_SHOWN * len(METRICS)).to_dict("records"):
        interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        shown.add_row(row["metric"], row["other"], interval, f"{row['p']:.3f}", f"{row['p_holm']:.3f}")
    wide_console().print(shown)
