"""Observing: merging by brute force, killing, damage on disk, calibration sets from elsewhere, and what the model must not notice."""
import json
import os
import random
import signal
import warnings
from dataclasses import replace
from functools import partial, reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segquant_nb import observe
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.graph import LayerSemantics, Part, Semantics, analyze
from segquant_nb.observe import (ModelStats, Stats, bin_edges, collect_stats, float_bins, load_stats, merge_stats, plot_stats,
                                 row_keys, save_stats, stats_bytes, stats_of)

EXACT = 'high', 'low', 'counts', 'keys', 'rows'
collect = partial(collect_stats, progress=False)


def bits(t):
    return t.contiguous().view(torch.uint8)


def same(a, b, gram=False):
    names = EXACT + ('gram',)*gram
    return (a.seen, a.parts, a.keep) == (b.seen, b.parts, b.keep) and all(
        torch.equal(bits(getattr(a, n)), bits(getattr(b, n))) for n in names)


class Block(nn.Module):
    "Query and key read one tensor; `out` reads a GELU beside them, and runs twice; `idle` never runs"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.out, self.idle = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(16, 12), nn.Linear(4, 4)
        self.drop, self.register = nn.Dropout(.5), self.register_buffer('calls', torch.zeros(()))

    def forward(self, x, scale=1., *, extra=None):
        self.calls += 1
        x = self.drop(x)*scale
        both = torch.cat([self.q(x), nn.functional.gelu(self.k(x))], -1)
        return self.out(both) + self.out(both.flip(0))


def calib_set(n=9, rows=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [{'x': torch.randn(2 + i % 3, rows, 12, generator=g).to(dtype), 'scale': 1 + i} for i in range(n)]


def semantics():
    return Semantics([LayerSemantics('q', 'Linear', 12, 8, [Part(0, 12)], shares_input_with=0),
                      LayerSemantics('k', 'Linear', 12, 8, [Part(0, 12)], shares_input_with=0),
                      LayerSemantics('out', 'Linear', 16, 12, [Part(0, 8), Part(8, 8)], shares_input_with=1)], 'Block')


# Merging

def brute_force(samples, keep, parts, seed=0):
    "Everything that Stats are, from all rows at once"
    x = torch.cat(samples)
    keys = np.concatenate([row_keys(seed, i, 0, len(s)) for i, s in enumerate(samples)])
    order = keys.argsort()[:keep]
    counts = np.zeros((len(parts), 4096), int)
    for number, part in enumerate(parts):
        for value in x[:, part].flatten().tolist():
            counts[number, int.from_bytes(np.float32(value).tobytes()[::-1]) >> 20] += 1
    return dict(seen=len(x), high=x.amax(0), low=x.amin(0), counts=torch.from_numpy(counts),
                keys=torch.from_numpy(keys[order]), rows=x[order])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 40), st.randoms(use_true_random=False),
       st.integers(0, 2**16))
def test_merging_is_exact_whatever_the_order(sizes, keep, draw, seed):
    g = torch.Generator().manual_seed(seed)
    samples = [torch.randn(n, 6, generator=g)**3 for n in sizes]
    samples[0][0, :3] = torch.tensor([0., -0., 1e-42])
    parts = (slice(0, 4, 1), slice(4, 6, 1))
    pieces = [stats_of(x, 'x', parts, True, keep, sample=i) for i, x in enumerate(samples)]
    while len(pieces) > 1:
        a, b = (pieces.pop(draw.randrange(len(pieces))) for _ in range(2))
        pieces.append(a.merge(b))
    found, wanted = pieces[0], brute_force(samples, keep, parts)
    assert found.seen == wanted['seen']
    for name in EXACT: assert torch.equal(getattr(found, name), wanted[name]), name
    in_order = reduce(Stats.merge, [stats_of(x, 'x', parts, True, keep, sample=i) for i, x in enumerate(samples)])
    assert same(found, in_order)
    x = torch.cat(samples).double()
    torch.testing.assert_close(found.gram, in_order.gram, rtol=1e-12, atol=1e-12*float(x.square().sum()))
    torch.testing.assert_close(found.hessian, 2*x.T @ x/len(x), rtol=1e-4, atol=1e-5*float(x.square().sum()/len(x)))


