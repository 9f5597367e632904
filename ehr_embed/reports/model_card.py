"""Write the model card of a run: its training data, its metrics, overall and per subgroup, and their limits.

The card follows Mitchell et al. 2019 (arXiv:1810.03993). It contains counts and metrics of groups but no single subject and no
path, so that it can be shared.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ehr_embed import __version__
from ehr_embed.core.files import atomic_path
from ehr_embed.core.programs import as_typed, quoted_override
from ehr_embed.data.pool import Pool
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import EventStore
from ehr_embed.evaluation.metric_entries import intervals_missing, values_of, with_interval
from ehr_embed.evaluation.regression import IN_UNITS
from ehr_embed.evaluation.subgroups import MAX_CODES, MIN_SUBJECTS, Subgroup, subgroups
from ehr_embed.reports.markdown import code, plain, table
from ehr_embed.reports.run_report import DATASET_COLUMNS, dataset_rows, difference_text
from ehr_embed.run_folder.layout import MODEL_CARD, PLOTS
from ehr_embed.sources.protocol import EVALUATED, SPLITS
from ehr_embed.tasks.protocol import Curves

WIDE_INTERVAL, WORRYING_ECE = 0.1, 0.05


def write_model_card(
    run_dir: Path,
    *,
    config: dict[str, Any],
    metrics: dict[str, Any],
    store: EventStore,
    samples: dict[str, Samples],
    curves: Curves,
    audited: dict[str, Any] | None,
    n_bootstrap: int,
) -> Path:
    """Write RUN_DIR/model_card.md, after all other files of the run.

    Args:
        run_dir: the run's folder; the card shows the calibration plot if the folder holds one.
        config: the resolved configuration.
        metrics: content of metrics.json.
        store: the event store.
        samples: evaluated samples per split.
        curves: labels and probabilities that the task evaluated; only binary tasks have the key held_out, and only their cards
            report subgroups.
        audited: report of the leakage audit; None if the audit was off.
        n_bootstrap: bootstrap replicates for the intervals of the subgroups.

    Returns:
        The path of the card.
    """
    groups: list[Subgroup] = []
    n_left_out = 0
    if "held_out" in curves:
        groups, n_left_out = subgroups(
            store.vocabulary,
            store.split("held_out"),
            samples["held_out"],
            curves["held_out"][1],
            threshold=metrics["held_out"]["threshold"],
            n_bootstrap=n_bootstrap,
        )
    parts = [
        f"# Model card: {plain(run_dir.resolve().name)}\n\n{_about(run_dir.resolve().name, config, metrics['train'])}",
        f"## Data\n\n{_data(config, store, metrics, samples)}",
        f"## Texts\n\n{_texts(store)}",
        f"## Metrics\n\n{_metrics(metrics)}",
    ]
    if metrics.get("datasets"):
        rows = [[plain(name), *cells] for name, *cells in dataset_rows(metrics["datasets"])]
        parts.append(f"## Datasets\n\n{table(DATASET_COLUMNS, rows)}")
    if metrics.get("members"):
        parts.append(f"## Members\n\n{_members(metrics['members'])}")
    if groups:
        parts.append(f"## Subgroups of held_out\n\n{_subgroups(groups, n_left_out)}")
    if (run_dir / PLOTS / "calibration.png").exists() or metrics.get("calibration"):
        parts.append(
            f"## Calibration\n\n{_calibration(metrics, has_plot=(run_dir / PLOTS / 'calibration.png').exists())}"
        )
    if (run_dir / PLOTS / "decision_curve.png").exists():
        told = (
            "Net benefit (Vickers and Elkin 2006) of acting at or above a probability, in true positives per sample: below the "
            "curves of acting on all or on nobody, a model does harm. The numbers are in `plots/decision_curve.csv`."
        )
        parts.append(f"## Decision curve\n\n![Net benefit by threshold](plots/decision_curve.png)\n\n{told}")
    limits = "\n".join(f"- {line}" for line in limits_of(config, metrics, store, samples, groups, audited))
    parts.append(f"## Limits\n\n{limits}")
    path = run_dir / MODEL_CARD
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _about(name: str, config: dict[str, Any], train: dict[str, Any]) -> str:
    def kind(node: dict[str, Any]) -> str:
        return str(node["_target_"]).rpartition(".")[2]

    labels = config["task"].get("labels")
    rows = [
        ["task", kind(config["task"]) + (f", labels {plain(_joined(labels))}" if labels else "")],
        ["model", f"{kind(config['model'])}, {train['n_parameters']:,} parameters"],
        ["events as", plain(f"{kind(config['embedder'])} {config['embedder'].get('model', '')}")],
        ["seed", str(config["seed"])],
        ["version", f"ehr_embed {__version__}"],
    ]
    if "best_epoch" in train:
        rows.insert(3, ["checkpoint", f"epoch {train['best_epoch']} of {train['epochs']}, best on tuning"])
    again = as_typed(
        f"To train it again, type in the folder that holds the run's folder {code(name)}: "
        + code(
            f'python train.py --config-path "$PWD/{name}" --config-name config {quoted_override("run_dir", f"{name}_again")}'
        )
        + "."
    )
    return f"{table(['', ''], rows)}\n\n{again}"


def _joined(labels: Any) -> str:
    names = [labels] if isinstance(labels, str) else labels
    return ", ".join(Path(name).stem for name in names)  # without folders, whose names could reveal a site


def origin_of(config: dict[str, Any], train: dict[str, Any]) -> str:
    """Return in a sentence where the weights of a run come from, if they did not start here; else nothing.

    >>> origin_of({"init_from": None}, {"epochs": 3})
    ''
    >>> origin_of({"init_from": "runs/a"}, {})
    'The weights come from an earlier run (`init_from`) and were not trained here.'
    """
    if config.get("init_from") is None and config.get("pretrain") is None:
        return ""
    first = "an earlier run (`init_from`)" if config.get("pretrain") is None else "a first stage (`pretrain`)"
    if "epochs" in train:
        return f"The weights started from those of {first}, which saw that run's data, and were trained on here."
    return f"The weights come from {first} and were not trained here."


def _data(config: dict[str, Any], store: EventStore, metrics: dict[str, Any], samples: dict[str, Samples]) -> str:
    rows, is_binary, are_numbers = [], "prevalence" in metrics["held_out"], "label_sd" in metrics["held_out"]
    for split in SPLITS:
        sizes, own = store.manifest["splits"][split], samples[split]
        labels = f"{own.labels.mean():.3f}" if is_binary else ""
        if are_numbers:
            labels = f"{own.labels.mean():.4g} ({own.labels.std():.4g})"
        rows.append([split, *(f"{n:,}" for n in (sizes["n_subjects"], sizes["n_events"], len(own))), labels])
    told = table(["split", "subjects", "events", "samples", "label, mean (SD)" if are_numbers else "prevalence"], rows)
    origin = origin_of(config, metrics["train"])
    saw = f"vocabulary and bins saw train only. {origin}" if origin else "vocabulary, bins and weights saw train only."
    if found := metrics.get("alignment"):
        saw += (
            f" Codes are read as those of the earlier run, by text: {found['n_matched']:,} of {found['n_codes']:,} have a match, "
            f"{100 * found['event_share']:.1f} % of train's events; the others are left out (`alignment.csv`)."
        )
    if found := metrics.get("pooled"):
        saw += (
            f" Codes of the pooled datasets are read as each other's, by text, where they say the same (`alignment.csv`): "
            f"{found['n_matched']:,} codes, {found['n_merged']:,} of them as those of an earlier dataset."
        )
    return f"{_datasets_named(store)}; {saw}\n\n{told}"


def _datasets_named(store: EventStore) -> str:
    pool = Pool.of(store.manifest)
    if pool is None or len(pool.read) == 1:
        return f"Dataset {code(store.manifest['name'])}"
    return f"{len(pool.read)} datasets, {', '.join(map(code, pool.read))}"


def _texts(store: EventStore) -> str:
    report = store.vocabulary.report
    coverage = report["text_coverage"]
    rows = [
        [step, *(f"{100 * coverage[what][step]:.1f} %" for what in ("codes", "events"))] for step in coverage["codes"]
    ]
    told = table(["text from", "codes", "events"], rows)
    return f"{report['tokens']:,} tokens for {report['codes_in_train']:,} codes of train.\n\n{told}"


def _metrics(metrics: dict[str, Any]) -> str:
    names, order = values_of(metrics["held_out"]), EVALUATED[::-1]
    rows = [[plain(name), *(with_interval(metrics[split][name]) for split in order)] for name in names]
    told = " ".join(["With 95 % bootstrap intervals over subjects.", *intervals_missing(metrics)])
    return f"{told}\n\n" + table(["metric", *order], rows)


def _calibration(metrics: dict[str, Any], *, has_plot: bool) -> str:
    """Return what was fitted on tuning, the metrics before and after, and the plot."""
    parts, found = [], metrics.get("calibration")
    if found is None:
        parts.append("Probabilities are as the model gives them (`calibration=none`).")
    elif "fitted" not in found:
        parts.append(f"{found['method']} was asked for, but {found['too_few']}.")
    else:
        parts.append(
            f"{found['method']} ({found['fitted']}), fitted on {found['n']:,} samples of tuning; `predict` and `serve` apply it. "
            "All metrics here are of calibrated probabilities; those of tuning are too optimistic, since it was fitted there."
        )
        rows = [
            [
                name,
                *(
                    with_interval(entry)
                    for split in EVALUATED[::-1]
                    for entry in (found["before"][split][name], metrics[split][name])
                ),
            ]
            for name in found["before"]["held_out"]
        ]
        head = [f"{split} {when}" for split in EVALUATED[::-1] for when in ("before", "after")]
        parts.append(table(["metric", *head], rows))
    if has_plot:
        parts.append("![Predicted probability against observed rate](plots/calibration.png)")
    return "\n\n".join(parts)


def _members(members: list[dict[str, Any]]) -> str:
    names = list(members[0]["held_out"])
    rows = [
        [
            plain(member["run"]),
            f"{member['weight']:.3f}",
            *(difference_text(member["held_out"][name]) for name in names),
        ]
        for member in members
    ]
    told = (
        "One prediction from the weighted mean of the members' log-probabilities. The columns say how far the ensemble lies above "
        "each member on held_out, with 95 % intervals and p-values adjusted over the members (Holm), paired over subjects."
    )
    return f"{told}\n\n{table(['member', 'weight', *names], rows)}"


def _subgroups(groups: list[Subgroup], n_left_out: int) -> str:
    rows = []
    for group in groups:
        if group.metrics is None:
            n = f"fewer than {MIN_SUBJECTS} subjects" if group.n is None else f"{group.n:,}"
            rows.append([plain(group.name), n, "", "too few", "too few"])
        else:
            areas = (with_interval(group.metrics[name]) for name in ("auroc", "auprc"))
            rows.append([plain(group.name), f"{group.n:,}", f"{group.metrics['prevalence']:.3f}", *areas])
    tail = ""
    if n_left_out:
        tail = f"\n\nOnly the {MAX_CODES} static codes with most subjects are listed; {n_left_out:,} more are left out."
    return table(["group", "samples", "prevalence", "AUROC", "AUPRC"], rows) + tail


def limits_of(
    config: dict[str, Any],
    metrics: dict[str, Any],
    store: EventStore,
    samples: dict[str, Samples],
    groups: list[Subgroup],
    audited: dict[str, Any] | None,
) -> list[str]:
    """Return the limits of the run's metrics, one sentence per limit, from facts of this run."""
    held_out, tuning, sizes = metrics["held_out"], metrics["tuning"], store.manifest["splits"]
    lines = [
        _sites(origin_of(config, metrics["train"]), store),
        f"Held_out has {sizes['held_out']['n_subjects']:,} subjects and {held_out['n']:,} samples; the checkpoint and any "
        f"threshold were chosen on {tuning['n']:,} samples of tuning, so the metrics on tuning are too optimistic.",
    ]
    if "prevalence" in held_out:
        n_positive = round(held_out["prevalence"] * held_out["n"])
        lines.append(
            f"{n_positive:,} samples of held_out are positive; this number limits the precision of every metric."
        )
    wide = [
        f"{name} ({entry['high'] - entry['low']:.2f})"
        for name, entry in held_out.items()
        if isinstance(entry, dict)
        and name not in IN_UNITS
        and isinstance(entry.get("low"), float)
        and entry["high"] - entry["low"] > WIDE_INTERVAL
    ]
    if wide:
        lines.append(f"Intervals wider than {WIDE_INTERVAL} on held_out: {', '.join(wide)}.")
    if "ece" in held_out and held_out["ece"]["value"] > WORRYING_ECE:
        lines.append(
            f"Probabilities are off by {held_out['ece']['value']:.2f} on average (ECE of held_out): use them for ranking only, or "
            + (
                "calibrate them with more labels."
                if metrics.get("calibration")
                else "calibrate them (`calibration=temperature`)."
            )
        )
    own = samples["held_out"]
    cut = float(np.mean(own.start > own.static_stop))
    lines.append(
        f"{100 * cut:.1f} % of held_out's samples have older events than the model reads (`model.max_length="
        f"{config['model'].get('max_length')}`); the model does not see those events."
    )
    shares = [
        f"{100 * sizes[s]['n_unknown'] / max(1, sizes[s]['n_events']):.2f} % of {s}" for s in ("tuning", "held_out")
    ]
    lines.append(f"Events whose code does not occur in train are all read as one unknown event: {', '.join(shares)}.")
    readable = store.vocabulary.report["text_coverage"]["events"]["readable"]
    if readable > 0:
        lines.append(
            f"{100 * readable:.1f} % of train's events have no description; their text is their code, made readable."
        )
    fraction = config["task"].get("label_fraction", 1.0)
    if isinstance(fraction, list) and min(fraction) < 1:
        said = " and ".join(f"{100 * share:g} %" for share in fraction)
        lines.append(f"Only {said} of train's labelled subjects were used, dataset by dataset.")
    elif not isinstance(fraction, list) and fraction < 1:
        lines.append(f"Only {100 * fraction:g} % of train's labelled subjects were used.")
    if config["task"].get("shuffle_labels") is not None:
        lines.append("The labels were shuffled: this run checks for leakage and is not a usable model.")
    if small := sum(group.metrics is None for group in groups):
        lines.append(
            f"{small} of {len(groups)} subgroups are too small to evaluate (below {MIN_SUBJECTS} subjects, or one class only)."
        )
    if not groups and "prevalence" in held_out:
        lines.append("The data have no static code or birth time that defines subgroups, so none were compared.")
    lines.append(_audit_line(audited))
    return lines


def _sites(origin: str, store: EventStore) -> str:
    """Return where the splits come from, and what that leaves unknown."""
    pool = Pool.of(store.manifest)
    if pool is not None and len(pool.read) > 1:
        said = "All splits come from the same datasets, and the model was trained on each of them"
        return f"{origin} {said}.".strip() if origin else f"{said}: performance at other sites or times is not known."
    if origin:
        return f"{origin} All splits that judge them come from one dataset, {code(store.manifest['name'])}."
    return f"All splits come from one dataset, {code(store.manifest['name'])}: performance at other sites or times is not known."


def _audit_line(audited: dict[str, Any] | None) -> str:
    if audited is None:
        return "No leakage audit was made (`audit=off`)."
    leaks = Counter(finding["check"] for finding in audited["findings"] if finding["level"] == "leak")
    if not leaks:
        unsure = f" ({len(audited['not_checked'])} checks lacked samples)" if audited["not_checked"] else ""
        return f"The leakage audit found nothing{unsure}; docs/audit.md lists the leaks that it cannot find."
    told = ", ".join(f"{check} {count}" for check, count in leaks.items())
    return f"**The leakage audit found {leaks.total()} possible leaks ({told}): see audit.json before believing any number.**"
