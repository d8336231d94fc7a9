"Files in, files out: what is kept and what is refused."
import gzip
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings as hsettings, strategies as st
from fvae_nb.data.ct import DataError, check_same_grid, ct_volume, read_ct, read_mask, write_ct

GOOD = np.random.default_rng(0).integers(-1000, 2000, (9, 8, 7)).astype(np.int16)
LPS = np.diag([-1., -1., 2., 1.])


def save(path, array=GOOD, affine=LPS, **header):
    image = nib.Nifti1Image(array, affine)
    for k, v in header.items(): image.header[k] = v
    nib.save(image, path)
    return path


@given(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([1, -1])] * 3), st.tuples(*[st.floats(.3, 5)] * 3), st.tuples(*[st.floats(-300, 300)] * 3), st.floats(-.2, .2), st.sampled_from(["int16", "float32", "uint8"]))
@hsettings(max_examples=40, deadline=None)
def test_round_trip_keeps_array_affine_and_orientation(tmp_path_factory, order, flips, spacing, origin, angle, dtype):
    d = tmp_path_factory.mktemp("rt")
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4); affine[:3, :3] = turn @ (np.eye(3)[:, order] * np.array(flips) * np.array(spacing)); affine[:3, 3] = origin
    array = (GOOD % 200).astype(dtype) - (0 if dtype == "uint8" else 1000)
    if dtype == "float32": array = array + np.float32(.25)
    save(d / "a.nii.gz", array.astype(dtype), affine)
    write_ct(read_ct(d / "a.nii.gz", hu_mode="clipped_m1024_3071"), d / "b.nii.gz")
    a, b = nib.load(d / "a.nii.gz"), nib.load(d / "b.nii.gz")
    assert np.array_equal(a.get_fdata(), b.get_fdata())
    assert np.array_equal(a.affine, b.affine)
    assert nib.aff2axcodes(a.affine) == nib.aff2axcodes(b.affine)


def test_a_point_stays_where_it_is(tmp_path):
    save(tmp_path / "a.nii.gz")
    ct = read_ct(tmp_path / "a.nii.gz")
    for index in [(0, 0, 0), (6, 7, 8), (3, 1, 5)]:
        mm = (ct.affine @ [*index, 1])[:3]
        stored = np.rint(np.linalg.inv(LPS) @ [*mm, 1]).astype(int)[:3]
        assert GOOD[tuple(stored)] == ct.array[index]


def test_made_volumes_say_synthetic(tmp_path):
    path = write_ct(ct_volume(GOOD.astype(np.float32), (2, 1, 1), "made", synthetic=True), tmp_path / "a.nii.gz")
    assert read_ct(path).synthetic and not read_ct(save(tmp_path / "real.nii.gz")).synthetic
    again = write_ct(read_ct(path), tmp_path / "b.nii.gz")
    assert b"SYNTHETIC" in bytes(nib.load(again).header["descrip"])
    header = nib.load(path).header
    assert b"SYNTHETIC" in bytes(header["descrip"]) and b"Not for clinical use" in bytes(header["descrip"])


def refused(words, call):
    with pytest.raises(DataError) as error: call()
    text = str(error.value)
    assert words in text and "\n" not in text, text


def test_missing_file(tmp_path): refused("no such file", lambda: read_ct(tmp_path / "x.nii.gz"))
def test_not_an_image(tmp_path):
    (tmp_path / "x.nii").write_text("hello " * 200); refused("not a NIfTI image", lambda: read_ct(tmp_path / "x.nii"))
def test_truncated_gzip(tmp_path):
    p = save(tmp_path / "x.nii.gz"); p.write_bytes(p.read_bytes()[:-4]); refused("damaged or truncated", lambda: read_ct(p))
def test_flipped_byte(tmp_path):
    p = save(tmp_path / "x.nii.gz"); raw = bytearray(gzip.decompress(p.read_bytes()))
    data = bytearray(gzip.compress(bytes(raw))); data[-6] ^= 1; p.write_bytes(data); refused("damaged or truncated", lambda: read_ct(p))
def test_truncated_plain(tmp_path):
    p = save(tmp_path / "x.nii"); p.write_bytes(p.read_bytes()[:-300]); refused("x.nii", lambda: read_ct(p))
