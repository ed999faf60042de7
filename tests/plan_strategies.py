"""Small plans for tests: a table of named ones and a hypothesis strategy of random valid ones.

All of them fit at most 6 CPU devices and a model so small that a step of real math takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from hypothesis import strategies as st

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.program.actions import Program
from hethub.program.compile import compile_program
from hethub.program.islands import Islands
from hethub.program.schedules import SCHEDULES
from hethub.specs.cluster import Cluster, DeviceType, GroupLink, Link, NodeGroup
from hethub.specs.layout import lay_out
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.specs.workload import Model, Workload

__all__ = [
    "NAMED_PLANS",
    "SEQUENCE",
    "VOCABULARY",
    "clusters",
    "islands",
    "joined",
    "models",
    "plans",
    "six_plans",
    "three_speeds",
    "tiny_model",
]

SEQUENCE = 16
VOCABULARY = 64
_FFN = 24


# -- building blocks ---------------------------------------------------------------------------------------


def tiny_model(*, layers: int = 3, heads: int = 4, kv_heads: int = 4, tied: bool = False) -> Model:
    """A Llama of a few ten thousand parameters; hidden size 4 x heads."""
    return Model(
        name="tiny",
        hidden_size=4 * heads,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4,
        ffn_size=_FFN,
        vocab_size=VOCABULARY,
        tied=tied,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        rope_scaling=None,
    )


def _link(megabytes_per_second: float, milliseconds: float) -> Link:
    return Link(
        name="test-link",
        bandwidth_bytes_per_second=megabytes_per_second * 1e6,
        latency_seconds=milliseconds / 1e3,
        transport="shared-memory",
    )


def _device_type(name: str, gflops: float, mebibytes: int = 64) -> DeviceType:
    return DeviceType(
        name=name,
        catalog=None,
        vendor="cpu",
        memory_bytes=mebibytes * 2**20,
        memory_reserve_bytes=0,
        memory_bandwidth_bytes_per_second=gflops * 1e9,
        peak_flops_per_second={"bf16": gflops * 1e9, "fp32": gflops * 1e9, "fp64": gflops * 5e8},
        matmul_efficiency=0.8,
        memory_efficiency=0.8,
        substitute_dtype={},
        power_watts=None,
        usd_per_hour=None,
    )


def three_speeds(*, emulated: bool = False, slower: float = 1.0) -> Cluster:
    """Six devices: a/0/0-1 fast, b/0-1/0 middle (a node each), c/0/0-1 slow; c is in another zone.

    With devices `slower` and latencies as much shorter, stages are cut into parts."""
    types = {"fast": 4.0 / slower, "middle": 2.5 / slower, "slow": 1.2 / slower}
    inside, outside = _link(400, 0.05 / slower), _link(100, 0.2 / slower)
    shapes = (("a", "fast", 1, 2, "east"), ("b", "middle", 2, 1, "east"), ("c", "slow", 1, 2, "west"))
    return Cluster(
        name="three-speeds",
        device_types={name: _device_type(name, gflops) for name, gflops in types.items()},
        node_groups=tuple(
            NodeGroup(
                name=name,
                device_type=device_type,
                nodes=nodes,
                devices_per_node=each,
                intra_link=inside,
                inter_link=outside,
                zone=zone,
            )
            for name, device_type, nodes, each, zone in shapes
        ),
        links=(
            GroupLink(
                between=("east", "west"), link=_link(50, 0.5 / slower), total_bandwidth_bytes_per_second=None
            ),
        ),
        emulated_time_scale=1.0 if emulated else None,
    )


FAST, FAST2, MIDDLE, MIDDLE2, SLOW, SLOW2 = ("a/0/0", "a/0/1", "b/0/0", "b/1/0", "c/0/0", "c/0/1")

# A group member: (device, heads, ffn, vocab); None stands for the whole of it.
Member = tuple[str, int | None, int | None, int | None]


def alone(device: str) -> list[Member]:
    """A group of one, which holds everything."""
    return [(device, None, None, None)]


class _Shapes:
    """Writes plans for one model, leaving out the shares of layers that a stage does not have."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def rank(self, member: Member, layers: tuple[int, int]) -> Rank:
        device, heads, ffn, vocab = member
        model = self.model
        decoder = layers[0] <= model.layers and layers[1] > 1
        ends = layers[0] == 0 or layers[1] == model.layers + 2
        return Rank(
            device=device,
            heads=(model.heads if heads is None else heads) if decoder else 0,
            ffn=(model.ffn_size if ffn is None else ffn) if decoder else 0,
            vocab=(model.vocab_size if vocab is None else vocab) if ends else 0,
        )

    def stage(
        self,
        layers: tuple[int, int],
        groups: Sequence[tuple[int, list[Member]]],
        *,
        in_flight: int = 2,
        recompute: Literal["none", "selective", "full"] = "none",
    ) -> Stage:
        """`groups` are (rows, members) of each replica."""
        replicas = [Replica(rows=rows, ranks=[self.rank(m, layers) for m in ms]) for rows, ms in groups]
        return Stage(layers=layers, recompute=recompute, in_flight=in_flight, replicas=replicas)

    def chain(
        self,
        cuts: Sequence[int],
        devices: Sequence[str],
        rows: int = 2,
        micro_batches: int = 4,
        in_flight: int = 3,
        schedule: str = "1f1b",
    ) -> Pipeline:
        """A pipeline of single devices: stage i holds layers [cuts[i], cuts[i + 1])."""
        stages = [
            self.stage((a, b), [(rows, alone(d))], in_flight=min(in_flight, micro_batches))
            for a, b, d in zip(cuts, cuts[1:], devices, strict=False)
        ]
        return Pipeline(schedule=schedule, micro_batches=micro_batches, micro_batch_rows=rows, stages=stages)


