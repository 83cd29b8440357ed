"""Checkpoints as files: the newest few `<number>.safetensors` of a folder, each whole or not there."""

import os
import re
from contextlib import suppress
from pathlib import Path

from peer.files import sync_folder, write_whole

_FILE_NAME = re.compile(r"(0|[1-9][0-9]{0,17})\.safetensors")
_TEMPORARY = ".*.new"


class NumberedFiles:
    """One folder of them. Other files in it are left alone."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: how many stay."""
        assert keep >= 1, "a folder that keeps nothing is none"
        self.folder = folder
        self._keep = keep

    def numbers(self) -> list[int]:
        """Newest first, by the file names alone."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        return sorted(
            (int(match[1]) for name in names if (match := _FILE_NAME.fullmatch(name))), reverse=True
        )

    def path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def write(self, number: int, data: bytes) -> None:
        """Returns when the file is safely on disk. Raises OSError; the files before it stay then."""
        self._make_folder()
        write_whole(self.path(number), data)
        self._prune(number)

    def sweep(self) -> None:
        """Removes what writers that were killed have left."""
        for path in self.folder.glob(_TEMPORARY):
            with suppress(OSError):
                path.unlink()

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.is_dir()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in missing:
                sync_folder(folder.parent)  # where it is entered

    def _prune(self, written: int) -> None:
        """Keeps the newest of those up to the one just written.

        What claims to be newer was passed over when the newest was loaded, and must not push out what is good.
        """
        numbers = [number for number in self.numbers() if number <= written]
        for number in numbers[self._keep :]:
            with suppress(OSError):  # one file too many does no harm
                self.path(number).unlink()
