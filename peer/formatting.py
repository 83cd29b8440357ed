"""Counts as people read them."""


def counted(number: int, noun: str, form: str = "") -> str:
    """Such as `1 expert`, `1234 rows`, or with `,` as its form `1,234 rows`."""
    return f"{number:{form}} {noun}{'' if number == 1 else 's'}"