def _plan(
    name: str, model: Model, pipelines: list[Pipeline], precision: str, cluster: Cluster | None = None
) -> Plan:
    """The global batch is whatever the pipelines add up to."""
    batch = sum(p.repeat * p.micro_batches * p.micro_batch_rows for p in pipelines)
    workload = Workload(
        model=model, sequence_length=SEQUENCE, global_batch=batch, precision=precision, optimizer="adamw"
    )
    cluster = three_speeds() if cluster is None else cluster
    return Plan(name=name, pipelines=pipelines, cluster=cluster, workload=workload)


def compute_model(plan: Plan) -> ComputeModel:
    """The prices of a plan's cluster and workload."""
    return ComputeModel(CostGraph(plan.cluster), plan.workload)


def compile_plan(plan: Plan, *, training: bool = True, islands: Mapping[int, int] | None = None) -> Program:
    """The plan's program; collectives carry gradients and weights inside `islands`."""
    return compile_program(lay_out(plan), compute_model(plan), training=training, islands=joined(islands))


def joined(islands: Mapping[int, int] | None) -> Islands | None:
    """Islands in which small models' uneven shares may be padded."""
    return None if islands is None else Islands(islands, most_padding=2.0)


# -- named plans: global batch 8 each -----------------------------------------------------------------------

NamedPlan = Callable[[str], Plan]
NAMED_PLANS: dict[str, NamedPlan] = {}
_Build = Callable[[_Shapes], list[Pipeline]]


def _named(
    name: str, *, layers: int = 3, heads: int = 4, kv_heads: int = 4, tied: bool = False, slower: float = 1.0
) -> Callable[[_Build], _Build]:
    """Add a plan to the table; the function gives its pipelines for a model of these sizes."""

    def register(build: _Build) -> _Build:
        model = tiny_model(layers=layers, heads=heads, kv_heads=kv_heads, tied=tied)

        def make(precision: str = "fp32") -> Plan:
            return _plan(name, model, build(_Shapes(model)), precision, three_speeds(slower=slower))

        NAMED_PLANS[name] = make
        return build

    return register


@_named("single device")
def _single(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 5), [FAST])]


@_named("pipeline of 2")
def _pipeline_2(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 2, 5), [FAST, SLOW])]


@_named("uneven pipeline of 3", layers=4)
def _pipeline_3(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 3, 5, 6), [FAST, MIDDLE, SLOW])]


@_named("rows 3 + 1")
def _rows_3_1(x: _Shapes) -> list[Pipeline]:
    stage = x.stage((0, 5), [(3, alone(FAST)), (1, alone(SLOW))])
    return [Pipeline(micro_batches=2, micro_batch_rows=4, stages=[stage])]


