"""`pip install ehr_embed` gives the whole tool: the wheel is built, installed without the checkout, and used in an empty folder."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import polars as pl
import pytest

from tests.helpers.small_meds import ROOT
from tests.helpers.wheels import build, call, source, wheel  # noqa: F401  (source and wheel are fixtures)

SMALL = ("data.n_subjects=300", "embedder=hashing", "trainer.epochs=1", "trainer.n_bootstrap=20", "trainer.threads=1")


def environment(folder: Path, *, what: Path | str, is_built: bool = False, editable: bool = False) -> Path:
    """Make a virtual environment that has this one's libraries, without its ehr_embed, and install `what`; return its bin/.

    Where pip must build a package first (`is_built`, `editable`), it builds with this environment's setuptools.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    own = call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder.parent).strip()
    # A line of a .pth file adds a folder, but no .pth file inside it is read, such as that of an editable install.
    Path(own, "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    options = ["--no-index"]
    if is_built or editable:
        options = ["--no-build-isolation", *(["--editable"] if editable else [])]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed"]
    call(*pip, *options, what, cwd=folder.parent)
    return folder / "bin"


@pytest.fixture(scope="module")
def bin_(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("fresh") / "env", what=wheel)


@pytest.fixture(scope="module")
def trained(bin_, tmp_path_factory) -> Path:
    """An empty folder in which the installed program has trained `runs/first`."""
    folder = tmp_path_factory.mktemp("empty")
    output = call(bin_ / "ehr-embed", "train", *SMALL, "run_dir=runs/first", cwd=folder)
    assert "auroc" in output
    return folder


def test_the_wheel_has_every_module_configuration_and_file_of_the_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ehr_embed").rglob("*.py")}
    texts = {str(Path("ehr_embed", path.relative_to(ROOT))) for name in ("conf", "sweeps")
             for path in (ROOT / name).rglob("*.yaml")}  # fmt: skip
    template = {str(path.relative_to(ROOT)) for path in (ROOT / "ehr_embed" / "console").rglob("*")
                if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    tables = {str(path.relative_to(ROOT)) for path in (ROOT / "ehr_embed").rglob("*.csv")}
    assert (modules | texts | template | tables) - names == set()
    assert not [name for name in names if name.startswith(("conf/", "sweeps/", "tests/", "docs/"))]


def test_the_source_distribution_gives_the_same_wheel(source, wheel, tmp_path):
    packed = build("sdist", source, tmp_path)
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / packed.name.removesuffix(".tar.gz")
    (tmp_path / "again").mkdir()
    again = build("wheel", unpacked, tmp_path / "again")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
    assert (unpacked / "train.py").is_file()


def test_the_program_answers_from_any_folder(bin_, tmp_path):
    where = call(bin_ / "python", "-c", "import ehr_embed; print(ehr_embed.__file__)", cwd=tmp_path)
    assert str(bin_.parent) in where, "the checkout is not what is tested"
    assert "explain" in call(bin_ / "ehr-embed", "--help", cwd=tmp_path)
    assert "encoder_tpe" in call(bin_ / "ehr-embed", "train", "--help", cwd=tmp_path)
    assert "n_layers: 2" in call(bin_ / "ehr-embed", "train", "--cfg", "job", cwd=tmp_path)
    output = call(bin_ / "ehr-embed", "train", "model.n_layer=2", cwd=tmp_path, code=2)
    assert "did you mean 'n_layers'" in output
    assert "ehr-embed train --cfg job" in output
    assert "train.py" not in output, "there is none"
    assert list(tmp_path.iterdir()) == []


def test_another_application_finds_the_configuration(bin_, tmp_path):
    (tmp_path / "app.py").write_text(
        "import hydra\n@hydra.main(version_base='1.3', config_path='pkg://ehr_embed.conf', config_name='train')\n"
        "def main(cfg): print(cfg.model._target_)\nmain()\n"
    )
    assert "ehr_embed.models.gru" in call(bin_ / "python", "app.py", "model=gru", cwd=tmp_path).lower()


@pytest.mark.slow
def test_it_trains_and_predicts_from_an_empty_folder(bin_, trained):
    assert (trained / "runs" / "first" / "metrics.json").is_file()
    assert "ehr-embed train --config-path" in (trained / "runs" / "first" / "config.yaml").read_text()
    data = next((trained / "cache").glob("demo-300-*"))
    call(bin_ / "ehr-embed", "predict", "run=runs/first", f"data.root={data}", "output=found.parquet", cwd=trained)
    assert len(pl.read_parquet(trained / "found.parquet")) == 300


@pytest.mark.slow
def test_it_searches_from_an_empty_folder(bin_, trained):
    arguments = ("sweeps=encoder_tpe", "hydra.sweeper.n_trials=2", "hydra.sweeper.has_plots=false")
    call(bin_ / "ehr-embed", "train", *SMALL, *arguments, cwd=trained)
    folder = trained / "multirun" / "encoder_tpe"
    assert len(pl.read_csv(folder / "summary.csv")) == 2
    assert json.loads((folder / "study.json").read_text())["command"].startswith("ehr-embed train data.n_subjects=300")
    call(bin_ / "ehr-embed", "train", "-m", *SMALL, "model=mean_pool,gbm", "hydra.sweep.dir=many", cwd=trained)
    assert (trained / "many" / "1" / "metrics.json").is_file()
    assert "gbm" in call(bin_ / "ehr-embed", "compare", "many", cwd=trained).lower()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "git"])
