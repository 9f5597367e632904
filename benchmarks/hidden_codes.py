"""Measure the cost of codes that train never had, with vectors of texts and with learned ids.

    python -m benchmarks.hidden_codes --data DIR --labels NAME --folder runs/hidden --cache CACHE
    python -m benchmarks.hidden_codes --data DIR --labels NAME --folder runs/hidden --share 0.5 --draws 3 --epochs 8

For each draw of codes, models are trained on data whose train split lacks the events of these codes (`data.hidden_codes`),
and meet them in held_out. A run that is in `--folder` already is left as it is. docs/hospitals.md shows the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

from benchmarks.common import report
from ehr_embed.experiment.run import run
from ehr_embed.run_folder.layout import FINISHED

CONF = Path(__file__).parents[1] / "conf"
EMBEDDERS = ("minilm_l6", "learned")


def auroc(folder: Path, overrides: Sequence[str]) -> float:
    """Make a run unless it is there, and return its held-out AUROC."""
    if not (folder / FINISHED).exists():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=[*overrides, f"run_dir={folder}"])
        run(cfg)
    return float(json.loads((folder / FINISHED).read_text())["held_out"]["auroc"]["value"])


def rows(folder: Path, common: Sequence[str], *, share: float, draws: int) -> list[list[str]]:
    """Return for each embedder the mean held-out AUROC with all codes and with hidden ones, and the loss per draw."""
    found, losses = [], {}
    for embedder in EMBEDDERS:
        pairs = []
        for draw in range(draws):
            own = [*common, f"embedder={embedder}", f"seed={draw}"]
            hidden = [f"data.hidden_codes={share}", f"data.hidden_seed={draw}"]
            pairs.append((auroc(folder / f"{embedder}_all_{draw}", own),
                          auroc(folder / f"{embedder}_hidden_{share:g}_{draw}", [*own, *hidden])))  # fmt: skip
        lost = [whole - part for whole, part in pairs]
        losses[embedder] = statistics.mean(lost)
        found.append([embedder, *(f"{statistics.mean(side):.3f}" for side in zip(*pairs, strict=True)),
                      ", ".join(f"{x:.3f}" for x in lost), f"{losses[embedder]:.3f}"])  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs and print their table, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of a MEDS dataset")
    parser.add_argument("--labels", required=True, help="name of its label set")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cache", type=Path, help="folder of stores and tables; the default is that of train.py")
    parser.add_argument("--share", type=float, default=0.5, help="share of the codes that train never has")
    parser.add_argument("--draws", type=int, default=3, help="draws of these codes, each with a seed of its own")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--model", default="encoder_small")
    chosen = parser.parse_args(arguments)
    common = [
        "data=meds", f"data.root={chosen.data.resolve()}", f"task.labels={chosen.labels}", f"model={chosen.model}", "trainer=short",
        f"trainer.epochs={chosen.epochs}", "trainer.threads=1", "trainer.n_bootstrap=0", "audit=off", "report=false",
        "data.describe_unseen=true", *([] if chosen.cache is None else [f"cache_dir={chosen.cache}"]),
    ]  # fmt: skip
    columns = ["vectors", "all codes", f"{chosen.share:.0%} hidden", "AUROC lost per draw", "mean"]
    table = [columns, *rows(chosen.folder, common, share=chosen.share, draws=chosen.draws)]
    print("\n".join("| " + " | ".join(row) + " |" for row in table), flush=True)
    report("hidden_codes", {"table": table}, dataset=chosen.data.name, device="cpu")


if __name__ == "__main__":
    main()
