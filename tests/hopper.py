"""What the tests of Hopper's kernels share: device code compiled for the host, and a driver that keeps what it is asked."""
import ctypes
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest

import segquant_nb.hopper_gemm as hopper_gemm
from segquant_nb.codes import PackedColumns
from segquant_nb.cuda import cuda_src_dir

COMPILER = next(filter(None, map(shutil.which, ('c++', 'g++', 'clang++'))), None)


def host_library(folder, source):
    "A C++ source that includes headers of cuda_src, as a library"
    if COMPILER is None and 'CI' not in os.environ: pytest.skip('no C++ compiler on this machine (c++, g++ or clang++)')
    (folder/'device_code.cpp').write_text(source)
    subprocess.run([COMPILER, '-std=c++17', '-O1', '-Wall', '-Werror', '-Wno-unknown-pragmas', '-shared', '-fPIC', f'-I{cuda_src_dir()}',
                    '-o', folder/'device_code.so', folder/'device_code.cpp'], check=True)
    return ctypes.CDLL(str(folder/'device_code.so'))


def recorded_maps(monkeypatch, *modules):
    "For a fixture to yield from: what a driver is asked to encode; a map is 128 times its number, from 1 on"
    asked = []

    def encode(target, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill):
        asked.append(dict(kind=kind, rank=rank, address=address.value, sizes=list(sizes), strides=list(strides), box=list(box)))
        assert target.value % 64 == 0 and swizzle == (3 if rank == 2 else 0) and list(steps) == [1]*rank
        ctypes.memset(target, len(asked), 128)
        return 0

    for module in (hopper_gemm, *modules): monkeypatch.setattr(module, '_driver', lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    hopper_gemm.tensor_map.cache_clear()
    yield asked
    hopper_gemm.tensor_map.cache_clear()


def random_sizes(rng):
    "Rows, channels and input segments"
    sizes = tuple(rng.randint(1, 200) for _ in range(rng.choice((1, 1, 2, 5))))
    return rng.randint(1, 700), rng.randint(1, 90)*8, PackedColumns(sizes)


def defines(launch):
    "What the source of a launch was told"
    return {name: int(value) for name, value in (o[2:].split('=') for o in launch.options if o.startswith('-D'))}
