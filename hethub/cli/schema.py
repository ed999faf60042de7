"""`hethub schema`: the JSON Schema of a file that people write, for editors to complete."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["schema"]


class SchemaFile(StrEnum):
    """The files that have a schema."""

    cluster = "cluster"
    workload = "workload"
    job = "job"
    plan = "plan"


def schema(which: Annotated[SchemaFile, typer.Argument(help="Which file.")]) -> None:
    """Print the JSON Schema of cluster.yaml, job.yaml, plan.yaml or the workload part.

    Example: hethub schema cluster > cluster.schema.json
    """
    from pydantic import BaseModel

    from hethub.specs.base import json_schema
    from hethub.specs.cluster import ClusterSpec
    from hethub.specs.job import JobSpec
    from hethub.specs.plan import PlanSpec
    from hethub.specs.workload import WorkloadSpec

    models: dict[SchemaFile, type[BaseModel]] = {
        SchemaFile.cluster: ClusterSpec,
        SchemaFile.workload: WorkloadSpec,
        SchemaFile.job: JobSpec,
        SchemaFile.plan: PlanSpec,
    }
    typer.echo(json.dumps(json_schema(models[which]), indent=2))
