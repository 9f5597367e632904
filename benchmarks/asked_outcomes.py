"""Judge a pretrained hazard head on many outcomes at once, without a label set: single codes, and random unions of codes.

    python benchmarks/asked_outcomes.py RUN DATA --split tuning --code_pattern ^SNOMED --leave_out arthritis
    python benchmarks/asked_outcomes.py RUN DATA --split held_out --code_pattern ^SNOMED --unions 60

An outcome counts if enough prediction times are followed by an onset within the horizon, and enough are not. These times are
drawn from each record's own event times that are followed by the horizon or more. Prints one JSON line: the mean AUROC of
single codes; with --unions that of random unions of 2 to 8 codes, as answered for the union itself and as combined from the
answers for its codes (one minus the product of the complements), and the share of unions for which their own answer is better;
with --each the AUROC of every code. Settings of pretraining can be chosen by it on tuning, since it reads no label of the
outcome that is asked for if --leave_out names it.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.metrics import roc_auc_score

from ehr_embed.data.outcomes import EVENT, TokenPlaces, follow_up
from ehr_embed.data.store import MICROSECONDS_PER_DAY, STATIC_TIME, SplitEvents
from ehr_embed.inference.asker import Answers, Asker
from ehr_embed.inference.records import Dataset

Booleans = npt.NDArray[np.bool_]


def event_times(events: SplitEvents, *, horizon_days: float, per_subject: int, seed: int = 0) -> pl.DataFrame:
    """Return subject_id and prediction_time: up to `per_subject` distinct event times of each record that the horizon follows."""
    subjects = np.repeat(np.asarray(events.subject_ids), np.diff(events.offsets))
    times = np.asarray(events.times)
    frame = pl.DataFrame({"subject_id": subjects, "time": times}).filter(pl.col("time") != STATIC_TIME).unique()
    followed = pl.col("time").max().over("subject_id") - pl.col("time") > horizon_days * MICROSECONDS_PER_DAY
    frame = frame.sort("subject_id", "time").filter(followed)
    lot = pl.Series("lot", np.random.default_rng(seed).random(len(frame)))
    frame = frame.with_columns(lot).filter(pl.col("lot").rank().over("subject_id") <= per_subject)
    return frame.select("subject_id", prediction_time=pl.col("time").cast(pl.Datetime("us")))


def onsets(
    data: Dataset, sets: Mapping[str, list[int]], *, horizon_days: float
) -> dict[str, tuple[Booleans, Booleans]]:
    """Return per set of tokens which samples are asked for it (it has not happened yet), and which have it within the horizon."""
    found = follow_up(
        data.events,
        data.samples,
        list(sets.values()),
        places=TokenPlaces(data.events, len(data.vocabulary)),
        excludes_prior=True,
    )
    is_asked = ~found.has_prior & ~np.isnan(found.days)
    has_it = (found.status == EVENT) & (found.days <= horizon_days)
    return {name: (is_asked[:, k], has_it[:, k] & is_asked[:, k]) for k, name in enumerate(sets)}


def auroc(risk: npt.NDArray[np.float64], of: tuple[Booleans, Booleans]) -> float:
    """Return the AUROC of a risk (n,) among the samples that are asked."""
    is_asked, has_it = of
    return float(roc_auc_score(has_it[is_asked], risk[is_asked]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "data"):
        parser.add_argument(name)
    parser.add_argument("--split", default="tuning")
    parser.add_argument("--code_pattern", default=".")
    parser.add_argument("--leave_out", help="regular expression of texts whose codes are left out")
    parser.add_argument("--each", action="store_true")
    for name, default in (("horizon_days", 365), ("per_subject", 12), ("least", 25), ("unions", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)

    asker = Asker(options.run)
    vocabulary = asker.run.vocabulary
    tokens: dict[str, list[int]] = {}
    for token, code in enumerate(vocabulary.token_codes):
        text = vocabulary.texts[int(vocabulary.plain_tokens[token])]
        is_left_out = options.leave_out is not None and re.search(options.leave_out, text, flags=re.IGNORECASE)
        if code is not None and re.search(options.code_pattern, code) and not is_left_out:
            tokens.setdefault(code, []).append(token)
    rng, codes = np.random.default_rng(0), list(tokens)
    members = {code: [code] for code in codes}
    for number in range(options.unions):
        size = min(int(rng.integers(2, 9)), len(codes))
        members[f"union {number}"] = [codes[i] for i in rng.choice(len(codes), size, replace=False)]

    with tempfile.TemporaryDirectory() as folder:
        times = str(Path(folder) / "times.parquet")
        events = asker.read(options.data, labels=None, split=options.split, lookups=()).events
        event_times(events, horizon_days=options.horizon_days, per_subject=options.per_subject).write_parquet(times)
        data = asker.read(options.data, labels=times, split=options.split, lookups=())
        sets = {name: [token for code in own for token in tokens[code]] for name, own in members.items()}
        found = onsets(data, sets, horizon_days=options.horizon_days)
        kept = {name: of for name, of in found.items() if min(of[1].sum(), (of[0] & ~of[1]).sum()) >= options.least}
        needed = dict.fromkeys(code for name in kept for code in members[name])

        def ask(names: Mapping[str, Any]) -> Answers:
            about = {name: {"codes": members[name]} for name in names}
            return asker.ask(about, options.data, horizon_days=options.horizon_days, labels=times, split=options.split)

        risk = dict(zip(kept, ask(kept).incidence[:, :, -1].T, strict=True)) if kept else {}
        alone = dict(zip(needed, ask(needed).incidence[:, :, -1].T, strict=True)) if options.unions and needed else {}

    own = {name: auroc(risk[name], of) for name, of in kept.items()}
    single = {name: value for name, value in own.items() if len(members[name]) == 1}
    told: dict[str, Any] = {
        "benchmark": "asked_outcomes",
        "predictions": len(data.samples),
        "codes": len(single),
        "auroc": round(float(np.mean(list(single.values()))), 4) if single else None,
    }
    if unions := [name for name in kept if len(members[name]) > 1]:
        combined = {name: 1 - np.prod([1 - alone[code] for code in members[name]], axis=0) for name in unions}
        of_codes = [auroc(combined[name], kept[name]) for name in unions]
        told |= {
            "unions": len(unions),
            "auroc_of_unions": round(float(np.mean([own[name] for name in unions])), 4),
            "auroc_of_unions_from_codes": round(float(np.mean(of_codes)), 4),
            "share_better_as_union": round(
                float(np.mean([own[n] > c for n, c in zip(unions, of_codes, strict=True)])), 2
            ),
        }
    if options.each:
        told["each"] = {name: round(value, 3) for name, value in single.items()}
    print(json.dumps(told | {k: v for k, v in vars(options).items() if k not in ("data", "each", "run", "unions")}))


if __name__ == "__main__":
    main()
