"""Pictures from an exported model, in numpy: neither torch nor diffusers nor transformers is imported.

    runtime = perfusion.runtime.Runtime("exported")
    runtime.load("teddy.safetensors")
    images = runtime.generate([Request("a <teddy> on the beach", seed=1), Request("a <teddy:0.8> in a forest")], steps=50)

Every row of a batch has its own concepts and settings. What it needs: numpy, Pillow, safetensors, tokenizers, and onnxruntime
or another runtime's functions for the graphs.

    manifest.py    manifest.json, checked
    graphs.py      the graphs in onnxruntime
    tokens.py      prompts to ids
    encoding.py    prompts to encodings, concepts by position
    key_value.py   encodings and concepts to K and V
    schedulers.py  DDIM, PNDM, Euler
    noise.py       torch's random numbers
    concept.py     a concept as arrays
    runtime.py     Runtime and Request
"""

from perfusion.runtime.concept import Concept
from perfusion.runtime.manifest import ExportedFolderError, Manifest
from perfusion.runtime.runtime import Batch, Request, Runtime

__all__ = ["Batch", "Concept", "ExportedFolderError", "Manifest", "Request", "Runtime"]
