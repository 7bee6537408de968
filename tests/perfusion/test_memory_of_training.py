"""What training takes at real widths, measured: the product's own code on a device whose memory is counted, and on a CPU with numbers."""

import dataclasses
import functools
import gc
import resource

import pytest
import torch

import perfusion
from perfusion import batched_projection, memory
from perfusion.base import Base, cross_attention_layers, describe_base, layer_width, text_encoders
from perfusion.checkpoint_file import Kind
from perfusion.covariance import Covariance
from perfusion.training import TrainingConfig, session
from perfusion.training.data import Picture
from perfusion.training.session import TrainingSession
from tests.perfusion.device_memory import Counted
from tests.perfusion.original_layout import pipeline_of

pytestmark = pytest.mark.proof
CAPTIONS = ("a photo of a {}", "a {} on a table", "the {}")


def pictures_of(side):
    generator = torch.Generator().manual_seed(0)
    return [Picture(f"{n}.png", torch.rand(3, side, side, generator=generator) * 2 - 1, None, CAPTIONS, (side, side)) for n in range(2)]


def models_of(pipe):
    return [pipe.unet, pipe.vae, *(encoder for _, encoder in text_encoders(pipe))]


def reckoned(pipe, config, side, device):
    """part -> bytes, as `perfusion info` and `perfusion train` say."""
    unet, vae, *texts = (sum(parameter.numel() for parameter in model.parameters()) for model in models_of(pipe))
    widths = [layer_width(layer) for layer in cross_attention_layers(pipe.unet).values()]
    parts = memory.Parts(unet, sum(texts), vae, pipe.unet.config.cross_attention_dim, sum(widths), side)
    made = [functools.partial(type(encoder), encoder.config) for _, encoder in text_encoders(pipe)]
    saved = memory.saved_by_backward(dict(pipe.unet.config), side // 8, torch.bfloat16, made)
    options = dict(rows=config.rows, batch=config.batch_size, checkpointing=config.checkpointing, low_memory=config.low_memory)
    return memory.training(parts, saved, torch.bfloat16, **options, device=device)


def identity(width):
    return Covariance(torch.eye(width, dtype=torch.float64), 1, 1, "a unit matrix", "", 1.0, 1.0, 0.0, 1e6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "side", "options", "card"),
    [
        pytest.param("sd1", 512, {"low_memory": True}, 6e9, id="sd1-low"),
        pytest.param("sd1", 512, {}, None, id="sd1-usual"),
        pytest.param("sd1", 512, {"micro_batch": 1, "gradient_checkpointing": True}, None, id="sd1-micro"),
        pytest.param("sdxl", 1024, {"low_memory": True}, 12e9, id="sdxl-low"),
        pytest.param("sdxl", 1024, {"gradient_checkpointing": True}, None, id="sdxl-checkpointing"),
    ],
)
def test_what_is_reckoned_is_what_a_device_holds(monkeypatch, family, side, options, card):
    for module in (session, batched_projection):  # weights on the meta device are otherwise taken for offloaded ones
        monkeypatch.setattr(module, "obstacle", lambda unet, **_: None)
    pipe = pipeline_of(Kind(family, 4, "epsilon", True), device="meta")
    for model in models_of(pipe):
        torch.nn.Module.to(model, torch.bfloat16)
    width = pipe.unet.config.cross_attention_dim
    layers = {name: layer_width(layer) for name, layer in cross_attention_layers(pipe.unet).items()}
    widths = tuple(encoder.config.hidden_size for _, encoder in text_encoders(pipe))
    base = Base(family=family, encoding_dim=width, text_widths=widths, layers=layers, text_encoder="")
    config = TrainingConfig(superclass="mug", name="mine", batch_size=3, **options)
    with Counted() as device:
        device.hold(*models_of(pipe))
        held = device.now
        with TrainingSession(pipe, base, config, identity(width), pictures_of(side)) as training:
            training.train_step()
            gc.collect()
            resting, start = device.now, device.peak
            device.peak = device.now
            training.train_step()
            step = device.peak
        del training
        gc.collect()
        assert device.now == pytest.approx(held, rel=1e-3)  # everything is back, and nothing beside it
    found = reckoned(pipe, config, side, "meta")
    texts = sum(parameter.numel() * 2 for _, encoder in text_encoders(pipe) for parameter in encoder.parameters())
    vae = sum(parameter.numel() * 2 for parameter in pipe.vae.parameters())
    print(f"\n{family} {options}: a step {step / 1e9:.2f} GB, with the pictures' encoding {start / 1e9:.2f} GB; {memory.table(found)}")
    assert max(step, start) == pytest.approx(memory.total(found), rel=0.12)
    if config.low_memory:
        assert held - resting == pytest.approx(texts + vae - 2 * 2 * width * sum(layers.values()), rel=0.02)  # offloaded between steps
        assert max(step, start) + memory.CUDA_CONTEXT < card


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_sdxl_is_trained_and_drawn_at_its_real_widths(tmp_path):
    """2.6 + 0.8 + 0.08 thousand million random numbers in bfloat16, pictures of 64 pixels: about 8 GB, and a few minutes on one core."""
    side = 64
    pipe = pipeline_of(Kind("sdxl", 4, "epsilon", True), device="meta")
    generator = torch.Generator().manual_seed(0)
    for model in models_of(pipe):
        torch.nn.Module.to(model, torch.bfloat16).to_empty(device="cpu")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("position_ids"):
                tensor.copy_(torch.arange(tensor.shape[-1])[None])
            elif tensor.ndim > 1:
                tensor.normal_(std=0.02, generator=generator)
            else:
                tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == 2_567_463_684
    base = describe_base(pipe)
    assert (base.family, len(base.layers), base.encoding_dim, base.outputs) == ("sdxl", 70, 2048, 83_200)
    covariance = dataclasses.replace(identity(2048), text_encoder=base.text_encoder)
    images = []
    for number, picture in enumerate(pictures_of(side)):
        from PIL import Image

        image = Image.fromarray(((picture.pixels.permute(1, 2, 0) + 1) * 127.5).byte().numpy())
        images.append(image)
    options = dict(steps=2, batch_size=2, low_memory=True, resolution=side, validation_every=0, tensorboard=False, instance_prompts=CAPTIONS)
    with Counted("cpu") as device:
        device.hold(*models_of(pipe))
        weights = device.now
        concept = perfusion.train(pipe, images, "coffee mug", "mine", covariance=covariance, progress=False, **options)
        peak = device.peak
    config = TrainingConfig(superclass="coffee mug", name="mine", **options)
    found = reckoned(pipe, config, side, "cpu")
    print(f"\nSDXL: weights {weights / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB; reckoned {memory.table(found)}; "
          f"process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 * 1.073741824:.1f} GB")  # fmt: skip
    assert peak == pytest.approx(memory.total(found), rel=0.1)
    assert concept.value_outputs.isfinite().all() and concept.base == base
    assert not torch.equal(concept.word_embeddings[0], pipe.text_encoder.get_input_embeddings().weight[0].float())

    path = tmp_path / "mine.safetensors"
    concept.save(path)
    size = dict(num_inference_steps=2, height=side, width=side, output_type="pt")
    with perfusion.attach(pipe) as handle:
        handle.load(path)
        drawn, plain = (
            pipe(prompt, generator=torch.Generator().manual_seed(1), **size).images[0]
            for prompt in ("a <mine> on the moon", "a coffee mug on the moon")
        )
    bare = pipe("a coffee mug on the moon", generator=torch.Generator().manual_seed(1), **size).images[0]
    assert drawn.shape == (3, side, side) and drawn.isfinite().all()
    assert torch.equal(plain, bare) and not torch.equal(drawn, plain)