@pytest.mark.parametrize('seed', [0, 1, 2**40])
def test_no_two_keys_are_alike_and_all_are_as_likely(seed):
    keys = np.stack([row_keys(seed, sample, 0, 500) for sample in range(400)])
    assert keys.min() >= 0 and len(np.unique(keys)) == keys.size
    far = np.concatenate([row_keys(seed, s, f, 50) for s in (0, 2**31 - 1) for f in (0, 2**32 - 50)])
    assert len(np.unique(far)) == 200 and far.min() >= 0
    for values in (keys, keys[:, :1], keys[:1], keys[::7, ::3]):  # also along rows and along samples alone
        share = (values/2**63 < .25).mean()
        assert abs(share - .25) < 4*(.1875/values.size)**.5
    low = (keys & 1).mean()
    assert abs(low - .5) < 4*(.25/keys.size)**.5


def test_a_seed_chooses_other_rows():
    x = torch.arange(1000.)[:, None]
    a, b = (stats_of(x, keep=50, seed=s).rows.flatten().tolist() for s in (0, 1))
    assert 0 < len(set(a) & set(b)) + 1 < 15


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bins_are_those_of_float32(dtype):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).mul(3).exp().clamp(max=6e4).to(dtype)
    x = torch.cat([x, -x, torch.tensor([0., 6e-5, 65504.], dtype=dtype)])
    bins, edges = float_bins(x), bin_edges()
    magnitude = x.float().abs()
    assert (bins >= 2048).eq(x < 0).all()
    assert (edges[bins % 2048] <= magnitude).all() and (magnitude < edges[bins % 2048 + 1]).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    s = stats_of(x, hessian=True)
    assert s.rows.dtype == dtype and s.high.dtype == torch.float32 and torch.equal(s.high, x.amax(0).float())
    whole = stats_of(x[:20], hessian=True).merge(stats_of(x[20:], hessian=True, sample=1))
    assert torch.equal(whole.high, s.high) and whole.rows.dtype == dtype


def test_merging_refuses_what_is_not_alike():
    x = torch.randn(20, 8)
    s = stats_of(x, 'a', keep=4)
    for other, problem in ((stats_of(x, 'b', keep=5, sample=1), 'keep is 4 in the first and 5'),
                           (stats_of(x[:, :4], 'b', keep=4, sample=1), 'width is 8 in the first and 4'),
                           (stats_of(x, 'b', [slice(0, 4), slice(4, 8)], keep=4, sample=1), 'parts is'),
                           (stats_of(x, 'b', hessian=True, keep=4, sample=1), 'only one has a Hessian'),
                           (stats_of(x, 'b', keep=4, sample=1), 'two layers'),
                           (stats_of(x, 'a', keep=4), 'count twice')):
        with pytest.raises(ValueError, match=problem): s.merge(other)


def test_what_cannot_be_asked_of_statistics():
    s = stats_of(torch.randn(20, 8), 'a')
    for error, problem, act in (
            (ValueError, r'percentile\(120', lambda: s.percentile(120)), (ValueError, 'both', lambda: s.percentile(9, 'up')),
            (ValueError, '6:12 of 8', lambda: s.columns(slice(6, 12))), (ValueError, '3:3 of 8', lambda: s.columns(slice(3, 3))),
            (TypeError, 'expected a slice', lambda: s.columns(5)), (ValueError, r'expected \(8,\)', lambda: s/torch.ones(3)),
            (ValueError, 'no zeros', lambda: s/torch.zeros(8)), (ValueError, 'no zeros', lambda: s/torch.full((8,), torch.nan)),
            (ValueError, '0:5, 3:8 of rows overlap', lambda: stats_of(s.rows, parts=[slice(0, 5), slice(3, 8)])),
            (TypeError, 'floating-point', lambda: stats_of([1., 2.])), (TypeError, 'list of ModelStats', lambda: merge_stats([])),
            (TypeError, 'list of ModelStats', lambda: merge_stats(collect(nn.Linear(8, 2), [s.rows]))),
            (ValueError, r'shard=3', lambda: collect(nn.Linear(8, 2), [s.rows], shard=3)),
            (ValueError, r'keep=2\.5', lambda: collect(nn.Linear(8, 2), [s.rows], keep=2.5)),
            (ValueError, 'sample 0, the model itself: 9 channels', lambda: collect(nn.Linear(8, 2), [torch.ones(4, 9)])),
            (ValueError, r'write \*ut\*', lambda: collect(Block(), calib_set(), 'ut')),
            (ValueError, 'fixed scale for each token', lambda: s.fit(Quantizer('int8', axis=-1))),
            (ValueError, 'fixed scale for each token', lambda: s.fit(DualScale('int8', axis=1, clip='mse')))):
        with pytest.raises(error, match=problem): act()
    for shared in (Quantizer(), Quantizer(axis=0), Quantizer(axis=(0, 1)), Quantizer(axis=-1, dynamic=True)): assert s.fit(shared).ready


