"""The passes that make codes, rotations and producers included, run on an emulated GPU and held to PyTorch bit for bit.

What the formats have in common is in test_cuda_emulated.py.
"""
import os

import pytest
import torch
from emulate import COMPILER, emulated_gpu
from emulate.cases import activations, same

import segquant_nb.cuda as cuda
from segquant_nb.codes import CodesKernel, Layout, PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.producers import ActivationCodes, NormCodes, activation_codes, activation_reference, norm_codes, norm_reference

pytestmark = pytest.mark.skipif(COMPILER is None and 'CI' not in os.environ, reason='no C++ compiler on this machine (c++, g++ or clang++)')


def vector(columns, seed=0): return columns.pack(torch.rand(1, columns.columns, generator=torch.Generator().manual_seed(seed)) + .5)[0]


@pytest.mark.parametrize('sizes, blocks, dtype, options', [
    ((256, 64), (256, 64), torch.bfloat16, dict(dual=True)), ((40, 256, 64), (8, 256, 32), torch.float32, dict(dual=True)), ((640, 34, 16), (128, 2, 16), torch.float16, {}),
    ((100, 60), (4, 1), torch.bfloat16, dict(quartz=32, rounded=True, packed=True)), ((32, 768), (32, 256), torch.bfloat16, dict(dtype='fp8e4m3'))])
def test_rotations(sizes, blocks, dtype, options):
    "Of every size, inside of a warp and across two, after smoothing; NaN and infinities spread over their block"
    columns = PackedColumns(sizes)
    given = dict(blocks=blocks, smooth=vector(columns), **options)
    for rows, seed in ((7, 0), (2, 1)):
        x = activations(rows, columns.columns, dtype, seed)
        with emulated_gpu(seed): got = quantize_cuda(x, columns, **given)
        assert same(got, quantize_reference(x, columns, **given))
    mixed = quantize_reference(x[:2].nan_to_num(0., 9., -9.), columns, **given).codes.float()
    plain = quantize_reference(x[:2].nan_to_num(0., 9., -9.), columns, **{**given, 'blocks': (1,)*len(sizes)}).codes.float()
    assert (mixed != plain).any()


@pytest.mark.parametrize('sizes, options, layout', [
    ((300, 84), dict(dual=True), Layout(1, 32, 1, 1)), ((500,), dict(quartz=32), Layout(1, 32, 2, 1)), ((1000,), dict(dtype='int4', packed=True), Layout(2, 32, 1, 1)),
    ((520, 24), dict(dual=True, duals=(False, True)), Layout(2, 32, 1, 1)), ((600,), dict(), Layout(1, 64, 1, 1)), ((640,), dict(dual=True, blocks=(128,)), Layout(5, 8, 4, 1)),
    ((600,), dict(dual=True), Layout(5, 8, 8, 1)), ((500,), dict(quartz=32, rounded=True), Layout(2, 16, 4, 1)), ((1500, 300), dict(dual=True), Layout(2, 64, 1, 1)), ((1024,), dict(dual=True), Layout(1, 64, 1, 1)),
    ((1536,), dict(quartz=16), Layout(3, 32, 4, 1))])
def test_rows_come_by(sizes, options, layout):
    "One block for all rows: what it keeps from one row to the next must not stick to it"
    columns = PackedColumns(sizes)
    x = activations(9, columns.columns, torch.bfloat16, 3)[:, :columns.columns]*10.**torch.tensor([0, 3, -3, 2, -2, 1, 0, -4, 4])[:, None]
    x = x.bfloat16()
    for scale in (None, 'own'):
        want = quantize_reference(x, columns, **options)
        given = options if scale is None else dict(scale=want.scale*.7, **options)
        with emulated_gpu(1, processors=1) as gpu: got = CodesKernel(columns, layout=layout, **given)(x)
        assert gpu.launches[0].grid == (1,) and same(got, quantize_reference(x, columns, **given)), scale


def test_a_static_scale_clips_and_forgives_accidents():
    x, columns = activations(8, 96, torch.float16, 5), PackedColumns((64, 32))
    scale = torch.tensor([[.01], [3.]])
    for options in (dict(), dict(dual=True)):
        given = dict(scale=scale.repeat_interleave(1 + len(options), 0), **options)
        with emulated_gpu(): assert same(quantize_cuda(x, columns, **given), quantize_reference(x, columns, **given))


