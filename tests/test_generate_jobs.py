"The jobs encode and generate: from a manifest to latents, from masks and words to SYNTHETIC scans."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from fvae_nb.data.ct import ct_volume, read_ct, read_mask, write_ct
from fvae_nb.data.manifests import Case, write_manifest
from fvae_nb.generation.latents import list_latents, read_latents
from fvae_nb.jobs import encode, generate, train_denoiser
from fvae_nb.running.cases import JobError, done
from fvae_nb.running.jobs import make_params, status


def _cohort(folder, count=3):
    "Scans of 9 slices with organ mask, and a nodule in every second; one scan damaged"
    (folder / "data").mkdir()
    rows = []
    for n in range(count):
        rng = np.random.default_rng(n)
        organs = np.full((9, 32, 32), 200, np.uint8); organs[:, :3] = 0; organs[:, 8:24, 6:14 + n] = 30
        hu = np.select([organs == 0, organs == 30], [-900., -850.], 40.) + rng.normal(0, 20, organs.shape)
        ct = ct_volume(np.rint(hu).astype(np.float32), (5., 3., 3.), synthetic=True)
        write_ct(ct, folder / f"data/c{n}.nii.gz"); write_ct(ct.with_array(organs), folder / f"data/c{n}_organ.nii.gz")
        masks = dict(organ=f"data/c{n}_organ.nii.gz", source_map="table7")
        if n % 2 == 0:
            nodule = np.zeros(organs.shape, np.uint8); nodule[3:6, 12:18, 8:12] = 1
            write_ct(ct.with_array(nodule), folder / f"data/c{n}_nodule.nii.gz")
            masks["disease"] = [dict(path=f"data/c{n}_nodule.nii.gz", channel=0, finding="Pulmonary nodules/masses", disease_class=161, text="Nodule (8 mm)")]
        rows.append(Case(id=f"c{n}", patient=f"p{n}", dataset="other", split="val" if n == 1 else "train", ct=f"data/c{n}.nii.gz", hu_mode="hu", licence="Apache-2.0", source="drawn", masks=masks,
                         report=dict(findings="Both lungs are clear.", impression="Normal.") if n % 2 else None, synthetic=True))
    write_manifest(rows, folder / "m.jsonl")
    return folder / "m.jsonl"


def _params(job, folder, **given):
    return make_params(job, [], (), **dict(run=str(folder))).model_copy(update=dict(text="none", device="cpu", **given))


@pytest.fixture
def cohort(tmp_path): return _cohort(tmp_path)


def test_encode_stores_what_the_manifest_says(cohort, tmp_path):
    run = encode.run(_params("encode", tmp_path / "run", manifest=str(cohort)))
    paths = list_latents(run.folder / "latents")
    cases = {p.stem: read_latents(p) for p in paths}
    assert sorted(cases) == ["c0", "c1", "c2"]
    assert (cases["c0"].patient, cases["c1"].split) == ("p0", "val")
    assert (cases["c0"].labels == 261).sum() == 72 and not (cases["c1"].labels >= 250).any()
    assert cases["c0"].meta["prompt"] == "Nodule 8 mm" and cases["c1"].meta["prompt"] == "Both lungs are clear. Normal."
    assert cases["c0"].ct.shape == (16, 3, 4, 4) and cases["c0"].mask.shape == (48, 3, 4, 4) and cases["c0"].text is None
    assert cases["c0"].meta["window"] == [-1000, 1000] and "window" not in encode.Params.model_fields      # all that reads latents takes it for granted
    assert cases["c0"].meta["synthetic"] and str(tmp_path) not in json.dumps(cases["c0"].meta)
    again = encode.run(_params("encode", tmp_path / "again", manifest=str(cohort)))
    for p in paths: assert p.read_bytes() == (again.folder / p.relative_to(run.folder)).read_bytes()
    assert encode.run(_params("encode", tmp_path / "val", manifest=str(cohort), splits=["val"])).units[0].case == "c1"


def test_encode_names_a_damaged_scan_and_does_the_rest(cohort, tmp_path):
    bad = tmp_path / "data/c1.nii.gz"; bad.write_bytes(bad.read_bytes()[:200])
    run = encode.run(_params("encode", tmp_path / "run", manifest=str(cohort)))
    state = status(run.folder)
    assert state["done"] == 2 and "c1.nii.gz" in state["failed"][0]["reason"]
    with pytest.raises(JobError, match="no rows of split test"): encode.cases(_params("encode", tmp_path / "x", manifest=str(cohort), splits=["test"]))


