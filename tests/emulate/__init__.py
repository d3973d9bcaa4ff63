"""A GPU without a GPU: the kernels of cuda_src, built by the host's C++ compiler and run on CPU tensors.

    with emulated_gpu() as gpu:
        y = ...          # everything that launches a kernel works on CPU tensors
    gpu.launches         # what was launched

It stands in for CuPy, so that the package's own checks, compile options, grids and arguments are
what runs. `emulate.h` says what it is strict about.
"""
import ctypes
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import segquant_nb.cuda as cuda
from segquant_nb import codes

HERE = Path(__file__).resolve().parent
COMPILER = next(filter(None, map(shutil.which, ('c++', 'g++', 'clang++'))), None)
FLAGS = ['-std=c++17', '-O1', '-ffp-contract=off', '-fno-strict-aliasing', '-U_FORTIFY_SOURCE', '-Wall', '-Wno-unknown-pragmas',
         '-Wno-unused-function', '-Wno-unused-variable', '-shared', '-fPIC']
ENTRY = '''
#include "{source}"
extern "C" int emulate_run(void** arguments, const unsigned* grid, const unsigned* block, size_t shared, unsigned long long seed, int early) {{
    emulate::machine.random = seed;
    emulate::machine.early_copies = early;
    return emulate::launch({function}, arguments, {{grid[0], grid[1], grid[2]}}, {{block[0], block[1], block[2]}}, shared);
}}
extern "C" int emulate_sizes(int* sizes) {{ return emulate::argument_sizes({function}, sizes); }}
extern "C" const char* emulate_error() {{ return emulate::machine.error; }}
'''


@dataclass
class Launch:
    "One kernel launch, as CuPy would have seen it"
    function: str
    options: tuple
    grid: tuple
    block: tuple
    arguments: tuple
    shared: int


def kept(*parts) -> Path:
    "A folder in the temporary one, under a name made of what goes into it"
    key = hashlib.sha256(json.dumps([*parts, FLAGS, COMPILER]).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir())/f'segquant-emulation-{os.getuid()}'/key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiled(target: Path, *arguments) -> str:
    "What the compiler complains about, if it does; others may look for the same file"
    fresh = target.with_name(f'{os.getpid()}{target.suffix}')
    done = subprocess.run([COMPILER, *FLAGS, *arguments, '-o', fresh], capture_output=True, text=True)
    if done.returncode: return done.stderr
    fresh.replace(target)


@cache
def emulator() -> Path:
    "emulate.h, beside it what the compiler made of it: to read it takes a fifth of a build's time"
    text = (HERE/'emulate.h').read_text()
    header = kept(text)/'emulate.h'
    if not (ready := header.with_name('emulate.h.gch')).exists():
        header.write_text(text)
        compiled(ready, '-x', 'c++-header', header)
    return header


def build(name: str, text: str, headers: dict, options: tuple, function: str) -> ctypes.CDLL:
    "The source as a host library; kept"
    assert COMPILER, 'the emulation needs a C++ compiler: c++, g++ or clang++'
    defines = [o for o in options if o.startswith('-D')]
    folder = kept(name, text, headers, defines, function, str(emulator()), ENTRY)
    library = folder/'kernel.so'
    if not library.exists():
        for path, content in {**headers, name: text}.items():
            (folder/path).parent.mkdir(parents=True, exist_ok=True)
            (folder/path).write_text(content)
        (folder/'entry.cpp').write_text(ENTRY.format(source=name, function=function))
        if complaints := compiled(library, *defines, '-include', emulator(), f'-I{folder}', folder/'entry.cpp'):
            raise RuntimeError(f'{name} does not compile for the host:\n{complaints}')
    return ctypes.CDLL(str(library))


def as_argument(value):
    "What CuPy makes of a Python or NumPy value"
    if isinstance(value, np.generic | np.ndarray): return np.ascontiguousarray(value)
    if value is None: return np.zeros((), np.uint64)
    return np.asarray(value, {bool: np.bool_, int: np.int64, float: np.float64}[type(value)])


