"""Documentation runs: the code blocks of every page, README.md first, are executed here.

In a page, all ```python blocks are one program, from top to bottom. In a ```bash block, every `perfusion ...` command is
run and every `make ...` must name a target of the Makefile; other lines are left alone. Blocks run in a folder with
teddy.safetensors, teapot.safetensors and pictures/*.png. The model `toybox` is stood in for by a tiny one with random
weights, and commands that take --steps get two of them: what is checked is that what the page says works, not how good
the pictures are.

A block after the line <!-- not run: REASON --> is left out. The reasons are counted below: there are to be few.
"""

import contextlib
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perfusion import cli, models
from perfusion.captions import everyday_captions
from perfusion.covariance import compute_covariance
from perfusion.serve import Settings, running
from tests.perfusion.tiny import SMALL
from tests.stand_in import save_concept, save_model

pytestmark = pytest.mark.filterwarnings("ignore:the covariance of")  # of few captions, in a tiny model

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "csrc/README.md", ROOT / "integrations/comfyui/README.md"]
ELSEWHERE = {"add-an-operator.md": ROOT / "tests/kernels/test_docs.py"}  # pages with a test of their own
SHORT = {"train": ["--steps", "2"], "generate": ["--steps", "2"], "serve": ["--check", "--port", "0"]}  # the last of equal options counts
SERVER = "http://127.0.0.1:8000"  # pages that name it are given a server of that model
REASONS = {"needs a GPU": 2, "needs a checkpoint": 5}  # how many blocks may say so

BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    """(line number, code) of the blocks of a page that are to be run."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("code")) + 1, found["code"])
        for found in BLOCK.finditer(text)
        if found["language"] == language and found["reason"] is None and page.name not in ELSEWHERE
    ]


def commands(code):
    """The commands of a shell block: lines joined at a backslash, comments and prompts dropped."""
    lines = code.replace("\\\n", " ").splitlines()
    return list(filter(None, (shlex.split(line.removeprefix("$ "), comments=True) for line in lines)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documentation")
    model = save_model(folder / "model", unet=SMALL)
    save_concept(folder / "teddy.safetensors", "teddy", seed=1, unet=SMALL)
    save_concept(folder / "teapot.safetensors", "teapot", seed=2, unet=SMALL)
    (folder / "pictures").mkdir()
    pipe = models.load_pipeline(model)
    compute_covariance(pipe, everyday_captions(300), progress=False).save(model / "covariance.safetensors")
    for number, picture in enumerate(pipe(["a teddy"] * 4, num_inference_steps=1).images):
        picture.save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.fixture
def here(world, monkeypatch, tmp_path_factory):
    """The world, as the working folder and the built-in model."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(models, "TOYBOX", world / "model")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "perfusion-data"))
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path_factory.getbasetemp() / "perfusion-home"))
    return world


def with_blocks(language):
    smoke = {ROOT / "README.md": pytest.mark.smoke}
    return [pytest.param(page, id=str(page.relative_to(ROOT)), marks=smoke.get(page, ())) for page in PAGES if blocks(page, language)]


@pytest.mark.docs
@pytest.mark.parametrize("page", with_blocks("python"))
def test_python(page, here, tmp_path):
    lines = []
    for number, code in blocks(page, "python"):
        lines += [""] * (number - len(lines)) + code.splitlines()
    text = "\n".join(lines[1:]) + "\n"
    with contextlib.ExitStack() as stack:
        if SERVER in text:
            settings = Settings(models={"toybox": str(here / "model")}, folder=tmp_path / "server", port=0)
            text = text.replace(SERVER, stack.enter_context(running(settings)))
        exec(compile(text, str(page), "exec"), {"__name__": "__main__"})  # so that errors name the page's line


@pytest.mark.docs
@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands(page, here):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for number, code in blocks(page, "bash"):
        for name, *arguments in commands(code):
            if name == "make":
                assert set(arguments[:1]) <= set(targets), f"{page.name}:{number}: make {shlex.join(arguments)}"
            if name == "perfusion":
                result = CliRunner().invoke(cli.app, [*arguments, *SHORT.get(arguments[0], [])], prog_name="perfusion")
                assert result.exit_code == 0, f"{page.name}:{number}: perfusion {shlex.join(arguments)}\n{result.output}"


def test_few_blocks_are_not_run():
    found = Counter(match["reason"] for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match["reason"])
    assert set(found) <= set(REASONS), f"reasons are {', '.join(REASONS)}"
    assert all(count <= REASONS[reason] for reason, count in found.items()), found


def test_every_block_is_understood():
    """No mistyped language or mark hides a block from this test."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert {found["language"] for found in BLOCK.finditer(text)} <= {"python", "bash", "text", "c", "cpp"}, page
        marked = sum(found["reason"] is not None for found in BLOCK.finditer(text))
        assert len(re.findall("^<!-- not run", text, re.MULTILINE)) == marked, page
        assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(BLOCK.findall(text)), page


def test_pages_with_their_own_test_have_one():
    for name, test in ELSEWHERE.items():
        assert (ROOT / "docs" / name).exists() and name in test.read_text()


LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


# This test's own tools


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```bash\nmake test\n```\n<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n")
    assert blocks(page, "bash") == [(4, "make test\n")]
    assert blocks(page, "python") == [(12, "x = 1\n")]


def test_commands_are_found():
    code = '# first\n$ perfusion generate "a <teddy>" \\\n    --steps 2  # quick\n\ncd x\n'
    assert commands(code) == [["perfusion", "generate", "a <teddy>", "--steps", "2"], ["cd", "x"]]


def test_errors_name_the_line_of_the_page(tmp_path, here):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\ntext\n```python\n\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        test_python(page, here, tmp_path)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 7)
