"""Inputs that are hard on every kernel, and how results are held to a reference."""
import torch


def activations(rows, columns, dtype, seed):
    "Values over six decades, with ties, zeros, rows of zeros, NaN and infinities"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)*10**(torch.rand(rows, 1, generator=g)*6 - 3)
    x[torch.rand(rows, columns, generator=g) < .02] = 0
    for value in (torch.nan, torch.inf, -torch.inf): x[torch.rand(rows, columns, generator=g) < .003] = value
    if rows > 2: x[1], x[2] = 0, (torch.arange(columns) - columns//2)/2
    if rows > 3: x[3] = torch.linspace(-1, 1, columns)*1e-41  # subnormal
    return x.to(dtype)


def same(a, b):
    return all(x is y or x.dtype == y.dtype and torch.equal(x.float().nan_to_num(999), y.float().nan_to_num(999)) for x, y in zip(a, b))
