"""A model folder from a stranger is refused or read, in bounded memory and time, and never leads outside itself."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from expert_fakes import make_manifest
from model_folders import RandomModel, change_json
from preloaded import run_preloaded

from peer.errors import ModelError, SettingsError, UserError
from talkoot.model.folder import CONFIG, INDEX, TOKENIZER, FolderWriter, ModelFolder
from talkoot.model.opened import open_model
from trainer_client.data.tokenizer import BytePairTokenizer, ByteTokenizer, byte_letters, load_tokenizer

MANIFEST = make_manifest((2, 2), k=2, hidden=16, feed_forward=32)
MOST_MEMORY = 2 * 2**30
PAIRS = BytePairTokenizer.learn(["In the sauna one must behave as in church. "] * 9, 400, 280)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel(MANIFEST, PAIRS).write(tmp_path_factory.mktemp("folders") / "model")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def weights(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def with_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header of the experts' file, but not its numbers."""
    data = weights(folder).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    change(entries)
    header = json.dumps(entries).encode()
    weights(folder).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def first(entries: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for name, entry in entries.items() if name != "__metadata__")
    return found


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def manifest_with(folder: Path, grid: Sequence[int] = (2, 2), **model: Any) -> None:
    manifest = json.loads((folder / CONFIG).read_text())["manifest"]
    manifest["model"] |= model
    manifest["experts"] |= {"grid": grid}
    change_json(folder / CONFIG, manifest=manifest)


def overlap(entries: dict[str, Any]) -> None:
    offsets = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
    offsets[1][:] = offsets[0]


