"The safety job: its report for a user's data, labels from a folder, reconstructions from a run, and nothing that was altered."
import json, shutil
from pathlib import Path
import numpy as np
import pytest
from fvae_nb.data.ct import ct_volume, read_ct, write_ct
from fvae_nb.data.prepare import crop
from fvae_nb.data.samples import ellipsoid_thorax
from fvae_nb.jobs import safety as job
from fvae_nb.running.cases import Run, Unit
from fvae_nb.running.jobs import make_params


def half_body(ct):
    "A segmenter of one's own"
    return ct.with_array((ct.array > -300).astype(np.uint8)*7)


def wrong_type(ct): return ct.array
def floats(ct): return ct.with_array(ct.array/1000)
def other_grid(ct): return ct_volume(np.zeros((3, 3, 3), np.uint8))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for seed in range(2): write_ct(crop(ellipsoid_thorax((9, 56, 64), (8., 5., 5.), seed=seed), slices=slice(0, 9)), folder/f"p{seed}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def done_run(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    return job.run(job.Params(vae=["tiny"], cases=[str(scans)], denoisers=["gaussian"], run=str(folder/"run"), device="cpu"))


@pytest.fixture
def copied(done_run, tmp_path): return Run(shutil.copytree(done_run.folder, tmp_path/"run"))


def test_all_stand_side_by_side(done_run):
    found = job.results(done_run.folder)
    assert [r["case"] for r in found] == ["p0", "p1"]
    for r in found:
        assert list(r["models"]) == ["tiny", "dct-4x8x8-16-causal", "gaussian-as-tiny"]
        tiny, blur = r["models"]["tiny"], r["models"]["gaussian-as-tiny"]
        assert blur["match"]["matched"] and blur["image"]["mse"] == pytest.approx(tiny["image"]["mse"], rel=.01)
        assert set(tiny["stability"]["organs"]) == {"body", "lung", "bone", "fat"}
    side = json.loads((done_run.folder/"cases/tiny/p0.json").read_text())["metrics"]
    assert 0 < side["eps"] < 1 and {"psnr", "ssim", "mse", "eps_dct", "eps_gaussian"} <= set(side)


def test_verdict_states_limits_and_too_few_cases(done_run):
    given = job.verdicts(done_run.folder)
    assert set(given) == {"tiny", "dct-4x8x8-16-causal", "gaussian-as-tiny"}
    text = given["tiny"]["sentence"]
    assert all(part in text for part in ("0.05", "0.5 mm", "10 HU", "at least 5 cases", "HU thresholds")) and given["tiny"]["n"] == 2
    assert any("tiny beside gaussian-as-tiny (a plain filter" in s and "2 cases" in s for s in job.beside_controls(done_run.folder))


@pytest.mark.parametrize("how, words", [("payload", "not the file its sidecar was written for"), ("missing", "not the file its sidecar was written for"), ("sidecar", "damaged sidecar"), ("parameters", "not the file its sidecar was written for")])
def test_altered_results_are_refused_with_one_error(copied, how, words):
    payload, side = copied.folder/"safety/tiny/p0.json", copied.folder/"cases/tiny/p0.json"
    if how == "payload":                                         # a better number, the same length
        text = payload.read_text(); at = text.index('"dice": 0.') + 10
        payload.write_text(text[:at] + ("9" if text[at] != "9" else "8") + text[at + 1:])
    elif how == "missing": payload.unlink()
    elif how == "sidecar": side.write_text("{")
    else: (copied.folder/"params.json").write_text((copied.folder/"params.json").read_text().replace("0.05", "0.95"))
    for call in (job.results, job.verdicts, job.organ_rows, job.beside_controls): 
        with pytest.raises(ValueError, match=words) as error: call(copied.folder)
        assert "\n" not in str(error.value) and "p0" in str(error.value)
    with pytest.raises(ValueError, match=words): job.keep_results(copied.folder, copied.folder/"kept.json")
    assert not (copied.folder/"kept.json").exists()


def test_unsigned_is_refused(copied):
    (copied.folder/"cases/tiny/p1.json").unlink()
    with pytest.raises(ValueError, match="unsigned"): job.signed(copied, Unit("tiny", "p1"))
    assert len(job.results(copied.folder)) == 1                     # an unfinished run shows what is done


def test_kept_results_carry_hashes_and_no_paths(done_run, scans, tmp_path):
    kept = job.keep_results(done_run.folder, tmp_path/"kept.json").read_text(); facts = json.loads(kept)
    assert str(scans) not in kept and "picture" not in kept and len(kept) < 20_000
    assert all(len(u["identity"]["input"]) == 64 and len(u["sha256"]) == 64 and len(u["identity"]["weights"]) >= 8 for u in facts["units"])


def test_report_opens_alone(done_run):
    from fvae_nb.running.report import build_report
    page = build_report(done_run).read_text()
    assert "Verdict" in page and "outside the limits" in page and "data:image/png;base64" in page and "Not for clinical use" in page
    assert "src='http" not in page and 'src="http' not in page and "Traceback" not in page


def test_own_segmenter_by_name(scans, tmp_path):
    run = job.run(job.Params(vae=["dct"], cases=[str(scans/"p0.nii.gz")], segmenter=f"{__name__}:half_body", run=str(tmp_path/"run"), device="cpu"))
    assert list(job.results(run.folder)[0]["models"]["dct"]["stability"]["organs"]) == ["label 7"]


@pytest.mark.parametrize("name, words", [("wrong_type", "integer labels"), ("floats", "integer labels"), ("other_grid", "")])
def test_segmenters_that_return_something_else(scans, tmp_path, name, words):
    run = job.run(job.Params(vae=["dct"], cases=[str(scans/"p0.nii.gz")], segmenter=f"{__name__}:{name}", run=str(tmp_path/"run"), device="cpu"))
    reason = json.loads((run.folder/"failed/dct/p0.json").read_text())
    assert reason["error"] in ("JobError", "DataError") and words in reason["reason"]


def test_labels_from_a_folder_and_reconstructions_from_a_run(scans, tmp_path):
    from fvae_nb.jobs import reconstruct
    done = reconstruct.run(reconstruct.Params(vae=["tiny"], cases=[str(scans/"p0.nii.gz")], control=False, run=str(tmp_path/"recon"), device="cpu"))
    ct, back = read_ct(scans/"p0.nii.gz"), read_ct(done.folder/"volumes/tiny/p0.nii.gz")
    write_ct(half_body(ct), tmp_path/"labels/p0.nii.gz"); write_ct(half_body(back), tmp_path/"back/tiny/p0.nii.gz")
    params = job.Params(vae=["tiny"], cases=[str(scans/"p0.nii.gz")], segmenter="folder", labels=str(tmp_path/"labels"), labels_back=str(tmp_path/"back"), organs={"body": [7]},
                        reconstructions=str(done.folder), masks={"p0": str(tmp_path/"labels/p0.nii.gz")}, denoisers=["gaussian"], run=str(tmp_path/"run"), device="cpu")
    found = job.results(job.run(params).folder)[0]["models"]
    assert "stability" in found["tiny"] and "stability" not in found["gaussian-as-tiny"]             # nobody segmented the blur
    assert found["gaussian-as-tiny"]["match"]["matched"] and "label 7" in found["tiny"]["masks"]
    from fvae_nb.augmentation.stability import case_stability
    assert found["tiny"]["stability"]["symmetric"] == pytest.approx(case_stability(ct, ct.with_array(back.array), half_body(ct), ct.with_array(half_body(back).array), {"body": (7,)})["symmetric"])
    volume = done.folder/"volumes/tiny/p0.nii.gz"; data = bytearray(volume.read_bytes()); data[-1] ^= 1; volume.write_bytes(data)
    again = job.run(params.model_copy(update=dict(run=str(tmp_path/"run2"))))
    assert "not the file its sidecar was written for" in json.loads((again.folder/"failed/tiny/p0.json").read_text())["reason"]


@pytest.mark.parametrize("what", ["labels/p0", "back/tiny/p0", "back/gaussian-as-tiny/p0", "mask", "recon"])
def test_a_result_is_made_again_when_anything_it_was_read_from_changed(scans, tmp_path, what):
    from fvae_nb.jobs import reconstruct
    scan, remade = scans/"p0.nii.gz", lambda: reconstruct.run(reconstruct.Params(vae=["tiny"], cases=[str(scans/"p0.nii.gz")], control=False, run=str(tmp_path/"recon"), device="cpu"))
    remade(); ct = read_ct(scan); mine, files = half_body(ct), {n: tmp_path/f"{n}.nii.gz" for n in ("labels/p0", "back/tiny/p0", "back/gaussian-as-tiny/p0", "mask")}
    for f in files.values(): write_ct(mine, f)
    params = job.Params(vae=["tiny"], cases=[str(scan)], segmenter="folder", labels=str(tmp_path/"labels"), labels_back=str(tmp_path/"back"), reconstructions=str(tmp_path/"recon"), masks={"p0": str(tmp_path/"mask.nii.gz")},
                        denoisers=["gaussian"], run=str(tmp_path/"run"), device="cpu")
    first = job.run(params); sidecar = first.folder/"cases/tiny/p0.json"; was = sidecar.read_bytes()
    job.run(params); assert sidecar.read_bytes() == was and not list((first.folder/"failed").rglob("*.json"))       # nothing changed, nothing is done
    if what == "recon":
        unit = Unit("tiny", "p0"); run = Run(tmp_path/"recon"); run.sidecar(unit).unlink(); volume = read_ct(tmp_path/"recon/volumes/tiny/p0.nii.gz")
        from fvae_nb.running.cases import publish
        part = tmp_path/"part.nii.gz"; write_ct(volume.with_array(volume.array + 3), part, "int16"); publish(run, unit, part, tmp_path/"recon/volumes/tiny/p0.nii.gz", dict(identity=json.loads(was)["identity"]))
    else: write_ct(mine.with_array(np.roll(mine.array, 2, 2)), files[what])
    job.run(params); assert sidecar.read_bytes() != was and json.loads(sidecar.read_text())["identity"] != json.loads(was)["identity"]


def test_the_middle_slices_of_everything_that_is_given(tmp_path):
    "Scan, labels, labels of the reconstruction, mask and reconstruction are whole; slices = 5 looks at the same five of each"
    from fvae_nb.augmentation.stability import case_stability, hu_change
    from fvae_nb.jobs import reconstruct
    from fvae_nb.jobs.residual import middle
    scan = tmp_path/"s/p0.nii.gz"; write_ct(ellipsoid_thorax((12, 56, 64), (8., 5., 5.)), scan); ct = read_ct(scan)
    reconstruct.run(reconstruct.Params(vae=["dct"], cases=[str(scan)], control=False, run=str(tmp_path/"recon"), device="cpu")); back = read_ct(tmp_path/"recon/volumes/dct/p0.nii.gz")
    organ = half_body(ct); lesion = np.zeros(ct.shape, np.uint8); lesion[5, 20:30, 20:30] = lesion[6, 10:30, 20:30] = 1; again = np.roll(organ.array, 1, 1); again[:3] = 0    # differs outside the middle too
    write_ct(organ, tmp_path/"labels/p0.nii.gz"); write_ct(ct.with_array(again), tmp_path/"back/dct/p0.nii.gz"); write_ct(ct.with_array(lesion), tmp_path/"mask.nii.gz")
    found = job.results(job.run(job.Params(vae=["dct"], cases=[str(scan)], slices=5, segmenter="folder", labels=str(tmp_path/"labels"), labels_back=str(tmp_path/"back"), reconstructions=str(tmp_path/"recon"), masks={"p0": str(tmp_path/"mask.nii.gz")},
                        control=False, denoisers=[], run=str(tmp_path/"run"), device="cpu")).folder)[0]
    few = lambda v: middle(v, 5); want = case_stability(few(ct), few(ct.with_array(back.array)), few(organ), few(ct.with_array(again)), {"label 7": (7,)})
    got = found["models"]["dct"]; assert found["shape"][0] == 5 and got["stability"]["symmetric"] == pytest.approx(want["symmetric"]) and want["symmetric"] < 1
    assert got["masks"]["label 1"]["bias"] == pytest.approx(hu_change(few(ct), few(ct.with_array(back.array)), few(ct.with_array(lesion)).array > 0)["bias"])


def test_reconstruction_of_another_scan_is_refused(scans, tmp_path):
    from fvae_nb.jobs import reconstruct
    other = tmp_path/"other/p0.nii.gz"; other.parent.mkdir(); shutil.copy(scans/"p1.nii.gz", other)
    done = reconstruct.run(reconstruct.Params(vae=["dct"], cases=[str(other)], control=False, run=str(tmp_path/"recon"), device="cpu"))
    run = job.run(job.Params(vae=["dct"], cases=[str(scans/"p0.nii.gz")], reconstructions=str(done.folder), run=str(tmp_path/"run"), device="cpu"))
    assert "made of another scan" in json.loads((run.folder/"failed/dct/p0.json").read_text())["reason"]


@pytest.mark.parametrize("change, words", [
    (dict(segmenter="unet"), "expected hu, folder"), (dict(segmenter="no.such.module:f"), "No module named"), (dict(segmenter="json:no_such"), "no attribute"),
    (dict(segmenter="folder"), "no such label file"), (dict(cases=["phantom:0"]), "phantom:N"), (dict(masks={"zz": "x.nii.gz"}), "'zz' is no case"), (dict(vae=["tini"]), "did you mean 'tiny'")])
def test_refused_before_anything_takes_time(change, words):
    with pytest.raises(ValueError, match=words): job.cases(job.Params(**change))


def test_smoke_preset_and_bad_parameters():
    assert make_params("safety", presets=["smoke"]).denoisers == ["gaussian"]
    with pytest.raises(ValueError, match="expected gaussian, tv, nlm"): make_params("safety", ["denoisers=median"])
    with pytest.raises(ValueError, match="did you mean 'eps_limit'"): make_params("safety", ["eps_limits=.1"])


def test_random_weights_get_no_verdict(scans, tmp_path):
    run = job.run(job.Params(vae=["leanvae-random"], cases=[str(scans/"p0.nii.gz")], control=False, denoisers=[], run=str(tmp_path/"run"), device="cpu"))
    assert job.verdicts(run.folder)["leanvae-random"]["sentence"] == "leanvae-random: untrained weights, no verdict"


def test_a_segmenter_in_a_package_is_found_through_the_command_line(scans, tmp_path, monkeypatch):
    "package.module:function has a dot: it must not be taken for a file and made absolute"
    from fvae_nb.running.jobs import make_params
    (tmp_path/"clinic").mkdir(); (tmp_path/"clinic/__init__.py").write_text("")
    (tmp_path/"clinic/tools.py").write_text("import numpy as np\ndef body(ct): return ct.with_array((ct.array > -500).astype(np.uint8))\n")
    monkeypatch.syspath_prepend(str(tmp_path)); monkeypatch.chdir(tmp_path)
    params = make_params("safety", ["vae=dct", f"cases={scans/'p0.nii.gz'}", "segmenter=clinic.tools:body", "control=false", "denoisers=[]", "device=cpu"], run=str(tmp_path/"run"))
    assert params.segmenter == "clinic.tools:body"
    assert job.results(job.run(params).folder)[0]["models"]["dct"]["stability"]["symmetric"] <= 1
