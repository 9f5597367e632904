"""Integrated gradients: exact where they can be computed by hand, complete, and on the events that carry the label."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.explain import explain
from ehr_embed.inference.attribution import integrated_gradients, occlusion
from ehr_embed.inference.explainer import Explainer, event_table
from ehr_embed.inference.predictor import Predictor
from tests.helpers.configs import composed
from tests.helpers.entry_points import inside  # noqa: F401 (a fixture)
from tests.helpers.homonyms import GOOD, KINDS, config, write_homonyms
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds


def sample(n_events: int = 3, *, padded: int = 5, width: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, padded, generator=generator)
    values[0, 1] = float("nan")
    return {
        "embeddings": torch.randn(1, padded, width, generator=generator),
        "padding_mask": torch.arange(padded)[None] < n_events,
        "values": values,
    }


def test_a_linear_score_is_attributed_exactly():
    inputs, weight, baseline = sample(), torch.randn(4), torch.randn(4)

    def score(x):
        each = x["embeddings"] @ weight + 2 * x["values"].nan_to_num()
        return (each * x["padding_mask"]).sum(1)

    found = integrated_gradients(score, inputs, baseline, n_steps=1)
    expected = (inputs["embeddings"][0] - baseline) @ weight + 2 * inputs["values"][0].nan_to_num()
    np.testing.assert_allclose(found.events[:3], expected[:3], atol=1e-5)
    assert found.events[3:].tolist() == [0.0, 0.0], "padding moves nothing"
    assert found.gap < 1e-5
    assert found.n_steps == 1


def test_of_a_product_each_half_gets_its_share():
    """x * y from (0, 0) to (a, b): the integral of a * t * b is ab / 2 for each."""
    inputs = {"embeddings": torch.tensor([[[3.0], [4.0]]]), "padding_mask": torch.ones(1, 2, dtype=torch.bool)}
    found = integrated_gradients(lambda x: x["embeddings"].prod(1)[:, 0], inputs, torch.zeros(1))
    np.testing.assert_allclose(found.events, [6.0, 6.0], atol=1e-5)
    assert found.score == 12.0
    assert found.baseline_score == 0.0


def test_steps_double_until_it_is_complete_and_what_cannot_be_is_refused():
    inputs = {"embeddings": torch.tensor([[[1.0]]]), "padding_mask": torch.ones(1, 1, dtype=torch.bool)}

    def steep(x):
        return torch.sigmoid(60 * (x["embeddings"][:, 0, 0] - 0.37)) * 5

    found = integrated_gradients(steep, inputs, torch.zeros(1), n_steps=2, tolerance=0.01)
    assert found.n_steps > 8
    assert found.gap <= 0.01 * 5
    with refused("8 steps", "Type: max_steps=32"):
        integrated_gradients(steep, inputs, torch.zeros(1), n_steps=2, max_steps=8)


@pytest.mark.parametrize(
    "score",
    [
        lambda x: x["values"].nan_to_num().sum(1),
        lambda x: (x["embeddings"] * 0).sum((1, 2)),
        lambda x: torch.ones(len(x["embeddings"])),
        lambda x: x["embeddings"].detach().sum((1, 2)),
    ],
)
def test_a_score_that_ignores_the_vectors_is_refused(score):
    with pytest.raises(UserError, match="Declare reads_vectors = False"):
        integrated_gradients(score, sample(5), torch.zeros(4))


def test_leaving_codes_out_tells_what_each_adds_and_shares_it_among_its_events():
    """Padding is not read, what remains is moved up, and more groups than go into one batch are told apart."""
    weight = torch.arange(1.0, 41.0)
    inputs = {
        "token_ids": torch.arange(40)[None],
        "padding_mask": torch.arange(40)[None] < 38,
        "rows": torch.ones(3, 2),  # one per distinct token, not per event
    }

    def score(x):
        assert (x["padding_mask"].long().diff(dim=1) <= 0).all(), "padding comes last"
        assert x["rows"].shape == (3, 2)
        return (weight[x["token_ids"]] * x["padding_mask"]).sum(1).square()

    group = np.arange(40)
    group[1] = 0  # the first two events have one code
    found = occlusion(score, inputs, group)
    total = float(weight[:38].sum())
    assert found.events[0] == found.events[1] == pytest.approx((total**2 - (total - 3) ** 2) / 2)
    assert found.events[37] == pytest.approx(total**2 - (total - 38) ** 2)
    assert found.events[38:].tolist() == [0.0, 0.0]
    assert (found.score, found.n_steps) == (total**2, 37)
    assert np.isnan(found.gap)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    root = write_homonyms(folder / "set")
    run(config(root, folder / "run", *KINDS["residual"], "trainer.epochs=20", "task.monitor=brier"))
    run(config(root, folder / "decoder", *KINDS["full"], "model=decoder_small", "trainer.epochs=2"))
    return folder


def explained(folder: Path, *overrides: str) -> list[Path]:
    return explain(composed(f"run={folder / 'run'}", f"output={folder / 'out'}", *overrides, name="explain"))


def test_the_event_that_carries_the_label_moves_the_prediction(folder):
    predictor = Predictor(folder / "run")
    data = predictor.read(str(folder / "set"), labels="case", split="held_out", lookups=())
    explainer = Explainer(predictor, target=None, n_steps=16, max_steps=2048, tolerance=0.01)
    p = predictor.predict_proba(folder / "set", labels="case")["probability_true"].to_numpy()
    for row in range(10):
        found = explainer.attribute(data, row)
        table = event_table(data, row, found)
        assert found.score == pytest.approx(np.log(p[row] / (1 - p[row])), abs=1e-4)
        assert table["attribution"].sum() == pytest.approx(found.score - found.baseline_score, abs=2 * found.gap + 1e-6)
        assert found.gap <= 0.01 * max(1, abs(found.score - found.baseline_score))
        assert len(table) == 5
        if GOOD in table["code"]:  # without it the log-odds are those of an average record, and nothing moves much
            top = table.sort(pl.col("attribution").abs()).row(-1, named=True)
            assert top["code"] == GOOD
            assert top["attribution"] > 5
            assert top["days_before"] > 90
        else:
            assert table["attribution"].abs().max() < 1


def test_the_other_class_is_moved_the_other_way(folder):
    predictor = Predictor(folder / "run")
    data = predictor.read(str(folder / "set"), labels="case", split="held_out", lookups=())
    one, other = (
        Explainer(predictor, target=name, n_steps=16, max_steps=2048, tolerance=0.01).attribute(data, 0).events
        for name in ("true", "false")
    )
    np.testing.assert_allclose(one, -other, atol=0.02)


def test_decoders_and_several_labels_too(folder):
    labels = pl.read_parquet(folder / "set" / "labels" / "case" / "0.parquet")
    (folder / "set" / "labels" / "control").mkdir()
    labels.with_columns(~pl.col("boolean_value")).write_parquet(folder / "set" / "labels" / "control" / "0.parquet")
    run(config(folder / "set", folder / "several", *KINDS["frozen"], "trainer.epochs=1", task=["task=multilabel"]))
    for name, target in (("decoder", "true"), ("several", "control")):
        predictor = Predictor(folder / name)
        data = predictor.read(str(folder / "set"), labels="case", split="tuning", lookups=())
        found = Explainer(predictor, target=target, n_steps=16, max_steps=2048, tolerance=0.01).attribute(data, 3)
        p = predictor.predict_proba(folder / "set", labels="case", split="tuning")[f"probability_{target}"][3]
        assert found.score == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
        assert np.abs(found.events).max() > 0


def test_files_of_a_subject(folder):
    table, png, page = explained(folder, "subject=204", "task.labels=case")
    assert [path.name for path in (table, png, page)] == [f"subject_204.{kind}" for kind in ("csv", "png", "html")]
    frame = pl.read_csv(table)
    assert frame.columns == ["time", "days_before", "code", "text", "numeric_value", "attribution"]
    assert GOOD in frame["code"]
    assert png.read_bytes().startswith(b"\x89PNG")
    html = page.read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=.http", html), "it needs no network"
    assert "Result of the test" in html


def test_texts_of_a_split(folder):
    table, png = explained(folder, "task.labels=case", "max_samples=30")
    frame = pl.read_csv(table)
    assert frame["text"][0] == "Result of the test"
    assert frame.filter(text="Result of the test")["n_samples"][0] == 30
    assert (frame["mean_abs_attribution"] >= frame["mean_attribution"].abs() - 1e-9).all()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_static_events_numbers_and_new_codes_are_drawn(tmp_path):
    """Values are carried beside the token, and count towards their event."""
    rng = np.random.default_rng(0)
    splits: dict[str, list] = {}
    labels = []
    for number, split in enumerate(("train", "tuning", "held_out")):
        splits[split] = []
        for subject in range(1000 * number, 1000 * number + 80):
            x = float(rng.normal())
            splits[split] += [(subject, None, "SEX//F", None), (subject, 0.0, "LAB", x), (subject, 0.1, "N1", None)]
            labels.append((subject, 1.0, x > 0))
    root = write_meds(tmp_path / "set", splits, codes=[("LAB", "Sodium", None)], labels={"case": labels})
    small = ("data.values=continuous", "trainer.epochs=20", "task.monitor=brier")
    run(config(root, tmp_path / "run", *KINDS["frozen"], *small))
    table, *_ = explained(tmp_path, "subject=2003", "task.labels=case")
    frame = pl.read_csv(table)
    assert frame["code"].to_list() == ["SEX//F", "LAB", "N1"]
    assert frame["days_before"].to_list()[0] is None
    value = {subject: number for subject, _, code, number in splits["held_out"] if code == "LAB"}
    assert frame["numeric_value"].to_list()[1] == pytest.approx(value[2003], abs=1e-3)
    assert frame["attribution"].abs().arg_max() == 1
    assert (frame["attribution"][1] > 0) == (value[2003] > 0)
    strange = write_meds(
        tmp_path / "other", {"x": [(9, 0.0, "NEW", None), (9, 0.5, "N1", None)]}, codes=[("NEW", "Asthma", None)],
        subject_splits=False,
    )  # fmt: skip
    table, *_ = explained(tmp_path, "subject=9", f"data.root={strange}")
    assert pl.read_csv(table)["text"].to_list() == ["Asthma", "N1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["subject=5000"], "subject=5000 .* 200, 201"),
        (
            ["subject=204", "prediction_time=2021-01-01"],
            "prediction_time=2021-01-01: subject 204 .*2020-.*Give one of these times",
        ),
        (["subject=204", "prediction_time=soon"], "prediction_time=soon: .*2020-01-31T12:00:00"),
        (["target=tru"], r"unknown target 'tru': did you mean 'true'"),
        (["max_steps=4"], r"n_steps=16: .*max_steps=4\. Type: max_steps=16"),
        (["max_samples=0"], r"max_samples=0"),
        (["max_samples=3", "min_samples=99"], "min_samples=99 .*Type: min_samples=1, or more max_samples"),
    ],
)
def test_mistakes_are_named(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        explained(folder, *overrides)


def test_a_model_that_reads_no_vectors_is_refused(folder, monkeypatch):
    class Blind(nn.Module):
        def forward(self, inputs):
            n = inputs["token_ids"].double().sum(1, keepdim=True)
            return torch.cat([n, -n], dim=1)

    predictor = Predictor(folder / "run")
    data = predictor.read(str(folder / "set"), labels="case", split="held_out", lookups=())
    explainer = Explainer(predictor, target=None, n_steps=16, max_steps=64, tolerance=0.01)
    explainer.predictor = Predictor(folder / "run")
    object.__setattr__(explainer.predictor.run, "model", Blind())
    with pytest.raises(UserError, match="Declare reads_vectors = False"):
        explainer.attribute(data, 0)


def test_the_command_line(folder, inside):
    output = inside("-m", "ehr_embed.explain", "run=run", "subject=204", cwd=folder)
    assert "run/explained/subject_204.html" in output
    assert re.search(r"log-odds of case: .* miss the difference by .* after \d+ steps", output)
    assert "unknown key or group 'subjct'" in inside(
        "-m", "ehr_embed.explain", "run=run", "subjct=2", cwd=folder, code=2
    )
