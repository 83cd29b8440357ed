"""Options, and the settings that they are generated from."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import typer.main
from typer.testing import CliRunner

from dht.invites import Invite
from dht.records import SwarmKeys
from expert_server.settings import NodeSettings
from peer.identity import Identity
from peer.settings import RoleSettings
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.cli import app
from talkoot.dashboard.settings import DashboardSettings
from talkoot.options import given_settings, help_of, join_options, load_settings
from talkoot.serve.settings import ServeSettings
from trainer_client.settings import Sampling, TrainerSettings

COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # of a group
ROLES: list[tuple[str, type[RoleSettings]]] = [
    *(("node", NodeSettings), ("doctor", NodeSettings)),
    *(("train", TrainerSettings), ("generate", Sampling), ("dashboard", DashboardSettings)),
    ("serve", ServeSettings),
]
_SCREEN = 72
"""The most lines at 80 columns. At 110 columns there are a quarter fewer."""


def options_of(name: str) -> dict[str, Any]:
    command = COMMANDS[name]
    return {option.name: option for option in command.get_params(typer.Context(command))}


def parsed(name: str, *arguments: str) -> typer.Context:
    context: typer.Context = COMMANDS[name].make_context(name, list(arguments))
    return context


@pytest.mark.parametrize(("name", "role"), ROLES)
def test_every_setting_is_an_option_of_its_name(name: str, role: type[RoleSettings]) -> None:
    options = options_of(name)
    for setting, field in role.model_fields.items():
        flags = options[setting].opts
        assert f"--{setting.replace('_', '-')}" in flags
        assert (field.annotation is bool) == bool(options[setting].is_flag)


@pytest.mark.parametrize("name", ["node", "doctor", "train", "dashboard", "generate", "serve", "evaluate"])
def test_every_option_says_what_it_is(name: str) -> None:
    assert [option.name for option in options_of(name).values() if not option.help] == []


@pytest.mark.parametrize("name", ["node", "doctor", "train", "dashboard", "generate", "serve", "evaluate"])
def test_help_shows_what_people_need_in_sections(name: str) -> None:
    ended = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert ended.exit_code == 0, ended.output
    headings = [line for line in ended.stdout.splitlines() if line.endswith(":") and line[0] != " "]
    sections: Mapping[str, Any] = COMMANDS[name].sections
    assert headings == [f"{heading}:" for heading in sections]
    for names in sections.values():
        for option in names:
            shown = options_of(name)[option]
            assert any(flag in ended.stdout for flag in (shown.opts if option != "paths" else ["FILE"]))
    assert len(ended.stdout.splitlines()) < _SCREEN


def all_commands(group: Any = None) -> Iterator[Any]:
    for command in (COMMANDS if group is None else group.commands).values():
        yield from all_commands(command) if hasattr(command, "commands") else [command]


def test_every_command_that_joins_can_join_through_another_node(tmp_path: Path) -> None:
    joining = [command for command in all_commands() if "join" in {each.name for each in command.params}]
    assert len(joining) > 10
    other = Identity.load_or_create(tmp_path / "key").peer_id
    mine, theirs = (Multiaddress.of(Endpoint.of("192.0.2.7", port), other) for port in (1, 2))
    invite = Invite(SwarmKeys("sauna", other), (mine,), token=b"")
    for command in joining:
        needed = ["x" for each in command.params if each.param_type_name == "argument"]
        arguments = ["--join", str(invite), "--bootstrap", str(theirs), *needed]
        given = command.make_context(command.name, arguments).params
        if "bootstrap" in given:
            assert given["bootstrap"] == [theirs]
        else:
            assert Invite.parse(given["join"]).bootstrap == (theirs, mine)


def test_options_to_join_are_shown_as_given_but_without_secrets(tmp_path: Path) -> None:
    peer_id = Identity.load_or_create(tmp_path / "key").peer_id
    address = Multiaddress.of(Endpoint.of("192.0.2.7", 1), peer_id)
    invite = str(Invite(SwarmKeys("sauna", peer_id), (address,)))
    file = tmp_path / "my invite"
    file.write_text(invite)
    through = ["--bootstrap", str(address)]
    given = {
        ("--join", f"@{file}"): f"--join '@{file}'",
        ("--join", f"@{file}", *through): f"--join '@{file}' --bootstrap {address}",
        ("--join", invite, *through): f"--join INVITE --bootstrap {address}",
        ("--join", f"@{file}", "--bootstrap", invite): f"--join '@{file}' --bootstrap ADDRESS",
        (): "--join INVITE",
    }
    for arguments, shown in given.items():
        assert join_options(parsed("train", *arguments)) == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bootstrap", "there"], "pass --join INVITE"),
        (["--join", "talkoot2", "--bootstrap", "there"], "the invite is incomplete"),
    ],
)
def test_a_wrong_bootstrap_is_told_in_one_line(arguments: list[str], said: str) -> None:
    ended = CliRunner().invoke(app, ["status", *arguments])
    assert ended.exit_code == 2
    assert ended.output.startswith("error: ")
    assert said in ended.output


def test_settings_that_help_does_not_show_are_accepted() -> None:
    shown = CliRunner().invoke(app, ["node", "--help"]).stdout
    assert "--max-calls" not in shown
    assert load_settings(parsed("node", "--max-calls", "7"), NodeSettings).max_calls == 7


def test_a_hint_for_a_mistyped_option_names_no_removed_one() -> None:
    below = [sub for group in COMMANDS.values() for sub in getattr(group, "commands", {}).values()]
    tried = 0
    for command in (*COMMANDS.values(), *below):
        options = command.get_params(typer.Context(command))
        removed = {flag for option in options if getattr(option, "hidden", False) for flag in option.opts}
        for flag in removed:
            with pytest.raises(typer.BadParameter) as found:
                command.make_context(command.name, [f"{flag}x"])
            hints = re.findall(r"--[\w-]+", found.value.message.partition("Possible options:")[2])
            assert removed.isdisjoint(hints), found.value.message
            tried += 1
    assert tried > 10
    with pytest.raises(typer.BadParameter, match=r"Possible options: .*--grace-s\)"):
        COMMANDS["train"].make_context("train", ["--grace-sx"])


def test_an_option_that_is_like_no_other_gets_no_hint() -> None:
    with pytest.raises(typer.BadParameter, match=r"--bogus; see `"):
        COMMANDS["node"].make_context("node", ["--bogus", "3"])


@pytest.mark.parametrize(
    ("name", "arguments", "role", "expected"),
    [
        ("node", ["--experts", "0"], NodeSettings, {"experts": 0}),
        ("node", ["--deny", "a", "--deny", "b"], NodeSettings, {"deny": ["a", "b"]}),
        ("node", ["--only-when-idle"], NodeSettings, {"only_when_idle": True}),
        ("node", ["--even-when-busy"], NodeSettings, {"only_when_idle": False}),
        ("node", ["--on-battery"], NodeSettings, {"not_on_battery": False}),
        ("node", ["--no-upnp"], NodeSettings, {"upnp": False}),
        ("node", ["--drain-timeout", "5"], NodeSettings, {"drain_timeout_s": 5.0}),
        ("node", ["--memory", "2GB"], NodeSettings, {"memory": "2GB"}),
        ("node", ["--memory-disk", "5GB"], NodeSettings, {"memory_disk": "5GB"}),
        ("node", ["--schedule", "22:00-07:00"], NodeSettings, {"schedule": "22:00-07:00"}),
        ("doctor", ["--port", "1"], NodeSettings, {"port": 1}),
        ("train", ["--in-flight", "auto"], TrainerSettings, {"in_flight": "auto"}),
        ("train", ["--in-flight", "3"], TrainerSettings, {"in_flight": "3"}),
        ("train", ["--data", "a", "--data", "b"], TrainerSettings, {"data": ["a", "b"]}),
        ("train", ["--log", "x"], TrainerSettings, {"log": Path("x")}),
        ("train", ["--wait-for-experts", "1"], TrainerSettings, {"wait_for_experts_s": 1.0}),
        ("dashboard", ["--port", "0"], DashboardSettings, {"port": 0}),
        ("evaluate", ["a.txt", "--field", "body"], TrainerSettings, {"field": "body"}),
        ("train", ["--resume", "--join", "x"], TrainerSettings, {}),
    ],
)  # fmt: skip
def test_options_that_were_given_are_settings(
    name: str, arguments: list[str], role: type[RoleSettings], expected: dict[str, Any]
) -> None:
    context = parsed(name, *arguments)
    given = given_settings(context, role)
    assert given == expected
    assert not set(role.model_fields) & set(context.params), "the command's function does not take them"
    role.load(**given)


def test_options_of_two_roles_with_one_name_stay_apart() -> None:
    context = parsed("generate", "--seed", "3", "--top-k", "5", "--threads", "2")
    assert given_settings(context, TrainerSettings) == {"threads": 2}
    assert given_settings(context, Sampling) == {"seed": 3, "top_k": 5}


def test_options_override_the_file(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text("experts = 3\nspare = 4\n")
    settings = load_settings(parsed("node", "--config", str(config), "--experts", "5"), NodeSettings)
    assert (settings.experts, settings.spare) == (5, 4)


def test_a_removed_setting_is_still_accepted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(DashboardSettings, "removed", {"colour": ""})
    command: Any = typer.main.get_command(app).commands["dashboard"]  # type: ignore[attr-defined]  # of a group
    context = command.make_context("dashboard", ["--colour", "red", "--port", "1"])
    assert load_settings(context, DashboardSettings).port == 1
    assert "colour no longer exists" in caplog.text


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        (
            NodeSettings,
            "experts",
            "Experts to host.  [default: as many as fit in a quarter of the free memory]",
        ),
        (
            NodeSettings,
            "port",
            "TCP port of this node; 0: the port of the last start, or any free one.  [default: 0]",
        ),
        (NodeSettings, "only_when_idle", "Pause while other programs need the processor.  [default: no]"),
        (NodeSettings, "max_calls", "Calls served at the same time.  [default: 64]"),
        (TrainerSettings, "learning_rate", "Highest learning rate of the dense part.  [default: 0.002]"),
        (TrainerSettings, "log", "File that gets a JSON line for each step."),
    ],
)
def test_an_option_says_what_its_setting_is_and_its_default(
    settings: type[RoleSettings], name: str, said: str
) -> None:
    assert help_of(settings.model_fields[name], several=False) == said


@pytest.mark.parametrize(("name", "option"), [("node", "deny"), ("train", "data")])
def test_an_option_that_may_come_several_times_says_so(name: str, option: str) -> None:
    assert "May be given several times." in options_of(name)[option].help


@pytest.mark.parametrize(
    ("name", "option", "metavar"),
    [
        ("train", "router", "product-key|noisy-top-k|switch|base|glam"),
        ("train", "in_flight", "N|auto"),
        ("ask", "objective", "rag-sequence|rag-token"),
        ("node", "port", "PORT"),
        ("node", "announce_every_s", "SECONDS"),
        ("node", "experts", "N"),
        ("node", "memory_disk", "SIZE"),
    ],
)
def test_an_option_shows_what_its_value_is(name: str, option: str, metavar: str) -> None:
    assert options_of(name)[option].metavar == metavar


@pytest.mark.parametrize("name", ["generate", "serve", "evaluate"])
def test_a_command_that_reads_checkpoints_does_not_offer_to_write_them(name: str) -> None:
    options = options_of(name)
    assert options["checkpoint"].help.endswith("[default: the newest run's]")
    assert options["state"].help.startswith(
        "The trainer's state folder, where its checkpoints are.  [default: ~"
    )
    assert options_of("train")["checkpoint"].help.endswith(
        "[default: a new one for each run, in the state folder]"
    )


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *((name, "node") for name in ("node", "doctor", "pause", "resume", "stop", "logs", "invite")),
        *((name, "trainer") for name in ("train", "generate", "evaluate")),
        ("dashboard", "dashboard"),
    ],
)
def test_each_state_folder_says_where_it_is_by_default(
    name: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = options_of(name)["state"]
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = platformdirs.user_state_path("talkoot") / folder
    assert f"[default: {str(expected).replace(str(tmp_path), '~')}]" in state.help
