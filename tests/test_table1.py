"The presets of Table 1 on a tree with MSD's layout."
import json
import nibabel as nib
import numpy as np
import pytest
import torch
from fvae_nb.running.jobs import make_params


@pytest.fixture
def msd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "Task06_Lung/imagesTr"; images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in (1, 3): nib.save(nib.Nifti1Image(rng.normal(0, 300, (32, 40, 9)).round().astype(np.int16), np.diag([.7, .7, 1.2, 1])), images / f"lung_{n:03d}.nii.gz")
    (images / "._lung_001.nii.gz").write_bytes(b"resource fork")
    (tmp_path / "settings.ini").write_text("[fvae]\ndata_root.msd_task06_lung = Task06_Lung\n")
    return tmp_path


def test_preset_names_the_protocol_and_the_dataset(msd):
    params = make_params("reconstruct", presets=["table1-lung"])
    assert (params.protocol, params.table, params.cases) == ("paper", "lung", ["msd_task06_lung"]) and "leanvae" in params.vae
    from fvae_nb.jobs import reconstruct as job
    cases, _ = job.cases(job.Params(vae=["dct"], cases=params.cases))
    assert [c["id"] for c in cases] == ["lung_001", "lung_003"]                      # the hidden file is passed over


def test_missing_dataset_says_which_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path / "settings.ini").write_text("[fvae]\n")
    from fvae_nb.jobs import reconstruct as job
    with pytest.raises(ValueError, match="data_root.msd_task07_pancreas"): job.cases(job.Params(cases=["msd_task07_pancreas"]))


def test_preset_runs_with_the_papers_figures_beside(msd, capsys):
    "Random copies of the VAEs stand in for their weights; tiny and the control are scored"
    from fvae_nb.jobs import reconstruct as job
    from fvae_nb.running.report import build_report
    preset = make_params("reconstruct", presets=["table1-lung"])
    run = job.run(preset.model_copy(update=dict(vae=["tiny", "leanvae-random", "wfvae-random"], control=False, run="out")))
    page = build_report(run).read_text()
    assert "Table 1, lung" in page and "30.93" in page and "77.97" in page and "random weights" in page
    side = json.loads((msd / "out/cases/tiny/lung_001.json").read_text())
    assert side["metrics"]["psnr"] > 10 and "psnr" not in json.loads((msd / "out/cases/wfvae-random/lung_001.json").read_text())["metrics"]
    back = nib.load(msd / "out/volumes/tiny/lung_001.nii.gz")
    assert np.array_equal(back.affine, nib.load(msd / "Task06_Lung/imagesTr/lung_001.nii.gz").affine)


def test_wfvae_is_drawn_in_bfloat16_with_a_seed(msd):
    from fvae_nb.data.ct import read_ct
    from fvae_nb.reconstruction.operator import reconstruct
    from fvae_nb.vaes.interface import load_vae
    vae, ct = load_vae("wfvae-random"), read_ct(msd / "Task06_Lung/imagesTr/lung_001.nii.gz")
    a, b, c = (reconstruct(ct, vae, protocol="paper", seed=s).array for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert next(vae.net.parameters()).dtype == torch.float32                          # the VAE itself is left as it was
    with pytest.raises(ValueError, match="no posterior"): load_vae("tiny").encode(torch.zeros(1, 1, 5, 8, 8), torch.Generator())
