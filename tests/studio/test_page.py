"""The page as people use it: by keyboard and mouse, on a narrow screen, with a server that refuses; and nothing is asked of the internet."""

import io
import threading
import time
import zipfile
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageColor, ImageDraw

from tests.studio.conftest import Studio, free_port, shot
from tests.studio.stand_in_server import Refusal, StandIn

TABS = ("Draw", "Train", "Concepts", "Strips", "Combine")


@pytest.fixture(scope="module")
def server():
    with StandIn(pause=0.25) as started:
        yield started


@pytest.fixture(scope="module")
def studio(chromium, server):
    found = Studio(chromium, server.address)
    yield found
    found.close()


@pytest.fixture
def tab(studio, server):
    server.refuse, server.held = None, False
    server.seen.clear()
    server.concepts.pop("mycat", None)
    found = studio.open(shows="teddy")
    yield found
    found.close()


def requests(server, kind="draw"):
    return [body for what, body in server.seen if what == kind]


def see(tab, text):
    tab.get_by_text(text).first.wait_for()


def uploaded(tab, file, shown):
    """Give a file to the place for concepts, which takes the next one once it is empty again."""
    tab.locator("#upload input[type=file]").set_input_files(file)
    see(tab, shown)
    tab.locator("#upload [data-testid=status-tracker].hide").wait_for(state="attached")
    tab.locator("#upload input[type=file]").wait_for(state="attached")


def until(tab, reached, what):
    """Look every 100 ms, for half a minute."""
    for _ in range(300):
        if reached():
            return
        tab.wait_for_timeout(100)
    raise AssertionError(f"waited in vain until {what}")


def paint(tab, editor, start, end, over=None):
    """A stroke, in parts of the editor's canvas, seen on it. over: the colour that it goes over, once the canvas shows that."""
    canvas = tab.locator(f"#{editor} canvas").first
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    boxes = [None]

    def settled():
        boxes.append(canvas.bounding_box())
        return len(boxes) > 5 and all(box == boxes[-1] for box in boxes[-5:])

    def middle():
        """The pixel halfway between the ends."""
        image = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
        return image.getpixel(tuple(int(size * (a + b) / 2) for size, a, b in zip(image.size, start, end)))

    def alike(one, other):
        return all(abs(a - b) < 9 for a, b in zip(one, other))

    def painted():
        tab.mouse.move(*points[0])
        tab.mouse.down()
        tab.mouse.move(*points[1], steps=12)
        tab.mouse.up()
        tab.mouse.move(*(each - 30 for each in points[0]))  # the brush's own outline, out of the way
        tab.wait_for_timeout(300)
        return not alike(middle(), before)

    if over is not None:
        until(tab, lambda: alike(middle(), over), f"the canvas shows {over}")
    until(tab, settled, "the canvas has its size")
    points = [(boxes[-1]["x"] + boxes[-1]["width"] * x, boxes[-1]["y"] + boxes[-1]["height"] * y) for x, y in (start, end)]
    before = middle()
    until(tab, painted, "the stroke is seen")


def test_draws_by_keyboard_alone_and_shows_the_picture_as_it_comes(tab, server):
    for _ in range(20):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.placeholder || ''").startswith("a photo"):
            break
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "where one is on the page is seen"
    tab.keyboard.type("a <teddy> & a hat")
    server.held = True
    tab.keyboard.press("Enter")
    for step in ("Step 6 of 24", "Step 12 of 24", "Step 18 of 24"):
        server.go_on()
        see(tab, step)
    server.go_on()
    see(tab, "Seed ")
    tab.locator("#gallery img").first.wait_for()
    shown = tab.locator("#picture img").bounding_box()
    assert shown["width"] == shown["height"] > 300, "a picture of 96 pixels is shown as large as its column"
    (sent,) = requests(server)
    assert sent["prompt"] == "a <teddy> & a hat" and sent["stream"] and sent["partial_images"] == 3 and "beta" not in sent
    assert (sent["model"], sent["steps"], sent["guidance_scale"]) == ("toybox", 24, 2.5), "what the server says suits the model"
    shot(tab, "draw")


