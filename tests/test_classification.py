"Table 4: arms that differ in nothing but their scans, labels by case, no test patient's anatomy in training; the job."
import json
import numpy as np
import pytest
import torch
from fvae_nb.data.ct import DataError, ct_volume, write_ct
from fvae_nb.data.findings import COLUMNS
from fvae_nb.data.manifests import Case, write_manifest
from fvae_nb.evaluation import classification as C
from fvae_nb.evaluation.tables import to_markdown
from fvae_nb.jobs import classify
from fvae_nb.running.cases import JobError, done
from fvae_nb.running.jobs import status

PLAN = C.TrainingPlan(steps=6, tune_steps=4, batch=2, every=2)


def boxes(n=8):
    rng = np.random.default_rng(0)
    return {f"c{i}": rng.normal(0, 1, (1, 8, 16, 16)).astype(np.float32) for i in range(n)}, {f"c{i}": rng.integers(0, 2, 18).astype(np.float32) for i in range(n)}


def test_unknown_labels_teach_nothing():
    x, y = boxes(); net = C.make_net("light"); y = {k: np.full(18, np.nan, np.float32) for k in y}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    C.train_classifier(net, x.get, y, ["c0", "c1"], ["c2"], C.TrainingPlan(steps=3, batch=2, every=1, weight_decay=0.))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    half = torch.tensor([[1., float("nan")]]); assert C.known_loss(torch.tensor([[3., -50.]]), half) == pytest.approx(np.log1p(np.exp(-3)))


def test_draws_visit_every_case_and_follow_the_seed():
    d = C.draws([f"c{i}" for i in range(5)], 10, 2, 3)
    flat = sum(d, []); assert len(d) == 10 and all(sorted(flat[5*k:5*k + 5]) == sorted(f"c{i}" for i in range(5)) for k in range(4))
    assert d == C.draws([f"c{i}" for i in range(5)], 10, 2, 3) != C.draws([f"c{i}" for i in range(5)], 10, 2, 4)
    assert d != C.draws([f"c{i}" for i in range(5)], 10, 2, 3, tune=True)


def test_shifts_move_air_in_and_change_no_shape():
    x = np.zeros((1, 9, 30, 60), np.float32) - 1; x[0, 4, 15, 30] = 5
    for seed in range(20):
        for how, v in (("light", x), ("ct-net", np.zeros((20, 32, 32), np.float32))):
            out = C.augment(v.copy(), np.random.default_rng(seed), how); assert out.shape == v.shape and out.flags["C_CONTIGUOUS"]
        out = C.augment(x.copy(), np.random.default_rng(seed)); assert out.max() == 5 and (out == 5).sum() == 1


def test_tuning_never_ends_worse_on_validation_and_takes_all_its_steps():
    x, y = boxes(); net = C.make_net("light", 1); C.train_classifier(net, x.get, y, ["c0", "c1", "c2"], ["c3", "c4"], PLAN)
    start = float(C.known_loss(torch.from_numpy(C.predict(net, x.get, ["c3", "c4"])), torch.from_numpy(np.stack([y["c3"], y["c4"]]))))
    facts = C.train_classifier(net, x.get, y, ["c0", "c1", "c5"], ["c3", "c4"], PLAN, tune=True)
    end = float(C.known_loss(torch.from_numpy(C.predict(net, x.get, ["c3", "c4"])), torch.from_numpy(np.stack([y["c3"], y["c4"]]))))
    assert facts["steps"] == 4 and end <= start + 1e-6 and facts["best"] == pytest.approx(end, abs=1e-5)
    with pytest.raises(DataError, match="in training and validation"): C.train_classifier(net, x.get, y, ["c0"], ["c0"], PLAN)
    with pytest.raises(DataError, match="0 validation"): C.train_classifier(net, x.get, y, ["c0"], [], PLAN)


def test_patience_ends_the_first_training_alone():
    x, y = boxes(); net = C.make_net("light", 1); plan = C.TrainingPlan(steps=40, tune_steps=6, batch=2, every=1, lr=.5, tune_lr=.5, patience=2)
    assert C.train_classifier(net, x.get, y, ["c0", "c1"], ["c2"], plan)["steps"] < 40
    assert C.train_classifier(net, x.get, y, ["c0", "c1"], ["c2"], plan, tune=True)["steps"] == 6


def test_table_knows_single_class_labels_and_pairs_the_arms():
    rng = np.random.default_rng(0); labels = rng.integers(0, 2, (40, 18)).astype(float); labels[:, 5] = 0
    good, poor = labels + rng.normal(0, .5, labels.shape), rng.normal(0, 1, labels.shape)
    arms = C.compare_arms(labels, {"real": poor, "control": poor, "drawn": good}, [f"p{i//2}" for i in range(40)], 100)
    assert arms["drawn"]["macro"]["labels"] == 17 and arms["drawn"]["macro"]["left_out"] == [COLUMNS[5]] and arms["drawn"]["patients"] == 20
    assert arms["drawn"]["over_control"]["low"] > 0 and arms["control"]["over_real"]["gain"] == 0 and "over_control" not in arms["control"]
    text = to_markdown(C.table4(arms)); assert "*70.71*" in text and "Hernia" not in text.split("\n")[2] and "no control" in text


