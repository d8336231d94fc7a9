"Generators' files by convention, a guard against wrong units, strict pairs and prompts, scores beside floors; the job end to end."
import csv, json, math
import nibabel as nib
import numpy as np
import pytest
from fvae_nb.data.ct import DataError, ct_volume, read_ct, read_mask, write_ct
from fvae_nb.data.samples import ellipsoid_thorax
from fvae_nb.evaluation.generated import (CONVENTIONS, DEFECTS, case_id, cosine_score, fit_text_map, hu_doubts, mismatched, pair_up, read_generated,
                                          read_prompts, score_sets, toolkit_fvd, toolkit_image, volumes_in)
from fvae_nb.metrics.frechet import frechet, frechet_strata
from test_features import agree, synthetic


@pytest.fixture(scope="module")
def ct():
    v = ellipsoid_thorax((20, 32, 24), (12., 11., 15.)); a = v.array.copy(); a[3, 5, 2] = 900                        # marks a corner that no flip keeps
    return v.with_array(a)


def save(path, array, affine=np.eye(4)): nib.save(nib.Nifti1Image(array, affine), path); return path


WRITERS = {  # convention -> (array as stored, affine, arguments to read it)
    "fvae": lambda ct: (None, None, {}),
    "maisi": lambda ct: (np.clip(ct.array, -1000, 1000).transpose(2, 1, 0)[::-1, ::-1].astype(np.int16), np.diag([15., 11., 12., 1.]), {}),
    "medsyn": lambda ct: (np.clip(ct.array, -1024, 600).transpose(2, 1, 0).astype(np.int16), np.diag([-1., -1., 1., 1.]), dict(spacing=(12., 11., 15.))),
    "generatect": lambda ct: ((ct.array/1000).transpose(2, 1, 0).astype(np.float32), np.eye(4), dict(spacing=(12., 11., 15.))),
    "generatect-sr": lambda ct: (((np.clip(ct.array, -1000, 1000) + 1000)/2000).transpose(1, 2, 0)[..., None].astype(np.float32), np.eye(4), dict(spacing=(12., 11., 15.)))}


@pytest.mark.parametrize("name", WRITERS)
def test_each_convention_comes_back_in_hu(tmp_path, ct, name):
    array, affine, more = WRITERS[name](ct)
    path = tmp_path / "case7_SYNTHETIC.nii.gz"
    if array is None: write_ct(ct, path, "int16")
    else: save(path, array, affine)
    back = read_generated(path, name, **more)
    low, high = {"fvae": (-9999, 9999), "maisi": (-1000, 1000), "medsyn": (-1024, 600), "generatect": (-9999, 9999), "generatect-sr": (-1000, 1000)}[name]
    assert back.shape == ct.shape and np.abs(back.array - np.clip(ct.array, low, high)).max() <= 1 and back.spacing == pytest.approx(ct.spacing)
    assert back.synthetic and back.name == "case7"


def test_the_release_writes_another_matrix_with_the_reference_affine(tmp_path, ct):
    real = write_ct(ct, tmp_path / "real.nii.gz"); stored = nib.load(real)
    half = save(tmp_path / "a.nii.gz", np.asarray(stored.dataobj)[::2, ::2].astype(np.int16), stored.affine)
    back = read_generated(half, "foundation-vae", reference=read_ct(real))
    assert back.spacing == pytest.approx((12., 22., 30.))
    with pytest.raises(DataError, match="give the reference"): read_generated(half, "foundation-vae")


@pytest.mark.parametrize("written, read", [(a, b) for a in ("generatect", "generatect-sr") for b in CONVENTIONS if a != b])
def test_the_wrong_convention_is_refused(tmp_path, ct, written, read):
    array, affine, _ = WRITERS[written](ct); path = save(tmp_path / "x.nii.gz", array, affine)
    with pytest.raises(DataError): read_generated(path, read, spacing=(12., 11., 15.), reference=ct)


