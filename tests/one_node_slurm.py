"""A Slurm of one node, this machine, for the time of a test; for root, with munge and slurm-wlm."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
JobRequeue=1
KillWait=2
BatchStartTimeout=1
MessageTimeout=5
SlurmdTimeout=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Return why no Slurm can be started here; an empty string if it can."""
    gone = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if gone:
        return f"{', '.join(gone)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd is started as root"


class OneNodeSlurm:
    """Its daemons, and what a test does to them."""

    def __init__(self, folder: Path):
        self.folder, host = folder, socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        conf = folder / "slurm.conf"
        conf.write_text(
            CONF.format(host=host, folder=folder, ports=_free_ports(2), cpus=os.cpu_count())
        )
        self.host, self.env = host, {**os.environ, "SLURM_CONF": str(conf)}

    def __enter__(self) -> "OneNodeSlurm":
        if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge")
            self.run("su", "munge", "-s", "/bin/sh", "-c", "munged")
        self.run("slurmctld")
        self.run("slurmd")
        self.await_(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t"), 60)
        return self

    def __exit__(self, *error) -> None:
        self.run("scancel", "--user=root", "--quiet", check=False)
        for pid in ("d.pid", "ctld.pid"):
            self.end(pid, signal.SIGTERM)
        self.kill_jobs()

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command with this Slurm's configuration; return what it printed."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stderr or done.stdout}")
        return done.stdout

    def fail_node(self) -> None:
        """End all that runs on the node at once, as a power cut would; start it again."""
        self.end("d.pid", signal.SIGKILL)
        self.kill_jobs()
        (self.folder / "d.pid").unlink(missing_ok=True)
        self.run("scontrol", "update", f"nodename={self.host}", "state=down", "reason=power")
        self.await_(lambda: not self.jobs("R"), 30)
        self.run("slurmd")
        self.run("scontrol", "update", f"nodename={self.host}", "state=resume", check=False)
        self.hurry()

    def jobs(self, state: str) -> list[str]:
        """Return the jobs in a state: R runs, PD waits."""
        return self.run("squeue", "-h", "-r", "-t", state, "-o", "%i").split()

    def hurry(self) -> None:
        """Start what was put back into the queue now, and not after two minutes."""
        for number in self.jobs("PD"):
            self.run("scontrol", "update", f"jobid={number}", "starttime=now", check=False)

    def kill_jobs(self) -> None:
        """End the steps of this Slurm and the processes below them."""
        mine = str(self.folder / "slurm.conf").encode()
        for process in Path("/proc").iterdir():
            try:
                named = (process / "cmdline").read_bytes()
                inside = b"SLURM_JOB_ID=" in (env := (process / "environ").read_bytes())
                if (inside or b"slurmstepd" in named) and mine in env + named:
                    os.kill(int(process.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue

    def end(self, pid: str, number: int) -> None:
        """Send a signal to one of the daemons, by its pid file."""
        try:
            os.kill(int((self.folder / pid).read_text()), number)
        except (OSError, ValueError):
            return

    def await_(self, done, seconds: float) -> None:
        """Wait until something is so."""
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() > until:
                said = (self.folder / "ctld.log").read_text()[-2000:]
                raise AssertionError(f"not within {seconds} s; slurmctld said:\n{said}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