@_named("rows 5 + 2 + 1")
def _rows_5_2_1(x: _Shapes) -> list[Pipeline]:
    stage = x.stage((0, 5), [(5, alone(FAST)), (2, alone(MIDDLE)), (1, alone(SLOW))], in_flight=1)
    return [Pipeline(micro_batches=1, micro_batch_rows=8, stages=[stage])]


@_named("rows cut differently in each stage")
def _rows_cross(x: _Shapes) -> list[Pipeline]:
    stages = [
        x.stage((0, 2), [(3, alone(FAST)), (1, alone(SLOW))]),
        x.stage((2, 5), [(1, alone(MIDDLE)), (1, alone(SLOW2)), (2, alone(FAST2))], in_flight=1),
    ]
    return [Pipeline(micro_batches=2, micro_batch_rows=4, stages=stages)]


@_named("heads 6 + 2", heads=8, kv_heads=8)
def _heads_6_2(x: _Shapes) -> list[Pipeline]:
    stage = x.stage((0, 5), [(2, [(FAST, 6, 18, 48), (SLOW, 2, 6, 16)])])
    return [Pipeline(micro_batches=4, micro_batch_rows=2, stages=[stage])]


@_named("uneven ffn and vocabulary")
def _ffn_vocab(x: _Shapes) -> list[Pipeline]:
    stage = x.stage((0, 5), [(4, [(FAST, 2, 13, 41), (MIDDLE, 1, 10, 22), (SLOW, 1, 1, 1)])])
    return [Pipeline(micro_batches=2, micro_batch_rows=4, stages=[stage])]


@_named("vocabulary-parallel tied head", tied=True)
def _tied_parallel(x: _Shapes) -> list[Pipeline]:
    stages = [
        x.stage((0, 2), [(2, [(FAST, 3, 20, 50), (FAST2, 1, 4, 14)])]),
        x.stage((2, 5), [(2, [(MIDDLE, 2, 12, 30), (SLOW, 2, 12, 34)])]),
    ]
    return [Pipeline(micro_batches=4, micro_batch_rows=2, stages=stages)]


@_named("two pipelines of different depth", layers=4)
def _two_depths(x: _Shapes) -> list[Pipeline]:
    return [
        x.chain((0, 4, 6), [FAST, MIDDLE], rows=2, micro_batches=3),
        x.chain((0, 2, 4, 6), [SLOW, SLOW2, MIDDLE2], rows=1, micro_batches=2),
    ]


@_named("pipelines of different tensor-parallel degree", heads=8, kv_heads=4)
def _two_degrees(x: _Shapes) -> list[Pipeline]:
    three: list[Member] = [(MIDDLE, 4, 12, 32), (MIDDLE2, 2, 8, 20), (SLOW, 2, 4, 12)]
    return [
        x.chain((0, 5), [FAST], rows=2, micro_batches=3),
        Pipeline(micro_batches=2, micro_batch_rows=1, stages=[x.stage((0, 5), [(1, three)], in_flight=1)]),
    ]


@_named("everything uneven at once", layers=4, heads=8, kv_heads=4, tied=True)
def _everything(x: _Shapes) -> list[Pipeline]:
    first = [
        x.stage((0, 4), [(2, [(FAST, 6, 17, 47), (MIDDLE, 2, 7, 17)]), (1, alone(FAST2))], recompute="full"),
        x.stage((4, 6), [(3, [(MIDDLE2, 4, 10, 31), (SLOW, 4, 14, 33)])], in_flight=1),
    ]
    return [
        Pipeline(micro_batches=2, micro_batch_rows=3, stages=first),
        x.chain((0, 6), [SLOW2], rows=1, micro_batches=2, in_flight=1),
    ]


@_named("tied embedding on the first and last stage", tied=True)
def _tied_ends(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 1, 4, 5), [FAST, MIDDLE, SLOW])]


@_named("recompute full")
def _recompute(x: _Shapes) -> list[Pipeline]:
    stages = [
        x.stage((0, 3), [(2, alone(FAST))], recompute="full"),
        x.stage((3, 5), [(2, alone(SLOW))], recompute="full", in_flight=1),
    ]
    return [Pipeline(micro_batches=4, micro_batch_rows=2, stages=stages)]


@_named("gpipe")
def _gpipe(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 2, 4, 5), [FAST, MIDDLE, SLOW], in_flight=4, schedule="gpipe")]


