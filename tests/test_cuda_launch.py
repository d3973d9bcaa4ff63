"""What happens around a kernel: checks, compile options, caches, arguments, messages; CuPy is a recording stand-in."""
import os
import re
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from emulate import emulated_gpu, forget

import segquant_nb.cuda as cuda
from segquant_nb.codes import PackedColumns, quantize_cuda
from segquant_nb.gemm import pick_tile, w8a8_sm80


def layer(M=70, N=40, K=128, terms=1):
    g = torch.Generator().manual_seed(0)
    def codes(rows): return torch.randint(-127, 128, (rows, K), dtype=torch.int8, generator=g)
    return dict(codes=codes(M), weight=codes(N), scale_x=torch.rand(terms, M, generator=g), scale_w=torch.rand(N, generator=g))


def test_a_launch_passes_addresses_and_plain_numbers():
    given = layer()
    with emulated_gpu(run=False) as gpu: y = w8a8_sm80(**given, bias=torch.ones(40))
    [launch] = gpu.launches
    assert launch.function == 's8_gemm' and launch.grid == (2,) and launch.block == (128,) and launch.shared == 128*64*4
    assert launch.options[0] == '-arch=sm_80' and {'-DDUAL=0', '-DSEGMENTED=0', '-DBM=64', '-DOUTPUT=0'} <= set(launch.options)
    assert not any('ftz' in o or 'fast' in o for o in launch.options)
    pointers = [a for a in launch.arguments if isinstance(a, np.uint64)]
    assert pointers[:4] == [np.uint64(t.data_ptr()) for t in (given['codes'], given['weight'], y, given['scale_x'])]
    assert [int(a) for a in launch.arguments if isinstance(a, np.int32)] == [70, 0, 70, 40, 128, 1]
    assert all(isinstance(a, np.uint64 | np.int32) for a in launch.arguments)


def test_a_kernel_is_compiled_once_and_loaded_once(tmp_path):
    x, columns = torch.randn(5, 64), PackedColumns((64,))
    compiled = []
    with emulated_gpu(run=False) as gpu:
        stub = sys.modules['cupy']
        create = stub.cuda.nvrtc.createProgram
        stub.cuda.nvrtc.createProgram = lambda *args: compiled.append(args[1]) or create(*args)
        for _ in range(3): quantize_cuda(x, columns)
        assert len(compiled) == 1 and len(gpu.launches) == 3
        forget()  # a new process finds the file
        quantize_cuda(x, columns)
        assert len(compiled) == 1
        quantize_cuda(x, columns, dual=True)  # other options, other code
        assert len(compiled) == 2
        forget()
        with mock.patch.object(cuda, 'cuda_sources', lambda s=cuda.cuda_sources(): s | {'common/device.cuh': s['common/device.cuh'] + '\n'}):
            quantize_cuda(x, columns)  # a changed header, other code
        assert len(compiled) == 3
        files = os.listdir(os.path.join(os.environ['XDG_CACHE_HOME'], 'segquant_nb'))
        assert len(files) == 3 and all(f.endswith('.cubin') for f in files)


def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(tmp_path):
    (tmp_path/'file').write_text('')
    with emulated_gpu(run=False) as gpu, mock.patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path/'file')):
        quantize_cuda(torch.randn(5, 64), PackedColumns((64,)))
    assert len(gpu.launches) == 1


def test_nobody_takes_away_the_shared_memory_that_another_was_given():
    "The same function with the same options, for calls of different sizes"
    file, place = ('quantize/sm80_unpack_int4.cu', 'unpack_int4'), torch.device('cpu')
    with emulated_gpu(run=False) as gpu:
        for shared in (200, 100, 200, 220, 40, 220):
            kernel = cuda.get_kernel(*file, place, shared*1024)
            cuda.launch(kernel, (1,), (64,), None, None, np.int64(0), shared=shared*1024)
    assert len(gpu.launches) == 6


def test_hopper_is_asked_for_by_its_full_name():
    for capability, arch in (((8, 0), 'sm_80'), ((8, 9), 'sm_89'), ((9, 0), 'sm_90a'), ((12, 0), 'sm_120')):
        with emulated_gpu(run=False, capability=capability) as gpu:
            quantize_cuda(torch.randn(2, 64), PackedColumns((64,)))
        assert gpu.launches[0].options[0] == f'-arch={arch}'


