"""The cluster file: what it means in SI units, what is refused and where, and that it can stand alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hethub import catalog
from hethub.errors import InputError
from hethub.specs.base import json_schema, validate_document
from hethub.specs.cluster import (
    Cluster,
    ClusterSpec,
    DeviceType,
    GroupLink,
    Link,
    NodeGroup,
    cluster_to_spec,
    load_cluster,
    load_problem,
    resolve_cluster,
)
from hethub.specs.document import dump_yaml, parse_document

EXAMPLES = sorted(Path("cluster_specs").glob("*.yaml"))
EXAMPLES = [path for path in EXAMPLES if "job" not in path.name]

# Line 1 to 6, so that a case below may replace one line and name it.
BASE = """\
name: two-vendors
device_types: {slow: {catalog: MI250X-GCD, memory_reserve_gib: 4}}
node_groups:
  - {name: a, device_type: a100-40gb, nodes: 4, devices_per_node: 8, intra_link: nvlink3, inter_link: roce-200g, zone: x}
  - {name: b, device_type: slow, nodes: 8, devices_per_node: 8, intra_link: XGMI2, inter_link: roce-200g, zone: y}
links: [{between: [a, b], bandwidth_gbit_s: 100, total_bandwidth_gb_s: 40, latency_us: 12, transport: tcp}]
exclude: [b/3/5]
workload: {model: llama-7b, sequence_length: 4096, global_batch: 512, precision: bf16, optimizer: adamw}
"""  # noqa: E501 - one group a line


def load(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_cluster(path)


def changed(line, old, new):
    """BASE with `old` on `line` replaced."""
    lines = BASE.splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    return "\n".join(lines) + "\n"


def test_figures_are_in_si_units(tmp_path):
    cluster, workload = load(tmp_path, BASE)
    fast, slow = cluster.device_types["A100-40GB"], cluster.device_types["slow"]
    assert fast.memory_bytes == 40 * 2**30
    assert fast.memory_reserve_bytes == 3 * 10**9
    assert slow.memory_reserve_bytes == 4 * 2**30
    assert fast.memory_bandwidth_bytes_per_second == 1555e9
    assert fast.flops_per_second("bf16") == 312e12 * 0.8308
    assert slow.matmul_efficiency == catalog.DEFAULT_MATMUL_EFFICIENCY
    assert slow.vendor == "amd"
    link = cluster.links[0]
    assert link.link.bandwidth_bytes_per_second == 12.5e9
    assert link.link.latency_seconds == pytest.approx(12e-6)
    assert link.total_bandwidth_bytes_per_second == 40e9
    assert cluster.node_groups[0].intra_link.bandwidth_bytes_per_second == 300e9
    assert workload is not None
    assert workload.model.layers == 32


def test_devices_come_group_by_group_and_node_by_node_without_the_excluded_one(tmp_path):
    cluster, _ = load(tmp_path, BASE)
    names = [device.name for device in cluster.devices()]
    assert names[:9] == [*(f"a/0/{i}" for i in range(8)), "a/1/0"]
    assert len(names) == 32 + 64 - 1
    assert "b/3/5" not in names
    assert cluster.counts() == {"A100-40GB": 32, "slow": 63}
    assert cluster.devices() is cluster.devices()


def test_a_type_called_like_a_catalog_device_overrides_it(tmp_path):
    text = BASE.replace("slow: {catalog: MI250X-GCD,", "A100-40GB: {power_watts: 250,").replace(
        "slow", "A100-40GB"
    )
    found = load(tmp_path, text)[0].device_types["A100-40GB"]
    assert found.power_watts == 250
    assert found.memory_bandwidth_bytes_per_second == 1555e9


def test_small_units_are_for_small_devices(tmp_path):
    cluster, _ = load_cluster(Path("cluster_specs/laptop.yaml"))
    fast = cluster.device_types["fast"]
    assert fast.memory_bytes % 2**20 == 0
    assert fast.memory_reserve_bytes == 0
    assert 1e8 < fast.peak_flops_per_second["fp32"] < 1e11
    assert cluster.emulated_time_scale == "auto"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_with_a_workload_and_stands_alone(path, monkeypatch):
    """Written out, it loads back equal where the catalog knows nothing."""
    cluster, workload = load_cluster(path)
    assert workload is not None
    monkeypatch.setattr(catalog, "devices", dict)
    monkeypatch.setattr(catalog, "links", dict)
    document = parse_document(dump_yaml({"cluster": cluster_to_spec(cluster)}), Path("plan.yaml"))
    inner = parse_document(dump_yaml(cluster_to_spec(cluster)), Path("plan.yaml"))
    assert resolve_cluster(validate_document(inner, ClusterSpec), document, prefix=("cluster",)) == cluster


def test_the_examples_are_as_large_as_promised():
    counts = {path.stem: load_cluster(path)[0].counts() for path in EXAMPLES}
    assert sorted(counts["hethub-768"].values()) == [128, 640]
    assert sum(counts["six-vendors"].values()) >= 192
    six = load_cluster(Path("cluster_specs/six-vendors.yaml"))[0]
    assert len({found.vendor for found in six.device_types.values()}) == 6
    assert len(counts["laptop"]) == 3
    assert 6 <= sum(counts["laptop"].values()) <= 8


REFUSED = {
    "unknown key": (5, "nodes: 8", "nodez: 8", 'node_groups[1].nodez: unknown key. Did you mean "nodes"?'),
    "a key of another name": (
        5,
        "nodes: 8",
        "count: 8",
        'node_groups[1].count: unknown key. Did you mean "nodes"?',
    ),
    "unknown device": (4, "a100-40gb", "A100-41GB", 'node_groups[0].device_type: "A100-41GB" is neither'),
    "nearest device": (4, "a100-40gb", "A100-41GB", 'Did you mean "A100-40GB"?'),
    "unknown catalog device": (
        2,
        "MI250X-GCD",
        "MI250",
        'device_types.slow.catalog: "MI250" is not in the catalog. Did',
    ),
    "unknown link": (
        5,
        "XGMI2",
        "xgmi9",
        'node_groups[1].intra_link: "xgmi9" is not in the catalog. Did you mean',
    ),
    "unknown vendor": (2, "{slow: {", "{slow: {vendor: adm, ", 'device_types.slow.vendor: "adm" is not'),
    "unknown end of a link": (6, "[a, b]", "[a, c]", 'links[0].between[1]: there is no group or zone "c"'),
    "a link to itself": (6, "[a, b]", "[a, a]", "links[0].between: joins a name with itself"),
    "zero nodes": (5, "nodes: 8", "nodes: 0", "node_groups[1].nodes: 0 is less than 1. Give at least 1."),
    "negative devices": (
        5,
        "devices_per_node: 8",
        "devices_per_node: -1",
        "node_groups[1].devices_per_node: -1 is less",
    ),
    "a count that is text": (
        5,
        "nodes: 8",
        "nodes: eight",
        'node_groups[1].nodes: expected a whole number, got "eight"',
    ),
    "duplicate group": (5, "name: b", "name: a", 'node_groups[1].name: node_groups[0] is called "a" too'),
    "a bad name": (5, "name: b", "name: ../b", 'node_groups[1].name: "../b" is not a name'),
    "two units": (
        2,
        "memory_reserve_gib: 4",
        "memory_gib: 4, memory_mib: 5",
        "device_types.slow: give only one of",
    ),
    "no room left": (2, "memory_reserve_gib: 4", "memory_reserve_gib: 64", "leave nothing of"),
    "efficiency over 1": (
        2,
        "memory_reserve_gib: 4",
        "matmul_efficiency: 1.1",
        "1.1 is more than 1.0. Give at most",
    ),
    "zero peak": (
        2,
        "memory_reserve_gib: 4",
        "peak_tflops: {bf16: 0}",
        "the peak of bf16, 0.0, is not above 0",
    ),
    "unknown dtype": (
        2,
        "memory_reserve_gib: 4",
        "peak_tflops: {bf17: 1}",
        '"bf17" is not known here. Did you mean',
    ),
    "a substitute it lacks": (
        2,
        "memory_reserve_gib: 4",
        "substitute_dtype: {bf16: fp64}",
        "no known peak for fp64 either",
    ),
    "an unknown figure": (4, "a100-40gb", "P800", "the memory bandwidth of P800 is unknown. Give it"),
    "a link without bandwidth": (
        6,
        "bandwidth_gbit_s: 100, ",
        "",
        "links[0]: has no bandwidth. Give bandwidth_gbit_s",
    ),
    "unknown transport": (
        6,
        "tcp",
        "tpc",
        'links[0].transport: "tpc" is not known here. Did you mean "tcp"?',
    ),
    "excluded node that is not there": (
        7,
        "b/3/5",
        "b/8/5",
        "exclude[0]: there is no b/8/5: b has nodes 0 to 7",
    ),
    "excluded device that is not there": (
        7,
        "b/3/5",
        "b/3/9",
        "exclude[0]: there is no b/3/9: its node has devices 0 to",
    ),
    "excluded group that is not there": (
        7,
        "b/3/5",
        "c/0/0",
        'exclude[0]: there is no group "c". Known: a, b.',
    ),
    "an exclusion that is no range": (7, "b/3/5", "b-3", "exclude[0]: 'b-3' is not group/node/device"),
    "no device left": (7, "b/3/5", '"a/0-3/0-7, b/0-7/0-7"', "exclude: leaves no device"),
    "disconnected": (6, "[a, b]", "[a, x]", 'no chain of links joins "b" (zone y) and "a" (zone x)'),
    "unknown precision": (
        8,
        "bf16",
        "bf17",
        'workload.precision: "bf17" is not known here. Did you mean "bf16"?',
    ),
    "unknown optimizer": (
        8,
        "adamw",
        "adam",
        'workload.optimizer: "adam" is not known here. Did you mean "adamw"?',
    ),
    "no bf16": (4, "a100-40gb", "V100-16GB", "V100-16GB has no bf16, and the workload's precision is bf16"),
    "no bf16 on T4": (4, "a100-40gb", "t4", "T4 has no bf16"),
    "unknown peak": (4, "a100-40gb", "C550", "no bf16 peak is known for C550"),
    "no double precision": (8, "bf16", "fp64", "no fp64 peak is known for slow"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_cluster_is_refused_with_its_line_and_key(tmp_path, case):
    line, old, new, text = REFUSED[case]
    with pytest.raises(InputError) as caught:
        load(tmp_path, changed(line, old, new))
    told = [one for one in caught.value.message.splitlines() if text in one]
    assert told, caught.value.message
    # A fault may show elsewhere than where it was made: a link that leads nowhere leaves a group alone, a
    # precision is what a device type lacks.
    elsewhere = {"disconnected": 5, "no double precision": 2}.get(case, line)
    assert told[0].startswith(f"{tmp_path}/cluster.yaml:{elsewhere}:")


def test_bf16_on_a_device_without_it_is_taken_with_a_substitute(tmp_path):
    text = changed(4, "a100-40gb", "old").replace(
        "{slow:", "{old: {catalog: T4, substitute_dtype: {bf16: fp16}}, slow:"
    )
    cluster, _ = load(tmp_path, text)
    assert cluster.device_types["old"].dtype_for("bf16") == "fp16"
    assert cluster.device_types["old"].flops_per_second("bf16") == pytest.approx(
        65e12 * catalog.DEFAULT_MATMUL_EFFICIENCY
    )


def test_all_problems_are_told_together(tmp_path):
    text = changed(5, "nodes: 8", "nodes: 0").replace("name: two-vendors", "nam: two-vendors")
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert len(caught.value.message.splitlines()) == 3  # name missing, nam unknown, nodes 0


def test_a_group_and_a_zone_of_one_name_are_told_apart_or_refused(tmp_path):
    same = changed(4, "zone: x", "zone: a")
    assert load(tmp_path, same)[0].node_groups[0].zone == "a"
    clash = changed(5, "zone: y", "zone: a")
    with pytest.raises(InputError, match='"a" is both a group and a zone'):
        load(tmp_path, clash)


def test_peak_without_figure_is_an_input_error_that_says_how_to_give_it(tmp_path):
    cluster, _ = load(tmp_path, BASE)
    with pytest.raises(InputError, match=r"device_types\.slow: no peak is known for fp64\. Give peak_tflops"):
        cluster.device_types["slow"].flops_per_second("fp64")


def test_an_unused_type_may_lack_figures_but_not_name_what_does_not_exist(tmp_path):
    assert load(tmp_path, BASE.replace("{slow:", "{spare: {catalog: C550}, slow:"))
    with pytest.raises(InputError, match=r"device_types\.spare\.catalog"):
        load(tmp_path, BASE.replace("{slow:", "{spare: {catalog: C55O}, slow:"))


def test_a_cluster_travels_between_processes(tmp_path):
    cluster, _ = load(tmp_path, BASE)
    cluster.devices()
    assert pickle.loads(pickle.dumps(cluster)) == cluster  # noqa: S301 - our own bytes


def test_the_schema_describes_every_key():
    schema = json_schema(ClusterSpec)
    for part in (schema, *schema["$defs"].values()):
        for key, field in part["properties"].items():
            assert field.get("description"), key


def links(name):
    return st.builds(
        Link,
        name=st.just(name),
        bandwidth_bytes_per_second=st.integers(1, 10**6).map(lambda mb: mb * 1e6),
        latency_seconds=st.floats(0, 1e5).map(lambda us: us / 1e6),
        transport=st.sampled_from(["native", "tcp"]),
    )


@st.composite
def clusters(draw):
    kind = DeviceType(
        name="k",
        catalog=draw(st.sampled_from([None, "A100-40GB"])),
        vendor="cpu",
        memory_bytes=draw(st.integers(2**20, 2**40)),
        memory_reserve_bytes=draw(st.integers(0, 2**19)),
        memory_bandwidth_bytes_per_second=draw(st.floats(0.1, 1e4)) * 1e9,
        peak_flops_per_second={"fp32": draw(st.floats(0.1, 1e6)) * 1e9},
        matmul_efficiency=draw(st.floats(0.01, 1)),
        memory_efficiency=draw(st.floats(0.01, 1)),
        substitute_dtype=draw(st.sampled_from([{}, {"bf16": "fp32"}])),
        power_watts=draw(st.none() | st.floats(1, 1000)),
        usd_per_hour=draw(st.none() | st.floats(0, 100)),
    )
    groups = tuple(
        NodeGroup(
            name=name,
            device_type="k",
            nodes=draw(st.integers(1, 3)),
            devices_per_node=draw(st.integers(1, 3)),
            intra_link=draw(links("i")),
            inter_link=draw(links("o")),
            zone=name + "z",
        )
        for name in "ab"
    )
    total = draw(st.none() | st.integers(1, 9000).map(lambda gbit: gbit * 1e9 / 8))
    link = GroupLink(between=("a", "bz"), link=draw(links("l")), total_bandwidth_bytes_per_second=total)
    names = [f"{g.name}/{n}/{i}" for g in groups for n in range(g.nodes) for i in range(g.devices_per_node)]
    exclude = frozenset(draw(st.lists(st.sampled_from(names[1:]))))
    scale = draw(st.sampled_from([None, "auto", 2.5]))
    return Cluster(
        name="c",
        device_types={"k": kind},
        node_groups=groups,
        links=(link,),
        exclude=exclude,
        emulated_time_scale=scale,
    )


@given(clusters())
def test_any_cluster_written_out_loads_back_equal(cluster):
    document = parse_document(dump_yaml(cluster_to_spec(cluster)), Path("plan.yaml"))
    assert resolve_cluster(validate_document(document, ClusterSpec), document) == cluster


def test_a_file_without_a_workload_is_no_problem_to_plan(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    lines = (Path(__file__).parents[2] / "cluster_specs" / "laptop.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("workload:")]
    path.write_text("\n".join(kept))
    assert load_cluster(path)[1] is None
    with pytest.raises(InputError, match="names no workload"):
        load_problem(path)
