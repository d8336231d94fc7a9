"CV-VAE v1 and SD3 against the released code's numbers; the released names; pieces and tiles; any size; strict loading; the paper's draws."
import json
import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from rules import fill, smooth_video
from fvae_nb.vaes import cvvae
from fvae_nb.vaes.cvvae import CVVAE, RELEASES, Block, SD3Block, TimeAttention, Up, build_cvvae, pieces_of, random_copy, tile_starts, tiled
from fvae_nb.vaes.interface import REGISTRY, VAE, WeightsError, control_for, find_weights, latent_frames, load_vae

HERE = FIXTURES / "cvvae"
CLASS = {"v1": "CVVAEModel", "sd3": "CVVAESD3Model"}
NAME = {"v1": "cvvae", "sd3": "cvvae-sd3"}
_nets = {}


# ---- parity

def network(facts, kind):
    "The fixture's configuration, filled by its rule, the latent as the release has it; each built once"
    key = kind + json.dumps(facts["config"], sort_keys=True)
    if key not in _nets:
        net = build_cvvae(CLASS[kind], **facts["config"], **({} if "scaling_factor" in facts["config"] else {"scaling_factor": 1.}))
        assert facts["gain"] == 1 and facts["key_prefix"] == "" and set(fill(net)) == set(net.state_dict())
        _nets[key] = net.eval().requires_grad_(False)
    return _nets[key]


def recipe(facts):
    i = facts["input"]
    if i["seed"] is None: return torch.zeros(1, i["channels"], i["frames"], i["height"], i["width"])
    return torch.from_numpy(smooth_video(i["channels"], i["frames"], i["height"], i["width"], seed=i["seed"]))[None]


@torch.no_grad()
def hold(folder, case):
    "Every array of one case, decoding from the stored mean; prints what was achieved"
    facts, arrays = json.loads((folder / f"{case}.json").read_text()), np.load(folder / f"{case}.npz")
    net = network(facts, case.split("_")[1])
    ours = dict(zip(("mean", "logvar"), (torch.cat(m, 2) for m in zip(*net.moments([recipe(facts)])))))
    ours["recon"] = net.decode(torch.from_numpy(arrays["mean"]) * net.scale)
    assert set(arrays.files) == set(ours)
    for name in arrays.files:
        theirs, allowed = torch.from_numpy(arrays[name]), facts["tolerance"][name]
        error = float((ours[name] - theirs).abs().max())
        print(f"cvvae {case:18}{name:7} max abs error {error:.1e}, allowed {allowed:.0e}")
        assert ours[name].shape == theirs.shape and error <= allowed, (name, error)


@pytest.mark.parametrize("case", sorted(f.stem for f in HERE.glob("small_*.npz")))
def test_parity(case): hold(HERE, case)


@pytest.mark.parametrize("case", ["small_v1_video", "small_sd3_video", "small_sd3_tiled"])
def test_parity_of_the_other_small_cases(case, test_data): hold(test_data / "parity/cvvae", case)


@pytest.mark.parametrize("kind", CLASS)
def test_parity_at_full_size(kind, test_data):
    try:
        for case in ("image", "video"): hold(test_data / "parity/cvvae", f"full_{kind}_{case}")
    finally: _nets.clear()                                                          # 0.7 GB each


def test_the_small_cases_are_here():
    assert {f.stem for f in HERE.glob("small_*.npz")} >= {f"small_{k}_{c}" for k in CLASS for c in ("zeros", "tail", "image", "tiled2d")}


