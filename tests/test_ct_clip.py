"CT-CLIP written from its description: the released keys and shapes, the public code's numbers on a small copy, its preparation, strict loading."
import json
import numpy as np
import pytest
import torch
from conftest import FIXTURES
from rules import fill, smooth_video
from test_features import agree, synthetic, volume
from fvae_nb.data.ct import DataError
from fvae_nb.evaluation.ct_clip import CTCLIP, clip_input, read_ct_clip
from fvae_nb.vaes.interface import WeightsError

FACTS = json.loads((FIXTURES / "ct_clip/small.json").read_text())
STORED = np.load(FIXTURES / "ct_clip/small.npz")
IMAGE = {k: v for k, v in FACTS["config"]["ctvit"].items() if k != "image_size"}
DIMS = {k: FACTS["config"][k] for k in ("dim_image", "dim_text", "dim_latent")}
TOLERANCE = FACTS["tolerance"]


def build(**more):
    net = CTCLIP(IMAGE, FACTS["config"]["text"], **DIMS, **more).eval()
    fill(net, ("visual_transformer.vq._codebook.initted", "visual_transformer.vq._codebook.cluster_size", "temperature"))                  # 0-d: the rule leaves it at 1
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def net(): return build()


def near(got, key): assert got.shape == STORED[key].shape and np.abs(got.numpy() - STORED[key]).max() < TOLERANCE


def test_released_keys_and_shapes():
    want = json.loads((FIXTURES / "ct_clip/keys.json").read_text())
    with torch.device("meta"): have = {k: list(v.shape) for k, v in CTCLIP().state_dict().items()}
    assert have == {k: v["shape"] if isinstance(v, dict) else v for k, v in want.items()} and len(have) == 361


@torch.no_grad()
def test_image_tower_stage_by_stage(net):
    vit = net.visual_transformer
    x = torch.stack([torch.from_numpy(smooth_video(1, 20, 40, 60, seed=s)) for s in (0, 1)])
    p = vit.patches(x); near(p, "patch"); b, t, h, w = p.shape[:4]
    near(vit.spatial_rel_pos_bias(h, w), "bias")
    near(vit.enc_spatial_transformer(p.reshape(b*t, h*w, -1), p.shape[:4], vit.spatial_rel_pos_bias(h, w)), "spatial")
    near(vit.tokens(x), "tokens")
    kept = torch.from_numpy(STORED["tokens"])                                        # the argmax jumps: codes from the stored tokens
    assert np.array_equal(vit.vq._codebook.nearest(kept).numpy(), STORED["indices"])
    near(vit.vq._codebook(kept), "encoded"); near(net.pool(vit.vq._codebook(kept)), "image_pooled")
    latent = torch.nn.functional.normalize(net.to_visual_latent(net.pool(torch.from_numpy(STORED["encoded"]))), dim=-1)
    near(latent, "image_latent")
    assert (net.visual_transformer.vq._codebook.nearest(vit.tokens(x)).numpy() != STORED["indices"]).mean() < .01   # its smallest margin is 5.6e-5


@torch.no_grad()
def test_text_tower_and_similarity(net):
    ids, mask = (torch.from_numpy(STORED[k]).long() for k in ("input_ids", "attention_mask"))
    near(net.text_hidden(ids, mask), "text_hidden"); near(net.text_latent(ids, mask), "text_latent")
    near(net.similarity(net.text_latent(ids, mask), torch.from_numpy(STORED["image_latent"])), "similarity")


def test_preparation_as_stored():
    # the fixture's NIfTI has a positive diagonal (RAS in nibabel's words) and CT-CLIP takes arrays as they lie
    from dataclasses import replace
    ct = synthetic(); ct = replace(ct, array=ct.array[:, ::-1, ::-1].copy())
    agree(clip_input(ct, orientation="RAS"), "ctclip_release", hu=False)


def test_toolkit_preparation_as_stored(): agree(clip_input(synthetic(), "vlm3d")*np.float32(1000), "toolkit_clip_hu")


def test_unknown_preparation():
    with pytest.raises(DataError, match="expected release or vlm3d"): clip_input(volume(0), "fvd")


@pytest.mark.parametrize("old", [False, True])
def test_strict_loading(tmp_path, net, old):
    state = dict(net.state_dict())
    if old: state["text_transformer.embeddings.position_ids"] = torch.arange(64)[None]
    file = tmp_path / "CT-CLIP_v2.pt"; torch.save(state, file)
    again, digest = read_ct_clip(file, IMAGE, FACTS["config"]["text"], **DIMS)
    ids, mask = (torch.from_numpy(STORED[k]).long() for k in ("input_ids", "attention_mask"))
    assert len(digest) == 64 and not hasattr(again, "to_visual_latent_extra")
    near(again.text_latent(ids, mask), "text_latent")                                # buffers no file holds (positions) are right, too
    x = torch.from_numpy(smooth_video(1, 20, 40, 60, seed=0))[None]; assert torch.equal(again.image_latent(x), net.image_latent(x))


def test_another_file_is_refused(tmp_path, net):
    file = tmp_path / "CT-CLIP_v2.pt"; state = dict(net.state_dict())
    state["visual_transformer.vq._codebook.embed"] = torch.zeros(1, 32, 32); torch.save(state, file)
    with pytest.raises(WeightsError, match="of another shape, first visual_transformer.vq"): read_ct_clip(file, IMAGE, FACTS["config"]["text"], **DIMS)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(WeightsError, match="not a weights file"): read_ct_clip(file)


@torch.no_grad()
def test_pooling_forgets_height(net):
    e = net.visual_transformer(torch.from_numpy(smooth_video(1, 20, 40, 60, seed=0))[None])
    assert torch.allclose(net.pool(e), net.pool(e.flip(1)), atol=1e-6) and not torch.allclose(net.pool(e), net.pool(e.flip(2)), atol=1e-3)
