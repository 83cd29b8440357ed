"""The commands of the README and the programs in `examples/`, run against a real node as a stranger would run them."""

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from expert_fakes import make_manifest
from model_folders import RandomModel
from preloaded import run_preloaded

from benchmarks.village import RunningNode, running_village
from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import build_block
from peer import SOFTWARE_VERSION
from peer.identity import VALID_FROM
from talkoot.model.folder import ModelFolder

SWARM = """
name = "sauna"
preset = "none"
[model]
layers = 2
hidden = 32
heads = 4
context = 32
feed_forward = 64
[experts]
grid = [2, 2]
kind = "ffn"
[routing]
top_k = 2
"""

NPM_FLAGS = ("--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000")
NO_REGISTRY = "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|E40[134]|E5.."
"""Errors by which npm says that it cannot reach its registry."""

TEN_LINES = """
import sys, torch
from talkoot import RemoteMixtureOfExperts, SwarmClient

with SwarmClient.join(sys.argv[1], state=sys.argv[2], router="switch") as swarm:
    layer = swarm.mixture(layer=0)
    assert isinstance(layer, RemoteMixtureOfExperts)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), layer, torch.nn.Linear(32, 1))
    model(torch.randn(4, 16, 8)).square().mean().backward()
    print([name for name, p in model.named_parameters() if p.grad is None])
    swarm.mixture(layer=2)
"""

OPEN = """
import {{ Node }} from './node.js';
try {{
  await Node.open('127.0.0.1', {port}, Buffer.alloc(34), 'sauna', []);
}} catch (error) {{
  console.log(error.message);
}}
"""

PREAMBLE = """
import sys
invite, = sys.argv[1:]
import torch

torch.manual_seed(0)

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.feed_forward = torch.nn.Identity()

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = torch.nn.Linear(8, 32), Block(), torch.nn.Linear(32, 1)
    def forward(self, x):
        return self.last(self.block.feed_forward(self.first(x)))

losses = []
def loss(answer, y):
    losses.append((answer - y).square().mean())
    return losses[-1]

model, batches = Model(), [(torch.ones(4, 16, 8), torch.ones(4, 16, 1))] * 8
"""

REPLACE = """
import runpy
sys.argv = ["examples/replace_ffn.py", invite, "--steps", "20"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


TWICE = """
import os, runpy, sys
_, program, text, *models = sys.argv
for model in models:
    sys.argv = [program, model, text, "--out", models[-1], "--steps", "50", "--batch-size", "4"]
    sys.argv += ["--learning-rate", "3e-3"]
    runpy.run_path(program, run_name="__main__")
