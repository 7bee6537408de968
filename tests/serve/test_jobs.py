"""Training jobs: from pictures to a concept that is drawn, over the death of whatever can die."""

import io
import json
import time

import httpx
import numpy
import pytest
from PIL import Image

from perfusion.serve import running

pytestmark = pytest.mark.serve


def pictures(count=4, size=(20, 16)):
    chance = numpy.random.default_rng(0)
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(chance.integers(0, 255, (*size, 3), numpy.uint8)).save(file, "png")
        yield ("pictures", (f"../../{number}.png", file.getvalue()))


def events(http, id):
    with http.stream("GET", f"/v1/jobs/{id}/events") as answer:
        assert answer.status_code == 200
        kind = None
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


def create(http, **form):
    plain = {"superclass": "teddy", "steps": 4, "batch_size": 2, "preview_every": 2}
    return http.post("/v1/concepts/train", files=list(pictures()), data={**plain, **form})


def test_from_pictures_to_a_concept(http):
    made = create(http, name="learned")
    assert made.status_code == 202, made.text
    job = made.json()
    seen = list(events(http, job["id"]))
    assert seen[0][0] == "progress" and seen[-1][0] == "succeeded", seen
    assert {kind for kind, _ in seen} >= {"progress", "preview", "succeeded"}
    assert seen[-1][1]["concept"] == "learned" and seen[-1][1]["step"] == 4
    assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "succeeded"
    assert http.post("/v1/images/generations", json={"prompt": "a <learned>", "steps": 2}).status_code == 200
    assert create(http, name="learned").status_code == 409
    assert http.delete(f"/v1/jobs/{job['id']}").json()["deleted"] and http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_what_cannot_be_learned_is_refused_before_anything_is_kept(http):
    before = http.get("/v1/jobs").json()
    for wrong, part in (
        ({"name": "A b"}, "name must be 1 to 32"), ({"name": "x", "steps": 0}, "steps"), ({"name": "x", "flip": 2}, "flip"),
        ({"name": "x", "captions": ["a {}"]}, "a caption for each picture"), ({"name": "x", "model": "sd9"}, "no model"),
    ):  # fmt: skip
        answer = create(http, **wrong)
        assert answer.status_code in (400, 404) and part in answer.json()["error"]["message"], answer.text
    bad = http.post("/v1/concepts/train", files=[("pictures", ("a.png", b"none"))], data={"name": "x", "superclass": "teddy"})
    assert bad.status_code == 400 and "number 0 cannot be read" in bad.json()["error"]["message"]
    assert http.get("/v1/jobs").json() == before


def test_a_job_survives_the_server(settings_of, tmp_path, survived):
    """Stopped in the midst of a job, and started again, the server goes on with it from its checkpoint; cancelling keeps one, too."""
    settings = settings_of(tmp_path / "state", grace=60.0)
    with running(settings) as url, httpx.Client(base_url=url, timeout=120) as http:
        job = create(http, name="long", steps=2000, preview_every=0).json()
        until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["step"] >= 3)
    with running(settings) as url, httpx.Client(base_url=url, timeout=120) as http:
        until(lambda: (now := http.get(f"/v1/jobs/{job['id']}").json())["status"] == "running" and now["step"] >= 5)
        assert http.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
        until(lambda: any((tmp_path / "state").rglob("step-*.safetensors")))
        assert http.post(f"/v1/jobs/{job['id']}/resume").json()["status"] in ("queued", "running")
        log = next((tmp_path / "state").rglob("log.jsonl"))
        first = json.loads(log.read_text().splitlines()[0])["step"]
        until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["status"] == "running")
        http.delete(f"/v1/jobs/{job['id']}")
        assert first == 1, "one log from the first step to the last"
    survived("a server is stopped in mid-training, started again", "the job goes on from its checkpoint")


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
