"""A stand-in for uv, for installations without downloads: `python fake_uv.py tool install … SOURCE`.

It makes a real environment that contains the Talkoot under test. It records its command lines in FAKE_UV_CALLS. If
FAKE_UV_BREAKS is set, it leaves half an environment behind and fails. FAKE_UV_PYTHON is the version of the only Python
that it finds. If FAKE_UV_OFFLINE is set, it can't download another.
"""

import json
import os
import shutil
import site
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
BIN = Path.home() / ".local" / "bin"


def environment() -> Path:
    return (
        Path(os.environ.get("UV_TOOL_DIR") or Path.home() / ".local" / "share" / "uv" / "tools") / "talkoot"
    )


def install(source: str) -> None:
    folder = environment()
    shutil.rmtree(folder, ignore_errors=True)
    if os.environ.get("FAKE_UV_BREAKS"):
        folder.mkdir(parents=True)
        sys.exit("Failed to install: No space left on device (os error 28)")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # links, so that they go with the environment
    needed = (path for path in Path(site.getsitepackages()[0]).iterdir() if "talkoot" not in path.name)
    for path in (*needed, *(ROOT / name for name in FLOORS)):
        (packages / path.name).symlink_to(path)
    noted = f'requirements = [{{ name = "talkoot", directory = "{source}" }}]'
    (folder / "uv-receipt.toml").write_text(f"[tool]\n{noted}\n")
    program = folder / "bin" / "talkoot"
    program.write_text(f"#!{folder}/bin/python\nfrom talkoot.cli import main\nmain()\n")
    program.chmod(0o755)
    BIN.mkdir(parents=True, exist_ok=True)
    (BIN / "talkoot").unlink(missing_ok=True)
    (BIN / "talkoot").symlink_to(program)


def main(arguments: list[str]) -> None:
    with Path(os.environ["FAKE_UV_CALLS"]).open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    match arguments:
        case ["tool", "install", "--help"]:
            print("--torch-backend")
        case ["tool", "install", *_, source]:
            install(source.removeprefix("talkoot @ file://"))
        case ["tool", "uninstall", "talkoot"]:
            shutil.rmtree(environment())
            (BIN / "talkoot").unlink()
        case ["tool", "dir", "--bin"]:
            print(BIN)
        case ["python", "find", wanted]:
            version = os.environ.get("FAKE_UV_PYTHON", "3.13")
            if wanted not in {version, ">=3.11,<3.14" if version < "3.14" else version}:
                sys.exit(f"error: No interpreter found for Python {wanted}")
        case ["python", "install", _]:
            if os.environ.get("FAKE_UV_OFFLINE"):
                sys.exit("error: Failed to download cpython")
        case _:
            sys.exit(f"error: unexpected arguments {arguments}")


if __name__ == "__main__":
    main(sys.argv[1:])
