"""Tables over seeds: what is one row, what stands in it, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from scipy import stats

from ehr_embed.comparison.tabulate import markdown, statistic, table_frame, tabulate, write_table
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import write_json
from ehr_embed.core.outcome import Outcome, write_outcome
from ehr_embed.evaluation.predictions import write_predictions
from ehr_embed.tabulate import main
from tests.helpers.refusals import refused

LABELS = (0, 1, 0, 1)


def write_run(
    folder: Path,
    *,
    auroc: float,
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    labels: Sequence[int] = LABELS,
) -> Path:
    """Write the files of a run that a table reads."""
    folder.mkdir(parents=True)
    entry = {"value": auroc, "low": auroc - 0.1, "high": auroc + 0.1}
    metrics = {"held_out": {"auroc": entry, "n": len(labels)}, "train": dict(facts or {"steps": 10, "seconds": 2.0})}
    write_json(folder / "metrics.json", metrics)
    OmegaConf.save(OmegaConf.create(dict(config)), folder / "config.yaml")
    if overrides:
        write_outcome(folder, Outcome("finished", [auroc], overrides=list(overrides)))
    path = folder / "predictions" / "held_out.parquet"
    path.parent.mkdir()
    write_predictions(
        path, subject_ids=np.arange(len(labels)), prediction_times=np.full(len(labels), "2020-01-01", "datetime64[us]"),
        labels=list(labels), probabilities=np.full(len(labels), auroc), threshold=0.5,
    )  # fmt: skip
    return folder


def write_sweep(root: Path) -> Path:
    """Two layer counts with three seeds each; the second has the same mean."""
    for trial, (layers, values) in enumerate({1: (0.7, 0.8, 0.9), 2: (0.8, 0.8, 0.8)}.items()):
        for seed, auroc in enumerate(values):
            write_run(
                root / str(trial) / f"seed_{seed}",
                auroc=auroc,
                config={"seed": seed, "model": {"n_layers": layers, "dim": 64 * layers}, "run_dir": f"{trial}/{seed}"},
                facts={"steps": 100, "seconds": 2.0 + seed, "embedding_seconds": 5.0 * (seed == 0)},
                overrides=[f"model.n_layers={layers}", f"seed={seed}"],
            )
    return root


def test_mean_sd_and_t_interval_by_hand():
    values = [0.71, 0.78, 0.75, 0.80]
    found = statistic(values)
    mean, sd = np.mean(values), np.std(values, ddof=1)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=sd / 2)
    np.testing.assert_allclose([found.mean, found.sd, found.low, found.high], [mean, sd, low, high])


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path):
    found = tabulate([write_sweep(tmp_path / "sweep")], metrics=["held_out/auroc", "ms_per_step", "embedding_seconds"])
    assert [group.keys for group in found.groups] == [{"model.n_layers": "1"}, {"model.n_layers": "2"}]
    first, second = (group.statistics for group in found.groups)
    assert [len(group.runs) for group in found.groups] == [3, 3]
    assert (first["held_out/auroc"].mean, first["held_out/auroc"].sd) == pytest.approx((0.8, 0.1))
    assert second["held_out/auroc"].sd == pytest.approx(0)
    assert first["ms_per_step"].mean == pytest.approx(30), "2, 3 and 4 s for a hundred steps"
    assert first["embedding_seconds"].mean == 5, "paid once, not a third each time"
    assert found.notes == []


def test_one_run_has_no_interval(tmp_path):
    run = write_run(tmp_path / "run", auroc=0.7, config={"seed": 0})
    found = tabulate([run])
    frame = table_frame(found)
    assert frame["held_out/auroc"].tolist() == [0.7]
    assert not [name for name in frame.columns if name.endswith(("/sd", "/low", "/high"))]
    assert "| 0.700 |" in markdown(found)


def test_the_configuration_tells_rows_apart_where_no_job_has_overrides(tmp_path):
    for number, (rate, seed) in enumerate([(0.1, 0), (0.1, 1), (0.2, 0)]):
        write_run(tmp_path / str(number), auroc=0.7, config={"seed": seed, "trainer": {"rate": rate, "epochs": 3}})
    found = tabulate([tmp_path])
    assert [(group.keys, len(group.runs)) for group in found.groups] == [
        ({"trainer.rate": "0.1"}, 2),
        ({"trainer.rate": "0.2"}, 1),
    ]


def test_rows_can_be_chosen(tmp_path):
    one, other = write_sweep(tmp_path / "one"), write_sweep(tmp_path / "other")
    by_folder = tabulate([one, other], by=["folder"])
    assert [(group.keys["folder"], len(group.runs)) for group in by_folder.groups] == [(str(one), 6), (str(other), 6)]
    by_key = tabulate([one, other], by=["model.dim"])
    assert [(group.keys, len(group.runs)) for group in by_key.groups] == [
        ({"model.dim": "64"}, 6),
        ({"model.dim": "128"}, 6),
    ]
    with pytest.raises(UserError, match=r"unknown --by 'model\.n_layer': did you mean 'model\.n_layers'"):
        tabulate([one], by=["model.n_layer"])


def test_means_over_other_subjects_are_refused_and_rows_of_them_say_so(tmp_path):
    config = {"task": {"labels": "a"}}
    write_run(tmp_path / "0", auroc=0.7, config=config | {"seed": 0, "model": "x"})
    write_run(tmp_path / "1", auroc=0.7, config=config | {"seed": 1, "model": "x"}, labels=(1, 0, 1, 0))
    with refused("different subjects", "--by folder"):
        tabulate([tmp_path])
    found = tabulate([tmp_path / "0", tmp_path / "1"], by=["folder"])
    assert found.notes == [
        "rows are about different subjects or labels: differences between rows are not due to the models alone"
    ]
    assert found.notes[0] in markdown(found)


def test_folds_have_other_subjects_and_are_one_row(tmp_path):
    for fold, labels in enumerate([(0, 1, 0, 1), (1, 1, 0, 0, 1)]):
        write_run(
            tmp_path / str(fold),
            auroc=0.7 + 0.1 * fold,
            config={"data": {"split_column": f"split{fold}"}},
            labels=labels,
        )
    [group] = tabulate([tmp_path], metrics=["held_out/auroc"]).groups
    assert group.statistics["held_out/auroc"].mean == pytest.approx(0.75)


def test_a_metric_that_some_runs_lack_is_refused_and_one_that_a_row_lacks_is_blank(tmp_path):
    for number, facts in enumerate([{"steps": 5, "seconds": 1.0}, {"steps": 5, "seconds": 1.0}, {"seconds": 1.0}]):
        write_run(tmp_path / str(number), auroc=0.7, config={"model": "ab"[number // 2]}, facts=facts)
    found = tabulate([tmp_path], metrics=["ms_per_step"])
    assert ["ms_per_step" in group.statistics for group in found.groups] == [True, False]
    with refused("ms_per_step"):
        tabulate([tmp_path], metrics=["ms_per_step"], by=["folder"])
    with pytest.raises(UserError, match=r"unknown metric 'held_out/aurok': did you mean 'held_out/auroc'"):
        tabulate([tmp_path], metrics=["held_out/aurok"])


def test_failed_runs_are_left_out_and_named(tmp_path):
    write_sweep(tmp_path)
    (tmp_path / "2").mkdir()
    write_outcome(tmp_path / "2", Outcome("failed", error="out of memory"))
    assert tabulate([tmp_path]).notes == [f"1 runs have no metrics.json and are left out: {tmp_path / '2'}"]
    with refused("metrics.json"):
        tabulate([tmp_path / "2"])


def test_the_command_line_prints_and_writes(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep")
    main(
        [
            str(sweep),
            "--metrics",
            "held_out/auroc,ms_per_step",
            "--markdown",
            "--output",
            str(tmp_path / "out" / "v1.table"),
        ]
    )
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "| model.n_layers | runs | held_out/auroc | iteration speed, ms per step |",
        "| --- | ---: | ---: | ---: |",
        "| 1 | 3 | 0.800 ± 0.100 [0.552, 1.048] | 30.0 ± 10.0 |",
        "| 2 | 3 | 0.800 | 30.0 ± 10.0 |",
    ]
    assert (tmp_path / "out" / "v1.table.md").read_text() == printed
    frame = pd.read_csv(tmp_path / "out" / "v1.table.csv")
    assert frame.columns[:4].tolist() == ["model.n_layers", "n_runs", "held_out/auroc", "held_out/auroc/sd"]
    assert frame["held_out/auroc/low"][0] == pytest.approx(0.8 - stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3))
    main([str(sweep)])
    assert "mean ± SD" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "found no such folder" in capsys.readouterr().err
    write_table(tabulate([sweep]), tmp_path / "again")
    assert (tmp_path / "again.csv").exists()
