"""Compare runs: write one table, plots, and paired bootstrap tests on the held-out subjects that the runs share.

python -m ehr_embed.compare RUN RUN ...
python -m ehr_embed.compare SWEEP_DIR --output FOLDER --reference RUN
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ehr_embed.comparison.compare import compare
from ehr_embed.core.errors import UserError
from ehr_embed.core.pipes import reader_may_leave
from ehr_embed.core.programs import command


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a `UserError` is printed as one message and ends with exit code 2."""
    parser = argparse.ArgumentParser(
        prog=command("compare"), description="Compare runs, with paired bootstrap tests between them."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN|SWEEP_DIR", help="folders of runs or of sweeps")
    parser.add_argument(
        "--output", type=Path, help="folder for the results; default: SWEEP_DIR/comparison or comparison"
    )
    parser.add_argument("--split", default="held_out", choices=("held_out", "tuning"), help="predictions to test")
    parser.add_argument(
        "--reference", type=Path, help="run that the others are tested against; default: the best on tuning"
    )
    parser.add_argument("--n-bootstrap", type=int, help="draws of subjects; default: as many as the tests need")
    chosen = parser.parse_args(arguments)
    output = chosen.output or (chosen.runs[0] / "comparison" if len(chosen.runs) == 1 else Path("comparison"))
    try:
        compare(chosen.runs, output, split=chosen.split, reference=chosen.reference, n_bootstrap=chosen.n_bootstrap)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
