"""Fuzzing of the HTTP surface from its own OpenAPI document: whatever is sent, no answer is a fault of the server."""

import hypothesis
import pytest
import schemathesis


@pytest.fixture
def schema(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


lazy = schemathesis.pytest.from_fixture("schema").exclude(path_regex="events$").exclude(path_regex="^/v1/keys", method="POST")
# a key that is made would be asked of every other test


@lazy.parametrize()
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_nothing_that_is_sent_is_the_servers_fault(case):
    if case.body.__class__ is dict:
        case.body.update({key: 1 for key in ("steps", "n", "batch_size", "n_iter") if isinstance(case.body.get(key), int)})
    answer = case.call(timeout=120)
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