def test_dividing_by_a_negative_number_turns_the_ends_round():
    x, scale = torch.rand(20, 3) + 1, torch.tensor([2., -2., 1.])
    s, direct = stats_of(x, hessian=True)/scale, stats_of(x/scale, hessian=True)
    assert same(s, direct) and s.negative[1] > 0 == s.positive[1]


# What is read from them

@pytest.mark.parametrize('group, axis', [(None, None), (None, 0), (4, None), (4, 0)])
def test_the_range_is_exactly_that_of_all_rows(group, axis):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 12, generator=g)**3
    s = reduce(Stats.merge, [stats_of(y, keep=8, sample=i) for i, y in enumerate(x.split(100))])
    for symmetric in (True, False):
        q = Quantizer('int8', axis, group, symmetric)
        ours, theirs = s.fit(q), q.fit(x)
        assert torch.equal(ours.scale, theirs.scale) and (symmetric or torch.equal(ours.zero, theirs.zero))
    assert torch.equal(s.positive, x.clamp(min=0).amax(0)) and torch.equal(s.negative, (-x).clamp(min=0).amax(0))
    clipped = Quantizer('int8', clip='percentile')
    assert torch.equal(s.fit(clipped).scale, clipped.fit(s.rows).scale)
    assert s.fit(Quantizer(dynamic=True)).scale is None


def test_percentiles_of_odd_inputs():
    assert stats_of(torch.zeros(9, 4)).percentile(99).tolist() == [0.]
    assert stats_of(torch.full((9, 4), -3.)).percentile(99).tolist() == [3.]
    one_sided = stats_of(torch.rand(1000, 4) + 1, keep=4)
    assert one_sided.percentile(99, 'negative').tolist() == [0.]
    assert one_sided.percentile(100).item() == one_sided.amax.max()
    x = torch.cat([torch.ones(4096, 1), torch.full((4096, 1), 100.)], 1)
    both = stats_of(x, parts=[slice(0, 1), slice(1, 2)])
    assert both.percentile(50)[0] <= 1 and 96 <= both.percentile(50)[1] <= 100


def test_of_two_zeros_the_sign_is_dropped():
    "-0. and 0. are equal, and which of them is the maximum depends on who comes first"
    a, b = stats_of(torch.tensor([[0., 0.], [-1., 1.]])), stats_of(torch.tensor([[-0., -0.], [-1., 1.]]), sample=1)
    for s in (a, b, a.merge(b), b.merge(a)): assert not s.high[0].signbit() and not s.low[1].signbit()


def test_alternating_parts():
    "A stack on the last axis: every other channel belongs together"
    x = torch.randn(50, 6)
    x[:, ::2] *= 10
    s = stats_of(x, 'x', [slice(0, 5, 2), slice(1, 6, 2)])
    even, odd = s.split()
    assert torch.equal(even.rows, s.rows[:, ::2]) and even.width == 3
    assert torch.equal(even.counts[0], s.counts[0]) and even.percentile(50) > 3*odd.percentile(50)
    assert even.name == 'x[0:5:2]'


def test_dividing_and_slicing_commute():
    x = torch.randn(300, 8)
    s, scale = stats_of(x, parts=[slice(0, 4), slice(4, 8)], hessian=True, keep=64), torch.rand(8) + .5
    a, b = (s/scale).columns(slice(4, 8)), s.columns(slice(4, 8))/scale[4:]
    assert same(a, b) and torch.equal(a.gram, b.gram)
    assert torch.equal((s/2).rows*2, s.rows) and s.high is not (s/2).high
    assert torch.equal(s.columns(slice(1, 3)).high, s.high[1:3])


