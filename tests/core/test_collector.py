"""Python's collector in the process of a command."""

from __future__ import annotations

import subprocess
import sys


def test_what_stands_to_be_closed_at_the_end_of_a_command_is_closed(tmp_path):
    """No last round of the collector: what libraries registered is called, and open files are written."""
    code = (
        "import atexit, gc; from pathlib import Path; from ehr_embed.core.collector import collect_rarely\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "collect_rarely()\n"
        "assert gc.isenabled()\n"
        "atexit.register((folder / 'registered').write_text, 'called')\n"
        "still_open = open(folder / 'open', 'w'); still_open.write('written')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "registered").read_text() == "called"
    assert (tmp_path / "open").read_text() == "written"
