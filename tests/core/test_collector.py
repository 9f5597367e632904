"""Python's collector in the process of a command."""

from __future__ import annotations

import subprocess
import sys


def test_commands_load_with_few_rounds_and_runs_set_them_back():
    """The threshold is set before a command is found, and a run sets it back, so that an earlier run's model does not stay."""
    code = (
        "import gc, sys; usual = gc.get_threshold(); from ehr_embed.console.main import main\n"
        "sys.argv = ['ehr-embed', '--help']; main()\n"
        "assert gc.get_threshold()[0] == 100_000 > usual[0]\n"
        "from ehr_embed.experiment.stage import run_stage\n"
        "try: run_stage(None, None, init_from=None, trial=None)\n"
        "except AttributeError: pass\n"
        "assert gc.get_threshold() == usual\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
