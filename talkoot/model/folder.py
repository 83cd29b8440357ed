"""A model as a folder of standard files, which `transformers` can also load.

`config.json` holds the manifest and the routing. The weights are float32 in safetensors files: the dense part in the
first, with the names of `LanguageModel`, and the experts of a layer in one file each, as
`experts.<layer>.<i>_<j>.<parameter>`. Missing experts are named in `config.json`, and no token goes to them.

A folder may come from anywhere. Reading it parses JSON and safetensors, and runs none of its Python.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dht.manifest import Manifest, parse_uid
from dht.uid import UID
from expert_server.blocks import OWN_KINDS, weightless_block
from peer.checkpoints import Form, form_of, is_finite, nbytes_of
from peer.errors import DataError, ModelError, SettingsError, StateError, WireError
from peer.files import kind_of, write_atomically
from peer.formatting import counted, printable
from peer.layers import make_norm
from peer.platform.files import open_plainly, sync_folder
from peer.platform.machine import require_free_memory
from peer.settings import describe_validation_error
from talkoot.model.reading import FolderMemory
from talkoot.model.tokenizer import parse_tokenizer, tokenizer_json
from talkoot.partial import LOCK, PARTIAL, PartialFolder, naming_failures, open_for_writing
from talkoot.train.local import run_at_once
from trainer_client.averaging.dense_part import require_bounded
from trainer_client.data.tokenizer import Tokenizer
from trainer_client.model import LocalPart, require_no_encoder
from trainer_client.moe import Experts, RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import Balance, RouterName, Sampling

FORMAT_VERSION = 1
CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "tokenizer.json"
CHAT_FORMAT = "chat_format.json"
"""A file that is not written here: see `talkoot.serve.chat`."""
CARD = "README.md"
PYTHON_FILES = ("configuration_talkoot.py", "modeling_talkoot.py")
"""Copied from this release into every folder. They import only torch and transformers."""

_MOST_BYTES = {CONFIG: 2**20, TOKENIZER: 2**24, INDEX: 2**25, CHAT_FORMAT: 2**16}
"""The limit for each JSON file. Parsed, it takes up to 40 times as much memory."""
_MOST_HEADERS = 2**26
"""The limit for the headers of all weight files together, in bytes: parsed, they take much more memory, too."""
_SOURCE = "source.json"
"""The file in an unfinished folder that says which model it is of."""
_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes in which `transformers` may have written a folder."""


