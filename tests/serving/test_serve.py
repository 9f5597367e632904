"""The server answers what `predict` writes, sees no event after the prediction time, and refuses in sentences."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import uvicorn
from starlette.testclient import TestClient

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.inference.explainer import Explainer
from ehr_embed.inference.predictor import Predictor
from ehr_embed.serve import serve
from ehr_embed.serving.answers import Answers
from ehr_embed.serving.app import Limits, create_app
from ehr_embed.serving.microbatches import MicroBatches, QueueFullError
from ehr_embed.serving.server import listen
from tests.helpers.configs import composed
from tests.helpers.small_ensemble import SMALL
from tests.helpers.small_meds import ROOT, Event, write_meds


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A calibrated ensemble of two seeds in `run`, and its cohort in the cache."""
    place = tmp_path_factory.mktemp("serving")
    run(composed(*SMALL, f"cache_dir={place / 'cache'}", f"run_dir={place / 'run'}"))
    return place


@pytest.fixture(scope="module")
def predictor(place) -> Predictor:
    return ehr_embed.load(place / "run")


@pytest.fixture(scope="module")
def client(predictor):
    with TestClient(create_app(Answers(predictor), run_name="run", hosts=("testserver",))) as client:
        yield client


def cohort(place: Path) -> Path:
    return next((place / "cache").glob("demo-160-*"))


def as_json(events: pl.DataFrame) -> list[dict[str, Any]]:
    rows = events.select("time", "code", "numeric_value").iter_rows(named=True)
    return [row | {"time": None if row["time"] is None else row["time"].isoformat()} for row in rows]


def records_of(root: Path, times: pl.DataFrame) -> list[dict[str, Any]]:
    """Whole records, those after the prediction time included."""
    events = pl.read_parquet(root / "data" / "**" / "*.parquet")
    return [
        {
            "subject_id": subject,
            "prediction_time": time.isoformat(),
            "events": as_json(events.filter(subject_id=subject)),
        }
        for subject, time in times.select("subject_id", "prediction_time").iter_rows()
    ]


