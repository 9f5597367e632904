"""Open the synthetic demo cohort, which is written once as a MEDS dataset and then read like any other."""

from __future__ import annotations

import logging
from pathlib import Path

from ehr_embed.core.files import read_json
from ehr_embed.core.settings import DrawSeed
from ehr_embed.sources.cohort import Subjects, write_demo_cohort
from ehr_embed.sources.imported import import_once
from ehr_embed.sources.meds import MedsSource

log = logging.getLogger(__name__)


def demo_source(
    *,
    root: str,
    n_subjects: Subjects,
    seed: DrawSeed,
    splits: str | None = None,
    split_column: str = "split",
    overwrite: bool = False,
) -> MedsSource:
    """Write the cohort to `root` unless it is there, and open it as a MEDS dataset.

    Args:
        root: the folder of the dataset.
        n_subjects: subjects of all splits together.
        seed: seed of the cohort.
        splits, split_column: as for `MedsSource`.
        overwrite: whether to write the cohort again.

    Raises:
        UserError: as for `import_once`, `write_demo_cohort` and `MedsSource`.
    """

    def write(folder: Path) -> None:
        log.info(
            "%s is filled with a SYNTHETIC cohort of %s subjects (data=demo). Your own data are read by: data=meds data.root=DIR "
            "task.labels=NAME",
            root,
            f"{n_subjects:,}",
        )
        write_demo_cohort(root=folder, n_subjects=n_subjects, seed=seed)

    import_once(
        Path(root).expanduser(),
        {"n_subjects": n_subjects, "seed": seed},
        write,
        overwrite=overwrite,
    )
    return MedsSource(root=root, name="demo", splits=splits, split_column=split_column)


def bayes_auroc(root: Path, split: str) -> float | None:
    """Return the AUROC of the demo's true risk on a split; None for a dataset whose true risk is unknown."""
    path = root / "extra" / "bayes.json"
    return float(read_json(path)["auroc"][split]) if path.exists() else None
