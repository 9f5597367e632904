"""`ehr-embed new NAME`: write a project of one's own, with a model, an experiment and a test that run as they stand."""

from __future__ import annotations

import argparse
import keyword
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from ehr_embed.core.errors import UserError
from ehr_embed.core.programs import PROGRAM

TEMPLATE = Path(__file__).resolve().parent / "template"
PLACEHOLDER = "my_project"
"""Name of the project in the template, in texts and in paths."""
RENAMED = {"gitignore": ".gitignore"}
"""Files whose names, in the template, would mean something to the repository of this package."""


def new_project(name: str, parent: Path) -> Path:
    """Write the project `name` into a folder of that name, whole or not at all.

    Args:
        name: the name of the project and of its package.
        parent: the folder in which the project's folder is made.

    Returns:
        The project's folder.

    Raises:
        UserError: the name is no name of a package, or it is taken: by a folder here or by an installed package.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii() or name != name.lower():
        raise UserError(
            f"{name}: expected the name of a Python package, of small letters, digits and _, since YAML files name its classes. "
            f"Type: {PROGRAM} new my_project"
        )
    target = parent / name
    if target.exists():
        raise UserError(f"{target} exists already, and nothing of it was changed. Type: {PROGRAM} new ANOTHER_NAME")
    if find_spec(name) is not None:
        raise UserError(
            f"{name} is the name of an installed package, which would be imported in the project's place. "
            f"Type: {PROGRAM} new ANOTHER_NAME"
        )
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as temporary:
        made = Path(temporary) / name
        for path in sorted(TEMPLATE.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                place = path.relative_to(TEMPLATE)
                place = place.with_name(RENAMED.get(place.name, place.name))
                written = made / str(place).replace(PLACEHOLDER, name)
                written.parent.mkdir(parents=True, exist_ok=True)
                written.write_text(path.read_text(encoding="utf-8").replace(PLACEHOLDER, name), encoding="utf-8")
        shutil.move(made, target)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} new", description="Write a project of your own: one model, one experiment, one test, that run."
    )
    parser.add_argument("name", help="name of the project, its folder and its package, such as my_project")
    name = parser.parse_args(arguments).name
    try:
        new_project(name, Path.cwd())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{name}/ holds a model, an experiment and a test; its README says more. Type:\n\n  cd {name}\n"
        f"  {PROGRAM} train --config-dir {name}/conf experiment=my_experiment\n  python -m pytest"
    )
    return 0