def test_settings_follow_the_model_until_they_are_moved(tab, server):
    tab.get_by_label("Prompt").first.fill("a <teddy>")
    tab.get_by_role("button", name="More").first.click()
    tab.locator("#guidance input[type=number]").fill("3.5")
    tab.locator("#guidance input[type=number]").press("Tab")
    tab.get_by_role("button", name="Connection").click()
    tab.get_by_role("button", name="Connect", exact=True).click()  # fills the lists anew
    see(tab, "answers.")
    tab.get_by_role("button", name="Draw", exact=True).click()
    see(tab, "Seed ")
    tab.get_by_label("Model").first.click()
    tab.get_by_role("option", name="large").click()
    tab.wait_for_function("document.querySelector('#guidance input[type=number]').value === '6'")
    tab.get_by_role("button", name="Draw", exact=True).click()
    tab.locator("#gallery img").nth(1).wait_for()
    assert [(sent["model"], sent["steps"], sent["guidance_scale"]) for sent in requests(server)] == [("toybox", 24, 3.5), ("large", 40, 6)]


def test_several_pictures_and_a_beta(tab, server):
    tab.get_by_label("Prompt").first.fill("a <teddy>")
    tab.get_by_label("β of the concept's own").uncheck()
    tab.locator("#beta input[type=number]").fill("0.55")
    tab.get_by_role("button", name="More").first.click()
    tab.locator("#count input[type=number]").fill("3")
    tab.get_by_label("Seed").first.fill("7")
    tab.get_by_role("button", name="Draw", exact=True).click()
    see(tab, "Seed 7, 8, 9")
    (sent,) = requests(server)
    assert sent["n"] == 3 and sent["seed"] == 7 and sent["beta"] == 0.55
    assert tab.locator("#gallery img").count() == 3


def test_stop_gives_up_the_picture_at_the_server(chromium):
    with StandIn() as slow:
        slow.held = True
        slow.go_on()
        studio = Studio(chromium, slow.address)
        tab = studio.open(shows="teddy")
        tab.get_by_label("Prompt").first.fill("a <teddy>")
        tab.keyboard.press("Enter")
        see(tab, "Step 6 of 24")
        tab.get_by_role("button", name="Stop").first.click()
        see(tab, "Stopped.")
        assert slow.cancelled.wait(60)
        tab.close()
        studio.close()


@pytest.mark.parametrize(
    ("refusal", "shown"),
    [
        (Refusal(429, "too many pictures wait", "rate_limit_error", retry=7), "Too many pictures wait. Try again in 7 seconds."),
        (Refusal(400, "<img src=x onerror=alert(1)> is no concept"), "<img src=x onerror=alert(1)> is no concept."),
    ],
    ids=("queue", "markup"),
)
def test_refusals_are_sentences(tab, server, refusal, shown):
    server.refuse = refusal
    tab.get_by_label("Prompt").first.fill("a <teddy>")
    tab.keyboard.press("Enter")
    see(tab, shown)
    shot(tab, "refused")


def test_what_is_missing_is_said_before_anything_is_sent(tab, server):
    tab.get_by_role("button", name="Draw", exact=True).click()
    see(tab, "Write a prompt first.")
    tab.get_by_role("tab", name="Train").click()
    tab.get_by_role("button", name="Train", exact=True).click()
    see(tab, "Upload pictures of the thing first.")
    assert not server.seen


def pictures(folder):
    files = []
    for number in range(3):
        image = Image.new("RGB", (300, 200), (80 * number, 200, 120))
        ImageDraw.Draw(image).ellipse((80, 50, 220, 150), fill="brown")
        files.append(folder / f"p{number}.png")
        image.save(files[-1])
    return files


