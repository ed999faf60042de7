"""The event loop: every device runs its list in order, over columns and not over objects.

The functions here run as they stand, over lists, and compiled by numba, over arrays (`compiled.py`): one
source, equal results. So they keep to what numba understands. Indices: a *key* is a message of one step
(step x messages + message), a *row* an action of one step (step x actions + action).

Events are (seconds, number), and among equal times the smaller number comes first: a device that goes on; past the
devices, one whose next action sends parameters (so that at one instant all activations leave before anyone's
parameters, which would hold them up); past those, a cell that has carried the next of its transfers.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import NamedTuple

__all__ = ["COMPUTE", "RECEIVE", "SEND", "Rules", "State", "Tables", "run_events"]

SEND, RECEIVE, COMPUTE = 0, 1, 2

Ints = list[int]
Floats = list[float]
Queue = list[tuple[float, int]]


class Tables(NamedTuple):
    """What does not change: the program, its prices and its paths, as columns.

    `subject` is the message of a send or receive and the price of a compute action; `price_group` is -1 where
    the device works alone. Groups and paths are runs of `group_member` and `path_cell`, each from its `..._first`.
    """

    first: Ints  # [devices + 1] of `code`
    code: Ints  # [actions] SEND, RECEIVE or COMPUTE
    carried: Ints  # [actions] 1 where the first step leaves it out
    subject: Ints
    price_seconds: Floats
    price_group: Ints
    group_first: Ints
    group_member: Ints
    message_transfer: Ints
    transfer_path: Ints
    transfer_channel: Ints
    transfer_lane: Ints
    transfer_source: Ints
    transfer_destination: Ints
    transfer_senders: (
        Ints  # 1, or the members of a collective, whose ends are -1: it begins when all have sent
    )
    transfer_bytes: Floats
    transfer_send_seconds: Floats  # what moving it takes of the devices themselves, beside their other work
    transfer_receive_seconds: Floats
    path_first: Ints
    path_cell: Ints
    path_bandwidth: Floats  # [as path_cell] bytes per second
    path_latency: Floats
    channel_slot: Ints  # [channels + 1] its first slot, one for each cell of its path
    slot_channel: Ints


class State(NamedTuple):
    """What changes; times in seconds, -1 for not yet and for nobody."""

    at: Ints  # [devices] the action that the device is at
    step: Ints  # [devices]
    since: Floats  # [devices] when it began to wait
    blocked: Ints  # [devices] 1 while its send waits for a buffer
    until: Floats  # [devices] when its messages under way will have arrived
    ends: Floats  # [steps x devices]
    start: Floats  # [rows]
    end: Floats  # [rows]
    arrival: Floats  # [keys]
    waiting: Ints  # [keys] the device that waits for it, or the latest of several
    waiting_next: Ints  # [devices] who waits for the same
    joined: Ints  # [keys] members that have sent; of collectives only
    group_count: Ints  # members that have come
    group_start: Floats  # when the last of them came
    unread: Ints  # [channels] messages sent and not yet taken
    held: Ints  # [channels] the device that waits for a buffer
    free_at: Floats  # [cells] where transfers queue
    # where transfers share: a channel carries one message at a time, and each cell is shared by the channels on it
    carrying: Ints  # [channels] key
    hops_left: Ints  # [channels]
    queue_head: Ints  # [channels] key
    queue_tail: Ints  # [channels] key
    queue_next: Ints  # [keys]
    work_done: Floats  # [cells] bytes that every channel on it got since it was last idle
    updated: Floats  # [cells] when work_done was so
    sharers: Ints  # [cells]
    due: Floats  # [cells] when it is done with the next of them
    event: Floats  # [cells] when it is looked at next: then or, since sharers may have come, before
    head: Ints  # [cells] its first slot
    least: Floats  # [cells] the least target of its slots
    slot_next: Ints  # [slots]
    slot_target: Floats  # [slots] of work_done


class Rules(NamedTuple):
    """How the engine under prediction behaves.

    buffers: -1 where sends are overlapped with what follows; else a send holds its device until the message has
    arrived, and waits until fewer than so many earlier activations of its channel are unread, or its receiver waits for
    it (0: a rendezvous). sharing: concurrent transfers share a link fairly; else they queue for it. overlap_slowdown:
    seconds that a second of compute takes longer while a message of the device is under way.
    """

    steps: int = 1
    buffers: int = -1
    sharing: bool = False
    overlap_slowdown: float = 0.0


def run_events(t: Tables, s: State, rules: Rules) -> None:
    """Run all devices as far as they come, from 0 seconds on; `s` then says when everything happened."""
    devices = len(t.first) - 1
    queue = [(0.0, device) for device in range(devices) if t.first[device] < t.first[device + 1]]
    while len(queue) > 0:
        now, number = heappop(queue)
        if number < 2 * devices:
            advance(t, s, rules, queue, number, now)
        else:
            look(t, s, rules, queue, number - 2 * devices, now)


def advance(t: Tables, s: State, rules: Rules, queue: Queue, number: int, now: float) -> None:
    """Run a device until it waits or until another event comes first."""
    devices, actions = len(t.first) - 1, len(t.code)
    device, lane = number % devices, number // devices
    action, step, stop = s.at[device], s.step[device], t.first[device + 1]
    while True:
        if action == stop:
            s.ends[step * devices + device] = now
            step += 1
            s.step[device] = step
            if step == rules.steps:
                break
            action = t.first[device]
        if len(queue) > 0 and queue[0][0] < now:
            heappush(queue, (now, device))
            break
        code = t.code[action]
        if step == 0 and t.carried[action] == 1:
            action += 1
        elif code == COMPUTE:
            price = t.subject[action]
            if t.price_group[price] >= 0:
                s.at[device] = action
                meet(t, s, rules, queue, device, now)
                return
            s.start[step * actions + action] = now
            now = lengthened(s, rules, device, now, now + t.price_seconds[price])
            s.end[step * actions + action] = now
            action += 1
            lane = 0
        elif code == SEND:
            s.at[device] = action
            own = t.transfer_lane[t.message_transfer[t.subject[action]]]
            if own > lane:
                heappush(queue, (now, own * devices + device))
                return
            now = send(t, s, rules, queue, device, now)
            if now < 0.0:
                return
            action += 1
        else:
            s.at[device] = action
            now = receive(t, s, rules, queue, device, now)
            if now < 0.0:
                return
            action += 1
            lane = 0
    s.at[device] = action


def receive(t: Tables, s: State, rules: Rules, queue: Queue, device: int, now: float) -> float:
    """Take the message that the device is at. Returns when the device goes on, -1 where it must wait."""
    action, step = s.at[device], s.step[device]
    message = t.subject[action]
    transfer = t.message_transfer[message]
    key = (step - t.carried[action]) * len(t.message_transfer) + message
    if s.arrival[key] < 0.0:
        s.waiting_next[device] = s.waiting[key]
        s.waiting[key] = device
        s.since[device] = now
        wake(t, s, queue, t.transfer_channel[transfer], now, rules)
        return -1.0
    row = step * len(t.code) + action
    s.start[row] = now
    # A message that came while the device worked was taken in beside that, which put it behind.
    now = s.arrival[key] if s.arrival[key] > now else now + t.transfer_receive_seconds[transfer]
    s.end[row] = now
    read(t, s, rules, queue, message, now)
    return now


def meet(t: Tables, s: State, rules: Rules, queue: Queue, device: int, now: float) -> None:
    """A member of a group is there; with the last of them all work together."""
    group = t.price_group[t.subject[s.at[device]]]
    first, last = t.group_first[group], t.group_first[group + 1]
    s.since[device] = now
    s.group_start[group] = max(s.group_start[group], now)
    s.group_count[group] += 1
    if s.group_count[group] < last - first:
        return
    start = s.group_start[group]
    slowest = device
    for place in range(first, last):
        if s.until[t.group_member[place]] > s.until[slowest]:
            slowest = t.group_member[place]
    for place in range(first, last):
        member = t.group_member[place]
        action = s.at[member]
        row = s.step[member] * len(t.code) + action
        end = lengthened(s, rules, slowest, start, start + t.price_seconds[t.subject[action]])
        # waiting for other members is exposed communication: the record begins when the device was ready
        s.start[row] = s.since[member]
        s.end[row] = end
        s.at[member] = action + 1
        heappush(queue, (end, member))
    s.group_count[group] = 0
    s.group_start[group] = 0.0


def lengthened(s: State, rules: Rules, device: int, start: float, end: float) -> float:
    """The end of work that is slowed while the device's messages are under way."""
    if rules.overlap_slowdown == 0.0 or s.until[device] <= start:
        return end
    return end + rules.overlap_slowdown * (min(end, s.until[device]) - start)


