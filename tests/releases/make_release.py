"""Records a release for the tests of upgrades: its wheel, and checkpoints as its nodes and trainers write them.

    make release-fixture VERSION=0.2.0

packs the code as it stands under that version, beside this file. The wheel replaces the one of the release before; the
checkpoints of all releases stay, because each must stay readable. While no release is recorded, the tests call these
functions to make one from the present code.
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


def recorded_wheels() -> list[Path]:
    return sorted(FOLDER.glob("*.whl"))


def recorded_samples(part: str) -> list[Path]:
    """The folders of one part, `node` or `run`, from every recorded release."""
    return sorted(FOLDER.glob(f"*/{part}"))


def build_wheel(version: str, folder: Path) -> Path:
    """Packs the present code as release `version`."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        for name in SOURCES:
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        _stamp(source / "peer" / "__init__.py", version)
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), scratch]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob(f"*-{version}-*.whl")
    return wheel


def _stamp(path: Path, version: str) -> None:
    text, count = re.subn(
        r'^SOFTWARE_VERSION: Final = ".*"$',
        f'SOFTWARE_VERSION: Final = "{version}"',
        path.read_text(),
        flags=re.MULTILINE,
    )
    assert count == 1, path
    path.write_text(text)


def write_node_sample(folder: Path) -> None:
    """An expert's checkpoint as a node saves it after 3 updates, and the swarm's manifest as it is published."""
    import checkpoint_samples

    checkpoint_samples.save(checkpoint_samples.make_store(folder), checkpoint_samples.make_expert(3))
    (folder / "manifest.json").write_bytes(checkpoint_samples.MANIFEST.to_json())


def write_run_sample(folder: Path) -> None:
    """A run's checkpoint as a trainer saves it after 4 steps, and the swarm's manifest as it is published."""
    import run_samples

    with tempfile.TemporaryDirectory() as scratch:
        text = str(run_samples.write_text(Path(scratch)))
        settings = run_samples.make_settings(steps=4, data=text, checkpoint=folder)
        run_samples.train_dense(run_samples.start(Path(scratch), settings))
    (folder / "manifest.json").write_bytes(run_samples.MANIFEST.to_json())


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]  # as pytest has it
    (version,) = sys.argv[1:]
    for wheel in recorded_wheels():
        wheel.unlink()
    build_wheel(version, FOLDER)
    shutil.rmtree(FOLDER / version, ignore_errors=True)
    write_node_sample(FOLDER / version / "node")
    write_run_sample(FOLDER / version / "run")


if __name__ == "__main__":
    main()