def test_pictures_and_tables():
    s = stats_of(torch.randn(30, 8), 'layer', [slice(0, 4), slice(4, 8)])
    assert 'layer: 30 rows of 8 channels, 30 kept' in repr(s) and '4:8' in repr(s)
    assert s._repr_png_()[1:4] == b'PNG' and len(plot_stats([s, s]).axes) == 4
    assert len(plot_stats(stats_of(torch.zeros(3, 4))).axes) == 2
    found = collect(Block(), calib_set(), ['q', 'out'])
    assert 'Block: 2 layers, 2 inputs, 9 samples' in repr(found) and '<td' in found._repr_html_()


# The pass

def test_a_pass_sees_what_all_rows_say():
    model, samples, arrived = Block().eval(), calib_set(), {'q': [], 'out': []}
    for name, seen in arrived.items():
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].detach().flatten(0, -2)))
    found = collect(model, samples, semantics(), hessian=True, keep=40)
    assert found['q'] is found['k'] and found.layers['k'] == 'q' and set(found) == {'q', 'k', 'out'}
    assert found['out'].parts == (slice(0, 8, 1), slice(8, 16, 1))
    for name, xs in arrived.items():
        calls = len(xs)//len(samples)
        per_sample = [torch.cat(xs[i*calls:(i + 1)*calls]) for i in range(len(samples))]
        wanted = brute_force(per_sample, 40, found[name].parts)
        for field in EXACT: assert torch.equal(getattr(found[name], field), wanted[field]), (name, field)
        x = torch.cat(xs).double()
        torch.testing.assert_close(found[name].gram, x.T @ x, rtol=1e-4, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.randoms(use_true_random=False))
def test_shards_in_any_order_are_one_pass(n, draw):
    model, samples = Block(), calib_set()
    whole = collect(model, samples, semantics(), hessian=True, keep=30)
    shards = [collect(model, samples, semantics(), hessian=True, keep=30, shard=(r, n)) for r in range(n)]
    draw.shuffle(shards)
    merged = merge_stats(shards)
    assert merged.about['samples'] == 9 and set(merged) == set(whole)
    for layer in whole:
        assert same(merged[layer], whole[layer])
        torch.testing.assert_close(merged[layer].gram, whole[layer].gram, rtol=1e-12, atol=1e-12)


def test_kinds_of_samples():
    model, samples = Block(), calib_set()
    wanted = collect(model, samples, 'out')['out']
    as_pairs = [((s['x'],), {'scale': s['scale']}) for s in samples]
    as_lists = [[s['x'], s['scale']] for s in samples]
    for given_as in (as_pairs, as_lists, (s for s in samples), iter(as_pairs)):
        assert same(collect(model, given_as, 'out')['out'], wanted)
    tensors = [s['x'] for s in samples]
    loader = torch.utils.data.DataLoader(torch.randn(8, 5, 12), batch_size=2)
    assert collect(model, tensors, 'out')['out'].seen == wanted.seen
    assert collect(model, loader, 'out')['out'].seen == 2*8*5


@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_as_it_was(fails):
    model, samples = Block().train(), calib_set()
    model.q.register_forward_pre_hook(lambda m, a: None)
    if fails: samples[4]['x'] = samples[4]['x'].clone().fill_(torch.nan)
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loader = torch.utils.data.DataLoader(samples, shuffle=True, batch_size=None)
    try: collect(model, samples if fails else loader, ['q', 'k', 'out'])
    except ValueError: assert fails
    assert model.training and model.drop.training and len(model.q._forward_pre_hooks) == 1
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n != 'q')
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any(p.grad_fn or p.grad is not None for p in model.parameters())


def test_samples_are_not_written_to():
    samples = calib_set()
    copies = [s['x'].clone() for s in samples]
    collect(Block(), samples, semantics())
    assert all(torch.equal(s['x'], c) for s, c in zip(samples, copies))


@pytest.mark.parametrize('whole', [True, False])
def test_compiled_models(whole):
    model, samples = Block().eval(), calib_set(3)
    wanted = collect(model, samples, semantics())
    if whole: compiled = torch.compile(model, backend='eager')
    else: compiled = Block().eval(); compiled.compile(backend='eager')
    compiled(samples[0]['x'])
    found = collect(compiled, samples, semantics())
    assert all(same(found[layer], wanted[layer]) for layer in wanted)


