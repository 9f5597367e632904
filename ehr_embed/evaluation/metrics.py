"""Evaluation of binary, multi-class and multi-label classification, with subject-level bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError
from ehr_embed.evaluation.bootstrap import Booleans, Floats, Integers, Ranking, SubjectBootstrap
from ehr_embed.evaluation.cells import MANY_SAMPLES, Cells
from ehr_embed.evaluation.metric import Metric

CLASS_METRICS = (
    *(Metric(name, is_higher_better=True, is_ranking=True) for name in ("auroc", "auprc")),
    *(Metric(name, is_higher_better=True) for name in ("f1", "accuracy", "precision", "recall")),
    *(Metric(name, is_higher_better=False) for name in ("brier", "ece", "loss")),
)
METRICS = tuple(metric.name for metric in CLASS_METRICS)
LEAST_PROBABILITY = float(np.finfo(np.float64).eps)
"""Least probability in the loss, as in scikit-learn: a model that is certain and wrong has a finite loss."""


def check_binary(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, split_name: str, what: str = "labels"
) -> tuple[Booleans, Floats]:
    """Return `labels` (n,) as bool and `probabilities` (n,) as float64, or refuse them.

    Raises:
        UserError: shapes differ, a probability is NaN, infinite or outside [0, 1], or only one class is present.

    >>> check_binary([1, 1], [0.2, 0.4], split_name="tuning")
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: split 'tuning': labels hold 0 negatives and 2 positives among 2 samples. AUROC is \
undefined without both classes, and no other number here would mean anything. Add subjects to this split, \
choose a task whose labels occur in it, or run on more data.
    """
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise UserError(
            f"split {split_name!r}: expected {what} and probabilities of one shape (n,), got {y.shape} and {p.shape}."
        )
    if not np.isin(y, (0, 1)).all():
        raise UserError(f"split {split_name!r}: {what} must be 0 or 1, got {np.unique(y)[:5].tolist()}.")
    check_probabilities(p, split_name=split_name)
    y = y.astype(bool)
    n_positive = int(y.sum())
    if n_positive in (0, len(y)):
        raise UserError(
            f"split {split_name!r}: {what} hold {len(y) - n_positive} negatives and {n_positive} positives among "
            f"{len(y)} samples. AUROC is undefined without both classes, and no other number here would mean anything. "
            "Add subjects to this split, choose a task whose labels occur in it, or run on more data."
        )
    return y, p


def check_probabilities(probabilities: Floats, *, split_name: str) -> None:
    """Refuse NaN, infinite and out-of-range entries of `probabilities` (any shape).

    Raises:
        UserError: there are such entries; the message gives their number.
    """
    n_bad = int((~np.isfinite(probabilities)).sum())
    if n_bad:
        raise UserError(
            f"split {split_name!r}: {n_bad} of {probabilities.size} probabilities are NaN or infinite, so nothing can "
            "be ranked. Training has most likely diverged: lower the learning rate, clip gradients or use fp32."
        )
    n_bad = int(((probabilities < 0) | (probabilities > 1)).sum())
    if n_bad:
        raise UserError(
            f"split {split_name!r}: {n_bad} of {probabilities.size} probabilities lie outside [0, 1]. "
            "Brier score and calibration need probabilities: apply sigmoid or softmax to the logits first."
        )


def choose_threshold(labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, split_name: str = "tuning") -> float:
    """Return the threshold t that maximises the F1 of `probabilities >= t`; among equal thresholds, the largest.

    Choose the threshold on the tuning split only: a threshold chosen on held_out would flatter every thresholded
    metric.

    Args:
        labels: (n,) 0/1.
        probabilities: (n,) in [0, 1].

    Raises:
        UserError: see `check_binary`.

    >>> choose_threshold([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])
    0.4
    """
    y, p = check_binary(labels, probabilities, split_name=split_name)
    order = np.argsort(-p, kind="stable")
    is_last_of_tie = np.r_[np.diff(p[order]) != 0, True]
    n_predicted = np.flatnonzero(is_last_of_tie) + 1
    n_true_positive = np.cumsum(y[order])[is_last_of_tie]
    f1 = 2 * n_true_positive / (n_predicted + y.sum())
    return float(p[order][is_last_of_tie][np.argmax(f1)])


def binary_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    threshold: float,
    subject_ids: npt.ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    split_name: str,
) -> dict[str, Any]:
    """Return the metrics of a binary task, each with a subject-level percentile bootstrap interval.

    AUROC, AUPRC (scikit-learn's average precision), F1, accuracy, precision, recall and Brier score equal
    scikit-learn's; precision and F1 are 0 where nothing is predicted or present. ECE is the expected calibration error
    of the positive class: the absolute gap between mean probability and observed rate in 10 bins of equal width,
    averaged over samples. Because it is an absolute value, resampling noise increases it, and its interval may lie
    above the point estimate. The loss is the mean negative log likelihood of the labels, in nats. Every sample counts
    once, whatever the class weights and label smoothing of training are, so that runs can be compared.

    A replicate with a single class is left out of the intervals of AUROC, AUPRC and recall. With one sample per subject
    and k positive subjects, about one replicate in e^k has a single class: 1 in 150 for k = 5, and hardly any of 1000
    for k = 10.

    Args:
        labels: (n,) 0/1.
        probabilities: (n,) probability of the positive class, in [0, 1].
        threshold: probability from which on a sample is predicted positive, from `choose_threshold` on tuning.
        subject_ids: (n,) integers or strings.
        n_bootstrap: number of replicates; 0 gives point values only, at the cost of one sort.
        seed: seed of the bootstrap.
        confidence: level of the intervals, in (0, 1).
        split_name: name of the split, for error messages.

    Returns:
        Each of `METRICS` -> {"value", "low", "high"}, where low and high are None without replicates or with one
        subject; and "n", "n_subjects", "prevalence", "threshold". Ready for JSON.

    Raises:
        UserError: see `check_binary`.

    >>> result = binary_metrics([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8], threshold=0.4, subject_ids=[1, 1, 2, 3],
    ...                         n_bootstrap=0, split_name="tuning")
    >>> result["auroc"], result["recall"]["value"], result["n_subjects"]
    ({'value': 0.875, 'low': None, 'high': None}, 1.0, 3)
    """
    y, p = check_binary(labels, probabilities, split_name=split_name)
    bootstrap = SubjectBootstrap.of(subject_ids, n_samples=len(y), n_bootstrap=n_bootstrap, seed=seed)
    replicates = _binary_replicates(bootstrap, y, p, p >= threshold, is_alone=True)
    return summaries(replicates, confidence) | _binary_facts(bootstrap, y, threshold)


def multiclass_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    class_names: Sequence[str],
    subject_ids: npt.ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    split_name: str,
) -> dict[str, Any]:
    """Return the metrics of a task with C exclusive classes; the prediction is the most probable class.

    AUROC and AUPRC are unweighted means over classes of one class against the rest. F1, precision and recall are macro
    means. The Brier score is summed over classes and averaged over samples (0 to 2). ECE is that of the predicted
    class.

    Args:
        labels: (n,) integers in 0 ... C - 1.
        probabilities: (n, C), rows that sum to one.
        class_names: C names, in column order.
        subject_ids, n_bootstrap, seed, confidence, split_name: as in `binary_metrics`.

    Returns:
        As `binary_metrics`, with "per_class" {name: {"n", and auroc, auprc, f1, precision, recall as values with
        intervals}} in place of prevalence and threshold.

    Raises:
        UserError: a class has no samples in the split, or the probabilities are no distributions.
    """
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    n_classes = len(class_names)
    if y.ndim != 1 or p.shape != (len(y), n_classes):
        raise UserError(
            f"split {split_name!r}: expected labels (n,) and probabilities (n, {n_classes}), "
            f"got {y.shape} and {p.shape}."
        )
    check_probabilities(p, split_name=split_name)
    if len(p) and np.abs(p.sum(axis=1) - 1).max() > 0.01:
        raise UserError(
            f"split {split_name!r}: class probabilities do not sum to 1 (worst row {p.sum(axis=1).max():.3g}). "
            "Classes are exclusive here: apply softmax to the logits, or use a multi-label task."
        )
    if not np.isin(y, np.arange(n_classes)).all():
        raise UserError(
            f"split {split_name!r}: labels must be integers in 0 ... {n_classes - 1}, got {np.unique(y)[:9].tolist()}."
        )
    y = y.astype(np.intp)
    n_of_class = np.bincount(y, minlength=n_classes)
    absent = [str(name) for name, n in zip(class_names, n_of_class, strict=True) if n == 0]
    if absent or (n_of_class > 0).sum() < 2:
        raise UserError(
            f"split {split_name!r}: of {n_classes} classes, no sample has {', '.join(absent) or 'another class'} "
            f"(n = {len(y)}). AUROC is undefined for a class without samples, and a mean over the others would "
            "not compare between splits. Merge or drop these classes in the task, or choose a larger split."
        )
    bootstrap = SubjectBootstrap.of(subject_ids, n_samples=len(y), n_bootstrap=n_bootstrap, seed=seed)
    predicted = p.argmax(axis=1)
    one_vs_rest = [
        _binary_replicates(bootstrap, y == index, np.ascontiguousarray(p[:, index]), predicted == index)
        for index in range(n_classes)
    ]
    replicates = _mean_replicates(one_vs_rest) | _top_label_replicates(bootstrap, y, p, predicted)
    per_class = {
        str(name): {"n": int(n)}
        | summaries({key: own[key] for key in ("auroc", "auprc", "f1", "precision", "recall")}, confidence)
        for name, n, own in zip(class_names, n_of_class, one_vs_rest, strict=True)
    }
    facts = {"n": len(y), "n_subjects": bootstrap.n_subjects, "per_class": per_class}
    return summaries(replicates, confidence) | facts


def multilabel_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    thresholds: npt.ArrayLike,
    label_names: Sequence[str],
    subject_ids: npt.ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    split_name: str,
) -> dict[str, Any]:
    """Return the metrics of a task with L yes-or-no labels per sample: those of each label, and their unweighted means.

    Args:
        labels: (n, L) 0/1.
        probabilities: (n, L) in [0, 1].
        thresholds: (L,) threshold of each label, from `choose_threshold` on tuning.
        label_names: L names, in column order.
        subject_ids, n_bootstrap, seed, confidence, split_name: as in `binary_metrics`.

    Returns:
        The means in the form of `binary_metrics` (accuracy is thus that of single labels), "n", "n_subjects", and
        "per_label" {name: a `binary_metrics` result}.

    Raises:
        UserError: a label cannot be evaluated, see `check_binary`; the message names the label.
    """
    y, p, t = np.asarray(labels), np.asarray(probabilities, dtype=np.float64), np.asarray(thresholds, dtype=np.float64)
    n_labels = len(label_names)
    if n_labels == 0 or y.ndim != 2 or y.shape[1] != n_labels or p.shape != y.shape or t.shape != (n_labels,):
        raise UserError(
            f"split {split_name!r}: expected labels and probabilities (n, {n_labels}) and thresholds ({n_labels},), "
            f"got {y.shape}, {p.shape} and {t.shape}."
        )
    columns = [
        check_binary(y[:, index], p[:, index], split_name=split_name, what=f"labels of {str(name)!r}")
        for index, name in enumerate(label_names)
    ]
    bootstrap = SubjectBootstrap.of(subject_ids, n_samples=len(y), n_bootstrap=n_bootstrap, seed=seed)
    replicates = [
        _binary_replicates(bootstrap, own, scores, scores >= threshold)
        for (own, scores), threshold in zip(columns, t.tolist(), strict=True)
    ]
    per_label = {
        str(name): summaries(own, confidence) | _binary_facts(bootstrap, column[0], threshold)
        for name, own, column, threshold in zip(label_names, replicates, columns, t.tolist(), strict=True)
    }
    facts = {"n": len(y), "n_subjects": bootstrap.n_subjects, "per_label": per_label}
    return summaries(_mean_replicates(replicates), confidence) | facts


def _binary_replicates(
    bootstrap: SubjectBootstrap, y: Booleans, p: Floats, predicted: Booleans, *, is_alone: bool = False
) -> dict[str, Floats]:
    """Return every metric in every replicate, name -> (1 + n_bootstrap,), NaN where undefined.

    Args:
        is_alone: whether no other class or label needs the same draws.
    """
    values = (np.ones(len(y)), y, predicted, y & predicted, (p - y) ** 2, log_loss(np.where(y, p, 1 - p)))
    areas, sums = [], []
    if len(y) > MANY_SAMPLES:
        cells = Cells.fit(y, p, predicted)
        means = cells.calibration_means(p, y)
        table = np.column_stack([*(cells.mean(column) for column in values), means])
        for weights in cells.own_weights(bootstrap) if is_alone else cells.weights(bootstrap):
            areas.append(cells.ranking.areas(weights))
            sums.append(weights @ table)
        for area, exact in zip(areas[0], cells.of_data, strict=True):
            area[0] = exact
    else:
        ranking = Ranking.fit(y, p)
        subject = bootstrap.subject[ranking.order]
        totals = bootstrap.calibration_totals(p, y)
        table = np.column_stack([*(bootstrap.totals(column) for column in values), totals])
        for weights in bootstrap.weights():
            areas.append(ranking.areas(np.take(weights, subject, axis=1)))
            sums.append(weights @ table)
    n, n_positive, n_predicted, n_both, squares, losses, *gaps = np.concatenate(sums).T
    n_wrong = n_positive + n_predicted - 2 * n_both
    with np.errstate(invalid="ignore"):
        recall = n_both / n_positive
    return {
        "auroc": np.concatenate([auroc for auroc, _ in areas]),
        "auprc": np.concatenate([auprc for _, auprc in areas]),
        "f1": 2 * n_both / np.maximum(n_positive + n_predicted, 1),
        "accuracy": 1 - n_wrong / n,
        "precision": n_both / np.maximum(n_predicted, 1),
        "recall": recall,
        "brier": squares / n,
        "ece": np.abs(gaps).sum(axis=0) / n,
        "loss": losses / n,
    }


def _top_label_replicates(
    bootstrap: SubjectBootstrap, y: Integers, p: Floats, predicted: Integers
) -> dict[str, Floats]:
    """Return accuracy, Brier score, loss and ECE of the predicted class in every replicate, for exclusive classes."""
    correct = predicted == y
    rows = np.arange(len(y))
    # This is the sum over classes of (p - onehot)^2, computed without the one-hot matrix.
    squares = (p**2).sum(axis=1) - 2 * p[rows, y] + 1
    losses = log_loss(p[rows, y])
    columns = [bootstrap.totals(values) for values in (np.ones(len(y)), correct, squares, losses)]
    table = np.column_stack([*columns, bootstrap.calibration_totals(p[rows, predicted], correct)])
    n, n_correct, total_squares, total_losses, *gaps = np.concatenate(
        [weights @ table for weights in bootstrap.weights()]
    ).T
    return {
        "accuracy": n_correct / n,
        "brier": total_squares / n,
        "ece": np.abs(gaps).sum(axis=0) / n,
        "loss": total_losses / n,
    }


def log_loss(probabilities: Floats) -> Floats:
    """Return the negative log likelihood of labels to which a model gave `probabilities`, in nats.

    >>> log_loss(np.array([1.0, 0.5, 0.0])).round(2).tolist()
    [0.0, 0.69, 36.04]
    """
    return -np.log(np.clip(probabilities, LEAST_PROBABILITY, None)) + 0.0


def _mean_replicates(members: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    """Return the macro mean of each metric within each replicate; NaN if the metric of any member is undefined."""
    return {name: np.mean([member[name] for member in members], axis=0) for name in METRICS}


def summaries(replicates: dict[str, Floats], confidence: float) -> dict[str, Any]:
    """Return the point value (replicate 0) and the percentile interval (over the others) of each metric.

    >>> summaries({"f1": np.array([0.5, 0.25, np.nan, 0.75])}, 0.5)
    {'f1': {'value': 0.5, 'low': 0.375, 'high': 0.625}}
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie between 0 and 1, got {confidence}; 0.95 is usual.")
    result: dict[str, Any] = {}
    for name, values in replicates.items():
        defined = values[1:][np.isfinite(values[1:])]
        low, high = None, None
        if len(defined):
            low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
        result[name] = {"value": float(values[0]), "low": low, "high": high}
    return result


def _binary_facts(bootstrap: SubjectBootstrap, y: Booleans, threshold: float) -> dict[str, Any]:
    facts = {"n": len(y), "n_subjects": bootstrap.n_subjects}
    return facts | {"prevalence": float(y.mean()), "threshold": float(threshold)}
