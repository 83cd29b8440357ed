"""The first signal stops a command politely, the second one hurries it, and its clean-up is always done."""

import signal
import subprocess
import sys

SCRIPT = """
import asyncio
from talkoot.signals import Stopped, run_until_stopped

hurried = asyncio.Event()

async def work():
    print("works", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("leaves", flush=True)
        await hurried.wait()
        print("cleaned up", flush=True)

try:
    asyncio.run(run_until_stopped(work(), hurried.set))
except Stopped as stopped:
    print(stopped.exit_status, flush=True)
"""


def test_the_second_signal_hurries_what_the_first_one_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "leaves\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readlines() == ["cleaned up\n", f"{128 + signal.SIGTERM}\n"]
        assert process.wait(60) == 0
