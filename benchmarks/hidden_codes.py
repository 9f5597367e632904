"""Measure the cost of codes that train never had, with vectors of texts and with learned ids.

    python -m benchmarks.hidden_codes --data DIR --labels NAME --folder runs/hidden --cache CACHE
    python -m benchmarks.hidden_codes --data DIR --labels NAME --folder runs/hidden --share 0.5 --draws 3 --epochs 8

For each label set and draw of codes, models are trained on data whose train split lacks the events of these codes
(`data.hidden_codes`), and meet them in held_out. A run that is in `--folder` already is left as it is. One row per run goes to
`hidden_codes.csv` in `--output`, and docs/hospitals.md shows the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import hospital_tables
from benchmarks.common import report
from benchmarks.hospital_rows import write
from benchmarks.runs import metrics_of
from ehr_embed.comparison.provenance_columns import provenance_of

EMBEDDERS = ("minilm_l6", "learned")


ROW = ("run", "labels", "vectors", "hidden", "draw", "seed", "epochs", "auroc", "auprc", "commit", "hardware", "date")
"""Columns of a row. `hidden` is the share of the codes that train never had, and `draw` the draw of these."""


def rows(folder: Path, common: Sequence[str], *, share: float, draws: int, epochs: int) -> list[dict[str, Any]]:
    """Make the runs that are missing, and return one row for each: per embedder and draw, with all codes and with hidden ones."""
    found = []
    for embedder in EMBEDDERS:
        for draw in range(draws):
            own = [*common, f"trainer.epochs={epochs}", f"embedder={embedder}", f"seed={draw}"]
            hidden = [f"data.hidden_codes={share}", f"data.hidden_seed={draw}"]
            sides = (
                (0.0, f"{embedder}_all_{draw}", own),
                (share, f"{embedder}_hidden_{share:g}_{draw}", [*own, *hidden]),
            )
            for part, name, overrides in sides:
                metrics, told = metrics_of(folder / name, overrides)["held_out"], provenance_of([folder / name])
                found.append(
                    {"run": name, "vectors": embedder, "hidden": part, "draw": draw, "seed": draw, "epochs": epochs}
                    | {metric: round(metrics[metric]["value"], 6) for metric in ("auroc", "auprc")}
                    | {column: told[column] for column in ("commit", "hardware", "date")}
                )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs and print their table, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of a MEDS dataset")
    parser.add_argument("--labels", nargs="+", required=True, help="names of its label sets")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs, one folder per label set")
    parser.add_argument("--cache", type=Path, help="folder of stores and tables; the default is that of train.py")
    parser.add_argument("--output", type=Path, help="folder of the rows; the default is --folder")
    parser.add_argument("--share", type=float, default=0.5, help="share of the codes that train never has")
    parser.add_argument("--draws", type=int, default=3, help="draws of these codes, each with a seed of its own")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--model", default="encoder_small")
    chosen = parser.parse_args(arguments)
    common = [
        "data=meds", f"data.root={chosen.data.resolve()}", f"model={chosen.model}", "trainer=short",
        "trainer.threads=1", "trainer.n_bootstrap=0", "audit=off", "report=false",
        "data.describe_unseen=true", *([] if chosen.cache is None else [f"cache_dir={chosen.cache}"]),
    ]  # fmt: skip
    found = []
    for labels in chosen.labels:
        own = [*common, f"task.labels={labels}"]
        of_labels = rows(chosen.folder / labels, own, share=chosen.share, draws=chosen.draws, epochs=chosen.epochs)
        found += [{"labels": labels} | row for row in of_labels]
    path = (chosen.output or chosen.folder) / hospital_tables.HIDDEN
    write(path, ROW, found)
    table = hospital_tables.hidden(hospital_tables.read(path))
    print(table, flush=True)
    report("hidden_codes", {"table": table}, dataset=chosen.data.name, device="cpu")


if __name__ == "__main__":
    main()
