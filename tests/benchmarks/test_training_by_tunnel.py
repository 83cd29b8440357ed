"""Training through tunnels, on the emulated internet of the benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.namespaces import why_not
from benchmarks.tunnel import LEAST_SHARE

NOT_HERE = why_not()


@pytest.mark.slow
@pytest.mark.usefixtures("p2pd")
@pytest.mark.timeout(400)
@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_training_through_a_relay_reaches_half_of_the_direct_throughput(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.tunnel", "--quick", "--json", str(file)]
    subprocess.run(command, check=True, timeout=390)
    results = json.loads(file.read_text())
    assert all(words.startswith("not checked") for words in results["reached"]["direct"])
    assert all(words.startswith("relayed") for words in results["reached"]["tunnel"])
    assert results["rows"][0]["share"] >= LEAST_SHARE