def test_a_voxel_size_nobody_wrote_must_be_given(tmp_path, ct):
    with pytest.raises(DataError, match="give spacing"): read_generated(tmp_path / "x.nii.gz", "medsyn")
    with pytest.raises(DataError, match="expected one of"): read_generated(tmp_path / "x.nii.gz", "medsin")


@pytest.mark.parametrize("change, told", [(lambda a: a + 1024, "intercept"), (lambda a: a/1000, "spread"), (lambda a: np.maximum(a, -200), "no air"), (lambda a: np.minimum(a, 100), "no bone")])
def test_guard(ct, change, told):
    assert hu_doubts(ct) == [] and any(told in d for d in hu_doubts(ct.with_array(change(ct.array).astype(np.float32))))


# ---- pairs and prompts

def test_volumes_by_case_without_masks(tmp_path, ct):
    for n in ("a_SYNTHETIC.nii.gz", "a_SYNTHETIC_mask.nii.gz", "b.nii.gz", "b_mask.nii.gz", "._c.nii.gz", "notes.txt"): (tmp_path / n).write_bytes(b"")
    assert list(volumes_in(tmp_path)) == ["a", "b"] and case_id("x/valid_1_a_1.mha") == "valid_1_a_1"
    (tmp_path / "a.nii").write_bytes(b"")
    with pytest.raises(DataError, match="same case"): volumes_in(tmp_path)
    with pytest.raises(DataError, match="no such folder"): volumes_in(tmp_path / "none")


def test_prompts(tmp_path):
    f = tmp_path / "p.csv"; f.write_text("\ufeffNames,Text_prompts\nvalid_1_a_1.nii.gz,\"Nodule, left.\"\n")
    assert read_prompts(f) == {"valid_1_a_1": "Nodule, left."}
    f.write_text("Names,Text_prompts\na,one\na.nii.gz,two\n")
    with pytest.raises(DataError, match="two prompts for a"): read_prompts(f)
    f.write_text("name,text\na,b\n")
    with pytest.raises(DataError, match="expected Names and Text_prompts"): read_prompts(f)


def test_a_missing_prompt_is_an_error_unless_named():
    made = real = {"a": "x", "b": "y"}
    with pytest.raises(DataError, match="first b.*B4"): pair_up(made, real, {"a": "t"})
    assert [p.prompt for p in pair_up(made, real, {"a": "t"}, "empty")[0]] == ["t", ""]
    assert pair_up({"a": 1, "c": 2}, {"a": 1, "d": 2})[1:] == (["c"], ["d"])


# ---- scores

def test_cosines_are_cut_case_by_case():
    a, b = np.array([[1., 0], [1, 0], [0, 1]]), np.array([[2., 0], [-1, 0], [1, 1]])
    s = cosine_score(a, b)
    assert s["each"] == pytest.approx([100, -100, 100/math.sqrt(2)]) and s["score"] == pytest.approx((100 + 0 + 70.7107)/3) and s["uncut"] == pytest.approx(70.7107/3)
    assert mismatched(np.eye(3), np.eye(3)) == 0 and math.isnan(mismatched(np.eye(1), np.eye(1)))
    with pytest.raises(DataError, match="expected pairs"): cosine_score(a, b[:2])


def rows(n, seed, shift=0.):
    r = np.random.default_rng(seed)
    return [{"volume": r.standard_normal((1, 5)) + shift} | {p: r.standard_normal((4, 3)) + shift for p in ("axial", "sagittal", "coronal")} | {"constant": np.array([[.3]])} for _ in range(n)]


def test_scores_carry_floors_and_real_rows():
    real, near, far, pool = rows(8, 0), rows(8, 1), rows(8, 2, 2.), rows(9, 3)
    a, b = score_sets(real, near, pool, draws=3), score_sets(real, far, pool, draws=3)
    assert a["fvd"]["value"] < b["fvd"]["value"] and a["fvd"]["floor"] == b["fvd"]["floor"] and a["fvd"]["floor_n"] == 8
    assert b["fvd"]["value"] == pytest.approx(frechet(*(np.concatenate([f["volume"] for f in s]) for s in (real, far))))
    assert a["fid"]["avg"]["value"] == pytest.approx(np.mean([a["fid"][p]["value"] for p in ("axial", "sagittal", "coronal")]))
    assert a["constant"] == pytest.approx({"real": .3, "made": .3}) and "i2i_other_case" in a["real"] and "t2i" not in a
    with pytest.raises(DataError, match="expected pairs"): score_sets(real, near[:3], pool)


