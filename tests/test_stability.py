"eps_phi, borders in millimetres, HU, the verdict: every empty case, spacing, far false positives."
import math
import numpy as np
import pytest
from fvae_nb.augmentation.stability import (LIMITS, boundary_shift, case_stability, eps_difference, eps_phi, hu_change, judge, label_sets, mean_interval,
                                            organ_agreement, segment_hu, stability, verdict)
from fvae_nb.data.ct import ct_volume
from fvae_nb.data.samples import ellipsoid_thorax


def box(shape, *bounds):
    m = np.zeros(shape, bool); m[tuple(slice(a, b) for a, b in zip(bounds[::2], bounds[1::2]))] = True
    return m


TOY, MM = (12, 14, 10), (1., 1., 2.5)
A, B, D = box(TOY, 3, 8, 3, 9, 2, 6), box(TOY, 4, 9, 3, 9, 2, 6), box(TOY, 3, 7, 4, 9, 3, 7)
C = A | box(TOY, 9, 11, 10, 13, 7, 9)
E = np.zeros(TOY, bool)


def volume(array, spacing=MM): return ct_volume(array.astype(np.uint8), spacing)


def test_identity_is_zero_exactly():
    ct = ellipsoid_thorax((17, 64, 64), (6., 5., 5.))
    case = stability(ct, lambda v: v)
    assert eps_phi([case])["eps"] == 0 and eps_phi([case], symmetric=False)["eps"] == 0
    assert all(o["shift"]["far"] == 0 and o["hu"]["bias"] == 0 for o in case["organs"].values() if not o["empty"])


def test_published_pair():
    "specs: A against D at 2 mm, eq. 25 and symmetric"
    case = case_stability(volume(A), volume(A), volume(A), volume(D))
    assert eps_phi([case], symmetric=False)["eps"] == pytest.approx(.35625, abs=1e-6)
    assert eps_phi([case])["eps"] == pytest.approx(.289508, abs=1e-5)


@pytest.mark.parametrize("a, b, empty, score", [(A, A, "", 1.), (A, E, "reconstruction", 0.), (E, A, "scan", 0.), (E, E, "both", math.nan)])
def test_every_empty_case(a, b, empty, score):
    found = organ_agreement(a, b, MM)
    assert found["empty"] == empty
    for key in ("dice", "nsd_one", "nsd", "paper", "symmetric"): assert found[key] == score or (math.isnan(score) and math.isnan(found[key]))
    shift = boundary_shift(a, b, MM)
    assert all(math.isnan(v) for v in shift.values()) if empty else shift["far"] == 0


def test_both_empty_is_left_out_and_counted_one_empty_is_punished():
    both = np.where(A, 1, 0); one = np.where(A, 1, np.where(box(TOY, 9, 11, 10, 13, 7, 9), 2, 0))
    sets = {"organ": (1,), "lesion": (2,)}
    kept = case_stability(volume(A), volume(A), volume(both), volume(both), sets)
    assert kept["left_out"] == ["lesion"] and kept["used"] == 1 and kept["symmetric"] == 1
    lost = case_stability(volume(A), volume(A), volume(one), volume(both), sets)
    assert lost["left_out"] == [] and lost["symmetric"] == .5                       # the lesion vanished: 0, the organ 1
    new = case_stability(volume(A), volume(A), volume(both), volume(one), sets)
    assert new["symmetric"] == new["paper"] == .5                                   # one that was not there
    e = eps_phi([kept, lost, new])
    assert (e["organs"]["lesion"]["both_empty"], e["organs"]["lesion"]["one_empty"], e["organs"]["lesion"]["n"]) == (1, 2, 2)
    nothing = case_stability(volume(A), volume(A), volume(E), volume(E), sets)
    assert eps_phi([kept, nothing])["left_out"] == 1 and eps_phi([kept, nothing])["n"] == 1


def test_far_false_positive_is_seen_by_symmetric_and_far_only():
    found, shift = organ_agreement(A, C, MM), boundary_shift(A, C, MM)
    assert found["nsd_one"] == 1 and found["nsd"] < .92
    assert shift["mean"] == 0 and shift["far"] > 5                                  # A's own border did not move; from the island it is far


