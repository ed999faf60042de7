"""The plan that a launch trains with."""

from __future__ import annotations

from pathlib import Path

from hethub.launch.compiled import choose_plans
from hethub.specs.job import load_job

SHIPPED = Path(__file__).parents[2] / "cluster_specs"


def test_a_searched_plan_keeps_the_constraints_of_the_cluster_file(tmp_path: Path) -> None:
    cluster, job = tmp_path / "cluster.yaml", tmp_path / "job.yaml"
    text = (
        (SHIPPED / "laptop.yaml").read_text().replace("model: laptop-model", f"model: {SHIPPED}/laptop-model")
    )
    told = (SHIPPED / "laptop-job.yaml").read_text().replace("cluster: laptop.yaml", "cluster: cluster.yaml")
    job.write_text(told)

    def stages(constraints: str) -> int:
        cluster.write_text(text + constraints)
        plan, _ = choose_plans(load_job(job))
        return max(len(pipeline.stages) for pipeline in plan.pipelines)

    assert stages("") == 4
    assert stages("constraints: {max_pipeline: 3}\n") == 3
