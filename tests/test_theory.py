"Theorem 1 where every quantity is a number: the bound, the proof's terms, the minimum itself."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from fvae_nb.augmentation.theory import FEATURES, best_parameters, logistic_risk, nodule_patches, patch_features, risk_gap


def task(seed, n=40, d=3):
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(n) % 2, 1, -1)
    return rng.normal(size=(n, d)) + .8*y[:, None]*rng.normal(size=d), y


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(.001, 30), bound=st.floats(.1, 8))
def test_bound_holds_for_any_transform_of_the_features(seed, size, bound):
    phi, y = task(seed)
    gap = risk_gap(phi, phi + size*np.random.default_rng(seed + 1).normal(size=phi.shape), y, bound)
    slack = 1e-6*(1 + gap["bound"])                                      # the minimum is found to about 1e-9
    assert -slack <= gap["excess"] <= gap["sharper"] + slack and gap["sharper"] <= gap["bound"] + slack
    assert gap["b"] <= slack and abs(gap["a"]) <= bound*gap["eps"] + slack and abs(gap["c"]) <= bound*gap["eps"] + slack
    assert gap["a"] + gap["b"] + gap["c"] == pytest.approx(gap["excess"], abs=1e-9)


def test_identity_costs_nothing():
    phi, y = task(0)
    gap = risk_gap(phi, phi.copy(), y, 3.)
    assert gap["eps"] == gap["bound"] == gap["excess"] == 0


@pytest.mark.parametrize("bound", [.3, 1., 5.])
def test_no_parameters_within_the_bound_do_better(bound):
    phi, y = task(3)
    best = best_parameters(phi, y, bound); risk = logistic_risk(best, phi, y)
    assert np.linalg.norm(best[:-1]) <= bound*(1 + 1e-9)
    rng = np.random.default_rng(0)
    for step in (.5, .05, .005):
        for _ in range(300):
            t = best + step*rng.normal(size=best.shape); norm = np.linalg.norm(t[:-1])
            t[:-1] *= min(1, bound/norm)
            assert logistic_risk(t, phi, y) >= risk - 1e-9


def test_separable_data_have_a_minimum_because_the_weights_are_bounded():
    phi, y = np.array([[2.], [-2.]]), np.array([1, -1])
    best = best_parameters(phi, y, 10.)
    assert np.linalg.norm(best[:-1]) == pytest.approx(10., rel=1e-6) and logistic_risk(best, phi, y) < 1e-8


def test_exchanged_classes_reach_a_quarter_of_the_bound():
    phi, y = np.array([[1.], [-1.]]), np.array([1, -1])
    for bound in (.5, 2., 7.):
        gap = risk_gap(phi, -phi, y, bound)
        assert gap["excess"] == pytest.approx(bound, rel=1e-4) and gap["bound"] == pytest.approx(4*bound)


def test_loss_is_lipschitz_in_the_features_with_the_norm_of_the_weights():
    rng = np.random.default_rng(5)
    for _ in range(200):
        w, b, p, q, y = rng.normal(size=4)*3, rng.normal(), rng.normal(size=4)*5, rng.normal(size=4)*5, rng.choice([-1, 1])
        theta = np.append(w, b)
        change = abs(logistic_risk(theta, p[None], np.array([y])) - logistic_risk(theta, q[None], np.array([y])))
        assert change <= np.linalg.norm(w)*np.linalg.norm(p - q) + 1e-12


def test_patches_are_the_seeds_and_the_task_can_be_learned():
    sheet, y = nodule_patches(6, seed=2); again, _ = nodule_patches(6, seed=2); other, _ = nodule_patches(6, seed=3)
    assert np.array_equal(sheet.array, again.array) and not np.array_equal(sheet.array, other.array) and sheet.synthetic
    phi = patch_features(sheet)
    assert phi.shape == (36, len(FEATURES)) and np.allclose(phi.mean(0), 0) and np.allclose(phi.std(0), 1) and (y == 1).sum() == 18
    best = best_parameters(phi, y, 4.)
    assert logistic_risk(best, phi, y) < .5                               # a coin has 0.693


def test_features_follow_their_patch():
    "Row by row: what changes in one patch changes in one row only"
    sheet, _ = nodule_patches(4)
    x = sheet.array.copy(); x[:, 32:64, 64:96] += 200
    moved = np.abs(patch_features(sheet.with_array(x), sheet) - patch_features(sheet)).max(1)
    assert np.flatnonzero(moved > 1e-6).tolist() == [1*4 + 2]


@pytest.mark.parametrize("call, words", [(lambda phi, y: risk_gap(phi, phi[:-1], y, 1.), "same patches"), (lambda phi, y: best_parameters(phi, y, 0), "above 0"), (lambda phi, y: best_parameters(phi, y, float("nan")), "above 0")])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words): call(*task(0))