def test_trains_with_a_painted_mask_and_an_uploaded_one(tab, server, tmp_path):
    files = pictures(tmp_path)
    tab.get_by_role("tab", name="Train").click()
    tab.locator("#pictures input[type=file]").set_input_files(files)
    tab.get_by_text("all of it").nth(2).wait_for()
    tab.get_by_role("button", name="Masks").click()
    tab.locator("#pictures button.thumbnail-lg, #pictures .thumbnail-item").nth(1).click()
    paint(tab, "mask-editor", (0.35, 0.5), (0.65, 0.5), over=ImageColor.getrgb("brown"))
    tab.get_by_role("button", name="Keep this mask").click()
    tab.get_by_text("its mask").nth(0).wait_for()
    mask = Image.new("L", (300, 200))
    ImageDraw.Draw(mask).ellipse((80, 50, 220, 150), fill=255)
    mask.save(tmp_path / "p2-masklabel.png")
    tab.locator("#mask-files input[type=file]").set_input_files([tmp_path / "p2-masklabel.png"])
    tab.get_by_text("its mask").nth(1).wait_for()
    shot(tab, "train-masks")
    tab.get_by_placeholder("mycat").fill("mycat")
    tab.get_by_placeholder("cat", exact=True).fill("cat")
    tab.locator("#steps input[type=number]").fill("200")
    tab.locator("#every input[type=number]").fill("20")
    tab.get_by_role("button", name="Train", exact=True).click()
    see(tab, "of 200, loss 0.")
    tab.locator("#preview img").wait_for()
    see(tab, "<mycat> is learned.")
    shot(tab, "trained")
    (sent,) = requests(server, "train")
    assert [Image.open(io.BytesIO(data)).size for data in sent["pictures"]] == [(300, 200)] * 3
    assert (sent["name"], sent["superclass"], sent["steps"], sent["preview_every"]) == ("mycat", "cat", "200", "20")
    whole, painted, uploaded = (Image.open(io.BytesIO(data)).convert("L") for data in sent["masks"])
    assert whole.getextrema() == (255, 255) and uploaded.tobytes() == mask.tobytes()
    width, height = painted.size
    assert width * 200 == height * 300
    assert painted.getpixel((width // 2, height // 2)) == 255 and painted.getpixel((5, 5)) == 0
    assert 0.02 < sum(painted.histogram()[128:]) / (width * height) < 0.4
    tab.get_by_role("tab", name="Concepts").click()
    tab.locator("#concept input").click()
    tab.get_by_role("option", name="mycat").click()
    tab.locator("#facts").get_by_text("<mycat>").wait_for()


def test_a_job_is_cancelled_and_found_again_after_a_reload(chromium, tmp_path):
    with StandIn(pause=0.3) as server:
        studio = Studio(chromium, server.address)
        tab = studio.open(shows="teddy")
        tab.get_by_role("tab", name="Train").click()
        tab.locator("#pictures input[type=file]").set_input_files(pictures(tmp_path))
        tab.get_by_text("all of it").nth(2).wait_for()
        tab.get_by_placeholder("mycat").fill("mycat")
        tab.get_by_placeholder("cat", exact=True).fill("cat")
        tab.get_by_role("button", name="Train", exact=True).click()
        see(tab, "of 400, loss")
        tab.close()  # the job goes on
        tab = studio.open()
        tab.get_by_role("tab", name="Train").click()
        tab.wait_for_function("[...document.querySelectorAll('#jobs input')].some(input => input.value.startsWith('mycat: running'))")
        tab.get_by_role("button", name="Watch").click()
        see(tab, "of 400, loss")
        tab.get_by_role("button", name="Cancel the job").click()
        see(tab, "<mycat> is cancelled; its checkpoint is kept.")
        assert server.jobs["job-0"]["status"] == "cancelled"
        tab.close()
        studio.close()


def test_a_strip_over_strength_and_beta(tab, server):
    tab.get_by_role("tab", name="Strips").click()
    tab.get_by_label("both").check()
    tab.locator("#along input[type=number]").fill("3")
    tab.get_by_role("button", name="Draw the strip").click()
    see(tab, "Seed 0, “a photo of a <teddy>”")
    sent = requests(server)
    assert {(body["strength"], body["beta"]) for body in sent} == {(s, b) for s in (0, 0.75, 1.5) for b in (0.5, 0.7, 0.9)}
    assert {body["seed"] for body in sent} == {0}
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download the strip").click()
    sheet = Image.open(download.value.path()).convert("RGB")
    assert download.value.suggested_filename == "teddy-both.png" and sheet.width > 3 * 96
    darkest = [sheet.getpixel((sheet.width // 6, sheet.height * row // 6)) for row in (1, 5)]
    assert sum(darkest[0]) > sum(darkest[1]), "β grows downwards"
    shot(tab, "strip")


def test_two_concepts_in_painted_regions(tab, server):
    tab.get_by_role("tab", name="Combine").click()
    tab.get_by_label("painted").check()
    paint(tab, "regions", (0.3, 0.3), (0.3, 0.6))
    tab.get_by_role("button", name="Draw both").click()
    see(tab, "Paint where <teapot> is to be, in blue, or choose other regions.")
    assert not requests(server)
    tab.locator("#regions").get_by_label("Color").first.click() if tab.locator("#regions").get_by_label("Color").count() else None
    tab.get_by_label("left and right").check()
    tab.get_by_role("button", name="Draw both").click()
    see(tab, "“a <teddy> next to a <teapot>”")
    (sent,) = requests(server)
    boxes = [(use["name"], use["region"]["box"]) for use in sent["concepts"]]
    assert boxes == [("teddy", [0, 0, 0.5, 1]), ("teapot", [0.5, 0, 1, 1])]
    tab.locator("#shown-regions img").wait_for()
    shot(tab, "combined")


def test_a_concept_is_taken_away_uploaded_and_deleted(tab, server, tmp_path):
    tab.get_by_role("tab", name="Concepts").click()
    see(tab, "Superclass")
    with tab.expect_download() as download:
        tab.locator("#file").click()
    assert download.value.suggested_filename == "teddy.safetensors" and download.value.path().read_bytes() == b"concept teddy"
    with tab.expect_download() as download:
        tab.locator("#archive").click()
    with zipfile.ZipFile(download.value.path()) as found:
        assert found.read("teddy/teddy.safetensors") == b"concept teddy"
        assert "library_name: perfusion-kernels" in found.read("teddy/README.md").decode()
    shot(tab, "concepts")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    tab.locator("#upload input[type=file]").set_input_files(tmp_path / "bad.safetensors")
    see(tab, "The file is not a Perfusion concept: its header cannot be read.")
    (tmp_path / "good.safetensors").write_bytes(b"concept good")
    tab.reload()
    tab.get_by_role("tab", name="Concepts").click()
    tab.locator("#upload input[type=file]").set_input_files(tmp_path / "good.safetensors")
    see(tab, "<good> is there now.")
    tab.locator("#delete").click()
    see(tab, "nothing was deleted")
    assert "good" in server.concepts
    tab.locator("#sure input").check()
    tab.locator("#delete").click()
    see(tab, "<good> is gone.")
    assert server.concepts.keys() == {"teddy", "teapot"}


def test_a_slow_first_answer_does_not_empty_the_lists(chromium, tmp_path, monkeypatch):
    """The page asks as it opens; concepts that are uploaded before the answer is there stay."""
    from perfusion.studio import Client

    own, asks, answered = Client.bases, iter(["the first"]), threading.Event()

    def bases(client):
        if next(asks, None):
            assert answered.wait(120)
        return own(client)

    monkeypatch.setattr(Client, "bases", bases)
    with StandIn() as server:
        server.concepts.clear()
        studio = Studio(chromium, server.address)
        tab = studio.open()
        tab.get_by_role("button", name="Connection").click()
        tab.get_by_role("tab", name="Concepts").click()
        for name in ("teddy", "teapot"):
            (tmp_path / f"{name}.safetensors").write_bytes(f"concept {name}".encode())
            uploaded(tab, tmp_path / f"{name}.safetensors", f"<{name}> is there now.")
            tab.wait_for_function("name => document.querySelector('#concept input').value === name", arg=name)
        answered.set()
        see(tab, "answers.")
        tab.wait_for_timeout(500)
        assert tab.locator("#concept input").input_value() == "teapot", "the lists stay where they are"
        tab.get_by_role("tab", name="Combine").click()
        tab.get_by_role("button", name="Draw both").click()
        see(tab, "“a <teddy> next to a <teapot>”")
        tab.close()
        studio.close()


def test_a_key_is_asked_for_and_typed(chromium):
    with StandIn(key="secret") as server:
        studio = Studio(chromium, server.address)
        tab = studio.open()
        tab.get_by_role("button", name="Connection").click()
        see(tab, "Type your key under Connection.")
        tab.get_by_label("Prompt").first.fill("a <teddy>")
        tab.keyboard.press("Enter")
        tab.get_by_text("Type your key under Connection.").nth(1).wait_for()
        tab.get_by_label("Key").fill("secret")
        tab.keyboard.press("Enter")
        see(tab, "answers.")
        tab.get_by_label("Prompt").first.focus()
        tab.keyboard.press("Enter")
        see(tab, "Seed ")
        assert "secret" not in tab.content()
        tab.close()
        studio.close()


def test_a_server_that_goes_away_is_said(chromium):
    server = StandIn()
    with server:
        studio = Studio(chromium, server.address)
        tab = studio.open(shows="teddy")
    tab.get_by_label("Prompt").first.fill("a <teddy>")
    tab.keyboard.press("Enter")
    see(tab, f"The server at {server.address} does not answer; start one with `perfusion serve`.")
    tab.close()
    studio.close()


def test_starts_where_the_environment_names_a_proxy(monkeypatch):
    pytest.importorskip("gradio", minversion="6")
    from perfusion.studio import Client, launch

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "elsewhere.example")
    launch(Client("http://127.0.0.1:9"), port=free_port(), block=False).close()


def test_nothing_is_wider_than_a_narrow_screen(studio):
    tab = studio.open(width=360, height=740)
    for name in TABS:
        shown = tab.get_by_role("tab", name=name)
        if not shown.count() or not shown.first.is_visible():  # behind the menu of more tabs
            tab.locator(".overflow-menu button").first.click()
            shown = tab.locator(".overflow-dropdown button", has_text=name)
        shown.first.click()
        tab.wait_for_timeout(700)
        until(tab, lambda: tab.evaluate("document.documentElement.scrollWidth") <= 360, f"{name} fits")
        wide = "[...document.querySelectorAll('.form')].filter(form => form.scrollWidth > form.clientWidth + 1).length"
        until(tab, lambda: not tab.evaluate(wide), f"the forms of {name} fit")
        shot(tab, f"narrow-{name.lower()}")
    tab.close()


def test_everything_has_a_name_for_who_cannot_see_it(tab):
    for name in TABS:
        tab.get_by_role("tab", name=name).click()
        tab.wait_for_timeout(500)
        nameless = """() => [...document.querySelectorAll('input:not([type=file]), textarea, button')].filter(each => each.offsetParent !== null
            && !(each.labels?.length || each.ariaLabel || each.getAttribute('aria-labelledby') || each.title || each.innerText.trim()
            || each.closest('label'))).map(each => each.outerHTML.slice(0, 120))"""
        until(tab, lambda: not tab.evaluate(nameless), f"each of {tab.evaluate(nameless)} in {name} has a name")


def test_the_internet_is_asked_nothing(studio, tab):
    """Runs last: of all that the tabs above asked for."""
    time.sleep(0.5)
    assert {urlsplit(url).hostname for url in studio.asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
