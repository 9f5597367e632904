"""Read the runs of `benchmarks.hospitals` as rows of a table, one per run and hospital that it is applied to.

The rows come from the predictions that the runs left, so that every figure has a file behind it. They are written as CSV, to
docs/results/hospitals, and `benchmarks.hospital_tables` makes Markdown of them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import yaml

from ehr_embed.comparison.paired_bootstrap import difference, paired_replicates
from ehr_embed.comparison.provenance_columns import provenance_of
from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation import predictions
from ehr_embed.evaluation.metrics import binary_metrics
from ehr_embed.run_folder.layout import CONFIG, FINISHED, predictions_file
from ehr_embed.sources.protocol import SPLITS

HOSPITALS = ("home", "away")
"""The two hospitals as the names of runs call them, in the order of a pool's datasets."""
MODELS = {
    "tab": "code_tab",
    "gbm": "gbm",
    "gbm5": "gbm with model.min_leaf_samples=5",
    "tuned": "code_tab",
    "pool": "gbm",
    "pooltab": "code_tab",
    "codes": "code_encoder",
    "events": "encoder_small",
    "random": "code_tab with embedder=random_frozen",
    "learned": "code_tab with embedder=random_frozen model.member_weights=codes",
}
"""The model of each kind and way, as the rows call it."""
BOTH = "mean logit of code_tab and gbm"
WAYS = {"tuned": "tuned", "pool": "pooled", "pooltab": "pooled"}
"""The column `way` of runs of the part `few` in which a model does not train on the drawn labels alone."""
ALONE, UNCHANGED, POOLED = "alone", "unchanged", "pooled"
WHOLE_RUN = re.compile(r"(home|away)_([a-z0-9]+)_(\d+)")
UNCHANGED_RUN = re.compile(r"(home|away)_to_(home|away)_([a-z0-9]+)_(texts|shuffled|none)_(\d+)")
FEW_RUN = re.compile(r"few_([a-z0-9]+)_(\d+)_(\d+)")
POOL_RUN = re.compile(r"pool_([a-z0-9]+)_(\d+)")
ROW = (
    "run", "model", "way", "trained_on", "applied_to", "control", "labels", "draw", "seed", "split", "n", "n_positive",
    "auroc", "auroc/low", "auroc/high", "auprc", "auprc/low", "auprc/high", "commit", "hardware", "date",
)  # fmt: skip
"""Columns of a row. `labels` counts the labels of train of `applied_to` that the model has seen; `control` says how codes were
aligned (texts, shuffled, none), and is empty where they were not another hospital's; `draw` is the seed of the drawn labels."""
PAIRED = ("model", "applied_to", "seeds", "n", "difference", "low", "high")
"""Columns of a paired difference: the AUROC of the pool less that of training in `applied_to` alone."""
N_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Predictions:
    """Labels (n,) and logits (n,) of the samples of a run, in the order of subjects and times."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float64]

    @classmethod
    def of(cls, folder: Path, splits: Iterable[str]) -> Predictions:
        """Read those of some splits of a run."""
        frame = pl.concat(pl.read_parquet(predictions_file(folder, split)) for split in splits).sort(
            "subject_id", "prediction_time"
        )
        p = frame["predicted_boolean_probability"].to_numpy().astype(np.float64).clip(1e-9, 1 - 1e-9)
        return cls(
            frame["subject_id"].to_numpy(), frame["boolean_value"].cast(pl.Int64).to_numpy(), np.log(p / (1 - p))
        )

    def with_logits_of(self, *others: Predictions) -> Predictions:
        """Return the mean of the logits of several models for the same samples."""
        for other in others:
            assert (self.ids == other.ids).all()
            assert (self.labels == other.labels).all()
        return replace(self, logits=np.mean([self.logits, *(other.logits for other in others)], axis=0))

    def of_pooled(self, number: int, n: int) -> Predictions:
        """Return those of the `number`-th of n pooled datasets, with the subjects' own ids."""
        here = self.ids % n == number
        order = np.argsort(self.ids[here], kind="stable")
        return Predictions(*(x[here][order] for x in (self.ids // n, self.labels, self.logits)))

    @property
    def compared(self) -> predictions.Predictions:
        """Return these as `ehr_embed compare` reads them, whose bootstrap draws subjects with all their samples."""
        probability_N1 = 1 / (1 + np.exp(-self.logits[:, None]))
        return predictions.Predictions(
            pl.DataFrame({"subject_id": self.ids}), self.labels[:, None] == 1, probability_N1
        )

    def measured(self) -> dict[str, Any]:
        """Return the cells of a row that say how good these are, with 95 % bootstrap intervals over subjects."""
        found = binary_metrics(self.labels, 1 / (1 + np.exp(-self.logits)), threshold=0.5, subject_ids=self.ids,
                               n_bootstrap=N_BOOTSTRAP, split_name="these samples")  # fmt: skip
        cells: dict[str, Any] = {"n": len(self.labels), "n_positive": int(self.labels.sum())}
        for name in ("auroc", "auprc"):
            cells |= {
                name: found[name]["value"],
                f"{name}/low": found[name]["low"],
                f"{name}/high": found[name]["high"],
            }
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in cells.items()}


@dataclass(frozen=True)
class Runs:
    """A folder of runs, and what the two hospitals are called."""

    folder: Path
    names: dict[str, str]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per run, hospital and split that the tables show, in the order of the runs' names."""
        found: list[dict[str, Any]] = []
        for name in sorted(path.parent.name for path in self.folder.glob(f"*/{FINISHED}")):
            found += [{column: row.get(column, "") for column in ROW} for row in self._rows_of(name)]
        return found

    def _rows_of(self, name: str) -> Iterator[dict[str, Any]]:
        if of := WHOLE_RUN.fullmatch(name):
            here, kind, _ = of.groups()
            yield self._row(name, MODELS[kind], ALONE, trained_on=[here], applied_to=here, labels=self.n_train(here))
        elif of := UNCHANGED_RUN.fullmatch(name):
            yield from self._unchanged(name, *of.groups())
        elif of := FEW_RUN.fullmatch(name):
            way, n, number = of.groups()
            how = WAYS.get(way, ALONE)
            trained_on = ["away"] if how == ALONE else ["home", "away"]
            # All labels leave nothing to draw.
            draw = "" if int(n) == self.n_train("away") else number
            yield self._row(name, MODELS[way], how, trained_on=trained_on, applied_to="away", labels=int(n), draw=draw)
        elif of := POOL_RUN.fullmatch(name):
            for here in HOSPITALS:
                labels = self.n_train(here)
                yield self._row(name, MODELS[of[1]], POOLED, trained_on=HOSPITALS, applied_to=here, labels=labels)

    def _unchanged(
        self, name: str, one: str, other: str, kind: str, control: str, seed: str
    ) -> Iterator[dict[str, Any]]:
        about: dict[str, Any] = {"trained_on": [one], "applied_to": other, "control": control, "labels": 0}
        for split in ("all", "held_out"):
            yield self._row(name, MODELS[kind], UNCHANGED, split=split, **about)
        boosted = f"{one}_to_{other}_gbm_{control}_{seed}"
        if kind == "tab" and (self.folder / boosted / FINISHED).exists():
            yield self._row(name, BOTH, UNCHANGED, split="all", also=boosted, **about)

    def _row(
        self, name: str, model: str, way: str, *, trained_on: Sequence[str], applied_to: str, split: str = "held_out",
        also: str | None = None, **about: Any,
    ) -> dict[str, Any]:  # fmt: skip
        folders = [self.folder / run for run in (name, also) if run]
        found = [self._predictions(folder, applied_to, split, way=way) for folder in folders]
        told = provenance_of(folders)
        return {
            "run": "+".join(folder.name for folder in folders), "model": model, "way": way,
            "trained_on": "+".join(self.names[here] for here in trained_on), "applied_to": self.names[applied_to],
            "seed": yaml.safe_load((self.folder / name / CONFIG).read_text())["seed"], "split": split, **about,
            **found[0].with_logits_of(*found[1:]).measured(),
            **{column: told[column] for column in ("commit", "hardware", "date")},
        }  # fmt: skip

    def _predictions(self, folder: Path, applied_to: str, split: str, *, way: str) -> Predictions:
        """Return the predictions of a run for a hospital."""
        found = Predictions.of(folder, SPLITS if split == "all" else (split,))
        return found.of_pooled(HOSPITALS.index(applied_to), len(HOSPITALS)) if way == POOLED else found

    def n_train(self, here: str) -> int:
        """Return the number of labels of train of a hospital, as a run of trees counts them."""
        found: int = json.loads((self.folder / f"{here}_gbm_0" / FINISHED).read_text())["train"]["n"]
        return found

    def paired(self) -> list[dict[str, Any]]:
        """Return by how much the pool's AUROC is above that of training in one hospital alone, and its 95 % interval over subjects.

        Each side is the mean logit of the seeds that both have, and both are judged on the same draws of held-out subjects.
        """
        rows = []
        for kind in ("tab", "gbm"):
            for here in HOSPITALS:
                sides: dict[str, Predictions] = {}
                seeds = [
                    seed for seed in range(100)
                    if all((self.folder / f"{side}_{kind}_{seed}" / FINISHED).exists() for side in ("pool", here))
                ]  # fmt: skip
                if not seeds:
                    continue
                for side, way in (("pool", POOLED), (here, ALONE)):
                    first, *rest = (
                        self._predictions(self.folder / f"{side}_{kind}_{seed}", here, "held_out", way=way)
                        for seed in seeds
                    )
                    sides[way] = first.with_logits_of(*rest)
                pool, alone = sides[POOLED], sides[ALONE]
                assert (pool.ids == alone.ids).all()
                assert (pool.labels == alone.labels).all()
                parts = paired_replicates([pool.compared, alone.compared], n_bootstrap=N_BOOTSTRAP)
                less = difference(*(part["auroc"] for part in parts))
                cells = (
                    MODELS[kind],
                    self.names[here],
                    len(seeds),
                    len(pool.labels),
                    less.difference,
                    less.low,
                    less.high,
                )
                rows.append(dict(zip(PAIRED, (round(x, 6) if isinstance(x, float) else x for x in cells), strict=True)))
        return rows


def write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
