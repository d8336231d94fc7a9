"The hub's VAEs: WAN and MAISI against the released modules' numbers, any size through every class, strict loading, one clear error without a network."
import json, time
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings as hsettings, strategies as st
from conftest import FIXTURES
from rules import fill, rule_array, smooth_video
from fvae_nb.running.cli import main
from fvae_nb.vaes import hub
from fvae_nb.vaes.interface import REGISTRY, VAESpec, VAE, WeightsError, control_for, latent_frames, load_vae

NAMES = (*hub._TINY, "maisi")
_made = {}


def tiny(name):
    "One random copy of each, built once"
    if name not in _made: _made[name] = hub.random_vae(name)
    return _made[name]


def close(a, b, tolerance, what):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    error = float((a - b).abs().max())
    print(f"{what}: max abs error {error:.2g}")
    assert a.shape == b.shape and torch.allclose(a, b, **tolerance)
    return error


# ---- parity

@pytest.fixture(scope="module", params=["wan21", "wan22"])
def wan(request):
    "(fixture's facts, arrays, our network with the rule's weights under the official names)"
    facts = json.loads((FIXTURES / f"wan/{request.param}_small.json").read_text())
    vae = hub._class("AutoencoderKLWan")(**facts["diffusers_config"])
    shapes = {k: tuple(v.shape) for k, v in vae.state_dict().items()}
    state = {hub.wan_key(k): torch.from_numpy(rule_array(k, shapes[hub.wan_key(k)])) for k in facts["key_map_official_to_diffusers"]}
    hub.load_strictly(vae, state, "rule")
    return facts, np.load(FIXTURES / f"wan/{request.param}_small.npz"), hub.wrap(vae, request.param)


@torch.no_grad()
def test_wan_parity(wan):
    facts, arrays, vae = wan
    side, tolerance, c = (32 if vae.spec.strides[1] == 8 else 64), facts["tolerance"], vae.spec.channels
    video = lambda T: torch.from_numpy(smooth_video(3, T, side, side, seed=T))[None]
    mu9 = arrays["moments_t9"][:, :c]
    close(vae.net.encode(video(9)), mu9, tolerance, "9 frames, mu")
    close(vae.net.encode(video(5)), arrays["mu_t5"], tolerance, "5 frames, mu")
    close(vae.net.encode(video(1)), arrays["mu_t1"], tolerance, "1 frame, mu")
    close(vae.net.encode(video(11)[:, :, :9]), arrays["mu_t11"], tolerance, "11 frames, of which the release drops 2, mu")
    close(vae.net.decode(torch.from_numpy(mu9)), np.clip(arrays["recon_t9"], -1, 1), tolerance, "9 frames, decoded from the stored latent")
    close(vae.net.decode(torch.from_numpy(arrays["mu_t1"])), np.clip(arrays["recon_t1"], -1, 1), tolerance, "1 frame, decoded")
    close(vae.net.decode(torch.from_numpy(arrays["mu_t11"]))[:, :, 8].squeeze(), np.clip(arrays["recon_t11"], -1, 1).squeeze(), tolerance, "last frame, decoded")


@torch.no_grad()
def test_wan_is_diffusers_own_and_standardises(wan):
    _, _, vae = wan
    x = torch.from_numpy(smooth_video(3, 9, 32, 48, seed=2))[None]
    raw = vae.net.vae.encode(x).latent_dist.mode()
    assert (vae.net.encode(x) - raw).abs().max() < 2e-5 and (vae.net.decode(raw) - vae.net.vae.decode(raw).sample).abs().max() < 2e-5    # 1x1x1 convolutions on other lengths round otherwise
    for name, mean, std in (("wan2.1", -.7571, 2.8184), ("wan2.2", -.2289, .4765)):
        net = tiny(name).net
        raw, z = net.vae.encode(x).latent_dist.mode(), net.encode(x)
        assert torch.allclose(z[:, 0], (raw[:, 0] - mean) / std, atol=1e-5)
        assert (net.decode(z) - net.vae.decode(raw).sample).abs().max() < 2e-5


