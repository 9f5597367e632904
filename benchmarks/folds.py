"""Folds over a dataset's subjects, and the comparison of an ensemble's recipes over them.

    python -m benchmarks.folds draw DIR --labels NAME --output FOLDS.parquet
    python train.py sweeps=folds data.root=DIR task.labels=NAME data.splits=FOLDS.parquet
    python -m benchmarks.folds table multirun/folds

A set of a few hundred labels, or a few dozen positive ones in held_out, tells recipes apart only over several folds. Each subject
is held out once. `table` gives the mean over folds of each recipe's seeds and of the ensemble, and their paired differences from
one of the recipes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.common import report
from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import read_labels
from ehr_embed.run_folder.layout import FINISHED, MEMBERS
from ehr_embed.sources.meds import MedsSource

TUNING_SHARE = 1 / 8
"""Share of the subjects of a fold's other parts that tune: with five folds 70, 10 and 20 % train, tune and are held out."""
METRICS = ("auroc", "auprc")
ENSEMBLE = "ensemble"


def folds(strata: npt.NDArray[np.int64], n_folds: int, seed: int) -> npt.NDArray[np.object_]:
    """Return the split (N, F) of N subjects in each of F folds, in which every subject is held out once.

    Args:
        strata: each subject's stratum (N,): strata are spread evenly over folds and splits.
        n_folds: F.
        seed: of the draw.

    >>> found = folds(np.array([0] * 30 + [1] * 10), 5, seed=0)
    >>> found.shape, [int((found[30:, fold] == "held_out").sum()) for fold in range(5)], int((found[:, 0] == "tuning").sum())
    ((40, 5), [2, 2, 2, 2, 2], 4)
    >>> bool(((found == "held_out").sum(1) == 1).all())
    True
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]  # in random order within each stratum
    found = np.full((len(strata), n_folds), "train", dtype=object)
    for fold in range(n_folds):
        is_out = np.zeros(len(strata), dtype=bool)
        is_out[order[fold::n_folds]] = True
        found[is_out, fold] = "held_out"
        rest = order[~is_out[order]]
        step = round(1 / TUNING_SHARE)
        found[rest[int(rng.integers(step)) :: step], fold] = "tuning"
    return found


def draw(root: Path, labels: str, output: Path, *, n_folds: int, seed: int) -> pl.DataFrame:
    """Write subject_id and the columns fold1, fold2, ... for `data.splits`; subjects are stratified by their greatest label.

    Raises:
        UserError: `root` is no MEDS dataset with splits, or lacks the label set.
    """
    source = MedsSource(root=str(root))
    subjects = source.split_of_subjects(max_events=2**62)
    if subjects is None:
        raise UserError(f"{root}: its subjects are not known. Add metadata/subject_splits.parquet")
    own = read_labels(labels, source.labels_dir).frame.group_by("subject_id").agg(pl.col("value").max())
    rows = subjects.select("subject_id").join(own, on="subject_id", how="left").sort("subject_id")
    strata = rows["value"].fill_null("").rank("dense").cast(pl.Int64).to_numpy()
    found = folds(strata, n_folds, seed)
    frame = rows.select("subject_id").with_columns(
        pl.Series(f"fold{fold + 1}", found[:, fold].tolist()) for fold in range(n_folds)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(output)
    return frame


def measured(sweep: Path) -> pl.DataFrame:
    """Return fold, recipe, split, metric and value (the mean over the recipe's seeds) of a finished sweep over folds.

    Raises:
        UserError: the folder holds no finished ensemble.
    """
    rows = []
    for place in sorted(sweep.glob(f"*/{FINISHED}")):
        fold = place.parent
        runs = [(ENSEMBLE, fold)] + [(run.name.rpartition("-")[0], run) for run in sorted((fold / MEMBERS).glob("*"))]
        for recipe, run in runs:
            metrics = json.loads((run / FINISHED).read_text(encoding="utf-8"))
            rows += [
                {
                    "fold": fold.name,
                    "recipe": recipe,
                    "split": split,
                    "metric": name,
                    "value": metrics[split][name]["value"],
                }
                for split in ("tuning", "held_out")
                for name in METRICS
            ]
    if not rows:
        raise UserError(
            f"{sweep}: expected a folder per fold with {FINISHED} and {MEMBERS}/. Type: python train.py sweeps=folds ..."
        )
    found = pl.DataFrame(rows).group_by("fold", "recipe", "split", "metric", maintain_order=True)
    return found.agg(pl.col("value").mean())


def against(values: pl.DataFrame, reference: str) -> pl.DataFrame:
    """Return mean and SD over folds per recipe, split and metric, and the paired difference from a recipe with its standard error.

    >>> values = pl.DataFrame({"fold": ["1", "2"] * 2, "recipe": ["a"] * 2 + ["b"] * 2, "split": ["held_out"] * 4,
    ...     "metric": ["auroc"] * 4, "value": [0.75, 0.5, 0.5, 0.5]})
    >>> against(values, "b").select("recipe", "mean", "difference", "standard_error").rows()
    [('a', 0.625, 0.125, 0.125), ('b', 0.5, 0.0, 0.0)]

    Raises:
        UserError: no recipe has the name `reference`.
    """
    if reference not in (names := values["recipe"].unique(maintain_order=True).to_list()):
        raise UserError(f"--against {reference}: expected one of {', '.join(names)}")
    keys = ["fold", "split", "metric"]
    other = values.filter(recipe=reference).select(*keys, reference=pl.col("value"))
    rows = values.join(other, on=keys).with_columns(difference=pl.col("value") - pl.col("reference"))
    return rows.group_by("recipe", "split", "metric", maintain_order=True).agg(
        mean=pl.col("value").mean(),
        sd=pl.col("value").std(),
        difference=pl.col("difference").mean(),
        standard_error=pl.col("difference").std() / pl.len().sqrt(),
        folds=pl.len(),
    )


def told(rows: pl.DataFrame, reference: str) -> list[str]:
    """Return the lines of a Markdown table, one row per split and recipe."""
    lines = [
        f"| split | recipe | AUROC | AUPRC | AUROC less {reference} | AUPRC less {reference} |",
        "|---|---|---|---|---|---|",
    ]
    for (split, recipe), group in rows.group_by("split", "recipe", maintain_order=True):
        of = {row["metric"]: row for row in group.iter_rows(named=True)}
        means = [f"{of[name]['mean']:.4f} ± {of[name]['sd']:.4f}" for name in METRICS]
        less = [f"{of[name]['difference']:+.4f} ± {of[name]['standard_error']:.4f}" for name in METRICS]
        lines.append(f"| {split} | {recipe} | {' | '.join(means + less)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw folds, or print the table of a sweep over them."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = own.add_subparsers(dest="what", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("root", type=Path)
    drawing.add_argument("--labels", required=True)
    drawing.add_argument("--output", type=Path, required=True)
    drawing.add_argument("--folds", type=int, default=5)
    drawing.add_argument("--seed", type=int, default=0)
    table = commands.add_parser("table")
    table.add_argument("sweep", type=Path)
    table.add_argument("--against", default="gbm")
    args = own.parse_args(arguments)
    if args.what == "draw":
        frame = draw(args.root, args.labels, args.output, n_folds=args.folds, seed=args.seed)
        result = {"labels": args.labels, "subjects": len(frame), "folds": args.folds}
        report("folds", result, dataset=args.root.name, device="cpu")
    else:
        rows = against(measured(args.sweep), args.against)
        print("\n".join(told(rows, args.against)))
        report("folds", {"rows": rows.to_dicts()}, dataset=args.sweep.name, device="cpu")


if __name__ == "__main__":
    main()
