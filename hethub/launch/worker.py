"""A worker: one process, one device. Plain Python, so that Ray actors and the tests' process pool run the same code."""

from __future__ import annotations

import datetime
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from hethub import catalog
from hethub.cost.graph import CostGraph
from hethub.cost.memory import usable_bytes
from hethub.cost.shapes import Parameter
from hethub.data.batches import Batches
from hethub.data.token_file import open_token_file
from hethub.errors import InputError, MachineError
from hethub.launch.beacon import Beacon
from hethub.launch.clock import Clock, wake_punctually
from hethub.launch.communicator import Communicator, Reserve
from hethub.launch.devices import Accelerator, ComputeDevice, EmulatedDevice, RealDevice
from hethub.launch.executor import (
    Executor,
    StepResult,
    held_out_rows,
    local_places,
    local_shards,
    training_rows,
)
from hethub.launch.faults import Interruptions, do_to_process
from hethub.launch.flights import Flight
from hethub.launch.gradients import WeightGradients
from hethub.launch.groups import ExchangeGroup, Library, NativeGroup
from hethub.launch.heap import Allocate, Heap, in_private
from hethub.launch.history import HistorySettings, HistoryWriter, digest
from hethub.launch.island import Island
from hethub.launch.lease import LeaseWatch
from hethub.launch.links import LinkTable
from hethub.launch.meter import Meter, MeterSettings
from hethub.launch.model import StageModel, TensorGroup, WeightSource
from hethub.launch.pretrained import Pretrained
from hethub.launch.recorder import Recorder
from hethub.launch.restoring import Restored
from hethub.launch.saving import CheckpointSettings, Saved, Saver
from hethub.launch.shards import Shards
from hethub.launch.shared_memory import Agreed, agree
from hethub.launch.sockets import Connections
from hethub.launch.streams import DeviceStreams
from hethub.launch.tally import DeviceMemoryError, is_out_of_memory
from hethub.launch.weights import initial_weight
from hethub.program.actions import Program
from hethub.program.faults import PlannedFault
from hethub.simulate.what_if import with_links
from hethub.specs.cluster import Cluster
from hethub.specs.job import Deed, OptimizerSettings
from hethub.specs.layout import Span, sequence_span
from hethub.specs.workload import Workload
from hethub.timeline.record import Kind

__all__ = ["DTYPES", "Fetched", "Task", "Worker", "WorkerSetup", "assemble", "make_batches"]

