"""Installs what a target of the Makefile needs into this environment, and prints what that is and how large it is.

python tools/install.py .            # what Talkoot itself needs
python tools/install.py '.[test]'    # with what its checks and tests need
"""

import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from importlib import metadata

_CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
"""PyTorch's builds for Linux without CUDA: 200 MB to download instead of 3 GB."""
_SHOWN = 8
_ANSWERS_WITHIN_S = 10.0
_DOWNLOAD = re.compile(r"^ *(?:Downloading|Using cached) (\S+) \((.+)\)$")
_STATIC = "editable_mode=compat"
"""Puts the folder on Python's path, so that type checkers and editors find the packages too."""
_LINES_OF_A_FAILURE = 40


def sizes() -> dict[str, int]:
    """The size on disk of each installed package, in bytes."""
    return {
        found.metadata["Name"]: sum(file.size or 0 for file in found.files or ())
        for found in metadata.distributions()
    }


def table(added: Mapping[str, int]) -> str:
    """A table of the largest packages, and the sum of all others."""
    if not added:
        return "everything was there already"
    ordered = sorted(added.items(), key=lambda item: -item[1])
    lines = [f"installed {len(added)} packages, {_in_mb(sum(added.values()))} on disk:"]
    lines += [f"  {_in_mb(size):>9}  {name}" for name, size in ordered[:_SHOWN]]
    if rest := ordered[_SHOWN:]:
        lines.append(f"  {_in_mb(sum(size for _, size in rest)):>9}  {len(rest)} others")
    return "\n".join(lines)


def torch_options() -> list[str]:
    """Options that make pip install the build of torch for machines without a GPU, where there is one."""
    if sys.platform != "linux" or shutil.which("nvidia-smi") or "torch" in sizes():
        return []
    try:
        with urllib.request.urlopen(f"{_CPU_BUILDS}/torch/", timeout=_ANSWERS_WITHIN_S):  # noqa: S310  # a constant
            return ["--extra-index-url", _CPU_BUILDS]
    except (urllib.error.URLError, TimeoutError):
        print(
            "download.pytorch.org does not answer: torch comes from your package index, perhaps with CUDA (3 GB)"
        )
        return []


def install(what: str) -> None:
    """Runs pip, and shows each download with its size. If pip fails, raises SystemExit with pip's last lines."""
    options = ["--progress-bar", "off", "--config-settings", _STATIC, *torch_options()]
    command = [sys.executable, "-m", "pip", "install", *options, "-e", what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        last: deque[str] = deque(maxlen=_LINES_OF_A_FAILURE)
        for line in pip.stdout:
            last.append(line)
            match = _DOWNLOAD.match(line.rstrip())
            if match and ".metadata" not in line:
                print(f"  {match[2]:>9}  {match[1].rpartition('/')[2]}", flush=True)
            elif line.startswith("Installing collected packages"):
                print("unpacking all of them, which takes another minute or more", flush=True)
    if pip.returncode:
        raise SystemExit("".join(last))


def _in_mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def main() -> None:
    (what,) = sys.argv[1:]
    before = sizes()
    print(f"installing {what} and what it needs, which takes some minutes the first time", flush=True)
    install(what)
    print(table({name: size for name, size in sizes().items() if name not in before}))


if __name__ == "__main__":
    main()
