"""A model as a folder that runs without torch and diffusers, and takes any concept at run time.

    perfusion.export("toybox", "exported")              # ONNX, for onnxruntime, TensorRT, browsers
    perfusion.export(pipe, "exported", format="pt2")    # torch.export programs

    unet            sample, timestep, key, value -> prediction          K and V of all layers are inputs
    text_encoder    ids, and words to put in their places -> encodings
    image_decoder   latents -> pictures
    tokenizer.json, weights.safetensors (to_k and to_v of all layers, the noise schedule), manifest.json

`perfusion.runtime` is the program beside it, in numpy. DESIGN.md, "Export".

    checks.py      what cannot be exported
    graphs.py      the graphs, as torch modules
    scheduler.py   the scheduler's constants
    writers.py     graphs to files, and files held against the modules
    folder.py      the folder
"""

from perfusion.exporting.checks import ExportError
from perfusion.exporting.folder import Exported, export

__all__ = ["ExportError", "Exported", "export"]
