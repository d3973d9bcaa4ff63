"""GPTQ against least squares written down another way, over layers found by search, and what must not matter."""
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from segquant_nb.formats import Quantizer
from segquant_nb.gptq import encode_weight, gptq_weight, inverse_factor, output_error, search_scales, weight_values
from segquant_nb.seglinear import Plan, granules, quantize_weight

FORMATS = ['int8', 'int6', 'int4', 'int3', 'fp8e4m3', 'fp8e5m2']


def cut(draw, total):
    places = sorted(draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=3)))
    edges = [0, *[p for p in places if p < total], total]
    return [b - a for a, b in pairwise(edges)]


@st.composite
def cases(draw, formats=FORMATS):
    n, k = draw(st.integers(1, 7)), draw(st.integers(1, 14))
    recipe = Quantizer(draw(st.sampled_from(formats)), axis=draw(st.sampled_from([None, 1])), group=draw(st.sampled_from([None, 1, 4])))
    if recipe.dtype.is_int and draw(st.booleans()): recipe = replace(recipe, symmetric=False)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(draw(st.integers(k, 40)), k, dtype=torch.float64) @ (torch.eye(k) + torch.randn(k, k)).double()
    if draw(st.booleans()): x[:, draw(st.integers(0, k - 1))] = 0
    if not x.any(): x += 1
    return torch.randn(n, k), x, Plan([(size, None) for size in cut(draw, k)], cut(draw, n), recipe)


def by_least_squares(w, x, plan, percdamp):
    """Granule by granule and column by column: scales from the columns as they are, the column rounded, the free ones solved for anew.

    Where a column is dead the weight becomes zero; nothing is inverted and no factor is taken.
    """
    K, live = w.shape[1], (x != 0).any(0)
    diagonal = 2*x.square().mean(0)
    data = torch.cat([x, (percdamp*diagonal[live].mean()*len(x)/2).sqrt()*torch.eye(K, dtype=torch.float64)]).numpy()
    w = (w*live).double().numpy()
    now, out = w.copy(), []
    for a, b in pairwise(granules(plan)):
        columns = torch.tensor(now[:, a:b])
        one = Plan([(b - a, None)], plan.outputs, replace(plan.weight, group=None))
        first = quantize_weight(columns, one)
        for j in range(a, b):
            column = encode_weight(torch.tensor(now[:, j:j + 1]).float(), Plan([(1, None)], plan.outputs, one.weight), *first[1:3])
            out.append(column.codes)
            now[:, j] = weight_values(column._replace(scale=column.scale.double()))[:, 0].numpy()
            if j + 1 < K:
                done = now*(np.arange(K) <= j)
                now[:, j + 1:] = np.linalg.lstsq(data[:, j + 1:], data @ (w - done).T, rcond=None)[0].T
    return torch.cat([c.float() for c in out], 1)


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from([.01, .3]))
def test_the_codes_of_least_squares(case, percdamp):
    w, x, plan = case
    got = gptq_weight(w, 2*x.T @ x/len(x), plan, percdamp=percdamp).codes.float()
    want = by_least_squares(w, x, plan, percdamp)
    assert torch.equal(got, want)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.integers(1, 20))
def test_block_size_and_size_of_the_hessian_do_not_matter(case, actorder, blocksize):
    w, x, plan = case
    h = x.T @ x
    one, other = gptq_weight(w, h, plan, 1, actorder=actorder), gptq_weight(w, h*2**-7, plan, blocksize, actorder=actorder)
    assert torch.equal(one.codes.float(), other.codes.float()) and torch.equal(one.scale, other.scale)
    assert one.codes.shape == w.shape and one.codes.is_contiguous() and one.scale.dtype == torch.float32
    assert (one.zero is None) == plan.weight.symmetric and (one.zero is None or one.zero.shape == one.scale.shape)


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans())
def test_inputs_without_correlation_give_the_nearest_codes(case, actorder):
    w, _, plan = case
    h = torch.diag(torch.rand(w.shape[1]) + .1)
    for a, b in zip(gptq_weight(w, h, plan, actorder=actorder)[:3], quantize_weight(w, plan)[:3]):
        assert a is b is None or torch.equal(a.float(), b.float())


