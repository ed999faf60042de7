"""The first board: is the cluster used, is the run on its way, and what does it cost."""

from __future__ import annotations

from hethub.telemetry.boards.expressions import RUN, SCALE, rate, run_value
from hethub.telemetry.boards.panels import Board, Look, Panel, Query, Row, Steps
from hethub.telemetry.boards.variables import CHOOSE_RUN, WHAT_DEVICES

__all__ = ["RUN_BOARD"]

_MODELLED = " Emulated devices: in modelled time."
_STEP_SECONDS = (
    f"sum by (run) ({rate('hethub_step_duration_seconds_sum')})"
    f" / on (run) (sum by (run) ({rate('hethub_step_duration_seconds_count')}) > 0)"
)
# Tokens of a step over its time, so that the figure is right from the first minute of a window on.
_TOKENS_PER_SECOND = (
    f"sum by (run) ({rate('hethub_tokens_total')})"
    f" / on (run) (sum by (run) ({rate('hethub_step_duration_seconds_sum')}) > 0) * on (run) {SCALE}"
)
_WATTS = f"sum by (run) (max by (run, node, device) ({rate('hethub_device_energy_joules_total')})) * on (run) {SCALE}"
_USD_PER_SECOND = f"sum by (run) ({rate('hethub_cost_usd_total')})"
_TOKENS = f"(sum by (run) ({rate('hethub_tokens_total')}) > 0)"


def _bound(which: str) -> str:
    return run_value("hethub_bound_share_ratio", f'bound="{which}"')


