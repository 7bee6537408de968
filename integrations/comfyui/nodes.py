"""The nodes. Concepts lie in ComfyUI/models/perfusion.

    Load Checkpoint ── MODEL ───────────────────────────────── Perfusion Apply ── KSampler
          └─── CLIP ──── Perfusion Text Encode ── positive ──────┘      (positive goes to KSampler, too)
    Load Perfusion Concept ── Settings ── Region ──┘
"""

from __future__ import annotations

import os
from typing import Any

import folder_paths

from perfusion import Concept

from .attention import patch
from .concepts import Loaded, changed, joined, uses_of
from .encoding import encode

FOLDER, CATEGORY, CONCEPTS = "perfusion", "perfusion", "PERFUSION_CONCEPTS"
if FOLDER not in folder_paths.folder_names_and_paths:
    folder_paths.folder_names_and_paths[FOLDER] = ([os.path.join(folder_paths.models_dir, FOLDER)], {".safetensors"})


class LoadConcept:
    DESCRIPTION = "Load a concept from models/perfusion. Prompts write its name as <name>."
    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", (CONCEPTS, "STRING"), ("concepts", "word")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"concept": (folder_paths.get_filename_list(FOLDER),)}}

    @classmethod
    def IS_CHANGED(cls, concept: str) -> float:
        return os.path.getmtime(folder_paths.get_full_path(FOLDER, concept))

    def load(self, concept: str) -> tuple:
        path = folder_paths.get_full_path(FOLDER, concept)
        if path is None:
            raise FileNotFoundError(f"there is no concept {concept!r} in models/{FOLDER}. Copy the file there.")
        loaded = Loaded(Concept.load(path))
        return [loaded], f"<{loaded.name}>"


class ConceptSettings:
    DESCRIPTION = "Set concepts: all that come in, or the one that is named. A lower bias opens the gate at more words: more identity."
    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "set", (CONCEPTS,), ("concepts",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        number = {"min": 0.0, "max": 2.0, "step": 0.05, "round": 0.001}
        return {
            "required": {
                "concepts": (CONCEPTS,),
                "strength": ("FLOAT", {**number, "default": 1.0, "tooltip": "Of the whole edit: 0 leaves the superclass."}),
                "bias": ("FLOAT", {**number, "default": 0.7, "max": 1.0, "tooltip": "β, the similarity at which the gate is half open."}),
                "temperature": ("FLOAT", {**number, "default": 0.15, "min": 0.01, "tooltip": "τ, how sharply it opens."}),
            },
            "optional": {"name": ("STRING", {"default": "", "tooltip": "Which concept; empty for all."})},
        }

    def set(self, concepts: list, strength: float, bias: float, temperature: float, name: str = "") -> tuple:
        return (changed(concepts, name, strength=strength, bias=bias, temperature=temperature),)


class ConceptRegion:
    DESCRIPTION = "Keep a concept inside a mask: outside of it no part of the picture can read its word."
    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "set", (CONCEPTS,), ("concepts",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"concepts": (CONCEPTS,), "mask": ("MASK",)}, "optional": {"name": ("STRING", {"default": ""})}}

    def set(self, concepts: list, mask: Any, name: str = "") -> tuple:
        region = mask.reshape(-1, *mask.shape[-2:])
        if len(region) != 1:
            raise ValueError(f"a region is one mask, and {len(region)} came.")
        return (changed(concepts, name, region=region[0]),)


class CombineConcepts:
    DESCRIPTION = "Several concepts for one prompt."
    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "combine", (CONCEPTS,), ("concepts",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"concepts": (CONCEPTS,), "more": (CONCEPTS,)}}

    def combine(self, concepts: list, more: list) -> tuple:
        return (joined(concepts, more),)


class TextEncode:
    DESCRIPTION = "Encode a prompt that names concepts: a photo of <mug> on (the moon:1.2). <mug:0.8> and <mug|bias=0.6> set one place."
    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "encode", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        text = ("STRING", {"multiline": True, "dynamicPrompts": True})
        return {"required": {"clip": ("CLIP",), "concepts": (CONCEPTS,), "text": text}}

    def encode(self, clip: Any, concepts: list, text: str) -> tuple:
        if clip is None:
            raise ValueError("the checkpoint has no text encoder: load one with a CLIP loader.")
        return (encode(clip, concepts, text),)


class Apply:
    DESCRIPTION = "Let a model draw the concepts of a conditioning. Chain it for a second conditioning."
    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "apply", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "conditioning": ("CONDITIONING",)}, "optional": {"more": ("CONDITIONING",)}}

    def apply(self, model: Any, conditioning: list, more: list | None = None) -> tuple:
        return (patch(model, uses_of([*conditioning, *(more or ())])),)


NODE_CLASS_MAPPINGS = {
    "PerfusionLoadConcept": LoadConcept,
    "PerfusionConceptSettings": ConceptSettings,
    "PerfusionConceptRegion": ConceptRegion,
    "PerfusionCombineConcepts": CombineConcepts,
    "PerfusionTextEncode": TextEncode,
    "PerfusionApply": Apply,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PerfusionLoadConcept": "Load Perfusion Concept",
    "PerfusionConceptSettings": "Perfusion Concept Settings",
    "PerfusionConceptRegion": "Perfusion Concept Region",
    "PerfusionCombineConcepts": "Combine Perfusion Concepts",
    "PerfusionTextEncode": "Perfusion Text Encode",
    "PerfusionApply": "Perfusion Apply",
}
