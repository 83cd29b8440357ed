"""Sources of text: files, folders and globs of plain text, JSON lines and Parquet, read piece by piece."""

import codecs
import glob
import json
import pydoc_data.topics
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.errors import DataError
from peer.files import kind_of
from peer.formatting import bytes_in_words
from peer.settings import require_extra

PIECE_BYTES = 2**16
"""Bytes of plain text that are read at once."""
_LONGEST_LINE = 2**26
"""The longest line of a JSON lines file, in bytes. A line is one document, and is read at once."""
_ROWS = 256
"""Rows of Parquet that are read at once."""
_SUFFIXES = {".txt", ".jsonl", ".parquet"}
"""The suffixes, in lower case, of files that are read from a folder. Any other file that is named by its path is plain
text.
"""


@dataclass(frozen=True)
class Document:
    """One text: a plain file, or a line or row of another file."""

    file: Path
    number: int
    """The number of its line or row, from 1; 0: it is the whole file."""
    pieces: Iterable[str]
    """The text. Read it before the next document."""
    labels: Mapping[str, str]
    """The requested labels whose values are text."""


def find_files(paths: Sequence[str]) -> list[Path]:
    """All files that the paths name, without duplicates: in the order of the paths, and by name within a folder or
    glob.

    Raises DataError for a path that matches no file or that can't be looked at. Folders inside a folder that can't be
    read are skipped.
    """
    found: dict[Path, None] = {}
    for path in paths:
        found.update(dict.fromkeys(_find(path)))
    if any(file.suffix.lower() == ".parquet" for file in found):
        require_extra("pyarrow", "parquet", "reading .parquet files")
    return list(found)


def unread_files(paths: Sequence[str]) -> list[Path]:
    """The files in folders among the paths that `find_files` leaves out because of their suffix, without hidden ones.
    Raises DataError as `find_files` does.
    """
    read = {file.resolve() for file in find_files(paths)}
    others: dict[Path, None] = {}
    for folder in filter(Path.is_dir, map(Path, paths)):
        for file in sorted(folder.rglob("*")):
            is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if not is_hidden and _is_file(file) and file.resolve() not in read:
                others[file] = None
    return list(others)


