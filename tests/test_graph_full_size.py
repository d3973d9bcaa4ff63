"""The published sizes, built on meta from their configs: counts, seconds and memory."""
import resource
import time
from collections import Counter

import pytest
import torch
from apart import Apart

from segquant_nb.graph import SegPattern, analyze

SD3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
           joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm='rms_norm')
MODELS = {
    'FLUX.1-dev': ('FluxTransformer2DModel', dict(
        patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True)),
    'SD3.5-large': ('SD3Transformer2DModel', SD3 | dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)),
    'SD3.5-medium': ('SD3Transformer2DModel', SD3 | dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=list(range(13)))),
    'SDXL': ('UNet2DConditionModel', dict(
        sample_size=128, block_out_channels=[320, 640, 1280], layers_per_block=2, cross_attention_dim=2048,
        down_block_types=['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
        up_block_types=['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
        transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], use_linear_projection=True,
        addition_embed_type='text_time', addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816)),
}
# linear layers; output split; input joined; merged heads; after a lopsided activation; lopsided
COUNTS = {'FLUX.1-dev': (504, 77, 38, 76, 156, 156), 'SD3.5-large': (536, 77, 0, 75, 154, 154),
          'SD3.5-medium': (392, 49, 0, 60, 98, 98), 'SDXL': (743, 70, 0, 140, 89, 19)}
# (kind, activation) of input parts
KINDS = {'FLUX.1-dev': {'activation gelu_tanh': 76, 'activation silu': 80, 'heads None': 76},
         'SD3.5-large': {'activation gelu_tanh': 75, 'activation silu': 79, 'heads None': 75},
         'SD3.5-medium': {'activation gelu_tanh': 47, 'activation silu': 51, 'heads None': 60},
         'SDXL': {'glu gelu': 70, 'activation silu': 19, 'heads None': 140}}
SPLITS = {'FLUX.1-dev': {'6×3072': 38, '3×3072': 38, '2×3072': 1},
          'SD3.5-large': {'6×2432': 75, '2×2432': 2},
          'SD3.5-medium': {'9×1536': 13, '6×1536': 34, '2×1536': 2},
          'SDXL': {'2×5120': 60, '2×2560': 10}}

def peak() -> float:
    "Megabytes that this process had at most"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10


def measure(kind: str, config: dict, answer):
    import diffusers
    torch.set_num_threads(1)
    model_class = getattr(diffusers, kind)
    before, start = peak(), time.process_time()  # of this process: others may be busy
    with torch.device('meta'): model = model_class.from_config(config)
    found = analyze(model)  # weights on meta, inputs guessed
    parts = Counter(f'{p.kind} {p.activation}' for l in found.linears.values() for p in l.inputs)
    splits = Counter(f'{len(l.outputs)}×{l.out_sizes[0]}' for l in found.linears.values() if len(l.outputs) > 1)
    unequal = [l for l in found.linears.values() if SegPattern.CONCAT2LINEAR in l.patterns]
    answer.send(dict(
        counts=tuple(found.counts().values()), parts=parts, splits=splits, seconds=time.process_time() - start,
        megabytes=peak() - before, lines=len(repr(found).splitlines()),
        unequal=[[l.in_sizes, [p.polarity for p in l.inputs]] for l in unequal],
        convs=sum(len(l.inputs) > 1 for l in found.values() if l.type == 'Conv2d' and l.name.endswith('conv1'))))


@pytest.mark.parametrize('name', MODELS)
def test_full_size(name):
    got = Apart(measure, *MODELS[name]).answer()
    print(f'\n{name}: {got["seconds"]:.1f} s, {got["megabytes"]:.0f} MB above the imports')
    assert got['counts'] == (*COUNTS[name], 0)
    assert {k: got['parts'].get(k) for k in KINDS[name]} == KINDS[name]
    assert got['splits'] == SPLITS[name]
    assert got['seconds'] < 15 and got['megabytes'] < 1500
    if name == 'FLUX.1-dev':
        assert got['unequal'] == [[[3072, 12288], ['symmetric', 'asymmetric']]]*38
        assert got['lines'] <= 15
    if name == 'SDXL': assert got['convs'] == 9  # each up block's conv1 sees the skip through norm and SiLU
