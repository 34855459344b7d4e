"""Calls in real child processes: what comes back, what ends them, and that nothing of them is left."""

import ctypes
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch

from merging_core.errors import ProcessError, RecipeError
from tasks import progress
from tasks.apart import build_apart, call_apart, end_calls
from tasks.steps import Direct, Step
from tasks.store import NOTES, Store

# This module cannot be imported by the child.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
ROOT = Path(__file__).parents[2]


def hang():
    """In C code that holds the interpreter's lock: no thread and no handler of this process runs any more."""
    ctypes.PyDLL(None).sleep(1000)


def ended(process):
    """Whether a process that is no child ends within ten seconds."""
    return not process.is_running() or not psutil.wait_procs([process], timeout=10)[1]


def pid_in(file):
    """The process whose number a child writes to ``file``."""
    for _ in range(3000):
        if file.exists() and (text := file.read_text()):
            return psutil.Process(int(text))
        time.sleep(0.01)
    raise AssertionError(f"no number in {file}")


def with_grandchild(file, last):
    def call():
        # A session of its own and deaf to polite requests, as some workers are.
        code = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)"
        )
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        file.write_text(str(child.pid))
        last()

    return call


def test_a_call_gives_its_result_from_another_process():
    assert call_apart("x", lambda: (os.getpid() != os.getppid(), sum(range(5)))) == (True, 10)
    assert call_apart("x", os.getpid) != os.getpid()


