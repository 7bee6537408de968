"""perfusion.training.session: the start, one step against eq. 3 of arXiv 2305.01644 written out, and the known mistakes."""

import contextlib
import dataclasses
import logging
import zlib

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from torch.nn.functional import linear

from perfusion.base import UnsupportedPipeline, cross_attention_layers, describe_base
from perfusion.training.data import read_pictures
from perfusion.training.session import TrainingSession
from tests.kernels.tolerance import as_run, assert_close, assert_same_run, exactly
from tests.perfusion.learning import assert_unchanged, covariance_of, settings, snapshot, write_pictures
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

PLAIN = ("a teddy", "a photo of a teddy")
CAPTIONS = ("a {}", "a photo of a {}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("session") / "pictures", mask=True)


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def session_on(pipe, folder, **changes):
    config = settings(instance_prompts=CAPTIONS, **changes)
    return TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), read_pictures(folder, config, 16))


def place_of(pipe, captions):
    tokenizer = pipe.tokenizer
    ids = tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
    return (ids == tokenizer("teddy", add_special_tokens=False).input_ids[0]).int().argmax(1), ids


# The start


@pytest.mark.numeric
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@torch.no_grad()
def test_everything_starts_at_the_superclass(make, folder):
    pipe = make()
    place, ids = place_of(pipe, PLAIN)
    # the pipeline's own hidden layer (SDXL: the last but one), and no padding mask
    expected = pipe.encode_prompt(list(PLAIN), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    with session_on(pipe, folder, key_lock=False) as session:
        encodings = session._read(["a <mine>", "a photo of a <mine>"])[0]
        assert torch.equal(encodings, expected[0])
        s = expected[0][torch.arange(2), place].mean(0)
        assert torch.equal(session.superclass_encoding, s) and torch.equal(session.target, s)
        layers = cross_attention_layers(pipe.unet).values()
        for kind, outputs in (("to_v", session.value_outputs), ("to_k", session.key_outputs)):
            weights = torch.cat([getattr(layer, kind).weight for layer in layers]).detach().double()
            assert_close(outputs.data, *exactly(lambda: weights @ s.double()))
        encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)][: len(session.words)]
        for word, encoder in zip(session.words, encoders):
            assert torch.equal(word, encoder.get_input_embeddings().weight[ids[0, place[0]]])


def test_what_is_trained_is_one_vector_per_layer_and_the_word(pipe, folder):
    with session_on(pipe, folder) as session:
        values, words = session.optimizer.param_groups
        assert [parameter is session.value_outputs for parameter in values["params"]] == [True]
        assert [id(parameter) for parameter in words["params"]] == [id(word) for word in session.words]
        # one o* per layer, not one per token; no keys
        assert sum(p.numel() for group in (values, words) for p in group["params"]) == session.base.outputs + session.base.encoding_dim
        assert session.key_outputs is None and not session.superclass_encoding.requires_grad


# One step


def equation_3(pipe, captions, value_outputs, key_outputs, word, target, s, covariance, config, drawn, mask):
    """Loss of one step in float64, from hooks that write eq. 3 down and no code of the product; the moved target; the keys."""
    inverse = torch.linalg.inv(covariance.matrix)
    place, ids = place_of(pipe, captions)
    every = torch.arange(len(captions))

    def substitute(module, args, output):
        output = output.clone()
        output[every, place] = word
        return output

    keys, ends = [], 0
    with contextlib.ExitStack() as stack:
        stack.callback(pipe.text_encoder.get_input_embeddings().register_forward_hook(substitute).remove)
        e = pipe.text_encoder(ids)[0]
        target = config.ema_decay * target + (1 - config.ema_decay) * e[every, place].detach().mean(0)
        c = e @ inverse @ target / (target @ inverse @ target)
        g = torch.sigmoid((c - config.bias) / config.temperature)
        for layer in cross_attention_layers(pipe.unet).values():
            columns = slice(ends, ends := ends + layer.to_v.out_features)

            def edit(module, args, output, o, seen=None):
                h = linear(args[0] - c[..., None] * target, module.weight) + g[..., None] * o
                return h if seen is None else seen.append(h.detach()) or h

            k = layer.to_k.weight @ s if key_outputs is None else key_outputs[columns]
            stack.callback(layer.to_k.register_forward_hook(lambda m, a, o, k=k: edit(m, a, o, k, keys)).remove)
            stack.callback(layer.to_v.register_forward_hook(lambda m, a, o, v=value_outputs[columns]: edit(m, a, o, v)).remove)
        latents, noise, timesteps = drawn
        alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[timesteps][
            :, None, None, None
        ]
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        prediction = pipe.unet(noisy, timesteps, e).sample
        goal = noise if pipe.scheduler.config.prediction_type == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        error = (prediction - goal) ** 2
        losses = [(m * each).sum() / (4 * m.sum()) for m, each in zip(mask, error)]
    return torch.stack(losses).mean(), target, keys


