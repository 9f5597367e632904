"""An import never replaces, and never advises to delete, what a folder holds."""

from __future__ import annotations

import logging

import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.sources.demo import demo_source
from tests.helpers.entry_points import inside  # noqa: F401  (a fixture)


@pytest.mark.parametrize("file", ["metadata/codes.parquet", "data/train/0.parquet", "notes.txt"])
def test_a_folder_that_holds_other_files_is_left_alone(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("a hospital's only copy")
    with pytest.raises(UserError) as error:
        demo_source(root=str(tmp_path), n_subjects=100, seed=0)
    message = str(error.value)
    assert "delete" not in message
    assert ("data=meds" in message) == (file != "notes.txt")
    assert (tmp_path / file).read_text() == "a hospital's only copy"


def test_the_synthetic_cohort_is_called_synthetic_when_it_is_written(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        demo_source(root=str(tmp_path / "demo"), n_subjects=100, seed=0)
    assert len([message for message in caplog.messages if "SYNTHETIC" in message and "data=meds" in message]) == 1


def test_a_trained_run_is_not_evaluated_on_a_synthetic_cohort_in_a_folder_that_was_typed(inside, tmp_path):
    (tmp_path / "ward").mkdir()
    output = inside("train.py", "init_from=runs/a", "trainer=evaluate", "data.root=ward", cwd=tmp_path, code=2)
    assert "data.root=ward holds no data" in output
    assert "data=meds" in output
    assert list((tmp_path / "ward").iterdir()) == []