def within(entries: dict[str, Any]) -> None:
    entries["again"] = first(entries) | {"data_offsets": [0, 4], "shape": [1]}


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is endless": (lambda f: replace(f / CONFIG, endless), "is a link"),
    "config is a pipe": (lambda f: replace(f / CONFIG, pipe), "is not a file"),
    "config is a folder": (lambda f: replace(f / CONFIG, Path.mkdir), "is not a file|Is a directory"),
    "tokenizer leads out": (
        lambda f: replace(f / TOKENIZER, lambda path: path.symlink_to("/etc/passwd")),
        "is a link",
    ),
    "weights are a pipe": (lambda f: replace(weights(f), pipe), "is not a file"),
    "weights lead out": (lambda f: replace(weights(f), endless), "is a link"),
    "weights by a name that leads out": (
        lambda f: change_json(f / INDEX, weight_map={"x": "../../x.safetensors"}),
        "names the file",
    ),
    "config of 1 GB": (lambda f: os.truncate(f / CONFIG, 2**30), "has more than"),
    "index of 1 TB": (lambda f: os.truncate(f / INDEX, 2**40), "has more than"),
    "config of lists": (lambda f: (f / CONFIG).write_text("[" + "[]," * 2**18 + "0]"), "not the "
    "configuration of a Talkoot"),
    "config of wrong experts": (
        lambda f: change_json(f / CONFIG, missing_experts=[1] * 2**18),
        "missing_experts",
    ),
    "config of unknown keys": (
        lambda f: change_json(f / CONFIG, manifest={f"\x1b[31m{n}": n for n in range(2**15)}),
        "unknown",
    ),
    "config that is nested": (lambda f: (f / CONFIG).write_text('{"a":' * 2**17), "not the configuration of a Talkoot"),
    "index that is nested": (lambda f: (f / INDEX).write_text('{"weight_map":' + "[" * 2**20), "not an index"),
    "index of lists": (lambda f: change_json(f / INDEX, weight_map={"x": [[]] * 2**20}), "not an index"),
    "checksums that are a list": (lambda f: change_json(f / INDEX, sha256=[]), "not an index"),
    "index that is a number": (lambda f: (f / INDEX).write_text("7"), "not an index"),
    "header of 2^63 bytes": (
        lambda f: weights(f).write_bytes((2**63).to_bytes(8, "little") + b"{}"),
        "too much memory",
    ),
    "header that is not there": (lambda f: weights(f).write_bytes(b"\x10"), "can't be read"),
    "shape of 2^64": (lambda f: with_header(f, lambda e: first(e).update(shape=[2**32, 2**32])), "can't be read"),
    "negative shape": (lambda f: with_header(f, lambda e: first(e).update(shape=[-1, 16])), "can't be read"),
    "offsets beyond the end": (
        lambda f: with_header(f, lambda e: first(e).update(data_offsets=[0, 2**62])),
        "can't be read",
    ),
    "offsets that overlap": (lambda f: with_header(f, overlap), "can't be read"),
    "a tensor within another": (lambda f: with_header(f, within), "can't be read"),
    "another dtype": (lambda f: with_header(f, lambda e: first(e).update(dtype="I32")), "expected floats"),
    "a million experts": (lambda f: manifest_with(f, [1024, 1024]), "lacks experts"),
    "64 layers of a million": (
        lambda f: manifest_with(f, [1024, 1024], layers=64),
        "lacks experts",
    ),
    "hidden 16384": (
        lambda f: manifest_with(f, hidden=16384, heads=256, feed_forward=65536, local_layers=16),
        "lacks|expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused(case: str, folder: Path) -> None:
    spoil, reason = HOSTILE[case]
    spoil(folder)
    with pytest.raises(UserError, match=reason) as caught:
        open_model(folder)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()


TOO_MUCH: dict[str, Callable[[Path], object]] = {
    "index of small names": lambda f: (f / INDEX).write_text(
        '{"weight_map":{' + ",".join(f'"{n:x}":1' for n in range(2**20)) + "}}"
    ),
    "tokenizer of lists": lambda f: (f / TOKENIZER).write_text('{"model":[' + "[]," * 2**21 + "0]}"),
}


def many_headers(folder: Path, each: int) -> dict[str, str]:
    """Ten links to one file with so many names."""
    names = (f'"{n:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(each))
    header = ("{" + ",".join(names) + "}").encode()
    (folder / "a0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for n in range(1, 10):
        os.link(folder / "a0.safetensors", folder / f"a{n}.safetensors")
    return {str(n): f"a{n}.safetensors" for n in range(10)}


def test_the_names_in_all_files_together_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talkoot.model.folder._MOST_HEADERS", 2**16)
    change_json(folder / INDEX, weight_map=many_headers(folder, 2**8))
    with pytest.raises(
        ModelError, match=r"a[1-9].safetensors: the names of its tensors and those before take too"
    ):
        ModelFolder.open(folder)


HEADERS: dict[str, Callable[[Path], object]] = {
    "many large headers": lambda f: change_json(f / INDEX, weight_map=many_headers(f, 2**18))
}


@pytest.mark.parametrize("cases", [TOO_MUCH, pytest.param(HEADERS, marks=pytest.mark.slow)])
def test_large_folders_take_bounded_memory(
    cases: dict[str, Callable[[Path], object]], written: Path, tmp_path: Path
) -> None:
    folders = []
    for case, spoil in cases.items():
        folders.append(Path(shutil.copytree(written, tmp_path / case)))
        spoil(folders[-1])
    program = (
        "import sys, resource; from pathlib import Path; from peer.errors import ModelError;"
        "from talkoot.model.folder import ModelFolder\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({MOST_MEMORY}, {MOST_MEMORY}))\n"
        "for path in sys.argv[1:]:\n"
        "    try: ModelFolder.open(Path(path))\n    except ModelError as error: print(error)"
    )
    done = run_preloaded("-c", program, *map(str, folders), env=os.environ, limit_s=400)
    assert (done.returncode, done.stderr) == (0, "")
    refused = done.stdout.splitlines()
    assert len(refused) == len(folders)
    assert all(str(folder) in line for folder, line in zip(folders, refused, strict=True))


def level() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PAIRS.to_json())["pre_tokenizer"]
    return found


def adding(token: int) -> dict[str, Any]:
    return {"type": "RobertaProcessing", "sep": ["z", token], "cls": ["z", token], "trim_offsets": True,
            "add_prefix_space": False}  # fmt: skip


def repeating(many: int) -> dict[str, Any]:
    """Adds `many` tokens `many` times to each text, in a file of a few times `many` bytes."""
    token, text = {"SpecialToken": {"id": "z", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    rest = {"Sequence": {"id": "B", "type_id": 0}}
    added = {"id": "z", "ids": [0] * many, "tokens": ["z"] * many}
    return {"type": "TemplateProcessing", "single": [text, *[token] * many], "pair": [text, rest],
            "special_tokens": {"z": added}}  # fmt: skip


def steps(*pre_tokenizers: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre_tokenizers]}}


def splitting(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


DIGITS = {"type": "Digits", "individual_digits": True}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "makes texts long": {
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 2**20}
    },
    "doubles bytes again and again": steps(*[level()] * 40),
    "has steps without end": steps(*[DIGITS] * 100_000, level()),
    "tracks back": steps(splitting("^(a+)+$"), level()),
    "tracks back without repetition": steps(splitting(r"a\g<0>\g<0>b|a"), level()),
    "has alternatives without end": steps(splitting("|".join("a" * n for n in range(1, 1000))), level()),
    "adds a million tokens to each text": {"post_processor": repeating(1000)},
    "processes tokens again and again": {
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            ]
            * 10_000,
        }
    },
    "adds a token that is not there": {"post_processor": adding(60_000)},
    "has no type": {"pre_tokenizer": {}},
    "is of no type": {"normalizer": {"type": ["NFC"]}},
    "says escape sequences": {"decoder": {"type": "\x1b[31m"}},
    "ends words": {"model": json.loads(PAIRS.to_json())["model"] | {"end_of_word_suffix": "</w>"}},
    "begins words": {"model": json.loads(PAIRS.to_json())["model"] | {"continuing_subword_prefix": "##"}},
    "makes the library panic": {
        "model": {"type": "BPE", "vocab": byte_letters() | {"aa": 256}, "merges": [["aa", "aa"]]}
    },
    "draws": {"model": json.loads(PAIRS.to_json())["model"] | {"dropout": 0.5}},
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(case: str, folder: Path) -> None:
    change_json(folder / TOKENIZER, **TOKENIZERS[case])
    with pytest.raises(ModelError, match="tokenizer") as caught:
        ModelFolder.open(folder)
    assert str(caught.value).isprintable()