@_named("interleaved: unequal chunks in a loop over 2 devices", layers=4)
def _interleaved(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 2, 3, 5, 6), [FAST, SLOW, FAST, SLOW], schedule="interleaved")]


@_named("interleaved: a V over 2 devices with little memory", layers=5)
def _interleaved_v(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 3, 4, 5, 7), [FAST, SLOW, SLOW, FAST], in_flight=2, schedule="interleaved")]


@_named("zb-h1", layers=4)
def _zero_bubble(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 3, 5, 6), [FAST, MIDDLE, SLOW], schedule="zb-h1")]


@_named("1f1b-split", layers=4)
def _one_forward_one_backward_split(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 3, 5, 6), [FAST, MIDDLE, SLOW], schedule="1f1b-split")]


@_named("zb-h1 with rows, shares and recomputation")
def _zero_bubble_uneven(x: _Shapes) -> list[Pipeline]:
    stages = [
        x.stage((0, 2), [(3, alone(FAST)), (1, alone(SLOW))], recompute="full"),
        x.stage((2, 5), [(4, [(MIDDLE, 3, 20, 40), (MIDDLE2, 1, 4, 24)])]),
    ]
    return [Pipeline(schedule="zb-h1", micro_batches=2, micro_batch_rows=4, stages=stages)]


@_named("list", layers=4)
def _list(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 1, 4, 6), [SLOW, FAST, MIDDLE], rows=1, micro_batches=8, schedule="list")]


@_named("list: chunks in a loop and a tied table", layers=4, tied=True)
def _list_chunks(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 1, 3, 4, 6), [FAST, SLOW, FAST, SLOW], schedule="list")]


@_named("chunks: one device in stages 0 and 2", layers=4)
def _chunks(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 2, 4, 6), [FAST, SLOW, FAST])]


@_named("chunks with a tied table twice on one device", tied=True)
def _tied_chunks(x: _Shapes) -> list[Pipeline]:
    return [x.chain((0, 2, 4, 5), [FAST, MIDDLE, FAST])]


@_named("neighbouring stages share a device")
def _neighbours(x: _Shapes) -> list[Pipeline]:
    stages = [
        x.stage((0, 2), [(2, alone(FAST)), (2, alone(MIDDLE))]),
        x.stage((2, 5), [(3, alone(FAST)), (1, alone(SLOW))]),
    ]
    return [Pipeline(micro_batches=2, micro_batch_rows=4, stages=stages)]


@_named("grouped-query heads", heads=8, kv_heads=2)
def _grouped(x: _Shapes) -> list[Pipeline]:
    stages = [
        x.stage((0, 3), [(2, [(FAST, 4, 15, 40), (MIDDLE, 4, 9, 24)])]),
        x.stage((3, 5), [(1, alone(SLOW)), (1, alone(FAST2))]),
    ]
    return [Pipeline(micro_batches=4, micro_batch_rows=2, stages=stages)]


@_named("deep and narrow: a stage per layer", layers=4)
def _deep(x: _Shapes) -> list[Pipeline]:
    order = [SLOW, FAST, MIDDLE, FAST2, MIDDLE2, SLOW2]
    return [x.chain((0, 1, 2, 3, 4, 5, 6), order, rows=1, micro_batches=8, in_flight=6)]


@_named("replicas that reduce in parts", slower=20)
def _in_parts(x: _Shapes) -> list[Pipeline]:
    stage = x.stage((0, 5), [(2, alone(FAST)), (1, alone(MIDDLE)), (1, alone(SLOW))])
    return [Pipeline(micro_batches=2, micro_batch_rows=4, stages=[stage])]


@_named("one micro-batch in parts", layers=4, slower=20)
def _one_in_parts(x: _Shapes) -> list[Pipeline]:
    """Forward and backward of the same micro-batch are cut."""
    stage = x.stage((0, 6), [(5, alone(FAST)), (3, alone(SLOW))], in_flight=1)
    return [Pipeline(micro_batches=1, micro_batch_rows=8, stages=[stage])]


@_named("parts of everything uneven", layers=4, heads=8, kv_heads=4, tied=True, slower=20)
def _parts_everything(x: _Shapes) -> list[Pipeline]:
    return _everything(x)