def test_debug_tells_shape_path_and_options(monkeypatch, capsys):
    monkeypatch.setenv('SEGQUANT_DEBUG', '1')
    with emulated_gpu(): w8a8_sm80(**layer())
    told = capsys.readouterr().err
    for part in ('mma/sm80_s8_gemm.cu', 's8_gemm', 'DUAL=0', '(70, 128) int8', '(40, 128) int8', 'grid (2,)'): assert part in told
    monkeypatch.setenv('SEGQUANT_DEBUG', '0')
    with emulated_gpu(): w8a8_sm80(**layer())
    assert not capsys.readouterr().err


def test_nothing_to_do_launches_nothing():
    with emulated_gpu(run=False) as gpu:
        assert w8a8_sm80(**layer(M=0)).shape == (0, 40)
        assert quantize_cuda(torch.randn(0, 64), PackedColumns((64,))).codes.shape == (0, 64)
        assert cuda.unpack_int4_cuda(torch.zeros(0, 16, dtype=torch.uint8)).shape == (0, 32)
    assert not gpu.launches


def test_a_refused_call_launches_nothing_and_writes_nothing():
    given = layer()
    before = {k: v.clone() for k, v in given.items()}
    wrong = [dict(codes=given['codes'].float()), dict(codes=given['codes'].t().contiguous().t()), dict(codes=given['codes'][:, :100].contiguous()),
             dict(weight=given['weight'].flatten()[1:1 + 39*128].view(39, 128)), dict(scale_x=torch.ones(3, 70)), dict(scale_w=torch.ones(41)),
             dict(scale_w=torch.ones(40).half()), dict(bias=torch.ones(40, 1)), dict(dtype=torch.int8), dict(codes=given['codes'].to('meta')),
             dict(columns=PackedColumns((64, 64, 64))), dict(dual=True), dict(codes=[1])]
    with emulated_gpu() as gpu:
        for change in wrong:
            with pytest.raises((TypeError, ValueError)) as error: w8a8_sm80(**{**given, **change})
            assert str(error.value).endswith('.') and '\n' not in str(error.value)
    assert not gpu.launches and all(torch.equal(given[k], before[k]) for k in given)


def test_tensors_on_a_cpu_are_refused_without_the_stand_in():
    with pytest.raises(ValueError, match='codes is on cpu, kernels run on cuda'): w8a8_sm80(**layer())
    with pytest.raises(ValueError, match='x is on cpu, kernels run on cuda'): quantize_cuda(torch.randn(5, 64), PackedColumns((64,)))


TOO_OLD = ('The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading and installing a new version from the URL: '
           'http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver.')
UNKNOWN = ('CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable CUDA_VISIBLE_DEVICES after program start. '
           'Setting the available devices to be zero.')
NO_LIBRARY = RuntimeError('CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13: cannot open shared object file: No such file or directory')
HALF_INSTALLED = ImportError('\n' + 64*'=' + '\nFailed to import CuPy.\n\nIf you installed CuPy via wheels (cupy-cudaXXX or cupy-rocm-X-X), make sure that …\n\nOriginal error:\n'
                             '  ImportError: libcublas.so.13: cannot open shared object file: No such file or directory\n' + 64*'=' + '\n')
NONE = 'No CUDA GPUs are available'


