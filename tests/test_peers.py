"""tests/peers.py finds a test that passes plain and is lost with perfusion attached, and counts no other."""

import json

import pytest

from tests import peers

TESTS = f"""
import sys
sys.path.append({str(peers.Path(__file__).parents[1])!r})
import importlib.util
spec = importlib.util.spec_from_file_location("tiny", {str(peers.Path(__file__).parent / "perfusion/tiny.py")!r})
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

def drawn():
    pipe = tiny.tiny_sd()
    return pipe, pipe("a cat", num_inference_steps=1, output_type="latent").images

def test_draws():
    assert drawn()[1].shape == (1, 4, 8, 8)

def test_knows_nothing_of_perfusion():
    assert not [name for name in vars(drawn()[0]) if "perfusion" in name]

def test_leaves_the_processors():
    assert not [each for each in drawn()[0].unet.attn_processors.values() if type(each).__name__ == "ConceptAttnProcessor"]

def test_draws_from_encodings_alone():
    pipe = tiny.tiny_sd()
    embeds = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    pipe.text_encoder = pipe.tokenizer = None
    assert pipe(prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1, output_type="latent").images.isfinite().all()

def test_fails_anyway():
    assert False
"""


@pytest.mark.proof  # a run of pytest by itself
def test_lost_tests_are_named(tmp_path, capfd):
    folder = tmp_path / "tests/pipelines/stable_diffusion"
    folder.mkdir(parents=True)
    (folder / "test_stand_in.py").write_text(TESTS, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    assert peers.main([str(tmp_path), "--rows", str(rows), "-p", "no:cacheprovider"]) == 1
    said = capfd.readouterr().out
    assert "attached: 3 of 4 tests that pass plain" in said and "loaded: 2 of 4 tests that pass plain" in said
    lost = [line.rpartition("::")[2] for line in said.splitlines() if line.startswith("  lost: ")]
    assert lost == ["test_knows_nothing_of_perfusion"] * 2 + ["test_leaves_the_processors"]
    row = json.loads(rows.read_text(encoding="utf-8"))
    assert (row["file"], row["passed"], row["failed"], row["skipped"]) == ("stable_diffusion/test_stand_in.py", 4, 1, 0)
    assert peers.table([row])[2] == "| stable_diffusion/test_stand_in.py | 4 | 3 | 2 | 1 | 0 |"


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(SystemExit, match="give a checkout of diffusers"):
        peers.main([str(tmp_path)])


def test_the_page_shows_the_rows_and_nothing_is_lost():
    assert peers.PAGE.read_text(encoding="utf-8") == peers.page(), "docs/pipelines.md is stale: python -m tests.peers --page"
    rows = [json.loads(line) for line in peers.ROWS.read_text(encoding="utf-8").splitlines()]
    assert rows and not any(row["lost"]["attached"] for row in rows)
    # it asks for the very type of the processors, and while a concept is loaded these are ours
    lost = [name.rpartition("::")[2] for row in rows for name in row["lost"]["loaded"]]
    assert set(lost) <= {"test_from_pipe_consistent_forward_pass"}