def send(t: Tables, s: State, rules: Rules, queue: Queue, device: int, now: float) -> float:
    """Send the message that the device is at. Returns when the device goes on, -1 where it must wait."""
    action, step = s.at[device], s.step[device]
    message = t.subject[action]
    transfer = t.message_transfer[message]
    key = step * len(t.message_transfer) + message
    channel = t.transfer_channel[transfer]
    if t.transfer_senders[transfer] > 1:
        return join(t, s, rules, queue, device, key, now)
    if rules.buffers >= 0 and t.transfer_lane[transfer] == 0:
        if s.unread[channel] >= rules.buffers and s.waiting[key] < 0:
            s.held[channel] = device
            s.blocked[device] = 1
            s.since[device] = now
            return -1.0
        s.unread[channel] += 1
    row = step * len(t.code) + action
    s.start[row] = now
    if s.blocked[device] == 1:
        s.start[row] = s.since[device]
        s.blocked[device] = 0
    if rules.sharing:
        hand_over(t, s, queue, channel, key, now)
        if rules.buffers >= 0:
            return -1.0
        now += t.transfer_send_seconds[transfer]
        s.end[row] = now
        return now
    arrival = reserve(t, s, transfer, now)
    now = arrival if rules.buffers >= 0 else now + t.transfer_send_seconds[transfer]
    s.end[row] = now
    under_way(t, s, transfer, arrival)
    deliver(t, s, rules, queue, key, arrival)
    return now


