"""The tally of an emulated device's memory: storages that are really alive, counted as they come and go.

Whoever makes a tensor that outlives the call that made it counts it. Autograd's own (`saving`) come by themselves. What
lives inside one action only is not counted: the cost model predicts it as workspace.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["DeviceMemoryError", "Held", "StorageTally", "is_out_of_memory"]


class DeviceMemoryError(Exception):
    """A device is out of memory; the text gives what it needs, what was predicted, what it has, and what to change."""

    def __init__(
        self,
        live_bytes: int,
        limit_bytes: int,
        device: str,
        predicted_bytes: int | None = None,
        advice: str = "",
    ) -> None:
        """`device` in words; `predicted_bytes` is its predicted peak where known."""
        predicted = "" if predicted_bytes is None else f"{_size(predicted_bytes)} predicted peak, "
        super().__init__(
            f"out of memory: {_size(live_bytes)} live, {predicted}{device} has {_size(limit_bytes)}"
            + (f". {advice}" if advice else "")
        )
        self.live_bytes = live_bytes
        self.limit_bytes = limit_bytes
        self.device = device
        self.predicted_bytes = predicted_bytes
        self.advice = advice

    def __reduce__(self) -> tuple[type[DeviceMemoryError], tuple[int, int, str, int | None, str]]:
        values = (self.live_bytes, self.limit_bytes, self.device, self.predicted_bytes, self.advice)
        return (type(self), values)

    def in_stage(self, stage: int, recompute: str) -> DeviceMemoryError:
        """The same, with what to change; `stage` is the failed action's, -1 for work on parameters."""
        if stage < 0:
            advice = "Give the device fewer layers, or share its stage among more devices"
        else:
            last = "give it fewer layers" if recompute == "full" else "set recompute: full"
            advice = f"Lower micro_batch_rows or in_flight of stage {stage}, or {last}"
        return DeviceMemoryError(self.live_bytes, self.limit_bytes, self.device, self.predicted_bytes, advice)


def _size(size_bytes: int) -> str:
    gib = size_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{size_bytes / 2**20:.2f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a real allocator had no more: the accelerator's, or the host's (which torch tells as RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class StorageTally:
    """Counts the bytes of live storages against `limit_bytes`.

    A storage counts once, however many tensors view it and however often it is added. `predicted_bytes` is what the
    cost model expects at the peak, for the error's text.
    """

    def __init__(self, limit_bytes: int, name: str, predicted_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.name = name
        self.predicted_bytes = predicted_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, list[int]] = {}  # address -> [uses, bytes]

    def add(self, tensor: Tensor) -> int:
        """Count a tensor's storage; returns the key for `drop`, which must come before the storage is gone. Raises
        DeviceMemoryError past the limit."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        known = self._known.get(key)
        if known is None:
            size = storage.nbytes()
            self._known[key] = [1, size]
            self.grow(size)
        else:
            known[0] += 1
        return key

    def drop(self, key: int) -> None:
        """Forget one use of a storage."""
        known = self._known[key]
        known[0] -= 1
        if not known[0]:
            del self._known[key]
            self.live_bytes -= known[1]

    def grow(self, size: int) -> None:
        """Count bytes that have no storage here. Raises DeviceMemoryError past the limit."""
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            if self.live_bytes > self.limit_bytes:
                raise DeviceMemoryError(self.live_bytes, self.limit_bytes, self.name, self.predicted_bytes)

    def shrink(self, size: int) -> None:
        """Forget bytes that `grow` counted."""
        self.live_bytes -= size

    def hold(self, tensors: Iterable[Tensor]) -> Held:
        """Count tensors for as long as the result lives; keep it beside them. Raises DeviceMemoryError past the
        limit."""
        return Held(self, tensors)

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which every tensor that autograd saves is counted until autograd lets go of it."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self, tensor)

    @staticmethod
    def _unpack(saved: _Saved) -> Tensor:
        return saved.tensor


class Held:
    """Tensors that somebody keeps, counted until `release` or the end of this object."""

    __slots__ = ("_keys", "_tally")

    def __init__(self, tally: StorageTally, tensors: Iterable[Tensor]) -> None:
        self._tally = tally
        self._keys: list[int] = []
        for tensor in tensors:
            self._keys.append(tally.add(tensor))

    def release(self) -> None:
        """Count them no longer. May be called twice."""
        while self._keys:
            self._tally.drop(self._keys.pop())

    def __del__(self) -> None:
        self.release()


class _Saved:
    """A tensor in autograd's keeping; its end is the end of the graph node."""

    __slots__ = ("key", "tally", "tensor")

    def __init__(self, tally: StorageTally, tensor: Tensor) -> None:
        self.tally = tally
        self.tensor = tensor
        self.key = tally.add(tensor)

    def __del__(self) -> None:
        if hasattr(self, "key"):
            self.tally.drop(self.key)
