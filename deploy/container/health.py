"""Exits with status 0 if the node of this state folder answers: the node's event loop, asked over its control socket.

It imports nothing of Talkoot, since that import would take longer than the answer.
"""

import json
import os
import socket
import sys

_DEADLINE_S = 8.0
_LONGEST_REPLY = 4096


def main() -> int:
    with socket.socket(socket.AF_UNIX) as node:
        node.settimeout(_DEADLINE_S)
        node.connect(os.path.join(os.environ["TALKOOT_NODE_STATE"], "control.sock"))
        node.sendall(b'{"version": 2, "command": "status"}\n')
        with node.makefile("rb") as answers:
            reply = json.loads(answers.readline(_LONGEST_REPLY))
    return 0 if reply.get("status") else 1


if __name__ == "__main__":
    sys.exit(main())
