"""Tensors and quantizers of every kind that hypothesis makes up."""
from dataclasses import fields

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segquant_nb.dualscale import DualScale
from segquant_nb.formats import DType, Quantizer
from segquant_nb.quartz import Quartz

laws = settings(derandomize=True, deadline=None, max_examples=100)

KINDS = [Quantizer, DualScale, Quartz]
INTS = [d for d in DType if d.is_int]
FLOATS = {DType.FP8E4M3: (3, -6), DType.FP8E5M2: (2, -14)}  # mantissa bits, lowest exponent
CODED = [*INTS, *FLOATS]
SIZES = [1e-20, 1e-3, 1., 7., 1e4, 1e20]


def pieces(draw, total, cuts):
    "Sizes of up to `cuts` + 1 pieces that are `total` together"
    places = sorted(draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=cuts)))
    edges = [0, *[p for p in places if p < total], total]
    return [b - a for a, b in zip(edges, edges[1:])]


@st.composite
def tensors(draw, min_dims=1, max_dims=3, side=40, dtype=np.float32, lowest=-1.):
    "Values over many orders of magnitude, with zeros and repeats, of one sign and of both, each with a size of its own"
    shape = *draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, max_side=4))[1:], draw(st.integers(1, side))
    above, below = draw(st.one_of(st.sampled_from(SIZES).map(lambda size: (size, size)), st.tuples(*[st.sampled_from(SIZES)]*2)))
    low, high = draw(st.sampled_from([(lowest, 1.), (0., 1.), (lowest, 0.)]))
    unit = st.one_of(*(st.floats(low*part, high*part, width=16, allow_subnormal=False) for part in (1, .0625)))
    x = torch.from_numpy(draw(hnp.arrays(dtype, shape, elements=unit)))
    return torch.where(x < 0, x*below, x*above)


@st.composite
def quantizers(draw, kinds=KINDS, dynamic=None, dtypes=CODED, clips=('amax', 'percentile', 'mse'), axes=(None, -1),
               groups=(None, 1, 2, 5, 16, 64), rounded=None):
    kind, axis, group, clip = (draw(st.sampled_from(list(of))) for of in (kinds, axes, groups, clips))
    dynamic = draw(st.booleans()) if dynamic is None else dynamic
    if kind is Quartz:
        return Quartz(axis, group or 32, dynamic, draw(st.booleans()) if rounded is None else rounded, clip, 90)
    dtype = draw(st.sampled_from(dtypes))
    if kind is DualScale: return DualScale(dtype, axis, group, dynamic, clip, 90)
    return Quantizer(dtype, axis, group, draw(st.booleans()) if dtype.is_int else True, dynamic, clip, 90)


def learned(q) -> dict:
    "The tensors that a quantizer holds, by name"
    return {f.name: getattr(q, f.name) for f in fields(q) if isinstance(getattr(q, f.name), torch.Tensor)}


def found(q, x) -> tuple:
    "What `find_scale` gives, always as a tuple"
    scales = q.find_scale(x)
    return scales if isinstance(scales, tuple) else (scales,)


def compiled(f, backend='eager'):
    torch._dynamo.reset()  # each recipe is a compilation of its own, and there is a limit
    return torch.compile(f, fullgraph=True, backend=backend)