def test_encode_refuses_masks_that_changed(cohort, tmp_path):
    params = _params("encode", tmp_path / "run", manifest=str(cohort))
    from fvae_nb.running.jobs import open_run
    open_run("encode", params)
    mask = read_mask(tmp_path / "data/c0_organ.nii.gz"); mask.array[0] = 0; write_ct(mask, tmp_path / "data/c0_organ.nii.gz")
    run = encode.run(params)
    assert "not the files they were" in status(run.folder)["failed"][0]["reason"] and status(run.folder)["done"] == 2


@pytest.mark.parametrize("name", ["organ", "nodule"])
def test_generate_refuses_masks_that_changed(cohort, tmp_path, name):
    "Any mask of a case, not only the first; the scan's own file may be gone"
    from fvae_nb.jobs import ablate
    from fvae_nb.running.jobs import open_run
    params = _params("generate", tmp_path / "run", generator="tiny-random", masks=str(cohort), steps=1)
    open_run("generate", params)
    source = next(c for c in ablate.cases(_params("ablate", tmp_path / "a", generator="tiny-random", masks=str(cohort)))[0] if c["id"] == "c0")
    (tmp_path / "data/c0.nii.gz").unlink()
    generate._maps(source, params)
    path = tmp_path / f"data/c0_{name}.nii.gz"
    mask = read_mask(path); mask.array[4] = 0; write_ct(mask, path)
    run = generate.run(params)
    state = status(run.folder)
    assert state["done"] == 2 and [f["case"] for f in state["failed"]] == ["c0"] and f"c0_{name}.nii.gz: is not the file it was" in state["failed"][0]["reason"]
    with pytest.raises(JobError, match=f"c0_{name}.nii.gz: is not the file it was"): generate._maps(source, params)


def test_a_scan_that_is_read_for_its_body_must_not_change(cohort, tmp_path):
    "No mask says where the body is, so the scan does; the ablation compares with it in any case"
    from fvae_nb.jobs import ablate
    for n in range(3):
        path = tmp_path / f"data/c{n}_organ.nii.gz"; mask = read_mask(path); mask.array[mask.array == 200] = 0; write_ct(mask, path)
    params = _params("generate", tmp_path / "run", generator="tiny-random", masks=str(cohort), steps=1)
    source, compared = generate.cases(params)[0][0], ablate.cases(_params("ablate", tmp_path / "a", generator="tiny-random", masks=str(cohort)))[0][0]
    assert (generate._maps(source, params)[0].array == 200).any() and ablate.real_scan(compared, params).shape == (9, 32, 32)
    path = tmp_path / "data/c0.nii.gz"; ct = read_ct(path); write_ct(ct.with_array(ct.array + 50), path)
    for look in (lambda: generate._maps(source, params), lambda: ablate.real_scan(compared, params)):
        with pytest.raises(JobError, match="c0.nii.gz: is not the file it was"): look()


def test_generate_from_a_manifest(cohort, tmp_path):
    params = _params("generate", tmp_path / "run", generator="tiny-random", masks=str(cohort), steps=2)
    run = generate.run(params)
    for n in range(3):
        path = run.folder / f"volumes/tiny-random/c{n}_SYNTHETIC.nii.gz"
        out, image, organ = read_ct(path), nib.load(path), nib.load(tmp_path / f"data/c{n}_organ.nii.gz")
        assert out.synthetic and b"SYNTHETIC" in bytes(image.header["descrip"]) and image.get_data_dtype() == np.int16
        assert image.shape == organ.shape and np.allclose(image.affine, organ.affine)       # the masks' own grid
        assert -1000 <= out.array.min() and out.array.max() <= 1000
        mask = read_mask(path.with_name(f"c{n}_SYNTHETIC_mask.nii.gz"), out)
        assert ((mask.array == 261).sum() == 72) == (n % 2 == 0)
    side = done(run, run.units[0])
    assert side["metrics"]["prompt"] == "Nodule 8 mm" and "hu_lesion" in side["metrics"]
    (tmp_path / "data/c0.nii.gz").unlink()                                                  # the scan itself is not needed
    again = generate.run(params.model_copy(update=dict(run=str(tmp_path / "again"))))
    a, b = (read_ct(r.folder / "volumes/tiny-random/c0_SYNTHETIC.nii.gz").array for r in (run, again))
    assert np.array_equal(a, b)


