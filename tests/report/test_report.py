"""The report of a real run, in a real browser: everything is there, nothing is asked of the network, and hostile names
are text."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hethub.report.data import load_run_data
from hethub.report.page import report_page, write_report
from hethub.report.sections import SECTIONS
from hethub.simulate.comparison import WARM_UP_STEPS
from tests.launch.small_job import edit, hethub, launched, write_job
from tests.report.chromium import CHROMIUM, Browser
from tests.report.test_markup import Parsed
from tests.telemetry.prometheus import until

EVIL = "<img src=x onerror=alert(1)><script>alert(2)<\u2215script>\"'&lt;b&gt; ☃"
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that came to its end, with prices, powers and an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    write_job(folder)
    edit(
        folder / "cluster.yaml",
        ("peak_gflops: {fp32: 1.0}", "peak_gflops: {fp32: 1.0}, power_watts: 5, usd_per_hour: 0.1"),
        ("peak_gflops: {fp32: 0.5}", "peak_gflops: {fp32: 0.5}, power_watts: 4, usd_per_hour: 0.05"),
    )
    edit(folder / "job.yaml", ("steps: 3", "steps: 8"), ("every: 3", "every: 4"))
    with launched(folder) as launch:
        result = launch.end()
    assert result.exit_code == 0, result.err
    return folder / "run"


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failed")
    write_job(folder)
    edit(
        folder / "job.yaml",
        ("steps: 3", "steps: 8"),
        ("output: run", "output: run\nfault: {device: b/0/0, step: 2, action: update, do: raise}"),
    )
    with launched(folder) as launch:
        assert launch.end().exit_code == 1
    return folder / "run"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that failed once the driver had seen some of its steps."""
    folder = tmp_path_factory.mktemp("killed")
    write_job(folder)
    edit(folder / "job.yaml", ("steps: 3", "steps: 100000"), ("evaluate: {every: 3, rows: 16}\n", ""))
    with launched(folder) as launch:
        launch.training()
        until((folder / "run" / "measured.npz").exists, 60, "some steps are written")
        os.kill(launch.worker("b/0/0"), signal.SIGKILL)
        assert launch.end().exit_code == 1
    return folder / "run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with Browser() as found:
        yield found


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]*>", " ", page)))


def test_a_finished_run_has_every_section_and_its_figures(finished: Path) -> None:
    page = report_page([load_run_data(finished)])
    ids = {value for key, value in Parsed(page).attributes if key == "id"}
    assert ids == set(SECTIONS)
    summary = json.loads((finished / "summary.json").read_text())
    words = text_of(page)
    assert "state finished" in words and "emulated: run" in words
    assert f"{100 * summary['share_of_physical_bound']:.1f} %" in words
    assert f"held-out loss{summary['heldout_loss']:.4f}".replace("loss", "loss ") in words
    assert "joules per token" in words and "torch" in words
    assert len(page.encode()) < MOST_BYTES


def test_a_failed_run_has_what_there_is_and_says_what_there_is_not(failed: Path) -> None:
    page = report_page([load_run_data(failed)])
    words = text_of(page)
    assert "state failed: rank 1, device b/0/0" in words
    assert "not shown of run: measured times" in words
    ids = {value for key, value in Parsed(page).attributes if key == "id"}
    assert {"summary", "split", "gantt", "memory", "loss", "events", "environment"} <= ids
    assert "waterfall" not in ids


def test_a_run_that_failed_in_its_midst_shows_its_last_steps(killed: Path) -> None:
    """Seen to catch: the last steps written only where the run comes to its end."""
    data = load_run_data(killed)
    assert data.lacking == () and data.comparison is not None
    assert data.state.state == "failed" and data.comparison.last >= WARM_UP_STEPS
    page = report_page([data])
    ids = {value for key, value in Parsed(page).attributes if key == "id"}
    assert ids == set(SECTIONS)
    assert f"measured step {data.step}" in text_of(page)
    # Counted by the devices, since nobody was left to be asked.
    assert all(peak.measured and peak.predicted for peak in data.peaks.values())
    assert list(data.peaks) == ["a/0/0", "b/0/0"]


