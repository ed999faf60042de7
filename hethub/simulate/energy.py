"""Energy and money of a step and of a job."""

from __future__ import annotations

from dataclasses import dataclass

from hethub.cost.graph import CostGraph
from hethub.program.actions import Program
from hethub.specs.cluster import DeviceType
from hethub.timeline.summary import DeviceSummary

__all__ = ["Job", "egress_usd", "job_of", "joules", "joules_of"]

_JOULES_PER_KWH = 3.6e6


def joules(device_type: DeviceType, seconds: float, computing: float, exposed: float) -> float | None:
    """Joules of one device over `seconds`, of which it computes and waits for communication so many; None where its
    power is not known.

    Full power while it computes, its power of communicating while compute waits for that, its idle power else; a power
    that is not given is taken as full power, which is never too little.
    """
    full = device_type.power_watts
    if full is None:
        return None
    idle = full if device_type.idle_power_watts is None else device_type.idle_power_watts
    sending = full if device_type.communication_power_watts is None else device_type.communication_power_watts
    return full * computing + sending * exposed + idle * (seconds - computing - exposed)


def joules_of(device_type: DeviceType, summary: DeviceSummary) -> float | None:
    """Joules of one device over a step, None where its power is not known."""
    computing = (summary.busy_ratio + summary.recompute_ratio) * summary.seconds
    exposed = summary.exposed_communication_ratio * summary.seconds
    return joules(device_type, summary.seconds, computing, exposed)


def egress_usd(program: Program, graph: CostGraph) -> float:
    """Dollars that a step's messages over priced links cost: bytes x the price of every link that they cross.

    Collectives of a tensor-parallel group that spans a priced link are no messages and cost nothing here.
    """
    prices = [link.usd_per_gb or 0.0 for link in graph.cluster.links]
    if not any(prices):
        return 0.0
    each = [
        sum(prices[number] for number in graph.way(t.source, t.destination, t.members).crossings)
        * t.bytes
        / 1e9
        for t in program.transfers
    ]
    return sum(each[message.transfer] for message in program.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What training over `tokens` takes; None where a price or a power is not known."""

    tokens: float
    hours: float
    kwh: float | None
    usd: float | None


def job_of(
    tokens: float,
    tokens_per_second: float,
    joules_per_token: float | None,
    usd_per_million_tokens: float | None,
) -> Job:
    """Scale the figures of a step to a job."""
    return Job(
        tokens=tokens,
        hours=tokens / tokens_per_second / 3600,
        kwh=None if joules_per_token is None else joules_per_token * tokens / _JOULES_PER_KWH,
        usd=None if usd_per_million_tokens is None else usd_per_million_tokens * tokens / 1e6,
    )
