"""Runs one contender of a benchmark in a session of its own, of which nothing is left afterwards."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_TRIES = 3


def run_apart(module: str, arguments: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Runs a module that prints its result as a line of JSON.

    hivemind.moe forks while threads run, and now and then hangs for it: such a run is tried again. Raises SystemExit
    with its output when the module fails.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    environment = os.environ | {"HIVEMIND_LOGLEVEL": "ERROR"}
    if "talkoot" in arguments:
        environment["OMP_WAIT_POLICY"] = "passive"  # as the command `talkoot` sets it
    for _ in range(_TRIES):
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                continue
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            said = output.read()
        if status:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{said}")
        (last,) = [line for line in said.splitlines() if line.startswith("{")][-1:]
        result: dict[str, Any] = json.loads(last)
        return result
    raise SystemExit(f"{' '.join(arguments)} hung, {_TRIES} times")
