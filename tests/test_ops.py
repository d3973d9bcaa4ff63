"""Which kernel runs, and that it is the layer that runs: GPU paths on emulated kernels, CPU paths as they are."""
import contextlib
import copy
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulate import COMPILER, emulated_gpu
from torch import nn

from segquant_nb import ops
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.ops import choose_kernel, cuda_reason, cuda_tables, doctor, use_emulation, use_kernels
from segquant_nb.quartz import Quartz
from segquant_nb.seglinear import Plan, SegLinear

TOKEN = dict(axis=-1, dynamic=True)
W8, W4 = Quantizer('int8', axis=1), Quantizer('int4', axis=1)
KINDS = {'static': [(96, Quantizer())], 'per token': [(96, Quantizer(**TOKEN))], 'int4': [(96, Quantizer('int4', **TOKEN))],
         'dual': [(96, DualScale())], 'dual per token': [(96, DualScale(**TOKEN))],
         'segments': [(33, Quantizer()), (63, Quantizer())], 'mixed': [(32, Quantizer(**TOKEN)), (64, DualScale(**TOKEN))],
         'mixed static': [(64, DualScale()), (32, Quantizer())], 'QuaRTZ': [(96, Quartz(**TOKEN))], 'QuaRTZ 16': [(96, Quartz(group=16))]}

needs_compiler = pytest.mark.skipif(COMPILER is None, reason='the emulation of kernels needs a C++ compiler')


@contextlib.contextmanager
def emulated(**kw):
    "Modules that are imported inside stay: those of the compiler must not be imported twice"
    with emulated_gpu(**kw) as gpu:
        try: yield gpu
        finally: imported = {name: m for name, m in sys.modules.items() if name != 'cupy'}
    sys.modules.update(imported)


@pytest.fixture
def gpu(request):
    "Kernels on CPU tensors, wherever this module asks"
    capability = getattr(request, 'param', (8, 0))
    with (emulated(capability=capability, run=capability < (9, 0)) as gpu,
          mock.patch.multiple(ops, _DEVICE='cpu', cuda_problem=lambda *_: None)):
        yield gpu