def test_ct_net_can_be_trained():
    net = C.make_net("ct-net", 0); assert sum(p.numel() for p in net.parameters()) > 11e6 and all(p.requires_grad for p in net.parameters())
    assert C.PLANS["ct-net"].optimiser == "sgd" and C.PLANS["ct-net"].patience == 15


def cohort(folder):
    "Six patients of two kinds, labels half known; scans drawn from two training and one test case"
    rows = []; (folder / "made").mkdir()
    for n in range(6):
        hu = np.full((8, 16, 16), 30., np.float32); hu[0, :2] = 400; hu[:, 4:12, 4:12] = -850; hu[2:6, 6:9, 6:9] = 200 if n % 2 else -400; hu[:, 12:] = -1000
        ct = ct_volume(hu, (5., 8., 8.)); write_ct(ct, folder / f"c{n}.nii.gz")
        rows.append(Case(id=f"c{n}", patient=f"p{n}", dataset="other", split=("train", "train", "val", "test", "test", "train")[n], ct=f"c{n}.nii.gz", hu_mode="hu", licence="Apache-2.0", source="drawn",
                         findings={COLUMNS[0]: n % 2, COLUMNS[1]: None}, synthetic=True))
        if n < 2: write_ct(ct_volume(hu, (5., 8., 8.), synthetic=True), folder / f"made/c{n}_SYNTHETIC.nii.gz")
    write_manifest(rows, folder / "m.jsonl")


def params(folder, **given): return classify.Params(**(dict(run=str(folder / "run"), real=str(folder / "m.jsonl"), generated=[f"mine={folder/'made'}"], box=(8, 16, 16), steps=3, tune_steps=2, every=1, batch=2, draws=20, device="cpu") | given))


def test_the_job_trains_every_arm_and_says_what_it_was_given(tmp_path):
    cohort(tmp_path); run = classify.run(params(tmp_path))
    assert {u.model for u in run.units} == {"real", "control", "mine"} and status(run.folder)["done"] == 3
    held = {u.model: json.loads((run.folder / done(run, u)["payload"]).read_text()) for u in run.units}
    assert held["mine"]["cases"] == ["c3", "c4"] and held["mine"]["labels"][0][:3] == [1, None, None]
    assert held["real"]["training"]["steps"] == 3 and held["control"]["training"]["steps"] == held["mine"]["training"]["steps"] == 2
    assert held["control"]["training"]["curve"] != held["mine"]["training"]["curve"]           # the scores may be those of the weights both began with
    table = (run.folder / "tables/table4.md").read_text(); assert "3 real training scans, 2 of mine" in table and "MedMat" in table
    before = {p: p.read_bytes() for p in (run.folder / "scores").rglob("*.json")}
    classify.run(params(tmp_path, overwrite=True)); assert all(p.read_bytes() == b for p, b in before.items())


def test_a_scan_drawn_from_a_test_case_is_refused(tmp_path):
    cohort(tmp_path); (tmp_path / "made/c1_SYNTHETIC.nii.gz").rename(tmp_path / "made/c3_SYNTHETIC.nii.gz")
    with pytest.raises(JobError, match="drawn from c3, a test case"): classify.cases(params(tmp_path))
    (tmp_path / "made/c3_SYNTHETIC.nii.gz").rename(tmp_path / "made/c4-2_SYNTHETIC.nii.gz")
    with pytest.raises(JobError, match="drawn from c4, a test case"): classify.cases(params(tmp_path))
    with pytest.raises(JobError, match="needs real = phantom"): classify.cases(params(tmp_path, generated=["phantom"]))


def test_the_further_steps_see_other_batches_and_other_shifts():
    x, y = boxes(); seen = {}
    for tune in (False, True):
        kept = seen[tune] = []; net = C.make_net("light"); net.register_forward_pre_hook(lambda m, a: kept.append(a[0].clone()) if m.training else None)
        C.train_classifier(net, x.get, y, ["c0"], ["c2"], C.TrainingPlan(steps=12, tune_steps=12, batch=1, every=12), tune=tune)     # one case: the order is no difference, the shifts are
    assert len(seen[True]) == len(seen[False]) == 12 and sum(torch.equal(a, b) for a, b in zip(seen[False], seen[True])) < 9


