"""What test_npu_isolated runs in another process."""

from __future__ import annotations

import os
import signal
import sys
import time

from mimo_edge.errors import BundleError


def add(a: int, b: int) -> int:
    return a + b


def process_id() -> int:
    return os.getpid()


def refuse() -> None:
    raise BundleError("no such thing", "look elsewhere")


def divide() -> float:
    return 1 / 0


def crash() -> None:
    print("the library's last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    os._exit(139)


def sleep() -> None:
    time.sleep(60)


def shout() -> str:
    os.write(1, b"x" * (1 << 20))  # more than a pipe holds
    return "said"
