"""The workload: model, sequence length, global batch, precision, optimizer."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from hethub import catalog
from hethub.specs.base import Problems, Spec
from hethub.specs.document import Document, Key, load_document
from hethub.specs.llama_config import Model, RopeScaling, config_of, model_from_config

__all__ = ["Model", "RopeScaling", "Workload", "WorkloadSpec", "resolve_workload", "workload_to_spec"]


class WorkloadSpec(Spec):
    """The `workload` key as written."""

    model: str | dict[str, Any] = Field(
        description="A shipped model (llama-7b), the path of a Hugging Face config.json of the Llama "
        "family, relative to this file, or a mapping with its keys.",
    )
    sequence_length: int = Field(ge=1, le=2**24, description="Tokens of each sequence.")
    global_batch: int = Field(ge=1, le=2**24, description="Sequences of each optimizer step.")
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = Field(
        description="Of weights and activations. Masters and optimizer state are fp32, or fp64 with fp64."
    )
    optimizer: Literal["adamw"] = Field("adamw", description="The optimizer.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be trained; `global_batch` in sequences of `sequence_length` tokens."""

    model: Model
    sequence_length: int
    global_batch: int
    precision: str
    optimizer: str


def resolve_workload(spec: WorkloadSpec, document: Document, prefix: Sequence[Key] = ()) -> Workload:
    """The workload, its model found. `prefix` leads to it in `document`; paths start from that file's folder.

    Raises InputError with one line per problem.
    """
    return Workload(
        model=_find_model(spec.model, document, (*prefix, "model")),
        sequence_length=spec.sequence_length,
        global_batch=spec.global_batch,
        precision=spec.precision,
        optimizer=spec.optimizer,
    )


def workload_to_spec(workload: Workload) -> dict[str, Any]:
    """The `workload` key of a file that stands alone: the model is written out."""
    return {
        "model": config_of(workload.model),
        "sequence_length": workload.sequence_length,
        "global_batch": workload.global_batch,
        "precision": workload.precision,
        "optimizer": workload.optimizer,
    }


def _find_model(model: str | dict[str, Any], document: Document, keys: tuple[Key, ...]) -> Model:
    if isinstance(model, dict):
        return _read_config(model, "custom", document, keys)
    if "/" in model or "\\" in model or model.endswith(".json"):
        return _read_file(model, document, keys)
    try:
        shipped = catalog.model(model)
    except catalog.UnknownName as error:
        raise document.error(
            keys, f"{error} For a model of your own, give the path of its config.json."
        ) from None
    return _read_config(shipped, model, document, keys)


def _read_file(name: str, document: Document, keys: tuple[Key, ...]) -> Model:
    path = document.path.parent / name
    if os.path.isdir(path):
        path = path / "config.json"
    if not os.path.isfile(path):
        raise document.error(
            keys, f"there is no file {path}. Give the path of a config.json, or a shipped model."
        )
    config = load_document(path)
    if not isinstance(config.value, dict):
        raise config.error((), "expected a mapping. Give a Hugging Face config.json.")
    stem = path.resolve().parent.name if path.name == "config.json" else path.stem
    return _read_config(config.value, _as_name(stem), config, ())


def _read_config(config: dict[str, Any], name: str, document: Document, keys: tuple[Key, ...]) -> Model:
    problems = Problems(document, keys)
    model = model_from_config(config, name, problems.add)
    problems.raise_any()
    assert model is not None  # model_from_config reports whatever keeps it from reading
    return model


def _as_name(text: str) -> str:
    """A file's name as a model name: other characters become dashes."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[:64] or "custom"
