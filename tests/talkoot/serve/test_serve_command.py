"""The command as users run it: with a swarm, with a folder, and how it ends."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from commands import wait_until
from model_folders import RandomModel
from openai_client import openai_client
from other_processes import gone
from preloaded import Preloaded
from served_model import LIMIT_S, served
from training_swarm import MANIFEST, TEXT, Founder, founded, talkoot

from peer.errors import ModelError, RevokedInviteError
from peer.loop import LoopThread
from talkoot.serve.chat import ChatFormat, Message
from talkoot.serve.model import model_of_folder
from trainer_client.client import SwarmClient
from trainer_client.inference import decoded, generate
from trainer_client.settings import Sampling


@pytest.fixture(scope="module")
def founder(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    with founded(loop, tmp_path_factory.mktemp("founder"), experts=8) as running:
        yield running


@pytest.fixture(scope="module")
def run(founder: Founder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a run with two steps."""
    state = tmp_path_factory.mktemp("trained")
    text = state / "sauna.txt"
    text.write_text(TEXT[:900])
    quick = ("--batch-size", 2, "--threads", 1, "--call-deadline-s", 60, "--steps", 2)
    ended = talkoot("train", "--join", founder.invite, "--state", state, "--data", text, *quick)
    assert ended.status == 0, ended.err
    return state


def test_a_swarms_model_is_served_until_ctrl_c(founder: Founder, run: Path, tmp_path: Path) -> None:
    process = Preloaded(
        *("-m", "talkoot", "serve", "--join", founder.invite, "--state", str(run)),
        *("--port", "0", "--threads", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.fullmatch(r"model village: (http://127\.0\.0\.1:\d+/)\n", process.stdout.readline())
        assert found is not None
        assert process.stdout.readline() == f"for OpenAI's clients: base URL {found[1]}v1\n"
        status = httpx.get(f"{found[1]}status", timeout=LIMIT_S).json()
        assert (status["from"], status["experts"]) == ("swarm", {"live": 8, "total": 8})
        with openai_client(found[1], LIMIT_S) as client:
            answer = client.completions.create(model="village", prompt="In the sauna", max_tokens=5)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        short = founder.node.swarm.host.peer_id.to_base58()[-8:]
        assert answer.to_dict()["talkoot"] == {"nodes": [short]}
        kin = psutil.Process(process.pid).children(recursive=True)
        endless = {"model": "village", "prompt": "In the sauna", "max_tokens": 4096, "stream": True}
        with httpx.stream("POST", f"{found[1]}v1/completions", json=endless, timeout=LIMIT_S) as answering:
            next(answering.iter_lines())
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    wait_until(lambda: gone(kin), "the end of its children")


def test_a_server_whose_invite_is_revoked_says_so_and_stops(
    founder: Founder, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def revoked(client: SwarmClient, *, reads: bool = False) -> None:
        raise RevokedInviteError("the token was revoked")

    monkeypatch.setattr(SwarmClient, "require_admitted", revoked)
    monkeypatch.setattr("talkoot.serve.server._LOOK_EVERY_S", 0.1)
    ended = talkoot("serve", "--join", founder.invite, "--state", run, "--port", 0, "--threads", 1)
    assert ended.status == RevokedInviteError.exit_status
    assert "base URL" in ended.out
    assert "error: the token was revoked [T116]" in ended.err


def test_a_folders_model_is_served_and_says_the_same(loop: LoopThread, tmp_path: Path) -> None:
    wanted = RandomModel(MANIFEST, missing=["0.0.1"])
    path = wanted.write(tmp_path / "model")
    model = model_of_folder(path)
    sampling = Sampling(max_tokens=30, seed=5, temperature=1)
    tokens = generate(model.model, list(b"In the sauna"), sampling)
    expected = "".join(decoded(tokens, model.tokenizer.token_bytes))
    with served(loop, model) as address:
        assert httpx.get(f"{address}status").json()["experts"] == {"live": 7, "total": 8}
        with openai_client(address, LIMIT_S) as client:
            answer = client.completions.create(model="village", prompt="In the sauna", max_tokens=30, seed=5)
    assert answer.choices[0].text == expected
    assert "talkoot" not in answer.to_dict()


def test_a_folders_chat_format_is_used(tmp_path: Path) -> None:
    messages = [
        Message("system", "Be kind."),
        Message("user", " Moi! {content} "),
        Message("assistant", "Moi."),
    ]
    assert ChatFormat.read(tmp_path).text(messages) == (
        "Be kind.\n\nUser: Moi! {content}\nAssistant: Moi.\nAssistant:"
    )
    (tmp_path / "chat_format.json").write_text(
        '{"user": "<u>{content}</u>", "assistant": "<a>{content}</a>", "prompt": "<a>", "stop": ["</a>"]}'
    )
    chat = ChatFormat.read(tmp_path)
    assert chat.text(messages[1:]) == "<u>Moi! {content}</u><a>Moi.</a><a>"
    assert chat.stop == ("</a>",)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"user": "no place"}', '{"user": "{content}{content}"}', '{"colour": "red"}', '{"stop": [""]}',
     '{"prompt": "' + "x" * 2**16 + '"}'],
)  # fmt: skip
def test_what_is_no_chat_format_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat_format.json").write_text(text)
    with pytest.raises(ModelError, match="chat_format"):
        ChatFormat.read(tmp_path)


def test_a_pipe_in_place_of_a_chat_format_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_format.json")
    with pytest.raises(ModelError, match="is not a file"):
        ChatFormat.read(tmp_path)


def test_what_to_serve_must_be_said_once(founder: Founder, tmp_path: Path) -> None:
    talkoot("serve").is_one_clear_line("--join INVITE", "--model DIR")
    talkoot("serve", "--join", founder.invite, "--model", tmp_path).is_one_clear_line(
        "--join INVITE", "--model DIR"
    )


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    talkoot("serve", "--model", tmp_path / "nowhere", "--port", 0).is_one_clear_line("nowhere")
    talkoot("serve", "--model", tmp_path, "--port", 0).is_one_clear_line(str(tmp_path))


def test_a_wrong_file_of_keys_is_told_before_anything_else(tmp_path: Path) -> None:
    command = ("serve", "--model", tmp_path, "--api-key-file", tmp_path / "keys")
    talkoot(*command).is_one_clear_line("can't read", "keys", "one key on each line")
