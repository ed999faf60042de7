"""The crew: one Ray actor per device, placed by custom resources, and what becomes of them.

All of Ray is here. Actors answer with values or with a `Failure`; the driver decides.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hethub import catalog
from hethub.checkpoints.restarts import Cause
from hethub.errors import InputError, MachineError, RunError
from hethub.interruption import stop_if_asked
from hethub.specs.cluster import Cluster

__all__ = ["Crew", "Failure", "WorkerFailedError", "resource_name"]

_NO_RESULTS = 1 << 60  # past every step, so that the answer is empty
_DEATHS_LOOK_SECONDS = 0.1
_DIED = (
    "the worker process died. Look into its log; if that says nothing and no one killed it, into the kernel's for its "
    "out-of-memory killer"
)
_PLACEMENT_TIMEOUT_SECONDS = 60.0
_LEAVE_SECONDS = 3.0  # for workers to notice that another is gone; who has not by then is replaced
_ALIVE_SECONDS = 1.0
_GATHER_FAILURES_SECONDS = (
    1.5  # a dead peer's neighbours fail within milliseconds; the cause may come after them
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker stopped. `secondary` marks the consequence of another worker's failure."""

    device: int
    action: str
    reason: str
    secondary: bool
    cause: Cause = Cause.WORKER


class WorkerFailedError(RunError):
    """A run failed at a worker: its device, what it was at and why; `cause` sorts these."""

    def __init__(self, message: str, device: str, action: str, reason: str, cause: Cause) -> None:
        super().__init__(message)
        self.device, self.action, self.reason, self.cause = device, action, reason, cause

    def __reduce__(self) -> tuple[Any, ...]:
        return (WorkerFailedError, (self.message, self.device, self.action, self.reason, self.cause))


def resource_name(device_type: str) -> str:
    """The Ray custom resource of a device type: one unit per device."""
    return f"hethub_{device_type}"