def test_generate_from_a_folder_of_painted_maps_with_prompts(tmp_path):
    folder = tmp_path / "maps"; folder.mkdir()
    organs = np.full((5, 16, 48), 200, np.uint16); organs[:, 4:12, 4:40] = 30; organs[2:4, 6:9, 8:14] = 261
    write_ct(ct_volume(organs, (5., 3., 3.)), folder / "a.nii.gz", "int16"); (folder / "a.txt").write_text("Nodule in the right lung.\n")
    params = _params("generate", tmp_path / "run", generator="tiny-random", masks=str(folder), steps=1, samples=2)
    found, models = generate.cases(params)
    assert [c["id"] for c in found] == ["a-1", "a-2"] and found[0]["prompt"] == "Nodule in the right lung." and models == ["tiny-random"]
    run = generate.run(params)
    a, b = (read_ct(run.folder / f"volumes/tiny-random/a-{n}_SYNTHETIC.nii.gz").array for n in (1, 2))
    assert np.abs(a - b).mean() > 5                                                         # two draws, not one twice
    (tmp_path / "p.csv").write_text("Names,Text_prompts\na.nii.gz,\"No nodule.\"\n")
    assert generate.cases(params.model_copy(update=dict(prompts=str(tmp_path / "p.csv"))))[0][0]["prompt"] == "No nodule."
    (tmp_path / "p.csv").write_text("Names,Text_prompts\nb.nii.gz,x\n")
    with pytest.raises(JobError, match="no line for a"): generate.cases(params.model_copy(update=dict(prompts=str(tmp_path / "p.csv"))))


def test_generate_tells_what_is_missing(tmp_path):
    base = _params("generate", tmp_path / "run")
    with pytest.raises(JobError, match="generator is empty"): generate.cases(base.model_copy(update=dict(generator="")))
    with pytest.raises(JobError, match="no label maps"): generate.cases(base.model_copy(update=dict(masks=str(tmp_path))))
    from fvae_nb.vaes.interface import WeightsError
    with pytest.raises(WeightsError, match="official-multi"): generate.run(_params("generate", tmp_path / "r", generator="official-multi", masks="phantom"))


@pytest.mark.parametrize("job", ["encode", "generate"])
def test_presets_are_valid(job):
    names = sorted(p.stem for p in (ROOT / "fvae_nb/_data/presets" / job).glob("*.yaml"))
    assert {"smoke", "paper", "fast", "official-healthy", "official-multi"} <= set(names)
    for name in names: make_params(job, presets=[name])


def test_smoke_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from fvae_nb.running.jobs import run_job
    for job in ("encode", "generate"):
        assert run_job(job, make_params(job, presets=["smoke"], run=str(tmp_path / job)), show=lambda s: None) == 0
    assert len(list((tmp_path / "generate").rglob("*_SYNTHETIC.nii.gz"))) == 2 and (tmp_path / "generate/report.html").exists()


def test_phantom_to_scan(tmp_path):
    "Phantom -> encode -> train_denoiser -> generate, the generator named by its run's folder"
    latents = encode.run(_params("encode", tmp_path / "encode", phantoms=3, phantom_shape=(17, 32, 32)))
    assert len(list_latents(latents.folder / "latents")) == 3
    how = dict(latents=str(latents.folder / "latents"), steps=4, every=2, sample_steps=0, device="cpu", train_split="train", ema=.5)
    trained = train_denoiser.run(make_params("train_denoiser", [], (), run=str(tmp_path / "train")).model_copy(update=how))
    side = done(trained, trained.units[0])["metrics"]
    assert side["steps"] == 4 and side["loss"] > 0 and side["parameters"] > 1e6
    drawn = generate.run(_params("generate", tmp_path / "generate", generator=str(trained.folder), phantoms=1, phantom_shape=(9, 32, 32), steps=2))
    out = read_ct(next(drawn.folder.rglob("phantom000_SYNTHETIC.nii.gz")))
    assert out.synthetic and out.shape == (9, 32, 32) and done(drawn, drawn.units[0])["metrics"]["hu_lung"] is not None
    packed = trained.payload(trained.units[0], "volumes", ".safetensors")
    again = generate.run(_params("generate", tmp_path / "packed", generator=str(packed), phantoms=1, phantom_shape=(9, 32, 32), steps=2))
    assert np.abs(read_ct(next(again.folder.rglob("phantom000_SYNTHETIC.nii.gz"))).array - out.array).mean() < 5      # float16 of the same weights


