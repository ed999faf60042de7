"""A checkpoint as a Hugging Face Llama folder: config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hethub.checkpoints.manifest import Manifest
from hethub.checkpoints.reshard import Need, Reader
from hethub.checkpoints.store import open_checkpoint
from hethub.errors import InputError, not_installed
from hethub.files import whole_file, write_json, writing
from hethub.specs.llama_config import config_of
from hethub.specs.workload import Model

__all__ = ["export_checkpoint", "hugging_face_config", "whole_weights"]


def whole_weights(folder: Path, manifest: Manifest) -> dict[str, npt.NDArray[np.floating]]:
    """Every weight as it was trained, wide, by its Hugging Face name. Raises CheckpointError where it is damaged."""
    with Reader(folder, manifest) as reader:
        return {
            p.name: np.ascontiguousarray(reader.read(Need(0, number, 0, p.shape[p.axis])))
            for number, p in enumerate(manifest.parameters)
        }


def hugging_face_config(model: Model, sequence_length: int, dtype: str) -> dict[str, Any]:
    """What `transformers` wants to know of the model; `dtype` is that of the weights beside it."""
    config = {key: value for key, value in config_of(model).items() if key != "name"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": sequence_length,
        "torch_dtype": {"fp32": "float32", "fp64": "float64"}[dtype],
    }


def export_checkpoint(folder: Path, output: Path) -> Manifest:
    """Write a checkpoint's weights to a new or empty folder. Raises CheckpointError, InputError for the output, or
    MachineError without the package safetensors."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise not_installed("safetensors", "the export", "launch") from None

    manifest = open_checkpoint(folder)
    model = manifest.model()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: is there already. Name a folder that does not exist yet.")
    weights = whole_weights(folder, manifest)
    with writing(output, "Name another folder."):
        output.mkdir(parents=True, exist_ok=True)
        with whole_file(output / "model.safetensors") as temporary:
            save_file(weights, str(temporary), metadata={"format": "pt"})
        config = hugging_face_config(model, manifest.training.sequence_length, manifest.dtype)
        write_json(output / "config.json", config)
    return manifest