def test_memory_is_bounded_and_known_before():
    model, samples = Block(), calib_set(60)
    found = semantics()
    for hessian in (False, True):
        known = stats_bytes(model, found, hessian, keep=32)
        stats = collect(model, samples, found, hessian, keep=32)
        assert set(known) == set(stats.inputs)
        for name, s in stats.inputs.items():
            assert len(s.rows) == 32
            held = sum(t.nbytes for t in (s.high, s.low, s.counts, s.keys, s.rows, s.gram) if t is not None)
            assert held <= known[name] < held + 40*4096 + 100*s.width
    with_hessian, without = (stats_bytes(model, found, h, keep=32) for h in (True, False))
    assert all(with_hessian[n] - without[n] == 8*s.width**2 == s.gram.nbytes for n, s in stats.inputs.items())
    need = sum(stats_bytes(model, found, keep=512).values())
    assert collect(model, samples, found, memory=need)['q'].keep == 512
    with pytest.warns(UserWarning, match=r'\d+ rows of each input are kept, not 512'):
        less = collect(model, samples, found, memory=need - 20_000)
    assert sum(stats_bytes(model, found, keep=less['q'].keep).values()) <= need - 20_000
    with pytest.raises(ValueError, match='observe some of the layers at a time'):
        collect(model, samples, found, memory=1000)
    half = sum(stats_bytes(model.bfloat16(), found, keep=1000).values())
    assert half < sum(stats_bytes(model.float(), found, keep=1000).values())


def test_during_the_pass_nothing_grows():
    "All tensors that a pass holds, after 10 samples and after 200"
    model, sizes = Block().eval(), []
    run = observe._Pass(observe._find_inputs(model, semantics()), 16, True, 0)
    observe._watch(model, run)
    with torch.no_grad():
        for run.sample, item in enumerate(calib_set(200)):
            observe._run_sample(model, run, item)
            if run.sample in (9, 199):
                held = [run.high, run.low, run.counts, *run.columns, *run.first_bin, *run.rows, *run.grams]
                sizes.append(sum(t.nbytes for t in held) + sum(k.keys.nbytes for k in run.kept))
    assert sizes[0] == sizes[1] <= sum(stats_bytes(model, semantics(), True, 16).values())


class Transposed(nn.Module):
    "transformers' way to write a linear layer, and one that takes its input by name"
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D
        self.a, self.b = Conv1D(8, 12), nn.Linear(8, 4)

    def forward(self, x): return self.b(input=self.a(x))


def test_other_linear_layers():
    found = collect(Transposed(), [torch.randn(3, 5, 12)])
    assert {layer: s.width for layer, s in found.items()} == {'a': 12, 'b': 8} and found['b'].seen == 15


def test_a_hessian_under_autocast():
    model, x = nn.Linear(8, 8), torch.randn(50, 8)
    with torch.autocast('cpu', torch.bfloat16): found = collect(model, [x], hessian=True)
    torch.testing.assert_close(found[''].gram, x.double().T @ x.double(), rtol=1e-5, atol=1e-5)


def test_inputs_without_rows():
    found = collect(nn.Linear(4, 4), [torch.randn(0, 4), torch.randn(4), torch.randn(2, 3, 4)], progress=False)
    assert found[''].seen == 7


# What is refused

@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_is_named(value, dtype, tmp_path):
    samples = calib_set(dtype=dtype)
    samples[6]['x'][1, 2, 3] = value
    with pytest.raises(ValueError, match=r'sample 6, layer q: NaN or Inf in 1 of 12 channels, .* channel 3'):
        collect(Block().to(dtype), samples, semantics(), folder=tmp_path, every=0)
    mended = calib_set(dtype=dtype)
    resumed = collect(Block().to(dtype), mended, semantics(), folder=tmp_path)
    wanted = collect(Block().to(dtype), mended, semantics())
    assert all(same(resumed[layer], wanted[layer]) for layer in wanted)


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_the_only_layer_names_what_it_sees(value):
    with pytest.raises(ValueError, match='NaN or Inf in 1 of 4 channels, .* channel 2'):
        collect(nn.Linear(4, 4), [torch.zeros(3, 4), torch.tensor([[0., 1., value, 2.]])])


def test_what_overflows_inside_is_named_where_it_is_seen():
    model = Block()
    with torch.no_grad(): model.k.weight.mul_(1e38)
    with pytest.raises(ValueError, match='sample 0, layer out: NaN or Inf'): collect(model, calib_set())


