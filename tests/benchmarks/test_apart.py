import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from benchmarks.apart import Child, Standby

MODULE = """\
import json, pathlib, subprocess, sys
hung = pathlib.Path(__file__).with_name("hung")
started = subprocess.Popen(["sleep", "300"], stdout=subprocess.DEVNULL)
print("not a figure")
print(json.dumps({"started": started.pid}), flush=True)
for line in sys.stdin:
    if line.strip() == "fail":
        sys.exit("it failed")
    if line.strip() == "hang" and not hung.exists():
        hung.touch()
    else:
        print(json.dumps({"said": line.strip()}), flush=True)
"""


@pytest.fixture(autouse=True)
def contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "contender.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "contender"


@pytest.fixture
def child(contender: str) -> Iterator[Child]:
    with closing(Child(contender, [])) as made:
        yield made


def test_a_child_answers_lines_and_is_killed_with_all_that_it_started(child: Child) -> None:
    family = [psutil.Process(child.pid), psutil.Process(child.hear(60)["started"])]
    child.tell("hello")
    assert child.hear(60) == {"said": "hello"}
    child.close()
    ends = time.monotonic() + 60
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_child_that_fails_or_hangs_says_so(child: Child) -> None:
    child.hear(60)
    child.tell("hang")
    with pytest.raises(TimeoutError):
        child.hear(0.1)
    child.tell("fail")
    with pytest.raises(SystemExit, match="it failed"):
        child.hear(60)


def test_a_module_on_standby_that_hangs_is_started_again(contender: str) -> None:
    with closing(Standby(contender, [], 3)) as standby:
        assert standby.ask("hello") == {"said": "hello"}
        assert standby.ask("hang") == {"said": "hang"}
