"LeanVAE written from its description: the released keys, the public code's numbers, exact streams, any size, files that are what they say."
import argparse, hashlib, json
import numpy as np
import pytest
import torch
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from rules import fill, smooth_video
from fvae_nb.vaes import leanvae
from fvae_nb.vaes.interface import REGISTRY, VAE, WeightsError, control_for, latent_frames, load_vae
from fvae_nb.vaes.leanvae import PLANE, SPACE, LeanVAE, NAF, PEG, config_of, haar, random_copy, read_leanvae

SMALL = ["small_video", "small_image", "small_even", "small_odd_height", "small_tiled"]
FULL = ["full16_video", "full16_image", "full16_tiled", "full4_video"]


# ---- parity

def network(facts):
    "The fixture's configuration, filled by its rule and the values it sets by hand"
    net = LeanVAE(**{k: v for k, v in facts["config"].items() if k != "use_tile_inference"}).eval()
    rule = facts["fill"]
    assert rule["gain"] == 1 and facts["key_prefix"] == ""
    filled, state = fill(net, tuple(rule["skip"])), net.state_dict()
    for key, value in rule["set"].items(): state[key].fill_(value)
    assert set(filled) | set(rule["set"]) == set(state)                          # nothing is left as the constructor made it
    return net


def outputs(net, facts, x, z, start):
    "Everything the fixtures store; whatever comes after the latent starts from the stored one"
    cut = facts["chunks"]
    mirrored, memory = leanvae._check(x, start), {}
    features = net.encoder(mirrored, memory, start)
    out = {"features": features, "logvar": net.std_layer(features), "latent_mean": net.latent_bottleneck.project(features).movedim(-1, 1),
           "bottleneck_recon": net.latent_bottleneck.lift(z.movedim(1, -1), {})}
    if start: out["dwt_image"] = haar(mirrored[:, :, :1], PLANE)
    if x.shape[2] > 1: out["dwt_video"] = haar(mirrored[:, :, int(start):], SPACE)
    if start: out["recon"] = net.decode(z)
    if cut:
        e, d = cut["chunksize_enc"], cut["chunksize_dec"]
        net.piece = max(e, d)                                                    # cuts are the fixture's, not ours
        out["latent_mean"] = torch.cat(list(net.encode_stream([x[:, :, :e], *x[:, :, e:].split(e - 1, 2)])), 2)
        out["recon"] = torch.cat(list(net.decode_stream([z[:, :, :d], *z[:, :, d:].split(d - 1, 2)])), 2)
    return out


@torch.no_grad()
def check(case, folder, fast=False):
    facts, stored = json.loads((folder / f"{case}.json").read_text()), np.load(folder / f"{case}.npz")
    net, i = network(facts), facts["input"]
    if fast: leanvae.fasten(net)
    x = i["scale"] * torch.stack([torch.from_numpy(smooth_video(i["channels"], i["frames"], i["height"], i["width"], s)) for s in i["seeds"]])
    got = outputs(net, facts, x, torch.from_numpy(stored["latent_mean"]), start=i["frames"] % 4 == 1)
    assert set(stored.files) == set(facts["tolerance"]) and set(stored.files) <= set(got)
    for key in stored.files:
        want = torch.from_numpy(stored[key])
        ours = got[key][:, :, 0] if want.dim() == 4 else got[key]               # an image comes back without its time axis
        assert ours.shape == want.shape
        error, tolerance = float((ours - want).abs().max()), facts["tolerance"][key]
        print(f"leanvae {case}, {key}: max abs error {error:.2g} (allowed {tolerance['atol']:.2g})")
        assert torch.allclose(ours, want, **tolerance)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("case", SMALL)
def test_parity_small(case, fast): check(case, FIXTURES / "leanvae", fast)


@pytest.mark.parametrize("case", FULL)
def test_parity_full_size(case, test_data): check(case, test_data / "parity/leanvae")