def join(t: Tables, s: State, rules: Rules, queue: Queue, device: int, key: int, now: float) -> float:
    """A member gives its part of a collective, which never holds it; with the last one it is on its way. Returns when
    the device goes on."""
    row = s.step[device] * len(t.code) + s.at[device]
    transfer = t.message_transfer[key % len(t.message_transfer)]
    s.start[row] = now
    now += t.transfer_send_seconds[transfer]
    s.end[row] = now
    s.joined[key] += 1
    if s.joined[key] == t.transfer_senders[transfer]:
        if rules.sharing:
            hand_over(t, s, queue, t.transfer_channel[transfer], key, now)
        else:
            deliver(t, s, rules, queue, key, reserve(t, s, transfer, now))
    return now


def under_way(t: Tables, s: State, transfer: int, arrival: float) -> None:
    """Both ends have a message under way until it arrives; of collectives nobody keeps count."""
    if t.transfer_senders[transfer] > 1:
        return
    source, destination = t.transfer_source[transfer], t.transfer_destination[transfer]
    s.until[source] = max(s.until[source], arrival)
    s.until[destination] = max(s.until[destination], arrival)


def deliver(t: Tables, s: State, rules: Rules, queue: Queue, key: int, arrival: float) -> None:
    """The arrival of a message is known: whoever waits for it goes on then."""
    s.arrival[key] = arrival
    receiver = s.waiting[key]
    s.waiting[key] = -1
    while receiver >= 0:
        following = s.waiting_next[receiver]
        end = max(s.since[receiver], arrival)
        row = s.step[receiver] * len(t.code) + s.at[receiver]
        s.start[row] = s.since[receiver]
        s.end[row] = end
        s.at[receiver] += 1
        heappush(queue, (end, receiver))
        read(t, s, rules, queue, key % len(t.message_transfer), end)
        receiver = following


