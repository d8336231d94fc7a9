"Submitting to a real Slurm: two nodes on loopback. What is only text is tested everywhere."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from cluster import Cluster, eventually, why_not
from fvae_nb.running import slurm
from fvae_nb.running.cases import JobError, Run
from fvae_nb.running.jobs import status
from fvae_nb.settings import SettingsError

FVAE = [sys.executable, "-m", "fvae_nb.running.cli"]


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason and os.environ.get("FVAE_REQUIRE_SLURM") == "1": pytest.fail(f"FVAE_REQUIRE_SLURM=1, but {reason}")
    if reason: pytest.skip(reason)
    folder = tempfile.mkdtemp(prefix="sl", dir="/tmp")                            # short: a socket's path holds 107 characters
    c = Cluster(Path(folder) / "c")
    try: yield c.start()
    finally:
        left = c.stop(); shutil.rmtree(folder, ignore_errors=True)
        assert left == [], "step daemons outlived the cluster"


@pytest.fixture
def here(cluster, tmp_path, monkeypatch):
    "A shared folder and an environment that reaches the cluster"
    monkeypatch.chdir(tmp_path)
    for k in [k for k in os.environ if k.startswith(("SLURM_", "SBATCH_"))]: monkeypatch.delenv(k)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"]); monkeypatch.setenv("OMP_NUM_THREADS", "1"); monkeypatch.setenv("FVAE_DEVICE", "cpu")
    return tmp_path


def scans(folder, n, shape=(5, 24, 24)):
    import numpy as np
    from fvae_nb.data.ct import ct_volume, write_ct
    rng = np.random.default_rng(0)
    for k in range(n): write_ct(ct_volume(rng.integers(-1000, 1000, shape).astype(np.float32)), Path(folder) / f"case{k}.nii.gz")
    return str(folder)


TWO = """pipeline: two
version: 1
variables: {vae: tiny, cases: thorax}
stages:
  residual: {job: residual, params: {vae: "{vae}", cases: "{cases}", slices: 5, wide: 5}, after: reconstruct}
  reconstruct: {job: reconstruct, params: {vae: "{vae}", cases: "{cases}"}, shards: 2}
"""


def tree(run): return {str(p.relative_to(run)): __import__("hashlib").sha256(p.read_bytes()).hexdigest() for p in sorted(Path(run).glob("volumes/**/*.nii.gz"))}


# a real cluster -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_array_does_a_run_and_the_chain_goes_on(cluster, here):
    (here / "in").mkdir(); scans(here / "in", 6)
    given = [f"cases={here / 'in'}", "vae=dct"]
    first = slurm.submit("reconstruct", given=given, run=str(here / "a run"), shards=3, res=slurm.resources(gpus=1, cpus=1))
    second = slurm.submit("residual", after=[first], given=given + ["slices=5", "wide=5"], run=str(here / "b"), res=slurm.resources(cpus=1))
    assert set(cluster.wait(first).values()) == {"COMPLETED"} and len(cluster.tasks(first)) == 3
    assert set(cluster.wait(second).values()) == {"COMPLETED"}
    for run in ("a run", "b"): s = status(here / run); assert s["total"] and s["done"] == s["total"]
    seen = {json.loads(p.read_text())["cuda"] for p in (here / "a run").glob("shards/*/attempt-*/attempt.json")}
    assert seen <= {"0", "1"}                                                     # the index within the node
    assert {json.loads(p.read_text())["cuda"] for p in (here / "b").glob("shards/*/attempt-*/attempt.json")} == {""}      # no --gres: no GPU seen
    assert len(list((here / "a run/slurm").glob("reconstruct-*.out"))) == 3        # a folder with a blank in its name
    rows = slurm.queue(here / "a run")
    assert {r["state"] for r in rows} == {"COMPLETED"} and {r["task"] for r in rows} == {"0", "1", "2"}
    here_run = subprocess.run([*FVAE, "status", str(here / "a run")], capture_output=True, text=True)
    assert here_run.returncode == 0 and f"job {first}_0 (reconstruct): COMPLETED" in here_run.stdout
    local = subprocess.run([*FVAE, "run", "reconstruct", "-p", given[0], "-p", given[1], "--run", str(here / "c")], capture_output=True, text=True)
    assert local.returncode == 0 and tree(here / "c") == tree(here / "a run")         # the same bytes as on one machine