def test_the_step_that_a_call_prepares_is_the_step_of_every_call():
    columns = PackedColumns((64,))
    with emulated_gpu() as gpu:
        run = CodesKernel(columns, dual=True)
        for rows in (1, 5, 0):
            x = activations(5, 64, torch.float32, rows)[:rows]
            assert same(run(x), quantize_reference(x, columns, dual=True))
        wide = activations(5, 128, torch.float32, 8)
        assert same(run(wide[:, 64:]), quantize_reference(wide[:, 64:], columns, dual=True))  # rows that lie apart
        assert same(run(wide[:, 1:65]), quantize_reference(wide[:, 1:65], columns, dual=True))  # and are not aligned
        assert [('-DALIGNED=1' in launch.options) for launch in gpu.launches] == [True, True, True, False]
        for wrong, said in ((x[:, :60], '64 columns'), (x.double(), 'float64'), (wide.t()[:64].t().clone().t(), '64 columns')):
            with pytest.raises((TypeError, ValueError), match=said): run(wrong)
        with pytest.raises(ValueError, match=r'scale has shape \(1, 4\)'): CodesKernel(columns, scale=torch.ones(1, 4))(wide[:, :64])


NORMS = [dict(shift=2, scale=2), dict(weight=1, bias=1), dict(kind='rms', weight=1, scale=2), dict(kind='rms', weight=1, bias=1, shift=2)]


@pytest.mark.parametrize('given', NORMS, ids=lambda given: ' '.join(map(str, given)))
def test_norms(given):
    g = torch.Generator().manual_seed(len(given))
    for dtype, sizes, images, options in ((torch.bfloat16, (600,), 3, dict(dual=True)), (torch.float16, (40, 100, 6), 1, {}), (torch.float32, (96, 33), 2, dict(blocks=(32, 1)))):
        columns = PackedColumns(sizes)
        K = columns.columns
        x = ((torch.randn(6, K, generator=g)*3 + torch.randn(6, 1, generator=g)*5)*10**torch.linspace(-2, 2, 6)[:, None]).to(dtype)
        emb = (torch.randn(images, 3*K, generator=g)*.5).to(dtype)
        own = dict(weight=emb[0, :K].clone(), bias=emb[0, K:2*K].clone(), shift=emb[:, K:2*K], scale=emb[:, 2*K:], kind='rms')
        kwargs = {name: own[name] for name in given}
        if images == 1 and 'shift' in given: kwargs['shift'] = kwargs['shift'][0]
        with emulated_gpu(7, processors=1): got = norm_codes(x.view(images, -1, K), columns, **kwargs, **options)
        y = norm_reference(x, columns=columns, **kwargs)
        assert same(got, quantize_reference(y, columns, **options)), (dtype, sizes)
        assert y.isfinite().all() and got.codes.float().abs().amax(1).min() > 20


def test_a_norm_whose_rows_come_by():
    columns, g = PackedColumns((1000,)), torch.Generator().manual_seed(1)
    x, emb = torch.randn(8, 1000, generator=g).half(), torch.randn(4, 2000, generator=g).half()
    shift, scale = emb.chunk(2, 1)
    with emulated_gpu(2, processors=1):
        run = NormCodes(columns, layout=Layout(1, 64, 1, 1))
        runs = [run(x, shift, scale), run(x, shift[:, None], scale[:, None]), *(NormCodes(columns, layout=Layout(*layout))(x, shift, scale)
                for layout in ((2, 32, 1, 1), (4, 16, 2, 1), (8, 8, 4, 1)))]
    want = quantize_reference(norm_reference(x, shift, scale, columns=columns), columns)
    assert all(same(got, want) for got in runs)  # sums do not depend on how many threads share a row


