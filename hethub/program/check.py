"""The independent checker: is this plan valid, and does it belong to this cluster?

It reads the plan as written and counts for itself; of the layout, the ownership table and the cost model it
uses only the memory figures, and only once everything else is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.memory import MemoryUse, device_memory, usable_bytes
from hethub.errors import InputError
from hethub.program.schedules import SCHEDULES
from hethub.program.updaters import own_by_strength
from hethub.specs.base import Problems
from hethub.specs.cluster import Cluster, Device, GroupLink
from hethub.specs.devices import parse_devices
from hethub.specs.document import Document, key_path
from hethub.specs.layout import lay_out
from hethub.specs.nearest import unknown_name
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.specs.workload import Model

__all__ = ["Keys", "Problem", "check_plan", "require_valid", "same_cluster"]

Keys = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a plan: where (keys into the plan file), and what is wrong and what to do."""

    keys: Keys
    text: str


def check_plan(plan: Plan) -> list[Problem]:
    """Everything wrong with a plan, in file order; empty when it may run. Memory is looked at last."""
    problems = list(_check_batch(plan))
    for number, pipeline in enumerate(plan.pipelines):
        problems.extend(_check_pipeline(pipeline, plan.workload.model, ("pipelines", number)))
    seats = list(_seats(plan))
    problems.extend(_check_names(plan, seats))
    problems.extend(_check_places(seats))
    if plan.workload.model.tied:
        problems.extend(_check_tied(plan, seats))
    if problems:
        return problems
    problems.extend(_check_precision(plan, seats))
    return problems or list(_check_memory(plan, seats))


def require_valid(plan: Plan, document: Document | None, source: str) -> None:
    """Raise one InputError, a line per problem; `source` names the plan where no document tells the line."""
    problems = check_plan(plan)
    if document is not None:
        found = Problems(document)
        for problem in problems:
            found.add(problem.keys, problem.text)
        found.raise_any()
    elif problems:
        raise InputError("\n".join(f"{source} {key_path(p.keys)}: {p.text}" for p in problems))


# -- rows, layers, shares ------------------------------------------------------------------------------------


def _check_batch(plan: Plan) -> Iterator[Problem]:
    rows = sum(p.repeat * p.micro_batches * p.micro_batch_rows for p in plan.pipelines)
    batch = plan.workload.global_batch
    if rows != batch:
        yield Problem(
            ("pipelines",),
            f"the rows add up to {rows}, the global batch is {batch}: "
            f"repeat x micro_batches x micro_batch_rows over all pipelines must give {batch}. "
            "Change them, or workload.global_batch.",
        )


def _check_pipeline(pipeline: Pipeline, model: Model, keys: Keys) -> Iterator[Problem]:
    if pipeline.schedule not in SCHEDULES:
        text = unknown_name(f"no schedule is called {pipeline.schedule!r}", pipeline.schedule, SCHEDULES)
        yield Problem((*keys, "schedule"), text)
    yield from _check_layers(pipeline.stages, model, (*keys, "stages"))
    for number, stage in enumerate(pipeline.stages):
        at = (*keys, "stages", number)
        yield from _check_stage(stage, pipeline, at)
        for place, replica in enumerate(stage.replicas):
            yield from _check_shares(stage, replica, model, (*at, "replicas", place, "ranks"))


def _layer_text(start: int, stop: int) -> str:
    return f"layer {start} is" if stop - start == 1 else f"layers {start} to {stop - 1} are"


def _check_layers(stages: list[Stage], model: Model, keys: Keys) -> Iterator[Problem]:
    """Every layer once, in order: embedding 0, decoders, head L + 1."""
    end = model.layers + 2
    at = 0
    for number, stage in enumerate(stages):
        start, stop = stage.layers
        here = (*keys, number, "layers")
        if not 0 <= start < stop <= end:
            yield Problem(
                here,
                f"[{start}, {stop}) is no range of the model's layers. Give [a, b) with 0 <= a < b <= {end}.",
            )
            return  # what follows would only repeat it
        if start > at:
            missing = _layer_text(at, start)
            yield Problem(
                here, f"{missing} left out before this stage. Begin it at {at}, or extend the one before."
            )
        elif start < at:
            twice = _layer_text(start, min(at, stop))
            yield Problem(
                here, f"{twice} held by an earlier stage too. Begin it at {at}; stages follow layer order."
            )
        at = max(at, stop)
    if at < end:
        yield Problem(
            (*keys, len(stages) - 1, "layers"),
            f"{_layer_text(at, end)} left out: the model ends at layer {end - 1} (its head). "
            f"End the last stage at {end}.",
        )


