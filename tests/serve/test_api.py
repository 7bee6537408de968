"""The HTTP surface of one server, as clients see it: OpenAI's own client first."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib

import httpx
import numpy
import openai
import pytest
from PIL import Image

from perfusion.families import family_by_id
from perfusion.serve.run import running

pytestmark = pytest.mark.serve


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(text):
    return numpy.asarray(picture(text).convert("RGB")).astype(int)


def png(color="red", size=(20, 12), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "png")
    return file.getvalue()


SHORT = {"steps": 3}


@pytest.mark.smoke
def test_five_lines_with_the_openai_client(client, teddy):
    answer = client.images.generate(prompt="a <teddy> on the beach", n=2, size="16x24", extra_body={**SHORT, "seed": 5})
    assert [picture(each.b64_json).size for each in answer.data] == [(16, 24)] * 2
    assert [each.model_extra["seed"] for each in answer.data] == [5, 6]
    assert answer.model_extra["model"] == "toybox" and answer.size == "16x24"
    again = client.images.generate(prompt="a <teddy> on the beach", model="toybox:teddy", size="16x24", extra_body={**SHORT, "seed": 6})
    assert abs(pixels(again.data[0].b64_json) - pixels(answer.data[1].b64_json)).max() <= 2


def test_every_extension(client, teddy):
    plain = dict(prompt="a <bear> and a cat", size="16x16", output_format="webp")
    region = {"mask": base64.b64encode(png("white")).decode()}
    concepts = [{"name": "bear", "concept": "teddy", "strength": [0, 1], "beta": 0.6, "tau": 0.1, "region": region}]
    body = {**SHORT, "seed": 1, "negative_prompt": "a cup", "guidance_scale": 3, "gate": "word", "concepts": concepts}
    first = client.images.generate(**plain, extra_body=body)
    assert picture(first.data[0].b64_json).format == "WEBP"
    box = [{**concepts[0], "region": {"box": [0, 0, 0.5, 1]}}]
    second = client.images.generate(**plain, extra_body={**body, "concepts": box})
    assert abs(pixels(first.data[0].b64_json) - pixels(second.data[0].b64_json)).max() > 2


def test_partial_pictures_are_streamed(client, teddy):
    events = list(client.images.generate(prompt="a <teddy>", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [event.model_extra["step"] for event in events[:2]] == [2, 4]
    whole = client.images.generate(prompt="a <teddy>", extra_body={"steps": 6, "seed": 1})
    assert abs(pixels(events[2].b64_json) - pixels(whole.data[0].b64_json)).max() <= 2


def test_models_and_concepts_are_listed(client, teddy):
    models = {model.id: model for model in client.models.list()}
    assert models["toybox"].model_extra["size"] == "16x16" and models["toybox:teddy"].model_extra["superclass"] == "teddy"
    assert client.models.retrieve("toybox:teddy").id == "toybox:teddy"


def test_models_say_what_suits_them(http):
    """The steps and the guidance of requests without their own: the family's, and no more steps than the server allows."""
    (base,) = (each for each in http.get("/v1/models").json()["data"] if each["kind"] == "base")
    family = family_by_id(base["family"])
    assert (base["steps"], base["guidance_scale"]) == (min(family.steps, 20), family.guidance_scale)
    body = {"prompt": "a cat", "seed": 1}
    plain = http.post("/v1/images/generations", json=body).json()
    said = http.post("/v1/images/generations", json={**body, "steps": base["steps"], "guidance_scale": base["guidance_scale"]}).json()
    assert plain["steps"] == base["steps"] and abs(pixels(plain["data"][0]["b64_json"]) - pixels(said["data"][0]["b64_json"])).max() <= 2


WRONG = [
    ({"prompt": ""}, 400, "prompt", "at least 1 character"),
    ({"size": "17x16"}, 400, "size", "multiples of"),
    ({"size": "large"}, 400, "size", "WIDTHxHEIGHT"),
    ({"size": "4096x4096"}, 400, "size", "at most 4096 pixels"),
    ({"n": 11}, 400, "n", "less than or equal to 10"),
    ({"model": "sd9"}, 404, "model", "there are toybox"),
    ({"response_format": "url"}, 400, "response_format", "b64_json"),
    ({"prompt": "a <unicorn>"}, 404, "prompt", "no concept named 'unicorn'"),
    ({"prompt": "a <teddy:9>"}, 400, "prompt", "between 0 and 4"),
    ({"prompt": "cat " * 100 + "<teddy>"}, 400, "prompt", "beyond the 77 tokens"),
    ({"extra_body": {"steps": 100}}, 400, "steps", "at most 20"),
    ({"extra_body": {"strenght": 1}}, 400, "strenght", "no field"),
    ({"extra_body": {"beta": [0.5, "x"]}}, 400, "beta", ""),
    ({"extra_body": {"tau": -1}}, 400, "tau", ""),
    ({"extra_body": {"concepts": [{"name": "cup"}]}}, 400, "concepts", "does not name <cup>"),
    ({"extra_body": {"concepts": [{"name": "teddy", "region": {"box": [0.5, 0, 0.5, 1]}}]}}, 400, "concepts.0.region", "empty"),
    ({"extra_body": {"concepts": [{"name": "teddy", "region": {"mask": "http://127.0.0.1/x.png"}}]}}, 400, "concepts.0.region", "no address is fetched"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "status", "param", "part"), WRONG, ids=[str(next(iter(case[0].items())))[:40] for case in WRONG])
