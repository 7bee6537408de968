"""The page's client and the server: what the page sends, the server takes, and what it answers, the page can show."""

import base64
import io

import pytest
from PIL import Image

from perfusion.studio.client import Client, ServerError
from perfusion.studio.painting import BOXES, box_mask, png
from tests.serve.test_jobs import pictures

pytestmark = pytest.mark.serve


@pytest.fixture
def client(url):
    return Client(url)


def test_everything_that_the_page_asks_for(client, world, tmp_path):
    """One walk, as a visitor's: upload, look, draw, combine, train with masks, take away, delete."""
    (base,) = client.bases()
    for name in ("cup", "cat"):
        if name not in [concept["name"] for concept in client.concepts()]:
            assert client.upload(world / f"{name}.safetensors")["name"] == name
    found = client.concept("cup")
    assert found["superclass"] == "cup" and found["models"] == [base["id"]] and found["bytes"] == len(client.concept_file("cup"))
    assert client.concept_file("cup") == (world / "cup.safetensors").read_bytes()
    request = {"prompt": "a <cup>", "seed": 3, "steps": 6, "guidance_scale": 6.0, "strength": 0.8, "model": base["id"]}
    events = list(client.watch_drawing(request, 2))
    kinds = [event.kind for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert all(0 < event.data["step"] < event.data["steps"] == 6 for event in events[:2])
    assert {Image.open(io.BytesIO(event.picture)).format for event in events} == {"PNG"} and events[-1].data["seed"] == 3
    drawn = client.draw({**request, "beta": 0.6, "negative_prompt": "a cat", "n": 2})
    assert [seed for _, seed in drawn] == [3, 4] and all(Image.open(io.BytesIO(data)).size for data, _ in drawn)
    box, mask = BOXES["left and right"][0], png(box_mask(BOXES["left and right"][1], (32, 32)))
    uses = [{"name": "cup", "strength": 0.9, "region": {"box": list(box)}},
            {"name": "cat", "strength": 0.9, "region": {"mask": base64.b64encode(mask).decode()}}]  # fmt: skip
    both = {"prompt": "a <cup> and a <cat>", "seed": 1, "steps": 2, "guidance_scale": 6.0, "concepts": uses}
    assert [event.kind for event in client.watch_drawing(both, 0)] == ["image_generation.completed"]
    sent = [(name.rpartition("/")[2], data) for _, (name, data) in pictures()]
    whole = [png(Image.new("L", Image.open(io.BytesIO(data)).size, 255)) for _, data in sent]
    job = client.train(sent, whole, name="pagecat", superclass="cat", steps=4, batch_size=2, preview_every=2, seed=0, flip=0.5)
    events = list(client.watch_job(job["id"]))
    assert events[-1].kind == "succeeded", events[-1].data
    assert any(event.kind == "preview" and Image.open(io.BytesIO(event.picture)).size for event in events)
    assert job["id"] in [each["id"] for each in client.jobs()] and client.concept("pagecat")["superclass"] == "cat"
    client.delete("pagecat")
    with pytest.raises(ServerError, match=r"pagecat.*[.]$") as refused:
        client.concept("pagecat")
    assert refused.value.status == 404


def test_refusals_of_the_server_are_sentences(client, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ServerError) as refused:
        client.upload(tmp_path / "bad.safetensors")
    assert refused.value.status == 400 and str(refused.value).endswith(".") and len(str(refused.value)) > 20
    with pytest.raises(ServerError) as refused:
        list(client.watch_drawing({"prompt": "a <nobody>", "seed": 1, "steps": 2}))
    assert "nobody" in str(refused.value) and refused.value.status in (400, 404)