class FolderRouting(BaseModel):
    """The settings, in addition to the manifest, on which evaluation of the model depends."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    router: RouterName
    top_k: Annotated[int, Field(ge=1, le=64)]
    balance: Balance

    @classmethod
    def of(cls, routing: Routing) -> Self:
        return cls(router=routing.name, top_k=routing.k, balance=routing.balance or routing.router.balance)

    def routing(self, manifest: Manifest) -> Routing:
        """The routing for evaluation. Without a limit of nodes, because all experts are in one place."""
        prefix = manifest.routing.prefix
        return Routing(self.router, self.top_k, "sequence" if prefix else "token", prefix, self.balance)


class _Config(BaseModel):
    """The keys of `config.json` that are read. `transformers` adds more."""

    model_type: Literal["talkoot"]
    format_version: int
    manifest: dict[str, Any]
    routing: FolderRouting
    vocab_size: Annotated[int, Field(ge=1, le=2**16)]
    memory: FolderMemory | None = None
    missing_experts: Annotated[tuple[str, ...], FailFast()]


# What a folder must hold


def _forms(prefix: str, module: nn.Module) -> dict[str, Form]:
    return {prefix + name: form_of(tensor) for name, tensor in module.state_dict().items()}


def dense_forms(
    manifest: Manifest, routing: FolderRouting, vocabulary: int, memory: FolderMemory | None = None
) -> dict[str, Form]:
    """The tensors of a `LanguageModel`, in its order, and of what reads a memory. Allocates nothing.

    Raises UserError if the model has an encoder, or can't read a memory in this way.
    """
    require_no_encoder(manifest)
    spec, how = manifest.model, routing.routing(manifest)
    table = ((vocabulary, spec.hidden), torch.float32)
    with torch.device("meta"):
        # not the whole model: on this device, normal_ would import torch's compiler, which takes a second
        local, norm = LocalPart(spec), make_norm(spec.norm, spec.hidden)
        # which calls nobody
        mixture = RemoteMixtureOfExperts(0, manifest, cast(Experts, None), run_at_once, how)
    forms: dict[str, Form] = {"embedding.weight": table}
    for layer in range(spec.layers):
        forms |= _forms(f"local.{layer}.", local)
    forms |= _forms("norm.", norm) | {"head.weight": table}
    for layer in range(spec.layers):
        forms |= _forms(f"mixtures.{layer}.", mixture)
    return forms if memory is None else forms | memory_forms(manifest, memory)


def memory_forms(manifest: Manifest, memory: FolderMemory) -> dict[str, Form]:
    """The tensors of what reads a memory. Allocates nothing. Raises UserError."""
    with torch.device("meta"):
        modules = memory.modules(manifest)
    return {name: form for prefix, module in modules.items() for name, form in _forms(prefix, module).items()}


def expert_forms(manifest: Manifest) -> dict[str, Form]:
    """The tensors of one expert's block. Raises SettingsError for kinds of other packages."""
    kind = manifest.experts.kind
    if kind not in OWN_KINDS:
        raise SettingsError(
            f"experts of kind {kind!r} need code of another package, which a model folder can't hold; it can hold "
            f"experts of {' and '.join(sorted(OWN_KINDS))}"
        )
    return _forms("", weightless_block(manifest))


def expert_prefix(uid: UID) -> str:
    """The prefix of the names of an expert's tensors."""
    return f"experts.{uid.layer}.{'_'.join(map(str, uid.coordinate))}."


# Writing


