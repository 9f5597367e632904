"""Imports and the end of a command without rounds of Python's collector."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from ehr_embed.core.loading import loading


def test_the_collector_goes_on_after_the_imports():
    """It goes on after a failed import too, and stays off where a caller had it off."""
    with loading():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with loading():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_stands_to_be_closed_at_the_end_of_a_command_is_closed(tmp_path):
    """No last round of the collector: what libraries registered is called, and open files are written."""
    code = (
        "import atexit; from pathlib import Path; from ehr_embed.core.loading import end_without_collection\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "end_without_collection()\n"
        "atexit.register((folder / 'registered').write_text, 'called')\n"
        "still_open = open(folder / 'open', 'w'); still_open.write('written')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "registered").read_text() == "called"
    assert (tmp_path / "open").read_text() == "written"
