"The job: one training a unit, resumed, refused where an input changed, compared by patient."
import json, math, shutil
import numpy as np
import pytest
from fvae_nb.augmentation.views import read_view
from fvae_nb.data.ct import DataError, read_mask, write_ct
from fvae_nb.jobs import augment
from fvae_nb.running.cases import JobError, Run, done
from fvae_nb.running.jobs import make_params
from fvae_nb.settings import sha256_of
from test_segmenters import FAKE, ball, fake_nnunet  # noqa: F401


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "Seven scans of six patients, a bright ball in each"
    folder = tmp_path_factory.mktemp("toy"); rows = []
    for k in range(7):
        ct, mask = ball(k); write_ct(ct, folder / f"ct/t{k}.nii.gz", "int16"); write_ct(mask, folder / f"masks/t{k}.nii.gz")
        rows.append(dict(schema_version=1, id=f"t{k}", patient=f"p{min(k, 5)}", dataset="other", split="train" if k < 4 else "test", ct=f"ct/t{k}.nii.gz", hu_mode="hu", licence="Apache-2.0", source="drawn",
                         masks=dict(tumor=f"masks/t{k}.nii.gz", tumor_labels={"1": "ball"}, source_map="local")))
    (folder / "toy.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def params(toy, run, **given):
    return augment.Params(**dict(manifest=str(toy / "toy.jsonl"), mask="tumor", labels={"ball": [1]}, sources=["dct-4x8x8-16-causal"], control=False, folds=3, run_folds=[0, 1], patch=(8, 16, 16), filters=[4, 8, 8], steps=2,
                                 test_on=["real", "same"], tolerances_mm=[2., 5.], device="cpu", run=str(run)) | given)


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    before = {p: sha256_of(p) for p in toy.rglob("*.nii.gz")}
    run = augment.run(params(toy, tmp_path_factory.mktemp("work") / "run"))
    assert {p: sha256_of(p) for p in toy.rglob("*.nii.gz")} == before                          # labels and scans untouched
    return run


def test_one_unit_is_one_arm_on_one_fold(finished):
    assert sorted({u.model for u in finished.units}) == ["add.dct-4x8x8-16-causal", "real", "replace.dct-4x8x8-16-causal"] and {u.case for u in finished.units} == {"fold0-seed0", "fold1-seed0"}
    assert all(done(finished, u, verify=True) for u in finished.units)
    assert len(list((finished.folder / "nets").rglob("*.safetensors"))) == 6


def test_every_arm_is_tested_on_the_same_patients_and_never_on_its_own(finished, toy):
    rows = augment.read_rows(finished.folder)
    tested = {a: sorted((r["fold"], r["case"], r["on"]) for r in rows if r["arm"] == a) for a in {r["arm"] for r in rows}}
    assert len({json.dumps(v) for v in tested.values()}) == 1
    for source in finished.sources.values():
        patients = lambda ids: {"p5" if i in ("t5", "t6") else i for i in ids}
        assert not patients(source["train"]) & patients(source["test"]) and len(source["train"]) + len(source["test"]) == 7
    same = {(r["fold"], r["case"]): r for r in rows if r["arm"] == "real" and r["on"] == "same"}
    for r in rows:
        if r["arm"] == "real" and r["on"] == "real": assert r["dsc.ball"] == same[r["fold"], r["case"]]["dsc.ball"]   # real has no reconstruction: the scan itself


def scans_of(run): return augment.Scans(augment.Params(**{k: v for k, v in run.params.items() if k != "job"}), run)


def test_every_arm_trains_on_what_its_name_says(finished):
    "The saved net is that of train_segmenter on the same scans, stored views and draws; and no two arms are one"
    from fvae_nb.augmentation.segmenters import load_segmenter, train_segmenter
    scans, first = scans_of(finished), {}
    for name in ("real", "replace.dct-4x8x8-16-causal", "add.dct-4x8x8-16-causal"):
        unit = next(u for u in finished.units if u.model == name and u.case == "fold0-seed0"); cases = finished.sources[unit.case]["train"]
        pairs = {c: scans.scan(c) for c in cases}; backs = {c: read_view(finished.folder / "views", "dct-4x8x8-16-causal", c)[0] for c in cases}
        net, _ = train_segmenter(pairs, ["ball"], scans.recipe, name.partition(".")[0], backs)
        weights = lambda s: np.concatenate([p.detach().numpy().ravel() for p in s.net.parameters()])
        first[name] = weights(load_segmenter(finished.payload(unit, "nets", ".safetensors"))); assert np.allclose(first[name], weights(net), atol=1e-6)
    assert all(not np.allclose(first[a], first[b], atol=1e-4) for a, b in (("real", "replace.dct-4x8x8-16-causal"), ("real", "add.dct-4x8x8-16-causal"), ("replace.dct-4x8x8-16-causal", "add.dct-4x8x8-16-causal")))


@pytest.mark.parametrize("name", ["real", "replace.dct-4x8x8-16-causal", "add.dct-4x8x8-16-causal"])
def test_what_a_net_is_tested_on(finished, name):
    "real: the scan for every arm; same: the stored reconstruction for those that trained on it"
    scans, seen = scans_of(finished), []
    unit = next(u for u in finished.units if u.model == name and u.case == "fold1-seed0")
    rows = augment.test_unit(scans, unit, lambda ct: seen.append(ct.array) or ct.with_array(np.zeros(ct.shape, np.uint8)))
    assert len(rows) == len(seen) and {r["on"] for r in rows} == {"real", "same"}
    for r, image in zip(rows, seen):
        scan = scans.scan(r["case"])[0].array; back = read_view(finished.folder / "views", "dct-4x8x8-16-causal", r["case"])[0].array if name != "real" else scan
        assert np.array_equal(image, back if r["on"] == "same" else scan) and (name == "real" or not np.array_equal(back, scan))


def test_scans_are_cut_around_their_labels_in_training_and_testing(toy, tmp_path):
    run = augment.run(params(toy, tmp_path / "run", views=["replace"], run_folds=[0], around_mm=7., steps=1, test_on=["same"])); scans, seen = scans_of(run), []
    unit = run.units[0]; rows = augment.test_unit(scans, unit, lambda ct: seen.append(ct.shape) or ct.with_array(np.zeros(ct.shape, np.uint8)))
    def box(case):
        where = np.argwhere(ball(int(case[1:]))[1].array)                                      # 5 x 2 x 2 mm: 7 mm are two slices, four pixels
        return tuple(min(int(b) + 1 + m, n) - max(int(a) - m, 0) for a, b, m, n in zip(where.min(0), where.max(0), (2, 4, 4), (8, 24, 24)))
    assert seen == [box(r["case"]) for r in rows] and any(s != (8, 24, 24) for s in seen)
    for case in run.sources[unit.case]["train"]:
        for source in ("", "dct-4x8x8-16-causal"): image, labels, _ = scans.grid(case, source); assert image.shape == labels.shape == box(case)


def test_each_tolerance_is_its_own_score(finished):
    from fvae_nb.metrics.masks import surface_dice
    scans = scans_of(finished); unit = finished.units[0]; move = lambda m: np.roll(m, 2, 2)           # 4 mm: beyond the first tolerance, within the second
    truths = {c: scans.scan(c)[1] for c in finished.sources[unit.case]["test"]}; todo = iter([c for c in truths for _ in range(2)])
    for r in augment.test_unit(scans, unit, lambda ct: ct.with_array(move(truths[next(todo)].array))):
        t = truths[r["case"]].array > 0; want = [100*surface_dice(t, move(t), (5., 2., 2.), mm) for mm in (2., 5.)]
        assert (r["nsd.ball"], r["nsd.ball.5mm"]) == pytest.approx(want) and want[0] < 90 < want[1]


def test_a_second_run_keeps_everything(finished, toy, capsys):
    capsys.readouterr(); augment.run(params(toy, finished.folder))
    assert capsys.readouterr().out.count("done before") == 6


def test_a_lost_unit_is_made_again_with_the_same_result(finished, toy):
    unit = next(u for u in finished.units if u.model.startswith("replace")); payload = finished.payload(unit, "scores", ".json"); was = payload.read_bytes()
    finished.sidecar(unit).unlink(); payload.unlink(); augment.run(params(toy, finished.folder))
    assert payload.read_bytes() == was


def test_views_lie_signed_beside_the_scores(finished):
    stored = sorted((finished.folder / "views/dct-4x8x8-16-causal").glob("*.nii.gz")); assert stored
    back, _ = read_view(finished.folder / "views", "dct-4x8x8-16-causal", "t0"); assert back.shape == (8, 24, 24)


def test_an_altered_view_fails_its_units_and_no_other(toy, finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run"); run = Run(tmp_path / "run")
    view = tmp_path / "run/views/dct-4x8x8-16-causal/t0.nii.gz"; view.write_bytes(view.read_bytes() + b" ")
    for u in run.units: run.sidecar(u).unlink()
    augment.run(params(toy, run.folder))
    failed = [json.loads(p.read_text()) for p in (run.folder / "failed").rglob("*.json")]
    assert failed and all(f["error"] == "DataError" and "not the file that was signed" in f["reason"] and f["model"] != "real" for f in failed)
    assert all(done(run, u) for u in run.units if u.model == "real")


def test_a_changed_scan_is_refused(toy, finished, tmp_path):
    shutil.copytree(toy, tmp_path / "toy"); p = params(tmp_path / "toy", tmp_path / "run", views=["real"], run_folds=[0]); run = augment.run(p)
    ct = tmp_path / "toy/masks/t1.nii.gz"; write_ct(read_mask(tmp_path / "toy/masks/t2.nii.gz"), ct); run.sidecar(run.units[0]).unlink(); augment.run(p)
    assert "t1: its files are not what they were" in json.loads(run.failure(run.units[0]).read_text())["reason"]


def test_other_scans_of_the_tested_patients(toy, tmp_path):
    (tmp_path / "ct").mkdir(); rows = [json.loads(line) for line in (toy / "toy.jsonl").read_text().splitlines()]
    for r in rows: r["ct"] = r["ct"].replace("ct/", "low/")
    (toy / "low").mkdir(exist_ok=True)
    for k in range(7): ct, _ = ball(k); write_ct(ct.with_array(ct.array + np.random.default_rng(k).normal(0, 200, ct.shape).astype(np.float32)), toy / f"low/t{k}.nii.gz", "int16")
    (toy / "low.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = augment.run(params(toy, tmp_path / "run", views=["real"], folds=0, run_folds=[], also={"low dose": str(toy / "low.jsonl")}, test_on=["real"]))
    rows = augment.read_rows(run.folder); assert {r["on"] for r in rows} == {"real", "low dose"} and {r["case"] for r in rows} == {"t4", "t5", "t6"}
    seen = []; augment.test_unit(scans_of(run), run.units[0], lambda ct: seen.append(ct.array) or ct.with_array(np.zeros(ct.shape, np.uint8)))
    from fvae_nb.data.ct import read_ct
    for r, image in zip(rows, seen): assert np.array_equal(image, read_ct(toy / ("low" if r["on"] == "low dose" else "ct") / f"{r['case']}.nii.gz").array)
    (toy / "part.jsonl").write_text((toy / "low.jsonl").read_text().splitlines()[0] + "\n" + (toy / "low.jsonl").read_text().splitlines()[4] + "\n")
    with pytest.raises(JobError, match="has no t5"): augment.cases(params(toy, tmp_path / "x", folds=0, run_folds=[], also={"low": str(toy / "part.jsonl")}, views=["real"]))


def test_nnunet_from_one_job(toy, fake_nnunet, tmp_path):
    run = augment.run(params(toy, tmp_path / "run", views=["add"], folds=6, run_folds=[0], segmenter="nnunet", nnunet_bin=str(fake_nnunet), test_on=["real"]))
    rows = augment.read_rows(run.folder); assert rows and all(r["dsc.ball"] > 60 for r in rows)           # the stand-in thresholds at 0 HU
    calls = [json.loads(line)[0] for line in (fake_nnunet / "calls.jsonl").read_text().splitlines()]
    assert calls == ["nnUNetv2_plan_and_preprocess", "nnUNetv2_train"] + ["nnUNetv2_predict"]*len(rows)
    images = sorted(p.name for p in (run.folder / "nnunet").rglob("imagesTr/*")); assert len(images) == 2*len(run.sources["fold0-seed0"]["train"]) and any("__dct" in n for n in images)


def test_a_patient_in_two_folds_is_refused(toy, tmp_path):
    rows = [json.loads(line) for line in (toy / "toy.jsonl").read_text().splitlines()]
    for n, r in enumerate(rows): r["fold"] = n % 2
    path = toy / "leak.jsonl"; path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match="patient p5 is in fold"): augment.cases(params(toy, tmp_path, manifest=str(path), folds=0, run_folds=[0], views=["real"]))


def test_mistakes_are_told_before_anything_starts(toy, tmp_path):
    with pytest.raises(JobError, match="no fold 7"): augment.cases(params(toy, tmp_path, run_folds=[7]))
    with pytest.raises(JobError, match="is only 0"): augment.cases(params(toy, tmp_path, folds=0, run_folds=[-1]))
    with pytest.raises(JobError, match="set data_root.msd_task06_lung"): augment.cases(params(toy, tmp_path, manifest="msd_task06_lung"))
    with pytest.raises(JobError, match="views"): make_params("augment", ["views=real,swap"])
    with pytest.raises(JobError, match="masks.organ"): augment.cases(params(toy, tmp_path, mask="organ"))


def fixed_rows(gain, n=8):
    "Two seeds of two arms; the second better by `gain` on every patient, worse on one scan without a tumour"
    out = []
    for arm, more in (("real", 0), ("replace.x", gain)):
        for seed in (0, 1): out += [dict(arm=arm, fold=0, seed=seed, case=f"c{k}", patient=f"p{k//2}", on="real", **{"dsc.t": 50. + k + more + seed, "nsd.t": math.nan if k == 7 else 40. + k}) for k in range(n)]
    return out


def test_comparison_counts_patients_and_not_scans_or_seeds():
    real, other = augment.compare(fixed_rows(3.), "dsc.t")
    assert (other["n"], other["scans"], other["seeds"]) == (4, 8, 2) and other["diff"] == pytest.approx(3) and other["low"] == pytest.approx(3) and real["diff"] == 0
    assert other["by_seed"] == pytest.approx({0: 3., 1: 3.})
    lopsided = [r for r in fixed_rows(0.) if r["case"] != "c1"]                                        # p0 has one scan, the others two; p0 gains 8, the others nothing
    for r in lopsided: r["dsc.t"] += 8*(r["arm"] == "replace.x" and r["patient"] == "p0" and r["seed"] == 0)
    assert augment.compare(lopsided, "dsc.t")[1]["by_seed"] == pytest.approx({0: 2., 1: 0.}) and augment.compare(lopsided, "dsc.t")[1]["diff"] == pytest.approx(1.)
    assert augment.compare(fixed_rows(3.), "nsd.t")[1]["scans"] == 7
    part = [r for r in fixed_rows(3.) if not (r["arm"] == "replace.x" and r["seed"] == 1)]
    assert augment.compare(part, "dsc.t")[1]["seeds"] == 1 and augment.compare(part, "dsc.t")[1]["diff"] == pytest.approx(3)   # an unfinished seed is left out of both
    with pytest.raises(JobError, match="no such arm"): augment.compare(part, "dsc.t", base="add.x")
    assert "+3.0 [+3.0, +3.0]" in augment.table(part, "dsc.t")


def test_the_figure_lists_arms_in_the_tables_order():
    import matplotlib.pyplot as plt
    fig = augment.draw_differences(fixed_rows(3.) + [r | dict(arm="zz.x") for r in fixed_rows(5.) if r["arm"] != "real"])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["replace.x", "zz.x"] and all(ax.get_ylim()[0] > ax.get_ylim()[1] for ax in fig.axes)     # the first on top
    plt.close(fig)


def test_a_kept_result_holds_hashes_and_no_path(finished, toy, tmp_path):
    path = augment.keep_results(finished.folder, tmp_path / "kept.json"); text = path.read_text(); kept = augment.read_kept(path)
    assert str(toy) not in text and str(finished.folder) not in text and kept["inputs"]["t0"][0] == sha256_of(toy / "ct/t0.nii.gz")
    assert [r["arm"] for r in augment.compare(kept["rows"], "dsc.ball")] == [r["arm"] for r in augment.compare(augment.read_rows(finished.folder), "dsc.ball")]


def test_a_seed_that_some_arm_has_not_finished_is_not_kept(finished, tmp_path):
    assert augment.read_kept(augment.keep_results(finished.folder, tmp_path / "all.json"))["params"]["seeds"] == [0]
    run = Run(shutil.copytree(finished.folder, tmp_path / "run")); run.sidecar(run.units[-1]).unlink()
    kept = augment.read_kept(augment.keep_results(run.folder, tmp_path / "part.json")); assert (kept["rows"], kept["units"], kept["params"]["seeds"]) == ([], 0, [])


@pytest.mark.parametrize("name", ["smoke", "table1-lung", "table1-pancreas"])
def test_presets_are_valid(name):
    p = make_params("augment", presets=[name]); assert p.views == ["real", "replace", "add"]
    if name != "smoke": assert (p.segmenter, p.trainer, p.run_folds, p.protocol, p.folds) == ("nnunet", "nnUNetTrainer", [0], "paper", 0)


def test_the_presets_on_a_tiny_copy_of_the_decathlons_layout(tmp_path, monkeypatch, fake_nnunet):
    root = tmp_path / "Task07_Pancreas"; names = [f"pancreas_{k:03d}" for k in range(11)]
    for k, n in enumerate(names):
        ct, mask = ball(k); tumour = mask.with_array((mask.array + (mask.array * (ct.array > 70))).astype(np.uint8))
        write_ct(ct, root / f"imagesTr/{n}.nii.gz", "int16"); write_ct(tumour, root / f"labelsTr/{n}.nii.gz")
    (root / "dataset.json").write_text(json.dumps(dict(name="Pancreas", labels={"0": "background", "1": "pancreas", "2": "cancer"}, training=[dict(image=f"./imagesTr/{n}.nii.gz", label=f"./labelsTr/{n}.nii.gz") for n in names], test=[])))
    monkeypatch.setenv("FVAE_DATA_ROOT__MSD_TASK07_PANCREAS", str(root)); monkeypatch.chdir(tmp_path)
    run = augment.run(make_params("augment", ["sources=dct", "control=false", "device=cpu", f"nnunet_bin={fake_nnunet}", "views=real,replace"], ["table1-pancreas"], run=str(tmp_path / "run")))
    rows = augment.read_rows(run.folder); assert augment.metrics_of(rows) == ["dsc.pancreas", "nsd.pancreas", "dsc.tumour", "nsd.tumour"] and {r["arm"] for r in rows} == {"real", "replace.dct"}
    assert "paper: nsd.tumour" in augment._beside_the_paper(rows, "pancreas")