def test_dropout_follows_the_seed_and_leaves_the_caller_alone():
    x, y = boxes()
    class Drop(torch.nn.Module):
        def __init__(self): super().__init__(); self.f = torch.nn.Linear(8*16*16, 18); self.masks = []
        def forward(self, v):
            v = torch.nn.functional.dropout(v.flatten(1), .5, self.training)
            if self.training: self.masks.append((v == 0).clone())
            return self.f(v)
    def once(seed, tune=False):
        net = Drop(); C.train_classifier(net, x.get, y, ["c0", "c1"], ["c2"], PLAN, tune, seed); return net.masks[0]
    torch.manual_seed(5); a = torch.rand(1); torch.manual_seed(5); first = once(0); once(0)
    b = torch.rand(1); torch.manual_seed(9); assert torch.equal(first, once(0)) and not torch.equal(first, once(1)) and not torch.equal(first, once(0, True))
    torch.manual_seed(5); net = Drop(); before = torch.get_rng_state(); C.train_classifier(net, x.get, y, ["c0", "c1"], ["c2"], PLAN); assert torch.equal(before, torch.get_rng_state())


def test_the_further_steps_have_their_own_rate():
    x, y = boxes(); plan = C.TrainingPlan(steps=4, tune_steps=4, batch=2, every=2, lr=0., tune_lr=1e-2)
    assert len({v for _, _, v in C.train_classifier(C.make_net("light", 1), x.get, y, ["c0", "c1"], ["c2"], plan)["curve"]}) == 1
    assert len({v for _, _, v in C.train_classifier(C.make_net("light", 1), x.get, y, ["c0", "c1"], ["c2"], plan, tune=True)["curve"]}) == 2


def test_the_light_net_sees_minus_1000_to_200():
    seen = C.light_input(ct_volume(np.repeat(np.array([-1500., -1000, -400, 200, 900], np.float32), 16).reshape(5, 4, 4), (5., 5., 5.)), (5, 4, 4))
    assert seen[0, :, 0, 0] == pytest.approx([-.449, -.449, .051, .551, .551], abs=1e-5)


def test_table_says_on_how_many_draws_it_rests():
    rng = np.random.default_rng(0); labels = rng.integers(0, 2, (20, 18)).astype(float); labels[:, 3] = np.arange(20) == 0; s = rng.normal(0, 1, labels.shape)
    arms = C.compare_arms(labels, {"real": s, "control": s}, None, 200); used = arms["real"]["macro"]["draws"]
    assert 90 < used < 160 and f"from {used} of 200 draws" in to_markdown(C.table4(arms)) and arms["control"]["over_real"]["draws"] == used
    labels[:, 3] = labels[:, 4]; assert "of 200 draws" not in to_markdown(C.table4(C.compare_arms(labels, {"real": s}, None, 200)))


def test_the_job_names_whole_folders_and_reads_by_convention(tmp_path, monkeypatch):
    import nibabel as nib
    cohort(tmp_path); monkeypatch.chdir(tmp_path)
    assert params(tmp_path, generated=["mine=made"]).generated == [f"mine={tmp_path/'made'}"] and params(tmp_path, generated=["made", "phantom"]).generated == [str(tmp_path / "made"), "phantom"]
    for p in (tmp_path / "made").iterdir():                                                  # as GenerateCT: HU/1000, no voxel size
        a = np.asarray(nib.load(p).dataobj); nib.save(nib.Nifti1Image((a/1000).astype(np.float32), np.eye(4)), p)
    given = params(tmp_path, convention="generatect", spacing=(5., 8., 8.)); case = classify.cases(given)[0][0]; pool = classify.Pool(given, case)
    assert np.allclose(pool("mine:c1"), pool("c1"), atol=1e-4)
    with pytest.raises(DataError, match="not HU|no chest CT"): classify.Pool(params(tmp_path), case)("mine:c1")
    whole = nib.load(tmp_path / "c1.nii.gz"); nib.save(nib.Nifti1Image(np.asarray(whole.dataobj)[::2, ::2].astype(np.int16), whole.affine), tmp_path / "made/c1_SYNTHETIC.nii.gz")
    release = classify.Pool(params(tmp_path, convention="foundation-vae"), case); assert release._scan(release.rows["mine:c1"]).spacing == pytest.approx((5., 16., 16.))     # read beside the scan it was drawn from
    with pytest.raises(JobError, match="convention = 'medsin'"): classify.cases(params(tmp_path, convention="medsin"))


def test_a_file_for_the_first_part_alone_is_refused(tmp_path):
    from fvae_nb.evaluation.ct_net import CTNet
    from fvae_nb.vaes.interface import WeightsError
    torch.save({k: v for k, v in CTNet().state_dict().items() if k.startswith("features.")}, tmp_path / "imagenet.pt")
    with pytest.raises(WeightsError, match="missing"): C.make_net("ct-net", 0, tmp_path / "imagenet.pt")


def test_the_further_steps_take_the_cases_in_another_order():
    x, y = boxes(); train = [c for c in x if c != "c2"]; order = {}
    for tune in (False, True):
        asked = []; C.train_classifier(C.make_net("light"), lambda i: (asked.append(i), x[i])[1], y, train, ["c2"], C.TrainingPlan(steps=12, tune_steps=12, batch=1, every=12), tune=tune); order[tune] = [i for i in asked if i != "c2"]
    assert len(order[True]) == 12 and order[True] != order[False] and order[False] == [i for step in C.draws(train, 12, 1, 0) for i in step]
