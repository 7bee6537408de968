"""perfusion.unet_graphs: what is recorded, when a recording is replayed, and when it must not be.

Where there is no GPU, a graph is the list of operators on the very tensors that were seen: as in a CUDA graph, numbers are constants
of it, and it writes its results where it wrote them first.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perfusion import Request, unet_graphs
from perfusion.base import cross_attention_layers
from tests.kernels.tolerance import as_run, assert_same_run
from tests.perfusion.editing import attached_with_two, draw

pytestmark = pytest.mark.models

LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1


class Tape(TorchDispatchMode):
    """The operators of a run, on the very tensors that they had."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                for place, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                    if isinstance(place, torch.Tensor) and place.data_ptr() != new.data_ptr():
                        place.copy_(new)

    def reset(self):
        self.calls = None


class TapeRecorder:
    kind = "cpu"

    def record(self, run, device):
        run()
        with torch.inference_mode(False), torch.no_grad(), Tape() as tape:
            return tape, run()

    def memory(self, device):
        return 0


@pytest.fixture
def handle(pipe):
    with attached_with_two(pipe) as handle:
        handle._engine.fast_path.by_index = True  # as on a device
        yield handle


@pytest.fixture
def graphs(handle):
    handle._engine.use_graphs(TapeRecorder())
    return handle._engine._graphs


PROMPTS = [
    "a <teddy> on a beach",
    "a <teapot:0.5> in the snow",
    Request("a <teddy> and a <teapot>", bias=0.1),
    Request("a <teapot>", temperature=0.9, gate="word"),
]


@pytest.mark.numeric
def test_one_graph_serves_all_prompts_concepts_and_settings(pipe, handle):
    expected = [as_run(lambda: draw(pipe, prompt, num_inference_steps=3)) for prompt in PROMPTS]
    handle._engine.use_graphs(TapeRecorder())
    graphs = handle._engine._graphs
    for prompt, image in zip(PROMPTS, expected):
        assert_same_run(draw(pipe, prompt, num_inference_steps=3), image)
    assert (graphs.recordings, graphs.replays) == (1, 12)
    assert "replayed as a graph" in handle.explain()[-1] and handle.memory()["graphs"] > 0
    handle.detach()
    assert "forward" not in vars(pipe.unet)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["regions", "schedule", "no concept"])
def test_what_a_prompt_makes_anew_is_copied_to_where_the_graph_reads(pipe, handle, kind):
    prompts = {
        "regions": [Request("a <teddy> and a <teapot>", regions={"teddy": mask}) for mask in (LEFT, 1 - LEFT)],
        "schedule": [Request(f"a <{name}>", bias=biases) for name, biases in (("teddy", [0.0, 0.3, 0.6]), ("teapot", [0.5, 0.1, 0.2]))],
        "no concept": ["a cat", "a dog on a beach"],
    }[kind]
    expected = [as_run(lambda: draw(pipe, prompt, num_inference_steps=3)) for prompt in prompts]
    assert not torch.allclose(*(each.value for each in expected), atol=1e-3)
    handle._engine.use_graphs(TapeRecorder())
    for prompt, image in zip(prompts, expected):
        assert_same_run(draw(pipe, prompt, num_inference_steps=3), image)
    assert handle._engine._graphs.recordings == 1


def test_each_count_of_rows_and_size_has_a_graph_and_few_are_kept(pipe, graphs, monkeypatch):
    monkeypatch.setattr(unet_graphs, "MOST", 2)
    draw(pipe, ["a <teddy>"] * 4, num_inference_steps=1)  # as many slots as are ever needed here
    for options in (dict(height=16, width=16), dict(height=24, width=16), dict(height=16, width=16)):
        draw(pipe, ["a <teddy>", "a cat"], num_inference_steps=2, **options)
    assert graphs.recordings == 3 and len(graphs) == 2
    draw(pipe, ["a <teddy>"] * 4, num_inference_steps=1)  # was dropped: recorded anew
    assert graphs.recordings == 4 and len(graphs) == 2