def test_one_pair_gives_nan_and_a_note():
    s = score_sets(rows(1, 0), rows(1, 1), draws=2)
    assert math.isnan(s["fvd"]["value"]) and "at least 2" in s["fvd"]["note"] and s["i2i"]["n"] == 1


def test_a_standins_text_map_finds_the_right_prompt():
    r = np.random.default_rng(0); way = r.standard_normal((6, 10)); x = r.standard_normal((60, 6)); t = x @ way + .1*r.standard_normal((60, 10)) + 5
    m = fit_text_map(x[:50], t[:50], ridge=1.)
    s = score_sets([{"volume": v[None]} for v in x[50:]], [{"volume": v[None]} for v in x[50:]], [{"volume": v[None]} for v in x[:50]], t[50:], m, center=True, draws=2)
    assert s["t2i"]["score"] > 90 > 60 > s["real"]["t2i_other_prompt"] and s["avg"] == pytest.approx((s["i2i"]["score"] + s["t2i"]["score"])/2)
    with pytest.raises(DataError, match="at least 4"): fit_text_map(x[:3], t[:3])


def test_toolkit_variants_are_named_and_off():
    assert list(DEFECTS) == [f"B{n}" for n in range(1, 11)]
    x, y = np.random.default_rng(0).random((2, 8, 1, 96))
    assert toolkit_fvd(x, y) > frechet(x[:, 0], y[:, 0]) and math.isnan(toolkit_fvd(x[:5], y[:5]))


def test_toolkit_image_as_stored(): agree(toolkit_image(synthetic()), "toolkit_cpu_gt", hu=False)


def test_toolkit_image_of_a_generated_volume_takes_hu_for_unit_values():
    ct = synthetic(); a, b = toolkit_image(ct, made=True), toolkit_image(ct.with_array(ct.array/1000), made=True)
    assert a.shape == (241, 512, 512) and ((a > 0) & (a < 1)).mean() < 2e-4 < .003 < ((b > 0) & (b < 1)).mean()         # read as [-1, 1], HU are black or white
    big = toolkit_image(ct_volume(np.arange(520, dtype=np.float32)[None, None]*np.ones((4, 4, 1), np.float32), (.75, .75, .75))); assert big.shape == (241, 512, 512)
    assert big[0, 0, 0] == pytest.approx((1000 + 4)/2000)                                                               # cut about the middle, filled up at the end


def test_strata_are_a_variant_by_name():
    real, made, pool = rows(8, 0), rows(8, 1), rows(9, 3); flat = lambda s: np.concatenate([f["volume"] for f in s])
    plain, b2 = (score_sets(real, made, pool, draws=3, strata=s) for s in (False, True))
    assert plain["fvd"]["value"] == pytest.approx(frechet(flat(real), flat(made))) and b2["fvd"]["value"] == pytest.approx(frechet_strata(flat(real), flat(made))) and b2["fvd"]["floor"] > 1.3*plain["fvd"]["floor"]
    assert b2["kid"] == plain["kid"] and b2["fid"] == plain["fid"]


