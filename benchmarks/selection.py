"""Measure how often each metric on tuning picks the better of two models.

    python -m benchmarks.selection
    python -m benchmarks.selection --auroc 0.76 0.78 --n 2000 --prevalence 0.05 --correlation 0.8 --n-draws 4000

Scores are normal in each class and calibrated into probabilities, so that the loss and the Brier score can be judged beside AUROC,
AUPRC and F1 (at the threshold that is best on the same draw, as in a run). Within a class the scores of the two models have the
given correlation: models on the same records find the same subjects hard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ehr_embed.evaluation.metrics import CLASS_METRICS, binary_metrics, choose_threshold

JUDGED = ("auroc", "auprc", "f1", "loss", "brier")


def shares(
    auroc: Sequence[float], *, n: int, prevalence: float, correlation: float, n_draws: int, seed: int = 0
) -> dict[str, float]:
    """Return, for each metric of `JUDGED`, the share of draws of n samples in which it prefers the model of the higher AUROC.

    Args:
        auroc: of the worse and of the better model.
        n: samples of tuning.
        prevalence: share of positives, the same in every draw.
        correlation: of the two models' scores within a class, 0 to 1.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) < round(n * prevalence)
    subjects = np.arange(n)
    # Two normal classes of variance 1 whose means differ by d have AUROC = Phi(d / sqrt 2); d x - d^2 / 2 is then their log ratio.
    gaps = [2**0.5 * NormalDist().inv_cdf(value) for value in auroc]
    is_higher_better = {metric.name: metric.is_higher_better for metric in CLASS_METRICS}
    n_right = dict.fromkeys(JUDGED, 0.0)
    for _ in range(n_draws):
        found, shared = [], correlation**0.5 * rng.normal(size=n)
        for gap in gaps:
            score = gap * labels + shared + (1 - correlation) ** 0.5 * rng.normal(size=n)
            logit = gap * score - gap**2 / 2 + np.log(prevalence / (1 - prevalence))
            p = 1 / (1 + np.exp(-logit))
            threshold = choose_threshold(labels, p)
            found.append(
                binary_metrics(labels, p, threshold=threshold, subject_ids=subjects, n_bootstrap=0, split_name="tuning")
            )
        for name in JUDGED:
            gain = found[1][name]["value"] - found[0][name]["value"]
            n_right[name] += 0.5 if gain == 0 else (gain > 0) == is_higher_better[name]
    return {name: n / n_draws for name, n in n_right.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--auroc", nargs=2, type=float, default=(0.76, 0.78), help="of the worse and the better model")
    parser.add_argument("--n", type=int, default=2000, help="samples of tuning")
    parser.add_argument("--prevalence", type=float, default=0.05, help="share of positives")
    parser.add_argument("--correlation", type=float, default=0.8, help="of the two models' scores within a class")
    parser.add_argument("--n-draws", type=int, default=4000, help="draws of both models' scores")
    chosen = parser.parse_args(arguments)
    found = shares(
        chosen.auroc, n=chosen.n, prevalence=chosen.prevalence, correlation=chosen.correlation, n_draws=chosen.n_draws
    )
    print(f"| {' | '.join(found)} |\n|{'---:|' * len(found)}")
    print(f"| {' | '.join(f'{share:.2f}' for share in found.values())} |")


if __name__ == "__main__":
    main()
