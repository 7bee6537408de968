"""Checkpoints built to the exact layouts of the two ports, and the concept that is in them.

    path = save(tmp_path, package(Truth(pipe)))
"""

import torch

from perfusion.base import cross_attention_layers, describe_base

# The tiny pipeline's layers under the names of the original Stable Diffusion code, which count residual blocks:
# one layer per down block, two per up block.
ORIGINAL = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2": "input_blocks.1.1.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2": "output_blocks.2.1.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2": "output_blocks.3.1.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2": "middle_block.1.transformer_blocks.0.attn2",
}
WORD_TOKEN = 5  # of "a photo of a *"


class Truth:
    """A concept as a port would have trained it: consistent with the pipeline's weights and text encoder."""

    def __init__(self, pipe, seed=0, concepts=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.base = describe_base(pipe)
        layers = cross_attention_layers(pipe.unet)
        self.to_k = {name: layer.to_k.weight for name, layer in layers.items()}
        self.to_v = {name: layer.to_v.weight for name, layer in layers.items()}
        dim = self.base.encoding_dim
        token = pipe.tokenizer("teddy", add_special_tokens=False).input_ids[0]
        start = pipe.text_encoder.get_input_embeddings().weight[token]
        self.words = start + 0.01 * self.draw(concepts, dim)
        self.targets = torch.stack([self.encode(pipe, word)[WORD_TOKEN] for word in self.words])
        self.prompt = self.encode(pipe, start)  # [77, D], the superclass prompt
        self.s = self.prompt[WORD_TOKEN]
        samples = self.draw(4 * dim, dim) + self.targets[0]
        self.covariance = samples.T @ samples / len(samples)
        self.inverse = torch.linalg.inv(self.covariance)
        self.moves = {name: self.draw(len(weight)) for name, weight in self.to_v.items()}

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    @torch.no_grad()
    def encode(self, pipe, word):
        ids = pipe.tokenizer("a photo of a *", padding="max_length", return_tensors="pt").input_ids
        table = pipe.text_encoder.get_input_embeddings()
        embedded = table(ids)
        embedded[0, WORD_TOKEN] = word
        handle = table.register_forward_hook(lambda *_: embedded)
        try:
            return pipe.text_encoder(ids)[0][0]
        finally:
            handle.remove()

    def keys(self, name):
        return self.to_k[name] @ self.s

    def values(self, name):
        return self.to_v[name] @ self.s + self.moves[name]

    def value_outputs(self):
        return torch.cat([self.values(name) for name in self.base.layers])


def save(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    return path


def package(truth, order=None, concepts=1):
    """What the first port's `save` writes."""
    pairs = []
    for name in order or truth.base.layers:
        for output in (truth.keys(name), truth.values(name)):
            pairs.append([truth.targets.clone(), output.repeat(concepts, 1)])
    return {"embed_params": truth.words.clone(), "key_value_params": pairs, "C_inv": truth.inverse}


def state_dict(truth, prefix="unet.", names=None, suffix="concept_outputs"):
    state = {"text.wrapped_embed.concepts": truth.words.clone(), "text.wrapped_embed.embed.weight": torch.zeros(9, 16)}
    for name in truth.base.layers:
        path = prefix + (names[name] if names else name)
        for projection, output in (("to_k", truth.keys(name)), ("to_v", truth.values(name))):
            state[f"{path}.{projection}.{suffix}"] = output[None]
            state[f"{path}.{projection}.weight"] = torch.zeros(len(output), 16)
            state[f"{path}.{projection}.initted"] = torch.ones(1, 1, dtype=torch.bool)
            state[f"{path}.{projection}.ema_concept_text_encs"] = truth.targets.clone()
            state[f"{path}.{projection}.C_inv"] = truth.inverse
    return state


def chendaryen(truth, rows=77, names=ORIGINAL, words=("teddy",)):
    """What the second port's `on_save_checkpoint` leaves: one output per token position."""
    parameters = torch.nn.ParameterDict()
    parameters["*"] = torch.nn.Parameter(truth.words[:1].clone())
    outputs = {}
    for name in truth.base.layers:
        outputs[f"{names[name]}.to_k.target_output"] = truth.prompt[:rows] @ truth.to_k[name].T
        outputs[f"{names[name]}.to_v.target_output"] = truth.prompt[:rows] @ truth.to_v[name].T + truth.moves[name]
    return {
        "global_step": 400,
        "C_inv": truth.inverse,
        "target_input": truth.targets[0].clone(),
        "embedding": {"initializer_words": list(words), "string_to_token": {"*": 265}, "string_to_param": parameters},
        "target_output": outputs,
    }
