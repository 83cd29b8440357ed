"""deploy/install/: what the scripts do with a fake uv, what they refuse, and what linters and a parser report."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Node, Parser
from uv_home import DEPLOY, UvHome

INSTALL_SH = DEPLOY / "install.sh"
INSTALL_PS1 = DEPLOY / "install.ps1"
FROM_THE_PACKAGE_INDEX = (
    "download.pytorch.org does not answer: torch comes from your package index, perhaps with CUDA (3 GB)"
)
APPROVED_VERBS = {
    "Copy",
    "Exit",
    "Expand",
    "Find",
    "Get",
    "Install",
    "Invoke",
    "Move",
    "New",
    "Out",
    "Read",
    "Remove",
}
APPROVED_VERBS |= {"Select", "Set", "Split", "Join", "Test", "Write"}
"""The approved PowerShell verbs that the script uses (Get-Verb)."""
AVOIDED = {"Write-Host", "Invoke-Expression", "Get-WmiObject", "Start-Process"}


@pytest.fixture
def home(tmp_path: Path) -> UvHome:
    return UvHome.make(tmp_path)


def assert_refused(ended: subprocess.CompletedProcess[str], *said: str) -> None:
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 1
    assert len(errors) == 1, ended.stderr
    for part in said:
        assert part in errors[0]


def install_call(home: UvHome) -> list[str]:
    (install,) = (call for call in home.calls() if call[:2] == ["tool", "install"] and "--help" not in call)
    return install


# install.sh


def test_shell_script_has_no_lint() -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    ended = subprocess.run([shellcheck, "--shell=sh", str(INSTALL_SH)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_installs_by_the_uv_that_is_there_and_uninstalls_without_a_trace(home: UvHome) -> None:
    home.add_uv()
    ended = home.install()
    assert ended.returncode == 0, ended.stderr
    assert "talkoot uninstall" in ended.stdout
    assert FROM_THE_PACKAGE_INDEX not in ended.stdout
    install = install_call(home)
    assert install[-1] == str(INSTALL_SH.parents[2])
    assert install[install.index("--torch-backend") + 1] == "auto"
    assert install[install.index("--python") + 1] == ">=3.11,<3.14"
    assert home.talkoot("--version").stdout.startswith("talkoot ")
    again = home.install()
    assert again.returncode == 0, again.stderr
    removed = home.talkoot("uninstall", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert home.files() == set()


def test_without_the_site_of_pytorch_torch_comes_from_the_package_index(home: UvHome) -> None:
    home.add_uv()
    home.program("curl", "exit 7")
    ended = home.install()
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(FROM_THE_PACKAGE_INDEX) == 1
    assert "--torch-backend" not in install_call(home)
    assert home.talkoot("--version").returncode == 0


@pytest.mark.parametrize(
    ("python", "offline", "taken"),
    [("3.14", "yes", "3.14"), ("3.14", "", ">=3.11,<3.14"), ("3.15", "yes", ">=3.11,<3.14")],
)
def test_python_3_14_is_taken_only_where_no_older_one_can_be_had(
    python: str, offline: str, taken: str, home: UvHome
) -> None:
    home.add_uv()
    ended = home.install(FAKE_UV_PYTHON=python, FAKE_UV_OFFLINE=offline)
    assert ended.returncode == 0, ended.stderr
    install = install_call(home)
    assert install[install.index("--python") + 1] == taken
    assert ("so Talkoot gets 3.14" in ended.stdout) == (taken == "3.14")


@pytest.fixture
def without_uv(home: UvHome) -> UvHome:
    """A home without uv. The script downloads it with a fake curl, whose archive has the fake uv."""
    folder = home.programs.parent / "uv-x86_64-unknown-linux-gnu"
    folder.mkdir()
    home.add_uv(folder)
    archive = folder.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    home.program("uname", '[ "$1" = -s ] && echo Linux || echo x86_64')
    home.program("curl", f'while [ $# -gt 1 ]; do [ "$1" = --output ] && cp "{archive}" "$2"; shift; done')
    return home


def test_downloads_uv_where_there_is_none_and_uninstalls_it_too(without_uv: UvHome) -> None:
    (archive,) = without_uv.programs.parent.glob("*.tar.gz")
    script = without_uv.programs.parent / "install.sh"
    pinned = re.search(r"x86_64-unknown-linux-gnu\) echo (\w{64})", INSTALL_SH.read_text())
    assert pinned is not None
    script.write_text(
        INSTALL_SH.read_text().replace(pinned[1], hashlib.sha256(archive.read_bytes()).hexdigest())
    )
    ended = without_uv.run("sh", str(script), "--from", str(INSTALL_SH.parents[2]))
    assert ended.returncode == 0, ended.stderr
    assert {file.split("/")[2] for file in without_uv.files() if "/share/" in file} == {"talkoot"}
    removed = without_uv.talkoot("uninstall", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert without_uv.files() == set()


def test_a_download_with_another_checksum_is_not_run(without_uv: UvHome) -> None:
    assert_refused(without_uv.install(), "another checksum")
    assert without_uv.files() == set()
    assert not without_uv.calls_file.exists()


def test_a_download_that_fails_is_one_line(without_uv: UvHome) -> None:
    without_uv.program("curl", "exit 6")
    assert_refused(without_uv.install(), "can't download", "HTTPS_PROXY")
    assert without_uv.files() == set()


@pytest.mark.parametrize("has_uv", [True, False])
def test_dry_run_changes_nothing(home: UvHome, has_uv: bool) -> None:
    if has_uv:
        home.add_uv()
    ended = home.install("--dry-run", "--join", "INVITE")
    assert ended.returncode == 0, ended.stderr
    assert "'tool' 'install' '--torch-backend' 'auto'" in ended.stdout
    assert "'talkoot' 'service' 'install' '--join' 'INVITE'" in ended.stdout
    assert ("would download uv" in ended.stdout) != has_uv
    assert [*home.home.iterdir()] == []


def test_half_an_installation_is_mended_by_running_it_again(home: UvHome) -> None:
    home.add_uv()
    assert_refused(home.install(FAKE_UV_BREAKS="1"), "see its message above")
    ended = home.install()
    assert ended.returncode == 0, ended.stderr
    assert home.talkoot("--version").returncode == 0


def test_without_a_terminal_no_service_is_offered(home: UvHome) -> None:
    home.add_uv()
    ended = home.install("--join", "INVITE")
    assert ended.returncode == 0, ended.stderr
    assert "To do it later" in ended.stdout


def test_service_that_fails_leaves_talkoot_installed(home: UvHome) -> None:
    home.add_uv()
    ended = home.install("--join", "INVITE", "--service")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: Talkoot is installed, but its service is not")
    assert home.talkoot("--version").returncode == 0


@pytest.mark.parametrize(
    ("program", "script", "says"),
    [
        ("df", "echo; echo / 9000000 8000000 1000000 89% /", "only 1000 MB are free"),
        ("uname", '[ "$1" = -s ] && echo Darwin || echo x86_64', "Intel"),
        ("uname", '[ "$1" = -s ] && echo FreeBSD || echo amd64', "FreeBSD on amd64"),
        ("uv", "echo uv 0.8.0", "too old"),
    ],
)
def test_machine_that_can_not_have_it_is_one_line(home: UvHome, program: str, script: str, says: str) -> None:
    home.program(program, script)
    assert_refused(home.install(), says)
    assert home.files() == set()


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--form", "x"], "--form"), (["--from"], "needs a value"), (["--service"], "--service needs --join")],
)
def test_wrong_options_are_one_line(home: UvHome, options: list[str], says: str) -> None:
    assert_refused(home.install(*options), says)


def test_script_outside_of_a_clone_asks_for_a_source(home: UvHome) -> None:
    shutil.copy(INSTALL_SH, home.home / "install.sh")
    assert_refused(home.run("sh", str(home.home / "install.sh")), "pass --from SOURCE")


def test_a_folder_is_not_taken_for_a_package_of_that_name(home: UvHome) -> None:
    """uv would download a stranger's package of that name, and run it."""
    home.add_uv()
    folder = home.home / "my clones" / "talkoot"
    folder.mkdir(parents=True)
    ended = home.run("sh", "-c", f'cd "{folder.parent}" && exec sh "{INSTALL_SH}" --from talkoot')
    assert ended.returncode == 0, ended.stderr
    (source,) = [
        call[-1] for call in home.calls() if call[:2] == ["tool", "install"] and "--help" not in call
    ]
    assert source == str(folder)


