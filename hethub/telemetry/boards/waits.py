"""The second board: which devices are busy, which wait and for what, and is the prediction right."""

from __future__ import annotations

from hethub.telemetry.boards.expressions import DEVICES, WAITING, predicted_share, share, slowdown
from hethub.telemetry.boards.panels import Board, Look, Panel, Query, Row, Steps
from hethub.telemetry.boards.variables import CHOOSE_DEVICES, CHOOSE_RUN, WHAT_DEVICES

__all__ = ["WAITS_BOARD"]

_BUSY = 'activity="busy"'
_EXPOSED = 'activity="exposed_communication"'
_BUBBLE = 'activity="bubble"'
_STAGE = ("pipeline", "stage", "device_type")
_STAGE_LEGEND = "pipeline {{pipeline}} stage {{stage}} {{device_type}}"
_DEVICE = ("node", "device")
_DEVICE_LEGEND = "{{node}}/{{device}}"
_COMPUTE = slowdown(
    "hethub_device_compute_seconds_total",
    "hethub_device_predicted_compute_seconds_total",
    DEVICES,
    "node",
    "device",
    "device_type",
)

_TYPES = (
    Panel(
        number=1,
        title="Where the time goes",
        description="The chosen devices' time, by activity; together it is all of it. busy is useful "
        "compute. exposed_communication: messages and collectives that nothing hid. bubble: waiting for "
        "a stage that has not sent yet. idle: nothing left to do in the step. A large bubble wants more "
        "or smaller micro-batches, a large exposed share another split of what crosses slow links.",
        unit="percentunit",
        look=Look.STACK,
        queries=(Query(share("", "activity", of=""), "{{activity}}"),),
        high=1.0,
        width=8,
    ),
    Panel(
        number=2,
        title="Busy by device type",
        description="Measured (mean of the type's devices) beside predicted; of the time in training steps, so "
        "without evaluation and checkpoints. All types alike: the split fits. One type far above the others: "
        "the others wait for it; give it less work. Measured under predicted for all types at once: look at "
        "messages, not at devices.",
        unit="percentunit",
        queries=(
            Query(share(_BUSY, "device_type"), "{{device_type}}"),
            Query(predicted_share(_BUSY, "device_type"), "{{device_type}} predicted"),
        ),
        high=1.0,
        width=8,
    ),
    Panel(
        number=3,
        title="Waiting by device type",
        description="Exposed communication, bubble and idle together. The type that waits most is the one "
        "that has too little work, or the wrong neighbour.",
        unit="percentunit",
        queries=(
            Query(share(WAITING, "device_type"), "{{device_type}}"),
            Query(predicted_share(WAITING, "device_type"), "{{device_type}} predicted"),
        ),
        high=1.0,
        width=8,
    ),
)
_STAGES = (
    Panel(
        number=20,
        title="Busy by stage",
        description="The stage with the highest share sets the pace of its pipeline. Stages far below it "
        "could take layers from it.",
        unit="percentunit",
        queries=(Query(share(_BUSY, *_STAGE), _STAGE_LEGEND),),
        high=1.0,
        width=6,
    ),
    Panel(
        number=21,
        title="Exposed communication by stage",
        description="Messages and collectives that no compute hid. High at one stage only: its link to a "
        "neighbour, or its tensor-parallel group.",
        unit="percentunit",
        queries=(Query(share(_EXPOSED, *_STAGE), _STAGE_LEGEND),),
        high=1.0,
        width=6,
    ),
    Panel(
        number=22,
        title="Bubble by stage",
        description="Waiting for a message that nobody has sent yet. It is least at the slowest stage, and "
        "grows with the distance from it.",
        unit="percentunit",
        queries=(Query(share(_BUBBLE, *_STAGE), _STAGE_LEGEND),),
        high=1.0,
        width=6,
    ),
    Panel(
        number=23,
        title="Busy share over its prediction, by stage",
        description="1: as planned. Above 1 at one stage and below at the others: that stage is slower than "
        "planned and the others wait for it.",
        unit="none",
        queries=(
            Query(
                f"{share(_BUSY, *_STAGE)} / on (pipeline, stage, device_type) {predicted_share(_BUSY, *_STAGE)}",
                _STAGE_LEGEND,
            ),
        ),
        decimals=2,
        width=6,
    ),
)
_EACH = (
    Panel(
        number=40,
        title="Busy, device by device",
        description="One row for each device, green is busy. A row that is redder than the others of its "
        "type waits; a row that turned red at some moment: look there for a fault.",
        unit="percentunit",
        look=Look.HEATMAP,
        queries=(Query(share(_BUSY, *_DEVICE), _DEVICE_LEGEND),),
        high=1.0,
        width=12,
        height=12,
    ),
    Panel(
        number=41,
        title="Compute time over prediction, device by device",
        description="Seconds of the device's own compute over what the plan predicts for the same actions: "
        "each device against its own prediction, whatever its type. 1: as planned; 2: twice as slow "
        "(heat, a shared host, a wrong profile). Above 1.3 for a while raises "
        "DeviceSlowerThanItsPrediction; `hethub replan` finds a plan for the device as it is.",
        unit="none",
        queries=(Query(_COMPUTE, _DEVICE_LEGEND + " {{device_type}}"),),
        steps=Steps(1.3, 1.1),
        decimals=2,
        width=12,
        height=12,
    ),
    Panel(
        number=42,
        title="The ten devices that wait most",
        description="Exposed communication, bubble and idle together. If all are of one type, the split is "
        "wrong; if they share a node or a stage, look at its links.",
        unit="percentunit",
        look=Look.BARS,
        queries=(
            Query(
                f"topk(10, {share(WAITING, 'node', 'device', 'device_type')})",
                _DEVICE_LEGEND + " {{device_type}}",
            ),
        ),
        high=1.0,
        decimals=1,
        width=12,
    ),
    Panel(
        number=43,
        title="Busy and communication, by kind of action",
        description="Share of the chosen devices' time by kind. recompute is forward work done again to save "
        "memory; reduce, norm, update and gather are the end of a step.",
        unit="percentunit",
        look=Look.BARS,
        queries=(Query(share("", "kind", of=""), "{{kind}}"),),
        high=1.0,
        decimals=1,
        width=12,
    ),
)

WAITS_BOARD = Board(
    uid="hethub-waits",
    title="HetHub: who waits",
    description="Busy and wait by device type, stage and device, measured beside predicted.",
    variables=(CHOOSE_RUN, *CHOOSE_DEVICES, WHAT_DEVICES),
    rows=(
        Row("$run, $what devices: by type", _TYPES),
        Row("$run, $what devices: by stage", _STAGES),
        Row("$run, $what devices: one by one", _EACH),
    ),
)
