"""Import of checkpoints that two public ports of the method write.

    lucidrains/perfusion-pytorch, `save`:   {embed_params [n, width] or None, key_value_params, C_inv [D, D]}, where
                                            key_value_params lists (i* [n, D], o* [n, d]) per edited projection, in the
                                            order of the model's modules: to_k, to_v of the first layer, and so on
    lucidrains/perfusion-pytorch, a model's
    state dict:                             ...attn2.to_v.concept_outputs [n, d], ....ema_concept_text_encs [n, D],
                                            ....C_inv [D, D], and the embedding wrapper's concepts [n, width]
    ChenDarYen/Key-Locked-Rank-One-Editing-for-Text-to-Image-Personalization:
                                            {global_step, C_inv [D, D], target_input [D], embedding, target_output}, where
                                            target_output maps ...attn2.to_v.target_output to one o* [77, d] per *token
                                            position*, under the layer names of the original Stable Diffusion code

None of them holds s, the superclass encoding. With the key lock o*_K = W_K s, so s is the least-squares solution over all
layers' W_K, exact when the checkpoint was trained on this UNet; the residual tells whether it was.

One output per position becomes one: the gate decides what an output is worth, so o* is the mean of the rows weighted by
the squared gate at each position of ordinary prompts, which is the least-squares choice.

Checkpoints are read with `torch.load(weights_only=True)` only; classes in them are replaced by inert stand-ins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from perfusion.advice import advise
from perfusion.base import Base, cross_attention_layers, describe_base, text_encoders
from perfusion.concept import DEFAULT_BIAS, DEFAULT_TEMPERATURE, Concept, check_name
from perfusion.concept_file import ConceptFileError

if TYPE_CHECKING:
    from perfusion.covariance import Covariance

__all__ = ["Conversion", "ConversionError", "convert"]

MAX_BYTES = 512 * 2**20
LUCIDRAINS = "lucidrains/perfusion-pytorch"
CHENDARYEN = "ChenDarYen/Key-Locked-Rank-One-Editing"

# The word stands at token 2, 4, 5 or 6, as it does in short training captions.
TEMPLATES = ("a {}", "a photo of {}", "picture of a {}", "a photo of a {}", "a picture of the {}", "a nice photo of the {}")
TRAINING_BIAS, TRAINING_TEMPERATURE = 0.75, 0.1
LOCKED = 0.02  # relative residual below which keys count as W_K s; another precision of the UNet makes about 0.0005
UNTRAINED = 1e-3  # relative residual below which values are nothing but W_V times some encoding
LEAST_SIMILARITY = 0.5  # at the concept word, where 1 is expected
LARGEST_SPREAD = 0.05  # of i* over the layers, relative; it is one vector by definition


class ConversionError(ValueError):
    """A checkpoint that cannot become a concept. Says why, and what would help."""


class Conversion(NamedTuple):
    """A converted concept, and in `notes` what was found and what was approximated, a sentence each."""

    concept: Concept
    notes: list[str]


@dataclasses.dataclass
class _Found:
    """What a checkpoint holds, in one form for all layouts. R rows: one output per token position, or R = 1."""

    port: str
    target: Tensor  # [D]
    inverse: Tensor | None  # [D, D], C^-1
    word: Tensor  # [width]
    keys: dict[str, Tensor]  # layer -> [R, d], in the base's layer order
    values: dict[str, Tensor]  # likewise
    superclass: str | None = None
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def convert(
    path: str | os.PathLike[str],
    pipe: Any,
    *,
    name: str,
    superclass: str | None = None,
    covariance: Covariance | None = None,
    index: int | None = None,
    templates: Sequence[str] = TEMPLATES,
    bias: float = DEFAULT_BIAS,
    temperature: float = DEFAULT_TEMPERATURE,
    license: str = "",
    author: str = "",
) -> Conversion:
    """A concept from a checkpoint of one of the two ports.

    path         the checkpoint
    pipe         the diffusers pipeline of the base model it was trained on: its weights give s, its text encoder the check
    name         of the concept
    superclass   one word; may be left out when the checkpoint says it
    covariance   for checkpoints without C^-1 only
    index        which concept, when the checkpoint holds several
    templates    prompts with {} at the word: where the concept is expected to stand
    bias, temperature, license, author   as in Concept

    Raises ConversionError when the file is none of the known layouts or does not belong to this pipeline, ValueError for
    a field that Concept refuses, UnsupportedPipeline, OSError.
    """
    check_name(name)
    if isinstance(pipe, Base):
        raise ConversionError("a Base is not enough: s comes from the UNet's key weights. Give the pipeline itself.")
    base = describe_base(pipe)
    if len(base.text_widths) != 1:
        raise ConversionError(f"these checkpoints hold one word embedding, but {base} needs one for each of its text encoders.")
    found = _find(_load(Path(path)), pipe, base, index)
    notes = [f"Checkpoint of {found.port}.", *found.notes]
    superclass = superclass or found.superclass
    if not superclass:
        raise advise(
            ConversionError("the checkpoint does not say its superclass."),
            python="Give it, for example superclass='teddy'.",
            command="Give it, for example --superclass teddy.",
        )

    metric_target, fingerprint = _metric_target(found, covariance, base)
    reader = _Reader(pipe)
    gates, similarity = _gates(reader, found, metric_target, templates)
    notes.append(f"Similarity c at the concept word, in {len(templates)} prompts: {similarity:.3f} (1 is ideal).")
    values, keys = (_collapse(rows, gates, notes, kind) for rows, kind in ((found.values, "values"), (found.keys, "keys")))

    s, key_outputs = _superclass_encoding(pipe, keys, notes)
    if key_outputs is not None:
        s = reader.superclass_encoding(superclass, templates)
        notes.append(f"s is the mean encoding at the word {superclass!r}.")
    if _fit(_weights(pipe, "to_v"), values)[1] < UNTRAINED:
        notes.append(
            "Warning: the values are W_V times one encoding, as at the start of training. The port never trained them "
            "(they were left out of its optimiser), so this concept will look like its superclass."
        )
    concept = Concept(
        name=name,
        superclass=superclass,
        base=base,
        value_outputs=values.float(),
        target=found.target.float(),
        metric_target=metric_target.float(),
        superclass_encoding=s.float(),
        word_embeddings=(found.word.float(),),
        key_outputs=None if key_outputs is None else key_outputs.float(),
        bias=bias,
        temperature=temperature,
        covariance=fingerprint,
        recipe=found.recipe,
        license=license,
        author=author,
    )
    return Conversion(concept, notes)


# Reading the file


class _StandIn:
    """Takes the place of a class named in a checkpoint: keeps the object's attributes and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