def test_an_error_after_a_nan_does_not_hide_it():
    class Fragile(Block):
        def forward(self, x, scale=1.):
            out = super().forward(x, scale)
            if out.isnan().any(): raise FloatingPointError('lost')
            return out
    samples = calib_set()
    samples[2]['x'][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match='sample 2, layer q: NaN'): collect(Fragile(), samples)


def test_sets_of_another_model():
    model = Block()
    for sample, problem in (({'x': torch.randn(2, 12), 'guidance': 1.}, "sample 1 does not fit Block: .*'guidance'.*takes x, scale, extra"),
                            ({'scale': 1.}, "sample 1 does not fit Block: missing a required argument: 'x'"),
                            ({'x': torch.randn(2, 7)}, 'sample 1, layer q: 7 channels arrive where 12 are expected. Is the set')):
        with pytest.raises(ValueError, match=problem): collect(model, [calib_set()[0], sample])
    with pytest.raises(RuntimeError, match='sample 1: Block stopped with TypeError.*another model'):
        collect(model, [calib_set()[0], {'x': torch.randn(2, 12), 'scale': 'large'}])
    with pytest.raises(TypeError, match='sample 0: .*a dict of inputs'): collect(model, [3])
    for wrong in ({'x': torch.randn(2, 12)}, torch.randn(2, 12), 'folder', 5):
        with pytest.raises(TypeError, match='expected an iterable of samples'): collect(model, wrong)
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match='calibration set is empty'): collect(model, empty)
    with pytest.raises(ValueError, match=r'shard=\(2, 2\)'): collect(model, calib_set(), shard=(2, 2))
    with pytest.raises(ValueError, match='keep=0'): collect(model, calib_set(), keep=0)
    with pytest.raises(ValueError, match='is a file'): collect(model, calib_set(), folder=__file__)


def test_a_recorded_set_knows_its_model():
    "Another model with the same signature and widths: nothing but the set can tell"
    from segquant_nb.calibration import Uniform, generate_calibrate_set
    from segquant_nb.zoo import load
    from copy import deepcopy
    flux = load('tiny-flux')
    call = dict(progress=False, height=64, width=64, num_inference_steps=2, max_sequence_length=24)
    recorded = generate_calibrate_set(flux, Uniform(2), ['a ring'], 'dit', **call)
    shorter = deepcopy(flux.transformer)
    del shorter.single_transformer_blocks[-1]
    for samples in (recorded, recorded[:1], recorded.get_dataloader(2)):
        assert collect(flux, samples, '*.proj_out').about['samples']
        with pytest.raises(ValueError, match='this set was recorded from FluxTransformer2DModel'): collect(shorter, samples)
    assert collect(shorter, [recorded[0]], '*.proj_out').about['samples'] == 1  # plain samples are anybody's


def test_layers_that_are_not_there_or_not_called():
    model = Block()
    with pytest.raises(ValueError, match="no layer 'ot'.*Did you mean 'out'"): collect(model, calib_set(), ['q', 'ot'])
    with pytest.raises(ValueError, match='none of the 1 layers was called'): collect(model, calib_set(), 'idle')
    with pytest.raises(ValueError, match='ReLU has no linear layer'): collect(nn.ReLU(), calib_set())
    wrong = Semantics([LayerSemantics('q', 'Linear', 5, 8)], 'Other')
    with pytest.raises(ValueError, match='semantics of Other.*q reads 5 channels there, here 12'):
        collect(model, calib_set(), wrong)
    with pytest.warns(UserWarning, match='1 of 4 layers were never called: idle'): found = collect(model, calib_set())
    assert found.missed == ['idle'] and 'idle' not in found and len(found) == 3
    with pytest.raises(KeyError, match='never called'): found['idle']
    with pytest.raises(KeyError, match="Did you mean 'out'"): found['outt']


def test_models_are_merged_only_with_their_like():
    model, samples = Block(), calib_set()
    part = partial(collect, model, samples, semantics())
    first = part(shard=(0, 2))
    for second, problem in ((part(shard=(1, 2), seed=1), 'seed is 0 in the first and 1 in the second'),
                            (part(shard=(1, 2), keep=9), 'keep is 512'),
                            (part(shard=(2, 4)), r'\(0, 2\) and \(2, 4\) have samples in common'),
                            (part(), 'count twice')):
        with pytest.raises(ValueError, match=problem): merge_stats([first, second])
    with torch.no_grad(): model.q.weight[0, 0] += 1
    with pytest.raises(ValueError, match='weights'): merge_stats([first, part(shard=(1, 2))])


