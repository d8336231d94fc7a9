"""What may happen to a night of work, and what must be left afterwards.

Most tests drive the bare loop (`running.cases.work`) in a process of its own, which starts in a blink; the others
run the whole of `fvae run reconstruct` on scans of a few kilobytes. Results are compared by the sha256 of the payloads.
"""
import errno, gzip, hashlib, json, os, random, resource, shutil, signal, subprocess, sys, threading, time, uuid
from pathlib import Path
import nibabel as nib
import numpy as np
import psutil
import pytest
from fvae_nb.running import cases as C
from fvae_nb.running import jobs as J
from fvae_nb.running.cases import JobError, Run, Unit, canonical, claim, done, publish, work, write_atomic, write_once

MARK = "FVAE_TEST_MARK"


def until(true, seconds=30, what="this"):
    "Poll; the moment it was true, or a failed test"
    end = time.time() + seconds
    while time.time() < end:
        if got := true(): return got
        time.sleep(.01)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def marked(mark):
    "Living processes that carry our mark in their environment: runners and kernels leave their parent's process group"
    found = []
    for p in psutil.process_iter():
        try:
            if p.status() != psutil.STATUS_ZOMBIE and p.environ().get(MARK) == mark: found.append(p)
        except (psutil.Error, OSError): pass
    return found


@pytest.fixture(autouse=True)
def mark(monkeypatch):
    "No process of a test outlives it"
    mark = uuid.uuid4().hex
    for name in ("FVAE_TEST_HOOK", "FVAE_LOCK_WAIT", "FVAE_SESSION", "FVAE_LAST", "FVAE_ATTEMPT"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(MARK, mark); monkeypatch.setenv("OMP_NUM_THREADS", "1"); monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    own = os.getpid()
    yield mark
    end = time.time() + 3
    while (left := [p for p in marked(mark) if p.pid != own]) and time.time() < end: time.sleep(.05)
    for p in left: p.kill()
    assert not left, f"still alive: {left}"


def start(command, cwd=None, limit=None, **env):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)                    # a test suite started in the background ignores it
        if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen([sys.executable, "-P", *command], cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=prepare)


def fvae(*words, report=False, **how):
    "The command; unless asked for, its report is a stub (the real one takes as long as the rest)"
    stub = "" if report else "import fvae_nb.running.report as R; R.build_report = lambda run: R.write_atomic(run.folder/'report.html', b'stub'); "
    return start(["-c", f"import sys; {stub}from fvae_nb.running.cli import main; sys.exit(main())", *map(str, words)], **how)


def end(process, seconds=90):
    "(exit code, what it said)"
    said = process.communicate(timeout=seconds)[0]
    return process.returncode, said


# ---------------------------------------------------------------- the bare loop

TOY = """
import fcntl, hashlib, json, os, sys, time
if os.environ.get("NO_LOCKS"): fcntl.flock = lambda *a: None          # as on a network file system that knows locks per machine
from fvae_nb.running.cases import Run, shard_of, work
run, seconds, shard, shards = Run(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def do(unit, part):
    data = hashlib.shake_256(unit.case.encode()).digest(20_000)
    with open(part, "wb") as f:
        for at in range(0, len(data), 5000): f.write(data[at:at + 5000]); f.flush(); time.sleep(seconds / 4)
    return {"bytes": len(data)}
log = open(run.folder/f"log-{os.getpid()}", "a")
def tell(**e): log.write(json.dumps(e) + "\\n"); log.flush()
out = work(run, shard_of(run.units, shard, shards), do, lambda u: run.payload(u, suffix=".bin"), tell=tell, lock_wait=60)
sys.exit(out.code)
"""


def content(case): return hashlib.shake_256(case.encode()).digest(20_000)


def toy_run(folder, n):
    run, names = Run(folder), [f"c{i:03d}" for i in range(n)]
    write_atomic(run.folder / "params.json", canonical({"job": "toy"}))
    write_atomic(run.folder / "cases.json", canonical({"cases": [{"id": c} for c in names], "units": [["toy", c] for c in names]}))
    return run


def toy(run, seconds=.0, shard=0, shards=1, **how): return start(["-c", TOY, str(run.folder), str(seconds), str(shard), str(shards)], **how)


def events(run, what="start"): return [e["case"] for log in run.folder.glob("log-*") for line in log.read_text().splitlines() if (e := json.loads(line))["event"] == what]