def test_training_job_killed_and_run_again(cohort, tmp_path):
    "`fvae run train_denoiser` killed in the middle: the same command goes on, with the curve of an undisturbed run"
    latents = encode.run(_params("encode", tmp_path / "encode", manifest=str(cohort))).folder / "latents"
    def command(folder): return [sys.executable, "-m", "fvae_nb.running.cli", "run", "train_denoiser", "-p", f"latents={latents}", "-p", "steps=6", "-p", "every=2", "-p", "sample_steps=0", "-p", "device=cpu", "--run", str(folder)]
    import torch
    env = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))       # the undisturbed run's number, which fixes the order of sums and so their last bits (tests/test_training.py)
    process = subprocess.Popen(command(tmp_path / "killed"), cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    until = time.time() + 120
    while not list((tmp_path / "killed").glob("checkpoints/step-*")) and process.poll() is None and time.time() < until: time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL); said = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, said[-800:]
    assert not list((tmp_path / "killed").glob("volumes/*/*.safetensors"))
    again = subprocess.run(command(tmp_path / "killed"), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-800:] + again.stderr[-800:]
    train_denoiser.run(make_params("train_denoiser", [], (), run=str(tmp_path / "whole")).model_copy(update=dict(latents=str(latents), steps=6, every=2, sample_steps=0, device="cpu")))
    runs = {f: json.loads(sorted((tmp_path / f / "checkpoints").glob("step-*"))[-1].joinpath("config.json").read_text()) for f in ("killed", "whole")}
    assert [r["step"] for r in runs.values()] == [6, 6]
    rows = {f: [{k: v for k, v in row.items() if k != "seconds"} for row in r["curve"]] for f, r in runs.items()}
    assert rows["killed"] == rows["whole"] and len(rows["whole"]) == 3
    a, b = (next((tmp_path / f).glob("volumes/*/*.safetensors")).read_bytes() for f in ("killed", "whole"))
    assert a == b


def test_visibility_is_measured_with_the_scaling_that_training_uses(cohort, tmp_path, monkeypatch):
    "Channels are looked at on two cases, but a deviation is one of all of them"
    from fvae_nb.generation import training
    latents = encode.run(_params("encode", tmp_path / "encode", manifest=str(cohort))).folder / "latents"
    used = []
    def visibility(vae, cases, scaling): used.append((len(cases), scaling)); return [float(c + 1) for c in range(16)]
    monkeypatch.setattr(training, "channel_visibility", visibility)
    params = make_params("train_denoiser", [], (), run=str(tmp_path / "train")).model_copy(update=dict(latents=str(latents), train_split="train", steps=1, every=1, sample_steps=0, device="cpu", visible=1.))
    known, _ = train_denoiser.read_cases(params)
    monkeypatch.setattr(train_denoiser, "read_cases", lambda params: (known + [replace(known[0], ct=3*known[0].ct)], []))
    run = train_denoiser.run(params)
    all_of_them = training.measure_scaling(train_denoiser.read_cases(params)[0])
    assert used == [(2, all_of_them)] and training.load_generator(run.folder).scaling == all_of_them != training.measure_scaling(known)
    assert training.load_generator(run.folder).config["visibility"] == [float(c + 1) for c in range(16)]
    facts = train_denoiser._ready(params, run.folder / "checkpoints")[3]                       # to go on, nothing is measured again
    assert len(used) == 1 and "visibility" not in facts and facts["scaling"] == all_of_them


def test_another_table_of_mask_colours_is_noticed(cohort, tmp_path, monkeypatch):
    from fvae_nb.generation import conditions, sampling
    from fvae_nb.generation.sampling import SamplingError, find_generator, sample
    from fvae_nb.generation.training import TrainingError
    from fvae_nb.vaes.interface import load_vae
    latents = encode.run(_params("encode", tmp_path / "encode", manifest=str(cohort))).folder / "latents"
    code = conditions.code_hash("lattice")
    assert {read_latents(p).meta["mask_code_sha256"] for p in list_latents(latents)} == {code}
    how = dict(latents=str(latents), steps=1, every=1, sample_steps=0, device="cpu")
    params = make_params("train_denoiser", [], (), run=str(tmp_path / "train")).model_copy(update=how)
    train_denoiser.run(params)
    generator = find_generator(str(tmp_path / "train"))
    assert generator.config["mask_code_sha256"] == code
    organs = read_mask(tmp_path / "data/c0_organ.nii.gz")
    monkeypatch.setattr(sampling, "code_hash", lambda name: "0"*64)
    with pytest.raises(SamplingError, match="is not the one this generator was trained with"): sample(generator, load_vae("tiny"), organs)
    monkeypatch.undo()
    from fvae_nb.generation.training import TrainingConfig, train
    from fvae_nb.generation.denoiser import Denoiser
    known, _ = train_denoiser.read_cases(params)
    with pytest.raises(TrainingError, match="another table of mask colours"):
        train(Denoiser(generator.model.config), known, [], tmp_path / "train/checkpoints", TrainingConfig(**generator.config["training"]).model_copy(update=dict(steps=2)), train_denoiser.facts_of(known) | dict(mask_code_sha256="0"*64))


def test_a_long_scan_says_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FVAE_ATTEMPT", str(tmp_path))
    tell = generate._tell(0.)
    for n in (1, 2): tell(n, 4)
    assert "step 1/4" in (said := capsys.readouterr().out) and "step 2/4" in said
    assert [json.loads(line)["n"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [1, 2]
    silent = generate._tell(60.); silent(3, 4)
    assert capsys.readouterr().out == ""
