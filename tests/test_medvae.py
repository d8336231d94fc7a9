"MedVAE against the released code's numbers; the released names; the way a volume goes in; windows; any size; strict loading."
import json
import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from rules import fill, smooth_video
from fvae_nb.vaes import medvae
from fvae_nb.vaes.hub import from_ras, to_ras
from fvae_nb.vaes.interface import REGISTRY, WeightsError, control_for, find_weights, load_vae
from fvae_nb.vaes.medvae import MODELS, MedNet, MedVAE, window_length

HERE = FIXTURES / "medvae"
CASES = {"medvae_3d_small": (1, 16, 32, 24), "medvae_3d_f8_small": (1, 16, 16, 24), "medvae_2d_small": (3, 1, 32, 48)}    # the recipes' sizes
FULL = {"medvae": dict(), "medvae-8": dict(mult=(1, 2, 4, 4)), "medvae-2d": dict(dims=2)}


def network(config, dims):
    net = MedVAE(dims, config["z_channels"], config["in_channels"], config["ch"], config["ch_mult"], config["num_res_blocks"])
    assert len(fill(net)) == len(net.state_dict())
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_parity(case):
    facts, stored = json.loads((HERE / f"{case}.json").read_text()), {k: torch.from_numpy(v) for k, v in np.load(HERE / f"{case}.npz").items()}
    channels, frames, height, width = CASES[case]
    assert f"smooth_video({channels},{frames},{height},{width},seed=3)" in facts["input"] and facts["gain"] == 1
    net, x = network(facts["ddconfig"], 2 if "_2d_" in case else 3), torch.from_numpy(smooth_video(channels, frames, height, width, seed=3))[None]
    mean = stored["moments"].chunk(2, 1)[0]
    ours = dict(moments=net.moments(x[:, :, 0] if net.dims == 2 else x), recon=net.decode(mean), latent_projection=net.projected(mean))
    assert set(ours) == set(stored)
    for name, theirs in stored.items():
        print(f"{case:20}{name:19} max abs error {float((ours[name] - theirs).abs().max()):.1e}, allowed {facts['tolerance']['atol']:.0e} + {facts['tolerance']['rtol']:.0e} relative")
        assert ours[name].shape == theirs.shape and torch.allclose(ours[name], theirs, **facts["tolerance"]), name
    assert (net.decode(ours["latent_projection"]) - stored["recon"]).abs().mean() > 100 * facts["tolerance"]["atol"]      # the head's picture is not what is decoded


# ---- names, shapes, norms

def shapes(net): return {k: list(v.shape) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("name, file, count", [("medvae", "4_1_3d", 161_001_358), ("medvae-8", "8_1_3d", 245_952_398), ("medvae-2d", "4_1_2d", 55_316_878)])
def test_names_and_shapes_of_the_release_at_full_size(name, file, count):
    with torch.device("meta"): net = MedVAE(**FULL[name])
    assert shapes(net) == json.loads((HERE / f"keys_medvae_{file}.json").read_text()) and sum(p.numel() for p in net.parameters()) == count
    assert (net.dims, net.stride) == MODELS[name][1:]
    assert medvae.config_of(net.state_dict()) == dict(dims=net.dims, z=1, image=1, ch=128, mult=FULL[name].get("mult", (1, 2, 4)), blocks=2, head=64)


def test_every_norm_has_the_releases_eps():
    for name, config in FULL.items():
        with torch.device("meta"): net = MedVAE(**config)
        norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
        assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-6)} and len(norms) == sum("norm" in k and k.endswith(".weight") for k in net.state_dict())


# ---- the road in and out

def tiny(name="medvae", **changes):
    vae = medvae.random_copy(name)
    for k, v in changes.items(): setattr(vae.net, k, v)
    fill(vae.net.vae)                     # livelier than fresh weights
    return vae