@settings(max_examples=40, deadline=None)
@given(cases())
def test_search_keeps_what_is_best_already(case):
    "Each granule's error with the found scale is no larger than with the full range, and the full range is the answer if alone"
    w, x, plan = case
    h = x.T @ x
    full = encode_weight(w, plan, *search_scales(w, plan, h, [1.]))
    assert torch.equal(full.codes.float(), quantize_weight(w, plan).codes.float())
    for hessian in (None, h.diagonal(), h):
        scales = search_scales(w, plan, hessian)
        before, after = weight_values(full) - w, weight_values(encode_weight(w, plan, *scales)) - w
        if plan.weight.axis is None: assert all((s == s[:1]).all() for s in scales[0].split(plan.outputs))
        weights = torch.eye(len(h)).double() if hessian is None else torch.diag(hessian) if hessian.ndim == 1 else hessian
        for a, b in pairwise(granules(plan)):
            old, new = (((e[:, a:b].double() @ weights[a:b, a:b])*e[:, a:b]).sum() for e in (before, after))
            assert new <= old*(1 + 1e-9) + 1e-12


def test_a_scale_is_taken_from_the_corrected_columns_unless_it_is_given():
    torch.manual_seed(0)
    x = torch.randn(99, 16).double() @ torch.randn(16, 16).double()
    w, plan = torch.randn(5, 16), Plan([(8, None), (8, None)], [5], Quantizer('int4', axis=1))
    h, before = x.T @ x, quantize_weight(w, plan)
    fresh, static = gptq_weight(w, h, plan), gptq_weight(w, h, plan, scales=before[1:3])
    assert torch.equal(fresh.scale[:, 0], before.scale[:, 0]) and not torch.equal(fresh.scale[:, 1], before.scale[:, 1])
    assert torch.equal(static.scale, before.scale)
    given = .8*before.scale
    assert torch.equal(gptq_weight(w, h, plan, scales=(given, None)).scale, given)
    for scales, scale in ((None, before.scale), ((given, None), given)):
        ordered = gptq_weight(w, h, plan, actorder=True, scales=scales)
        order = h.diagonal().argsort(descending=True)
        whole = gptq_weight(w[:, order], h[order][:, order], Plan([(1, None)]*16, [5], plan.weight),
                            scales=(scale[:, (order >= 8).long()], None))
        assert torch.equal(ordered.scale, scale) and torch.equal(ordered.codes[:, order], whole.codes)


def test_segments_of_the_output_are_solved_with_the_same_hessian():
    "With a scale per channel the rows do not know of each other, however they are cut"
    torch.manual_seed(0)
    x, w = torch.randn(64, 12) @ torch.randn(12, 12), torch.randn(9, 12)
    for axis, same in ((1, True), (None, False)):
        whole = gptq_weight(w, x.T @ x, Plan([(12, None)], [2, 7], Quantizer('int4', axis=axis)))
        first, second = (gptq_weight(w[rows], x.T @ x, Plan([(12, None)], [len(w[rows])], Quantizer('int4', axis=axis)))
                         for rows in (slice(0, 2), slice(2, 9)))
        assert torch.equal(whole.codes, torch.cat([first.codes, second.codes]))
        uncut = gptq_weight(w, x.T @ x, Plan([(12, None)], [9], Quantizer('int4', axis=axis)))
        assert torch.equal(whole.codes, uncut.codes) == same


def test_the_factor_is_that_of_the_inverse():
    torch.manual_seed(0)
    h = torch.randn(30, 20).double()
    h = h.T @ h
    want = torch.linalg.cholesky(torch.linalg.inv(h + .01*h.diagonal().mean()*torch.eye(20).double()), upper=True)
    torch.testing.assert_close(inverse_factor(h), want, rtol=1e-9, atol=1e-12)


def test_damping_grows_until_it_works():
    h = torch.tensor([[1., 3.], [3., 1.]])  # eigenvalues 4 and -2: needs 2, of a mean of 1
    u = inverse_factor(h, .005)
    torch.testing.assert_close(torch.linalg.inv(u.T @ u), h.double() + 5*torch.eye(2).double())
    assert inverse_factor(torch.full((50, 50), 1e-30), 1e-12).isfinite().all()


