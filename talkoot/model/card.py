"""The model card of an exported folder: what the model is, where it comes from, and what is known about it."""

import hashlib
import html
import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from dht.manifest import Manifest
from dht.uid import UID
from peer import SOFTWARE_VERSION
from peer.errors import WireError
from peer.files import write_atomically
from peer.formatting import counted, printable
from talkoot.model.dense import ExportedDense
from talkoot.model.folder import PYTHON_FILES, python_file
from talkoot.partial import naming_failures
from trainer_client.training.record import perplexity

REPLICAS = "replicas.json"
_MOST_NAMES, _MOST_MISSING = 1000, 20
_MOST_NOTE = 10_000
"""The most characters of the user's note about the data."""
_WORST_LOSS = 100.0
"""The largest plausible loss, in nats per token."""
_SYNTAX = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")
_USE = """\
With `pip install torch transformers`, run this in the model's folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
prompt = tokenizer("In the sauna", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
```
"""


class ExpertSource(BaseModel):
    """Where an expert in the folder comes from."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    updates: Annotated[int, Field(ge=0)]
    """Optimizer steps that the parameters have taken."""
    node: str
    """The PeerID of the node that gave them."""
    replicas: dict[str, int]
    """All nodes that served the expert, by PeerID, and the update count that each announced."""


class _Sources(RootModel[dict[str, ExpertSource]]):
    pass


class SourcesFile:
    """`replicas.json` in the folder: where each expert comes from. It is written again after each layer."""

    def __init__(self, folder: Path) -> None:
        """Continues what an earlier export wrote there."""
        self._path = folder / REPLICAS
        self.experts: dict[UID, ExpertSource] = {}
        try:
            read = _Sources.model_validate_json(self._path.read_bytes()).root
            self.experts = {UID.parse(text): source for text, source in read.items()}
        except (OSError, ValidationError, WireError):
            pass  # the file is missing or incomplete: its layers are fetched again

    def of_layer(self, layer: int) -> dict[UID, ExpertSource]:
        return {uid: source for uid, source in self.experts.items() if uid.layer == layer}

    def replace_layer(self, layer: int, experts: Mapping[UID, ExpertSource]) -> None:
        """Raises StartError if the file can't be written."""
        others = {uid: source for uid, source in self.experts.items() if uid.layer != layer}
        self.experts = dict(sorted((others | dict(experts)).items()))
        values = {str(uid): source.model_dump() for uid, source in self.experts.items()}
        with naming_failures(self._path):
            write_atomically(self._path, (json.dumps(values, indent=1) + "\n").encode())


@dataclass(frozen=True, eq=False)
class CardFacts:
    """The contents of a card."""

    swarm_id: str
    manifest: Manifest
    dense: ExportedDense
    experts: Mapping[UID, ExpertSource]
    is_pruned: bool
    """Whether experts were left out because a given text does not use them."""
    figures: Mapping[str, float]
    """Measured at the export: losses in nats per token, by name."""
    names: Collection[str]
    """Names that nodes announce."""
    data_note: str
    exported_at: float


