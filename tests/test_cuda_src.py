"""The device headers, compiled for the host and compared with Python."""
import ctypes
import os
import shutil
import subprocess

import pytest
import torch

from segquant_nb.cuda import cuda_src_dir
from segquant_nb.formats import pack_int4, unpack_int4

COMPILER = next(filter(None, map(shutil.which, ('c++', 'g++', 'clang++'))), None)

SOURCE = '''
#include <cstdint>
#include "common/int4.cuh"
extern "C" void unpack_words(const uint32_t* packed, uint32_t* codes, int words) {
    for (int i = 0; i < words; ++i) unpack_int4x8(packed[i], codes[2 * i], codes[2 * i + 1]);
}
'''


@pytest.mark.skipif(COMPILER is None and 'CI' not in os.environ, reason='no C++ compiler on this machine (c++, g++ or clang++)')
def test_int4_header_unpacks_what_python_packs(tmp_path):
    assert COMPILER, 'CI needs a C++ compiler'
    source, library = tmp_path/'unpack.cpp', tmp_path/'unpack.so'
    source.write_text(SOURCE)
    subprocess.run([COMPILER, '-std=c++17', '-O1', '-Wall', '-Werror', '-shared', '-fPIC', f'-I{cuda_src_dir()}',
                    '-o', library, source], check=True)
    torch.manual_seed(0)
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(4)
    packed = torch.cat([every_byte, torch.randint(256, (4096,), dtype=torch.uint8)])
    codes = torch.empty(2*packed.numel(), dtype=torch.int8)
    ctypes.CDLL(str(library)).unpack_words(ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(codes.data_ptr()),
                                           packed.numel()//4)
    assert torch.equal(codes, unpack_int4(packed))
    assert torch.equal(pack_int4(codes), packed)
