"""Small MEDS datasets, written by hand, and the open real ones where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.small_meds import DATA, write_meds

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest-xdist keeps the cores busy with processes; threads on top of them fight for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a busy machine an example takes as long as it takes, which says nothing about the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True, scope="session")
def _searched_application() -> None:
    """Parts of a search that are tested by themselves know the application, as after `run_main`."""
    try:
        from ehr_embed.experiment.searched import SearchedRuns
        from ehr_embed.search.application import register_application
    except ModuleNotFoundError as error:
        if error.name not in ("hydra", "omegaconf"):
            raise
        return  # a GPU's machine, where `benchmarks.gpu` runs some tests, need not have them
    register_application(SearchedRuns())


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw their plots and write a picture of one pixel each, since turning four plots into pixels takes as
    long as a tiny training. A module that tests the pictures has a fixture of this name that does nothing; runs in processes of
    their own write whole pictures."""
    from PIL import Image

    from ehr_embed.core.files import atomic_path
    from ehr_embed.evaluation import plots

    def write_pixel(figure: object, path: str) -> None:
        with atomic_path(path) as temporary:
            Image.new("L", (1, 1)).save(temporary, format="PNG")

    monkeypatch.setattr(plots, "_save", write_pixel)


@pytest.fixture(autouse=True)
def _quiet_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point that ran in this process leaves no switch on for the processes that later tests start."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("HYDRA_FULL_ERROR")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Nine subjects, three a split, codes A (with values), B and C, label set `outcome`."""
    splits = {
        split: [
            event
            for s in range(3)
            for subject in [10 * (number + 1) + s]
            for event in [
                (subject, None, "SEX//F" if s % 2 else "SEX//M", None),
                (subject, 0.0, "A", float(s)),
                (subject, 1.0, "B", None),
                (subject, 1.0, "A", float(s + 1)),
                (subject, 2.5, "C", None),
            ]
        ]
        for number, split in enumerate(("train", "tuning", "held_out"))
    }
    subjects = [10 * (number + 1) + s for number in range(3) for s in range(3)]
    labels = {"outcome": [(subject, 2.0, subject % 2 == 1) for subject in subjects]}
    codes = [("A", "Sodium, mmol/L", None), ("B", "Fever", None), ("C", None, ["B"]), ("SEX//F", "Female", None)]
    return write_meds(tmp_path / "tiny", splits, codes=codes, labels=labels)


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Path of an open real dataset; skips where it is absent, as for most users."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.is_dir():
            pytest.skip(f"open dataset {name} is not at {DATA}; set EHR_EMBED_TEST_DATA to the folder that holds it")
        return path

    return find