@pytest.mark.parametrize("file, channels, count", [("keys", 16, 39_785_940), ("keys_dim4", 4, 39_767_496)])
def test_parity_of_keys_at_full_size(file, channels, count, test_data):
    with torch.device("meta"): net = LeanVAE(channels)
    keys = json.loads((test_data / f"parity/leanvae/{file}.json").read_text())
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == keys and len(keys) == 168
    assert sum(p.numel() for p in net.parameters()) == count
    assert config_of(net.state_dict()) == dict(latent_dim=channels, l_dim=128, h_dim=384, embedding_dim=512, sep_num_layer=2, fusion_num_layer=4, ista_iter_num=2, ista_layer_num=2)


def test_parity_of_norms_and_padding():
    "One norm a feed-forward, eps 1e-5 in each; residual sums everywhere but in the bottleneck; zeros in front of time"
    with torch.device("meta"): net = LeanVAE()
    norms = {n: m for n, m in net.named_modules() if "norm" in type(m).__name__.lower()}
    assert len(norms) == 24 and all(type(m) is torch.nn.LayerNorm and m.eps == 1e-5 and n.split(".")[-3] == "ffd_layer" and n.endswith(".0") for n, m in norms.items())
    assert {n: m.residual for n, m in net.named_modules() if isinstance(m, NAF)} == {n: not n.startswith("latent") for n, m in net.named_modules() if isinstance(m, NAF)}
    peg = PEG(2)
    torch.nn.init.ones_(peg.ds_conv.weight); torch.nn.init.zeros_(peg.ds_conv.bias)
    with torch.no_grad(): y = peg(torch.ones(1, 4, 3, 3, 2), {})
    assert y[0, :, 1, 1, 0].tolist() == [9, 18, 27, 27] and y[0, :, 0, 0, 0].tolist() == [4, 8, 12, 12]


# ---- streams and sizes

