"""The page over a real server with a tiny model: a visitor's whole way, in a headless Chromium. What it draws is noise; that it draws is not."""

import io

import httpx
import pytest
from PIL import Image

from tests.serve.conftest import settings_of, world  # noqa: F401  (fixtures)
from tests.studio.conftest import Studio, shot
from tests.studio.test_page import paint, pictures, see, uploaded


@pytest.fixture
def address(settings_of, tmp_path):  # noqa: F811
    from perfusion.serve import running

    with running(settings_of(tmp_path / "state")) as url:
        yield url


def test_upload_draw_combine_train_and_take_away(chromium, address, world, tmp_path):  # noqa: F811
    studio = Studio(chromium, address)
    tab = studio.open()
    tab.set_default_timeout(120_000)

    tab.get_by_role("tab", name="Concepts").click()
    for name in ("teddy", "teapot"):
        uploaded(tab, world / f"{name}.safetensors", f"<{name}> is there now.")
        tab.locator("#facts").get_by_text(f"<{name}>").wait_for()
    assert {each["name"] for each in httpx.get(f"{address}/v1/concepts", timeout=120).json()["data"]} == {"teddy", "teapot"}
    with tab.expect_download() as download:
        tab.locator("#file").click()
    assert download.value.path().read_bytes() == (world / "teapot.safetensors").read_bytes()

    tab.get_by_role("tab", name="Draw").click()
    tab.get_by_label("Prompt").first.fill("a <nobody>")
    tab.keyboard.press("Enter")
    see(tab, "nobody")
    shot(tab, "real-refused")
    tab.get_by_label("Prompt").first.fill("a <teddy> on the beach")
    tab.keyboard.press("Enter")
    see(tab, "Seed ")
    tab.locator("#gallery img").first.wait_for()
    seen = httpx.get(tab.locator("#gallery img").first.get_attribute("src"), timeout=120).content
    assert Image.open(io.BytesIO(seen)).convert("L").getextrema() != (0, 0)
    shot(tab, "real-draw")

    tab.get_by_role("tab", name="Combine").click()
    tab.get_by_label("painted").check()
    paint(tab, "regions", (0.3, 0.3), (0.3, 0.6))
    tab.get_by_label("left and right").check()
    tab.get_by_role("button", name="Draw both").click()
    see(tab, "“a <teddy> next to a <teapot>”")
    tab.locator("#both img").wait_for()
    shot(tab, "real-combined")

    tab.get_by_role("tab", name="Train").click()
    tab.locator("#pictures input[type=file]").set_input_files(pictures(tmp_path))
    tab.get_by_text("all of it").nth(2).wait_for()
    tab.get_by_placeholder("mycat").fill("mycat")
    tab.get_by_placeholder("cat", exact=True).fill("cat")
    tab.locator("#steps input[type=number]").fill("10")
    tab.locator("#every input[type=number]").fill("10")
    tab.get_by_role("button", name="Train", exact=True).click()
    see(tab, "<mycat> is learned.")
    shot(tab, "real-trained")
    assert httpx.get(f"{address}/v1/concepts/mycat", timeout=120).json()["superclass"] == "cat"
    metrics = httpx.get(f"{address}/metrics", timeout=120).text
    assert "perfusion_picture_seconds_count" in metrics
    own = ("data:", "blob:", f"http://127.0.0.1:{studio.port}")
    assert all(asked.startswith(own) for asked in studio.asked), "the page asks nobody but its own address"
    tab.close()
    studio.close()