def _check_stage(stage: Stage, pipeline: Pipeline, keys: Keys) -> Iterator[Problem]:
    rows = sum(replica.rows * replica.repeat for replica in stage.replicas)
    if rows != pipeline.micro_batch_rows:
        yield Problem(
            (*keys, "replicas"),
            f"the rows of the replicas add up to {rows}, micro_batch_rows is {pipeline.micro_batch_rows}. "
            "Change the rows until they are equal.",
        )
    count = pipeline.micro_batches
    if stage.in_flight > count:
        yield Problem(
            (*keys, "in_flight"),
            f"{stage.in_flight} in flight, but there are {count} micro-batches. Use at most {count}.",
        )
    elif pipeline.schedule == "gpipe" and stage.in_flight != count:
        yield Problem(
            (*keys, "in_flight"),
            f"gpipe holds all {count} micro-batches at once. Set in_flight to {count}, or use 1f1b.",
        )


class _Split(NamedTuple):
    """What the ranks of a group divide: `unit` is the smallest piece, `here` whether the stage has it."""

    key: str
    total: int
    unit: int
    here: bool
    words: str
    layer: str


def _splits(stage: Stage, model: Model) -> tuple[_Split, ...]:
    start, stop = stage.layers
    decoder = start <= model.layers and stop > 1
    ends = start == 0 or stop == model.layers + 2
    group = model.heads // model.kv_heads
    return (
        _Split("heads", model.heads, group, decoder, "attention heads", "decoder layer"),
        _Split("ffn", model.ffn_size, 1, decoder, "feed-forward columns", "decoder layer"),
        _Split("vocab", model.vocab_size, 1, ends, "vocabulary rows", "embedding or head"),
    )


def _check_shares(stage: Stage, replica: Replica, model: Model, keys: Keys) -> Iterator[Problem]:
    """The group's shares make up each layer once, in whole units; none where the stage lacks the layer."""
    for split in _splits(stage, model):
        shares = [getattr(rank, split.key) for rank in replica.ranks]
        for number, share in enumerate(shares):
            at = (*keys, number, split.key)
            if not split.here and share:
                yield Problem(
                    at, f"the stage has no {split.layer}, so its share is 0, not {share}. Leave it out."
                )
            elif split.here and share < split.unit:
                yield Problem(
                    at, f"each rank needs at least {split.unit} of the {split.total} {split.words}. Raise it."
                )
            elif split.here and share % split.unit:
                yield Problem(
                    at,
                    f"{share} heads cut a key-value group: the model has {split.unit} heads to a group. "
                    f"Use a multiple of {split.unit}.",
                )
        total = sum(share * rank.count for share, rank in zip(shares, replica.ranks, strict=True))
        if split.here and total != split.total:
            yield Problem(
                keys,
                f"{split.key} adds up to {total}, the model has {split.total} {split.words}. "
                "Change the shares.",
            )


# -- devices -------------------------------------------------------------------------------------------------


class _Seat(NamedTuple):
    """One rank of an unrolled pipeline: `pipeline` is (entry, copy), `vocab` its half-open rows."""

    pipeline: tuple[int, int]
    stage: int
    device: str
    vocab: tuple[int, int]
    keys: Keys


def _named(rank: Rank) -> list[str]:
    """The devices of an entry; raises ValueError on a malformed range."""
    return parse_devices(rank.devices if rank.devices is not None else rank.device or "")


def _seats(plan: Plan) -> Iterator[_Seat]:
    """Every rank of every copy of every pipeline; entries with malformed or too few devices give fewer."""
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            for r, replica in enumerate(stage.replicas):
                first_row = 0
                for k, rank in enumerate(replica.ranks):
                    keys: Keys = ("pipelines", p, "stages", s, "replicas", r, "ranks", k)
                    for place, device in enumerate(_safe_names(rank)):
                        # innermost first: rank of the group, then replica, then pipeline
                        turn, member = divmod(place, rank.count)
                        row = first_row + member * rank.vocab
                        copy = turn // replica.repeat
                        yield _Seat((p, copy), s, device, (row, row + rank.vocab), keys)
                    first_row += rank.vocab * rank.count


