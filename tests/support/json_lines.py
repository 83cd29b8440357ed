"""Files of JSON lines."""

import json
from pathlib import Path


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
