"""Measure what models keep after every code got another name, read in each of the ways that this version has.

    python -m benchmarks.renamed_codes --data DIR --labels NAME --renamed gibleed --folder runs/renamed
    python -m benchmarks.renamed_codes --data DIR --labels NAME --renamed gibleed --folder runs/renamed --models encoder_small lift

Each model is trained on the data as they are, and is then applied, unchanged, to the same subjects with renamed codes
(`data.renamed`). A run that is in `--folder` already is left as it is. One row per run is written to `renamed.csv` in `--output`;
docs/hospitals.md shows the table of the file in docs/results/hospitals.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import hospital_tables
from benchmarks.common import report
from benchmarks.hospital_rows import write
from benchmarks.hospitals import CODE_TAB
from benchmarks.runs import metrics_of
from ehr_embed.comparison.provenance_columns import provenance_of
from ehr_embed.embedding.alignment import SHIPPED_RULES

PLAIN_RULES = "rules_without_synonyms.yaml"
READINGS: dict[str, tuple[str, ...]] = {
    "own texts": ("data.aligned_to=none",),
    "nearest": ("data.aligned_to=auto",),
    "nearest, without synonyms": ("data.aligned_to=auto", f"data.alignment_rules={PLAIN_RULES}"),
    "one to one": ("data.alignment_matching=one_to_one",),
    "one to one, without synonyms": ("data.alignment_matching=one_to_one", f"data.alignment_rules={PLAIN_RULES}"),
    "one to one, texts shuffled": ("data.alignment_matching=one_to_one", "data.alignment_texts=shuffled"),
}
"""Ways to read renamed codes, and the overrides that ask for them."""
WITHOUT_RULES = ("own texts", "nearest", "one to one", "one to one, texts shuffled")
"""Readings that need no rules of their own."""
ENCODER = ("model=encoder_small", "trainer=short")


@dataclass(frozen=True)
class Model:
    """A model as the rows call it: the overrides that both of its runs have, those of training alone, its epochs, number of seeds
    and readings."""

    name: str
    reads: tuple[str, ...]
    trains: tuple[str, ...]
    readings: tuple[str, ...]
    epochs: int = 8
    seeds: int = 3


MODELS = {
    "encoder_small": Model("encoder_small", ENCODER[:1], ENCODER[1:], tuple(READINGS)),
    "learned": Model(
        "encoder_small with embedder=learned", (*ENCODER[:1], "embedder=learned"), ENCODER[1:], ("own texts", "one to one")
    ),
    "variants": Model(
        "encoder_small with data.text_variants=0.5", ENCODER[:1], (*ENCODER[1:], "data.text_variants=0.5"), ("own texts",)
    ),
    "adapted": Model(
        "encoder_small with embedder=adapted", (*ENCODER[:1], "embedder=adapted"), ENCODER[1:], ("own texts",), seeds=1
    ),
    "lift": Model(
        "encoder_small with model.whiten=lift", (*ENCODER[:1], "model.whiten=lift", "model.shrinkage=1"), ENCODER[1:], WITHOUT_RULES
    ),
    "code_encoder": Model("code_encoder", ("model=code_encoder",), ("trainer=short",), WITHOUT_RULES, epochs=4, seeds=1),
    "code_tab": Model("code_tab", CODE_TAB, ("experiment=hospitals",), WITHOUT_RULES, epochs=4, seeds=1),
}  # fmt: skip
ROW = (
    "run",
    "model",
    "seed",
    "epochs",
    "codes",
    "auroc",
    "auprc",
    "auroc/kept",
    "auprc/kept",
    "commit",
    "hardware",
    "date",
)
"""Columns of a row. `codes` says how codes are read; it is "as trained" on the data of training."""
AS_TRAINED = "as trained"


def rows_of(model: Model, key: str, folder: Path, common: Sequence[str], renamed: str) -> list[dict[str, Any]]:
    """Make the runs of a model that are missing and return their rows."""
    rows = []
    for seed in range(model.seeds):
        start = folder / f"{key}_{seed}"
        own = [*model.reads, *common, f"seed={seed}"]
        runs = {AS_TRAINED: (start, metrics_of(start, [*own, *model.trains, f"trainer.epochs={model.epochs}"]))}
        for reading in model.readings:
            how = [word.replace(PLAIN_RULES, str(folder / PLAIN_RULES)) for word in READINGS[reading]]
            there = folder / f"{key}_{reading.replace(',', '').replace(' ', '_')}_{seed}"
            # The other words of training belong to the run that trains.
            found = metrics_of(there, [*own, "trainer=evaluate", f"data.renamed={renamed}", f"init_from={start}", *how])
            runs[reading] = there, found
        for reading, (where, found) in runs.items():
            told = provenance_of([where])
            rows.append(
                {"run": where.name, "model": model.name, "seed": seed, "epochs": model.epochs, "codes": reading}
                | {name: round(found["held_out"][name]["value"], 6) for name in ("auroc", "auprc")}
                | {f"{name}/kept": round(found["transfer"][name]["kept"], 6) if "transfer" in found else ""
                   for name in ("auroc", "auprc")}
                | {column: told[column] for column in ("commit", "hardware", "date")}
            )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs, write their rows, and print their table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of a MEDS dataset")
    parser.add_argument("--labels", required=True, help="name of its label set")
    parser.add_argument("--renamed", required=True, help="value of data.renamed: a table of paraphrases")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cache", type=Path, help="folder of stores and tables; the default is that of train.py")
    parser.add_argument("--output", type=Path, help="folder of the rows; the default is --folder")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--also", nargs="*", default=(), help="overrides of all runs")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    rules = yaml.safe_load(SHIPPED_RULES.read_text(encoding="utf-8")) | {"synonyms": None}
    (chosen.folder / PLAIN_RULES).write_text(yaml.safe_dump(rules), encoding="utf-8")
    common = [
        "data=meds", f"data.root={chosen.data.resolve()}", f"task.labels={chosen.labels}", "data.describe_unseen=true",
        "trainer.threads=1", "trainer.n_bootstrap=0", "audit=off", "report=false",
        *([] if chosen.cache is None else [f"cache_dir={chosen.cache}"]), *chosen.also,
    ]  # fmt: skip
    rows = [row for key in chosen.models for row in rows_of(MODELS[key], key, chosen.folder, common, chosen.renamed)]
    path = (chosen.output or chosen.folder) / hospital_tables.RENAMED
    write(path, ROW, rows)
    table = hospital_tables.renamed(hospital_tables.read(path))
    print(table, flush=True)
    report("renamed_codes", {"table": table}, dataset=chosen.data.name, device="cpu")


if __name__ == "__main__":
    main()