@pytest.mark.parametrize("version", ["wan21", "wan22"])
def test_wan_official_files_fit_key_by_key_at_full_size(version, test_data):
    keys = json.loads((test_data / f"parity/wan/keys_{version}.json").read_text())
    assert {k: hub.wan_key(k) for k in keys} == {k: v["diffusers"] for k, v in keys.items()}
    with torch.device("meta"): vae = hub._build("AutoencoderKLWan", hub.WAN[f"wan{version[3]}.{version[4]}"])
    ours = {k: tuple(v.shape) for k, v in vae.state_dict().items()}
    assert ours == {hub.wan_key(k): tuple(v["shape"]) for k, v in keys.items()}
    assert sum(int(np.prod(s)) for s in ours.values()) == {"wan21": 126_892_531, "wan22": 704_688_668}[version]
    assert hub.spec_of(vae, "x").channels == {"wan21": 16, "wan22": 48}[version]


def test_our_names_for_wan21_are_those_of_from_single_file():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    official = json.loads((FIXTURES / "wan/wan21_small.json").read_text())["key_map_official_to_diffusers"]
    theirs = convert_wan_vae_to_diffusers({k: k for k in official})
    assert theirs == {hub.wan_key(k): k for k in official}


@torch.no_grad()
def test_maisi_parity():
    facts, arrays = json.loads((FIXTURES / "maisi/maisi_small.json").read_text()), np.load(FIXTURES / "maisi/maisi_small.npz")
    net = hub.MaisiNet(num_channels=facts["config"]["num_channels"], norm_num_groups=facts["config"]["norm_num_groups"]).eval()
    fill(net.vae)
    x = (torch.from_numpy(smooth_video(1, 16, 24, 32, seed=5))[None] + 1) / 2
    tolerance = facts["tolerance"]
    close(hub.to_ras(net.encode(hub.from_ras(x))), arrays["mu"], tolerance, "mu")
    close(hub.to_ras(net.decode(hub.from_ras(torch.from_numpy(arrays["mu"])))), arrays["recon"], tolerance, "decoded from the stored latent")
    # the memory machinery we leave off: the same numbers where the axis divides by 4n, a silent loss where it does not
    split = hub.MaisiNet(num_channels=facts["config"]["num_channels"], norm_num_groups=facts["config"]["norm_num_groups"], num_splits=2).eval()
    split.load_state_dict(net.state_dict())
    y = torch.rand(1, 1, 16, 32, 16)
    assert (split.vae.encode(y)[0] - net.vae.encode(y)[0]).abs().max() < 1e-4
    assert split.vae.encode(torch.rand(1, 1, 16, 36, 16))[0].shape[3] == 8 and net.vae.encode(torch.rand(1, 1, 16, 36, 16))[0].shape[3] == 9


def test_maisi_file_fits_key_by_key_at_full_size(test_data):
    keys = json.loads((test_data / "parity/maisi/keys.json").read_text())
    with torch.device("meta"): net = hub.MaisiNet()
    assert {k: list(v.shape) for k, v in net.vae.state_dict().items()} == keys
    assert sum(p.numel() for p in net.parameters()) == 20_944_897


def test_maisi_sees_the_body_as_it_was_trained():
    x = torch.rand(1, 1, 3, 4, 5)
    ras = hub.to_ras(x)
    assert ras.shape == (1, 1, 5, 4, 3) and torch.equal(hub.from_ras(ras), x)
    assert ras[0, 0, 0, 0, 2] == x[0, 0, 2, -1, -1]        # lowest right-left index is the patient's left, lowest front index is the back


# ---- every class: any size

