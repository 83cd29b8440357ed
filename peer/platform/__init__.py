"""What differs between Linux, macOS and Windows, one subject in each module.

Nothing else names an operating system, uvloop, or a function that only POSIX has; `tests/test_platforms.py` checks it,
and mypy checks everything for all three systems. Windows and macOS code that can't run on Linux has not been run.
"""