def find_texts(paths: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each path. Each path is a text of its own.

    Raises DataError as `find_files` does, and for two paths that name the same files.
    """
    found: dict[str, list[Path]] = {}
    known: dict[tuple[Path, ...], str] = {}
    for path in paths:
        files = find_files([path])
        resolved = tuple(sorted(file.resolve() for file in files))
        if (other := known.setdefault(resolved, path)) != path or path in found:
            same = f"{path} is given twice" if other == path else f"{other} and {path} are the same text"
            raise DataError(f"{same}: give each text once")
        found[path] = files
    return found


def read_text(files: Sequence[Path], field: str = "text") -> Iterator[str]:
    """All text of the files in pieces, with a newline between documents.

    A plain file is one document, and so is the `field` of each line or row. Without files, the text is 465 KB of
    Python's own help. Raises DataError, which names the place of anything that is not text.
    """
    if not files:
        yield "\n".join(pydoc_data.topics.topics.values())
        return
    separator = ""
    for document in read_documents(files, field):
        empty = True
        for piece in document.pieces:
            if piece:
                yield separator + piece
                separator, empty = "", False
        if not empty:
            separator = "\n"


def read_documents(
    files: Sequence[Path], field: str = "text", labels: Sequence[str] = ()
) -> Iterator[Document]:
    """The documents of the files: each plain file is one, and so is the `field` of each line or row.

    `labels`: other wanted fields. Raises DataError, which names the place of anything that is not text.
    """
    for file in files:
        try:
            for document in _documents(file, field, labels):
                yield Document(document.file, document.number, _readable(document), document.labels)
        except OSError as error:
            raise unreadable(file, error) from error


def _readable(document: Document) -> Iterator[str]:
    try:
        yield from document.pieces
    except OSError as error:
        raise unreadable(document.file, error) from error


def unreadable(file: Path, error: OSError) -> DataError:
    """The DataError to raise in place of this OSError."""
    return DataError(f"can't read {file}: {error.strerror or error}; check its name and its permissions")


def _find(path: str) -> list[Path]:
    if not path:  # which Path would take for the current folder
        raise DataError("a path of a text is empty: give the path of a file or folder")
    at = Path(path)
    try:
        if (kind := kind_of(at)) == stat.S_IFDIR:
            return _find_in_folder(at)
    except OSError as error:
        raise unreadable(at, error) from error
    if kind == stat.S_IFREG:
        return [at]
    if kind is not None:
        raise DataError(f"{path} is not a file: write its output to a file first")
    matched = sorted(Path(name) for name in glob.glob(path, recursive=True))
    files = [file for file in matched if _is_file(file)]
    if not files:
        raise DataError(f"no file or folder {path}: give one with text in it")
    return files


def _find_in_folder(folder: Path) -> list[Path]:
    next(folder.iterdir(), None)  # unlike rglob, it raises OSError if the folder can't be read
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and _is_file(file))
    if not files:
        raise DataError(
            f"no .txt, .jsonl or .parquet file in {folder}: put some there, or name other text files by a glob in "
            f"quotes, such as '{folder / '*'}'"
        )
    return files


def _is_file(path: Path) -> bool:
    try:
        return kind_of(path) == stat.S_IFREG
    except OSError as error:
        raise unreadable(path, error) from error


def _documents(file: Path, field: str, labels: Sequence[str]) -> Iterator[Document]:
    match file.suffix.lower():
        case ".jsonl":
            found = _read_texts_in_lines(file, field)
        case ".parquet":
            found = _read_parquet(file, field, labels)
        case _:
            yield Document(file, 0, _read_plain(file), {})
            return
    for number, values in found:
        known = {label: as_text(values[label]) for label in labels if isinstance(values.get(label), str)}
        yield Document(file, number, _in_pieces(as_text(values[field])), known)


def as_text(value: str) -> str:
    """Replaces halves of surrogate pairs, which are valid JSON but not text."""
    return value.encode(errors="replace").decode()


def _in_pieces(text: str) -> Iterator[str]:
    return (text[at : at + PIECE_BYTES] for at in range(0, len(text), PIECE_BYTES))


def _read_plain(path: Path) -> Iterator[str]:
    """Pieces that end with white space if possible, so that no token is cut. A byte-order mark is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    kept, position = "", 0
    with path.open("rb") as file:
        if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
            position = len(file.read(len(codecs.BOM_UTF8)))
        while data := file.read(PIECE_BYTES):
            if (at := data.find(0)) >= 0:
                raise DataError(f"{path} is not text: byte {position + at} is 0; give a text file")
            pending = len(decoder.getstate()[0])
            text = kept + _decode(decoder, data, path, position - pending)
            position += len(data)
            cut = max(text.rfind("\n"), text.rfind(" ")) + 1 or len(text)
            yield text[:cut]
            kept = text[cut:]
    pending = len(decoder.getstate()[0])
    yield kept + _decode(decoder, b"", path, position - pending, final=True)


def _decode(
    decoder: codecs.IncrementalDecoder, data: bytes, path: Path, position: int, *, final: bool = False
) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8: byte {position + error.start} can't be read; give a text file, or turn "
            "it into UTF-8 with iconv"
        ) from error


def read_json_lines(path: Path, longest: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Each line's number, its name for errors, and its object. All text in it can be encoded.

    `longest`: the limit for a line, in bytes. Raises DataError and OSError.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(longest + 1), b""), 1):
            where = f"line {number} of {path}"
            if len(line) > longest:
                raise DataError(f"{where} is longer than {bytes_in_words(longest)}: is it JSON lines?")
            if line.strip():
                yield number, where, _object_of(line, where)


def _object_of(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}; give a file with an object in each line") from error
    if not isinstance(values, dict):
        raise DataError(f"{where} is not a JSON object: give a file with an object in each line")
    return {name: as_text(value) if isinstance(value, str) else value for name, value in values.items()}


def _read_texts_in_lines(path: Path, field: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each line's number and values; the field is text."""
    for number, where, values in read_json_lines(path, _LONGEST_LINE):
        if field not in values:
            raise DataError(_no_field(field, where, values))
        if not isinstance(values[field], str):
            raise DataError(f"{where}: the field {field!r} is not text: pass --field")
        yield number, values


def _read_parquet(path: Path, field: str, labels: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each row's number and values; the field is text."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(_no_field(field, str(path), names))
            columns = [field, *(label for label in labels if label in names and label != field)]
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    if values[field] is None:
                        continue
                    if not isinstance(values[field], str):
                        raise DataError(f"{path}: the field {field!r} is not text: pass --field")
                    yield number, values
    except ArrowException as error:
        raise DataError(f"can't read {path}: {error}; give a whole Parquet file") from error
    except UnicodeDecodeError as error:  # pyarrow checks neither what it reads nor what it writes
        raise DataError(
            f"{path} is not text in UTF-8: one of the {_ROWS} rows after row {number} can't be read ({error}); give a "
            "file with text in UTF-8"
        ) from error


def _no_field(field: str, where: str, names: Iterable[str]) -> str:
    known = ", ".join(repr(name)[:40] for name in list(names)[:10]) or "none"
    return f"{where} has no field {field!r}, its fields are {known}: pass --field"