class FolderWriter:
    """Writes a folder. After a failure, complete files stay, and the next writer of the same model continues
    with them.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        routing: FolderRouting,
        tokenizer: Tokenizer,
        memory: FolderMemory | None = None,
    ) -> None:
        """Raises UserError if the path is in use, or the kind of experts can't be in a folder."""
        self._manifest, self._routing, self._tokenizer, self._memory = manifest, routing, tokenizer, memory
        self._dense = dense_forms(manifest, routing, len(tokenizer.token_bytes), memory)
        self._expert = expert_forms(manifest)
        self._folder = PartialFolder(path)
        self.path, self.partial = path, self._folder.partial
        with naming_failures(path):
            try:
                self._keep_what_fits()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Leaves complete files for another writer to continue with."""
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has_layer(self, layer: int) -> bool:
        """Whether an earlier writer has written it."""
        return self._file(1 + layer).exists()

    def write_dense(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: the state of a `LanguageModel`. Raises ModelError if they are not, and StartError."""
        _require_forms(tensors, self._dense, "the dense part")
        self._write(0, self._dense, ((name, tensors[name]) for name in self._dense))

    def write_layer(self, layer: int, experts: Iterable[tuple[UID, Mapping[str, Tensor]]]) -> None:
        """Writes the experts of a layer, given their blocks' tensors, without holding them in memory.

        Raises ModelError if a tensor is not one of a block's, and StartError if the file can't be written.
        """
        names = {
            expert_prefix(uid) + name: form
            for uid in self._manifest.uids()
            if uid.layer == layer
            for name, form in self._expert.items()
        }
        self._write(1 + layer, names, self._of_experts(layer, experts))

    def finish(self, card: str) -> None:
        """Writes everything but the weights, and moves the folder to its place. `card`: the text of the model card."""
        with naming_failures(self.path):
            places = self._places()
            there = {name for name in places if name.startswith("experts.")}
            first = next(iter(self._expert))
            missing = [str(uid) for uid in self._manifest.uids() if expert_prefix(uid) + first not in there]
            digests = {name: _digest(self.partial / name) for name in sorted(set(places.values()))}
            index = {"metadata": {"total_size": self._size(places)}, "weight_map": places, "sha256": digests}
            self._write_json(INDEX, index)
            self._write_json(CONFIG, self._config(missing))
            self._write_json("generation_config.json", _generation_config(self._manifest.model.context))
            self._write_text(TOKENIZER, tokenizer_json(self._tokenizer))
            self._write_json("tokenizer_config.json", self._tokenizer_config())
            for name in PYTHON_FILES:
                self._write_text(name, python_file(name))
            self._write_text(CARD, card)
            self._folder.finish(_SOURCE)

    def _keep_what_fits(self) -> None:
        """Removes the files of an earlier writer, unless it wrote the same model."""
        source = {
            "manifest": self._manifest.model_dump(mode="json"),
            "routing": self._routing.model_dump(mode="json"),
            "tokenizer": hashlib.sha256(self._tokenizer.to_json().encode()).hexdigest(),
            "memory": None if self._memory is None else self._memory.model_dump(mode="json"),
        }
        data = json.dumps(source, indent=1).encode()
        file = self.partial / _SOURCE
        is_same = file.exists() and file.read_bytes() == data
        for path in self.partial.iterdir():
            if path.name != LOCK and not (is_same and not path.name.startswith(".")):
                path.unlink()
        write_atomically(file, data)

    def _of_experts(
        self, layer: int, experts: Iterable[tuple[UID, Mapping[str, Tensor]]]
    ) -> Iterator[tuple[str, Tensor]]:
        for uid, tensors in experts:
            assert uid.layer == layer, f"expert {uid} is not of layer {layer}"
            _require_forms(tensors, self._expert, f"expert {uid}")
            for name in self._expert:
                yield expert_prefix(uid) + name, tensors[name]

    def _write(self, number: int, most: Mapping[str, Form], tensors: Iterable[tuple[str, Tensor]]) -> None:
        path = self._file(number)
        temporary = path.with_name(f".{path.name}.new")
        try:
            _write_safetensors(temporary, most, tensors)
            with naming_failures(path):
                os.replace(temporary, path)
                sync_folder(self.partial)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def _count(self) -> int:
        return 1 + self._manifest.model.layers

    def _file(self, number: int) -> Path:
        return self.partial / f"model-{number + 1:05}-of-{self._count:05}.safetensors"

    def _places(self) -> dict[str, str]:
        """The file of each tensor."""
        places: dict[str, str] = {}
        for number in range(self._count):
            path = self._file(number)
            assert path.exists(), f"{path.name} was not written"
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path.name)
        return places

    def _size(self, names: Iterable[str]) -> int:
        forms = (self._dense.get(name) or self._expert[name.split(".", 3)[3]] for name in names)
        return nbytes_of(forms)

    def _config(self, missing: list[str]) -> dict[str, Any]:
        return {
            "architectures": ["TalkootForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_talkoot.TalkootConfig",
                "AutoModelForCausalLM": "modeling_talkoot.TalkootForCausalLM",
            },
            "model_type": "talkoot",
            "dtype": "float32",
            "format_version": FORMAT_VERSION,
            "vocab_size": len(self._tokenizer.token_bytes),
            "manifest": self._manifest.model_dump(mode="json"),
            "routing": self._routing.model_dump(mode="json"),
            "missing_experts": missing,
        } | self._reading()

    def _reading(self) -> dict[str, Any]:
        """What `config.json` says about a memory. `beside`: the shapes of the tensors that read it, for
        `transformers`.
        """
        if self._memory is None:
            return {}
        forms = memory_forms(self._manifest, self._memory)
        return {
            "memory": self._memory.model_dump(mode="json"),
            "beside": {name: list(shape) for name, (shape, _) in forms.items()},
        }

    def _tokenizer_config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._manifest.model.context,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        write_atomically(self.partial / name, text.encode())


