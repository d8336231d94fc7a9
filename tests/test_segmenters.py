"DynUNet and nnU-Net: the same call, the same grid, the words that the release says."
import json, os, stat, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from fvae_nb.augmentation.segmenters import NNUNet, RECIPES, Recipe, Segmenter, build_net, cut_patch, load_segmenter, plan_levels, score, to_grid, train_nnunet, train_segmenter
from fvae_nb.data.ct import DataError, ct_volume

TINY = replace(RECIPES["small"], patch=(8, 16, 16), filters=(4, 8, 8), steps=2)


def ball(seed, shape=(8, 24, 24), spacing=(5., 2., 2.)):
    rng = np.random.default_rng(seed); at = [rng.uniform(.35, .65) * n for n in shape]
    inside = sum(((np.indices(shape)[i] - at[i]) * spacing[i])**2 for i in range(3)) < 9**2
    ct = ct_volume(np.where(inside, 60, -60).astype(np.float32) + rng.normal(0, 20, shape).astype(np.float32), spacing, f"b{seed}")
    return ct, ct.with_array(inside.astype(np.uint8))


def test_the_same_seed_gives_the_same_net_and_another_gives_another():
    scans = {f"b{s}": ball(s) for s in range(3)}
    a, b, c = (train_segmenter(scans, ["ball"], TINY, seed=s)[0] for s in (0, 0, 1))
    first = lambda s: next(iter(s.net.parameters())).detach().numpy()
    assert np.array_equal(first(a), first(b)) and not np.array_equal(first(a), first(c))


def test_replacing_a_scan_by_itself_changes_nothing():
    "Views differ in the images alone: with T = id all three arms are one"
    scans = {f"b{s}": ball(s) for s in range(3)}; same = {k: v[0] for k, v in scans.items()}
    losses = [train_segmenter(scans, ["ball"], TINY, view, same)[1] for view in ("real", "replace", "add")]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("shape, spacing", [((5, 20, 20), (5., 2., 2.)), ((9, 30, 17), (4., 1.5, 2.5)), ((20, 40, 40), (2., 1., 1.))])
def test_labels_come_back_on_the_scans_own_grid(shape, spacing):
    net, _ = train_segmenter({"b0": ball(0), "b1": ball(1)}, ["ball"], replace(TINY, spacing_mm=(5., 2., 2.)))
    ct, _ = ball(3, shape, spacing)
    found = net(ct)
    assert found.shape == ct.shape and np.array_equal(found.affine, ct.affine) and found.array.dtype == np.uint8


def test_a_saved_segmenter_answers_alike(tmp_path):
    net, _ = train_segmenter({"b0": ball(0), "b1": ball(1)}, ["a", "b"], TINY)
    again = load_segmenter(net.save(tmp_path / "n.safetensors")); ct, _ = ball(5)
    assert np.array_equal(net(ct).array, again(ct).array) and again.labels == ("a", "b")
    with pytest.raises(DataError, match="no such segmenter"): load_segmenter(tmp_path / "absent.safetensors")


def test_bad_input_has_one_clear_error():
    scans = {"b0": ball(0), "b1": ball(1, spacing=(5., 3., 2.))}
    with pytest.raises(DataError, match="set spacing_mm"): train_segmenter(scans, ["ball"], TINY)
    with pytest.raises(DataError, match="multiples of|cannot be halved|too small"): train_segmenter({"b0": ball(0)}, ["ball"], replace(TINY, patch=(8, 15, 15)))
    with pytest.raises(DataError, match="no reconstruction of b0"): train_segmenter({"b0": ball(0)}, ["ball"], TINY, "replace", {})
    with pytest.raises(DataError, match="at least 3"): train_segmenter({"b0": ball(0)}, ["ball"], replace(TINY, filters=(4, 8)))
    ct, mask = ball(0)
    with pytest.raises(DataError): to_grid(ct, ct_volume(mask.array[1:], mask.spacing), TINY)


@pytest.mark.parametrize("seed", range(6))
def test_a_patch_is_the_scans_own_voxels(seed):
    image = np.random.default_rng(0).normal(size=(9, 20, 21)).astype(np.float32); label = (image > 1.5).astype(np.uint8)
    for patch in ((8, 16, 16), (16, 16, 32)):
        x, y = cut_patch(image, label, replace(TINY, patch=patch, shift=0.), seed)
        inside = x != -1
        assert x.shape == y.shape == patch and np.isin(x[inside], image).all() and ((x > 1.5) == (y > 0)).all()


