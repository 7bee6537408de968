"""perfusion serve --ray: two small replicas on this machine draw what one draws alone, and one that is killed loses no picture."""

import functools
import os
import signal
import threading
import time

import httpx
import pytest

pytestmark = pytest.mark.serve

pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

from perfusion.serve import Settings, running  # noqa: E402
from perfusion.serve.deployment import Fleet, RayPool, deployment  # noqa: E402

PICTURES = 4


def test_the_deployment_scales_by_ongoing_drawings_and_never_by_concept(tmp_path):
    settings = Settings(folder=tmp_path, rows=4, grace=7)
    made = deployment(settings, Fleet(least=2, most=9, gpus=1))._bound_deployment
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 9, 4)
    assert made.max_ongoing_requests == 6 and made._deployment_config.graceful_shutdown_timeout_s == 7
    assert made.ray_actor_options["num_gpus"] == 1
    own = made.init_args[0]
    assert own.store == settings.store_url and own.devices == ("cuda",)
    with pytest.raises(ValueError, match="replicas must be"):
        Fleet(least=3, most=2)


def draw(url, seed, found):
    request = {"prompt": "a red circle", "seed": seed, "steps": 30, "size": "auto"}
    answer = httpx.post(f"{url}/v1/images/generations", json=request, timeout=300)
    found[seed] = (answer.status_code, answer.json()["data"][0]["b64_json"] if answer.status_code == 200 else answer.text)


def replicas():
    """Processes of replicas that this test's Ray has started."""
    return [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::ServeRepl")]


@pytest.mark.proof
def test_a_replica_that_is_killed_loses_no_picture(tmp_path, survived):
    """And all pictures are those of their seeds, whichever replica drew them."""
    settings = Settings(folder=tmp_path, port=0, rows=2, train=False, devices=("cpu",), timeout=280.0)
    with running(settings, pool=functools.partial(RayPool, fleet=Fleet(least=2, most=2))) as url:
        alone = {}
        for seed in range(PICTURES):
            draw(url, seed, alone)
        together = {}
        threads = [threading.Thread(target=draw, args=(url, seed, together)) for seed in range(PICTURES)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        victims = replicas()
        assert len(victims) == 2
        os.kill(victims[0].pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        metrics = httpx.get(f"{url}/metrics", timeout=120).text
    assert {seed: status for seed, (status, _) in together.items()} == dict.fromkeys(range(PICTURES), 200), together
    assert together.keys() == alone.keys()
    for seed in range(PICTURES):
        assert abs(pixels(together[seed][1]) - pixels(alone[seed][1])).max() <= 3  # rows of other batches: rounding
    assert "restart" in metrics
    survived("`kill -9` of a replica of Ray Serve in mid-picture", f"all {len(together)} pictures drawn, with their seeds, by the other")


def pixels(text):
    import base64
    import io

    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)
