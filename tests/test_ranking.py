"Areas under the curve as scikit-learn has them, intervals over patients, labels without both classes left out and named."
import json, math
import numpy as np
import pytest
from hypothesis import given, settings as hsettings, strategies as st
from sklearn.metrics import roc_auc_score
from conftest import FIXTURES
from fvae_nb.data.ct import DataError
from fvae_nb.metrics.ranking import auroc, ranking, ranking_gain


def test_stored_ties():
    f = json.loads((FIXTURES / "metrics/metrics.json").read_text())["auroc_ties"]
    assert auroc(f["labels"], f["scores"]) == pytest.approx(f["value"], abs=1e-12)


@hsettings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=30))
def test_as_scikit_learn_ties_included(rows):
    y, s = np.array(rows).T
    if len(set(y)) < 2: assert math.isnan(auroc(y, s))
    else:
        assert auroc(y, s) == pytest.approx(roc_auc_score(y, s))
        assert auroc(y, -s) == pytest.approx(1 - auroc(y, s)) and auroc(y, 3*s + 7) == pytest.approx(auroc(y, s))


def test_table_and_macro():
    r = np.random.default_rng(0); y = (r.random((80, 4)) < .3).astype(float); y[:, 3] = 0; y[:5, 0] = np.nan; s = y*.8 + r.standard_normal((80, 4)); s[:5] = 0; s = np.nan_to_num(s)
    out = ranking(y, s, ["a", "b", "c", "none"], draws=200)
    want = [roc_auc_score(y[5:, 0], s[5:, 0]), roc_auc_score(y[:, 1], s[:, 1]), roc_auc_score(y[:, 2], s[:, 2])]
    assert [out["labels"][k]["auroc"] for k in "abc"] == pytest.approx(want)
    assert out["macro"]["auroc"] == pytest.approx(np.mean(want)) and out["macro"]["labels"] == 3 and out["macro"]["left_out"] == ["none"]
    assert math.isnan(out["labels"]["none"]["auroc"]) and out["labels"]["none"]["positives"] == 0
    assert out["labels"]["a"]["positives"] + out["labels"]["a"]["negatives"] == 75
    assert out["macro"] == ranking(y, s, ["a", "b", "c", "none"], draws=200)["macro"]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    from scipy.stats import norm
    r, hits = np.random.default_rng(1), 0
    for i in range(120):
        y = np.repeat([0., 1.], [60, 40]); s = r.standard_normal(100) + y*np.sqrt(2)*norm.ppf(.75)
        low, high = (ranking(y[:, None], s[:, None], draws=200, level=.5, seed=i)["macro"][k] for k in ("low", "high"))
        hits += low <= .75 <= high
    assert .36 < hits/120 < .64                                                          # half of the time; 120 trials have a standard error of .046


def test_repeated_scans_of_a_patient_add_no_certainty():
    r = np.random.default_rng(2); y = (r.random(60) < .4).astype(float); s = y + r.standard_normal(60)
    width = lambda out: out["macro"]["high"] - out["macro"]["low"]
    once = width(ranking(y[:, None], s[:, None], draws=400))
    many, who = np.repeat(y, 5)[:, None], np.repeat(np.arange(60), 5)
    assert width(ranking(many, np.repeat(s, 5)[:, None], patients=who, draws=400)) == pytest.approx(once, rel=.25)
    assert width(ranking(many, np.repeat(s, 5)[:, None], draws=400)) < .6*once


def test_gain_is_paired():
    r = np.random.default_rng(3); y = (r.random((150, 3)) < .3).astype(float); a = y + r.standard_normal((150, 3)); b = a + .3*y
    out = ranking_gain(y, a, b, draws=300)
    assert out["gain"] == pytest.approx(np.mean([auroc(y[:, k], b[:, k]) - auroc(y[:, k], a[:, k]) for k in range(3)]))
    assert out["low"] > 0 and out["high"] - out["low"] < .06                          # unpaired it would be several times wider
    assert ranking_gain(y, a, a, draws=50)["gain"] == 0


@pytest.mark.parametrize("y, s, more, told", [([[0], [2]], [[0], [1]], {}, "labels hold 2"), ([[0, 1]], [[0]], {}, "expected both"), ([[0], [1]], [[0], [math.nan]], {}, "NaN"),
                                              ([[0], [1]], [[0], [1]], dict(patients=["a"]), "patient keys"), ([[0], [1]], [[0], [1]], dict(names=["a", "b"]), "names for")])
def test_bad_input(y, s, more, told):
    with pytest.raises(DataError, match=told): ranking(y, s, draws=5, **more)


def test_a_draw_that_lost_a_class_is_dropped_and_counted():
    r = np.random.default_rng(4); y = np.c_[np.arange(40) < 20, np.arange(40) == 0].astype(float); s = y + r.standard_normal((40, 2))
    out = ranking(y, s, draws=1000); assert .58 < out["macro"]["draws"]/out["draws"] < .68                    # 1 - (39/40)^40
    assert ranking(y[:, :1], s[:, :1], draws=1000)["macro"]["draws"] == 1000 and ranking_gain(y, s, s + y, draws=1000)["draws"] == out["macro"]["draws"]
    assert ranking(y*0, s, draws=50)["macro"]["draws"] == 0
