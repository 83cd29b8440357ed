"""Chooses the service manager that starts programs for their user on this system."""

import sys

from peer.platform import launchd, systemd, task_scheduler
from peer.platform.services import ServiceManager


def service_manager() -> ServiceManager:
    if sys.platform == "win32":
        return task_scheduler
    if sys.platform == "darwin":
        return launchd
    return systemd
