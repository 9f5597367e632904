"""Open the synthetic demo cohort, which is written once as a MEDS dataset and then read like any other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.files import read_json
from ehr_embed.core.settings import DrawSeed
from ehr_embed.sources.cohort import BAYES, LABELS, RISKS, Subjects, auroc_of, write_demo_cohort
from ehr_embed.sources.imported import import_once
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS

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


def bayes_auroc(root: Path, keys: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> float | None:
    """Return the AUROC that the demo's true risk has on samples, which no model can exceed in expectation.

    Args:
        root: the folder of the dataset.
        keys: subject_id and prediction_time, (n,) each, of the samples.
        labels: (n,) their classes, 1 = the outcome.

    Returns:
        None where no true risk is known: the dataset is no demo cohort, its label set was written anew, or a sample has another
        prediction time or label than the one that was drawn with the risk.
    """
    if not (root / BAYES).exists() or labels.ndim != 1:
        return None
    parts = {split: root / "labels" / LABELS / split / "0.parquet" for split in SPLITS}
    if not all(path.exists() for path in parts.values()):
        return None
    risks = pl.read_parquet(root / RISKS, columns=["subject_id", "risk"])
    known = {
        split: pl.read_parquet(path)
        .select("subject_id", "prediction_time", "boolean_value")
        .join(risks, on="subject_id")
        for split, path in parts.items()
    }
    if any(not np.isclose(auroc_of(known[split]), auroc) for split, auroc in read_json(root / BAYES)["auroc"].items()):
        return None
    asked = pl.DataFrame(dict(keys)).with_columns(label=pl.Series(labels == 1))
    on = {"subject_id": "subject_id", "prediction_time": "prediction_time", "label": "boolean_value"}
    found = asked.join(pl.concat(known.values()), left_on=list(on), right_on=list(on.values()), how="inner")
    if len(found) != len(asked) or found["label"].n_unique() != 2:
        return None
    return auroc_of(found.rename({"label": "boolean_value"}))