@pytest.mark.numeric
@pytest.mark.parametrize(("prediction_type", "key_lock"), [("epsilon", True), ("v_prediction", True), ("epsilon", False)])
def test_gradients_are_those_of_equation_3(folder, monkeypatch, prediction_type, key_lock):
    pipe = tiny_sd(dtype=torch.float64, prediction_type=prediction_type)
    drawn, captions, conditions, keys = [], [], [], []
    with session_on(pipe, folder, key_lock=key_lock) as session:
        session.train_step()  # nothing is at its start any more
        trained, target = [p.detach().double() for p in session._trained().values()], session.target.double()
        add_noise, places_of = session.noise_scheduler.add_noise, session._places_of
        monkeypatch.setattr(session.noise_scheduler, "add_noise", lambda *args: drawn.append(args) or add_noise(*args))
        monkeypatch.setattr(session, "_places_of", lambda texts: captions.append(texts) or places_of(texts))
        pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: conditions.append(kwargs), with_kwargs=True)
        for layer in cross_attention_layers(pipe.unet).values():
            layer.to_k.register_forward_hook(lambda module, args, output: keys.append(output.detach()))
        measures = session.train_step()
        gradients = [p.grad.double() for p in session._trained().values()]
    (given,) = conditions
    assert set(given) == {"timestep", "encoder_hidden_states", "return_dict"} and given["return_dict"] is False  # no mask on the text

    ((latents, noise, timesteps),) = drawn
    pictures, mirrored = drawn_at(step=1)
    mean, deviation = session.latents.mean[pictures, mirrored], session.latents.std[pictures, mirrored]
    assert ((latents - mean).abs() < 6 * deviation).all()

    def written_out():
        leaves = [leaf.clone().requires_grad_() for leaf in trained]
        values, own_keys, word = leaves if not key_lock else (leaves[0], None, leaves[1])
        loss, moved, expected_keys = equation_3(
            pipe, [caption.replace("<mine>", "teddy") for caption in captions[0]], values, own_keys, word, target,
            session.superclass_encoding.double(), session.covariance, session.config, (latents.double(), noise.double(), timesteps),
            session.latents.mask[pictures, mirrored].double(),
        )  # fmt: skip
        return (loss, moved, *torch.autograd.grad(loss, leaves), *expected_keys)

    seen = [torch.tensor(measures.loss), session.target, *gradients, *keys]
    exact = exactly(written_out)
    for number, (mine, truth) in enumerate(zip(seen, exact)):  # the keys of one forward, of several
        assert truth.value.abs().sum() > 0
        assert_close(mine.float(), truth, f"result {number}")
    assert len(exact) == 2 + len(gradients) + 4


def drawn_at(step, batch=3, count=4, flip=0.5):
    """Which pictures a step of seed 0 takes, and which of them mirrored."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"0 {step}".encode()))
    return torch.randint(count, (batch,), generator=generator), (torch.rand(batch, generator=generator) < flip).long()


def test_locked_keys_do_not_depend_on_the_trained_outputs(pipe, folder):
    with session_on(pipe, folder) as session:
        encodings = session._read(["a <mine>"])[0]
        one = session._edit(encodings, torch.arange(1), 0.75, 0.1)
        assert one.key_updates is None
        (gradient,) = torch.autograd.grad(one.key_encodings.sum(), session.value_outputs, retain_graph=True, allow_unused=True)
        assert gradient is None
        (gradient,) = torch.autograd.grad(one.value_updates.sum(), session.value_outputs)
        assert gradient.abs().min() > 0
        session.value_outputs.data.add_(1)
        assert torch.equal(session._edit(encodings, torch.arange(1), 0.75, 0.1).key_encodings, one.key_encodings)


@pytest.mark.numeric
def test_two_rates_and_no_decay(pipe, folder):
    """The first step of Adam moves every number by its group's rate: a scaled gradient would not, and decay would show."""
    with session_on(pipe, folder) as session:
        before = {name: p.detach().clone() for name, p in session._trained().items()}
        session.train_step()
        for name, parameter in session._trained().items():
            rate = 0.03 if name == "value_outputs" else 0.006
            gradient = parameter.grad
            start, slope = before[name].double(), gradient.double()
            assert_close(parameter.data, *exactly(lambda: start - rate * slope / (slope.abs() + 1e-8)))