def test_nnunets_rule_for_strides():
    assert plan_levels((1., 1., 1.), (96, 96, 96), 5)[1] == [[1, 1, 1]] + [[2, 2, 2]]*4
    kernels, strides = plan_levels((5., .8, .8), (16, 64, 64), 4)
    assert kernels[0] == [1, 3, 3] and strides[1] == [1, 2, 2] and kernels[-1] == [3, 3, 3]
    kernels, strides = plan_levels((5., 3., 3.), (8, 48, 48), 4)              # slices come to be the finest axis: 10, 24, 24 mm at the bottom, which sees all axes still
    assert kernels == [[3, 3, 3]]*4 and strides == [[1, 1, 1], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
    net = build_net(replace(RECIPES["small"], patch=(8, 48, 48)), (5., 3., 3.), 1)
    assert sum(p.numel() for p in {id(p): p for p in net.parameters()}.values()) == 340_522


def threshold_net(recipe, spacing, level=0.):
    "A net that knows one thing: label 1 where the picture lies above `level`"
    import torch
    class Above(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.tensor(20.))
        def forward(self, x): return torch.cat([-self.w*(x - level), self.w*(x - level)], 1)
    return Segmenter(Above(), recipe, spacing, ["bright"])


@pytest.mark.parametrize("grid", [None, (5., 2., 2.), (2.5, 3., 1.2)])
@pytest.mark.parametrize("shape, spacing, low, high", [((9, 30, 26), (5., 2., 2.), (1, 3, 12), (4, 12, 24)), ((24, 40, 34), (2., 1.5, 2.5), (14, 4, 20), (22, 18, 31)), ((6, 12, 14), (5., 2., 2.), (0, 0, 0), (3, 6, 5))])
def test_labels_lie_where_the_scan_has_them(shape, spacing, low, high, grid):
    "Windows, air around small scans, resampling there and back: a box off centre in every axis stays where it is"
    box = np.zeros(shape, np.uint8); box[tuple(map(slice, low, high))] = 1
    ct = ct_volume(np.where(box, 800, -800).astype(np.float32), spacing)
    net = threshold_net(replace(TINY, spacing_mm=grid), grid or spacing); found = net(ct).array
    middle = lambda m: np.argwhere(m).mean(0)
    assert (found == box).all() if grid is None else 2*(found*box).sum()/(found.sum() + box.sum()) > .85 and np.abs((middle(found) - middle(box))*spacing).max() < .5*max(*spacing, *grid)


def test_surface_scores_are_in_millimetres():
    ct, _ = ball(0, (12, 30, 30), (5., 2., 1.)); box = np.zeros(ct.shape, np.uint8); box[3:8, 8:20, 8:20] = 1
    truth = ct.with_array(box); moved = lambda axis: ct.with_array(np.roll(box, 1, axis)); nsd = lambda axis, mm: score(truth, moved(axis), ["a"], mm)["nsd.a"]
    assert nsd(2, 1.01) == nsd(1, 2.01) == nsd(0, 5.01) == 100 and max(nsd(1, 1.5), nsd(0, 4.5)) < 99
    from fvae_nb.metrics.masks import surface_dice
    assert nsd(0, 4.5) == pytest.approx(100*surface_dice(box > 0, np.roll(box, 1, 0) > 0, (5., 2., 1.), 4.5))


def test_scores_of_empty_masks():
    ct, mask = ball(0); none = mask.with_array(mask.array * 0)
    s = score(none, none, ["ball"]); assert np.isnan(s["dsc.ball"]) and np.isnan(s["nsd.ball"])
    for pair in ((mask, none), (none, mask)): assert score(*pair, ["ball"]) == {"dsc.ball": 0., "nsd.ball": 0.}


FAKE = '''#!{python}
"Stands in for nnU-Net's commands: notes how it was called and leaves what the real ones leave"
import json, os, shutil, sys
from pathlib import Path
import nibabel as nib
me, words = Path(sys.argv[0]).name, sys.argv[1:]
raw, pre, res = (Path(os.environ["nnUNet_" + k]) for k in ("raw", "preprocessed", "results"))
with open(Path(__file__).parent / "calls.jsonl", "a") as f: f.write(json.dumps([me, *words]) + "\\n")
if (Path(__file__).parent / "fail").exists(): sys.exit("CUDA out of memory")
set_ = "Dataset009_FoundationVAE"
if me == "nnUNetv2_plan_and_preprocess":
    facts = json.loads((raw / set_ / "dataset.json").read_text())
    images, labels = (sorted((raw / set_ / d).glob("*.nii.gz")) for d in ("imagesTr", "labelsTr"))
    assert facts["numTraining"] == len(images) == len(labels) and [i.name.replace("_0000.nii.gz", ".nii.gz") for i in images] == [l.name for l in labels]
    (pre / set_).mkdir(parents=True)
if me == "nnUNetv2_train":
    splits = json.loads((pre / set_ / "splits_final.json").read_text())
    assert len(splits) == 5 and all(s["train"] and s["val"] for s in splits)
    out = res / set_ / (words[words.index("-tr") + 1] + "__nnUNetPlans__" + words[1]) / ("fold_" + words[2]); out.mkdir(parents=True)
    (out / "checkpoint_final.pth").write_bytes(b"net")
if me == "nnUNetv2_predict":
    into = Path(words[words.index("-o") + 1]); into.mkdir()
    for p in Path(words[words.index("-i") + 1]).glob("*_0000.nii.gz"):
        image = nib.load(p); nib.save(nib.Nifti1Image((image.get_fdata() > 0).astype("uint8"), image.affine), into / p.name.replace("_0000", ""))
'''


@pytest.fixture
def fake_nnunet(tmp_path):
    folder = tmp_path / "bin"; folder.mkdir()
    for name in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"):
        (folder / name).write_text(FAKE.replace("{python}", sys.executable)); (folder / name).chmod(0o755)
    return folder


def test_nnunet_from_folder_to_labels(fake_nnunet, tmp_path):
    net = NNUNet(tmp_path / "nn", ("ball",), bin=str(fake_nnunet), device="cpu")
    training = {f"b{s}{end}": (*ball(s), f"p{s}") for s in range(6) for end in ("", "__tiny")}
    calls = lambda: [json.loads(line) for line in (fake_nnunet / "calls.jsonl").read_text().splitlines()]
    train_nnunet(net, training)
    assert calls() == [["nnUNetv2_plan_and_preprocess", "-d", "9", "--verify_dataset_integrity", "-c", "3d_fullres"], ["nnUNetv2_train", "9", "3d_fullres", "0", "-tr", "nnUNetTrainer", "-device", "cpu"]]
    for split in json.loads((net.preprocessed / "splits_final.json").read_text()): assert not {n[:2] for n in split["train"]} & {n[:2] for n in split["val"]}
    train_nnunet(net, training); assert len(calls()) == 2                                     # done is done
    (net.results / "checkpoint_final.pth").rename(net.results / "checkpoint_latest.pth")
    with pytest.raises(DataError): train_nnunet(net, training)                                # our stand-in cannot go on; that it was asked to is what counts
    assert calls()[-1][-1] == "--c"; (net.results / "checkpoint_latest.pth").rename(net.results / "checkpoint_final.pth")
    ct, mask = ball(9); found = net(ct)
    assert np.array_equal(found.array, (np.rint(ct.array) > 0).astype(np.uint8)) and calls()[-1][:3] == ["nnUNetv2_predict", "-d", "9"]
    assert [p.name for p in net.folder.iterdir() if p.name.startswith("tmp")] == []


def test_where_a_patient_has_one_file_the_splits_are_nnunets_own(tmp_path):
    from sklearn.model_selection import KFold
    from fvae_nb.augmentation.segmenters import write_nnunet
    names = [f"b{s}" for s in range(7)]
    splits = write_nnunet(NNUNet(tmp_path, ("ball",)), {n: (*ball(0), n) for n in names})
    theirs = [[names[i] for i in v] for _, v in KFold(5, shuffle=True, random_state=12345).split(names)]
    assert [s["val"] for s in splits] == theirs


def test_what_nnunet_said_last_is_in_the_error(fake_nnunet, tmp_path):
    (fake_nnunet / "fail").touch()
    with pytest.raises(DataError, match="CUDA out of memory.*plan.log"): train_nnunet(NNUNet(tmp_path / "nn", ("ball",), bin=str(fake_nnunet)), {f"b{s}": (*ball(s), f"p{s}") for s in range(5)})
    with pytest.raises(DataError, match="extra \\[nnunet\\]"): train_nnunet(NNUNet(tmp_path / "other", ("ball",), bin=str(tmp_path)), {f"b{s}": (*ball(s), f"p{s}") for s in range(5)})
