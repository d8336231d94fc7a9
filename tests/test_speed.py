"Ratios, measured in turn on one thread."
import time
import pytest
import torch
from fvae_nb.vaes.interface import load_vae


@pytest.mark.slow
def test_tiny_is_a_hundred_times_faster_than_wan():
    "Encode plus decode at the same size, interleaved; WAN2.1's real layout at random weights (time does not depend on them)"
    from diffusers import AutoencoderKLWan
    before = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        wan, tiny, x = AutoencoderKLWan().eval(), load_vae("tiny"), torch.rand(1, 1, 5, 64, 64) * 2 - 1
        colour, ratios = x.expand(-1, 3, -1, -1, -1).contiguous(), []
        tiny.decode(tiny.encode(x))
        for _ in range(3):
            with torch.no_grad():
                t = time.process_time(); wan.decode(wan.encode(colour).latent_dist.mode()); slow = time.process_time() - t
            t = time.process_time()
            for _ in range(5): tiny.decode(tiny.encode(x))
            ratios.append(slow / ((time.process_time() - t) / 5))
        ratios.sort()
        print(f"WAN2.1 / tiny, one thread, 5x64x64: {ratios[0]:.0f}, {ratios[1]:.0f}, {ratios[2]:.0f}")
        assert ratios[1] > 100
    finally: torch.set_num_threads(before)
