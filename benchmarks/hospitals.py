"""One model across two hospitals: unchanged transfer in both directions with controls, few labels, and pooled training.

    python -m benchmarks.hospitals --home P12 --away EICU --folder runs/hospitals
    python -m benchmarks.hospitals --home P12 --away EICU --folder runs/hospitals --parts few --draws 5
    python -m benchmarks.hospitals --home P12 --away EICU --folder runs/hospitals --parts --output docs/results/hospitals

Each part makes the runs that `--folder` lacks, in this process, one after the other. A run that is there already is left as it is,
so that a stopped benchmark goes on where it was. All runs of the folder are then written as rows of two CSV files, of which the
tables are made; `--parts` without a part does this alone. `python docs/results.py` writes the tables of docs/hospitals.md from the
files in docs/results/hospitals.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import hospital_tables
from benchmarks.common import report
from benchmarks.hospital_rows import PAIRED, ROW, Runs, write
from benchmarks.runs import metrics_of
from ehr_embed.core.errors import UserError

SIZES = (20, 50, 100, 200)
WAYS = ("gbm", "gbm5", "tab", "tuned", "pool", "pooltab")
"""Boosting, boosting with leaves of 5, `code_tab` from scratch, `code_tab` of the other hospital fine-tuned, and both pooled."""
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
READS = {
    "tab": CODE_TAB,
    "gbm": MODELS["gbm"],
    "codes": ("model=code_encoder", "data.values=continuous"),
    "events": ("model=encoder_small", "data.values=continuous"),
}
SEQUENCES = {
    "codes": (
        *READS["codes"], "trainer=short", "trainer.epochs=8", "trainer.learning_rate=2e-3", "trainer.warmup_steps=100",
        "trainer.batch_size=128", "trainer.batch_tokens=131072",
    ),
    "events": (*READS["events"], "trainer=short", "trainer.epochs=6"),
}  # fmt: skip
"""Models that read vectors of codes or of single events, without a teacher. They are measured from the larger hospital alone."""
OWN_VECTORS = ("embedder=random_frozen", "model.member_weights=codes")
CONTROLS = {"random": ("embedder=random_frozen",), "learned": OWN_VECTORS}
"""Controls without texts: `random` gives each code a random vector in place of its text's, and `learned` also lets the model learn
weights for each code alone."""
TUNED = ("trainer=short", "trainer.epochs=3", "trainer.learning_rate=1e-4", "trainer.warmup_steps=0", *LAST)


@dataclass(frozen=True)
class Hospital:
    """A dataset, its label set, and what training on it alone is given besides."""

    name: str
    root: Path
    labels: str
    prefixes: tuple[str, ...] = ()

    @property
    def data(self) -> tuple[str, ...]:
        """Return the overrides that read it."""
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
    ways: tuple[str, ...] = WAYS
    cache: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def run(self, name: str, *overrides: str) -> dict[str, Any]:
        """Make a run unless it is there, and return its metrics."""
        return metrics_of(self.folder / name, [*overrides, *TRAINER, *self.cache, *self.also])

    def trained(self, hospital: Hospital, kind: str, seed: int) -> Path:
        """Return the run of a model that was trained on all labels of one hospital."""
        name = f"{hospital.name}_{kind}_{seed}"
        is_tab = kind == "tab" or kind in CONTROLS
        prefixes = hospital.prefixes if is_tab else ()
        known = MODELS | SEQUENCES
        how = known[kind] if kind in known else (*MODELS["tab"], *CONTROLS[kind])
        schedule = few_schedule(self.n_train(hospital)) if is_tab else ()
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


def make_unchanged(lab: Lab) -> None:
    """Apply the models of each hospital to all labels of the other, by texts and with the controls."""
    for one, other in ((lab.home, lab.away), (lab.away, lab.home)):
        for control in ("texts", "shuffled", "none"):
            for kind in MODELS:
                for seed in lab.seeds:
                    lab.unchanged(one, other, kind, seed, control)
        for kind in CONTROLS:  # what reads no texts can only be aligned
            lab.unchanged(one, other, kind, lab.seeds[0], "texts")
    for kind in SEQUENCES:
        for control in ("texts", "shuffled"):
            for seed in lab.seeds:
                lab.unchanged(lab.home, lab.away, kind, seed, control)


def make_few(lab: Lab) -> None:
    """Use some labels of the other hospital in each of the ways, over draws."""
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
    for seed in lab.seeds:
        lab.unchanged(home, away, "tab", seed, "texts")
    for n in (*lab.sizes, n_train):
        share = 1.0 if n == n_train else round(n / n_train, 6)
        # All labels leave nothing to draw: seeds take the place of draws.
        numbers = lab.seeds if n == n_train else draws_with_cases(lab, n, share)
        for way in lab.ways:
            for number in numbers:
                if n == n_train:
                    name = WHOLE.get(way, f"few_{way}_{n}").format(away=away.name)
                    drawn: tuple[str, ...] = (f"seed={number}",)
                else:
                    fraction = f"task.label_fraction={[1.0, share] if way in POOLED else share}"
                    name, drawn = f"few_{way}_{n}", (fraction, f"task.fraction_seed={number}", *QUICK)
                schedule = few_schedule(n) if way == "tab" else ()
                lab.run(f"{name}_{number}", *ways[way], *schedule, *drawn)


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


def make_pooled(lab: Lab) -> None:
    """Train on all labels of each hospital alone and of the pool."""
    for kind in MODELS:
        for seed in lab.seeds:
            for hospital in (lab.home, lab.away):
                lab.trained(hospital, kind, seed)
            prefixes = lab.home.prefixes if kind == "tab" else ()
            lab.run(f"pool_{kind}_{seed}", *MODELS[kind], *pooled_data(lab), *prefixes, f"seed={seed}")


def pooled_data(lab: Lab) -> tuple[str, ...]:
    """Return the overrides that read both hospitals as one."""
    roots, labels = f"[{lab.home.root},{lab.away.root}]", f"[{lab.home.labels},{lab.away.labels}]"
    return ("data=pooled", f"data.roots={roots}", f"data.labels={labels}")


MAKE: dict[str, Callable[[Lab], None]] = {"unchanged": make_unchanged, "few": make_few, "pooled": make_pooled}


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
    parser.add_argument("--output", type=Path, help="folder of the rows and tables; the default is --folder")
    parser.add_argument(
        "--parts", nargs="*", choices=tuple(MAKE), default=tuple(MAKE), help="runs to make; none makes no run"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=SIZES, help="numbers of labels of the part few, beside all"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="ways to use them")
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
    for part in chosen.parts:
        MAKE[part](lab)
    runs = Runs(lab.folder, {hospital.name: hospital.root.name for hospital in (lab.home, lab.away)})
    output = chosen.output or lab.folder
    write(output / hospital_tables.RUNS, ROW, runs.rows())
    write(output / hospital_tables.PAIRED, PAIRED, runs.paired())
    tables = hospital_tables.tables(output, {}, seeds=len(lab.seeds), draws=len(lab.draws))
    print("\n".join(f"{part}\n\n{table}" for part, table in tables.items()), flush=True)
    report("hospitals", {"tables": tables}, dataset=f"{chosen.home.name}, {chosen.away.name}", device="cpu")


if __name__ == "__main__":
    main()
