"""perfusion.projection_hooks: the keys and values that attention sees, against the equations written out."""

import weakref

import pytest
import torch

from perfusion.base import UnsupportedPipeline, describe_base
from perfusion.edit import RowSettings, Tables
from perfusion.projection_hooks import HookEdit, ProjectionHooks, hook_edit
from tests.kernels.tolerance import as_run, assert_close, assert_rounded_once, assert_same_run, exactly
from tests.perfusion.editing import check_rows, hooks_of, make_concept, use, watch
from tests.perfusion.tiny import tiny_sd

WIDTH = 16


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd(width=WIDTH)


@pytest.fixture(scope="module")
def base(pipe):
    return describe_base(pipe)


@pytest.fixture
def unet(pipe):
    """The shared UNet; a test that leaves a hook on it fails."""
    yield pipe.unet.float()
    assert not hooks_of(pipe.unet)
    pipe.unet.float().requires_grad_(False)


@pytest.fixture
def install():
    """install(unet, edit_of) gives an ProjectionHooks until the test ends."""
    editors = []

    def new(unet, edit_of=lambda encodings: None):
        editors.append(ProjectionHooks(unet, edit_of))
        editors[-1].install()
        return editors[-1]

    yield new
    for editor in editors:
        editor.remove()


def encodings_of(rows, dtype=torch.float32, seed=0):
    return torch.randn(rows, 77, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(unet, encodings, *, by_position=False):
    latents = torch.randn(len(encodings), 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(encodings.dtype)
    return unet(latents, 500, encodings).sample if by_position else unet(latents, 500, encoder_hidden_states=encodings).sample


def edit_for(encodings, rows, key_rows=None):
    """The HookEdit of rows: list of lists of Use, as the handle builds it."""
    concepts = list({id(one.concept): one.concept for uses in rows for one in uses}.values())
    edited = [row for row, uses in enumerate(rows) if uses]
    width = max(len(rows[row]) for row in edited)

    def table(value, empty, dtype=torch.float32):
        values = [[value(one) for one in rows[row]] + [empty] * (width - len(rows[row])) for row in edited]
        return torch.tensor(values, dtype=dtype)

    fields = ("target", "metric_target", "superclass_encoding", "value_outputs")
    keys = [concept.key_outputs for concept in concepts]
    unlocked = any(key is not None for key in keys)
    tables = Tables(
        *(torch.stack([getattr(concept, field) for concept in concepts]) for field in fields),
        torch.stack([torch.zeros(concepts[0].base.outputs) if key is None else key for key in keys]) if unlocked else None,
        torch.tensor([key is not None for key in keys]) if unlocked else None,
    )
    return hook_edit(
        encodings,
        torch.tensor(edited),
        tables,
        RowSettings(
            table(lambda one: concepts.index(one.concept), -1, torch.int32),
            table(lambda one: one.concept.bias if one.bias is None else one.bias, 0.0),
            table(lambda one: one.concept.temperature if one.temperature is None else one.temperature, 1.0),
            table(lambda one: one.strength, 0.0),
        ),
        key_rows,
    )


@pytest.fixture(scope="module")
def uses(base):
    """Three concepts, the last one with keys of its own."""
    return [use(make_concept(base, name, seed=seed, unlocked=name == "robot")) for seed, name in enumerate(("teddy", "teapot", "robot"), 1)]


def again(one, **settings):
    return use(one.concept, **settings)


# Against the equations


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_layer_sees_the_edit_written_out(unet, install, uses, dtype):
    a, b, free = uses
    rows = [
        [],
        [a],
        [again(b, bias=-0.2, temperature=0.9)],
        [free],
        [a, b],
        [],
        [a, b, free],
        [again(free, strength=0.4), again(b, strength=1.7, bias=0.1), again(a, temperature=0.2)],
        [again(a, strength=0.4, bias=0.0)],
    ]
    unet, encodings = unet.to(dtype), encodings_of(len(rows), dtype)
    install(unet, lambda encodings: edit_for(encodings, rows))
    with watch(unet) as forwards, torch.no_grad():
        run(unet, encodings)
    check_rows(unet, forwards[0], rows)


def test_the_gates_of_these_tests_are_neither_open_nor_shut(uses):
    gates = edit_for(encodings_of(2), [[uses[0], uses[1]], [uses[2]]]).gates
    assert gates.shape == (2, 77, 2) and gates[1, :, 1].abs().max() == 0
    present = gates[gates > 0]
    assert present.min() < 0.2 and present.max() > 0.8 and ((present > 0.2) & (present < 0.8)).float().mean() > 0.3


def test_strength_zero_changes_no_bit(uses):
    encodings = encodings_of(1)
    edit = edit_for(encodings, [[again(uses[0], strength=0.0)]])
    assert torch.equal(edit.value_encodings, encodings) and torch.equal(edit.key_encodings, encodings)
    assert edit.value_updates.abs().max() == 0


@pytest.mark.numeric
def test_the_token_at_the_target_gets_the_outputs_alone(uses):
    """e = i*: nothing of W e is left, and the gate stands at similarity 1."""
    one = uses[0]
    encodings = one.concept.target.double().expand(1, 77, WIDTH).contiguous()
    edit = edit_for(encodings, [[one]])
    metric, outputs = one.concept.metric_target.double(), one.concept.value_outputs.double()

    def written_out():
        component = encodings @ metric / (encodings[0, 0] @ metric)
        gate = torch.sigmoid((component - one.concept.bias) / one.concept.temperature)
        return encodings - component[..., None] * encodings, gate, gate[..., None] * outputs

    left, gate, update = exactly(written_out)
    assert not left.value.any()
    assert_close(edit.value_encodings.float(), left)
    assert_close(edit.gates[..., 0].float(), gate)
    assert_close(edit.value_updates.float(), update)


@pytest.mark.numeric
def test_the_global_lock_takes_all_keys_from_another_encoding(unet, install, uses):
    """Also those of concepts with keys of their own; rows under the local lock keep theirs."""
    rows, others = [[], [uses[0]], [uses[2], uses[0]], [uses[2]]], encodings_of(4, seed=7)
    keys = {2: others[2], 1: others[1]}
    install(unet, lambda encodings: edit_for(encodings, rows, keys))
    with watch(unet) as forwards, torch.no_grad():
        run(unet, encodings_of(4))
    check_rows(unet, forwards[0], rows, keys=keys)


@pytest.mark.numeric
def test_half_precision_and_autocast_compute_the_edit_in_float32(uses):
    """The components lose digits with C⁻¹ in half precision: nothing but the result is rounded."""
    rows, exact = [[uses[0], uses[2]]], encodings_of(1, torch.bfloat16).double()
    plain = edit_for(exact.bfloat16(), rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = edit_for(exact.float(), rows)
    fields = ("key_encodings", "value_encodings", "value_updates", "key_updates")
    for field, truth in zip(fields, exactly(lambda: tuple(getattr(edit_for(exact, rows), field).double() for field in fields)), strict=True):
        low, wide = getattr(plain, field), getattr(cast, field)
        assert low.dtype == torch.bfloat16 and wide.dtype == torch.float32
        assert_rounded_once(low, truth)
        assert_close(wide, truth, field)


@pytest.mark.numeric
def test_a_unet_under_autocast(unet, install, uses):
    install(unet, lambda encodings: edit_for(encodings, [[], [uses[0]]]))
    encodings = encodings_of(2)
    with torch.no_grad():
        expected = as_run(lambda: run(unet, encodings))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(unet, encodings)
    assert got.dtype == torch.bfloat16
    assert_same_run(got, expected)


# Gradients


def training_edit(encodings, concept, outputs, key_outputs):
    one = torch.tensor([[0]], dtype=torch.int32)
    metric, unlocked = (concept.target[None], concept.metric_target[None]), torch.tensor([True])
    tables = Tables(*metric, concept.superclass_encoding[None], outputs[None], key_outputs[None], unlocked)
    settings = RowSettings(one, torch.tensor([[0.3]]), torch.tensor([[0.4]]), torch.ones(1, 1))
    return hook_edit(encodings, torch.tensor([1]), tables, settings)


def gradients(unet, install, concept, *, checkpointing=False):
    """Of the encodings, the value and the key outputs, through the whole UNet, two forwards before one backward."""
    source = encodings_of(2).requires_grad_()
    outputs, keys = (table.clone().requires_grad_() for table in (concept.value_outputs, concept.key_outputs))
    editor = install(unet)
    unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
    unet.train(checkpointing)
    loss = 0
    for scale in (1.0, 1.5):
        encodings = source * scale
        editor.use(encodings, training_edit(encodings, concept, outputs, keys))
        loss = loss + run(unet, encodings).square().mean()
    loss.backward()
    unet.disable_gradient_checkpointing()
    unet.eval()
    editor.remove()
    return loss.detach(), source.grad, outputs.grad, keys.grad


def test_gradients_are_those_of_finite_differences(unet, install, uses):
    concept = uses[2].concept.to(dtype=torch.float64)
    unet = unet.double()
    encodings = encodings_of(2, torch.float64)
    editor = install(unet)

    def loss(shift_e, shift_v, shift_k):
        moved = encodings + shift_e
        editor.use(moved, training_edit(moved, concept, concept.value_outputs + shift_v, concept.key_outputs + shift_k))
        return run(unet, moved).square().mean()

    generator = torch.Generator().manual_seed(3)
    shapes = [tensor.shape for tensor in (encodings, concept.value_outputs, concept.key_outputs)]
    shifts = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    for place, shift in enumerate(shifts):
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        arguments = [step * shift if place == other else torch.zeros(()) for other in range(3)]
        (slope,) = torch.autograd.grad(loss(*arguments), step)
        with torch.no_grad():
            up, down = (loss(*(sign * 1e-5 * shift if place == other else torch.zeros(()) for other in range(3))) for sign in (1, -1))
        torch.testing.assert_close(slope, (up - down) / 2e-5, rtol=1e-5, atol=1e-9)
        assert slope != 0


def test_gradient_checkpointing_changes_no_gradient(unet, install, uses):
    plain = gradients(unet, install, uses[2].concept)
    checkpointed = gradients(unet, install, uses[2].concept, checkpointing=True)
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    assert all(map(torch.equal, plain, checkpointed))  # the same sums, in the same order


# Which tensor has which edit


def counting(rows):
    """An edit_of that counts how often it is asked."""

    def edit_of(encodings):
        edit_of.calls += 1
        return edit_for(encodings, rows)

    edit_of.calls = 0
    return edit_of


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_edit_is_made_once_per_tensor_and_again_after_a_change_in_place(unet, install, uses, mode):
    edit_of = counting([[uses[0]]])
    install(unet, edit_of)
    with mode():
        encodings, other = encodings_of(1), encodings_of(1, seed=4)
        first = run(unet, encodings)
        assert torch.equal(run(unet, encodings, by_position=True), first) and edit_of.calls == 1
        expected = run(unet, other)
        encodings.copy_(other)
        assert torch.equal(run(unet, encodings), expected) and edit_of.calls == 3
        assert torch.equal(run(unet, encodings), expected) and edit_of.calls == 3


def test_forget_asks_again(unet, install, uses):
    edit_of, encodings = counting([[uses[0]]]), encodings_of(1)
    editor = install(unet, edit_of)
    with torch.no_grad():
        run(unet, encodings)
        editor.forget()
        run(unet, encodings)
    assert edit_of.calls == 2


def test_two_encodings_in_turn_are_both_kept(unet, install, uses):
    """Some guiders run the two halves of guidance as separate forwards."""
    edit_of = counting([[uses[0]]])
    install(unet, edit_of)
    positive, negative = encodings_of(1), encodings_of(1, seed=2)
    with torch.no_grad():
        for _ in range(3):
            run(unet, positive)
            run(unet, negative)
    assert edit_of.calls == 2


@pytest.mark.parametrize("gradient", [False, True])
def test_an_edit_lives_as_long_as_its_encodings(unet, install, uses, gradient):
    edits = []

    def edit_of(encodings):
        edit = edit_for(encodings, [[uses[0]]])
        edits.append(weakref.ref(edit.value_updates))
        return edit

    install(unet, edit_of)
    encodings = encodings_of(1)
    encodings = (encodings.requires_grad_() * 1) if gradient else encodings
    with torch.set_grad_enabled(gradient):
        run(unet, encodings)
    assert edits[0]() is not None
    del encodings
    assert edits[0]() is None


def test_an_edit_that_fails_leaves_nothing_behind(unet, install, uses):
    edit_of = counting([[uses[0]]])

    def failing(encodings):
        if edit_of.calls == 0:
            edit_of.calls = 1
            raise ValueError("no")
        return edit_of(encodings)

    install(unet, failing)
    encodings = encodings_of(1)
    with torch.no_grad():
        with pytest.raises(ValueError, match="no"):
            run(unet, encodings)
        expected = run(unet, encodings_of(1))
        assert torch.equal(run(unet, encodings), expected)


def test_without_an_edit_every_bit_stays(unet, install):
    encodings = encodings_of(2)
    with torch.no_grad():
        expected = run(unet, encodings)
        install(unet)
        assert torch.equal(run(unet, encodings), expected)


# Install and remove


def test_remove_takes_every_hook_away(unet, uses):
    encodings = encodings_of(1)
    with torch.no_grad():
        expected = run(unet, encodings)
        editor = ProjectionHooks(unet, counting([[uses[0]]]))
        editor.install()
        assert len(hooks_of(unet)) == 9  # modules: to_k and to_v of four layers, and the UNet
        assert not torch.equal(run(unet, encodings), expected)
        editor.remove()
        assert not hooks_of(unet) and torch.equal(run(unet, encodings), expected)
        editor.remove()


def test_a_forward_keeps_nothing_for_compiled_code(unet, install, uses):
    editor = install(unet, counting([[uses[0]]]))
    with torch.no_grad():
        run(unet, encodings_of(1))
    assert all(projection.now is None and projection.pending is None for projection in editor._projections)


def test_hooks_that_compiled_code_still_calls_after_remove_do_nothing(unet, uses):
    editor, encodings = ProjectionHooks(unet, counting([[uses[0]]])), encodings_of(1)
    editor.install()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    (before,), (after,) = layer.to_v._forward_pre_hooks.values(), layer.to_v._forward_hooks.values()
    assert before(layer.to_v, (encodings,)) is not None and after(layer.to_v, (encodings,), torch.zeros(1, 77, 16)) is not None
    editor.remove()
    assert before(layer.to_v, (encodings,)) is None and after(layer.to_v, (encodings,), torch.zeros(1, 77, 16)) is None


def test_processors_that_pass_the_hooks_by_are_refused_when_there_is_an_edit(unet, install, uses):
    rows, processor = [[]], "FusedAttnProcessor2_0"
    install(unet, lambda encodings: edit_for(encodings, rows) if any(rows) else None)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    own = layer.processor
    layer.processor = type(processor, (type(own),), {})()
    try:
        with torch.no_grad():
            run(unet, encodings_of(1))
            rows[0] = [uses[0]]
            with pytest.raises(UnsupportedPipeline, match=f"concepts do not work with {processor}, which layer mid_block.*Call .* first"):
                run(unet, encodings_of(1))
    finally:
        layer.processor = own


def test_an_edit_says_which_rows_it_changes(uses):
    encodings = encodings_of(3)
    edit = edit_for(encodings, [[], [uses[0]], []])
    assert isinstance(edit, HookEdit) and edit.rows.tolist() == [1] and edit.key_updates is None
    for table in (edit.key_encodings, edit.value_encodings):
        assert torch.equal(table[[0, 2]], encodings[[0, 2]]) and not torch.equal(table[1], encodings[1])
