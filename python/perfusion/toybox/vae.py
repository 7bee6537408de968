"""The toybox autoencoder: principal components of 8×8 patches, and small networks that learn what those miss."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

PATCH = 8


class Residual(nn.Module):
    """x plus two convolutions of it; the second starts at zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(nn.functional.silu(self.inner(nn.functional.silu(x))))


def _network(inputs: int, width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, 1, 1), *(Residual(width) for _ in range(depth)), nn.SiLU())


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Images [B, 3, H, W] in [-1, 1] to latents [B, latent_channels, H/8, W/8] and back; H and W are multiples of 8.

    Both ways have a linear path (`analysis`, `synthesis`) set by `set_principal_components`, and a residual network that
    starts at zero: before any training it is the best linear autoencoder of patches, and training can only add to it.
    It works on space-to-depth blocks, because upsampling by repetition cannot tell the places within a patch apart.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        widths: tuple[int, int] = (48, 96),
        encoder_depths: tuple[int, int] = (1, 1),
        decoder_depths: tuple[int, int] = (2, 2),
        scaling_factor: float = 1.0,
        block_out_channels: tuple[int, ...] = (48, 48, 48, 96),  # pipelines count these for the patch size, 2^(4 - 1)
    ):
        super().__init__()
        fine, coarse = widths
        self.analysis = nn.Conv2d(3, latent_channels, PATCH, PATCH)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), _network(48, fine, encoder_depths[0]),
            nn.PixelUnshuffle(2), _network(4 * fine, coarse, encoder_depths[1]), _zero(nn.Conv2d(coarse, latent_channels, 1)),
        )  # fmt: skip
        self.synthesis = nn.ConvTranspose2d(latent_channels, 3, PATCH, PATCH)
        self.decoder_coarse = nn.Sequential(
            _network(latent_channels, coarse, decoder_depths[0]), nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2)
        )
        self.unshuffle = nn.PixelUnshuffle(4)
        self.decoder_fine = nn.Sequential(
            _network(48 + fine, fine, decoder_depths[1]), _zero(nn.Conv2d(fine, 48, 3, 1, 1)), nn.PixelShuffle(4)
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        latents = self.analysis(x) + self.encoder(x)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> DecoderOutput | tuple[Tensor]:
        linear = self.synthesis(z)
        image = linear + self.decoder_fine(torch.cat([self.unshuffle(linear), self.decoder_coarse(z)], dim=1))
        return DecoderOutput(sample=image) if return_dict else (image,)

    @torch.no_grad()
    def set_principal_components(self, images: Tensor, whitening: float = 0.5) -> None:
        """Set the linear path to the principal components of the patches of images [n, 3, H, W] in [-1, 1].

        whitening: 0 keeps the components' own variances, 1 makes them equal.
        """
        channels = self.config.latent_channels
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH**2).double()
        mean = patches.mean(0)
        variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        variances, directions = variances.flip(0)[:channels], directions.flip(1)[:, :channels]
        directions = directions * directions.sum(0).sign()  # a direction and its opposite are the same component
        sizes = (variances / variances.sum()).pow(whitening / 2)
        self.analysis.weight.copy_((directions / sizes).T.reshape(channels, 3, PATCH, PATCH))
        self.analysis.bias.copy_(-mean @ (directions / sizes))
        self.synthesis.weight.copy_((directions * sizes).T.reshape(channels, 3, PATCH, PATCH))
        # the mean differs over the patch, the bias cannot: the mean colour, and the rest is left to the network
        self.synthesis.bias.copy_(mean.view(3, -1).mean(1))