def test_two_dimensional(tmp_path): refused("2D", lambda: read_ct(save(tmp_path / "x.nii.gz", GOOD[:, :, 0])))
def test_four_dimensional(tmp_path): refused("4D", lambda: read_ct(save(tmp_path / "x.nii.gz", np.stack([GOOD, GOOD], -1))))
def test_one_slice(tmp_path): refused("single slice", lambda: read_ct(save(tmp_path / "x.nii.gz", GOOD[:, :, :1])))
def test_nan(tmp_path):
    a = GOOD.astype(np.float32); a[0, 0, 0] = np.nan; refused("NaN", lambda: read_ct(save(tmp_path / "x.nii.gz", a)))
def test_infinite(tmp_path):
    a = GOOD.astype(np.float32); a[0, 0, 0] = np.inf; refused("infinite", lambda: read_ct(save(tmp_path / "x.nii.gz", a)))
def test_constant(tmp_path): refused("every voxel is -1000", lambda: read_ct(save(tmp_path / "x.nii.gz", np.full_like(GOOD, -1000))))
def test_unit_range(tmp_path): refused("hu_mode", lambda: read_ct(save(tmp_path / "x.nii.gz", np.random.rand(9, 8, 7).astype(np.float32))))
def test_byte_range(tmp_path): refused("hu_mode", lambda: read_ct(save(tmp_path / "x.nii.gz", (GOOD % 256).astype(np.uint8))))
def test_sheared(tmp_path):
    a = LPS.copy(); a[1, 2] = .5; refused("sheared", lambda: read_ct(save(tmp_path / "x.nii.gz", affine=a)))
def test_two_axes_the_same_way(tmp_path):
    p = save(tmp_path / "x.nii"); raw = bytearray(p.read_bytes())
    raw[252:256] = np.array([0, 1], "<i2").tobytes(); raw[280:328] = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0]], "<f4").tobytes(); p.write_bytes(raw)
    refused("cannot be inverted", lambda: read_ct(p))
def test_no_spacing(tmp_path):
    p = save(tmp_path / "x.nii"); raw = bytearray(p.read_bytes())
    raw[252:256] = np.array([0, 1], "<i2").tobytes(); raw[280:328] = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], "<f4").tobytes(); p.write_bytes(raw)
    refused("no spacing along axis 2", lambda: read_ct(p))
def test_colour(tmp_path):
    rgb = np.zeros((5, 6, 7), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(rgb, LPS), tmp_path / "x.nii.gz"); refused("colour", lambda: read_ct(tmp_path / "x.nii.gz"))
def test_no_orientation(tmp_path):
    p = save(tmp_path / "x.nii"); raw = bytearray(p.read_bytes()); raw[252:256] = b"\0" * 4; p.write_bytes(raw)
    refused("neither where nor how", lambda: read_ct(p))
def test_contradictory_spacing(tmp_path):
    p = save(tmp_path / "x.nii"); raw = bytearray(p.read_bytes()); raw[80:84] = np.float32(3.3).tobytes(); p.write_bytes(raw)
    refused("contradictory spacing", lambda: read_ct(p))
def test_unknown_mode(tmp_path): refused("unknown hu_mode", lambda: read_ct(save(tmp_path / "x.nii.gz"), hu_mode="hounsfield"))
def test_mask_on_another_grid(tmp_path):
    ct = read_ct(save(tmp_path / "ct.nii.gz"))
    refused("mask of shape", lambda: read_mask(save(tmp_path / "m.nii.gz", np.zeros((4, 4, 4), np.uint8)), ct))
    moved = LPS.copy(); moved[0, 3] = 5
    refused("another place", lambda: read_mask(save(tmp_path / "n.nii.gz", np.zeros(GOOD.shape, np.uint8), moved), ct))
def test_mask_with_fractions(tmp_path): refused("whole numbers", lambda: read_mask(save(tmp_path / "m.nii.gz", np.full(GOOD.shape, .5, np.float32))))


def test_hu_modes(tmp_path):
    p = save(tmp_path / "x.nii.gz", (GOOD % 256).astype(np.uint8))
    ct = read_ct(p, hu_mode="uint8_window")
    assert ct.array.min() >= -1000 and ct.array.max() <= 1000
    raw = save(tmp_path / "raw.nii.gz", GOOD + 1024)
    assert np.array_equal(read_ct(raw, hu_mode="ct_rate_raw", rescale=(1, -1024)).array, read_ct(save(tmp_path / "y.nii.gz")).array)
    refused("rescale", lambda: read_ct(raw, hu_mode="ct_rate_raw"))
