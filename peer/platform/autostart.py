"""Which of the three starts programs for their user here."""

import sys

from peer.platform import launchd, systemd, task_scheduler
from peer.platform.services import ServiceManager


def service_manager() -> ServiceManager:
    if sys.platform == "win32":
        return task_scheduler
    if sys.platform == "darwin":
        return launchd
    return systemd
