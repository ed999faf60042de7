"""Hugging Face Llama folders: config.json and safetensors, as initial weights of a job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from hethub.cost.shapes import Parameter, model_parameters
from hethub.errors import InputError
from hethub.specs.layout import Span
from hethub.specs.workload import Model

__all__ = ["Pretrained", "check_pretrained"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Pretrained:
    """Weights of a folder, read slice by slice. Names and shapes have been checked by `check_pretrained`."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        opened: dict[Path, Any] = {}
        for name, path in tensor_files(folder).items():
            if path not in opened:
                opened[path] = self._stack.enter_context(safe_open(str(path), framework="pt"))
            self._files[name] = opened[path]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape, None where there is no such tensor."""
        if name not in self._files:
            return None
        return tuple(self._files[name].get_slice(name).get_shape())

    def weights(self, parameter: Parameter, span: Span) -> Tensor:
        """A weight source of stages: indices [start, stop) of the cut axis."""
        whole = self._files[parameter.name].get_slice(parameter.name)
        found: Tensor = whole[slice(*span)] if parameter.axis == 0 else whole[:, slice(*span)]
        return found

    def close(self) -> None:
        """Let go of the files."""
        self._stack.close()


def tensor_files(folder: Path) -> Mapping[str, Path]:
    """Tensor name -> its file, from the folder's index or its one file. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    index = folder / _INDEX
    try:
        if index.is_file():
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if any(Path(file).name != file for file in table.values()):
                raise InputError(f"{index}: weight_map names a file outside of the folder. Mend it.")
            return {str(name): folder / file for name, file in table.items()}
        with safe_open(str(folder / _SINGLE), framework="pt") as single:
            return dict.fromkeys(single.keys(), folder / _SINGLE)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: no weights: {str(error).splitlines()[0]}. "
            f"Give a folder with {_SINGLE}, or {_INDEX} and its files."
        ) from error


def check_pretrained(folder: Path, model: Model) -> str:
    """Refuse a folder whose tensors are not those of `model`; returns a digest of its files.

    Raises InputError naming the first tensor that is absent or has another shape.
    """
    from safetensors import SafetensorError

    try:
        found = Pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: cannot be read: {str(error).splitlines()[0]}. Give whole files."
        ) from error
    try:
        for parameter in model_parameters(model):
            shape = found.shape(parameter.name)
            if shape != parameter.shape:
                what = "absent" if shape is None else f"of shape {list(shape)}"
                raise InputError(
                    f"{folder}: {parameter.name} is {what}, the workload's model has {list(parameter.shape)}. "
                    "Give the weights of this model, or its config.json as the workload's model."
                )
    finally:
        found.close()
    digest = hashlib.sha256()
    for path in sorted(set(tensor_files(folder).values())):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