def _safe_names(rank: Rank) -> list[str]:
    try:
        return _named(rank)
    except ValueError:
        return []  # reported by `_check_names`


def _check_names(plan: Plan, seats: list[_Seat]) -> Iterator[Problem]:
    """Devices well formed, as many as the repeats need, known and not excluded."""
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            for r, replica in enumerate(stage.replicas):
                wanted = pipeline.repeat * replica.repeat
                for k, rank in enumerate(replica.ranks):
                    keys = ("pipelines", p, "stages", s, "replicas", r, "ranks", k)
                    yield from _check_entry(rank, wanted * rank.count, keys)
    known = {device.name for device in plan.cluster.devices()}
    for entry, names in _by_entry(seat for seat in seats if seat.device not in known).items():
        yield Problem((*entry, _device_key(plan, entry)), _unknown_text(plan.cluster, names))


def _check_entry(rank: Rank, wanted: int, keys: Keys) -> Iterator[Problem]:
    key = (*keys, "device" if rank.device is not None else "devices")
    try:
        names = _named(rank)
    except ValueError as error:
        yield Problem(key, f"{error}")
        return
    if rank.device is not None and (len(names) != 1 or names[0] != rank.device):
        yield Problem(
            key, f"{rank.device!r} is not one device. Write group/node/device, or use `devices` for ranges."
        )
    elif len(names) != wanted:
        yield Problem(
            key,
            f"{len(names)} devices are named, pipeline repeat x replica repeat x count needs {wanted}. "
            "Name that many, or change the counts.",
        )


def _by_entry(seats: Iterable[_Seat]) -> dict[Keys, list[str]]:
    found: dict[Keys, list[str]] = {}
    for seat in seats:
        found.setdefault(seat.keys, []).append(seat.device)
    return found


def _device_key(plan: Plan, keys: Keys) -> str:
    _, p, _, s, _, r, _, k = keys
    assert isinstance(p, int) and isinstance(s, int) and isinstance(r, int) and isinstance(k, int)
    rank = plan.pipelines[p].stages[s].replicas[r].ranks[k]
    return "device" if rank.device is not None else "devices"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _unknown_text(cluster: Cluster, names: list[str]) -> str:
    excluded = [name for name in names if name in cluster.exclude]
    if excluded:
        return f"{_listed(excluded)}: excluded by the cluster. Use another device."
    groups = "; ".join(f"{g.name}/0-{g.nodes - 1}/0-{g.devices_per_node - 1}" for g in cluster.node_groups)
    return f"{_listed(names)}: not in the cluster, which has {groups}."


def _check_places(seats: list[_Seat]) -> Iterator[Problem]:
    """No device twice in one stage, none in two pipelines."""
    pipeline_of: dict[str, tuple[int, int]] = {}
    in_stage: set[tuple[tuple[int, int], int, str]] = set()
    for seat in seats:
        place = (seat.pipeline, seat.stage, seat.device)
        if pipeline_of.setdefault(seat.device, seat.pipeline) != seat.pipeline:
            yield Problem(seat.keys, f"{seat.device} stands in two pipelines. Use each device in one only.")
        elif place in in_stage:
            yield Problem(seat.keys, f"{seat.device} stands twice in stage {seat.stage}. Use another device.")
        in_stage.add(place)


def _check_tied(plan: Plan, seats: list[_Seat]) -> Iterator[Problem]:
    """A device with the tied table in two places keeps one shard of it: both places need the same rows."""
    held: dict[str, tuple[int, int]] = {}
    for seat in seats:
        stages = plan.pipelines[seat.pipeline[0]].stages
        layers = stages[seat.stage].layers
        if layers[0] != 0 and layers[1] != plan.workload.model.layers + 2:
            continue
        first = held.setdefault(seat.device, seat.vocab)
        if first != seat.vocab:
            yield Problem(
                (*seat.keys, "vocab"),
                f"{seat.device} holds rows {seat.vocab[0]} to {seat.vocab[1] - 1} of the tied embedding here "
                f"and {first[0]} to {first[1] - 1} in an earlier stage. Give it the same rows in both.",
            )