def test_a_tokenizer_neither_pads_nor_cuts_texts() -> None:
    text = "In the sauna"
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    cutting = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    spoilt = json.loads(PAIRS.to_json()) | {"padding": padding, "truncation": cutting}
    assert load_tokenizer(json.dumps(spoilt)).encode(text).tolist() == PAIRS.encode(text).tolist()


def test_tokenizers_that_take_a_bounded_time_are_read(folder: Path) -> None:
    changes = steps(DIGITS, splitting("[0-9][0-9]"), level())
    change_json(folder / TOKENIZER, normalizer={"type": "NFC"}, post_processor=repeating(2), **changes)
    assert ModelFolder.open(folder).tokenizer.encode("In 1967").size


def write(path: Path) -> None:
    RandomModel(MANIFEST).write(path)


def test_a_folder_that_others_prepared_is_not_written_to(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    (tmp_path / "link.partial").symlink_to(precious)
    shutil.copytree(precious, tmp_path / "own.partial")
    for name in ("link", "own"):
        with pytest.raises(SettingsError, match="remove it, or pass another folder"):
            write(tmp_path / name)
        assert (tmp_path / f"{name}.partial" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["lock", "source.json", ".model-00001-of-00002.safetensors.new"])
def test_links_in_a_folder_that_is_being_written_lead_nowhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with FolderWriter(tmp_path / "model", MANIFEST, RandomModel(MANIFEST).routing, ByteTokenizer()):
        pass
    planted = tmp_path / "model.partial" / name
    planted.unlink(missing_ok=True)
    planted.symlink_to(tmp_path / "letter.txt")
    with suppress(UserError):  # a lock that is a link is refused
        write(tmp_path / "model")
    assert (tmp_path / "letter.txt").read_text() == "dear"
