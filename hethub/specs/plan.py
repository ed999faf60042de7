"""The plan file: the most general split, small to write.

A plan is a list of pipelines (model replicas), each with its own micro-batches and stages; a stage has
replicas that each take some rows of every micro-batch; a replica is a tensor-parallel group whose ranks take
their own shares of attention heads (whole key-value groups), FFN columns and vocabulary rows. Layer 0 is the
embedding, 1 to L the decoders, L + 1 the final norm, head and loss; `layers: [a, b]` is half-open.

The file stands alone: it holds the cluster and the workload with every figure, the prediction, the bounds and
why the runner-up lost. Everything that can be derived (groups, transports, owners, transfers) is derived,
never stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from hethub.files import write_whole
from hethub.specs.base import Spec, validate_document
from hethub.specs.cluster import Cluster, ClusterSpec, cluster_to_spec, resolve_cluster
from hethub.specs.document import Document, dump_yaml, load_document
from hethub.specs.workload import Workload, WorkloadSpec, resolve_workload, workload_to_spec

__all__ = [
    "PLAN_VERSION",
    "Pipeline",
    "Plan",
    "PlanSpec",
    "Rank",
    "Replica",
    "Stage",
    "load_plan",
    "plan_to_spec",
    "save_plan",
]

PLAN_VERSION = 1


class Rank(Spec):
    """One rank of a tensor-parallel group, or `count` alike ones, with its shares."""

    device: str | None = Field(None, description="One device, group/node/device.")
    devices: str | None = Field(
        None,
        description="Device ranges, inclusive and node-major, such as 'g/0-3/0-7, g/4/0-4'; holds "
        "(pipeline repeat) x (replica repeat) x count devices, consumed innermost first.",
    )
    count: int = Field(1, ge=1, description="Alike ranks in each replica.")
    heads: int = Field(0, ge=0, description="Query heads of this rank, in whole key-value groups.")
    ffn: int = Field(0, ge=0, description="Columns of the feed-forward layer.")
    vocab: int = Field(
        0, ge=0, description="Rows of the vocabulary, in stages with the embedding or the head."
    )

    @model_validator(mode="after")
    def _one_way_to_name_devices(self) -> Rank:
        if (self.device is None) == (self.devices is None):
            raise ValueError("give exactly one of `device` and `devices`")
        return self


class Replica(Spec):
    """A tensor-parallel group that takes `rows` of every micro-batch, or `repeat` alike ones in turn."""

    rows: int = Field(ge=1, description="Rows of every micro-batch.")
    repeat: int = Field(1, ge=1, description="Alike replicas, each with `rows` rows.")
    ranks: list[Rank] = Field(min_length=1, description="The tensor-parallel group.")


class Stage(Spec):
    """A contiguous range of layers and the replicas that hold it."""

    layers: tuple[int, int] = Field(description="Half-open layer range [a, b): 0 embedding, L + 1 head.")
    recompute: Literal["none", "selective", "full"] = Field("none", description="Activations to recompute.")
    in_flight: int = Field(ge=1, description="Most micro-batches whose activations are held at once.")
    replicas: list[Replica] = Field(
        min_length=1, description="Replicas; their rows add up to the micro-batch."
    )

    @model_validator(mode="before")
    @classmethod
    def _layers_from_list(cls, data: Any) -> Any:
        """YAML has lists, not tuples; strict validation would refuse them."""
        if isinstance(data, dict) and isinstance(data.get("layers"), list):
            return {**data, "layers": tuple(data["layers"])}
        return data


class Pipeline(Spec):
    """One model replica as a chain of stages; `repeat` alike ones stand side by side."""

    repeat: int = Field(1, ge=1, description="Alike pipelines on further devices.")
    schedule: str = Field(
        "1f1b",
        description="Name of a schedule: 1f1b, 1f1b-split, gpipe, interleaved, zb-h1 or list (for unequal stages).",
    )
    micro_batches: int = Field(ge=1, description="Micro-batches of each step.")
    micro_batch_rows: int = Field(ge=1, description="Rows (sequences) of each micro-batch.")
    stages: list[Stage] = Field(min_length=1, description="Stages in layer order.")


class PlanSpec(Spec):
    """The plan file as written."""

    version: Literal[1] = Field(description="Version of this format.")
    name: str = Field("plan", description="What this plan is called in reports.")
    pipelines: list[Pipeline] = Field(min_length=1, description="Model replicas, rows given in this order.")
    cluster: ClusterSpec = Field(description="The cluster that the plan is for, every figure given.")
    workload: WorkloadSpec = Field(description="Model, sequence length, global batch, precision, optimizer.")
    prediction: dict[str, Any] | None = Field(None, description="What the simulator predicted.")
    bounds: dict[str, Any] | None = Field(None, description="The two bounds and the shares reached.")
    search: dict[str, Any] | None = Field(None, description="How it was found and why the runner-up lost.")


class Plan(Spec):
    """A plan with its cluster and workload resolved. `pipelines` is the split itself."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    pipelines: list[Pipeline]
    cluster: Cluster
    workload: Workload
    prediction: dict[str, Any] | None = None
    bounds: dict[str, Any] | None = None
    search: dict[str, Any] | None = None


def load_plan(path: Path) -> tuple[Plan, Document]:
    """Read a plan file and resolve it; the document tells where a key stands. Raises InputError."""
    document = load_document(path)
    spec = validate_document(document, PlanSpec)
    cluster = resolve_cluster(spec.cluster, document, prefix=("cluster",))
    workload = resolve_workload(spec.workload, document, prefix=("workload",))
    plan = Plan(
        name=spec.name,
        pipelines=spec.pipelines,
        cluster=cluster,
        workload=workload,
        prediction=spec.prediction,
        bounds=spec.bounds,
        search=spec.search,
    )
    return plan, document


def plan_to_spec(plan: Plan) -> dict[str, Any]:
    """The plan file's content: what `save_plan` writes and `--json` prints under `plan`."""
    content: dict[str, Any] = {
        "version": PLAN_VERSION,
        "name": plan.name,
        "pipelines": [pipeline.model_dump(mode="json", exclude_defaults=True) for pipeline in plan.pipelines],
    }
    for key in ("prediction", "bounds", "search"):
        value = getattr(plan, key)
        if value is not None:
            content[key] = value
    content["workload"] = workload_to_spec(plan.workload)
    content["cluster"] = cluster_to_spec(plan.cluster)
    return content


def save_plan(plan: Plan, path: Path) -> None:
    """Write the plan file whole or not at all."""
    write_whole(path, dump_yaml(plan_to_spec(plan)))
