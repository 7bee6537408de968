"""perfusion.batched_projection and the training step that uses it: the same numbers as calling every layer, or a refusal that says why."""

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters

from perfusion.base import cross_attention_layers, describe_base
from perfusion.batched_projection import BatchedProjection, obstacle
from perfusion.edit import RowSettings
from perfusion.training import session as session_module
from perfusion.training.data import read_pictures
from perfusion.training.session import TrainingSession
from tests.kernels.tolerance import as_run, assert_close, assert_same_run, exactly
from tests.perfusion.learning import covariance_of, settings, write_pictures
from tests.perfusion.tiny import SMALL, tiny_sd, tiny_sdxl

pytestmark = pytest.mark.models

CAPTIONS = ("a {}", "a photo of a {}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("hoist") / "pictures", mask=True)


def session_on(pipe, folder, **changes):
    config = settings(instance_prompts=CAPTIONS, **changes)
    return TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), read_pictures(folder, config, 16))


@contextlib.contextmanager
def called_one_by_one(pipe):
    """A hook on one projection, which does nothing, and for which no weight may be read."""
    layer = next(iter(cross_attention_layers(pipe.unet).values()))
    handle = layer.to_v.register_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


def steps(session, count=2):
    """Loss, gate and gradients of each step."""
    found = []
    for _ in range(count):
        measures = session.train_step()
        found += [torch.tensor(measures.loss), torch.tensor(measures.gate_on_word)]
        found += [parameter.grad.clone() for parameter in session._trained().values()]
    return tuple(found)


def assert_alike(found, expected):
    for mine, other in zip(found, expected, strict=True):
        assert other.value.abs().sum() > 0
        assert_same_run(mine, other)


# The same numbers


@pytest.mark.numeric
@pytest.mark.parametrize(("make", "key_lock"), [(tiny_sd, True), (tiny_sd, False), (tiny_sdxl, True)])
def test_a_step_is_the_one_that_calls_every_layer(folder, make, key_lock):
    pipe = make(dtype=torch.float64)
    with session_on(pipe, folder, key_lock=key_lock) as session:
        assert session.obstacle is None
        hoisted = steps(session)

    def one_by_one():
        with called_one_by_one(pipe), session_on(pipe, folder, key_lock=key_lock) as session:
            assert "has hooks" in session.obstacle
            return steps(session)

    assert_alike(hoisted, as_run(one_by_one))


def test_every_projection_reads_no_rows_and_every_caption_is_projected_once(folder, monkeypatch):
    pipe, read, projected = tiny_sd(), [], []
    own = BatchedProjection.project
    monkeypatch.setattr(BatchedProjection, "project", lambda self, encodings, *rest: projected.append(len(encodings)) or own(self, encodings, *rest))
    with session_on(pipe, folder, batch_size=7) as session:
        for layer in cross_attention_layers(pipe.unet).values():
            for module in (layer.to_k, layer.to_v):
                module.register_forward_hook(lambda module, args, output: read.append((len(args[0]), len(output))))
        session.train_step()
    assert read == [(0, 7)] * 8 and projected == [len(CAPTIONS)]


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_layers_own(dtype):
    """An encoding without edit: strength 0."""
    unet = tiny_sd(dtype=dtype).unet
    encodings = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    ones = torch.ones(2, 1)
    outputs = torch.randn(1, 40)
    tables = session_module.Tables(torch.ones(1, 16), torch.ones(1, 16), torch.ones(1, 16), outputs)
    index = torch.zeros(2, 1, dtype=torch.int32)
    found, gates = BatchedProjection(unet).project(encodings, torch.tensor([1, 0, 1]), tables, RowSettings(index, ones, ones, 0 * ones))
    assert gates.shape == (2, 77, 1) and found.keys.shape == found.values.shape == (3, 77, 40)
    for kind, table in (("to_k", found.keys), ("to_v", found.values)):
        weight = torch.cat([getattr(layer, kind).weight for layer in cross_attention_layers(unet).values()]).detach().double()
        assert_close(table, *exactly(lambda: encodings.double()[[1, 0, 1]] @ weight.T), kind)


# Compiled


@pytest.mark.numeric
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_compiled_unet_has_no_graph_break_and_the_same_gradients(folder, monkeypatch, one_by_one):
    """With gradient checkpointing, whose layers run again in the backward. Other captions, noise and values are no other graph, nor is
    another training."""
    pipe, compile = tiny_sd(unet=SMALL), torch.compile
    monkeypatch.setattr(session_module.torch, "compile", lambda unet, **options: compile(unet, backend="aot_eager", **options))
    with called_one_by_one(pipe) if one_by_one else contextlib.nullcontext():

        def uncompiled(seed):
            with session_on(pipe, folder, seed=seed) as session:
                return steps(session)

        expected = [as_run(lambda: uncompiled(seed)) for seed in (0, 1)]
        torch._dynamo.reset()
        counters.clear()
        for seed in (0, 1):
            with session_on(pipe, folder, seed=seed, compile=True, gradient_checkpointing=True) as session:
                assert (session.obstacle is None) != one_by_one
                assert_alike(steps(session), expected[seed])
                assert session._unet is not pipe.unet and (seed or len(session.sample(["a {}"], 1)) == 1)
            assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert not hasattr(pipe.unet, "_orig_mod")


# Where the layers must be called


def other_kind(layer):
    layer.to_v = torch.nn.Sequential(layer.to_v)


def own_forward(layer):
    layer.to_k.forward = layer.to_k.forward  # as offloading does


def other_tensor(layer):
    class Quantised(torch.Tensor):
        pass

    layer.to_v.weight = torch.nn.Parameter(layer.to_v.weight.detach().as_subclass(Quantised), requires_grad=False)


def offloaded(layer):
    layer.to_v.to("meta")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_kind, "to_v of mid_block.* is a torch.nn.modules.container.Sequential"),
        (own_forward, "to_k of mid_block.* has hooks"),
        (lambda layer: layer.to_v.register_forward_pre_hook(lambda module, args: None), "to_v of .* has hooks"),
        (other_tensor, "to_v of .* has a weight that cannot be read"),
        (offloaded, "to_v of .* has a weight that cannot be read"),
        (lambda layer: layer.to_k.requires_grad_(True), "to_k of .* is trained"),
        (lambda layer: layer.to_v.half(), "to_v of .* is torch.float16 on cpu, and others are torch.float32 on cpu"),
    ],
)
def test_what_a_layer_may_do_beside_its_product_is_an_obstacle(change, reason):
    unet = tiny_sd().unet
    assert obstacle(unet) is None
    change(unet.mid_block.attentions[0].transformer_blocks[0].attn2)
    with pytest.raises(ValueError, match=f"every to_k and to_v must be a frozen Linear without hooks, but {reason}"):
        BatchedProjection(unet)


def test_lora_is_called_and_stays_in_charge(folder):
    from peft import LoraConfig

    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    with session_on(pipe, folder) as session:
        assert "is a peft.tuners.lora" in session.obstacle and session._batched is None
        with_lora = steps(session)
    pipe.unet.disable_adapters()
    with session_on(pipe, folder) as session:
        without = steps(session)
    assert with_lora[0] != without[0]
