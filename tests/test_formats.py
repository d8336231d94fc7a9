"NRRD, MetaImage and DICOM beside NIfTI: the same scan, the same refusals, no patient in the output."
import json, shutil
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from fvae_nb.data.ct import DataError, ct_volume, read_ct, write_ct

SECRET = ("DOE^JANE", "PAT-4711", "19500101", "General Hospital")


def make_series(folder, array, spacing=(3., .8, .7), axes=((1, 0, 0), (0, 1, 0)), origin=(-100., -120., -50.), tilt=0., series=None, slope=1., intercept=-1024., change=lambda n, ds: None, names=None):
    "A DICOM series from (slice, row, column) HU, slices along the normal of `axes`"
    folder.mkdir(exist_ok=True, parents=True)
    x, y = np.array(axes[0], float), np.array(axes[1], float)
    normal, series, study = np.cross(x, y), series or generate_uid(), generate_uid()
    order = np.random.default_rng(0).permutation(len(array))               # names say nothing about places
    for n, plane in enumerate(array):
        meta = FileMetaDataset(); meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, CTImageStorage, generate_uid()
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID, series, study
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.InstitutionName, ds.Modality = *SECRET, "CT"
        ds.Rows, ds.Columns = plane.shape; ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        ds.PixelSpacing = [spacing[1], spacing[2]]
        ds.ImageOrientationPatient = [float(v) for v in (*x, *y)]
        ds.ImagePositionPatient = [float(v) for v in np.array(origin) + normal * n * spacing[0] + y * tilt * n]
        ds.PixelData = np.rint((plane - intercept) / slope).astype(np.uint16).tobytes()
        change(n, ds)
        ds.save_as(folder / (names[n] if names else f"IM{order[n]:04d}"), enforce_file_format=True)
    return folder


HU = np.random.default_rng(1).integers(-1000, 2000, (7, 9, 8)).astype(np.float32)


def test_series_is_the_scan_it_was_made_from(test_data, tmp_path):
    "A real CT written as DICOM and read back: the same voxels at the same places"
    ct = read_ct(test_data / "ct" / "ts_pulmonary_ct.nii.gz")
    s, r, c = ct.spacing
    lps = np.diag([-1., -1., 1., 1.]) @ ct.affine
    folder = make_series(tmp_path / "series", ct.array, ct.spacing, axes=(lps[:3, 2] / c, lps[:3, 1] / r), origin=lps[:3, 3])
    back = read_ct(folder)
    assert np.array_equal(back.array, ct.array) and np.allclose(back.affine, ct.affine, atol=1e-3) and np.allclose(back.spacing, ct.spacing, atol=1e-4)


@pytest.mark.parametrize("axes", [((1, 0, 0), (0, 1, 0)), ((-1, 0, 0), (0, -1, 0)), ((0, 1, 0), (0, 0, -1)), ((1, 0, 0), (0, 0, -1)), ((.8, .6, 0), (-.6, .8, 0))])
def test_any_orientation(tmp_path, axes):
    back = read_ct(make_series(tmp_path / "s", HU, axes=axes))
    x, y = np.array(axes[0], float), np.array(axes[1], float)
    for n, r, c in [(0, 0, 0), (6, 8, 7), (3, 1, 5)]:
        lps = np.array((-100., -120., -50.)) + np.cross(x, y) * n * 3. + y * r * .8 + x * c * .7
        index = np.rint(np.linalg.inv(back.affine) @ [-lps[0], -lps[1], lps[2], 1]).astype(int)[:3]
        assert back.array[tuple(index)] == HU[n, r, c]


def test_no_identifier_travels(tmp_path):
    folder = make_series(tmp_path / "case7", HU)
    ct = read_ct(folder)
    for suffix in (".nii", ".nrrd", ".mha"):
        data = write_ct(ct, tmp_path / f"out{suffix}").read_bytes()
        assert not any(s.encode() in data for s in SECRET)
    assert not any(s in repr(ct) + str(vars(ct)) for s in SECRET)


def test_no_identifier_in_a_run(tmp_path, monkeypatch):
    from fvae_nb.jobs import reconstruct as job
    from fvae_nb.running.report import build_report
    monkeypatch.chdir(tmp_path)
    make_series(tmp_path / "case7", HU.repeat(2, 1).repeat(2, 2)); make_series(tmp_path / "case8", HU)
    shutil.copy(next((tmp_path / "case7").iterdir()), tmp_path / "case8" / "stray")     # two series: a failure whose message must not tell either
    run = job.run(job.Params(vae=["dct"], cases=["case7", "case8"], run="out", control=False))
    build_report(run)
    assert sorted(p.parent.name + "/" + p.stem for p in (tmp_path / "out").glob("[cf]a*/*/*.json")) == ["dct/case7", "dct/case8"]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file(): assert not any(s.encode() in path.read_bytes() for s in SECRET), path
    assert "2 series" in json.loads((tmp_path / "out/failed/dct/case8.json").read_text())["reason"]


