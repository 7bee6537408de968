"""Concepts, keys and namespaces over HTTP; what is kept of files that are not what they say: nothing."""

import dataclasses
import hashlib
import json

import httpx
import pytest
import torch

from perfusion.concept import Concept
from perfusion.serve import running
from perfusion.serve.store import DamagedFile, Store
from tests.stand_in import save_concept

pytestmark = pytest.mark.serve


def upload(http, data, **form):
    return http.post("/v1/concepts", files={"file": data}, data=form)


def test_the_life_of_a_concept(http, world):
    data = (world / "teapot.safetensors").read_bytes()
    made = upload(http, data, name="my-pot")
    assert made.status_code == 201, made.text
    concept = made.json()
    assert concept["id"] == hashlib.sha256(data).hexdigest() and concept["superclass"] == "teapot" and concept["models"] == ["toybox"]
    assert http.get("/v1/concepts/my-pot").json() == concept
    assert concept in http.get("/v1/concepts").json()["data"]
    assert http.get("/v1/concepts/my-pot/file").content == data
    again = upload(http, data, name="my-pot")
    assert again.status_code == 409 and again.json()["error"]["code"] == "name_taken"
    drawn = http.post("/v1/images/generations", json={"prompt": "a <my-pot>", "steps": 2})
    assert drawn.status_code == 200
    assert http.delete("/v1/concepts/my-pot").json()["deleted"]
    for answer in (http.get("/v1/concepts/my-pot"), http.delete("/v1/concepts/my-pot"), http.get("/v1/concepts/my-pot/file")):
        assert answer.status_code == 404
    assert http.post("/v1/images/generations", json={"prompt": "a <my-pot>", "steps": 2}).status_code == 404


def test_nothing_is_kept_of_what_is_no_concept_for_these_models(http, world, tmp_path, survived):
    data = (world / "cup.safetensors").read_bytes()
    save_concept(tmp_path / "foreign.safetensors", "teddy", width=24)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    before = http.get("/v1/concepts").json()
    wrongs = (
        b"", b"PK\x03\x04 a pickle", data[:-1], data + b"x", data[:100], len(header).to_bytes(8, "little") + header,
        (tmp_path / "foreign.safetensors").read_bytes(), torch.zeros(3).numpy().tobytes(), bytes(900_000),
    )  # fmt: skip
    for wrong in wrongs:
        answer = upload(http, wrong)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "file", answer.text
    assert upload(http, data, name="../etc").status_code == 400
    assert http.get("/v1/concepts").json() == before
    for path in ("..%2f..%2fstate.sqlite", "%2e%2e", "A", "a" * 40):
        assert http.get(f"/v1/concepts/{path}/file").status_code in (400, 404)
    survived("files that are no concept, or for another model", "400; nothing is kept", len(wrongs))


def test_namespaces_scopes_and_quotas(settings_of, world, tmp_path):
    """Each key has its own teddy, sees its own concepts, and may do what its scopes say."""
    with running(settings_of(tmp_path / "state", queue_per_key=5)) as url, httpx.Client(base_url=url, timeout=120) as http:
        made = http.post("/v1/keys", json={"name": "root", "scopes": ["admin"]})
        assert made.status_code == 201, "without keys whoever reaches a server on loopback is its admin"
        root = {"authorization": f"Bearer {made.json()['key']}"}
        assert http.get("/v1/models").status_code == 401, "and not any more"
        assert http.get("/v1/models", headers={"authorization": "Bearer pk-wrong"}).status_code == 401

        def key(name, *scopes, **more):
            answer = http.post("/v1/keys", json={"name": name, "scopes": list(scopes), **more}, headers=root)
            return {"authorization": f"Bearer {answer.json()['key']}"}

        alice, bob, guest = key("alice", "draw", "upload", concepts=2), key("bob", "draw", "upload"), key("guest", "draw")
        for who, file in ((alice, "teddy"), (bob, "cup")):
            sent = http.post("/v1/concepts", files={"file": (world / f"{file}.safetensors").read_bytes()}, data={"name": "thing"}, headers=who)
            assert sent.status_code == 201
        body = {"prompt": "a <thing>", "steps": 3, "seed": 1}
        drawn = [http.post("/v1/images/generations", json=body, headers=who) for who in (alice, bob, guest)]
        assert [answer.status_code for answer in drawn] == [200, 200, 404]
        assert drawn[0].json()["data"] != drawn[1].json()["data"], "one name, two concepts"
        never = http.post("/v1/images/generations", json={**body, "n": 6}, headers=alice)
        assert never.status_code == 400 and never.json()["error"]["param"] == "n", "what can never be taken is not told to come back"
        secret = Concept.load(world / "teddy.safetensors")
        for name in (secret.name, "c" + hashlib.sha256((world / "teddy.safetensors").read_bytes()).hexdigest()[:31]):
            assert http.post("/v1/images/generations", json={**body, "prompt": f"a <{name}>"}, headers=guest).status_code == 404

        many = {"file": (world / "cat.safetensors").read_bytes()}
        assert [http.post("/v1/concepts", files=many, data={"name": name}, headers=alice).status_code for name in "ab"] == [201, 429]
        for answer in (
            http.post("/v1/concepts", files=many, headers=guest), http.delete("/v1/concepts/thing", headers=guest),
            http.get("/v1/keys", headers=alice), http.get("/v1/jobs", headers=alice), http.get("/v1/concepts?namespace=alice", headers=bob),
        ):  # fmt: skip
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "scope"
        assert len(http.get("/v1/concepts?namespace=alice", headers=root).json()["data"]) == 2
        assert http.delete("/v1/keys/alice", headers=root).status_code == 200
        assert http.get("/v1/models", headers=alice).status_code == 401
        kept = (tmp_path / "state" / "state.sqlite").read_bytes() + (tmp_path / "state" / "state.sqlite-wal").read_bytes()
        assert bob["authorization"].removeprefix("Bearer ").encode() not in kept

    assert settings_of(tmp_path / "state", host="0.0.0.0").loopback is False
    with pytest.raises(ValueError, match="there is no key. Make one first: perfusion keys"):
        with running(settings_of(tmp_path / "none", host="0.0.0.0")):
            pass


def test_a_damaged_file_is_never_served(tmp_path):
    store = Store(str(tmp_path / "files"))
    digest = store.put(b"what was kept")
    assert store.get(digest) == b"what was kept" and store.digests() == [digest]
    (path,) = (tmp_path / "files").rglob("*.safetensors")
    for wrong in (b"what was kep", b"", b"what was kept?"):
        path.write_bytes(wrong)
        with pytest.raises(DamagedFile):
            store.get(digest)
    store.put(b"what was kept")  # which mends it
    assert store.get(digest) == b"what was kept"
    store.remove(digest)
    with pytest.raises(DamagedFile):
        store.get(digest)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        store.get("../" + digest[3:])


def test_a_store_may_be_any_file_system():
    store = Store("memory://concepts-of-a-test")
    digest = store.put(b"data")
    assert store.get(digest) == b"data" and store.digests() == [digest]


def test_a_full_disk_keeps_nothing_half(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    store = Store(str(tmp_path / "files"))
    monkeypatch.setattr("perfusion.serve.store.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        store.put(b"data")
    assert store.digests() == []


def test_settings_say_what_is_wrong(settings_of, tmp_path):
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        settings_of(tmp_path, rows=0)
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got 0"):
        settings_of(tmp_path, timeout=0)
    with pytest.raises(ValueError, match="without : and /"):
        dataclasses.replace(settings_of(tmp_path), models={"a/b": "toybox"})
