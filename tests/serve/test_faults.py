"""What a server survives. docs/server.md has the table of what was done and what came of it."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from perfusion.concept import Concept
from perfusion.serve import running
from tests.serve.test_api import gauge, pixels, until
from tests.serve.test_jobs import pictures

pytestmark = pytest.mark.serve


def ask(url, seed, prompt="a <teddy>", headers=None, **more):
    body = {"prompt": prompt, "seed": seed, "steps": 12, "size": "32x32", **more}
    return httpx.post(f"{url}/v1/images/generations", json=body, headers=headers, timeout=300)


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
def test_a_worker_is_killed_in_mid_batch(own, url, survived):
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
    survived("`kill -9` of a worker in mid-batch", f"all {len(answers)} requests answered, each once, with the pictures of their seeds")


@pytest.mark.parametrize("queue", [100, pytest.param(1000, marks=pytest.mark.proof)])
def test_a_thousand_wait_and_the_rest_are_told_when_to_come_back(settings_of, world, tmp_path, survived, queue):
    count = queue // 10 + 14
    with running(settings_of(tmp_path / "state", rows=8, queue=queue, queue_per_key=queue)) as url:
        with concurrent.futures.ThreadPoolExecutor(count) as clients:
            answers = list(clients.map(lambda seed: ask(url, seed, "a cat", n=10, steps=2), range(count)))
        taken = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(taken) >= queue // 10 and len(taken) + len(refused) == count and refused
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(answer.json()["error"]["code"] == "queue_full" for answer in refused)
        assert ask(url, 1, "a cat", steps=2).status_code == 200
    came = f"{10 * len(taken):,} drawn; 429 with Retry-After for the other {10 * len(refused):,}"
    survived(f"{10 * count:,} pictures at once for a queue of {queue:,}", came)


def test_a_corrupt_concept_file_is_named_and_harms_no_other(own, tmp_path, survived):
    address, http = own
    (path,) = (tmp_path / "state" / "concepts").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    answer = ask(address, 1)
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "damaged_concept", answer.text
    assert http.get("/v1/concepts/teddy/file").status_code == 409
    assert ask(address, 1, "a cat").status_code == 200
    survived("a concept file loses its last bytes", f"{answer.status_code} {answer.json()['error']['code']}; other requests are drawn")


def test_a_full_disk_is_a_sentence(own, monkeypatch, survived):
    address, http = own

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("perfusion.serve.store.write_bytes", full)
    other = Concept.from_bytes(http.get("/v1/concepts/teddy/file").content).to_bytes()  # in half precision, so another file
    answer = http.post("/v1/concepts", files={"file": other}, data={"name": "other"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage" and "retry-after" in answer.headers
    assert [each["name"] for each in http.get("/v1/concepts").json()["data"]] == ["teddy"]
    assert ask(address, 1).status_code == 200
    came = f"{answer.status_code} {answer.json()['error']['code']} with Retry-After; nothing half-written is there or served"
    survived("the disk is full at an upload", came)


def test_a_clock_that_jumps_ends_nothing(own, monkeypatch, survived):
    """Times of day go back and forth by years, between any two looks at the clock, while pictures are drawn."""
    address, http = own
    looks, real = itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(looks) * 1e8)
    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda seed: ask(address, seed), range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text[:200] for answer in answers]
    assert {answer.json()["data"][0]["seed"] for answer in answers} == set(range(6)) and next(looks) > 0
    assert gauge(http, "worker_restarts_total") == 0
    survived("the clock jumps back and forth by three years", f"all {len(answers)} pictures drawn, none given up", next(looks))


def test_a_picture_that_takes_too_long_is_given_up(settings_of, tmp_path, survived):
    with running(settings_of(tmp_path / "state", timeout=0.3)) as url:
        answer = ask(url, 1, "a cat", steps=150, size="256x256")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
        with httpx.Client(base_url=url, timeout=120) as http:
            until(lambda: gauge(http, "drawing_pictures") == 0)
    survived("a picture takes longer than the timeout", f"{answer.status_code} {answer.json()['error']['code']}; it is drawn no further")


@contextlib.contextmanager
def program(world, folder, *options):
    """The whole program, as it is started: its process, its address, once it is ready, and the lines of its log so far."""
    code = "import sys; from perfusion.cli import main; sys.argv[0] = 'perfusion'; main()"
    model = ["--model", f"toybox={world / 'model'}", "--port", "0", "--folder", str(folder), "--device", "cpu"]
    with subprocess.Popen([sys.executable, "-c", code, "serve", *model, *options], stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if '"event": "listening"' in line:
                    break
            url = json.loads(lines[-1])["url"]
            until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, 300)
            yield server, url, lines
        finally:
            server.kill()  # whatever comes, nobody waits for it for ever


def test_sigterm_under_load_finishes_what_is_drawn_and_refuses_what_waits(world, tmp_path, survived):
    with contextlib.ExitStack() as stack:
        server, url, lines = stack.enter_context(program(world, tmp_path / "state", "--rows", "1", "--grace", "250"))
        with httpx.Client(base_url=url, timeout=300) as http:
            clients = stack.enter_context(concurrent.futures.ThreadPoolExecutor(8))
            stack.callback(server.kill)  # before the clients are waited for
            answers = [clients.submit(ask, url, seed, "a cat", steps=40, size="64x64") for seed in range(8)]
            until(lambda: gauge(http, "queue_pictures") >= 4 and gauge(http, "drawing_pictures") >= 1)
            server.send_signal(signal.SIGTERM)
            answers = [answer.result() for answer in answers]
            server.wait(300)
            rest = server.stderr.read()
    assert server.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), rest
    codes = sorted({answer.status_code for answer in answers})
    assert codes == [200, 503], [answer.text[:200] for answer in answers]
    assert all(answer.json()["error"]["code"] == "closing" for answer in answers if answer.status_code == 503)
    assert "a cat" not in "".join(lines) + rest, "prompts are not logged"
    drawn = sum(answer.status_code == 200 for answer in answers)
    survived(f"SIGTERM with {len(answers)} requests, one in a batch", f"{drawn} drawn and answered, {len(answers) - drawn} refused with 503")


@pytest.mark.proof
def test_a_server_that_is_killed_in_mid_training_loses_nothing(world, tmp_path, survived):
    """`kill -9` of the whole program while a job runs and pictures are drawn: keys, concepts and the job are there when it starts again."""
    folder = tmp_path / "state"
    teddy = (world / "teddy.safetensors").read_bytes()
    with program(world, folder) as (server, url, _):
        made = httpx.post(f"{url}/v1/keys", json={"name": "root", "scopes": ["admin"]}, timeout=60).json()
        root = {"authorization": f"Bearer {made['key']}"}
        with httpx.Client(base_url=url, timeout=120, headers=root) as http, concurrent.futures.ThreadPoolExecutor(4) as clients:
            http.post("/v1/concepts", files={"file": teddy}).raise_for_status()
            form = {"name": "long", "superclass": "teddy", "steps": 2000, "batch_size": 2, "preview_every": 0}
            job = http.post("/v1/concepts/train", files=list(pictures()), data=form).json()["id"]
            until(lambda: http.get(f"/v1/jobs/{job}").json()["step"] >= 30, 300)  # and a checkpoint at 25
            asked = [clients.submit(ask, url, seed, "a cat", steps=150, size="64x64", headers=root) for seed in range(4)]
            until(lambda: gauge(http, "drawing_pictures") >= 1)
            server.kill()
            server.wait()
            assert all(isinstance(each.exception(60), httpx.TransportError) for each in asked), "no answer is made up"
    with program(world, folder) as (server, url, _), httpx.Client(base_url=url, timeout=120, headers=root) as http:
        assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401, "keys hold"
        assert http.get("/v1/concepts/teddy/file").content == teddy
        until(lambda: (now := http.get(f"/v1/jobs/{job}").json())["status"] == "running" and now["step"] >= 40, 300)
        assert ask(url, 1, headers=root).status_code == 200
        steps = [json.loads(line)["step"] for line in next(folder.rglob("log.jsonl")).read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[0] == 1, "one log, every step once"
        assert http.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"
        server.send_signal(signal.SIGTERM)
        server.wait(120)
    survived("`kill -9` of the whole server in mid-training", "keys, concepts and the job are there when it starts again; its log has every step once")