@_named("parts, split backward and recomputation", layers=4, slower=20)
def _parts_split(x: _Shapes) -> list[Pipeline]:
    """Both pipelines hold the same layers, cut differently."""
    chains = [
        x.chain((0, 3, 6), [FAST, MIDDLE], rows=1, micro_batches=4),
        x.chain((0, 4, 6), [SLOW, MIDDLE2], rows=1, micro_batches=4),
    ]
    modes: tuple[Literal["selective", "full"], ...] = ("selective", "full")
    stages = [
        [s.model_copy(update={"recompute": mode}) for s, mode in zip(c.stages, modes, strict=True)]
        for c in chains
    ]
    return [
        c.model_copy(update={"schedule": "zb-h1", "stages": own})
        for c, own in zip(chains, stages, strict=True)
    ]


@_named("selective recomputation in a group", heads=8, kv_heads=2)
def _selective(x: _Shapes) -> list[Pipeline]:
    stages = [
        x.stage((0, 3), [(2, [(FAST, 4, 15, 40), (MIDDLE, 4, 9, 24)])], recompute="selective"),
        x.stage((3, 5), [(2, alone(SLOW))], recompute="selective", in_flight=1),
    ]
    return [Pipeline(micro_batches=4, micro_batch_rows=2, stages=stages)]


# -- six ways to cut one model: global batch 8 each, for what goes from one plan to another -------------------

_SIX: dict[str, _Build] = {
    "one device": lambda x: [x.chain((0, 6), [FAST])],
    "unequal stages": lambda x: [x.chain((0, 3, 5, 6), [FAST, MIDDLE, SLOW])],
    "unequal rows": lambda x: [
        Pipeline(
            micro_batches=1,
            micro_batch_rows=8,
            stages=[x.stage((0, 6), [(5, alone(FAST)), (2, alone(MIDDLE)), (1, alone(SLOW))], in_flight=1)],
        )
    ],
    "unequal heads": lambda x: [
        Pipeline(
            micro_batches=4,
            micro_batch_rows=2,
            stages=[x.stage((0, 6), [(2, [(FAST, 6, 18, 48), (SLOW, 2, 6, 16)])])],
        )
    ],
    "unlike pipelines": lambda x: [
        x.chain((0, 4, 6), [FAST, MIDDLE], rows=2, micro_batches=3),
        x.chain((0, 2, 4, 6), [SLOW, SLOW2, MIDDLE2], rows=1, micro_batches=2),
    ],
    "everything uneven": _everything,
}


def six_plans(precision: str = "fp32") -> dict[str, Plan]:
    """Plans of one tied model of 4 layers, 8 heads in groups of 2; on one to six devices."""
    model = tiny_model(layers=4, heads=8, kv_heads=4, tied=True)
    return {name: _plan(name, model, build(_Shapes(model)), precision) for name, build in _SIX.items()}


