"""Why a plan is as it is, in lines: the waterfall to the bound, limits, worths, runners-up and transports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hethub.cost.measured import Measured
    from hethub.planners.answer import Answer
    from hethub.specs.cluster import Planning

__all__ = ["Explanation", "explanation"]

_NOT_KNOWN = "not known: the search has no plan of its own on all devices (the even split stands in)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The explanation's figures, as `--json` prints them."""

    content: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """For people: a heading, then tab-separated lines, for each part."""
        from hethub.timeline.waterfall import CAUSES

        yield "# where the time of all devices goes, weighed by their speed"
        for cause, share in self.content["waterfall"].items():
            if share >= 5e-5:
                yield f"{cause}\t{share:.2%}\t{CAUSES[cause]}"
        yield "# what limits each device type: the share of the step that goes with a tenth more of it"
        yield "device_type\tlimit\tmemory\tspeed\tone more node" if self.content["limits"] else _NOT_KNOWN
        for entry in self.content["limits"]:
            yield (
                f"{entry['device_type']}\t{entry['limit']}\t{entry['more_memory']:.2%}\t{entry['more_speed']:.2%}\t"
                f"{entry['one_more_node']:.2%} ({entry['devices_of_a_node']} devices)"
            )
        yield "# links twice as fast: the share of the step that goes"
        if not self.content["limits"]:
            yield _NOT_KNOWN
        for entry in self.content["links"]:
            yield f"{entry['link']}\t{entry['faster']:.2%}"
        yield "# stage boundaries: a micro-batch's message each way, over an idle link"
        for entry in self.content["boundaries"]:
            yield (
                f"{entry['count']} x {entry['source']} to {entry['destination']}\t{entry['transport']}\t"
                f"{entry['size_bytes'] / 2**20:.3g} MiB\t{entry['seconds']:.3g} s"
            )
        yield "# plans that lost"
        for entry in self.content["runners_up"]:
            yield f"{entry['step_seconds']:.4g} s\t{entry['description']}\t{entry['reason']}"


def explanation(found: Answer, told: Planning, measured: Measured) -> Explanation:
    """All parts, by searching again with one thing changed at a time."""
    from hethub.cli.waterfall import predicted_waterfall
    from hethub.planners.explain import boundaries, limits
    from hethub.planners.interface import Problem

    problem = Problem.of(told.cluster, told.workload, measured, constraints=told.constraints)
    searched = (
        found.figures["search"]["closed_form_seconds"] is not None
    )  # else it is the even split that stands in
    types, links = limits(problem) if searched else ((), ())
    return Explanation(
        content={
            "waterfall": predicted_waterfall(found.modelled).total,
            "limits": [asdict(entry) for entry in types],
            "links": [asdict(entry) for entry in links],
            "boundaries": [
                asdict(entry) for entry in boundaries(found.modelled.layout, found.modelled.compute)
            ],
            "runners_up": found.figures["search"]["runners_up"],
        }
    )
