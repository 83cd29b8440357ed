"""Formats and parses sizes, ages, counts and hosts, and makes text from other peers safe to show."""

import ipaddress
import re
import reprlib

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(?:([kmgt])(i?)b?|b?)", re.IGNORECASE)
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]+))(?::[0-9]{1,5})?")


def parse_bytes(value: object) -> object:
    """Parses sizes such as `2GB`, `512MiB` or `1.5g` into bytes. Returns values that are not text unchanged. Raises
    ValueError.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size: write for example 2GB or 512MiB")
    number, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** " kmgt".index((prefix or " ").lower())
    return int(float(number) * unit)


def bytes_in_words(size: float) -> str:
    """A size such as `512 MB`, to three digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def age_in_words(seconds: float) -> str:
    """An age such as `90 s`, `12 min`, `5 h` or `3 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def counted(number: int, noun: str, form: str = "") -> str:
    """A count such as `1 expert` or `1234 rows`, or `1,234 rows` with `,` as the form."""
    return f"{number:{form}} {noun}{'' if number == 1 else 's'}"


def endpoint(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def in_brief(value: object) -> str:
    """A wrong argument, for an error message, such as `'0'` or `tensor([1., 2.])`."""
    return printable(reprlib.repr(value))


def printable(text: str, most: int = 200) -> str:
    """Another peer's text, safe for a log, an error or a terminal: one line of at most `most` printable characters.

    Other characters, such as an escape, a line break or a change of direction, become blanks.
    """
    shown = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    return " ".join(shown.split())[:most].rstrip()


def host_in(header: str) -> str:
    """The host in an HTTP Host header, without its port; empty if the header is not valid by RFC 9110."""
    match = _HOST.fullmatch(header)
    return "" if match is None else match[1] or match[2]


def is_loopback(host: str) -> bool:
    """Whether this name or address always means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