@pytest.mark.parametrize("kind, file, count, tensors", [("v1", "keys", 182_446_475, 254), ("sd3", "keys_sd3", 181_892_515, 244)])
def test_parity_of_keys_at_full_size(kind, file, count, tensors):
    with torch.device("meta"): net = build_cvvae(CLASS[kind])
    keys = json.loads((HERE / f"{file}.json").read_text())
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == keys and len(keys) == tensors and sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("kind, eps", [("v1", 1e-5), ("sd3", 1e-6)])
def test_parity_of_eps_in_every_norm(kind, eps):
    with torch.device("meta"): net = build_cvvae(CLASS[kind])
    norms = {k: m for k, m in net.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    expected = {k.removesuffix(".weight") for k in json.loads((HERE / f"{'keys' if kind == 'v1' else 'keys_sd3'}.json").read_text()) if "norm" in k and k.endswith(".weight")}
    assert set(norms) == expected
    for name, m in norms.items():
        assert m.eps == (1e-5 if isinstance(m, nn.LayerNorm) else eps), name
        assert isinstance(m, nn.LayerNorm) == name.endswith("norm_t") and (isinstance(m, nn.LayerNorm) or m.num_groups == 32), name


@pytest.mark.parametrize("kind", CLASS)
@torch.no_grad()
def test_the_zeros_case_sees_a_wrong_eps(kind):
    facts, arrays = json.loads((HERE / f"small_{kind}_zeros.json").read_text()), np.load(HERE / f"small_{kind}_zeros.npz")
    net = network(facts, kind)
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    right = norms[0].eps
    try:
        for m in norms: m.eps = 1e-6 if kind == "v1" else 1e-5
        assert (net.encode(recipe(facts)) - torch.from_numpy(arrays["mean"])).abs().max() > .05
    finally:
        for m in norms: m.eps = right


# ---- parts

@torch.no_grad()
def test_paddings_by_the_table():
    x = torch.arange(1., 25).view(1, 1, 2, 3, 4)
    def after(pads):
        y = x
        for p in pads: y = p(y)
        return y
    v1, sd3 = cvvae.V1, cvvae.SD3
    for pads in (v1.back, v1.shrink): assert torch.equal(after(pads)[:, :, 0], after(pads)[:, :, 2]) and torch.equal(after(pads)[:, :, 1], after(pads)[:, :, 2])
    assert torch.equal(after(sd3.back), after(sd3.shrink)) and after(sd3.back)[0, 0, 0, 0, 0] == 1 and after(sd3.back)[0, 0, -1, -1, -1] == 24
    assert after(v1.shrink).shape == (1, 1, 4, 4, 5) and after(v1.shrink)[..., :3, :4].equal(torch.cat([x[:, :, :1]]*2 + [x], 2)) and after(v1.shrink)[..., 3, :].abs().sum() == after(v1.shrink)[..., 4].abs().sum() == 0
    assert after(v1.around)[:, :, [0, -1]].abs().sum() == 0 and torch.equal(after(v1.around)[:, :, 1:-1, 1:-1, 1:-1], x)
    assert after(v1.grow)[0, 0, 0, 1, 1] == 1 and after(v1.grow)[0, 0, -1, 0, 0] == 0 and torch.equal(after(v1.grow)[:, :, 0], after(v1.grow)[:, :, 1])
    assert after(sd3.around)[0, 0, 0, 0, 0] == 1 and after(sd3.around)[0, 0, -1, -1, -1] == 24 and torch.equal(after(sd3.around), after(sd3.grow))


@torch.no_grad()
def test_doubling_time_puts_the_pair_in_order_and_drops_the_first():
    up, x = Up(2, (cvvae.zero_all,), True), torch.rand(1, 2, 3, 4, 4)
    for p in up.parameters(): p.zero_()
    for c in range(4): up.conv.bias[c] = c
    assert up(x)[0, :, :, 0, 0].tolist() == [[2, 0, 2, 0, 2], [3, 1, 3, 1, 3]] and up(x).shape == (1, 2, 5, 8, 8)
    assert Up(2, (cvvae.copy_all,), False)(x).shape == (1, 2, 3, 8, 8)


@torch.no_grad()
def test_the_decoders_attention_has_one_sum_and_looks_both_ways_in_time():
    torch.manual_seed(0)
    att, x = TimeAttention(4, lambda c: nn.GroupNorm(2, c)), torch.randn(1, 4, 3, 2, 2)
    for p in att.proj_out_t.parameters(): p.zero_()
    assert torch.equal(att(x), x)                                                    # the spatial half alone adds nothing
    nn.init.eye_(att.proj_out_t.weight)
    y = x.clone(); y[:, :, 2, 0, 1] += 1
    moved = (att(y) - att(x) - (y - x)).abs().amax(1)[0]
    assert moved[0].max() > 1e-6 and moved[2].max() > 1e-6


def test_the_releases_blocks_differ_in_spelling_only():
    norm = lambda c: nn.GroupNorm(2, c)
    a, b = Block(4, 6, norm, cvvae.V1.back), SD3Block(4, 6, norm, cvvae.V1.back)
    assert [k for k in a.state_dict() if "shortcut" in k] == ["nin_shortcut.weight", "nin_shortcut.bias"] and a.nin_shortcut.weight.dim() == 5 and b.conv_shortcut.weight.dim() == 4
    assert not [k for k in Block(4, 4, norm, ()).state_dict() if "shortcut" in k]


# ---- pieces and tiles

@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6), step=st.integers(2, 16))
@hsettings(max_examples=60, deadline=None, derandomize=True)
def test_pieces_share_one_frame_and_miss_none(cuts, step):
    T = sum(cuts)
    x = torch.arange(float(T)).view(1, 1, T, 1, 1)
    out = [(p.flatten().long().tolist(), first) for p, first in pieces_of(x.split(cuts, 2), step)]
    rounds = max(1, -(-(T - 1) // step))
    assert [p for p, _ in out] == [list(range(step*r, min(step*(r + 1) + 1, T))) for r in range(rounds)] and [f for _, f in out] == [True] + [False]*(rounds - 1)


@given(H=st.integers(1, 12), W=st.integers(1, 12))
@hsettings(max_examples=25, deadline=None, derandomize=True)
def test_tiles_cover_the_plane_and_fade_without_a_trace(H, W):
    x = torch.rand(1, 2, 2, 8*H, 8*W, generator=torch.Generator().manual_seed(H))
    seen = []
    def double(t): seen.append(t.shape[-2:]); return 2*t
    assert torch.allclose(tiled(double, x, 32, 24, 8), 2*x, atol=1e-6)
    starts = [tile_starts(n, 32, 24) for n in (8*H, 8*W)]
    assert len(seen) == len(starts[0]) * len(starts[1]) and all(s[-1] + 32 >= n and (len(s) == 1 or s[-2] + 32 < n) for s, n in zip(starts, (8*H, 8*W)))
    assert all(8 < a <= 32 and 8 < b <= 32 for a, b in seen) or min(H, W) == 1


def test_a_ct_of_512_is_one_tile_and_tiles_meet_on_the_grid():
    assert tile_starts(512, 576, 448) == [0] and tile_starts(640, 576, 448) == [0, 448]
    with torch.device("meta"): net = build_cvvae("CVVAESD3Model")
    assert net.tile_in == (576, 448, 16) and net.tile_out == (72, 56, 128)
    with pytest.raises(WeightsError, match="do not meet on the latent's grid"): CVVAE(nn.Identity(), nn.Identity(), tile=32, overlap=.2222)


@torch.no_grad()
def test_half_precision_tiles_are_mixed_in_float32():
    a, b = torch.full((1, 1, 1, 4, 1), 1000., dtype=torch.float16), torch.full((1, 1, 1, 4, 1), 1001., dtype=torch.float16)
    mixed = cvvae._fade(a, b, 4, -2)
    assert mixed.dtype == torch.float16 and mixed.flatten().tolist() == [1000, 1000, 1000.5, 1001]       # 1000.25, .5, .75 rounded to halves once


_lively = {}
def lively(kind, **rules):
    "A narrow copy filled by rule, so that every layer matters"
    key = kind, *rules.items()
    if key not in _lively:
        vae = random_copy(NAME[kind]); fill(vae.net)
        if rules: vae = VAE(CVVAE(vae.net.encoder, vae.net.decoder, vae.net.scale, **rules).eval().requires_grad_(False), vae.spec)
        _lively[key] = vae
    return _lively[key]


@pytest.mark.parametrize("kind", CLASS)
@torch.no_grad()
def test_every_latent_sees_its_whole_piece_and_nothing_else(kind):
    net, x = lively(kind).net, torch.from_numpy(smooth_video(3, 21, 16, 16, seed=0))[None]
    z, changed = net.encode(x), x.clone()
    changed[:, :, 12] *= -1
    moved = (net.encode(changed) - z).abs().amax((0, 1, 3, 4))
    assert moved[:5].min() > 1e-4 and moved[5:].max() == 0
    changed = x.clone(); changed[:, :, 16] *= -1                                    # the shared slice
    assert (net.encode(changed) - z).abs().amax((0, 1, 3, 4)).min() > 1e-4
    assert torch.equal(net.encode(x[:, :, :17]), z[:, :, :5]) and torch.equal(net.encode(x[:, :, 16:])[:, :, 1:], z[:, :, 5:])


# ---- sizes, streams

@pytest.mark.parametrize("kind", CLASS)
@given(T=st.integers(1, 22), H=st.integers(1, 26), W=st.integers(1, 26))
@hsettings(max_examples=10, deadline=None, derandomize=True)
def test_any_size_in_the_same_size_out(kind, T, H, W):
    vae, video = load_vae(f"{NAME[kind]}-random"), torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1
    latent = vae.encode(video)
    back = vae.decode(latent)
    assert latent.values.shape == (1, vae.spec.channels, latent_frames(T, vae.spec), -(-H // 8), -(-W // 8))
    assert back.shape == video.shape and torch.isfinite(back).all() and vae.decode(latent, channels=3).shape[1] == 3


@pytest.mark.parametrize("kind", CLASS)
@given(H=st.integers(20, 80), W=st.integers(20, 80))
@hsettings(max_examples=5, deadline=None, derandomize=True)
def test_any_size_through_tiles(kind, H, W):
    vae, video = lively(kind, frames=8, tile=32, overlap=.25), torch.rand(1, 1, 10, H, W, generator=torch.Generator().manual_seed(H)) * 2 - 1
    latent = vae.encode(video)
    assert latent.values.shape[2:] == (4, -(-H // 8), -(-W // 8)) and vae.decode(latent).shape == video.shape


@pytest.mark.parametrize("kind", CLASS)
@given(cuts=st.lists(st.integers(1, 19), min_size=1, max_size=4), latents=st.lists(st.integers(1, 6), min_size=1, max_size=3))
@hsettings(max_examples=6, deadline=None, derandomize=True)
@torch.no_grad()
def test_streams_are_the_whole(kind, cuts, latents):
    vae, T = lively(kind), sum(cuts)
    video = torch.from_numpy(smooth_video(1, T, 16, 24, seed=T))[None]
    whole = vae.encode(video)
    assert (torch.cat(list(vae.encode_stream(video.split(cuts, 2))), 2) - whole.values).abs().max() <= 2e-5
    z = torch.randn(1, vae.spec.channels, sum(latents), 2, 3, generator=torch.Generator().manual_seed(T))
    frames = torch.cat(list(vae.net.decode_stream(z.split(latents, 2))), 2)
    assert frames.shape[2] == 1 + 4*(sum(latents) - 1) and (frames - vae.net.decode(z)).abs().max() <= 2e-5


# ---- the posterior

@torch.no_grad()
def test_latents_are_scaled_once_and_draws_with_them():
    vae, x = lively("v1"), torch.from_numpy(smooth_video(1, 5, 16, 16, seed=1))[None]
    raw = [torch.cat(m, 2) for m in zip(*vae.net.moments([x.expand(-1, 3, -1, -1, -1)]))]
    mean, logvar = vae.net.posterior(x.expand(-1, 3, -1, -1, -1))
    assert torch.allclose(mean, .18215*raw[0]) and torch.allclose((logvar/2).exp(), .18215*(raw[1]/2).exp(), rtol=1e-5) and torch.equal(vae.encode(x).values, mean)
    one = VAE(CVVAE(vae.net.encoder, vae.net.decoder), vae.spec)
    assert torch.allclose(one.decode(one.encode(x)), vae.decode(vae.encode(x)), atol=1e-5)
    draw = lambda seed: vae.encode(x, torch.Generator().manual_seed(seed)).values
    z = (torch.stack([draw(s) for s in range(60)]) - mean) / (logvar/2).exp()
    assert torch.equal(draw(1), draw(1)) and abs(z.mean()) < .05 and abs(z.std() - 1) < .03
    assert lively("sd3").net.scale == 1


@torch.no_grad()
def test_log_variances_are_clamped():
    net = random_copy().net
    net.encoder.conv_out.bias[4:6], net.encoder.conv_out.bias[6:8] = 90, -90
    logvar = next(net.moments([torch.rand(1, 3, 1, 8, 8)]))[1]
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


def test_the_papers_protocol_draws_in_float16_with_a_seed(tmp_path):
    import nibabel as nib
    from fvae_nb.data.ct import read_ct
    from fvae_nb.reconstruction.operator import _as_released, reconstruct
    vae, dtype, how = _as_released(lively("v1"))
    assert dtype == torch.float16 and how["sample"] and how.get("size", 65) == 65 and next(vae.net.parameters()).dtype == dtype
    hu = np.transpose(np.round(900 * smooth_video(1, 3, 16, 24, seed=9)[0]).astype(np.int16), (1, 2, 0))
    nib.save(nib.Nifti1Image(hu, np.diag([.7, .7, 2.5, 1.])), tmp_path / "a.nii.gz")
    ct = read_ct(tmp_path / "a.nii.gz")
    a, b, c = (reconstruct(ct, lively("v1"), protocol="paper", seed=s).array for s in (0, 0, 1))
    assert a.shape == ct.shape and np.array_equal(a, b) and not np.array_equal(a, c) and np.array_equal(a, np.trunc(a)) and np.abs(a).max() <= 1000


# ---- registry and files

def test_registry_rows_and_random_copies():
    for name, (sub, _) in RELEASES.items():
        e, s = REGISTRY[name], load_vae(f"{name}-random").spec
        assert f"{sub}/diffusion_pytorch_model.safetensors" in e.files[0].split("|") and sub in e.how and e.args == (name,) and "none" in e.licence and not e.hub      # nothing is fetched unasked
        assert s.random and (s.channels, s.strides, s.first, s.range, s.streams, s.clamp) == (16 if "sd3" in name else 4, (4, 8, 8), 1, (-1, 1), True, False)
        assert control_for(s) == f"dct-4x8x8-{s.channels}-causal" and torch.equal(next(load_vae(f"{name}-random").net.parameters()), next(load_vae(f"{name}-random").net.parameters()))


SMALL = {"v1": dict(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1), "sd3": dict(block_out_channels=[8]*4, layers_per_block=1, norm_num_groups=4)}


@pytest.fixture(params=CLASS)
def release(request, tmp_path):
    "A folder as the hub has it, of a narrow network"
    from safetensors.torch import save_file
    net = build_cvvae(CLASS[request.param], **SMALL[request.param]); fill(net)
    folder = tmp_path / RELEASES[NAME[request.param]][0]; folder.mkdir()
    save_file({k: v.half().contiguous() for k, v in net.state_dict().items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS[request.param], "_diffusers_version": "0.25.0", "double_z": True, "tile_overlap_ratio": .2222, **SMALL[request.param]}))
    return NAME[request.param], net, tmp_path, folder


def test_a_release_loads_strictly_from_hub_folder_own_folder_file_and_bin(release):
    name, net, top, folder = release
    state = {k: v.half().float() for k, v in net.state_dict().items()}
    file = folder / "diffusion_pytorch_model.safetensors"
    assert find_weights(REGISTRY[name], top) == top
    for where in (top, folder, file):
        vae = load_vae(name, weights=where)
        assert all(torch.equal(v, state[k]) for k, v in vae.net.state_dict().items()) and len(vae.weights) == 64 and vae.spec.name == name and not vae.spec.random
        assert vae.net.scale == (.18215 if name == "cvvae" else 1) and not vae.net.training and not any(p.requires_grad or p.is_meta for p in vae.net.parameters())
    file.unlink(); torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert torch.equal(load_vae(name, weights=folder).net.state_dict()["decoder.conv_out.weight"], state["decoder.conv_out.weight"])


def test_wrong_files_are_one_line(release):
    from safetensors.torch import save_file
    name, net, top, folder = release
    file, config, state = folder / "diffusion_pytorch_model.safetensors", folder / "config.json", dict(net.state_dict())
    def said(match, where=file, **change):
        if change: save_file({k: v.contiguous() for k, v in {**state, **change}.items() if v is not None}, file)
        with pytest.raises(WeightsError, match=match) as error: load_vae(name, weights=folder)
        assert str(where) in str(error.value) and "\n" not in str(error.value)
    said("1 missing, first decoder.conv_in.bias", **{"decoder.conv_in.bias": None})
    said("1 unknown, first extra", extra=torch.zeros(2))
    said("another shape", **{"decoder.conv_in.bias": torch.zeros(3)})
    file.write_bytes(b"\0" * 64); said("damaged")
    facts = json.loads(config.read_text())
    for change, match in (({"causal_decoder": True}, "causal_decoder = True"), ({"half_3d": False}, "half_3d"), ({"resolution": 9}, "'resolution' is not a known setting"), ({"act_fn": "gelu"} if name == "cvvae-sd3" else {"decoder_attn_type": "vanilla"}, "is not supported"),
                          ({"block_out_channels": [8]*3} if name == "cvvae-sd3" else {"ch_mult": [1, 1]}, "expected four"), ({"tile_spatial_size": 100}, "do not meet")):
        config.write_text(json.dumps(facts | change)); said(match, config)
    config.write_text(json.dumps(facts | {"_class_name": "AutoencoderKL"})); said("describes AutoencoderKL", config)
    for text, match in (("[1]", "holds a list"), ("{", "not JSON")): config.write_text(text); said(match, config)
    config.unlink(); save_file({k: v.contiguous() for k, v in state.items()}, file); said("not this network's weights")     # without it: the released widths
    with pytest.raises(WeightsError, match="of AILab-CVC/CV-VAE on the Hugging Face hub"): load_vae(name, weights=top / "nowhere")


def test_a_pickle_cannot_run_code(release):
    import os
    name, _, top, folder = release
    class Bad:
        def __reduce__(self): return os.mkdir, (str(top / "ran"),)
    (folder / "diffusion_pytorch_model.safetensors").unlink(); torch.save({"x": Bad()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match="damaged"): load_vae(name, weights=folder)
    assert not (top / "ran").exists()
