"The first ten minutes: what a person meets who types `fvae` and does not know what next."
import os, socket, subprocess, sys
import pytest
from fvae_nb.running.cli import _typed, app, doctor, main
from fvae_nb.running.jobs import _HOW, job_module, jobs_available, make_params


def said(capsys, *words, code=0):
    got = main(list(words)); out = capsys.readouterr()
    assert got == code, (got, out)
    return out.out + out.err


@pytest.fixture
def alone(monkeypatch, in_tmp):
    "A machine without network, settings, cache or GPU"
    def refuse(*args, **more): raise AssertionError("asked the network")
    for name in ("connect", "connect_ex", "sendto"): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for key in [k for k in os.environ if k.startswith("FVAE_")]: monkeypatch.delenv(key)
    monkeypatch.setenv("FVAE_CACHE", str(in_tmp / "cache"))
    return in_tmp


def test_fvae_alone_helps(capsys):
    text = said(capsys, code=2) if main([]) else said(capsys)
    for command in ("run", "doctor", "samples", "jobs"): assert f"\n  {command} " in text
    assert "Start with `fvae doctor`" in " ".join(text.split())


def test_run_without_a_name_lists_every_job(capsys):
    text = said(capsys, "run", code=2)
    for job in [*jobs_available(), "pipeline"]: assert any(line.split()[:1] == [job] and len(line.split()) > 3 for line in text.splitlines()), job


def test_jobs_tells_one_job(capsys):
    text = said(capsys, "jobs", "reconstruct")
    assert text.startswith("reconstruct: ") and "vae = tiny,dct" in text and "train_denoiser" not in text
    assert "-f table1-lung  The paper's Table 1" in text and "data_root.msd_task06_lung" in text         # presets, and what they need
    assert "one of auto, whole, fused" in said(capsys, "jobs", "generate")                               # a choice is told where the description does not
    assert "-f smoke" in said(capsys, "jobs", "pipeline") and "-f paper" in said(capsys, "jobs", "pipeline")


def test_jobs_alone_is_a_list_a_person_reads(capsys):
    lines = said(capsys, "jobs").splitlines()
    assert [l.split()[0] for l in lines[:-1]] == [*jobs_available(), "pipeline"] and "fvae jobs JOB" in lines[-1]


@pytest.mark.parametrize("job", jobs_available())
def test_a_default_can_be_typed_as_it_is_shown(job):
    "What `fvae jobs JOB` prints after the = is what -p takes; an empty text is '' in a shell"
    plain = job_module(job).Params()
    given = {k: _typed(getattr(plain, k)) for k in type(plain).model_fields if k not in _HOW}
    assert make_params(job, [f"{k}={'' if v == chr(39)*2 else v}" for k, v in given.items()]) == plain


def test_help_of_every_command_is_a_whole_sentence(capsys):
    commands = said(capsys, "--help").split("Commands:")[1]
    assert "status" in commands and "..." not in commands


def test_a_scan_that_is_not_there_is_refused_before_a_run_is_made(in_tmp, capsys):
    text = said(capsys, "run", "reconstruct", "-p", "cases=my_scna.nii.gz", code=2)
    assert "my_scna.nii.gz: no such file or folder" in text and len(text.strip().splitlines()) == 1 and not (in_tmp / "runs").exists()
    assert "sampl: no such file or folder; give scans by path, a .jsonl or .csv manifest, 'sample'" in said(capsys, "run", "reconstruct", "-p", "cases=sampl", code=2)


def test_a_list_typed_as_python_is_told_how_a_list_is_typed(capsys):
    assert "a list takes commas, as -p vae=a,b" in said(capsys, "run", "reconstruct", "-p", "vae=['tiny']", code=2)


@pytest.mark.parametrize("words, told", [
    (["statsu", "x"], "Did you mean 'status'?"), (["docter"], "Did you mean 'doctor'?"), (["run", "recontruct"], "did you mean 'reconstruct'?"), (["jobs", "pge"], "did you mean 'page'?"),
    (["run", "page", "-p", "vea=tiny"], "did you mean 'vae'?"), (["submit", "encod"], "did you mean 'encode'?")])
def test_a_slip_is_answered_with_the_nearest_name(capsys, words, told):
    text = said(capsys, *words, code=2)
    assert told in text and len(text.strip().splitlines()) == 1


def test_a_name_near_nothing_gets_no_guess(capsys):
    assert "id you mean" not in said(capsys, "xyzzy", code=2)


@pytest.mark.parametrize("line, wanted", [("fvae ru", {"run"}), ("fvae run rec", {"reconstruct"}), ("fvae run reconstruct -p ch", {"chunk="}), ("fvae run reconstruct -f table1-l", {"table1-lung"}), ("fvae jobs pag", {"page"})])
def test_tab_completes(line, wanted, tmp_path):
    env = os.environ | {"_FVAE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    out = subprocess.run([sys.executable, "-m", "fvae_nb.running.cli"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert set(out.stdout.split()) == wanted, out.stderr


def test_doctor_never_asks_the_network_and_says_what_to_do(alone, capsys):
    text = said(capsys, "doctor")
    rows = doctor()
    assert {r[0] for r in rows} <= {"works", "to do"} and {"Python", "torch", "packages", "cache", "VAEs", "sample", "Slurm"} <= {r[1] for r in rows}
    assert "tiny, dct" in text and "-> fvae samples" in text and "drawn thorax" in text and "fvae vaes" in text


def test_doctor_finds_what_is_wrong(alone, capsys, monkeypatch):
    (alone / "settings.ini").write_text("[fvae]\ndata_root = nowhere\ndevice = cuda\n")
    (alone / "cache/samples").mkdir(parents=True); (alone / "cache/samples/chest_ct.nii.gz").write_bytes(b"x")
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = said(capsys, "doctor", code=1)
    assert "nowhere is not a folder" in text and "correct data_root in" in text
    assert "torch sees none" in text and "2 to mend" in text and "-> fvae samples" not in text


def test_doctor_reads_broken_settings_without_falling(alone, capsys):
    (alone / "settings.ini").write_text("[fvae]\ndata_rot = x\n")
    assert "did you mean 'data_root'?" in said(capsys, "doctor", code=1)


def test_doctor_names_a_package_that_is_missing(alone, capsys, monkeypatch):
    import importlib.metadata as meta
    true = meta.version
    def version(name):
        if name == "monai": raise meta.PackageNotFoundError(name)
        return "0.1" if name == "numpy" else true(name)
    monkeypatch.setattr(meta, "version", version)
    text = said(capsys, "doctor", code=1)
    assert "missing or too old: numpy>=2, monai>=1.5" in text and "pip install 'numpy>=2' 'monai>=1.5'" in text
