"""The configuration files of the daemons of `slurm_cluster` as text, and free ports and subnets for them."""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost=ctl({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=CORE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
# the machine has fewer CPUs than the nodes claim
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_min_age_reserve=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
CompleteWait=0
MinJobAge=3600
MessageTimeout={message_timeout_s}
SlurmctldTimeout=30
SlurmdTimeout={node_timeout_s}
UnkillableStepTimeout=20
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=3
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

# Shell scripts for `sh -c` inside the new namespaces of a host; all values are passed as environment variables.
ENTER_NETWORK = """\
outside="nsenter --net=/proc/$PPID/ns/net"
ip link add eth0 type veth peer name "$VETH" netns "$PPID"
$outside ip link set "$VETH" master "$BRIDGE" up
ip link set lo up
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
mount --bind "$FOLDER/nsswitch.conf" /etc/nsswitch.conf
"""

ENTER_NODE = """\
mount --bind "$FOLDER/hosts" /etc/hosts
hostname "$NAME"
exec "$@"
"""


def config_files(folder: Path, addresses: dict[str, str], cpus: int, gpus: int, node_timeout_s: int) -> dict[str, str]:
    """The text of each file by name. `addresses` has the controller first, then the nodes.

    A silent node counts as down after one to two times `node_timeout_s`, plus the time of two messages.
    """
    ctl, *nodes = addresses
    ports = dict(zip(addresses, free_ports(len(addresses)), strict=True))
    shape = f"Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus}"
    return {
        "slurm.conf": SLURM_CONF.format(
            name=folder.name,
            folder=folder,
            address=addresses[ctl],
            port=ports[ctl],
            node_timeout_s=node_timeout_s,
            message_timeout_s=min(10, max(1, node_timeout_s // 3)),
            nodes="\n".join(f"NodeName={n} NodeAddr={addresses[n]} Port={ports[n]} {shape}" for n in nodes),
        ),
        "gres.conf": "".join(f"NodeName={n} Name=gpu File={folder}/gpu[0-{gpus - 1}]\n" for n in nodes if gpus),
        "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
        "hosts": "127.0.0.1 localhost\n" + "".join(f"{address} {n}\n" for n, address in addresses.items()),
        # no DNS: in a private network nothing answers it, and each look-up of an address would wait ten seconds
        "nsswitch.conf": "hosts: files\n",
    }


def free_ports(count: int) -> list[int]:
    """TCP ports that are free at the moment."""
    held = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


def free_subnet() -> str:
    """The first three numbers of a /24 subnet that no interface of this machine uses."""
    used = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, text=True, check=True, timeout=10).stdout
    return next(subnet for i in range(256) if f" {(subnet := f'10.77.{i}')}." not in used)
