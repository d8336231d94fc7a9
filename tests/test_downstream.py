"Downstream segmentation and the ablation: arms that differ in one thing each, and the job that drives one generator's conditions."
import json
from dataclasses import replace
import numpy as np
import pytest
from fvae_nb.augmentation.segmenters import RECIPES
from fvae_nb.data.ct import DataError, ct_volume, read_ct, read_mask, write_ct
from fvae_nb.data.manifests import Case, write_manifest
from fvae_nb.evaluation import segmentation as S
from fvae_nb.evaluation.tables import to_markdown
from fvae_nb.jobs import ablate, generate
from fvae_nb.running.cases import JobError, Unit, done

RECIPE = replace(RECIPES["small"], patch=(16, 16, 16), filters=(8, 8, 8), steps=2, batch=1)


def pair(seed, synthetic=False):
    rng = np.random.default_rng(seed); label = np.zeros((16, 16, 16), np.uint8); a = rng.integers(2, 8, 3); label[a[0]:a[0] + 6, a[1]:a[1] + 6, a[2]:a[2] + 6] = 1
    ct = ct_volume((label*400. - 300 + rng.normal(0, 50, label.shape)).astype(np.float32), (2., 2., 2.), f"s{seed}", synthetic); return ct, ct.with_array(label)


def test_four_arms_differ_in_one_thing_each():
    real, made, test = {f"r{i}": pair(i) for i in range(2)}, {f"g{i}": pair(i + 10, True) for i in range(3)}, {"t0": pair(20), "t1": pair(21)}
    seen = []; arms = S.compare_training(real, made, test, ["box"], RECIPE, tell=lambda arm, step, steps, loss: seen.append((arm, steps)))
    assert {a: (v["pairs"], v["steps"]) for a, v in arms.items()} == {"real": (2, 2), "generated": (3, 2), "both": (5, 5), "control": (2, 5)}
    assert set(seen) == {("real", 2), ("generated", 2), ("both", 5), ("control", 5)}
    assert [r["case"] for r in arms["both"]["rows"]] == ["t0", "t1"] and all(0 <= r["dsc.box"] <= 100 for v in arms.values() for r in v["rows"])
    again = S.compare_training(real, made, test, ["box"], RECIPE, arms=["real"]); assert again["real"]["rows"] == arms["real"]["rows"]
    text = to_markdown(S.training_table(arms)); assert "box: Dice over control" in text and "Tested on 2" in text
    with pytest.raises(DataError, match="in training and test"): S.compare_training(real, made, real, ["box"], RECIPE)
    with pytest.raises(DataError, match="not marked SYNTHETIC"): S.compare_training(real, {"x": pair(5)}, test, ["box"], RECIPE)
    with pytest.raises(DataError, match="no test pairs"): S.compare_training(real, made, {}, ["box"], RECIPE)


def test_gain_is_paired():
    a = [dict(case=str(i), k=float(10*i)) for i in range(8)]; b = [dict(case=str(i), k=10.*i + 2) for i in reversed(range(8))]
    g = S.gain(a, b, "k"); assert (g["mean"], g["low"], g["high"], g["n"]) == (2., 2., 2., 8)
    assert S.gain(a, [], "k")["n"] == 0


@pytest.fixture
def manifest(tmp_path):
    "One diseased case of two findings, one healthy"
    rows = []
    for n in range(2):
        organs = np.full((9, 32, 32), 200, np.uint8); organs[:, :3] = 0; organs[:, 8:24, 6:26] = 30
        ct = ct_volume(np.select([organs == 0, organs == 30], [-1000., -850.], 40.).astype(np.float32) + np.arange(32, dtype=np.float32), (5., 3., 3.), synthetic=True)
        masks = dict(organ=f"c{n}_organ.nii.gz", source_map="table7"); write_ct(ct.with_array(organs), tmp_path / masks["organ"])
        if n == 0:
            big, small = np.zeros((2, *organs.shape), np.uint8); big[2:7, 10:20, 8:14] = 1; small[4, 12:14, 20:22] = 1
            for k, m in (("big", big), ("small", small)): write_ct(ct.with_array(m), tmp_path / f"{k}.nii.gz")
            hu = np.where(big > 0, 20, np.where(small > 0, 60, ct.array)).astype(np.float32); ct = ct.with_array(hu)
            masks["disease"] = [dict(path="small.nii.gz", channel=0, finding="Lung nodule", rex_code="2d", disease_class=161, text="Small nodule"), dict(path="big.nii.gz", channel=0, finding="Pleural effusion", rex_code="2e", disease_class=159, text="Large effusion")]
        write_ct(ct, tmp_path / f"c{n}.nii.gz")
        rows.append(Case(id=f"c{n}", patient=f"p{n}", dataset="other", split="test", ct=f"c{n}.nii.gz", hu_mode="hu", licence="Apache-2.0", source="drawn", masks=masks, report=dict(findings="Effusion and nodule.", impression="Both."), synthetic=True))
    write_manifest(rows, tmp_path / "m.jsonl"); return tmp_path / "m.jsonl"


def test_what_each_arm_is_told(manifest, tmp_path):
    p = ablate.Params(masks=str(manifest), generator="tiny-random", text="none"); cases, arms = ablate.cases(p)
    assert [c["id"] for c in cases] == ["c0"] and arms == ["organ", "single", "multi"]             # a healthy case cannot tell arms apart
    _, disease = generate._maps(cases[0], p); ids = lambda d: set() if d is None else set(np.unique(d.array).tolist()) - {0}
    told = {a: ablate.asked(a, disease, cases[0]) for a in arms}
    assert {a: (ids(t[0]), t[1], t[2]) for a, t in told.items()} == {"organ": (set(), "Effusion and nodule. Both.", 259), "single": ({259}, "Large effusion", 259), "multi": ({259, 261}, "Effusion and nodule. Both.", 259)}


def test_the_job_draws_every_arm_from_one_noise_and_fills_table_5(manifest, tmp_path):
    p = ablate.Params(run=str(tmp_path / "run"), masks=str(manifest), generator="tiny", text="none", steps=2, volume_features="none", slice_features="none", device="cpu")
    run = ablate.run(p); side = {u.model: done(run, u) for u in run.units}
    assert all(side.values()) and {s["metrics"]["finding"] for s in side.values()} == {259} and side["single"]["metrics"]["prompt"] == "Large effusion"
    masks = {a: set(np.unique(read_mask(generate._payload(run, Unit(a, "c0")).with_name("c0_SYNTHETIC_mask.nii.gz")).array).tolist()) for a in side}
    assert 259 not in masks["organ"] and 261 not in masks["single"] and {259, 261} <= masks["multi"]
    made = {a: read_ct(generate._payload(run, Unit(a, "c0"))) for a in side}; assert all(v.synthetic for v in made.values()) and not np.array_equal(made["organ"].array, made["multi"].array)
    held = json.loads((run.folder / "ablation.json").read_text()); assert list(held["arms"]) == ["organ", "single", "multi"] and held["arms"]["multi"]["lesions"]["n"] == 1 and len(held["inputs_sha256"]) == 64
    assert "*51.49*" in (run.folder / "tables/table5.md").read_text()
    with pytest.raises(JobError, match="nothing to take away"): ablate.run(p.model_copy(update=dict(run=str(tmp_path / "b"), generator="maisi-v2-random")))


def test_without_diseases_there_is_nothing_to_ablate(tmp_path):
    with pytest.raises(JobError, match="no case has a disease mask"): ablate.cases(ablate.Params(masks="phantom", phantoms=1, seed=1))
