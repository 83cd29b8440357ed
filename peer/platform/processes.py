"""This process's share of the machine, and child processes that never outlive it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import psutil

if sys.platform != "win32":
    import resource

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST_ARENAS = -1, -3, -8
"""Parameters of mallopt, as malloc.h numbers them."""
_KEPT_BYTES = 256 * 2**20
_LARGE_BYTES = 32 * 2**20
"""The highest value that glibc accepts for this parameter. Larger blocks return to the system as soon as they are
freed.
"""
_WINDOWS_DESCRIPTORS = 2**16
"""Stands for "more than needed": Windows allows more handles than a process of ours opens."""
_NICE_BELOW_NORMAL = 1
"""From this niceness on, a process runs below normal priority on Windows."""
_NICE_IDLE = 15

# Each of these programs runs in a fresh interpreter, which then becomes the child. On Linux the kernel sends SIGKILL
# when the parent ends (PR_SET_PDEATHSIG = 1); elsewhere a second process waits for the end of either. Both check that
# the parent has not ended already. A separate process group keeps Ctrl-C from the child: only the parent gets it, and
# it still needs the child to leave properly.
_KILL_WITH_PARENT = "import ctypes;ctypes.CDLL(None).prctl(1,9) and sys.exit('prctl failed')\n"
_WATCH_PARENT = """\
import select
child = os.getpid()
if os.fork() == 0:
    ends = select.kqueue()
    for process in (parent, child):
        try:
            ends.control([select.kevent(process, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)], 0)
        except ProcessLookupError:
            break
    else:
        process = ends.control(None, 1)[0].ident
    if process == parent:
        os.kill(child, 9)
    os._exit(0)
"""
_BECOME_CHILD = """\
import os, sys
parent, most_bytes = int(sys.argv[1]), int(sys.argv[2])
{die_with_parent}
os.getppid() == parent or sys.exit(1)
if most_bytes:
    import contextlib, resource
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
os.setpgid(0, 0)
os.execv(sys.argv[3], sys.argv[3:])
"""

CHILD_FLAGS = 0
"""For `creationflags`: on Windows, they keep Ctrl-C from the child. On other systems, the child ignores it itself."""
if sys.platform == "win32":
    CHILD_FLAGS = subprocess.CREATE_NEW_PROCESS_GROUP


def die_with_parent(arguments: Sequence[str], most_bytes: int = 0) -> list[str]:
    """The command line that runs `arguments` as a child that is killed when this process ends in any way.

    `most_bytes`: the limit of its address space; 0: no limit. Windows and macOS do not enforce it.
    """
    if sys.platform == "win32":
        _end_children_with_this_process()
        return list(arguments)
    end = _KILL_WITH_PARENT if sys.platform == "linux" else _WATCH_PARENT
    code = _BECOME_CHILD.format(die_with_parent=end)
    return [sys.executable, "-I", "-S", "-c", code, str(os.getpid()), str(most_bytes), *arguments]


def ask_to_end(pid: int) -> None:
    """Asks a child that was started with CHILD_FLAGS to end in an orderly way. Raises ProcessLookupError."""
    if sys.platform == "win32":
        os.kill(pid, signal.CTRL_BREAK_EVENT)
    else:
        os.kill(pid, signal.SIGTERM)


def how_to_kill(pid: int) -> str:
    """The command line that ends a process at once."""
    return f"taskkill /F /PID {pid}" if sys.platform == "win32" else f"kill -9 {pid}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lower_priority(niceness: int) -> None:
    """Lets other programs run first. Call it before any thread starts: a thread inherits its starter's priority."""
    if sys.platform != "win32":
        os.nice(max(0, niceness - os.nice(0)))
    elif niceness >= _NICE_IDLE:
        psutil.Process().nice(psutil.IDLE_PRIORITY_CLASS)
    elif niceness >= _NICE_BELOW_NORMAL:
        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)


def most_descriptors() -> int:
    """How many files and connections this process may have open."""
    if sys.platform == "win32":
        return _WINDOWS_DESCRIPTORS
    else:  # noqa: RET505  # or mypy looks for `resource` on Windows
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_descriptors() -> int:
    """How many files and connections this process has open."""
    if sys.platform == "win32":
        return psutil.Process().num_handles()
    return len(os.listdir("/dev/fd"))


def raise_descriptor_limit() -> None:
    """Raises the limit of open files and connections, for this process and its children, as far as the system
    allows.
    """
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with contextlib.suppress(ValueError, OSError):  # macOS gives no number
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_freed_memory() -> None:
    """Lets the process keep up to 256 MiB of freed memory. Call it before threads start: they have their own arenas.

    Each batch frees its gradients and activations, and the next one needs as much again. Returning that memory to the
    system, which then zeroes it again, took a tenth of a node's CPU time. Only glibc has these settings.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_MOST_ARENAS, 1)  # memory that one thread freed can be used by the others
            libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
            libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def return_freed_memory() -> None:
    """Returns the freed memory to the system now, where the C library is glibc."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


if sys.platform == "win32":
    from ctypes import wintypes

    _KILL_ON_JOB_CLOSE = 0x2000
    _EXTENDED_LIMITS = 9
    _job: int | None = None

    class _Limits(ctypes.Structure):
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

        _fields_ = (
            ("process_time", wintypes.LARGE_INTEGER),
            ("job_time", wintypes.LARGE_INTEGER),
            ("flags", wintypes.DWORD),
            ("least_working_set", ctypes.c_size_t),
            ("most_working_set", ctypes.c_size_t),
            ("most_processes", wintypes.DWORD),
            ("affinity", ctypes.c_size_t),
            ("priority_class", wintypes.DWORD),
            ("scheduling_class", wintypes.DWORD),
            ("io_counters", ctypes.c_ulonglong * 6),
            ("process_memory", ctypes.c_size_t),
            ("job_memory", ctypes.c_size_t),
            ("peak_process_memory", ctypes.c_size_t),
            ("peak_job_memory", ctypes.c_size_t),
        )

    def _end_children_with_this_process() -> None:
        """Puts this process, and so its children, into a job. The job ends with its only handle, which this process
        holds.

        Raises OSError.
        """
        global _job
        if _job is not None:
            return
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.CreateJobObjectW.restype = wintypes.HANDLE
        kernel.CreateJobObjectW.argtypes = [wintypes.LPVOID, wintypes.LPCWSTR]
        kernel.SetInformationJobObject.argtypes = [
            wintypes.HANDLE, ctypes.c_int, wintypes.LPVOID, wintypes.DWORD,
        ]  # fmt: skip
        kernel.GetCurrentProcess.restype = wintypes.HANDLE
        kernel.AssignProcessToJobObject.argtypes = [wintypes.HANDLE, wintypes.HANDLE]
        job = kernel.CreateJobObjectW(None, None)
        limits = _Limits(flags=_KILL_ON_JOB_CLOSE)
        if not (
            job
            and kernel.SetInformationJobObject(
                job, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
            )
            and kernel.AssignProcessToJobObject(job, kernel.GetCurrentProcess())
        ):
            raise ctypes.WinError(ctypes.get_last_error())
        _job = job
