"""Explain the predictions of a run: the events that moved one subject's prediction, or the texts that move those of a split."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import atomic_path
from ehr_embed.core.progress import ProgressBar
from ehr_embed.core.settings import Count, Positive, Seed, checked
from ehr_embed.data.batches import MICROSECONDS_PER_DAY, BatchDataset
from ehr_embed.data.store import STATIC_TIME
from ehr_embed.evaluation.code_screening import visible_events
from ehr_embed.inference.attribution import Attribution, integrated_gradients, occlusion
from ehr_embed.inference.attribution_plots import Timeline, plot_texts, plot_timeline, write_timeline_html
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.records import Dataset
from ehr_embed.models.ensemble import log_probabilities
from ehr_embed.models.event_vectors import as_rows
from ehr_embed.models.members import over_members
from ehr_embed.models.protocol import passes_gradients
from ehr_embed.run_folder.layout import MOVED, MOVED_TEXTS

log = logging.getLogger(__name__)


class Explainer:
    """Explainer that attributes the log-odds of one class of a run to events.

    Models whose event vectors a gradient reaches are explained by integrated gradients; all others (`model=gbm`, `logistic`,
    `code_tab`, `text_encoder`, and ensembles with one of them) by leaving out the events of one code at a time.

    Args:
        predictor: the run, opened for prediction.
        target: class or label of the run; None = the last one.
        n_steps, max_steps, tolerance: as in `integrated_gradients`.

    Raises:
        UserError: the run has no such class.
    """

    @checked("")
    def __init__(
        self, predictor: Predictor, *, target: str | None, n_steps: Count, max_steps: Count, tolerance: Positive
    ) -> None:
        names = predictor.class_names
        if target is not None and target not in names:
            raise unknown_name("target", target, names)
        if n_steps > max_steps:
            raise UserError(f"n_steps={n_steps}: expected at most max_steps={max_steps}. Type: max_steps={n_steps}")
        self.predictor, self.target = predictor, names[-1] if target is None else target
        self._index = names.index(self.target)
        self._steps: dict[str, Any] = {"n_steps": n_steps, "max_steps": max_steps, "tolerance": tolerance}
        counts = torch.as_tensor(predictor.run.vocabulary.tokens["count"].to_numpy().copy(), dtype=torch.float32)
        vectors = predictor.run.embedding.table.cpu()
        self._baseline = (counts @ vectors / counts.sum()).to(predictor.device)

    @property
    def outcome(self) -> str:
        """Return what a person calls the target: the label set where the class is merely `true`."""
        labels = (self.predictor.run.config.get("task") or {}).get("labels")
        is_boolean = self.predictor.class_names == ["false", "true"]
        return Path(labels).stem if is_boolean and self.target == "true" and isinstance(labels, str) else self.target

    def score(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the log-odds (B,) of the target for a batch of model inputs."""
        logits = self.predictor.run.model(as_rows(inputs) if "embeddings" in inputs else inputs)
        logits = log_probabilities(logits) if logits.ndim == 3 and self.predictor.has_exclusive_classes else logits
        logits = over_members(logits.float())  # of members with independent classes, the mean log-odds
        own = logits[:, self._index]
        if not self.predictor.has_exclusive_classes:
            return own
        others = [index for index in range(logits.shape[1]) if index != self._index]
        return own - logits[:, others].logsumexp(-1)

    def attribute(self, data: Dataset, row: int) -> Attribution:
        """Return the attribution of one sample of the dataset, without padding."""
        with self.predictor.reading(data.vocabulary):  # a model that reads codes too knows the new ones
            return self._attribute(data, row)

    def _attribute(self, data: Dataset, row: int) -> Attribution:
        batch = BatchDataset(data.events, data.samples)[np.array([row])].to(self.predictor.device)
        embedding = data.embedding.to(self.predictor.device)
        inputs = embedding.inputs(batch)
        n = int(data.samples.lengths[row])
        if not passes_gradients(self.predictor.run.model):
            for name in ("places", "sequence_starts"):  # they describe the whole record
                inputs.pop(name, None)
            found = occlusion(self.score, inputs, _code_of_event(data, batch.token_ids[0].cpu().numpy()))
            return replace(found, events=found.events[:n])
        # Events with the same token share one row of `rows`, so a gradient on rows could not separate them: each event gets a
        # vector of its own. `places` and `sequence_starts` describe one sample, but the path is a batch of many.
        for name in ("rows", "row_ids", "places", "sequence_starts"):
            del inputs[name]
        inputs["embeddings"] = embedding(batch.token_ids).detach()
        found = integrated_gradients(self.score, inputs, self._baseline, **self._steps)
        return replace(found, events=found.events[:n])


