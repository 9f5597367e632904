"""Weights & Biases in addition to the JSONL files. A run never waits for a prompt and never fails for lack of a network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import pandas as pd
import wandb

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.secrets import without_private
from ehr_embed.core.settings import OneOf, Told, checked
from ehr_embed.run_folder.layout import WANDB_ID
from ehr_embed.trackers.jsonl import JsonlTracker
from ehr_embed.trackers.protocol import MakesReport, Scalar, json_ready, state_of

log = logging.getLogger(__name__)
Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 30.0
"""Seconds to wait for the W&B server when a run starts, before the run goes on offline."""
MAX_TAG_LENGTH = 64  # W&B refuses longer ones


class WandbTracker:
    """Tracker that sends config, history, summary and plots to W&B, and writes the files of `JsonlTracker`.

    Paths in the config are cut to their last part, and secrets are masked. Source code, git state, console output and the
    description of the machine are not sent. Patient records, their codes and their texts are sent only if `log_examples` is
    set. Without a network the run is kept in `<run_dir>/wandb` for `wandb sync`.

    Args:
        run_dir: the run's folder.
        config: the resolved configuration as plain values; W&B shows it with `table_digest` added.
        tags: the chosen config groups, as `group=option`.
        name: name of the run; None lets W&B choose.
        run_id: id of the run, unique in the project; None lets W&B choose. A run that is resumed keeps the id in its folder.
        project: W&B project.
        entity: user or team; None = the account's default.
        group: name under which W&B shows several runs together, such as the name of a search.
        job_type: kind of run, such as train.
        mode: online, offline, disabled, or auto: `WANDB_MODE` if set, else online with an API key and offline without.
        table_digest: digest of the embedding table that the run read.
        log_table: also store the embedding table as an artifact.
        table_path: file of the embedding table.
        log_examples: also send a table of held-out records with their texts and predictions.

    Raises:
        UserError: the mode is unknown, `log_table` is set without `table_path`, or, on entering, mode=online without an API key.
    """

    @checked("tracker")
    def __init__(
        self,
        *,
        run_dir: Path,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
        name: str | None = None,
        run_id: str | None = None,
        project: str = "ehr_embed",
        entity: str | None = None,
        group: str | None = None,
        job_type: str = "train",
        mode: Annotated[str, OneOf("auto", *MODES), Told(example="auto")] = "auto",
        table_digest: str | None = None,
        log_table: bool = False,
        table_path: Path | None = None,
        log_examples: bool = False,
    ) -> None:
        if log_table and table_path is None:
            raise UserError("log_table=true needs the table's file, but table_path is empty. Type: log_table=false")
        self._jsonl = JsonlTracker(run_dir=run_dir, tags=tags, table_digest=table_digest)
        self._mode = mode
        self._table_digest = table_digest
        self._table_path = table_path if log_table else None
        self._log_examples = log_examples
        self._run_dir = Path(run_dir)
        self._init_arguments: dict[str, Any] = {
            "config": {**without_private(config), "table_digest": table_digest},
            "tags": [tag[:MAX_TAG_LENGTH] for tag in tags],
            "name": name,
            "id": run_id,
            "project": project,
            "entity": entity,
            "group": group,
            "job_type": job_type,
        }
        self._run: wandb.Run

    def check(self) -> None:
        """Refuse mode=online without an API key.

        Raises:
            UserError: there is no key.
        """
        if self._mode == "online" or (self._mode == "auto" and os.environ.get("WANDB_MODE") == "online"):
            self._wanted_mode()

    def __enter__(self) -> Self:
        self._jsonl.__enter__()
        self._run = self._start()
        # Every chart has the epoch on its x axis instead of W&B's own step counter.
        self._run.define_metric("*", step_metric="epoch")
        if self._table_path is not None:
            table = wandb.Artifact("embedding_table", type="embeddings", metadata={"digest": self._table_digest})
            # A table may be many gigabytes, so W&B must not copy it into its staging area or its cache.
            table.add_file(str(self._table_path), policy="immutable", skip_cache=True)
            self._run.log_artifact(table)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._jsonl.__exit__(exc_type, exc, traceback)
        state = state_of(exc_type)
        self._run.summary["state"] = state
        if state in ("pruned", "failed"):  # a stopped run gets no tag, which would stay when the run is resumed
            self._run.tags = (*(self._run.tags or ()), state)
        self._run.finish(exit_code=int(state == "failed"))

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record the metrics of one epoch in W&B and in `metrics.jsonl`."""
        self._jsonl.log(metrics, step=step)
        # Without commit=True, W&B would hold a row with a step back until the next row.
        self._run.log({"epoch": step, **json_ready(metrics)}, step=step, commit=True)

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        """Set values of the run's summary in W&B and in `summary.json`."""
        self._jsonl.summarise(values)
        self._run.summary.update(json_ready(values))

    def add_plots(self, paths: Sequence[Path]) -> None:
        """Send PNG files as images under `plots/`."""
        self._jsonl.add_plots(paths)
        if paths:
            self._run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in paths})

    def add_examples(self, make: Callable[[], pd.DataFrame]) -> None:
        """Send the table of example records if `log_examples` is set; the table contains patient text."""
        if self._log_examples:
            self.add_table("examples", make())

    def add_report(self, make: MakesReport) -> None:
        """Send the report as a page; codes and texts of the data are on it only if `log_examples` is set."""
        name = "report/search" if self._init_arguments["job_type"] == "search" else "report/run"
        self._run.log({name: wandb.Html(make(has_codes=self._log_examples), inject=False)})

    def add_table(self, name: str, table: pd.DataFrame) -> None:
        """Send a table, such as the trials of a search; paths and secrets are treated as in the config."""
        table = table.astype(object).where(table.notna(), None)
        # Secrets are recognised by their key, here the name of the column.
        table = table.apply(lambda column: [without_private({column.name: value})[column.name] for value in column])
        self._run.log({f"tables/{name}": wandb.Table(dataframe=table)})

    def _start(self) -> wandb.Run:
        """Start the W&B run online, else offline, else disabled; each step down logs one warning."""
        mode: Mode = self._wanted_mode()
        if mode == "online":
            try:
                return self._init("online")
            except (wandb.Error, OSError, TimeoutError) as error:
                self._warn_offline(f"W&B cannot be reached ({_first_line(error)})")
                mode = "offline"
        if mode == "offline":
            try:
                return self._init("offline")
            except (wandb.Error, OSError) as error:
                log.warning(
                    "W&B cannot write its files under %s (%s): this run is recorded in metrics.jsonl alone",
                    self._run_dir,
                    _first_line(error),
                )
        return self._init("disabled")

    def _wanted_mode(self) -> Mode:
        wanted = os.environ.get("WANDB_MODE", "") if self._mode == "auto" else self._mode
        for mode in MODES:
            if mode == wanted and mode != "online":
                return mode
        if _has_key():
            return "online"
        if wanted == "online":
            raise UserError(
                "mode=online needs a W&B API key and none was found; W&B would stop the run to ask for one. "
                "Type: wandb login, or tracker.mode=auto to keep the run offline"
            )
        self._warn_offline("no W&B API key was found (wandb login)")
        return "offline"

    def _warn_offline(self, reason: str) -> None:
        folder = self._run_dir / "wandb"
        log.warning("%s: this run is recorded offline; to upload it, type: wandb sync %s/offline-run-*", reason, folder)

    def _init(self, mode: Mode) -> wandb.Run:
        path = self._run_dir / WANDB_ID
        arguments = dict(self._init_arguments)
        if path.exists():
            arguments["id"] = path.read_text(encoding="utf-8").strip()
            # Offline runs cannot be resumed; `wandb sync --append` joins their parts.
            arguments["resume"] = "allow" if mode == "online" else None
        run = wandb.init(**arguments, mode=mode, dir=str(self._run_dir), reinit="finish_previous", settings=_settings())
        if mode != "disabled":
            with atomic_path(path) as temporary:
                temporary.write_text(f"{run.id}\n", encoding="utf-8")
        if mode == "online":
            log.info("W&B: %s", run.url)
        return run


def _has_key() -> bool:
    """Return whether W&B finds an API key in the environment, its settings or netrc, without a prompt or a request."""
    try:
        return wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"the W&B API key is not usable: {_first_line(error)}. "
            "Type: wandb login --relogin, or tracker.mode=offline to run without a key"
        ) from error


def _settings() -> wandb.Settings:
    return wandb.Settings(
        init_timeout=INIT_TIMEOUT_S,
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        # Do not send the host or user name, hardware, command line, package list or load curves.
        host="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