def refused(words, call):
    with pytest.raises(DataError) as error: call()
    text = str(error.value)
    assert words in text and "\n" not in text and not any(s in text for s in SECRET), text


def test_two_series(tmp_path):
    make_series(tmp_path / "s", HU); make_series(tmp_path / "s", HU, names=[f"B{n}" for n in range(7)])
    refused("2 series", lambda: read_ct(tmp_path / "s"))
def test_missing_slices(tmp_path):
    folder = make_series(tmp_path / "s", HU, names=[f"I{n}" for n in range(7)]); (folder / "I3").unlink()
    refused("missing slices: 6.00 mm between I2 and I4", lambda: read_ct(folder))
def test_duplicate_positions(tmp_path):
    folder = make_series(tmp_path / "s", HU, names=[f"I{n}" for n in range(7)])
    shutil.copy(folder / "I3", folder / "I3b"); refused("same place", lambda: read_ct(folder))
def test_gantry_tilt(tmp_path): refused("gantry tilt", lambda: read_ct(make_series(tmp_path / "s", HU, tilt=.6)))
def test_single_dicom_slice(tmp_path): refused("single slice", lambda: read_ct(make_series(tmp_path / "s", HU[:1])))
def test_empty_folder(tmp_path): (tmp_path / "s").mkdir(); refused("without DICOM", lambda: read_ct(tmp_path / "s"))
def test_colour_dicom(tmp_path):
    def colour(n, ds): ds.PhotometricInterpretation = "PALETTE COLOR"
    refused("palette", lambda: read_ct(make_series(tmp_path / "s", HU, change=colour)))
def test_mr(tmp_path):
    def mr(n, ds): ds.Modality = "MR"
    refused("modality MR", lambda: read_ct(make_series(tmp_path / "s", HU, change=mr)))
def test_scout_among_slices(tmp_path):
    def scout(n, ds):
        if n == 4: ds.ImageOrientationPatient = [0., 1., 0., 0., 0., -1.]
    refused("scouts", lambda: read_ct(make_series(tmp_path / "s", HU, change=scout)))
def test_no_rescale(tmp_path):
    def bare(n, ds): del ds.RescaleSlope
    refused("RescaleSlope", lambda: read_ct(make_series(tmp_path / "s", HU, change=bare)))
def test_truncated_pixels(tmp_path):
    def short(n, ds):
        if n == 2: ds.PixelData = ds.PixelData[:20]
    refused("pixels cannot be read", lambda: read_ct(make_series(tmp_path / "s", HU, change=short)))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_round_trip(tmp_path, suffix):
    nib.save(nib.Nifti1Image(HU.astype(np.int16), np.array([[-.7, 0, 0, 11], [0, 0, .9, -20], [0, -2.5, 0, 7], [0, 0, 0, 1.]])), tmp_path / "a.nii.gz")
    a = read_ct(tmp_path / "a.nii.gz")
    b = read_ct(write_ct(a, tmp_path / f"b{suffix}"))
    assert np.array_equal(a.array, b.array) and np.allclose(a.affine, b.affine, atol=1e-6)
    c = read_ct(write_ct(b, tmp_path / "c.nii.gz"))
    assert np.array_equal(nib.load(tmp_path / "a.nii.gz").get_fdata(), nib.load(tmp_path / "c.nii.gz").get_fdata())
    assert np.allclose(nib.load(tmp_path / "a.nii.gz").affine, nib.load(tmp_path / "c.nii.gz").affine, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_bad_input(tmp_path, suffix):
    import SimpleITK as sitk
    good = write_ct(ct_volume(HU, (3, 1, 1)), tmp_path / f"good{suffix}")
    cut = tmp_path / f"cut{suffix}"; cut.write_bytes(good.read_bytes()[:-60]); refused("damaged", lambda: read_ct(cut))
    text = tmp_path / f"text{suffix}"; text.write_text("dear colleague"); refused("not an image", lambda: read_ct(text))
    refused("no such file", lambda: read_ct(tmp_path / f"none{suffix}"))
    colour = tmp_path / f"colour{suffix}"; sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(colour)); refused("colour", lambda: read_ct(colour))
    flat = tmp_path / f"flat{suffix}"; sitk.WriteImage(sitk.GetImageFromArray(HU[0]), str(flat)); refused("2D", lambda: read_ct(flat))


def test_missing_spacing(tmp_path):
    raw = HU.astype("<i2").tobytes()
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image\nNDims = 3\nDimSize = 8 9 7\nElementType = MET_SHORT\nElementDataFile = LOCAL\n" + raw)
    refused("missing spacing", lambda: read_ct(tmp_path / "a.mha"))
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 8 9 7\nencoding: raw\nendian: little\n\n" + raw)
    refused("missing spacing", lambda: read_ct(tmp_path / "a.nrrd"))
