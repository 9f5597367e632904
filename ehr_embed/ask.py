"""`python -m ehr_embed.ask`: ask a run of task=time_to_event for outcomes in words, and write each subject's risk and curve."""

from __future__ import annotations

import logging
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from ehr_embed.config.check import checks_config
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path, write_json
from ehr_embed.core.threads import AUTO, use_threads
from ehr_embed.experiment.cli import CONF, run_main
from ehr_embed.run_folder.layout import CONFIG, FINISHED, PLOTS

if TYPE_CHECKING:
    from ehr_embed.inference.asker import Answers, Question

log = logging.getLogger(__name__)
ANSWERS, QUESTIONS = "answers.parquet", "questions.json"
PICTURE = re.compile(r"\d+_[A-Za-z0-9_-]+\.png")
"""Name of the picture of a question."""


@checks_config("AskKeys")
def ask(cfg: DictConfig) -> Path:
    """Ask as `cfg` (conf/ask.yaml) says, and write the answers.

    Returns:
        The folder of the answers.

    Raises:
        UserError: both words and codes are asked for, the split is unknown, the folder is that of a run, the labels are not
            boolean, or `Asker` refuses the run, a question or the dataset.
    """
    if len(cfg.questions) and (len(cfg.codes) or cfg.code_pattern is not None):
        raise UserError(
            "questions and codes are both given: an outcome is asked for in words or by codes. Leave one out"
        )
    folder = Path(cfg.output).expanduser()
    if (folder / CONFIG).exists():
        raise UserError(
            f"output={folder} is the folder of a run, whose metrics.json would be lost. Type: output=ANOTHER"
        )
    # Imported here, so that a misspelt override is refused before torch is loaded.
    from ehr_embed.experiment.inputs import alignment_settings
    from ehr_embed.inference.asker import Asker
    from ehr_embed.inference.trained_run import device_named

    device = device_named(cfg.device)
    use_threads(cfg.get("threads", AUTO), device=device.type)
    asker = Asker(cfg.run, device=str(device), trusted_packages=cfg.trusted_packages)
    questions = asker.questions(
        _asked(cfg), literal=cfg.literal, n_events=cfg.n_events, min_cosine=cfg.min_cosine, margin=cfg.margin
    )
    for question in questions:
        print(_shown(question))
    began = time.perf_counter()
    answers = asker.ask(
        questions,
        cfg.data.root,
        horizon_days=cfg.horizon_days,
        labels=cfg.labels,
        split=cfg.split,
        lookups=list(cfg.data.lookups),
        alignment=alignment_settings(cfg),
    )
    log.info("%d predictions in %.1f s", len(answers.times), time.perf_counter() - began)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_earlier(folder)
    with atomic_path(folder / ANSWERS) as temporary:
        answers.frame.write_parquet(temporary)
    write_json(folder / QUESTIONS, _described(cfg, answers))
    _plot(folder, answers)
    if cfg.labels is not None:  # a file of prediction times alone judges nothing
        root = asker.run.config["data"]["root"] if cfg.data.root is None else cfg.data.root
        metrics = judged(answers, cfg.labels, Path(root) / "labels", split=cfg.split, n_bootstrap=cfg.n_bootstrap)
        if metrics is not None:
            write_json(folder / FINISHED, metrics)
            _print(metrics, cfg.split or "all")
    print(f"{len(answers.times)} predictions for {len(questions)} questions in {folder}")
    return folder


def _asked(cfg: DictConfig) -> Any:
    if len(cfg.questions):
        return [str(words) for words in cfg.questions]
    keys: dict[str, Any] = {"codes": list(cfg.codes)} if len(cfg.codes) else {}
    keys |= {"code_pattern": cfg.code_pattern} if cfg.code_pattern is not None else {}
    if not keys:
        return []
    return {cfg.code_pattern if not len(cfg.codes) else "+".join(cfg.codes): keys}


