"""`ehr-embed new NAME`: a project is written whole under its own name, or refused before anything is written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ehr_embed.console.new import PLACEHOLDER, TEMPLATE, main, new_project
from ehr_embed.core.errors import UserError
from tests.helpers.small_meds import ROOT


def test_a_project_bears_its_name_everywhere(tmp_path):
    project = new_project("frailty", tmp_path)
    files = [path for path in project.rglob("*") if path.is_file()]
    made_from = [path for path in TEMPLATE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) == len(made_from)
    assert [path for path in files if PLACEHOLDER in str(path.relative_to(tmp_path)) + path.read_text()] == []
    assert (project / "frailty" / "model.py").is_file()
    assert (project / ".gitignore").is_file()
    assert list(tmp_path.iterdir()) == [project], "nothing else is left"


@pytest.mark.parametrize(
    ("name", "reason"), [("my-project", "name of a Python package"), ("class", "name of a Python package"),
                         ("torch", "installed package"), ("taken", "exists already")],
)  # fmt: skip
def test_a_name_that_cannot_be_is_refused(name, reason, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=rf"{reason}.*Type: ehr-embed new"):
        new_project(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command_says_what_to_type_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["frailty"]) == 0
    assert "ehr-embed train --config-dir frailty/conf experiment=my_experiment" in capsys.readouterr().out
    assert main(["frailty"]) == 2


@pytest.mark.slow
def test_its_own_tests_pass(tmp_path, monkeypatch):
    """The tests of the new project pass, with this checkout in the place of an installation."""
    project = new_project("frailty", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
