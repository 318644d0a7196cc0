import os
import pickle
import platform
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from data_prep.executor import AHEAD, WorkerLost, parallel, portable
from tests.paths import ROOT

PICTURES = """
import resource
from pathlib import Path
from data_prep.executor import alone_and_lean

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

def fetched():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() / 1e6

alone_and_lean()
picture = 1920 * 1080 * 4
len(b"x" * picture)
before, pages = held(), fetched()
for _ in range(20):
    len(b"x" * picture)
pages = fetched() - pages
many = [b"x" * picture for _ in range(30)] + [b"x" * (4 * picture) for _ in range(8)]
del many
print(pages, held() - before)
"""


class Unlucky(ValueError):
    """Not built from its message alone, as BadClip is not."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self):
        return type(self), (self.key, self.reason)


def act(item):
    """What an item's name says."""
    if item == "raise":
        raise Unlucky("clip", "torn")
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hang":
        time.sleep(600)
    if item == "exit":
        os._exit(3)
    if item == "slow":
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPROF)
    if isinstance(item, Path):  # killed from outside, once
        if not item.exists():
            item.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "second time"
    if item == "lambda":
        return lambda: 0
    return f"{item} done"


def number_and_process(state, item):
    return state, os.getpid(), item


def die_once(path, number):
    act(path)
    return number


def die(number):
    act("kill")


def say_pid(gate):
    Path(gate).write_text(str(os.getpid()))
    time.sleep(600)


def fail_to_load(number):
    raise FileNotFoundError("no such weights")


def call(items, function=act, workers=1, **settings):
    return list(parallel(function, items, executor="local", workers=workers, **settings))


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_items(workers):
    assert call(range(20), workers=workers) == [f"{i} done" for i in range(20)]


def test_state_is_made_once_in_each_process():
    found = call(range(12), number_and_process, workers=2, setup=int)
    assert [item for _, _, item in found] == list(range(12))
    assert {number for number, _, _ in found} <= {0, 1}
    assert len({pid for _, pid, _ in found} - {os.getpid()}) == len(
        {number for number, _, _ in found}
    )
    assert call([5], number_and_process, workers=0, setup=int) == [(0, os.getpid(), 5)]


def test_items_are_taken_as_they_are_needed():
    taken = []
    with closing(
        parallel(act, (taken.append(i) or i for i in range(10**9)), executor="local", workers=1)
    ) as results:
        assert [next(results) for _ in range(3)] == ["0 done", "1 done", "2 done"]
        assert len(taken) <= 3 + AHEAD


@pytest.mark.parametrize("workers", [0, 1])
def test_exceptions_keep_their_type(workers):
    with pytest.raises(Unlucky, match="clip: torn") as caught:
        call(["a", "raise", "b"], workers=workers)
    assert caught.value.key == "clip"
    with pytest.raises(FileNotFoundError, match="no such weights"):
        call([1], workers=workers, setup=fail_to_load)


def test_exceptions_say_where_they_were_raised():
    with pytest.raises(Unlucky) as caught:
        call(["raise"])
    (note,) = caught.value.__notes__
    assert note.startswith("In a worker process:") and 'raise Unlucky("clip", "torn")' in note


def test_exceptions_that_cannot_travel():
    class Local(Exception):
        pass

    assert str(portable(Local("why"))) == "Local: why"
    assert isinstance(portable(KeyError("x")), KeyError)


def test_results_that_cannot_travel():
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        call(["lambda"])


@pytest.mark.parametrize(
    ("item", "reason"), [("kill", "SIGKILL.*memory.*fewer workers"), ("exit", "exit code 3")]
)
def test_a_dead_worker_names_its_item(item, reason):
    with pytest.raises(WorkerLost, match=f"clip {item}: its worker process .*{reason}"):
        call(["a", item, "b"], workers=2, name="clip {}".format)


def test_lost_items_can_be_replaced_and_the_worker_goes_on():
    found = call(["a", "kill", "hang", "b"], time_limit=1, lost="{}: {}".format)
    assert found[0] == "a done" and found[3] == "b done"
    assert found[1].startswith("kill: its worker process was ended by SIGKILL")
    assert found[2] == "hang: took more than 1 s, so that its worker process was stopped"


def test_an_item_whose_process_was_killed_from_outside_is_tried_again(tmp_path):
    found = call([tmp_path / "item", "b"], workers=2, lost="{}: {}".format)
    assert found == ["second time", "b done"]
    assert call([5], number_and_process, setup=partial(die_once, tmp_path / "setup"))[0][::2] == (
        0,
        5,
    )


def test_a_process_that_dies_in_its_setup_is_nobodys_fault():
    with pytest.raises(
        WorkerLost, match=r"5: its worker process was ended by SIGKILL.* at its start"
    ):
        call([5], number_and_process, setup=die, lost="{}: {}".format)


def test_what_took_too_long_is_not_tried_again(caplog):
    found = call(["hang", "slow"], time_limit=1, lost="{}: {}".format)
    assert found[1] == "slow: its worker process was ended by SIGPROF"
    assert "tried once more" not in caplog.text


def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    """It is killed as its only worker waits at a pipe."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    code = (
        "from data_prep.executor import parallel\nfrom tests.data_prep.test_executor import "
        f"say_pid\nlist(parallel(say_pid, [{str(gate)!r}], executor='local', workers=1))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pid = int(gate.read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_freed_pictures_serve_the_next_ones_and_what_lies_free_is_bounded():
    run = subprocess.run([sys.executable, "-c", PICTURES], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    fetched, held = map(float, run.stdout.split())  # MB
    assert fetched < 20, "one picture in place of 20 x 8.3 MB"
    assert held < 75, "of 514 MB that were freed"


def test_leaving_early_stops_the_processes():
    results = parallel(partial(number_and_process, 0), range(100), executor="local", workers=2)
    pids = {next(results)[1] for _ in range(10)}
    results.close()
    deadline = time.monotonic() + 30
    while pids and time.monotonic() < deadline:
        pids = {pid for pid in pids if alive(pid)}
    assert not pids


def alive(pid):
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "ray", "workers": 0}, "Ray needs at least workers=1"),
        ({"executor": "local", "workers": 0, "time_limit": 3}, "use workers=1 or more"),
    ],
)
def test_settings_are_checked_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        parallel(act, [], **settings)


def test_without_ray_the_error_says_what_to_do():
    code = (
        "import sys; sys.modules['ray'] = None\nfrom data_prep.executor import "
        "parallel\nparallel(str, [1], executor='ray', workers=1)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        "ImportError: executor=ray:" in run.stderr
        and "pip install -e '.[ray]'; or use executor=local" in run.stderr
    )