@pytest.mark.parametrize("spacing", [(1., 1., 1.), (5., .7, .9), (2.5, 1.4, .6)])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("voxels", [-3, -1, 0, 1, 2])
def test_planted_shift_of_a_plane_is_recovered_with_its_sign(spacing, axis, voxels):
    "An organ that fills one half of the volume: its only border moves by whole voxels"
    def half(n):
        m = np.zeros((20, 20, 20), bool); m[(slice(None),)*axis + (slice(0, n),)] = True
        return m
    shift = boundary_shift(half(10), half(10 + voxels), spacing)
    assert shift["mean"] == pytest.approx(voxels*spacing[axis]) and (shift["size"], shift["p95"]) == pytest.approx((abs(voxels)*spacing[axis],)*2)


def test_a_box_that_grows_everywhere():
    a, b = box((30,)*3, 10, 20, 10, 20, 10, 20), box((30,)*3, 8, 22, 8, 22, 8, 22)
    assert boundary_shift(a, b, (1, 1, 1))["mean"] == pytest.approx(2) and boundary_shift(b, a, (1, 1, 1))["mean"] < -2 + .5


def test_a_moved_organ_has_no_mean_shift_but_a_size():
    a = box((20,)*3, 5, 15, 5, 15, 5, 15); b = np.roll(a, 2, 1)
    shift = boundary_shift(a, b, (1, 1, 1))
    assert abs(shift["mean"]) < .25 and shift["p95"] == pytest.approx(2)


def test_drawing_faces_changes_little():
    ct = ellipsoid_thorax((17, 96, 96), (6., 3.5, 3.5)); a = segment_hu(ct).array == 2
    b = np.roll(a, 1, 2)
    assert boundary_shift(a, b, ct.spacing, most=3000)["size"] == pytest.approx(boundary_shift(a, b, ct.spacing)["size"], rel=.05)


def test_spacing_decides_about_the_tolerance():
    thin, thick = organ_agreement(A, B, (1., 1., 2.5)), organ_agreement(A, B, (3., 1., 2.5))
    assert thin["nsd"] == 1 and thick["nsd"] < .9 and thin["dice"] == thick["dice"]


def test_hu_of_organ_and_core():
    organ = box((10, 20, 20), 2, 8, 4, 16, 4, 16)
    core = box((10, 20, 20), 4, 6, 8, 12, 8, 12)
    ct = ct_volume(np.zeros((10, 20, 20), np.float32), (2., 1., 1.))
    back = ct.with_array(np.where(core, 30, 0).astype(np.float32))
    found = hu_change(ct, back, organ, core_mm=3.9)
    assert found["core"] == pytest.approx(30) and found["bias"] == pytest.approx(30*core.sum()/organ.sum()) and found["ml"] == pytest.approx(organ.sum()*2/1000)
    assert math.isnan(hu_change(ct, back, organ, core_mm=50)["core"]) and hu_change(ct, back, organ & False)["ml"] == 0
    assert hu_change(ct.with_array(ct.array + 5000), ct.with_array(ct.array + 2000), organ)["bias"] == 0     # both outside the window


@pytest.mark.parametrize("spacing", [(5., 1., 1.), (1., 1., 1.), (3.27, .98, .98), (1.2, 2.5, .7)])
def test_a_core_is_as_deep_in_every_direction(spacing):
    "Against every pair of voxels: the distance of a centre to the boxes of the voxels outside, the volume's border included"
    from scipy.ndimage import gaussian_filter
    rng = np.random.default_rng(0); organ = gaussian_filter(rng.normal(size=(11, 20, 18)), 2) > -.1
    outside = np.argwhere(np.pad(~organ, 1, constant_values=True)) - 1; core = np.zeros_like(organ)
    for v in np.argwhere(organ): core[tuple(v)] = np.sqrt(((np.maximum(abs(outside - v) - .5, 0)*spacing)**2).sum(1)).min() > 3
    ct = ct_volume(np.zeros(organ.shape, np.float32), spacing); change = rng.uniform(-500, 500, organ.shape).astype(np.float32)
    assert 5 < core.sum() < .8*organ.sum() and hu_change(ct, ct.with_array(change), organ)["core"] == pytest.approx(change[core].mean(), abs=1e-3)