def test_gradient_checkpointing_changes_no_bit_and_moves_the_target_once(folder):
    ends = []
    for checkpointing in (False, True):
        pipe = tiny_sd()
        with session_on(pipe, folder, gradient_checkpointing=checkpointing) as session:
            assert pipe.unet.is_gradient_checkpointing == checkpointing
            calls, move = [], session._move_target
            session._move_target = lambda encodings: calls.append(1) or move(encodings)
            measures = [session.train_step() for _ in range(3)]
            assert len(calls) == 3
            ends.append((measures, session.state()))
        assert not pipe.unet.is_gradient_checkpointing
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(tensor, ends[1][1][name]) for name, tensor in ends[0][1].items())


def test_the_loss_falls(pipe, folder):
    """Of one batch with its noise, which every step has again."""
    with session_on(pipe, folder, learning_rate=0.3) as session:
        losses = []
        for _ in range(20):
            session.step = 0
            losses.append(session.train_step().loss)
        assert losses[-1] < losses[0] - 0.01


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_in_float32_with_an_exact_metric(folder, dtype):
    pipe = tiny_sd(dtype=dtype)
    with session_on(pipe, folder) as session, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for _ in range(2):
            measures = session.train_step()
        assert measures.gradient_norm > 0 and 0 < measures.gate_off_word < measures.gate_on_word < 1
        assert all(tensor.dtype == torch.float32 for tensor in session.state().values())
        concept = session.concept()
    matrix, target = session.covariance.matrix, concept.target.double()
    largest = torch.linalg.solve(matrix, target).abs().max()
    assert_close(concept.metric_target, *exactly(lambda: torch.linalg.solve(matrix, target) / largest))


@pytest.mark.numeric
def test_the_target_of_a_concept_does_not_lag_behind_its_word(folder):
    """Its component at its own word is 1, in the mean of the captions, however far the running mean is behind."""
    with session_on(tiny_sd(), folder, word_learning_rate=0.05, ema_decay=0.99) as session:
        for _ in range(8):
            session.train_step()
        behind = dataclasses.replace(
            session.concept(), target=session.target.clone(), metric_target=session.covariance.metric_targets(session.target)
        )
        captions = sorted(session._places)
        with torch.no_grad():
            at_word = session._read(captions)[0][torch.arange(len(captions)), session._places_of(captions)]
        before = session.target.clone()
        concept = session.concept()
        assert torch.equal(session.target, before)  # the training goes on as it would have
    word, target, metric = (x.double() for x in (at_word, concept.target, concept.metric_target))
    (similarity,) = exactly(lambda: (word @ metric / (target @ metric)).mean())
    assert_close(concept.similarity(at_word).mean(), similarity)
    assert_close(torch.ones(()), similarity)
    assert abs(behind.similarity(at_word).mean().item() - 1) > 0.02


def test_training_uses_the_noise_of_the_model_not_of_the_sampler(folder):
    """Euler adds sigmas times noise to latents of another scale, and PNDM knows no velocity."""
    ends = []
    for scheduler in (DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler):
        pipe = tiny_sd(prediction_type="v_prediction")
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        with session_on(pipe, folder) as session:
            ends.append(session.train_step())
    assert ends[0] == ends[1] == ends[2]


def test_noise_that_is_not_known_is_refused(folder):
    pipe = tiny_sd()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedPipeline, match="FlowMatchEulerDiscreteScheduler.*beta_schedule"):
        session_on(pipe, folder)


def test_a_loss_that_is_not_finite_stops_the_training_before_it_enters_the_vectors(pipe, folder):
    with session_on(pipe, folder) as session:
        session.latents.mean.fill_(float("nan"))
        before = session.value_outputs.detach().clone()
        with pytest.raises(ValueError, match="not finite at step 1"):
            session.train_step()
        assert torch.equal(session.value_outputs, before)


