"""The low-rank branch against decompositions written down another way, and what must not matter."""
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from segquant_nb.formats import Quantizer
from segquant_nb.gptq import gptq_weight, inverse_factor, output_error, weight_values
from segquant_nb.lowrank import (best_low_rank, quantize_low_rank, random_svd, rank_for_bytes, rank_for_energy,
                                 split_low_rank)
from segquant_nb.seglinear import Plan, SegLinear, quantize_weight


def product(branch): return branch[1].double() @ branch[0].double()


@st.composite
def cases(draw):
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(40, k).double() @ (torch.eye(k) + torch.randn(k, k)).double()
    return torch.randn(n, k).double(), x, draw(st.integers(1, 14))


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans(), st.sampled_from([None, 0, 7]))
def test_nothing_of_that_rank_is_nearer(case, outputs, seed):
    "The error is that of the singular values that are left out, in the weight or in the output"
    w, x, rank = case
    factor = inverse_factor(2*x.T @ x/len(x), 1e-9) if outputs else None
    branch = best_low_rank(w, rank, factor, seed)
    assert branch[0].shape == (min(rank, *w.shape), w.shape[1]) and branch[1].shape == (w.shape[0], min(rank, *w.shape))
    y, off = (x if outputs else torch.eye(w.shape[1]).double()).numpy() @ w.numpy().T, w - product(branch)
    error = np.linalg.norm((x.numpy() if outputs else 1)@off.numpy().T if outputs else off.numpy())
    best = np.sqrt((np.linalg.svd(y, compute_uv=False)[rank:]**2).sum())
    assert error <= best*(1 + 1e-4) + 1e-6*np.linalg.norm(y)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 3), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_errors_never_rise_over_the_rounds(case, rounds, dtype):
    w, x, rank = case
    h, plan = 2*x.T @ x/len(x), Plan([(w.shape[1], None)], [len(w)], Quantizer('int4', axis=1))
    for quantize in (quantize_weight, lambda w, p: gptq_weight(w, h, p)):
        errors = []
        for more in (rounds, rounds + 1):
            encoded, branch = quantize_low_rank(w, rank, plan, h, more, quantize, dtype)
            assert branch[0].dtype == branch[1].dtype == dtype
            errors.append(output_error(w, weight_values(encoded).double() + product(branch), h).sum())
        assert errors[1] <= errors[0]


def test_no_rounds_is_svdquant():
    torch.manual_seed(0)
    w, plan = torch.randn(20, 30), Plan([(30, None)], [20], Quantizer('int4', axis=1))
    encoded, (down, up) = quantize_low_rank(w, 5, plan, rounds=0, seed=None)
    u, s, v = np.linalg.svd(w.double().numpy())
    exact = (u[:, :5]*s[:5]) @ v[:5]
    np.testing.assert_allclose(product((down, up)), exact, atol=2**-7*np.abs(exact).max())
    want = quantize_weight((w.double() - product((down, up))).float(), plan)  # what is left of the *rounded* branch
    assert torch.equal(encoded.codes, want.codes) and torch.equal(encoded.scale, want.scale)
    x = torch.randn(99, 30) @ torch.randn(30, 30)
    assert torch.equal(quantize_low_rank(w, 5, plan, x.T @ x, 0, seed=None)[1][0], down)  # the first one is the weight's


def test_a_fitted_branch_beats_the_published_one():
    torch.manual_seed(0)
    x, w = (torch.randn(500, 32)*torch.logspace(0, -2, 32)) @ torch.randn(32, 32), torch.randn(24, 32)
    h, plan = 2*x.T @ x/len(x), Plan([(32, None)], [24], Quantizer('int4', axis=1))
    def error(**options):
        encoded, branch = quantize_low_rank(w, 4, plan, **options)
        return output_error(w, weight_values(encoded).double() + product(branch), h).sum()
    assert error(hessian=h) < .3*error(rounds=0) and error(hessian=h) < .6*error()


