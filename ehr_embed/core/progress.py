"""Show how far long work has come: a bar on a terminal, elsewhere a line per minute with the time that is left."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)
EVERY_S = 60.0
"""Seconds between two lines where there is no terminal, such as in the log of Slurm; work that ends sooner has no line."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit} ({percentage:.0f} %) in {elapsed}, about {remaining} left"


class ProgressBar(tqdm):
    """A progress bar of tqdm on a terminal; elsewhere its state is logged once per minute, as a line of its own.

    Args:
        iterable: what is gone through; None = `update` is called.
        desc: what is done, such as `epoch 3`.
        unit: what is counted, in the singular.
        is_shown: whether anything is shown, for work that several processes share.
        options: options of tqdm, such as `total`.

    Attributes:
        is_bar: whether there is a bar, whose postfix somebody sees.
    """

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, desc: str, unit: str, is_shown: bool = True, **options: Any
    ) -> None:
        self.is_bar = is_shown and sys.stderr.isatty()
        if not self.is_bar:
            options |= {"file": _Log(), "bar_format": LINE, "leave": False, "ncols": 200}
            options |= {"mininterval": EVERY_S, "maxinterval": EVERY_S, "delay": EVERY_S}
            unit += "es" if unit.endswith("ch") else "s"
        super().__init__(iterable, desc=desc, unit=unit, disable=not is_shown, **options)


class _Log(io.StringIO):
    """A file whose lines are logged, without the characters by which a bar overwrites itself."""

    def write(self, text: str) -> int:
        """Log a text that is not blank."""
        if line := text.strip("\r\n \x1b[A"):
            log.info("%s", line)
        return len(text)