# Leaving it


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_given_back(folder, error):
    pipe = tiny_sd()
    pipe("a teddy", num_inference_steps=1, output_type="latent")  # transformers sets hooks of its own at the first call
    pipe.unet.requires_grad_(True).train()
    pipe.unet.mid_block.eval()  # modes may differ inside a model
    before = snapshot(pipe)
    with contextlib.suppress(error or ()):
        with session_on(pipe, folder, gradient_checkpointing=True) as session:
            session.train_step()
            session.sample(["a {}"], 1)
            if error:
                raise error
    assert_unchanged(pipe, before)


def test_a_start_that_fails_leaves_nothing_behind(folder):
    pipe = tiny_sd()
    pipe("a teddy", num_inference_steps=1, output_type="latent")
    before = snapshot(pipe)
    config = settings(instance_prompts="a {} and an <other>")
    with pytest.raises(ValueError, match="<other>"):
        with TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), read_pictures(folder, config, 16)):
            pass
    assert_unchanged(pipe, before)


def test_state_is_a_copy_and_fits_its_own_shape_only(pipe, folder):
    with session_on(pipe, folder) as session:
        session.train_step()
        kept = session.state()
        again = {name: tensor.clone() for name, tensor in kept.items()}
        one = session.train_step()
        assert all(torch.equal(kept[name], again[name]) for name in kept)
        session.restore(1, kept)
        assert session.train_step() == one
        with pytest.raises(ValueError, match=r"value_outputs must be of shape \[40\]"):
            session.restore(1, {**kept, "value_outputs": torch.zeros(3)})


# Long captions


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_caption_that_is_cut_is_said_once(make, tmp_path, caplog):
    folder = write_pictures(tmp_path / "in")
    (folder / "0.txt").write_text("a <mine> " + "in the snow " * 40)
    (folder / "1.txt").write_text("a <mine> in the snow")
    pipe = make()
    logger = logging.getLogger(type(pipe).__module__)
    before = list(logger.filters)
    logging.getLogger("diffusers").propagate = True  # to caplog
    try:
        with pytest.warns(UserWarning, match="their ends count for nothing: 'a <mine> in the snow.* … .*in the snow' of .*0.png. Shorter"):
            with session_on(pipe, folder) as session:
                for _ in range(3):
                    session.train_step()
        assert not [record for record in caplog.records if "truncated" in record.getMessage()] and logger.filters == before
    finally:
        logging.getLogger("diffusers").propagate = False


def test_a_caption_whose_word_is_cut_names_its_picture(tmp_path):
    folder = write_pictures(tmp_path / "in")
    (folder / "0.txt").write_text("in the snow " * 40 + "a <mine>")
    with pytest.raises(ValueError, match="images: caption of .*0.png: prompt 'in the snow .* … .* a teddy': <mine> lies beyond the 77 tokens"):
        with session_on(tiny_sd(), folder):
            pass


# Less memory


@pytest.mark.models
@pytest.mark.numeric
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_micro_batches_are_the_same_step(make, folder):
    """Up to the order of sums; i* moves once."""

    def end(**options):
        pipe = make()
        with session_on(pipe, folder, **options) as session:
            measures = [session.train_step() for _ in range(2)]
            state = session.state()
        assert getattr(pipe.vae, "use_tiling", False) is False and not pipe.unet.is_gradient_checkpointing
        return *(torch.tensor([each.loss, each.gate_on_word]) for each in measures), *(state[name] for name in sorted(state))

    expected = as_run(end)
    for options in ({"micro_batch": 1}, {"micro_batch": 2}, {"low_memory": True}):
        for mine, other in zip(end(**options), expected, strict=True):
            assert_same_run(mine, other)


def test_a_step_draws_pictures_of_one_shape(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, size in enumerate(((40, 20), (44, 22), (20, 40), (24, 24))):
        Image.new("RGB", size, (50 * number, 80, 120)).save(folder / f"{number}.png")
    pipe, config = tiny_sdxl(), settings(instance_prompts="a {}", buckets=True, steps=1)
    seen = []
    with TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), read_pictures(folder, config, 16, step=4)) as session:
        handle = pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((tuple(args[0].shape[-2:]), kwargs["added_cond_kwargs"]["time_ids"][0].tolist())), with_kwargs=True
        )
        for _ in range(12):
            session.train_step()
        handle.remove()
    assert len(session._groups) == 3 and {shape for shape, _ in seen} == {(group.mean.shape[-2], group.mean.shape[-1]) for _, group in session._groups}
    assert all(ids == [2 * h, 2 * w, 0, 0, 2 * h, 2 * w] for (h, w), ids in seen)
