"""Reads the log of a local run: what goes on, what went wrong, in words for a person."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from model.errors import HrnnError, InputError, UnavailableError

ANSI = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Executing task '([\w-]+)'")
_FINISHED = re.compile(r"Task '([\w-]+)' finished with status (\w+)")
_RAISED = re.compile(r"^model\.errors\.(\w+): (.*)$")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)(?::.*)?$")


class StepError(HrnnError):
    """A step failed for a reason that is not the user's input."""


class LogReader:
    """Turns kfp's log into progress lines and finds the error of the step that failed."""

    def __init__(self, say: Callable[[str], None], steps: Sequence[str], *, verbose: bool) -> None:
        """Say lines through `say`.

        Args:
            steps: of the pipeline, in order; those taken from the cache are not in the log.
            verbose: say every line of the log.
        """
        self._say, self._steps, self._verbose = say, tuple(steps), verbose
        self.states: dict[str, str] = {}  # by step: running, done, failed, "done before"
        self._step, self._next = "", 0  # under way; place of the one after it
        self._started = time.monotonic()
        self._own_output = False  # inside the step's own lines, after kfp's preamble
        self.failed_step = ""
        self._error: tuple[str, str] | None = None
        self._last_exception = ""

    def read(self, line: str) -> None:
        """The next line of the log."""
        line = ANSI.sub("", line).rstrip("\n")
        if self._verbose:
            self._say(line)
        text = line.strip()
        if started := _STARTED.search(line):
            self._say_skipped(started[1])
            self._step, self._own_output = started[1], False
            self.states[self._step] = "running"
            self._started = time.monotonic()
            self._say(f"[{self._place(self._step)}{self._step}]")
        elif finished := _FINISHED.search(line):
            self._finished(finished[1], succeeded=finished[2] == "SUCCESS")
        elif line == "    }":
            self._own_output = True  # kfp prints the step's input as JSON before the step speaks
        elif "[KFP Executor" in line:
            self._own_output = self._own_output and "Looking for" not in line
        elif raised := _RAISED.match(text):
            # Of the first step that fails: the exit handler comes after it.
            if not self.failed_step:
                self._error = raised[1], raised[2]
            self._own_output = False
        elif _EXCEPTION.match(text):
            if not self.failed_step:
                self._last_exception = text
        elif text.startswith("Traceback"):
            self._own_output = False
        elif self._own_output and text and not self._verbose:
            self._say(f"  {text}")

    def error(self, log: Path) -> HrnnError:
        """What to tell the user of a failed run."""
        step = self.failed_step or self._step or "the pipeline"
        if self._error is not None:
            kind, message = self._error
            error = {"InputError": InputError, "UnavailableError": UnavailableError}.get(
                kind, StepError
            )
            return error(f"{step}: {message} (full log: {log})")
        reason = self._last_exception or "it ended without saying why"
        return StepError(f"{step} failed: {reason} (full log: {log})")

    def _finished(self, step: str, *, succeeded: bool) -> None:
        seconds = time.monotonic() - self._started
        self._own_output = False
        self.states[step] = "done" if succeeded else "failed"
        if succeeded:
            self._say(f"  done in {seconds:.1f} s")
            return
        self.failed_step = self.failed_step or step
        self._say(f"  {step} failed after {seconds:.1f} s")

    def _say_skipped(self, step: str) -> None:
        """kfp says nothing of the steps that it takes from the cache."""
        if step in self._steps:
            for skipped in self._steps[self._next : self._steps.index(step)]:
                self.states[skipped] = "done before"
                self._say(f"[{self._place(skipped)}{skipped}]\n  done before, not again")
            self._next = self._steps.index(step) + 1

    def _place(self, step: str) -> str:
        many = len(self._steps)
        return f"{self._steps.index(step) + 1}/{many} " if step in self._steps else ""