@pytest.fixture
def others_home() -> Iterator[Path]:
    """A home folder in which this user can't write, with the script in it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir(mode=0o555)
        shutil.copy(INSTALL_SH, folder)
        Path(folder).chmod(0o755)
        yield home


def test_home_without_rights_is_one_line(others_home: Path) -> None:
    command = ["sh", str(others_home.parent / "install.sh"), "--from", "talkoot"]
    nobody = 65534 if os.geteuid() == 0 else None
    ended = subprocess.run(
        command,
        env={"HOME": str(others_home), "PATH": os.defpath},
        capture_output=True,
        text=True,
        user=nobody,
        cwd="/",
    )
    assert_refused(ended, f"can't write {others_home}")


# install.ps1


def nodes(root: Node, *kinds: str) -> Iterator[Node]:
    if root.type in kinds:
        yield root
    for child in root.children:
        yield from nodes(child, *kinds)


def words(root: Node, *kinds: str) -> list[str]:
    return [(node.text or b"").decode() for node in nodes(root, *kinds)]


@pytest.fixture(scope="module")
def powershell() -> Node:
    return Parser(Language(tree_sitter_powershell.language())).parse(INSTALL_PS1.read_bytes()).root_node


def test_powershell_script_parses(powershell: Node) -> None:
    assert not powershell.has_error


def test_powershell_script_follows_the_analyzers_rules(powershell: Node) -> None:
    """Checks those rules of PSScriptAnalyzer that a syntax tree shows; the analyzer itself needs PowerShell."""
    text = INSTALL_PS1.read_text(encoding="ascii")  # PSUseBOMForUnicodeEncodedFile
    assert not re.search(r"[ \t]$", text, re.MULTILINE)  # PSAvoidTrailingWhitespace
    functions = words(powershell, "function_name")
    called = words(powershell, "command_name")
    # PSAvoidUsingCmdletAliases, PSAvoidUsingInvokeExpression, PSAvoidUsingWriteHost …
    assert not AVOIDED & {*called}
    for name in (*functions, *called):
        verb, hyphen, noun = name.partition("-")
        # PSUseApprovedVerbs, PSUseSingularNouns
        assert (hyphen, verb in APPROVED_VERBS, noun.endswith("s")) == ("-", True, False), name
    # PSAvoidUsingEmptyCatchBlock
    assert all(words(block, "statement_list") for block in nodes(powershell, "catch_clause"))
    # PSReviewUnusedParameter, PSUseDeclaredVarsMoreThanAssignments
    named = Counter(
        re.sub(r"[${}@]", "", name).lower() for name in words(powershell, "variable", "braced_variable")
    )
    automatic = {
        "erroractionpreference",
        "false",
        "lastexitcode",
        "progresspreference",
        "psscriptroot",
        "true",
    }
    assert {
        name for name, number in named.items() if number == 1 and not name.startswith("env:")
    } <= automatic
    assert not [name for name in named if name.startswith("global:")]  # PSAvoidGlobalVars


def test_scripts_pin_the_same_uv_and_pythons() -> None:
    shell, power = INSTALL_SH.read_text(), INSTALL_PS1.read_text()
    assert re.findall(r"uv_version=(\S+)", shell) == re.findall(r"UvVersion = '(\S+)'", power)
    assert re.findall(r"python='(\S+)'", shell) == re.findall(r"Python = '(\S+)'", power)
    assert len({*re.findall(r"\b[0-9a-f]{64}\b", shell + power)}) == 4


def test_all_installers_say_in_the_same_words_where_torch_comes_from() -> None:
    for installer in (INSTALL_SH, INSTALL_PS1, DEPLOY.parents[1] / "tools" / "install.py"):
        assert FROM_THE_PACKAGE_INDEX in installer.read_text()


@pytest.mark.skipif(shutil.which("pwsh") is None, reason="no PowerShell here")
def test_powershell_script_installs_and_dry_run_changes_nothing(home: UvHome) -> None:
    home.add_uv()
    pwsh = ("pwsh", "-NoProfile", "-File", str(INSTALL_PS1))
    machine = {"PROCESSOR_ARCHITECTURE": "AMD64", "LOCALAPPDATA": str(home.home)}
    before = home.files()
    ended = home.run(*pwsh, "-DryRun", "-Join", "INVITE", **machine)
    assert ended.returncode == 0, ended.stderr
    assert "'tool' 'install' '--torch-backend' 'auto'" in ended.stdout
    assert home.files() == before
