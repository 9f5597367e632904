"""Folds over a dataset's subjects, and the comparison of an ensemble's recipes over them.

    python -m benchmarks.folds draw DIR --labels NAME --output FOLDS.parquet
    python -m benchmarks.folds draw DIR --labels NAME --output FOLDS.parquet --shares 0.6,0.1,0.3
    python train.py sweeps=folds data.root=DIR task.labels=NAME data.splits=FOLDS.parquet
    python train.py sweeps=folds data.root=DIR task.labels=NAME data.splits=FOLDS.parquet hydra.sweeper.seeds=[0,1,2]
    python -m benchmarks.folds table multirun/folds
    python -m benchmarks.folds table SWEEP SWEEP --output docs/results/paired/folds.csv

A set of a few hundred labels, or a few dozen positive ones in held_out, tells recipes apart only over several folds. Each subject
is held out once, or with `--shares` each column is a draw of its own. `table` gives the mean over folds of each recipe's seeds and
of the ensemble, the SD over the seeds of a fold, and the paired differences from one of the recipes with their 95 % intervals over
folds. The folds of a dataset share subjects of train, so that these intervals are too narrow (Bengio and Grandvalet 2004).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.common import report
from ehr_embed.comparison.results import read_config
from ehr_embed.comparison.tabulate import statistic
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.data.labels import read_labels
from ehr_embed.run_folder.layout import FINISHED, MEMBERS
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS

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


def draws(strata: npt.NDArray[np.int64], n_draws: int, shares: Sequence[float], seed: int) -> npt.NDArray[np.object_]:
    """Return the split (N, F) of N subjects in each of F draws that do not depend on each other.

    Args:
        strata: each subject's stratum (N,): each stratum is split by `shares`.
        n_draws: F.
        shares: of train, tuning and held_out.
        seed: of the draws.

    >>> found = draws(np.array([0] * 30 + [1] * 10), 2, (0.6, 0.1, 0.3), seed=0)
    >>> [int((found[30:, 0] == split).sum()) for split in ("train", "tuning", "held_out")], found.shape
    ([6, 1, 3], (40, 2))
    """
    rng = np.random.default_rng(seed)
    found = np.full((len(strata), n_draws), "train", dtype=object)
    for number in range(n_draws):
        for stratum in np.unique(strata):
            order = rng.permutation(np.flatnonzero(strata == stratum))
            n_out, n_tuning = round(shares[2] * len(order)), round(shares[1] * len(order))
            found[order[:n_out], number] = "held_out"
            found[order[n_out : n_out + n_tuning], number] = "tuning"
    return found


def draw(
    root: Path, labels: str, output: Path, *, n_folds: int, seed: int, shares: Sequence[float] | None = None
) -> pl.DataFrame:
    """Write subject_id and the columns fold1, fold2, ... for `data.splits`; subjects are stratified by their greatest label.

    With `shares` (of train, tuning and held_out) each column is a draw of its own; otherwise each subject is held out once.

    Raises:
        UserError: `root` is no MEDS dataset with splits, or lacks the label set; or `shares` leave a split of a draw without a
            subject of some label.
    """
    source = MedsSource(root=str(root))
    subjects = source.split_of_subjects(max_events=2**62)
    if subjects is None:
        raise UserError(f"{root}: its subjects are not known. Add metadata/subject_splits.parquet")
    own = read_labels(labels, source.labels_dir).frame.group_by("subject_id").agg(pl.col("value").max())
    rows = subjects.select("subject_id").join(own, on="subject_id", how="left").sort("subject_id")
    strata = rows["value"].fill_null("").rank("dense").cast(pl.Int64).to_numpy()
    found = folds(strata, n_folds, seed) if shares is None else draws(strata, n_folds, shares, seed)
    if shares is not None:
        _check_draws(rows["value"], found, labels)
    frame = rows.select("subject_id").with_columns(
        pl.Series(f"fold{fold + 1}", found[:, fold].tolist()) for fold in range(n_folds)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(output)
    return frame


def _check_draws(values: pl.Series, found: npt.NDArray[np.object_], labels: str) -> None:
    """Refuse draws of which a split has no subject with some label, since it could not be judged.

    Args:
        values: each subject's label (N,), null = none.
        found: each subject's split in each draw, (N, F).
        labels: name of the label set.

    Raises:
        UserError: says which label, draw and split.
    """
    for value in values.drop_nulls().unique().sort():
        of_value = found[(values == value).fill_null(False).to_numpy()]
        for number, split in product(range(found.shape[1]), SPLITS):
            if not (of_value[:, number] == split).any():
                raise UserError(
                    f"{labels}: {len(of_value)} subjects have the label {value}, and draw {number + 1} has none in {split}, "
                    "which could not be judged. Give larger shares of train, tuning and held_out, such as --shares 0.4,0.3,0.3, or "
                    "leave --shares out: then each subject is held out once"
                )


def measured(sweep: Path) -> pl.DataFrame:
    """Return dataset, labels, fold, recipe, split, metric and value of each run of a finished sweep over folds.

    A recipe is a member of the ensemble, or the ensemble itself; it has a run per fold and seed.

    Raises:
        UserError: the folder holds no finished ensemble.
    """
    rows = []
    for place in sorted([*sweep.glob(f"*/{FINISHED}"), *sweep.glob(f"*/seed_*/{FINISHED}")]):
        whole = place.parent
        config = read_config(whole)
        about = {
            "dataset": Path(str(config.get("data.root", sweep))).name,
            "labels": str(config.get("task.labels", "")),
            "fold": place.relative_to(sweep).parts[0],
        }
        runs = [(ENSEMBLE, whole)] + [(run.name.rpartition("-")[0], run) for run in sorted((whole / MEMBERS).glob("*"))]
        for recipe, run in runs:
            metrics = json.loads((run / FINISHED).read_text(encoding="utf-8"))
            rows += [
                about | {"recipe": recipe, "split": split, "metric": name, "value": metrics[split][name]["value"]}
                for split in ("tuning", "held_out")
                for name in METRICS
            ]
    if not rows:
        raise UserError(
            f"{sweep}: expected a folder per fold with {FINISHED} and {MEMBERS}/. Type: python train.py sweeps=folds ..."
        )
    return pl.DataFrame(rows)


def against(values: pl.DataFrame, reference: str) -> pl.DataFrame:
    """Return mean and SD over folds per dataset, labels, recipe, split and metric, the SD over the seeds of a fold (mean over
    folds; null for one seed), and the paired difference from a recipe with its standard error and 95 % interval.

    >>> values = pl.DataFrame({"dataset": ["d"] * 4, "labels": ["l"] * 4, "fold": ["1", "2"] * 2, "recipe": ["a"] * 2 + ["b"] * 2,
    ...     "split": ["held_out"] * 4, "metric": ["auroc"] * 4, "value": [0.75, 0.5, 0.5, 0.5]})
    >>> against(values, "b").select("recipe", "mean", "difference", "standard_error").rows()
    [('a', 0.625, 0.125, 0.125), ('b', 0.5, 0.0, 0.0)]

    Raises:
        UserError: no recipe has the name `reference`.
    """
    if reference not in (names := values["recipe"].unique(maintain_order=True).to_list()):
        raise UserError(f"--against {reference}: expected one of {', '.join(names)}")
    keys = ["dataset", "labels", "fold", "split", "metric"]
    of_fold = values.group_by(*keys, "recipe", maintain_order=True).agg(
        pl.col("value").mean(), seeds_sd=pl.col("value").std(), seeds=pl.len()
    )
    other = of_fold.filter(recipe=reference).select(*keys, reference=pl.col("value"))
    rows = of_fold.join(other, on=keys, maintain_order="left").with_columns(
        difference=pl.col("value") - pl.col("reference")
    )
    found = []
    for key, group in rows.group_by("dataset", "labels", "split", "recipe", "metric", maintain_order=True):
        mean, less = statistic(group["value"].to_list()), statistic(group["difference"].to_list())
        found.append(
            dict(zip(("dataset", "labels", "split", "recipe", "metric"), key, strict=True))
            | {"folds": len(group), "seeds": int(group["seeds"].sum()) / len(group)}
            | {"mean": mean.mean, "sd": mean.sd, "seeds_sd": group["seeds_sd"].mean()}
            | {"difference": less.mean, "low": less.low, "high": less.high}
            | {"standard_error": None if less.sd is None else less.sd / len(group) ** 0.5, "reference": reference}
        )
    return pl.DataFrame(found)


def told(rows: pl.DataFrame, reference: str) -> list[str]:
    """Return the lines of a Markdown table, one row per dataset, labels, split and recipe."""
    lines = [
        f"| data | split | recipe | seeds | AUROC | AUPRC | SD over seeds | AUROC less {reference} | AUPRC less {reference} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, labels, split, recipe), group in rows.group_by(
        "dataset", "labels", "split", "recipe", maintain_order=True
    ):
        of = {row["metric"]: row for row in group.iter_rows(named=True)}
        auroc = of["auroc"]
        means = [f"{of[name]['mean']:.4f}" + _plus_minus(of[name]["sd"]) for name in METRICS]
        spread = "" if auroc["seeds_sd"] is None else f"{auroc['seeds_sd']:.4f}"
        less = ["" if recipe == reference else _interval(of[name]) for name in METRICS]
        about = [f"{dataset} {labels}", split, recipe, f"{auroc['seeds']:g}", *means, spread, *less]
        lines.append(f"| {' | '.join(about)} |")
    return lines


def _plus_minus(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.4f}"


def _interval(row: dict[str, float | None]) -> str:
    interval = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
    return f"{row['difference']:+.4f}{interval}"


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
    drawing.add_argument("--shares", help="of train, tuning and held_out, for draws that do not depend on each other")
    table = commands.add_parser("table")
    table.add_argument("sweeps", type=Path, nargs="+", metavar="sweep")
    table.add_argument("--against", default="gbm")
    table.add_argument("--output", type=Path, help="a CSV of the table")
    args = own.parse_args(arguments)
    if args.what == "draw":
        shares = None if args.shares is None else shares_of(args.shares)
        frame = draw(args.root, args.labels, args.output, n_folds=args.folds, seed=args.seed, shares=shares)
        result = {"labels": args.labels, "subjects": len(frame), "folds": args.folds}
        report("folds", result, dataset=args.root.name, device="cpu")
    else:
        rows = against(pl.concat([measured(sweep) for sweep in args.sweeps]), args.against)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(args.output) as temporary:
                rows.write_csv(temporary)
        print("\n".join(told(rows, args.against)))
        report("folds", {"rows": rows.to_dicts()}, dataset=args.sweeps[0].name, device="cpu")


def shares_of(text: str) -> tuple[float, float, float]:
    """Return the shares of train, tuning and held_out.

    >>> shares_of("0.6,0.1,0.3")
    (0.6, 0.1, 0.3)

    Raises:
        UserError: the text is not three shares of sum 1.
    """
    try:
        train, tuning, held_out = (float(part) for part in text.split(","))
    except ValueError:
        train = tuning = held_out = 0.0
    if min(train, tuning, held_out) <= 0 or abs(train + tuning + held_out - 1) > 1e-6:
        raise UserError(
            f"--shares {text}: expected the shares of train, tuning and held_out, of sum 1. Type: --shares 0.6,0.1,0.3"
        )
    return train, tuning, held_out


if __name__ == "__main__":
    main()