@pytest.mark.slow
def test_refused_before_anything_is_sent(cluster, here):
    with pytest.raises(JobError, match="4242.*does not know"): slurm.submit("reconstruct", after=["4242"], given=["vae=dct"], run=str(here / "a"))
    with pytest.raises(JobError, match="unknown parameter 'vea'.*did you mean 'vae'"): slurm.submit("reconstruct", given=["vea=dct"], run=str(here / "a"))
    assert not (here / "a").exists() and cluster.ask("squeue", "-h", "-n", "reconstruct").strip() == ""
    with pytest.raises(JobError, match="partition"): slurm.submit("reconstruct", given=["vae=dct"], run=str(here / "a"), res=slurm.resources(partition="nowhere"))
    assert slurm.submitted(here / "a") == []


@pytest.mark.slow
def test_a_node_is_lost_in_the_middle(cluster, here, monkeypatch):
    "Slow cases on two nodes; one node dies; its tasks run again on the other and the chain behind them goes on"
    (here / "in").mkdir(); scans(here / "in", 8, (33, 96, 96)); monkeypatch.setenv("FVAE_TEST_HOOK", "compute:*:sleep1.5")     # long enough to be hit
    given = [f"cases={here / 'in'}", "vae=tiny"]
    first = slurm.submit("reconstruct", given=given, run=str(here / "a"), shards=4, res=slurm.resources(cpus=1))
    second = slurm.submit("residual", after=[first], given=[given[0], "vae=dct", "slices=5", "wide=5"], run=str(here / "b"), res=slurm.resources(cpus=1))
    def running(): return [r for r in slurm.queue(here / "a") if r["state"] == "RUNNING" and r["node"] == "n1"]
    lost = eventually(running, 60, .2); assert lost, cluster.words()
    assert eventually(lambda: list((here / "a").glob("shards/*/attempt-*/events.jsonl")), 60)     # a runner is at work
    cluster.lose("n1")
    try:
        assert set(cluster.wait(first, 240).values()) == {"COMPLETED"}, slurm.queue(here / "a")
        assert set(cluster.wait(second, 120).values()) == {"COMPLETED"}
    finally: cluster.node("n1"); assert eventually(lambda: cluster.states().get("n1") == "idle", 60), cluster.words()
    again = [int(x) for x in re.findall(r"Restarts=(\d+)", cluster.ask("scontrol", "show", "job", first))]
    assert sorted(again)[-1] == 1 and 0 in again, again                           # those of n1 began anew, those of n2 did not
    ends = [json.loads(p.read_text()).get("end") for p in (here / "a").glob("shards/*/attempt-*/attempt.json")]
    assert None in ends                                                           # an attempt that was cut off without a word
    for run in ("a", "b"): s = status(here / run); assert s["total"] and s["done"] == s["total"]
    monkeypatch.delenv("FVAE_TEST_HOOK")
    quiet = subprocess.run([*FVAE, "run", "reconstruct", "-p", given[0], "-p", given[1], "--run", str(here / "c")], capture_output=True, text=True)
    assert quiet.returncode == 0 and tree(here / "c") == tree(here / "a")


