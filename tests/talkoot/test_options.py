"""Options and the settings of the same names."""

from pathlib import Path
from typing import Any

import platformdirs
import pytest
import typer.main

from expert_server.settings import NodeSettings
from peer.settings import RoleSettings
from talkoot.cli import app
from talkoot.dashboard.settings import DashboardSettings
from talkoot.options import given_settings, help_of
from trainer_client.settings import TrainerSettings

COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # of a group
_SWARM = {"join", "new", "bootstrap", "local"}
_OF_ONE_CALL = {"config", "resume", "check", "cached", "invite-file", "json", "log-format"}


def options_of(name: str) -> list[Any]:
    command = COMMANDS[name]
    options: list[Any] = command.get_params(typer.Context(command))
    return options


@pytest.mark.parametrize(
    ("name", "settings"),
    [("node", NodeSettings), ("train", TrainerSettings), ("dashboard", DashboardSettings)],
)
def test_every_option_of_a_role_is_a_setting_of_that_name(name: str, settings: type[RoleSettings]) -> None:
    first = {parameter.opts[0].removeprefix("--") for parameter in COMMANDS[name].params}
    known = {setting.replace("_", "-") for setting in settings.model_fields}
    assert first - known <= _SWARM | _OF_ONE_CALL


@pytest.mark.parametrize("name", ["node", "train", "dashboard", "generate", "evaluate"])
def test_every_option_says_what_it_is(name: str) -> None:
    assert [option.name for option in options_of(name) if not option.help] == []


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        (NodeSettings, "experts", "Experts to host.  [default: a quarter of the free memory]"),
        (NodeSettings, "grpc_port", "TCP port of the expert service; 0: any free one.  [default: 0]"),
        (NodeSettings, "only_when_idle", "Pause while other programs need the processor.  [default: no]"),
        (NodeSettings, "max_calls", "Calls served at the same time.  [default: 64]"),
        (TrainerSettings, "learning_rate", "Highest step size of the dense part.  [default: 0.002]"),
        (TrainerSettings, "log", "File that gets a JSON line for each step."),
    ],
)
def test_an_option_says_what_its_setting_is_and_its_default(
    settings: type[RoleSettings], name: str, said: str
) -> None:
    assert help_of(settings.model_fields[name], several=False) == said


def test_an_option_that_may_come_several_times_says_so() -> None:
    assert "the denylist. May be given several times." in help_of(
        NodeSettings.model_fields["deny"], several=True
    )


def test_the_words_that_a_setting_may_be_are_shown() -> None:
    (router,) = (option for option in options_of("train") if option.name == "router")
    assert router.metavar == "product-key|noisy-top-k|switch|base|glam"


def test_an_option_of_the_commands_own_is_not_the_setting_of_its_name() -> None:
    (top_k,) = (option for option in options_of("generate") if option.name == "top_k")
    assert top_k.help == "Draw from the k likeliest tokens.  [default: all]"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *((name, "node") for name in ("node", "pause", "resume", "stop", "logs", "invite")),
        *((name, "trainer") for name in ("train", "generate", "evaluate")),
        ("dashboard", "dashboard"),
    ],
)
def test_each_state_folder_says_where_it_is_by_default(
    name: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (state,) = (option for option in options_of(name) if option.name == "state")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = platformdirs.user_state_path("talkoot") / folder
    assert f"[default: {str(expected).replace(str(tmp_path), '~')}]" in state.help


def test_what_was_not_given_is_no_setting() -> None:
    options: dict[str, object] = {
        "experts": 0,
        "spare": None,
        "deny": [],
        "only_when_idle": False,
        "join": "x",
    }
    assert given_settings(options, NodeSettings) == {"experts": 0, "only_when_idle": False}