def test_errors_are_openais(client, teddy, wrong, status, param, part):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**{"prompt": "a <teddy>", **wrong})
    error = caught.value.body
    assert caught.value.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert part in error["message"] and (param is None or error["param"] == param), error
    assert isinstance(caught.value, openai.BadRequestError if status == 400 else openai.NotFoundError)


def test_null_is_as_if_left_out(http):
    body = {"prompt": "a cat", "steps": 2, "seed": 1}
    nulls = dict.fromkeys(("n", "size", "output_format", "negative_prompt", "strength", "concepts", "user", "input_fidelity"))
    plain, null = (http.post("/v1/images/generations", json=each).json() for each in (body, {**body, **nulls}))
    assert abs(pixels(plain["data"][0]["b64_json"]) - pixels(null["data"][0]["b64_json"])).max() <= 2
    assert http.post("/v1/images/generations", json={"prompt": None}).json()["error"]["param"] == "prompt"


def test_what_is_no_request_is_told_so(http):
    for answer, status in [
        (http.post("/v1/images/generations", content=b"{", headers={"content-type": "application/json"}), 400),
        (http.post("/v1/images/generations", content=b"\xff\xfe"), 400),
        (http.post("/v1/images/generations", json=[1]), 400),
        (no_type := http.post("/v1/images/generations", content=b'{"prompt": "a cat"}'), 400),
        (http.get("/v1/images/generations"), 405),
        (http.get("/nowhere"), 404),
        (http.post("/v1/images/generations", json={"prompt": "x" * 2**21}), 413),
        (http.post("/v1/images/generations", content=(b"x" * 2**16 for _ in range(40))), 413),
    ]:
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
    assert "Content-Type: application/json" in no_type.json()["error"]["message"]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # variations, says the client
def test_edits_and_variations(client, teddy):
    edited = client.images.edit(image=("a.png", png()), prompt="a <teddy>", size="16x16", extra_body={**SHORT, "seed": "1", "image_strength": "0.7"})
    listed = client.images.edit(image=[("a.png", png())], prompt="a <teddy>", size="16x16", extra_body={**SHORT, "seed": "1", "image_strength": "0.7"})
    assert abs(pixels(listed.data[0].b64_json) - pixels(edited.data[0].b64_json)).max() <= 2, "a list of one, as OpenAI's own examples have it"
    for images, said in (([("a.png", png()), ("b.png", png())], "got 2"), ([], "got none")):
        with pytest.raises(openai.BadRequestError, match=said):
            client.images.edit(image=images, prompt="a <teddy>")
    clear = png((0, 0, 0, 0), (20, 12), "RGBA")
    masked = client.images.edit(image=("a.png", png()), mask=("m.png", clear), prompt="a <teddy>", size="16x16", extra_body={**SHORT, "seed": "1", "image_strength": "0.7"})
    assert abs(pixels(edited.data[0].b64_json) - pixels(masked.data[0].b64_json)).max() <= 2, "a mask that is clear everywhere is none"
    varied = client.images.create_variation(image=("a.png", png()), n=2, size="16x16", extra_body=SHORT)
    assert len(varied.data) == 2
    with pytest.raises(openai.BadRequestError, match="picture cannot be read"):
        client.images.edit(image=("a.png", b"no picture"), prompt="a cat")


def test_pictures_that_are_bombs_are_not_opened(client):
    for side, message in ((3000, "3000 x 3000 pixels"), (60_000, "more than the 4096 pixels")):
        chunks = [b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
        bomb = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks)
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(image=("a.png", bomb), prompt="a cat")


