"""The demo cohort: synthetic, written once as a MEDS dataset and read like any other."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from ehr_embed.files import read_json, remove_leftovers
from ehr_embed.sources.cohort import write_demo_cohort
from ehr_embed.sources.meds import MedsSource


def demo_source(
    *, root: str, n_subjects: int, seed: int, splits: str | None = None, split_column: str = "split"
) -> MedsSource:
    """Write the cohort to `root` unless it is there, and open it as MEDS."""
    folder = Path(root)
    if not (folder / "data").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            remove_leftovers(folder.parent, f"{folder.name}.")
            if not (folder / "data").is_dir():  # another process may have written it meanwhile
                write_demo_cohort(root=folder, n_subjects=n_subjects, seed=seed)
    return MedsSource(root=root, name="demo", splits=splits, split_column=split_column)


def bayes_auroc(root: Path, split: str) -> float | None:
    """AUROC of the demo's true risk on a split, None for a dataset whose risk is not known."""
    path = root / "extra" / "bayes.json"
    return float(read_json(path)["auroc"][split]) if path.exists() else None
