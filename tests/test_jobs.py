"Jobs through the real command, in processes of their own."
import csv, json, os, re, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from conftest import ROOT
from fvae_nb.data.ct import ct_volume, write_ct

FVAE = Path(sys.executable).with_name("fvae")


def fvae(*words, cwd, code=0, **env):
    run = subprocess.run([FVAE, *map(str, words)], cwd=cwd, capture_output=True, text=True, env=os.environ | {"FVAE_DEVICE": "cpu"} | env, timeout=600)
    assert run.returncode == code, f"exit {run.returncode}, expected {code}\n{run.stdout}\n{run.stderr}"
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    d = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    for n in range(3): write_ct(ct_volume(rng.normal(0, 300, (9, 24, 32)).round().astype(np.float32), (3, 1, 1)), d / f"case{n}.nii.gz")
    (d / "broken.nii.gz").write_bytes((d / "case0.nii.gz").read_bytes()[:-50])
    return d


@pytest.fixture(scope="module")
def finished(scans, tmp_path_factory):
    "A run over three scans and a broken one"
    cwd = tmp_path_factory.mktemp("work")
    said = fvae("run", "reconstruct", "-p", "vae=tiny,dct", "-p", f"cases={scans}", "--run", "out", cwd=cwd, code=1)
    return cwd / "out", said


def test_a_broken_case_is_recorded_and_the_rest_go_on(finished):
    run, said = finished
    assert said.count("FAILED DataError") == 3 and "damaged or truncated gzip" in said
    assert sorted(p.name for p in (run / "volumes/tiny").iterdir()) == ["case0.nii.gz", "case1.nii.gz", "case2.nii.gz"]
    failed = json.loads((run / "failed/tiny/broken.json").read_text())
    assert failed["error"] == "DataError" and failed["times"] == 1
    assert "9 of 12 done, 3 failed, 0 missing" in fvae("status", run, cwd=run.parent, code=1)


def test_the_tree_is_the_designs(finished):
    run, _ = finished
    for name in ("params.json", "cases.json", "provenance.json", "metrics.csv", "summary.json", "report.ipynb", "report.html", "cases/tiny/case0.json"): assert (run / name).is_file(), name
    attempt = next(run.glob("shards/00000/attempt-*"))
    for name in ("job.ipynb", "events.jsonl", "stdout.log", "stderr.log", "attempt.json"): assert (attempt / name).is_file(), name
    assert json.loads((attempt / "job.ipynb").read_text())["metadata"]["fvae"]["status"] == "completed"
    rows = list(csv.DictReader(open(run / "metrics.csv")))
    assert {r["model"] for r in rows} == {"tiny", "dct", "dct-4x8x8-16-causal"} and len(rows) == 9
    assert json.loads((run / "summary.json").read_text())["models"]["tiny"]["psnr"]["n"] == 3


def test_the_same_command_does_nothing_twice(finished, scans):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (run / "volumes").rglob("*.nii.gz")}
    said = fvae("run", "reconstruct", "-p", "vae=tiny,dct", "-p", f"cases={scans}", "--run", "out", cwd=run.parent, code=1)
    assert said.count("done before") == 9
    assert before == {p: p.stat().st_mtime_ns for p in (run / "volumes").rglob("*.nii.gz")}


def test_other_parameters_are_refused_for_the_same_folder(finished, scans):
    run, _ = finished
    assert "differ in" in fvae("run", "reconstruct", "-p", "vae=dct", "-p", f"cases={scans}", "--run", "out", cwd=run.parent, code=2)


def test_results_hold_no_path_of_this_machine_but_the_inputs(finished):
    run, _ = finished
    import socket
    text = (run / "provenance.json").read_text()
    for mine in (str(Path.home()), str(ROOT), str(run.parent), sys.prefix, socket.gethostname()): assert mine not in text, mine


def test_report_is_one_file_without_addresses(finished):
    page = (finished[0] / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page) and "<script" not in page.lower() and "data:image/png" in page


@pytest.mark.browser
def test_report_opens_offline_in_a_browser(finished, tmp_path):
    from browser import open_page
    with open_page((finished[0] / "report.html").as_uri(), tmp_path) as page:
        assert page.requests() == [] and page.errors() == []
        assert len(page.find("img")) >= 3 and all(page.script("return arguments[0].naturalWidth > 100", i) for i in page.find("img"))


def test_mistakes_exit_with_2_and_make_no_folder(in_tmp):
    said = fvae("run", "reconstruct", "-p", "vea=tiny", "-p", "chunk=fast", cwd=in_tmp, code=2)
    assert "did you mean 'vae'" in said and "chunk = 'fast'" in said
    fvae("run", "nonsense", cwd=in_tmp, code=2)
    assert list(in_tmp.iterdir()) == []


def test_parameter_cells_are_the_models(tmp_path):
    from papermill import inspect_notebook
    from fvae_nb.running.jobs import check_job_notebook, job_module, jobs_available
    for job in jobs_available():
        path = ROOT / "fvae_nb/_data/jobs" / f"{job}.ipynb"
        check_job_notebook(path)
        cell, model = inspect_notebook(str(path)), job_module(job).Params
        assert list(cell) == [*[k for k in model.model_fields if k not in ("run", "shard", "shards", "overwrite")], "run", "shard", "shards", "overwrite"], job
        import ast
        given = model(**{k: ast.literal_eval(v["default"]) for k, v in cell.items()})
        assert given == model(), job


@pytest.mark.slow
def test_pretraining_resumes_after_a_kill_with_the_same_curve(tmp_path):
    import signal, time
    words = ["run", "pretrain_tiny", "-p", "steps=8", "-p", "every=2", "-p", "late=1", "-p", "batch=2", "-p", "size=32", "-p", "frames=5"]
    fvae(*words, "--run", "whole", cwd=tmp_path)
    process = subprocess.Popen([FVAE, *words, "--run", "cut"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"FVAE_DEVICE": "cpu"}, start_new_session=True)
    deadline = time.time() + 120
    while not list((tmp_path / "cut/checkpoints").glob("step-*")) and time.time() < deadline: time.sleep(.02)
    pid = json.loads(next((tmp_path / "cut").glob("shards/*/attempt-*/attempt.json")).read_text())["pid"]
    process.kill(); os.kill(pid, signal.SIGKILL); process.wait()
    fvae(*words, "--run", "cut", cwd=tmp_path)
    curves = [json.loads((tmp_path / n / "cases/weights/tiny.json").read_text()) for n in ("whole", "cut")]
    assert curves[0]["metrics"]["curve"] == curves[1]["metrics"]["curve"]
    assert curves[0]["sha256"] == curves[1]["sha256"]


@pytest.mark.parametrize("hu, window", [(-830, "lung"), (40, "soft tissue")])
def test_a_report_opens_in_the_window_that_shows_something(hu, window):
    "A box of lung, or of soft tissue, in air"
    from fvae_nb.jobs.reconstruct import _window
    a = np.full((4, 40, 40), -1024, np.float32); a[:, 10:30, 10:30] = hu
    assert _window(ct_volume(a)) == window
