"""Odd configurations: a run that ends with metrics, or one clear line that names the key; never a library's traceback."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ehr_embed.core.errors import UserError
from ehr_embed.experiment import results
from ehr_embed.experiment.cli import explain
from ehr_embed.experiment.run import run
from ehr_embed.sources.cohort import write_demo_cohort
from tests.helpers import fuzz
from tests.helpers.configs import composed
from tests.helpers.fuzz import large, small
from tests.helpers.overrides import last_of_each
from tests.helpers.small_meds import ROOT, Event, write_meds

QUICK = (
    "embedder=hashing",
    "model=encoder_small",
    "model.n_layers=1",
    "model.model_dim=16",
    "trainer.epochs=1",
    "trainer.n_bootstrap=3",
    "trainer.precision=32-true",
    "trainer.batch_size=64",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """24 subjects a split, with births, static events, numbers and a label set."""
    rng, labels = np.random.default_rng(0), []
    splits: dict[str, list[Event]] = {}
    for number, split in enumerate(fuzz.SPLITS):
        splits[split] = []
        for subject in range(1000 * number, 1000 * number + 24):
            splits[split] += [(subject, None, f"SEX//{subject % 2}", None), (subject, -9000.0, "MEDS_BIRTH", None)]
            splits[split] += [
                (subject, float(day), f"C{rng.integers(5)}", float(rng.normal()) if day % 2 else None)
                for day in range(int(rng.integers(2, 8)))
            ]
            labels.append((subject, 99.0, subject % 3 == 0))
    root = tmp_path_factory.mktemp("config") / "set"
    return write_meds(root, splits, codes=[("C0", "Fever", None)], labels={"good": labels})


def base(dataset: Path, *overrides: str) -> DictConfig:
    place = ("data=meds", f"data.root={dataset}", f"cache_dir={dataset.parent / 'cache'}", "run_dir=run")
    return composed(*place, *QUICK, *overrides)


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Work in an empty folder, without plots, which take longer than all the rest."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_plots", lambda *_, **__: [])
        yield


def outcome(cfg: DictConfig) -> float | str:
    """Return what `train.py` makes of a configuration: its metric, or the line that it prints."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return run(cfg)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return line_of(error)


def line_of(error: Exception, *arguments: str) -> str:
    told = explain(error, "train", list(arguments))
    assert "\n" not in told, told
    assert len(told) > 20, told
    assert "object_type" not in told, told
    return told


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


