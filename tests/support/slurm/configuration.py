"""Write the configuration of a private SLURM cluster: all paths in one folder, free ports, no files of a real cluster."""

from __future__ import annotations

import os
import pwd
import random
import socket
from dataclasses import dataclass
from pathlib import Path

CPUS_PER_NODE = 4
GPUS_PER_NODE = 2
# Environment variable of every daemon (set by `SlurmCluster`) and every job process (set by the task prolog): "FOLDER/NODE".
NODE_MARK = "INFINI_TRAIN_TEST_NODE"

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# SLURM holds a requeued job until its old credential expires. A short lifetime lets the job of a lost node restart soon.
AuthInfo=socket={folder}/munge.socket,cred_expire=5

StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
AccountingStorageType=accounting_storage/none
MinJobAge=86400

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
MpiDefault=none
PropagateResourceLimits=NONE
# Nodes have the size configured here, regardless of the machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU

JobRequeue=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# SLURM detects a lost node within two to three times this time.
SlurmdTimeout=10
KillWait=20
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,max_rpc_cnt=0

GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
    "CPUs={cpus} RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN"
)
TASK_PROLOG = """\
#!/bin/sh
echo "export TMPDIR={folder}/tmp/$SLURMD_NODENAME"
echo "export {mark}={folder}/$SLURMD_NODENAME"
"""


@dataclass(frozen=True)
class Configuration:
    """Paths of a cluster's files. The folder's path must be short, because paths of unix sockets have at most 107 bytes."""

    folder: Path
    nodes: tuple[str, ...]

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge.socket"

    def temporary_folder(self, node: str) -> Path:
        return self.folder / "tmp" / node


def free_ports(count: int) -> list[int]:
    """Return free ports below the kernel's range for outgoing connections.

    The kernel does not assign these ports to other programs, so a node that was killed can reuse its port much later.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(max(lowest // 2, 1025), lowest), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"found fewer than {count} free ports below {lowest}")


def write_configuration(folder: Path, nodes: tuple[str, ...]) -> Configuration:
    configuration = Configuration(folder, nodes)
    host = socket.gethostname().split(".")[0]
    controller_port, *node_ports = free_ports(1 + len(nodes))
    lines = [
        NODE.format(name=name, host=host, port=port, cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE)
        for name, port in zip(nodes, node_ports, strict=True)
    ]
    configuration.slurm_conf.write_text(
        SLURM_CONF.format(
            host=host,
            controller_port=controller_port,
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=folder,
            nodes="\n".join(lines),
        )
    )
    for gpu in range(GPUS_PER_NODE):
        (folder / f"gpu{gpu}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"NodeName={','.join(nodes)} Name=gpu File={folder}/gpu[0-{GPUS_PER_NODE - 1}]\n")
    prolog = folder / "task_prolog"
    prolog.write_text(TASK_PROLOG.format(folder=folder, mark=NODE_MARK))
    prolog.chmod(0o755)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    (folder / "state").mkdir()
    (folder / "work").mkdir()
    for node in nodes:
        (folder / node).mkdir()
        configuration.temporary_folder(node).mkdir(parents=True)
    return configuration