def python_file(name: str) -> str:
    """The text of one of the Python files in a folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _generation_config(context: int) -> dict[str, Any]:
    """Samples as `talkoot generate` does, until the context is full."""
    sampling = Sampling()
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "max_length": context,
    }


def _write_safetensors(path: Path, most: Mapping[str, Form], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a file with one tensor in memory at a time. `most`: all tensors that the file may have. The header has
    room for them, and is written last.
    """
    room = len(_header(most))
    forms: dict[str, Form] = {}
    with naming_failures(path):
        file = open_for_writing(path)
    try:
        file.seek(room)
        # errors of the tensors' source pass unchanged
        for name, tensor in tensors:
            forms[name] = form_of(tensor)
            with naming_failures(path):
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        with naming_failures(path):
            file.seek(0)
            file.write(_header(forms, room))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):  # on a full disk, closing tries to write the rest
            file.close()


def _header(forms: Mapping[str, Form], size: int | None = None) -> bytes:
    """The header of a safetensors file with these tensors, in this order. It is padded with spaces to `size`, or to a
    multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in forms.items():
        assert dtype is torch.float32, f"{name} is {dtype}"
        start, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-len(text) // 8) * 8 if size is None else size - 8
    assert len(text) <= length, "more tensors than there was room for"
    return length.to_bytes(8, "little") + text.ljust(length)


def _require_forms(tensors: Mapping[str, Tensor], expected: Mapping[str, Form], what: str) -> None:
    """Raises ModelError."""
    _require_names(tensors, expected, what)
    for name, form in expected.items():
        if form_of(tensors[name]) != form:
            raise ModelError(f"{name} of {what} is {form_of(tensors[name])}; expected {form}")


def _require_names(names: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raises ModelError."""
    wanted = set(expected)
    if different := wanted ^ set(names):
        name = min(different)
        raise ModelError(
            f"{what} {'lacks' if name in wanted else 'has the unknown tensor'} {printable(name)}"
        )


# Reading