def tree(run, kind="volumes"): return {p.relative_to(run.folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in (run.folder / kind).rglob("*") if p.is_file()}


def leftovers(run): return [p for p in run.folder.rglob("*") if p.is_file() and (p.name.endswith(".part") or ".tmp" in p.parts)]


def complete(run):
    "Every case done and true, nothing else there"
    assert tree(run) == {f"volumes/toy/{u.case}.bin": hashlib.sha256(content(u.case)).hexdigest() for u in run.units}
    assert all(done(run, u, verify=True) for u in run.units)
    assert leftovers(run) == [] and not list(run.folder.glob("failed/*/*"))


class Reader(threading.Thread):
    "Polls the payloads as a consumer would; half a file is an error"
    def __init__(self, run, read): super().__init__(daemon=True); self.run_, self.read, self.bad, self.seen, self.on = run, read, [], 0, True; self.start()
    def run(self):
        while self.on:
            for path in (self.run_.folder / "volumes").rglob("*.*"):
                try: self.read(path); self.seen += 1
                except Exception as error: self.bad.append((path.name, repr(error)))
            time.sleep(.005)
    def stop(self): self.on = False; self.join(); return self.bad


def whole(path): assert path.read_bytes() == content(path.stem)


@pytest.mark.parametrize("point", ["compute", "written", "between"])
def test_a_kill_at_any_point_costs_that_case_only(tmp_path, point):
    run = toy_run(tmp_path, 8); place = lambda u: run.payload(u, suffix=".bin")
    assert end(toy(run, FVAE_TEST_HOOK=f"{point}:c004:kill"))[0] == -9
    finished = [u.case for u in run.units if done(run, u)]
    assert finished == ["c000", "c001", "c002", "c003"]
    assert place(Unit("toy", "c004")).exists() == (point == "between")      # a payload nobody signed for: not done
    before = {p: p.stat().st_mtime_ns for c in finished for p in (place(Unit("toy", c)), run.sidecar(Unit("toy", c)))}
    assert end(toy(run))[0] == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert sorted(events(run, "done")) == [u.case for u in run.units] and events(run).count("c004") == 2
    complete(run)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_leave_the_same_payloads(tmp_path):
    run, chance = toy_run(tmp_path, 260), random.Random(0)
    for _ in range(30):
        before = len(events(run))
        p = toy(run, .016)
        until(lambda: len(events(run)) > before or p.poll() is not None, what="work")
        time.sleep(chance.uniform(0, .16))
        assert p.poll() is None, "the work ended before the thirtieth kill: make it longer"
        p.kill(); end(p)
    killed = len(events(run)) - len(events(run, "done"))
    assert len(leftovers(run)) <= 1                                      # each start sweeps up after the one before
    assert end(toy(run, 0))[0] == 0
    complete(run)
    assert killed >= 15 and len(events(run)) <= 260 + 30                 # most kills hit a case; each cost that one and no other


@pytest.mark.parametrize("same", [False, True], ids=["two shards", "two identical jobs"])
def test_200_cases_two_runners_at_once(tmp_path, same):
    run = toy_run(tmp_path, 200); reader = Reader(run, whole)
    both = [toy(run, .01, 0 if same else k, 1 if same else 2) for k in range(2)]
    assert [end(p) for p in both] == [(0, ""), (0, "")]
    assert reader.stop() == [] and reader.seen > 200
    assert sorted(events(run)) == [u.case for u in run.units]              # each exactly once
    shares = [len(set(json.loads(line)["case"] for line in log.read_text().splitlines() if '"done"' in line)) for log in run.folder.glob("log-*")]
    assert sum(shares) == 200 and min(shares) > 20, shares
    complete(run)


def test_without_locks_two_identical_runs_are_slower_and_right(tmp_path):
    run = toy_run(tmp_path, 40); reader = Reader(run, whole)
    both = [toy(run, .02, NO_LOCKS="1") for _ in range(2)]
    assert [end(p) for p in both] == [(0, ""), (0, "")]
    assert reader.stop() == [] and len(events(run)) > 40                 # they really did the same work at the same time
    complete(run)


def test_two_runs_one_killed_the_other_takes_over(tmp_path):
    run = toy_run(tmp_path, 30)
    a, b = toy(run, .02, FVAE_TEST_HOOK="compute:c004:sleep60"), None
    until(lambda: "c004" in events(run), what="c004")
    b = toy(run, .02)
    until(lambda: len(events(run, "done")) == 29, what="the others")
    assert b.poll() is None                                              # it waits for the held case
    a.kill(); end(a)
    assert end(b)[0] == 0
    complete(run)


@pytest.mark.parametrize("limit", [7000, 400])
def test_disk_full_stops_cleanly_and_says_what_to_do(tmp_path, limit):
    run = toy_run(tmp_path, 3)
    code, said = end(toy(run, limit=limit))
    assert code == 1 and ("no space left while writing" in said), said
    if limit == 7000: assert "c000.bin (5000 bytes written" in said or "c000.bin (7000 bytes written" in said, said
    assert leftovers(run) == [] and tree(run) == {} and not list(run.folder.glob("cases/*/*")) and not list(run.folder.glob("failed/*/*"))
    assert end(toy(run))[0] == 0
    complete(run)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_small_disk_fills_up(tmp_path):
    disk = tmp_path / "disk"; disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode: pytest.skip("no tmpfs can be mounted here")
    try:
        run = toy_run(disk, 80)
        code, said = end(toy(run))
        assert code == 1 and "no space left while writing" in said and "free on that disk" in said, said
        finished = [u for u in run.units if done(run, u, verify=True)]
        assert 10 < len(finished) < 50 and leftovers(run) == [] and not list(run.folder.glob("failed/*/*"))
        for u in finished[:40]: run.payload(u, suffix=".bin").unlink()   # somebody makes room by taking results away
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert end(toy(run))[0] == 0
        complete(run)
    finally: subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- the loop, in this process

def simple(unit, part): part.write_bytes(content(unit.case)); return {}


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    run = toy_run(tmp_path, 4); place = lambda u: run.payload(u, suffix=".bin")
    for point in ("compute", "written", "between"):
        monkeypatch.setenv("FVAE_TEST_HOOK", f"{point}:c002:interrupt")
        with pytest.raises(KeyboardInterrupt): work(run, run.units, simple, place)
        assert leftovers(run) == [] and not done(run, Unit("toy", "c002")) and not list(run.folder.glob("failed/*/*"))
    monkeypatch.delenv("FVAE_TEST_HOOK")
    assert work(run, run.units, simple, place).code == 0
    complete(run)


def test_what_a_dead_process_left_is_swept_and_nothing_else(tmp_path):
    run = toy_run(tmp_path, 2)
    dead = subprocess.Popen([sys.executable, "-c", ""]); dead.wait()
    folders = [tmp_path / ".tmp", tmp_path / "cases" / "toy", tmp_path / "failed" / "toy", tmp_path]
    def part(folder, here, pid): folder.mkdir(parents=True, exist_ok=True); p = folder / f".x.json.{here}.{pid}.0123abcd.part"; p.write_text("half"); return p
    gone = [part(f, C.here(), dead.pid) for f in folders]
    mine, other, old = part(folders[0], C.here(), os.getpid()), part(folders[1], "elsewhere-00000000", dead.pid), part(folders[3], "elsewhere-00000000", 1)
    os.utime(old, (time.time() - 90000,) * 2)
    assert set(C.sweep(run)) == {*gone, old}
    assert mine.exists() and other.exists() and not any(p.exists() for p in (*gone, old))


def test_a_file_system_without_locks_does_not_stop_the_work(tmp_path, monkeypatch):
    run = toy_run(tmp_path, 3)
    def none(*_): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(C.fcntl, "flock", none)
    assert work(run, run.units, simple, lambda u: run.payload(u, suffix=".bin"), lock_wait=0).code == 0
    complete(run)


def test_a_session_overwrites_once_and_fails_once(tmp_path):
    run = toy_run(tmp_path, 3); place = lambda u: run.payload(u, suffix=".bin"); did = []
    def do(unit, part):
        did.append(unit.case)
        if unit.case == "c001": raise JobError("c001.nii.gz: truncated")
        return simple(unit, part)
    assert work(run, run.units, do, place, session="a").code == 1 and did == ["c000", "c001", "c002"]
    assert work(run, run.units, do, place, session="a").code == 1 and len(did) == 3           # the runner beside: nothing to do
    assert work(run, run.units, do, place, session="b").code == 1 and did[3:] == ["c001"]      # the same command again: tries
    assert json.loads(run.failure(Unit("toy", "c001")).read_bytes())["times"] == 2
    del did[:]
    assert work(run, run.units, do, place, session="c", overwrite=True).code == 1 and did == ["c000", "c001", "c002"]
    assert work(run, run.units, do, place, session="c", overwrite=True).code == 1 and len(did) == 3
    assert work(run, run.units, simple, place, session="d").code == 0 and not run.failure(Unit("toy", "c001")).exists()
    complete(run)


def test_damaged_input_is_not_tried_again_and_a_shaky_disk_is(tmp_path, monkeypatch):
    monkeypatch.setattr(C.time, "sleep", lambda s: None)
    run = toy_run(tmp_path, 6); tries = []
    errors = dict(c000=JobError("x"), c001=gzip.BadGzipFile("x"), c002=EOFError("x"), c003=FileNotFoundError("x"), c004=OSError(errno.EIO, "x"), c005=RuntimeError("CUDA out of memory"))
    def do(unit, part): tries.append(unit.case); part.write_text("half"); raise errors[unit.case]
    out = work(run, run.units, do, lambda u: run.payload(u, suffix=".bin"))
    assert {c: tries.count(c) for c in errors} == dict(c000=1, c001=1, c002=1, c003=1, c004=3, c005=3)
    assert len(out.failed) == 6 and tree(run) == {} and leftovers(run) == []


def test_numbers_json_does_not_know_do_not_cost_the_case(tmp_path):
    run = toy_run(tmp_path, 1)
    def do(unit, part): simple(unit, part); return {"psnr": float("inf"), "mse": np.float32(.5), "nan": np.nan, "window": (0, 1)}
    identity = lambda u: {"shape": (1, 2)}
    place = lambda u: run.payload(u, suffix=".bin")
    assert work(run, run.units, do, place, identity).code == 0
    assert done(run, run.units[0], C.plain(identity(0)))["metrics"].items() >= {"psnr": None, "mse": .5, "nan": None, "window": [0, 1]}.items()
    assert work(run, run.units, do, place, identity).kept == run.units
    def odd(unit, part): simple(unit, part); return {"x": object()}
    old = tree(run)
    assert "TypeError" in work(run, run.units, odd, place, identity, overwrite=True).failed[run.units[0]]
    assert tree(run) == old and done(run, run.units[0])                  # told before anything was replaced


def test_an_equal_sidecar_stays_and_a_foreign_one_goes(tmp_path):
    run = toy_run(tmp_path, 1); u, seen = run.units[0], []
    def put(data):
        part = tmp_path / ".tmp" / "p"; part.parent.mkdir(exist_ok=True); part.write_bytes(data)
        publish(run, u, part, run.payload(u, suffix=".bin"), dict(metrics={}))
    put(b"one")
    real = os.replace
    def replace(a, b):
        if str(b).endswith(".bin"): seen.append(run.sidecar(u).exists())
        real(a, b)
    C.os.replace = replace
    try: put(b"one"); put(b"two")
    finally: C.os.replace = real
    assert seen == [True, False]


def test_the_first_writer_wins(tmp_path):
    got = []
    threads = [threading.Thread(target=lambda n=n: got.append(write_once(tmp_path / "x.json", str(n).encode() * 1000))) for n in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(got)) == 1 and len(got) == 8 and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_cut_line_of_events_is_skipped(tmp_path):
    f, tail = tmp_path / "events.jsonl", J._Tail()
    f.write_bytes(b'{"event": "start", "model": "m", "case": "a"}\n{"event": "done", "ca{"event": "kept", "model": "m", "case": "b"}\n[1]\n{"event": "sta')
    assert [e["event"] for e in tail.read(tmp_path)] == ["start"]
    with open(f, "ab") as out: out.write(b'rt", "model": "m", "case": "c"}\n')
    assert [e["case"] for e in tail.read(tmp_path)] == ["c"] and list(tail.begun.values()) == [Unit("m", "c")]
    assert list(tail.read(tmp_path / "nowhere")) == []
    J._show_event({"event": "done", "case": "a"}, lambda line: pytest.fail(line))    # an event without its numbers is no reason to die


# ---------------------------------------------------------------- the whole command

def scan(path, seed, shape=(32, 32, 16)):
    nib.save(nib.Nifti1Image(np.random.default_rng(seed).integers(-1000, 1000, shape).astype("i2"), np.diag([1., 1., 2., 1.])), path)


WORDS = ("reconstruct", "-p", "vae=dct", "-p", "device=cpu", "-p", "cases=in")
UNITS = [Unit("dct", f"c{i}") for i in range(4)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with four scans in `in`, run undisturbed, with a relative path, beside files that must not be imported"
    desk = tmp_path_factory.mktemp("desk"); (desk / "in").mkdir()
    for i in range(4): scan(desk / "in" / f"c{i}.nii.gz", i)
    for name in ("numpy", "papermill", "fvae_nb"): (desk / f"{name}.py").write_text("raise ImportError('the working folder was imported from')")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    code, said = end(fvae("run", *WORDS, "--run", "first", cwd=desk, report=True))
    assert code == 0, said
    return desk


@pytest.fixture
def finished(desk, tmp_path):
    "A copy of the finished run"
    shutil.copytree(desk / "first", tmp_path / "run")
    return Run(tmp_path / "run")


def go(desk, run, *more, **how): return fvae("run", *WORDS, "--run", run.folder, *more, cwd=desk, **how)


def same(desk, run):
    "As the undisturbed run"
    assert tree(run) == tree(Run(desk / "first")) and len(tree(run)) == 4
    assert all(done(run, u, verify=True) for u in UNITS) and leftovers(run) == []


def told(run, what="start"): return [e["case"] for f in sorted(run.folder.glob("shards/*/*/events.jsonl")) for line in f.read_text().splitlines() if (e := json.loads(line))["event"] == what]


def attempts(run): return [json.loads(p.read_bytes()) for p in sorted(run.folder.glob("shards/*/*/attempt.json"))]


def notebooks(run): return [json.loads(p.read_text()) for p in sorted(run.folder.glob("shards/*/*/job.ipynb"))]


def runner_and_kernel(mark):
    "The two processes below a supervisor"
    def look():
        named = {}
        for p in marked(mark):
            try: line = " ".join(p.cmdline())
            except psutil.Error: continue
            if "running.jobs import _main" in line: named["runner"] = p
            elif "ipykernel_launcher" in line: named["kernel"] = p
        return (named["runner"], named["kernel"]) if len(named) == 2 else None
    return until(look, what="a runner with its kernel")


def test_a_run_leaves_what_it_promises(desk):
    run = Run(desk / "first")
    assert {p.name for p in run.folder.iterdir()} == {"params.json", "cases.json", "provenance.json", "volumes", "cases", "shards", ".tmp", ".locks", "report.html", "report.ipynb", "metrics.csv", "summary.json"}
    assert attempts(run)[0]["exit"] == 0 and notebooks(run)[0]["metadata"]["fvae"]["status"] == "completed"
    assert Path(run.sources["c0"]["path"]) == desk / "in" / "c0.nii.gz"    # typed as a relative path
    assert json.loads((run.folder / "provenance.json").read_bytes())["params_sha256"] == run.params_sha256
    same(desk, run)


@pytest.mark.slow
def test_runner_killed_and_its_kernel_stopped(desk, tmp_path, mark):
    "SIGKILL of the runner in mid-case; the kernel goes with it although it is stopped; a fresh runner does the rest"
    run = Run(tmp_path / "run")
    p = go(desk, run, FVAE_TEST_HOOK=f"written:c2:sleep60:{tmp_path}/once")
    until(lambda: "c2" in told(run), what="c2")
    until((tmp_path / "once").exists)
    runner, kernel = runner_and_kernel(mark)
    assert [a["state"] for a in J.status(run.folder)["attempts"]] == ["running"]
    kernel.send_signal(signal.SIGSTOP); runner.send_signal(signal.SIGKILL)
    until(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 3, "the kernel's end")
    assert notebooks(run)[0]["metadata"]["papermill"]["end_time"] is None and "running" in {c["metadata"]["papermill"]["status"] for c in notebooks(run)[0]["cells"]}
    code, said = end(p)
    assert code == 0 and "killed by signal 9 during dct c2" in said and "starting again" in said, said
    assert told(run) == ["c0", "c1", "c2", "c3", "c2"]                   # what killed a runner goes last
    assert [a["state"] for a in J.status(run.folder)["attempts"]] == ["ended without a word", "completed"]
    same(desk, run)


@pytest.mark.slow
def test_kernel_that_keeps_dying_and_the_notebook_that_lies(desk, tmp_path):
    run = Run(tmp_path / "run")
    code, said = end(go(desk, run, FVAE_TEST_HOOK="compute:c1:kill"))
    assert code == 75 and "kernel-died during dct c1" in said and "3 done, 0 failed, 1 missing" in said, said
    assert {a["reason"] for a in attempts(run)} == {"kernel-died"} and told(run, "done") == ["c0", "c2", "c3"]
    for book in notebooks(run):                                          # papermill's word; should it ever tell the truth, we want to know
        assert {c["metadata"]["papermill"]["status"] for c in book["cells"]} == {"completed"}
        assert book["metadata"]["papermill"]["exception"] is None and book["metadata"]["papermill"]["end_time"]
        assert book["metadata"]["fvae"]["status"] == "failed" and book["metadata"]["fvae"]["error"] == "kernel-died"      # ours
    assert len(attempts(run)) == 3 and not (run.folder / "report.html").exists()
    assert end(fvae("status", run.folder))[0] == 3
    code, said = end(go(desk, run))
    assert code == 0 and told(run, "done")[3:] == ["c1"], said
    same(desk, run)


@pytest.mark.slow
def test_kernel_that_leaves_once_and_overwrite_goes_on(desk, finished, tmp_path):
    "os._exit in a kernel under --overwrite: what the first runner redid stays, the second redoes the rest, old results do not count"
    old = {u: done(finished, u)["session"] for u in UNITS}
    seen = len(told(finished))
    code, said = end(go(desk, finished, "--overwrite", FVAE_TEST_HOOK=f"written:c2:exit:{tmp_path}/once"))
    assert code == 0 and "kernel-died during dct c2; 2 units are missing" in said.replace("(", "").replace(")", ""), said
    assert told(finished)[seen:] == ["c0", "c1", "c2", "c3", "c2"]
    assert len({done(finished, u)["session"] for u in UNITS} - set(old.values())) == 1
    same(desk, finished)


@pytest.mark.slow
def test_damaged_inputs_fail_alone_and_a_mended_one_is_taken(tmp_path):
    inputs = tmp_path / "in"; inputs.mkdir()
    for i, name in enumerate(("good1", "good2", "cut", "cut4", "flip", "text", "nan", "flat")): scan(inputs / f"{name}.nii.gz", i)
    at = lambda name: inputs / f"{name}.nii.gz"
    data = at("cut").read_bytes(); at("cut").write_bytes(data[:len(data) // 2])
    at("cut4").write_bytes(at("cut4").read_bytes()[:-4])
    data = bytearray(at("flip").read_bytes()); data[len(data) // 2] ^= 255; at("flip").write_bytes(data)
    at("text").write_text("this is not a scan")
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), np.nan, "f4"), np.eye(4)), at("nan"))
    nib.save(nib.Nifti1Image(np.zeros((8, 8), "i2"), np.eye(4)), at("flat"))
    run = Run(tmp_path / "run")
    command = ("run", *WORDS, "--run", run.folder)
    code, said = end(fvae(*command, cwd=tmp_path))
    assert code == 1 and "2 done, 6 failed, 0 missing" in said, said
    state = J.status(run.folder)
    assert {f["case"] for f in state["failed"]} == {"cut", "cut4", "flip", "text", "nan", "flat"}
    for f in state["failed"]: assert f"{f['case']}.nii.gz" in f["reason"] and "DataError" in f["reason"] and "Traceback" not in f["reason"], f
    assert set(tree(run)) == {"volumes/dct/good1.nii.gz", "volumes/dct/good2.nii.gz"} and len(told(run)) == 8 and leftovers(run) == []
    assert end(fvae("status", run.folder))[0] == 1
    scan(at("cut"), 2); scan(at("good2"), 99)                             # one is mended; one that was done is replaced behind our back
    run.sidecar(Unit("dct", "good2")).unlink()
    code, said = end(fvae(*command, cwd=tmp_path))
    state = {f["case"]: f["reason"] for f in J.status(run.folder)["failed"]}
    assert code == 1 and done(run, Unit("dct", "cut")) and "cut" not in state and not run.failure(Unit("dct", "cut")).exists(), said
    assert "is not the file it was" in state["good2"]


@pytest.mark.slow
def test_damaged_results_are_found_and_redone(desk, finished):
    seen, at = len(told(finished)), lambda n: finished.payload(Unit("dct", f"c{n}"))
    at(0).write_bytes(at(0).read_bytes()[:-5])
    data = bytearray(at(1).read_bytes()); data[len(data) // 2] ^= 1; at(1).write_bytes(data)
    finished.sidecar(UNITS[2]).unlink()
    side = json.loads(finished.sidecar(UNITS[3]).read_bytes()); finished.sidecar(UNITS[3]).write_bytes(canonical(side | {"params_sha256": "0" * 64}))
    assert [bool(done(finished, u)) for u in UNITS] == [False, True, False, False] and not any(done(finished, u, verify=True) for u in UNITS)
    code, said = end(fvae("verify", finished.folder))
    assert code == 1 and said.count("damaged: dct") == 3 and "c1" in said and not finished.sidecar(UNITS[1]).exists()
    code, said = end(go(desk, finished))
    assert code == 0 and told(finished)[seen:] == ["c0", "c1", "c2", "c3"], said
    same(desk, finished)
    assert end(fvae("verify", finished.folder)) == (0, "0 damaged\n")


@pytest.mark.parametrize("spoil", [lambda s, p: s.write_bytes(s.read_bytes()[:-9]), lambda s, p: s.write_bytes(b""), lambda s, p: s.write_text("[]"), lambda s, p: s.write_text("{}"), lambda s, p: p.unlink(),
                                   lambda s, p: s.write_bytes(canonical(json.loads(s.read_bytes()) | {"schema": 2})), lambda s, p: s.write_bytes(canonical(json.loads(s.read_bytes()) | {"case": "c1"})),
                                   lambda s, p: s.write_bytes(canonical(json.loads(s.read_bytes()) | {"payload": None}))])
def test_a_sidecar_that_does_not_hold_is_no_sidecar(finished, spoil):
    u = UNITS[0]
    assert done(finished, u)
    spoil(finished.sidecar(u), finished.payload(u))
    assert done(finished, u) is None
    assert J.status(finished.folder)["missing"] == [dict(model="dct", case="c0")]
    assert [b["case"] for b in J.verify(finished.folder)] == ["c0"] and J.verify(finished.folder) == []


def test_a_result_of_other_weights_or_input_is_redone(desk, finished):
    side = done(finished, UNITS[0])
    assert done(finished, UNITS[0], side["identity"]) and not done(finished, UNITS[0], side["identity"] | {"input": "0" * 64})


@pytest.mark.slow
@pytest.mark.parametrize("limit", [60_000, 1500], ids=["no room for a payload", "nor for the notebook"])
def test_disk_full_under_the_whole_command(tmp_path, limit):
    (tmp_path / "in").mkdir(); scan(tmp_path / "in" / "big.nii.gz", 0, (64, 64, 32))
    run = Run(tmp_path / "run")
    code, said = end(go(tmp_path, run, limit=limit))
    assert code == 75 and "Traceback" not in said, said
    if limit == 60_000: assert "no space left while writing" in said and "big.nii.gz" in said and " bytes written" in said, said
    assert leftovers(run) == [] and tree(run) == {} and "0 done, 0 failed, 1 missing" in said, said
    assert len(list(run.folder.glob("shards/*/*"))) == 1                 # trying again at once would be of no use
    for book in run.folder.glob("shards/*/*/job.ipynb"): book.write_bytes(book.read_bytes()[:200])         # cut to something that is no JSON
    assert end(fvae("status", run.folder))[0] == 3
    code, said = end(go(tmp_path, run))
    assert code == 0 and J.status(run.folder)["done"] == 1 and len(tree(run)) == 1 and leftovers(run) == [], said


@pytest.mark.slow
def test_two_identical_commands_at_once(desk, tmp_path):
    def opens(path): nib.load(path).get_fdata(); gzip.decompress(path.read_bytes())
    run = Run(tmp_path / "run"); reader = Reader(run, opens)
    both = [go(desk, run, FVAE_TEST_HOOK="compute:*:sleep0.3", report=True) for _ in range(2)]
    (a, said), (b, too) = map(end, both)
    assert (a, b) == (0, 0), said + too
    assert reader.stop() == [] and reader.seen
    assert sorted(told(run)) == ["c0", "c1", "c2", "c3"]
    assert len(list(run.folder.glob("shards/*/*"))) == 2 and len(told(run, "kept")) == 4 and "report: " in said and "report: " in too
    same(desk, run)


@pytest.mark.slow
def test_two_shards_at_once_without_locks_and_an_empty_one(desk, tmp_path):
    (tmp_path / "site").mkdir(); (tmp_path / "site" / "sitecustomize.py").write_text("import fcntl\nfcntl.flock = lambda *a: None\n")
    run = Run(tmp_path / "run")
    three = [go(desk, run, "--shard", k, "--shards", 6, PYTHONPATH=f"{tmp_path}/site") for k in (0, 0, 5)]
    assert [end(p)[0] for p in three] == [0, 0, 0]
    assert {u.case for u in UNITS if done(run, u)} == {"c0"} and not (run.folder / "report.html").exists()
    assert len(list(run.folder.glob("shards/00000/*"))) == 2 and not list(run.folder.glob("shards/00005/*"))     # more shards than cases: nothing to start
    assert end(go(desk, run, "--shard", 0, "--shards", 1))[0] == 0
    same(desk, run)


def test_the_report_is_made_once_however_many_end_together(finished, monkeypatch):
    import fvae_nb.running.report as R
    made, said = [], []
    def build(run): made.append(time.time()); time.sleep(.3); write_atomic(run.folder / "report.html", b"x"); return run.folder / "report.html"
    monkeypatch.setattr(R, "build_report", build)
    def together():
        threads = [threading.Thread(target=J._report, args=(finished, said.append)) for _ in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    shutil.rmtree(finished.folder / ".locks")
    together(); assert len(made) == 1 and len(said) == 4
    together(); assert len(made) == 1                                    # nothing changed
    side = json.loads(finished.sidecar(UNITS[0]).read_bytes()); finished.sidecar(UNITS[0]).write_bytes(canonical(side | {"seconds": 1}))
    together(); assert len(made) == 2
    (finished.folder / "report.html").unlink(); together(); assert len(made) == 3
    monkeypatch.setattr(R, "build_report", lambda run: 1 / 0); (finished.folder / "report.html").unlink()
    assert J._report(finished, said.append) and "report could not be made (ZeroDivisionError" in said[-1]


@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_everything_in_order(desk, tmp_path, mark, how, code):
    run = Run(tmp_path / "run")
    p = go(desk, run, FVAE_TEST_HOOK="written:c1:sleep60")
    until(lambda: "c1" in told(run), what="c1")
    runner_and_kernel(mark); asked = time.time()
    p.send_signal(how)
    got, said = end(p)
    assert got == code and time.time() - asked < 10 and f"stopped by {how.name}" in said, said
    assert attempts(run)[0]["exit"] == 130 and notebooks(run)[0]["metadata"]["fvae"]["error"].startswith("KeyboardInterrupt")
    assert leftovers(run) == [] and [u.case for u in UNITS if done(run, u)] == ["c0"] and not list(run.folder.glob("failed/*/*"))   # the case cleaned up behind itself
    assert until(lambda: [x for x in marked(mark) if x.pid != os.getpid()] == [], 3)


def test_a_kernel_that_does_not_listen_is_killed_after_the_grace(desk, tmp_path, mark):
    run = Run(tmp_path / "run")
    code = f"from fvae_nb.running.jobs import *; import sys; sys.exit(run_job('reconstruct', make_params('reconstruct', ['vae=dct', 'device=cpu', 'cases=in'], run={str(run.folder)!r}), grace=1))"
    p = start(["-c", code], cwd=desk, FVAE_TEST_HOOK="written:c1:sleep60")
    until(lambda: "c1" in told(run), what="c1")
    _, kernel = runner_and_kernel(mark)
    kernel.send_signal(signal.SIGSTOP); asked = time.time(); p.terminate()
    assert end(p)[0] == 143 and time.time() - asked < 5


def test_the_supervisor_is_killed_and_nobody_stays(desk, tmp_path, mark):
    run = Run(tmp_path / "run")
    p = go(desk, run, FVAE_TEST_HOOK="written:c1:sleep60")
    until(lambda: "c1" in told(run), what="c1"); runner_and_kernel(mark)
    p.kill(); end(p)
    until(lambda: [x for x in marked(mark) if x.pid != os.getpid()] == [], 8, "the end of runner and kernel")
    assert leftovers(run) == []


@pytest.mark.slow
def test_kills_of_the_whole_command_leave_the_same_payloads(desk, tmp_path, mark):
    run, chance = Run(tmp_path / "run"), random.Random(1)
    for n in range(4):
        p = go(desk, run, FVAE_TEST_HOOK="compute:*:sleep0.4")
        time.sleep(chance.uniform(1, 5))
        victims = [x for x in marked(mark) if x.pid != os.getpid()]
        if n % 2: victims = [x for x in victims if x.pid == p.pid]       # only the supervisor, or everything at once
        for x in victims:
            try: x.kill()
            except psutil.NoSuchProcess: pass
        p.kill(); end(p)
        until(lambda: [x for x in marked(mark) if x.pid != os.getpid()] == [], 8, "the end of all")
    assert end(go(desk, run))[0] == 0
    same(desk, run)


@pytest.mark.slow
def test_a_case_held_elsewhere_is_waited_for_and_then_75(desk, finished):
    u = UNITS[1]
    finished.sidecar(u).unlink()
    write_atomic(finished.failure(u), canonical(dict(schema=1, model="dct", case="c1", error="DataError", reason="of last week", times=1, session="old")))
    with claim(finished, u) as mine:
        assert mine
        code, said = end(go(desk, finished, FVAE_LOCK_WAIT="0.3"))
        assert code == 75 and "3 done, 0 failed, 1 missing" in said, said  # last week's failure says nothing about today
        p = go(desk, finished)
        until(lambda: len(told(finished, "kept")) == 6, what="the other three")
    code, said = end(p)
    assert code == 0 and not finished.failure(u).exists() and J.status(finished.folder)["failed"] == [], said
    same(desk, finished)


def test_status_is_not_fooled(finished):
    a = finished.folder / "shards" / "00003" / "attempt-x"; a.mkdir(parents=True)
    state = lambda: J.status(finished.folder)["attempts"][-1]["state"]
    assert state() == "ended without a word"                             # killed before it could say who it is
    facts = dict(pid=os.getpid(), born=C.born(os.getpid()), here=C.here(), host="h", shard=3)
    write_atomic(a / "attempt.json", canonical(facts)); assert state() == "running"
    write_atomic(a / "attempt.json", canonical(facts | {"born": "1"})); assert state() == "ended without a word"      # another process with that number
    write_atomic(a / "attempt.json", canonical(facts | {"here": "elsewhere-0"})); assert state() == "no end recorded on h"
    (a / "attempt.json").write_text('{"pid":'); assert state() == "ended without a word"
    write_atomic(finished.failure(UNITS[0]), b"{cut"); assert J.status(finished.folder)["failed"] == []


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("words, said", [
    (["-p", "vea=tiny", "-p", "chunk=fast", "-p", "control=yes", "-p", "limit=0"], ["did you mean 'vae'", "chunk = 'fast'", "control = 'yes' (-p): expected true or false", "limit"]),
    (["-p", "window=5,1"], ["low < high"]),
    (["-p", "window=5,x"], ["window", "-p"]),
    (["-p", "vae=tiny", "-p", "vae=dct"], ["given twice"]),
    (["-p", "vae"], ["expected key=value"]),
    (["-p", "protocol=[x"], ["not valid JSON"]),
    (["-p", "chunk=1e400"], ["chunk"]),
    (["--shard", "2", "--shards", "2"], ["expected 0 to 1"]),
    (["-f", "nosuch"], ["no preset 'nosuch'", "smoke"]),
    (["--run", "a{b}"], ["braces"]),
    (["--run", "file/x"], ["cannot be written"]),
    (["-p", "cases=twice"], ["share one file"]),
    (["-p", "cases=upper"], ["share one file"]),
    (["-p", "cases=odd"], ["expected letters, digits"]),
])
def test_mistakes_cost_a_moment_and_leave_nothing(in_tmp, capsys, words, said):
    from fvae_nb.running.cli import main
    for name in ("twice/a.nii", "twice/a.nii.gz", "upper/a.nii.gz", "upper/A.nii.gz", "odd/-a.nii.gz"): (in_tmp / name).parent.mkdir(exist_ok=True); (in_tmp / name).write_text("x")
    (in_tmp / "file").write_text("x")
    before = sorted(in_tmp.rglob("*"))
    if not any(w.startswith("cases=") for w in words): words = [*words, "-p", "cases=thorax"]
    assert main(["run", "reconstruct", *words]) == 2
    err = capsys.readouterr().err
    for s in said: assert s in err, err
    assert sorted(in_tmp.rglob("*")) == before


@pytest.mark.parametrize("words", [["-p", "vea=tiny", "-p", "chunk=fast"], ["-p", "cases=twice"], ["-f", "other.yaml"]])
def test_a_mistake_takes_less_than_three_seconds(in_tmp, words):
    (in_tmp / "twice").mkdir()
    for name in ("a.nii", "a.nii.gz"): (in_tmp / "twice" / name).write_text("x")
    (in_tmp / "other.yaml").write_text("job: pretrain_tiny\nversion: 1\n")
    began = time.time()
    code, said = end(fvae("run", "reconstruct", *words, cwd=in_tmp))
    assert code == 2 and time.time() - began < 3 and "Traceback" not in said, said
    assert not (in_tmp / "runs").exists()


def test_a_run_belongs_to_its_parameters(desk, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(desk)
    make = lambda *p: J.make_params("reconstruct", ["vae=dct", "device=cpu", *p], run=str(finished.folder))
    assert J.open_run("reconstruct", make("cases=in")).folder == finished.folder
    with pytest.raises(JobError, match="differ in chunk"): J.open_run("reconstruct", make("cases=in", "chunk=8"))
    (tmp_path / "elsewhere" / "in").mkdir(parents=True); monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(JobError, match="differ in cases"): J.open_run("reconstruct", make("cases=in"))    # the same words, another folder
    assert J.make_params("reconstruct", ["cases=sample,thorax,x.nii.gz"]).cases == ["sample", "thorax", str(tmp_path / "elsewhere" / "x.nii.gz")]
    (finished.folder / "cases.json").write_text("{")
    with pytest.raises(JobError, match="is not JSON"): J.status(finished.folder)


def test_two_commands_with_other_parameters_cannot_share_a_new_folder(desk, tmp_path, monkeypatch):
    monkeypatch.chdir(desk)
    make = lambda *p: J.make_params("reconstruct", ["vae=dct", "device=cpu", "cases=in", *p], run=str(tmp_path / "run"))
    module = J.job_module("reconstruct"); real = module.cases
    def slow(params):                                                    # the other one comes in while we list our cases
        monkeypatch.setattr(module, "cases", real); J.open_run("reconstruct", make("chunk=8"))
        return real(params)
    monkeypatch.setattr(module, "cases", slow)
    with pytest.raises(JobError, match="differ in chunk"): J.open_run("reconstruct", make())
    assert Run(tmp_path / "run").params["chunk"] == 8 and not leftovers(Run(tmp_path / "run"))


def test_paths_are_tied_to_where_they_were_typed(in_tmp):
    "The kernel works in a folder of its own"
    (in_tmp / "here").mkdir()
    p = J.make_params("pretrain_tiny", ["photos=here", "start=w.safetensors"], run="runs/x")
    assert (p.photos, p.video, p.start, p.run) == (str(in_tmp / "here"), "", str(in_tmp / "w.safetensors"), str(in_tmp / "runs" / "x"))
    assert J.make_params("reconstruct", ["window=-1000,400"]).window == (-1000, 400)
    for job in J.jobs_available(): p = J.make_params(job); assert J.job_module(job).Params(**json.loads(p.model_dump_json())) == p     # as runner and kernel get them


def test_presets_load_and_are_for_their_job():
    p = J.make_params("pretrain_tiny", ["photos=a/b"], ["full"])
    assert (p.batch, p.late, p.muon_lr, p.steps, p.bf16, p.late_frames) == (8, .4, .006, 18000, True, 13)
    assert J.make_params("reconstruct", presets=["smoke"]).vae == ["tiny"]
    assert J.make_params("reconstruct", ["vae=dct"], ["smoke"]).vae == ["dct"]                  # -p wins
    for job in J.jobs_available():
        for preset in (J._preset_folder() / job).glob("*.yaml"): assert J.make_params(job, presets=[preset.stem])
    with pytest.raises(JobError, match="no preset 'full' for reconstruct; known: smoke"): J.make_params("reconstruct", presets=["full"])
    with pytest.raises(JobError, match="is not for job 'reconstruct'"): J.make_params("reconstruct", presets=[str(J._preset_folder() / "pretrain_tiny" / "full.yaml")])


def test_a_runner_per_gpu_and_one_without(monkeypatch):
    monkeypatch.setattr(J, "gpus", lambda: ["A", "B"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert J.free_gpus() == ["0", "1"] and J.free_gpus("cpu") == [None] and J.free_gpus("cuda:1") == [None]
    for given, want in (("", [None]), ("3", ["3"]), ("2, 5", ["2", "5"]), ("GPU-x", ["GPU-x"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given); assert J.free_gpus() == want


def test_a_job_notebook_without_its_tag_is_refused(tmp_path):
    book = json.loads((J._job_folder() / "reconstruct.ipynb").read_text())
    for cell in book["cells"]: cell["metadata"].pop("tags", None)
    (tmp_path / "x.ipynb").write_text(json.dumps(book))
    with pytest.raises(JobError, match="0 cells tagged 'parameters'"): J.check_job_notebook(tmp_path / "x.ipynb")
    for name in J.jobs_available(): J.check_job_notebook(J._job_folder() / f"{name}.ipynb")
