"A cohort of drawn patients: complete, honest about itself, never drawn twice, split by patient."
import json
import numpy as np
import pytest
from fvae_nb.data.cohort import ODDS, cohort_plan, phantom_cohort
from fvae_nb.data.ct import DataError, check_same_grid, read_ct, read_mask
from fvae_nb.data.findings import COLUMNS, is_normal
from fvae_nb.data.manifests import audit, check_path, read_case, read_diseases, read_manifest, read_organs
from fvae_nb.data.phantom import KINDS

SMALL = dict(patients=8, seed=5, shape=(44, 48, 48), spacing=(7.5, 8., 8.))


def quiet(done, total): pass


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    told = []
    manifest = phantom_cohort(folder, **SMALL, progress=lambda done, total: told.append((done, total)))
    return folder, manifest, read_manifest(manifest), told


def test_every_patient_is_told(cohort):
    assert cohort[3] == [(k, 8) for k in range(1, 9)]


def test_the_manifest_passes_every_check(cohort):
    folder, manifest, cases, _ = cohort
    assert len(cases) == 8 == len({c.patient for c in cases}) and audit(cases, lambda d: folder) == []
    assert check_path(manifest, files=True, chest=True).problems == []
    assert {c.split for c in cases} == {"train", "val", "test"}


def test_files_say_synthetic(cohort):
    folder, _, cases, _ = cohort
    for c in cases:
        assert c.synthetic and c.dataset == "phantom"
        for f in (c.ct, c.masks.organ, *(d.path for d in c.masks.disease or ())): assert "SYNTHETIC" in f and (folder/f).is_file()
        assert read_ct(folder/c.ct).synthetic and b"SYNTHETIC" in bytes(__import__("nibabel").load(folder/c.ct).header["descrip"])
    assert not list(folder.rglob("*.part*"))


def test_masks_lie_on_the_scan_and_hold_what_the_row_says(cohort):
    folder, _, cases, _ = cohort
    for c in cases:
        ct = read_case(c, folder); organs = read_organs(c, folder, ct)
        for d, (cls, m) in zip(c.masks.disease or (), read_diseases(c, folder, ct)):
            check_same_grid(m, ct)
            assert cls == d.disease_class and int(m.array.sum()) == d.voxels > 0
            low, high = {"2d": (-500, 100), "2e": (-300, 60), "1c": (-1000, -850), "2c": (-750, -450), "2b": (-500, 80), "2h": (0, 700)}[d.rex_code]
            if d.voxels > 30: assert low < np.median(ct.array[m.array > 0]) < high, (c.id, d.finding)      # 8 mm voxels: edges weigh much
            if d.rex_code != "2h": assert np.isin(organs.array[m.array > 0], (28, 29, 30, 31, 32, 132, 133)).all()
        assert list(c.shape) == list(ct.shape[::-1]) and set(c.findings) == set(COLUMNS)


def test_rows_agree_with_the_plan(cohort):
    plan = cohort_plan(8, 5)
    for c in cohort[2]:
        want = {d.kind for d in plan[c.seed]}
        assert is_normal(c.findings) == (not want)
        assert {x for x, v in c.findings.items() if v} <= {x for k in want for x in KINDS[k].columns}
        assert bool(c.masks.disease) == bool(want - {"cardiomegaly"}) and c.report.clean.startswith(c.report.findings[:20])


def test_a_stopped_run_goes_on(cohort, tmp_path):
    class Stop(Exception): pass
    def stop(done, total):
        if done == 2: raise Stop
    arguments = dict(SMALL, patients=3)
    with pytest.raises(Stop): phantom_cohort(tmp_path, **arguments, progress=stop)
    assert not list(tmp_path.glob("*.jsonl"))
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.nii.gz")}
    manifest = phantom_cohort(tmp_path, **arguments, progress=quiet)
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())                     # kept
    assert [c.seed for c in read_manifest(manifest)] == [50000, 50001, 50002] and check_path(manifest, files=True).problems == []


def test_a_lost_or_older_file_is_drawn_again(tmp_path):
    arguments = dict(SMALL, patients=1, healthy=1.)
    (case,) = read_manifest(phantom_cohort(tmp_path, **arguments, progress=quiet))
    first = (tmp_path/case.ct).read_bytes(); (tmp_path/case.ct).unlink()
    phantom_cohort(tmp_path, **arguments, progress=quiet)
    was = read_ct(tmp_path/case.ct).array
    assert len(first) > 1000 and was.shape == SMALL["shape"]
    phantom_cohort(tmp_path, **arguments | dict(contrast=1.), progress=quiet)
    assert not np.array_equal(read_ct(tmp_path/case.ct).array, was)
    row = tmp_path/"cases"/f"{case.id}.json"; row.write_text("{ half")
    phantom_cohort(tmp_path, **arguments, progress=quiet)
    assert json.loads(row.read_text())["case"]["id"] == case.id and np.array_equal(read_ct(tmp_path/case.ct).array, was)


def test_plans():
    assert cohort_plan(30, 1) == cohort_plan(30, 1) != cohort_plan(30, 2)
    assert sum(not d for d in cohort_plan(40, 2, .3).values()) == 12 and not any(cohort_plan(9, 0, 1.).values())
    kinds = [d.kind for ds in cohort_plan(400, 9, 0.).values() for d in ds]
    assert set(kinds) == set(ODDS) and max(set(kinds), key=kinds.count) == "nodule"
    sizes = [d.size for ds in cohort_plan(400, 9, 0.).values() for d in ds if d.kind == "nodule"]
    assert .5 < np.mean([15 <= s <= 40 for s in sizes]) < .8 and min(sizes) >= 8
    assert {d.kind for ds in cohort_plan(50, 1, 0., {"effusion": 1.}).values() for d in ds} == {"effusion"}


@pytest.mark.parametrize("arguments, says", [(dict(patients=0), "1 to 10000"), (dict(healthy=1.5), "a share"), (dict(odds={"flu": 1}), "flu"), (dict(odds={"nodule": 0.}), "no finding has odds"), (dict(parts={"train": .5}), "add up")])
def test_bad_arguments_say_what_was_expected(arguments, says, tmp_path):
    with pytest.raises(DataError) as error: phantom_cohort(tmp_path, **dict(SMALL, patients=1) | arguments, progress=quiet)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_bar_tells_time(tmp_path, capsys):
    phantom_cohort(tmp_path, 1, shape=(5, 16, 16), spacing=(20., 20., 20.))
    assert "patients 1/1" in (told := capsys.readouterr().err) and "min left" in told
