"""`python -m ehr_embed.report`: write report.html of a finished run or of a search again, from what its folder holds."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from ehr_embed.config.check import checks_config
from ehr_embed.experiment.cli import CONF, run_main


@checks_config("ReportKeys")
def report(cfg: DictConfig) -> Path:
    """Write the report as `cfg` (conf/report.yaml) says.

    Returns:
        The path of the file.

    Raises:
        UserError: the folder holds neither a finished run nor a search, or a damaged one.
    """
    from ehr_embed.comparison.search_report import is_search, report_of_folder
    from ehr_embed.reports.html_report import write_report

    folder = Path(cfg.run).expanduser()
    path = report_of_folder(folder) if is_search(folder) else write_report(folder)
    print(path)
    return path


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def main(cfg: DictConfig) -> None:
    """Run the command line."""
    report(cfg)


if __name__ == "__main__":
    run_main(main, "report")