# ---- the job

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Twelve crude patients: six real, six further, and generated volumes with the mask's lungs moved in one"
    root = tmp_path_factory.mktemp("sets")
    for n in range(10):
        v = ellipsoid_thorax((20, 32, 32), (12., 11., 11.), seed=n); r = np.random.default_rng(n)
        hu = np.roll(v.array, r.integers(-1, 2, 2), (1, 2))
        lung = np.where(np.abs(hu + 830) < 90, 30, np.where(hu > -500, 200, 0)).astype(np.uint8)
        write_ct(v.with_array(hu.astype(np.float32)), root / ("real" if n < 5 else "pool") / f"c{n}.nii.gz", "int16")
        if n < 5:
            write_ct(v.with_array(hu.astype(np.float32) + 5), root / "made" / f"c{n}_SYNTHETIC.nii.gz", "int16")
            write_ct(v.with_array(lung), root / "made" / f"c{n}_SYNTHETIC_mask.nii.gz")
    with open(root / "p.csv", "w", newline="") as f: csv.writer(f).writerows([["Names", "Text_prompts"], *([f"c{n}.nii.gz", f"Report {n}: " + ("effusion" if n % 2 else "clear lungs")] for n in range(10))])
    return root


def job_params(root, **more):
    from fvae_nb.jobs.evaluate import Params
    return Params(**dict(generated=[str(root / "made")], reference=str(root / "real"), pool=str(root / "pool"), prompts=str(root / "p.csv"), cube=16, mm=25., draws=2, device="cpu") | more)


def test_job_from_folders_to_tables(folders, tmp_path, monkeypatch):
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache"))
    run = job.run(job_params(folders, run=str(tmp_path / "run")))
    out = json.loads((run.folder / "evaluation.json").read_text())
    row, = out["table2"]
    assert row["method"] == "made" and row["scores"]["n"] == 5 and row["scores"]["i2i"]["score"] > 90 and row["scores"]["fvd"]["floor_n"] == 5 and "t2i" in row["scores"]
    assert {r["method"] for r in out["table3"]} == {"made", "real scans, the ceiling"} and out["table3"][0]["groups"]["lung"]["dice"] > 80 and out["table3"][0]["groups"]["heart"]["n"] == 0
    assert out["off_target"]["made"]["n"] == 5
    for t in ("table2", "table3"):
        for end in ("md", "csv", "tex"): assert (run.folder / "tables" / f"{t}.{end}").stat().st_size > 200
    cells = list(csv.DictReader((run.folder / "tables/table2.csv").open()))
    mine = [c for c in cells if c["value"] and "paper" not in c["source"]]
    assert mine and all(json.loads(c["source"])["params_sha256"] == run.params_sha256 for c in mine)
    assert "stand-in" in (run.folder / "tables/table2.md").read_text() and "| FVD CT-CLIP |" not in (run.folder / "tables/table2.md").read_text()
    before = sorted(p.stat().st_mtime_ns for p in (run.folder / "features").rglob("*.npz")); job.run(job_params(folders, run=str(tmp_path / "run")))
    assert sorted(p.stat().st_mtime_ns for p in (run.folder / "features").rglob("*.npz")) == before                       # done is done


def signed_run(root, tmp_path):
    "A run of generate as its sidecars describe it"
    from fvae_nb.running.cases import Run, Unit, canonical, publish, write_atomic
    run = Run(tmp_path / "generate-1"); run.folder.mkdir()
    write_atomic(run.folder / "params.json", canonical({"job": "generate"}))
    write_atomic(run.folder / "cases.json", canonical({"cases": [dict(id=f"c{n}", path=None, sha256="c"*64, prompt=f"Prompt {n}") for n in range(2)], "units": [["ours", f"c{n}"] for n in range(2)]}))
    for n in range(2):
        part = run.folder / f"part{n}"; part.write_bytes((root / "made" / f"c{n}_SYNTHETIC.nii.gz").read_bytes()); u = Unit("ours", f"c{n}")
        publish(run, u, part, run.payload(u, suffix="_SYNTHETIC.nii.gz"), dict(identity=dict(generator="a"*64, weights="b"*64), metrics={"peak_mb": 2048}, seconds=3.5))
    return run


