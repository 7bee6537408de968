"""perfusion.convert.layouts and .layers: checkpoints that are none of the known layouts, or do not fit the pipeline."""

import pytest
import torch

from perfusion.convert import ConversionError, convert, layers
from tests.perfusion.checkpoints import Truth, chendaryen, package, save
from tests.perfusion.tiny import tiny_sd


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture
def truth(pipe):
    return Truth(pipe)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c.update(embed_params=None), "embed_params is None: the word's embedding was not saved"),
        (lambda c: c.update(embed_params=torch.zeros(1, 512)), r"embed_params must be .* shape \(1, 16\) .*got torch.float32 \(1, 512\)"),
        (lambda c: c["key_value_params"].pop(), "has 7 entries, and .* needs 8: a key and a value output per layer"),
        (lambda c: c.update(key_value_params=3), "must be a list of pairs"),
        (lambda c: c["key_value_params"][0].__setitem__(1, torch.zeros(1, 9)), r"widths \[9, 8, 8, 16\] are not those of"),
        (lambda c: c["key_value_params"][0].__setitem__(1, torch.full((1, 8), float("nan"))), "o[*] holds NaN or infinity"),
        (lambda c: c["key_value_params"][0].__setitem__(0, torch.zeros(1, 768)), r"i[*] must be .* shape \(1, 16\)"),
        (lambda c: [pair[0].zero_() for pair in c["key_value_params"]], "never trained"),
        (lambda c: c.update(C_inv=torch.zeros(3, 3)), r"C_inv must be a floating point tensor of shape \(16, 16\)"),
        (lambda c: c.update(C_inv=-torch.eye(16)), "energy .* is not positive"),
        (lambda c: c.update(C_inv=torch.zeros(1).expand(10**9, 10**9)), "C_inv must be"),
        (lambda c: c.update(C_inv=torch.zeros(16, 16, dtype=torch.int32)), "C_inv must be .*int32"),
        (lambda c: c.update(C_inv=torch.eye(16).to_sparse()), "C_inv must be"),
        (lambda c: c.pop("C_inv"), "holds no C.-1"),
        (lambda c: c.update(embed_params=30 * torch.ones(1, 16).cumsum(1)), "similarity to i[*] is .*trained with another text encoder"),
    ],
)
def test_packages_that_do_not_fit_are_refused(pipe, truth, tmp_path, edit, message):
    content = package(truth)
    edit(content)
    with pytest.raises(ConversionError, match=message):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c["target_output"].popitem(), "once for each of 4 layers, but for mid_block.* it is there 0 times"),
        (lambda c: c["target_output"].update({"input_blocks.9.attn2.to_k.target_output": torch.zeros(77, 8)}), "is there for 5 layers"),
        (lambda c: c.update(target_output={k: v[:50] for k, v in c["target_output"].items()}), r"must be .* shape \(77, 8\) .*\(50, 8\)"),
        (lambda c: c.update(embedding=3), "embedding and target_output must be dictionaries"),
        (lambda c: c["embedding"].update(string_to_param={}), "must hold one placeholder word, it holds 0"),
        (lambda c: c["embedding"].update(string_to_param={"*": torch.zeros(3, 16)}), "has 3 embeddings .num_vectors_per_token"),
        (lambda c: c["embedding"].update(initializer_words=None), "does not say its superclass"),
        (lambda c: c.update(target_input=torch.ones(768)), r"target_input must be .*\(16\)"),
    ],
)
def test_position_checkpoints_that_do_not_fit_are_refused(pipe, truth, tmp_path, edit, message):
    content = chendaryen(truth)
    edit(content)
    with pytest.raises(ConversionError, match=message):
        convert(save(tmp_path, content), pipe, name="my-teddy")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weights": 1}, "not a checkpoint of a known port; at its top it holds: 'weights'. Known are lucidrains"),
        ([1], "at its top it holds: list"),
        ({"a.ema_concept_text_encs": torch.zeros(1, 16)}, "must hold one embedding wrapper's 'concepts', it holds 0"),
    ],
)
def test_other_content_is_refused(pipe, tmp_path, content, message):
    with pytest.raises(ConversionError, match=message):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


def test_original_names_of_stable_diffusion():
    """Spot checks against the published layout of v1 checkpoints."""
    for layer, original in {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2": "input_blocks.1.1.transformer_blocks.0.attn2",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2": "input_blocks.8.1.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.attn2": "middle_block.1.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2": "output_blocks.3.1.transformer_blocks.0.attn2",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2": "output_blocks.11.1.transformer_blocks.0.attn2",
    }.items():
        assert list(layers._original_name(layer, 2)) == [original]
    assert list(layers._original_name("encoder.cross", 2)) == []
    assert list(layers._original_name("other_block.attentions.0.attn2", 2)) == []
    assert list(layers._original_name("down_blocks.0.attentions.0.transformer_blocks.0.attn2", [1, 2])) == []
