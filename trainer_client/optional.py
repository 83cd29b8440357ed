"""What some options need and not everybody installs."""

from importlib.util import find_spec

from peer.errors import SettingsError


def require(module: str, extra: str, purpose: str) -> None:
    """Raises SettingsError that says how to install it."""
    if find_spec(module) is None:
        raise SettingsError(f"{purpose} needs the package {module}: pip install 'talkoot[{extra}]'")