@pytest.mark.parametrize("name", NAMES)
@given(T=st.integers(1, 20), H=st.integers(2, 20).map(lambda n: 2*n + 1), W=st.integers(2, 20).map(lambda n: 2*n + 1))
@hsettings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_size_in_the_same_size_out(name, T, H, W):
    vae = tiny(name)
    video = torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1
    latent = vae.encode(video)
    back = vae.decode(latent)
    t, h, w = (-(-n // (s*k)) * k for n, s, k in zip((T, H, W), vae.spec.strides, (1, *vae.spec.size)))
    assert latent.values.shape == (1, vae.spec.channels, latent_frames(T, vae.spec), h, w)
    assert back.shape == video.shape and torch.isfinite(back).all() and back.abs().max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_count(name):
    vae = tiny(name)
    for T in range(1, 21): assert vae.decode(vae.encode(torch.zeros(1, 1, T, 5, 3))).shape == (1, 1, T, 5, 3)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "maisi", "hunyuanvideo", "cogvideox", "ltx", "cosmos", "mochi"])
def test_windows_of_65_and_long_latents(name):
    "65 slices, the paper's window, is 4k+1 and 8k+1; beyond 16 frames HunyuanVideo works in overlapping pieces"
    vae = tiny(name)
    assert vae.decode(vae.encode(torch.zeros(1, 1, 65, 7, 8))).shape == (1, 1, 65, 7, 8)


@pytest.mark.parametrize("name", NAMES)
def test_every_vae_has_its_linear_control(name):
    spec = tiny(name).spec
    theirs = load_vae(control_for(spec)).spec
    assert (theirs.channels, theirs.strides, bool(theirs.first)) == (spec.channels, spec.strides, bool(spec.first))


