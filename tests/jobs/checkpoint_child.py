"""Runs trainings for `test_checkpoint.py`, each in a process of its own that may be killed: TensorFlow is imported once.

A line of JSON on standard input is an order. It is answered by "start PID", a line "step NUMBER CHECKSUM" for each training
step, and "end STATUS". The process is reaped when "reap" says so, and "reaped" answers: until then its id is its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import cv2  # noqa: F401
import tensorflow as tf
from rich.console import Console

import input_workers as iw
from input_workers.config import load_config
from input_workers.jobs import checkpoint
from input_workers.jobs.model import Trainer
from input_workers.jobs.train import train


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write of a short line is whole or not there


def report(step: int, batch: Any) -> None:
    digest = hashlib.blake2b(batch.image.numpy().tobytes() + batch.label.numpy().tobytes(), digest_size=16)
    say(f"step {step} {digest.hexdigest()}")


def die_in(place: str, time: int) -> None:
    """Let this process be killed when it comes to the place for that time."""
    calls = 0

    def deadly(original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == time:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        return call

    if place == "evaluating":
        make = Trainer.__init__

        def make_deadly(self: Any, *arguments: Any) -> None:
            make(self, *arguments)
            self.evaluate = deadly(self.evaluate)

        Trainer.__init__ = make_deadly
        return
    owner, name = {
        "saving the model": (Trainer, "save"),
        "saving the input": (iw.GlobalCoordinator, "save_state"),
        "syncing": (checkpoint, "_sync"),
        "renaming": (Path, "rename"),
        "after renaming": (checkpoint, "sync_folder"),
        "removing": (checkpoint.shutil, "rmtree"),
    }[place]
    setattr(owner, name, deadly(getattr(owner, name)))


def run(order: dict[str, Any]) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    if order["die_in"] is not None:
        die_in(*order["die_in"])
    with open(order["log"], "a") as log:
        console = Console(file=log, soft_wrap=True)
        try:
            train(load_config(order["config"]), console, resume=order["resume"], on_batch=report)
        except iw.InputWorkersError as error:
            console.print(f"error: {error}")
            raise


def main() -> None:
    pid = 0
    for line in sys.stdin:
        if line == "reap\n":
            os.waitpid(pid, 0)
            say("reaped")
            continue
        pid = os.fork()
        if not pid:
            say(f"start {os.getpid()}")
            status = 1
            try:
                run(json.loads(line))
                status = 0
            finally:
                os._exit(status)  # without the parent's handlers
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        say(f"end {ended.si_status}")


if __name__ == "__main__":
    main()
