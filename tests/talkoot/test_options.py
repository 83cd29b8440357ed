"""Options and the settings of the same names."""

import pytest
import typer.main

from expert_server.settings import NodeSettings
from peer.settings import RoleSettings
from talkoot.cli import app
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
