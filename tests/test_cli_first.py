"The first ten minutes: what a person meets who types `fvae` and does not know what next."
import os, socket, subprocess, sys
import pytest
from fvae_nb.running.cli import app, doctor, main
from fvae_nb.running.jobs import jobs_available


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
    assert text.startswith("reconstruct: ") and "vae = ['tiny', 'dct']" in text and "train_denoiser" not in text


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
