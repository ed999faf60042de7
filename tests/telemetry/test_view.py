"""What `top` makes of two looks at the endpoints."""

from __future__ import annotations

import socketserver
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client import start_http_server

from hethub.errors import InputError, MachineError
from hethub.telemetry.families import Series, registry_of
from hethub.telemetry.scrape import Look, Samples, look_at, rates, targets_of
from hethub.telemetry.view import view_of

DEVICE = {"node": "a/0", "device": "1", "device_type": "fast", "stage": "0"}


def look(at: float, busy: float, idle: float, tokens: float, silent: tuple[str, ...] = ()) -> Look:
    seconds = "hethub_device_seconds_total"
    return Look(
        at,
        Samples(
            [
                ("hethub_run_info", {"run": "r", "emulated": "true"}, 1.0),
                ("hethub_run_state", {"state": "training"}, 1.0),
                ("hethub_run_state", {"state": "failed"}, 0.0),
                ("hethub_time_scale_ratio", {}, 10.0),
                ("hethub_predicted_tokens_per_second", {}, 20.0),
                ("hethub_run_step", {}, 4.0),
                ("hethub_run_steps", {}, 14.0),
                ("hethub_steps_total", {}, tokens / 8),
                ("hethub_tokens_total", {}, tokens),
                ("hethub_device_info", DEVICE, 1.0),
                (seconds, {**DEVICE, "activity": "busy", "kind": "forward"}, busy / 2),
                (seconds, {**DEVICE, "activity": "busy", "kind": "backward"}, busy / 2),
                (seconds, {**DEVICE, "activity": "idle", "kind": "idle"}, idle),
                ("hethub_device_compute_seconds_total", DEVICE, busy),
                ("hethub_device_predicted_compute_seconds_total", DEVICE, busy / 2),
            ]
        ),
        silent,
    )


def test_shares_and_speeds_are_of_the_time_between_the_looks() -> None:
    view = view_of(look(100.0, 50.0, 50.0, 800.0), look(104.0, 53.0, 51.0, 864.0), ("drift",))
    (device,) = view.devices
    assert (device.name, device.pace) == ("a/0/1", 2.0)
    assert device.shares["busy"] == 0.75 and device.shares["idle"] == 0.25
    assert sum(device.shares.values()) == pytest.approx(1.0)
    # 64 tokens in 4 s of the wall are 160 a modelled second; 20 a second of the wall are predicted.
    assert (view.tokens_per_second, view.predicted_tokens_per_second) == (160.0, 200.0)
    assert view.share_of_prediction == 0.8 and view.seconds_left == pytest.approx(5.0)
    assert (view.state, view.alerts) == ("training", ("drift",))


def test_without_a_step_between_the_looks_shares_are_not_known() -> None:
    view = view_of(look(1.0, 5.0, 5.0, 8.0), look(2.0, 5.0, 5.0, 8.0, ("host:1",)))
    assert view.devices[0].shares == {} and view.devices[0].pace is None and view.seconds_left is None
    assert view.alerts == ("host:1 does not answer",)


def test_a_counter_that_began_anew_has_no_rate() -> None:
    found = rates(look(1.0, 9.0, 9.0, 800.0), look(2.0, 1.0, 10.0, 16.0))
    assert found.total("hethub_tokens_total") is None
    assert found.total("hethub_device_seconds_total", activity="idle") == 1.0


def test_targets_are_those_of_the_file_and_silent_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    file.write_text('[{"targets": ["127.0.0.1:9"], "labels": {}}]')
    assert targets_of(file) == ["127.0.0.1:9"]
    found = look_at(targets_of(file), 0.0)
    assert found.silent == ("127.0.0.1:9",) and list(found.samples.items()) == []
    file.write_text("[{}]")
    with pytest.raises(InputError, match="names no endpoints"):
        targets_of(file)


def test_targets_are_asked_directly_whatever_proxy_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    series = Series()
    series.set("hethub_run_step", 7.0, {"run": "r"})
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry_of(series.families))
    try:
        found = look_at([f"127.0.0.1:{server.server_port}"], 0.0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert found.silent == () and found.samples.one("hethub_run_step", run="r") == 7.0


def test_a_target_that_does_not_speak_http_is_silent() -> None:
    """Seen to catch: a traceback of http.client, whose errors are no OSErrors."""

    class Nonsense(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(b"nonsense\r\n\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Nonsense) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        target = f"127.0.0.1:{server.server_address[1]}"
        try:
            assert look_at([target], 0.0).silent == (target,)
        finally:
            server.shutdown()
            thread.join()


def test_without_the_package_that_reads_metrics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: a traceback."""
    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
    with pytest.raises(MachineError, match=r"prometheus_client: not installed.*hethub\[launch\]"):
        look_at(["127.0.0.1:1"], 0.0)