def test_interval_covers_and_says_when_it_cannot():
    rng = np.random.default_rng(0)
    covered = sum(low <= .3 <= high for _, low, high, _ in (mean_interval(rng.normal(.3, .1, 25), draws=400, seed=s) for s in range(120)))
    assert covered > 100                                                               # nominal 114; the percentile interval is a little narrow
    assert mean_interval([.2])[0] == .2 and math.isnan(mean_interval([.2])[1]) and mean_interval([math.nan, .4, .6])[3] == 2


def test_paired_difference_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(1); spread = rng.uniform(.2, .9, 20)
    first, second = ({str(i): dict(symmetric=v - d, paper=v - d) for i, v in enumerate(spread)} for d in (0., .01))
    found = eps_difference(first, second)
    assert found["difference"] == pytest.approx(-.01) and found["high"] < 0 and found["n"] == 20
    assert eps_difference(first, {"19": second["19"], "x": second["0"]})["n"] == 1


def case(d, shift=0., hu=0., empty="", tau=2.):
    o = dict(dice=d, nsd=d, nsd_one=d, paper=d, symmetric=d, empty=empty, shift=dict(mean=shift), hu=dict(bias=hu))
    return dict(organs={"liver": o}, paper=d, symmetric=d, used=1, left_out=[], tolerance_mm=tau)


@pytest.mark.parametrize("cases, answer, word", [
    ([case(.99)]*6, "yes", "keeps what this segmenter sees"), ([case(.99)]*2, "undecided", "2 cases cannot tell"), ([case(.99)], "undecided", "1 case cannot tell"),
    ([case(.9)]*6, "no", "eps_phi may be as large as 0.100, above 0.05"), ([case(.99, shift=-.8)]*6, "no", "liver moved by -0.80 mm"), ([case(.99, hu=12.)]*6, "no", "liver changed by +12.0 HU"),
    ([case(.999)]*5 + [case(0., empty="reconstruction")], "no", "liver appeared or vanished"), ([case(.999)]*9 + [case(.6)], "no", "may be as large as")])
def test_verdicts(cases, answer, word):
    judged = judge(cases)
    text = verdict("tiny", judged, "a segmenter")
    assert judged["answer"] == answer and word in text
    for part in ("0.05", "0.5 mm", "10 HU", "at least 5 cases", "tau 2 mm", "a segmenter", "Not for clinical use"): assert part in text


def test_limits_are_the_users():
    assert judge([case(.9)]*6, dict(eps=.2))["answer"] == "yes" and LIMITS["eps"] == .05


def test_mixed_tolerances_and_nothing():
    with pytest.raises(ValueError, match="different tolerances"): eps_phi([case(.9), case(.9, tau=1.)])
    with pytest.raises(ValueError, match="no cases"): eps_phi([])


def test_another_grid_is_refused():
    with pytest.raises(ValueError): case_stability(volume(A), volume(A), volume(A), ct_volume(A.astype(np.uint8), (1., 1., 1.)))
    with pytest.raises(ValueError, match="one grid"): boundary_shift(A, A[:5], MM)
    with pytest.raises(ValueError, match="one grid"): organ_agreement(E, E[:5], MM)


def test_label_sets_and_any_segmenter():
    ct = ellipsoid_thorax((9, 48, 48), (8., 7., 7.))
    threshold = lambda v: v.with_array((v.array > -500).astype(np.uint8)*3)
    found = stability(ct, lambda v: v.with_array(v.array - 600), threshold)
    assert list(found["organs"]) == ["label 3"] == list(label_sets(threshold(ct)))
    assert found["symmetric"] < .5 and found["organs"]["label 3"]["hu"]["bias"] < -400


def test_segment_hu_finds_what_was_drawn():
    ct = ellipsoid_thorax()
    labels = segment_hu(ct).array
    assert np.median(ct.array[labels == 2]) < -800 and np.median(ct.array[labels == 3]) > 200 and -150 < np.median(ct.array[labels == 4]) < -30
    assert (labels[:, 0] == 0).all() and labels.dtype == np.uint8
