"""`python -m ehr_embed.explain`: explain one subject's prediction by its events, or the predictions of a split by texts."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from ehr_embed.config.check import checks_config
from ehr_embed.core.threads import AUTO, use_threads
from ehr_embed.experiment.cli import CONF, run_main


@checks_config("ExplainKeys")
def explain(cfg: DictConfig) -> list[Path]:
    """Explain as `cfg` (conf/explain.yaml) says, and write the tables and plots.

    Returns:
        The paths of the files.

    Raises:
        UserError: a setting is out of range, or `Predictor` or `Explainer` refuses the run, the dataset or the target.
    """
    # Imported here, so that a misspelt override is refused before torch is loaded.
    from ehr_embed.experiment.inputs import alignment_settings
    from ehr_embed.inference.explainer import Explainer, explain_split, explain_subject
    from ehr_embed.inference.predictor import Predictor
    from ehr_embed.inference.trained_run import device_named, trained_on
    from ehr_embed.reports.html_report import write_report
    from ehr_embed.run_folder.layout import EXPLAINED, REPORT

    device = device_named(cfg.device)
    use_threads(cfg.get("threads", AUTO), device=device.type)
    predictor = Predictor(cfg.run, device=str(device), trusted_packages=cfg.trusted_packages)
    explainer = Explainer(
        predictor, target=cfg.target, n_steps=cfg.n_steps, max_steps=cfg.max_steps, tolerance=cfg.tolerance
    )
    root = cfg.data.root
    if root is None:
        root = str(trained_on(predictor.run, trusted=tuple(cfg.trusted_packages)).labels_dir.parent)
    split = "held_out" if cfg.split is None and cfg.subject is None else cfg.split
    folder = Path(cfg.output).expanduser()
    reading = predictor.opened(
        root, labels=cfg.task.labels, split=split, lookups=list(cfg.data.lookups), alignment=alignment_settings(cfg)
    )
    with reading as data:
        if cfg.subject is not None:
            paths = explain_subject(explainer, data, int(cfg.subject), cfg.prediction_time, folder)
        else:
            paths = explain_split(
                explainer, data, max_samples=cfg.max_samples, min_samples=cfg.min_samples, seed=cfg.seed, folder=folder
            )
    if (report := folder.parent / REPORT).is_file() and folder == Path(cfg.run).expanduser() / EXPLAINED:
        paths.append(write_report(report.parent))  # which shows now what moved the predictions
    print("\n".join(map(str, paths)))
    return paths


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="explain")
def main(cfg: DictConfig) -> None:
    """Run the command line."""
    explain(cfg)


if __name__ == "__main__":
    run_main(main, "explain")
