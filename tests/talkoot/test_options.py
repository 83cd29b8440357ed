"""Options and the settings of the same names."""

from types import ModuleType

import pytest
import typer.main

from expert_server.settings import NodeSettings
from peer.settings import RoleSettings
from talkoot.cli import app
from talkoot.commands import node, train
from talkoot.commands.options import given_settings
from talkoot.dashboard.settings import DashboardSettings
from trainer_client.settings import TrainerSettings

_SWARM = {"join", "new", "bootstrap", "local"}
_OF_ONE_CALL = {"config", "resume", "check", "cached", "invite-file", "json", "log-format"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [("node", NodeSettings), ("train", TrainerSettings), ("dashboard", DashboardSettings)],
)
def test_every_option_of_a_role_is_a_setting_of_that_name(name: str, settings: type[RoleSettings]) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # of a group
    first = {parameter.opts[0].removeprefix("--") for parameter in command.params}
    known = {setting.replace("_", "-") for setting in settings.model_fields}
    assert first - known <= _SWARM | _OF_ONE_CALL


@pytest.mark.parametrize(
    ("name", "module", "settings"), [("node", node, NodeSettings), ("train", train, TrainerSettings)]
)
def test_options_are_taken_for_settings_unless_they_are_the_commands_own(
    name: str, module: ModuleType, settings: type[RoleSettings]
) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # of a group
    names = {parameter.name for parameter in command.params}
    assert names - set(module.NOT_SETTINGS) <= set(settings.model_fields)
    assert set(module.NOT_SETTINGS) <= names


@pytest.mark.parametrize(
    ("name", "settings"),
    [("node", NodeSettings), ("train", TrainerSettings), ("dashboard", DashboardSettings)],
)
def test_a_default_in_an_options_help_is_the_settings_own(name: str, settings: type[RoleSettings]) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # of a group
    told = 0
    for parameter in command.params:
        field = settings.model_fields.get(parameter.name)
        if field is None or "[default: " not in parameter.help:
            continue
        shown = parameter.help.partition("[default: ")[2].removesuffix("]").partition(",")[0]
        if field.default in (None, 0, ()):  # what stands for nothing is said in words
            assert not shown[0].isdigit(), parameter.name
        else:
            told += 1
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert shown == default, parameter.name
    assert told


def test_what_was_not_given_is_no_setting() -> None:
    options: dict[str, object] = {
        "experts": 0,
        "spare": None,
        "deny": [],
        "only_when_idle": False,
        "join": "x",
    }
    assert given_settings(options, ("join",)) == {"experts": 0, "only_when_idle": False}
