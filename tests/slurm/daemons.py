"""A real SLURM of one node, which belongs to the tests of this folder."""

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel")

CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=5
MessageTimeout=90
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=200000 Gres=gpu:2 Features=a100 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "NodeName={host} Name=gpu File=/dev/null\nNodeName={host} Name=gpu File=/dev/zero\n"


class Slurm:
    """The daemons and what they keep, in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool", "log", "munge"):
            (folder / name).mkdir(mode=0o755)
        ports = {"controller_port": free_port(), "node_port": free_port()}
        self.config = folder / "slurm.conf"
        self.config.write_text(CONFIG.format(folder=folder, host=self.host, **ports))
        (folder / "gres.conf").write_text(GPUS.format(host=self.host))
        self.environment = os.environ | {"SLURM_CONF": str(self.config)}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *arguments: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [name, *arguments], env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def start_controller(self) -> None:
        self.start("slurmctld", "-D")
        self.wait_for("scontrol", "ping", text="UP")

    def start_node(self) -> None:
        self.start("slurmd", "-D", "-N", self.host)

    def start_all(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.start("munged", "--foreground", *(f"--{option}={munge / name}" for option, name in files.items()))
        self.wait_for("munge", "--no-input", f"--socket={munge / 'socket'}", text="MUNGE")
        self.start_controller()
        self.start_node()
        for _ in range(10):
            with contextlib.suppress(AssertionError):
                self.wait_for("sinfo", "--noheader", "--format=%T", text="idle", seconds=10)
                break
            self("scontrol", "reconfigure", check=False)  # a node's first word may come before the controller listens

    def stop(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def stop_all(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False)
        for name in ("slurmd", "slurmctld", "munged"):
            if name in self.daemons:
                self.stop(name)

    def __call__(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM's prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check, timeout=60)
        return done.stdout

    def wait_for(self, *command: str, text: str, seconds: float = 60) -> str:
        """What a command prints, once it holds the text."""
        for _ in range(int(seconds / 0.2)):
            if text in (out := self(*command, check=False)):
                return out
            signal.sigtimedwait([], 0.2)
        raise AssertionError(f"{' '.join(command)} does not say {text!r} but {out!r}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