@pytest.mark.slow
def test_one_shard_runs_twice_at_once(cluster, here, monkeypatch):
    "Only the node's daemon dies, as in a network cut: the old task goes on while the new one runs elsewhere"
    n = 24; (here / "in").mkdir(); scans(here / "in", n, (33, 96, 96)); monkeypatch.setenv("FVAE_TEST_HOOK", "compute:*:sleep1.5")    # the controller needs half a minute to miss a node
    given = [f"cases={here / 'in'}", "vae=tiny"]
    cluster.ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        job = slurm.submit("reconstruct", given=given, run=str(here / "a"), res=slurm.resources(cpus=1))
        assert eventually(lambda: list((here / "a").glob("cases/*/*.json")), 90), cluster.words()
    finally: cluster.ask("scontrol", "update", "NodeName=n2", "State=RESUME")
    cluster.kill("n1")
    try:
        both = eventually(lambda: len(list((here / "a").glob("shards/00000/attempt-*/attempt.json"))) >= 2, 120, .3)
        assert both, slurm.queue(here / "a")
        old, new = (json.loads(p.read_text()) for p in sorted((here / "a").glob("shards/00000/attempt-*/attempt.json")))
        assert "end" not in old and Path(f"/proc/{old['pid']}").exists() or old["end"] > new["start"]       # they did overlap
        assert set(cluster.wait(job, 240).values()) == {"COMPLETED"}
    finally: cluster.node("n1"); assert eventually(lambda: cluster.states().get("n1") == "idle", 60), cluster.words()
    assert eventually(lambda: not cluster.steps(), 60)                            # the returning daemon ends the old one
    s = status(here / "a"); assert s["total"] == 2*n and s["done"] == s["total"]      # each VAE and its control
    monkeypatch.delenv("FVAE_TEST_HOOK")
    quiet = subprocess.run([*FVAE, "run", "reconstruct", "-p", given[0], "-p", given[1], "--run", str(here / "c")], capture_output=True, text=True)
    assert quiet.returncode == 0 and tree(here / "c") == tree(here / "a")


@pytest.mark.slow
def test_a_task_asks_for_another_try_by_its_own_name(cluster, here):
    "An array whose task 1 says 75 on its first run: only that task is put back, and what waits for the array runs"
    (here / "slurm").mkdir()
    code = "import os, sys; from fvae_nb.running.slurm import requeue; print(os.environ['SLURM_ARRAY_TASK_ID'], os.environ.get('SLURM_RESTART_COUNT'), flush=True); sys.exit(requeue(75 if os.environ['SLURM_ARRAY_TASK_ID'] == '1' and not os.environ.get('SLURM_RESTART_COUNT') else 0))"
    (here / "a.sh").write_text(slurm.script([sys.executable, "-c", code, "{shard}"], here, "again", slurm.resources(cpus=1), [0, 1, 2], "c-again"))
    job = cluster.ask("sbatch", "--parsable", str(here / "a.sh")).strip()
    (here / "b.sh").write_text(slurm.script(["true"], here, "then", slurm.resources(cpus=1), [], "c-then", [job]))
    then = cluster.ask("sbatch", "--parsable", str(here / "b.sh")).strip()
    assert set(cluster.wait(job, 90).values()) == {"COMPLETED"} and set(cluster.wait(then, 60).values()) == {"COMPLETED"}
    said = {k: (here / "slurm" / f"again-{job}_{k}.out").read_text() for k in (0, 1, 2)}
    assert "1 1" in said[1] and "put back" in said[1] and all("put back" not in said[k] for k in (0, 2))


@pytest.mark.slow
def test_no_controller_then_one_submission_only(cluster, here):
    cluster.kill("slurmctld", 15)
    try:
        started = time.time()
        r = subprocess.run([*FVAE, "submit", "reconstruct", "-p", "vae=dct", "-p", "cases=phantom", "--run", str(here / "a")], capture_output=True, text=True)
        assert r.returncode == 75 and time.time() - started < 30 and "nothing was submitted" in r.stderr and len(r.stderr.strip().splitlines()) == 1
        assert slurm.submitted(here / "a") == []
        assert "controller cannot be reached" in subprocess.run([*FVAE, "submit", "pipeline", "-f", "smoke", "--run", str(here / "p")], capture_output=True, text=True).stderr
        assert not (here / "p").exists()                                          # nothing half submitted
    finally: cluster.controller(); assert eventually(lambda: set(cluster.states().values()) <= {"idle", "mixed", "allocated"} and cluster.states(), 60), cluster.words()
    (here / "in").mkdir(); scans(here / "in", 1)
    job = slurm.submit("reconstruct", given=["vae=dct", f"cases={here / 'in'}"], run=str(here / "a"), res=slurm.resources(cpus=1))
    assert len(slurm.submitted(here / "a")) == 1 and set(cluster.wait(job).values()) == {"COMPLETED"}