def read(t: Tables, s: State, rules: Rules, queue: Queue, message: int, now: float) -> None:
    """A message is taken out of its buffer."""
    transfer = t.message_transfer[message]
    if rules.buffers > 0 and t.transfer_lane[transfer] == 0:
        channel = t.transfer_channel[transfer]
        s.unread[channel] -= 1
        wake(t, s, queue, channel, now, rules)


def wake(t: Tables, s: State, queue: Queue, channel: int, now: float, rules: Rules) -> None:
    """Let a sender that waits on a channel look again, unless it would wait on."""
    device = s.held[channel]
    if rules.buffers < 0 or device < 0:
        return
    key = s.step[device] * len(t.message_transfer) + t.subject[s.at[device]]
    if s.unread[channel] < rules.buffers or s.waiting[key] >= 0:
        s.held[channel] = -1
        heappush(queue, (now, device))


# -- links where transfers queue ---------------------------------------------------------------------------------


def reserve(t: Tables, s: State, transfer: int, now: float) -> float:
    """`cost.graph.reserve`, the rule that emulated links follow too, over columns; a test holds the two together."""
    path = t.transfer_path[transfer]
    size = t.transfer_bytes[transfer]
    done = now
    for place in range(t.path_first[path], t.path_first[path + 1]):
        cell = t.path_cell[place]
        free = max(now, s.free_at[cell]) + size / t.path_bandwidth[place]
        s.free_at[cell] = free
        done = max(done, free)
    return done + t.path_latency[path]


# -- links that transfers share ----------------------------------------------------------------------------------
#
# Processor sharing, one cell at a time: each of n channels on a cell gets 1/n of it, and a message is through when the
# last cell of its path has carried all its bytes. `work_done` counts what every sharer got, so that the next to be
# through is the one of the least target, whoever comes and goes.


def hand_over(t: Tables, s: State, queue: Queue, channel: int, key: int, now: float) -> None:
    """Give a message to its channel, which carries one after the other."""
    transfer = t.message_transfer[key % len(t.message_transfer)]
    path = t.transfer_path[transfer]
    slowest = t.path_bandwidth[t.path_first[path]]
    for place in range(t.path_first[path], t.path_first[path + 1]):
        slowest = min(slowest, t.path_bandwidth[place])
    # when it would arrive if nobody shared: all that is known now
    under_way(t, s, transfer, now + t.transfer_bytes[transfer] / slowest + t.path_latency[path])
    if s.carrying[channel] < 0:
        load(t, s, queue, channel, key, now)
    elif s.queue_head[channel] < 0:
        s.queue_head[channel] = key
        s.queue_tail[channel] = key
    else:
        s.queue_next[s.queue_tail[channel]] = key
        s.queue_tail[channel] = key


def load(t: Tables, s: State, queue: Queue, channel: int, key: int, now: float) -> None:
    """Put a channel's message on all cells of its path."""
    transfer = t.message_transfer[key % len(t.message_transfer)]
    path = t.transfer_path[transfer]
    first, last = t.path_first[path], t.path_first[path + 1]
    s.carrying[channel] = key
    s.hops_left[channel] = last - first
    for place in range(first, last):
        cell = t.path_cell[place]
        if s.sharers[cell] > 0:
            share = t.path_bandwidth[place] / s.sharers[cell]
            s.work_done[cell] += (now - s.updated[cell]) * share
        else:
            s.work_done[cell] = 0.0
        s.updated[cell] = now
        slot = t.channel_slot[channel] + place - first
        target = s.work_done[cell] + t.transfer_bytes[transfer]
        s.slot_target[slot] = target
        s.slot_next[slot] = s.head[cell]
        s.head[cell] = slot
        s.least[cell] = target if s.sharers[cell] == 0 else min(s.least[cell], target)
        s.sharers[cell] += 1
        expect(t, s, queue, cell, t.path_bandwidth[place], now)


