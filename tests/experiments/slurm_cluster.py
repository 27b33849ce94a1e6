"""A Slurm of two nodes on this machine, for one test; needs root, slurm-wlm and munge."""

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import time

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scancel")
NODES = ("node1", "node2")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=node2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def skip_unless_asked(request):
    """Skips a test that is not asked for by its marker, or that this machine cannot run."""
    if "slurm" not in (request.config.option.markexpr or ""):
        pytest.skip("runs with make test-slurm")
    lacks = [name for name in PROGRAMS if shutil.which(name) is None]
    lacks += ["root"] if os.getuid() else []
    if lacks:
        pytest.skip(f"needs {', '.join(lacks)}: apt install slurm-wlm munge, as root")


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """Its daemons by name, and the environment in which Slurm's commands reach it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts munge, the controller and a daemon per node, and waits for idle nodes."""
        folder = self.folder
        for name in ("munge", "state"):
            (folder / name).mkdir(parents=True)
        # munge refuses a socket that not everyone can reach.
        for parent in (folder / "munge", folder, *folder.parents):
            if parent.owner() == "root" and parent != pathlib.Path("/"):
                parent.chmod(parent.stat().st_mode | 0o111)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (folder / "slurm.conf").write_text(
            CONFIG.format(folder=folder, host=socket.gethostname(), ports=_free_ports(3))
        )
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        given = [f"--{option}={folder}/munge/{name}" for option, name in places.items()]
        log = f"--log-file={folder}/munge/log"
        self._daemon("munge", ["munged", "--force", "--foreground", *given, log])
        self._until(lambda: (folder / "munge" / "socket").exists(), "munge")
        self._daemon("controller", ["slurmctld", "-D"])
        for name in NODES:
            self._daemon(name, ["slurmd", "-D", "-N", name])
        self._until(lambda: self._states().count("idle") == len(NODES), "idle nodes")

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("w") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def _states(self) -> list[str]:
        return self.ask("sinfo", "-h", "-N", "-o", "%t").split()

    def _until(self, ready, what: str) -> None:
        last = time.monotonic() + 30
        while not ready():
            if time.monotonic() > last:
                logs = [path.read_text()[-500:] for path in sorted(self.folder.glob("*.out"))]
                raise RuntimeError(f"no {what} after 30 s: {' '.join(logs)}")
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        ).stdout

    def kill(self, name: str) -> None:
        """Kills a daemon; the jobs of a node's daemon live on, unseen."""
        self.daemons[name].kill()
        self.daemons[name].wait()

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        self.ask("scancel", "-u", str(os.getuid()))
        time.sleep(1)
        for daemon in reversed(self.daemons.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


@contextlib.contextmanager
def cluster(folder: pathlib.Path):
    """A running cluster, torn down at the end."""
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
