"WF-VAE against the released code's numbers; the released names; any size; streams that equal the whole; strict loading."
import json
import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from rules import fill, smooth_video
from fvae_nb.vaes import wfvae
from fvae_nb.vaes.interface import REGISTRY, Latent, WeightsError, find_weights, load_vae
from fvae_nb.vaes.wfvae import L16, WFVAE, Memory

HERE = FIXTURES / "wfvae"
SMALL = dict(L16, base_channels=8, latent_dim=4, encoder_energy_flow_hidden_size=6, decoder_energy_flow_hidden_size=10)
_nets = {}


def network(facts):
    "Our network with the fixture's configuration, filled by its rule; each built once"
    key = json.dumps(facts["config"], sort_keys=True)
    if key not in _nets:
        net = WFVAE(**facts["config"])
        filled = fill(net, tuple(facts["fill"]["skip"]))
        assert facts["fill"]["gain"] == 1 and len(filled) == sum("wavelet" not in k for k in net.state_dict())
        _nets[key] = net.eval().requires_grad_(False)
    return _nets[key]


def recipe(facts):
    i = facts["input"]
    return torch.from_numpy(np.stack([smooth_video(i["channels"], i["frames"], i["height"], i["width"], seed=s) for s in i["seeds"]])) * i["scale"]


def check(facts, arrays, name, ours):
    "Within the tolerance the fixture states; prints what was achieved"
    theirs = torch.from_numpy(arrays[name])
    error, tolerance = float((ours - theirs).abs().max()), facts["tolerance"][name]
    print(f"{facts['case']:18}{name:12} max abs error {error:.1e}, allowed {tolerance['atol']:.1e} + {tolerance['rtol']:g} relative")
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, **tolerance), (name, error)


@torch.no_grad()
def hold(folder, case, fast=False):
    "One case: every array, decoding from the stored latent; a chunked case in one pass and as our stream"
    facts, arrays = json.loads((folder / f"{case}.json").read_text()), np.load(folder / f"{case}.npz")
    net, x, z = network(facts), recipe(facts), torch.from_numpy(arrays["latent_mean"])
    ours = {}
    if fast: wfvae.fasten(net)
    ours["latent_mean"], ours["logvar"] = net.posterior(x)
    _, (ours["haar_in"], ours["enc_l1"], ours["enc_l2"]) = net.encoder(x, Memory())
    ours["recon"], (ours["dec_l1"], ours["dec_l2"]) = net.decoder(z, Memory())
    for name in arrays.files: check(facts, arrays, name, ours[name])
    if facts["chunked"]:
        check(facts, arrays, "latent_mean", torch.cat(list(net.encode_stream([x])), 2))
        check(facts, arrays, "recon", torch.cat(list(net.decode_stream([z])), 2))


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("case", ["small_video", "small_image", "small_odd_frames", "small_tiled", "small_tiled25", "groupnorm_video", "time8_video", "time8_tiled"])
def test_parity(case, fast): hold(HERE, case, fast)


@pytest.mark.parametrize("case", ["full16_image", "full16_video", "full16_tiled"])
def test_parity_at_full_size(case, test_data): hold(test_data / "parity/wfvae", case)


# ---- names, shapes, norms

def shapes(net): return {k: list(v.shape) for k, v in net.state_dict().items()}


def test_names_and_shapes_of_the_release_at_full_size():
    with torch.device("meta"): large, small = WFVAE(**L16), WFVAE(**dict(L16, base_channels=128, latent_dim=8))
    assert shapes(large) == json.loads((HERE / "keys.json").read_text()) and shapes(small) == json.loads((HERE / "keys_small8.json").read_text())
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert count(large) == 317_081_372 and round(count(large.encoder) / 1e5) == 846 and round(count(large.decoder) / 1e5) == 2325


@pytest.mark.parametrize("norm", ["layernorm", "groupnorm"])
def test_every_norm_has_the_releases_eps(norm):
    with torch.device("meta"): net = WFVAE(**dict(L16, norm_type=norm))
    norms = {k: m for k, m in net.named_modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))}
    keys = {k.removesuffix(".weight").removesuffix(".norm") for k in json.loads((HERE / "keys.json").read_text()) if "norm" in k and k.endswith(".weight")}
    assert {k.removesuffix(".norm") if norm == "layernorm" else k for k in norms} == keys and len(keys) == 40
    for name, m in norms.items():
        assert m.eps == 1e-6, name
        assert norm == "layernorm" or m.num_groups == 32, name


