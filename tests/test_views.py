"Views: the same budget for all, no patient on both sides, no reconstruction that nobody vouches for."
import json, math
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from fvae_nb.augmentation.views import Arm, VIEWS, arm, arms, assign_folds, check_folds, paired, read_view, schedule, store_view
from fvae_nb.data.ct import DataError, ct_volume, read_ct, write_ct


@given(st.lists(st.text("abcdefgh12", min_size=1, max_size=4), min_size=1, max_size=9, unique=True), st.integers(1, 30), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_view_draws_the_same_cases_with_the_same_seeds(cases, steps, batch, seed):
    plans = {v: schedule(v, cases, steps, batch, seed) for v in VIEWS}
    for plan in plans.values(): assert len(plan) == steps and all(len(s) == batch for s in plan)
    assert len({tuple((d.case, d.seed) for s in p for d in s) for p in plans.values()}) == 1
    counts = [sum(d.case == c for s in plans["add"] for d in s) for c in cases]
    assert max(counts) - min(counts) <= 1
    assert not any(d.other for s in plans["real"] for d in s) and all(d.other for s in plans["replace"] for d in s)


def test_the_order_in_which_cases_are_listed_does_not_matter():
    assert schedule("add", ["b", "a", "c"], 20) == schedule("add", ["c", "b", "a"], 20)


@given(st.dictionaries(st.text("abc123", min_size=1, max_size=5), st.sampled_from("pqrstuv"), min_size=2, max_size=30), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_folds_never_divide_a_patient(patients, seed, data):
    n = len(set(patients.values()))
    if n < 2:
        with pytest.raises(DataError, match="number of patients"): assign_folds(patients, 2, seed)
        return
    k = data.draw(st.integers(2, n)); folds = check_folds(patients, assign_folds(patients, k, seed))
    per = [len({patients[c] for c, f in folds.items() if f == i}) for i in range(k)]
    assert min(per) >= 1 and max(per) - min(per) <= 1


def test_arms_and_their_names():
    rows = arms(["wan2.1", "gaussian-as-wan2.1", "wan2.1"])
    assert [a.name for a in rows] == ["real", "replace.wan2.1", "add.wan2.1", "replace.gaussian-as-wan2.1", "add.gaussian-as-wan2.1"]
    assert [arm(a.name) for a in rows] == rows and arm("real") == Arm("real")
    for bad in ("", "add", "add.", "real.x", "both.tiny"):
        with pytest.raises(DataError, match="expected real"): arm(bad)


@pytest.fixture
def scan():
    return ct_volume(np.random.default_rng(0).normal(0, 100, (5, 12, 14)).astype(np.float32), (3., 1., 1.), "case")


def darker(ct): return ct.with_array(ct.array - 10), {"by": 10}


def test_a_view_is_made_once(scan, tmp_path):
    calls = []
    def make(ct): calls.append(1); return darker(ct)
    first, facts = store_view(scan, tmp_path, "darker", make, {"scan": "1"})
    again, _ = store_view(scan, tmp_path, "darker", make, {"scan": "1"})
    assert calls == [1] and facts == {"by": 10} and np.array_equal(first.array, again.array)
    assert np.abs(first.array - (scan.array - 10)).max() <= .5 and np.allclose(first.affine, scan.affine)
    assert sorted(p.name for p in (tmp_path / "darker").iterdir()) == ["case.json", "case.nii.gz"]


@pytest.mark.parametrize("what, says", [("bytes", "not the file that was signed"), ("voxel", "not the file that was signed"), ("unsigned", "has no signature"), ("nonsense", "not JSON"), ("empty", "without hash"), ("identity", "made from something else")])
def test_what_does_not_fit_its_signature_is_refused_in_one_line(scan, tmp_path, what, says):
    store_view(scan, tmp_path, "darker", darker, {"scan": "1", "weights": "a"})
    path, note = tmp_path / "darker/case.nii.gz", tmp_path / "darker/case.json"
    if what == "bytes": path.write_bytes(path.read_bytes()[:-7])
    if what == "voxel":
        v = read_ct(path); v.array[2, 3, 4] += 1; write_ct(v, path, "int16")
    if what == "unsigned": note.unlink()
    if what == "nonsense": note.write_text("{")
    if what == "empty": note.write_text("{}")
    with pytest.raises(DataError, match=says) as error: read_view(tmp_path, "darker", "case", {"scan": "1", "weights": "b" if what == "identity" else "a"})
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    if what not in ("unsigned", "identity"):                            # and making it again does not paper over it
        with pytest.raises(DataError): store_view(scan, tmp_path, "darker", darker, {"scan": "1", "weights": "a"})


def test_a_maker_killed_before_signing_costs_one_volume(scan, tmp_path):
    store_view(scan, tmp_path, "darker", darker, {}); (tmp_path / "darker/case.json").unlink()
    (tmp_path / "darker/case.nii.gz").write_bytes(b"half a vol")
    back, _ = store_view(scan, tmp_path, "darker", darker, {})
    assert np.abs(back.array - (scan.array - 10)).max() <= .5


def test_nothing_is_stored_of_a_failed_reconstruction(scan, tmp_path):
    with pytest.raises(DataError, match="not finite"): store_view(scan, tmp_path, "nan", lambda ct: (ct.with_array(ct.array * np.inf), {}), {})
    with pytest.raises(DataError): store_view(scan, tmp_path, "small", lambda ct: (ct_volume(ct.array[1:], ct.spacing), {}), {})
    assert not list(tmp_path.rglob("*.nii.gz")) and not list(tmp_path.rglob("*.json"))


def test_paired_statistics_against_scipy_and_by_hand():
    from scipy.stats import wilcoxon
    rng = np.random.default_rng(1); a = rng.normal(60, 20, 20); b = a + rng.normal(3, 4, 20)
    name = lambda v: {f"c{n}": float(x) for n, x in enumerate(v)}
    r = paired(name(a), name(b))
    assert r["n"] == 20 and r["mean"] == pytest.approx((b - a).mean()) and r["p"] == pytest.approx(wilcoxon(b - a).pvalue)
    assert r["low"] < r["mean"] < r["high"] and r["high"] - r["low"] == pytest.approx(2*1.96*(b - a).std()/math.sqrt(20), rel=.15)
    assert paired(name(b), name(a))["mean"] == pytest.approx(-r["mean"])
    one = {c: "p" for c in name(a)}; assert paired(name(a), name(b), one)["n"] == 1 and math.isnan(paired(name(a), name(b), one)["p"])


def test_a_case_that_has_no_score_is_left_out_of_both_rows():
    r = paired({"a": 1., "b": math.nan, "c": 3.}, {"a": 2., "b": 9., "c": math.nan})
    assert r["n"] == 1 and r["mean"] == 1.
