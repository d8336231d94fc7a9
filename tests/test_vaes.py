"Every VAE behind the one door: any size, exact streams, parity with released code."
import json
import numpy as np
import pytest
import torch
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from fvae_nb.vaes.interface import REGISTRY, WeightsError, control_for, load_vae

OFFLINE = ["tiny", "dct", "dct-4x8x8-16-causal", "dct-1x8x8-32"]


@pytest.mark.parametrize("name", OFFLINE)
@given(T=st.integers(1, 20), H=st.integers(5, 40), W=st.integers(5, 40))
@hsettings(max_examples=12, deadline=None)
def test_any_size_in_the_same_size_out(name, T, H, W):
    video = torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1
    vae = load_vae(name)
    latent = vae.encode(video)
    back = vae.decode(latent)
    assert back.shape == video.shape and latent.values.shape[1] == vae.spec.channels and torch.isfinite(back).all()
    t, h, w = vae.spec.strides
    assert latent.values.shape[2:] == (vae.spec.first + -(-(T - vae.spec.first) // t), -(-H // h), -(-W // w))


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16])
def test_streams_are_the_whole(name, chunk):
    vae, video = load_vae(name), torch.rand(1, 1, 19, 24, 33) * 2 - 1
    whole = vae.encode(video)
    pieces = [video[:, :, a:a + chunk] for a in range(0, 19, chunk)]
    latents = list(vae.encode_stream(pieces))
    assert (torch.cat(latents, 2) - whole.values).abs().max() < 2e-5
    streamed = torch.cat(list(vae.decode_stream(latents, whole.shape)), 2)
    assert (streamed - vae.decode(whole)).abs().max() < 2e-5


def test_tiny_is_causal():
    vae, a = load_vae("tiny"), torch.rand(1, 1, 13, 32, 32) * 2 - 1
    b = a.clone(); b[:, :, 9:] = -b[:, :, 9:]
    assert torch.equal(vae.encode(a).values[:, :, :3], vae.encode(b).values[:, :, :3])
    assert (vae.decode(vae.encode(a))[:, :, :9] - vae.decode(vae.encode(b))[:, :, :9]).abs().max() < 2e-5


def test_tiny_is_small_standardised_and_says_what_it_saw():
    from fvae_nb.vaes.tiny import read_tiny, weights_path
    net, facts, _ = read_tiny(weights_path())
    assert sum(p.numel() for p in net.parameters()) <= 3_000_000 and weights_path().stat().st_size < 8_000_000
    assert facts["never"] == "no medical image" and facts["licence"] and facts["steps"] > 0
    assert all(row["kind"] in ("photo", "video") and len(row["sha256"]) == 64 and row["licence"] for row in facts["data"]) and len(facts["data"]) > 2
    assert (net.std > 0).all() and not torch.equal(net.std, torch.ones(16))


def test_untrained_tiny_is_the_control():
    from fvae_nb.vaes.dct import DCT
    from fvae_nb.vaes.tiny import TinyVAE
    x, control = torch.rand(1, 1, 9, 32, 40) * 2 - 1, DCT(causal=True)
    with torch.no_grad(): assert (TinyVAE()(x) - control.decode(control.encode(x))).abs().max() < 1e-5


def test_colour_is_read_as_its_mean():
    vae, gray = load_vae("tiny"), torch.rand(1, 1, 5, 16, 16) * 2 - 1
    latent = vae.encode(gray.expand(-1, 3, -1, -1, -1))
    assert torch.allclose(latent.values, vae.encode(gray).values, atol=1e-5)
    assert vae.decode(latent, channels=3).shape == (1, 3, 5, 16, 16)


def test_control_has_the_same_budget():
    for name in ("tiny", "dct"):
        spec = load_vae(name).spec
        theirs = load_vae(control_for(spec)).spec
        assert (theirs.channels, theirs.strides, theirs.first) == (spec.channels, spec.strides, spec.first)


def test_taef2_parity(taef2):
    facts = json.loads((FIXTURES / "taef2/astronaut64.json").read_text())
    data = np.load(FIXTURES / "taef2/astronaut64.npz")
    x = torch.from_numpy(data["input_uint8"].astype(np.float32) / 255).permute(2, 0, 1)[None, :, None]
    with torch.no_grad(): z = taef2.net.encode(x)[:, :, 0]; y = taef2.net.decode(torch.from_numpy(data["latent"])[:, :, None])[:, :, 0]
    errors = [float((a - torch.from_numpy(data[k])).abs().max()) for a, k in ((z, "latent"), (y, "recon"))]
    print("taef2 max abs error: latent %.2g, reconstruction %.2g" % tuple(errors))
    assert max(errors) <= facts["tolerance"]["atol"]


def test_taef2_keys_match_the_release(test_data):
    from fvae_nb.vaes.taef2 import TAEF2
    keys = json.loads((test_data / "parity/taef2/keys.json").read_text())
    net = TAEF2()
    for part in ("encoder", "decoder"):
        assert {k: list(v.shape) for k, v in getattr(net, part).state_dict().items()} == {k: v["shape"] for k, v in keys[part].items()}


def test_missing_weights_say_where_they_were_looked_for(in_tmp):
    with pytest.raises(WeightsError) as error: load_vae("taef2")
    assert "settings.ini" in str(error.value) and "taef2_encoder.safetensors" in str(error.value)


def test_damaged_weights_are_refused(tmp_path):
    for part in ("encoder", "decoder"): (tmp_path / f"taef2_{part}.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(WeightsError): load_vae("taef2", weights=tmp_path)
