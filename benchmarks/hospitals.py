"""One model across two hospitals: unchanged transfer in both directions with controls, few labels, and pooled training.

    python -m benchmarks.hospitals --home P12 --away EICU --folder runs/hospitals
    python -m benchmarks.hospitals --home P12 --away EICU --folder runs/hospitals --parts few --draws 5

Each part makes the runs that `--folder` lacks, in this process, one after the other, and prints its table. A run that is there
already is left as it is, so that a stopped benchmark goes on where it was. docs/hospitals.md shows the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from hydra import compose, initialize_config_dir

from benchmarks.common import report
from ehr_embed.comparison.paired_bootstrap import difference, paired_replicates
from ehr_embed.core.errors import UserError
from ehr_embed.evaluation import predictions
from ehr_embed.evaluation.metrics import binary_metrics
from ehr_embed.experiment.run import run
from ehr_embed.run_folder.layout import FINISHED, predictions_file
from ehr_embed.sources.protocol import SPLITS

CONF = Path(__file__).parents[1] / "conf"
PARTS = ("unchanged", "few", "pooled")
SIZES = (20, 50, 100, 200)
WAYS = {"gbm": "boosting", "gbm5": "boosting, leaves of 5", "tab": "code_tab from scratch", "tuned": "code_tab transferred",
        "pool": "boosting pooled", "pooltab": "code_tab pooled"}  # fmt: skip
POOLED = ("pool", "pooltab")
WHOLE = {"gbm": "{away}_gbm", "tab": "{away}_tab", "pool": "pool_gbm", "pooltab": "pool_tab"}
"""Runs of other parts that use all labels."""
QUICK = ("trainer.n_bootstrap=0",)
MOST_DRAWS = 4
"""Times as many draws as are wanted are tried, at most, where some have one class only."""
TRAINER = ("trainer.threads=1", "audit=off")
LAST = ("trainer.keep=last", "trainer.patience=null")
CODE_TAB = (
    "model=code_tab", "model.member_weights=text", "model.feeds_absent=false", "model.code_dropout=0.3", "model.text_noise=0.2",
    "data.values=continuous",
)  # fmt: skip
FEW, FEW_BELOW = ("trainer.batch_size=32",), 1000
"""Overrides that `code_tab` gets in addition if it is trained from scratch on fewer labels than this, since batches of 256 would
make two steps per epoch. Fine-tuning does not get them, since it starts from trained weights and lasts three epochs. A pool does
not get them either, since it has the labels of both hospitals."""
MODELS = {"tab": ("experiment=hospitals",), "gbm": ("model=gbm", "data.values=continuous")}
READS = {"tab": CODE_TAB, "gbm": MODELS["gbm"]}
OWN_VECTORS = ("embedder=random_frozen", "model.member_weights=codes")
CONTROLS = {"random": ("embedder=random_frozen",), "learned": OWN_VECTORS}
"""Controls without texts: `random` gives each code a random vector in place of its text's, and `learned` also lets the model learn
weights for each code alone."""
TUNED = ("trainer=short", "trainer.epochs=3", "trainer.learning_rate=1e-4", "trainer.warmup_steps=0", *LAST)
NAMES = {"tab": "code_tab", "gbm": "gbm", "both": "mean logit of both", "random": "code_tab of random vectors",
         "learned": "code_tab of random vectors and learned weights per code"}  # fmt: skip


@dataclass(frozen=True)
class Hospital:
    """A dataset, its label set, and what training on it alone is given besides."""

    name: str
    root: Path
    labels: str
    prefixes: tuple[str, ...] = ()

    @property
    def data(self) -> tuple[str, ...]:
        """Overrides that read it."""
        return ("data=meds", f"data.root={self.root}", f"task.labels={self.labels}")


@dataclass(frozen=True)
class Lab:
    """The two hospitals and the folder of the runs."""

    home: Hospital
    away: Hospital
    folder: Path
    seeds: tuple[int, ...]
    draws: tuple[int, ...]
    sizes: tuple[int, ...] = SIZES
    ways: tuple[str, ...] = tuple(WAYS)
    cache: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def run(self, name: str, *overrides: str) -> dict[str, Any]:
        """Make a run unless it is there, and return its metrics."""
        folder = self.folder / name
        if not (folder / FINISHED).exists():
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("train", overrides=[*overrides, *TRAINER, *self.cache, *self.also, f"run_dir={folder}"])
            run(cfg)
        found: dict[str, Any] = json.loads((folder / FINISHED).read_text())
        return found

    def trained(self, hospital: Hospital, kind: str, seed: int) -> Path:
        """Return the run of a model that was trained on all labels of one hospital."""
        name = f"{hospital.name}_{kind}_{seed}"
        prefixes = () if kind == "gbm" else hospital.prefixes
        how = MODELS[kind] if kind in MODELS else (*MODELS["tab"], *CONTROLS[kind])
        schedule = () if kind == "gbm" else few_schedule(self.n_train(hospital))
        self.run(name, *how, *schedule, *hospital.data, *prefixes, f"seed={seed}")
        return self.folder / name

    def n_train(self, hospital: Hospital) -> int:
        """Return the number of labels of a hospital that its train split has, as a run of trees counts them."""
        found: int = self.run(f"{hospital.name}_gbm_0", *MODELS["gbm"], *hospital.data, "seed=0")["train"]["n"]
        return found

    def unchanged(self, one: Hospital, other: Hospital, kind: str, seed: int, control: str) -> Path:
        """Return the run in which a model of one hospital meets all labels of the other."""
        start = self.trained(one, kind, seed)
        name = f"{one.name}_to_{other.name}_{kind}_{control}_{seed}"
        how = {"texts": (), "shuffled": ("data.alignment_texts=shuffled",), "none": ("data.aligned_to=none",)}[control]
        reads = READS[kind] if kind in READS else (*READS["tab"], *CONTROLS[kind])
        self.run(name, *reads, *other.data, "trainer=evaluate", f"init_from={start}", f"seed={seed}", *how)
        return self.folder / name


def few_schedule(n_labels: int) -> tuple[str, ...]:
    """Return the overrides with which `code_tab` is trained from scratch on so many labels.

    >>> few_schedule(444), few_schedule(8000)
    (('trainer.batch_size=32',), ())
    """
    return FEW if n_labels < FEW_BELOW else ()


def unchanged(lab: Lab) -> list[list[str]]:
    """Return rows: direction, model, and AUROC and AUPRC on all labels of the other hospital by texts, and of the controls."""
    rows = []
    for one, other in ((lab.home, lab.away), (lab.away, lab.home)):
        found: dict[tuple[str, str], list[Predictions]] = {}
        for control in ("texts", "shuffled", "none"):
            for kind in MODELS:
                runs = [lab.unchanged(one, other, kind, seed, control) for seed in lab.seeds]
                found[kind, control] = [Predictions.of(folder, SPLITS) for folder in runs]
            both = zip(found["tab", control], found["gbm", control], strict=True)
            found["both", control] = [tab.with_logits_of(gbm) for tab, gbm in both]
        for kind in CONTROLS:  # what reads no texts can only be aligned
            folder = lab.unchanged(one, other, kind, lab.seeds[0], "texts")
            found[kind, "texts"] = [Predictions.of(folder, SPLITS)]
        for kind in NAMES:
            texts = found[kind, "texts"]
            low, high = texts[0].interval()
            controls = [mean_sd([p.auroc for p in found.get((kind, c), ())]) for c in ("shuffled", "none")]
            rows.append([f"{one.name} to {other.name}, {len(texts[0].labels):,} labels", NAMES[kind],
                         f"{mean_sd([p.auroc for p in texts])} (seed 0: [{low:.3f}, {high:.3f}])",
                         mean_sd([p.auprc for p in texts]), *controls])  # fmt: skip
    return rows


def few(lab: Lab) -> list[list[str]]:
    """Return rows: number of labels of the other hospital, and held-out AUROC there of each way to use them, over draws."""
    away, home = lab.away, lab.home
    start = lab.trained(home, "tab", 0)
    n_train = lab.n_train(away)
    ways: dict[str, tuple[str, ...]] = {
        "gbm": (*MODELS["gbm"], *away.data),
        "gbm5": (*MODELS["gbm"], *away.data, "model.min_leaf_samples=5"),
        "tab": (*MODELS["tab"], *away.data),
        "tuned": (*READS["tab"], *TUNED, *away.data, f"init_from={start}"),
        "pool": ("model=gbm", *pooled_data(lab)),
        "pooltab": (*MODELS["tab"], *pooled_data(lab), *home.prefixes),
    }
    unchanged = {kind: held_out(lab.unchanged(home, away, kind, 0, "texts")) for kind in MODELS}
    rows = [["0", *(f"{unchanged['tab']} (unchanged)" if way == "tuned" else "" for way in ways)]]
    for n in (*lab.sizes, n_train):
        share = 1.0 if n == n_train else round(n / n_train, 6)
        # All labels leave nothing to draw: seeds take the place of draws.
        numbers = lab.seeds if n == n_train else draws_with_cases(lab, n, share)
        cells = []
        for way, overrides in ways.items():
            found: list[float] = []
            for number in numbers if way in lab.ways else ():
                if n == n_train:
                    name = WHOLE.get(way, f"few_{way}_{n}").format(away=away.name)
                    drawn: tuple[str, ...] = (f"seed={number}",)
                else:
                    fraction = f"task.label_fraction={[1.0, share] if way in POOLED else share}"
                    name, drawn = f"few_{way}_{n}", (fraction, f"task.fraction_seed={number}", *QUICK)
                schedule = few_schedule(n) if way == "tab" else ()
                metrics = lab.run(f"{name}_{number}", *overrides, *schedule, *drawn)
                here = metrics.get("datasets", {}).get(away.root.name, metrics)
                found.append(float(here["held_out"]["auroc"]["value"]))
            cells.append(mean_sd(found))
        rows.append([str(n) if n == n_train else f"{n} ({len(numbers)} draws)", *cells])
    return rows


def draws_with_cases(lab: Lab, n: int, share: float) -> list[int]:
    """Return the numbers of the first draws of n labels that hold both classes, as many as are wanted, if there are.

    Nothing can be learned from a draw without a case, so that a further draw takes its place, for all ways alike. Boosting is the
    quickest way to find out.
    """
    found: list[int] = []
    for number in range(MOST_DRAWS * len(lab.draws)):
        if len(found) == len(lab.draws):
            break
        drawn = (f"task.label_fraction={share}", f"task.fraction_seed={number}", *QUICK)
        try:
            lab.run(f"few_gbm_{n}_{number}", *MODELS["gbm"], *lab.away.data, *drawn)
        except UserError as error:
            if "only one class" not in str(error):
                raise
        else:
            found.append(number)
    return found


def pooled(lab: Lab) -> list[list[str]]:
    """Return rows: model, held-out AUROC and AUPRC in each hospital, of training there alone and of the pool."""
    rows = []
    for kind in MODELS:
        for hospital in (lab.home, lab.away):
            alone = [lab.run(f"{hospital.name}_{kind}_{seed}") for seed in lab.seeds]
            together = []
            for seed in lab.seeds:
                prefixes = lab.home.prefixes if kind == "tab" else ()
                together.append(
                    lab.run(f"pool_{kind}_{seed}", *MODELS[kind], *pooled_data(lab), *prefixes, f"seed={seed}")
                )
            cells = []
            for measure in ("auroc", "auprc"):
                own = [float(m["held_out"][measure]["value"]) for m in alone]
                here = [float(m["datasets"][hospital.root.name]["held_out"][measure]["value"]) for m in together]
                cells += [mean_sd(own), mean_sd(here)]
            rows.append([hospital.name, NAMES[kind], *cells, paired(lab, hospital, kind)])
    return rows


def paired(lab: Lab, hospital: Hospital, kind: str) -> str:
    """Return by how much the pool's AUROC is above that of training there alone, and its 95 % interval over subjects; each side is
    the mean logit of its seeds, and both are judged on the same draws of held-out subjects."""
    number = [lab.home, lab.away].index(hospital)
    sides = []
    for name in (f"pool_{kind}", f"{hospital.name}_{kind}"):
        found = [Predictions.of(lab.folder / f"{name}_{seed}", ("held_out",)) for seed in lab.seeds]
        if name.startswith("pool"):
            found = [p.of_pooled(number, 2) for p in found]
        sides.append(replace(found[0], logits=np.mean([p.logits for p in found], axis=0)))
    pool, alone = sides
    assert (pool.ids == alone.ids).all()
    assert (pool.labels == alone.labels).all()
    less = difference(*(part["auroc"] for part in paired_replicates([pool.compared, alone.compared], n_bootstrap=1000)))
    return f"{less.difference:+.3f} [{less.low:+.3f}, {less.high:+.3f}]"


def pooled_data(lab: Lab) -> tuple[str, ...]:
    """Return the overrides that read both hospitals as one."""
    roots, labels = f"[{lab.home.root},{lab.away.root}]", f"[{lab.home.labels},{lab.away.labels}]"
    return ("data=pooled", f"data.roots={roots}", f"data.labels={labels}")


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

    def with_logits_of(self, other: Predictions) -> Predictions:
        """Return the mean of the logits of two models for the same samples."""
        assert (self.ids == other.ids).all()
        return Predictions(self.ids, self.labels, (self.logits + other.logits) / 2)

    def of_pooled(self, number: int, n: int) -> Predictions:
        """Return those of the `number`-th of n pooled datasets, with the subjects' own ids."""
        here = self.ids % n == number
        order = np.argsort(self.ids[here], kind="stable")
        return Predictions(*(x[here][order] for x in (self.ids // n, self.labels, self.logits)))

    @property
    def compared(self) -> predictions.Predictions:
        """These as `ehr_embed compare` reads them, whose bootstrap draws subjects with all their samples."""
        probability_N1 = 1 / (1 + np.exp(-self.logits[:, None]))
        return predictions.Predictions(
            pl.DataFrame({"subject_id": self.ids}), self.labels[:, None] == 1, probability_N1
        )

    def measured(self, n_bootstrap: int) -> dict[str, Any]:
        """Return the metrics of a binary task."""
        return binary_metrics(self.labels, 1 / (1 + np.exp(-self.logits)), threshold=0.5, subject_ids=self.ids,
                              n_bootstrap=n_bootstrap, split_name="all splits")  # fmt: skip

    @property
    def auroc(self) -> float:
        """Area under the ROC curve."""
        return float(self.measured(0)["auroc"]["value"])

    @property
    def auprc(self) -> float:
        """Area under the precision-recall curve."""
        return float(self.measured(0)["auprc"]["value"])

    def interval(self) -> tuple[float, float]:
        """Return the 95 % bootstrap interval of the AUROC over subjects."""
        found = self.measured(1000)["auroc"]
        return found["low"], found["high"]


def held_out(folder: Path) -> str:
    """Return the held-out AUROC of a run."""
    return f"{json.loads((folder / FINISHED).read_text())['held_out']['auroc']['value']:.3f}"


def mean_sd(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation of some values.

    >>> mean_sd([0.8, 0.9]), mean_sd([0.8]), mean_sd([])
    ('0.850 ± 0.071', '0.800', '')
    """
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


TABLES: dict[str, tuple[Callable[[Lab], list[list[str]]], Sequence[str]]] = {
    "unchanged": (unchanged, ("direction", "model", "AUROC", "AUPRC", "AUROC, texts shuffled", "AUROC, not aligned")),
    "few": (few, ("labels", *WAYS.values())),
    "pooled": (pooled, ("hospital", "model", "AUROC alone", "AUROC pooled", "AUPRC alone", "AUPRC pooled",
                        "AUROC pooled - alone")),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs of the chosen parts and print their tables, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="folder of the larger dataset")
    parser.add_argument("--away", type=Path, required=True, help="folder of the other")
    parser.add_argument("--home-labels", default="in_hospital_mortality_48h")
    parser.add_argument("--away-labels", default="in_hospital_mortality_24h")
    parser.add_argument(
        "--home-hours", type=int, nargs="*", default=[12, 24], help="prefixes that the home's labels hold at"
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cache", type=Path, help="folder of stores and tables; the default is that of train.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=SIZES, help="numbers of labels of the part few, beside all"
    )
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="ways to use them")
    parser.add_argument("--also", nargs="*", default=(), help="overrides of all runs, such as trainer.min_steps=30")
    chosen = parser.parse_args(arguments)
    hours = ",".join(map(str, chosen.home_hours))
    shares = ",".join("0.2" for _ in chosen.home_hours)
    prefixes = (f"task.prefixes={{hours:[{hours}],shares:[{shares}]}}",) if chosen.home_hours else ()
    lab = Lab(
        Hospital("home", chosen.home.resolve(), chosen.home_labels, prefixes),
        Hospital("away", chosen.away.resolve(), chosen.away_labels),
        chosen.folder,
        tuple(range(chosen.seeds)),
        tuple(range(chosen.draws)),
        tuple(chosen.sizes),
        tuple(chosen.ways),
        () if chosen.cache is None else (f"cache_dir={chosen.cache}",),
        tuple(chosen.also),
    )
    tables = {}
    for part in chosen.parts:
        make, columns = TABLES[part]
        tables[part] = [list(columns), *make(lab)]
        print("\n".join("| " + " | ".join(row) + " |" for row in tables[part]), flush=True)
    report("hospitals", {"tables": tables}, dataset=f"{chosen.home.name}, {chosen.away.name}", device="cpu")


if __name__ == "__main__":
    main()
