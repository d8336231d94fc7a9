"Latent files: what is stored is what would be computed, and damage is named."
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from fvae_nb.data.ct import DataError, ct_volume
from fvae_nb.generation.latents import air_outside, encode_case, latent_header, list_latents, read_latents, window_starts_released, write_latents
from fvae_nb.vaes.interface import load_vae


@pytest.fixture(scope="module")
def scan():
    rng = np.random.default_rng(0)
    ct = ct_volume(rng.normal(0, 300, (70, 24, 20)).astype(np.float32), (5., 3., 3.), "a", synthetic=True)
    organs = np.full(ct.shape, 200, np.uint8); organs[:, 8:16, 4:12] = 30
    sick = np.zeros(ct.shape, np.uint16); sick[3:5, 10:14, 6:10] = 261
    return ct, ct.with_array(organs), ct.with_array(sick)


@pytest.fixture(scope="module")
def tiny(): return load_vae("tiny")


def test_stored_is_computed_again(scan, tiny, tmp_path):
    ct, organs, sick = scan
    made = encode_case(ct, tiny, organs, sick, patient="p", split="val")
    for dtype, kind in (("float16", torch.float16), ("float32", torch.float32)):
        back = read_latents(write_latents(made, tmp_path / f"{dtype}.safetensors", dtype))
        again = encode_case(ct, tiny, organs, sick, patient="p", split="val", chunk=5)
        assert torch.equal(back.ct, made.ct.to(kind).float()) and torch.allclose(back.ct, again.ct.to(kind).float(), atol=2e-3 if dtype == "float16" else 2e-5)
        assert torch.equal(back.mask, made.mask.to(kind).float()) and np.array_equal(back.labels, again.labels) and back.labels.dtype == np.uint16 and back.labels.max() == 261
        assert (back.case, back.patient, back.split, back.vae, back.shape) == ("a", "p", "val", "tiny", (70, 24, 20))
    a, b = (write_latents(made, tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    assert a == b                                                       # equal work, equal bytes


def test_header_says_all_and_no_path(scan, tiny, tmp_path):
    ct, organs, sick = scan
    head = latent_header(write_latents(encode_case(ct, tiny, organs, sick, source=dict(name="a.nii.gz", sha256="0"*64)), tmp_path / "a.safetensors"))
    needed = {"schema", "case", "vae_id", "vae_weights_sha256", "vae_config_sha256", "posterior", "seed", "scaled", "scale_factor", "shift_factor", "window", "value_range", "channels_in", "affine", "axcodes", "axis_order", "spacing", "shape", "pad",
              "tile", "compression", "dtype_compute", "source", "code_version", "mask_code", "synthetic", "mode"}
    assert needed <= head.keys() and head["synthetic"] and str(tmp_path) not in json.dumps(head)
    np.testing.assert_allclose(np.array(head["affine"]).reshape(4, 4), ct.affine, atol=1e-5)


def test_any_run_of_frames(scan, tiny, tmp_path):
    ct, organs, sick = scan
    path = write_latents(encode_case(ct, tiny, organs, sick), tmp_path / "a.safetensors")
    whole = read_latents(path)
    for a, b in ((0, 2), (3, 9), (17, 18)):
        part = read_latents(path, slice(a, b), labels=False)
        assert torch.equal(part.ct, whole.ct[:, a:b]) and torch.equal(part.mask, whole.mask[:, a:b]) and part.labels is None


def test_released_windows_are_encoded_afresh(scan, tiny, tmp_path):
    ct, organs, sick = scan
    path = write_latents(encode_case(ct, tiny, organs, sick, mode="released", windows=3, seed=4), tmp_path / "a.safetensors")
    starts = latent_header(path)["windows"]
    assert len(starts) == 3 and all(s in (3, 4) for s in starts)          # on slices that hold the finding
    for n, a in enumerate(starts):
        w = read_latents(path, window=n)
        cut = replace(ct, array=ct.array[a:a + 65])
        own = encode_case(cut, tiny, replace(organs, array=organs.array[a:a + 65]), replace(sick, array=sick.array[a:a + 65]))
        assert w.ct.shape[1] == 17 and torch.equal(w.ct, own.ct.half().float()) and torch.equal(w.mask, own.mask.half().float()) and np.array_equal(w.labels, own.labels)
    healthy = window_starts_released(70, None, 200, seed=1)
    assert set(healthy) == set(range(6)) and healthy == window_starts_released(70, None, 200, seed=1)
    with pytest.raises(DataError, match="mode='whole'"): window_starts_released(64)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign"])
def test_damaged_files_are_named_not_fatal(scan, tiny, tmp_path, damage):
    ct, organs, _ = scan
    good = write_latents(encode_case(ct, tiny, organs), tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    if damage == "foreign":
        from safetensors.torch import save_file
        save_file({"w": torch.zeros(2)}, bad)
    else: bad.write_bytes({"cut": good.read_bytes()[:-50], "text": b"no safetensors", "empty": b""}[damage])
    told = []
    assert list_latents(tmp_path, bad=told) == [good] and len(told) == 1 and "bad.safetensors" in told[0] and "run encode again" in told[0]
    with pytest.raises(DataError, match="bad.safetensors"): list_latents(tmp_path)
    with pytest.raises(DataError, match="bad.safetensors"): read_latents(bad)


def test_splits_and_missing_folders(scan, tiny, tmp_path):
    ct, organs, _ = scan
    for n, split in enumerate(("train", "val", "val")): write_latents(encode_case(replace(ct, name=f"c{n}"), tiny, organs, split=split), tmp_path / f"x/c{n}.safetensors")
    assert [p.stem for p in list_latents(tmp_path, "val")] == ["c1", "c2"]
    with pytest.raises(DataError, match="of split test"): list_latents(tmp_path, "test")
    with pytest.raises(DataError, match="no such folder"): list_latents(tmp_path / "none")


def test_outside_becomes_air(scan):
    ct, organs, _ = scan
    organs = organs.with_array(np.where(np.arange(20) < 3, 0, organs.array).astype(np.uint8))
    out = air_outside(ct, organs)
    assert (out.array[..., :3] == -1000).all() and np.array_equal(out.array[..., 3:], ct.array[..., 3:])
