"""Draw docs/step.png, the picture of docs/runtime.md: one step of a real run on emulated devices, and its prediction.

Five devices of two types train a small Llama in two pipelines that cut the layers differently. One pipeline splits its
backward (`zb-h1`); the other recomputes its first stage and ends in a tensor-parallel group of two. So the picture
holds parts, the overlapped reduction, split backwards, recomputation in the wait, collectives and late weights.

    .venv/bin/python docs/step.py            # trains for a minute, writes docs/step.png (needs Chromium)
    .venv/bin/python docs/step.py --html F   # writes the interactive chart to F instead
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the pool of worker processes without Ray stands with the tests

from hethub.simulate.engine import simulate  # noqa: E402
from hethub.specs.cluster import load_cluster  # noqa: E402
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage  # noqa: E402
from hethub.timeline.gantt import gantt_figure, write_gantt  # noqa: E402
from hethub.timeline.summary import step_seconds  # noqa: E402
from tests.launch.pool import Pool  # noqa: E402
from tests.plan_strategies import compute_model  # noqa: E402

STEPS, WARM_UP = 3, 1
PICTURE_WIDTH = 1600  # pixels
CLUSTER = """\
name: step
device_types:
  fast: {vendor: cpu, memory_mib: 32, memory_bandwidth_gb_s: 1.2, peak_gflops: {fp32: 0.5}}
  slow: {vendor: cpu, memory_mib: 32, memory_bandwidth_gb_s: 0.6, peak_gflops: {fp32: 0.25}}
node_groups:
  - {name: a, device_type: fast, nodes: 1, devices_per_node: 2, intra_link: {bandwidth_mb_s: 60, latency_us: 200},
     inter_link: {bandwidth_mb_s: 20, latency_us: 400}, zone: hall}
  - {name: b, device_type: slow, nodes: 1, devices_per_node: 3, intra_link: {bandwidth_mb_s: 60, latency_us: 200},
     inter_link: {bandwidth_mb_s: 20, latency_us: 400}, zone: hall}
workload: {model: config.json, sequence_length: 32, global_batch: 20, precision: fp32, optimizer: adamw}
emulated: {time_scale: 6}
"""
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


def main() -> int:
    """Train, choose the step of median time, draw it under its prediction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", type=Path, help="write the interactive chart here and no picture")
    options = parser.parse_args()
    plan = the_plan()
    with closing(Pool(5)) as pool:
        trained = pool.train(
            plan, WARM_UP + STEPS, held_out_rows=0, time_scale=plan.cluster.emulated_time_scale
        )
    prediction = simulate(trained.program, compute_model(plan), steps=3)
    assert prediction.timeline is not None
    seconds = step_seconds(trained.timeline)[WARM_UP:]
    step = WARM_UP + int(np.argsort(seconds)[len(seconds) // 2])
    title = "One training step: two pipelines over five devices of two types"
    with tempfile.TemporaryDirectory() as folder:
        page = options.html or Path(folder) / "step.html"
        write_gantt(page, prediction.timeline, trained.timeline, step, title)
        if options.html is None:
            figure = gantt_figure(prediction.timeline, trained.timeline, step, title)
            screenshot(page, ROOT / "docs" / "step.png", figure["layout"]["height"])
    return 0


def the_plan() -> Plan:
    """Written by hand, to show much at once rather than to be quick."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cluster.yaml").write_text(CLUSTER)
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        cluster, workload = load_cluster(Path(folder) / "cluster.yaml")
    assert workload is not None
    pipelines = [
        Pipeline(
            schedule="zb-h1",
            micro_batches=5,
            micro_batch_rows=2,
            stages=[
                Stage(layers=(0, 7), in_flight=3, replicas=[one(2, rank("a/0/0"))]),
                Stage(layers=(7, 10), in_flight=2, replicas=[one(2, rank("b/0/0"))]),
            ],
        ),
        Pipeline(
            schedule="1f1b",
            micro_batches=5,
            micro_batch_rows=2,
            stages=[
                Stage(layers=(0, 5), in_flight=3, recompute="full", replicas=[one(2, rank("a/0/1"))]),
                Stage(layers=(5, 10), in_flight=2, replicas=[one(2, rank("b/0/1", 2), rank("b/0/2", 2))]),
            ],
        ),
    ]
    return Plan(name=cluster.name, pipelines=pipelines, cluster=cluster, workload=workload)


def rank(device: str, parts: int = 1) -> Rank:
    """An equal share of a tensor-parallel group of `parts` devices."""
    shares = ("num_attention_heads", "intermediate_size", "vocab_size")
    heads, ffn, vocab = (int(str(MODEL[key])) // parts for key in shares)
    return Rank(device=device, heads=heads, ffn=ffn, vocab=vocab)


def one(rows: int, *ranks: Rank) -> Replica:
    """A replica of these ranks."""
    return Replica(rows=rows, ranks=list(ranks))


def screenshot(page: Path, picture: Path, height: int) -> None:
    """The page as a browser draws it, `height` pixels of chart. Raises SystemExit without a Chromium."""
    browser = next(
        (b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None
    )
    if browser is None:
        raise SystemExit("no Chromium here: install one, or use --html and take the picture yourself")
    page.write_text(page.read_text().replace("displaylogo: false", "displayModeBar: false"))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    arguments += ["--virtual-time-budget=10000", f"--window-size={PICTURE_WIDTH},{height + 16}"]
    subprocess.run(
        [browser, *arguments, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True
    )


if __name__ == "__main__":
    sys.exit(main())
