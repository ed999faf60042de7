"""A task beside: the same answer, an error of it raised here, and no process left behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from hethub.planners.beside import beside
from tests.processes import alive, until

HEAD = "import os, sys, time\nfrom hethub.planners.beside import beside\n"
FORKS = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1
forking = pytest.mark.skipif(not FORKS, reason="one core: nothing is forked")


def run(code: str, **options) -> str:
    """What a process of one thread prints; test runners have more."""
    command = [sys.executable, "-c", HEAD + code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, **options
    ).stdout.strip()


@forking
def test_the_answer_comes_from_another_process(tmp_path):
    code = (
        "def task():\n    open('begun', 'w').close()\n    return os.getpid()\n"
        "with beside([task], allowed=True) as results:\n"
        "    while not os.path.exists('begun'): time.sleep(0.01)\n"
        "    print(results() != [os.getpid()])"
    )
    assert run(code, cwd=tmp_path) == "True"


@forking
def test_this_process_does_what_the_fork_has_not_begun(tmp_path):
    """Each task once. Seen to catch: a fork that takes all turns at its start."""
    code = (
        "def first():\n"
        "    open('begun', 'w').close()\n"
        "    while not os.path.exists('second'): time.sleep(0.01)\n"
        "    return os.getpid()\n"
        "def second():\n    open('second', 'x').close()\n    return os.getpid()\n"
        "with beside([first, second], allowed=True) as results:\n"
        "    while not os.path.exists('begun'): time.sleep(0.01)\n"
        "    one, other = results()\n"
        "    print(one != os.getpid(), other == os.getpid())"
    )
    assert run(code, cwd=tmp_path) == "True True"


def test_without_leave_the_task_runs_here_and_only_when_it_is_asked_for():
    begun = []
    with beside([lambda: begun.append(1) or os.getpid()], allowed=False) as results:
        assert not begun
        assert results() == [os.getpid()]


def test_beside_other_threads_nothing_is_forked():
    asked = threading.Event()
    thread = threading.Thread(target=asked.wait)
    thread.start()
    try:
        with beside([os.getpid], allowed=True) as results:
            assert results() == [os.getpid()]
    finally:
        asked.set()
        thread.join()


@forking
def test_what_a_fork_that_failed_has_done_is_done_here_and_its_error_raised(tmp_path):
    """Seen to catch: only the task that failed repeated, of two that the fork began."""
    code = (
        "def first():\n    print('first', os.getpid() == parent, flush=True)\n"
        "def second():\n    open('begun', 'w').close()\n    raise ValueError('no figure')\n"
        "parent = os.getpid()\n"
        "with beside([first, second], allowed=True) as results:\n"
        "    while not os.path.exists('begun'): time.sleep(0.01)\n"
        "    try: results()\n    except ValueError as error: print(error)"
    )
    assert run(code, cwd=tmp_path).splitlines() == ["first False", "first True", "no figure"]


@forking
def test_leaving_without_the_answer_ends_the_fork(tmp_path):
    code = (
        "def task():\n    open('pid', 'w').write(str(os.getpid()))\n    os.rename('pid', 'told')\n    time.sleep(600)\n"
        "with beside([task], allowed=True):\n"
        "    while not os.path.exists('told'): time.sleep(0.01)"
    )
    run(code, cwd=tmp_path)
    assert not alive(int((tmp_path / "told").read_text()))


@forking
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_the_fork_does_not_outlive_a_killed_parent(tmp_path):
    code = (
        "def task():\n    open('pid', 'w').write(str(os.getpid()))\n    os.rename('pid', 'told')\n    time.sleep(600)\n"
        "with beside([task], allowed=True) as results:\n"
        "    while not os.path.exists('told'): time.sleep(0.01)\n"
        "    results()"
    )
    parent = subprocess.Popen([sys.executable, "-c", HEAD + code], cwd=tmp_path)
    try:
        until((tmp_path / "told").exists, 30, "the fork works")
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until(lambda: not alive(int((tmp_path / "told").read_text())), 30, "the fork ends")