# -- what a device can do ------------------------------------------------------------------------------------


def _check_precision(plan: Plan, seats: list[_Seat]) -> Iterator[Problem]:
    types = {device.name: device.type for device in plan.cluster.devices()}
    seen = set()
    for seat in seats:
        device_type = types[seat.device]
        if device_type.name in seen:
            continue
        seen.add(device_type.name)
        try:
            device_type.flops_per_second(plan.workload.precision)
        except InputError as error:
            yield Problem(("workload", "precision"), f"{seat.device}: {error.message}")


def _check_memory(plan: Plan, seats: list[_Seat]) -> Iterator[Problem]:
    """The fullest device of every entry that does not fit."""
    devices = plan.cluster.devices()
    layout = lay_out(plan)
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    ownership = own_by_strength(layout, compute)
    uses = device_memory(compute, layout, *ownership.updates)
    over = {
        devices[d].name: (devices[d], use)
        for d, use in uses.items()
        if use.total > usable_bytes(devices[d].type)
    }
    reported: set[str] = set()
    for keys, names in _by_entry(seat for seat in seats if seat.device in over).items():
        fresh = [over[name] for name in names if name not in reported]
        reported.update(names)
        if fresh:
            device, use = max(fresh, key=lambda found: found[1].total - usable_bytes(found[0].type))
            yield Problem((*keys, _device_key(plan, keys)), _memory_text(device, use, len(fresh) - 1))


def _size_text(size_bytes: int) -> str:
    gib = size_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{size_bytes / 2**20:.2f} MiB"


def _memory_text(device: Device, use: MemoryUse, others: int) -> str:
    parts = ", ".join(
        f"{f.name} {_size_text(getattr(use, f.name))}"
        for f in fields(use)
        if f.name != "one" and getattr(use, f.name)
    )
    also = f" ({others} more devices of this entry are short too)" if others else ""
    return (
        f"{device.name} needs {_size_text(use.total)} ({parts}), but {_size_text(usable_bytes(device.type))} "
        f"are available{also}. Give it fewer layers, rows or shares, a lower in_flight, or recompute: full."
    )


# -- the cluster ---------------------------------------------------------------------------------------------


def same_cluster(plan: Plan, cluster: Cluster) -> list[str]:
    """How the cluster inside the plan differs from another, a line each; empty when there is no difference.

    Names of the clusters and the emulation's time scale say nothing about what runs where: not compared.
    """
    ours, theirs = plan.cluster, cluster
    found = _differences("device type", dict(ours.device_types), dict(theirs.device_types))
    found += _differences(
        "node group", {g.name: g for g in ours.node_groups}, {g.name: g for g in theirs.node_groups}
    )
    found += _differences("link", _links(ours), _links(theirs))
    names = [[group.name for group in c.node_groups] for c in (ours, theirs)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        found.append(f"node groups stand in another order: {names[0]} in the plan, {names[1]} in the cluster")
    for word, extra in (
        ("only in the plan", ours.exclude - theirs.exclude),
        ("only in the cluster", theirs.exclude - ours.exclude),
    ):
        if extra:
            found.append(f"excluded {word}: {_listed(sorted(extra))}")
    return found


def _links(cluster: Cluster) -> dict[str, GroupLink]:
    return {"-".join(sorted(link.between)): link for link in cluster.links}


def _differences(what: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in theirs:
            found.append(f"{what} {name} is in the plan only")
        elif name not in ours:
            found.append(f"{what} {name} is in the cluster only")
        elif ours[name] != theirs[name]:
            found.extend(_field_differences(f"{what} {name}", ours[name], theirs[name]))
    return found


def _field_differences(name: str, ours: object, theirs: object) -> list[str]:
    changed = [
        (field.name, getattr(ours, field.name), getattr(theirs, field.name))
        for field in fields(ours)  # type: ignore[arg-type]  # specs are dataclasses
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]
    return [f"{name}: {key} is {one} in the plan, {other} in the cluster" for key, one, other in changed]
