"""Fuzzing of the HTTP surface from its own OpenAPI document: whatever is sent, no answer is a fault of the server."""

import re
import subprocess
import sys

import hypothesis
import pytest
import schemathesis

pytestmark = pytest.mark.serve

SETTINGS = hypothesis.settings(
    max_examples=8, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
SMALL = ("steps", "n", "batch_size", "n_iter")


def test_nothing_that_is_sent_is_the_servers_fault(url):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.path.endswith("/events") or (operation.path, operation.method) == ("/v1/keys", "post"):
            continue  # a stream without an end; and a key that is made would be asked of every other test

        @hypothesis.given(case=operation.as_strategy())
        @SETTINGS
        def send(case):
            if isinstance(case.body, dict):
                case.body.update({key: 1 for key in SMALL if isinstance(case.body.get(key), int)})
            answer = case.call(timeout=120)
            seen.add(answer.status_code)
            assert answer.status_code < 500, (case.method, case.path, answer.status_code, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text

        send()
    assert {200, 400, 404} <= seen


@pytest.mark.proof
@pytest.mark.parametrize("phase", ["examples,coverage", "fuzzing", "stateful"])
def test_every_phase_of_schemathesis(url, survived, phase, tmp_path):
    """Its own program: values at the bounds of every field, wrong and right ones at random, and sequences of requests that follow each other."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--mode", "all"]
    command += ["--phases", phase, "--max-examples", "20", "--max-time", "120", "--generation-deterministic", "--no-shrink"]
    command += ["--suppress-health-check", "all", "--request-timeout", "120", "--no-color", "--warnings", "off"]
    command += ["--exclude-path-regex", "/events$", "--exclude-path", "/v1/keys"]  # without an end; locks the others out
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)  # it leaves a folder of its own there
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    cases = int(re.search(r"(\d+) generated", found.stdout)[1])
    assert cases > 100, found.stdout[-2000:]
    survived(f"schemathesis, {phase.replace(',', ' and ')}: right and wrong requests", "no answer of 500 or above", cases)
