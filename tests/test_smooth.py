"""Smoothing: the search against layers quantized one by one, and folds that must not be made."""
import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from graph_configs import CASES, build
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from segquant_nb import smooth
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.graph import as_call, _tensors_in, example_from_pipeline, read_trace, record
from segquant_nb.observe import stats_of
from segquant_nb.seglinear import Plan, SegLinear, rotate_columns
from segquant_nb.smooth import (Divided, Fold, apply_folds, check_folds, find_folds, folded_state, same_range,
                                search_alpha, sharing_groups, smooth_factors)
from segquant_nb.zoo import load, noise_model

warnings.filterwarnings('ignore')


def cut(draw, total):
    edges = [0, *sorted(draw(st.sets(st.integers(1, total - 1), max_size=2))), total]
    return [b - a for a, b in zip(edges, edges[1:])]


@st.composite
def groups(draw):
    "One to three layers that share factors, each with rows of its own"
    k = draw(st.integers(2, 20))
    recipes = [Quantizer('int8'), Quantizer('int4', symmetric=False), Quantizer('int4', axis=-1, dynamic=True), DualScale('int4'),
               Quantizer('int8', clip='percentile', percentile=90), Quantizer('fp8e4m3'), Quantizer('fp16')]
    inputs = [(size, draw(st.sampled_from(recipes))) for size in cut(draw, k)]
    weight = Quantizer(draw(st.sampled_from(['int8', 'int4'])), axis=draw(st.sampled_from([None, 1])),
                       group=draw(st.sampled_from([None, 3])), symmetric=draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(2, 12))
        rows = torch.randn(60, k)*torch.randn(k).exp()
        blocks = [draw(st.sampled_from([1, size & -size])) for size, _ in inputs]
        found.append((nn.Linear(k, n, bias=False), Plan(inputs, cut(draw, n), weight, blocks), stats_of(rows, keep=40)))
    return found


@settings(max_examples=60, deadline=None)
@given(groups())
def test_the_search_says_what_layers_built_one_by_one_say(group):
    found = search_alpha([(layer.weight, plan, stats) for layer, plan, stats in group], (None, 0., .5, 1.), 1.2, 10**6, 10**6)
    for factors, error in ((found.factors, found.error), (None, found.before)):
        total = 0.
        for layer, plan, stats in group:
            x = 1.2*stats.rows
            s = torch.ones_like(stats.high) if factors is None else factors
            blocks = plan.blocks or [1]*len(plan.inputs)
            seen = [(stats.extremes if q.clip == 'amax' and b == 1 else stats.rows)[:, at:at + size]/s[at:at + size]
                    for at, size, q, b in zip([0, *torch.tensor(plan.in_sizes).cumsum(0)], plan.in_sizes, plan.quantizers, blocks)]
            ready = [q.fit(rotate_columns(rows, [size], [b])) for rows, size, q, b in zip(seen, plan.in_sizes, plan.quantizers, blocks)]
            fitted = replace(plan, inputs=zip(plan.in_sizes, ready))
            with torch.no_grad():
                y = layer(x)
                total += ((SegLinear.of(layer, fitted, None, s)(x) - y).square().sum()/y.square().sum()).item()
        assert abs(total/len(group) - error) <= 1e-3*error + 1e-9
    assert found.error <= found.before*(1 + 1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_no_single_change_is_better_than_the_choice(segments, tried, seed):
    errors = torch.randn(segments, tried, 6, generator=torch.Generator().manual_seed(seed)).double()
    products = torch.einsum('atn,bsn->atbs', errors, errors)
    chosen, least = smooth._choose(products)
    def energy(c): return errors[range(segments), c].sum(0).square().sum().item()
    assert abs(energy(chosen) - least) < 1e-9
    assert least <= energy([0]*segments) + 1e-9
    for i in range(segments):
        for t in range(tried): assert energy(chosen[:i] + [t] + chosen[i + 1:]) >= least - 1e-9


def test_some_rows_of_a_segment_with_one_scale_get_the_scale_of_all():
    torch.manual_seed(0)
    layer, rows = nn.Linear(16, 300, bias=False), torch.randn(64, 16)*torch.randn(16).exp()
    layer.weight.data[7] *= 30  # not among the rows that are looked at
    stats = stats_of(rows)
    plan = Plan([(16, Quantizer('fp16'))], [100, 200], Quantizer('int4'))
    some, sizes, real = smooth._some_rows(layer.weight.detach(), plan, 30)
    assert sum(sizes) == len(some) < 40 and real.sum() == 30
    s = torch.rand(16) + .5
    got = torch.cat([plan.weight.fit(b).fake(b) for b in (some*s).split(sizes)])[real]
    want = torch.cat([plan.weight.fit(b).fake(b) for b in (layer.weight.detach()*s).split([100, 200])])[::10]
    assert torch.equal(got, want)
    search_alpha([(layer.weight, plan, stats)], outputs=30)


def test_a_margin_means_nothing_to_dynamic_scales():
    torch.manual_seed(0)
    w, stats = torch.randn(24, 32), stats_of(torch.randn(128, 32)*torch.randn(32).exp())
    plan = Plan([(32, Quantizer('int4', axis=-1, dynamic=True))], [24], Quantizer('int4', axis=1))
    a, b = (search_alpha([(w, plan, stats)], margin=m) for m in (1., 2.))
    assert a.alphas == b.alphas and abs(a.error - b.error) < 1e-6
    still = Plan([(32, Quantizer('int8'))], [24], Quantizer('int8', axis=1))
    assert search_alpha([(w, still, stats)], margin=2.).error > 10*search_alpha([(w, still, stats)], margin=1.).error


@pytest.mark.parametrize('sizes', [None, [3, 5]])
def test_the_range_stays(sizes):
    x, w = torch.tensor([3., 0, 1, 2, 9, 0, 0, .5]), torch.rand(8)
    s = same_range(smooth_factors(x, w, .5, sizes), x, sizes)
    for a, b in zip((x/s).split(sizes or [8]), x.split(sizes or [8])): assert torch.isclose(a.max(), b.max())
    zero = same_range(smooth_factors(0*x, w), 0*x)
    assert torch.equal(zero, torch.ones(8))


def test_nothing_that_was_given_is_written_to():
    torch.manual_seed(0)
    w, stats = torch.randn(6, 8), stats_of(torch.randn(40, 8))
    before = [w.clone(), *(t.clone() for t in (stats.high, stats.low, stats.rows))]
    search_alpha([(w, Plan([(8, Quantizer())], [6]), stats)])
    assert all(map(torch.equal, before, [w, stats.high, stats.low, stats.rows]))


# ---- folds -------------------------------------------------------------------------------------------

class OnePlusNorm(nn.LayerNorm):
    "As Gemma has it"
    def forward(self, x): return F.layer_norm(x, x.shape[-1:])*(1 + self.weight) + self.bias


class Block(nn.Module):
    "Two layers that read a norm; what else happens is up to `variant`"
    def __init__(self, variant, width=16):
        super().__init__()
        self.variant = variant
        kind = OnePlusNorm if 'one plus' in variant else nn.LayerNorm
        self.norm = kind(width, elementwise_affine='modulated' not in variant)
        self.modulation = nn.Linear(width, 2*width)
        self.a, self.b, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        if 'gate' in variant: self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x, c):
        h, v = self.norm(x), self.variant
        if 'modulated' in v:
            scale, shift = self.modulation(torch.tanh(c)).chunk(2, -1)
            one = 2 if 'two' in v else 0 if 'none' in v else 1
            h = h*(one + scale) + shift
        y = self.a(h).sigmoid() + self.b(h).tanh()
        if 'residual' in v: y = y + h
        if 'router' in v: y = torch.where(h.sum(-1, keepdim=True) > 0, y, -y)
        if 'gate' in v: y = self.gate*y
        return self.out((x + y).tanh())