def scan(T, H, W, seed=0): return torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(T=st.integers(1, 22), H=st.integers(1, 40), W=st.integers(1, 40))
@hsettings(max_examples=25, deadline=None, derandomize=True)
def test_any_size_in_the_same_size_out(T, H, W):
    vae, video = load_vae("leanvae-random"), scan(T, H, W)
    latent = vae.encode(video)
    back = vae.decode(latent)
    assert latent.values.shape == (1, 16, latent_frames(T, vae.spec), -(-H // 8), -(-W // 8))
    assert back.shape == video.shape and torch.isfinite(back).all() and back.abs().max() <= 1


@pytest.fixture(scope="module")
def lively():
    "A random copy whose every layer matters: filled by rule, so that a lost memory shows"
    vae = random_copy()
    fill(vae.net, ("latent_bottleneck.weights", "latent_bottleneck.threshold"))
    return VAE(vae.net, vae.spec)


@pytest.mark.parametrize("pieces", [(1,)*19, (5, 4, 4, 4, 2), (2, 3, 9, 1, 4), (18, 1), (19,)])
@pytest.mark.parametrize("piece", [1, 3, 4])
def test_streams_are_the_whole(lively, pieces, piece, monkeypatch):
    video = scan(19, 24, 33)
    monkeypatch.setattr(lively.net, "piece", 100)                                # the whole at once
    whole = lively.encode(video); back = lively.net.decode(whole.values)
    monkeypatch.setattr(lively.net, "piece", piece)
    latents = list(lively.encode_stream(video.split(pieces, 2)))
    assert (torch.cat(latents, 2) - whole.values).abs().max() <= 2e-5
    streamed = torch.cat(list(lively.net.decode_stream(torch.cat(latents, 2).split(2, 2))), 2)
    assert (streamed - back).abs().max() <= 2e-5
    assert torch.cat(list(lively.decode_stream(latents, whole.shape)), 2).shape == video.shape


@torch.no_grad()
def test_without_memory_the_second_piece_would_differ(lively):
    "The test above can fail: pieces that forget are far off"
    x = .5 * scan(9, 16, 16).expand(-1, 3, -1, -1, -1)
    net = lively.net
    forgetful = torch.cat([net.latent_bottleneck.project(net.encoder(p, {}, s)).movedim(-1, 1) for p, s in ((x[:, :, :5], True), (x[:, :, 5:], False))], 2)
    assert torch.allclose(forgetful[:, :, :2], net.encode(x)[:, :, :2], atol=2e-5) and (forgetful - net.encode(x))[:, :, 2:].abs().max() > .1


@torch.no_grad()
def test_causal_both_ways(lively):
    a = .5 * scan(13, 16, 16).expand(-1, 3, -1, -1, -1); b = a.clone(); b[:, :, 9:] *= -1
    za, zb = lively.net.encode(a), lively.net.encode(b)
    assert (za - zb)[:, :, :3].abs().max() < 2e-5 and (za - zb)[:, :, 3].abs().max() > .1
    assert (lively.net.decode(za) - lively.net.decode(zb))[:, :, :9].abs().max() < 2e-5


def test_two_streams_at_once_do_not_mix(lively):
    a, b = scan(13, 16, 16, 1), scan(13, 16, 16, 2)
    cut = lambda x: x.split((5, 4, 4), 2)
    mixed = list(zip(lively.encode_stream(cut(a)), lively.encode_stream(cut(b))))
    for n, x in enumerate((a, b)): assert (torch.cat([m[n] for m in mixed], 2) - lively.encode(x).values).abs().max() <= 2e-5


def test_values_enter_halved_and_leave_doubled_clamped_per_channel():
    vae = random_copy()
    class Glass:
        def encode_stream(self, chunks):
            for x in chunks: self.low, self.high = float(x.min()), float(x.max()); yield x
        def decode_stream(self, latents): yield from latents
    glass = VAE(Glass(), vae.spec)
    video = torch.linspace(-1, 1, 5 * 64).view(1, 1, 5, 8, 8)
    latent = glass.encode(video)
    assert (glass.net.low, glass.net.high) == (-.5, .5)
    assert torch.allclose(glass.decode(latent), video, atol=1e-6)
    latent.values[:, 0] = 5.                                                     # one channel overshoots: held at white before the mean
    assert torch.allclose(glass.decode(latent), (1 + 2*video) / 3, atol=1e-6)


@torch.no_grad()
def test_sizes_the_patches_cannot_be_cut_from_are_refused():
    net = random_copy().net
    for shape in ((4, 16, 16), (6, 16, 16), (5, 12, 16), (5, 16, 20)):
        with pytest.raises(ValueError, match="1\\+4k frames and sides of 0 or 7 modulo 8"): net.encode(torch.zeros(1, 3, *shape))
    assert net.decode(net.encode(torch.zeros(1, 3, 5, 15, 23))).shape == (1, 3, 5, 16, 24)
    with pytest.raises(WeightsError, match="l_dim \\+ h_dim"): LeanVAE(l_dim=8, h_dim=8, embedding_dim=20)


@torch.no_grad()
def test_encoding_is_one_product_and_a_fresh_bottleneck_agrees_with_its_latent():
    "phi starts with orthonormal rows and Q as its transpose: the first guess already has this latent"
    b = leanvae.ISTABottleneck(32, 4, 0, 1)
    y = torch.randn(1, 2, 3, 4, 4)
    assert torch.allclose(b.project(b.lift(y, {})), y, atol=1e-5)


# ---- registry and files

def test_registry_rows_and_random_copies():
    for name, c in (("leanvae", 16), ("leanvae-4", 4)):
        e, vae = REGISTRY[name], load_vae(f"{name}-random")
        assert (e.hub, e.fetch, e.licence) == ("Yumic/LeanVAE", (f"LeanVAE-dim{c}.ckpt",), "MIT") and e.fetch[0] in e.files[0].split("|")
        s = vae.spec
        assert s.random and s.name == f"{name}-random" and (s.channels, s.strides, s.first, s.range, s.clamp, s.streams) == (c, (4, 8, 8), 1, (-.5, .5), True, True)
        assert control_for(s) == f"dct-4x8x8-{c}-causal" and torch.equal(next(vae.net.parameters()), next(load_vae(f"{name}-random").net.parameters()))


def save(path, net, **extra):
    torch.save({"args": config_of(net.state_dict()) | {"use_tile_inference": False, "chunksize_enc": 9}, "state_dict": net.state_dict()} | extra, path)


def test_a_release_loads_strictly_from_folder_file_and_safetensors(tmp_path):
    from safetensors.torch import save_file
    source, x = random_copy(), scan(6, 9, 17)
    want, file = source.encode(x).values, tmp_path / "LeanVAE-dim16.ckpt"
    save(file, source.net)
    for where in (tmp_path, file):
        vae = load_vae("leanvae", weights=where)
        assert torch.equal(vae.encode(x).values, want) and torch.equal(vae.decode(vae.encode(x)), source.decode(source.encode(x)))
        assert vae.weights == hashlib.sha256(file.read_bytes()).hexdigest() and vae.spec.name == "leanvae" and vae.spec.licence == "MIT" and not vae.spec.random
        assert not vae.net.training and not any(p.requires_grad or p.is_meta for p in vae.net.parameters())
    file.unlink(); save_file({k: v.contiguous() for k, v in source.net.state_dict().items()}, tmp_path / "LeanVAE-dim16.safetensors")
    assert torch.equal(load_vae("leanvae", weights=tmp_path).encode(x).values, want)


def test_a_training_checkpoint_gives_its_autoencoder_and_leaves_the_rest(tmp_path):
    net, file = random_copy().net, tmp_path / "last.ckpt"
    state = {f"autoencoder.{k}": v for k, v in net.state_dict().items()} | {"perceptual_model.lin0.weight": torch.zeros(3), "gan_loss.discriminator.0.weight": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-4}}, file)
    config, tensors, _ = read_leanvae(file)
    assert config == config_of(net.state_dict()) and set(tensors) == set(net.state_dict())
    assert torch.equal(load_vae("leanvae", weights=file).encode(scan(5, 8, 8)).values, random_copy_like(net).encode(scan(5, 8, 8)).values)


