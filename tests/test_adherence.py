"Organ groups, Dice and IoU with left-out targets, lesions that are there, ignored or elsewhere, findings nobody asked for, worse masks."
import math
import numpy as np
import pytest
from hypothesis import given, settings as hsettings, strategies as st
from fvae_nb.data.ct import DataError, ct_volume
from fvae_nb.data.labels import TABLE7
from fvae_nb.data.samples import ellipsoid_thorax
from fvae_nb.evaluation.adherence import (NET_LABELS, NET_RECIPE, TABLE3_GROUPS, WORSE, by_finding, by_size, group_mask, lesion_adherence, net_labels, net_organs, off_target, off_target_rate, organ_adherence,
                                          summarise_adherence, threshold_organs, train_organs, worsen_mask)

ONCE = np.array([[sorted(TABLE7)]], np.uint8)                                          # every id once


@pytest.mark.parametrize("group, fill, n", [("lung", False, 5), ("lung", True, 7), ("heart", True, 1), ("vessel", True, 1), ("rib", True, 24), ("body", True, 1)])
def test_voxels_per_group_where_every_id_occurs_once(group, fill, n): assert group_mask(ONCE, group, fill).sum() == n


def volume(array, spacing=(4., 3., 3.)): return ct_volume(np.asarray(array), spacing)


def test_absent_targets_and_unknown_groups_are_left_out():
    a = np.zeros((4, 6, 6), np.uint8); a[:2] = 28; a[3, :3] = 133; b = a.copy(); b[3] = 0; b[2, 0, 0] = 115
    out = organ_adherence(volume(b), volume(a))
    assert out["lung"]["dice"] == pytest.approx(2*72/(72 + 90)) and out["vessel"]["dice"] == 0 and math.isnan(out["heart"]["dice"]) and math.isnan(out["rib"]["iou"])
    assert math.isnan(organ_adherence(volume(b), volume(a), has=("lung",))["vessel"]["dice"])
    s = summarise_adherence([out, organ_adherence(volume(a), volume(a))])
    assert s["vessel"]["n_zero"] == 1 and s["vessel"]["dice"] == 50 and s["heart"]["n"] == 0 and s["heart"]["n_left_out"] == 2 and math.isnan(s["heart"]["dice"])
    with pytest.raises(DataError, match="resample"): organ_adherence(volume(a), volume(a[:3]))


def test_painted_lesions_belong_to_no_organ():
    a = np.full((3, 5, 5), 28, np.uint16); a[1, 1:4, 1:4] = 261
    assert organ_adherence(volume(np.full((3, 5, 5), 28, np.uint16)), volume(a))["lung"]["dice"] == 1


@hsettings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_dice_and_iou_of_one_case_are_tied(seed):
    r = np.random.default_rng(seed); a, b = (np.where(r.random((3, 5, 6)) < .5, 28, 0).astype(np.uint8) for _ in range(2))
    o = organ_adherence(volume(a), volume(b))["lung"]
    assert o["iou"] == pytest.approx(o["dice"]/(2 - o["dice"]), abs=1e-12) if o["dice"] == o["dice"] else True


def test_thresholds_find_lungs_of_a_drawn_thorax():
    ct = ellipsoid_thorax((33, 64, 64), (7., 5.6, 5.6)); found = threshold_organs(ct)
    truth = np.where(np.abs(ct.array + 830) < 90, 28, 0)
    assert organ_adherence(found, ct.with_array(truth.astype(np.uint8)))["lung"]["dice"] > .85 and set(np.unique(found.array)) <= {0, 28, 63, 133, 200}
    solid = ct.with_array(np.full(ct.shape, 40, np.float32)); assert set(np.unique(threshold_organs(solid).array)) <= {0, 200}


# ---- lesions

def scene(hu=30., at=(10, 16, 16), radius=12.):
    z, y, x = np.ogrid[:20, :32, :32]
    ball = ((z - at[0])*4)**2 + ((y - at[1])*3)**2 + ((x - at[2])*3)**2 < radius**2
    a = np.full((20, 32, 32), -850, np.float32) + np.random.default_rng(0).normal(0, 10, (20, 32, 32)).astype(np.float32); a[ball] = hu
    return volume(a), ball


def test_a_lesion_there_ignored_weak_and_elsewhere():
    real, ball = scene(); empty = volume(np.where(ball, -850, real.array).astype(np.float32))
    there = lesion_adherence(real, ball, real)
    assert there["share"] == pytest.approx(1) and not there["ignored"] and there["extent"] == pytest.approx(1, abs=.02) and there["offset_mm"] < .5
    assert there["diameter_mm"] == pytest.approx(24, rel=.1)
    gone = lesion_adherence(empty, ball, real); assert gone["ignored"] and abs(gone["share"]) < .05 and gone["extent"] == 0 and math.isnan(gone["offset_mm"])
    weak = lesion_adherence(real.with_array((empty.array*.6 + real.array*.4).astype(np.float32)), ball, real); assert weak["share"] == pytest.approx(.4, abs=.02) and not weak["ignored"]
    moved, _ = scene(at=(10, 19, 16)); off = lesion_adherence(moved, ball, real); assert off["offset_mm"] == pytest.approx(9, abs=1.5) and not off["ignored"]
    far, _ = scene(at=(10, 28, 28)); assert lesion_adherence(far, ball, real)["ignored"]


