"A throwaway Slurm for tests: munge, one controller, two node daemons on loopback, four pretend GPUs. Everything lies in one folder and is stopped by process id."
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NEEDS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "munged")

CONF = """ClusterName=fvaetest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={run}/jobcomp.txt
MinJobAge=3600
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1
GresTypes=gpu
SlurmctldTimeout=10
SlurmdTimeout=10
ReturnToService=2
KillWait=3
BatchStartTimeout=10
CompleteWait=0
InactiveLimit=0
MessageTimeout=10
TCPTimeout=2
JobRequeue=1
JobFileAppend=1
MaxArraySize=10001
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool.%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd.%n.log
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def why_not():
    "Why there can be no Slurm here; '' where there can"
    missing = [p for p in NEEDS if not find(p)]
    if missing: return f"{', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.getuid() == 0 else "needs root"


def find(program): return shutil.which(program) or next((p for d in ("/usr/sbin", "/sbin") if os.access(p := f"{d}/{program}", os.X_OK)), None)


def eventually(what, seconds, every=.1):
    "The first true answer within the time, else None"
    until = time.time() + seconds
    while time.time() < until:
        if answer := what(): return answer
        time.sleep(every)
    return None


class Cluster:
    def __init__(self, folder):
        self.run, self.processes = Path(folder), {}
        for d in ("state", "dev", "spool.n1", "spool.n2"): (self.run / d).mkdir(parents=True)
        for k in range(4): (self.run / "dev" / f"nvidia{k}").symlink_to("/dev/null")
        free = [socket.socket() for _ in range(3)]
        for s in free: s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in free]
        for s in free: s.close()
        self.host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
        (self.run / "slurm.conf").write_text(CONF.format(host=self.host, ports=ports, run=self.run))
        (self.run / "gres.conf").write_text("".join(f"NodeName=n{n} Name=gpu File={self.run}/dev/nvidia[{2*n - 2}-{2*n - 1}]\n" for n in (1, 2)))
        (self.run / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")                # named and never used; the default needs a system bus
        self.env = dict(os.environ, SLURM_CONF=str(self.run / "slurm.conf"))
        for k in list(self.env):
            if k.startswith(("SLURM_", "SBATCH_")) and k != "SLURM_CONF": del self.env[k]

    def start(self):
        key = self.run / "munge.key"
        key.write_bytes(os.urandom(128)); key.chmod(0o400); self.run.chmod(0o755)
        names = {"--key-file": "munge.key", "--socket": "munge.sock", "--pid-file": "munge.pid", "--seed-file": "munge.seed", "--log-file": "munge.log"}
        self.spawn("munged", find("munged"), "-F", "-f", *(f"{k}={self.run}/{v}" for k, v in names.items()))
        assert eventually((self.run / "munge.sock").exists, 10), (self.run / "munged.out").read_text()
        self.controller(); self.node("n1"); self.node("n2")
        assert eventually(lambda: self.states() == {"n1": "idle", "n2": "idle"}, 40), self.words()
        return self

    def spawn(self, name, *argv):
        with open(self.run / f"{name}.out", "ab") as out: self.processes[name] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=self.env)

    def controller(self): self.spawn("slurmctld", find("slurmctld"), "-D", "-f", str(self.run / "slurm.conf"))
    def node(self, name): self.spawn(name, find("slurmd"), "-D", "-N", name, "-f", str(self.run / "slurm.conf"))

    def ask(self, *argv, check=True):
        r = subprocess.run(argv, capture_output=True, text=True, env=self.env, timeout=60, stdin=subprocess.DEVNULL)
        assert not check or r.returncode == 0, r.stderr
        return r.stdout

    def states(self): return {line.split()[0]: line.split()[1].rstrip("*") for line in self.ask("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()}
    def tasks(self, job_id): return {line.split("|")[0]: line.split("|")[1] for line in self.ask("squeue", "-h", "-r", "-t", "all", "-j", job_id, "-o", "%K|%T", check=False).splitlines()}
    def words(self): return "\n".join(p.read_text(errors="replace")[-800:] for p in sorted(self.run.glob("*.log")) + sorted(self.run.glob("*.out")))

    def wait(self, job_id, seconds=120):
        "Until every task has ended; {task: state}"
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        def look():
            states = self.tasks(job_id)
            return states if states and all(s in ended for s in states.values()) else None
        states = eventually(look, seconds, .3)
        assert states, f"job {job_id} did not end: {self.tasks(job_id)}\n{self.words()}"
        return states

    def kill(self, name, sig=signal.SIGKILL):
        p = self.processes.pop(name); p.send_signal(sig); p.wait(20)

    def steps(self, node=None):
        "Process ids of slurmstepd of this cluster"
        out = []
        for p in Path("/proc").glob("[0-9]*"):
            try: words = (p / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"); env = (p / "environ").read_bytes()
            except OSError: continue
            if words.startswith("slurmstepd") and str(self.run).encode() in env + words.encode(): out.append(int(p.name))
        return out

    def family(self, pid):
        "A process and all that it started"
        kids = {}
        for p in Path("/proc").glob("[0-9]*"):
            try: kids.setdefault(int((p / "stat").read_text().rsplit(")", 1)[1].split()[1]), []).append(int(p.name))
            except OSError: continue
        def walk(pid): return [pid, *(x for k in kids.get(pid, ()) for x in walk(k))]
        return walk(pid)

    def on(self, node):
        "Every process of the step daemons that work for one node; a task's environment says which"
        out, mark = [], f"SLURMD_NODENAME={node}".encode()
        for step in self.steps():
            all_ = self.family(step)
            for pid in all_:
                try: found = mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError: continue
                if found: out += all_; break
        return out

    def lose(self, node):
        "A node dies: its daemon, the step daemons on it and all they started"
        mine = self.on(node)
        assert mine, f"nothing runs on {node}"
        self.kill(node)
        for pid in mine:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass

    def stop(self):
        if "slurmctld" in self.processes:
            self.ask("scancel", "--user=root", check=False)
            eventually(lambda: not self.ask("squeue", "-h", check=False).strip(), 15)
        for name in [n for n in self.processes if n not in ("slurmctld", "munged")] + ["slurmctld", "munged"]:
            p = self.processes.pop(name, None)
            if p is None: continue
            p.terminate()
            try: p.wait(15)
            except subprocess.TimeoutExpired: p.kill(); p.wait()
        left = self.steps()
        for pid in left: os.kill(pid, signal.SIGKILL)
        return left
