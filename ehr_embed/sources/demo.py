"""The demo cohort: synthetic, written once as a MEDS dataset and read like any other."""

from __future__ import annotations

from pathlib import Path

from ehr_embed.core.files import read_json
from ehr_embed.sources.cohort import write_demo_cohort
from ehr_embed.sources.imported import import_once
from ehr_embed.sources.meds import MedsSource


def demo_source(
    *,
    root: str,
    n_subjects: int,
    seed: int,
    splits: str | None = None,
    split_column: str = "split",
    overwrite: bool = False,
) -> MedsSource:
    """Write the cohort to `root` unless it is there, and open it as MEDS.

    Raises:
        UserError: as `import_once` and `MedsSource`.
    """
    import_once(
        Path(root).expanduser(),
        {"n_subjects": n_subjects, "seed": seed},
        lambda folder: write_demo_cohort(root=folder, n_subjects=n_subjects, seed=seed),
        overwrite=overwrite,
    )
    return MedsSource(root=root, name="demo", splits=splits, split_column=split_column)


def bayes_auroc(root: Path, split: str) -> float | None:
    """AUROC of the demo's true risk on a split, None for a dataset whose risk is not known."""
    path = root / "extra" / "bayes.json"
    return float(read_json(path)["auroc"][split]) if path.exists() else None
