"""Scripts whose tensors end at a page of memory that nobody may touch, in a process that would not survive it."""
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
START = '''
import ctypes, mmap, sys
sys.path.insert(0, {tests!r})
import torch
from emulate import emulated_gpu
libc, page, kept, empty = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, [], torch.empty
libc.mmap.restype = ctypes.c_void_p

def guarded(*shape, dtype=torch.float32, device=None, before=False):
    "An empty tensor that ends where a page begins that nobody may touch, or starts where one ends"
    like = empty(*shape, dtype=dtype, device='meta')
    size = like.numel()*like.element_size()
    room = -(-size//page)*page
    base = libc.mmap(None, ctypes.c_size_t(room + 2*page), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
    for wall in (base, base + page + room): assert not libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0)
    at = base + page if before else base + page + (room - size)//16*16
    kept.append((ctypes.c_char*size).from_address(at))
    return torch.frombuffer(kept[-1], dtype=dtype).view(like.shape) if size else like

def moved(x, before): return guarded(*x.shape, dtype=x.dtype, before=before).copy_(x)
'''


def in_guarded_memory(inside: str, outside: str) -> subprocess.CompletedProcess:
    """Scripts with `emulated_gpu`, and `moved` and `guarded` tensors.

    The first one has to get to its end; what comes after it has to end the process, by a signal or by a refusal.
    """
    code = START.replace('{tests!r}', repr(str(TESTS))) + inside + "print('inside', flush=True)\n" + outside
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.stdout == 'inside\n' and done.returncode, (done.returncode, done.stderr)
    return done