class ModelFolder:
    """A folder to read from. Tensors are read when they are asked for."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        routing: FolderRouting,
        tokenizer: Tokenizer,
        live: frozenset[UID],
        places: Mapping[str, Path],
        digests: Mapping[Path, str],
        memory: FolderMemory | None,
    ) -> None:
        """See `open`. `places`: the file of each tensor. `digests`: the SHA-256 of files, where it is known."""
        self.path = path
        self.manifest = manifest
        self.routing = routing
        self.tokenizer = tokenizer
        self.live = live
        """The experts in the folder."""
        self.memory = memory
        """How the model reads a memory; None: it reads none."""
        self._places = places
        self._unchecked = dict(digests)
        """The SHA-256 of each file from which nothing was read yet."""
        self._files: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Checks names, shapes and dtypes of all tensors. Their numbers and files are checked when they are read.

        Raises UserError if the folder is incomplete, or this software can't use it.
        """
        with _refusing(path):
            kind = kind_of(path)
        if kind != stat.S_IFDIR:
            raise ModelError(f"no model folder {path}: pass one that `talkoot export` wrote")
        if not os.path.lexists(path / CONFIG):
            stopped = path.suffix == PARTIAL
            hint = (
                "run the same `talkoot export` again"
                if stopped
                else "pass a folder that `talkoot export` wrote"
            )
            raise ModelError(f"{path} has no {CONFIG}: {hint}")
        try:
            config = _Config.model_validate_json(read_file(path, CONFIG))
            if config.format_version != FORMAT_VERSION:
                later = config.format_version > FORMAT_VERSION
                raise ModelError(
                    f"{path} has format version {config.format_version}, this software reads {FORMAT_VERSION}"
                    + (": update Talkoot" if later else "")
                )
            manifest = _manifest(config.manifest)
            missing = frozenset(parse_uid(text, manifest) for text in config.missing_experts)
        except ValidationError as error:
            raise ModelError(
                f"{path / CONFIG} is not the configuration of a Talkoot model: "
                + printable(describe_validation_error(error, _Config), 1000)
            ) from error
        except WireError as error:
            raise ModelError(f"{path / CONFIG}: missing_experts: {error}") from error
        tokenizer = _tokenizer_of(path)
        if len(tokenizer.token_bytes) != config.vocab_size:
            raise ModelError(
                f"{path} has a tokenizer of {len(tokenizer.token_bytes)} tokens, but a model of {config.vocab_size}"
            )
        _require_routing(path, config.routing, manifest)
        places, digests = _places_in(path)
        if (there := manifest.model.layers * manifest.experts.count - len(missing)) > len(places):
            raise ModelError(
                f"{path} lacks experts: it has {len(places)} tensors, and should have {there} experts"
            )
        live = frozenset(manifest.uids()) - missing
        folder = cls(path, manifest, config.routing, tokenizer, live, places, digests, config.memory)
        folder._check_forms()
        return folder

    def close(self) -> None:
        self._files.clear()

    @cached_property
    def _dense_forms(self) -> dict[str, Form]:
        return dense_forms(self.manifest, self.routing, len(self.tokenizer.token_bytes), self.memory)

    @cached_property
    def _expert_forms(self) -> dict[str, Form]:
        return expert_forms(self.manifest)

    @property
    def dense_nbytes(self) -> int:
        """The size of the dense part in memory."""
        return nbytes_of(self._dense_forms.values())

    @property
    def expert_nbytes(self) -> int:
        """The size of one expert in memory."""
        return nbytes_of(self._expert_forms.values())

    @property
    def nbytes(self) -> int:
        """The size of all tensors in memory."""
        return self.dense_nbytes + len(self.live) * self.expert_nbytes

    def require_memory(self, size: int) -> None:
        """Raises ModelError unless this many bytes are free. The file of a huge model may take next to no disk."""
        require_free_memory(size, f"reading the model in {self.path}", ModelError)

    def dense(self) -> dict[str, Tensor]:
        """The state of a `LanguageModel`, float32. Raises ModelError if a file is damaged or a number is not finite."""
        tensors = {name: self._tensor(name) for name in self._dense_forms}
        try:
            require_bounded({name: tensor for name, tensor in tensors.items() if ".balance." in name})
        except StateError as error:
            raise ModelError(f"{self.path}: {error}") from error
        return tensors

    def expert(self, uid: UID) -> dict[str, Tensor]:
        """The tensors of a live expert's block, float32. Raises ModelError if a file is damaged or a number is not
        finite.
        """
        assert uid in self.live, f"expert {uid} is missing"
        return {name: self._tensor(expert_prefix(uid) + name) for name in self._expert_forms}

    def _check_forms(self) -> None:
        expected = dict(self._dense_forms)
        for uid in sorted(self.live):
            expected |= {expert_prefix(uid) + name: form for name, form in self._expert_forms.items()}
        _require_names(self._places, expected, str(self.path))
        for name, (shape, _) in expected.items():
            with _refusing(self._places[name]):
                found = self._file(name).get_slice(name)
                if tuple(found.get_shape()) != shape or found.get_dtype() not in _FLOATS:
                    raise ModelError(
                        f"{name} in {self._places[name]} is {found.get_dtype()} {found.get_shape()}; expected floats "
                        f"{list(shape)}"
                    )

    def _tensor(self, name: str) -> Tensor:
        with _refusing(self._places[name]):
            self._check_file(self._places[name])
            tensor: Tensor = self._file(name).get_tensor(name).float().contiguous()
        if not is_finite(tensor):
            raise ModelError(f"{name} in {self._places[name]} has numbers that are not finite")
        return tensor

    def _check_file(self, path: Path) -> None:
        """Compares the file with its SHA-256, once. Raises OSError and ModelError."""
        digest = self._unchecked.pop(path, None)
        if digest is not None and digest != _digest(path):
            raise ModelError(
                f"{path} is damaged: its SHA-256 is not the one in {INDEX}. Copy the folder again; if you changed the "
                f'weights on purpose, remove "sha256" from {INDEX}'
            )

    def _file(self, name: str) -> Any:
        path = self._places[name]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]