@torch.no_grad()
def test_group_norm_of_flat_blocks_is_per_frame_and_of_others_over_time():
    net, x = WFVAE(**dict(SMALL, base_channels=32, norm_type="groupnorm", encoder_energy_flow_hidden_size=32, decoder_energy_flow_hidden_size=32)), torch.randn(1, 32, 3, 4, 4)
    moved = lambda norm: (norm(torch.cat([x[:, :, :2], 5*x[:, :, 2:] + 1], 2)) - norm(x))[:, :, :2].abs().max()
    assert moved(net.encoder.down1[1].norm1) == 0 and moved(net.decoder.norm_out) > .1


# ---- any size, streams

def tiny(**config):
    vae = wfvae.random_wfvae(**config)
    fill(vae.net, ("encoder.wavelet", "decoder.inverse_wavelet"))     # livelier than fresh weights
    return vae


TINY = {"4x8x8": tiny(), "nearest": tiny(t_interpolation="nearest"), "no attention": tiny(use_attention=False, decoder_num_resblocks=1, encoder_num_resblocks=1),
        "8x8x8": tiny(l1_dowmsample_block="Spatial2xTime2x3DDownsample", l1_downsample_wavelet="HaarWaveletTransform3D", l1_upsample_block="Spatial2xTime2x3DUpsample", l1_upsample_wavelet="InverseHaarWaveletTransform3D")}
GROUP = tiny(norm_type="groupnorm", base_channels=32, encoder_energy_flow_hidden_size=64, decoder_energy_flow_hidden_size=64, encoder_num_resblocks=1, decoder_num_resblocks=1)


@pytest.mark.parametrize("kind", [*TINY, "groupnorm"])
@given(T=st.integers(1, 14), H=st.integers(3, 26), W=st.integers(3, 26))
@hsettings(max_examples=10, deadline=None)
def test_any_size_in_the_same_size_out(kind, T, H, W):
    vae = GROUP if kind == "groupnorm" else TINY[kind]
    video = torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1
    latent = vae.encode(video)
    back, t = vae.decode(latent), vae.spec.strides[0]
    assert back.shape == video.shape and torch.isfinite(back).all() and vae.decode(latent, channels=3).shape[1] == 3
    assert latent.values.shape == (1, 16, 1 - (1 - T) // t, -(-H // 8), -(-W // 8))


@pytest.mark.parametrize("kind", TINY)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), latents=st.lists(st.integers(1, 4), min_size=1, max_size=6))
@hsettings(max_examples=10, deadline=None)
@torch.no_grad()
def test_streams_are_the_network_in_one_pass(kind, cuts, latents):
    vae, T = TINY[kind], sum(cuts)
    stride = vae.spec.strides[0]
    whole = torch.from_numpy(smooth_video(1, T, 16, 24, seed=T))[None]
    padded = torch.cat([whole, whole[:, :, -1:].expand(-1, -1, (1 - T) % stride, -1, -1)], 2).expand(-1, 3, -1, -1, -1)
    mean = vae.net.encode(padded)
    streamed = torch.cat(list(vae.encode_stream(whole.split(cuts, 2))), 2)
    assert (streamed - mean).abs().max() < 2e-5
    z = mean[:, :, :1].repeat(1, 1, sum(latents), 1, 1) + .1 * torch.arange(sum(latents))[:, None, None].sin()
    frames = torch.cat(list(vae.net.decode_stream(z.split(latents, 2))), 2)
    assert frames.shape[2] == 1 + stride * (sum(latents) - 1) and (frames - vae.net.decode(z)).abs().max() < 2e-5