def test_job_reads_runs_and_refuses_what_is_unsigned(folders, tmp_path):
    from fvae_nb.jobs import evaluate as job
    from fvae_nb.running.cases import JobError
    run = signed_run(folders, tmp_path)
    found, names = job.cases(job_params(folders, generated=[str(run.folder)], prompts="", pool=""))
    assert names == ["ours"] and [c["id"] for c in found] == ["c0", "c1"] and found[0]["made"]["ours"]["seconds"] == 3.5 and found[1]["prompt"] == "Prompt 1"
    stray = run.folder / "volumes/ours/c2_SYNTHETIC.nii.gz"; stray.write_bytes((folders / "made/c2_SYNTHETIC.nii.gz").read_bytes())
    with pytest.raises(JobError, match="unsigned"): job.cases(job_params(folders, generated=[str(run.folder)]))
    stray.unlink(); file = run.folder / "volumes/ours/c0_SYNTHETIC.nii.gz"; data = bytearray(file.read_bytes()); data[-1] ^= 1; file.write_bytes(data)
    with pytest.raises(JobError, match="unsigned"): job.cases(job_params(folders, generated=[str(run.folder)]))            # altered since it was signed


@pytest.mark.parametrize("more, told", [(dict(convention="medsin"), "convention"), (dict(generated=["phantom:same"]), "needs reference=phantom"), (dict(reference="/nowhere/x"), "no such folder")])
def test_job_parameters_are_checked_before_anything_is_written(folders, more, told):
    from fvae_nb.jobs import evaluate as job
    with pytest.raises(ValueError, match=told): job.cases(job_params(folders, **more))


def test_job_takes_the_splits_of_a_manifest(folders, tmp_path):
    from fvae_nb.jobs import evaluate as job
    from fvae_nb.running.cases import JobError
    rows = [dict(schema_version=1, id=f"c{n}", patient=f"p{n}", dataset="other", split="test" if n < 5 else "train", ct=f"{'real' if n < 5 else 'pool'}/c{n}.nii.gz", hu_mode="hu", licence="CC0-1.0", source="drawn") for n in range(8)]
    (folders / "m.jsonl").write_text("\n".join(map(json.dumps, rows))); m = str(folders / "m.jsonl")
    found, _ = job.cases(job_params(folders, reference=m, reference_splits=["test"], pool=m, pool_splits=["train"]))
    assert [c["id"] for c in found] == [*(f"c{n}" for n in range(5)), *(f"pool.c{n}" for n in range(5, 8))]
    with pytest.raises(JobError, match="no rows of split val"): job.cases(job_params(folders, reference=m, reference_splits=["val"]))


def test_job_keeps_what_the_book_shows(folders, tmp_path, monkeypatch):
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache"))
    run = job.run(job_params(folders, run=str(tmp_path / "run"), limit=3, split="all")); kept = json.loads(job.keep_results(run.folder, tmp_path / "k.json", "what").read_text())
    assert set(kept["inputs"]["c1"]) == {"real", "made"} and len(kept["inputs"]) == 8 and kept["params_sha256"] == run.params_sha256 and str(tmp_path) not in json.dumps(kept) and str(folders) not in json.dumps(kept)
    drawn = signed_run(folders, tmp_path).folder; behind = json.loads(job.keep_results(run.folder, tmp_path / "k.json", "what", {"made": drawn}).read_text())["generators"]["made"]
    assert behind["weights_sha256"] == "a"*64 and behind["vae_sha256"] == "b"*64 and set(behind["masks"]) == {"c0", "c1"} and "generators" not in kept
    assert "each" not in kept["table2"][0]["scores"]["i2i"] and {"real scans, the ceiling", "made"} == {r["method"] for r in kept["table3"]}


def test_job_pool_and_prompts_are_checked(folders, tmp_path):
    from fvae_nb.jobs import evaluate as job
    from fvae_nb.running.cases import JobError
    with pytest.raises(JobError, match="scored case too"): job.cases(job_params(folders, pool=str(folders / "real")))
    (tmp_path / "q.csv").write_text("Names,Text_prompts\nc0,one\n")
    with pytest.raises(JobError, match="no prompt for 4 of 5 cases, first c1"): job.cases(job_params(folders, prompts=str(tmp_path / "q.csv")))


