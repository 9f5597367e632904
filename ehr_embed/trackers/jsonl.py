"""The default tracker: record a run in two files of its folder, without an account or a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import append_line, atomic_path, write_json
from ehr_embed.run_folder.layout import HISTORY, SUMMARY
from ehr_embed.trackers.protocol import Scalar, json_ready, state_of

if TYPE_CHECKING:
    import pandas as pd


class JsonlTracker:
    """Tracker that writes `metrics.jsonl`, one line per epoch, and at the end `summary.json`: state, tags, digest, values.

    Args:
        run_dir: the run's folder.
        config: ignored, since the experiment writes it to `config.yaml`.
        tags: the chosen config groups, as `group=option`.
        table_digest: digest of the embedding table that the run read.
        table_path: ignored, since the digest identifies the table.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        config: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        table_digest: str | None = None,
        table_path: Path | None = None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._history = self._run_dir / HISTORY
        self._tags = list(tags)
        self._table_digest = table_digest
        self._summary: dict[str, Any] = {}
        self._has_logged = False

    def __enter__(self) -> Self:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        facts = {"state": state_of(exc_type), "tags": self._tags, "table_digest": self._table_digest}
        try:
            write_json(self._run_dir / SUMMARY, facts | {"values": self._summary})
        except UserError:
            if exc is None:  # the run's own error, such as a full disk, must not be hidden by a second one
                raise

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append one line to `metrics.jsonl`; the first call removes the lines of later epochs that an earlier start wrote."""
        if not self._has_logged:
            self._forget_from(step)
            self._has_logged = True
        append_line(self._history, json.dumps({"epoch": step} | json_ready(metrics), allow_nan=False))

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        """Add values to those that `summary.json` will hold."""
        self._summary |= json_ready(values)

    def add_plots(self, paths: Sequence[Path]) -> None:
        """Do nothing: the plots are in the run's folder already."""

    def add_examples(self, make: Callable[[], pd.DataFrame]) -> None:
        """Do nothing: the event store and predictions/ hold the same records and predictions."""

    def _forget_from(self, epoch: int) -> None:
        """Remove the lines from `epoch` on that an earlier start of the run wrote: the resumed run writes them again."""
        if not self._history.exists():
            return
        with atomic_path(self._history) as temporary:
            kept = [line for line in self._history.read_text("utf-8").splitlines() if _epoch(line) < epoch]
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _epoch(line: str) -> float:
    """Return the epoch of a line; infinity for a line that a killed run left half-written."""
    try:
        return float(json.loads(line)["epoch"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
