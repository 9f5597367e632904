"""`python -m ehr_embed.predict`: write a finished run's probabilities for the subjects of a MEDS dataset to a parquet file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from ehr_embed.config.check import checks_config
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.threads import AUTO, use_threads
from ehr_embed.experiment.cli import CONF, run_main
from ehr_embed.run_folder.layout import FINISHED

if TYPE_CHECKING:
    import polars as pl

    from ehr_embed.data.labels import LabelSet

log = logging.getLogger(__name__)


@checks_config("PredictKeys")
def predict(cfg: DictConfig) -> Path:
    """Predict as `cfg` (conf/predict.yaml) says, and write the table.

    Returns:
        The path of the file.

    Raises:
        UserError: `Predictor` refuses the run or the dataset, a label is not one of the run's classes, or the run has no
            metrics.json with the threshold that labelled predictions need.
    """
    # Imported here, so that a misspelt override is refused before torch is loaded.
    from ehr_embed.data.labels import read_labels
    from ehr_embed.experiment.inputs import alignment_settings
    from ehr_embed.inference.predictor import Predictor
    from ehr_embed.inference.trained_run import device_named

    device = device_named(cfg.device)
    use_threads(cfg.get("threads", AUTO), device=device.type)
    predictor = Predictor(cfg.run, device=str(device), trusted_packages=cfg.trusted_packages)
    began = time.perf_counter()
    found = predictor.predict_proba(
        cfg.data.root,
        labels=cfg.task.labels,
        split=cfg.split,
        lookups=list(cfg.data.lookups),
        alignment=alignment_settings(cfg),
    )
    log.info(
        "%d predictions for %d subjects in %.1f s",
        len(found), found["subject_id"].n_unique(), time.perf_counter() - began,
    )  # fmt: skip
    path = Path(cfg.output).expanduser()
    labels = None
    if cfg.task.labels is not None:
        labels = read_labels(cfg.task.labels, Path(cfg.data.root) / "labels", needs_values=False)
    if labels is not None and labels.value_column is not None and predictor.predicts_number:
        write_numbers(path, found, labels, predictor.columns[0])
    elif labels is None or labels.value_column is None or not predictor.has_exclusive_classes:
        with atomic_path(path) as temporary:
            found.write_parquet(temporary)
    else:
        write_labelled(path, found, labels, predictor.class_names, run_dir=Path(cfg.run).expanduser())
    print(f"{len(found)} predictions in {path}")
    return path


def write_labelled(path: Path, found: pl.DataFrame, labels: LabelSet, class_names: list[str], *, run_dir: Path) -> None:
    """Write predictions with their labels in the format in which a run writes its own predictions.

    Args:
        path: parquet file to write.
        found: one row per prediction with subject_id, prediction_time and probability_<class>.
        labels: label set at whose prediction times the predictions were made.
        class_names: classes of the run.
        run_dir: the run's folder, whose metrics.json holds the decision threshold chosen on tuning.
    """
    from ehr_embed.evaluation.predictions import write_multiclass_predictions, write_predictions
    from ehr_embed.tasks.classification import encode_classes

    rows = found.join(labels.frame, on=["subject_id", "prediction_time"], how="left", maintain_order="left")
    classes = encode_classes(rows["value"], class_names, f"label set {labels.name}")
    ids, times = rows["subject_id"].to_numpy(), rows["prediction_time"].to_numpy()
    p = rows.select(f"probability_{name}" for name in class_names).to_numpy()
    if len(class_names) == 2:
        write_predictions(
            path,
            subject_ids=ids,
            prediction_times=times,
            labels=classes,
            probabilities=p[:, 1],
            threshold=threshold_of(run_dir),
        )
    else:
        write_multiclass_predictions(
            path, subject_ids=ids, prediction_times=times, labels=classes, probabilities=p, class_names=class_names
        )


def write_numbers(path: Path, found: pl.DataFrame, labels: LabelSet, column: str) -> None:
    """Write predicted numbers with their labels in the format in which a run writes its own predictions.

    Args:
        path: parquet file to write.
        found: one row per prediction with subject_id, prediction_time and `column`.
        labels: label set at whose prediction times the predictions were made.
        column: name of the column of predictions.

    Raises:
        UserError: the labels are no numbers.
    """
    import polars as pl

    from ehr_embed.evaluation.predictions import write_number_predictions
    from ehr_embed.tasks.numbers import as_numbers

    rows = found.join(as_numbers(labels).frame, on=["subject_id", "prediction_time"], how="left", maintain_order="left")
    write_number_predictions(
        path,
        subject_ids=rows["subject_id"].to_numpy(),
        prediction_times=rows["prediction_time"].to_numpy(),
        labels=rows["value"].cast(pl.Float64).to_numpy(),
        predicted=rows[column].to_numpy(),
    )


def threshold_of(run_dir: Path) -> float:
    """Return the probability at and above which a run of a binary task predicts the positive class.

    Raises:
        UserError: the run has no metrics.json with a threshold.
    """
    from ehr_embed.run_folder.finish import read_metrics

    path = run_dir / FINISHED
    threshold = read_metrics(run_dir)["tuning"].get("threshold") if path.is_file() else None
    if threshold is None:
        raise UserError(
            f"{path}: expected the threshold that tuning chose, but the run was stopped before its evaluation. Leave task.labels "
            "out to get probabilities only, or train again."
        )
    return float(threshold)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="predict")
def main(cfg: DictConfig) -> None:
    """Run the command line."""
    predict(cfg)


if __name__ == "__main__":
    run_main(main, "predict")