_GLANCE = (
    Panel(
        number=1,
        title="Cluster utilization",
        description="HETHUB's figure: tokens/s of the last 20 steps over the homogeneous bound, which is the "
        "sum of what each device type would reach alone with its own best plan (predicted). 100 % means "
        "that mixing the types costs nothing. Below 80 %: look at the board Who waits.",
        unit="percentunit",
        look=Look.GAUGE,
        queries=(Query(_bound("homogeneous"), "of the homogeneous bound"),),
        steps=Steps(0.8, 0.95),
        high=1.0,
        decimals=1,
        width=4,
        height=7,
    ),
    Panel(
        number=2,
        title="Share of the physical bound",
        description="Tokens/s of the last 20 steps over what all devices could do if work split freely and "
        "messages took no time. It cannot reach 100 %; compare it with other plans of the same cluster, "
        "not with a goal.",
        unit="percentunit",
        look=Look.GAUGE,
        queries=(Query(_bound("physical"), "of the physical bound"),),
        high=1.0,
        decimals=1,
        width=4,
        height=7,
    ),
    Panel(
        number=3,
        title="Goodput",
        description="Share of the time since the driver started in which new steps were made: less what "
        "starting, checkpoints and failures took. The board Links, memory, power, faults names the "
        "causes.",
        unit="percentunit",
        look=Look.GAUGE,
        queries=(Query(run_value("hethub_goodput_ratio"), "goodput"),),
        steps=Steps(0.8, 0.9),
        high=1.0,
        decimals=1,
        width=4,
        height=7,
    ),
    Panel(
        number=4,
        title="Devices",
        description="Emulated devices do real math on CPUs in modelled time: they show scheduling, overlap "
        "and overhead, not chips.",
        unit="string",
        look=Look.STAT,
        queries=(
            Query(
                'max by (devices, what) (label_replace(label_replace(hethub_run_info{run="$run"}, "what", '
                '"emulated", "emulated", "true"), "what", "real", "emulated", "false"))',
                "{{devices}} {{what}}",
            ),
        ),
        width=4,
        height=3,
    ),
    Panel(
        number=5,
        title="State",
        description="What the run is doing. Recovering: an attempt failed and the next one begins.",
        unit="string",
        look=Look.STAT,
        queries=(Query(f"max by (state) (hethub_run_state{{{RUN}}}) == 1", "{{state}}"),),
        width=4,
        height=3,
    ),
    Panel(
        number=6,
        title="Alerts firing",
        description="How many of docker/prometheus' alerts fire for this run. What to do about each: "
        "docs/dashboards.md.",
        unit="short",
        look=Look.STAT,
        queries=(Query(f'count(ALERTS{{{RUN}, alertstate="firing"}}) or vector(0)', "firing"),),
        steps=Steps(1.0, 0.5),
        width=4,
        height=3,
    ),
    Panel(
        number=7,
        title="Steps",
        description="Steps done, and asked for. Steps done goes back when the run goes back to a checkpoint.",
        unit="short",
        look=Look.STAT,
        queries=(
            Query(run_value("hethub_run_step"), "done"),
            Query(run_value("hethub_run_steps"), "asked for"),
        ),
        width=4,
        height=4,
    ),
    Panel(
        number=8,
        title="Time to go",
        description="Steps that are left times the step time of the window. Wall time; failures to come are "
        "not in it.",
        unit="dtdurations",
        look=Look.STAT,
        queries=(
            Query(
                f"({run_value('hethub_run_steps')} - on (run) {run_value('hethub_run_step')})"
                f" * on (run) ({_STEP_SECONDS})",
                "to go",
            ),
        ),
        width=4,
        height=4,
    ),
    Panel(
        number=9,
        title="Time since the last step",
        description="Grows until the next step ends, so it should stay under about one step time. Ten times "
        "the predicted step raises NoProgress.",
        unit="dtdurations",
        look=Look.STAT,
        queries=(
            Query(f"time() - {run_value('hethub_last_step_timestamp_seconds')}", "since the last step"),
        ),
        width=4,
        height=4,
    ),
)
_SPEED = (
    Panel(
        number=20,
        title="Tokens per second",
        description="Measured beside predicted and both bounds. Measured under predicted: something is "
        "slower than planned, see measured over predicted on the board Who waits. Predicted far under "
        "the homogeneous bound: the plan is what costs; `hethub plan --explain` says why." + _MODELLED,
        unit="short",
        queries=(
            Query(_TOKENS_PER_SECOND, "measured"),
            Query(f"{run_value('hethub_predicted_tokens_per_second')} * on (run) {SCALE}", "predicted"),
            Query(
                f"max by (run, bound) (hethub_bound_tokens_per_second{{{RUN}}}) * on (run) group_left () {SCALE}",
                "{{bound}} bound",
            ),
        ),
        width=12,
    ),
    Panel(
        number=21,
        title="Time of a step",
        description="Mean and 95th percentile of the steps in the window, beside the prediction. A "
        "percentile far above the mean: a few steps are slow (a checkpoint, a neighbour), not all of "
        "them. Wall time.",
        unit="s",
        queries=(
            Query(_STEP_SECONDS, "mean"),
            Query(
                f"histogram_quantile(0.95, sum by (run, le) ({rate('hethub_step_duration_seconds_bucket')}))",
                "95 % are shorter",
            ),
            Query(run_value("hethub_predicted_step_seconds"), "predicted"),
        ),
        width=8,
    ),
    Panel(
        number=22,
        title="MFU",
        description="Model FLOPs per second of the last 20 steps over the peak FLOP/s of all devices in use. "
        "In a mixed cluster it says how far from the data sheets the run is, not how well it is split: "
        "that is the first gauge.",
        unit="percentunit",
        look=Look.STAT,
        queries=(Query(run_value("hethub_mfu_ratio"), "MFU"),),
        high=1.0,
        decimals=1,
        width=4,
    ),
)
_COST = (
    Panel(
        number=30,
        title="Dollars per hour",
        description="Price of the devices in use and of priced links, by the prices of the cluster file."
        + _MODELLED,
        unit="currencyUSD",
        look=Look.STAT,
        queries=(Query(f"{_USD_PER_SECOND} * on (run) {SCALE} * 3600", "per hour"),),
        decimals=2,
        width=6,
        height=5,
    ),
    Panel(
        number=31,
        title="Dollars per million tokens",
        description="Measured beside predicted. Above the prediction as far as the run is slower than it.",
        unit="currencyUSD",
        look=Look.STAT,
        queries=(
            Query(f"{_USD_PER_SECOND} / on (run) {_TOKENS} * 1e6", "measured"),
            Query(run_value("hethub_predicted_usd_per_million_tokens"), "predicted"),
        ),
        width=6,
        height=5,
    ),
    Panel(
        number=32,
        title="Power",
        description="Of all devices. Sensors where there are any, else the cost model's estimate for what "
        "each device does (the label source on the board Links, memory, power, faults tells)." + _MODELLED,
        unit="watt",
        look=Look.STAT,
        queries=(Query(_WATTS, "all devices"),),
        width=6,
        height=5,
    ),
    Panel(
        number=33,
        title="Joules per token",
        description="Energy of the window over its tokens, beside the prediction. Waiting devices draw power "
        "too, so it rises when devices wait.",
        unit="joule",
        look=Look.STAT,
        queries=(
            Query(
                f"sum by (run) (max by (run, node, device) ({rate('hethub_device_energy_joules_total')}))"
                f" / on (run) {_TOKENS}",
                "measured",
            ),
            Query(run_value("hethub_predicted_joules_per_token"), "predicted"),
        ),
        width=6,
        height=5,
    ),
)
_LEARNING = (
    Panel(
        number=40,
        title="Loss",
        description="Training loss of each step and the last loss on held-out text, nats per token. Gaps: "
        "the loss was no number; LossNotFinite fires.",
        unit="none",
        queries=(
            Query(run_value("hethub_loss"), "training"),
            Query(run_value("hethub_held_out_loss"), "held out"),
        ),
        low=None,
        decimals=3,
        width=12,
    ),
    Panel(
        number=41,
        title="Gradient norm",
        description="Before clipping. A jump comes before most losses that run away.",
        unit="none",
        queries=(Query(run_value("hethub_gradient_norm"), "norm"),),
        width=6,
    ),
    Panel(
        number=42,
        title="Learning rate",
        description="Of the last step: warm-up, then a cosine.",
        unit="sci",
        queries=(Query(run_value("hethub_learning_rate"), "learning rate"),),
        width=6,
    ),
    Panel(
        number=50,
        title="What runs",
        description="The plan's digest, the model and the objective. Another digest than yesterday's: the "
        "run was planned anew.",
        unit="string",
        look=Look.TABLE,
        queries=(Query(f"hethub_run_info{{{RUN}}}", ""),),
        width=24,
        height=4,
    ),
)

RUN_BOARD = Board(
    uid="hethub-run",
    title="HetHub: run at a glance",
    description="Is the cluster used, is the run on its way, what does it cost.",
    variables=(CHOOSE_RUN, WHAT_DEVICES),
    rows=(
        Row("$run, $what devices: at a glance", _GLANCE),
        Row("$run, $what devices: speed", _SPEED),
        Row("$run, $what devices: money and energy", _COST),
        Row("$run, $what devices: learning", _LEARNING),
    ),
)
