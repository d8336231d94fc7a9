"The package as others get it: a wheel, installed where no checkout is in sight."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, seconds=300, **how):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=seconds, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_job_runs_from_an_installed_wheel(tmp_path):
    copy, target, desk = tmp_path / "copy", tmp_path / "target", tmp_path / "desk"
    desk.mkdir(); copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "fvae_nb", copy / "fvae_nb", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", copy)
    wheel, = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--target", target, wheel)
    here = {p.relative_to(ROOT / "fvae_nb") for p in (ROOT / "fvae_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    there = {p.relative_to(target / "fvae_nb") for p in (target / "fvae_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert here == there and {Path("_data/jobs/reconstruct.ipynb"), Path("_data/presets/reconstruct/smoke.yaml"), Path("_data/weights/tiny.safetensors")} <= there
    for path in target.rglob("*"): path.chmod(path.stat().st_mode & ~0o222)         # as in a system's site-packages
    env = {k: v for k, v in os.environ.items() if not k.startswith("FVAE_")} | dict(PYTHONPATH=str(target), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    python = lambda code, *words: run(sys.executable, "-P", "-c", code, *words, cwd=desk, env=env)
    assert Path(python("import fvae_nb; print(fvae_nb.__file__)").strip()).is_relative_to(target)
    said = python("import sys; from fvae_nb.running.cli import main; sys.exit(main())", "run", "reconstruct", "-p", "device=cpu")     # the default case: thorax
    folder, = (desk / "runs").iterdir()
    assert "0 failed, 0 missing" in said and (folder / "report.html").stat().st_size > 10_000, said
    assert {p.name for p in folder.glob("volumes/*/*")} == {"ellipsoid_thorax_SYNTHETIC.nii.gz"}
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["commit"] is None and facts["dirty"] is None                       # no checkout, and none claimed
    kernel, = folder.glob("shards/*/*/job.ipynb")
    assert str(ROOT / "fvae_nb") not in kernel.read_text() and str(ROOT / "fvae_nb") not in (folder / "report.html").read_text()
    probe = "import asyncio, sys; from fvae_nb.running.jobs import kernel_manager_class; import nbformat; from nbclient import NotebookClient; b = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('import fvae_nb; print(fvae_nb.__file__)')]); NotebookClient(b, kernel_name='fvae', kernel_manager_class=kernel_manager_class()).execute(); print(b.cells[0].outputs[0].text)"
    assert Path(python(probe).strip()).is_relative_to(target)                       # the kernel's package too
    assert sorted(p.name for p in desk.iterdir()) == ["runs"]