def test_a_layer_that_only_one_process_saw():
    class Sometimes(Block):
        def forward(self, x, scale=1.):
            if scale == 2: self.idle(x[..., :4])
            return super().forward(x, scale)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        shards = [collect(Sometimes(), calib_set(), shard=(r, 3)) for r in range(3)]
    assert [s.missed for s in shards] == [['idle'], [], ['idle']]
    merged = merge_stats(shards)
    assert merged.missed == [] and same(merged['idle'], shards[1]['idle'])


# On disk

@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stored')
    return folder, collect(Block(), calib_set(), semantics(), hessian=True, keep=20, folder=folder)


def test_a_folder_gives_back_what_was_put_in(stored, tmp_path):
    folder, found = stored
    wanted = collect(Block(), calib_set(), semantics(), hessian=True, keep=20)
    assert list(found) == list(wanted) and repr(found) == repr(wanted)
    assert all(same(found[layer], wanted[layer], True) for layer in wanted)
    assert found['q'] is not found['q']  # read when it is asked for
    (tmp_path/'keep.safetensors').write_bytes(b'of somebody else')
    for stats in (wanted, wanted):  # twice, over itself
        save_stats(stats, tmp_path)
        assert all(same(load_stats(tmp_path)[layer], wanted[layer], True) for layer in wanted)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize('damage, when, problem', [
    (lambda f: f.write_bytes(f.read_bytes()[:-9]), 'load', 'damaged: .* bytes, not'),
    (lambda f: f.unlink(), 'load', 'is missing'),
    (lambda f: f.write_bytes(f.read_bytes()[:-9] + b'x' + f.read_bytes()[-8:]), 'read', 'checksum is another one'),
])
def test_damage_is_found(stored, tmp_path, damage, when, problem):
    save_stats(stored[1], tmp_path)
    damage(tmp_path/json.loads((tmp_path/'stats.json').read_text())['inputs']['out']['file'])
    with pytest.raises(ValueError, match=f'statistics of out.*{problem}'):
        found = load_stats(tmp_path)
        assert when == 'read' and found['q'].seen
        found['out']


