"""Few modules lie at the top, packages are empty, each has a README, and the names that others import stand in one place."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ehr_embed.core.manifest import RUN_FOLDERS
from ehr_embed.run_folder import layout
from ehr_embed.run_folder.layout import PREDICTIONS, VOCABULARY
from tests.helpers.small_meds import ROOT

HOUSE = ROOT / "ehr_embed"
PACKAGES = sorted(path.parent for path in HOUSE.glob("*/__init__.py"))
MOST_FLAT = 14
MOST_LEVELS = 12
API = importlib.import_module("ehr_embed.api")


def imported(path: Path) -> set[str]:
    """Packages of this project that a module imports from."""
    tree = ast.parse(path.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[1] for name in names if name.startswith("ehr_embed.")}


def test_few_modules_lie_flat():
    assert len(list(HOUSE.glob("*.py"))) <= MOST_FLAT


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_is_empty_and_says_what_is_in_it(package):
    assert not (package / "__init__.py").read_text()
    lines = (package / "README.md").read_text().splitlines()
    assert 5 <= len(lines) <= 20
    named = re.findall(r"`([a-z_0-9/]+\.py)`", "\n".join(lines))
    assert named
    assert [name for name in named if not (package / name).is_file()] == []


def test_packages_stand_on_few_levels_without_a_circle():
    below = {
        package.name: set().union(*map(imported, package.glob("*.py"))) & {p.name for p in PACKAGES} - {package.name}
        for package in PACKAGES
    }
    level: dict[str, int] = {}
    while len(level) < len(below):
        ready = [name for name in below if name not in level and below[name] <= set(level)]
        assert ready, f"a circle among {sorted(set(below) - set(level))}"
        level |= {name: 1 + max((level[other] for other in below[name]), default=0) for name in ready}
    assert max(level.values()) <= MOST_LEVELS


def test_the_stable_names_are_there_and_explained():
    for name in API.__all__:
        found = getattr(API, name)
        assert found is not None
        assert not callable(found) or name in ("Outputs", "Curves") or found.__doc__, name
    defined = {alias.asname or alias.name for node in ast.parse((HOUSE / "api.py").read_text()).body
               if isinstance(node, ast.ImportFrom) and node.module != "__future__" for alias in node.names}  # fmt: skip
    assert set(API.__all__) == defined


def test_the_page_for_members_of_ones_own_imports_stable_names_only():
    page = (ROOT / "docs" / "extending.md").read_text()
    lines = re.findall(r"^from (ehr_embed\S*) import", page, re.MULTILINE)
    assert set(lines) == {"ehr_embed.api"}


def test_a_wrong_import_is_caught(tmp_path):
    copy = tmp_path / "ehr_embed"
    for path in HOUSE.rglob("*.py"):
        target = copy / path.relative_to(HOUSE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())

    def lint() -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})

    done = lint()
    assert done.returncode == 0, done.stdout
    (copy / "core" / "stopping.py").write_text("import hydra\nfrom ehr_embed.data import store\n")
    done = lint()
    assert done.returncode == 1
    assert re.search(r"packages below it BROKEN.*OmegaConf BROKEN", done.stdout, re.DOTALL), done.stdout


def test_what_lies_in_folders_of_a_run_is_looked_for_in_its_manifest():
    assert set(RUN_FOLDERS) == {VOCABULARY, PREDICTIONS}  # core knows no run folder and says it again


def test_a_file_name_of_a_run_folder_stands_in_one_module():
    names = {value for key, value in vars(layout).items() if key.isupper() and isinstance(value, str) and "." in value}
    names -= {layout.TABLE, layout.LOOKUPS, layout.LOCK, layout.CHECKPOINTS}
    assert "best_checkpoint.pt" in names
    found = [
        f"{path.relative_to(ROOT)}: {node.value}"
        for path in HOUSE.rglob("*.py")
        if path.name != "layout.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []


def test_the_drawing_of_the_architecture_is_that_of_the_code():
    """`python docs/architecture.py` was run after the last change of a package or of its README."""
    module = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == module["draw"]()
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert module["expanded"](page) == page


def test_one_number_is_followed_through_five_files():
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## The way of one number")[2].partition("\n## ")[0]
    told = re.split(r"^\d\. ", section, flags=re.MULTILINE)[1:]
    steps = [re.findall(r"`([^`]+)`", re.sub(r"\([^)]*\)", "", step)) for step in told]
    assert len(steps) == 5
    for step, (file, *_) in zip(told, steps, strict=True):
        for names, source in re.findall(r"\((`[^)]*?) in\s+`([^`]+)`\)", step):
            for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
                assert f"def {name}(" in (HOUSE / source).read_text()
                assert re.search(rf"\b{name}\(", (HOUSE / file).read_text()), f"{file} calls it"
    assert section.count(".py`)") == 3, "each further file has its parentheses"
    for number, (file, *names) in enumerate(steps):
        source = (HOUSE / file).read_text()
        assert f"def {names[0]}(" in source
        called = [name for name in names if name.isidentifier() and name != "conclude"]
        assert [name for name in called if not re.search(rf"\b{name}\b", source)] == [], file
        if 0 < number < 4:
            assert re.search(rf"\b{names[0]}\(", (HOUSE / steps[number - 1][0]).read_text()), "the file before calls it"
    assert "finish(" in (HOUSE / steps[1][0]).read_text()


def test_the_command_line_answers_before_torch_is_loaded():
    """A misspelt override or `--help` takes a fraction of a second, and each job of a search starts as fast."""
    code = "import sys, ehr_embed.experiment.cli, ehr_embed.search.trial; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