def test_a_dead_channel_changes_nothing_else():
    torch.manual_seed(0)
    x, w = torch.randn(50, 10) @ torch.randn(10, 10), torch.randn(4, 10)
    kept = torch.arange(10) != 6
    dead = x*kept
    for recipe in (Quantizer('int4', axis=1), Quantizer('int4', axis=1, symmetric=False)):
        for actorder in (False, True):
            whole = gptq_weight(w, dead.T @ dead, Plan([(10, None)], [4], recipe), actorder=actorder)
            rest = gptq_weight(w[:, kept], dead[:, kept].T @ dead[:, kept], Plan([(9, None)], [4], recipe), actorder=actorder)
            assert torch.equal(whole.codes[:, kept], rest.codes) and torch.equal(whole.scale, rest.scale)
            assert not weight_values(whole)[:, 6].any()


def test_the_callers_tensors_stay_as_they_are():
    torch.manual_seed(0)
    x, w = torch.randn(40, 8).double(), torch.randn(4, 8)
    h, plan = x.T @ x, Plan([(8, None)], [4], Quantizer('int4', axis=1, group=4))
    h[2] = h[:, 2] = 0
    scales = search_scales(w, plan, h)
    kept = [t.clone() for t in (w, h, scales[0])]
    for actorder in (False, True): gptq_weight(w, h, plan, actorder=actorder, scales=scales), gptq_weight(w, h, plan, actorder=actorder)
    inverse_factor(h), search_scales(w, plan, h), encode_weight(w, plan, *scales), output_error(w, w, h)
    for now, then in zip((w, h, scales[0]), kept): assert torch.equal(now, then)
    w.requires_grad_(), h.requires_grad_()
    assert not gptq_weight(w, h, plan).scale.requires_grad and not search_scales(w, plan, h)[0].requires_grad


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_in_another_type_is_the_same_weight(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(40, 8), torch.randn(4, 8).to(dtype)
    plan = Plan([(8, None)], [4], Quantizer('int4', axis=1))
    one, other = gptq_weight(w, x.T @ x, plan), gptq_weight(w.float(), (x.T @ x).double(), plan)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


def test_the_number_of_threads_does_not_matter():
    torch.manual_seed(0)
    x, w, threads = torch.randn(900, 300) @ torch.randn(300, 300), torch.randn(200, 300), torch.get_num_threads()
    plan = Plan([(300, None)], [200], Quantizer('int4', axis=1, group=32))
    h, found = (x.T @ x).double(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(gptq_weight(w, h, plan))
    finally: torch.set_num_threads(threads)
    assert torch.equal(found[0].codes, found[1].codes) and torch.equal(found[0].scale, found[1].scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_same_codes_on_a_gpu():
    torch.manual_seed(0)
    x, w = torch.randn(900, 300) @ torch.randn(300, 300), torch.randn(200, 300)
    plan = Plan([(200, None), (100, None)], [50, 150], Quantizer('int4', axis=1, group=32))
    h = (x.T @ x).double()
    for actorder in (False, True):
        here, there = gptq_weight(w, h, plan, actorder=actorder), gptq_weight(w.cuda(), h, plan, actorder=actorder)
        assert torch.equal(here.codes, there.codes.cpu()) and torch.equal(here.scale, there.scale.cpu())
    for a, b in zip(search_scales(w, plan, h), search_scales(w.cuda(), plan, h.cuda())): assert a is b or torch.equal(a, b.cpu())


def test_weights_of_16_bits_stay_as_they_are():
    w, x = torch.randn(4, 8), torch.randn(40, 8)
    for dtype in (torch.bfloat16, torch.float16):
        plan = Plan([(8, None)], [4], Quantizer(str(dtype).replace('torch.bfloat', 'bf').replace('torch.float', 'fp'), axis=1))
        for encoded in (gptq_weight(w, x.T @ x, plan), encode_weight(w, plan, *search_scales(w, plan, x.T @ x))):
            assert torch.equal(encoded.codes, w.to(dtype)) and torch.equal(weight_values(encoded), w.to(dtype).float())


def test_errors_are_those_of_the_outputs():
    torch.manual_seed(0)
    x, w, other = torch.randn(40, 8).double(), torch.randn(4, 8), torch.randn(4, 8)
    want = (x @ (w - other).double().T).square().mean(0)
    torch.testing.assert_close(output_error(w, other, 2*x.T @ x/40), want)