def test_a1111(http, teddy):
    body = {"prompt": "a <perfusion:teddy:0.8>", "steps": 3, "seed": 4, "width": 16, "height": 16, "cfg_scale": 5, "sampler_name": "Euler a"}
    answer = http.post("/sdapi/v1/txt2img", json=body).json()
    info = json.loads(answer["info"])
    assert picture(answer["images"][0]).size == (16, 16) and info["all_seeds"] == [4]
    again = http.post("/v1/images/generations", json={"prompt": "a <teddy:0.8>", "steps": 3, "seed": 4, "guidance_scale": 5}).json()
    assert abs(pixels(answer["images"][0]) - pixels(again["data"][0]["b64_json"])).max() <= 2
    more = {"init_images": [answer["images"][0]], "denoising_strength": 0.7, "batch_size": 2}
    assert len(http.post("/sdapi/v1/img2img", json={**body, **more}).json()["images"]) == 2
    assert http.get("/sdapi/v1/progress").json()["progress"] == 0
    assert http.get("/sdapi/v1/sd-models").json()[0]["model_name"] == "toybox"
    assert http.post("/sdapi/v1/img2img", json={**body, "init_images": ["/etc/passwd"]}).status_code == 400
    plain = http.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "override_settings": {"sd_model_checkpoint": "toybox"}}).json()
    suited = http.get("/v1/models/toybox").json()
    assert [json.loads(plain["info"])[key] for key in ("steps", "cfg_scale")] == [suited["steps"], suited["guidance_scale"]]
    nowhere = http.post("/sdapi/v1/txt2img", json={**body, "override_settings": {"sd_model_checkpoint": "sd9"}})
    assert nowhere.status_code == 404 and "there are toybox" in nowhere.json()["error"]["message"]


def test_health_and_metrics(http, client, teddy):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready", "models": ["toybox"]}
    assert [http.head(path).status_code for path in ("/health", "/ready")] == [200, 200], "as balancers ask"

    def value(name):
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"perfusion_{name} ")]
        return float(lines[0].split()[1])

    names = ("picture_seconds_count", "first_step_seconds_count", "batch_rows_count")
    before = {name: value(name) for name in names}
    client.images.generate(prompt="a <teddy>", extra_body=SHORT)
    until(lambda: [value(name) - before[name] for name in names] == [1, 1, 3])
    text = http.get("/metrics").text
    for name in ("queue_pictures", "drawing_pictures", "batch_fill", "step_seconds", "refused", "concept_lookups_total", "worker_restarts"):
        assert f"perfusion_{name}" in text, name


def test_pages_of_other_sites_and_names_of_other_hosts_are_refused(http, url):
    for headers in ({"origin": "https://elsewhere.example"}, {"origin": "null"}, {"host": "rebound.example"}):
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers, headers
    assert http.get("/v1/models", headers={"origin": url}).status_code == 200


def test_a_client_that_goes_away_is_drawn_for_no_longer(http, url, survived):
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a cat", "steps": 20, "n": 10, "size": "64x64"}).encode()
    for stream in (False, True):
        before = cancelled(http)
        body = json.dumps({"prompt": "a cat", "steps": 20, "size": "64x64", **({"stream": True} if stream else {"n": 10})}).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (host.encode(), len(body)))
            connection.sendall(body)
            if stream:
                assert connection.recv(1000)
            else:
                until(lambda: drawing(http) > 0)
        until(lambda: drawing(http) == 0)
        assert cancelled(http) > before
    survived("a client vanishes, before its answer and in a stream", "its pictures are drawn no further", 2)


def test_a_slow_client_holds_nobody_up(url, client, survived):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        assert client.images.generate(prompt="a cat", extra_body=SHORT).data
    survived("a client sends half a request and waits", "others are answered meanwhile")


def test_many_at_once_share_batches(http, url, teddy):
    """And a batch's pictures are those of one after another."""
    body = {"prompt": "a <teddy>", "steps": 12, "size": "16x16"}
    found = {}

    def ask(seed):
        found[seed] = http.post("/v1/images/generations", json={**body, "seed": seed}).json()["data"][0]["b64_json"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    before = sums(http)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: sums(http)[0] - before[0] == 12 * 12)  # the report of the last step may come after its picture
    assert sums(http)[1] - before[1] < 12 * 12 / 1.5, "no batches"
    alone = http.post("/v1/images/generations", json={**body, "seed": 7}).json()["data"][0]["b64_json"]
    assert abs(pixels(alone) - pixels(found[7])).max() <= 2


def gauge(http, name):
    return next(float(line.split()[1]) for line in http.get("/metrics").text.splitlines() if line.startswith(f"perfusion_{name} "))


def sums(http):
    return gauge(http, "batch_rows_sum"), gauge(http, "batch_rows_count")


def drawing(http):
    return gauge(http, "drawing_pictures") + gauge(http, "queue_pictures")


def cancelled(http):
    return gauge(http, "cancelled_pictures_total")


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_prompts_are_logged_when_asked_and_never_else(settings_of, tmp_path, caplog):
    for number, asked in enumerate((False, True)):
        caplog.clear()
        with caplog.at_level("INFO", "perfusion.serve"), running(settings_of(tmp_path / str(number), log_prompts=asked)) as url:
            body = {"prompt": "a purple cat", "size": "16x16", "steps": 1}
            assert httpx.post(f"{url}/v1/images/generations", json=body, timeout=120).status_code == 200
        logged = [getattr(record, "fields", {}).get("prompt") for record in caplog.records]
        assert ("a purple cat" in logged) == asked