@pytest.mark.parametrize('activation', ['silu', 'gelu', 'gelu-tanh'])
def test_activations(activation):
    columns = PackedColumns((70, 32))
    for dtype, gated, first in ((torch.bfloat16, False, False), (torch.float16, True, False), (torch.float32, True, True)):
        x = (torch.randn(9, 102*(1 + gated), generator=torch.Generator().manual_seed(3))*torch.linspace(.1, 3, 9)[:, None]).to(dtype)
        with emulated_gpu(4): got = activation_codes(x, columns, activation=activation, gated=gated, gate_first=first, dual=True)
        y = activation_reference(x, activation, gated, first)
        want = quantize_reference(y, columns, dual=True)
        off = (got.codes.int() - want.codes.int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3 and torch.allclose(got.scale, want.scale, rtol=2e-3, atol=1e-9)


def test_an_activation_of_what_is_not_finite():
    "NaN is 0, infinity the largest code; neither spoils its neighbor, with which it shares a reciprocal"
    columns, x = PackedColumns((64,)), torch.linspace(-2, 2, 64)[None].repeat(4, 1)
    x[1, 9], x[2, 9], x[3, 9] = torch.nan, torch.inf, 1e30
    with emulated_gpu(): got = activation_codes(x, columns, activation='silu', scale=torch.full((1, 1), .02))
    assert torch.equal(got.codes[1:, :9], got.codes[:1, :9].expand(3, -1)) and torch.equal(got.codes[1:, 10:], got.codes[:1, 10:].expand(3, -1))
    assert got.codes[1:, 9].tolist() == [0, 127, 127]


@pytest.mark.parametrize('options', [dict(), dict(dual=True), dict(dtype='int4', packed=True), dict(dtype='int4', dual=True), dict(quartz=16), dict(quartz=32, rounded=True)], ids=str)
def test_products_find_the_codes_of_quotients(options, monkeypatch):
    "For every bfloat16 down to 2^-8 of every largest value in a row; the question whether they do is needed"
    mantissas = torch.arange(128., 256)
    x = torch.cat([mantissas*2.**-e for e in range(9)]).repeat(128, 1)
    x[x > mantissas[:, None]] = 0
    x, columns = torch.cat([x, -x], 1).bfloat16(), PackedColumns((2304,))
    want = quantize_reference(x, columns, **options)
    with emulated_gpu(): assert same(CodesKernel(columns, **options)(x), want)
    sources, asked = dict(cuda.cuda_sources()), '    if (below) return'
    assert sources['quantize/rounding.cuh'].count(asked) == 1
    sources['quantize/rounding.cuh'] = sources['quantize/rounding.cuh'].replace(asked, '    return true;\n' + asked)
    monkeypatch.setattr(cuda, 'cuda_sources', lambda: sources)
    with emulated_gpu(): assert not same(CodesKernel(columns, **options)(x), want)


BREAKS = [  # source, what is broken
    ('quantize/sm80_codes.cu', 'rooms[i] = 0;\n    __syncthreads();', 'rooms[i] = 0;'), ('quantize/sm80_codes.cu', '    __syncthreads();\n    return most;', '    return most;'),
    ('quantize/sm80_codes.cu', '(turn + 1) % 3', 'turn % 3'), ('quantize/rounding.cuh', 'value[i] = fmaf(fmaf(-scale, near, value[i]), inverse, near);', 'value[i] = near;'),
    ('quantize/rounding.cuh', '(bytes & 0x7f7f7f7fu)', 'bytes'), ('quantize/sm80_codes.cu', '        __syncwarp();\n        rotate_across', '        rotate_across'),
    ('quantize/rotation.cuh', '(i) / NEIGHBORS / 8 * 16', '0'), ('quantize/produce.cuh', '        __syncthreads();\n        total', '        total'),
    ('quantize/produce.cuh', '(WHOLE ? 0 : i) < at[c].count ?', 'true ?'), ('quantize/sm80_codes.cu', 'row / rows_of_image : 0', '0 : 0'),
    ('quantize/sm80_codes.cu', 'copies_wait<1>();\n        __syncwarp();', '__syncwarp();'), ('quantize/sm80_codes.cu', '(turn + 1) % 2 * TENSORS', 'turn % 2 * TENSORS')]


@pytest.mark.parametrize('file, right, wrong', BREAKS, ids=[f'{b[0].split("/")[1]}-{i}' for i, b in enumerate(BREAKS)])
def test_a_broken_kernel_is_noticed(file, right, wrong, monkeypatch):
    sources = dict(cuda.cuda_sources())
    assert sources[file].count(right) == 1
    sources[file] = sources[file].replace(right, wrong)
    monkeypatch.setattr(cuda, 'cuda_sources', lambda: sources)
    i = BREAKS.index((file, right, wrong))
    columns = PackedColumns((624,) if i > 9 else (620,) if i > 3 else (300, 300))
    x = ((torch.arange(20*columns.columns) - 6000).view(20, -1)/8*torch.linspace(3, .1, 20)[:, None]).half()
    emb = torch.randn(4, 620, generator=torch.Generator().manual_seed(0)).half()
    options = dict(quartz=32) if i == 4 else dict(dual=i < 4)
    if i == 3: columns, options = PackedColumns((254,)), dict(scale=torch.rand(1, 20) + .1)
    if i == 3: x = (torch.arange(-127, 127) + .5)*options['scale'].T  # on ties, or next to them
    if i in (5, 6): columns, x, options = PackedColumns((512,)), x[:, :512], dict(blocks=(256,))
    if i == 0: x = x.flip(1)  # the largest value is in the other warp than the one that makes room
    layout = Layout(1, 64, 1, 1)  # two warps for a row: they have to meet
    differs = False
    for seed in range(8):
        if differs: break
        with emulated_gpu(seed, i == 11, processors=1):
            try:
                if file == 'quantize/produce.cuh' or 'image' in right: differs |= not same(norm_codes(x, columns, shift=emb, layout=layout), quantize_reference(norm_reference(x, emb, columns=columns), columns))
                else: differs |= not same(CodesKernel(columns, layout=layout, **options)(x), quantize_reference(x, columns, **options))
            except RuntimeError as e: differs |= any(told in str(e) for told in ('stuck', 'different operations', 'copies landed'))
    assert differs