def changes():
    def weights(pipe):
        pipe.unet.conv_in.weight = torch.nn.Parameter(1.5 * pipe.unet.conv_in.weight, requires_grad=False)

    def in_place(pipe):
        pipe.unet.conv_in.weight.mul_(1.5)

    def freeu(pipe):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)

    def module(pipe):
        pipe.unet.conv_in = torch.nn.Sequential(pipe.unet.conv_in, torch.nn.Tanh())

    def processor(pipe):
        class Halved(type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor)):
            def __call__(self, *args, **kwargs):
                return super().__call__(*args, **kwargs) / 2

        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Halved()

    return [weights, in_place, freeu, module, processor]


@pytest.mark.numeric
@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_a_changed_unet_is_never_drawn_with_an_old_graph(pipe, handle, graphs, change):
    before = draw(pipe, "a <teddy>", num_inference_steps=2)
    change(pipe)
    after = draw(pipe, "a <teddy>", num_inference_steps=2)
    assert graphs.recordings == (1 if change.__name__ == "in_place" else 2)
    graphs.closed, own = "no graph in this test", graphs.remove
    own()
    assert_same_run(after, as_run(lambda: draw(pipe, "a <teddy>", num_inference_steps=2)))
    assert not torch.allclose(after, before, atol=1e-4)


@pytest.mark.numeric
def test_lora_is_followed_through_its_whole_life(pipe, handle):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)

    def steps():
        pipe.unet.add_adapter(config, "one")
        yield
        pipe.unet.set_adapters("one", 0.3)
        yield
        pipe.unet.disable_adapters()
        yield
        pipe.unet.enable_adapters()
        yield
        pipe.unet.fuse_lora()
        yield

    torch.manual_seed(0)
    handle._engine.use_graphs(TapeRecorder())
    graphs, seen = handle._engine._graphs, [draw(pipe, "a <teddy>", num_inference_steps=1)]
    for _ in steps():
        found = draw(pipe, "a <teddy>", num_inference_steps=1)
        count, graphs._recorder.kind = graphs.recordings, "none"
        assert_same_run(found, as_run(lambda: draw(pipe, "a <teddy>", num_inference_steps=1)))
        graphs._recorder.kind = "cpu"
        assert "without a graph" in handle.explain()[-1]
        seen.append(found)
    assert count == 6 and all(not torch.allclose(*pair, atol=1e-5) for pair in zip(seen[:-1], seen[1:-1]))  # fused, it draws as before


def test_what_no_graph_can_stand_for_runs_as_it_is_and_says_why(pipe, handle, graphs):
    latents, encodings = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)

    def reason():
        pipe.unet(latents, 5, encodings)
        return graphs.reason

    assert reason() == "gradients are enabled"
    with torch.no_grad():
        assert reason() is None
        pipe.unet.train()
        assert reason() == "the UNet is in training mode"
        pipe.unet.eval()
        watching = pipe.unet.conv_in.register_forward_hook(lambda *all: None)
        assert reason() == "a Conv2d has hooks, which a replay would not call"
        watching.remove()
        pipe.unet(latents, 7.0, encoder_hidden_states=encodings), pipe.unet(latents, timestep=7, encoder_hidden_states=encodings)
        assert graphs.reason is None and not torch.equal(pipe.unet(latents, 3, encodings).sample, pipe.unet(latents, 900, encodings).sample)
    cross_attention_layers(pipe.unet)["mid_block.attentions.0.transformer_blocks.0.attn2"].set_processor(type("Own", (), {"__call__": lambda *a: a[2]})())
    assert graphs.replays > 0


@pytest.mark.numeric
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_pictures_with_and_without_graphs_are_the_same(pipe):
    pipe = pipe.to("cuda")
    prompts = [*PROMPTS, Request("a <teddy> and a <teapot>", regions={"teddy": LEFT}), Request("a <teddy>", bias=[0.0, 0.3]), "a cat"]

    def pictures(kept, **options):
        with attached_with_two(pipe, **options) as handle:
            found = [kept(lambda: draw(pipe, prompt, num_inference_steps=3)) for prompt in prompts]
            return found, handle._engine._graphs and (handle._engine._graphs.recordings, handle.memory()["graphs"])

    expected, _ = pictures(as_run)
    found, (recordings, nbytes) = pictures(lambda run: run(), graphs=True)
    for image, same in zip(expected, found):
        assert_same_run(same, image)
    assert recordings == 4 and nbytes > 0
