"""`hethub bound CLUSTER`: what no plan can beat, and where the best found plan loses against it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hethub.cost.bounds import PhysicalBound
    from hethub.planners.answer import Answer

__all__ = ["bound"]


def bound(
    cluster: Annotated[Path, typer.Argument(help="The cluster file, with its workload.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Print both bounds with their derivation, and the loss from them to the best found plan, by cause.

    Example: hethub bound cluster_specs/laptop.yaml
    """
    from hethub.cli.waterfall import predicted_waterfall, waterfall_lines
    from hethub.cost.bounds import physical_bound
    from hethub.planners.answer import answer
    from hethub.specs.cluster import load_problem

    loaded, workload = load_problem(cluster)
    found = answer(loaded, workload, may_fork=True, whole_batches=True)
    physical = physical_bound(found.modelled.compute)
    lost = predicted_waterfall(found.modelled)
    if as_json:
        typer.echo(json.dumps(_as_object(found, physical) | {"waterfall": lost.total}, indent=2))
        return
    tokens = workload.global_batch * workload.sequence_length
    lines = [
        *_physical_lines(physical, tokens, workload.model.layers),
        *_homogeneous_lines(found),
        *_plan_lines(found),
        *(f"{cause}\t{text}" for cause, text in waterfall_lines(lost)),
    ]
    typer.echo("\n".join(lines))


def _as_object(found: Answer, physical: PhysicalBound) -> dict[str, Any]:
    return {
        "physical": asdict(physical),
        "homogeneous": asdict(found.homogeneous),
        **{key: found.figures[key] for key in ("bounds", "share", "step_seconds", "tokens_per_second")},
    }


def _physical_lines(physical: PhysicalBound, tokens: int, layers: int) -> list[str]:
    lines = [
        f"physical bound\t{tokens / physical.step_seconds:,.0f} tokens/s, {physical.step_seconds:.4g} s a step",
        "# each kind of layer is split over the types so that the last device is done soonest, communication free;",
        "# seconds are of the whole batch through one layer on one device",
        "device_type\tshare\tkind\tlayers\tseconds\tpart of the work",
    ]
    for name, kinds in physical.layer_seconds.items():
        for kind, seconds in kinds.items():
            count = layers if kind == "decoder" else 1
            part = physical.split[name][kind]
            lines.append(f"{name}\t{physical.shares[name]:.2%}\t{kind}\t{count}\t{seconds:.4g}\t{part:.2%}")
    return lines


def _homogeneous_lines(found: Answer) -> list[str]:
    homogeneous = found.homogeneous
    lines = [
        f"homogeneous bound\t{homogeneous.tokens_per_second:,.0f} tokens/s",
        "# every type alone, with its own best plan and its share of the batch, added up",
        "device_type\tdevices\texact batch\tbatch\ttokens/s\ttokens/s at the whole batch",
    ]
    for entry in homogeneous.types:
        lines.append(
            f"{entry.device_type}\t{entry.count}\t{entry.exact_batch:.2f}\t{entry.global_batch}\t"
            f"{entry.tokens_per_second:,.0f}\t{entry.whole_batch_tokens_per_second:,.0f}"
        )
    if homogeneous.not_a_bound:
        lines.append(
            f"# not a bound: {', '.join(homogeneous.not_a_bound)} cannot hold the model alone, counts 0"
        )
    return lines


def _plan_lines(found: Answer) -> list[str]:
    share = found.figures["share"]
    reached = [f"{share['physical_bound']:.1%} of the physical bound"]
    if share["homogeneous_bound"] is not None:
        reached.append(f"{share['homogeneous_bound']:.1%} of the homogeneous one")
    return [
        f"plan\t{found.figures['tokens_per_second']:,.0f} tokens/s predicted: {', '.join(reached)}",
        "# where the time of all devices goes, weighed by their speed",
        "cause\tshare\tmeaning",
    ]
