"""Tabulate many runs: runs that differ only in their seed form one row, with mean, SD and 95 % interval over these runs.

Where the runs of a row are folds of a cross-validation (data.split_column), the seeds of each fold are averaged first, and
mean and SD are over the folds.

python -m ehr_embed.tabulate multirun/pipelines
python -m ehr_embed.tabulate multirun/physionet2012 --metrics held_out/auroc,ensemble/auroc
python -m ehr_embed.tabulate RUN RUN ... --by model._target_ --metrics held_out/auroc,ms_per_step --markdown
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ehr_embed.comparison.tabulate import FOLDER, markdown, print_table, tabulate, write_table
from ehr_embed.core.errors import UserError
from ehr_embed.core.pipes import reader_may_leave
from ehr_embed.core.programs import command


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a `UserError` is printed as one message and ends with exit code 2."""
    parser = argparse.ArgumentParser(
        prog=command("tabulate"), description="One table of many runs, with means over seeds."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN|SWEEP_DIR", help="folders of runs or of sweeps")
    parser.add_argument("--metrics", default="", help="names with commas, e.g. held_out/auroc,ms_per_step")
    parser.add_argument("--by", default="", help=f"keys with commas that tell rows apart, or {FOLDER}; default: all")
    parser.add_argument("--markdown", action="store_true", help="print it as a markdown table")
    parser.add_argument("--output", type=Path, metavar="STEM", help="also write STEM.csv and STEM.md")
    chosen = parser.parse_args(arguments)
    try:
        tabulated = tabulate(chosen.folders, metrics=_names(chosen.metrics), by=_names(chosen.by))
        if chosen.output is not None:
            write_table(tabulated, chosen.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(markdown(tabulated), end="") if chosen.markdown else print_table(tabulated)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    main()