KEYS = sorted(leaves(OmegaConf.to_container(composed("data=meds", *QUICK), resolve=False)))
NUMBERS = st.sampled_from(
    [-(2**70), -1, 0, 1, 2, 3, 7, 64, 2**40, 2**70, 0.0, 0.5, -0.5, 1.5, 1e-300, 1e300, math.nan, math.inf]
)
# Without slashes: a folder may be made of a text.
TEXTS = st.one_of(
    st.sampled_from(
        ["", "abc", "None", "auto", "1", "é", "a b", "\n", "???", "${nope}", "${seed}", "cpu", "balanced", "none"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/.$\\"), max_size=5),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
YAML = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
)


def check_values(dataset: Path, changes: list[tuple[str, Any]]) -> None:
    """A finite metric or a line; a value of the wrong kind is told by the name of its key."""
    cfg = base(dataset)
    with elsewhere():
        for key, value in changes:
            # Processes by the dozen, and trainings without end, are no mistakes of this project's.
            assume(not (key == "trainer.num_workers" and isinstance(value, int) and value > 1))
            try:
                OmegaConf.update(cfg, key, value, merge=False)
            except (OmegaConfBaseException, AttributeError, TypeError, ValueError):
                return  # below a key that is gone, or nothing that YAML can hold
        assume(not any(key == "trainer.epochs" and isinstance(value, int) and value > 100 for key, value in changes))
        result = outcome(cfg)
    fuzz.counted(is_refused=isinstance(result, str))
    if isinstance(result, float):
        assert math.isfinite(result)
        for key, value in changes:
            assert not (isinstance(value, float) and not math.isfinite(value)) or not _is_there(cfg, key, value), key
    elif len(changes) == 1 and not isinstance(changes[0][1], dict | list):
        key = changes[0][0]
        last = key.rsplit(".", 1)[-1]
        assert last in result or key.split(".")[0] in result, (key, result)


def _is_there(cfg: DictConfig, key: str, value: Any) -> bool:
    found = OmegaConf.select(cfg, key, throw_on_resolution_failure=False, throw_on_missing=False)
    return found is value


changes = st.lists(st.tuples(st.sampled_from(KEYS), YAML), min_size=1, max_size=2)


@small(25)
@given(changes=changes)
def test_any_value_in_any_place(dataset, changes):
    check_values(dataset, changes)


@pytest.mark.slow
@large(300)
@given(changes=changes)
def test_any_value_in_any_place_at_length(dataset, changes):
    check_values(dataset, changes)


def check_misspelt(key: str, place: int, letter: str, value: str) -> None:
    """A key that does not exist is refused in one line that names those beside it."""
    start = key.rfind(".") + 1
    place = start + place % (len(key) - start)
    wrong = key[:place] + letter + key[place + 1 :]
    assume(wrong not in KEYS and wrong not in ("export", "experiment", "pipeline", "sweeps", "hydra"))
    argument = f"{wrong}={value}"
    GlobalHydra.instance().clear()
    try:
        composed("data=meds", argument)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        told = line_of(error, "data=meds", argument)
    else:
        raise AssertionError(f"{argument} was taken")
    fuzz.counted(is_refused=True)
    assert "Valid: " in told or "no such key" in told, told
    assert wrong.rsplit(".", 1)[-1] in told or wrong in told


misspelt = (
    st.sampled_from([key for key in KEYS if "_target_" not in key]),
    st.integers(0, 30),
    st.sampled_from("abz_"),
    st.sampled_from(["1", "null", "[1,2]", "abc"]),
)


@small(8)
@given(*misspelt)
def test_a_misspelt_key(key, place, letter, value):
    check_misspelt(key, place, letter, value)


@pytest.mark.slow
@large(150)
@given(*misspelt)
def test_a_misspelt_key_at_length(key, place, letter, value):
    check_misspelt(key, place, letter, value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "seed=-1: expected a whole number from 0 to 4294967295"),
        ("seed", 1.5, "seed=1.5: expected a whole number"),
        ("run_dir", None, "run_dir=null: expected a folder, got null"),
        ("cache_dir", 3, "cache_dir=3: expected a folder, got the number 3"),
        ("init_from", 5, "init_from=5: expected a run's folder"),
        ("pretrain", True, "pretrain=True: expected groups of a first stage"),
        ("pretrain", {"trainr": {}}, "unknown key of pretrain 'trainr': did you mean 'trainer'"),
        ("trusted_packages", "a", r"trusted_packages=a: expected a list of packages, got the text 'a'"),
        ("embedder", None, "embedder=null: expected a mapping with _target_"),
        ("model", 3, "model=3: expected a mapping with _target_"),
        ("data", "abc", "data=abc: expected a mapping"),
        ("model.max_length", 0, "model.max_length=0: expected 1 or more events"),
        ("model.max_length", "x", "model.max_length=x: expected 1 or more events"),
        ("model.model_dim", 0, "model.model_dim=0: expected 1 to 65536"),
        ("model.n_layers", -1, "model.n_layers=-1: expected 1 to 1024"),
        ("model.positions", "???", "model.positions is not set"),
        ("embedder.embedding_dim", 0, "embedder.embedding_dim=0: expected 1 to 65536"),
        ("embedder.batch_size", 0, "embedder.batch_size=0: expected 1 or more"),
        ("task.shuffle_labels", -1, "task.shuffle_labels=-1: expected 0 or more"),
        ("task.fraction_seed", -1, "task.fraction_seed=-1: expected 0 or more"),
        ("task.class_weights", [0, 1], r"task.class_weights=\[0.*\]: expected numbers above 0"),
        ("trainer.learning_rate", -1.0, "trainer.learning_rate=-1.0: expected 0 or more"),
        ("trainer.learning_rate", math.nan, "trainer.learning_rate=nan: expected a finite number"),
        ("trainer.clip_norm", math.nan, "trainer.clip_norm=nan: expected a finite number"),
        ("trainer.weight_decay", -1.0, "trainer.weight_decay=-1.0: expected 0 or more"),
        ("trainer.scheduler_patience", -1, "trainer.scheduler_patience=-1: expected 0 or more"),
        ("trainer.n_bootstrap", 2**70, "trainer.n_bootstrap=1180591620717411303424: expected a number of at most 64 bits"),
        ("trainer.n_bootstrap", -1, "trainer.n_bootstrap=-1: expected 0 to 1000000"),
        ("trainer.num_workers", -1, "trainer.num_workers=-1: expected 0 to 1024. 0 builds batches in this process"),
        ("trainer.accelerator", "gpus", "unknown trainer.accelerator 'gpus': did you mean 'gpu'"),
        ("data.n_bins", "abc", "data.n_bins=abc: expected 2 to 10000 bins, got the text 'abc'"),
        ("data.min_count", 1.5, "data.min_count=1.5: expected 1 or more events, got the number 1.5"),
        ("data.lookups", "abc", "data.lookups=abc: expected a list of CSV files"),
        ("data.lookups", [None], r"data.lookups=\[None\]: expected a list of CSV files"),
        ("data.min_text_coverage", 3, r"data.min_text_coverage=3: expected a share in \[0, 1\]"),
        ("data.describe_unseen", "yes please", "data.describe_unseen=yes please: expected true or false"),
        ("data.hidden_codes", "abc", r"data.hidden_codes=abc: expected a share in \[0, 1\)"),
        ("data.hidden_seed", None, "data.hidden_seed=null: expected a whole number"),
        ("data.renamed", 5, "data.renamed=5: expected a CSV file"),
        ("data.renamed_missing", "abc", "unknown data.renamed_missing 'abc': Valid: keep, refuse"),
        ("task.labels", "${nope}", r"task.labels: Interpolation key 'nope' not found\. Type: python train.py --cfg job"),
    ],
)  # fmt: skip
def test_what_ended_in_a_traceback_or_was_taken_in_silence(dataset, key, value, message):
    cfg = base(dataset)
    OmegaConf.update(cfg, key, value, merge=False)
    with elsewhere():
        result = outcome(cfg)
    assert isinstance(result, str)
    assert re.match(message, result), result


