"""What a server survives. docs/server.md has the table of what was done and what came of it."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys

import httpx
import pytest

from perfusion.concept import Concept
from perfusion.serve import running
from tests.serve.test_api import gauge, pixels, until


def ask(url, seed, prompt="a <teddy>", **more):
    body = {"prompt": prompt, "seed": seed, "steps": 12, "size": "32x32", **more}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=300)


@pytest.fixture
def own(settings_of, world, tmp_path):
    """A server of this test alone, with the teddy, and its address."""
    with running(settings_of(tmp_path / "state", rows=4)) as url, httpx.Client(base_url=url, timeout=300) as http:
        http.post("/v1/concepts", files={"file": (world / "teddy.safetensors").read_bytes()}).raise_for_status()
        yield url, http


def workers():
    """Process ids of the workers, found as children of the process that forks them."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{parent}/cmdline") as file:
                forks = "forkserver" in file.read()
            with open(f"/proc/{parent}/stat") as file:
                grandparent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if forks and grandparent == os.getpid():
            found.append(int(pid))
    return set(found)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are found in /proc")
def test_a_worker_is_killed_in_mid_batch(own, url):
    """Its pictures are drawn again with the same seeds, each request is answered once, and nobody is told."""
    address, http = own
    expected = [ask(address, seed).json()["data"][0] for seed in range(2)]
    others = workers()
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, address, seed) for seed in range(8)]
        until(lambda: gauge(http, "drawing_pictures") >= 4 and gauge(http, "batch_rows_count") > 28)
        victim = max(others)  # the last one that was started is this test's
        os.kill(victim, signal.SIGKILL)
        answers = [answer.result() for answer in answers]
    assert [answer.status_code for answer in answers] == [200] * 8, [answer.text for answer in answers]
    for seed, picture in enumerate(expected):
        again = answers[seed].json()["data"][0]
        assert again["seed"] == picture["seed"] and abs(pixels(again["b64_json"]) - pixels(picture["b64_json"])).max() <= 2
    assert gauge(http, "worker_restarts_total") == 1 and gauge(http, "picture_seconds_count") == 10


def test_a_thousand_wait_and_the_rest_are_told_when_to_come_back(settings_of, world, tmp_path):
    with running(settings_of(tmp_path / "state", rows=8, queue=100, queue_per_key=100)) as url:
        with concurrent.futures.ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda seed: ask(url, seed, "a cat", n=10, steps=2), range(24)))
        taken = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(taken) >= 10 and len(taken) + len(refused) == 24 and refused
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(answer.json()["error"]["code"] == "queue_full" for answer in refused)
        assert ask(url, 1, "a cat", steps=2).status_code == 200


def test_a_corrupt_concept_file_is_named_and_harms_no_other(own, tmp_path):
    address, http = own
    (path,) = (tmp_path / "state" / "concepts").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    answer = ask(address, 1)
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "damaged_concept", answer.text
    assert http.get("/v1/concepts/teddy/file").status_code == 409
    assert ask(address, 1, "a cat").status_code == 200


def test_a_full_disk_is_a_sentence(own, monkeypatch):
    address, http = own

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("perfusion.serve.store.write_bytes", full)
    other = Concept.from_bytes(http.get("/v1/concepts/teddy/file").content).to_bytes()  # in half precision, so another file
    answer = http.post("/v1/concepts", files={"file": other}, data={"name": "other"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage" and "retry-after" in answer.headers
    assert [each["name"] for each in http.get("/v1/concepts").json()["data"]] == ["teddy"]
    assert ask(address, 1).status_code == 200


def test_a_picture_that_takes_too_long_is_given_up(settings_of, tmp_path):
    with running(settings_of(tmp_path / "state", timeout=0.3)) as url:
        answer = ask(url, 1, "a cat", steps=150, size="256x256")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
        with httpx.Client(base_url=url) as http:
            until(lambda: gauge(http, "drawing_pictures") == 0)


def test_sigterm_under_load_finishes_what_is_drawn_and_refuses_what_waits(world, tmp_path):
    """The whole program, as it is started."""
    code = "import sys; from perfusion.cli import main; sys.argv[0] = 'perfusion'; main()"
    command = [sys.executable, "-c", code, "serve", "--model", f"toybox={world / 'model'}", "--port", "0", "--folder", str(tmp_path / "state"), "--rows", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, contextlib.ExitStack() as stack:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if '"event": "listening"' in line:
                url = json.loads(line)["url"]
                break
        with httpx.Client(base_url=url, timeout=300) as http:
            until(lambda: http.get("/ready").status_code == 200, 300)
            clients = stack.enter_context(concurrent.futures.ThreadPoolExecutor(8))
            stack.callback(server.kill)  # whatever comes, nobody waits for it for ever
            answers = [clients.submit(ask, url, seed, "a cat", steps=150, size="64x64") for seed in range(8)]
            until(lambda: gauge(http, "queue_pictures") >= 4)
            server.send_signal(signal.SIGTERM)
            answers = [answer.result() for answer in answers]
            server.wait(120)
            rest = server.stderr.read()
    assert server.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), rest
    codes = sorted({answer.status_code for answer in answers})
    assert codes == [200, 503], [answer.text[:200] for answer in answers]
    assert all(answer.json()["error"]["code"] == "closing" for answer in answers if answer.status_code == 503)
    assert "a cat" not in "".join(lines) + rest, "prompts are not logged"
