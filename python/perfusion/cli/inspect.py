"""`perfusion inspect`: what a concept file holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfusion.cli.strict_json import strict_json

if TYPE_CHECKING:
    from perfusion.base import Base
    from perfusion.concept import Concept


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A concept file, such as my-teddy.safetensors.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every number unrounded.")] = False,
) -> None:
    """Check a concept file and say what is in it.

    Shows what the concept is called and what it is one of, the base model it needs, how wide its gate opens, how it was
    trained, and how large its vectors are. Nothing in the file is executed, so files from strangers are safe to look at.

    Exit codes: 0 a sound concept, 2 no such file, 3 a file that is refused.
    """
    from perfusion.concept import Concept

    concept, size = Concept.load(file), file.stat().st_size
    facts = describe(concept, file, size)
    print(strict_json(facts) if json else "\n".join(_lines(facts, concept)))


def describe(concept: Concept, file: Path, size: int) -> dict[str, Any]:
    """Everything that `perfusion inspect` knows, as JSON values."""
    return {
        "file": str(file),
        "bytes": size,
        "dtype": _dtype(file),
        "name": concept.name,
        "superclass": concept.superclass,
        "base": {
            "family": concept.base.family,
            "encoding_dim": concept.base.encoding_dim,
            "text_widths": list(concept.base.text_widths),
            "layers": dict(concept.base.layers),
            "outputs": concept.base.outputs,
            "text_encoder": concept.base.text_encoder,
        },
        "bias": concept.bias,
        "temperature": concept.temperature,
        "keys": "locked" if concept.key_outputs is None else "own",
        "covariance": concept.covariance,
        "recipe": concept.recipe,
        "created": concept.created,
        "author": concept.author,
        "license": concept.license,
        "energy": concept.energy,
        "norms": {
            "target": _norm(concept.target),
            "superclass_encoding": _norm(concept.superclass_encoding),
            "word_embeddings": [_norm(word) for word in concept.word_embeddings],
            "value_outputs": _norm(concept.value_outputs),
            "key_outputs": None if concept.key_outputs is None else _norm(concept.key_outputs),
        },
        "groups": _groups(concept),
        "cosines": {
            "target_superclass": _cosine(concept.target, concept.superclass_encoding),
            "target_metric_target": _cosine(concept.target, concept.metric_target),
        },
        # What the plain superclass word feels of this concept: the less, the better they are kept apart.
        "superclass_similarity": concept.similarity(concept.superclass_encoding).item(),
        "superclass_gate": concept.gate(concept.superclass_encoding).item(),
        "target_gate": concept.gate(concept.target).item(),
    }


def _dtype(file: Path) -> str:
    import safetensors

    with safetensors.safe_open(file, "pt") as tensors:
        types = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return " and ".join(sorted(names[kind] for kind in types))


def _norm(vector: Any) -> float:
    return vector.double().norm().item()


def _cosine(a: Any, b: Any) -> float:
    return (a.double() @ b.double() / (a.double().norm() * b.double().norm()).clamp_min(1e-300)).item()


def _groups(concept: Concept) -> list[dict[str, Any]]:
    """The value outputs by UNet block: how many layers and outputs, their norm, and their size per output."""
    members: dict[str, list[str]] = {}
    for layer in concept.base.layers:
        members.setdefault(layer.split(".attentions.")[0], []).append(layer)
    groups = []
    for block, layers in sorted(members.items(), key=lambda member: _place(member[0])):
        outputs = sum(concept.base.layers[layer] for layer in layers)
        norm = sum(_norm(concept.value_output(layer)) ** 2 for layer in layers) ** 0.5
        rms = norm / outputs**0.5
        groups.append({"block": block, "layers": len(layers), "outputs": outputs, "norm": norm, "rms": rms})
    return groups


def _base(base: Base) -> str:
    """The base in words; of the custom ones, toybox has a name here."""
    from safetensors import safe_open

    from perfusion.base import fingerprints_match
    from perfusion.covariance import FILE_NAME
    from perfusion.models import TOYBOX

    with safe_open(TOYBOX / FILE_NAME, "pt") as file:
        toybox = file.metadata()["perfusion.text_encoder"]
    return str(base).replace("a custom model", "toybox" if fingerprints_match(base.text_encoder, toybox) else "a custom model")


def _place(block: str) -> int:
    """Where a block stands in the UNet: down, middle, up; blocks of one kind keep their order."""
    return next((place for place, kind in enumerate(("down_blocks", "mid_block", "up_blocks")) if block.startswith(kind)), -1)


def _lines(facts: dict[str, Any], concept: Concept) -> Iterable[str]:
    norms, cosines = facts["norms"], facts["cosines"]
    recipe = ", ".join(f"{key} {value}" for key, value in facts["recipe"].items())
    words = " and ".join(f"{norm:.3g}" for norm in norms["word_embeddings"])
    origin = [facts["created"]]
    origin += [f"by {facts['author']}"] if facts["author"] else []
    origin += [f"licence {facts['license']}"] if facts["license"] else []
    yield f"{facts['file']}: a Perfusion concept, {facts['bytes']:,} bytes, {facts['dtype']}"
    yield ""
    yield f"name         {facts['name']}; write <{facts['name']}> in a prompt"
    yield f"superclass   {facts['superclass']}"
    yield f"base         {_base(concept.base)}"
    yield f"gate         bias {facts['bias']:g}, temperature {facts['temperature']:g}; both can be set at every use"
    yield "keys         " + ("locked to the superclass" if facts["keys"] == "locked" else "its own, trained without the key lock")
    yield f"covariance   {facts['covariance'] or 'not stated'}"
    yield f"recipe       {recipe or 'not stated'}"
    yield f"created      {', '.join(origin)}"
    yield ""
    yield f"norms        target {norms['target']:.4g}, superclass {norms['superclass_encoding']:.4g}, word embedding {words}"
    yield (
        f"cosines      target with superclass {cosines['target_superclass']:.3f}, "
        f"with metric target {cosines['target_metric_target']:.3f}"
    )
    yield f"energy       {facts['energy']:.4g} (target . metric target, its largest entry being 1)"
    yield f"opening      {facts['target_gate']:.0%} at the concept word"
    yield f"             {facts['superclass_gate']:.0%} at the plain superclass word (similarity {facts['superclass_similarity']:.3f})"
    yield ""
    width = max(len(group["block"]) for group in facts["groups"])
    yield f"{'value outputs':{width}}  layers  outputs     norm  per output"
    for group in facts["groups"]:
        numbers = f"{group['layers']:6}  {group['outputs']:7,}  {group['norm']:7.4g}  {group['rms']:10.4g}"
        yield f"{group['block']:{max(width, 13)}}  {numbers}"
