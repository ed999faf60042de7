from __future__ import annotations

import math

import pytest

from hethub.cost.profiles.artifact import import_artifact
from hethub.cost.profiles.profile import LayerKey
from hethub.errors import InputError

LAYERS = """\
model,device_type,tensor_parallel,micro_batch,layer_kind,forward_ms,backward_ms,optimizer_step_ms,parameters,origin
M,A,1,1,embedding,1,0.002,4,100,measured
M,A,1,1,decoder,2,3,4,300,measured
M,A,1,1,decoder,9,3,4,300,hand_edited
M,B,1,1,decoder,2.1,3,,300,measured_rounded
"""
COLLECTIVES = """\
device_type,collective,devices,message_mib,time_ms
A,all_gather,2,1,5
A,all_gather,2,1,6
"""
LINKS = """\
scope,cluster,sender_device_type,sender_gpus,receiver_device_type,coef_log2_squared,coef_log2,coef_constant,max_measured_gb_per_s
inter_node,mit,A,2,B,0,1,1,3
inter_node,gcp,A,2,B,0,0,100,100
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in (
        ("layer_profiles", LAYERS),
        ("collective_times", COLLECTIVES),
        ("link_bandwidth", LINKS),
    ):
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


def key(device, kind):
    return LayerKey("M", device, kind, 1, 2048, "fp32")


def test_rows_edited_by_hand_are_left_out(folder):
    profile = import_artifact(folder)
    assert [row.forward_seconds for row in profile.rows(key("A", "decoder"))] == [0.002]


def test_the_optimizer_step_is_shared_by_elements_and_unknown_stays_unknown(folder):
    profile = import_artifact(folder)
    assert profile.rows(key("A", "decoder"))[0].update_seconds == pytest.approx(0.003)
    assert profile.rows(key("B", "decoder"))[0].update_seconds is None
    assert profile.rows(key("A", "embedding"))[0].backward_seconds is None  # the hooks never saw it


def test_of_repeated_collectives_the_first_is_taken(folder):
    assert import_artifact(folder).transfer_seconds("all_gather", "intra/A", 2, 2**20) == 0.005


def test_bandwidths_are_sampled_where_they_were_fitted_and_never_above_the_largest_measured(folder):
    rows = [row for row in import_artifact(folder).transfers if row.operation == "send"]
    assert {row.link_class for row in rows} == {"inter/A/B"}
    for row in rows:
        rate = 2 * row.message_bytes / row.time_seconds / 1e9
        assert 0 < rate <= 3 * (1 + 1e-9)
        assert rate == pytest.approx(min(3, 1 + math.log2(row.message_bytes / 1e6)))
    assert min(row.message_bytes for row in rows) == 2**19  # below, this polynomial is negative


@pytest.mark.parametrize(
    ("file", "change", "place"),
    [
        ("layer_profiles", ("M,A,1,1,decoder,2,", "M,A,1,1,decoder,fast,"), ":3 forward_ms"),
        ("layer_profiles", ("M,A,1,1,decoder,2,", "M,A,1,1,decoder,inf,"), ":3 forward_ms"),
        ("collective_times", ("1,5", "1,"), ":2 time_ms"),
        ("link_bandwidth", ("0,1,1,3", "0,x,1,3"), ":2 coef_log2"),
    ],
)
def test_a_bad_value_names_file_line_and_column(folder, file, change, place):
    path = folder / f"{file}.csv"
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(InputError, match=f"{file}.csv{place}"):
        import_artifact(folder)
