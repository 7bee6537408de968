"""The arithmetic of bench/roofline.py: against floors worked out by hand for whole UNets, and against the tensors of the cases."""

import pytest
import torch

from bench import roofline

from . import cases


def over_layers(unet: str, function) -> float:
    """Microseconds of all cross-attention layers."""
    return 1e6 * sum(layer.count * function(layer).floor(roofline.H200) for layer in roofline.UNETS[unet])


def attention(layer: roofline.Layer, rows: int, **edit) -> roofline.Work:
    return roofline.edited_attention(B=rows, N=layer.N, T=77, H=layer.H, d=layer.d, **edit)


CORES = {"sd15": (10.4, 20.9, 83.4, 167), "sd21": (22.5, 44.9, 180, 359), "sdxl": (92.7, 185, 742, 1484)}
LAYERS = {"sd15": (37.8, 74.3, 295, 590), "sd21": (83.3, 166, 664, 1328), "sdxl": (636, 1271, 5084, 10168)}


@pytest.mark.parametrize("unet", roofline.UNETS)
def test_roofline_of_whole_unets(unet):
    """Three digits, for 1, 2, 8 and 16 rows; layers without bias and residual."""
    for rows, core, whole in zip((1, 2, 8, 16), CORES[unet], LAYERS[unet]):
        assert over_layers(unet, lambda x: attention(x, rows)) == pytest.approx(core, rel=5e-3)

        def layer(x, rows=rows):
            return roofline.cross_attention_layer(B=rows, N=x.N, C=x.C, T=77, H=x.H, d=x.d, bias=False, residual=False)

        assert over_layers(unet, layer) == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("unet, expected", [("sd15", 9.6), ("sdxl", 153)])
def test_floor_of_a_models_text_projections(unet, expected):
    """K and V of all layers at once, two rows: bound by the weights."""
    O = 2 * sum(layer.count * layer.C for layer in roofline.UNETS[unet])
    work = roofline.edited_projection(B=2, T=77, D=roofline.TEXT_WIDTHS[unet], O=O)
    assert 1e6 * work.floor() == pytest.approx(expected, rel=5e-3)
    assert max(work.times(roofline.H200), key=work.times(roofline.H200).get) == "bandwidth"


def test_the_core_is_bound_by_memory():
    """Of the time that memory takes, tensor cores need less than half, and exponentials the more the narrower a head is."""
    for d, exponentials in ((40, 0.64), (160, 0.16)):
        times = roofline.edited_attention(B=1, N=10**6, T=77, H=8, d=d).times(roofline.H200)
        assert times["tensor"] / times["bandwidth"] == pytest.approx(0.47, abs=0.01)
        assert times["exponentials"] / times["bandwidth"] == pytest.approx(exponentials, abs=0.01)


def test_the_edit_costs_few_bytes_and_no_tensor_work():
    """Over all layers of SD 1.5 with eight concepts: below 2 %."""
    plain, edited = ([attention(x, 1, J=J) for x in roofline.UNETS["sd15"] for _ in range(x.count)] for J in (0, 8))
    assert 1 < sum(w.bytes for w in edited) / sum(w.bytes for w in plain) < 1.02
    assert [w.tensor for w in edited] == [w.tensor for w in plain] and [w.issued for w in edited] == [w.issued for w in plain]


@pytest.mark.parametrize("d", (40, 64, 80, 160))
def test_tiles_of_80_keys(d):
    """At most 1.04 times the useful products, where tiles of 128 keys and padded heads make it 1.66 to 2.66."""
    work = roofline.edited_attention(B=1, N=4096, T=77, H=8, d=d)
    assert work.issued / work.tensor == pytest.approx(80 / 77)
    assert roofline.edited_attention(B=1, N=4096, T=231, H=8, d=d).issued / work.issued == pytest.approx(240 / 80)


@pytest.mark.parametrize("C, H, expected", [(1280, 8, 0.45), (640, 8, 0.86), (320, 8, 1.55), (320, 5, 0.97)])
def test_absorption_saves_products_in_wide_layers(C, H, expected):
    sizes = dict(B=2, N=256, C=C, T=77, H=H)
    whole, absorbed = roofline.cross_attention_layer(**sizes, d=C // H), roofline.cross_attention_layer(**sizes)
    assert absorbed.tensor / whole.tensor == pytest.approx(expected, abs=0.005)


def test_fusion_saves_the_traffic_of_keys_and_values():
    sizes = dict(B=2, T=77, J=2)
    fused = roofline.fused_edited_attention(**sizes, N=256, D=768, H=8, d=160)
    apart = [roofline.edited_projection(B=2, T=77, D=768, O=1280) for _ in "kv"] + [roofline.edited_attention(**sizes, N=256, H=8, d=160)]
    assert fused.tensor == sum(work.tensor for work in apart)
    assert sum(work.bytes for work in apart) - fused.bytes == 2 * (2 * 2 * 77 * 1280 * 2) + 2 * 77 * 768 * 2  # K, V out and in; e once


def test_float32_is_no_work_for_matrix_instructions():
    half, single = (roofline.edited_attention(B=1, N=64, T=77, H=8, d=40, size=size) for size in (2, 4))
    assert (single.tensor, single.scalar, single.issued) == (0, half.tensor, None) and single.bytes == 2 * half.bytes


@pytest.mark.parametrize("operator", cases.PUBLIC)
def test_a_call_is_read_from_its_tensors(operator):
    """Where all is read: as many bytes as the call's tensors have, gates and tables of unused places left out."""
    case = cases.make(J=2, S=4, dtype=torch.float16)
    arguments = case.arguments(operator)
    results = cases.PUBLIC[operator](**arguments)
    work = roofline.of(operator, arguments)
    results = results if isinstance(results, tuple) else (results,)
    assert work.written == sum(x.numel() * x.element_size() for x in results)

    used = case.index >= 0
    places, slots, rows = used.sum().item(), case.index[used].unique().numel(), used.any(-1).sum().item()
    assert (places, slots, rows) == (4, 3, 3)
    parts = {"index": 1, "gates": places / case.index.numel(), "components": places / case.index.numel()}
    parts |= {"bias": parts["gates"], "temperature": parts["gates"]}
    if operator == "concept_gates":
        parts["encodings"] = rows / len(case.index)
    tables = ("targets", "metric_targets", "outputs", "projected_targets", "key_outputs", "key_targets", "value_outputs", "value_targets")
    parts |= {name: slots / len(case.targets) for name in tables}
    assert work.read == pytest.approx(sum(x.numel() * x.element_size() * parts.get(name, 1) for name, x in arguments.items()))
    assert work.flops > 0 and work.floor() > 0


def test_a_call_without_edit_or_weights():
    case = cases.make(dtype=torch.float16)
    plain = {name: getattr(case, name) for name in ("query", "key", "value")}
    assert roofline.of("edited_attention", plain | {"index": None}) == roofline.edited_attention(B=4, N=17, T=13, H=3, d=8)
    absorbed = {"hidden_states": case.hidden_states, "key": torch.empty(4, 13, 3, 29), "value": None, "query_weight": None}
    alone = roofline.cross_attention_layer(B=4, N=17, C=29, T=13, H=3, bias=False, residual=False)
    assert roofline.of("cross_attention_layer", absorbed) == alone
    with pytest.raises(ValueError, match="one with a model"):
        roofline.of("edited_convolution", plain)
