"""What the page is made of, without a browser: masks from strokes, cards, and errors as sentences."""

import io
import threading
import zipfile

import pytest
from PIL import Image, ImageDraw

pytest.importorskip("httpx")

from perfusion.studio.answers import Answers  # noqa: E402
from perfusion.studio.card import archive, card  # noqa: E402
from perfusion.studio.client import Client, ServerError, sentence  # noqa: E402
from perfusion.studio.painting import BOXES, COLOURS, box_mask, overlay, painted_mask, region_masks  # noqa: E402
from tests.studio.stand_in_server import Refusal, StandIn  # noqa: E402

SIZE = (40, 20)


def layer(*strokes):
    """A layer of an editor: (colour, box) each."""
    image = Image.new("RGBA", SIZE)
    for colour, box in strokes:
        ImageDraw.Draw(image).rectangle(box, colour)
    return image


def test_strokes_become_masks_of_their_colours():
    painting = {"background": None, "layers": [layer((COLOURS[0], (0, 0, 19, 19)), (COLOURS[1], (25, 0, 30, 19))), None]}
    first, second = region_masks(painting, SIZE)
    assert first.getbbox() == (0, 0, 20, 20) and second.getbbox() == (25, 0, 31, 20)
    almost = "#d04010"  # as a browser's smoothing leaves it
    assert region_masks({"layers": [layer((almost, (0, 0, 5, 5)))]}, SIZE)[0].getbbox() == (0, 0, 6, 6)
    later = {"layers": [layer((COLOURS[0], (0, 0, 19, 19))), layer((COLOURS[1], (0, 0, 9, 19)))]}
    assert [mask.getbbox() for mask in region_masks(later, SIZE)] == [(10, 0, 20, 20), (0, 0, 10, 20)]
    assert region_masks(None, SIZE) == [None, None] and painted_mask({"layers": []}, SIZE) is None
    assert painted_mask(painting, (80, 40)).getbbox() == (0, 0, 62, 40)


def test_the_two_halves_cover_the_picture_and_do_not_overlap():
    for boxes in BOXES.values():
        first, second = (box_mask(box, SIZE) for box in boxes)
        assert all(a + b == 255 for a, b in zip(first.tobytes(), second.tobytes()))


def test_what_is_outside_of_a_mask_is_pale_and_what_is_inside_is_as_it_was():
    picture = Image.new("RGB", SIZE, (200, 30, 30))
    seen = overlay(picture, box_mask((0, 0, 0.5, 1), SIZE))
    assert seen.getpixel((5, 5)) == (200, 30, 30) and min(seen.getpixel((35, 5))) > 180
    assert overlay(picture, None).tobytes() == picture.tobytes()


def test_an_archive_is_what_push_takes():
    concept = {**StandIn.concept("teddy", "teddy"), "author": "A | B\nC"}
    with zipfile.ZipFile(io.BytesIO(archive(concept, b"content", [Image.new("RGB", (8, 8))]))) as found:
        assert sorted(found.namelist()) == ["teddy/README.md", "teddy/gallery.png", "teddy/teddy.safetensors"]
    text = card(concept, with_gallery=False)
    assert "| author | A \\| B C |" in text and "gallery.png" not in text and text.startswith("---\nlibrary_name")


def test_errors_are_sentences():
    assert sentence("  no\nroom ") == "No room." and sentence("Why?") == "Why?"
    with StandIn(key="secret") as server:
        with pytest.raises(ServerError, match=r"Type your key under Connection\.$"):
            Client(server.address).concepts()
        client = Client(server.address).with_key(" secret ")
        assert [concept["name"] for concept in client.concepts()] == ["teddy", "teapot"]
        with pytest.raises(ServerError, match=r"^There is no concept '\.\./x'\.$|not_found|no reason"):
            client.concept("../x")
        server.refuse = Refusal(429, "too many pictures wait", retry=7)
        with pytest.raises(ServerError, match=r"^Too many pictures wait\. Try again in 7 seconds\.$"):
            client.draw({"prompt": "a", "seed": 1})
    with pytest.raises(ServerError, match="does not answer; start one with `perfusion serve`"):
        client.concepts()
    with pytest.raises(ServerError, match="no address of a server"):
        Client("nonsense").concepts()


def test_a_picture_is_given_up_by_breaking_the_connection():
    with StandIn(pause=1.0) as server:
        closes, ended, first = [], [], threading.Event()

        def watch():
            try:
                for _ in Client(server.address).watch_drawing({"prompt": "a", "seed": 1, "steps": 4}, opened=closes.append):
                    first.set()
            except ServerError as error:
                ended.append(error)

        thread = threading.Thread(target=watch)
        thread.start()
        assert first.wait(60)
        closes[0]()
        thread.join(60)
        assert not thread.is_alive() and ended and server.cancelled.wait(60)


def test_a_slow_answer_never_replaces_that_to_a_later_question():
    answers, asked, answer = Answers(), threading.Event(), threading.Event()
    assert answers.choices("concepts") is None

    def slow():
        asked.set()
        assert answer.wait(60)
        return []

    thread = threading.Thread(target=answers.ask, args=("concepts", slow))
    thread.start()
    assert asked.wait(60)
    answers.ask("concepts", lambda: [{"name": "teddy"}])
    answer.set()
    thread.join(60)
    assert not thread.is_alive() and answers.choices("concepts") == [("teddy", "teddy")]
    answers.ask("concepts", list)
    assert answers.choices("concepts") == []
    answers.ask("jobs", lambda: [{"id": "job-0", "name": "mycat", "status": "running", "step": 1, "steps": 2}])
    assert answers.choices("jobs") == [("mycat: running, step 1 of 2", "job-0")]
