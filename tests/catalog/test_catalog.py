"""The shipped tables: every row loads, carries its source, and is found whatever the case."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from hethub import catalog
from hethub.specs.base import validate_document
from hethub.specs.cluster import ClusterSpec, resolve_cluster
from hethub.specs.document import dump_yaml, parse_document
from hethub.specs.llama_config import model_from_config

DEVICES = list(catalog.devices().values())


@pytest.mark.parametrize("name", [device.name for device in DEVICES])
def test_every_device_has_a_source_a_known_vendor_and_sane_figures(name):
    device = catalog.device(name.upper())
    assert device.source
    assert device.confidence in {"vendor", "third-party", "press"}
    assert catalog.vendor(device.vendor).name == device.vendor
    assert 8 <= device.memory_gib <= 512
    assert device.memory_bandwidth_gb_s is None or 100 < device.memory_bandwidth_gb_s < 20_000
    assert all(1 < peak < 5000 for peak in device.peak_tflops.values())
    for share in (device.matmul_efficiency, device.memory_efficiency):
        assert share is None or 0 < share <= 1


@pytest.mark.parametrize("name", [device.name for device in DEVICES if device.memory_bandwidth_gb_s])
def test_every_device_with_known_bandwidth_can_stand_in_a_cluster(name):
    group = {"name": "g", "device_type": name, "nodes": 1, "devices_per_node": 1}
    text = dump_yaml(
        {"name": "c", "node_groups": [{**group, "intra_link": "pcie4", "inter_link": "roce-100g"}]}
    )
    document = parse_document(text, Path("c.yaml"))
    cluster = resolve_cluster(validate_document(document, ClusterSpec), document)
    assert cluster.device_types[name].memory_bytes == catalog.device(name).memory_gib * 2**30


def test_a_device_without_bf16_says_so():
    assert catalog.device("v100-32gb").lacks == {"bf16"}
    assert "bf16" not in catalog.device("T4").peak_tflops
    assert catalog.device("A100-40GB").lacks == frozenset()


def test_fp16_runs_at_the_rate_of_bf16_but_where_the_table_says_otherwise():
    assert catalog.device("A100-40GB").peak_tflops["fp16"] == catalog.device("A100-40GB").peak_tflops["bf16"]
    assert catalog.device("MI100").peak_tflops == {"bf16": 92.3, "fp16": 184.6, "fp32": 23.1}


def test_an_unpublished_figure_stays_unknown():
    assert "bf16" not in catalog.device("C550").peak_tflops
    assert catalog.device("P800").memory_bandwidth_gb_s is None


@pytest.mark.parametrize("name", sorted(catalog.links()))
def test_every_link_has_figures_and_sources(name):
    link = catalog.link(name)
    assert link.bandwidth_gb_s > 0
    assert link.latency_us > 0
    assert link.source
    assert link.latency_source
    assert link.scope in {"intra", "inter"}
    assert link.transport in {"native", "device-direct", "host-staged", "shared-memory", "tcp"}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738),
        ("llama-13b", 13.016),
        ("llama-70b", 68.977),
        ("llama-140b", 137.4),
        ("llama3-8b", 8.030),
        ("llama3-70b", 70.554),
        ("llama3-405b", 405.85),
        ("llama3.2-1b", 1.236),
    ],
)
def test_every_model_has_the_parameters_it_is_known_for(name, billions):
    problems = []
    model = model_from_config(catalog.model(name.upper()), "x", lambda *problem: problems.append(problem))
    assert problems == []
    assert model is not None
    attention = 2 * model.hidden_size * model.head_dim * (model.heads + model.kv_heads)
    decoder = attention + 3 * model.hidden_size * model.ffn_size + 2 * model.hidden_size
    tables = model.vocab_size * model.hidden_size * (1 if model.tied else 2)
    assert (model.layers * decoder + tables + model.hidden_size) / 1e9 == pytest.approx(billions, rel=5e-4)


def test_all_shipped_models_are_checked_above():
    assert len(catalog.models()) == 8


@pytest.mark.parametrize("name", sorted(catalog.vendors()))
def test_every_vendor_names_its_torch_device(name):
    vendor = catalog.vendor(name)
    assert vendor.torch_device
    assert vendor.evidence
    # Else all workers of a node would open its first device.
    assert vendor.visible_devices_variable or vendor.torch_device == "cpu"


def test_an_unknown_name_carries_the_nearest_and_all_known_ones():
    with pytest.raises(catalog.UnknownName) as caught:
        catalog.device("mi250")
    assert caught.value.nearest == "MI250X-GCD"
    assert len(caught.value.known) == len(DEVICES)
    assert 'Did you mean "MI250X-GCD"?' in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - our own bytes


def test_a_model_that_is_changed_does_not_change_the_table():
    model = catalog.model("llama3-405b")
    before = copy.deepcopy(model)
    model["hidden_size"] = 1
    model["rope_scaling"]["factor"] = 99.0
    assert catalog.model("llama3-405b") == before