def folds_of(variant):
    torch.manual_seed(1)
    model = Block(variant).eval()
    for p in model.norm.parameters(): nn.init.normal_(p)
    args = torch.randn(3, 5, 16), torch.randn(3, 1, 16)
    trace = record(model, args)
    found = read_trace(trace, model)
    return model, args, find_folds(model, found, trace), found


@pytest.mark.parametrize('variant, plus_one', [('affine', 0), ('modulated', 1), ('modulated none', 0), ('one plus', 1)])
def test_a_sound_fold_is_kept(variant, plus_one):
    model, args, folds, found = folds_of(variant)
    checked = check_folds(model, folds, args)
    fold, = [f for f in checked if f.into]
    assert {n for n, _ in fold.layers} == {'a', 'b'} and max(r.plus_one for r in fold.into) == plus_one
    assert ('a', 'b') in sharing_groups(found, checked)
    s = torch.rand(16).double() + .5
    model = model.double()
    args = tuple(a.double() for a in args)
    smoothed, left = apply_folds(model, checked, {'a': s, 'b': s})
    with torch.no_grad(): assert (smoothed(*args) - model(*args)).abs().max() < 1e-12 and not left


@pytest.mark.parametrize('variant', ['affine residual', 'affine router', 'modulated two', 'modulated residual', 'modulated two gate'])
def test_an_unsound_fold_is_given_up(variant):
    model, args, folds, _ = folds_of(variant)
    assert any(f.into for f in folds)
    for f in check_folds(model, folds, args): assert not f.into and f.reason