def random_copy_like(net):
    vae = random_copy(); vae.net.load_state_dict(net.state_dict()); return vae


def test_pickled_objects_are_refused_unread_with_what_to_do(tmp_path):
    file = tmp_path / "lightning.ckpt"
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "ran"), "w"))
    for extra, named in (({"hyper_parameters": argparse.Namespace(lr=1)}, "argparse.Namespace"), ({"callbacks": Trap()}, "open")):
        save(file, random_copy().net, **extra)
        with pytest.raises(WeightsError) as error: load_vae("leanvae", weights=file)
        said = str(error.value)
        assert str(file) in said and named in said and "\n" not in said and "'state_dict'" in said and "weights_only=False" in said
    assert not (tmp_path / "ran").exists()


def test_wrong_files_are_one_line(tmp_path):
    net, file = random_copy().net, tmp_path / "LeanVAE-dim16.ckpt"
    def said(match, name="leanvae"):
        with pytest.raises(WeightsError, match=match) as error: load_vae(name, weights=file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    state = dict(net.state_dict())
    file.write_bytes(b"\0" * 100); said("damaged")
    save(file, net); data = file.read_bytes(); file.write_bytes(data[:len(data) // 2]); said("damaged")
    torch.save({"state_dict": state}, file); said("no 'args'")
    torch.save(state, file); said("no 'state_dict'")
    torch.save([1, 2], file); said("no 'state_dict'")
    save(file, net); said("has 16 latent channels, leanvae-4 has 4; load it as 'leanvae'", "leanvae-4")
    save(file, net, args=config_of(state) | {"sep_num_layer": 2}); said("sep_num_layer 2 in args, 1 in the tensors")
    cut = {k: v for k, v in state.items() if k != "std_layer.bias"}
    torch.save({"args": {}, "state_dict": cut}, file); said("1 missing, first std_layer.bias")
    torch.save({"args": {}, "state_dict": state | {"gan_loss.x": torch.zeros(1)}}, file); said("1 unknown, first gan_loss.x")
    torch.save({"args": {}, "state_dict": {"encoder.conv1.weight": torch.zeros(1)}}, file); said("not LeanVAE's weights")
    torch.save({"args": {}, "state_dict": state | {"std_layer.bias": torch.zeros(3)}}, file); said("1 of another shape")


def test_missing_weights_name_file_and_hub(tmp_path):
    with pytest.raises(WeightsError, match="LeanVAE-dim4.ckpt of Yumic/LeanVAE"): load_vae("leanvae-4", weights=tmp_path)
