"VideoVAE+ against the released code's numbers; the released names; the licence; chunks; any size; strict loading."
import json
import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from rules import fill, rule_array, smooth_video
from fvae_nb.vaes import videovae_plus as vvp
from fvae_nb.vaes.interface import REGISTRY, WeightsError, control_for, find_weights, load_vae
from fvae_nb.vaes.videovae_plus import VideoVAEPlus

HERE = FIXTURES / "videovae_plus"
_nets = {}


def network(facts):
    "Our network with the fixture's configuration, filled by its rule; each built once"
    key = json.dumps([facts["config"], facts["chunk_size"]], sort_keys=True)
    if key not in _nets:
        c = facts["config"]
        net = VideoVAEPlus(c["ddconfig"]["z_channels"], c["use_quant_conv"], c["ddconfig"]["ch"], c["ddconfig"]["ch_mult"], c["ddconfig"]["num_res_blocks"],
                           c["ppconfig"].get("hidden_channel", 128), facts["chunk_size"] or 16)
        assert facts["gain"] == 1 and len(fill(net)) == len(net.state_dict())
        _nets.clear(); _nets[key] = net.eval().requires_grad_(False)
    return _nets[key]


def recipe(facts):
    i = facts["input"]
    if i["seed"] is None: return torch.zeros(1, i["channels"], i["frames"], i["height"], i["width"])
    return torch.from_numpy(smooth_video(i["channels"], i["frames"], i["height"], i["width"], i["seed"]))[None]


@torch.no_grad()
def hold(folder, case):
    "One case: every array, decoding from the stored latent"
    facts, arrays = json.loads((folder / f"{case}.json").read_text()), np.load(folder / f"{case}.npz")
    net, x, stored = network(facts), recipe(facts), {k: torch.from_numpy(v) for k, v in arrays.items()}
    if facts["chunk_size"]:
        padded = torch.cat([x, x[:, :, -1:].expand(-1, -1, -x.shape[2] % 4, -1, -1)], 2)
        ours = dict(recon=net.decode(net.encode(padded))[:, :, :x.shape[2]])
    elif facts["mask_temporal"]: ours = dict(zip(("mean", "logvar"), net.spatial(x, image=True)), recon=net.spatial_back(stored["mean"], image=True))
    else:
        ours = dict(zip(("mean", "logvar"), net.posterior(x)), spatial_mean=net.spatial(x)[0], temporal_decoded=net.decoder_temporal(stored["mean"]), recon=net.decode(stored["mean"]))
        assert torch.equal(net.encode(x), ours["mean"])
    assert set(ours) == set(stored)
    for name, theirs in stored.items():
        error, allowed = float((ours[name] - theirs).abs().max()), facts["tolerance"][name]
        print(f"{case:18}{name:17} max abs error {error:.1e}, allowed {allowed:.0e}")
        assert ours[name].shape == theirs.shape and error <= allowed, name


@pytest.mark.parametrize("case", ["small_16z_video", "small_16z_image", "small_16z_chunked", "small_16z_zeros", "small_4z_video"])
def test_parity(case): hold(HERE, case)


@pytest.mark.parametrize("case", ["full_16z_image", "full_16z_video"])
def test_parity_at_full_size(case, test_data): hold(test_data / "parity/videovae_plus", case)


# ---- names, shapes, norms

