"""Every kernel source compiles for every GPU that it is for, and what it takes is known: no GPU needed, only NVRTC (or nvcc)."""
import os
import re
import shutil
import subprocess

import pytest

import nvrtc
import segquant_nb.cuda as cuda
from kernel_variants import VARIANTS

LIBRARY, NVCC = nvrtc.find(), shutil.which('nvcc')


def worth_compiling(file, options, arch):
    "What is no E4M3 has the same code for sm_89 as for sm_80 (`__CUDA_ARCH__` is asked in numbers.cuh alone): one of each source shows that it compiles"
    e4m3 = {'mma/sm80_s8_gemm.cu': 2, 'quantize/sm80_codes.cu': 3}
    return arch != 'sm_89' or options == next(o for f, o, _ in VARIANTS if f == file) or options.get('FORMAT', -1) == e4m3.get(file)


CASES = [(file, options, arch) for file, options, archs in VARIANTS for arch in archs if worth_compiling(file, options, arch)]


def by_nvcc(file, arch, defines, folder):
    "What the compiler on the path says"
    done = subprocess.run([NVCC, f'-gencode=arch=compute_{arch[3:]},code={arch}', '-cubin', '-std=c++17', '-Xptxas', '-v', *cuda._options(defines),
                           f'-I{cuda.cuda_src_dir()}', '-o', folder/'kernel.cubin', cuda.cuda_src_dir()/file], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stderr


@pytest.mark.skipif(not (LIBRARY or NVCC or 'CI' in os.environ), reason='no NVRTC (pip install nvidia-cuda-nvrtc) and no nvcc')
@pytest.mark.parametrize('file, options, arch', CASES, ids=[f'{a}-{f.split("/")[1]}-{"".join(map(str, o.values()))}' for f, o, a in CASES])
def test_compiles(file, options, arch, monkeypatch, tmp_path, record_property):
    assert LIBRARY or NVCC, 'CI needs a compiler: pip install nvidia-cuda-nvrtc'
    if LIBRARY:
        monkeypatch.setattr(cuda, '_nvrtc', lambda: nvrtc.Nvrtc(LIBRARY))
        code, log = cuda.compile_cubin(file, arch, options)
        assert code.startswith(b'\x7fELF')
    else:
        log = by_nvcc(file, arch, options, tmp_path)
    # An array that is indexed by what is not known when compiled goes to memory, without being called a spill.
    if file == 'quantize/sm80_codes.cu': assert int(re.search(r'(\d+) bytes stack frame', log)[1]) <= 32, log
    cost = cuda.kernel_cost(log)
    record_property('cost', repr(cost))
    assert 'warning' not in log and 'Performance Loss' not in log, log
    # A few bytes at the edge of a pass over memory cost nothing; in the loop of a product they would.
    assert 0 < cost.registers <= 255 and cost.spilled <= (0 if 'gemm' in file else 32), f'{cost}\n{log}'


@pytest.mark.skipif(not LIBRARY, reason='no NVRTC: pip install nvidia-cuda-nvrtc')
def test_an_error_in_a_source_is_shown_with_its_place(monkeypatch):
    monkeypatch.setattr(cuda, '_nvrtc', lambda: nvrtc.Nvrtc(LIBRARY))
    monkeypatch.setattr(cuda, 'cuda_sources', lambda: {'common/a.cuh': '', 'bad.cu': '#include "common/a.cuh"\nextern "C" __global__ void f() { nonsense; }'})
    with pytest.raises(RuntimeError, match=r'bad.cu does not compile for sm_80(.|\n)*bad.cu\(2\).*nonsense'):
        cuda.compile_cubin('bad.cu', 'sm_80')


def test_every_source_is_compiled_here():
    assert {name for name in cuda.cuda_sources() if name.endswith('.cu')} == {file for file, _, _ in VARIANTS}


def test_one_architecture_only_has_code_of_its_own():
    "If another source asks, `worth_compiling` has to know"
    asking = {name: text.count('__CUDA_ARCH__') for name, text in cuda.cuda_sources().items() if '__CUDA_ARCH__' in text}
    assert asking == {'common/numbers.cuh': 1} and '__CUDA_ARCH__ >= 890' in cuda.cuda_sources()['common/numbers.cuh']