class Gpu:
    "What the emulated CuPy shares"
    def __init__(self, seed: int = 0, early_copies: bool = False, run: bool = True):
        self.seed, self.early_copies, self.run = seed, early_copies, run
        self.launches: list[Launch] = []
        self.max_shared = 227*1024

    def launch(self, program: dict, function: str, grid, block, arguments, shared):
        self.launches.append(Launch(function, tuple(program['options']), grid, block, arguments, shared))
        assert len(grid) <= 3 and 1 <= min(grid) and grid[0] < 2**31 and max((*grid[1:], 1)) < 2**16, f'grid {grid}'
        assert len(block) <= 3 and 1 <= np.prod(block) <= 1024, f'block {block}'
        if not self.run: return
        library = build(program['name'], program['text'], program['headers'], tuple(program['options']), function)
        values = [as_argument(a) for a in arguments]
        sizes = (ctypes.c_int*64)()
        wanted = list(sizes[:library.emulate_sizes(sizes)])
        assert [v.nbytes for v in values] == wanted, f'{function}: arguments of {[v.nbytes for v in values]} bytes, the kernel takes {wanted}'
        pointers = (ctypes.c_void_p*len(values))(*[v.ctypes.data for v in values])
        three = [(ctypes.c_uint*3)(*(*dims, 1, 1)[:3]) for dims in (grid, block)]
        library.emulate_error.restype = ctypes.c_char_p
        if library.emulate_run(pointers, *three, ctypes.c_size_t(shared), ctypes.c_ulonglong(2*self.seed + 1), int(self.early_copies)):
            raise RuntimeError(f'{function}: {library.emulate_error().decode()}')
        self.seed += 1

    def cupy(self):
        "The part of CuPy that the package uses"
        programs, functions = {}, {}

        def create(text, name, headers, names):
            programs[len(programs) + 1] = dict(text=text, name=name, headers={n.decode(): h.decode() for n, h in zip(names, headers)})
            return len(programs)

        class RawModule:
            def __init__(module, path): module.path = path
            def get_function(module, function):  # CuPy, too, gives the same one again
                if (module.path, function) not in functions: functions[module.path, function] = RawKernel(json.loads(Path(module.path).read_text()), function)
                return functions[module.path, function]

        class RawKernel:
            max_dynamic_shared_size_bytes, kernel = 48*1024, SimpleNamespace(ptr=None)

            def __init__(kernel, program, function): kernel.program, kernel.function = program, function

        class Context:
            def __init__(*_): pass
            def __enter__(self): return self
            def __exit__(*_): pass

        nvrtc = SimpleNamespace(
            getVersion=lambda: (13, 0), createProgram=create, getProgramLog=lambda i: '', destroyProgram=lambda i: None,
            compileProgram=lambda i, options: programs[i].update(options=list(options)), getCUBIN=lambda i: json.dumps(programs[i]).encode())
        runtime = SimpleNamespace(driverGetVersion=lambda: 13000, runtimeGetVersion=lambda: 13000)
        return SimpleNamespace(__version__='14.2.0', RawModule=RawModule,
                               cuda=SimpleNamespace(nvrtc=nvrtc, runtime=runtime, Device=Context))


def start(room):
    "What the driver does with the memory that a `Launcher` has laid out: what it finds there is what runs"
    launcher = room.launcher
    raw, gpu = launcher.kernel.raw, RUNNING[-1]  # a launcher may outlive the GPU that it was made on
    values = launcher.format.unpack_from(room.bytes)
    found = [ctypes.string_at(place, struct.calcsize(part)) for place, part in zip(room.given[2], launcher.arguments)]
    arguments = tuple(np.frombuffer(bytes(data), KINDS.get(part, f'V{len(data)}'))[0] for part, data in zip(launcher.arguments, found))
    assert launcher.shared <= min(raw.max_dynamic_shared_size_bytes, gpu.max_shared), f'{launcher.shared} bytes of shared memory'
    def trimmed(dims): return tuple(dims[:max((i + 1 for i in range(3) if dims[i] != 1), default=1)])
    gpu.launch(raw.program, raw.function, trimmed(values[:3]), trimmed(values[3:6]), arguments, values[6])
    return 0


RUNNING: list[Gpu] = []
KINDS = {'P': np.uint64, 'Q': np.uint64, 'q': np.int64, 'i': np.int32, 'f': np.float32}


@contextmanager
def _as_cupy(module):
    "mock.patch.dict would forget everything else that is imported meanwhile, which torch.compile does not survive"
    real = sys.modules.get('cupy')
    sys.modules['cupy'] = module
    try:
        yield
    finally:
        if real is None: del sys.modules['cupy']
        else: sys.modules['cupy'] = real


@contextmanager
def emulated_gpu(seed: int = 0, early_copies: bool = False, run: bool = True, capability: tuple[int, int] = (8, 0),
                 processors: int = 108):
    "Inside, kernels launch on CPU tensors; `run=False` only records. What `torch.empty` gives is poisoned"
    gpu, poisoning = Gpu(seed, early_copies, run), torch.are_deterministic_algorithms_enabled()
    with (tempfile.TemporaryDirectory() as cache, _as_cupy(gpu.cupy()), mock.patch.dict(os.environ, XDG_CACHE_HOME=cache),
          mock.patch.multiple(cuda, _DEVICE='cpu', cuda_problem=lambda *_: None, _stream=lambda device: 0, _is_current=lambda device: True, _capability=lambda device: capability,
                              _processors=lambda device: processors),
          mock.patch.object(cuda.Room, 'start', start)):
        forget()
        RUNNING.append(gpu)
        torch.use_deterministic_algorithms(True)  # what a kernel does not write is NaN, or the largest integer
        try:
            yield gpu
        finally:
            torch.use_deterministic_algorithms(poisoning)
            RUNNING.pop()
            forget()


def forget():
    "As in a new process: no kernel is loaded"
    cuda.get_kernel.cache_clear()
    codes._pass.cache_clear()
