"""Drawing a part of a picture anew with models whose latents diffusers' inpainting does not know: toybox has 8 channels, not 4."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["KeepOutside", "known"]


def known(model: torch.nn.Module) -> bool:
    """Whether diffusers' inpainting pipelines take a denoiser."""
    return model.config.in_channels in (4, 9)


class KeepOutside:
    """For `callback_on_step_end` of an image-to-image pipeline: after each step latents outside the mask are the picture's again, at the
    noise of the next step and without noise after the last.

    image: RGB, mask: L, white where it is drawn anew; both of one size.
    """

    def __init__(self, pipe: Any, image: Any, mask: Any):
        from diffusers.image_processor import VaeImageProcessor
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

        vae = pipe.vae
        with torch.no_grad():
            pixels = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor).preprocess(image).to(pipe.device, vae.dtype)
            self.latents = retrieve_latents(vae.encode(pixels), sample_mode="argmax") * vae.config.scaling_factor
        self.noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(0)).to(self.latents)
        white = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8).view(1, 1, mask.height, mask.width)
        self.mask = torch.nn.functional.interpolate(white.float() / 255, self.latents.shape[-2:], mode="area").to(self.latents.device) > 0.5

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        drawn, kept = tensors["latents"], self.latents
        # image-to-image begins late in the schedule, and counts its own steps from there
        left = pipe.scheduler.timesteps[-(pipe._num_timesteps - step - 1) :][:1] if step + 1 < pipe._num_timesteps else ()
        if len(left):
            kept = pipe.scheduler.add_noise(kept, self.noise, left)
        return {"latents": torch.where(self.mask, drawn, kept.to(drawn))}
