"""Run an entry point so that a user's mistake ends in one message and exit code 2, never in a library's traceback."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ehr_embed.core.collector import collect_rarely
from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import cannot_write, write_failure
from ehr_embed.core.pipes import reader_may_leave
from ehr_embed.core.programs import command, quoted_override, shipped
from ehr_embed.core.secrets import masked
from ehr_embed.core.stopping import REQUEUE, Stopped
from ehr_embed.experiment.searched import SearchedRuns
from ehr_embed.experiment.usage import SELF_DESCRIBED, usage
from ehr_embed.search.plugin import register

CONF = shipped("conf")
PACKAGE = "ehr_embed"
EXTRAS = {f"hydra/launcher/{name}": "launchers" for name in ("joblib", "submitit_local", "submitit_slurm")}
"""Extra of the package that brings an option of Hydra."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@reader_may_leave()
def run_main(main: Callable[[], Any], config_name: str) -> None:
    """Run a Hydra application; set HYDRA_FULL_ERROR=1 to see tracebacks."""
    if config_name in SELF_DESCRIBED and {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(config_name))
        return
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and the wording is ours
    collect_rarely()
    register(SearchedRuns())
    # pandas and scikit-survival load numexpr, which logs the number of cores.
    logging.getLogger("numexpr").setLevel(logging.WARNING)
    # Hydra would write "Error executing job with overrides", and all of them, above a message of one line.
    JobReturn.return_value = property(_value_or_raise, JobReturn.return_value.fset)  # type: ignore[method-assign,assignment,attr-defined]
    try:
        refuse_repeated(sys.argv[1:])
        refuse_separated(sys.argv[1:], config_name)
        main()
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(REQUEUE)
    except KeyboardInterrupt:
        print("interrupted; what was finished before is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        print(f"error: {masked(explain(error, config_name, sys.argv[1:]))}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # submitit raises no type of its own
        if wants_traceback or 'Could not detect "srun"' not in str(error):
            raise
        print(
            "error: hydra/launcher=submitit_slurm: there is no Slurm on this machine (srun was not found). Run it on a login "
            "node, or hydra/launcher=submitit_local for processes on this machine",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:  # a library's own file; errors of files that this package writes are `UserError`s already
        if wants_traceback or write_failure(error) is None:
            raise
        print(f"error: {cannot_write(error.filename or 'a file', error, is_whole=False)}", file=sys.stderr)
        sys.exit(2)


def _value_or_raise(job: JobReturn) -> Any:
    """Return the value of a job of Hydra, or raise its error."""
    assert job.status != JobStatus.UNKNOWN, "the job has not ended"
    if job.status == JobStatus.COMPLETED:
        return job._return_value
    raise job._return_value


def refuse_repeated(arguments: list[str]) -> None:
    """Refuse a key or group that the command line gives two values: Hydra would take the last in silence.

    Raises:
        UserError: names the key and both values.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if not equals or argument.startswith(("-", "~")):
            continue
        if values.setdefault(key, value) != value:
            raise UserError(
                f"{key} is given twice, as {key}={values[key]} and {key}={value}: only one of them can be meant. Leave one out; to "
                f"run both, one after the other, type: -m {key}={values[key]},{value}"
            )


def refuse_separated(arguments: list[str], config_name: str) -> None:
    """Refuse overrides that an option such as `--config-dir` separates: argparse would answer with its usage alone.

    Raises:
        UserError: names the option and gives the command in the order that is read.
    """
    known, unread = get_args_parser().parse_known_args(arguments)
    is_unknown_option = any(argument.startswith("-") for argument in unread)  # of which argparse itself tells
    if not unread or not known.overrides or is_unknown_option:
        return
    overrides = [*known.overrides, *unread]
    options = [argument for argument in arguments if argument not in overrides]
    raise UserError(
        f"{unread[0]} stands after {shlex.join(options)}, and {known.overrides[0]} before it: overrides must stand together, with "
        f"options before them. Type: {command(config_name)} {shlex.join([*options, *overrides])}"
    )


def explain(error: Exception, config_name: str, arguments: list[str]) -> str:
    """Return the message for a user: an error of this package as it is, and one of Hydra with the valid names."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException) and (quoted := _quoted(error.override)):
        return (
            f"{error.override}: brackets, braces, commas, = and some other signs have a meaning in a value, unless the value is "
            f"quoted, inside the quotes of the shell. Type: {quoted}"
        )
    if several := re.search(r"Ambiguous value for argument '(.*?=.*?)' ?\n", str(error), flags=re.DOTALL):
        return _several(several.group(1), config_name)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if extra := EXTRAS.get(error.missing_cfg_file):
            return f"{group}={name} needs a package that is not installed. Type: pip install '{PACKAGE}[{extra}]'"
        return str(unknown_name(f"option of {group}", name, error.options, f"Type: {group}=NAME"))
    if there := re.search(r"Could not append to config\. An item is already at '([\w./@]+)'", str(error)):
        key = there.group(1)
        return f"could not add {key!r}: {key!r} is there already, and + adds what is not. Type: {key}=VALUE"
    if gone := re.search(r"Could not delete from config\. '([\w./@]+)' does not exist", str(error)):
        return _unknown_key(gone.group(1), config_name, [a for a in arguments if not a.startswith("~")])
    found = re.search(r"Could not (?:override|append to config\.) '?([\w./@]+)'?", str(error))
    if isinstance(error, ConfigCompositionException) and found:
        key = found.group(1)
        own = [a for a in arguments if a.lstrip("+~").startswith(key)]
        return _unknown_key(key, config_name, [a for a in arguments if a not in own], own)
    if isinstance(error, OmegaConfBaseException) and (key := getattr(error, "full_key", None)):
        told = f"{key}: {str(error).splitlines()[0]}. Type: {command(config_name)} --cfg job   to see all keys."
    else:
        told = f"{' '.join(str(error).split())} (HYDRA_FULL_ERROR=1 shows where)"
    return told


def _quoted(override: str) -> str | None:
    """Return `KEY=VALUE` with the value quoted for Hydra and for the shell; None where that does not make it readable.

    >>> print(_quoted("data.root=a[1]"), _quoted("n layers=[1"))
    "data.root='a[1]'" None
    """
    key, _, value = override.partition("=")
    quoted = quoted_override(key, value)
    try:
        OverridesParser.create().parse_override(shlex.split(quoted)[0])
    except HydraException:
        return None
    return quoted


def _several(override: str, config_name: str) -> str:
    """Return the message for `KEY=A,B` without -m: one run takes one value."""
    key, _, value = override.partition("=")
    told = f"{override} gives several values, and one run takes one. For one run per value, type: "
    told += f"{command(config_name)} -m {override}"
    if (CONF / key.lstrip("+")).is_dir():
        return told
    return f"{told}   If it is one value with a comma in it: {_quoted(override)}   For a list: '{key}=[{value}]'"


def _unknown_key(key: str, config_name: str, others: list[str], typed: Sequence[str] = ()) -> str:
    """Return the message for an unknown key, with the valid keys beside it under the other overrides.

    Args:
        key: the key.
        config_name: the configuration.
        others: the overrides of other keys.
        typed: those of this key.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            simple = [a for a in others if "=" in a and not a.startswith(("-", "hydra")) and "," not in a]
            if own := get_args_parser().parse_known_args(others)[0].config_dir:
                simple.append(f"hydra.searchpath=['file://{Path(own).absolute()}']")
            cfg = compose(config_name, overrides=simple)
    except (HydraException, OmegaConfBaseException):
        return f"could not override {key!r}: no such key. Type: {command(config_name)} --cfg job   to see all keys."
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig):
        return str(unknown_name("key", key, cfg.keys(), f"Type: {command(config_name)} --cfg job   to see all keys."))
    valid = [str(k) for k in node if k != "_target_"]
    if name in valid and isinstance(node[name], DictConfig) and len(typed) == 1:
        # The key is there; what it lacks is the name that the value would add.
        held, added = ", ".join(map(str, node[name])), shlex.quote(f"+{typed[0]}")
        return (
            f"{key} holds {held} already; type + to add to a mapping. To have both, type: {added}   "
            f"To have the new one alone: '~{key}' {added}"
        )
    kind = f"key of {parent}" if parent else "key or group"
    return str(unknown_name(kind, name, valid, f"Type: {command(config_name)} --cfg job   to see all keys."))