def layer_of(inputs, weight=W8, n=40, dtype=torch.float32, blocks=(), **extra):
    g = torch.Generator().manual_seed(0)
    k = sum(size for size, _ in inputs)
    linear = nn.utils.skip_init(nn.Linear, k, n)
    linear.weight.data.copy_(torch.randn(n, k, generator=g)/k**.5)
    linear.bias.data.copy_(torch.randn(n, generator=g))
    rows = F.gelu(2*torch.randn(20, k, generator=g))
    return SegLinear.of(linear.to(dtype), Plan(inputs, [n//4, n - n//4], weight, blocks), rows, **extra), rows


def extras(k=96, n=40):
    g = torch.Generator().manual_seed(1)
    smooth = 2.**torch.randint(-2, 3, (k,), generator=g)  # so that dividing and multiplying agree
    return {'': {}, 'smooth': dict(smooth=smooth), 'rank': dict(low_rank=(torch.randn(4, k, generator=g)/9, torch.randn(n, 4, generator=g)/9)),
            'both': dict(smooth=smooth, low_rank=(torch.randn(4, k, generator=g)/9, torch.randn(n, 4, generator=g)/9))}


@needs_compiler
@pytest.mark.parametrize('kind', KINDS)
def test_a_gpu_layer_is_the_layer(gpu, kind):
    for w, extra in ((W8, ''), (W4, 'both'), *([(W8, 'smooth'), (W4, 'rank')] if kind == 'mixed' else [])):
        q, x = layer_of(KINDS[kind], w, **extras()[extra])
        assert choose_kernel(q, 'cuda').path == 'cuda_sm80'
        use_kernels(q, 'cuda')
        right = q.integer(x)
        assert (q(x) - right).abs().max() < 3e-6*right.abs().max()
    if kind == 'mixed':
        short = q(x.bfloat16().view(2, 10, 96))
        assert short.shape == (2, 10, 40) and (short.flatten(0, 1).float() - q.integer(x.bfloat16()).float()).abs().max() < 2**-7*right.abs().max()
    assert {'codes', 's8_gemm'} == {launch.function for launch in gpu.launches}, gpu.launches


FP8 = Quantizer('fp8e4m3', axis=1)
FORMATS = {'weights in groups': (KINDS['mixed'], Quantizer('int8', axis=1, group=32)), '4 bits in groups': ([(33, Quantizer(**TOKEN)), (63, Quantizer(**TOKEN))], Quantizer('int4', axis=1, group=32)),
           'rounded QuaRTZ': ([(96, Quartz(rounded=True, **TOKEN))], W4), 'E4M3': ([(96, Quantizer('fp8e4m3', **TOKEN))], FP8), 'E4M3 dual': ([(32, Quantizer('fp8e4m3')), (64, DualScale('fp8e4m3'))], FP8),
           'weight only': ([(33, Quantizer('bf16')), (63, Quantizer('bf16'))], W8), '4-bit weight only': ([(96, Quantizer('fp16'))], Quantizer('int4', axis=1, group=32)),
           'int6 weights': (KINDS['static'], Quantizer('int6', axis=1)), 'int3 weights': (KINDS['per token'], Quantizer('int3', axis=1))}


@needs_compiler
@pytest.mark.parametrize('gpu', [(8, 9)], indirect=True)
@pytest.mark.parametrize('kind', FORMATS)
def test_every_format_with_many_rows_and_few(gpu, kind):
    alone = 'only' in kind
    for extra in ('', 'both'):
        q, x = layer_of(*FORMATS[kind], **extras()[extra])
        use_kernels(q, 'cuda')
        assert q.kernel is (ops.cuda_16bit if alone else ops.cuda_sm80)
        for rows in (x, x[:5], x[:1]):
            right = q.integer(rows)
            for _ in range(3):
                assert (q(rows) - right).abs().max() < (2e-2 if alone else 3e-6)*right.abs().max()  # a weight of 16 bits
        short = q(x.half().view(2, 10, 96)).flatten(0, 1)
        assert short.dtype == torch.float16 and (short.float() - q.integer(x.half()).float()).abs().max() < 2**-6*right.abs().max()
    functions = {launch.function for launch in gpu.launches}
    assert functions == ({'rows_codes', 'f16_gemv', 'decode'} if alone else {'codes', 's8_gemm', *['s8_gemv', 'rows_codes']*('E4M3' not in kind)})


@needs_compiler
def test_few_rows_take_one_launch(gpu):
    for kind, w in (('mixed', W8), ('int4', W4), ('static', W4)):
        q, x = layer_of(KINDS[kind], w)
        use_kernels(q, 'cuda')
        for n in (1, 16, 17):
            q(x[:n])
            del gpu.launches[:]
            q(x[:n])
            assert [launch.function for launch in gpu.launches] == (['codes', 's8_gemm'] if n == 17 else ['rows_codes', 's8_gemv'])
    assert q(x[:0]).shape == (0, 40) and q(x[:0].view(0, 1, 96)).shape == (0, 1, 40) and q(x[0]).shape == (40,)
    assert torch.equal(q(x.t().contiguous().t()), q(x))  # whatever the strides


@needs_compiler
def test_a_compiled_layer_finds_what_was_made_ready(gpu):
    q, x = layer_of(KINDS['mixed'], **extras()['both'])
    use_kernels(q, 'cuda')
    q._apply(lambda t: t.clone())  # as if it had moved
    torch._dynamo.reset()
    compiled, made = torch.compile(q, fullgraph=True, dynamic=True, backend='aot_eager'), []
    with mock.patch.object(ops, 'CudaLinear', side_effect=lambda *args: made.append(args) or CudaLinear(*args)):
        for n in (3, 20, 7, 20): torch.testing.assert_close(compiled(x[:n]), q.integer(x[:n]))
    assert len(made) == 1  # once for all calls
    copied = copy.deepcopy(q)
    del q
    assert torch.equal(copied(x), compiled(x))


CudaLinear = ops.CudaLinear


@needs_compiler
@pytest.mark.parametrize('kind', ['static', 'int4', 'mixed', 'QuaRTZ'])
def test_rotated_inputs(gpu, kind):
    blocks = [size & -size for size, _ in KINDS[kind]]
    for w, extra in ((W8, ''), (W4, 'both'), (W8, 'rank')):
        q, x = layer_of(KINDS[kind], w, blocks=blocks, **extras()[extra])
        choice = choose_kernel(q, 'cuda')
        assert choice.path == 'cuda_sm80' and 'rotated first' not in choice.why and 'rotated first' in choose_kernel(q, 'cpu').why
        use_kernels(q, 'cuda')
        right = q.integer(x)
        assert (q(x) - right).abs().max() < 3e-6*right.abs().max()
        if extra == 'both': continue
        short = q(x.bfloat16().view(2, 10, 96))
        assert short.dtype == torch.bfloat16 and (short.flatten(0, 1).float() - q.integer(x.bfloat16()).float()).abs().max() < 2**-6*right.abs().max()
    if kind != 'mixed': return
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), q(x))


@needs_compiler
def test_weights_that_fit_are_not_copied(gpu):
    for inputs, w in (([(128, Quantizer())], W8), ([(128, Quantizer())], W4), ([(64, Quantizer()), (64, DualScale())], W4)):
        q, x = layer_of(inputs, w)
        assert cuda_tables(q).weight is None
        use_kernels(q, 'cuda')
        del gpu.launches[:]
        assert (q(x) - q.integer(x)).abs().max() < 1e-5
        assert {launch.function for launch in gpu.launches} == {'codes', 's8_gemm'}
    for sizes in ((96,), (33, 95), (32, 96, 64)):  # padded at the end, between, and not at all, but to another place
        q, _ = layer_of([(s, Quantizer()) for s in sizes])
        assert (cuda_tables(q).weight is None) == (sizes == (32, 96, 64))


@needs_compiler
def test_layers_that_read_the_same_share_its_codes(gpu):
    def functions(): made = [launch.function for launch in gpu.launches]; gpu.launches.clear(); return made
    (a, x), (b, _), (c, _), (other, _) = [layer_of(KINDS[k]) for k in ('per token', 'per token', 'per token', 'dual per token')]
    b.codes.neg_(), c.codes.mul_(-1).clamp_(-5)
    for q in (a, b, c, other): use_kernels(q, 'cuda')
    right = [q(x.clone()) for q in (a, b, c, other)]
    functions()
    for step in range(4):
        y = x.clone()
        for q, want in zip((a, b, c, other), right): assert torch.equal(q(y), want)
        assert functions().count('codes') == (4 if not step else 2)  # a's, and those of the other recipe
    for step in range(3):  # the same tensor again, as a CUDA graph writes it: nothing is kept from call to call
        y.copy_(x) if step else y.data.copy_(x.flip(0))
        for q, want in zip((a, b, c), right): assert torch.equal(q(y), want if step else want.flip(0))
    a(y)
    y.mul_(2)  # another version
    assert torch.equal(b(y), b(y.clone()))
    a(y)
    del y
    assert ops._SHARED.last is None  # the codes are gone with what they stand for
    with torch.inference_mode():
        y = x.clone()
        for q, want in zip((a, b, c), right): assert torch.equal(q(y), want)
    for q, want in zip((a, b, c), right):  # each in a thread of its own
        with ThreadPoolExecutor(1) as thread: assert thread.submit(lambda: torch.equal(q(x), want)).result()


@needs_compiler
def test_compiled_gpu_layers_are_one_graph_for_all_sizes(gpu):
    for inputs, extra in ((KINDS['mixed'], extras()['both']), (KINDS['static'], {})):
        q, x = layer_of(inputs, **extra)
        use_kernels(q, 'cuda')
        torch._dynamo.reset()
        compiled = torch.compile(q, fullgraph=True, dynamic=True, backend='aot_eager')
        compiled(x)
        with torch.compiler.set_stance('fail_on_recompile'):
            for n in (3, 7, 20): torch.testing.assert_close(compiled(x[:n]), q(x[:n]))


def arguments():
    return (torch.randn(50, 64), torch.zeros(40, 64, dtype=torch.int8), None, torch.ones(1, 40), None, None, None, None, None,
            repr(tuple(ops.Spec('sm80', (64,), (False,), 'int8'))))


def test_the_operator_describes_itself():
    with emulated(run=False): torch.library.opcheck(ops.linear_op, arguments(), test_utils=('test_schema', 'test_faketensor'))


def test_a_notebook_has_an_operator_of_its_own():
    "However often its cell runs: an operator of the same name would replace the module's"
    source = Path(ops.__file__).read_text()
    for _ in range(2):
        theirs = dict(__name__='__main__', __package__='segquant_nb')
        exec(source, theirs)
    assert (ops.linear_op.name(), theirs['linear_op'].name()) == ('segquant_nb::linear', 'main::linear')
    with mock.patch.object(ops, 'CudaLinear', side_effect=RuntimeError('the one of the module')):
        with pytest.raises(RuntimeError, match='of the module'): ops.linear_op(*arguments())


@pytest.mark.parametrize('gpu', [(9, 0), (8, 9), (12, 0)], indirect=True)
def test_hopper_gets_its_own_kernel(gpu, request):
    capability = request.node.callspec.params['gpu']
    q, x = layer_of(KINDS['mixed'])
    odd, _ = layer_of(KINDS['mixed'], n=36)
    want = 'cuda_sm90' if capability == (9, 0) else 'cuda_sm80'
    assert choose_kernel(q, 'cuda').path == want and choose_kernel(odd, 'cuda').path == 'cuda_sm80'
    assert ('slower than bfloat16' in choose_kernel(odd, 'cuda').why) == (capability == (9, 0))


def test_without_a_gpu_it_says_so():
    with mock.patch.object(ops, 'cuda_problem', lambda *_: 'There is no GPU: buy one.'):
        assert choose_kernel(layer_of(KINDS['static'])[0], 'cuda') == ops.Choice('', 'emulation', 'There is no GPU: buy one.')
        said = dict(doctor().rows)
    assert said['GPU'] == 'There is no GPU: buy one.' and said['cuda_sm80'] == said['cuda_sm90'] == 'not here: see GPU'


def test_one_warning_names_every_reason_once():
    model = nn.Sequential(layer_of([(96, Quantizer('fp8e4m3'))])[0], layer_of([(96, Quantizer('fp8e4m3'))])[0], layer_of(KINDS['static'], Quantizer('fp8e4m3', axis=1))[0],
                          layer_of(KINDS['static'])[0], nn.Linear(3, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        table = use_kernels(model)
    [w] = caught
    assert str(w.message).count('fp8e4m3 inputs') == 1 and 'fp8e4m3 weights' in str(w.message) and '3 of 4' in str(w.message) and w.filename == __file__
    assert [c.path for c in table.of] == ['emulation']*3 + ['cpu_int8'] and [c.layer for c in table.of] == ['0', '1', '2', '3']
    assert '2  emulation' in repr(table)


@needs_compiler
def test_copies_states_and_other_weights(gpu):
    (q, x), (other, _) = layer_of(KINDS['mixed'], **extras()['both']), layer_of(KINDS['mixed'], **extras()['both'])
    other.codes.neg_(), other.bias.add_(1)
    names = q.state_dict().keys()
    use_kernels(q, 'cuda')
    y = q(x)
    assert q.state_dict().keys() == names
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))): assert torch.equal(twin(x), y) and twin.kernel is ops.cuda_sm80
    half = copy.deepcopy(q).half()
    assert half.cuda_scale_w.dtype == torch.float32 and half(x.half()).dtype == torch.float16
    q.load_state_dict(other.state_dict())  # the tables follow
    assert not torch.equal(q(x), y) and (q(x) - other.integer(x)).abs().max() < 1e-5
    use_emulation(q)
    assert q.kernel is None and not any(name.startswith('cuda_') for name, _ in q.named_buffers())


