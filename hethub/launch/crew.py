"""The crew: a worker process per device, on hosts that Ray places by custom resources, and what becomes of them.

All of Ray is here. Workers answer with values or with a `Failure`; the driver decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hethub import catalog
from hethub.checkpoints.restarts import Cause
from hethub.errors import HeadLostError, MachineError, RunError
from hethub.interruption import stop_if_asked
from hethub.launch.environment import code_digest
from hethub.launch.host_watch import HOST_SILENT_SECONDS, HostWatch
from hethub.launch.node_host import NodeHost
from hethub.launch.worker_process import Failure, pack, unpack
from hethub.specs.cluster import Cluster, Device
from hethub.telemetry.describe import used_nodes

__all__ = ["Crew", "WorkerFailedError", "resource_name"]

_Node = tuple[()] | tuple[str, int]  # group and number of a node of the spec; of this machine ()

_NO_RESULTS = 1 << 60  # past every step, so that the answer is empty
_DEATHS_LOOK_SECONDS = 0.1
_DIED = (
    "the worker process died. Look into its log; if that says nothing and no one killed it, into the kernel's for its "
    "out-of-memory killer"
)
_NODE_DIED = "the node's host process died, and with it all of its workers. Look into Ray's log of that node"
_NODE_SILENT = (
    f"the node's host has answered nothing for {HOST_SILENT_SECONDS:.0f} s: it is stopped, hung or cut off"
)
_SHORT_BYTES = 10_000
_TMPDIR_CHARACTERS = 27  # Ray adds up to 80 for its sockets, whose paths the kernel cuts off at 107
_CLOSE_SECONDS = 3.0
# Of Ray's own looks at its nodes, where Ray is started here: a dead one is known after 3 s, a hung one after 15.
_RAY_HEALTH = {
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 4000,
    "health_check_failure_threshold": 3,
}
_HEAD_LOOK_SECONDS = 1.0
_HEAD_LOOKS = 3  # in a row without an answer: lost
_PLACEMENT_TIMEOUT_SECONDS = 60.0
_LEAVE_SECONDS = 3.0  # for workers to notice that another is gone; who has not by then is replaced
_STACKS_SECONDS = 1.0
_ALIVE_SECONDS = 3.0  # for a host to say who has died; one that does not is lost
_GATHER_FAILURES_SECONDS = (
    1.5  # a dead peer's neighbours fail within milliseconds; the cause may come after them
)


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


class Crew:
    """Ray, started here or joined, and a worker for each of `devices` (indices into `Cluster.devices()`).

    A host is a Ray actor that holds the devices of one node of the spec; where Ray is started here, one holds them all.
    Use as a context manager: leaving it kills hosts and workers and, where it started Ray, stops Ray and removes its
    files.
    """

    def __init__(self, cluster: Cluster, devices: Sequence[int], logs: Path, address: str | None) -> None:
        self.cluster = cluster
        self.devices = tuple(devices)
        self.logs = logs
        self.address = address
        self._hosts: dict[_Node, Any] = {}
        self._groups: dict[_Node, Any] = {}
        self._members: dict[_Node, list[int]] = {}  # all devices of the nodes in use
        self._seats: dict[str, int] = {}  # device name -> place among the accelerators of its host
        self._working: set[int] = set()  # devices that have a worker
        self._pending: dict[Any, int] = {}  # calls that have not been answered
        self._processes: dict[int, int] = {}  # device -> descriptor of its process, on this machine only
        self._watch: HostWatch[_Node] = HostWatch()
        self._folder: Path | None = None
        self._head = ("", 0)  # address of Ray's head
        self._head_silent = 0  # looks in a row
        self._look_at = 0.0
        self._serving: tuple[str, str] | None = None  # telemetry folder and address of agents
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

        for process in self._processes.values():
            _kill(process)
        self._processes.clear()
        if ray.is_initialized():
            closed = [host.close.remote() for host in self._hosts.values()]
            if closed:
                ray.wait(closed, num_returns=len(closed), timeout=_CLOSE_SECONDS)
            if self._head_silent < _HEAD_LOOKS:  # else nobody is there to be told
                for host in self._hosts.values():
                    ray.kill(host, no_restart=True)
                for group in self._groups.values():
                    ray.util.remove_placement_group(group)
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            self._connect()
            self._note_head()
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
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="hethub-"))
                ray.init(
                    num_cpus=1,  # as many processes as Ray starts ahead
                    **_request(self._needs(range(len(self.cluster.devices())))),
                    include_dashboard=False,
                    _temp_dir=str(self._folder),
                    **quiet,
                )
            except (OSError, ValueError, RuntimeError) as error:
                why = str(error).partition("\n")[0].removesuffix(".")
                raise MachineError(
                    f"no Ray can be started here: {why}. Mend what it names; the path that TMPDIR gives may have "
                    f"{_TMPDIR_CHARACTERS} characters at most."
                ) from error
        else:
            try:
                ray.init(address=self.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
                raise MachineError(
                    f"ray address {self.address}: {str(error).splitlines()[0]}. Is it up? If it asks for a token, set "
                    "RAY_AUTH_MODE=token and give the token (docs/security.md)."
                ) from error

    def _note_head(self) -> None:
        import ray

        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head = (host, int(port))

    def _look_for_head(self) -> None:
        """Raise HeadLostError where Ray's head has taken no connection for some seconds. Ray itself ends this process
        after a minute, without a word."""
        if time.monotonic() < self._look_at:
            return
        try:
            socket.create_connection(self._head, timeout=_HEAD_LOOK_SECONDS).close()
            self._head_silent = 0
        except OSError as error:
            self._head_silent += 1
            if self._head_silent >= _HEAD_LOOKS:
                raise HeadLostError(
                    f"the Ray head at {self._head[0]}:{self._head[1]} is gone ({error}). What was trained since the "
                    "newest checkpoint is lost."
                ) from error
        self._look_at = time.monotonic() + _HEAD_LOOK_SECONDS

    def _place(self) -> None:
        """Start the hosts that are missing, each in a placement group of its own, so that Ray finds or refuses the
        whole node."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        host_class = ray.remote(NodeHost)
        self._members, seats = self._nodes(), self._seated()
        for node, members in self._members.items():
            if node in self._hosts:
                continue
            names = [self.cluster.devices()[device].name for device in members]
            self._seats |= {name: seats[name] for name in names}
            needs = self._needs(members)
            if node not in self._groups:
                self._groups[node] = placement_group([needs])
            group = self._groups[node]
            if not group.wait(_PLACEMENT_TIMEOUT_SECONDS):
                raise MachineError(
                    f"no Ray node offers {needs} for {'/'.join(map(str, node)) or 'this machine'}. Start it with "
                    f"{_ray_start(needs)}."
                )
            self._hosts[node] = host_class.options(
                num_cpus=0,
                **_request(needs),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            ).remote()
            self._serve(node)

    def serve(self, folder: Path, listen: str) -> None:
        """Let every host, those that come later too, start an agent that serves its workers' counters."""
        self._serving = (str(folder), listen)
        for node in self._hosts:
            self._serve(node)

    def _serve(self, node: _Node) -> None:
        if self._serving is None:
            return
        folder, listen = self._serving
        nodes = used_nodes([self.cluster.devices()[device] for device in self._members[node]])
        name = "-".join(map(str, node)) or "local"
        self._hosts[node].serve.remote(folder, nodes, name, listen)

    def _node(self, device: int) -> _Node:
        """Which host holds a device."""
        return self._holder(self.cluster.devices()[device])

    def _holder(self, device: Device) -> _Node:
        return () if self.address is None else (device.group, device.node)

    def _nodes(self) -> dict[_Node, list[int]]:
        """All devices of the nodes that are in use, by host: another plan may use others of them."""
        used = {self._node(device) for device in self.devices}
        nodes: dict[_Node, list[int]] = {}
        for device in range(len(self.cluster.devices())):
            if self._node(device) in used:
                nodes.setdefault(self._node(device), []).append(device)
        return nodes

    def _needs(self, devices: Iterable[int]) -> dict[str, float]:
        """What Ray sets aside for devices: the bundle and the host ask for the same."""
        needs: dict[str, float] = {}
        for device in devices:
            device_type = self.cluster.devices()[device].type
            names = [resource_name(device_type.name)]
            vendor = self._accelerator(self.cluster.devices()[device])
            if vendor is not None and vendor.ray_resource is not None:
                names.append(vendor.ray_resource)
            for name in names:
                needs[name] = needs.get(name, 0.0) + 1.0
        return needs

    def _accelerator(self, device: Device) -> catalog.Vendor | None:
        """How Ray and torch call a device that is an accelerator; None of the CPU, and of what is emulated on it."""
        if self.cluster.emulated_time_scale is not None:
            return None
        vendor = catalog.vendor(device.type.vendor)
        return None if vendor.torch_device == "cpu" else vendor

    def _variable(self, device: Device) -> str:
        """The environment's variable that says which accelerator a worker sees; "" where there is none to see."""
        vendor = self._accelerator(device)
        return "" if vendor is None else vendor.visible_devices_variable or ""

    def _seated(self) -> dict[str, int]:
        """Device name -> its place among the accelerators of its host that the same variable lists. Ray lists those
        that it was asked for; of those that Ray does not know all count that the machine has, left out or not."""
        excluded = self.cluster.exclude
        seats: dict[str, int] = {}
        taken: Counter[tuple[_Node, str]] = Counter()
        for device in replace(self.cluster, exclude=frozenset()).devices():
            vendor = self._accelerator(device)
            if device.name in excluded and (vendor is None or vendor.ray_resource is not None):
                continue
            beside = self._holder(device), self._variable(device)
            seats[device.name] = taken[beside]
            taken[beside] += 1
        return seats

    def prepare(self) -> None:
        """Start the workers that are missing, with all imported that they need. Raises RunError naming one that
        cannot."""
        everyone = self.cluster.devices()
        self._require_same_code()
        asked: dict[int, Any] = {}
        for device in self.devices:
            if device in self._working:
                continue
            name = everyone[device].name
            asked[device] = self._host(device).begin.remote(
                name,
                device,
                str(self.logs / f"{name.replace('/', '-')}.log"),
                self._variable(everyone[device]),
                self._seats[name],
            )
        import hethub.launch.worker  # noqa: F401  # the driver needs it too: meanwhile

        for device, reference in asked.items():
            found = self._got(device, reference, "start", _PLACEMENT_TIMEOUT_SECONDS)
            if isinstance(found, Failure):
                raise self.failed(found.device, found.action, found.reason, found.cause)
            self._working.add(device)
            if self.address is None:
                with contextlib.suppress(ProcessLookupError):
                    self._processes[device] = os.pidfd_open(found)

    def _require_same_code(self) -> None:
        """Raise MachineError where a host of another node runs another program than this one: plans, programs and
        answers go between them as Python objects."""
        if self.address is None:
            return
        ours = code_digest()
        asked = {node: self._hosts[node].code.remote() for node in self._members}
        for node, reference in asked.items():
            found = self._got(self._members[node][0], reference, "start", _PLACEMENT_TIMEOUT_SECONDS)
            if isinstance(found, Failure):
                raise self.failed(found.device, found.action, found.reason, found.cause)
            if found != ours:
                raise MachineError(
                    f"node {'/'.join(map(str, node))} runs another HetHub: the digest of its code is {found[:16]}, the "
                    f"driver's {ours[:16]}. Install the same on all nodes."
                )

    def _host(self, device: int) -> Any:
        return self._hosts[self._node(device)]

    def _ask(self, device: int, method: str, arguments: Any) -> Any:
        """Ask a worker, `arguments` packed or a reference to such; returns a reference to its answer."""
        return self._host(device).call.remote(self.cluster.devices()[device].name, method, arguments)

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
        # What is the same for all is packed once: a big plan's programs take long.
        same = None if isinstance(arguments, Mapping) else _shared(pack(arguments))
        for device in self.devices if devices is None else devices:
            chosen = pack(arguments[device]) if isinstance(arguments, Mapping) else same
            pending[self._ask(device, method, chosen)] = device
        answers: dict[int, Any] = {}
        while pending:
            stop_if_asked()
            self._look_for_head()
            done, _ = ray.wait(list(pending), num_returns=1, timeout=poll_seconds)
            failures = self._deaths(pending) + self._silent_hosts()
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
        """What a worker answered, or the Failure that it is."""
        found = self._got(device, reference, self.explain(device))
        if found is None:
            return Failure(device, self.explain(device), _DIED, False)
        return found if isinstance(found, Failure) else unpack(found)

    def _got(self, device: int, reference: Any, action: str, seconds: float | None = None) -> Any:
        """What a host answered; a Failure of the device where it could not, or not in time."""
        import ray

        try:
            return ray.get(reference, timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            return Failure(device, action, f"no Ray node has started it within {seconds:.0f} s", False)
        except ray.exceptions.RayActorError:
            return Failure(device, action, _NODE_DIED, False)
        except ray.exceptions.RayTaskError as error:
            return Failure(device, action, str(error.cause).splitlines()[0], False)
        except ray.exceptions.RayError as error:
            return Failure(device, action, str(error).splitlines()[0], False)

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

    def _silent_hosts(self) -> list[Failure]:
        """Failures of all devices whose host, on another machine, answers nothing any more. It is given up: Ray ends it
        should its node come back."""
        import ray

        if self.address is None:
            return []
        lost = self._watch.look(
            self._hosts,
            lambda node: self._hosts[node].dead.remote(),
            lambda asked: ray.wait(asked, num_returns=len(asked), timeout=0)[0],
        )
        for node in lost:
            ray.kill(self._hosts.pop(node), no_restart=True)
        return [
            Failure(device, self.explain(device), _NODE_SILENT, False, Cause.NODE)
            for device in self.devices
            if self._node(device) in lost
        ]

    def _ended(self) -> list[int]:
        """Devices whose process on this machine has ended."""
        poll = select.poll()
        of = {process: device for device, process in self._processes.items()}
        for process in of:
            poll.register(process, select.POLLIN)
        return sorted(of[process] for process, _ in poll.poll(0))

    def dead(self) -> list[int]:
        """Devices whose workers have died, or whose host has: one that answers nothing counts as such."""
        import ray

        found = set(self._ended())
        elsewhere = self._working - self._processes.keys()
        asked = {
            self._hosts[node].dead.remote(): node
            for node in {self._node(device) for device in elsewhere} & self._hosts.keys()
        }
        ray.wait(list(asked), num_returns=len(asked), timeout=_ALIVE_SECONDS) if asked else None
        gone: set[str] = set()
        for reference, node in asked.items():
            try:
                gone.update(ray.get(reference, timeout=0))
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                del self._hosts[node]
        names = self.cluster.devices()
        found |= {d for d in elsewhere if names[d].name in gone or self._node(d) not in self._hosts}
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
        for device in [d for d in self._working if everyone[d].name not in wanted]:
            self._end(device)
        self._processes = {wanted[everyone[d].name]: process for d, process in self._processes.items()}
        self._working = {wanted[everyone[d].name] for d in self._working}
        self.cluster, self.devices = cluster, tuple(devices)
        self._place()

    def _end(self, device: int) -> None:
        """Kill a worker, a stopped one too."""
        process = self._processes.pop(device, None)
        if process is not None:
            _kill(process)
        if device in self._working:
            self._working.remove(device)
            host = self._hosts.get(self._node(device))
            if host is not None:
                host.end.remote(self.cluster.devices()[device].name)

    def save_stacks(self) -> None:
        """Let all workers write into their logs where they are: for whoever looks at a job that stood still."""
        import ray

        asked = [host.save_stacks.remote() for host in self._hosts.values()]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=_STACKS_SECONDS)

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

    def died(self, number: int) -> WorkerFailedError:
        """The error that names a device whose worker, or its host, is gone."""
        reason = _DIED if self._node(number) in self._hosts else _NODE_DIED
        return self.failed(number, self.explain(number), reason, Cause.WORKER)

    def ask(self, method: str, devices: Collection[int], timeout_seconds: float) -> dict[int, Any]:
        """Answers of a quick method while another runs, by device; without those that do not answer in time or fail."""
        import ray

        asked = {self._ask(device, method, pack(())): device for device in devices}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_seconds)
        answers = {asked[reference]: self._answer(asked[reference], reference) for reference in done}
        return {device: answer for device, answer in answers.items() if not isinstance(answer, Failure)}

    def silent(self, devices: Collection[int], seconds: float) -> list[int]:
        """Those of `devices` whose processes do not answer within `seconds`: stopped, hung, or starved."""
        import ray

        asked = {self._ask(device, "results", pack((_NO_RESULTS,))): device for device in devices}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        return [device for reference, device in asked.items() if reference not in done]

    def results(
        self, device: int, since: int, timeout_seconds: float = 0.5
    ) -> list[tuple[int, float, float]]:
        """(step, loss, norm) that a device has finished since the last look; [] when it does not answer in time."""
        import ray

        try:
            found = ray.get(self._ask(device, "results", pack((since,))), timeout=timeout_seconds)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return []
        answer = [] if found is None else unpack(found)
        return [] if isinstance(answer, Failure) else answer


def _kill(process: int) -> None:
    """Kill what a descriptor stands for, and close it."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    os.close(process)


def _request(needs: Mapping[str, float]) -> dict[str, Any]:
    """What is needed, as arguments of Ray, which takes GPUs apart and refuses them among the other resources."""
    return {
        "num_gpus": int(needs.get("GPU", 0)),
        "resources": {name: count for name, count in needs.items() if name != "GPU"},
    }


def _ray_start(needs: Mapping[str, float]) -> str:
    """The command that starts a node which offers this."""
    asked = _request(needs)
    gpus = f" --num-gpus {asked['num_gpus']}" if asked["num_gpus"] else ""
    counts = json.dumps({name: int(count) for name, count in asked["resources"].items()})
    return f"`ray start{gpus} --resources '{counts}'`"


def _shared(packed: bytes) -> Any:
    """A short one as it is, a longer one by a reference into Ray's store."""
    import ray

    return packed if len(packed) < _SHORT_BYTES else ray.put(packed)


def _set_environment(*, local: bool) -> None:
    """What Ray and its workers read from the environment; a user's own settings win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        for name, value in _RAY_HEALTH.items():
            os.environ.setdefault(f"RAY_{name}", str(value))
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":  # a stranger's calls are refused
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