def test_the_child_sees_environment_folder_and_threads_as_they_are_now(monkeypatch, tmp_path):
    names = ("TRIPOISE_STORE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME")
    call_apart("x", os.getpid)
    for name in names:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "user:secret")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        environment, folder, threads = call_apart("x", lambda: (dict(os.environ), os.getcwd(), torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert {environment[name] for name in names} == {"7"}
    assert "TOKENIZERS_PARALLELISM" not in environment
    assert not [name for name in environment if name.startswith("PREFECT_")]
    assert (Path(folder), threads) == (tmp_path, 2)


def test_an_error_keeps_its_type_and_message_and_brings_the_childs_traceback():
    def refuse():
        raise RecipeError("dare: density must be in [0, 1], got 2.")

    with pytest.raises(RecipeError, match=r"^dare: density must be in \[0, 1\], got 2.$") as raised:
        call_apart("x", refuse)
    assert "in refuse" in str(raised.value.__cause__)


def test_an_error_that_cannot_be_copied_is_told_in_its_words():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def fail():
        raise Odd("this", "that")

    with pytest.raises(RuntimeError, match="Odd: this and that") as raised:
        call_apart("x", fail)
    assert "in fail" in str(raised.value.__cause__)


def test_log_records_arrive_at_the_levels_set_here(caplog):
    def call():
        log = logging.getLogger("tripoise.test")
        log.info("made %s in %.1f s", "it", 1.0)
        log.debug("hidden")

    with caplog.at_level(logging.INFO, "tripoise"):
        call_apart("x", call)
    assert caplog.messages == ["made it in 1.0 s"]


def test_progress_is_shown_here(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    seen = []

    def call():
        with progress.track("a long step", "bytes") as report:
            thread = threading.Thread(target=report, args=(3, 4))
            thread.start()
            thread.join()

    with progress.watched_by(lambda *told: seen.append(told)):
        call_apart("x", call)
    assert seen == [("a long step", 3, 4)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_ended_by_a_signal_is_an_error_and_leaves_nothing(number, tmp_path):
    file = tmp_path / "pid"
    call = with_grandchild(file, lambda: os.kill(os.getpid(), number))
    with pytest.raises(ProcessError, match=rf"^merge a: its process was ended by signal {number:d}") as raised:
        call_apart("merge a", call, again="The next run goes on.")
    assert ("want of memory" in str(raised.value)) == (number == signal.SIGKILL)
    assert str(raised.value).endswith("The next run goes on.")
    assert not psutil.pid_exists(int(file.read_text()))


def test_a_limit_ends_code_that_holds_the_interpreters_lock_and_all_that_it_started(tmp_path):
    file = tmp_path / "pid"
    with pytest.raises(ProcessError, match=r"^merge a: stopped after 0.05 minutes, its time limit. Raise timeout_min"):
        call_apart("merge a", with_grandchild(file, hang), timeout_s=3)
    assert not psutil.pid_exists(int(file.read_text()))


PARENT = """
import ctypes, os, sys
from pathlib import Path
from tasks.apart import call_apart
def call(file=Path(sys.argv[1])):
    file.write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(1000)
call_apart("x", call)
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_child_and_server_end_with_their_parent(stop, tmp_path):
    file = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as parent:
        child = pid_in(file)
        below = psutil.Process(parent.pid).children(recursive=True)
        assert child in below
        try:
            with open(os.pidfd_open(child.pid)) as gone:
                parent.send_signal(stop)
                assert parent.wait(20) != 0
                assert select.select([gone], [], [], 10)[0]
        finally:
            parent.kill()
    assert all(map(ended, below))


def test_the_server_runs_no_thread_of_ours_and_comes_again_when_it_was_killed():
    call_apart("x", os.getpid)
    [server] = [one for one in psutil.Process().children() if "tasks.apart.server" in " ".join(one.cmdline())]
    names = {Path(f"/proc/{server.pid}/task/{one.id}/comm").read_text().strip() for one in server.threads()}
    assert names <= {"python", "python3", "jemalloc_bg_thd"}
    server.kill()
    server.wait()
    assert call_apart("x", lambda: 3) == 3


def test_a_child_does_not_outlive_its_keeper(tmp_path):
    file = tmp_path / "pid"

    def call():
        file.write_text(str(os.getpid()))
        hang()

    def kill_the_keeper():
        child = pid_in(file)
        child.parent().kill()
        gone.extend(psutil.wait_procs([child], timeout=20)[0])

    gone = []
    killer = threading.Thread(target=kill_the_keeper)
    killer.start()
    with pytest.raises(ProcessError, match="lost its keeper"):
        call_apart("x", call)
    killer.join()
    assert gone


def test_calls_of_other_threads_can_be_ended(tmp_path):
    file = tmp_path / "pid"
    said = []

    def call():
        file.write_text(str(os.getpid()))
        hang()

    def wait():
        with pytest.raises(ProcessError) as raised:
            call_apart("merge a", call)
        said.append(str(raised.value))

    waiting = threading.Thread(target=wait)
    waiting.start()
    child = pid_in(file)
    end_calls()
    waiting.join(timeout=30)
    assert ended(child)
    assert said
    assert said[0].startswith("merge a: ")


def step(make, kind="merged", **more):
    return Step(kind, "merge it", {"made by": "a test"}, (), make, device="cpu", **more)


def test_a_step_made_apart_has_the_same_bytes_as_one_made_here_and_starts_nothing_once_it_is_made(
    family, tmp_path, monkeypatch
):
    from flows.pipeline import Kitchen, pin_recipe
    from tasks.recipes import parse_recipe

    experts = {name: str(family[name]) for name in ("helpful", "honest")}
    recipe = parse_recipe({"base": str(family["base"]), "experts": experts, "method": {"name": "r_tsvm"}})
    stores = [Store(tmp_path / name) for name in ("here", "apart")]
    for store, limit in zip(stores, (None, 60.0), strict=True):
        run = Direct(store)  # which makes apart what has a limit
        merged = Kitchen(run, *pin_recipe(recipe, run), timeout_minutes=limit).merge(recipe)
    here, apart = (store.manifest(merged) for store in stores)
    assert {name: one["sha256"] for name, one in here.files.items()} == {
        name: one["sha256"] for name, one in apart.files.items()
    }
    monkeypatch.setattr("tasks.apart.build.call_apart", None)
    run = Direct(stores[1])
    assert Kitchen(run, *pin_recipe(recipe, run), timeout_minutes=60.0).merge(recipe) == merged
    assert all(one.reused for one in run.built)


def test_a_merge_that_is_stopped_leaves_what_the_next_one_goes_on_with(tmp_path):
    store = Store(tmp_path)

    def hangs(out):
        (out / NOTES).mkdir()
        (out / "shard").write_text("whole")
        hang()

    with pytest.raises(ProcessError, match="The next run goes on with the shards that are complete"):
        build_apart([step(hangs, timeout_minutes=1 / 60)], store)
    [built] = build_apart([step(lambda out: {"found": (out / "shard").read_text()})], store)
    assert not built.reused
    assert store.manifest(built.ref).details == {"found": "whole"}


def test_an_interrupt_of_the_waiting_process_ends_the_child_and_frees_the_artifact(tmp_path):
    store, file = Store(tmp_path / "store"), tmp_path / "pid"

    def hangs(out):
        file.write_text(str(os.getpid()))
        hang()

    def interrupt():
        pid_in(file)
        os.kill(os.getpid(), signal.SIGINT)

    waiting = step(hangs)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        build_apart([waiting], store)
    assert not psutil.pid_exists(int(file.read_text()))
    assert not store.is_locked(f"merged-{waiting.ref.digest}")


def test_who_wants_the_same_artifact_waits_for_the_child_and_the_collector_knows_it(tmp_path):
    store, file = Store(tmp_path / "store"), tmp_path / "go"

    def slow(out):
        (out / "begun").write_text("")
        while not file.exists():
            time.sleep(0.01)

    wanted, found = step(slow), []
    threads = [threading.Thread(target=lambda: found.extend(build_apart([wanted], store))) for _ in range(2)]
    threads[0].start()
    while not store.is_locked(f"merged-{wanted.ref.digest}"):
        time.sleep(0.01)
    threads[1].start()
    file.write_text("")
    for thread in threads:
        thread.join()
    assert sorted(one.reused for one in found) == [False, True]
    other = "import sys; from pathlib import Path; from tasks.usage import collecting\n"
    other += "with collecting(Path(sys.argv[1])) as used: print(*used)"
    said = subprocess.run([sys.executable, "-c", other, store.root], cwd=ROOT, capture_output=True, text=True)
    assert f"merged/{wanted.ref.digest}" in said.stdout.split()