print("idle threads:", os.environ["OMP_WAIT_POLICY"])
"""
"""Runs the program twice in one process, since loading `transformers` takes seconds."""


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with running_village(
        SWARM, 1, 8, ["--threads", "1", "--niceness", "0", "--drain-timeout", "0"]
    ) as running:
        yield running


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    words = ("-W", "ignore", *map(str, arguments))
    return run_preloaded(*words, env=os.environ | {"HF_HUB_OFFLINE": "1"}, limit_s=240)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the JavaScript client, its packages, and `proto/` where the client looks for it."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    root = tmp_path_factory.mktemp("javascript")
    client = root / "examples" / "clients" / "node"
    shutil.copytree("examples/clients/node", client, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree("proto", root / "proto")
    try:
        ended = subprocess.run(
            [npm, "ci", *NPM_FLAGS], cwd=client, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip("no npm registry answers in time")
    if re.search(rf"npm (error|ERR!) code ({NO_REGISTRY})", ended.stderr):
        pytest.skip("no npm registry answers")
    assert ended.returncode == 0, ended.stderr
    return client


def run_node(folder: Path, *arguments: str) -> str:
    ended = subprocess.run(["node", *arguments], cwd=folder, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_client_in_javascript_makes_a_forward_call(node: RunningNode, javascript: Path) -> None:
    """This test comes first, since those below train the experts."""
    said = run_node(javascript, "forward.js", str(node.invite))
    assert f"swarm {node.invite.keys.swarm_id}: this node runs {SOFTWARE_VERSION} and hosts 8 experts" in said
    asked = [UID.parse(uid) for uid in re.findall(r"^expert (\S+): 0 updates$", said, re.MULTILINE)]
    answers = torch.tensor(
        [[*map(float, row.split())] for row in re.findall(r"^row \d: (.+)$", said, re.MULTILINE)]
    )
    manifest = Manifest.from_toml(node.folder / "swarm.toml")
    rows = torch.arange(3 * manifest.width).reshape(3, -1).sin()
    lengths, positions = torch.tensor([3]), torch.arange(3)
    with torch.no_grad():
        one, other = (build_block(manifest, uid)(rows, lengths, positions) - rows for uid in asked)
    torch.testing.assert_close(answers, (one + 2 * other) / 3, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "usage: node forward.js INVITE"),
        (["talkoot2abc"], 1, "error: the invite is incomplete or mistyped\n"),
    ],
)
def test_client_in_javascript_says_in_a_line_what_is_wrong_with_the_invite(
    javascript: Path, arguments: list[str], status: int, said: str
) -> None:
    ended = subprocess.run(
        ["node", "forward.js", *arguments], cwd=javascript, capture_output=True, text=True, timeout=100
    )
    assert (ended.returncode, ended.stdout) == (status, "")
    assert ended.stderr.startswith(said)
    assert ended.stderr.count("\n") == 1


def test_client_in_javascript_refuses_a_server_with_a_key_of_another_kind(
    javascript: Path, tmp_path: Path
) -> None:
    key, name = rsa.generate_private_key(65537, 2048), x509.Name([])
    until = datetime(2099, 1, 1, tzinfo=UTC)
    shown = x509.CertificateBuilder(name, name, key.public_key(), 1, VALID_FROM, until).sign(
        key, hashes.SHA256()
    )
    pem = tmp_path / "server.pem"
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem.write_bytes(
        key.private_bytes(encoding, form, serialization.NoEncryption()) + shown.public_bytes(encoding)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor() as pool:
        listening.settimeout(60)

        def serve() -> None:
            accepted, _ = listening.accept()
            accepted.settimeout(60)
            with (
                contextlib.suppress(ConnectionError, ssl.SSLError),
                context.wrap_socket(accepted, server_side=True) as tls,
            ):
                tls.recv(1)

        serving = pool.submit(serve)
        port = listening.getsockname()[1]
        said = run_node(javascript, "--input-type=module", "-e", OPEN.format(port=port))
        serving.result()
    assert said == "another peer answers there\n"


def test_client_in_javascript_makes_the_bytes_of_the_vectors(javascript: Path) -> None:
    assert run_node(javascript, "vectors.js") == "all vectors agree\n"


def test_the_nine_lines_of_the_readme_train_and_a_model_learns_with_experts_for_its_feed_forward_blocks(
    node: RunningNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one process, since optimizers import torch's compiler, which takes seconds."""
    (lines,) = re.findall(r"^```python\n(.*?)^```", Path("README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 9
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    told = "print(len(losses), losses[-1].item() < losses[0].item(), type(model.block.feed_forward).__name__)"
    ended = run("-c", "\n".join([PREAMBLE, lines, told, REPLACE]), node.invite)
    assert ended.returncode == 0, ended.stderr
    first, *steps = ended.stdout.splitlines()
    assert first == "8 True RemoteMixtureOfExperts"
    learned = [float(loss) for loss in re.findall(r"loss (\S+)", "\n".join(steps))]
    assert learned[-1] < 0.95 * learned[0], steps


@pytest.mark.slow
def test_ten_lines_are_enough_and_a_layer_that_is_not_there_is_named(
    node: RunningNode, tmp_path: Path
) -> None:
    ended = run("-c", TEN_LINES, node.invite, tmp_path)
    assert ended.stdout == "[]\n", ended.stderr
    assert "SettingsError: layer 2: this swarm has layers 0 to 1" in ended.stderr


def test_the_notebook_trains_keeps_the_model_and_goes_on_without_the_swarm(
    node: RunningNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands run in forks, and only the last cell, which loads `transformers`, in a process of its own."""
    text, kept = tmp_path / "mine.txt", tmp_path / "kept"
    text.write_text("The kettle sings, and the sauna is warm. " * 200)
    notebook = json.loads(Path("examples/keep_a_model.ipynb").read_text())
    form, *cells, last = [
        "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"
    ]
    for name, value in {"INVITE": node.invite, "TEXT": str(text), "FOLDER": str(kept)}.items():
        form, count = re.subn(rf'^{name} = ".*?"', f'{name} = "{value}"', form, flags=re.MULTILINE)
        assert count == 1, name
    form, count = re.subn(r"^STEPS = \d+", "STEPS = 40", form, flags=re.MULTILINE)
    assert count == 1

    def forked(words: list[str], *, check: bool, **options: Any) -> "subprocess.CompletedProcess[str]":
        assert (words[:3], check) == ([sys.executable, "-m", "talkoot"], True)
        ended = run(*words[1:])
        assert ended.returncode == 0, ended.stderr
        return ended

    with monkeypatch.context() as patched:
        patched.setattr("subprocess.run", forked)
        exec("\n".join([form, *cells]), {})
    said = capsys.readouterr().out
    before, after = map(float, re.findall(r"loss (\S+) -> (\S+)", said)[0])
    assert after < 0.8 * before
    assert "model.safetensors.index.json" in said
    ended = run(
        "-c", "\n".join([form, "from pathlib import Path; model_folder = Path(FOLDER, 'model')", last])
    )
    assert ended.returncode == 0, ended.stderr
    written = ended.stdout[ended.stdout.index("The kettle sings") :]
    assert len(written.encode()) > 32, "until the context is full"


def test_an_exported_model_is_trained_on_with_ones_own_text(tmp_path: Path) -> None:
    manifest = make_manifest((2, 2), k=2, layers=2, hidden=16, context=32)
    folder = RandomModel(manifest).write(tmp_path / "model")
    text = tmp_path / "mine.txt"
    text.write_text("The kettle sings, and the sauna is warm. " * 40)
    ended = run("-c", TWICE, "examples/fine_tune.py", text, folder, tmp_path / "mine")
    assert ended.returncode == 0, ended.stderr
    assert "longer than" not in ended.stderr
    losses = re.findall(r"loss (\S+)", ended.stdout)
    before, after, again, last = losses
    assert float(last) < float(after) < 0.8 * float(before)
    assert again == after, "what was saved is what was learned"
    assert ModelFolder.open(tmp_path / "mine").live == set(manifest.uids())
    assert "idle threads: passive" in ended.stdout


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model", "no folder some/model: pass one that `talkoot export` wrote"),
        ("text", "no file mine.txt: pass"),
    ],
)
def test_a_model_or_text_that_is_not_there_is_named_and_nothing_is_downloaded(
    tmp_path: Path, missing: str, said: str
) -> None:
    folder = "some/model" if missing == "model" else tmp_path
    ended = run("examples/fine_tune.py", folder, "mine.txt", "--out", tmp_path / "mine")
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