@pytest.mark.parametrize('changed, said', [
    (dict(hip='6.0'), 'AMD'),
    (dict(cuda=None), r'is built without CUDA: .*pip install torch --index-url \S+cu130'),
    (dict(available=False, knows=None, init=RuntimeError('Found no NVIDIA driver on your system. Please check …')), 'no NVIDIA driver.*install one for CUDA 13'),
    (dict(available=False, knows=12020, init=RuntimeError(TOO_OLD)), r'The driver knows CUDA 12\.2 and PyTorch \S+ is built for CUDA 13: update the driver, or pip install torch .*cu126.*cuda12'),
    (dict(available=False, knows=11040, init=RuntimeError(TOO_OLD)), r'The driver knows CUDA 11\.4 and PyTorch .* update the driver\.$'),
    (dict(available=False, init=RuntimeError(NONE)), r'no NVIDIA GPU \(No CUDA GPUs are available\): see nvidia-smi\.$'),
    (dict(available=False, init=RuntimeError(NONE), visible=''), r"nvidia-smi, and CUDA_VISIBLE_DEVICES, which is ''\.$"),
    (dict(available=False, init=RuntimeError(UNKNOWN)), r'\(CUDA unknown error - this may be due to .*nvidia-smi'),
    (dict(available=False, init=RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' start method")), 'forked subprocess'),
    (dict(available=False), r'is_available\(\) is False'),
    (dict(device=torch.device('cuda', 3), count=2), 'There is no cuda:3: PyTorch sees 2 GPUs, cuda:0 to cuda:1; see CUDA_VISIBLE_DEVICES'), (dict(device=1), 'no cuda:1: PyTorch sees 1 GPU, cuda:0;'),
    (dict(capability=(7, 5)), 'Some GPU has compute capability 7.5: the kernels need 8.0'),
    (dict(cupy=ModuleNotFoundError("No module named 'cupy'", name='cupy')), r'CuPy, which loads the kernels, is not installed: pip install "segquant-nb\[cuda13\]"'),
    (dict(cupy=ModuleNotFoundError("No module named 'cuda'", name='cuda')), r"cannot be imported \(No module named 'cuda'\).*cuda13"),
    (dict(cupy=HALF_INSTALLED), r'cannot be imported \(ImportError: libcublas.so.13: cannot open shared .*\): pip install'),
    (dict(runtime=12090), 'built for CUDA 12, PyTorch for CUDA 13: pip uninstall cupy-cuda12x, then pip install .*cuda13'),
    (dict(driver=12080), r'driver knows CUDA 12\.8 and CuPy 14\.2\.0 is built for CUDA 13: update the driver, or pip install'),
    (dict(nvrtc=NO_LIBRARY), r'finds no NVRTC, the compiler \(CuPy failed to load libnvrtc\.so\.13.*cuda13'),
    (dict(capability=(12, 1), archs=(75, 80, 89, 90, 100, 120)), 'NVRTC 13.0, the compiler, does not know sm_121: pip install -U nvidia-cuda-nvrtc')])
def test_what_is_missing_is_said_in_a_sentence_with_the_mend(changed, said, monkeypatch):
    "With what PyTorch and CuPy really raise"
    state = dict(hip=None, cuda='13.0', available=True, knows=13000, init=None, count=1, device=None, capability=(9, 0), cupy=None, runtime=13020, driver=13000, nvrtc=None,
                 archs=(75, 80, 89, 90), visible=None) | changed

    def raising(name, value=None):
        def f(*_):
            if isinstance(state[name], Exception): raise state[name]
            return value
        return f

    class Importer:
        def find_spec(self, name, *_):
            if name == 'cupy' and state['cupy']: raise state['cupy']

    numbers = SimpleNamespace(runtimeGetVersion=lambda: state['runtime'], driverGetVersion=lambda: state['driver'])
    stub = SimpleNamespace(__version__='14.2.0', cuda=SimpleNamespace(runtime=numbers, nvrtc=SimpleNamespace(getVersion=raising('nvrtc', (13, 0)), getSupportedArchs=lambda: state['archs'])))
    monkeypatch.delitem(sys.modules, 'cupy', raising=False)
    if not state['cupy']: monkeypatch.setitem(sys.modules, 'cupy', stub)
    monkeypatch.setattr(sys, 'meta_path', [Importer(), *sys.meta_path])
    for place, name, value in ((torch.version, 'hip', state['hip']), (torch.version, 'cuda', state['cuda']), (torch.cuda, 'is_available', lambda: state['available']),
                               (torch.cuda, 'init', raising('init')), (torch.cuda, 'device_count', lambda: state['count']), (cuda, '_driver_version', lambda: state['knows']),
                               (torch.cuda, 'get_device_capability', lambda d=None: state['capability']), (torch.cuda, 'get_device_name', lambda d=None: 'Some GPU')):
        monkeypatch.setattr(place, name, value)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if state['visible'] is not None: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', state['visible'])
    problem = cuda.cuda_problem(state['device'])
    assert re.search(said, problem) and '\n' not in problem and problem.endswith('.') and len(problem) < 250, problem
    if state['device'] is None:
        with pytest.raises(RuntimeError) as error: cuda.get_kernel('x.cu', 'x', torch.device('cuda', 0))
        assert str(error.value) == problem
    monkeypatch.undo()


def test_all_is_well_says_nothing(monkeypatch):
    with emulated_gpu(): assert cuda.cuda_problem() is None


def test_two_threads_may_ask_for_the_same_kernel():
    x, columns, failures = torch.randn(5, 64), PackedColumns((64,)), []

    def ask():
        try: quantize_cuda(x, columns)
        except Exception as e: failures.append(e)

    with emulated_gpu(run=False) as gpu:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert not failures and len(gpu.launches) == 8


@pytest.mark.parametrize('M, N, crowded, processors, rows', [(1, 9216, 0, 132, 16), (16, 64, 1, 132, 16), (17, 64, 0, 132, 64),
                                                              (4096, 3072, 0, 132, 128), (4096, 3072, 1, 132, 128), (77, 640, 0, 132, 64)])
def test_the_tile_fits_the_shape(M, N, crowded, processors, rows):
    assert pick_tile(M, N, bool(crowded), processors)[0] == rows


def test_the_third_call_is_the_first_one_with_other_addresses():
    columns, scale = PackedColumns((48, 80)), torch.rand(2, 1) + .1
    with emulated_gpu():
        for kw in (dict(), dict(dual=True), dict(dtype='int4', smooth=torch.rand(192) + .5), dict(scale=scale), dict(quartz=32, packed=True), dict(dtype='fp8e4m3')):
            def quantize(x): return quantize_cuda(x, columns, **kw)
            again = cuda.Repeated(quantize)
            for rows in (5, 7, 5, 7, 5, 5, 7):
                x = torch.randn(rows, 128)
                made, right = again(x), quantize(x)
                assert type(made) is type(right) and all(a is b or torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(made, right))
            assert len(again.known) == 2 and all(again.known.values()) and (made.scale is right.scale) == ('scale' in kw)


def linear(x, residual=None):
    given = layer(K=192)
    codes, scale, _ = quantize_cuda(x, PackedColumns((48, 80)), dual=True)
    return w8a8_sm80(codes, given['weight'], scale, given['scale_w'], None, PackedColumns((48, 80)), True, torch.float32, residual=residual)


def test_two_launches_with_memory_between_them():
    weight = layer(K=192)
    with mock.patch.dict(globals(), layer=lambda **_: weight), emulated_gpu() as gpu:
        again = cuda.Repeated(linear)
        for M in (9, 33, 9, 33, 9, 33):
            x, y = torch.randn(M, 128), torch.randn(M, 40)
            assert torch.equal(again(x, None), linear(x)) and torch.equal(again(x, y), linear(x, y))
        assert len(again.known) == 4
        for made, room, launches, *_ in again.known.values():
            assert len(launches) == 2 and [shape[1] for shape, *_ in made] == [40] and room >= 9*192
        (y, z), kept = (again(x, None), again(x, None)), x.clone()
        assert y.data_ptr() != z.data_ptr() and torch.equal(x, kept)  # no memory of its own
        keys = again.known.copy()
        for wrong, why in ((x[:, :96].contiguous(), '128 columns'), (x.int(), 'int32'), (x.to('meta'), 'meta')):
            for _ in range(3):
                with pytest.raises((TypeError, ValueError), match=why): again(wrong, None)
        assert not any(again.known[k] for k in again.known.keys() - keys.keys())
        for odd in (torch.randn(9, 160)[:, 3:131], torch.randn(9*128 + 1)[1:].view(9, 128)):  # strides and offsets
            assert torch.equal(again(odd, None), linear(odd))
        assert again(x[:0].clone(), None).shape == (0, 40)


def test_what_is_unclear_is_not_repeated():
    with emulated_gpu():
        columns, x = PackedColumns((64,)), torch.randn(70, 64)
        def shared(x, y): return quantize_cuda(x if x is y else x + 0, columns).codes
        def computes(x): return quantize_cuda(x*2, columns)
        def gives_its_input(x): return quantize_cuda(x, columns)._replace(shifts=x)
        def gives_a_part(x): return quantize_cuda(x, columns).codes[1:]
        for f, n in ((shared, 2), (computes, 1), (gives_its_input, 1), (gives_a_part, 1)):
            again = cuda.Repeated(f)
            for seed in range(5):
                x = torch.randn(70, 64, generator=torch.Generator().manual_seed(seed))
                for a, b in zip(again(*[x]*n), f(*[x]*n)): assert a is b or torch.equal(a, b)
            assert not any(again.known.values()), f
        def inside(x): return quantize_cuda(x[1:], columns)  # an address inside of an input: no difficulty
        again = cuda.Repeated(inside)
        for _ in range(5): assert torch.equal(again(x := torch.randn(3, 64)).codes, inside(x).codes)
        assert all(again.known.values())


def test_tensor_maps_move_along():
    def encoded(address): made = cuda.AddressBytes(address.to_bytes(8, 'little')*16); made.address, made.moved = address, encoded; return made
    def two(x):
        start = cuda.Launcher(cuda.get_kernel('quantize/sm80_unpack_int4.cu', 'unpack_int4', torch.device('cpu')), (64,), '128s P 2i 128s')
        y = torch.empty(4, 8)
        start((1,), encoded(x.data_ptr() + 4), y.data_ptr(), 5, 6, encoded(y.data_ptr()) if mapped else bytes(128))
        return y
    x, (mapped, again) = torch.zeros(3, 3), (True, cuda.Repeated(two))
    with emulated_gpu(run=False) as gpu:
        for _ in range(5):
            y = again(x := torch.zeros(3, 3))
            found = [int.from_bytes(a.tobytes()[:8], 'little') for a in gpu.launches[-1].arguments]
            assert found == [x.data_ptr() + 4, y.data_ptr(), 5 + (6 << 32), y.data_ptr()]
        assert all(again.known.values())
        mapped, again = False, cuda.Repeated(two)
        for _ in range(4): again(x)
    assert not any(again.known.values())  # it may hold an address


def test_an_error_of_the_driver_is_a_sentence(monkeypatch):
    with emulated_gpu():
        start = cuda.Launcher(cuda.get_kernel('quantize/sm80_unpack_int4.cu', 'unpack_int4', torch.device('cpu')), (64,), 'P P q')
        monkeypatch.setattr(cuda.Room, 'start', lambda *_: 701)
        monkeypatch.setattr(cuda, '_driver', lambda: SimpleNamespace(cuGetErrorString=lambda status, text: setattr(text._obj, 'value', b'too many resources')))
        with pytest.raises(RuntimeError, match='unpack_int4 was not launched: too many resources .error 701, grid .3, 1, 1., block .64, 1, 1.'): start((3,), 0, 0, 0)


def test_a_number_too_large_for_its_place_is_refused():
    with emulated_gpu() as gpu:
        start = cuda.Launcher(cuda.get_kernel('quantize/sm80_unpack_int4.cu', 'unpack_int4', torch.device('cpu')), (64,), 'P P i')
        with pytest.raises(Exception, match='argument out of range|format requires'): start((1,), 0, 0, 2**31)
    assert not gpu.launches


def test_a_full_disk_is_no_obstacle():
    real, tried = os.replace, []
    def replace(old, new):
        tried.append(new)
        if len(tried) == 1: raise OSError(28, 'No space left on device')
        real(old, new)
    with emulated_gpu(run=False) as gpu, mock.patch.object(cuda.os, 'replace', replace):
        cuda.unpack_int4_cuda(torch.zeros(2, 16, dtype=torch.uint8))
    assert len(gpu.launches) == 1 and len(tried) == 2 and tried[0].name == tried[1].name


def test_another_gpu_is_made_the_current_one_for_a_launch():
    "And for a repeated call: its memory is asked for there, and its kernels start there"
    import contextlib
    made = []
    def current(device): return bool(made) and made[-1] == 'inside'
    @contextlib.contextmanager
    def device(d):
        made.append('inside')
        try: yield
        finally: made.append('outside')
    columns, given = PackedColumns((64,)), torch.randn(5, 64)
    with emulated_gpu() as gpu, mock.patch.object(cuda, '_is_current', current), mock.patch.object(torch.cuda, 'device', device):
        again = cuda.Repeated(lambda x: quantize_cuda(x, columns))
        for n in range(1, 5):
            y = again(given)
            assert made.count('inside') == made.count('outside') == n == len(gpu.launches)
        assert all(again.known.values()) and torch.equal(y.codes, quantize_cuda(given, columns).codes)


def test_a_repeated_call_goes_to_the_stream_of_now():
    columns, x, streams = PackedColumns((64,)), torch.randn(5, 64), []
    with emulated_gpu():
        start = cuda.Room.start
        with mock.patch.object(cuda.Room, 'start', lambda room: streams.append(room.launcher.format.unpack_from(room.bytes)[7]) or start(room)):
            again = cuda.Repeated(lambda x: quantize_cuda(x, columns))
            for stream in (5, 5, 5, 6, 7):
                with mock.patch.object(cuda, '_stream', lambda device: stream): again(x)
    assert streams == [5, 5, 5, 6, 7]
