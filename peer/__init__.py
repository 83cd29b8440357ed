"""How two peers talk, and the plain things that all other packages need."""

import os
import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, Final

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
"""Otherwise gRPC stops and restarts its threads around every fork, and crashes if one of them is busy. On a loaded
machine, one in ten nodes crashed because calls reached it while it started p2pd. No process of ours uses gRPC after a
fork.
"""

SOFTWARE_VERSION: Final = "0.2.0.dev0"
PROTOCOL_VERSION: Final = 5
"""Peers of another protocol version are refused. The error names both versions."""


class _LazyPackage(ModuleType):
    """A package that runs its own __init__ only when somebody asks for what it defines, not for each submodule."""

    def __getattr__(self, name: str) -> Any:
        if (submodule := sys.modules.get(f"{self.__name__}.{name}")) is not None:
            return submodule
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]  # from now on, what is not there is nowhere
        spec.loader.exec_module(self)
        return getattr(self, name)


if "hivemind" not in sys.modules and (_spec := find_spec("hivemind")) is not None:
    # its __init__ imports 470 modules that nothing here uses: half a second of CPU time and 45 MB in each process
    sys.modules["hivemind"] = module_from_spec(_spec)
    sys.modules["hivemind"].__class__ = _LazyPackage