def test_medsyn_read_as_another_passes_with_a_voxel_size_nobody_wrote(tmp_path, ct):
    array, affine, _ = WRITERS["medsyn"](ct); path = save(tmp_path / "x.nii.gz", array, affine)
    for name in ("fvae", "maisi"): assert read_generated(path, name).spacing == (1., 1., 1.)                     # the guard sees values, not sizes


def test_averages_of_planes_and_centred_cosines():
    real, made, pool = rows(8, 0), rows(8, 1, .5), rows(9, 3); s = score_sets(real, made, pool, draws=3)["fid"]
    for k in ("value", "floor", "same_n", "excess"): assert s["avg"][k] == pytest.approx(np.mean([s[p][k] for p in ("axial", "sagittal", "coronal")]))
    assert s["avg"]["floor"] != s["avg"]["value"]
    far = lambda n, seed: [{"volume": f["volume"] + 50} for f in rows(n, seed)]                                  # what all scans share says nothing of a pair
    plain, centred = (score_sets(far(8, 0), far(8, 1), far(9, 3), center=c, draws=2)["i2i"]["uncut"] for c in (False, True))
    assert plain > 99.9 and abs(centred) < 60


def first(folders, n=0): return dict(id=f"c{n}", case=f"c{n}", path=str(folders / "real" / f"c{n}.nii.gz"), hu_mode="hu", rescale=None, prompt="", made={})


def test_a_ceiling_needs_one_grid_and_one_segmenter(folders, tmp_path):
    from dataclasses import replace
    from fvae_nb.jobs import evaluate as job
    real = read_ct(folders / "real/c0.nii.gz"); wanted = read_mask(folders / "made/c0_SYNTHETIC_mask.nii.gz"); wanted = real.with_array(wanted.array.astype(np.uint16))
    wanted.array[8:11, 14:18, 8:11] = 261
    obey = lambda made, **more: job._obeyed(job_params(folders, **more), first(folders), "made", made, real, made.with_array(wanted.array), {})
    same = obey(real.with_array(real.array + 1)); assert {"organs", "organs_real", "off_target_real"} <= set(same) and same["lesions"][0]["ignored"] is not None
    affine = real.affine.copy(); affine[0, 3] += 40; moved = replace(real, affine=affine, stored=None)
    other = obey(moved); assert "organs_real" not in other and "off_target_real" not in other and other["lesions"][0]["ignored"] is None       # the same shape, elsewhere in the patient
    seg = tmp_path / "seg"; write_ct(real.with_array(np.where(wanted.array > 200, 30, wanted.array).astype(np.uint8)), seg / "c0.nii.gz")
    for more in (dict(segmentations=str(seg)), dict(segmentations_real=str(seg))): assert "organs_real" not in obey(real.with_array(real.array), **more)
    assert "organs_real" in obey(real.with_array(real.array), segmentations=str(seg), segmentations_real=str(seg))


def test_drawn_diseases_are_painted_as_table_7_plus_100():
    from fvae_nb.jobs import evaluate as job
    p = job._drawn(0, "disease"); a = job._mask(None, {}, "phantom-same", p.ct, p).array
    assert "nodule" in p.masks and np.unique(a[a > 200]).tolist() == [261] and np.array_equal(a == 261, p.masks["nodule"])


def test_job_masks_the_real_scans_alone_and_says_who_segmented(folders, tmp_path, monkeypatch):
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache")); seg, real = tmp_path / "seg", tmp_path / "real"
    for n in range(2):
        v = read_ct(folders / "real" / f"c{n}.nii.gz"); a = v.array.copy(); a[:, -1, :] = 300; write_ct(v.with_array(a), real / f"c{n}.nii.gz", "int16")       # a table below the patient
        write_ct(read_mask(folders / "made" / f"c{n}_SYNTHETIC_mask.nii.gz"), seg / f"c{n}.nii.gz")
    def held(masked, where):
        run = job.run(job_params(folders, run=str(tmp_path / f"{where.parent.name}{masked}"), reference=str(where), pool="", prompts="", segmentations=str(seg), real_masked=masked, slice_features="none"))
        with np.load(next((run.folder / "features").rglob("c0.npz"))) as f: return f["real_volume"], f["made_volume"], json.loads((run.folder / "evaluation.json").read_text())
    plain, masked = held(False, real), held(True, real)
    assert not np.allclose(plain[0], masked[0], atol=1e-3) and np.array_equal(plain[1], masked[1])
    assert masked[2]["table3"][0]["segmenter"] == "table7 outputs of the user" and masked[2]["table3"][0]["groups"]["lung"]["dice"] == 100


