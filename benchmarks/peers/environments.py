"""Give each peer a Python environment of its own, with the torch of this process, and run its script there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

DONE = "installed.json"
"""Written last into an environment: what was installed, and beside what. Without it an environment is made again."""
PLACE = re.compile(r"https?://\S+|(?<=host=)'[^']*'")
"""A package index, in the words of pip."""


@dataclass(frozen=True)
class Peer:
    """A package to compare with.

    Attributes:
        name: what reports call the peer, and its environment's folder.
        script: a file beside this one, run with the environment's Python; it prints one JSON line.
        requirements: what pip installs, in the words of a requirements file.
    """

    name: str
    script: str
    requirements: tuple[str, ...]


class CannotInstallError(Exception):
    """pip could not install a peer; the text is the last error that pip told."""


def python_of(peer: Peer, folder: Path) -> Path:
    """Return the Python of a peer's environment, which is made and filled by pip if it is missing.

    The environment finds torch where this process found it, and pip installs no other: both sides of a ratio compute with the same
    kernels, and gigabytes need not be downloaded.

    Args:
        peer: what to install.
        folder: where the environments are kept.

    Raises:
        CannotInstallError: pip could not install it.
    """
    home = folder / peer.name
    python = home / "bin" / "python"
    done, torch = home / DONE, metadata.distribution("torch")
    held_now = [torch.version, sys.version, str(torch.locate_file("")), *peer.requirements]
    if done.exists() and json.loads(done.read_text()) == held_now:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    share_torch(home)
    held = home / "constraints.txt"
    held.write_text(f"torch=={torch.version}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--constraint", str(held), *peer.requirements]
    tried = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if tried.returncode:
        raise CannotInstallError(last_error(tried.stderr))
    done.write_text(json.dumps(held_now))
    return python


def last_error(said: str) -> str:
    """Return the last error that pip told, without the address of a package index, which may be a private one.

    >>> last_error("ERROR: none at https://name:word@host/simple\\nNote: upgrade pip")
    'ERROR: none at (address)'
    >>> last_error("")
    'pip told no error'
    """
    errors = [line for line in said.splitlines() if line.lstrip().lower().startswith("error")]
    return PLACE.sub("(address)", errors[-1].strip() if errors else "pip told no error")


def share_torch(home: Path) -> None:
    """Let the environment at `home` import this process's torch, and no other of its packages."""
    found = metadata.distribution("torch")
    site = Path(str(found.locate_file("")))
    shared = home / "shared"
    shared.mkdir()
    tops = {Path(str(file)).parts[0] for file in found.files or []}
    for name in sorted(tops - {"..", "bin"}):
        (shared / name).symlink_to(site / name)
    (own,) = (home / "lib").glob("python*/site-packages")
    (own / "shared_torch.pth").write_text(f"{shared}\n")


def environment() -> dict[str, str]:
    """Return this process's environment variables without those that lead Python to packages, and without a model hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(peer: Peer, python: Path, *arguments: str | Path) -> dict[str, Any]:
    """Return the JSON line that the peer's script prints last.

    Raises:
        RuntimeError: the script failed or printed no such line; the text ends with what it wrote to its standard error.
    """
    command = [str(python), str(Path(__file__).parent / peer.script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    try:
        done.check_returncode()
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.CalledProcessError, IndexError, json.JSONDecodeError) as error:
        raise RuntimeError(
            f"{peer.name} failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}"
        ) from error
    return found