def _code_of_event(data: Dataset, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a number per event, (T,), which the events of one code share; a token without a code is one of its own."""
    codes = data.vocabulary.token_codes
    names = [f"token {token}" if codes[token] is None else f"code {codes[token]}" for token in tokens]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def event_table(data: Dataset, row: int, found: Attribution) -> pl.DataFrame:
    """Return one row per event of a sample, in the model's order, with its attribution.

    Returns:
        Columns time (null = static), days_before (null = static), code, text, numeric_value and attribution.
    """
    samples = data.samples.take(np.array([row]))
    _, index = next(visible_events(samples))
    tokens, times = data.events.token_ids[index], data.events.times[index]
    values = np.full(len(index), np.nan, np.float32) if data.events.values is None else data.events.values[index]
    strings, texts = data.vocabulary.strings, data.vocabulary.texts
    special = tokens < 2  # padding and the unknown event have no code to decode
    decoded = data.vocabulary.decode(np.where(special, 2, tokens).astype(np.int64), np.where(special, np.nan, values))
    is_static = times == STATIC_TIME
    days = np.where(is_static, np.nan, (samples.prediction_times[0] - times) / MICROSECONDS_PER_DAY)
    frame = pl.DataFrame(
        {
            "time": pl.Series(np.where(is_static, 0, times)).cast(pl.Datetime("us")),
            "days_before": days,
            "code": [strings[t] if s else code for t, s, code in zip(tokens, special, decoded["code"], strict=True)],
            "text": [texts[token] for token in tokens],
            "numeric_value": decoded["numeric_value"],
            "attribution": found.events,
        }
    )
    static = pl.Series(is_static)
    return frame.with_columns(
        time=pl.when(static).then(None).otherwise(pl.col("time")), days_before=pl.col("days_before").fill_nan(None)
    )


def explain_subject(
    explainer: Explainer, data: Dataset, subject: int, prediction_time: str | None, folder: Path
) -> list[Path]:
    """Explain one prediction of a subject and write subject_<ID>.csv, .png and .html.

    Args:
        explainer: explainer of the run.
        data: the dataset.
        subject: id of the subject.
        prediction_time: ISO time of the prediction; None = the subject's last one.
        folder: folder for the files.

    Returns:
        The paths of the files.

    Raises:
        UserError: the subject has no prediction, or none at this time.
    """
    rows = np.flatnonzero(data.samples.subject_ids == subject)
    if not len(rows):
        some = ", ".join(map(str, data.samples.subject_ids[:5]))
        raise UserError(f"subject={subject} has no prediction here. Subjects that have one are {some}, ...")
    times = data.samples.prediction_times[rows].astype("datetime64[us]")
    row = rows[np.argmax(times)]
    if prediction_time is not None:
        wanted = rows[times == np.datetime64(_parsed(prediction_time), "us")]
        if not len(wanted):
            listed = ", ".join(str(time) for time in np.sort(times)[:10])
            raise UserError(
                f"prediction_time={prediction_time}: subject {subject} has predictions at {listed}. Give one of these times."
            )
        row = wanted[0]
    found = explainer.attribute(data, int(row))
    table = event_table(data, int(row), found)
    if np.isnan(found.gap):
        log.info(
            "log-odds of %s: %.3f; %d events; each of %d codes was left out once, since no gradient reaches their vectors",
            explainer.outcome, found.score, len(table), found.n_steps,
        )  # fmt: skip
    else:
        log.info(
            "log-odds of %s: %.3f, of an average record %.3f; %d events, whose contributions miss the difference by %.1e after %d "
            "steps",
            explainer.outcome, found.score, found.baseline_score, len(table), found.gap, found.n_steps,
        )  # fmt: skip
    when = data.samples.prediction_times[row].astype("datetime64[us]").astype(datetime)
    timeline = Timeline(table, subject, when, explainer.outcome, found.score, found.baseline_score)
    paths = [folder / f"subject_{subject}.{kind}" for kind in ("csv", "png", "html")]
    with atomic_path(paths[0]) as path:
        table.write_csv(path)
    plot_timeline(paths[1], timeline)
    write_timeline_html(paths[2], timeline)
    return paths


def explain_split(
    explainer: Explainer, data: Dataset, *, max_samples: Count, min_samples: Count, seed: Seed, folder: Path
) -> list[Path]:
    """Explain samples of a split, write texts.csv with all their texts, and texts.png with the 20 texts per direction that
    raise and lower the prediction most.

    The columns are text, n_samples and n_events (the numbers of samples and events with the text), and mean_attribution and
    mean_abs_attribution. The means are over the samples with the text, of the sum over its events in a sample.

    Args:
        explainer: explainer of the run.
        data: the dataset.
        max_samples: number of samples drawn at random.
        min_samples: smallest number of samples with a text for the text to be drawn in texts.png.
        seed: seed of the draw.
        folder: folder for the files.

    Raises:
        UserError: no text occurs in `min_samples` of the drawn samples.
    """
    n = len(data.samples)
    drawn = np.sort(np.random.default_rng(seed).permutation(n)[:max_samples])
    parts, gaps, steps = [], [], []
    for row in ProgressBar(drawn.tolist(), desc="explain", unit="sample"):
        found = explainer.attribute(data, row)
        gaps.append(found.gap)
        steps.append(found.n_steps)
        parts.append(event_table(data, row, found).select("text", "attribution", sample=pl.lit(row)))
    if np.isnan(gaps[0]):
        log.info("%d samples of %d, by leaving out one code at a time, at most %d codes", len(drawn), n, max(steps))
    else:
        log.info(
            "%d samples of %d; contributions miss the change of the log-odds by %.1e at most, after at most %d steps",
            len(drawn), n, max(gaps), max(steps),
        )  # fmt: skip
    by_sample = pl.concat(parts).group_by("text", "sample").agg(pl.col("attribution").sum(), n_events=pl.len())
    texts = by_sample.group_by("text").agg(
        n_samples=pl.len(),
        n_events=pl.col("n_events").sum(),
        mean_attribution=pl.col("attribution").mean(),
        mean_abs_attribution=pl.col("attribution").abs().mean(),
    )
    texts = texts.sort("mean_abs_attribution", "text", descending=[True, False])
    frequent = texts.filter(pl.col("n_samples") >= min_samples)
    if not len(frequent):
        raise UserError(
            f"no text is in min_samples={min_samples} of the {len(drawn)} samples. Type: min_samples=1, or more max_samples"
        )
    with atomic_path(folder / MOVED_TEXTS) as path:
        texts.write_csv(path)
    plot_texts(folder / MOVED, frequent, target=explainer.outcome, n_samples=len(drawn))
    return [folder / MOVED_TEXTS, folder / MOVED]


def _parsed(text: str) -> datetime:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError as error:
        raise UserError(f"prediction_time={text}: expected a time as 2020-01-31 or 2020-01-31T12:00:00.") from error