def test_dark_lesions_count_too():
    real, ball = scene(hu=-990.); empty = volume(np.where(ball, -850, real.array).astype(np.float32))
    assert lesion_adherence(real, ball, real)["share"] == pytest.approx(1) and lesion_adherence(empty, ball, real)["ignored"]


def test_without_a_real_case_nothing_is_judged():
    real, ball = scene()
    alone = lesion_adherence(real, ball); assert alone["ignored"] is None and math.isnan(alone["share"]) and alone["contrast_made"] > 800
    assert lesion_adherence(real, ball, expected=880.)["share"] == pytest.approx(1, abs=.05)
    with pytest.raises(DataError, match="empty disease mask"): lesion_adherence(real, ball & False)


def test_other_lesions_do_not_enter_the_shell():
    real, ball = scene(); z, y, x = np.ogrid[:20, :32, :32]
    second = ((z - 10)*4)**2 + ((y - 16)*3)**2 + ((x - 24)*3)**2 < 100; a = real.array.copy(); a[second] = 30; both = volume(a)
    plain, aware = lesion_adherence(both, ball, both), lesion_adherence(both, ball, both, others=ball | second)
    assert aware["contrast_made"] > plain["contrast_made"] + 20 and aware["contrast_made"] == pytest.approx(880, abs=5)


def test_the_wall_beside_a_painted_lesion_is_no_shell():
    real, ball = scene(hu=-600.); a, organs = real.array.copy(), np.full(real.shape, 30, np.uint16)
    wall = np.zeros(real.shape, bool); wall[:, :12] = True; a[wall] = 50; organs[wall] = 200
    faint = volume(a); painted = np.where(ball, 261, organs); plain = lesion_adherence(faint, ball, faint, organs)["contrast_real"]
    assert plain == pytest.approx(250, abs=5) and lesion_adherence(faint, ball, faint, painted)["contrast_real"] == pytest.approx(plain)
    assert lesion_adherence(faint, ball, faint)["contrast_real"] < 150                     # without organs the wall counts, and a faint opacity looks weak


def test_findings_are_counted_by_kind():
    rows = [dict(finding=f, ignored=i, share=s, extent=1., offset_mm=math.nan, contrast_made=100*s, contrast_real=100.) for f, i, s in (("a", True, .1), ("b", False, .5), ("b", True, .1), ("c", None, math.nan))]
    b = by_finding(rows); assert [(r["finding"], r["n"], r["n_ignored"]) for r in b] == [("b", 2, 1), ("a", 1, 1)] and b[0]["share"] == pytest.approx(.3) and math.isnan(b[0]["offset_mm"]) and b[0]["contrast_made"] == pytest.approx(30)


def test_by_size_sorts_and_counts():
    rows = [dict(diameter_mm=d, ignored=i, share=s, offset_mm=1.) for d, i, s in ((5, True, .1), (8, True, .2), (15, False, .5), (50, None, math.nan))]
    b = by_size(rows); assert [(r["n"], r["n_ignored"]) for r in b] == [(2, 2), (1, 0), (0, 0), (0, 0)] and b[0]["share"] == pytest.approx(.15) and math.isnan(b[2]["share"])


def test_findings_nobody_asked_for():
    real, ball = scene(); organs = np.full(real.shape, 30); empty = volume(np.where(ball, -850, real.array).astype(np.float32))
    found = off_target(real, organs); assert len(found) == 1 and found[0]["ml"] == pytest.approx(ball.sum()*.036, rel=.4) and np.allclose(found[0]["centre"], (10, 16, 16), atol=1)
    assert off_target(empty, organs) == [] and off_target(real, organs, ball) == [] and len(off_target(real, organs, np.roll(ball, 12, 2))) == 1
    thin = empty.array.copy(); thin[:, 15:17, 15:17] = 40; assert off_target(volume(thin), organs) == []                 # a vessel
    r = off_target_rate([found, []], [[]]); assert r["share"] == .5 and r["real_share"] == 0 and r["n"] == 2
    with pytest.raises(DataError, match="no lung"): off_target(real, organs*0)


@pytest.mark.parametrize("kind", WORSE)
def test_worse_masks_are_worse_and_repeat(kind):
    _, ball = scene(); s = (4., 3., 3.); w = worsen_mask(ball, s, kind, 6.)
    d = 2*(w & ball).sum()/(w.sum() + ball.sum())
    assert w.shape == ball.shape and w.dtype == bool and .2 < d < 1 and np.array_equal(w, worsen_mask(ball, s, kind, 6.)) and not worsen_mask(ball & False, s, kind, 6.).any()