def shapes(net): return {k: list(v.shape) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("file, config, count", [("keys.json", dict(), 485_689_043), ("keys_4z.json", dict(z=4, quant=True), 484_901_107)])
def test_names_and_shapes_of_the_release_at_full_size(file, config, count):
    with torch.device("meta"): net = VideoVAEPlus(**config)
    assert shapes(net) == json.loads((HERE / file).read_text()) and sum(p.numel() for p in net.parameters()) == count
    assert vvp.config_of(net.state_dict()) == dict(z=16, quant=False, ch=128, mult=(1, 2, 4, 4), blocks=2, hidden=128) | config


def test_every_norm_has_the_releases_eps():
    with torch.device("meta"): net = VideoVAEPlus()
    norms = {k: m for k, m in net.named_modules() if isinstance(m, nn.GroupNorm)}
    wanted = {k.removesuffix(".weight") for k in json.loads((HERE / "keys.json").read_text()) if ("norm" in k or "final_block.0" in k) and k.endswith(".weight")}
    assert set(norms) == wanted and {m.num_groups for m in norms.values()} == {32}
    assert {k for k, m in norms.items() if m.eps == 1e-5} == {"encoder.mid.attn_1_tmp.norm", "decoder.mid.attn_1_tmp.norm"}
    assert {m.eps for m in norms.values()} == {1e-5, 1e-6}


@torch.no_grad()
def test_the_unused_branches_are_those_of_blocks_that_keep_their_width():
    "Present in the file, without effect: 80 tensors at full size"
    net = VideoVAEPlus(z=4, ch=32, mult=(1, 2, 2, 2), hidden=32)
    fill(net)
    x = torch.from_numpy(smooth_video(3, 4, 16, 16, seed=1))[None]
    before = net.decode(net.encode(x))
    kept = [k for k, m in net.named_modules() if isinstance(m, vvp.ResBlock) and m.same]
    for k in kept:
        for p in net.get_submodule(k).conv3_tmp.parameters(): p.fill_(float("nan"))
    assert torch.equal(net.decode(net.encode(x)), before)
    with torch.device("meta"): full = VideoVAEPlus()
    assert sum(4 for m in full.modules() if isinstance(m, vvp.ResBlock) and m.same) == 80


# ---- attention in time, spelled out

@torch.no_grad()
def test_time_attention_one_number_at_a_time():
    layer, x = vvp.TimeAttention(32, reach=2), torch.from_numpy(rule_array("x", (1, 32, 5, 1, 2)))
    fill(layer)
    y, out = layer(x), torch.empty(1, 32, 5, 1, 2)
    for w in range(2):
        s = x[0, :, :, 0, w]
        q, k, v = (layer.qkv(layer.norm(s[None]))[0]).split(32)
        Rk, Rv = layer.relative_position_k["embeddings_table"], layer.relative_position_v["embeddings_table"]
        row = lambda i, j: max(-2, min(2, j - i)) + 2
        for i in range(5):
            scores = torch.stack([(q[:, i] * k[:, j]).sum() / 32**.5 + (q[:, j] * Rk[row(j, i)]).sum() / 32**.25 for j in range(5)])   # query j, distance i-j
            a = scores.softmax(0)
            out[0, :, i, 0, w] = sum(a[j] * (v[:, j] + Rv[row(i, j)]) for j in range(5))
    want = x + layer.proj_out(out[:, :, :, 0].permute(0, 3, 1, 2)[0]).permute(1, 2, 0)[None, :, :, None]
    assert (y - want).abs().max() < 1e-5


# ---- chunks, any size

def tiny(name="videovae+"):
    vae = vvp.random_copy(name)
    fill(vae.net)                       # livelier than fresh weights
    return vae


TINY = {name: tiny(name) for name in ("videovae+", "videovae+4z")}


@pytest.mark.parametrize("name", TINY)
@given(T=st.integers(1, 21), H=st.integers(1, 19), W=st.integers(1, 19))
@hsettings(max_examples=6, deadline=None)
def test_any_size_in_the_same_size_out(name, T, H, W):
    vae = TINY[name]
    video = torch.rand(1, 1, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1
    latent = vae.encode(video)
    back = vae.decode(latent)
    assert back.shape == video.shape and torch.isfinite(back).all() and vae.decode(latent, channels=3).shape[1] == 3
    assert latent.values.shape == (1, vae.spec.channels, -(-T // 4), -(-H // 8), -(-W // 8))


@given(cuts=st.lists(st.integers(1, 23), min_size=1, max_size=4))
@hsettings(max_examples=6, deadline=None)
@torch.no_grad()
def test_streams_are_chunks_of_sixteen_wherever_the_pieces_are_cut(cuts):
    vae, T = TINY["videovae+"], sum(cuts)
    video = torch.from_numpy(smooth_video(1, T, 8, 16, seed=T))[None]
    padded = torch.cat([video, video[:, :, -1:].expand(-1, -1, -T % 4, -1, -1)], 2).expand(-1, 3, -1, -1, -1)
    alone = [vae.net.encoder_temporal(vae.net.spatial(c)[0])[:, :16] for c in padded.split(16, 2)]      # by hand
    z = torch.cat(list(vae.encode_stream(video.split(cuts, 2))), 2)
    assert torch.equal(z, torch.cat(alone, 2))
    frames = torch.cat([vae.net.spatial_back(vae.net.decoder_temporal(c)) for c in alone], 2)[:, :, :T].mean(1, keepdim=True).clamp(-1, 1)
    back = torch.cat(list(vae.decode_stream(z.split(3, 2), (T, 8, 16))), 2)
    assert (back - frames).abs().max() < 1e-5


@torch.no_grad()
def test_another_chunk_is_another_network():
    net, x = tiny().net, torch.from_numpy(smooth_video(3, 16, 16, 16, seed=0))[None]
    whole = net.encode(x)
    net.chunk = 8
    assert (net.encode(x) - whole).abs().max() > 1e-3
    with pytest.raises(ValueError, match="multiple of 4"): VideoVAEPlus(chunk=6)


def test_the_paper_protocol_goes_in_windows_of_64_filled_by_the_last_slice(tmp_path):
    import nibabel as nib
    from fvae_nb.data.ct import read_ct
    from fvae_nb.reconstruction.operator import reconstruct
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(0, 300, (8, 8, 18)).round().astype(np.int16), np.diag([.7, .7, 1.2, 1])), tmp_path / "a.nii.gz")
    vae, ct, seen = tiny(), read_ct(tmp_path / "a.nii.gz"), []
    plain = vae.net._posterior
    vae.net._posterior = lambda c: seen.append(c) or plain(c)
    back = reconstruct(ct, vae, protocol="paper")
    assert back.shape == ct.shape and [c.shape[2] for c in seen] == [16] * 4 and torch.equal(seen[1][:, :, 2:], seen[2][:, :, :14])
    seen.clear()
    assert reconstruct(ct, vae).shape == ct.shape and [c.shape[2] for c in seen] == [16, 4]


@torch.no_grad()
def test_a_draw_is_of_the_second_posterior_and_log_variances_are_clamped():
    vae, x = tiny(), torch.from_numpy(smooth_video(1, 4, 8, 8, seed=0))[None]
    a, b, c = (vae.encode(x, torch.Generator().manual_seed(s)).values for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    last = vae.net.encoder_temporal.final_block[2].conv
    last.bias[16:24], last.bias[24:] = 90, -90
    mean, logvar = vae.net.posterior(x.expand(-1, 3, -1, -1, -1))
    assert torch.equal(mean, vae.encode(x).values) and (logvar[:, :8] == 20).all() and (logvar[:, 8:] == -30).all()


# ---- the licence, and loading

@pytest.fixture
def release(in_tmp, monkeypatch):
    "A folder with a checkpoint as the release's, at small widths"
    for k in ("FVAE_ACCEPT_LICENCE", "FVAE_WEIGHTS"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("FVAE_CACHE", str(in_tmp / "cache"))
    (in_tmp / "settings.ini").write_text("[fvae]\n")
    net, folder = tiny().net, in_tmp / "w"; folder.mkdir()
    torch.save({"state_dict": net.state_dict() | {"loss.logvar": torch.zeros(1), "loss.perceptual_loss.net.x": torch.zeros(2)}, "epoch": 4}, folder / "sota-4-16z.ckpt")
    return net, folder


def same(net, vae): return all(torch.equal(v, vae.net.state_dict()[k]) for k, v in net.state_dict().items())


def test_no_weights_without_the_users_word(release, monkeypatch):
    net, folder = release
    def refuse(*a, **k): raise AssertionError("a file was touched")
    with monkeypatch.context() as m:
        m.setattr(torch, "load", refuse)
        with pytest.raises(WeightsError, match="not for commercial use.*accept_licence = videovae\\+ under") as error: load_vae("videovae+", weights=folder)
        assert "\n" not in str(error.value) and "CC BY-NC-ND 4.0" in str(error.value)
        (folder.parent / "settings.ini").write_text("[fvae]\naccept_licence = videovae+4z\n")      # another one's terms
        with pytest.raises(WeightsError, match="CC BY-NC-ND"): load_vae("videovae+", weights=folder)
    assert same(net, load_vae("videovae+", weights=folder, accept_licence=True))
    (folder.parent / "settings.ini").write_text("[fvae]\naccept_licence = videovae+, videovae+4z\nweights.videovae+ = w\n")
    vae = load_vae("videovae+")
    assert same(net, vae) and vae.spec.licence == "CC BY-NC-ND 4.0" and len(vae.weights) == 64 and vae.spec.name == "videovae+"
    assert not any(p.requires_grad for p in vae.net.parameters()) and not vae.net.training
    (folder.parent / "settings.ini").write_text("[fvae]\n"); monkeypatch.setenv("FVAE_ACCEPT_LICENCE", "videovae+")
    assert same(net, load_vae("videovae+", weights=folder / "sota-4-16z.ckpt"))


def test_only_weights_with_terms_ask_and_random_copies_do_not(release):
    assert {n for n, e in REGISTRY.items() if e.terms} == {"videovae+", "videovae+4z"}
    for name in ("videovae+", "videovae+4z"):
        e, vae = REGISTRY[name], load_vae(f"{name}-random")
        assert not e.hub and not e.fetch                                        # nothing is ever fetched for the user
        assert vae.spec.random and vae.spec.streams and vae.spec.strides == (4, 8, 8) and vae.spec.first == 0 and vae.spec.channels == vvp.CHANNELS[name]
        assert control_for(vae.spec) == f"dct-4x8x8-{vae.spec.channels}"
    with pytest.raises(WeightsError, match="sota-4-4z.ckpt"): find_weights(REGISTRY["videovae+4z"])


def test_the_command_line_asks_too(release, capsys):
    from fvae_nb.running.cli import main
    _, folder = release
    assert main(["vaes", "--verify", "videovae+", str(folder)]) == 2
    assert "accept_licence = videovae+" in capsys.readouterr().err
    assert main(["vaes"]) == 0
    said = capsys.readouterr().out
    assert "CC BY-NC-ND 4.0" in said.split("\nvideovae+ ")[1].split("\n")[0] and "not for commercial use" in said


def test_wrong_weights_give_one_clear_line(release):
    net, folder = release
    file, state = folder / "sota-4-16z.ckpt", net.state_dict()
    def expect(match, name="videovae+", **change):
        torch.save({"state_dict": {k: v for k, v in {**state, **change}.items() if v is not None}}, file)
        with pytest.raises(WeightsError, match=match) as error: vvp.load(file, name)
        assert "\n" not in str(error.value)
    expect("1 missing, first decoder.mid.attn_1.q.bias", **{"decoder.mid.attn_1.q.bias": None})
    expect("1 unknown, first extra", extra=torch.zeros(2))
    expect("of another shape", **{"decoder.mid.attn_1.q.bias": torch.zeros(3)})
    expect("has 16 latent channels, videovae\\+4z has 4", "videovae+4z")
    expect("trained with text", **{"encoder.down.0.attn.0.to_q.weight": torch.zeros(2, 2)})
    expect("not VideoVAE\\+'s weights", **{"encoder.conv_in.bias": None})
    file.write_bytes(b"no pickle")
    with pytest.raises(WeightsError, match="damaged"): vvp.load(file)


def test_text_checkpoints_of_both_sizes_are_recognised(test_data, tmp_path):
    for name, channels in (("16z", "videovae+"), ("4z", "videovae+4z")):
        keys = json.loads((test_data / f"parity/videovae_plus/keys_{name}_text.json").read_text())
        torch.save({"state_dict": {k: torch.zeros(()) for k in keys}}, tmp_path / "x.ckpt")
        with pytest.raises(WeightsError, match=f"take sota-4-{name}.ckpt, the one without"): vvp.load(tmp_path / "x.ckpt", channels)


def test_a_pickle_cannot_run_code_and_objects_are_named(release):
    import argparse, os
    net, folder = release
    class Bad:
        def __reduce__(self): return os.mkdir, (str(folder / "ran"),)
    torch.save({"state_dict": Bad()}, folder / "sota-4-16z.ckpt")
    with pytest.raises(WeightsError, match="Python objects.*mkdir"): vvp.load(folder)
    assert not (folder / "ran").exists()
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": argparse.Namespace(lr=1)}, folder / "sota-4-16z.ckpt")
    with pytest.raises(WeightsError, match="Python objects.*argparse.Namespace"): vvp.load(folder)


def test_bare_tables_half_precision_and_safetensors(release):
    from safetensors.torch import save_file
    net, folder = release
    torch.save({k: v.half() for k, v in net.state_dict().items()}, folder / "sota-4-16z.ckpt")
    assert {v.dtype for v in vvp.load(folder).net.state_dict().values()} == {torch.float32}
    (folder / "sota-4-16z.ckpt").unlink()
    save_file(net.state_dict(), folder / "sota-4-16z.safetensors")
    assert same(net, vvp.load(folder))