def test_no_statistics_or_half_a_list(stored, tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no statistics'): load_stats(tmp_path)
    save_stats(stored[1], tmp_path)
    listing = tmp_path/'stats.json'
    listing.write_text(listing.read_text()[:100])
    with pytest.raises(ValueError, match='stats.json is damaged'): load_stats(tmp_path)


@pytest.mark.parametrize('change, problem', [
    (dict(keep=7), 'keep is 20 there and 7 here'), (dict(seed=3), 'seed is 0 there and 3'),
    (dict(hessian=False), 'hessian is True there'), (dict(shard=(0, 2)), r'shards is \[\[0, 1\]\] there'),
    (dict(layers=['q']), 'layers are not the same, k for example'), (dict(calib_set=calib_set(8)), 'total is 9 there and 8 here'),
    (dict(calib_set=calib_set()[::-1]), 'sample 8 is not the one')])
def test_another_pass_does_not_go_on(stored, change, problem):
    settings = dict(calib_set=calib_set(), layers=semantics(), hessian=True, keep=20, folder=stored[0]) | change
    before = {f.name: f.read_bytes() for f in stored[0].iterdir()}
    with pytest.raises(ValueError, match=problem): collect(Block(), **settings)
    assert before == {f.name: f.read_bytes() for f in stored[0].iterdir()}


def test_other_weights_do_not_go_on(stored):
    model = Block()
    with torch.no_grad(): model.out.bias[0] += 1
    with pytest.raises(ValueError, match='weights is'):
        collect(model, calib_set(), semantics(), hessian=True, keep=20, folder=stored[0])


def killed(act) -> bool:
    "Run it in a child process; was it killed?"
    child = os.fork()
    if not child:
        try: act()
        except BaseException: os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('every', [1, 2, 5])
def test_killed_whenever_a_file_is_put_in_place(tmp_path, monkeypatch, every, after):
    "Each process dies at the n-th rename, before or after it, until one comes through"
    wanted = collect(Block(), calib_set(), semantics(), hessian=True, keep=20)
    put, count = os.replace, [0]

    def deadly(a, b):
        count[0] += 1
        if count[0] == dies_at and not after: os.kill(os.getpid(), signal.SIGKILL)
        put(a, b)
        if count[0] == dies_at and after: os.kill(os.getpid(), signal.SIGKILL)

    def act(): collect(Block(), calib_set(), semantics(), hessian=True, keep=20, folder=tmp_path, every=0)
    monkeypatch.setattr(os, 'replace', deadly)
    deaths, dies_at = 0, every
    while killed(act):
        deaths += 1
        dies_at = every + deaths
        assert deaths < 100
    assert deaths >= 3
    monkeypatch.undo()
    found = load_stats(tmp_path)
    assert found.about['samples'] == 9 and all(same(found[layer], wanted[layer], True) for layer in wanted)
    assert len(list(tmp_path.iterdir())) == 3  # nothing is left lying about


def test_killed_in_the_middle_of_a_sample(tmp_path):
    class Deadly(list):
        def __getitem__(self, i):
            if i == at: os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(i)
    def act(): collect(Block(), Deadly(calib_set()), semantics(), hessian=True, keep=20, folder=tmp_path, every=0)
    for at in (2, 3, 7): assert killed(act)
    with pytest.raises(ValueError, match='interrupted after 7 samples'): load_stats(tmp_path)
    wanted = collect(Block(), calib_set(), semantics(), hessian=True, keep=20)
    for at in (None, 3):  # the second time there is nothing left to do
        found = collect(Block(), Deadly(calib_set()), semantics(), hessian=True, keep=20, folder=tmp_path)
        assert all(same(found[layer], wanted[layer], True) for layer in wanted)


def test_a_stream_goes_on_too(tmp_path):
    def stream(stop=None):
        for i, sample in enumerate(calib_set()):
            if i == stop: raise OSError('the line is dead')
            yield sample
    with pytest.raises(OSError, match='line is dead'): collect(Block(), stream(5), semantics(), folder=tmp_path, every=0)
    found = collect(Block(), stream(), semantics(), folder=tmp_path)
    wanted = collect(Block(), stream(), semantics())
    assert all(same(found[layer], wanted[layer]) for layer in wanted)


# Real models

def test_shared_inputs_are_what_the_graph_says():
    "Every layer for itself, and once for each tensor: the same statistics"
    from segquant_nb.zoo import load, noise_model
    for name, arguments in (('tiny-flux', dict(hidden_states=torch.randn(2, 64, 64), timestep=torch.tensor([.3, .7]),
                                               guidance=torch.ones(2), pooled_projections=torch.randn(2, 64),
                                               encoder_hidden_states=torch.randn(2, 24, 128), txt_ids=torch.zeros(24, 3),
                                               img_ids=torch.rand(64, 3).round())),
                            ('tiny-sdxl', dict(sample=torch.randn(2, 16, 16, 16), timestep=torch.tensor(300),
                                               encoder_hidden_states=torch.randn(2, 24, 128),
                                               added_cond_kwargs={'text_embeds': torch.randn(2, 64),
                                                                  'time_ids': torch.rand(2, 6)}))):
        model = noise_model(load(name))
        alone, once = collect(model, [arguments]*2, keep=16), collect(model, [arguments]*2, analyze(model, arguments), keep=16)
        assert set(alone) == set(once) and len(once.inputs) < len(alone.inputs)
        for layer in alone:
            for field in ('high', 'low', 'keys', 'rows'):
                assert torch.equal(getattr(alone[layer], field), getattr(once[layer], field)), layer
            assert torch.equal(alone[layer].counts.sum(0), once[layer].counts.sum(0))


def test_offloaded_weights():
    "With accelerate's hooks the weights are elsewhere until a layer runs"
    from accelerate import cpu_offload
    samples, wanted = calib_set(3), collect(Block(), calib_set(3), ['q', 'k', 'out'])
    offloaded = cpu_offload(Block(), execution_device='cpu')
    assert any(p.is_meta for p in offloaded.parameters())
    found = collect(offloaded, samples, ['q', 'k', 'out'])
    assert all(same(found[layer], wanted[layer]) for layer in wanted)
    assert all(p.is_meta for n, p in offloaded.named_parameters())
