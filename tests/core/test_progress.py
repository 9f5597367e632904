"""Without a terminal, long work logs a line per minute with the time that is left; short work logs nothing."""

from __future__ import annotations

import logging
import re
import time

import pytest

from ehr_embed.core import progress
from ehr_embed.core.progress import ProgressBar


def test_a_line_per_interval_says_how_much_is_left(monkeypatch, caplog, capsys):
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    with caplog.at_level(logging.INFO):
        for _ in ProgressBar(range(20), desc="epoch 3", unit="batch"):
            time.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 12, "one per interval, not one per batch"
    assert re.fullmatch(r"epoch 3: \d+ of 20 batches \(\d+ %\) in 00:00, about 00:00 left", lines[0])
    assert capsys.readouterr() == ("", "")


def test_updates_count_too(monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    with caplog.at_level(logging.INFO), ProgressBar(total=10, desc="embedding texts", unit="text") as bar:
        for _ in range(5):
            time.sleep(0.01)
            bar.update(2)
    assert any(record.getMessage().startswith("embedding texts: ") for record in caplog.records)
    assert not bar.is_bar


@pytest.mark.parametrize("is_shown", [True, False])
def test_short_or_hidden_work_is_silent(caplog, capsys, is_shown, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 60.0 if is_shown else 0.0)
    with caplog.at_level(logging.INFO):
        assert list(ProgressBar(range(3), desc="import", unit="file", is_shown=is_shown)) == [0, 1, 2]
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")