def test_the_same_seed_gives_the_same_bits_in_any_thread():
    torch.manual_seed(0)
    matrices, found = [torch.randn(60, 50) for _ in range(6)], {}
    alone = [random_svd(m, 4, seed=3) for m in matrices]
    state = torch.get_rng_state()
    def work(i): found[i] = [random_svd(matrices[i], 4, seed=3) for _ in range(20)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    for i, want in enumerate(alone):
        for got in found[i]: assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(random_svd(matrices[0], 4, seed=4)[0], alone[0][0])


def test_the_random_decomposition_is_as_good_as_the_librarys():
    torch.manual_seed(0)
    for decay in (.3, .5, 1.):
        m = torch.randn(200, 300).double() @ torch.diag(torch.arange(1, 301)**-decay).double()
        best = torch.linalg.svdvals(m)[10:].norm()
        u, s, v = random_svd(m, 10)
        torch.testing.assert_close(u.T @ u, torch.eye(10).double())
        torch.testing.assert_close(v @ v.T, torch.eye(10).double())
        assert best <= (m - u*s @ v).norm() < 1.003*best


def test_a_matrix_of_low_rank_is_found_again():
    torch.manual_seed(0)
    w = torch.randn(9, 3).double() @ torch.randn(3, 7).double()
    for rank in (3, 5, 7, 20):
        for factor in (None, inverse_factor(torch.diag(torch.rand(7) + .1))):
            down, up = best_low_rank(w, rank, factor)
            assert down.isfinite().all() and up.isfinite().all()
            torch.testing.assert_close(up @ down, w)
    down, up = best_low_rank(torch.zeros(4, 5), 2)
    assert not (up @ down).any() and down.isfinite().all()


def test_half_precision_holds_both_factors():
    "Weights for smoothed inputs may have columns of very different size: the factors share it"
    torch.manual_seed(0)
    x = torch.randn(99, 16)*torch.logspace(-3, 3, 16)
    w = torch.randn(8, 16)/torch.logspace(-3, 3, 16)
    down, up = best_low_rank(w, 8, inverse_factor(x.T @ x))
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    for t in (down, up): assert t.half().isfinite().all()


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 3), st.booleans())
def test_a_split_branch_is_never_nearer(case, segments, outputs):
    w, x, rank = case
    sizes = [len(c) for c in torch.arange(len(w)).chunk(segments)]
    plan = Plan([(w.shape[1], None)], sizes, Quantizer('int4'))
    factor = inverse_factor(x.T @ x) if outputs else None
    (down, up), ranks = split_low_rank(w, rank, plan, factor)
    assert len(ranks) == len(sizes) and sum(ranks) == len(down) == up.shape[1] <= rank
    start = np.cumsum([0, *ranks])
    for i, block in enumerate(up.split(sizes)):  # a direction serves one segment
        assert not block[:, :start[i]].any() and not block[:, start[i + 1]:].any()
    h = x.T @ x + .01*(x.T @ x).diagonal().mean()*torch.eye(w.shape[1]).double() if outputs else torch.eye(w.shape[1])
    one = output_error(w, product(best_low_rank(w, rank, factor, None)), h).sum()
    many = output_error(w, up @ down, h).sum()
    assert one <= many*(1 + 1e-9) + 1e-9
    # its own promise: of all ways to share out so many directions the best
    kept = [np.cumsum(np.linalg.svd((block @ torch.linalg.cholesky(h.double())).numpy(), compute_uv=False)**2) for block in w.split(sizes)]
    ways = itertools.product(*(range(min(rank, len(k)) + 1) for k in kept))
    best = max(sum(k[r - 1] for k, r in zip(kept, way) if r) for way in ways if sum(way) <= rank)
    np.testing.assert_allclose(2*many, sum(k[-1] for k in kept) - best, rtol=1e-6, atol=1e-6*sum(k[-1] for k in kept))


def test_ranks_by_bytes_and_energy():
    torch.manual_seed(0)
    w, plan = torch.randn(12, 20), Plan([(15, None), (5, None)], [4, 8], Quantizer('int4', axis=1))
    for nbytes in (0, 63, 64, 200, 10**6):
        rank = rank_for_bytes(plan, nbytes)
        assert rank == 12 or 2*rank*(12 + 20) <= nbytes < 2*(rank + 1)*(12 + 20)
    squares = np.linalg.svd(w.numpy(), compute_uv=False)**2
    for share in (1e-6, .3, .7, .999, 1.):
        rank = rank_for_energy(w, share)
        assert squares[:rank].sum() >= share*squares.sum()*(1 - 1e-6) and (rank == 1 or squares[:rank - 1].sum() < share*squares.sum())
    factor = inverse_factor(torch.diag(torch.tensor([1e4]*2 + [1e-4]*18)))
    assert rank_for_energy(w, .99, factor) <= 2
    assert rank_for_energy(torch.zeros(4, 5), .5) == rank_for_energy(torch.eye(4), .25) == 1
    for share in (0, -1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='share'): rank_for_energy(w, share)


def test_the_callers_tensors_stay_as_they_are():
    torch.manual_seed(0)
    x, w = torch.randn(40, 8).double(), torch.randn(6, 8).double()
    h, plan = x.T @ x, Plan([(8, None)], [6], Quantizer('int4', axis=1))
    kept = w.clone(), h.clone()
    quantize_low_rank(w, 2, plan, h), best_low_rank(w, 2, inverse_factor(h)), split_low_rank(w, 2, plan)
    for now, then in zip((w, h), kept): assert torch.equal(now, then)
    w.requires_grad_()
    encoded, branch = quantize_low_rank(w, 2, plan, h)
    assert not (encoded.scale.requires_grad or branch[0].requires_grad)


def test_the_layer_computes_what_was_fitted():
    torch.manual_seed(0)
    x, linear = torch.randn(99, 16) @ torch.randn(16, 16), torch.nn.Linear(16, 12)
    smooth = torch.rand(16) + .5
    plan = Plan([(10, Quantizer('fp16')), (6, Quantizer('fp16'))], [5, 7], Quantizer('int4', axis=1, group=4))
    inputs = x/smooth
    weight = linear.weight.detach()*smooth
    encoded, branch = quantize_low_rank(weight, 3, plan, 2*inputs.T @ inputs/99, dtype=torch.float32)
    layer = SegLinear(plan, encoded, linear.bias, smooth, branch)
    want = x.double() @ ((weight_values(encoded).double() + product(branch))/smooth).T + linear.bias
    with torch.no_grad(): got = layer(x.double())
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-3)  # inputs have 16 bits
    assert (got - linear(x)).norm() < .05*linear(x).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    torch.manual_seed(0)
    x, w = torch.randn(400, 64) @ torch.randn(64, 64), torch.randn(48, 64)
    h, plan = (x.T @ x).double(), Plan([(64, None)], [48], Quantizer('int4', axis=1))
    here, there = quantize_low_rank(w, 6, plan, h, seed=None), quantize_low_rank(w.cuda(), 6, plan, h, seed=None)
    errors = [output_error(w, (weight_values(e).double() + product(b)).cpu(), h).sum() for e, b in (here, there)]
    torch.testing.assert_close(*errors, rtol=.05, atol=0)
    states = torch.cuda.get_rng_state()
    for a, b in zip(random_svd(w.cuda(), 6), random_svd(w.cuda(), 6)): assert torch.equal(a, b)
    assert torch.equal(states, torch.cuda.get_rng_state())