def test_memory_is_told_in_gb(folders, tmp_path, monkeypatch):
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache")); made = signed_run(folders, tmp_path)
    out = job.results(job.run(job_params(folders, generated=[str(made.folder)], run=str(tmp_path / "run"), slice_features="none", pool="")).folder)
    assert out["table2"][0]["memory_gb"] == 2. and out["table2"][0]["seconds"] == 3.5


def test_pictures_say_whose_scans_and_who_found(folders, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache")); shown = []; monkeypatch.setattr(plt, "close", lambda fig: shown.append(([a.get_title() for a in fig.axes], fig._suptitle.get_text())))
    v = read_ct(folders / "real/c0.nii.gz"); write_ct(ct_volume(v.array, v.spacing), tmp_path / "real/c0.nii.gz", "int16"); write_ct(read_mask(folders / "made/c0_SYNTHETIC_mask.nii.gz"), tmp_path / "seg/c0.nii.gz")
    for where, seg, want in ((tmp_path / "real", "", ("real", "found by thresholds")), (folders / "real", str(tmp_path / "seg"), ("drawn", "found by the user's segmenter"))):
        run = job.run(job_params(folders, run=str(tmp_path / want[0]), reference=str(where), segmentations=seg, slice_features="none", limit=1, pool="", prompts="")); job.keep_picture(run.folder, tmp_path / "p.webp", "made", ["c0"])
        titles, heading = shown[-1]; assert titles == [f"{want[0]} c0", "made", "asked for", want[1]] and f"{want[0]} patients" in heading


def test_run_lists_b3_as_on(folders, tmp_path, monkeypatch, capsys):
    import matplotlib; matplotlib.use("Agg")
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache")); job.show_run(job.run(job_params(folders, run=str(tmp_path / "run"), slice_features="none", limit=1, pool="", prompts="")).folder)
    off, on = [l for l in capsys.readouterr().out.splitlines() if l.startswith(("Defects", "On,"))]; assert "B3" not in off and "B2" in off and "B3" in on


def test_the_toolkits_defects_are_reached_by_name_alone(folders, tmp_path, monkeypatch, capsys):
    from fvae_nb.evaluation import features
    from fvae_nb.jobs import evaluate as job
    import matplotlib; matplotlib.use("Agg")
    from fvae_nb.running.cases import JobError
    assert job.Params().defects == []
    asked = []; monkeypatch.setattr(features, "load_extractor", lambda name, **more: asked.append((name, more)) or name)
    for name, given in (("ct-net", []), ("ct-net", ["B5"]), ("ct-clip", ["B1"]), ("ct-clip", [])): job._extractors(job_params(folders, volume_features=name, slice_features="none", defects=given), "cpu")
    assert [(n, m.get("variant")) for n, m in asked] == [("ct-net", None), ("ct-net", "vlm3d"), ("ct-clip", "vlm3d"), ("ct-clip", None)]
    monkeypatch.undo(); monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache"))
    for more, told in ((dict(defects=["B5"]), "defects = B5.*ct-net"), (dict(defects=["B1"]), "defects = B1.*ct-clip"), (dict(defects=["B2"], volume_features="none"), "defects = B2")):
        with pytest.raises(JobError, match=told): job.cases(job_params(folders, **more))
    with pytest.raises(ValueError): job_params(folders, defects=["B3"])
    run = job.run(job_params(folders, run=str(tmp_path / "run"), slice_features="none", limit=4, defects=["B2"], prompts="")); pairs, _ = job._gather(run, "made")
    out = json.loads((run.folder / "evaluation.json").read_text())["table2"][0]; flat = lambda k: np.concatenate([p[k]["volume"] for p in pairs])
    assert out["scores"]["fvd"]["value"] == pytest.approx(frechet_strata(flat("real"), flat("made"))) and "(strata of four: B2)" in out["features"]
    table = (run.folder / "tables/table2.md").read_text(); assert "strata of four: B2" in table and "| Frechet, volumes |" in table
    job.show_run(run.folder); said = capsys.readouterr().out; assert "On, as this run was told: B2" in said and "B2" not in next(l for l in said.splitlines() if l.startswith("Defects"))
    five = job.results(job.run(job_params(folders, run=str(tmp_path / "five"), slice_features="none", defects=["B2"], prompts="")).folder)["table2"][0]
    assert math.isnan(five["scores"]["fvd"]["value"]) and "one alone in the last stratum" in five["note"]


def test_two_segmenters_stand_row_beside_row(folders, tmp_path, monkeypatch):
    from fvae_nb.evaluation import adherence
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache")); net = tmp_path / "organs.safetensors"; net.write_bytes(b"weights"); monkeypatch.setattr(adherence, "organs_file", lambda: net)
    monkeypatch.setattr(adherence, "net_organs", lambda ct: ct.with_array(np.full(ct.shape, 30, np.uint8)))                   # finds lung everywhere
    run = job.run(job_params(folders, run=str(tmp_path / "run"), slice_features="none", limit=2, pool="", prompts="", segmenters=["thresholds", "net"]))
    rows = json.loads((run.folder / "evaluation.json").read_text())["table3"]; lung = {(r["method"], r["by"]): r["groups"]["lung"]["dice"] for r in rows}
    assert set(lung) == {(m, b) for m in ("made", "real scans, the ceiling") for b in ("thresholds", "net")} and lung["made", "thresholds"] > 80 > 50 > lung["made", "net"] == lung["real scans, the ceiling", "net"]
    assert [r["source"]["segmenter"] for r in rows] == ["thresholds"]*2 + ["net"]*2 and len(rows[2]["source"]["organs_net"]) == 64 and "organs_net" not in rows[0]["source"]
    text = (run.folder / "tables/table3.md").read_text(); assert "| segmented by |" in text and "| made | net |" in text and "- net: the package's net" in text
    when = lambda: sorted(p.stat().st_mtime_ns for p in (run.folder / "features").rglob("*.npz")); before = when()
    job.run(job_params(folders, run=str(tmp_path / "run"), slice_features="none", limit=2, pool="", prompts="", segmenters=["thresholds", "net"])); assert when() == before
    net.write_bytes(b"others"); job.run(job_params(folders, run=str(tmp_path / "run"), slice_features="none", limit=2, pool="", prompts="", segmenters=["thresholds", "net"])); assert when() != before    # another net: other answers
    one = job.run(job_params(folders, run=str(tmp_path / "one"), slice_features="none", limit=2, pool="", prompts="")); assert "segmented by" not in (one.folder / "tables/table3.md").read_text() and "Segmented by HU thresholds" in (one.folder / "tables/table3.md").read_text()


def test_slices_are_compared_with_their_neighbours(folders, tmp_path, monkeypatch):
    from fvae_nb.generation.sampling import continuity
    from fvae_nb.jobs import evaluate as job
    monkeypatch.setenv("FVAE_CACHE", str(tmp_path / "cache")); v = read_ct(folders / "real/c0.nii.gz"); write_ct(v.with_array(v.array + 40*(np.arange(20) % 2)[:, None, None], synthetic=True), tmp_path / "made/c0_SYNTHETIC.nii.gz", "int16")
    out = job.results(job.run(job_params(folders, generated=[str(tmp_path / "made")], run=str(tmp_path / "run"), slice_features="none", pool="", prompts="")).folder)     # no masks beside these volumes
    assert out["continuity"]["made"]["real"] == pytest.approx(continuity(v.array), abs=.05) and out["continuity"]["made"]["made"] > out["continuity"]["made"]["real"] + 10 and out["table3"] == []
