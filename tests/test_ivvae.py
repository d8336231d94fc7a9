"IV-VAE against the released code's numbers; the released names; groups, streams, any size; strict loading; the paper's draws."
import functools, json
import numpy as np
import pytest
import torch
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from rules import fill, smooth_video
from fvae_nb.vaes import ivvae
from fvae_nb.vaes.interface import REGISTRY, VAE, WeightsError, control_for, find_weights, latent_frames, load_vae
from fvae_nb.vaes.ivvae import IVVAE, VARIANTS, FlatConv, GroupConv, HalfNorm, Pyramid, choose, random_copy

HERE = FIXTURES / "ivvae"
KEYS = {"ivvae": "keys", "ivvae-z16-dim64": "keys_z16_dim64", "ivvae-z8-dim64": "keys_z8_dim64", "ivvae-z4-dim64": "keys_z4_dim64"}


# ---- parity

@functools.lru_cache(1)
def network(*config):
    net = IVVAE(*config).eval()
    assert set(fill(net)) == set(net.state_dict())
    return net


@torch.no_grad()
def hold(folder, case):
    "Every array of one case, decoding from the stored latent; prints what was achieved"
    facts, arrays = json.loads((folder / f"{case}.json").read_text()), np.load(folder / f"{case}.npz")
    c, i = facts["config"], facts["input"]
    net = network(c["z_dim"], c["dim"], c["scale_factor"], c["shift_factor"])
    assert facts["gain"] == 1 and facts["key_prefix"] == ""
    x = torch.from_numpy(smooth_video(i["channels"], i["frames"], i["height"], i["width"], seed=i["seed"]))[None]
    x = x[:, :, :1 + (i["frames"] - 1)//4*4]                    # the released loop drops the rest
    ours = dict(zip(("mean", "logvar"), (torch.cat(m, 2) for m in zip(*net._pieces([x])))))
    ours |= dict(latent=net.encode(x), recon=net.decode(torch.from_numpy(arrays["latent"])))
    assert set(arrays.files) == set(ours)
    for name in arrays.files:
        theirs, allowed = torch.from_numpy(arrays[name]), facts["tolerance"][name]
        error = float((ours[name] - theirs).abs().max())
        print(f"ivvae {case:12}{name:8} max abs error {error:.1e}, allowed {allowed:.0e}")
        assert ours[name].shape == theirs.shape and error <= allowed, (name, error)


@pytest.mark.parametrize("case", ["small_video", "small_image", "small_tail"])
def test_parity(case): hold(HERE, case)


def test_parity_at_full_size(test_data):
    for case in ("full_image", "full_video"): hold(test_data / "parity/ivvae", case)


def shapes(net): return {k: list(v.shape) for k, v in net.state_dict().items()}


def test_parity_of_keys_at_full_size():
    with torch.device("meta"): net = IVVAE()
    keys = json.loads((HERE / "keys.json").read_text())
    assert shapes(net) == keys and len(keys) == 362 and sum(p.numel() for p in net.parameters()) == 241_854_742


@pytest.mark.parametrize("name, count", [("ivvae-z16-dim64", 107_798_550), ("ivvae-z8-dim64", 107_379_150), ("ivvae-z4-dim64", 107_170_842)])
def test_parity_of_keys_of_the_smaller_variants(name, count, test_data):
    with torch.device("meta"): net = IVVAE(*VARIANTS[name])
    assert shapes(net) == json.loads((test_data / f"parity/ivvae/{KEYS[name]}.json").read_text()) and sum(p.numel() for p in net.parameters()) == count


def test_parity_of_eps_in_every_norm():
    "1e-12 beside the length, not under its root: seen where the input is shorter than that"
    net, count = random_copy().net, 0
    for name, m in net.named_modules():
        if not isinstance(m, HalfNorm): continue
        count += 1
        channels = m.gamma.shape[0] // m.halves
        x = torch.zeros(1, m.gamma.shape[0], *[2]*(m.gamma.dim() - 1)); x[:, ::channels] = 1e-13        # the first channel of each half
        with torch.no_grad(): y = m(x)
        assert torch.allclose(y[:, ::channels], torch.tensor(.1 * channels**.5), rtol=1e-4) and y.abs().sum() == y[:, ::channels].abs().sum(), name
        with torch.no_grad(): assert torch.allclose(m(1e-3*torch.ones_like(x)), torch.tensor(1.), rtol=1e-4), name
    assert count == sum(k.endswith("gamma") for k in net.state_dict()) == 66


# ---- groups

@torch.no_grad()
def test_a_group_is_an_ordinary_convolution_between_its_past_and_a_blank():
    conv, x = GroupConv(2, 3, 4), torch.randn(2, 2, 9, 5, 6, generator=torch.Generator().manual_seed(0))
    memory = {}
    y = torch.cat([conv(x[:, :, :1], memory), conv(x[:, :, 1:], memory)], 2)
    blank = torch.zeros_like(x[:, :, :1])
    for a, b in ((0, 1), (1, 5), (5, 9)):
        held = torch.cat([x[:, :, max(a - 1, 0)][:, :, None], x[:, :, a:b], blank], 2)
        assert torch.allclose(y[:, :, a:b], torch.nn.functional.conv3d(held, conv.weight, conv.bias, padding=(0, 1, 1)), atol=1e-6)


@torch.no_grad()
def test_many_groups_at_once_are_the_groups_one_by_one():
    net = lively("ivvae").net
    x = torch.from_numpy(smooth_video(3, 13, 16, 24, seed=3))[None]
    memory = {}
    once = torch.cat([net.moments(p, memory)[0] for p in (x[:, :, :1], x[:, :, 1:])], 2)
    z = net.encode(x)
    assert (net.scale * (once - net.shift) - z).abs().max() <= 2e-5
    memory = {}
    pictures = [net.decoder(net.conv2(p / net.scale + net.shift, memory), memory) for p in (z[:, :, :1], z[:, :, 1:])]
    assert (torch.cat([choose(p) for p in pictures], 2) - net.decode(z)).abs().max() <= 2e-5


def test_keyframes_are_chosen_from_the_first_half_and_nothing_is_added():
    x = torch.arange(9.).view(1, 1, 9, 1, 1).expand(1, 6, 9, 2, 2) + 100*(torch.arange(6) > 2).view(1, 6, 1, 1, 1)
    assert choose(x[:, :, :1])[0, :, 0, 0, 0].tolist() == [0, 0, 0]
    assert choose(x[:, :, 1:])[0, 0, :, 0, 0].tolist() == [1, 102, 103, 104, 5, 106, 107, 108]


@torch.no_grad()
def test_in_time_the_keyframe_half_drops_and_the_change_half_mixes():
    down, x = ivvae.Down(2, True), torch.randn(1, 4, 4, 6, 8)
    memory, y = {}, torch.cat([x[:, :, ::2], x[:, :, 1::2] * 0], 2)
    halves = lambda v: (v[:, :2], v[:, 2:])
    a, b = halves(down(x, {}))
    a2, b2 = halves(down(torch.cat([x[:, :, :1], 9*x[:, :, 1:2], x[:, :, 2:]], 2), {}))       # the second frame changes
    assert torch.equal(a, a2) and (b - b2)[:, :, 0].abs().max() > .1 and torch.equal(b[:, :, 1], b2[:, :, 1])
    up = ivvae.Up(4, True)
    first, later = (up(torch.randn(1, 8, 1, 3, 4), memory) for _ in range(2))
    assert first.shape == (1, 4, 1, 6, 8) and later.shape == (1, 4, 2, 6, 8) and torch.equal(later[:, :2, 0], later[:, :2, 1]) and not torch.equal(later[:, 2:, 0], later[:, 2:, 1])


@torch.no_grad()
def test_the_pyramid_looks_twelve_positions_far_and_joins_halves_in_order():
    p = Pyramid(2, 1)
    for k, m in p.named_children(): torch.nn.init.zeros_(m.conv.weight); torch.nn.init.zeros_(m.conv.bias)
    p.PAC_12.conv.weight[0, 0, 1, 2] = 1                        # first half's output, one step of 12 to the right
    p.PAC_conv.conv.weight[1, 5] = 1                            # first halves come first: 12 is the sixth of them
    x = torch.zeros(1, 4, 1, 1, 30); x[0, 0, 0, 0, 20] = 1
    assert p(x, {})[0, 1, 0, 0].nonzero().flatten().tolist() == [8]


# ---- streams, sizes

_lively = {}
def lively(name):
    "A narrow copy filled by rule, so that every layer matters; made once"
    if name not in _lively:
        vae = random_copy(name)
        fill(vae.net)
        _lively[name] = VAE(vae.net, vae.spec)
    return _lively[name]


@pytest.mark.parametrize("name", ["ivvae", "ivvae-z4-dim64"])
@given(T=st.integers(1, 14), H=st.integers(1, 26), W=st.integers(1, 26))
@hsettings(max_examples=10, deadline=None, derandomize=True)
def test_any_size_in_the_same_size_out(name, T, H, W):
    vae, video = load_vae(f"{name}-random"), torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1
    latent = vae.encode(video)
    back = vae.decode(latent)
    assert latent.values.shape == (1, VARIANTS[name][0], latent_frames(T, vae.spec), -(-H // 8), -(-W // 8))
    assert back.shape == video.shape and torch.isfinite(back).all() and vae.decode(latent, channels=3).shape[1] == 3


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), latents=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@hsettings(max_examples=10, deadline=None, derandomize=True)
@torch.no_grad()
def test_streams_are_the_whole(cuts, latents):
    vae, T = lively("ivvae"), sum(cuts)
    video = torch.from_numpy(smooth_video(1, T, 16, 24, seed=T))[None]
    whole = vae.encode(video)
    assert (torch.cat(list(vae.encode_stream(video.split(cuts, 2))), 2) - whole.values).abs().max() <= 2e-5
    z = torch.randn(1, 16, sum(latents), 2, 3, generator=torch.Generator().manual_seed(T))
    frames = torch.cat(list(vae.net.decode_stream(z.split(latents, 2))), 2)
    assert frames.shape[2] == 1 + 4*(sum(latents) - 1) and (frames - vae.net.decode(z)).abs().max() <= 2e-5


@torch.no_grad()
def test_nothing_looks_beyond_its_group():
    net, x = lively("ivvae").net, torch.from_numpy(smooth_video(3, 13, 16, 16, seed=0))[None]
    z = net.encode(x)
    for n in (1, 2, 3): assert torch.equal(net.encode(x[:, :, :4*n - 3]), z[:, :, :n])
    y = net.decode(z)
    for n in (1, 2, 3): assert torch.equal(net.decode(z[:, :, :n]), y[:, :, :4*n - 3])
    changed = x.clone(); changed[:, :, 8] += 1                  # the last of group two is seen by its own latent and all later ones
    assert [float(d) > 1e-4 for d in (net.encode(changed) - z).abs().amax((0, 1, 3, 4))] == [False, False, True, True]


@torch.no_grad()
def test_a_streams_memory_does_not_grow():
    net, memory, sizes = random_copy().net, {}, []
    for n in range(5):
        net.decoder(torch.randn(1, 16, 1, 2, 2), memory)
        sizes.append(sum(v.untyped_storage().nbytes() for v in memory.values() if torch.is_tensor(v)))
    assert sizes[1:] == [sizes[1]]*4 and sizes[1] == sum(v.nbytes for v in memory.values() if torch.is_tensor(v))


def test_frames_that_are_no_groups_are_refused():
    with pytest.raises(ValueError, match="1\\+4k frames, got 4"): random_copy().net.encode(torch.zeros(1, 3, 4, 8, 8))


# ---- the posterior

@torch.no_grad()
def test_moments_are_stacked_half_by_half():
    net, x = random_copy().net, torch.rand(1, 3, 1, 8, 8)
    torch.nn.init.zeros_(net.conv1.conv_2d.weight); torch.nn.init.zeros_(net.conv1.conv_3d.weight)
    net.conv1.conv_2d.bias.copy_(torch.arange(16.)); net.conv1.conv_3d.bias.copy_(100 + torch.arange(16.))
    mean, logvar = net.moments(x, {})
    assert mean.flatten().tolist() == [*range(8), *range(100, 108)] and logvar.flatten().tolist() == [*range(8, 16), *range(108, 116)]      # no clamp either


@torch.no_grad()
def test_draws_have_the_posteriors_mean_and_spread_and_a_seed():
    vae, x = lively("ivvae"), torch.from_numpy(smooth_video(1, 5, 16, 16, seed=1))[None]
    draw = lambda seed: vae.encode(x, torch.Generator().manual_seed(seed)).values
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    mean, logvar = vae.net.posterior(x.expand(-1, 3, -1, -1, -1))
    assert torch.equal(vae.encode(x).values, mean)
    z = (torch.stack([draw(s) for s in range(40)]) - mean) / (logvar/2).exp()
    assert abs(z.mean()) < .02 and abs(z.std() - 1) < .02
    raw = torch.cat([m[1] for m in vae.net._pieces([x.expand(-1, 3, -1, -1, -1)])], 2)
    assert torch.allclose((logvar/2).exp(), .7619*(raw/2).exp(), rtol=1e-5)         # scale * (mu + sigma * noise - shift)


@torch.no_grad()
def test_bfloat16_computes_and_stays_near():
    "The paper's script runs this network in bfloat16: 8 bits of mantissa, some eighty layers"
    vae = random_copy(); fill(vae.net)
    x = torch.from_numpy(smooth_video(3, 5, 16, 24, seed=4))[None]
    whole = vae.net.decode(vae.net.encode(x))
    net = vae.to(dtype=torch.bfloat16).net
    half = net.decode(net.encode(x.bfloat16()))
    assert half.dtype == torch.bfloat16 and 1e-4 < (half.float() - whole).square().mean().sqrt() / whole.std() < .15


def test_the_papers_protocol_draws_in_bfloat16_with_a_seed(tmp_path):
    import nibabel as nib
    from fvae_nb.data.ct import read_ct
    from fvae_nb.reconstruction.operator import _as_released, reconstruct
    vae, dtype, how = _as_released(lively("ivvae"))
    assert dtype == torch.bfloat16 and how["sample"] and how.get("size", 65) == 65 and next(vae.net.parameters()).dtype == dtype
    hu = np.transpose(np.round(900 * smooth_video(1, 3, 16, 24, seed=9)[0]).astype(np.int16), (1, 2, 0))
    nib.save(nib.Nifti1Image(hu, np.diag([.7, .7, 2.5, 1.])), tmp_path / "a.nii.gz")
    ct = read_ct(tmp_path / "a.nii.gz")
    a, b, c = (reconstruct(ct, lively("ivvae"), protocol="paper", seed=s).array for s in (0, 0, 1))
    assert a.shape == ct.shape and np.array_equal(a, b) and not np.array_equal(a, c) and np.array_equal(a, np.trunc(a)) and np.abs(a).max() <= 1000


# ---- registry and files

def test_registry_rows_and_random_copies():
    for name, (z, dim, scale, shift) in VARIANTS.items():
        e, s = REGISTRY[name], load_vae(f"{name}-random").spec
        file = name.replace("-", "_") if name != "ivvae" else "ivvae_z16_dim96"
        assert f"{file}.pth" in e.files[0].split("|") and f"z{z}_dim{dim}" in e.files[0] and e.licence == "Apache-2.0" and "ModelScope" in e.how and e.args == (name,)
        assert s.random and (s.channels, s.strides, s.first, s.range, s.streams, s.clamp) == (z, (4, 8, 8), 1, (-1, 1), True, False)
        assert control_for(s) == f"dct-4x8x8-{z}-causal" and torch.equal(next(load_vae(f"{name}-random").net.parameters()), next(load_vae(f"{name}-random").net.parameters()))


@pytest.fixture
def release(tmp_path, monkeypatch):
    "A file as ModelScope has it, of a narrow network"
    monkeypatch.setitem(VARIANTS, "ivvae", (16, 8, .7619, -.0483))
    torch.save(lively("ivvae").net.state_dict(), tmp_path / "ivvae_z16_dim96.pth")
    return tmp_path


def test_a_release_loads_strictly_from_folder_file_and_safetensors(release):
    from safetensors.torch import save_file
    x, net = torch.rand(1, 1, 6, 9, 17)*2 - 1, lively("ivvae").net
    want, file = lively("ivvae").encode(x).values, release / "ivvae_z16_dim96.pth"
    assert find_weights(REGISTRY["ivvae"], release) == release
    for where in (release, file):
        vae = load_vae("ivvae", weights=where)
        assert torch.equal(vae.encode(x).values, want) and len(vae.weights) == 64 and (vae.spec.name, vae.spec.licence, vae.spec.random) == ("ivvae", "Apache-2.0", False)
        assert not vae.net.training and not any(p.requires_grad or p.is_meta for p in vae.net.parameters())
    (release / "weights").mkdir(); file.rename(release / "weights" / file.name)
    assert torch.equal(load_vae("ivvae", weights=release).encode(x).values, want)
    save_file({k: v.bfloat16().contiguous() for k, v in net.state_dict().items()}, release / "ivvae_z16_dim96.safetensors")
    assert {v.dtype for v in load_vae("ivvae", weights=release / "ivvae_z16_dim96.safetensors").net.state_dict().values()} == {torch.float32}


def test_wrong_files_are_one_line(release):
    file, state = release / "ivvae_z16_dim96.pth", dict(lively("ivvae").net.state_dict())
    def said(match, name="ivvae", **change):
        if change: torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, file)
        with pytest.raises(WeightsError, match=match) as error: load_vae(name, weights=file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    said("1 missing, first decoder.conv1.conv.bias", **{"decoder.conv1.conv.bias": None})
    said("1 unknown, first extra", extra=torch.zeros(2))
    said("another shape", **{"decoder.conv1.conv.bias": torch.zeros(3)})
    said("not IV-VAE's weights", **{"conv1.conv_2d.bias": None})
    torch.save(state, file); said("has 16 latent channels and width 8, ivvae-z8-dim64 has 8 and 64; load it as 'ivvae'", "ivvae-z8-dim64")
    file.write_bytes(file.read_bytes()[:5000]); said("damaged")
    with pytest.raises(WeightsError, match="ivvae_z4_dim64.pth of wpy1999/iv-vae on ModelScope"): load_vae("ivvae-z4-dim64", weights=release)


def test_a_pickle_cannot_run_code(release):
    import os
    class Bad:
        def __reduce__(self): return os.mkdir, (str(release / "ran"),)
    torch.save({"conv1.conv_2d.bias": Bad()}, release / "ivvae_z16_dim96.pth")
    with pytest.raises(WeightsError, match="damaged"): load_vae("ivvae", weights=release)
    assert not (release / "ran").exists()