def test_unknown_ways():
    with pytest.raises(DataError, match="expected one of"): worsen_mask(np.ones((2, 2, 2), bool), (1, 1, 1), "rough", 1)
    with pytest.raises(DataError, match="expected one of"): group_mask(ONCE, "lungs")
    assert set(TABLE3_GROUPS) == {"lung", "heart", "vessel", "rib"}


def test_thresholds_find_ribs_and_vessels_of_a_phantom():
    from fvae_nb.data.phantom import thorax_phantom
    p = thorax_phantom((41, 96, 96), (4., 3.7, 3.7), seed=3, noise="cheap", findings=()); got = organ_adherence(threshold_organs(p.ct), p.mask)
    assert got["rib"]["dice"] > .4 and got["vessel"]["dice"] > .15 and got["lung"]["dice"] > .85


def test_the_shell_begins_beyond_the_lesions_soft_edge():
    from scipy.ndimage import distance_transform_edt
    real, ball = scene(); away = distance_transform_edt(~ball, sampling=real.spacing); soft = real.array.copy(); soft[(away > 0) & (away <= 3)] = 30
    assert lesion_adherence(volume(soft), ball, real)["contrast_made"] == pytest.approx(lesion_adherence(real, ball, real)["contrast_made"], abs=.01)


# ---- the net for drawn volumes

def test_the_net_learns_the_groups_of_table_3_and_no_more():
    got = net_labels(volume(ONCE)).array; count = {n: int((got == k).sum()) for k, n in enumerate(NET_LABELS, 1)}
    assert count == {"lung": 6, "heart": 1, "vessel": 1, "rib": 24} and (got == 0).sum() == ONCE.size - 32
    back = np.array([0, *(ids[0] for ids in NET_LABELS.values())])[got]                          # as `net_organs` answers
    for g in TABLE3_GROUPS: assert np.array_equal(group_mask(back, g), group_mask(ONCE, g))


def test_the_net_is_tied_to_its_voxels_and_answers_in_table_7():
    from dataclasses import replace
    ct = ellipsoid_thorax((16, 32, 32), (12., 11., 11.)); mask = ct.with_array(np.where(np.abs(ct.array + 830) < 90, 30, 0).astype(np.uint8))
    recipe = replace(NET_RECIPE, patch=(16, 32, 32), filters=(4, 8, 16), steps=12, lr=2e-2)
    net, losses = train_organs({"a": (ct, mask)}, recipe); again, same = train_organs({"a": (ct, mask)}, recipe); assert losses == same and np.mean(losses[-3:]) < losses[0]
    assert net.recipe.spacing_mm == pytest.approx((12., 11., 11.)) and net.labels == tuple(NET_LABELS)
    fine = ellipsoid_thorax((32, 32, 64), (6., 11., 5.5)); found = net_organs(fine, net); assert found.shape == fine.shape and set(np.unique(found.array)) <= {0, 28, 115, 133, 63} and found.array.dtype == np.uint8
    assert organ_adherence(net_organs(ct, net), mask)["lung"]["dice"] > .5


def test_the_packages_net_finds_more_than_thresholds_in_a_patient_it_never_saw():
    from fvae_nb.data.phantom import thorax_phantom
    p = thorax_phantom((65, 128, 128), (5., 3., 3.), seed=31, noise="cheap", findings=(), contrast=0.); net, hu = (organ_adherence(f(p.ct), p.mask) for f in (net_organs, threshold_organs))
    assert net["lung"]["dice"] > .93 and net["heart"]["dice"] > .85 and net["rib"]["dice"] > hu["rib"]["dice"] and net["vessel"]["dice"] > hu["vessel"]["dice"]


def test_the_packages_net_is_small():
    from fvae_nb.evaluation.adherence import organs_file
    assert organs_file().stat().st_size < 3e6


def test_thresholds_are_those_of_vessels_in_lung_and_of_bone():
    from scipy.ndimage import distance_transform_edt
    ct = ellipsoid_thorax((33, 64, 64), (7., 5.6, 5.6)); plain = threshold_organs(ct).array; lung = (plain == 28) | (plain == 133)
    deep = distance_transform_edt(lung, sampling=ct.spacing) > 15; near = distance_transform_edt(~lung, sampling=ct.spacing); wall = (plain == 200) & (near > 9) & (near < 18); wall[:, :, 22:42] = False
    for where, ident, below, above in ((deep, 133, -610, -590), (wall, 63, 215, 225)):
        at = tuple(np.argwhere(where)[where.sum()//2])
        for hu, found in ((below, False), (above, True)): a = ct.array.copy(); a[at] = hu; assert (threshold_organs(ct.with_array(a)).array[at] == ident) == found, (ident, hu)