def test_a_source_distribution_and_a_git_url_give_the_program(kind, source, tmp_path):
    """Two further commands of docs/install.md install the package: `pip install FILE` and `pip install git+URL`."""
    what: Path | str = source
    if kind == "sdist":
        what = build("sdist", source, tmp_path)
    else:
        shutil.copytree(source, tmp_path / "repository", ignore=shutil.ignore_patterns("build", "*.egg-info"))
        git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path / "repository")
        for words in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "all")):
            call(*git, *words, cwd=tmp_path)
        what = f"git+file://{tmp_path / 'repository'}"
    bin_, empty = environment(tmp_path / "env", what=what, is_built=True), tmp_path / "empty"
    empty.mkdir()
    where = call(bin_ / "python", "-c", "import ehr_embed; print(ehr_embed.__file__)", cwd=empty)
    assert str(bin_.parent) in where, "the checkout is not what is tested"
    assert "auroc" in call(bin_ / "ehr-embed", "train", *SMALL, "run_dir=runs/first", cwd=empty)
    assert (empty / "runs" / "first" / "report.html").is_file()


@pytest.mark.slow
def test_a_new_project_runs_as_it_stands(bin_, tmp_path):
    output = call(bin_ / "ehr-embed", "new", "frailty", cwd=tmp_path)
    assert "cd frailty" in output
    project = tmp_path / "frailty"
    assert "1 passed" in call(bin_ / "python", "-m", "pytest", "-q", "-k", "padding", cwd=project)
    readme = (project / "README.md").read_text()
    line = next(line for line in readme.splitlines() if line.startswith("ehr-embed train"))
    call(
        bin_ / "ehr-embed", *line.split()[1:], *SMALL, "run_dir=runs/own", cwd=project
    )  # whose code is found in this folder
    assert (project / "runs" / "own" / "metrics.json").is_file()


@pytest.mark.slow
def test_an_editable_install_reads_the_checkout(source, tmp_path):
    bin_ = environment(tmp_path / "env", what=source, editable=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    (source / "conf" / "model" / "mine.yaml").write_text("# A model.\n_target_: ehr_embed.models.gru.GRU\n")
    try:
        assert "models.gru" in call(bin_ / "ehr-embed", "train", "model=mine", "--cfg", "job", cwd=empty)
        code = "from importlib.resources import files; print(files('ehr_embed.conf'))"
        assert str(source / "conf") in call(bin_ / "python", "-c", code, cwd=empty)
    finally:
        (source / "conf" / "model" / "mine.yaml").unlink()


@pytest.mark.slow
def test_pip_alone_is_enough(wheel, tmp_path):
    """A clean machine with only pip: the wheel with all that it depends on from the registry, then a run."""
    venv.create(tmp_path / "env", with_pip=True)
    bin_ = tmp_path / "env" / "bin"
    constraints = ROOT / "constraints.txt"
    call(
        bin_ / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        constraints,
        wheel,
        cwd=tmp_path,
        timeout=3000,
    )
    output = call(bin_ / "ehr-embed", "train", "data.n_subjects=300", *SMALL[2:], cwd=tmp_path)
    assert "auroc" in output
