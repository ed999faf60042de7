"""Who waits for whom when a program does not end."""

from __future__ import annotations

from hethub.program.actions import Program
from hethub.simulate.kernel import RECEIVE, SEND, State, Tables

__all__ = ["deadlock_text"]


def deadlock_text(program: Program, t: Tables, s: State) -> str | None:
    """The cycle of devices that wait for each other, in words; None when all devices have ended.

    Where they wait for one that has ended, or ends in no cycle, it is the chain of those.
    """
    stuck = [
        device
        for device in range(len(t.first) - 1)
        if t.first[device] < t.first[device + 1] and s.at[device] < t.first[device + 1]
    ]
    if not stuck:
        return None
    chain = [stuck[0]]
    while (following := _waits_for(program, t, s, chain[-1], stuck)) not in chain:
        if following not in stuck:
            shown = f"{_words(program, t, s, chain[-1])}, for rank {following}, which has ended"
            return f"deadlock: {shown}"
        chain.append(following)
    cycle = chain[chain.index(following) :]
    links = [f"{_words(program, t, s, device)}, for rank {other}" for device, other in _pairs(cycle)]
    return f"deadlock of {len(cycle)} ranks: {'; '.join(links)}"


def _pairs(cycle: list[int]) -> list[tuple[int, int]]:
    return list(zip(cycle, [*cycle[1:], cycle[0]], strict=True))


def _words(program: Program, t: Tables, s: State, device: int) -> str:
    return f"rank {device} waits at {program.describe(device, int(s.at[device] - t.first[device]))}"


def _waits_for(program: Program, t: Tables, s: State, device: int, stuck: list[int]) -> int:
    """The device whose next move a stuck one needs."""
    action = s.at[device]
    if t.code[action] in (SEND, RECEIVE):
        transfer = t.message_transfer[t.subject[action]]
        if t.transfer_senders[transfer] > 1:
            joint = program.transfers[transfer].members
            step = s.step[device] - t.carried[action]
            return next((m for m in joint if not _joined(t, s, m, t.subject[action], step)), joint[0])
        other = t.transfer_destination if t.code[action] == SEND else t.transfer_source
        return int(other[transfer])
    group = t.price_group[t.subject[action]]
    members = t.group_member[t.group_first[group] : t.group_first[group + 1]]
    absent = [int(member) for member in members if not _meets(t, s, member, group)]
    return next((member for member in absent if member in stuck), absent[0])


def _joined(t: Tables, s: State, member: int, message: int, step: int) -> bool:
    """Whether a member has given its part of a step's collective."""
    own = range(int(t.first[member]), int(t.first[member + 1]))
    place = next((a for a in own if t.code[a] == SEND and t.subject[a] == message), None)
    return place is not None and (s.step[member], s.at[member]) > (step, place)


def _meets(t: Tables, s: State, member: int, group: int) -> bool:
    """Whether a member has come to its group."""
    action = s.at[member]
    if action == t.first[member + 1]:
        return False
    return t.code[action] not in (SEND, RECEIVE) and t.price_group[t.subject[action]] == group
