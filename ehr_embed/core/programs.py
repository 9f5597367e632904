"""Say where the configuration that comes with the package lies, and what a user types to start a command."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = "ehr-embed"
HOME = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"\bpython (?:(train|embed)\.py|-m ehr_embed\.([a-z]+))\b")
_typed: list[str] = []
"""The words before the arguments, where the console script started this process."""
PLAIN_VALUE = re.compile(r"[\w./-]+")
"""A value that neither Hydra nor a shell reads as anything but text."""


def shipped(name: str) -> Path:
    """Return a folder that comes with the package: inside it where it was installed from a wheel, beside it in a checkout.

    >>> (shipped("conf") / "train.yaml").is_file(), (shipped("sweeps") / "pipelines.yaml").is_file()
    (True, True)
    """
    return HOME / name if (HOME / name).is_dir() else HOME.parent / name


@contextmanager
def started_as(name: str) -> Iterator[None]:
    """While inside, messages name commands as the console script takes them, which has started the command `name`."""
    _typed[:] = [PROGRAM, name]
    try:
        yield
    finally:
        _typed.clear()


def command(name: str) -> str:
    """Return what starts a command: the words in which the user started this one, as far as they fit.

    >>> command("generate")
    'python -m ehr_embed.generate'
    >>> with started_as("predict"):
    ...     command("train")
    'ehr-embed train'
    """
    if _typed:
        return f"{PROGRAM} {name}"
    if name not in ("train", "embed"):
        return f"python -m ehr_embed.{name}"
    is_checkout = shipped("conf").parent != HOME
    return f"python {name}.py" if is_checkout else f"{PROGRAM} {name}"


def as_typed(text: str) -> str:
    """Return a text with its commands, which are written as a checkout has them, as they are typed here.

    >>> as_typed("Type: python train.py data=meds")
    'Type: python train.py data=meds'
    >>> with started_as("train"):
    ...     as_typed("Type: python embed.py overwrite=true or python -m ehr_embed.predict run=RUN")
    'Type: ehr-embed embed overwrite=true or ehr-embed predict run=RUN'
    """
    return COMMAND.sub(lambda found: command(found[1] or found[2]), text)


def quoted_override(key: str, value: object) -> str:
    """Return `key=value`, quoted for Hydra and for a shell where the value has characters that they would read.

    >>> print(quoted_override("run", "runs/a"), quoted_override("run", "multirun/a=1,b=2"))
    run=runs/a "run='multirun/a=1,b=2'"
    """
    if PLAIN_VALUE.fullmatch(str(value)):
        return f"{key}={value}"
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", str(value))
    quoted = f"{key}='{escaped}'"
    return shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'


def command_line() -> str:
    """Return the command line that started this process, quoted for a shell."""
    return shlex.join([*(_typed or sys.argv[:1]), *sys.argv[1:]])