def asked(client: TestClient, records: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    answer = client.post("/predict", json={"records": records, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


@pytest.fixture(scope="module")
def labelled(place, predictor) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Return what `predict` says at the labels of held_out, and the same records in the form of requests."""
    root = cohort(place)
    found = predictor.predict_proba(root, labels=next((root / "labels").iterdir()).name)
    return found, records_of(root, found)


def test_answers_are_what_predict_writes(client, labelled, place):
    found, records = labelled
    answers = [answer for start in range(0, len(records), 16) for answer in asked(client, records[start : start + 16])]
    for name in ("false", "true"):
        own = [answer["probabilities"][name] for answer in answers]
        np.testing.assert_allclose(own, found[f"probability_{name}"], atol=1e-6)
    written = pl.read_parquet(place / "run" / "predictions" / "held_out.parquet")
    np.testing.assert_allclose(own, written["predicted_boolean_probability"], atol=1e-6)
    assert [answer["subject_id"] for answer in answers] == found["subject_id"].to_list()
    assert any(answer["events"]["after_prediction_time"] for answer in answers), "else the next test says little"
    assert (place / "run" / "calibration.json").is_file()
    assert client.get("/health").json()["is_calibrated"]


def test_no_event_after_the_prediction_time_is_seen(client, labelled):
    record = dict(labelled[1][0])
    until = record["prediction_time"]
    seen = [event for event in record["events"] if event["time"] is None or event["time"] <= until]
    code = seen[-1]["code"]
    later = [
        {"time": "2999-01-01", "code": code, "numeric_value": 1e6},
        {"time": "2999-01-02", "code": "MEDS_DEATH", "description": "Death"},
        {"time": "2999-01-03", "code": "MEDS_BIRTH"},
    ]
    plain, with_later, at_the_time = asked(
        client,
        [
            record | {"events": seen},
            record | {"events": [*later, *seen]},
            record | {"events": [*seen, {"time": until, "code": "NEW", "description": "Metastatic carcinoma"}]},
        ],
    )
    assert with_later["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-7)
    assert with_later["events"] == plain["events"] | {"given": len(seen) + 3, "after_prediction_time": 3}
    assert at_the_time["probabilities"]["true"] != pytest.approx(plain["probabilities"]["true"], abs=1e-7), "inclusive"
    (last,) = asked(client, [{"events": seen}])
    assert last["prediction_time"] <= until
    assert last["prediction_time"] == max(event["time"] for event in seen if event["time"])


def test_unseen_codes_are_read_by_the_texts_that_come_with_them(client, predictor, tmp_path):
    events: list[Event] = [(s, float(d), code, 5.0) for s, code in ((1, "X1"), (2, "X2"), (3, "X3")) for d in (0, 1)]
    codes = [("X1", "Fever and cough", None), ("X2", "Broken leg", None)]
    root = write_meds(tmp_path / "new", {"a": events}, codes=codes, subject_splits=False)
    expected = predictor.predict_proba(root, split=None)["probability_true"].to_list()
    assert len(set(expected)) == 3

    def record(subject: int, text: str | None) -> dict[str, Any]:
        frame = pl.read_parquet(root / "data" / "a" / "0.parquet").filter(subject_id=subject)
        return {"events": [event | {"description": text} for event in as_json(frame)]}

    found = asked(client, [record(1, "Fever and cough"), record(2, "Broken leg"), record(3, None)])
    assert [answer["probabilities"]["true"] for answer in found] == pytest.approx(expected, abs=1e-6)
    assert found[0]["events"] == {"given": 2, "after_prediction_time": 0, "by_text": 2, "unknown": 0, "read": 2}
    # One code with another text in each record of a batch, and in a later request: none is read with another's.
    same = [record(1, "Broken leg"), record(1, "Fever and cough"), record(1, None)]
    first, second, third = (answer["probabilities"]["true"] for answer in asked(client, same))
    assert (first, second) == pytest.approx((expected[1], expected[0]), abs=1e-6)
    assert third not in (pytest.approx(first, abs=1e-6), pytest.approx(second, abs=1e-6))
    (again,) = asked(client, [record(1, "Broken leg")])
    assert again["probabilities"]["true"] == pytest.approx(first, abs=1e-6)


def test_an_ensemble_says_how_far_its_members_lie_apart(client, labelled):
    for answer in asked(client, labelled[1][:8]):
        low, high = answer["interval"]["true"]
        assert low <= answer["probabilities"]["true"] <= high
        assert low < high
        assert [low, high] == [f(member["probabilities"]["true"] for member in answer["members"]) for f in (min, max)]
        assert len(answer["members"]) == 2


def test_attributions_are_those_of_explain(client, labelled, predictor, place):
    found, records = labelled
    root, member = cohort(place), ehr_embed.load(place / "run" / "members" / "pooled-0")
    with TestClient(create_app(Answers(member), run_name="member")) as of_member:
        (by_gradients,) = asked(of_member, records[:1], attributions=True)
    (by_leaving_out,) = asked(client, records[:1], attributions=True)  # of an ensemble, which passes no gradients
    for own, run_of_it in ((by_gradients["attributions"], member), (by_leaving_out["attributions"], predictor)):
        data = run_of_it.read(str(root), labels=next((root / "labels").iterdir()).name, split="held_out", lookups=[])
        row = int(np.flatnonzero(data.samples.subject_ids == found["subject_id"][0])[0])
        expected = Explainer(run_of_it, target=None, n_steps=16, max_steps=512, tolerance=0.01).attribute(data, row)
        np.testing.assert_allclose([event["attribution"] for event in own["events"]], expected.events, atol=1e-5)
        assert any(event["attribution"] for event in own["events"])
    own = by_gradients["attributions"]
    total = sum(event["attribution"] for event in own["events"])
    assert total == pytest.approx(own["log_odds"] - own["log_odds_of_average_events"], abs=2 * own["gap"] + 1e-6)
    assert "interval" not in by_gradients
    refused = client.post("/predict", json={**records[0], "attributions": True, "target": "maybe"})
    assert refused.status_code == 422
    assert "unknown target 'maybe'" in refused.json()["error"]
    assert client.post("/predict", json={"records": records[:9], "attributions": True}).status_code == 422


def test_requests_that_come_together_are_computed_together(client, labelled):
    found, records = labelled
    held, release = threading.Event(), threading.Event()
    app_predict = Answers.predict

    def slow(self, given):
        held.set()
        release.wait(10)
        return app_predict(self, given)

    batches = client.get("/metrics").text
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(9) as pool:
        patch.setattr(Answers, "predict", slow)
        first = pool.submit(asked, client, [records[0]])
        held.wait(10)
        others = [pool.submit(asked, client, [record]) for record in records[1:9]]
        while "ehr_embed_queued_records 8.0" not in client.get("/metrics").text:
            pass
        release.set()
        answers = [future.result()[0] for future in (first, *others)]
    own = [answer["probabilities"]["true"] for answer in answers]
    np.testing.assert_allclose(own, found["probability_true"][:9], atol=1e-6)

    def count(text: str) -> float:
        return next(
            float(line.split()[1]) for line in text.splitlines() if line.startswith("ehr_embed_batch_records_count")
        )

    after = client.get("/metrics").text
    assert count(after) == count(batches) + 2, "one, then eight at once"
    assert 'ehr_embed_requests_total{path="/predict",status="200"}' in after
    assert 'ehr_embed_events_total{kind="after_prediction_time"}' in after


EVENT = {"time": "2020-01-01", "code": "A"}
SECRET = "SECRET-4711"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "the body"),
        (b"[" * 100_000, 422, "the body"),
        (b"\xff\xfe", 422, "the body"),
        (b"3", 422, "the body"),
        ({}, 422, "events: Field required"),
        ({"records": []}, 422, "at least one record"),
        ({"records": [{"events": [EVENT]}] * 65}, 422, "at most 64 records"),
        ({"events": [EVENT] * 20_001}, 422, "at most 20,000 events"),
        ({"events": []}, 422, "expected a prediction_time"),
        ({"events": [{"code": "A"}]}, 422, "expected a prediction_time"),
        ({"events": [EVENT], "prediction_time": "2019-01-01"}, 422, "none of its 1 events"),
        ({"events": [EVENT, {"code": "SEX"}], "prediction_time": "2019-01-01"}, 422, "lies before every timed event"),
        ({"events": [{"time": "2020-01-01"}]}, 422, "events[0].code"),
        ({"events": [EVENT | {"code": ""}]}, 422, "events[0].code"),
        ({"events": [EVENT | {"cod": SECRET}]}, 422, "events[0].cod"),
        ({"events": [EVENT, EVENT | {"code": 3}]}, 422, "events[1].code"),
        ({"events": [EVENT | {"time": SECRET}]}, 422, "events[0].time: expected a time as"),
        ({"events": [EVENT | {"time": 1577836800}]}, 422, "events[0].time"),
        ({"events": [EVENT | {"time": "2020-01-01T00:00:00Z"}]}, 422, "without a time zone"),
        ({"events": [EVENT | {"time": "2020-01-01T00:00:00.0000001"}]}, 422, "whole microseconds"),
        ({"events": [EVENT | {"numeric_value": SECRET}]}, 422, "events[0].numeric_value"),
        (b'{"events": [{"time": "2020-01-01", "code": "A", "numeric_value": NaN}]}', 422, "numeric_value"),
        ({"events": [EVENT | {"numeric_value": 1e39}]}, 422, "float32"),
        ({"events": [EVENT | {"description": d} for d in (SECRET, "y")]}, 422, "two descriptions"),
        ({"events": [EVENT | {"description": "x" * 2001}]}, 422, "events[0].description"),
        ({"events": [EVENT], "subject_id": 2**64}, 422, "subject_id"),
        (b" " * (16 << 20) + b"{}", 413, "max_body_mib"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(client, body, status, message, caplog):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    told = answer.json()["error"]
    assert message in told
    for shown in (answer.text, caplog.text):
        assert "Traceback" not in shown
        assert SECRET not in shown, "values may be a patient's"


def test_other_requests_are_refused_in_a_sentence(client):
    for call, status, message in (
        (
            lambda: client.post("/predict", content="{}", headers={"content-type": "text/plain"}),
            415,
            "application/json",
        ),
        (lambda: client.get("/predict"), 405, "POST /predict"),
        (lambda: client.get("/docs"), 404, "POST /predict"),
        (lambda: client.get("/health", headers={"host": "evil.example:8000"}), 421, "allowed_hosts"),
    ):
        answer = call()
        assert answer.status_code == status
        assert message in answer.json()["error"]
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "numeric_value" in json.dumps(body)


def test_one_bad_record_fails_alone(client, labelled, predictor, caplog):
    """One record of a batch makes the model fail; the batch may hold records of several callers."""
    found, records = labelled
    app_predict = Answers.predict
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:

        def failing(self, given):
            if any(record.subject_id == "bad" for record in given):
                raise ValueError(SECRET)
            return app_predict(self, given)

        patch.setattr(Answers, "predict", failing)
        calls = [
            pool.submit(client.post, "/predict", json=record)
            for record in ({**records[0], "subject_id": "bad"}, *records[1:4])
        ]
        bad, *good = (call.result() for call in calls)
    assert bad.status_code == 500
    assert SECRET not in bad.text + caplog.text
    own = [answer.json()["predictions"][0]["probabilities"]["true"] for answer in good]
    np.testing.assert_allclose(own, found["probability_true"][1:4], atol=1e-6)
    assert client.get("/health").status_code == 200


def test_a_slow_answer_ends_in_504_and_nothing_stays_behind(predictor, labelled):
    release = threading.Event()

    class Slow(Answers):
        def predict(self, records):
            release.wait(10)
            return super().predict(records)

    limits = Limits(timeout_s=0.6, max_queued=1)
    with TestClient(create_app(Slow(predictor), run_name="run", limits=limits)) as client:
        answer = client.post("/predict", json=labelled[1][0])
        assert (answer.status_code, "timeout_s" in answer.json()["error"]) == (504, True)
        waiting = client.post("/predict", json=labelled[1][0])  # behind the first, which still computes
        assert waiting.status_code == 504
        many = client.post("/predict", json={"records": labelled[1][:2]})
        assert (many.status_code, many.headers["retry-after"]) == (503, "1")
        release.set()
        tries = (
            client.post("/predict", json=labelled[1][0]) for _ in range(30)
        )  # a busy machine may take longer than 0.6 s
        found = next(answer for answer in tries if answer.status_code == 200).json()["predictions"][0]
        assert found["probabilities"]["true"] == pytest.approx(labelled[0]["probability_true"][0], abs=1e-6)


def test_what_was_begun_is_answered_before_the_end():
    def work(items: list[int]) -> list[int]:
        return [-item for item in items]

    async def main() -> list[list[int]]:
        batches = MicroBatches[int, int](work, max_batch=4, max_queued=100, max_wait_s=0.05)
        batches.start()
        calls = [asyncio.create_task(batches.submit([i, i + 1])) for i in range(6)]
        await asyncio.sleep(0)
        calls[3].cancel()
        await batches.close()
        with pytest.raises(QueueFullError):
            await batches.submit([1])
        return [call.result() for call in calls if not call.cancelled()]

    assert asyncio.run(main()) == [[-i, -i - 1] for i in (0, 1, 2, 4, 5)]


def test_the_requests_of_the_documentation_are_answered_as_it_says(predictor, client, capsys):
    page = (ROOT / "docs" / "serving.md").read_text()
    code, answer = (
        re.search(pattern, page, re.DOTALL)[1] for pattern in (r"```python[^\n]*\n(.*?)```", r"```json\n(.*?)```")
    )
    body = re.search(r"curl .*? -d '(.*?)'\n", page, re.DOTALL)[1]
    found = client.post("/predict", content=body, headers={"content-type": "application/json"}).json()

    def shape(node: Any) -> Any:
        return {key: shape(value) for key, value in node.items()} if isinstance(node, dict) else type(node)

    told = json.loads(answer)
    assert shape(found["predictions"][0]) == shape(told["predictions"][0])
    assert found["predictions"][0]["events"]["given"] == told["predictions"][0]["events"]["given"] == 3
    # The other one over a real connection, of a server that ends when it is told to.
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(create_app(Answers(predictor), run_name="run"), log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        exec(compile(code.replace(":8000", f":{listener.getsockname()[1]}"), "ask.py", "exec"), {})
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()
    printed = capsys.readouterr().out
    assert "'false'" in printed
    assert re.search(r"[+-]\d\.\d{3}  .*[Cc]hest pain", printed)


def test_it_stays_on_this_machine_unless_told_and_names_the_extra(place, monkeypatch):
    assert composed("run=x", name="serve").host == "127.0.0.1"
    monkeypatch.setattr("ehr_embed.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match=r'uvicorn .*pip install "ehr_embed\[serve\]"'):
        serve(composed(f"run={place / 'run'}", name="serve"))
    monkeypatch.undo()
    for override, message in (
        ("port=70000", "port=70000"),
        ("host=203.0.113.7", r"host=203\.0\.113\.7 port=\d+: .*Type: port="),
        ("timeout_s=0", "timeout_s"),
    ):
        with pytest.raises(UserError, match=message):
            serve(composed(f"run={place / 'run'}", override, name="serve"))