@pytest.mark.slow
def test_a_lost_answer_is_found_by_the_comment(cluster, here, monkeypatch):
    "sbatch submits but its answer never arrives: no second job"
    (here / "in").mkdir(); scans(here / "in", 1)
    real = slurm._ask
    def deaf(*argv, **k):
        out = real(*argv, **k)
        if argv[0] == "sbatch": raise slurm.ClusterDown("sbatch: no answer")
        return out
    monkeypatch.setattr(slurm, "_ask", deaf)
    job = slurm.submit("reconstruct", given=["vae=dct", f"cases={here / 'in'}"], run=str(here / "a"), res=slurm.resources(cpus=1))
    mine = [l for l in cluster.ask("squeue", "-h", "-t", "all", "-o", "%A|%k").splitlines() if l.endswith(slurm.submitted(here / "a")[0]["comment"])]
    assert mine == [f"{job}|{slurm.submitted(here / 'a')[0]['comment']}"] and set(cluster.wait(job).values()) == {"COMPLETED"}


@pytest.mark.slow
def test_an_id_that_is_not_ours_is_lost_and_only_missing_sends_the_rest(cluster, here):
    "As after a controller that forgot us and gave our number to another"
    (here / "in").mkdir(); scans(here / "in", 4)
    given = [f"cases={here / 'in'}", "vae=dct"]
    (here / "slurm").mkdir(); (here / "x.sh").write_text(slurm.script(["true"], here, "stranger", slurm.resources(cpus=1), [], "somebody-else"))
    foreign = cluster.ask("sbatch", "--parsable", str(here / "x.sh")).strip()
    stage = slurm.prepare("reconstruct", given, run=str(here / "a"), shards=2, res=slurm.resources(cpus=1))
    from fvae_nb.running.jobs import open_run
    open_run("reconstruct", stage["params"].model_copy(update={"run": str(here / "a")})); (here / "a/slurm").mkdir()
    slurm._record(here / "a", stage="reconstruct", job_id=foreign, comment=stage["comment"], array=[0, 1], shards=2)
    assert [r["state"] for r in slurm.queue(here / "a")] == ["LOST"]
    done = subprocess.run([*FVAE, "run", "reconstruct", "-p", given[0], "-p", given[1], "--run", str(here / "a"), "--shard", "0", "--shards", "2"], capture_output=True, text=True)
    assert done.returncode == 0
    job = slurm.submit("reconstruct", given=given, run=str(here / "a"), shards=2, only_missing=True, res=slurm.resources(cpus=1))
    assert slurm.submitted(here / "a")[-1]["array"] == [1] and set(cluster.wait(job)) == {"1"}
    assert status(here / "a")["done"] == 4 and slurm.queue(here / "a")[0]["state"] == "ENDED"
    assert slurm.submit("reconstruct", given=given, run=str(here / "a"), shards=2, only_missing=True) is None


@pytest.mark.slow
def test_a_pipeline_is_one_chain(cluster, here):
    (here / "in").mkdir(); scans(here / "in", 2)
    (here / "two.yaml").write_text(TWO)
    ids = slurm.submit_pipeline("two.yaml", here / "p", ["vae=dct", f"cases={here / 'in'}"], cpus=1)
    assert list(ids) == ["reconstruct", "residual"]
    assert all(set(cluster.wait(i).values()) == {"COMPLETED"} for i in ids.values())
    assert all(status(here / "p" / k)["missing"] == [] for k in ids)
    again = slurm.run_pipeline("two.yaml", here / "p", ["vae=dct", f"cases={here / 'in'}"], show=lambda line: None)    # the same folders: nothing left to do
    assert again == 0


# text only ----------------------------------------------------------------------------------------------------

def test_no_slurm_here_says_so(monkeypatch, in_tmp):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(JobError, match="sinfo: not found on this machine"): slurm.submit("reconstruct", given=["vae=dct"], run="a")
    assert not Path("a").exists()


