"""The console entry, which imports the commands. Until it has, Ctrl-C ends the process without a traceback."""

import signal


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from talkoot.cli import main

    main()


if __name__ == "__main__":
    main()