def model_card(facts: CardFacts) -> str:
    """The card in Markdown, with the front matter that model hubs read."""
    manifest = facts.manifest
    parts = [
        _front_matter(manifest),
        f"# {manifest.name}\n\nA language model with a mixture of experts. Volunteers trained it together in the swarm "
        f"`{facts.swarm_id}`, with Talkoot. `talkoot export` {SOFTWARE_VERSION} wrote this folder on "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(facts.exported_at))}.\n",
        f"## Use it\n\n{_USE}",
        _code(),
        _reading(facts),
        _data(facts),
        _figures(facts),
        _experts(facts),
        _contributors(facts),
        _licence(manifest),
        # whole, because a reader would complete a shorter one with the preset's values
        f"## Manifest\n\n```json\n{json.dumps(manifest.model_dump(mode='json'), indent=2)}\n```\n",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(manifest: Manifest) -> str:
    lines = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [talkoot, mixture-of-experts]",
    ]
    if manifest.license is not None:
        lines.append(f"license: {manifest.license.lower()}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _code() -> str:
    hashes = "\n".join(
        f"| `{name}` | `{hashlib.sha256(python_file(name).encode()).hexdigest()}` |" for name in PYTHON_FILES
    )
    return (
        "`trust_remote_code=True` runs two Python files of this folder. They are copies of the release's, and must "
        f"have these checksums:\n\n| file | SHA-256 |\n|---|---|\n{hashes}\n"
    )


def _reading(facts: CardFacts) -> str:
    """The paragraph about a model that reads a memory: what is not in the folder."""
    memory = facts.dense.memory
    if memory is None:
        return ""
    named = (
        f"It learned to read the memory `{_plain(memory.memory)}` of its swarm, which is not in this folder."
    )
    if memory.settings.answers_questions:
        how = (
            'It answers questions. With an invite to the swarm, `talkoot ask --model DIR --join INVITE "…"` finds the '
            "passages, computes here, and names its sources. `transformers` has the generator alone. It continues a "
            "text of four lines: a passage's title, its text, the question, and the answer, which begins with a space "
            f"and ends with a line's end. It has learned with {counted(memory.settings.passages_read, 'passage')} for "
            f"each question, of at most {memory.memory_length} tokens each."
        )
    else:
        how = (
            f"It read {counted(memory.settings.passages_read, 'passage')} for each {memory.memory_chunk} tokens. "
            "`transformers` and `talkoot serve --model` write without them, and worse. In Python, "
            "`talkoot.model.opened.open_model(DIR).model` takes tokens and the tokens of their passages."
        )
    return f"## Memory\n\n{named} {how}\n"


def _data(facts: CardFacts) -> str:
    note = facts.data_note.strip()[:_MOST_NOTE]
    lines = [_plain(line, _MOST_NOTE) for line in note.splitlines()] or ["Not recorded."]
    said = "What it was trained on, according to the person who exported it:\n\n" if note else ""
    return f"## Data\n\n{said}" + "\n".join(lines) + "\n"


def _figures(facts: CardFacts) -> str:
    dense, counts = facts.dense, [source.updates for source in facts.experts.values()]
    rows = [
        ("dense part", f"from {dense.origin}"),
        ("training steps in the dense part, with those averaged in from other trainers", f"{dense.steps:,}"),
        ("experts", f"{len(facts.experts)} of {facts.manifest.experts_total}"),
        ("updates of an expert", f"{median_low(counts)} (median)" if counts else "none"),
    ]
    # a stranger may have announced it
    if (loss := dense.validation_loss) is not None and 0 <= loss <= _WORST_LOSS:
        measured = f", measured after step {step:.0f}" if (step := dense.validated_after) is not None else ""
        rows.append(
            (
                "validation loss",
                f"{loss:.4f} nats per token (perplexity {perplexity(loss):.2f}), on its trainer's text{measured}",
            )
        )
    rows += [(name, f"{loss:.4f} nats per token") for name, loss in facts.figures.items()]
    table = "".join(f"| {name} | {text} |\n" for name, text in rows)
    return f"## Figures\n\n| | |\n|---|---|\n{table}"


def _experts(facts: CardFacts) -> str:
    manifest = facts.manifest
    rows = []
    for layer in range(manifest.model.layers):
        sources = [source for uid, source in facts.experts.items() if uid.layer == layer]
        taken = [source.updates for source in sources]
        replicas = [count for source in sources for count in source.replicas.values()]
        rows.append(
            f"| {layer} | {len(sources)} | {_spread(taken)} | {len(replicas)} | {_spread(replicas)} |\n"
        )
    text = (
        "## Experts\n\nThe parameters of each expert are those of one of its replicas. The update counts are those "
        f"that the nodes announced: the least, the median and the most. `{REPLICAS}` lists all of them.\n\n"
        "| layer | experts | updates | replicas | updates of the replicas |\n|---|---|---|---|---|\n"
        + "".join(rows)
        + "\nAn export takes minutes. If the swarm was training meanwhile, the parts of this model are from different "
        "moments: it is a smear over that time, not a snapshot.\n"
    )
    if missing := [uid for uid in manifest.uids() if uid not in facts.experts]:
        named = ", ".join(map(str, missing[:_MOST_MISSING]))
        more = f" and {len(missing) - _MOST_MISSING} more" if len(missing) > _MOST_MISSING else ""
        why = "were left out" if facts.is_pruned else "had no host that gave them"
        text += (
            f"\n**{len(missing)} of {manifest.experts_total} experts {why}** and are masked; tokens go to others: "
            f"{named}{more}.\n"
        )
    return text


def _spread(counts: Sequence[int]) -> str:
    return f"{min(counts)} / {median_low(counts)} / {max(counts)}" if counts else "–"


def _contributors(facts: CardFacts) -> str:
    names = sorted({_plain(name) for name in facts.names if name}, key=str.lower)[:_MOST_NAMES]
    if not names:
        return ""
    return (
        "## Contributors\n\nNodes that hosted experts at the time of the export, and announce a name: "
        + ", ".join(names)
        + ".\n"
    )


def _licence(manifest: Manifest) -> str:
    if manifest.license is None:
        return (
            "## Licence\n\nThe swarm's manifest names none. Ask its founder before you pass this model on.\n"
        )
    return f"## Licence\n\n{manifest.license}, as the swarm's manifest says.\n"


def _plain(text: str, most: int = 200) -> str:
    """The text with all Markdown and HTML escaped."""
    return _SYNTAX.sub(r"\\\1", html.escape(printable(text, most), quote=False))