def expect(t: Tables, s: State, queue: Queue, cell: int, bandwidth: float, now: float) -> None:
    """Announce when the next of a cell's sharers is through."""
    left = max(0.0, s.least[cell] - s.work_done[cell])
    s.due[cell] = now + left * s.sharers[cell] / bandwidth
    if s.event[cell] < 0.0 or s.due[cell] < s.event[cell]:
        s.event[cell] = s.due[cell]
        heappush(queue, (s.event[cell], 2 * (len(t.first) - 1) + cell))


def look(t: Tables, s: State, rules: Rules, queue: Queue, cell: int, now: float) -> None:
    """See whether a cell is done with the next of its sharers; if not, look again when it is."""
    if now != s.event[cell]:
        return  # it was to be looked at earlier, and was
    s.event[cell] = -1.0
    if s.due[cell] > now:
        s.event[cell] = s.due[cell]
        heappush(queue, (s.event[cell], 2 * (len(t.first) - 1) + cell))
    else:
        carry(t, s, rules, queue, cell, now)


def carry(t: Tables, s: State, rules: Rules, queue: Queue, cell: int, now: float) -> None:
    """A cell is through with the sharers of the least target."""
    reached = s.least[cell]
    s.work_done[cell] = reached
    s.updated[cell] = now
    through, kept, slot = (
        -1,
        -1,
        s.head[cell],
    )  # chains of slots: done with all their cells, and not with this one
    while slot >= 0:
        following = s.slot_next[slot]
        if s.slot_target[slot] <= reached:
            channel = t.slot_channel[slot]
            s.sharers[cell] -= 1
            s.hops_left[channel] -= 1
            if s.hops_left[channel] == 0:
                s.slot_next[slot] = through
                through = slot
        else:
            s.least[cell] = s.slot_target[slot] if kept < 0 else min(s.least[cell], s.slot_target[slot])
            s.slot_next[slot] = kept
            kept = slot
        slot = following
    s.head[cell] = kept
    if kept >= 0:
        channel = t.slot_channel[kept]
        path = t.transfer_path[t.message_transfer[s.carrying[channel] % len(t.message_transfer)]]
        place = t.path_first[path] + kept - t.channel_slot[channel]
        expect(t, s, queue, cell, t.path_bandwidth[place], now)
    while through >= 0:
        following = s.slot_next[through]  # before the channel's next message takes the slot
        unload(t, s, rules, queue, t.slot_channel[through], now)
        through = following


def unload(t: Tables, s: State, rules: Rules, queue: Queue, channel: int, now: float) -> None:
    """A message has passed all its cells: it arrives a latency later, and the channel's next one follows."""
    key = s.carrying[channel]
    transfer = t.message_transfer[key % len(t.message_transfer)]
    s.carrying[channel] = -1
    following = s.queue_head[channel]
    if following >= 0:
        s.queue_head[channel] = s.queue_next[following]
        load(t, s, queue, channel, following, now)
    arrival = now + t.path_latency[t.transfer_path[transfer]]
    if rules.buffers >= 0 and t.transfer_senders[transfer] == 1:
        sender = t.transfer_source[transfer]
        s.end[s.step[sender] * len(t.code) + s.at[sender]] = arrival
        s.at[sender] += 1
        heappush(queue, (arrival, sender))
    deliver(t, s, rules, queue, key, arrival)
