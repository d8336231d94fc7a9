"Training shared by several processes: the same curve as by one; a process that dies takes the others along and the run goes on from its last checkpoint."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import eventually
from fvae_nb.running import slurm

FVAE = [sys.executable, "-m", "fvae_nb.running.cli"]


def curve(job, folder, processes, *more):
    "The curve of a small training; exit status 0"
    texts = [x for t in ("device=cpu", f"processes={processes}", *more) for x in ("-p", t)]
    r = subprocess.run([*FVAE, "run", job, *texts, "--run", str(folder)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stdout + r.stderr
    side = json.loads(next(Path(folder).glob("cases/*/*.json")).read_text())
    return side["metrics"]["curve"], side


SMALL = {"train_denoiser": ("steps=6", "every=2", "sample_steps=0", "dropout=0.1"),
         "pretrain_tiny": ("steps=4", "every=2", "batch=2", "frames=5", "size=32", "late_batch=2", "late_frames=5", "late_size=32")}


@pytest.mark.slow
@pytest.mark.parametrize("job", list(SMALL))
def test_two_processes_give_the_curve_of_one(job, in_tmp):
    one, _ = curve(job, in_tmp / "one", 1, *SMALL[job])
    two, _ = curve(job, in_tmp / "two", 2, *SMALL[job])
    assert sorted(p.name for p in (in_tmp / "two/logs").iterdir()) == ["rank-000.log", "rank-001.log"]
    print(job, [(a["step"], a["loss"], b["loss"]) for a, b in zip(one, two)])
    assert [r["step"] for r in one] == [r["step"] for r in two] and len(one) >= 2
    for a, b in zip(one, two): assert abs(a["loss"] - b["loss"]) <= 2e-4 * abs(a["loss"])     # sums in another order, then Muon or AdamW on them
    assert any(abs(a["loss"] - one[0]["loss"]) > 1e-3 * abs(a["loss"]) for a in one[1:])       # the curve moves at all


def test_a_death_is_told_and_nobody_is_left(in_tmp, monkeypatch):
    "The second process dies at once; the first waits for it in vain and is ended"
    (in_tmp / "x").mkdir()
    from fvae_nb.running.jobs import make_params
    params = make_params("train_denoiser", ["device=cpu", "processes=2", "batch=3", "steps=2"])        # 3 over 2: both refuse
    started = time.time()
    with pytest.raises(RuntimeError, match=r"process \d of 2 ended with 1.*batch = 3 over 2 processes"): slurm.together("train_denoiser", params, in_tmp / "x", 2)
    assert time.time() - started < 120
    assert subprocess.run(["pgrep", "-f", str(in_tmp / "x")], capture_output=True, text=True).stdout == ""


def test_one_process_dies_and_takes_the_other_along(in_tmp):
    "Rank 1 is killed in the middle of a long training; rank 0 is stopped, so that only we can end it"
    from fvae_nb.running.jobs import make_params
    import threading
    params, told = make_params("pretrain_tiny", ["device=cpu", "processes=2", "batch=2", "late_batch=2", "frames=5", "late_frames=5", "size=32", "late_size=32", "steps=100000", "every=100000"]), []
    def work():
        try: slurm.together("pretrain_tiny", params, in_tmp / "x", 2)
        except RuntimeError as error: told.append(str(error))
    t = threading.Thread(target=work); t.start()
    def ranks():
        found = {}
        for p in Path("/proc").glob("[0-9]*"):
            try: env, words = (p / "environ").read_bytes().split(b"\0"), (p / "cmdline").read_bytes()
            except OSError: continue
            if str(in_tmp / "x").encode() in words and b"_member()" in words: found |= {int(e[5:]): int(p.name) for e in env if e.startswith(b"RANK=")}
        return found
    both = eventually(lambda: r if len(r := ranks()) == 2 else None, 60); assert both
    time.sleep(8)                                                                 # well inside the steps
    os.kill(both[0], signal.SIGSTOP); os.kill(both[1], signal.SIGKILL); t.join(30)
    assert not t.is_alive() and "process 1 of 2 ended with -9" in told[0]
    assert ranks() == {}


def test_a_job_that_is_no_training(in_tmp):
    from fvae_nb.running.jobs import make_params
    with pytest.raises(RuntimeError, match="not a training that several processes can share"): slurm.together("reconstruct", make_params("reconstruct"), in_tmp / "x", 1)
