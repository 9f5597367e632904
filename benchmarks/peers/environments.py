"""Give each peer a Python environment of its own, with the torch of this process, and run its script there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

DONE = "installed.json"
"""Written last into an environment: what was installed. Without it an environment is made again."""


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
    """pip could not install a peer; the text is the last line that pip said."""


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
    done = home / DONE
    if done.exists() and json.loads(done.read_text()) == list(peer.requirements):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    share_torch(home)
    held = home / "constraints.txt"
    held.write_text(f"torch=={metadata.version('torch')}\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(held), *peer.requirements]
    tried = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if tried.returncode:
        raise CannotInstallError((tried.stderr.strip() or "pip said nothing").splitlines()[-1])
    done.write_text(json.dumps(list(peer.requirements)))
    return python


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
        RuntimeError: the script failed; the text ends with what it wrote to its standard error.
    """
    command = [str(python), str(Path(__file__).parent / peer.script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{peer.name} failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