def test_one_unsound_fold_does_not_take_the_others_along(monkeypatch):
    pipe = load('tiny-sdxl')
    model, (args, kwargs) = noise_model(pipe), example_from_pipeline(pipe)
    trace = record(model, args, kwargs)
    folds = find_folds(model, read_trace(trace, model), trace)
    three = [f for f in folds if len(f.layers) == 3][:3]
    broken = [Fold(f.layers[:1], f.size, f.into) if f in three else f for f in folds]  # query alone of query, key, value
    for at_once in (17, 64):
        checked = check_folds(model, broken, args, kwargs, at_once)
        assert [bool(f.into) for f in checked] == [bool(f.into) and f == b for f, b in zip(folds, broken)]
    calls, reads = [], smooth._reads
    monkeypatch.setattr(smooth, '_reads', lambda *a, **k: calls.append(0) or reads(*a, **k))
    gated = next(f for f in folds if f.layers[0][0].endswith('ff.net.2'))
    other_half = Fold(gated.layers, gated.size, tuple(r._replace(first=gated.size) for r in gated.into))
    broken = [other_half if f == gated else f for f in folds]
    assert [bool(f.into) for f in check_folds(model, broken, args, kwargs)].count(True) == 51
    assert len(calls) == 4  # as it was, all, all but one, that one: layers after it are no suspects


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_check_in_16_bits_says_the_same(dtype):
    pipe = load('tiny-flux')
    model, (args, kwargs) = noise_model(pipe), example_from_pipeline(pipe)
    trace = record(model, args, kwargs)
    folds = find_folds(model, read_trace(trace, model), trace)
    wrong = [Fold(f.layers, f.size, tuple(r._replace(plus_one=0) for r in f.into)) for f in folds if any(r.plus_one for r in f.into)]
    model = model.to(dtype)
    args, kwargs = tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (args, kwargs))
    assert [f.into for f in check_folds(model, folds, args, kwargs)] == [f.into for f in folds]
    assert not any(f.into for f in check_folds(model, wrong, args, kwargs))


@pytest.mark.parametrize('name', ['flux', 'flux2', 'sd3', 'sd3-controlnet', 'pixart-sigma', 'lumina2', 'z-image', 'hidream', 'easyanimate',
                                  'cogvideox', 'sd15', 'unet2d', 'stable-cascade', 'uvit', 'controlnet-xl', 'qwen-image'])
def test_models_of_diffusers_compute_the_same(name):
    model, inputs = build(CASES[name])
    args, kwargs = as_call(inputs)
    trace = record(model, args, kwargs)
    found = read_trace(trace, model)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    checked = check_folds(model, find_folds(model, found, trace), args, kwargs)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules()) and any(f.into for f in checked)
    listed = [n for f in checked for n, _ in f.layers]
    assert set(listed) == set(n for n, l in found.items() if l.type == 'Linear')
    model = model.double()
    args, kwargs = tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (args, kwargs))
    factors, generator = {}, torch.Generator().manual_seed(1)
    for f in checked:
        s = torch.randn(f.size, generator=generator).double().exp()
        for layer, at in f.layers if f.into else (): factors.setdefault(layer, torch.ones(found[layer].in_features).double())[at:at + f.size] = s
    smoothed, left = apply_folds(model, checked, factors)
    assert not left
    with torch.no_grad():
        for y, z in zip(_tensors_in(model(*args, **kwargs)), _tensors_in(smoothed(*args, **kwargs))):
            assert (y - z).abs().max() <= 1e-10*y.abs().max()


def test_folds_that_share_values_make_a_group_of_two_tensors():
    pipe = load('tiny-sd35')
    model, (args, kwargs) = noise_model(pipe), example_from_pipeline(pipe)
    trace = record(model, args, kwargs)
    found = read_trace(trace, model)
    folds = find_folds(model, found, trace)
    together = sharing_groups(found, folds)
    assert ('transformer_blocks.0.attn.to_out.0', 'transformer_blocks.0.attn.to_add_out') in together
    assert sorted(n for g in together for n in g) == sorted(found.linears)
    alone = sharing_groups(found, [Fold(f.layers, f.size) for f in folds])
    assert ('transformer_blocks.0.attn.to_out.0',) in alone


def test_a_copy_shares_what_stays_and_inplace_makes_none():
    model, args, folds, _ = folds_of('affine')
    checked, s = check_folds(model, folds, args), torch.rand(16) + .5
    before = copy.deepcopy(model.state_dict())
    smoothed, left = apply_folds(model, checked, {'a': s, 'b': s, 'out': 2*s})
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert smoothed.out.weight is model.out.weight and smoothed.a.bias is model.a.bias and smoothed.a.weight is not model.a.weight
    assert left.keys() == {'out'} and torch.equal(left['out'], 2*s)
    same, _ = apply_folds(model, checked, {'a': s, 'b': s}, inplace=True)
    assert same is model and torch.equal(model.a.weight, smoothed.a.weight) and torch.equal(model.norm.weight, before['norm.weight']/s)


def test_a_parameter_keeps_its_type_and_rounds_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    fold, s = Fold((('1', 0),), 4, (Divided('0.weight', 0), Divided('0.bias', 0))), torch.tensor([3., 5, 7, 9])
    state, _ = folded_state(model, [fold, fold], {'1': s})
    assert {p.dtype for p in state.values()} == {torch.bfloat16} and state.keys() == {'0.weight', '0.bias', '1.weight'}
    once = (model[0].weight.detach().float()/s[:, None]/s[:, None]).bfloat16()
    assert torch.equal(state['0.weight'], once)