@pytest.mark.parametrize("name", ["wan2.1", "maisi", "cogvideox", "sd"])
def test_padding_is_never_seen(name):
    "What is added before encoding repeats the edge; what comes back beyond the video is cut: a network that returns its input shows both"
    spec = tiny(name).spec

    class Glass:
        def encode(self, x): self.x = x; return x
        def decode(self, z): return z
        def encode_stream(self, chunks): yield from map(self.encode, chunks)
        def decode_stream(self, latents): yield from latents

    glass = VAE(Glass(), VAESpec("glass", spec.channels, spec.strides, first=spec.first, inputs=spec.inputs, range=spec.range, size=spec.size, group=spec.group, streams=False))
    video = torch.rand(1, 1, 6, 9, 13) * 2 - 1
    latent = glass.encode(video)
    T = spec.first + spec.strides[0] * (latent_frames(6, spec) - spec.first)
    assert glass.net.x.shape[2:] == (T, -(-9 // spec.strides[1]) * spec.strides[1], -(-13 // spec.strides[2]) * spec.strides[2])
    assert torch.equal(glass.net.x[:, :, 6:], glass.net.x[:, :, 5:6].expand(-1, -1, T - 6, -1, -1))
    latent.values[:, :, 6:] = latent.values[..., 9:, :] = latent.values[..., 13:] = 1e9
    assert torch.allclose(glass.decode(latent), video, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "maisi"])
def test_image_and_causal_vaes_stream_exactly(name):
    vae = tiny(name)
    if not vae.spec.streams:
        with pytest.raises(ValueError, match="cannot stream"): list(vae.encode_stream([torch.zeros(1, 1, 5, 8, 8)]))
        return
    video = torch.rand(1, 1, 14, 17, 19) * 2 - 1
    whole = vae.encode(video)
    for chunk in (1, 4, 6):
        latents = list(vae.encode_stream([video[:, :, a:a + chunk] for a in range(0, 14, chunk)]))
        assert (torch.cat(latents, 2) - whole.values).abs().max() <= 2e-5
        assert (torch.cat(list(vae.decode_stream(latents, whole.shape)), 2) - vae.decode(whole)).abs().max() <= 2e-5


def test_two_streams_at_once_do_not_mix():
    vae = tiny("wan2.1")
    a, b = (torch.rand(1, 1, 9, 16, 16) for _ in range(2))
    one, two = vae.encode_stream([a]), vae.encode_stream([b])
    mixed = [(x, y) for x, y in zip(one, two)]
    assert torch.equal(torch.cat([x for x, _ in mixed], 2), vae.encode(a).values) and torch.equal(torch.cat([y for _, y in mixed], 2), vae.encode(b).values)


@torch.no_grad()
def test_cogvideox_would_return_eight_frames_for_five():
    vae = tiny("cogvideox").net.vae
    assert vae.decode(vae.encode(torch.rand(1, 3, 5, 8, 8)).latent_dist.mode()).sample.shape[2] == 8
    assert tiny("cogvideox").decode(tiny("cogvideox").encode(torch.rand(1, 1, 5, 8, 8))).shape[2] == 5


# ---- standardisation

@torch.no_grad()
def test_latents_are_standardised_as_each_release_says():
    x = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    raw = lambda n, x: tiny(n).net.vae.encode(x).latent_dist.mode()
    assert torch.allclose(tiny("hunyuanvideo").net.encode(x), raw("hunyuanvideo", x) * .476986)
    assert torch.allclose(tiny("sdxl").net.encode(x)[:, :, 3], raw("sdxl", x[:, :, 3]) * .13025, atol=1e-6)
    cosmos = tiny("cosmos"); z = cosmos.net.encode(x)
    mean, std = (torch.tensor(cosmos.net.vae.config[k]).view(16, -1) for k in ("latents_mean", "latents_std"))
    assert torch.allclose(z[0, 5, 1], (raw("cosmos", x)[0, 5, 1] - mean[5, 1]) / std[5, 1], atol=1e-5)
    flux = hub.random_vae("flux2", 1).net; bn = flux.vae.bn                     # channel c*4 + 2*row + column of a 2x2 patch
    bn.running_mean.copy_(torch.linspace(-1, 1, 128)); bn.running_var.copy_(torch.linspace(1, 4, 128))
    net, y = hub.HubNet(flux.vae, True), x[:, :, 0]
    z, r = net.encode(x[:, :, :1])[0, :, 0], flux.vae.encode(y).latent_dist.mode()[0]
    k = 7*4 + 2*1 + 0
    assert torch.allclose(z[7, 1, 0], (r[7, 1, 0] - bn.running_mean[k]) / (bn.running_var[k] + bn.eps).sqrt(), atol=1e-5)
    assert torch.allclose(net.decode(net.encode(x[:, :, :1]))[:, :, 0], flux.vae.decode(flux.vae.encode(y).latent_dist.mode()).sample, atol=1e-5)


def test_random_copies_are_repeatable_named_and_leave_the_seed_alone():
    torch.manual_seed(3); before = torch.rand(1)
    torch.manual_seed(3); a, b, c = (hub.random_vae("sd", s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), before)
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(x.net.parameters(), y.net.parameters()))
    assert same(a, b) and not same(a, c)
    assert a.spec.name == "sd-random" and a.spec.random and load_vae("sd-random").spec == a.spec and not load_vae("tiny").spec.random
    with pytest.raises(WeightsError, match="no tiny copy of 'sdx'"): load_vae("sdx-random")


# ---- files

@pytest.mark.parametrize("kind", ["folder", "official", "file"])
def test_wan_files_load_in_both_spellings(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.WAN, "wan2.2", hub._WAN22 | dict(base_dim=8, decoder_base_dim=8) | hub._STANDARD["wan2.2"])
    source, x = tiny("wan2.2"), torch.rand(1, 1, 6, 16, 16)
    if kind == "folder": source.net.vae.save_pretrained(tmp_path / "vae")
    else:
        back = {v: k for k, v in json.loads((FIXTURES / "wan/wan22_small.json").read_text())["key_map_official_to_diffusers"].items()}
        torch.save({back[k]: v for k, v in source.net.vae.state_dict().items()}, tmp_path / "Wan2.2_VAE.pth")
    vae = load_vae("wan2.2", weights=tmp_path / "Wan2.2_VAE.pth" if kind == "file" else tmp_path)
    assert torch.equal(vae.encode(x).values, source.encode(x).values)
    assert vae.spec.licence == "Apache-2.0" and len(vae.weights) == 64 and not vae.spec.random


