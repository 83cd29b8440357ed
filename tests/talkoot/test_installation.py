"""`talkoot update` and `talkoot uninstall` in a real environment that a fake uv made."""

import os
import pty
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from commands import assert_one_clear_line, run_here
from uv_home import DEADLINE_S, UvHome

from dht.invites import Invite
from dht.records import SwarmKeys
from peer.errors import InstallationError
from peer.files import StateFolder
from peer.identity import Identity
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.installation import Installation


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user who has installed Talkoot. Its copy `as-installed` lies beside it."""
    user = tmp_path_factory.mktemp("installed") / "user"
    user.mkdir()
    home = UvHome.make(user)
    home.add_uv()
    assert home.install().returncode == 0
    home.calls_file.unlink()
    shutil.copytree(user, user.with_name("as-installed"), symlinks=True)
    return user


@pytest.fixture
def home(user: Path) -> UvHome:
    """Restored at the same path, which the environment contains."""
    shutil.rmtree(user)
    shutil.copytree(user.with_name("as-installed"), user, symlinks=True)
    return UvHome(user / "home", user / "programs", user / "calls")


@pytest.fixture
def states(home: UvHome) -> Path:
    """The state folders of a node and a trainer."""
    states = home.home / ".local" / "state" / "talkoot"
    for name in ("node", "trainer"):
        (states / name / "checkpoints").mkdir(parents=True)
        (states / name / "checkpoints" / "1").touch()
        (states / name / "identity.key").touch()
    return states


def kept(states: Path) -> set[str]:
    return {str(path.relative_to(states)) for path in states.rglob("*") if path.is_file()}


IDENTITIES = {"node/identity.key", "trainer/identity.key"}
ALL = {*IDENTITIES, "node/checkpoints/1", "trainer/checkpoints/1", "node/lock", "trainer/lock"}


def environment(home: UvHome) -> Path:
    return home.home / ".local" / "share" / "uv" / "tools" / "talkoot"


def test_update_takes_the_source_and_the_build_of_torch_that_were_chosen(home: UvHome) -> None:
    ended = home.talkoot("update")
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "updated"), ended.stderr
    (call,) = home.calls()
    assert call[:4] == ["tool", "install", "--torch-backend", "auto"]
    assert {"--upgrade", "--reinstall-package"} <= {*call}
    assert call[-1] == f"talkoot @ {Path(__file__).parents[2].as_uri()}"
    assert home.talkoot("update", "--from", "talkoot.whl").returncode == 0
    assert home.calls()[-1][-1] == "talkoot.whl"


def test_a_folder_to_update_from_is_not_taken_for_a_package_of_that_name(home: UvHome) -> None:
    folder = home.home / "my clones" / "talkoot"
    folder.mkdir(parents=True)
    talkoot = home.home / ".local" / "bin" / "talkoot"
    ended = home.run("sh", "-c", f'cd "{folder.parent}" && exec "{talkoot}" update --from talkoot')
    assert ended.returncode == 0, ended.stderr
    assert home.calls()[-1][-1] == str(folder)


@pytest.fixture
def with_service(home: UvHome, tmp_path: Path) -> UvHome:
    """An installation with a service. A stand-in for systemctl records its calls in `systemctl` in the home folder."""
    home.program("systemctl", f'echo "$*" >> "{home.home}/systemctl"')
    home.program("systemd-run", "exit 1")
    peer_id = Identity.load_or_create(tmp_path / "key").peer_id
    invite = Invite(SwarmKeys("sauna", peer_id), (Multiaddress.of(Endpoint("127.0.0.1:1"), peer_id),))
    ended = home.talkoot("service", "install", "--as-root", "--join", str(invite))
    assert ended.returncode == 0, ended.stderr
    return home


def systemctl(home: UvHome) -> list[str]:
    return (home.home / "systemctl").read_text().splitlines()


def test_update_restarts_the_service(with_service: UvHome) -> None:
    ended = with_service.talkoot("update")
    assert (ended.returncode, "restarted the service" in ended.stdout) == (0, True), ended.stderr
    assert systemctl(with_service)[-1] == "--user restart talkoot-node.service"


def test_uninstall_removes_the_service(with_service: UvHome) -> None:
    ended = with_service.talkoot("uninstall", "--yes", "--state")
    assert ended.returncode == 0, ended.stderr
    assert "--user disable --now talkoot-node.service" in systemctl(with_service)
    assert with_service.files() == {"systemctl"}


def test_update_that_fails_is_one_line(home: UvHome) -> None:
    assert_one_clear_line(
        home.talkoot("update", FAKE_UV_BREAKS="1"), "failed", "run this command or the installer again"
    )


def test_update_without_uv_asks_for_it(home: UvHome) -> None:
    (home.programs / "uv").unlink()
    assert_one_clear_line(home.talkoot("update"), "install it, or add it to PATH")


def test_broken_notes_of_uv_are_one_line(home: UvHome) -> None:
    (environment(home) / "uv-receipt.toml").write_text("[tool]\nrequirements = 3\n")
    assert_one_clear_line(home.talkoot("uninstall", "--yes"), "run the installer again")


@pytest.mark.parametrize("requirements", ["[]", "[{}]"])
def test_notes_of_uv_that_lack_talkoot_are_broken(tmp_path: Path, requirements: str) -> None:
    (tmp_path / "uv-receipt.toml").write_text(f"[tool]\nrequirements = {requirements}\n")
    with pytest.raises(InstallationError, match="run the installer again"):
        Installation.find(tmp_path)


@pytest.mark.parametrize(
    ("file", "command", "says"),
    [
        ("pipx_metadata.json", "update", "pipx upgrade talkoot"),
        ("pyvenv.cfg", "uninstall", "-m pip install --upgrade SOURCE"),
    ],
)
def test_what_uv_did_not_install_is_told_how(home: UvHome, file: str, command: str, says: str) -> None:
    (environment(home) / "uv-receipt.toml").unlink()
    (environment(home) / file).touch()
    assert_one_clear_line(home.talkoot(command), says)


def test_a_clone_is_told_to_use_git() -> None:
    assert_one_clear_line(run_here("update"), "git pull")


def test_what_windows_is_to_run_names_all_folders() -> None:
    own = Path("/O'Hara/talkoot")
    installation = Installation(own / "tools" / "talkoot", ("talkoot",), own / "uv" / "uv.exe", own)
    assert installation.in_powershell(installation.removal_command()) == (
        "$env:UV_TOOL_DIR = '/O''Hara/talkoot/tools'; $env:UV_PYTHON_INSTALL_DIR = '/O''Hara/talkoot/python'; "
        "$env:UV_CACHE_DIR = '/O''Hara/talkoot/cache'; & '/O''Hara/talkoot/uv/uv.exe' 'tool' 'uninstall' 'talkoot'; "
        "Remove-Item -Recurse -Force '/O''Hara/talkoot'"
    )


@pytest.mark.parametrize(
    ("noted", "asked"),
    [
        ({"name": "talkoot", "directory": "/a b"}, "talkoot @ file:///a%20b"),
        ({"name": "talkoot", "url": "https://a/t.whl", "extras": ["bpe"]}, "talkoot[bpe] @ https://a/t.whl"),
        ({"name": "talkoot", "git": "https://a/t?rev=b"}, "talkoot @ git+https://a/t@b"),
        ({"name": "talkoot", "specifier": ">=0.2"}, "talkoot>=0.2"),
    ],
)
def test_uvs_notes_are_read(tmp_path: Path, noted: dict[str, object], asked: str) -> None:
    lines = ", ".join(f"{key} = {value!r}" for key, value in noted.items())
    own = tmp_path / "talkoot"
    environment, uv = own / "tools" / "talkoot", own / "uv" / "uv"
    for folder in (environment, uv.parent):
        folder.mkdir(parents=True)
    uv.touch(mode=0o755)
    (environment / "uv-receipt.toml").write_text(f"[tool]\nrequirements = [{{ {lines} }}]\n")
    assert Installation.find(environment).requirements == (asked,)


def test_uninstall_keeps_the_state(home: UvHome, states: Path) -> None:
    ended = home.talkoot("uninstall", "--yes")
    assert (ended.returncode, f"{states} stays" in ended.stdout) == (0, True), ended.stderr
    assert kept(states) == ALL
    assert not environment(home).exists()


def test_uninstall_with_state_keeps_the_identities(home: UvHome, states: Path) -> None:
    ended = home.talkoot("uninstall", "--yes", "--state")
    assert (ended.returncode, f"identities stay in {states}" in ended.stdout) == (0, True), ended.stderr
    assert kept(states) == IDENTITIES


def test_uninstall_asks_before_it_removes_anything(home: UvHome, states: Path) -> None:
    ended = home.talkoot("uninstall", "--state")
    assert ended.returncode == 1
    assert kept(states) >= IDENTITIES | {"node/checkpoints/1"}
    assert environment(home).exists()


@pytest.mark.parametrize("linked", ["talkoot", "talkoot/node"])
def test_uninstall_empties_no_folder_to_which_a_link_leads(
    home: UvHome, states: Path, tmp_path: Path, linked: str
) -> None:
    link = states.parent / linked
    theirs = tmp_path / "photos"
    link.rename(theirs)
    link.symlink_to(theirs)
    before = kept(theirs)
    assert_one_clear_line(home.talkoot("uninstall", "--yes", "--state"), "is a link to")
    assert kept(theirs) == before
    assert link.is_symlink()
    assert (home.home / ".local" / "bin" / "talkoot").exists()


def test_uninstall_removes_no_folder_that_the_installer_did_not_make(tmp_path: Path) -> None:
    environment = tmp_path / "tools" / "talkoot"
    (tmp_path / "uv").mkdir()
    uv = tmp_path / "uv" / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    environment.mkdir(parents=True)
    (environment / "uv-receipt.toml").write_text('[tool]\nrequirements = [{ name = "talkoot" }]\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(uv.parent))
        assert Installation.find(environment).own_folder is None
        own = tmp_path / "share" / "talkoot"
        own.mkdir(parents=True)
        for part in ("uv", "tools"):
            (tmp_path / part).rename(own / part)
        assert Installation.find(own / "tools" / "talkoot").own_folder == own


def test_uninstall_removes_nothing_while_a_peer_runs(home: UvHome, states: Path) -> None:
    with closing(StateFolder(states / "trainer")):
        assert_one_clear_line(home.talkoot("uninstall", "--yes", "--state"), "another process uses")
    assert kept(states) == ALL
    assert environment(home).exists()


def test_identity_needs_a_terminal(home: UvHome, states: Path) -> None:
    assert_one_clear_line(
        home.talkoot("uninstall", "--yes", "--state", "--identity"), "a terminal in which it can ask twice"
    )
    assert environment(home).exists()


@pytest.mark.parametrize(("answers", "removes"), [("y\ny\n", True), ("y\nn\n", False)])
def test_identity_is_deleted_only_after_two_answers(
    home: UvHome, states: Path, answers: str, removes: bool
) -> None:
    master, slave = pty.openpty()
    with open(master, "wb", buffering=0) as keyboard, open(slave, "rb", buffering=0) as terminal:
        keyboard.write(answers.encode())
        ended = subprocess.run(
            [home.home / ".local" / "bin" / "talkoot", "uninstall", "--yes", "--state", "--identity"],
            env={
                "HOME": str(home.home),
                "PATH": f"{home.programs}:{os.defpath}",
                "FAKE_UV_CALLS": str(home.calls_file),
            },
            stdin=terminal,
            capture_output=True,
            timeout=DEADLINE_S,
        )
    assert (ended.returncode == 0) == removes, ended.stderr
    assert states.exists() != removes
    assert environment(home).exists() != removes
