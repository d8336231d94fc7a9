"The Frechet distance agrees with scipy and MONAI, carries its floor, and says when it means nothing."
import json, math, warnings
import numpy as np
import pytest
from hypothesis import given, settings as hsettings, strategies as st
from conftest import FIXTURES
from fvae_nb.data.ct import DataError
from fvae_nb.metrics.frechet import compare_sets, describe_sets, floor_of, frechet, frechet_strata, kid, mmd_gaussian

STORED = json.loads((FIXTURES / "metrics/metrics.json").read_text())


def feats(n, d, seed, shift=0., scale=1.):
    "The fixture's rule"
    mix = np.random.RandomState(99).standard_normal((d, d))/np.sqrt(d)
    return scale*(np.random.RandomState(seed).standard_normal((n, d)) @ mix) + shift


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient", "four"])
def test_stored_distances(case):
    want = STORED["frechet"][case]; (n, m), d = want["n"], want["dim"]
    x, y = feats(n, d, 1), feats(m, d, 2, .3, 1.2)
    assert frechet(x, y) == pytest.approx(want["svd_form"], rel=1e-9)              # float64 and another summation order
    assert frechet(x, y) == pytest.approx(want["toolkit"], rel=1e-7)               # scipy's root of a singular product is off by 1e-5 of 264
    assert frechet(x, feats(n, d, 3)) == pytest.approx(want["toolkit_same"], rel=1e-6)


def test_monai_agrees():
    import torch
    from monai.metrics import FIDMetric
    x, y = feats(64, 8, 1), feats(48, 8, 2, .3, 1.2)
    assert frechet(x, y) == pytest.approx(float(FIDMetric()(torch.from_numpy(y), torch.from_numpy(x))), rel=1e-6)


def test_stored_kid():
    assert kid(feats(64, 8, 1), feats(48, 8, 2, .3, 1.2)) == pytest.approx(STORED["kid_unbiased_poly3"], rel=1e-9)


@pytest.mark.parametrize("n", [30, 50, 80])
def test_the_floor_of_unit_vectors(n):
    c = np.zeros(512); c[0] = 1
    def unit(rng): v = 2*c + rng.standard_normal((n, 512))/np.sqrt(512); return v/np.linalg.norm(v, axis=1, keepdims=True)
    assert frechet(unit(np.random.default_rng(0)), unit(np.random.default_rng(1))) == pytest.approx(STORED["frechet_floor_unit_512"][str(n)], abs=.015)   # other draws of one distribution


@hsettings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
def test_symmetric_nonnegative_unmoved_by_rotation_and_shift(n, m, d, seed):
    r = np.random.default_rng(seed); x, y = r.standard_normal((n, d)), r.standard_normal((m, d)) + 1
    turn = np.linalg.qr(r.standard_normal((d, d)))[0]
    v = frechet(x, y)
    assert v >= 0 and v == pytest.approx(frechet(y, x), rel=1e-8, abs=1e-8)
    assert v == pytest.approx(frechet(x @ turn + 5, y @ turn + 5), rel=1e-6, abs=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_fewer_than_two_is_nan_and_told():
    x = np.ones((1, 4))
    for measure in (frechet, kid, mmd_gaussian):
        with pytest.warns(UserWarning, match="at least 2"): assert math.isnan(measure(x, np.eye(4)))
    found = compare_sets(x, np.eye(4))
    assert math.isnan(found["value"]) and "at least 2" in found["note"] and "not defined" in describe_sets(found)


def test_every_value_carries_a_floor_at_its_own_n():
    r = np.random.default_rng(0)
    real, made, pool = r.standard_normal((12, 5)), r.standard_normal((12, 5)), r.standard_normal((20, 5))
    with_pool = compare_sets(real, made, pool, draws=5)
    assert (with_pool["floor_n"], with_pool["same_n"], with_pool["note"]) == (12, with_pool["value"], "")
    alone = compare_sets(real, made, draws=5)
    assert alone["floor_n"] == 6 and alone["same_n"] != alone["value"] and alone["note"].startswith("floor at n = 6, not 12")
    assert alone["excess"] == pytest.approx(alone["same_n"] - alone["floor"])
    assert "floor" in describe_sets(alone) and "n = 12" in describe_sets(alone)
    assert floor_of(real, 7)["mean"] != floor_of(real, 7)["mean"]                    # two parts of 7 do not exist in 12


def test_floors_repeat_and_keep_patients_together():
    r = np.random.default_rng(1)
    slices = [c + .05*r.standard_normal((9, 3)) for c in r.standard_normal((8, 3))]
    assert floor_of(slices, 4) == floor_of(slices, 4)
    assert floor_of(slices, 4)["mean"] > 2*floor_of(list(np.concatenate(slices)), 36)["mean"]
    with pytest.raises(DataError, match="one set"): floor_of([np.ones((2, 3)), np.ones((2, 4))], 1)


def test_toolkit_strata_depend_on_order_and_break_on_a_remainder():
    r = np.random.default_rng(2); x, y = r.standard_normal((2, 8, 6))
    assert frechet_strata(x, y) == pytest.approx((frechet(x[:4], y[:4]) + frechet(x[4:], y[4:]))/2)
    assert frechet_strata(x[::-1][[0, 2, 4, 6, 1, 3, 5, 7]], y) != pytest.approx(frechet_strata(x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error"); assert math.isnan(frechet_strata(x[:5], y[:5]))
    with pytest.raises(DataError, match="equal numbers"): frechet_strata(x, y[:5])


@pytest.mark.parametrize("x, y, told", [(np.ones((3, 4)), np.ones((3, 5)), "one extractor"), (np.ones(4), np.ones((3, 4)), "shape"), (np.full((3, 2), np.inf), np.ones((3, 2)), "infinity")])
def test_bad_features(x, y, told):
    with pytest.raises(DataError, match=told): frechet(x, y)


def test_kid_is_unbiased_where_frechet_is_not():
    r = np.random.default_rng(3); values = np.array([[kid(*(s := r.standard_normal((2, 20, 5)))), frechet(*s)] for _ in range(300)])
    assert abs(values[:, 0].mean()) < 3*values[:, 0].std()/np.sqrt(300) and values[:, 1].min() > .3


def test_large_sets_are_drawn_down_and_repeat():
    r = np.random.default_rng(4); x, y = r.standard_normal((2, 600, 3))
    assert kid(x, y, most=100) == kid(x, y, most=100) != kid(x, y)
    assert mmd_gaussian(x, x + 2) > .3 and abs(mmd_gaussian(x, y)) < .01