def test_maisi_file_may_nest_its_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MAISI", hub.MAISI | dict(num_channels=[8, 16, 32], norm_num_groups=4))
    source, x = tiny("maisi"), torch.rand(1, 1, 5, 9, 9)
    for state in (source.net.vae.state_dict(), {"unet_state_dict": source.net.vae.state_dict(), "epoch": 3}):
        torch.save(state, tmp_path / "autoencoder_v1.pt")
        assert torch.equal(load_vae("maisi", weights=tmp_path).encode(x).values, source.encode(x).values)


def test_wrong_and_damaged_files_are_one_line(tmp_path):
    vae = tiny("wan2.1").net.vae
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(WeightsError, match="missing.*of another shape") as error: load_vae("wan2.1", weights=tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"\x80\x02not a pickle")
    with pytest.raises(WeightsError, match="damaged"): load_vae("wan2.1", weights=tmp_path)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(WeightsError, match="describes AutoencoderKLWan, not AutoencoderKLMochi"): load_vae("mochi", weights=tmp_path / "other")
    (tmp_path / "other/config.json").unlink()
    with pytest.raises(WeightsError, match="config.json: FileNotFoundError"): load_vae("wan2.1", weights=tmp_path / "other")
    with pytest.raises(WeightsError, match="no class 'AutoencoderWan'"): hub._class("AutoencoderWan")


