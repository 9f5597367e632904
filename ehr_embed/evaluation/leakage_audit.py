"""Leakage audit: before training, search the store and the samples for leaks that would make a result look better.

The audit does not repeat checks of other modules: `MedsSource` refuses a subject in two splits or two files,
`read_labels` refuses a prediction time with two labels, and `build_samples` gives a sample no event after its
prediction time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from meds import death_code

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import OneOf, check_setting
from ehr_embed.data.kept import kept_facts
from ehr_embed.data.samples import Samples, ragged_arange, samples_digest
from ehr_embed.data.store import STATIC_TIME, EventStore, SplitEvents
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.evaluation.code_screening import (
    CHUNK_EVENTS,
    MIN_PER_CLASS,
    RECORD,
    SampleFeatures,
    aurocs,
    chunks,
    code_groups,
    sample_features,
)

log = logging.getLogger(__name__)
Mode = Annotated[str, OneOf("error", "warn", "off")]
FORMAT = 1
"""Version of the findings cached in the store's folder. Increase it when a check is added, removed or changed."""
AUROC_LIMIT = 0.98
MIN_DUPLICATE_EVENTS = 10
"""Least number of events of records that are compared with each other; shorter records may be equal by chance."""
PREVALENCE_Z, PREVALENCE_RATIO = 5.0, 1.5
MAX_LISTED = 20

Level = Literal["leak", "note"]


@dataclass(frozen=True)
class Finding:
    """A finding of the audit.

    Attributes:
        check: name of the check.
        level: a `leak` stops a run under `audit=error`; a `note` is information and stops nothing.
        message: the finding in one sentence.
        details: the numbers, codes and subject ids of the finding, ready for JSON.
    """

    check: str
    level: Level
    message: str
    details: dict[str, Any]


def audit(
    store: EventStore, samples: Mapping[str, Samples], class_names: list[str], *, mode: str = "warn"
) -> dict[str, Any] | None:
    """Look for leaks and log the findings; they change neither the data nor the training.

    Checks: `split_overlap` (a subject id in two splits), `duplicate_subjects` (the same record under different ids; a
    leak if in different splits), `death_before_prediction` (MEDS' code of death among the visible events),
    `single_code` (a feature of one code alone ranks a class in train with an AUROC above 0.98 or below 0.02),
    `record_shape` (the length of the record or its first or last time alone does so), `prevalence` (the share of a
    class differs much between a split and train; a note).

    The findings are cached in the store's folder: those about the events for all runs on the store, those about the
    samples for all runs and trials with the same samples and labels.

    Args:
        store: store of the events.
        samples: samples of each split.
        class_names: classes of the task; empty for a task that predicts events.
        mode: `error`, `warn`, or `off`.

    Returns:
        The findings, the checks that were not possible, the share of prediction times that are followed by events, and
        the seconds taken, ready for JSON; None for `off`.

    Raises:
        UserError: the mode is unknown, or it is `error` and there is a leak; the message lists all leaks.
    """
    check_setting("audit", mode, Mode)
    if mode == "off":
        return None
    began = time.perf_counter()
    of_events, had_events = kept_facts(
        store, "audit-events", {"format": FORMAT, "splits": list(samples)}, lambda: _audit_events(store, samples)
    )
    about = {"format": FORMAT, "samples": samples_digest(samples), "class_names": class_names}
    of_samples, had_samples = kept_facts(
        store, "audit-samples", about, lambda: _audit_samples(store, samples, class_names)
    )
    findings = [Finding(**finding) for finding in (*of_events["findings"], *of_samples["findings"])]
    not_checked = of_samples["not_checked"]
    findings.sort(key=lambda finding: finding.level)  # leaks first
    leaks = [finding for finding in findings if finding.level == "leak"]
    if mode == "error" and leaks:
        listed = "\n  ".join(finding.message for finding in leaks)
        raise UserError(
            f"audit=error: {len(leaks)} possible leaks, nothing was trained:\n  {listed}\nMend the dataset or the label set; "
            "where a finding is meant to be so, type: audit=warn"
        )
    for finding in findings:
        log.log(logging.WARNING if finding.level == "leak" else logging.INFO, "audit: %s", finding.message)
    for line in not_checked:
        log.info("audit: %s", line)
    seconds = time.perf_counter() - began
    kept = " of events and samples" if had_events and had_samples else " of events" if had_events else None
    source = "" if kept is None else f"; the audit{kept} was kept from an earlier run in {store.folder}"
    log.info("audit: %d possible leaks (%.1f s%s)", len(leaks), seconds, source)
    return {
        "findings": [asdict(finding) for finding in findings],
        "not_checked": not_checked,
        "share_with_later_events": of_samples["share_with_later_events"],
        "seconds": seconds,
    }