@torch.no_grad()
def test_the_decoder_looks_one_latent_ahead_and_no_further():
    net, z = TINY["4x8x8"].net, torch.randn(1, 16, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, cut = net.decode(z), net.decode(z[:, :, :4])
    apart = (whole[:, :, :13] - cut).abs().amax((0, 1, 3, 4))
    assert apart[:11].max() < 2e-5 < apart[11:].min()          # frames 11 and 12, the last two, knew no latent 4


@torch.no_grad()
def test_the_encoder_is_causal():
    net, a = TINY["4x8x8"].net, torch.rand(1, 3, 13, 16, 16)
    b = a.clone(); b[:, :, 9:] = -b[:, :, 9:]
    assert (net.encode(a) - net.encode(b)).abs().amax((0, 1, 3, 4))[:3].max() < 1e-6 < (net.encode(a) - net.encode(b)).abs().amax((0, 1, 3, 4))[3]


@torch.no_grad()
def test_a_streams_memory_does_not_grow():
    net, memory, sizes = TINY["4x8x8"].net, Memory(), []
    memory.last = False
    for _ in range(6):
        net.decoder(torch.randn(1, 16, 1, 2, 2), memory)
        sizes.append(sum(v.untyped_storage().nbytes() for v in memory.values() if torch.is_tensor(v)))
    assert sizes[2] == sizes[3] == sizes[-1]
    assert sizes[-1] == sum(v.nbytes for v in memory.values() if torch.is_tensor(v))      # copies: a view would keep its whole piece alive


def test_group_norms_do_not_stream():
    assert not GROUP.spec.streams
    with pytest.raises(ValueError, match="cannot stream"): next(GROUP.encode_stream([torch.zeros(1, 1, 5, 8, 8)]))
    x = torch.from_numpy(smooth_video(1, 9, 16, 16, seed=1))[None]
    memory = Memory()
    pieces = torch.cat([GROUP.net.encoder(p.expand(-1, 3, -1, -1, -1), memory)[0] for p in (x[:, :, :5], x[:, :, 5:])], 2)
    assert (pieces[:, :16] - GROUP.encode(x).values).abs().max() > 1e-3       # why it is refused


@torch.no_grad()
def test_encode_gives_the_mean_and_log_variances_are_clamped():
    net, x = tiny().net, torch.rand(1, 3, 5, 16, 16)
    net.encoder.conv_out.conv.bias[16:20], net.encoder.conv_out.conv.bias[20:24] = 90, -90
    mean, logvar = net.posterior(x)
    assert torch.equal(net.encode(x), mean) and mean.shape == logvar.shape == (1, 16, 2, 2, 2)
    assert (logvar[:, :4] == 20).all() and (logvar[:, 4:8] == -30).all() and logvar[:, 8:].abs().max() < 20


# ---- the transform

@given(T=st.integers(1, 9), H=st.integers(1, 5), W=st.integers(1, 5), C=st.integers(1, 3))
@hsettings(max_examples=20, deadline=None)
def test_haar_there_and_back(T, H, W, C):
    x = torch.randn(2, C, 2*T - 1, 2*H, 2*W)
    for dims, gain in ((3, 8 * .3536**2), (2, 1.)):
        bands = wfvae.Haar(dims)(x, Memory())
        assert bands.shape == (2, C * 2**dims, T if dims == 3 else 2*T - 1, H, W)
        assert torch.allclose(wfvae.InverseHaar(dims)(bands, Memory()), x * gain, atol=1e-5)


# ---- loading

@pytest.fixture
def release(tmp_path):
    "A folder as the hub has it, at small widths"
    from safetensors.torch import save_file
    net = WFVAE(**SMALL)
    fill(net, ("encoder.wavelet", "decoder.inverse_wavelet"))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WFVAEModel", "_diffusers_version": "0.30.2", "dropout": 0.0, "scale": [.18215]*4, "shift": [0]*4, **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return net, tmp_path


def same(net, vae): return all(torch.equal(v, vae.net.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_release_loads_strictly_through_the_one_door(release):
    net, folder = release
    entry = REGISTRY["wfvae"]
    assert entry.hub == "chestnutlzj/WF-VAE-L-16Chn" and find_weights(entry, folder) == folder
    vae = load_vae("wfvae", weights=folder)
    assert same(net, vae) and vae.spec.name == "wfvae" and vae.spec.strides == (4, 8, 8) and vae.spec.channels == 4 and vae.spec.streams and vae.spec.range == (-1, 1)
    assert len(vae.weights) == 64 and not any(p.requires_grad for p in vae.net.parameters()) and not vae.net.training
    assert same(net, load_vae("wfvae", weights=folder / "diffusion_pytorch_model.safetensors"))


def test_half_precision_files_load_as_float32(release):
    from safetensors.torch import save_file
    net, folder = release
    save_file({k: v.bfloat16() for k, v in net.state_dict().items()}, folder / "diffusion_pytorch_model.safetensors")
    vae = load_vae("wfvae", weights=folder)
    assert {v.dtype for v in vae.net.state_dict().values()} == {torch.float32} and float(vae.net.encoder.wavelet_transform_in.bank().max()) == 0.353515625


@pytest.mark.parametrize("average", [True, False])
def test_training_checkpoints_give_the_average_else_the_generator(release, average):
    net, folder = release
    other = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    held = {"state_dict": {"gen_model": other if average else net.state_dict(), "dics_model": {"x": torch.zeros(3)}}, "optimizer_state": {"lr": 1e-5}, "sampler_state": {"epoch": 2},
            "ema_state_dict": {f"module.{k}": v for k, v in net.named_parameters() if v.requires_grad} if average else {}}
    torch.save(held, folder / "model.ckpt")
    assert same(net, load_vae("wfvae", weights=folder / "model.ckpt"))


def test_the_generator_of_a_checkpoint_needs_its_filters(release):
    net, folder = release
    torch.save({"state_dict": {"gen_model": {k: v for k, v in net.state_dict().items() if "wavelet" not in k}}}, folder / "m.ckpt")
    with pytest.raises(WeightsError, match="40 missing"): load_vae("wfvae", weights=folder / "m.ckpt")


def test_wrong_weights_give_one_clear_line(release, tmp_path):
    from safetensors.torch import save_file
    net, folder = release
    file, state = folder / "diffusion_pytorch_model.safetensors", {k: v.clone() for k, v in net.state_dict().items()}
    def expect(match, **change):
        save_file({k: v.contiguous() for k, v in {**state, **change}.items() if v is not None}, file)
        with pytest.raises(WeightsError, match=match) as error: load_vae("wfvae", weights=folder)
        assert "\n" not in str(error.value)
    expect("1 missing, first decoder.conv_in.conv.bias", **{"decoder.conv_in.conv.bias": None})
    expect("1 unknown, first extra", extra=torch.zeros(2))
    expect("another shape", **{"decoder.conv_in.conv.bias": torch.zeros(3)})
    expect("Haar filters", **{"encoder.wavelet_transform_in.h_conv.conv.weight": -state["encoder.wavelet_transform_in.h_conv.conv.weight"]})
    (folder / "x.ckpt").write_bytes(b"no pickle")
    with pytest.raises(WeightsError, match="damaged"): load_vae("wfvae", weights=folder / "x.ckpt")
    with pytest.raises(WeightsError, match="chestnutlzj/WF-VAE-L-16Chn"): load_vae("wfvae", weights=tmp_path / "nowhere")


def test_a_pickle_cannot_run_code(release):
    import os
    net, folder = release
    class Bad:
        def __reduce__(self): return os.mkdir, (str(folder / "ran"),)
    torch.save({"state_dict": Bad()}, folder / "bad.ckpt")
    with pytest.raises(WeightsError, match="damaged"): load_vae("wfvae", weights=folder / "bad.ckpt")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("change, match", [({"attention_type": "AttnBlock3D"}, "attention_type"), ({"norm_type": "rms"}, "norm_type"), ({"mid_layers_type": []}, "mid_layers_type"),
                                           ({"l1_upsample_block": "Spatial2xTime2x3DUpsample"}, "do not fit"), ({"l2_downsample_wavelet": "Other"}, "do not fit"), ({"_class_name": "WFVAE2Model"}, "WFVAE2Model")])
def test_configurations_the_page_does_not_cover_are_refused_by_name(release, change, match):
    _, folder = release
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(WeightsError, match=match): load_vae("wfvae", weights=folder)


def test_a_configuration_that_is_no_table_gives_one_clear_line(release):
    _, folder = release
    for text, match in (("[1]", "holds a list"), ("{", "not JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=match): load_vae("wfvae", weights=folder)


def test_half_precision_computes_and_stays_near():
    "The paper's script runs this network in bfloat16: 8 bits of mantissa, some fifty layers"
    vae, x = tiny(), torch.from_numpy(smooth_video(1, 5, 16, 24, seed=4))[None]
    with torch.no_grad(): whole = vae.net.decode(vae.net.encode(x.expand(-1, 3, -1, -1, -1)))
    net = vae.to(dtype=torch.bfloat16).net
    with torch.no_grad(): half = net.decode(net.encode(x.expand(-1, 3, -1, -1, -1).bfloat16()))
    assert half.dtype == torch.bfloat16 and 1e-4 < (half.float() - whole).square().mean().sqrt() / whole.std() < .1
