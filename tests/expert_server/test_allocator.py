"""A node does not return memory to the system between batches, and does when it gives its experts up."""

import subprocess
import sys

BATCHES = """
import resource
import torch
from expert_server.allocator import keep_freed_memory, return_freed_memory

keep_freed_memory()

def batch():
    gradients = [torch.ones(2**18) for _ in range(16)]
    return torch.ones(100)  # small, and above them in memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_bytes():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

kept = [batch() for _ in range(5)]
before = faults()
kept += [batch() for _ in range(20)]
print((faults() - before) // 20)
before = resident_bytes()
return_freed_memory()
print(before - resident_bytes())
"""


def test_batches_use_memory_again_until_it_is_returned() -> None:
    command = [sys.executable, "-W", "ignore", "-c", BATCHES]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    faults_per_batch, returned = map(int, output.split())
    assert faults_per_batch < 400, "16 MiB are 4096 pages"
    assert returned > 8 * 2**20
