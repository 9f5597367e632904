"""How often each metric on tuning picks the better of two models.

    python -m benchmarks.selection
    python -m benchmarks.selection --auroc 0.76 0.78 --n 2000 --prevalence 0.05 --n-draws 4000

Scores are normal in each class, of both models independent given the label, and calibrated into probabilities, so that the loss and
the Brier score can be judged beside AUROC, AUPRC and F1 (at the threshold that is best on the same draw, as in a run).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ehr_embed.evaluation.metrics import CLASS_METRICS, binary_metrics, choose_threshold

JUDGED = ("auroc", "auprc", "f1", "loss", "brier")


def shares(auroc: Sequence[float], *, n: int, prevalence: float, n_draws: int, seed: int = 0) -> dict[str, float]:
    """Return, for each metric of `JUDGED`, the share of draws of n samples in which it prefers the model of the higher AUROC.

    Args:
        auroc: of the worse and of the better model.
        n: samples of tuning.
        prevalence: share of positives, the same in every draw.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) < round(n * prevalence)
    subjects = np.arange(n)
    # Two normal classes of variance 1 whose means differ by d have AUROC = Phi(d / sqrt 2); d x - d^2 / 2 is then their log ratio.
    gaps = [2**0.5 * NormalDist().inv_cdf(value) for value in auroc]
    is_higher_better = {metric.name: metric.is_higher_better for metric in CLASS_METRICS}
    n_right = dict.fromkeys(JUDGED, 0.0)
    for _ in range(n_draws):
        found = []
        for gap in gaps:
            score = gap * labels + rng.normal(size=n)
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--auroc", nargs=2, type=float, default=(0.76, 0.78), help="of the worse and the better model")
    parser.add_argument("--n", type=int, default=2000, help="samples of tuning")
    parser.add_argument("--prevalence", type=float, default=0.05, help="share of positives")
    parser.add_argument("--n-draws", type=int, default=4000, help="draws of both models' scores")
    chosen = parser.parse_args(arguments)
    found = shares(chosen.auroc, n=chosen.n, prevalence=chosen.prevalence, n_draws=chosen.n_draws)
    print(f"| {' | '.join(found)} |\n|{'---:|' * len(found)}")
    print(f"| {' | '.join(f'{share:.2f}' for share in found.values())} |")


if __name__ == "__main__":
    main()