HERE = "hethub/here/{}"  # key of the job's store that a rank sets when it begins to join
STOP = "hethub/stop"  # key that the root sets to the step after which all stop
_LEASE_LOOK_SECONDS = 2.0
_TIMED_KINDS = (Kind.FORWARD, Kind.BACKWARD)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """Who a worker is: `device` indexes `Cluster.devices()`, `rank_of` maps such indices to process ranks.

    `on_join` is what a fault of the job does to it before it joins. `lease` is the run's lease file and the driver's
    token: a worker whose driver has lost it ends itself.
    """

    device: int
    rank_of: Mapping[int, int]
    store_host: str
    store_port: int
    timeout_seconds: float
    on_join: Deed | None = None
    lease: tuple[Path, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to train, the same for all workers.

    `evaluation` is the forward-only program, None without held-out rows. With `links_file` the devices are emulated
    and that file holds their links; without it they are real. `beacon_file` is where workers say where they are.
    `history` is where they record what they trained on, None where that is not kept; `faults` are interruptions on
    purpose in training. With `read_in_place` workers of one host read each other's parameters where they lie, if they
    can. `peak_bytes` is the predicted peak memory by device. `checkpoint` says when to save and where, `restore` is the
    checkpoint to go on from and `initial_weights` the Hugging Face folder to begin with; without either, weights come
    from the seed. With `skips` a step whose gradient is not finite makes no update; without, it raises. `meter` says
    where workers count while they train, None where nobody counts.
    """

    graph: CostGraph
    workload: Workload
    program: Program
    evaluation: Program | None
    settings: OptimizerSettings
    seed: int
    total_steps: int
    tokens_file: Path
    held_out: float
    links_file: Path | None = None
    beacon_file: Path | None = None
    history: HistorySettings | None = None
    faults: tuple[PlannedFault, ...] = ()
    read_in_place: bool = True
    peak_bytes: Mapping[int, int] = field(default_factory=dict)
    checkpoint: CheckpointSettings | None = None
    restore: Path | None = None
    initial_weights: Path | None = None
    skips: bool = False
    meter: MeterSettings | None = None

    @property
    def cluster(self) -> Cluster:
        """The cluster that the plan is for."""
        return self.graph.cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a device read of a checkpoint, or why it did not."""

    bytes_read: int = 0
    bytes_needed: int = 0
    problem: str = ""


def make_batches(task: Task) -> Batches:
    """The job's data as a pure function of (seed, step, row)."""
    return Batches(
        open_token_file(task.tokens_file).tokens,
        sequence_length=task.workload.sequence_length,
        global_batch=task.workload.global_batch,
        seed=task.seed,
        held_out=task.held_out,
    )


class Worker:
    """One device's process: joins the job once, then loads and runs any number of tasks."""

    def __init__(self, setup: WorkerSetup) -> None:
        """Join the job's store and group. Blocks until the store answers."""
        self.setup = setup
        if setup.on_join is not None:
            do_to_process(setup.on_join)
        torch.set_num_threads(1)
        self.rank = setup.rank_of[setup.device]
        limit = datetime.timedelta(seconds=setup.timeout_seconds)
        self._connections = Connections()
        self._store = store = dist.TCPStore(
            setup.store_host, setup.store_port, is_master=False, timeout=limit
        )
        store.set(HERE.format(self.rank), "")
        # Host memory is what any two vendors can exchange, so this group carries everything between islands. All
        # connections are made here: with the library's connections on first use, two ends that connect at once were
        # seen to hang now and then (torch 2.13).
        dist.init_process_group(
            catalog.vendor("cpu").backend,
            store=store,
            rank=self.rank,
            world_size=len(setup.rank_of),
            timeout=limit,
        )
        self._connections.note()
        self._groups: dict[tuple[int, ...], ExchangeGroup | NativeGroup] = {}
        self._libraries: dict[tuple[int, ...], Library] = {}  # of collectives between replicas
        self._groups_made = 0  # of the library's
        self._links: LinkTable | None = None
        self.history: HistoryWriter | None = None
        self.saver: Saver | None = None
        self.meter: Meter | None = None
        self._restored: Restored | None = None
        self._stopping = False
        if setup.lease is not None:
            watch = LeaseWatch(*setup.lease)
            threading.Thread(target=_end_without_lease, args=(watch,), name="lease", daemon=True).start()

    def fetch(self, task: Task) -> Fetched:
        """Read what this device needs of the task's checkpoint, for the `load` that follows. Damage is an answer, not
        an error, so that all devices can be asked and another checkpoint be tried."""
        self._restored = None
        if task.restore is None or not task.program.devices[self.setup.device]:
            return Fetched()
        try:
            found = self._restored = Restored(task.restore, task.program, self.setup.device)
        except InputError as error:
            return Fetched(problem=error.message)
        return Fetched(bytes_read=found.bytes_read, bytes_needed=found.bytes_needed)

    def load(self, task: Task) -> None:
        """Build this device's shards, channels and executors for a task. A device that the plan leaves out idles."""
        self.task = task
        self.training: Executor | None = None
        self.evaluating: Executor | None = None
        self.recorder, self._done = Recorder(task.program), -1  # the last step that is done
        if self.history is not None:
            self.history.close()
        self.history = None
        if self.saver is not None:
            self.saver.close()
        self.saver = None
        if self.meter is not None:
            self.meter.close()
        self.meter = None
        if not task.program.devices[self.setup.device]:
            return
        self.batches = make_batches(task)
        self.compute = self._device()
        heap = self._heap()
        allocate = in_private if heap is None else heap.allocate
        stages = self._stages(allocate)
        sink = WeightGradients(stages.values(), allocate)
        shards = local_shards(task.program, self.setup.device, stages, sink)
        self.agreed = self._agree(heap, shards)
        reserve, mark = self._reserve(), self._mark()
        self.training = self._executor(task.program, stages, sink, shards, self.recorder, reserve, mark)
        self.training.island = self._island(shards)
        self.training.lane.skips = task.skips
        if self._restored is not None:
            self._restored.fill(self.training.lane.updater)
            self._restored = None
        self.history, self.training.hook, self.saver = self._history(), self._hook(), self._saver()
        self.meter = self.training.meter = self._meter()
        if task.evaluation is not None:
            self.evaluating = self._executor(
                task.evaluation, stages, sink, shards, Recorder(task.evaluation), reserve, mark
            )
        for stage in stages.values():
            stage.sink = sink

    def _history(self) -> HistoryWriter | None:
        task = self.task
        if task.history is None:
            return None
        names = [device.name for device in task.cluster.devices()]
        return HistoryWriter(task.history, task.program, self.setup.device, names, self.batches)

    def _saver(self) -> Saver | None:
        settings, training = self.task.checkpoint, self.training
        if settings is None or training is None:
            return None
        name = self.task.cluster.devices()[self.setup.device].name
        return Saver(settings, name, training.lane.updater)

    def _meter(self) -> Meter | None:
        task = self.task
        if task.meter is None:
            return None
        try:
            return Meter(task.meter, task.program, task.graph, task.workload, self.setup.device)
        except (OSError, ValueError) as error:  # training does without
            print(f"no metrics of this device: {error}", flush=True)  # noqa: T201
            return None

    def _hook(self) -> Interruptions | None:
        """What the job does to this device on purpose; None where it leaves it alone."""
        faults = [fault for fault in self.task.faults if fault.link or fault.device == self.setup.device]
        training = self.training
        assert training is not None
        return Interruptions(faults, training.compute, lambda: training.sink.buffers) if faults else None

    def _device(self) -> ComputeDevice:
        device = self.task.cluster.devices()[self.setup.device]
        clock = Clock(time.monotonic())
        if self.task.links_file is None:
            real = torch.device(catalog.vendor(device.type.vendor).torch_device)
            return (
                RealDevice(clock, real)
                if real.type == "cpu"
                else Accelerator(clock, real, DeviceStreams(real))
            )
        wake_punctually()
        return EmulatedDevice(
            clock,
            usable_bytes(device.type),
            f"{device.name} ({device.type.name}, emulated)",
            self.task.peak_bytes.get(self.setup.device),
        )

    def _heap(self) -> Heap | None:
        """Where weights and gradients lie that neighbours may read in place; None where that is not done."""
        emulated, accelerator = self.task.links_file is not None, self.compute.streams is not None
        if not self.task.read_in_place or emulated or accelerator:
            return None
        try:
            return Heap()
        except OSError:
            return None

    def _agree(self, heap: Heap | None, shards: Shards) -> Agreed:
        if self.task.links_file is not None:  # emulated links carry everything
            return Agreed({}, frozenset())
        try:
            return agree(self.task.program, self.setup.device, self.setup.rank_of, heap, shards)
        finally:
            if heap is not None:
                heap.close()

    def _stages(self, allocate: Allocate) -> dict[int, StageModel]:
        task = self.task
        devices = task.cluster.devices()
        dtype = DTYPES[devices[self.setup.device].type.dtype_for(task.workload.precision)]

        source = self._weight_source()
        places = local_places(task.program, self.setup.device)
        groups = self._join_groups(
            {place.stage.index: task.program.groups[self.setup.device, i] for i, place in places.items()}
        )
        shared: dict[str, Tensor] = {}
        stages = {}
        for index, place in sorted(places.items()):
            stage = StageModel(
                task.workload.model,
                place.stage.layers,
                place.rank.share,
                sequence_length=task.workload.sequence_length,
                dtype=dtype,
                device=self.compute.torch_device,
                weights=source,
                group=groups.get(index),
                recompute=place.stage.recompute if place.stage.recompute == "selective" else "none",
                held=shared,
                allocate=allocate,
            )
            shared.update(stage.parameters)
            stages[index] = stage
        return stages

    def _weight_source(self) -> WeightSource:
        task = self.task
        if self._restored is not None:
            return self._restored.weights
        if task.initial_weights is not None:
            return Pretrained(task.initial_weights).weights

        def made(parameter: Parameter, span: Span) -> Tensor:
            return torch.from_numpy(initial_weight(parameter, span, task.workload.model, task.seed))

        return made

    def _join_groups(self, wanted: Mapping[int, tuple[int, ...]]) -> dict[int, TensorGroup]:
        """Tensor-parallel groups of this device, made in an order that all members share."""
        found: dict[int, TensorGroup] = {}
        moment = time.monotonic if self.compute.streams is None else self.compute.streams.moment
        for members in sorted(set(wanted.values())):
            if len(members) < 2:
                continue
            if members not in self._groups:
                self._groups[members] = self._new_group(members)
            self._groups[members].moment = moment
            for stage, devices in wanted.items():
                if devices == members:
                    found[stage] = self._groups[members]
        return found

    def _new_group(self, members: tuple[int, ...]) -> ExchangeGroup | NativeGroup:
        ranks = [self.setup.rank_of[d] for d in members]
        devices = self.task.cluster.devices()
        vendors = {devices[d].type.vendor for d in members}
        if len(vendors) > 1:
            return ExchangeGroup(ranks)
        vendor = catalog.vendor(vendors.pop())
        if vendor.torch_device == "cpu":  # where messages are quicker
            return ExchangeGroup(ranks)
        if vendor.backend is None:
            raise MachineError(
                f"the collective library of {vendor.name} is not known. Use tensor_parallel 1 there."
            )
        return NativeGroup(self._library(members, overlaps=False))

    def _library(self, members: tuple[int, ...], *, overlaps: bool) -> Library:
        """The collectives of the vendor of these devices, all of one vendor with a known library."""
        ranks = [self.setup.rank_of[d] for d in members]
        backend = catalog.vendor(self.task.cluster.devices()[members[0]].type.vendor).backend
        assert backend is not None
        self._meet_alike(ranks, "replicas" if overlaps else "tensor-parallel")
        try:
            return Library(ranks, backend, overlaps=overlaps)
        except (RuntimeError, ValueError) as error:
            raise MachineError(
                f"the group of ranks {', '.join(map(str, ranks))} cannot be formed with {backend}: "
                f"{str(error).splitlines()[0]} Install a torch with {backend}, or plan without a group there"
            ) from error

    def _meet_alike(self, ranks: Sequence[int], purpose: str) -> None:
        """Have as many groups as the others when they and this process make one: torch names a group that only its
        members make after its ranks and the number of groups that the process has (2.13), so that members with unlike
        numbers would wait for each other for ever. Who has fewer makes groups of its own, of one."""
        key = f"hethub/groups/{purpose}/{'-'.join(map(str, ranks))}/{{}}"
        self._store.set(key.format(self.rank), str(self._groups_made))
        most = max(int(self._store.get(key.format(rank))) for rank in ranks)
        while self._groups_made < most:
            dist.new_group([self.rank], backend=catalog.vendor("cpu").backend, use_local_synchronization=True)
            self._groups_made += 1
        self._groups_made += 1

    def _island(self, shards: Shards) -> Island | None:
        """What runs the training program's collectives; None where it has none. All members make their groups in one
        order, behind the tensor-parallel ones."""
        program, device = self.task.program, self.setup.device
        groups = {t.members for t in program.transfers if device in t.members}
        for members in sorted(groups - self._libraries.keys()):
            self._libraries[members] = self._library(members, overlaps=True)
        return Island(program, device, shards, self._libraries) if groups else None

    def _executor(
        self,
        program: Program,
        stages: Mapping[int, StageModel],
        sink: WeightGradients,
        shards: Shards,
        recorder: Recorder,
        reserve: Reserve | None,
        mark: Callable[[int, int], None],
    ) -> Executor:
        task = self.task
        return Executor(
            program,
            self.setup.device,
            stages=stages,
            sink=sink,
            shards=shards,
            compute=self.compute,
            communicator=Communicator(
                program,
                self.setup.device,
                self.setup.rank_of,
                reserve,
                self.compute.tally,
                self.agreed.bells if program.training else frozenset(),
                self.compute.streams,
            ),
            recorder=recorder,
            settings=task.settings,
            total_steps=task.total_steps,
            mark=mark,
            neighbours=self.agreed.neighbours,
        )

    def _mark(self) -> Callable[[int, int], None]:
        if self.task.beacon_file is None:
            return lambda step, action: None
        beacon = Beacon(self.task.beacon_file, len(self.task.cluster.devices()))
        return lambda step, action: beacon.set(self.setup.device, step, action)

    def _reserve(self) -> Reserve | None:
        """How an emulated link is taken; None on real ones. Lets go of the last task's table."""
        if self._links is not None:
            self._links.close()
            self._links = None
        if self.task.links_file is None:
            return None
        graph = self.task.graph
        table = self._links = LinkTable(self.task.links_file, graph.cell_count)
        device = self.setup.device
        if not any(fault.link for fault in self.task.faults):
            return lambda destination, size, now: table.reserve(graph.path(device, destination), size, now)
        graphs: dict[tuple[tuple[str, float], ...], CostGraph] = {(): graph}

        def reserve(destination: int, size: int, now: float) -> float:
            hook = None if self.training is None else self.training.hook
            slow = tuple(hook.slow_links.items()) if isinstance(hook, Interruptions) else ()
            if slow not in graphs:
                factors = {link: 1.0 / factor for link, factor in slow}
                graphs[slow] = CostGraph(with_links(graph.cluster, factors))
            return table.reserve(graphs[slow].path(device, destination), size, now)

        return reserve

    def start_clock(self, epoch_seconds: float, time_scale: float) -> None:
        """Count time from here on from `epoch_seconds` of the machine's monotonic clock; real runs have scale 1."""
        if self.training is not None:
            self.compute.clock = Clock(epoch_seconds, time_scale)
        if self.meter is not None:
            self.meter.start(self.compute.clock)

    def now(self) -> float:
        """Modelled seconds since the clock's epoch."""
        return self.compute.clock.now() if self.training is not None else 0.0

    def train(
        self, first: int, last: int, report: Callable[[int, StepResult], None] | None = None
    ) -> list[StepResult]:
        """Steps [first, last), fewer where `stop` was asked for; `report` is called after each. Idle devices return
        nothing."""
        results = []
        if self.training is not None:
            workload = self.task.workload
            for step in range(first, last):
                self._tell_stop(step)
                rows = training_rows(self.batches, step, workload.global_batch, workload.sequence_length)
                if self.history is not None:
                    rows = replace(rows, get=self.history.watching(rows.get))
                results.append(self.training.run(step, rows))
                if self.meter is not None and self.meter.step(step, self.recorder.last_end):
                    self.meter.count(self.recorder.fresh(), self._memory_bytes())
                self._done = step
                self._record(step, results[-1])
                if report is not None:
                    report(step, results[-1])
                stops = self._told_to_stop(step)
                more = step + 1 < self.task.total_steps
                if self.saver is not None and more and (stops or self.saver.due(step + 1)):
                    begin = time.monotonic()
                    self.saver.save(step + 1)
                    if self.meter is not None:
                        self.meter.stood_for_checkpoint(time.monotonic() - begin)
                if stops:
                    break
            self.training.settle()
            if self.meter is not None:
                self.meter.count(self.recorder.fresh(), self._memory_bytes())
        return results

    def stop(self) -> None:
        """Let all devices stop after the step that the root begins next, with a checkpoint. Asked of the root."""
        self._stopping = True

    def _tell_stop(self, step: int) -> None:
        """On the root, before the totals of `step` leave it: so everyone who has them sees the key."""
        if self._stopping and self.training is not None and self.training.lane.is_root:
            self._store.set(STOP, str(step))

    def _told_to_stop(self, step: int) -> bool:
        return self.saver is not None and self._store.check([STOP]) and int(self._store.get(STOP)) <= step

    def saved(self) -> Sequence[Saved]:
        """Reports of the newest checkpoints; may be asked while training."""
        return [] if self.saver is None else self.saver.reports()

    def all_saved(self) -> Sequence[Saved]:
        """The same, when nothing is being written any more."""
        return [] if self.saver is None else self.saver.wait()

    def _record(self, step: int, result: StepResult) -> None:
        """The step's line of the history."""
        if self.history is None:
            return
        assert self.training is not None
        self.training.mark(step, len(self.training.actions))
        digests = None
        if self.history.digests_due(step, self.task.total_steps):
            self.training.settle()
            weight = self.training.lane.shards.weight
            digests = {n: digest(_to_numpy(weight(n)).tobytes()) for n in self.history.held}
        self.history.add(step, result.loss, result.norm, digests)

    def evaluate(self, rows: int) -> float:
        """Mean loss over the first `rows` held-out rows; meaningful on the root only."""
        if self.evaluating is None:
            return float("nan")
        workload = self.task.workload
        total = 0.0
        for turn in range((rows + workload.global_batch - 1) // workload.global_batch):
            total += self.evaluating.run(
                turn, held_out_rows(self.batches, turn, rows, workload.global_batch, workload.sequence_length)
            ).loss
        self.evaluating.settle()
        return total

    def reads_in_place(self) -> set[int]:
        """The devices whose parameters this one reads where they lie."""
        return set(self.agreed.neighbours) if self.training is not None else set()

    def recent_records(self) -> npt.NDArray[np.void]:
        """This device's records of the last steps that it has done; may be asked while training."""
        return self.recorder.recent(self._done)

    def records(self) -> npt.NDArray[np.void]:
        """This device's timeline records of training so far."""
        return self.recorder.take()

    def peak_bytes(self) -> int | None:
        """Most bytes of live storages so far, where a tally counts them."""
        if self.training is None or self.compute.tally is None:
            return None
        return self.compute.tally.peak_bytes

    def _memory_bytes(self) -> tuple[float, float]:
        """In use, and at most so far: the tally's, or the accelerator's allocator's; NaN where nobody counts."""
        if self.compute.tally is not None:
            return self.compute.tally.live_bytes, self.compute.tally.peak_bytes
        library = getattr(torch, self.compute.torch_device.type, None)
        if library is None or not hasattr(library, "memory_allocated"):
            return math.nan, math.nan
        return library.memory_allocated(), library.max_memory_allocated()

    def memory_words(self, error: BaseException) -> str | None:
        """Why an action failed, if it was for want of a real device's memory: what was asked, what was predicted, what
        to change. An emulated device's error says so itself."""
        if isinstance(error, DeviceMemoryError) or not is_out_of_memory(error):
            return None
        device_type = self.task.cluster.devices()[self.setup.device].type
        predicted = self.task.peak_bytes.get(self.setup.device, 0)
        words = str(error).splitlines()[0].rstrip(".")
        sizes = f"{predicted / 2**20:.2f} MiB of {usable_bytes(device_type) / 2**20:.2f}"
        return (
            f"out of memory: {words}; the plan predicts a peak of {sizes}. Lower micro_batch_rows or in_flight "
            "here, set recompute: full, or plan with more memory_reserve"
        )

    def owned_weights(self) -> dict[int, npt.NDArray[np.generic]]:
        """Slice number -> values, of the slices that this device updates."""
        if self.training is None:
            return {}
        lane = self.training.lane
        return {n: _to_numpy(lane.shards.weight(n)) for n in lane.updater.owned}

    def held_weights(self) -> dict[str, npt.NDArray[np.generic]]:
        """Parameter name -> this device's shard, for comparing replicas."""
        if self.training is None:
            return {}
        return {name: _to_numpy(w.detach()) for name, w in self.training.lane.shards.weights.items()}

    def time_stages(self, repeats: int = 5) -> tuple[float, float]:
        """(wall seconds of real math, predicted seconds) of one forward and backward of this device's stages, alone and
        at its quickest.

        What `time_scale: auto` is made from.
        """
        if self.training is None:
            return (0.0, 0.0)
        measured = predicted = 0.0
        for index, place in local_places(self.task.program, self.setup.device).items():
            runs = [self._time_stage(index) for _ in range(repeats + 1)][1:]
            measured += min(runs)
            predicted += sum(
                self.task.program.prices[self.setup.device, place.stage.index, kind, -1].busy_seconds
                for kind in _TIMED_KINDS
            )
        return measured, predicted

    def _time_stage(self, index: int) -> float:
        assert self.training is not None
        place = self.training.places[index]
        stage = self.training.stages[index]
        model, seq = self.task.workload.model, self.task.workload.sequence_length
        rows = place.replica.rows[1] - place.replica.rows[0]
        tokens = torch.zeros((rows, seq), dtype=torch.int64)
        tokens_here = sequence_span(seq, len(place.replica.ranks), place.replica.ranks.index(place.rank))
        hidden = (rows, tokens_here[1] - tokens_here[0], model.hidden_size)
        entry = tokens if stage.first else torch.randn(hidden).to(stage.dtype)
        flight = Flight(stage, [place.stage.layers], entry, tokens, torch.ones(rows), 1.0)
        begin = time.perf_counter()
        flight.forward([0], keep=True)
        flight.backward(0, None, split=False)
        spent = time.perf_counter() - begin
        self.training.sink.clear()
        return spent

    def cut(self) -> None:
        """Let all that wait for this worker know that it will not come."""
        self._connections.cut()

    def close(self) -> None:
        """Leave the job."""
        dist.destroy_process_group()


def _end_without_lease(watch: LeaseWatch) -> None:
    """End this process when its driver is gone: on a real cluster it would train on for nobody."""
    waiting = threading.Event()
    while not waiting.wait(_LEASE_LOOK_SECONDS):
        if watch.lost():
            os._exit(1)


def _to_numpy(tensor: Tensor) -> npt.NDArray[np.generic]:
    """Host copy; bf16, which numpy lacks, as fp32 (exact)."""
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return np.asarray(wide.cpu().contiguous().numpy()).copy()


def assemble(
    program: Program, owned: Sequence[Mapping[int, npt.NDArray[np.generic]]]
) -> dict[str, npt.NDArray[np.generic]]:
    """Whole parameters from the slices that their updaters returned."""
    whole: dict[str, npt.NDArray[np.generic]] = {}
    for part in owned:
        for number, values in part.items():
            entry = program.ownership.slices[number]
            parameter = program.ownership.parameters[entry.parameter]
            target = whole.setdefault(parameter.name, np.empty(parameter.shape, dtype=values.dtype))
            index = [slice(None)] * len(parameter.shape)
            index[parameter.axis] = slice(entry.start, entry.stop)
            target[tuple(index)] = values
    return whole
