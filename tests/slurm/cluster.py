"""A real SLURM cluster on one machine: slurmctld, munged and one slurmd per node, each host in namespaces of its own.

A host has its own name, address, /etc/hosts, /dev/shm and process table; files and cores are those of this machine. So
MASTER_ADDR is a remote address, and whatever runs on a node dies with it. This process is the login node:

    with Cluster(folder, Site(nodes=2)) as cluster:
        cluster.run("sinfo")
        cluster.cut_power("n2")
        cluster.power_on("n2")

Everything that the cluster writes lies in `folder`. Its processes end with the thread that started them, and its
interfaces and mounts with its processes. Several clusters may run at once. Needs root and `tools/install/slurm.sh`.

Also a program: `python -m tests.slurm.cluster [NODES]` opens a shell on the login node of a cluster of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

HOST_PROGRAM = Path(__file__).with_name("host.sh")
LONGEST_FOLDER = 80
"""Characters of the folder's path: a socket's path has at most 107, and the sockets lie below the folder."""
SLURMD_PORT = 6818
SEARCH_PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Site:
    """The cluster as SLURM sees it. Cores, memory and GPUs are what the nodes claim; CUDA finds no GPU there."""

    nodes: int = 2
    cpus: int = 64
    memory_mb: int = 500_000
    gpus: int = 8
    kill_wait: int = 30
    """Seconds from SIGTERM to SIGKILL, after scancel and at a time limit; 30 is SLURM's default."""
    node_timeout: int = 10
    """Seconds until a silent node is down; SLURM's default is 300."""
    private: tuple[str, ...] = ()
    """Folders of which each node sees its own, empty at first: no shared file system there."""
    loopback_names: bool = False
    """True if each node knows its own name as 127.0.1.1, as Debian's installer writes it into /etc/hosts."""

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names, n1 first."""
        return tuple(f"n{number}" for number in range(1, self.nodes + 1))


class Cluster:
    """A cluster that runs from `start` to `stop`, or inside `with`."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.folder = folder.resolve()
        self.site = site
        self.configuration = self.folder / "slurm.conf"
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._network = 0
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ValueError(f"{self.folder} has more than {LONGEST_FOLDER} characters, too many for sockets below it")

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- What a test asks for -----------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a user on the login node, and nothing of this process's own."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": SEARCH_PATH, "SLURM_CONF": str(self.configuration)}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Runs a command on the login node and returns what it printed.

        Raises:
            RuntimeError: it failed; the message has the command and what it wrote.
        """
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    @property
    def interface(self) -> str:
        """The login node's interface to the cluster, the only one that is not in namespaces of the cluster's own."""
        return f"vppo{self._network}"

    def address(self, name: str) -> str:
        """Returns the IPv4 address of a host: `controller`, `n1`, `n2`, ..."""
        number = 2 if name == "controller" else 10 + int(name.removeprefix("n"))
        return f"10.214.{self._network}.{number}"

    def processes(self, name: str) -> list[psutil.Process]:
        """Lists what runs on a host, its PID 1 and its daemon included."""
        first = self._first_process(name)
        return [first, *first.children(recursive=True)]

    def folder_on(self, name: str, folder: str) -> Path:
        """Returns a folder as a host sees it, by a path that leads there from this process."""
        return Path("/proc", str(self._first_process(name).pid), "root", folder.lstrip("/"))

    def cut_power(self, name: str) -> None:
        """Ends a node without a word: its cable goes first, so that no peer sees a connection close."""
        self._on_switch("ip", "link", "set", f"port{name}", "down")
        self._end(name)

    def power_on(self, name: str) -> None:
        """Brings a node back after `cut_power`, and waits until SLURM has it."""
        self._launch_node(name)
        self._wait_until_ready()

    # --- From nothing to a cluster ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts every host and waits until SLURM would run a job on each node."""
        self._plug_in_login()
        self._write_files()
        self._launch("controller")
        _wait(self._switch_is_there, 10, "the controller's switch")
        _run("ip", "link", "set", self._login_port, "netns", str(self._first_process("controller").pid))
        self._on_switch("ip", "link", "set", self._login_port, "master", "eth0", "up")
        for name in self.site.names:
            self._launch_node(name)
        self._wait_until_ready()

    def stop(self) -> None:
        """Ends every host and everything on it, and waits until their processes and the login's interface are gone."""
        for name in [*self.site.names, "controller"]:
            self._end(name)
        if self._network:
            subprocess.run(["ip", "link", "del", self.interface], env=self.environment, capture_output=True)
            self._network = 0

    def _plug_in_login(self) -> None:
        """Takes a free network, whose owner is the one whose interface of that name exists."""
        for network in random.SystemRandom().sample(range(1, 255), 20):
            self._network = network
            cable = ["ip", "link", "add", self.interface, "type", "veth", "peer", "name", self._login_port]
            if not subprocess.run(cable, env=self.environment, capture_output=True).returncode:
                _run("ip", "addr", "add", f"10.214.{network}.1/24", "dev", self.interface)
                _run("ip", "link", "set", self.interface, "up")
                return
        self._network = 0
        raise RuntimeError("20 networks of 10.214.x were tried, and each is taken; `ip link` shows them")

    @property
    def _login_port(self) -> str:
        return f"vppoport{self._network}"

    def _write_files(self) -> None:
        site = self.site
        munge = self.folder / "munge"
        munge.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, munge):
            folder.chmod(0o755)
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "controller").mkdir(exist_ok=True)
        hosts = {name: self.address(name) for name in ("controller", *site.names)}
        for name in hosts:
            own = {name: "127.0.1.1"} if site.loopback_names and name != "controller" else {}
            host = self.folder / "hosts" / name
            (host / "spool").mkdir(parents=True, exist_ok=True)
            lines = [f"{address} {known}\n" for known, address in ({"localhost": "127.0.0.1"} | hosts | own).items()]
            (host / "etc_hosts").write_text("".join(lines))
        devices = self.folder / "gpus"  # SLURM wants a device behind each GPU: these are all /dev/null
        devices.mkdir(exist_ok=True)
        for number in range(site.gpus):
            with contextlib.suppress(FileExistsError):
                os.mknod(devices / f"nvidia{number}", 0o020666, os.makedev(1, 3))
        gpus = (
            f"Name=gpu Flags=nvidia_gpu_env File={devices}/nvidia[0-{self.site.gpus - 1}]\n" if self.site.gpus else ""
        )
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}")
        self.configuration.write_text(self._configuration_text())

    def _configuration_text(self) -> str:
        site, folder = self.site, self.folder
        gpus = f"GresTypes=gpu\nNodeName=DEFAULT Gres=gpu:{site.gpus}\n" if site.gpus else ""
        nodes = "".join(f"NodeName={name} NodeAddr={self.address(name)}\n" for name in site.names)
        return f"""\
ClusterName=onemachine
SlurmctldHost=controller({self.address("controller")})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/controller/slurmctld.pid
SlurmctldLogFile={folder}/controller/slurmctld.log
SlurmdSpoolDir={folder}/hosts/%n/spool
SlurmdPidFile={folder}/hosts/%n/slurmd.pid
SlurmdLogFile={folder}/hosts/%n/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
MessageTimeout=5
KillWait={site.kill_wait}
SlurmdTimeout={site.node_timeout}
ReturnToService=2
MinJobAge=86400
{gpus}NodeName=DEFAULT CPUs={site.cpus} RealMemory={site.memory_mb} State=UNKNOWN
{nodes}PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""

    # --- Hosts --------------------------------------------------------------------------------------------------------

    def _launch_node(self, name: str) -> None:
        self._launch(name)
        node, switch = (str(self._first_process(host).pid) for host in (name, "controller"))
        with contextlib.suppress(RuntimeError):  # the port of a node that lost its power
            self._on_switch("ip", "link", "del", f"port{name}")
        _run("ip", "link", "add", "eth0", "netns", node, "type", "veth", "peer", "name", f"port{name}", "netns", switch)
        self._on_switch("ip", "link", "set", f"port{name}", "master", "eth0", "up")

    def _launch(self, name: str) -> None:
        """Starts PID 1 of a host. It ends with `unshare`, which ends with the thread that started it."""
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        host = [str(HOST_PROGRAM), str(self.folder), name, self.address(name)]
        private = self.site.private if name != "controller" else ()
        environment = {"PATH": SEARCH_PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        with open(self.folder / "hosts" / name / "console.log", "ab") as log:
            self._hosts[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, *host, *private],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        _wait(lambda: self._first_process(name).is_running(), 10, f"the first process of {name}")

    def _first_process(self, name: str) -> psutil.Process:
        """Returns PID 1 of a host as this machine sees it. Raises LookupError while there is none."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._hosts[name].pid).children():
                return child
        raise LookupError(name)

    def _end(self, name: str) -> None:
        if name not in self._hosts:
            return
        with contextlib.suppress(LookupError):
            everything = self.processes(name)
            self._first_process(name).kill()  # the kernel ends the rest of its process table
            psutil.wait_procs(everything, timeout=10)
        host = self._hosts.pop(name)
        host.kill()
        host.wait()

    def _on_switch(self, *command: str) -> None:
        _run("nsenter", "--net", "--target", str(self._first_process("controller").pid), *command)

    def _switch_is_there(self) -> bool:
        self._on_switch("ip", "link", "show", "eth0")
        return True

    # --- Readiness ----------------------------------------------------------------------------------------------------

    def _wait_until_ready(self) -> None:
        _wait(self._is_ready, 30, f"SLURM with {self.site.nodes} nodes; see {self.folder}/hosts/*/*.log")

    def _is_ready(self) -> bool:
        """Returns True if every slurmd answers and slurmctld has heard of it: a node that just died counts as idle."""
        for name in self.site.names:
            socket.create_connection((self.address(name), SLURMD_PORT), timeout=1).close()
        states = "--states=idle,alloc,mix,comp"
        return len(set(self.run("sinfo", "--noheader", "--Node", states, "--format=%N").split())) == self.site.nodes


def _run(*command: str) -> None:
    done = subprocess.run(command, env={"PATH": SEARCH_PATH}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _wait(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until `happened()` is true; an error counts as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if happened():
                return
        except (OSError, RuntimeError, LookupError) as error:
            last: object = error
        else:
            last = "not yet"
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:.0f} s: {last}")
        time.sleep(0.1)


def main() -> None:
    """Opens a shell on the login node of a cluster, which ends with it."""
    nodes = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder), Site(nodes=nodes)) as cluster:
        print(f"SLURM with {nodes} nodes, {' '.join(cluster.site.names)}; it ends with this shell")
        subprocess.run([os.environ.get("SHELL", "bash")], env=os.environ | cluster.environment)


if __name__ == "__main__":
    main()