def judged(
    answers: Answers, labels: str, labels_dir: Path, *, split: str | None, n_bootstrap: int
) -> dict[str, Any] | None:
    """Return the metrics of the answers, laid out as a run's metrics.json: those of the split, per question if there are several.
    Return None for a file of prediction times without labels.

    The threshold of F1, accuracy, precision and recall is a risk of 0.5, since no label chooses one.

    Raises:
        UserError: the labels are not boolean, or have one class only.
    """
    from ehr_embed.data.labels import read_labels
    from ehr_embed.evaluation.metrics import binary_metrics

    found = read_labels(labels, labels_dir, needs_values=False)
    if found.value_column is None:
        return None
    if not found.is_boolean:
        raise UserError(
            f"labels={labels}: expected boolean labels, got {found.value_column}: a risk is that of one outcome."
        )
    rows = answers.times.join(found.frame, on=["subject_id", "prediction_time"], how="left", maintain_order="left")
    name = split or "all"
    by_question = {
        question.name: binary_metrics(
            (rows["value"] == "true").to_numpy(),
            answers.incidence[:, number, -1],
            threshold=0.5,
            subject_ids=rows["subject_id"].to_numpy(),
            n_bootstrap=n_bootstrap,
            split_name=name,
        )
        for number, question in enumerate(answers.questions)
    }
    metrics = next(iter(by_question.values())) if len(by_question) == 1 else {"per_question": by_question}
    return {name: metrics, "monitor": {"name": "auroc", "is_higher_better": True}}


def _shown(question: Question) -> str:
    """Return the question with the events that it was resolved to, nearest first, and those that only the margin leaves out."""
    from ehr_embed.embedding.nearest_events import margin_to

    lines = [
        f"{question.name}:" + (" the words' own vector; the nearest events are" if question.vector is not None else "")
    ]
    for event in question.events:
        cosine = "" if math.isnan(event.cosine) else f"cosine {event.cosine:.3f}, "
        lines.append(f"  {event.text} ({event.code}; {cosine}{event.n_train:,} events in train)")
    if question.wider is not None:
        lines.append("  left out by margin alone; type the margin of an event to include it and those above it:")
        for event in question.left_out:
            needed = margin_to(question.events[0].cosine, event.cosine)
            lines.append(f"    {event.text} ({event.code}; cosine {event.cosine:.3f}, margin={needed:g})")
    return "\n".join(lines)


def _described(cfg: DictConfig, answers: Answers) -> dict[str, Any]:
    """Return what questions.json holds: the horizon, the times of the curves, and the events of each question."""
    questions = {
        question.name: {
            "literal": question.vector is not None,
            "n_prior": int(answers.has_prior[:, number].sum()),
            "mean_risk": float(answers.incidence[:, number, -1].mean()),
            "events": [
                event._asdict() | {"cosine": None if math.isnan(event.cosine) else event.cosine}
                for event in question.events
            ],
            "left_out": [event._asdict() for event in question.left_out],
        }
        for number, question in enumerate(answers.questions)
    }
    return {"horizon_days": cfg.horizon_days, "days": answers.days, "n": len(answers.times), "questions": questions}


def _remove_earlier(folder: Path) -> None:
    """Remove what an earlier call wrote into a folder of answers and this one may not write again: pictures of other questions, and
    metrics of labels."""
    if not (folder / QUESTIONS).is_file():
        return
    (folder / FINISHED).unlink(missing_ok=True)
    for path in (folder / PLOTS).glob("*.png"):
        if PICTURE.fullmatch(path.name):
            path.unlink()


def _plot(folder: Path, answers: Answers) -> None:
    """Draw the curves of each question."""
    from ehr_embed.evaluation.survival_plots import plot_risk_curves

    (folder / PLOTS).mkdir(exist_ok=True)
    for number, question in enumerate(answers.questions):
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", question.name)[:60]
        path = folder / PLOTS / f"{number + 1}_{name}.png"
        plot_risk_curves(path, answers.incidence[:, number], grid_days=answers.days, title=question.name)


def _print(metrics: dict[str, Any], split: str) -> None:
    from ehr_embed.evaluation.metric_entries import with_interval

    found = metrics[split]
    for name, own in found["per_question"].items() if "per_question" in found else [("", found)]:
        told = ", ".join(f"{metric} {with_interval(own[metric])}" for metric in ("auroc", "auprc", "brier", "ece"))
        print(f"{name + ': ' if name else ''}{told} (n={own['n']}, prevalence {own['prevalence']:.3f})")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="ask")
def main(cfg: DictConfig) -> None:
    """Run the command line."""
    ask(cfg)


if __name__ == "__main__":
    run_main(main, "ask")