def test_settings_fill_the_script(in_tmp):
    Path("settings.ini").write_text("[fvae]\nslurm.partition = gpu\nslurm.mem = 24G\n")
    stage = slurm.prepare("reconstruct", ["vae=dct"], run="r", shards=3, res=slurm.resources(limit=2))
    lines = stage["script"].splitlines()
    for option in ("partition=gpu", "mem=24G", "array=0-2%2", "requeue", "open-mode=append", f"comment={stage['comment']}"): assert f"#SBATCH --{option}" in lines
    assert lines[-1].startswith(f"exec {sys.executable} -m fvae_nb.running.cli run reconstruct") and "export CUDA_VISIBLE_DEVICES=" in lines
    assert subprocess.run(["bash", "-n"], input=stage["script"], text=True).returncode == 0
    assert json.loads(stage["preset"]) == {"job": "reconstruct", "version": 1, "vae": ["dct"]}
    Path("settings.ini").write_text("[fvae]\nslurm.queue = gpu\n")
    with pytest.raises(SettingsError, match="slurm.queue"): slurm.resources()


def test_time_runs_out_and_the_run_says_so(in_tmp):
    "USR1, as Slurm sends it before the limit: the run ends orderly with a code that asks for another try, and goes on"
    scans(in_tmp, 3)
    command = [*FVAE, "run", "reconstruct", "-p", "vae=dct", "-p", f"cases={in_tmp}", "-p", "control=false", "--run", "r"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    p = subprocess.Popen(command, env=env | {"FVAE_TEST_HOOK": "compute:*:sleep3"}, stdout=subprocess.PIPE, text=True)
    assert eventually(lambda: list((in_tmp / "r").glob("shards/*/attempt-*/events.jsonl")), 60)
    p.send_signal(signal.SIGUSR1)
    out, _ = p.communicate(timeout=60)
    assert p.returncode == 128 + signal.SIGUSR1 and p.returncode in slurm.AGAIN and "stopped by SIGUSR1" in out
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0 and status(in_tmp / "r")["done"] == 3


def test_what_would_be_ignored_is_refused(in_tmp):
    def said(*argv):
        r = subprocess.run([*FVAE, "submit", *argv], capture_output=True, text=True)
        assert r.returncode == 2, r.stdout
        return r.stderr
    assert "--gpus: not for a pipeline" in said("pipeline", "-f", "smoke", "--run", "p", "--gpus", "2", "--dry-run")
    assert "--only-missing: not for Kubernetes" in said("reconstruct", "--backend", "k8s", "--dry-run", "--only-missing")
    assert "not a training that several nodes can share" in said("reconstruct", "--nodes", "2", "--dry-run")


def test_an_answer_that_never_comes_is_not_called_a_refusal(monkeypatch, in_tmp):
    "sbatch and the question after it both time out: nobody knows, and we say so"
    def silent(*argv, **k):
        if argv[0] == "sinfo": return "slurm 22"
        raise slurm.ClusterDown(f"{argv[0]}: no answer in 15 s")
    monkeypatch.setattr(slurm, "_ask", silent); monkeypatch.setattr(slurm, "cluster", dict)
    with pytest.raises(slurm.ClusterDown) as e: slurm.submit("pretrain_tiny", run=str(in_tmp / "a"))
    assert e.value.unsure
    def dead(*argv, **k): raise slurm.ClusterDown(f"{argv[0]}: the controller cannot be reached (x)")
    monkeypatch.setattr(slurm, "_ask", dead)
    with pytest.raises(slurm.ClusterDown) as e: slurm.submit("pretrain_tiny", run=str(in_tmp / "a"))
    assert not e.value.unsure and slurm.submitted(in_tmp / "a") == []


def test_several_nodes_use_srun(in_tmp):
    text = slurm.prepare("train_denoiser" if "train_denoiser" in slurm_jobs() else "pretrain_tiny", run="r", res=slurm.resources(nodes=2, gpus=4))["script"]
    assert "#SBATCH --nodes=2" in text and "#SBATCH --ntasks-per-node=1" in text and "\nsrun " in text and " join train_denoiser " in text
    assert "requeue(75)" in text.split("trap ")[1].split("USR1")[0] and text.rstrip().splitlines()[-1].startswith("exec ")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    trial = re.sub(r"srun .* &", "sleep 30 > /dev/null &", text.replace(sys.executable, "echo"))              # bash alone: the signal reaches the trap, not a corpse
    p = subprocess.Popen(["bash", "-c", trial], stdout=subprocess.PIPE, text=True); time.sleep(1); p.send_signal(signal.SIGUSR1)
    assert "requeue(75)" in p.communicate(timeout=20)[0] and p.returncode == 1


def slurm_jobs():
    from fvae_nb.running.jobs import jobs_available
    return jobs_available()


def test_requeue_outside_slurm_changes_nothing(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [slurm.requeue(c) for c in (0, 1, 75)] == [0, 1, 75]
    monkeypatch.setenv("SLURM_JOB_ID", "7"); monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    assert slurm.requeue(1) == 1 and slurm.requeue(0) == 0 and slurm.requeue(75) == 1
    assert "restarted 5 times already" in capsys.readouterr().out


@pytest.mark.parametrize("text, says", [
    ("pipeline: x\nversion: 1\nstages: {a: {job: reconstruct, after: b}}", "waits for 'b'"),
    ("pipeline: x\nversion: 1\nstages: {a: {job: reconstruct, after: b}, b: {job: residual, after: a}}", "circle: a, b"),
    ("pipeline: x\nversion: 1\nstages: {a: {job: reconstruct, params: {cases: '{c}'}}}", "unknown placeholder"),
    ("pipeline: x\nversion: 1\nstages: {a: {jobb: reconstruct}}", "jobb"),
    ("stages: {}", "expected 'pipeline: NAME'"),
])
def test_bad_pipelines_are_named(in_tmp, text, says):
    Path("p.yaml").write_text(text)
    with pytest.raises(JobError, match=says): slurm.read_pipeline("p.yaml", "root")


def test_a_folder_that_is_read_is_waited_for(in_tmp):
    Path("p.yaml").write_text("pipeline: x\nversion: 1\nvariables: {n: 3}\nstages: {b: {job: residual, params: {cases: '{a}/volumes', slices: '{n}'}}, a: {job: reconstruct}}")
    stages = slurm.read_pipeline("p.yaml", "root", ["n=9"])
    assert list(stages) == ["a", "b"] and stages["b"].after == ["a"] and stages["b"].params == {"cases": f"{Path('root').absolute()}/a/volumes", "slices": "9"}


def packaged(): return sorted(p.stem for p in (Path(slurm.__file__).parents[1] / "_data/presets/pipeline").glob("*.yaml"))


@pytest.mark.parametrize("name", packaged())
def test_packaged_pipelines_hold(name, in_tmp, capsys):
    slurm.submit_pipeline(name, "root", dry_run=True)
    out = capsys.readouterr().out
    for stage in slurm.read_pipeline(name, "root"): assert f"# ---- {stage}" in out
    assert not Path("root").exists()


def test_kubernetes_text(in_tmp):
    res = slurm.resources(gpus=2, mem="32G", limit=4)
    doc = yaml.safe_load(slurm.indexed_job(slurm.prepare("reconstruct", ["vae=dct"], run="r", shards=8, res=res), res, "image:1"))
    spec, box = doc["spec"], doc["spec"]["template"]["spec"]["containers"][0]
    assert (doc["kind"], spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Job", "Indexed", 8, 4)
    assert box["resources"]["limits"] == {"cpu": "2", "memory": "32Gi", "nvidia.com/gpu": "2"}
    assert box["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    from fvae_nb.running.jobs import make_params
    texts = [box["command"][k + 1] for k, w in enumerate(box["command"]) if w == "-p"]                      # nothing is written: the parameters travel in the text
    assert make_params("reconstruct", texts).vae == ["dct"] and "-f" not in box["command"]
    assert box["command"][box["command"].index("--shard") + 1] == "$(SHARD)" and box["command"][box["command"].index("--shards") + 1] == "8"
    assert box["volumeMounts"][0]["mountPath"] == str(Path.cwd())
    r = subprocess.run([*FVAE, "submit", "reconstruct", "--backend", "k8s"], capture_output=True, text=True)
    assert r.returncode == 2 and "--dry-run" in r.stderr