def _has_stand_in(name: str) -> bool:
    """Classes that the ports' files name: the configuration object one of them keeps, and torch's ParameterDict."""
    known = {"typing.Any", "collections.defaultdict", "torch.nn.modules.container.ParameterDict"}
    known |= {f"builtins.{kind}" for kind in ("list", "dict", "int", "float", "str", "bool")}
    return name in known or name.startswith("omegaconf.")


def _load(path: Path) -> Any:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConversionError(f"{path} is not a regular file. Give the checkpoint file.")
    if path.stat().st_size > MAX_BYTES:
        raise ConversionError(f"{path} has {path.stat().st_size:,} bytes; a checkpoint of these ports has at most {MAX_BYTES:,}.")
    with open(path, "rb") as file:  # opened here: torch decides by a path's ending how to read it, and endings lie
        return _load_opened(path, file)


def _load_opened(path: Path, file: BinaryIO) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        if _is_concept(path):
            raise ConversionError(f"{path} is a concept already, and needs no conversion: use it as it is.") from None
        raise ConversionError(
            f"{path} is not a torch checkpoint (a zip archive written by torch.save, torch 1.6 or later). "
            "If it is older, load and save it once with the torch that wrote it."
        ) from None
    if unpacked > MAX_BYTES:
        raise ConversionError(f"{path} unpacks to {unpacked:,} bytes; a checkpoint of these ports has at most {MAX_BYTES:,}.")
    try:
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in names if not _has_stand_in(name))
        if refused:
            asked = ascii(refused[0])[1:-1][:120]
            raise ConversionError(f"{path} asks to load {asked}, which checkpoints of these ports do not hold. Refused.")
        with torch.serialization.safe_globals([(_StandIn, name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storage classes of older torch
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except ConversionError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, KeyError, EOFError and others on bad files
        said = ascii(str(error).partition("\n")[0])[:200]
        raise ConversionError(f"{path} cannot be read safely by torch ({type(error).__name__}: {said}).") from None


def _is_concept(path: Path) -> bool:
    try:
        Concept.load(path)
    except ConceptFileError:
        return False
    return True


# Layouts


def _find(content: Any, pipe: Any, base: Base, index: int | None) -> _Found:
    if isinstance(content, Mapping):
        if {"target_input", "target_output", "embedding"} <= set(content):
            if index not in (None, 0):
                raise ConversionError(f"the checkpoint holds one concept, so index must be 0, got {index}.")
            return _find_chendaryen(content, pipe, base)
        if "key_value_params" in content:
            return _find_package(content, pipe, base, index)
        state = content.get("state_dict", content)
        if isinstance(state, Mapping) and any(str(key).endswith("ema_concept_text_encs") for key in state):
            return _find_state(state, pipe, base, index)
    keys = ", ".join(sorted(ascii(key) for key in content)[:8]) if isinstance(content, Mapping) else type(content).__name__
    raise ConversionError(
        f"not a checkpoint of a known port; at its top it holds: {keys:.300}. "
        f"Known are {LUCIDRAINS} (`save`, or a state dict) and {CHENDARYEN}."
    )


def _find_chendaryen(content: Mapping[str, Any], pipe: Any, base: Base) -> _Found:
    embedding, outputs = content["embedding"], content["target_output"]
    if not isinstance(embedding, Mapping) or not isinstance(outputs, Mapping):
        raise ConversionError("embedding and target_output must be dictionaries.")
    words = _parameters(embedding.get("string_to_param"))
    if len(words) != 1:
        raise ConversionError(f"the checkpoint must hold one placeholder word, it holds {len(words)}.")
    word = next(iter(words.values()))
    if isinstance(word, Tensor) and word.dim() == 2 and len(word) != 1:
        raise ConversionError(f"the placeholder has {len(word)} embeddings (num_vectors_per_token); a concept has one.")
    positions = text_encoders(pipe)[0][0].model_max_length
    layers, paths = {}, _layer_paths(pipe)
    for projection in ("to_k", "to_v"):
        by_path = {
            key.removesuffix(f".{projection}.target_output"): value
            for key, value in outputs.items()
            if isinstance(key, str) and key.endswith(f".{projection}.target_output")
        }
        layers[projection] = {
            layer: _tensor(rows, f"{projection} output of {layer}", (positions, base.layers[layer]))
            for layer, rows in _by_layer(by_path, paths, base, f"{projection}.target_output").items()
        }
    step = content.get("global_step")
    initial = _texts(embedding.get("initializer_words"))
    return _Found(
        port=CHENDARYEN,
        target=_tensor(content["target_input"], "target_input", (base.encoding_dim,)),
        inverse=_optional_square(content.get("C_inv"), base),
        word=_tensor(word, "the placeholder's embedding", (1, base.text_widths[0]))[0],
        keys=layers["to_k"],
        values=layers["to_v"],
        superclass=initial[0] if len(initial) == 1 else None,
        recipe={"source": CHENDARYEN, **({"steps": step} if type(step) is int and 0 <= step < 10**9 else {})},
    )


def _find_package(content: Mapping[str, Any], pipe: Any, base: Base, index: int | None) -> _Found:
    pairs = content["key_value_params"]
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ConversionError("key_value_params must be a list of pairs (i*, o*).")
    if len(pairs) != 2 * len(base.layers):
        raise ConversionError(
            f"key_value_params has {len(pairs)} entries, and {base} needs {2 * len(base.layers)}: a key and a value output "
            "per layer. Was every cross-attention layer wired, with both projections, and on this model?"
        )
    if content.get("embed_params") is None:
        raise ConversionError("embed_params is None: the word's embedding was not saved (no EmbeddingWrapper), and i* belongs to it.")
    count = _count(content["embed_params"], index)
    chosen = 0 if index is None else index
    targets = [_tensor(pair[0], "i*", (count, base.encoding_dim))[chosen] for pair in pairs]
    outputs = [_tensor(pair[1], "o*", (count, None))[chosen : chosen + 1] for pair in pairs]
    target, notes = _one_target(targets)
    keys, values = _assign(outputs, pipe, base)
    return _Found(
        port=LUCIDRAINS,
        target=target,
        inverse=_optional_square(content.get("C_inv"), base),
        word=_tensor(content["embed_params"], "embed_params", (count, base.text_widths[0]))[chosen],
        keys=keys,
        values=values,
        recipe={"source": LUCIDRAINS},
        notes=notes,
    )


def _find_state(state: Mapping[str, Any], pipe: Any, base: Base, index: int | None) -> _Found:
    state = {str(key): value for key, value in state.items()}
    words = [value for key, value in state.items() if key.rsplit(".", 1)[-1] == "concepts"]
    if len(words) != 1:
        raise ConversionError(f"the state dict must hold one embedding wrapper's 'concepts', it holds {len(words)}.")
    count = _count(words[0], index)
    chosen = 0 if index is None else index
    paths, found, targets = _layer_paths(pipe), {}, []
    for projection in ("to_k", "to_v"):
        outputs = {}
        # The output's name changed over the port's history; what it means did not.
        for suffix in ("concept_outputs", "concept_output", "superclass_output"):
            ending = f".{projection}.{suffix}"
            outputs |= {key.removesuffix(ending): value for key, value in state.items() if key.endswith(ending)}
        found[projection] = {
            layer: _tensor(value, f"{projection} output of {layer}", (count, base.layers[layer]))[chosen : chosen + 1]
            for layer, value in _by_layer(outputs, paths, base, f"{projection}.concept_outputs").items()
        }
    for key, value in state.items():
        if key.endswith("ema_concept_text_encs"):
            targets.append(_tensor(value, key, (count, base.encoding_dim))[chosen])
    inverses = [value for key, value in state.items() if key.rsplit(".", 1)[-1] == "C_inv"]
    target, notes = _one_target(targets)
    return _Found(
        port=LUCIDRAINS,
        target=target,
        inverse=_optional_square(inverses[0] if inverses else None, base),
        word=_tensor(words[0], "concepts", (count, base.text_widths[0]))[chosen],
        keys=found["to_k"],
        values=found["to_v"],
        recipe={"source": LUCIDRAINS},
        notes=notes,
    )


def _count(words: Any, index: int | None) -> int:
    """How many concepts a checkpoint holds; refuses an `index` that it has not, and several without an `index`."""
    count = len(words) if isinstance(words, Tensor) and words.dim() == 2 else 1
    if index is None and count != 1:
        raise ConversionError(f"the checkpoint holds {count} concepts. Choose one by index, 0 to {count - 1}.")
    if index is not None and not 0 <= index < count:
        plural = "" if count == 1 else "s"
        raise ConversionError(f"the checkpoint holds {count} concept{plural}, so index must be 0 to {count - 1}, got {index}.")
    return count


def _parameters(value: Any) -> dict[str, Any]:
    """The entries of a saved ParameterDict, of old and new torch, or of a plain dict."""
    if isinstance(value, _StandIn):
        value = value.__dict__.get("_parameters")
    return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else {}


def _texts(value: Any) -> list[str]:
    """A list of words, plain or inside a saved configuration object."""
    if isinstance(value, _StandIn):
        value = value.__dict__.get("_content")
    items = value if isinstance(value, (list, tuple)) else []
    items = [item.__dict__.get("_val") if isinstance(item, _StandIn) else item for item in items]
    return [item for item in items if isinstance(item, str)]


def _tensor(value: Any, what: str, shape: tuple[int | None, ...]) -> Tensor:
    """The tensor as float64 on the CPU, after checking it, since a hostile one may claim any size."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    fits = plain and value.is_floating_point() and value.dim() == len(shape)
    fits = fits and all(want in (None, have) for want, have in zip(shape, value.shape))
    if not fits or value.numel() > MAX_BYTES // 8:
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ConversionError(f"{what} must be a floating point tensor of shape ({wanted}) for this pipeline, got {came}.")
    value = value.detach().double()
    if not torch.isfinite(value).all():
        raise ConversionError(f"{what} holds NaN or infinity: training diverged.")
    return value


def _optional_square(value: Any, base: Base) -> Tensor | None:
    return None if value is None else _tensor(value, "C_inv", (base.encoding_dim, base.encoding_dim))


def _one_target(targets: list[Tensor]) -> tuple[Tensor, list[str]]:
    """The one i*: its mean over the layers, which the port keeps separately. [D]"""
    target = torch.stack(targets).mean(0)
    if not target.any():
        raise ConversionError("i* is zero: this concept was never trained.")
    spread = max((one - target).norm() / target.norm() for one in targets)
    if spread > LARGEST_SPREAD:
        raise ConversionError(f"i* must be one vector, but the layers' differ by {spread:.1%}. The layers were not trained together.")
    if spread > 1e-5:
        return target, [f"Approximated: i* is the mean over the layers, which differ by up to {spread:.2%}."]
    return target, []


# Layers by name and by order


def _layer_paths(pipe: Any) -> dict[str, tuple[str, ...]]:
    """layer -> its names: diffusers' own, and the one in the original Stable Diffusion code."""
    per_block = getattr(pipe.unet, "_orig_mod", pipe.unet).config.layers_per_block
    return {layer: (layer, *_original_name(layer, per_block)) for layer in cross_attention_layers(pipe.unet)}


def _original_name(layer: str, per_block: Any) -> Iterator[str]:
    """input_blocks, middle_block and output_blocks count residual blocks; a down block has `per_block`, an up block one more."""
    kind, *rest = layer.split(".attentions.")
    if not rest or not isinstance(per_block, int):
        return
    attention, _, tail = rest[0].partition(".")
    block = int(kind.rsplit(".", 1)[-1]) if kind[-1].isdigit() else 0
    place = block * (per_block + 1) + int(attention)
    if kind.startswith("down_blocks."):
        yield f"input_blocks.{place + 1}.1.{tail}"
    elif kind.startswith("up_blocks."):
        yield f"output_blocks.{place}.1.{tail}"
    elif kind == "mid_block":
        yield f"middle_block.1.{tail}"


def _by_layer(values: Mapping[str, Any], paths: Mapping[str, tuple[str, ...]], base: Base, what: str) -> dict[str, Any]:
    """Values by path -> values by layer, every layer exactly once."""
    result = {}
    for layer in base.layers:
        hits = [path for path in values if any(path == name or path.endswith(f".{name}") for name in paths[layer])]
        if len(hits) != 1:
            raise ConversionError(
                f"{what} must be there once for each of {len(base.layers)} layers, but for {layer} it is there {len(hits)} times. "
                "Was it trained on another model?"
            )
        result[layer] = values[hits[0]]
    if len(result) != len(values):
        raise ConversionError(f"{what} is there for {len(values)} layers, {base} has {len(result)}. Was it trained on another model?")
    return result


def _assign(outputs: list[Tensor], pipe: Any, base: Base) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which output in a bare list belongs to which layer: (keys, values) by layer.

    Two orders are known: diffusers' module order, and the original code's, which has the middle block in the middle.
    Widths decide, then the key lock: only in the right order are the keys W_K s.
    """
    places = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    run_order = sorted(base.layers, key=lambda layer: places.get(layer.split(".")[0], 0))
    widths = [output.shape[1] for output in outputs]
    candidates = []
    for order in dict.fromkeys((tuple(base.layers), tuple(run_order))):
        if widths == [base.layers[layer] for layer in order for _ in ("key", "value")]:
            keys = dict(zip(order, outputs[0::2]))
            residual = _fit(_weights(pipe, "to_k"), torch.cat([keys[layer] for layer in base.layers], 1)[0])[1]
            candidates.append((order, residual))
    if not candidates:
        raise ConversionError(f"the outputs' widths {widths[0::2]} are not those of {base}. It was trained on another model.")
    order, residual = min(candidates, key=lambda candidate: candidate[1])
    if len(candidates) > 1 and residual > LOCKED:
        raise ConversionError("the order of the layers cannot be told: two orders fit the widths, and the keys are not locked.")
    keys, values = dict(zip(order, outputs[0::2])), dict(zip(order, outputs[1::2]))
    return {layer: keys[layer] for layer in base.layers}, {layer: values[layer] for layer in base.layers}


# The mathematics


def _weights(pipe: Any, projection: str) -> list[Tensor]:
    """W of every layer, [d_l, D] each, as they lie in the pipeline."""
    linears = [getattr(layer, projection) for layer in cross_attention_layers(pipe.unet).values()]
    weights = [getattr(linear, "base_layer", linear).weight.detach() for linear in linears]
    if any(weight.is_meta for weight in weights):
        raise ConversionError("the UNet's weights are offloaded and cannot be read. Convert before offloading.")
    return weights


def _fit(weights: list[Tensor], outputs: Tensor) -> tuple[Tensor, float]:
    """x [D] that minimises |W x - o| over all layers' W [O, D], and the relative residual |W x - o| / |o|."""
    width, normal, right, start = weights[0].shape[1], 0, 0, 0
    for weight in weights:
        matrix = weight.cpu().double()
        part = outputs[start : start + len(matrix)]
        normal, right, start = normal + matrix.T @ matrix, right + matrix.T @ part, start + len(matrix)
    x = torch.linalg.pinv(normal, rtol=1e-12 * width, hermitian=True) @ right
    residual = torch.cat([weight.cpu().double() @ x for weight in weights]) - outputs
    return x, (residual.norm() / outputs.norm().clamp_min(1e-300)).item()


def _superclass_encoding(pipe: Any, keys: Tensor, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """s with W_K s = keys, and None; or the fit, and the keys themselves where they are not locked."""
    s, residual = _fit(_weights(pipe, "to_k"), keys)
    if residual <= LOCKED:
        notes.append(f"s comes from the locked keys o*_K = W_K s; relative residual {residual:.1e}.")
        return s, None
    notes.append(
        f"The keys are not W_K s on this UNet (relative residual {residual:.2f}): trained without the key lock, or on another "
        "UNet. They are kept as they are, and the file is twice as large."
    )
    return s, keys


def _metric_target(found: _Found, covariance: Covariance | None, base: Base) -> tuple[Tensor, str]:
    """C^-1 i* [D], and the fingerprint of C."""
    if found.inverse is not None:
        metric = found.inverse @ found.target
        fingerprint = "inverse-" + hashlib.sha256(found.inverse.float().numpy().tobytes()).hexdigest()[:16]
    elif covariance is not None:
        metric, fingerprint = covariance.metric_targets(found.target).double(), covariance.fingerprint
    else:
        raise advise(
            ConversionError("the checkpoint holds no C^-1."),
            python="Give the text encoder's covariance; get_covariance(pipe) of perfusion.covariance finds or computes it.",
            command="Give the text encoder's with --covariance FILE; `perfusion covariance --output FILE` finds or computes it.",
        )
    if not torch.dot(found.target, metric) > 0:
        raise ConversionError("the energy i* . C^-1 i* is not positive: C^-1 is not the inverse of a covariance.")
    return metric, fingerprint


class _Reader:
    """Encodes prompts in which one token has a given embedding."""

    def __init__(self, pipe: Any) -> None:
        self.tokenizer, self.encoder = text_encoders(pipe)[0]
        self.stand_in = self.token("*")

    def token(self, word: str) -> int:
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ConversionError(f"{word!r} is {len(ids)} tokens for this text encoder; give a superclass that is one.")
        return ids[0]

    @torch.no_grad()
    def encode(self, templates: Sequence[str], word: str, embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encodings [P, T, D] in float64 of the templates with `word` in them, and where that token stands [P, T]."""
        texts = [template.format(word) for template in templates]
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        place = ids == self.token(word)
        if not (place.sum(1) == 1).all():
            raise ConversionError(f"each template must hold {{}} once and nothing like {word!r} besides, got {list(templates)}.")

        def substitute(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            where = place.to(output.device)[..., None]
            return torch.where(where, embedding.to(output), output)

        table = self.encoder.get_input_embeddings()
        handle = table.register_forward_hook(substitute) if embedding is not None else None
        try:
            encodings = self.encoder(ids.to(table.weight.device))[0]
        finally:
            if handle is not None:
                handle.remove()
        return encodings.cpu().double(), place

    def superclass_encoding(self, superclass: str, templates: Sequence[str]) -> Tensor:
        """s [D]: the mean encoding at the superclass word."""
        encodings, place = self.encode(templates, superclass)
        return encodings[place].mean(0)


def _gates(reader: _Reader, found: _Found, metric_target: Tensor, templates: Sequence[str]) -> tuple[Tensor, float]:
    """The training gate at every position of every template with the concept word in it, [P, T]; and the mean c at the word."""
    encodings, place = reader.encode(templates, "*", found.word)
    similarity = encodings @ metric_target / torch.dot(found.target, metric_target)
    at_word = similarity[place].mean().item()
    if at_word < LEAST_SIMILARITY:
        raise ConversionError(
            f"at the concept word the similarity to i* is {at_word:.2f}, and 1 is expected: the gate would not open. "
            "The checkpoint was trained with another text encoder, or another of its layers."
        )
    return torch.sigmoid((similarity - TRAINING_BIAS) / TRAINING_TEMPERATURE), at_word


def _collapse(rows: Mapping[str, Tensor], gates: Tensor, notes: list[str], kind: str) -> Tensor:
    """One output for all positions: [O] from [R, d] per layer, in layer order."""
    outputs = torch.cat(list(rows.values()), dim=1)  # [R, O]
    if len(outputs) == 1:
        return outputs[0]
    weights = (gates**2).sum(0)  # [R]
    weights = weights / weights.sum()
    mean = weights @ outputs
    spread = ((weights @ (outputs - mean).square().sum(1)).sqrt() / mean.norm()).item()
    top = weights.argsort(descending=True)[:4].tolist()
    shares = ", ".join(f"token {position} {weights[position]:.0%}" for position in top if weights[position] > 0.01)
    notes.append(
        f"Approximated: the port has one o* per token position; the {kind} are their mean, weighted by the squared gate "
        f"({shares}). The positions differ from it by {spread:.0%} (root mean square)."
    )
    return mean
