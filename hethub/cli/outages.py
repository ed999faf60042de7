"""`hethub simulate PLAN --faults JOB`: what the job's faults, checkpoints and policy make of a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hethub.cost.measured import Measured
    from hethub.simulate.forecast import Forecast
    from hethub.specs.cluster import Cluster
    from hethub.specs.job import Job
    from hethub.specs.plan import Plan

__all__ = ["outage_facts", "outage_figures", "predict_outages"]


def predict_outages(job_file: Path, plan_file: Path, measured: Measured) -> Forecast:
    """Play the job through under a plan. Raises InputError where the plan is not one for the job, or what a modelled
    second takes is not known."""
    from hethub.launch.compiled import choose_plans, read_plan
    from hethub.simulate.forecast import forecast
    from hethub.specs.job import load_job

    job = load_job(job_file)

    def replan(cluster: Cluster) -> Plan:
        return choose_plans(replace(job, plan=None, cluster=cluster, compare_even_steps=0))[0]

    return forecast(
        read_plan(plan_file, job),
        job.faults,
        steps=job.steps,
        checkpoint=job.checkpoint,
        policy=job.on_failure,
        replan=replan,
        scale=_scale(job),
        measured=measured,
    )


def _scale(job: Job) -> float:
    from hethub.errors import InputError

    scale = job.cluster.emulated_time_scale
    if scale == "auto":
        raise InputError(
            f"{job.cluster_path}: emulated.time_scale is auto, and recoveries take wall seconds. Set the number that "
            "a run of it has found."
        )
    return 1.0 if scale is None else float(scale)


def outage_figures(found: Forecast) -> dict[str, Any]:
    """For `--json`, wall seconds: the training, and each failure by its parts."""
    return asdict(found) | {"goodput_ratio": found.goodput_ratio}


def outage_facts(found: Forecast) -> Sequence[str]:
    """Lines for a person."""
    lines = [
        f"failure\tstep {one.step}, {one.device} ({one.cause}): on from step {one.from_step}"
        + (f" without {', '.join(one.lost)}, {one.step_seconds:.4g} s a step" if one.lost else "")
        + f"; {one.again_seconds:.3g} s done again, {one.between_seconds:.3g} s between"
        for one in found.outages
    ]
    if found.ended:
        lines.append(f"ends\tafter {found.steps} steps: {found.ended}")
    return [
        *lines,
        f"training\t{found.steps} steps in {found.wall_seconds:.4g} s wall",
        f"a step\t{found.step_seconds:.4g} s wall without faults",
        f"goodput\t{found.goodput_ratio:.1%}",
    ]
