"""Weights & Biases beside the JSONL files. A run never waits for a prompt and never dies for want of a network."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Literal, Self

import pandas as pd
import wandb

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import atomic_path
from ehr_embed.core.secrets import MASK, is_secret, masked
from ehr_embed.run_folder.layout import WANDB_ID
from ehr_embed.trackers.jsonl import JsonlTracker
from ehr_embed.trackers.protocol import Scalar, json_ready, state_of

log = logging.getLogger(__name__)
Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 30.0
"""In the run's folder: which W&B run a later start in it goes on with."""
MAX_TAG_LENGTH = 64  # W&B refuses longer ones


class WandbTracker:
    """Sends config, history, summary and plots to W&B, and writes the files of `JsonlTracker`.

    Paths in the config leave as their last part and secrets not at all; neither code, git state, console output nor the
    machine's description is sent, and no record, code or text of one unless `log_examples` asks for it. Without a network the run
    is kept in `<run_dir>/wandb` for `wandb sync`.

    Args:
        run_dir: the run's folder.
        config: plain values; shown as the run's config, with `table_digest` added.
        tags: the chosen config groups, `group=option`.
        name: the run's name; None lets W&B choose.
        run_id: the run's id, unique in the project; None lets W&B choose. In a folder with a run that was stopped, its id.
        project: the W&B project.
        entity: user or team; None = the account's default.
        group: runs shown together, such as a search's name.
        job_type: what the run is, such as train.
        mode: online, offline, disabled, or auto: `WANDB_MODE` if set, else online with a key and offline without.
        table_digest: of the embedding table the run read.
        log_table: also store the embedding table as an artifact.
        table_path: the table's file.
        log_examples: also send a table of held-out records, in text, with their predictions.

    Raises:
        UserError: an unknown mode; `log_table` without `table_path`; on entering, mode=online without a key.
    """

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
        mode: str = "auto",
        table_digest: str | None = None,
        log_table: bool = False,
        table_path: Path | None = None,
        log_examples: bool = False,
    ) -> None:
        if mode not in ("auto", *MODES):
            raise unknown_name("tracker mode", mode, ("auto", *MODES), "Type: tracker=wandb tracker.mode=auto")
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

    def __enter__(self) -> Self:
        self._jsonl.__enter__()
        self._run = self._start()
        # Epochs, not W&B's own counter, are the x axis of every chart.
        self._run.define_metric("*", step_metric="epoch")
        if self._table_path is not None:
            table = wandb.Artifact("embedding_table", type="embeddings", metadata={"digest": self._table_digest})
            # A table may be many gigabytes: neither staged nor cached a second time.
            table.add_file(str(self._table_path), policy="immutable", skip_cache=True)
            self._run.log_artifact(table)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._jsonl.__exit__(exc_type, exc, traceback)
        state = state_of(exc_type)
        self._run.summary["state"] = state
        if state in ("pruned", "failed"):  # a tag would stay on a run that goes on
            self._run.tags = (*(self._run.tags or ()), state)
        self._run.finish(exit_code=int(state == "failed"))

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._jsonl.log(metrics, step=step)
        # With a step W&B would hold the row back until the next one.
        self._run.log({"epoch": step, **json_ready(metrics)}, step=step, commit=True)

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        self._jsonl.summarise(values)
        self._run.summary.update(json_ready(values))

    def add_plots(self, paths: Sequence[Path]) -> None:
        self._jsonl.add_plots(paths)
        if paths:
            self._run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in paths})

    def add_examples(self, make: Callable[[], pd.DataFrame]) -> None:
        if self._log_examples:
            self.add_table("examples", make())

    def add_table(self, name: str, table: pd.DataFrame) -> None:
        """A table of this run, such as the trials of a search; paths in it are cut as in the config."""
        table = table.astype(object).where(table.notna(), None)
        # A column's name is the key by which a secret is known.
        table = table.apply(lambda column: [without_private({column.name: value})[column.name] for value in column])
        self._run.log({name: wandb.Table(dataframe=table)})

    def _start(self) -> wandb.Run:
        """Online, else offline, else disabled; each step down is one warning."""
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
            # Offline there is nothing to ask: `wandb sync --append` joins the parts.
            arguments["resume"] = "allow" if mode == "online" else None
        run = wandb.init(**arguments, mode=mode, dir=str(self._run_dir), reinit="finish_previous", settings=_settings())
        if mode != "disabled":
            with atomic_path(path) as temporary:
                temporary.write_text(f"{run.id}\n", encoding="utf-8")
        if mode == "online":
            log.info("W&B: %s", run.url)
        return run


def without_private(value: Any) -> Any:
    """A copy in which paths are cut to their last part (folder names can tell user, site or patient) and secrets are masked.

    Paths are what is absolute, begins with a dot, or is there; a model's name with a slash stays. Secrets are the values of keys
    such as `token` and `api_key`, and what stands before the @ of a URL.

    >>> without_private({"root": "/home/ann/mimic", "files": ["~/a.csv", "../ward_7/b.csv"], "model": "org/name"})
    {'root': 'mimic', 'files': ['a.csv', 'b.csv'], 'model': 'org/name'}
    >>> without_private({"hf_token": "hf_1", "batch_tokens": 4096, "storage": "postgresql://ann:pw@db/x"})
    {'hf_token': '***', 'batch_tokens': 4096, 'storage': 'postgresql://***@db/x'}
    >>> without_private("sqlite:////home/ann/study.db")
    'sqlite:study.db'
    """
    if isinstance(value, Mapping):
        return {
            key: MASK if item is not None and is_secret(str(key)) else without_private(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_private(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    if value.startswith(("sqlite:", "file:")):
        return masked(f"{value.split(':')[0]}:{PurePosixPath(value).name}")
    if "://" in value:
        return masked(re.sub(r"(://)[^/@]*@", rf"\1{MASK}@", masked(value)))
    if value.startswith(("/", "~", "./", "../")) or PureWindowsPath(value).is_absolute() or _is_there(value):
        return PureWindowsPath(value).name if "\\" in value else PurePosixPath(value).name
    return masked(value)


def _is_there(value: str) -> bool:
    try:
        return "/" in value and Path(value).exists()
    except (OSError, ValueError):  # too long, or with a null byte: no path
        return False


def _has_key() -> bool:
    """Whether W&B finds a key in the environment, its settings or netrc; never asks, sends nothing."""
    try:
        return wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"the W&B API key is not usable: {_first_line(error)}. "
            "Type: wandb login --relogin, or tracker.mode=offline to do without"
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
        # No host or user name, hardware, command line, package list or load curves.
        host="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