def test_a_run_that_has_only_begun_is_reported(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "run.json", tmp_path / "run")
    words = text_of(report_page([load_run_data(tmp_path / "run")]))
    assert "state lost" in words and "not shown of run: the split" in words


def test_the_command_writes_into_the_run_and_compares_two(
    capsys: pytest.CaptureFixture[str], finished: Path, failed: Path, tmp_path: Path
) -> None:
    assert hethub(capsys, tmp_path, "report", finished).out == f"wrote {finished / 'report.html'}\n"
    other = tmp_path / "both.html"
    assert hethub(capsys, tmp_path, "report", finished, failed, "-o", other).exit_code == 0
    assert Parsed(other.read_text()).text.count("training loss") >= 2
    missing = hethub(capsys, tmp_path, "report", finished, "--step", "99")
    assert missing.exit_code == 2 and "not in the timeline" in missing.err
    assert hethub(capsys, tmp_path, "report", tmp_path).exit_code == 2


def test_a_browser_shows_it_offline_without_a_word_of_complaint(
    browser: Browser, finished: Path, tmp_path: Path
) -> None:
    write_report(tmp_path / "report.html", [load_run_data(finished)])
    shown = browser.show(tmp_path / "report.html")
    assert shown.requests == [] and shown.console == []
    assert browser.value("document.querySelectorAll('section').length") == len(SECTIONS)
    # Every picture has a size, and the Gantt chart as many bars as the two steps have actions.
    assert browser.value(
        "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 5)"
    )
    assert browser.value("document.querySelectorAll('#gantt ~ div rect, #gantt ~ * rect').length") > 20
    # Waits that began in the step before end at the names of the lanes.
    gantt = "[...document.querySelectorAll('svg[aria-label=\"Gantt chart of one step\"] rect')]"
    assert browser.value(f"{gantt}.length > 20 && {gantt}.every(r => +r.getAttribute('x') > 189)")
    assert not browser.value("document.documentElement.scrollWidth > window.innerWidth")


def test_hostile_names_stay_text(browser: Browser, finished: Path, tmp_path: Path) -> None:
    """Seen to catch: a heading that is put into the page unescaped."""
    folder = tmp_path / EVIL
    shutil.copytree(finished, folder)
    mark = json.loads((folder / "run.json").read_text())
    mark |= {"cluster": EVIL, "hethub": EVIL, "job_file": f"/{EVIL}", "environment": {EVIL: EVIL}}
    (folder / "run.json").write_text(json.dumps(mark))
    events = (folder / "attempts.jsonl").read_text().splitlines()
    evil = json.dumps(
        {"event": "failed", "attempt": 1, "step": 1, "device": EVIL, "reason": EVIL, "cause": EVIL}
    )
    (folder / "attempts.jsonl").write_text("\n".join([*events, evil]) + "\n")
    write_report(tmp_path / "report.html", [load_run_data(folder), load_run_data(finished)])
    shown = browser.show(tmp_path / "report.html")
    assert shown.requests == [] and shown.console == []
    assert browser.value("document.querySelectorAll('script, img, [onerror]').length") == 0
    assert browser.value("document.querySelector('h1').textContent") == f"{EVIL} against run"
    assert EVIL in browser.value("document.body.textContent")


def test_a_page_that_is_allowed_more_is_told_on_by_the_browser(browser: Browser, tmp_path: Path) -> None:
    """The two tests before would see a request and an error: this page makes both."""
    (tmp_path / "bad.html").write_text(
        "<title>x</title><img src='http://127.0.0.1:9/x.png'><script>throw Error('seen')</script>"
    )
    shown = browser.show(tmp_path / "bad.html")
    assert shown.requests == ["http://127.0.0.1:9/x.png"]
    assert any("seen" in line for line in shown.console)