class _Actor:
    """What runs inside a Ray actor: a Worker whose output goes to the run folder."""

    def __init__(self, device: int, log_file: str) -> None:
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        self._device = device
        self._worker: Any = None
        self._results: list[tuple[int, float, float]] = []
        print(f"device index {device}, process {os.getpid()}, host {socket.gethostname()}", flush=True)  # noqa: T201

    def prepare(self) -> int:
        """Import what a worker needs, which takes most of a start; returns the process id."""
        import hethub.launch.worker  # noqa: F401

        return os.getpid()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker; anything raised becomes a Failure."""
        from hethub.launch.executor import ActionError
        from hethub.launch.worker import Worker

        try:
            if method == "join":
                if self._worker is not None:  # of the attempt before
                    self._worker.close()
                self._device = arguments[0].device
                self._worker = Worker(*arguments)
                return None
            if method == "train":
                self._results = []
                self._worker.train(*arguments, report=self._report)
                return self._worker.now()
            return getattr(self._worker, method)(*arguments)
        except BaseException as error:
            import traceback

            traceback.print_exc()
            cause = error.__cause__ if isinstance(error, ActionError) else error
            action = error.action if isinstance(error, ActionError) else method
            reason = error.reason if isinstance(error, ActionError) else f"{type(error).__name__}: {error}"
            if self._worker is not None and cause is not None:
                reason = self._worker.memory_words(cause) or reason
            if self._worker is not None:
                self._worker.cut()
            return Failure(self._device, action, reason.splitlines()[0], *_sorted(cause))

    def _report(self, step: int, result: Any) -> None:
        self._results.append((step, result.loss, result.norm))

    def results(self, since: int) -> list[tuple[int, float, float]]:
        """(step, loss, norm) of the training steps done, from the `since`-th on; answered while training."""
        return self._results[since:]


def _sorted(error: BaseException | None) -> tuple[bool, Cause]:
    """Whether a worker's error is the consequence of another's, and what kind it is."""
    from hethub.launch.communicator import PeerLostError
    from hethub.launch.parameters import NotFiniteError
    from hethub.launch.tally import DeviceMemoryError, is_out_of_memory

    if isinstance(error, PeerLostError):
        return True, Cause.LINK
    if isinstance(error, NotFiniteError):
        return error.suspicion < 2, Cause.NOT_A_NUMBER
    if error is not None and (isinstance(error, DeviceMemoryError) or is_out_of_memory(error)):
        return False, Cause.MEMORY
    return False, Cause.DATA if isinstance(error, InputError) else Cause.WORKER


class Crew:
    """Ray, started here or joined, and one actor for each of `devices` (indices into `Cluster.devices()`).

    Use as a context manager: leaving it kills the actors and, where it started Ray, stops Ray and removes its files.
    """

    def __init__(self, cluster: Cluster, devices: Sequence[int], logs: Path, address: str | None) -> None:
        self.cluster = cluster
        self.devices = tuple(devices)
        self.logs = logs
        self.address = address
        self.actors: dict[int, Any] = {}
        self._groups: list[Any] = []
        self._bundles: dict[str, tuple[Any, int]] = {}  # device name -> its place in a placement group
        self._fresh: list[int] = []  # devices whose actors have not been prepared
        self._pending: dict[Any, int] = {}  # calls that have not been answered
        self._processes: dict[int, int] = {}  # device -> descriptor of its process, on this machine only
        self._folder: Path | None = None
        self.explain: Callable[[int], str] = lambda device: "before its first action"

    def __enter__(self) -> Crew:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for device in list(self.actors):
            self._end(device)
        if ray.is_initialized():
            for group in self._groups:
                ray.util.remove_placement_group(group)
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            self._connect()
        finally:
            # Ray puts a handler of its own there, which aborts the process.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)
        self._place()

    def _connect(self) -> None:
        _set_environment(local=self.address is None)
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self.address is None:
            counts: dict[str, float] = {}
            for device in self.cluster.devices():  # another plan may use them all
                name = resource_name(device.type.name)
                counts[name] = counts.get(name, 0) + 1
            self._folder = Path(tempfile.mkdtemp(prefix="hethub-"))
            ray.init(
                num_cpus=len(self.devices),  # as many processes as Ray starts ahead
                resources=counts,
                include_dashboard=False,
                _temp_dir=str(self._folder),
                **quiet,
            )
        else:
            try:
                ray.init(address=self.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise MachineError(f"ray address {self.address}: {str(error).splitlines()[0]}") from error

    def _place(self) -> None:
        """Start the actors that are missing, in one placement group per node of the spec, so that its devices share a
        Ray node."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        nodes: dict[tuple[str, int], list[int]] = {}
        everyone = self.cluster.devices()
        for device in self.devices:
            if everyone[device].name not in self._bundles:
                nodes.setdefault((everyone[device].group, everyone[device].node), []).append(device)
        actor_class = ray.remote(max_concurrency=2)(_Actor)
        for (group, node), members in nodes.items():
            bundles = [self._needs(d) for d in members]
            placed = placement_group(bundles, strategy="STRICT_PACK")
            self._groups.append(placed)
            if not placed.wait(_PLACEMENT_TIMEOUT_SECONDS):
                raise MachineError(
                    f"no Ray node offers {bundles} for {group}/{node}. Start it with "
                    f"--resources naming {sorted({k for b in bundles for k in b})}."
                )
            for number, device in enumerate(members):
                self._bundles[everyone[device].name] = (placed, number)
        for device in self.devices:
            if device not in self.actors:
                needs = self._needs(device)
                self.actors[device] = actor_class.options(
                    num_cpus=0,
                    num_gpus=needs.pop("GPU", 0),
                    resources=needs,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        *self._bundles[everyone[device].name]
                    ),
                ).remote(device, str(self.logs / f"{everyone[device].name.replace('/', '-')}.log"))
                self._fresh.append(device)

    def _needs(self, device: int) -> dict[str, float]:
        """What Ray sets aside for a device: its bundle and its actor ask for the same."""
        device_type = self.cluster.devices()[device].type
        needs = {resource_name(device_type.name): 1.0}
        if (
            catalog.vendor(device_type.vendor).ray_resource == "GPU"
            and self.cluster.emulated_time_scale is None
        ):
            needs["GPU"] = 1.0
        return needs

    def prepare(self) -> None:
        """Let every new worker import what it needs. Raises RunError naming one that cannot."""
        asked = {device: self.actors[device].prepare.remote() for device in self._fresh}
        self._fresh = []
        import hethub.launch.worker  # noqa: F401  # the driver needs it too: meanwhile

        for device, reference in asked.items():
            found = self._answer(device, reference)
            if isinstance(found, Failure):
                raise self.failed(found.device, found.action, found.reason, found.cause)
            if self.address is None:
                with contextlib.suppress(ProcessLookupError):
                    self._processes[device] = os.pidfd_open(found)

    def host(self) -> str:
        """An address of this machine that the workers reach."""
        import ray

        return "127.0.0.1" if self.address is None else str(ray.util.get_node_ip_address())

    def call(
        self,
        method: str,
        arguments: Mapping[int, tuple[Any, ...]] | tuple[Any, ...] = (),
        *,
        devices: Sequence[int] | None = None,
        watch: Callable[[Collection[int]], None] | None = None,
        poll_seconds: float = 0.2,
    ) -> dict[int, Any]:
        """Call a worker method on every device (or on `devices`) and wait for all answers, by device.

        `arguments` are the same for all or by device; `watch` is called while waiting, with the devices waited for, and
        may raise. Raises RunError naming rank, device, action and reason as soon as any worker fails or dies.
        """
        import ray

        pending = self._pending = {}
        # What is the same for all is pickled once: a big plan's programs take long.
        same = () if isinstance(arguments, Mapping) else tuple(_shared(a) for a in arguments)
        for device in self.devices if devices is None else devices:
            actor = self.actors[device]
            chosen = arguments[device] if isinstance(arguments, Mapping) else same
            pending[actor.call.remote(method, *chosen)] = device
        answers: dict[int, Any] = {}
        while pending:
            stop_if_asked()
            done, _ = ray.wait(list(pending), num_returns=1, timeout=poll_seconds)
            failures = self._deaths(pending)
            for reference in done:
                device = pending.pop(reference)
                answer = self._answer(device, reference)
                if isinstance(answer, Failure):
                    failures.append(answer)
                answers[device] = answer
            if failures:
                raise self._failed(failures, pending)
            if watch is not None:
                watch(tuple(pending.values()))
        return answers

    def _answer(self, device: int, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayActorError:
            return Failure(device, self.explain(device), _DIED, False)
        except ray.exceptions.RayError as error:
            return Failure(device, self.explain(device), str(error).splitlines()[0], False)

    def _failed(self, failures: list[Failure], pending: dict[Any, int]) -> WorkerFailedError:
        """Give the other workers a moment, then name the failure that is nobody's consequence."""
        import ray

        limit = time.monotonic() + _GATHER_FAILURES_SECONDS
        while pending and time.monotonic() < limit and all(f.secondary for f in failures):
            failures += self._deaths(pending)
            done, _ = ray.wait(list(pending), num_returns=1, timeout=_DEATHS_LOOK_SECONDS)
            for reference in done:
                answer = self._answer(pending.pop(reference), reference)
                if isinstance(answer, Failure):
                    failures.append(answer)
        first = min(
            failures,
            key=lambda f: (
                f.secondary,
                f.cause != Cause.NOT_A_NUMBER,
                " by the gradient of " not in f.reason,
            ),
        )
        return self.failed(first.device, first.action, first.reason, first.cause)

    def _deaths(self, pending: Mapping[Any, int]) -> list[Failure]:
        """Who of those waited for has died on this machine: known at once, while Ray takes a second or two to tell."""
        return [
            Failure(device, self.explain(device), _DIED, False)
            for device in self._ended()
            if device in pending.values()
        ]

    def _ended(self) -> list[int]:
        """Devices whose process on this machine has ended."""
        poll = select.poll()
        of = {process: device for device, process in self._processes.items()}
        for process in of:
            poll.register(process, select.POLLIN)
        return sorted(of[process] for process, _ in poll.poll(0))

    def dead(self) -> list[int]:
        """Devices whose actors have died."""
        import ray

        found = set(self._ended())
        asked = {
            actor.results.remote(_NO_RESULTS): d
            for d, actor in self.actors.items()
            if d not in self._processes
        }
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ALIVE_SECONDS) if asked else ([], [])
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayActorError:
                found.add(asked[reference])
        return sorted(found)

    def regroup(self, cluster: Cluster, devices: Sequence[int], ended: Collection[str]) -> None:
        """Go on with `devices` of `cluster`, which may leave out some that were there: workers are known by the names
        of their devices. Those called `ended` are killed first, for the others may wait for them. Workers that live
        and are free stay, so that nothing has to be imported again; those that died, or do not notice that others
        did, are replaced. `prepare` and `join` come next."""
        import ray

        everyone = self.cluster.devices()
        gone = set(self.dead()) | {d for d in self.devices if everyone[d].name in ended}
        for device in gone:
            self._end(device)
        busy = [reference for reference, device in self._pending.items() if device not in gone]
        if busy:
            _, busy = ray.wait(busy, num_returns=len(busy), timeout=_LEAVE_SECONDS)
        for device in {self._pending[reference] for reference in busy} | set(self.dead()):
            self._end(device)
        self._pending = {}
        wanted = {cluster.devices()[d].name: d for d in devices}
        for device in [d for d in self.actors if everyone[d].name not in wanted]:
            self._end(device)
        self._processes = {wanted[everyone[d].name]: process for d, process in self._processes.items()}
        self.actors = {wanted[everyone[d].name]: actor for d, actor in self.actors.items()}
        self.cluster, self.devices, self._fresh = cluster, tuple(devices), []
        self._place()

    def _end(self, device: int) -> None:
        """Kill a worker. Ray asks one to end itself, which a stopped one cannot."""
        import ray

        process = self._processes.pop(device, None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)
        actor = self.actors.pop(device, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def failed(self, number: int, action: str, reason: str, cause: Cause = Cause.STALL) -> WorkerFailedError:
        """The error that names a device, what it was at and why it ends the run."""
        device = self.cluster.devices()[number]
        return WorkerFailedError(
            f"rank {self.devices.index(number)}, device {device.name} ({device.type.name}), {action}: "
            f"{reason.removesuffix('.')}. Its log: {self.logs / (device.name.replace('/', '-') + '.log')}",
            device.name,
            action,
            reason,
            cause,
        )

    def ask(self, method: str, devices: Collection[int], timeout_seconds: float) -> dict[int, Any]:
        """Answers of a quick method while another runs, by device; without those that do not answer in time or fail."""
        import ray

        asked = {self.actors[device].call.remote(method): device for device in devices}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_seconds)
        answers = {asked[reference]: self._answer(asked[reference], reference) for reference in done}
        return {device: answer for device, answer in answers.items() if not isinstance(answer, Failure)}

    def silent(self, devices: Collection[int], seconds: float) -> list[int]:
        """Those of `devices` whose processes do not answer within `seconds`: stopped, hung, or starved."""
        import ray

        asked = {self.actors[device].results.remote(_NO_RESULTS): device for device in devices}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        return [device for reference, device in asked.items() if reference not in done]

    def results(
        self, device: int, since: int, timeout_seconds: float = 0.5
    ) -> list[tuple[int, float, float]]:
        """(step, loss, norm) that a device has finished since the last look; [] when it does not answer in time."""
        import ray

        try:
            found: list[tuple[int, float, float]] = ray.get(
                self.actors[device].results.remote(since), timeout=timeout_seconds
            )
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return []
        return found


def _shared(argument: Any) -> Any:
    """A number or text as it is, anything larger by a reference into Ray's store."""
    import ray

    return argument if isinstance(argument, int | float | str) else ray.put(argument)


def _set_environment(*, local: bool) -> None:
    """What Ray and its workers read from the environment; a user's own settings win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
