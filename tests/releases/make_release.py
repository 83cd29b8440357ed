"""Keeps a release for the tests of upgrades: its wheel, and a manifest and checkpoints as it writes them.

    make release-fixture VERSION=0.1.0

packs the code as it stands under that version. The wheel takes the place of the one before it; manifests and
checkpoints of all releases stay, as each must be readable for ever.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
SOURCES = ("peer", "dht", "expert_server", "trainer_client", "talkoot")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


def build_wheel(version: str) -> None:
    for wheel in FOLDER.glob("*.whl"):
        wheel.unlink()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for name in SOURCES:
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        stamp(source / "peer" / "__init__.py", version)
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(FOLDER), folder]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)


def stamp(path: Path, version: str) -> None:
    text, count = re.subn(
        r'^SOFTWARE_VERSION: Final = ".*"$',
        f'SOFTWARE_VERSION: Final = "{version}"',
        path.read_text(),
        flags=re.MULTILINE,
    )
    assert count == 1, path
    path.write_text(text)


def write_samples(folder: Path) -> None:
    """An expert's checkpoint as a node saves it, and a run's as a trainer does, each with its manifest as published."""
    import checkpoint_samples
    import run_samples

    shutil.rmtree(folder, ignore_errors=True)
    node, run = folder / "node", folder / "run"
    expert = checkpoint_samples.make_expert(3)
    checkpoint_samples.save(checkpoint_samples.make_store(node), expert)
    (node / "manifest.json").write_bytes(checkpoint_samples.MANIFEST.to_json())
    with tempfile.TemporaryDirectory() as scratch:
        text = str(run_samples.write_text(Path(scratch)))
        settings = run_samples.make_settings(steps=4, data=text, checkpoint=run)
        run_samples.train_dense(run_samples.start(Path(scratch), settings))
    (run / "manifest.json").write_bytes(run_samples.MANIFEST.to_json())


def main() -> None:
    (version,) = sys.argv[1:]
    build_wheel(version)
    write_samples(FOLDER / version)


if __name__ == "__main__":
    main()