def test_a_pickle_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"a": Trap()}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(WeightsError, match="damaged or not a weights file"): load_vae("wan2.1", weights=tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- where weights are looked for

def test_without_a_network_one_clear_line_and_soon(in_tmp, monkeypatch):
    import huggingface_hub
    monkeypatch.setenv("FVAE_CACHE", str(in_tmp / "cache"))
    class Refusing(huggingface_hub.HfApi):
        def __init__(self): super().__init__(endpoint="http://127.0.0.1:9")     # nobody listens there
    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    start = time.monotonic()
    with pytest.raises(WeightsError) as error: load_vae("wan2.1")
    said = str(error.value)
    assert time.monotonic() - start < 10 and "\n" not in said
    for part in ("Wan2.1_VAE.pth", "vae/diffusion_pytorch_model.safetensors", str(in_tmp / "cache"), "weights.wan2.1 = FOLDER", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "not reachable"): assert part in said
    assert main(["vaes", "--verify", "wan2.1", str(in_tmp)]) == 2


def test_settings_then_cache_then_hub(in_tmp, monkeypatch):
    import huggingface_hub
    monkeypatch.setenv("FVAE_CACHE", str(in_tmp / "cache"))
    source, asked = tiny("sd"), []
    def download(repo, file, local_dir):
        asked.append((repo, file)); source.net.vae.save_pretrained(local_dir)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load_vae("sd")
    assert asked == [("stabilityai/sd-vae-ft-mse", "config.json"), ("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors")]
    load_vae("sd"); assert len(asked) == 2                                      # now in the cache
    hub.random_vae("sd", 5).net.vae.save_pretrained(in_tmp / "mine")
    (in_tmp / "settings.ini").write_text("[fvae]\nweights.sd = mine\n")
    assert not torch.equal(next(load_vae("sd").net.parameters()), next(source.net.parameters())) and len(asked) == 2


def test_what_diffusers_fetched_before_is_used(in_tmp, monkeypatch):
    import huggingface_hub
    monkeypatch.setenv("FVAE_CACHE", str(in_tmp / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(in_tmp / "hf"))
    def unreachable(*a, **k): raise AssertionError("asked the network")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    repo = in_tmp / "hf/models--genmo--mochi-1-preview"
    (repo / "refs").mkdir(parents=True); (repo / "refs/main").write_text("abc")
    tiny("mochi").net.vae.save_pretrained(repo / "snapshots/abc/vae")
    assert load_vae("mochi").spec.licence == "Apache-2.0"


def test_a_gated_model_says_so(in_tmp, monkeypatch):
    import huggingface_hub
    monkeypatch.setenv("FVAE_CACHE", str(in_tmp / "cache"))
    class GatedRepoError(Exception): pass
    def refuse(*a, **k): raise GatedRepoError("403 with a page of text\nand more")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(WeightsError, match="terms must be accepted") as error: load_vae("cosmos")
    assert "\n" not in str(error.value)


# ---- the command

def test_vaes_lists_what_is_here_what_can_be_had_and_under_which_licence(in_tmp, monkeypatch, capsys):
    monkeypatch.setenv("FVAE_CACHE", str(in_tmp / "cache"))
    tiny("sd").net.vae.save_pretrained(in_tmp / "mine")
    (in_tmp / "settings.ini").write_text("[fvae]\nweights.sd = mine\n")
    assert main(["vaes"]) == 0
    said = capsys.readouterr().out
    block = {n: said.split(f"\n{n} ", 1)[1].split("\n")[1] for n in ("wan2.1", "cosmos", "sd", "taef2")}
    assert "installed" in block["sd"] and "downloadable" in block["wan2.1"] and "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in block["wan2.1"]
    assert "gated" in block["cosmos"] and "by hand" in block["taef2"]
    for e in REGISTRY.values(): assert e.name in said and e.licence in said


def test_verify_prints_hash_and_round_trip_or_says_random(in_tmp, monkeypatch, capsys):
    assert main(["vaes", "--verify", "wan2.2", "random"]) == 0
    said = capsys.readouterr().out
    assert "random weights" in said and "dB" not in said and "PSNR" not in said
    source = tiny("sd").net.vae; source.save_pretrained(in_tmp / "w")           # untrained tensors under a real name: below the floor
    assert main(["vaes", "--verify", "sd", str(in_tmp / "w")]) == 1
    said = capsys.readouterr().out
    import hashlib
    assert hashlib.sha256((in_tmp / "w/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest() in said and "dB" in said and "below the floor" in said
    assert main(["vaes", "--verify", "sdd", "x"]) == 2


def test_verify_passes_a_real_vae(test_data, capsys):
    folder = test_data / "weights/taef2"
    if not folder.is_dir(): pytest.skip(f"no TAEF2 weights at {folder}")
    assert main(["vaes", "--verify", "taef2", str(folder)]) == 0
    print(capsys.readouterr().out)


def test_every_row_of_the_registry_is_whole():
    import importlib
    for e in REGISTRY.values():
        module, function = e.module.split(":")
        assert callable(getattr(importlib.import_module(module), function)) and e.licence and e.about and e.how
        assert bool(e.hub) == bool(e.fetch) and all(any(f in either.split("|") for either in e.files) or f.endswith("config.json") for f in e.fetch)


def test_papers_protocol_with_wan(wan, tmp_path):
    "The released script end to end, on the same small WAN2.1: file axes, windows of 65 and 5, channel mean, truncation"
    import nibabel as nib
    from fvae_nb.data.ct import read_ct, write_ct
    from fvae_nb.reconstruction.operator import reconstruct
    if wan[2].spec.strides[1] != 8: pytest.skip("the fixture is WAN2.1's")
    theirs = np.load(FIXTURES / "wan/protocol_wan21_small.npz")["recon_hu"]
    hu = np.transpose(np.round(1200 * smooth_video(1, 70, 32, 40, seed=9)[0]).astype(np.int16), (1, 2, 0))
    nib.save(nib.Nifti1Image(hu, np.diag([.7, .7, 2.5, 1.])), tmp_path / "a.nii.gz")
    write_ct(reconstruct(read_ct(tmp_path / "a.nii.gz"), wan[2], protocol="paper"), tmp_path / "b.nii.gz", "int16")
    back = nib.load(tmp_path / "b.nii.gz").get_fdata()
    print("voxels that differ: %.4f %%, by at most %g HU" % (100 * (back != theirs).mean(), np.abs(back - theirs).max()))
    assert np.abs(back - theirs).max() <= 1 and (back != theirs).mean() <= 1e-3
