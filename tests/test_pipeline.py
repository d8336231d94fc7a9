"Every stage of the paper on drawn thoraxes, killed in the middle and run again."
import json
import os
import signal
import subprocess
import sys

import pytest

from cluster import eventually
from fvae_nb.running.jobs import status

FVAE = [sys.executable, "-m", "fvae_nb.running.cli"]


@pytest.mark.slow
def test_smoke_pipeline_killed_and_resumed(in_tmp):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*FVAE, "run", "pipeline", "-f", "smoke", "--run", "p"]
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually(lambda: (in_tmp / "p/safety/cases.json").exists() or first.poll() is not None, 300)
    first.send_signal(signal.SIGKILL); first.wait()
    made = {p: p.stat().st_mtime_ns for p in (in_tmp / "p").glob("*/cases/*/*.json")}
    assert made and not (in_tmp / "p/report.html").exists()                       # the first stage was done, the pipeline was not
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert all(p.stat().st_mtime_ns == t for p, t in made.items())                # what was done stayed
    stages = ["reconstruct", "safety", "augment", "encode", "train", "generate", "evaluate", "classify", "ablate"]
    for name in stages:
        s = status(in_tmp / "p" / name)
        assert s["total"] and s["done"] == s["total"] and not s["failed"], (name, s["failed"], s["missing"])
    page = (in_tmp / "p/report.html").read_text()
    for name in stages: assert f"Stage {name}" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    provenance = [json.loads((in_tmp / "p" / n / "provenance.json").read_text()) for n in stages]
    assert all(p["notebook_sha256"] for p in provenance)                          # each figure's run says what it was made by
    said = subprocess.run([*FVAE, "report", "p"], capture_output=True, text=True, env=env)
    assert said.returncode == 0 and said.stdout.strip().endswith("report.html")