def _manifest(values: dict[str, Any]) -> Manifest:
    """Also accepts a folder of another protocol version. Raises ValidationError."""
    values = {key: value for key, value in values.items() if key != "protocol_version"}
    return Manifest.model_validate_json(json.dumps(values))


def _require_routing(path: Path, routing: FolderRouting, manifest: Manifest) -> None:
    router = routing.routing(manifest).router
    if routing.top_k > manifest.routing.top_k or (router.only_k and routing.top_k != router.k):
        raise ModelError(
            f"{path / CONFIG}: {routing.router} can't send each token to {counted(routing.top_k, 'expert')} here"
        )


def _tokenizer_of(path: Path) -> Tokenizer:
    try:
        return parse_tokenizer(read_file(path, TOKENIZER).decode())
    except (DataError, UnicodeDecodeError) as error:
        raise ModelError(f"{path / TOKENIZER}: {printable(str(error))}") from error


def _places_in(path: Path) -> tuple[dict[str, Path], dict[Path, str]]:
    """The file of each tensor: from the index, or all in one file; and the SHA-256 of files that the index gives.
    Raises ModelError.
    """
    single = path / "model.safetensors"
    if not (path / INDEX).exists() and single.exists():
        return _names_in([single]), {}
    try:
        index = json.loads(read_file(path, INDEX))
        weight_map: dict[str, str] = index["weight_map"]
        digests = {path / name: str(digest) for name, digest in index.get("sha256", {}).items()}
        names = {name for name in weight_map.values() if _WEIGHTS.fullmatch(name)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path / INDEX} is not an index: {printable(repr(error))}") from error
    if strange := set(weight_map.values()) - names:
        raise ModelError(f"{path / INDEX} names the file {printable(min(strange))!r}")
    places = _names_in([path / name for name in sorted(names)])
    for name, file_name in weight_map.items():
        if places.get(name) != path / file_name:
            raise ModelError(f"{path / INDEX} has {printable(name)} in {file_name}, where it is not")
    return places, digests


def _names_in(files: Iterable[Path]) -> dict[str, Path]:
    """The file of each tensor in these safetensors files. Raises ModelError."""
    places: dict[str, Path] = {}
    left = _MOST_HEADERS
    for path in files:
        with _refusing(path):
            with _opened(path) as file:
                left -= int.from_bytes(file.read(8), "little")
            if left < 0:
                raise ModelError(f"{path}: the names of its tensors and those before take too much memory")
            with safe_open(path, framework="pt") as weights:
                places |= dict.fromkeys(weights.keys(), path)
    return places


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns errors of the library safetensors and of the disk into a ModelError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ModelError(f"{path} can't be read: {printable(reason)}") from error


def read_file(folder: Path, name: str) -> bytes:
    """One of the JSON files. Raises ModelError, also if it is a link or too large."""
    path, most = folder / name, _MOST_BYTES[name]
    with _refusing(path), _opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ModelError(f"{path} has more than {most} bytes")
    return data


def _digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError and ModelError."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> BufferedReader:
    """Raises OSError, and ModelError if the path leads out of the folder or is not a file."""
    if path.is_symlink():
        raise ModelError(f"{path} is a link: copy the folder with the files themselves (cp -rL)")
    file = os.fdopen(open_plainly(path, os.O_RDONLY), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ModelError(f"{path} is not a file")
    return file
