"""One fit over many ranks: unequal ones take unequal parts of each step, and what is learnt is what one process learns."""

from __future__ import annotations

from anyfit.cluster.balance import Balancer
from anyfit.cluster.call import Call, job_of, read_call, read_outcome, write_call, write_outcome
from anyfit.cluster.group import Group
from anyfit.cluster.launcher import Cluster, launch
from anyfit.cluster.meeting import Member
from anyfit.cluster.ranks import Channel, child, device_of, figures_of, of_torchrun
from anyfit.cluster.shards import Shards

__all__ = [
    "Balancer",
    "Call",
    "Channel",
    "Cluster",
    "Group",
    "Member",
    "Shards",
    "child",
    "device_of",
    "figures_of",
    "job_of",
    "launch",
    "of_torchrun",
    "read_call",
    "read_outcome",
    "write_call",
    "write_outcome",
]