# -- random plans ------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> Model:
    """2 to 5 layers, 2 to 8 heads in groups, tied or not."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.sampled_from([n for n in (1, 2, 4) if 2 <= n * kv_heads <= 8]))
    return tiny_model(
        layers=draw(st.integers(2, 5)), heads=heads, kv_heads=kv_heads, tied=draw(st.booleans())
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """2 to 6 CPU devices in 1 to 3 groups, in one zone or a chain of zones, real or emulated."""
    sizes = draw(st.lists(st.sampled_from([(1, 1), (1, 2), (2, 1)]), min_size=1, max_size=3))
    if sum(nodes * each for nodes, each in sizes) < 2:
        sizes = [(1, 2)]
    apart = draw(st.booleans())
    speed = st.sampled_from([0.1, 1.0, 2.5, 4.0])  # 0.1: slow enough for parts
    link = st.builds(_link, st.sampled_from([10.0, 100.0]), st.sampled_from([0.01, 0.1, 1.0]))
    groups = tuple(
        NodeGroup(
            name=f"g{i}",
            device_type=f"type{i}",
            nodes=nodes,
            devices_per_node=each,
            intra_link=draw(link),
            inter_link=draw(link),
            zone=f"zone{i}" if apart else "zone",
        )
        for i, (nodes, each) in enumerate(sizes)
    )
    between = [(f"zone{i}", f"zone{i + 1}") for i in range(len(sizes) - 1)] if apart else []
    total = st.sampled_from([None, 5e6])
    return Cluster(
        name="random",
        device_types={f"type{i}": _device_type(f"type{i}", draw(speed)) for i in range(len(sizes))},
        node_groups=groups,
        links=tuple(
            GroupLink(between=ends, link=draw(link), total_bandwidth_bytes_per_second=draw(total))
            for ends in between
        ),
        emulated_time_scale=draw(st.sampled_from([None, 1.0])),
    )


def islands() -> st.SearchStrategy[dict[int, int]]:
    """Some of six devices in two islands, whatever they are."""
    places = st.lists(st.sampled_from([0, 0, 0, 1, 1, -1]), min_size=6, max_size=6)
    return places.map(lambda found: {d: place for d, place in enumerate(found) if place >= 0})


def _split(draw: st.DrawFn, total: int, parts: int) -> list[int]:
    """`total` as that many whole parts, each at least 1."""
    cuts = (
        sorted(draw(st.sets(st.integers(1, total - 1), min_size=parts - 1, max_size=parts - 1)))
        if parts > 1
        else []
    )
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _members(draw: st.DrawFn, model: Model, devices: Sequence[str]) -> list[Member]:
    """A tensor-parallel group with uneven shares."""
    count = len(devices)
    unit = model.heads // model.kv_heads
    heads = [unit * n for n in _split(draw, model.kv_heads, count)]
    return list(
        zip(
            devices,
            heads,
            _split(draw, model.ffn_size, count),
            _split(draw, model.vocab_size, count),
            strict=True,
        )
    )


def _groups(
    draw: st.DrawFn, model: Model, devices: Sequence[str], rows: int
) -> list[tuple[int, list[Member]]]:
    """Replicas over these devices (some may stay unused), each with its rows."""
    replicas = draw(st.integers(1, min(len(devices), rows)))
    sizes = _split(draw, len(devices), replicas)
    groups = []
    at = 0
    for size, share in zip(sizes, _split(draw, rows, replicas), strict=True):
        groups.append((share, _members(draw, model, devices[at : at + min(size, model.kv_heads)])))
        at += size
    return groups


def _places(draw: st.DrawFn, model: Model, devices: Sequence[str]) -> list[list[str]]:
    """Devices of each stage; sometimes one stands in one stage more (a chunk), or all in two (a loop or a V)."""
    form = draw(st.sampled_from(["chain", "chain", "loop", "v"]))
    if form != "chain":
        once = [[device] for device in devices[: (model.layers + 2) // 2]]
        return once + (once if form == "loop" else once[::-1])
    stages = draw(st.integers(1, min(len(devices), model.layers + 2)))
    places = []
    at = 0
    for size in _split(draw, len(devices), stages):
        places.append(list(devices[at : at + size]))
        at += size
    if len(places) > 1 and len(places) < model.layers + 2 and draw(st.booleans()):
        # In the middle: on first and last stage at once, a tied table would need the same rows in both.
        places.insert(draw(st.integers(1, len(places) - 1)), [draw(st.sampled_from(list(devices)))])
    return places


def _pipeline(draw: st.DrawFn, model: Model, devices: Sequence[str]) -> Pipeline:
    micro_batches, rows = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    shapes = _Shapes(model)
    stages = []
    start = 0
    places = _places(draw, model, devices)
    for names, layers in zip(places, _split(draw, model.layers + 2, len(places)), strict=True):
        stages.append(
            shapes.stage(
                (start, start + layers),
                _groups(draw, model, names, rows),
                in_flight=micro_batches if schedule == "gpipe" else draw(st.integers(1, micro_batches)),
                recompute=draw(st.sampled_from(["none", "selective", "full"])),
            )
        )
        start += layers
    return Pipeline(schedule=schedule, micro_batches=micro_batches, micro_batch_rows=rows, stages=stages)


@st.composite
def plans(draw: st.DrawFn, precision: str = "fp32") -> Plan:
    """A random valid plan on at most 6 devices; its pipelines make the batch (at most 48 rows)."""
    cluster, model = draw(clusters()), draw(models())
    names = draw(st.permutations([device.name for device in cluster.devices()]))
    pipelines = []
    at = 0
    for size in _split(draw, len(names), draw(st.integers(1, min(3, len(names))))):
        pipelines.append(_pipeline(draw, model, names[at : at + size]))
        at += size
    return _plan("random", model, pipelines, precision, cluster)
