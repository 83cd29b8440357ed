"""Settings: which source wins, and what the error for a wrong one says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError

from peer.errors import SettingsError
from peer.settings import RoleSettings


class SaunaSettings(RoleSettings):
    env_prefix: ClassVar[str] = "TALKOOT_SAUNA_"
    removed: ClassVar[Mapping[str, str]] = {"ladle_ml": "", "benches": "pass guests", "whisks": ""}

    heat: int = Field(default=80, ge=0, le=110, description="degrees")
    wait_s: float = Field(default=1.0, gt=0, description="seconds")
    stove: Path | None = Field(default=None, description="its folder")
    guests: tuple[str, ...] = Field(default=(), description="who comes")
    towels: Annotated[int, Field(ge=1, le=9)] | Literal["auto"] = Field(default=1, description="for each")
    open: bool = Field(default=True, description="for guests")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SaunaSettings.model_fields:
        monkeypatch.delenv(f"TALKOOT_SAUNA_{name.upper()}", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "sauna.toml"
    path.write_text("heat = 60\nwait_s = 2.5\n", encoding="utf-8")
    return path


def test_defaults_hold_where_nothing_is_given() -> None:
    assert SaunaSettings.load().heat == 80


def test_the_file_is_stronger_than_defaults(config: Path) -> None:
    settings = SaunaSettings.load(config)
    assert (settings.heat, settings.wait_s, settings.stove) == (60, 2.5, None)


def test_the_environment_is_stronger_than_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALKOOT_SAUNA_HEAT", "70")
    settings = SaunaSettings.load(config)
    assert (settings.heat, settings.wait_s) == (70, 2.5)


def test_flags_are_strongest(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALKOOT_SAUNA_HEAT", "70")
    assert SaunaSettings.load(config, heat=90, wait_s=None).heat == 90


def test_a_flag_of_none_was_not_given(config: Path) -> None:
    assert SaunaSettings.load(config, heat=None).heat == 60


def test_what_is_loaded_is_of_the_class_that_was_asked_and_frozen(config: Path) -> None:
    settings = SaunaSettings.load(config, stove=Path("/stove"), guests=["a", "b"])
    assert type(settings) is SaunaSettings
    assert settings.stove == Path("/stove")
    assert settings.guests == ("a", "b")
    with pytest.raises(ValidationError, match="frozen"):
        settings.heat = 1


def test_two_files_do_not_mix(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("heat = 50\n", encoding="utf-8")
    assert SaunaSettings.load(config).wait_s == 2.5
    assert SaunaSettings.load(other).wait_s == 1.0
    assert SaunaSettings.load().heat == 80


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"heat": -3}, "heat must be at least 0, not -3"),
        ({"heat": 111}, "heat must be at most 110, not 111"),
        ({"heat": "hot"}, "heat must be a whole number, not 'hot'"),
        ({"heat": 80.5}, "heat must be a whole number, not 80.5"),
        ({"wait_s": 0}, "wait_s must be more than 0, not 0"),
        ({"wait_s": "long"}, "wait_s must be a number, not 'long'"),
        ({"towels": "x"}, "towels must be a whole number or 'auto', not 'x'"),
        ({"open": "perhaps"}, "open must be true or false, not 'perhaps'"),
        ({"guests": 3}, "guests must be a list, not 3"),
        ({"heat": -3, "wait_s": 0}, "heat must be at least 0, not -3; wait_s must be more than 0, not 0"),
    ],
)
def test_what_a_setting_may_be_is_told_in_plain_words(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        SaunaSettings.load(**given)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"heat = hot", "is not a TOML file: Invalid value"),
        (b"\xff", "is not a TOML file: it is not text in UTF-8"),
    ],
)
def test_a_file_that_is_no_toml_is_named(config: Path, data: bytes, said: str) -> None:
    config.write_bytes(data)
    with pytest.raises(SettingsError, match=f"sauna.toml {said}"):
        SaunaSettings.load(config)


def test_the_mark_that_windows_puts_before_a_text_does_no_harm(config: Path) -> None:
    config.write_text("heat = 60\n", encoding="utf-8-sig")
    assert SaunaSettings.load(config).heat == 60


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"can't read /\S+: Is a directory$"):
        SaunaSettings.load(tmp_path)


def test_an_unknown_key_in_the_file_is_named(config: Path) -> None:
    config.write_text("heet = 60\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="unknown setting 'heet'"):
        SaunaSettings.load(config)


def test_an_unknown_flag_is_named() -> None:
    with pytest.raises(SettingsError, match="unknown setting 'steam'"):
        SaunaSettings.load(steam=1)


def test_an_unknown_variable_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALKOOT_SAUNA_HEET", "60")
    with pytest.raises(SettingsError, match=r"TALKOOT_SAUNA_HEET .*\(did you mean TALKOOT_SAUNA_HEAT\?\)"):
        SaunaSettings.load()


def test_variables_of_other_roles_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALKOOT_LAUNDRY_HEET", "60")
    assert SaunaSettings.load().heat == 80


@pytest.mark.parametrize(("key", "value"), [("heat", 111), ("heat", -1), ("heat", "hot"), ("wait_s", 0)])
def test_a_value_out_of_bounds_is_refused_in_one_line_that_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"^{key} must be ") as caught:
        SaunaSettings.load(**{key: value})
    assert "\n" not in str(caught.value)


def test_a_value_out_of_bounds_in_the_environment_names_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALKOOT_SAUNA_HEAT", "200")
    with pytest.raises(SettingsError, match="heat"):
        SaunaSettings.load()


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"heat must .*wait_s must "):
        SaunaSettings.load(heat=200, wait_s=-1)


def test_of_very_many_wrong_keys_some_are_named(config: Path) -> None:
    """A stranger's file may have as many as fit into it, and to look for a similar key takes 50 µs."""
    config.write_text("".join(f"key{number} = 1\n" for number in range(1000)), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"unknown setting 'key\d+'.*; and 980 more$") as caught:
        SaunaSettings.load(config)
    assert str(caught.value).count("unknown setting") == 20


def test_a_missing_file_and_one_that_does_not_parse_are_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no file .*absent"):
        SaunaSettings.load(tmp_path / "absent.toml")
    config.write_text("heat = = 60", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"sauna\.toml is not a TOML file: Invalid value"):
        SaunaSettings.load(config)


def test_a_list_in_the_environment_that_does_not_parse_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALKOOT_SAUNA_GUESTS", "not json")
    with pytest.raises(SettingsError, match="guests"):
        SaunaSettings.load()


def test_removed_settings_are_ignored_with_a_warning(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config.write_text("heat = 60\nladle_ml = 300\n", encoding="utf-8")
    monkeypatch.setenv("TALKOOT_SAUNA_BENCHES", "of no kind that it ever was")
    settings = SaunaSettings.load(config, whisks=2)
    assert settings.heat == 60
    assert [record.getMessage() for record in caplog.records] == [
        "the setting benches no longer exists and is ignored: pass guests",
        "the setting ladle_ml no longer exists and is ignored: remove it",
        "the setting whisks no longer exists and is ignored: remove it",
    ]


def test_only_loading_takes_removed_settings() -> None:
    with pytest.raises(ValidationError, match="whisks"):
        SaunaSettings(whisks=2)  # type: ignore[call-arg]  # that is the point


def test_settings_that_are_not_given_warn_of_nothing(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    SaunaSettings.load(config, whisks=None)
    assert not caplog.records
