"""What the commands of all benchmarks have in common: their first options, and the file of their figures."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def command_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """`description`: the module's docstring. `quick`: what `--quick` does."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def write_figures(file: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes the file of `--json`, if one was given."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n")
