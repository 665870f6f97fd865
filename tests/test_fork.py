"""Processes: a forked child is refused and disturbs nothing, a spawned one works."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_factory import write_checkpoint
from stopping import SlowDisk
from streamed import open_streamed

from mimo_edge.api import Runtime
from mimo_edge.errors import BackendError
from mimo_edge.export.pipeline import export_bundle

PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 3

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fork")
    source, _ = write_checkpoint(folder / "source", "flash", tokenizer=False)
    export_bundle(source, folder / "bundle", recipe="f32").close()
    return folder / "bundle"


def in_child(work: Callable[[], None], timeout_s: int = 60) -> None:
    """Do `work` in a forked child, which must end by itself and well."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    watchdog = threading.Timer(timeout_s, os.kill, (child, 9))
    watchdog.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    watchdog.cancel()
    watchdog.join()
    assert status == 0


def refused(runtime: Runtime) -> None:
    with pytest.raises(BackendError, match="forked"):
        runtime.session()
    with pytest.raises(BackendError, match="forked"):
        runtime.logits([1, 2])


@pytest.mark.parametrize("slots", [None, 4])
def test_a_forked_child_is_refused_and_disturbs_nothing(bundle: Path, slots: int | None) -> None:
    runtime, _ = open_streamed(bundle, slots, 3)
    with runtime:
        session = runtime.session()
        first = session.generate(PROMPT, max_tokens=6).token_ids

        def child() -> None:
            refused(runtime)
            with pytest.raises(BackendError, match="forked"):
                session.generate([7])
            session.cancel()
            session.stop()
            runtime.close()
            runtime.close()

        in_child(child)
        second = session.generate([7, 8], max_tokens=6).token_ids
        # a child that only ends, by way of every finalizer there is
        script = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from streamed import open_streamed\n"
            f"runtime, _ = open_streamed(Path({str(bundle)!r}), {slots}, 3)\n"
            "session = runtime.session()\n"
            f"session.generate({PROMPT!r}, max_tokens=6)\n"
            "if os.fork() == 0:\n"
            "    sys.exit(3)\n"
            "pid, status = os.wait()\n"
            "assert os.waitstatus_to_exitcode(status) == 3, status\n"
            "print(*session.generate([7, 8], max_tokens=6).token_ids)\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
                ),
            },
        )
        assert done.returncode == 0, done.stderr
        assert tuple(map(int, done.stdout.split())) == second
    fresh, _ = open_streamed(bundle, None)
    with fresh:
        session = fresh.session()
        assert session.generate(PROMPT, max_tokens=6).token_ids == first
        assert session.generate([7, 8], max_tokens=6).token_ids == second


def test_a_fork_while_another_thread_computes(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks that other threads held at the fork are held for ever in the child."""
    disk = SlowDisk(monkeypatch)
    runtime, _ = open_streamed(bundle, 4)
    with runtime:
        session, other = runtime.session(), runtime.session()
        disk.block()
        thread = threading.Thread(target=lambda: session.generate(PROMPT, max_tokens=4))
        thread.start()
        assert disk.reached.wait(30)

        def child() -> None:
            refused(runtime)
            with pytest.raises(BackendError, match="forked"):
                other.generate([7])
            runtime.close()

        in_child(child)
        disk.release()
        thread.join(60)
        assert not thread.is_alive()
        assert session.last_reply is not None
        assert len(session.last_reply.token_ids) == 4


def test_a_child_may_open_the_model_itself(bundle: Path) -> None:
    runtime, _ = open_streamed(bundle, 4)
    with runtime:
        want = runtime.session().generate(PROMPT, max_tokens=6).token_ids

        def child() -> None:
            mine, _ = open_streamed(bundle, 4)
            with mine:
                assert mine.session().generate(PROMPT, max_tokens=6).token_ids == want

        in_child(child)
        assert runtime.session().generate(PROMPT, max_tokens=6).token_ids == want


def answer(path: str) -> tuple[int, ...]:
    """In a spawned process."""
    with Runtime.open(path, backend="ggml", threads=1, context=256) as runtime:
        return runtime.session().generate(PROMPT, max_tokens=6).token_ids


def test_spawned_processes_work(bundle: Path) -> None:
    with Runtime.open(bundle, backend="ggml", threads=1, context=256) as runtime:
        want = runtime.session().generate(PROMPT, max_tokens=6).token_ids
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            assert pool.map(answer, [str(bundle)] * 2) == [want, want]
