"""Say what a stage would do, before it does any of it: `check=true`.

Sizes are read from the dataset's files. Time and memory are measured on a few steps of random events of the shape that the data
would have, and are therefore estimates.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ehr_embed.config.instantiate import builder, instantiate_embedder
from ehr_embed.core.threads import use_threads
from ehr_embed.data.labels import LabelSet
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedders.protocol import Embedder
from ehr_embed.experiment.preflight import sizes_before_setup, splits_of
from ehr_embed.inference.trained_run import device_named
from ehr_embed.models.event_vectors import named_inputs
from ehr_embed.models.protocol import FitsAtOnce, ReadsVocabulary
from ehr_embed.sources.code_texts import read_lookups, resolve_texts
from ehr_embed.sources.protocol import SPLITS, Source
from ehr_embed.tasks.protocol import ReadsLabels, Task
from ehr_embed.training.memory import peak_memory_mib
from ehr_embed.training.precision import autocast_of_run, choose_precision
from ehr_embed.training.settings import TrainerSettings

N_STEPS, N_WARM, N_TEXTS = 3, 1, 32
"""Steps that are measured, steps before them, and texts that are embedded."""
MAX_CODES_ROWS = 200_000_000
"""Largest number of events whose codes are counted; more would take minutes."""
SHOWN_CLASSES, SHOWN_CODES = 5, 3
MANY_PARAMETERS = 1_000_000
"""Size from which a transformer is slow to train without a GPU."""
SMALLER = {
    "ehr_embed.models.encoder.Encoder": "model=encoder_small trainer=short",
    "ehr_embed.models.decoder.Decoder": "model=decoder_small trainer=pretrain_short",
}
"""The option to type for a smaller model of a kind, which trains on a CPU."""
MIB_PER_GIB = 2**10


@dataclass(frozen=True)
class Measured:
    """The size of a model and the cost of a step.

    Attributes:
        n_parameters: number of trained numbers.
        seconds: seconds of a step; None where the model does not train by steps on vectors.
        gib: GiB of memory: of the GPU, or of this whole process.
        where: the device and precision in words.
    """

    n_parameters: int
    seconds: float | None
    gib: float
    where: str


def tell_outlook(cfg: DictConfig, run_dir: Path) -> None:
    """Print what a stage would do in `run_dir`.

    Raises:
        UserError: the data or the embedder's weights cannot be read.
    """
    source: Source = builder(cfg)(cfg.data.source)
    task: Task = builder(cfg)(cfg.task)
    settings: TrainerSettings = builder(cfg)(cfg.trainer)
    use_threads(settings.threads, key="trainer.threads", device=_device(settings).type)
    splits, n_events, n_subjects = splits_of(source), *sizes_of(source)
    lines = [("run", f"{run_dir} (check=true: nothing is written there)")]
    lines.append(("data", f"{source.name}: {n_subjects:,} subjects, {n_events:,} events in {len(source.shards)} files"))
    label_sets = task.label_sets(source.labels_dir) if isinstance(task, ReadsLabels) else []
    counts = [samples_by_class(label_set, splits) for label_set in label_sets]
    lines += [(f"label {label_set.name}", told) for label_set, (told, _) in zip(label_sets, counts, strict=True)]
    n_train = max((n for _, n in counts), default=round(n_subjects * 0.8) if splits is None else _n_in_train(splits))
    codes = codes_of(source, n_events)
    n_tokens, told = tokens_of(cfg, source, codes)
    lines.append(("texts", told))
    if codes is not None:
        lines.append(("coverage", coverage_of(codes, source.code_metadata(), list(cfg.data.lookups))))
    embedder: Embedder = instantiate_embedder(cfg.embedder, trusted=tuple(cfg.trusted_packages))
    try:
        width, per_text = embedder.embedding_dim, seconds_per_text(embedder)
    finally:
        embedder.close()
    lines.append(
        (
            "embedding",
            f"at most {in_words(n_tokens * per_text)} ({per_text * 1000:.2f} ms a text); vectors of width {width}",
        )
    )
    length = max(1, min(int(cfg.model.max_length), round(n_events / max(1, n_subjects))))
    n_rows = max(
        1, min(settings.batch_size or settings.most_batch_tokens, settings.most_batch_tokens // length, n_train)
    )
    sizes = {"num_classes": _n_classes(label_sets)} if label_sets and task.is_trained else sizes_before_setup(task)
    members = _members(cfg)
    name = cfg.model._target_.rsplit(".", 1)[-1] + (f" of {len(members)} members" if members else "")
    if sizes is None:
        of = type(task).__name__
        lines.append(
            ("model", f"{name}; parameters, time and memory not estimated: {of} gives its outputs with the data")
        )
        _tell(lines)
        return
    if "vocab_size" in sizes:
        sizes = {"vocab_size": n_tokens}
    found = measured(cfg, settings, width=width, n_tokens=n_tokens, shape=(n_rows, length), task_sizes=sizes)
    lines.append(("model", f"{name}, {found.n_parameters:,} parameters"))
    if members:
        lines.append(
            ("time", "that of the members, which are told one by one, and of evaluating what they predict together")
        )
    elif found.seconds is None:
        lines.append(("time", "not estimated: this model is not trained by steps on vectors"))
    else:
        n_batches = -(-n_train // n_rows)
        epoch, n_epochs = n_batches * found.seconds, settings.epochs_of(n_batches)
        lines.append(
            (
                "training",
                f"at most {n_epochs} epochs of {n_batches:,} batches of {n_rows} samples, about {length} events each",
            )
        )
        lines.append(
            (
                "time",
                f"about {in_words(epoch)} an epoch on {found.where}, at most {in_words(epoch * n_epochs)} in all, and "
                "evaluation",
            )
        )
    smaller = SMALLER.get(str(cfg.model._target_))
    if found.where.startswith("cpu") and found.n_parameters > MANY_PARAMETERS and smaller:
        lines.append(
            ("without a GPU", f"add {smaller} for a small model, as the demo trains, in a fraction of this time")
        )
    lines.append(
        (
            "memory",
            f"about {found.gib:.1f} GiB; the table of vectors is at most {n_tokens * width * 4 / 2**20:,.1f} MiB of it",
        )
    )
    _tell(lines)


def _tell(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in lines))


def sizes_of(source: Source) -> tuple[int, int]:
    """Return the number of events and of subjects of a source."""
    subjects = [
        pl.scan_parquet(shard, glob=False).select(pl.len(), n=pl.col("subject_id").n_unique()).collect()
        for shard in source.shards
    ]
    frame = pl.concat(subjects)
    return int(frame["len"].sum()), int(frame["n"].sum())  # a subject lies in one file


def samples_by_class(labels: LabelSet, splits: pl.DataFrame | None) -> tuple[str, int]:
    """Return the samples of each split and class in words, and the number of those of train.

    >>> frame = pl.DataFrame({"subject_id": [1, 1, 2], "value": ["true", "false", "true"]})
    >>> splits = pl.DataFrame({"subject_id": [1, 2], "split": ["train", "tuning"]})
    >>> samples_by_class(LabelSet("x", frame, "boolean_value"), splits)
    ('train 2 (false 1, true 1), tuning 1 (true 1), held_out 0', 2)
    """
    by_value = _by_number if labels.are_numbers else _by_class
    if splits is None:
        return f"{len(labels.frame):,} samples in all splits ({by_value(labels.frame)})", len(labels.frame)
    rows = labels.frame.join(splits, on="subject_id", how="inner")
    parts = {split: rows.filter(split=split) for split in SPLITS}
    told = [f"{split} {len(part):,}" + (f" ({by_value(part)})" if len(part) else "") for split, part in parts.items()]
    return ", ".join(told), len(parts["train"])


def _by_class(rows: pl.DataFrame) -> str:
    counts = rows.group_by("value").len().sort("value")
    told = [f"{value} {n:,}" for value, n in counts.head(SHOWN_CLASSES).iter_rows()]
    return ", ".join([*told, *(["..."] if len(counts) > SHOWN_CLASSES else [])])


def _by_number(rows: pl.DataFrame) -> str:
    low_middle_high = np.quantile(rows["value"].cast(pl.Float64).to_numpy(), [0, 0.5, 1])
    return f"median {low_middle_high[1]:.4g}, {low_middle_high[0]:.4g} to {low_middle_high[2]:.4g}"


def _n_classes(label_sets: list[LabelSet]) -> int:
    return sum(_n_logits(label_set, is_alone=len(label_sets) == 1) for label_set in label_sets)


def _n_logits(labels: LabelSet, *, is_alone: bool) -> int:
    if labels.are_numbers or (labels.is_boolean and not is_alone):
        return 1
    return max(2, labels.frame["value"].n_unique())


def _n_in_train(splits: pl.DataFrame) -> int:
    return len(splits.filter(split="train"))


def codes_of(source: Source, n_events: int) -> pl.DataFrame | None:
    """Return code, n (its events) and n_values (those with a number); None where a source has too many events to count them."""
    if n_events > MAX_CODES_ROWS:
        return None
    parts = []
    for shard in source.shards:
        frame = pl.scan_parquet(shard, glob=False)
        value = pl.col("numeric_value").count() if "numeric_value" in frame.collect_schema() else pl.lit(0)
        parts.append(frame.group_by(pl.col("code").cast(pl.String)).agg(n=pl.len(), n_values=value).collect())
    return pl.concat(parts, how="vertical_relaxed").group_by("code").sum()


def coverage_of(codes: pl.DataFrame, metadata: pl.DataFrame, lookups: list[str]) -> str:
    """Return in words which share of events has a text that somebody wrote, and which of the most frequent codes have none.

    >>> codes = pl.DataFrame({"code": ["A", "LAB//B"], "n": [3, 1]})
    >>> metadata = pl.DataFrame({"code": ["A"], "description": ["fever"], "parent_codes": [None]},
    ...     schema_overrides={"parent_codes": pl.List(pl.String)})
    >>> coverage_of(codes, metadata, [])
    '75.0% of all events have a text (50.0% of codes); the rest show their bare codes, such as LAB//B'
    """
    found = codes.drop_nulls("code").sort("n", descending=True)
    steps = resolve_texts(found["code"], metadata, read_lookups(lookups))
    bare = steps["step"].to_numpy() == "readable"
    n, of_events = found["n"].to_numpy(), float(found["n"].sum()) or 1.0
    told = f"{1 - n[bare].sum() / of_events:.1%} of all events have a text ({1 - bare.mean():.1%} of codes)"
    named = ", ".join(found["code"].filter(pl.Series(bare)).head(SHOWN_CODES))
    return told + (f"; the rest show their bare codes, such as {named}" if named else "")


def tokens_of(cfg: DictConfig, source: Source, codes: pl.DataFrame | None) -> tuple[int, str]:
    """Return the largest number of texts to embed, and in words how it was found."""
    settings = VocabularySettings(values=cfg.data["values"], n_bins=cfg.data.n_bins, min_count=cfg.data.min_count)
    if codes is None:
        n_codes = source.code_metadata()["code"].n_unique()
        return n_codes, f"about {n_codes:,} codes by metadata/codes.parquet"
    n_binned = len(codes.filter(pl.col("n_values") >= settings.min_count)) if settings.has_bins else 0
    most = len(codes) + n_binned * settings.n_bins
    bins = f", {n_binned:,} of them with value bins: at most {most:,} texts" if n_binned else ""
    return most, f"{len(codes):,} codes{bins}; texts that are in the cache already take no time"


def seconds_per_text(embedder: Embedder) -> float:
    """Return the seconds that a text takes, measured on a few short ones; 0 for an embedder that reads no texts."""
    if not embedder.reads_text:
        return 0.0
    texts = [f"Measurement number {i} of a patient's record" for i in range(N_TEXTS)]
    embedder.embed(texts[:1])  # which loads the weights
    began = time.perf_counter()
    embedder.embed(texts)
    return (time.perf_counter() - began) / N_TEXTS


def measured(
    cfg: DictConfig,
    settings: TrainerSettings,
    *,
    width: int,
    n_tokens: int,
    shape: tuple[int, int],
    task_sizes: dict[str, int],
) -> Measured:
    """Build the model and time steps on random events.

    Args:
        cfg: the configuration of a stage.
        settings: those of its trainer.
        width, n_tokens: size of the table of vectors.
        shape: rows and events of a batch.
        task_sizes: the task's `num_classes`, or `vocab_size` where it predicts events.

    Raises:
        UserError: the model's settings do not fit together.
    """
    device = _device(settings)
    has_values = cfg.data["values"] in ("continuous", "both")
    torch.manual_seed(0)
    parts = _members(cfg)
    build = partial(builder(cfg), embedding_dim=width, has_values=has_values, **task_sizes)
    models: list[nn.Module] = [build(config) for config in parts or [cfg.model]]
    model = models[0]
    n_parameters = sum(p.numel() for part in models for p in part.parameters() if p.requires_grad)
    precision = choose_precision(settings.precision, settings.accelerator)
    where = f"{device.type} in {precision} with {torch.get_num_threads()} threads"
    if parts or isinstance(model, ReadsVocabulary | FitsAtOnce):
        return Measured(n_parameters, None, peak_memory_mib(device) / MIB_PER_GIB, where)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = {name: x.to(device) for name, x in random_inputs(shape, width, n_tokens, has_values=has_values).items()}
    if "vocab_size" in task_sizes:
        table = torch.randn(n_tokens, width, device=device)
        inputs |= {"table": table, "targets": inputs["token_ids"], "target_gap_days": inputs["gap_days"]}
        inputs |= {"target_values": inputs["values"]} if has_values else {}
    began = 0.0
    for step in range(N_WARM + N_STEPS):
        if step == N_WARM:
            _wait(device)
            began = time.perf_counter()
        with autocast_of_run(settings.precision, precision, device), named_inputs(type(model).__name__):
            loss = total(model(inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    return Measured(n_parameters, (time.perf_counter() - began) / N_STEPS, peak_memory_mib(device) / MIB_PER_GIB, where)


def random_inputs(shape: tuple[int, int], width: int, n_tokens: int, *, has_values: bool) -> dict[str, Tensor]:
    """Return inputs of a model as `EventEmbedding.inputs` gives them, of random events without padding."""
    inputs = {name: torch.rand(shape).cumsum(1) for name in ("days", "gap_days", "elapsed_days", "age_days")}
    inputs |= {"padding_mask": torch.ones(shape, dtype=torch.bool), "is_static": torch.zeros(shape, dtype=torch.bool)}
    n_rows = max(1, min(n_tokens, shape[0] * shape[1]))
    inputs |= {
        "rows": torch.randn(n_rows, width),
        "row_ids": torch.randint(n_rows, shape),
        "token_ids": torch.randint(2, max(3, n_tokens), shape, dtype=torch.int32),
    }
    return inputs | ({"values": torch.randn(shape)} if has_values else {})


def total(outputs: Any) -> Tensor:
    """Return the sum of a model's logits, or of the scores of an event head, which stands for a loss."""
    parts = (
        [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    )
    return torch.stack([part.float().mean() for part in parts]).sum()


def _members(cfg: DictConfig) -> list[DictConfig]:
    """Return the configurations of the models that an ensemble blends; empty for any other model."""
    members = cfg.model.get("members")
    return list(members) if OmegaConf.is_list(members) else []


def _device(settings: TrainerSettings) -> torch.device:
    return device_named("cuda" if settings.accelerator == "gpu" else settings.accelerator)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_words(seconds: float) -> str:
    """Return a duration as a person says it.

    >>> in_words(0.2), in_words(75), in_words(7300), in_words(200_000)
    ('1 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    s = max(1, round(seconds))
    for size, name, below, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if s >= size:
            rest = s % size // below
            return f"{s // size} {name}" + (f" {rest} {small}" if rest else "")
    return f"{s} s"