def test_a_demo_of_which_a_split_has_one_class_is_refused(tmp_path):
    """Its best possible AUROC is undefined, and NaN is no JSON."""
    message = r"data\.n_subjects=120 data\.cohort_seed=0: 0 of the 18 .*tuning .*Type: data\.n_subjects=500"
    with pytest.raises(UserError, match=message):
        write_demo_cohort(root=tmp_path / "demo", n_subjects=120, seed=0)
    assert not (tmp_path / "demo").exists()
    write_demo_cohort(root=tmp_path / "demo", n_subjects=500, seed=0)


CASES = [
    (["trainer.learing_rate=1"], "unknown key of trainer 'learing_rate': did you mean 'learning_rate'"),
    (["data.n_subjects=120"], "data.n_subjects=120 data.cohort_seed=0"),
    (["model=encodr"], "unknown option of model 'encodr': did you mean 'encoder'"),
    (["seed=[1,2]"], "seed=[1, 2]: expected a whole number"),
    (["data.root=${nope}", "data=meds"], "Interpolation key 'nope' not found"),
    (["model.n_layers=2", "model.n_layers=x"], "model.n_layers=x: expected 1 to 1024"),
    (["model=encoder", "model.n_layers=0", "model.n_layers=-1"], "model.n_layers=-1: expected 1 to 1024"),
    (["trainer.epochs="], "trainer.epochs"),
    (["a b"], "a b"),
    (["+seed=1"], "'seed' is there already"),
    (["~nonsense"], "unknown key or group 'nonsense'"),
    (["sweeps=nope"], "unknown option of sweeps 'nope'"),
    (["data=meds", "data.root=nowhere"], "data.root=nowhere"),
]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [pytest.param(*case, marks=[pytest.mark.slow] if n else []) for n, case in enumerate(CASES)],
)
def test_the_command_line_says_it_in_one_line(tmp_path, arguments, told):
    command = [sys.executable, str(ROOT / "train.py"), *last_of_each(["embedder=hashing", *arguments])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    # Hydra itself says on a line of its own which job it was.
    lines = [
        line for line in done.stderr.strip().splitlines() if not line.startswith("Error executing job with overrides")
    ]
    assert [line.startswith("error: ") for line in lines] == [True], done.stderr
    assert told in lines[0], lines[0]
    assert "Traceback" not in done.stdout + done.stderr
