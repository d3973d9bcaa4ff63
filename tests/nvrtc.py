"""NVRTC without a GPU and without CuPy: the pip package nvidia-cuda-nvrtc by ctypes, under the names that CuPy gives it."""
import ctypes
import sys
from pathlib import Path


def find() -> Path | None:
    "The library inside an installed wheel of NVIDIA's"
    found = (lib for path in sys.path for lib in Path(path or '.').glob('nvidia/*/lib/libnvrtc.so.*'))
    return next((lib for lib in sorted(found) if '.alt.' not in lib.name), None)


class NvrtcError(RuntimeError):
    pass


class Nvrtc:
    "createProgram, compileProgram, getCUBIN, getProgramLog, destroyProgram, getVersion: as `cupy.cuda.nvrtc`"
    def __init__(self, library: Path):
        self.lib = ctypes.CDLL(str(library))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, name, *args):
        if code := getattr(self.lib, 'nvrtc' + name)(*args):
            raise NvrtcError(f'nvrtc{name}: {self.lib.nvrtcGetErrorString(code).decode()}')

    def _bytes(self, program, name):
        size = ctypes.c_size_t()
        self._call(f'Get{name}Size', program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f'Get{name}', program, text)
        return text.raw

    def getVersion(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call('Version', ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def createProgram(self, text, name, headers, include_names):
        program, n = ctypes.c_void_p(), len(headers)
        strings = ctypes.c_char_p*n
        self._call('CreateProgram', ctypes.byref(program), text.encode(), name.encode(), n, strings(*headers), strings(*include_names))
        return program

    def compileProgram(self, program, options):
        self._call('CompileProgram', program, len(options), (ctypes.c_char_p*len(options))(*[o.encode() for o in options]))

    def getCUBIN(self, program): return self._bytes(program, 'CUBIN')

    def getProgramLog(self, program): return self._bytes(program, 'ProgramLog').rstrip(b'\0').decode()

    def destroyProgram(self, program): self._call('DestroyProgram', ctypes.byref(program))
