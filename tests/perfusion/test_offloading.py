"""perfusion.training.offloading: where models are, and the size of tiles, whatever happens."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from perfusion.training.offloading import Offloaded, tiled


class Model(torch.nn.Linear):
    """Remembers where it was sent."""

    def __init__(self):
        super().__init__(1, 1)
        self.sent = []

    def to(self, device):
        self.sent.append(str(device))
        if self.full and str(device) != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self

    full = False


def test_models_are_on_the_device_while_they_compute():
    model, small = Model(), Model()
    small.is_loaded_in_8bit = True
    with Offloaded([model, small], torch.device("cuda")) as offloaded:
        assert model.sent == ["cpu"]
        with offloaded.here():
            with offloaded.here():
                pass
            assert model.sent == ["cpu", "cuda"]
        with pytest.raises(ValueError), offloaded.here():
            raise ValueError
        assert model.sent == ["cpu", "cuda", "cpu", "cuda", "cpu"]
    assert model.sent[5:] == ["cuda"] and small.sent == []


def test_an_error_is_not_covered_by_a_device_that_is_full():
    model = Model()
    model.full = True
    with pytest.warns(UserWarning, match="stay on the CPU"), pytest.raises(ValueError, match="the first"):
        with Offloaded([model], torch.device("cuda")):
            raise ValueError("the first")
    with pytest.raises(torch.OutOfMemoryError), Offloaded([model], torch.device("cuda")):
        pass


def test_a_picture_of_1024_pixels_is_cut_by_the_vae_of_sdxl():
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        norm_num_groups=2, sample_size=1024)  # fmt: skip
    seen = []
    vae.encoder.register_forward_hook(lambda module, given, output: seen.append(tuple(given[0].shape[-2:])))
    vae.decoder.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape[-2:])))
    with torch.no_grad(), tiled(vae):
        latents = vae.encode(torch.zeros(1, 3, 1024, 768)).latent_dist.mean
        assert vae.decode(latents).sample.shape == (1, 3, 1024, 768)
    assert seen and max(max(size) for size in seen) == 512
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (False, 1024, 128)
    with tiled(AutoencoderTiny(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4)), tiled(torch.nn.Identity()):
        pass