TINY = {name: tiny(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
@given(T=st.integers(1, 9), H=st.integers(1, 19), W=st.integers(1, 19))
@hsettings(max_examples=8, deadline=None)
def test_any_size_in_the_same_size_out(name, T, H, W):
    vae = TINY[name]
    video = torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1
    latent, s = vae.encode(video), vae.spec.strides
    back = vae.decode(latent)
    assert back.shape == video.shape and torch.isfinite(back).all() and vae.decode(latent, channels=3).shape[1] == 3
    assert latent.values.shape == (1, 1, -(-T // s[0]), -(-H // s[1]), -(-W // s[2]))


@torch.no_grad()
def test_a_volume_is_turned_as_in_training_and_a_picture_is_not():
    net, seen, x = TINY["medvae"].net, [], torch.from_numpy(smooth_video(1, 8, 12, 16, seed=0))[None]
    plain = MedVAE.moments
    net.vae.moments = lambda v: seen.append(v) or plain(net.vae, v)
    try: z = net.encode(x)
    finally: del net.vae.moments
    assert seen[0].shape == (1, 1, 16, 12, 8)                                    # right, front, up
    assert seen[0][0, 0, 15, 11, 0] == x[0, 0, 0, 0, 0] and seen[0][0, 0, 0, 11, 0] == x[0, 0, 0, 0, 15] and seen[0][0, 0, 15, 11, 7] == x[0, 0, 7, 0, 0]
    assert torch.equal(z, from_ras(plain(net.vae, to_ras(x))[:, :1])) and z.shape == (1, 1, 2, 3, 4)
    assert torch.equal(net.decode(z), from_ras(net.vae.decode(to_ras(z))))
    flat = TINY["medvae-2d"].net
    assert torch.allclose(flat.encode(x)[:, :, 5], plain(flat.vae, x[:, :, 5])[:, :1], atol=1e-6) and flat.decode(flat.encode(x)).shape == x.shape


def test_pictures_stream_and_volumes_say_that_they_do_not():
    x = torch.from_numpy(smooth_video(1, 7, 10, 12, seed=0))[None]
    flat = TINY["medvae-2d"]
    assert torch.allclose(torch.cat(list(flat.encode_stream(x.split((3, 1, 3), 2))), 2), flat.encode(x).values, atol=1e-6)
    with pytest.raises(ValueError, match="cannot stream"): next(TINY["medvae"].encode_stream([x]))


@given(n=st.integers(1, 1300), stride=st.sampled_from([4, 8]))
def test_windows_are_whole_latents_with_whole_steps(n, stride):
    w = window_length(n, stride)
    assert w == n if n <= 160 else w < n and w % (4 * stride) == 0 and 80 <= w <= 160 and (3 * w // 4) % stride == 0


@torch.no_grad()
def test_long_axes_go_in_windows_blended_where_they_overlap():
    vae, x = tiny(most=16), torch.from_numpy(smooth_video(1, 8, 12, 40, seed=2))[None]     # 40 columns: windows of 16 at 0, 12, 24
    net, ras = vae.net, to_ras(x)
    m, z = net.posterior(x)[0], torch.cat([net.vae.moments(ras[:, :, a:a + 16])[:, :1, :] for a in (0, 12, 24)], 2)
    got = to_ras(m)
    assert got.shape == (1, 1, 10, 3, 2)
    assert torch.allclose(got[:, :, :3], z[:, :, :3], atol=1e-5) and torch.allclose(got[:, :, 7:], z[:, :, 9:], atol=1e-5)      # seen by one window only
    assert torch.allclose(got[:, :, 4:6], z[:, :, 5:7], atol=1e-5)
    low, high = torch.minimum(z[:, :, 3], z[:, :, 4]), torch.maximum(z[:, :, 3], z[:, :, 4])                                    # seen by two
    assert ((got[:, :, 3] >= low - 1e-5) & (got[:, :, 3] <= high + 1e-5)).all() and (high - low).max() > 1e-2
    back = to_ras(net.decode(m))
    assert back.shape == ras.shape and torch.allclose(back[:, :, :12], net.vae.decode(got[:, :, :4])[:, :, :12], atol=1e-5)
    net.most = 160
    assert (net.encode(x) - m).abs().max() > 1e-3                                # whole, it sees more


def test_a_whole_scan_through_overlapping_windows_of_slices():
    from fvae_nb.data.samples import ellipsoid_thorax
    from fvae_nb.reconstruction.operator import reconstruct
    ct = ellipsoid_thorax((11, 20, 24))
    a, b = reconstruct(ct, TINY["medvae"], size=8, overlap=4), reconstruct(ct, TINY["medvae"], size=99)
    assert a.shape == b.shape == ct.shape and np.isfinite(a.array).all() and np.abs(a.array - b.array).max() > 1


@torch.no_grad()
def test_encode_gives_the_mean_a_generator_a_draw_and_log_variances_are_clamped():
    for name in ("medvae", "medvae-2d"):
        vae, x = tiny(name), torch.from_numpy(smooth_video(1, 4, 8, 8, seed=0))[None]
        a, b, c = (vae.encode(x, torch.Generator().manual_seed(s)).values for s in (0, 0, 1))
        mean, logvar = vae.net.posterior(x)
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(mean, vae.encode(x).values) and logvar.shape == mean.shape
        vae.net.vae.quant_conv.bias[1] = 90
        assert (vae.net.posterior(x)[1] == 20).all()


# ---- loading

@pytest.fixture
def release(tmp_path):
    "A folder with a checkpoint as the hub's, at small widths"
    net = tiny().net.vae
    (tmp_path / "model_weights").mkdir()
    torch.save({"state_dict": net.state_dict() | {"loss.logvar": torch.zeros(1)}, "global_step": 9}, tmp_path / "model_weights/vae_4x_1c_3D.ckpt")
    return net, tmp_path


def same(net, vae): return all(torch.equal(v, vae.net.vae.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_release_loads_strictly_through_the_one_door(release):
    net, folder = release
    for place in (folder, folder / "model_weights", folder / "model_weights/vae_4x_1c_3D.ckpt"):
        vae = load_vae("medvae", weights=place)
        assert same(net, vae) and len(vae.weights) == 64 and vae.spec.name == "medvae" and not vae.spec.streams
    assert vae.spec.strides == (4, 4, 4) and vae.spec.range == (-1, 1) and vae.spec.inputs == 1 and not vae.net.training and not any(p.requires_grad for p in vae.net.parameters())
    with pytest.raises(WeightsError, match="stanfordmimi/MedVAE"): find_weights(REGISTRY["medvae-2d"], folder / "nowhere")


@pytest.mark.parametrize("name, strides, control", [("medvae", (4, 4, 4), "dct-4x4x4-1"), ("medvae-8", (8, 8, 8), "dct-8x8x8-1"), ("medvae-2d", (1, 4, 4), "dct-1x4x4-1")])
def test_random_copies_have_the_real_budget(name, strides, control):
    vae = load_vae(f"{name}-random")
    assert vae.spec.random and vae.spec.strides == strides and vae.spec.channels == 1 and vae.spec.streams == (strides[0] == 1) and control_for(vae.spec) == control
    assert torch.equal(vae.encode(torch.zeros(1, 1, 8, 8, 8)).values, load_vae(f"{name}-random").encode(torch.zeros(1, 1, 8, 8, 8)).values)     # the same each time


def test_wrong_weights_give_one_clear_line(release, tmp_path):
    net, folder = release
    file, state = folder / "model_weights/vae_4x_1c_3D.ckpt", net.state_dict()
    def expect(match, name="medvae", **change):
        torch.save({"state_dict": {k: v for k, v in {**state, **change}.items() if v is not None}}, file)
        with pytest.raises(WeightsError, match=match) as error: medvae.load(file, name)
        assert "\n" not in str(error.value)
    expect("1 missing, first encoder.conv_out.bias", **{"encoder.conv_out.bias": None})
    expect("1 unknown, first extra", extra=torch.zeros(2))
    expect("of another shape", **{"encoder.conv_out.bias": torch.zeros(3)})
    expect("is 3D, stride 4, .* medvae-2d is 2D, stride 4", "medvae-2d")
    expect("is 3D, stride 4, .* medvae-8 is 3D, stride 8", "medvae-8")
    expect("LoRA factors", **{"encoder.mid.attn_1.q.lora_A": torch.zeros(4, 4)})
    expect("not MedVAE's weights \\(no channel_ds.0.bias\\)", **{"channel_ds.0.bias": None})
    torch.save({"state_dict": {k: torch.zeros(s) for k, s in shapes(MedVAE(2, 3, 3, 32, (1, 1, 1), 1)).items()}}, file)
    with pytest.raises(WeightsError, match="3 latent and 3 image channels"): medvae.load(file, "medvae-2d")
    file.write_bytes(b"no pickle")
    with pytest.raises(WeightsError, match="damaged"): medvae.load(file)
