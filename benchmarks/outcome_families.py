"""Compare a hazard run's answers for outcomes whose families were kept out of its training with those of runs that trained on them.

    python -m benchmarks.outcome_families draw RUN --folds 4 --leave_out arthritis
    python train.py experiment=pretrain_hazards data.root=DATA run_dir=RUN_0 'task.auto.never={codes: [CODE,...]}'
    python -m benchmarks.outcome_families judge DATA RUN_0 RUN_1 RUN_2 RUN_3 --horizon_days 365

A family is a cluster of codes by the cosines of their texts. `draw` spreads the families over folds and prints, line by line, what
the run of each fold keeps out of all sets of pretraining; RUN is any run on the dataset. `judge` asks each run for every frequent
code and prints one JSON line: the AUROC of codes that were kept out, and that of the same codes in the other runs, both as means
over families, since one family is noise. A model that guesses has 0.5, so that the share of what lies above 0.5 is given too.
Nothing reads a label.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage

from benchmarks.asked_outcomes import auroc, event_times, onsets
from ehr_embed.inference.asker import Asker

MIN_EVENTS = 20
"""A token with fewer events belongs to no family."""
N_BOOTSTRAP = 2000
"""Draws of families behind the 95 % interval."""
DISTANCE = 0.5
"""Cosine distance, averaged over pairs, below which two clusters of texts are one family."""


def codes_of(asker: Asker) -> dict[str, list[int]]:
    """Return the frequent tokens of each code of a run's vocabulary."""
    vocabulary = asker.run.vocabulary
    counts, found = vocabulary.tokens["count"].to_numpy(), dict[str, list[int]]()
    for token, code in enumerate(vocabulary.token_codes):
        if code is not None and counts[token] >= MIN_EVENTS:
            found.setdefault(code, []).append(token)
    return found


def families(asker: Asker, codes: dict[str, list[int]]) -> dict[str, int]:
    """Return the number of each code's family, from 1."""
    vectors = F.normalize(asker.run.embedding.table.float(), dim=1)
    means = np.stack([F.normalize(vectors[own].mean(0), dim=0).numpy() for own in codes.values()])
    number = fcluster(linkage(means, "average", metric="cosine"), DISTANCE, "distance")
    return dict(zip(codes, number.tolist(), strict=True))


def folds_of(family: dict[str, int], n_folds: int) -> dict[int, int]:
    """Return the fold of each family, drawn so that folds have about as many codes.

    >>> found = folds_of({"a": 1, "b": 1, "c": 2, "d": 3}, 2)
    >>> sorted(found), sorted(set(found.values()))
    ([1, 2, 3], [0, 1])
    """
    sizes, load, fold = np.bincount(list(family.values())), [0] * n_folds, dict[int, int]()
    for number in (np.random.default_rng(0).permutation(len(sizes) - 1) + 1).tolist():
        fold[number] = int(np.argmin(load))
        load[fold[number]] += int(sizes[number])
    return fold


def draw(run: str, n_folds: int, leave_out: str | None) -> list[str]:
    """Return the override of each fold's run; codes whose text contains `leave_out` are in no fold."""
    asker = Asker(run)
    vocabulary, codes = asker.run.vocabulary, codes_of(asker)
    family = families(asker, codes)
    fold = folds_of(family, n_folds)
    texts = {code: vocabulary.texts[int(vocabulary.plain_tokens[own[0]])].lower() for code, own in codes.items()}
    names = [code for code in codes if leave_out is None or leave_out.lower() not in texts[code]]
    parts = [[code for code in names if fold[family[code]] == number] for number in range(n_folds)]
    return ["task.auto.never={codes: [" + ",".join(f'"{code}"' for code in part) + "]}" for part in parts]


def judge(root: str, runs: Sequence[str], *, split: str, horizon_days: int, least: int) -> dict[str, Any]:
    """Return the AUROC of codes in runs that kept them out and in runs that did not, as means over families."""
    out: dict[str, list[float]] = {}
    trained: dict[str, list[float]] = {}
    family: dict[str, int] = {}
    for run in runs:
        asker = Asker(run)
        never = set((asker.run.config["task"]["auto"]["never"] or {}).get("codes", []))
        codes = codes_of(asker)
        family = family or families(asker, codes)
        with tempfile.TemporaryDirectory() as folder:
            times = str(Path(folder) / "times.parquet")
            events = asker.read(root, labels=None, split=split, lookups=()).events
            event_times(events, horizon_days=horizon_days, per_subject=12).write_parquet(times)
            data = asker.read(root, labels=times, split=split, lookups=())
            found = onsets(data, codes, horizon_days=horizon_days)
            kept = {name: of for name, of in found.items() if min(of[1].sum(), (of[0] & ~of[1]).sum()) >= least}
            about = {name: {"codes": [name]} for name in kept}
            answers = asker.ask(about, root, horizon_days=horizon_days, labels=times, split=split)
        for name, risk in zip(kept, answers.incidence[:, :, -1].T, strict=True):
            (out if name in never else trained).setdefault(name, []).append(auroc(risk, kept[name]))
    by_family: dict[int, list[tuple[float, float]]] = {}
    for name in sorted(set(out) & set(trained)):
        by_family.setdefault(family[name], []).append((float(np.mean(out[name])), float(np.mean(trained[name]))))
    pairs = np.array([np.mean(own, 0) for own in by_family.values()]).reshape(-1, 2)
    ratios = pairs[:, 0] / pairs[:, 1]
    drawn = pairs[np.random.default_rng(0).integers(0, len(pairs), (N_BOOTSTRAP, len(pairs)))].mean(1)
    above = (drawn[:, 0] - 0.5) / (drawn[:, 1] - 0.5)
    return {
        "families": len(pairs),
        "codes": sum(map(len, by_family.values())),
        "auroc_kept_out": round(float(pairs[:, 0].mean()), 4),
        "auroc_trained": round(float(pairs[:, 1].mean()), 4),
        "share": round(float(pairs[:, 0].mean() / pairs[:, 1].mean()), 3),
        "share_above_chance": round(float((pairs[:, 0].mean() - 0.5) / (pairs[:, 1].mean() - 0.5)), 3),
        "share_above_chance_interval": np.quantile(above, [0.025, 0.975]).round(2).tolist(),
        "quartiles_of_shares": np.quantile(ratios, [0.25, 0.5, 0.75]).round(2).tolist(),
        "families_above_0.9": round(float((ratios >= 0.9).mean()), 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw or judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    drawing, judging = ways.add_parser("draw"), ways.add_parser("judge")
    drawing.add_argument("run")
    drawing.add_argument("--folds", type=int, default=4)
    drawing.add_argument("--leave_out", help="part of the texts of codes that are in no fold")
    judging.add_argument("data")
    judging.add_argument("runs", nargs="+")
    judging.add_argument("--split", default="tuning")
    judging.add_argument("--horizon_days", type=int, default=365)
    judging.add_argument("--least", type=int, default=15, help="onsets that a code needs, and times without")
    options = parser.parse_args(arguments)
    if options.way == "draw":
        print("\n".join(draw(options.run, options.folds, options.leave_out)))
        return
    how = {name: getattr(options, name) for name in ("split", "horizon_days", "least")}
    print(json.dumps({"benchmark": "outcome_families"} | judge(options.data, options.runs, **how) | how))


if __name__ == "__main__":
    main()