def _audit_events(store: EventStore, splits: Iterable[str]) -> dict[str, Any]:
    """Run the checks that need the events alone."""
    events = {split: store.split(split) for split in splits}
    return {"findings": [asdict(finding) for finding in (*split_overlap(events), *duplicate_subjects(events))]}


def _audit_samples(store: EventStore, samples: Mapping[str, Samples], class_names: list[str]) -> dict[str, Any]:
    """Run the checks that need the samples and their labels."""
    events = {split: store.split(split) for split in samples}
    findings: list[Finding] = []
    not_checked: list[str] = []
    classes = {split: class_columns(part.labels, class_names) for split, part in samples.items()}
    if classes["train"]:
        findings += death_before_prediction(store.vocabulary, events, samples, classes)
        features = sample_features(store.vocabulary, events["train"], samples["train"])
        for name, is_class in classes["train"].items():
            found, skipped = single_code(store.vocabulary, features, is_class[features.rows], name)
            findings += found
            not_checked += skipped
        findings += prevalence(classes)
    return {
        "findings": [asdict(finding) for finding in findings],
        "not_checked": not_checked,
        "share_with_later_events": {
            split: followed_share(events[split], part, classes[split]) for split, part in samples.items()
        },
    }


def class_columns(labels: npt.NDArray[Any], class_names: list[str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return masks (n,) of the classes to check: the second of two, each of several, or each of several labels.

    The result is empty for labels that are no classes.

    >>> sorted(class_columns(np.array([0, 1]), ["false", "true"]))
    ['true']
    >>> sorted(class_columns(np.array([[0, 1.0]]), ["a", "b"])), class_columns(np.array([0.5, 3.2]), ["risk"])
    (['a', 'b'], {})
    """
    if labels.ndim == 2 and labels.shape[1] == len(class_names) and np.isin(labels, (0, 1)).all():
        return {name: labels[:, index] == 1 for index, name in enumerate(class_names)}
    if labels.ndim != 1 or len(class_names) < 2 or not np.issubdtype(labels.dtype, np.integer):
        return {}
    start = 1 if len(class_names) == 2 else 0
    return {name: labels == index for index, name in enumerate(class_names) if index >= start}


def split_overlap(events: Mapping[str, SplitEvents]) -> list[Finding]:
    """Find subject ids that are in two splits."""
    findings = []
    for one, other in combinations(events, 2):
        shared = np.intersect1d(events[one].subject_ids, events[other].subject_ids)
        if len(shared):
            message = f"{len(shared)} subjects are in {one} and in {other}, such as {shared[0]}"
            details = {"splits": [one, other], "n": len(shared), "subject_ids": shared[:MAX_LISTED].tolist()}
            findings.append(Finding("split_overlap", "leak", message, details))
    return findings


def duplicate_subjects(events: Mapping[str, SplitEvents]) -> list[Finding]:
    """Find different subject ids with the same record: the same tokens, values, and times since the first timed event.

    A copy whose dates are all shifted by the same time is found too. Records with fewer than `MIN_DUPLICATE_EVENTS`
    events are not compared.
    """
    ids, splits, hashes = [], [], []
    names = list(events)
    for number, split in enumerate(names):
        long = np.diff(events[split].offsets) >= MIN_DUPLICATE_EVENTS
        ids.append(events[split].subject_ids[long])
        splits.append(np.full(int(long.sum()), number))
        hashes.append(record_hashes(events[split])[long])
    id_S, split_S, hash_S = np.concatenate(ids), np.concatenate(splits), np.concatenate(hashes)
    order = np.lexsort((id_S, split_S, hash_S))
    id_S, split_S, hash_S = id_S[order], split_S[order], hash_S[order]
    _, starts, counts = np.unique(hash_S, return_index=True, return_counts=True)
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        stop = start + count
        if len(own := np.unique(id_S[start:stop])) > 1:
            where = tuple(names[number] for number in np.unique(split_S[start:stop]))
            groups.setdefault(where, []).append(own.tolist())
    findings = []
    for where, found in groups.items():
        n = sum(map(len, found))
        message = (
            f"{n} subjects have the record of another one under their own id, all in {where[0]}, such as {found[0][:2]}"
            if len(where) == 1
            else f"{n} subjects have the same record as one of another split ({', '.join(where)}), such as {found[0][:2]}"
        )
        details = {"splits": list(where), "n_subjects": n, "groups": [group[:10] for group in found[:MAX_LISTED]]}
        findings.append(Finding("duplicate_subjects", "note" if len(where) == 1 else "leak", message, details))
    return findings


def record_hashes(events: SplitEvents, *, chunk_events: int = CHUNK_EVENTS) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each subject's tokens, values and times since the first timed event, in order, (S,)."""
    first, lengths = events.offsets[:-1], np.diff(events.offsets)
    hashes = np.zeros(len(lengths), np.uint64)
    for begin, end in chunks(lengths, chunk_events):
        low, high = int(first[begin]), int(events.offsets[end])
        own = lengths[begin:end]
        times = np.asarray(events.times[low:high])
        is_timed = times != STATIC_TIME
        subject = np.repeat(np.arange(end - begin), own)
        origin = np.full(end - begin, np.iinfo(np.int64).max)
        np.minimum.at(origin, subject[is_timed], times[is_timed])
        relative = np.where(is_timed, times - np.where(is_timed, origin[subject], 0), -1).view(np.uint64)
        position = ragged_arange(np.zeros(end - begin, np.int64), own).astype(np.uint64)
        mixed = _mix(position * np.uint64(0x9E3779B97F4A7C15) + events.token_ids[low:high].astype(np.uint64))
        mixed = _mix(mixed ^ relative)
        if events.values is not None:
            value = np.asarray(events.values[low:high])
            mixed = _mix(mixed ^ np.where(np.isnan(value), np.float32("nan"), value).view(np.uint32).astype(np.uint64))
        # Every term depends on the position, so the sum depends on the order of the events; unsigned sums wrap around.
        np.add.at(hashes[begin:end], subject, mixed)
    return hashes


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele et al. 2014), where each input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def death_before_prediction(
    vocabulary: Vocabulary,
    events: Mapping[str, SplitEvents],
    samples: Mapping[str, Samples],
    classes: Mapping[str, Mapping[str, npt.NDArray[np.bool_]]],
) -> list[Finding]:
    """Find prediction times at which death is visible: it is the outcome itself, or the prediction is made after it."""
    groups, names, _ = code_groups(vocabulary)
    is_death_V = np.array([name.split("//")[0] == death_code for name in names])[groups]
    findings: list[Finding] = []
    if not is_death_V.any():
        return findings
    for split, part in samples.items():
        tokens, begins = events[split].token_ids, range(0, len(events[split].token_ids), CHUNK_EVENTS)
        at = np.concatenate(
            [begin + np.flatnonzero(is_death_V[tokens[begin : begin + CHUNK_EVENTS]]) for begin in begins]
        )
        row = np.searchsorted(at, part.static_start)
        next_death = np.r_[at, np.iinfo(np.int64).max][row]
        is_visible = next_death < part.stop
        if is_visible.any():
            by_class = {name: int((is_visible & own).sum()) for name, own in classes[split].items()}
            told = ", ".join(f"{count} of them {name}" for name, count in by_class.items())
            message = f"{split}: {death_code} is visible at {int(is_visible.sum())} prediction times, {told}"
            details = {"split": split, "n": int(is_visible.sum()), "by_class": by_class}
            findings.append(Finding("death_before_prediction", "leak", message, details))
    return findings


def single_code(
    vocabulary: Vocabulary, features: SampleFeatures, is_class: npt.NDArray[np.bool_], class_name: str
) -> tuple[list[Finding], list[str]]:
    """Find features of a single code, or of the record's shape, that alone rank a class in train (nearly) perfectly.

    The limit is an AUROC above 0.98 or below 0.02 over at least 20 samples with and 20 without the class; for a last
    value, only samples that have one count. By chance, an AUROC over 20 and 20 samples has a standard deviation of
    0.09, so 0.98 is five standard deviations away, too far for the best of a hundred thousand codes.

    Returns:
        The findings, and a sentence for each class with too few samples to check.
    """
    n, n_class = len(is_class), int(is_class.sum())
    if min(n_class, n - n_class) < MIN_PER_CLASS:
        return [], [
            f"class {class_name!r}: the audit did not look for codes that predict the label alone, because train has {n_class} "
            f"samples with and {n - n_class} without it, one of them fewer than {MIN_PER_CLASS}"
        ]
    _, names, tokens = code_groups(vocabulary)
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for feature, entries in features.entries.items():
        auroc = aurocs(entries, is_class)
        for column in np.flatnonzero((auroc > AUROC_LIMIT) | (auroc < 1 - AUROC_LIMIT)).tolist():
            if feature == RECORD:
                key, text = ("record_shape", features.record_names[column]), features.record_names[column]
            else:
                key, text = ("single_code", names[column]), feature
            value = float(auroc[column])
            if key not in found or abs(value - 0.5) > abs(found[key][0] - 0.5):
                found[key] = value, text
    texts = vocabulary.texts
    token_of = dict(zip(names, tokens.tolist(), strict=True))
    findings = []
    ranked = sorted(found.items(), key=lambda item: -abs(item[1][0] - 0.5))
    for (check, name), (value, what) in ranked[:MAX_LISTED]:
        details = {"class": class_name, "name": name, "feature": what, "auroc": value, "n": n, "n_class": n_class}
        about = f"{what} of {name} ({texts[token_of[name]]})" if check == "single_code" else what
        message = f"{about} alone predicts class {class_name!r} in train, AUROC {value:.3f} ({n_class} of {n} samples)"
        findings.append(Finding(check, "leak", message, details))
    if len(ranked) > MAX_LISTED:
        more = f"{len(ranked) - MAX_LISTED} more codes alone predict class {class_name!r} in train"
        findings.append(Finding("single_code", "leak", more, {"class": class_name, "n": len(ranked)}))
    return findings, []


def followed_share(
    events: SplitEvents, samples: Samples, classes: Mapping[str, npt.NDArray[np.bool_]]
) -> dict[str, dict[str, float]]:
    """Return, for each class and for the rest, the share of prediction times after which the subject has an event.

    If records of cases continue and records of controls end, or the reverse, the label may depend on follow-up.
    """
    last = np.searchsorted(events.offsets, samples.static_start, side="right")
    is_followed = samples.stop < events.offsets[last]
    shares = {}
    for name, own in classes.items():
        parts = {name: is_followed[own], f"not {name}": is_followed[~own]}
        shares[name] = {which: float(part.mean()) for which, part in parts.items() if len(part)}
    return shares


def prevalence(classes: Mapping[str, Mapping[str, npt.NDArray[np.bool_]]]) -> list[Finding]:
    """Find classes whose shares in a split and in train differ by over a factor of 1.5 and five standard errors."""
    findings = []
    for name, train in classes["train"].items():
        for split in (split for split in classes if split != "train"):
            own = classes[split][name]
            pooled = np.concatenate([train, own]).mean()
            error = float(np.sqrt(pooled * (1 - pooled) * (1 / len(train) + 1 / len(own))))
            low, high = sorted((float(train.mean()), float(own.mean())))
            if high - low > PREVALENCE_Z * error and high > PREVALENCE_RATIO * low:
                shares = {"train": float(train.mean()), split: float(own.mean())}
                message = f"share of class {name!r}: {shares['train']:.3f} in train, {shares[split]:.3f} in {split}"
                findings.append(Finding("prevalence", "note", message, {"class": name, "shares": shares}))
    return findings