def test_a_layer_that_was_moved_still_computes():
    q, x = layer_of(KINDS['static'])
    ops._prepare(q, 'cuda_sm80')
    with pytest.warns(UserWarning, match='call use_kernels after moving'): y = q(x)
    assert torch.equal(y, q.emulate(x))


@pytest.mark.parametrize('extra', ['', 'both'])
def test_autocast_does_not_reach_in(extra):
    q, x = layer_of(KINDS['per token'], **extras()[extra])
    right = q(x)
    use_kernels(q)
    kernel = q(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(q(x), kernel)
        use_emulation(q)
        assert torch.equal(q(x), right)


def test_double_precision_and_gradients():
    q, x = layer_of(KINDS['per token'])
    use_kernels(q)
    assert torch.equal(q(x.double()), q.emulate(x.double()))
    assert not q(x.requires_grad_()).requires_grad


def test_debug_names_the_path(monkeypatch, capsys):
    q, x = layer_of(KINDS['static'])
    use_kernels(q)
    q(x)
    assert not capsys.readouterr().err
    monkeypatch.setenv('SEGQUANT_DEBUG', '1')
    q(x), q(x.double())
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith('segquant: cpu_int8: (20, 96) → 40 float32, ') and first.endswith(' ms') and 'emulation' in second


@needs_compiler
def test_debug_names_the_layer_and_its_kernels(gpu, monkeypatch, capsys):
    model = nn.ModuleDict(dict(first=layer_of(KINDS['static'])[0], second=layer_of(KINDS['static'])[0]))
    use_kernels(model, 'cuda')
    x = torch.randn(20, 96)
    y = [model[name](x.clone()) for name in model]
    assert not capsys.readouterr().err
    monkeypatch.setenv('SEGQUANT_DEBUG', '1')
    for name in model: assert torch.equal(model[name](x.clone()), y[0])
    model.second(x[:2])
    lines = capsys.readouterr().err.splitlines()
    assert [line[:20] for line in lines] == ['segquant: cuda_sm80:', 'segquant:   quantize', 'segquant:   mma/sm80']*2 + ['segquant: cuda_sm80:', 'segquant:   gemv/sm8', 'segquant:   gemv/sm8']
    assert lines[0].endswith(': first: (20, 96) → 40 float32, 2 kernels') and ': second: ' in lines[3] and lines[6].endswith('(2, 96) → 40 float32, 2 kernels')


def test_the_doctor_survives_what_it_finds():
    for error, said in ((RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\nMore'), 'FAILS for segments, dual, low rank: CUDA out of memory'), (KeyError(), 'FAILS for segments, dual, low rank: KeyError')):
        with mock.patch.object(ops, '_prepare', side_effect=error): assert dict(doctor().rows)['cpu_int8'] == said


def test_a_wrong_kernel_is_found():
    with mock.patch.object(ops, 'cpu_linear', lambda layer, x: layer.integer(x)*1.001): assert dict(doctor().rows)['cpu_int8'].startswith('WRONG')


@needs_compiler
def test_the_doctor_examines_kernels(gpu):
    with mock.patch.object(ops, '_gpu', lambda: 'emulated'):
        said = dict(doctor().rows)
    assert said['cuda_sm80'] == 'right' and said['cuda_sm90'] == 'not here: sm_80 is no Hopper'


def test_what_is_refused():
    q, x = layer_of(KINDS['static'])
    use_kernels(q)
    with pytest.raises(ValueError, match='this layer reads 96 channels'): q(x[:, :95])
    for inputs, why in (([(48, Quantizer()), (48, Quantizer(**TOKEN))], 'static and dynamic'), ([(96, Quantizer(dynamic=True))], 'all rows'),
                        ([(96, Quantizer('int8', clip='mse', **TOKEN))], 'search'), ([(96, Quantizer('int6'))], 'int6')):
        assert why in cuda_reason(layer_of(inputs)[0])


@needs_compiler
def test_shared_codes_are_those_of_what_the_input_holds_now(gpu):
    (first, x), (second, _) = layer_of(KINDS['per token']), layer_of(KINDS['per token'], n=24)
    for q in (first, second): use_kernels(q, 'cuda')
    for _ in range(3): first(x), second(x)  # from now on codes are kept
    assert first.ready[torch.float32].shares
    other = torch.randn_like(x)
    x = x.clone()
    first(x)
    version = x._version
    x.data = other
    assert x._version == version and torch.equal(second(x), second(other.clone()))


@needs_compiler
def test_tracers_record_the_operator_and_not_what_it_does(gpu):
    from torch.fx.experimental.proxy_tensor import make_fx
    q, x = layer_of(KINDS['mixed'])
    use_kernels(q, 'cuda')
    torch.testing.assert_close(make_fx(q)(x)(x.flip(0)), q(x.flip(0)))


@needs_compiler
def test_a_compiled_layer_sees_other_codes_and_a_moved_one_lets_go(gpu):
    import gc
    import weakref
    q, x = layer_of([(96, Quantizer(**TOKEN))])
    use_kernels(q, 'cuda')
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, backend='aot_eager')
    compiled(x)
    q.codes = -q.codes
    torch.testing.assert_close(compiled(x), q(x))
    made = weakref.ref(q.ready[torch.float32])
    del x, compiled  # codes are kept as long as their input
    torch._dynamo.reset()
    gc.collect()
    gc.disable()
    try:
        q.to('meta')
        assert made() is None
    finally: gc.enable()


def edits(q):
    "Each changes what the layer means, in place"
    for name in ('bias', 'weight_scale', 'smooth', 'down', 'up', 'input0_scale', 'input1_positive'):
        if (t := getattr(q, name, None)) is not None: yield name, lambda t=t: t.mul_(2)
    yield 'codes', lambda: q.codes.copy_(q.codes.flip(0))
    yield 'another bias', lambda: setattr(q, 'bias', -q.bias)
    yield 'another scale', lambda: setattr(q, 'weight_scale', q.weight_scale*3)
    yield 'other codes', lambda: setattr(q, 'codes', q.codes.flip(1).contiguous())


IN_PLACE = {'dual': (KINDS['mixed static'], W8, 'both'), 'per token': (KINDS['per token'], W8, 'smooth'), '4 bits': (KINDS['int4'], W4, 'rank'), 'fits': ([(128, Quantizer())], W8, ''),
            'groups': (KINDS['per token'], Quantizer('int4', axis=1, group=32), ''), 'weight only': (FORMATS['weight only'][0], W8, 'both'), 'E4M3': FORMATS['E4M3'] + ('',)}


@needs_compiler
@pytest.mark.parametrize('gpu', [(8, 9)], indirect=True)
@pytest.mark.parametrize('kind', IN_PLACE)
def test_tables_follow_the_tensors_of_a_layer_where_they_are(gpu, kind):
    inputs, w, extra = IN_PLACE[kind]
    (q, x), close = layer_of(inputs, w, **extras()[extra]), 2e-2 if kind == 'weight only' else 1e-5
    use_kernels(q, 'cuda')
    def right(layer):
        want = layer.integer(x)
        for rows in (x, x[:5]): assert (layer(rows) - want[:len(rows)]).abs().max() <= close*want.abs().max(), name
        assert (layer(x.half()).float() - layer.integer(x.half()).float()).abs().max() <= 2**-5*want.abs().max(), name
    name, seen = 'as made', x.clone()
    right(q)
    def places(): return [t.data_ptr() for made in q.ready.values() for t in (*made.tables, *ops._tables(q)) if t is not None]
    at = places()
    other, _ = layer_of(inputs, w, **extras()[extra])
    for name, edit in edits(other): edit()
    other = SegLinear.restore(q.plan, dict(other.state_dict()))
    q(seen), other.bias.neg_()
    name = 'load_state_dict'
    q.load_state_dict(other.state_dict())
    right(q)
    assert places() == at and torch.equal(q(seen), q(seen.clone()))
    use_kernels(q, 'cuda')
    assert places() == at
    for name, edit in edits(q):
        bias, values = q.bias, q.bias.clone()
        edit()
        if name == 'another bias': assert torch.equal(bias, values)  # it is the caller's
        twins = copy.deepcopy(q), pickle.loads(pickle.dumps(q)), copy.deepcopy(q)._apply(lambda t: t.clone())
        for layer in (q, *twins): right(layer)
        if name != 'other codes': assert places() == at, name
    with torch.inference_mode():
        name = 'in inference mode'
        q.bias.add_(1)
        right(q)
    with mock.patch.object(ops, 'is_captured', lambda device: True):
        q(x)
        q.bias.add_(1)
        with pytest.raises(RuntimeError, match='call it once before a CUDA graph of it is captured'): q(x)
    right(q)


@needs_compiler
def test_tables_made_in_inference_mode_follow_too(gpu):
    q, x = layer_of(KINDS['static'])
    with torch.inference_mode(): use_kernels(q, 'cuda'), q(x)
    q.load_state_dict({k: v*2 if k == 'bias' else v for k, v in q.state_dict().items()})
    assert q.cuda_bias.is_inference() and (q(x) - q.integer(x)).abs().max() < 1e-5


@needs_compiler
def test_codes_that_were_kept_are_forgotten_with_their_scale(gpu):
    (a, x), (b, _) = layer_of(KINDS['static']), layer_of(KINDS['static'], n=24)
    for q in (a, b): use_kernels(q, 'cuda')
    for _ in range(3): a(x), b(x)  # from now on codes are kept
    a(x)
    for q in (a, b): q.input0_scale.mul_(4)
    assert torch.equal(b(x), b(x.clone())) and (b(x) - b.integer(x)).abs().max() < 1e-5


@needs_compiler
def test_a_compiled_layer_follows_too(gpu):
    for inputs, extra in ((KINDS['mixed static'], 'both'), ([(128, Quantizer())], '')):
        q, x = layer_of(inputs, **extras()[extra])
        use_kernels(q, 'cuda')
        torch._dynamo.reset()
        compiled = torch.compile(q, fullgraph=True, backend='aot_eager')
        compiled(x)
        with torch.compiler.set_stance('fail_on_recompile'):
            for name, edit in edits(q):
                if 'other' in name: continue
                edit()
                right = q.integer(x)
                assert (compiled(x) - right).abs().max() < 1e-5*right.abs().max(), name


@pytest.mark.parametrize('gpu', [(9, 0)], indirect=True)
def test_few_rows_read_the_layout_of_their_product(gpu):
    "The Hopper path, with weights that only the portable product takes"
    q, x = layer_of(KINDS['dual'], Quantizer('int4', axis=1, group=32))
    ops._prepare(q, 'cuda_sm90')
    q(x[:3]), q(x)
    four, _ = layer_of([(128, Quantizer(**TOKEN))], W4)
    ops._prepare(four, 'cuda_sm90')
    assert ops._tables(four).few is four.codes and ops._tables(four).weight is not four.codes


@needs_compiler
@pytest.mark.parametrize('gpu', [(8, 9)], indirect=True)
def test_few_rows_with_too_many_spans_go_with_the_many(gpu):
    "A block has no room for the sums of every group: the layer runs, and nobody promised a stream"
    q, _ = layer_of([(12288, Quantizer(**TOKEN))], Quantizer('int4', axis=1, group=64), n=16)
    x = torch.randn(3, 12288)
    assert 'as a stream' not in str(use_kernels(q, 'cuda'))
    assert (q(x) - q.integer(x)).abs().max() < 1e-4*q.integer(x).abs().max()


def test_a_model_without_quantized_layers_is_told():
    assert repr(use_kernels(nn.Linear(4, 4))) == 'no SegLinear in this model: quantize it first'
    with pytest.raises(TypeError, match="use='cuda': expected True or False"): ops.use_quick_parts(nn.Linear(4, 4), 'cuda')
