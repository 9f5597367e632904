"""The wheel of this checkout, and programs that run without seeing the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.small_meds import ROOT

SOURCES = ("ehr_embed", "conf", "sweeps", "docs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
           "CHANGELOG.md", "constraints.txt", "Makefile", "train.py", "embed.py")  # fmt: skip


def call(
    *words: str | Path, cwd: Path, code: int = 0, timeout: float = 600, variables: Mapping[str, str] | None = None
) -> str:
    """Run a program that does not see the checkout, with more environment variables, and return its output."""
    hidden = ("PYTHONPATH", "EHR_EMBED_CACHE", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | dict(variables or {})
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a `wheel` or an `sdist` of a source folder as pip does, with this environment's setuptools."""
    code = f"from setuptools import build_meta; print('built', build_meta.build_{kind}({str(target)!r}))"
    return target / call(sys.executable, "-c", code, cwd=source).split("built ")[1].split()[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("dist"))
