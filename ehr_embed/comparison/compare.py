"""Compare runs: write one table, plots, and paired bootstrap tests on the held-out subjects that the runs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from ehr_embed.comparison.paired_bootstrap import (
    difference,
    holm,
    least_p,
    paired_replicates,
    replicates_needed,
)
from ehr_embed.comparison.report import best_first, wide_console, write_report
from ehr_embed.comparison.results import find_runs, read_rows
from ehr_embed.comparison.search_report import report_of_folder
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation.bootstrap import NO_INTERVAL
from ehr_embed.evaluation.predictions import Predictions, read_predictions
from ehr_embed.run_folder.layout import predictions_file

MAX_PAIRS_SHOWN = 20
USUAL_P = 0.05


def compare(
    paths: Sequence[Path],
    output: Path,
    *,
    split: str = "held_out",
    reference: Path | None = None,
    n_bootstrap: int | None = None,
) -> pd.DataFrame:
    """Write summary.csv, study.json, plots/ and comparisons.csv of all runs under `paths` into `output`.

    Args:
        paths: run folders, or folders with runs below them.
        output: folder for the results.
        split: split whose predictions are tested.
        reference: the run that every other run is tested against; None = the run with the best objective on tuning, a choice
            that does not depend on the held-out split. Two other runs are not tested against each other, because each
            further test would cost all tests power.
        n_bootstrap: bootstrap draws of subjects; None = as many as the number of comparisons needs (`replicates_needed`).

    Returns:
        One row per metric and run other than the reference: difference, 95 % interval, p, and p after Holm's adjustment over
        the comparisons in that metric.

    Raises:
        UserError: fewer than two runs have predictions, or the runs predict for different subjects, times or labels.
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
    n_bootstrap = replicates_needed(len(tested) - 1) if n_bootstrap is None else n_bootstrap
    pairs = paired_tests(predictions, n_bootstrap=n_bootstrap)
    with atomic_path(output / "comparisons.csv") as path:
        pairs.to_csv(path, index=False)
    report_of_folder(output)  # again, now with the tests
    print_tests(pairs, tested[0], split, output, n_bootstrap)
    return pairs


def paired_tests(predictions: Mapping[str, Predictions], *, n_bootstrap: int) -> pd.DataFrame:
    """Test the first run, the reference, against each other run on the same bootstrap draws of subjects.

    Raises:
        UserError: the runs do not predict for the same subjects, times and labels.
    """
    reference, *others = predictions
    for name, other in predictions.items():
        predictions[reference].refuse_other_samples(other, reference, name)
    values = dict(zip(predictions, paired_replicates(list(predictions.values()), n_bootstrap=n_bootstrap), strict=True))
    rows = []
    for metric in values[reference]:
        found = [difference(values[reference][metric], values[other][metric]) for other in others]
        adjusted = holm([result.p for result in found])
        rows += [
            {"metric": metric, "run": reference, "other": other} | vars(result) | {"p_holm": p}
            for other, result, p in zip(others, found, adjusted, strict=True)
        ]
    return pd.DataFrame(rows)


def print_tests(pairs: pd.DataFrame, reference: str, split: str, output: Path, n_bootstrap: int) -> None:
    """Print the tests of the reference against each other run, and the smallest p-value that the replicates can show."""
    shown = Table(
        title=f"{reference} minus each other run on {split}, paired over subjects, {output / 'comparisons.csv'}",
        title_justify="left",
    )
    for name in ("metric", "other"):
        shown.add_column(name)
    for name in ("difference [95 %]", "p", "p (Holm)"):
        shown.add_column(name, justify="right")
    for metric in pairs["metric"].unique():
        for row in pairs[pairs["metric"] == metric].head(MAX_PAIRS_SHOWN).to_dict("records"):
            has_draws = row["p"] == row["p"]
            interval = f" [{row['low']:+.4f}, {row['high']:+.4f}]" if has_draws else f" ({NO_INTERVAL})"
            p_values = (f"{row['p']:.4f}", f"{row['p_holm']:.4f}") if has_draws else ("", "")
            shown.add_row(row["metric"], row["other"], f"{row['difference']:+.4f}{interval}", *p_values)
    console = wide_console()
    console.print(shown)
    n_comparisons = pairs["other"].nunique()
    least = least_p(n_comparisons, n_bootstrap)
    console.print(
        f"{n_comparisons} comparisons with the reference, {n_bootstrap:,} replicates: the least adjusted p is {least:.4f}.",
        highlight=False,
    )
    if least > USUAL_P:
        needed = replicates_needed(n_comparisons)
        console.print(f"No difference can come out below {USUAL_P}. Type: --n-bootstrap {needed}", highlight=False)
