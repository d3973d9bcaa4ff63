"""Every denoiser and ControlNet of diffusers that can be made small, and a few models of other kinds."""
import warnings

import pytest
import torch
import torch.nn.functional as F
from graph_configs import CASES, build
from torch import nn

from segquant_nb.graph import LAYERS, SegPattern, analyze

warnings.filterwarnings('ignore')

# Counted by hand from the number of blocks: linear layers whose output is split, whose input is
# joined, which merge attention heads, whose input follows a lopsided activation.
EXPECTED = {
    'flux': (5, 2, 4, 11),            # 2 + 2 + 1 AdaLN; 2 proj_out; 2 + 2; 2 time + 2 ff + 2 single + 5
    'flux-guidance': (5, 2, 4, 12), 'ovis': (9, 2, 4, 10), 'bria': (5, 2, 4, 10),
    'chroma': (0, 2, 4, 5),           # modulation by token: the false friend
    'bria-fibo': (7, 5, 4, 10), 'flux2': (8, 2, 4, 10), 'flux3': (9, 0, 4, 10),
    'sd3': (5, 0, 3, 10), 'sd35': (5, 0, 4, 10), 'sd3-controlnet': (4, 0, 4, 10),
    'auraflow': (4, 0, 3, 8), 'qwen-image': (5, 0, 4, 10),
    'pixart-sigma': (1, 0, 4, 5), 'dit': (3, 0, 2, 7), 'sana': (1, 0, 4, 3), 'lumina2': (3, 0, 4, 9),
    'hunyuan-dit': (1, 2, 8, 12), 'prx': (7, 0, 2, 6), 'wan': (1, 0, 4, 5), 'wan-i2v': (1, 0, 2, 6),
    'ltx': (1, 0, 4, 5), 'cogvideox': (5, 0, 2, 8), 'mochi': (8, 0, 4, 9), 'cosmos': (8, 0, 4, 10),
    'allegro': (1, 0, 4, 5), 'hunyuan-video': (6, 2, 5, 16), 'helios': (1, 0, 4, 5),
    'sd15': (4, 0, 8, 13),            # 4 transformer blocks: GEGLU, 2 attentions; 4 + 9 after SiLU
    'sd21': (4, 0, 8, 13), 'sdxl': (8, 0, 16, 18), 'sd-scale-shift': (12, 0, 8, 13),
    'controlnet': (2, 0, 4, 7), 'stable-cascade': (12, 1, 4, 4), 'unet2d': (0, 0, 4, 9),
    'stable-audio3': (7, 0, 4, 8), 'kandinsky5': (4, 0, 5, 8),
}

# Layers that cannot be seen in one forward of these models, and why.
UNSEEN = {
    'flux3': 9,                       # the branch for a conditioning image
    'hunyuan-dit': 4, 'hunyuan-dit-controlnet': 4,  # nn.MultiheadAttention-like bare weights
    'controlnet-union': 1,            # nn.MultiheadAttention's out_proj
    'minimax-rvq': 3,                 # its heads are called by the pipeline
}

# What a class of diffusers says of itself: (class name, the layer in it, output segments).
BY_CLASS = [('AdaLayerNormZero', 'linear', 6), ('AdaLayerNormZeroSingle', 'linear', 3),
            ('AdaLayerNormContinuous', 'linear', 2), ('GEGLU', 'proj', 2), ('SwiGLU', 'proj', 2),
            ('SD35AdaLayerNormZeroX', 'linear', 9)]
ACTIVATIONS = {'GEGLU': ('glu', 'gelu'), 'SwiGLU': ('glu', 'silu')}


def test_enough_of_them():
    assert len(CASES) >= 95 and len({row.model for row in CASES.values()}) >= 75


@pytest.mark.parametrize('name', CASES)
def test_model(name):
    model, inputs = build(CASES[name])
    found = analyze(model, inputs)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    assert found.keys() == layers.keys()
    for layer in found.values():
        if not layer.seen: continue
        covered = sorted(c for p in layer.inputs for c in range(p.start, p.start + p.size*p.step, p.step))
        assert covered == list(range(layer.in_features)), layer
        assert sum(layer.out_sizes) == layer.out_features, layer
    counts = found.counts()
    assert counts['linears'] and counts['unseen'] == UNSEEN.get(name, 0), found.unseen
    if name in EXPECTED:
        assert tuple(counts[k] for k in ('split', 'concat', 'heads', 'activation')) == EXPECTED[name]
    check_classes(model, found)


def check_classes(model, found):
    "What the class names promise, wherever the layer ran and all of it was used"
    for path, module in model.named_modules():
        kind = type(module).__name__
        for class_name, layer, segments in BY_CLASS:
            this = found.get(f'{path}.{layer}')
            if kind == class_name and this is not None and this.seen and not this.dead:
                assert len(this.outputs) == segments and len(set(this.out_sizes)) == 1, this
        if kind == 'FeedForward' and hasattr(module, 'net') and type(module.net[0]).__name__ in ACTIVATIONS:
            part, = found[f'{path}.net.2'].inputs
            assert (part.kind, part.activation) == ACTIVATIONS[type(module.net[0]).__name__]
            assert (part.polarity, part.gate_polarity) == ('symmetric', 'asymmetric')
            assert part.producer == part.gate == f'{path}.net.0.proj'
        if kind == 'Attention' and getattr(module, 'heads', 1) > 1:
            out = found.get(f'{path}.to_out.0')
            if out is not None and out.seen and out.in_features > module.heads:
                assert out.heads == (module.heads, out.in_features//module.heads), out


def analyzed(name):
    model, inputs = build(CASES[name])
    return analyze(model, inputs)


def test_unequal_split_and_concat():
    found = analyzed('flux2')
    block = 'single_transformer_blocks.0.attn'
    assert found[f'{block}.to_qkv_mlp_proj'].out_sizes == [32, 32, 32, 96, 96]
    assert found[f'{block}.to_qkv_mlp_proj'].patterns == {SegPattern.LINEAR2SPLIT}
    heads, glu = found[f'{block}.to_out'].inputs
    assert (heads.heads, heads.polarity) == ((2, 16), 'symmetric')
    assert (glu.kind, glu.columns, glu.gate_polarity) == ('glu', (96 + 96, 96), 'asymmetric')  # the up half


def test_only_the_gelu_part_is_dual():
    found = analyzed('flux')
    layer = found['single_transformer_blocks.0.proj_out']
    assert [(p.size, p.kind, p.polarity) for p in layer.inputs] == [
        (32, 'heads', 'symmetric'), (128, 'activation', 'asymmetric')]
    same = {n for n, other in found.items()
            if other.shares_input_with == found['single_transformer_blocks.0.proj_mlp'].shares_input_with}
    assert same == {'single_transformer_blocks.0.' + n for n in ('proj_mlp', 'attn.to_q', 'attn.to_k', 'attn.to_v')}


def test_dual_attention_is_split_in_nine():
    found = analyzed('sd35')
    assert len(found['transformer_blocks.0.norm1.linear'].outputs) == 9
    assert found['transformer_blocks.0.attn2.to_out.0'].heads == (2, 16)


def test_fused_projections_are_three_segments():
    found = analyzed('prx')
    assert found['blocks.0.attention.img_qkv_proj'].out_sizes == [32]*3
    assert found['blocks.0.attention.txt_kv_proj'].out_sizes == [32]*2


def test_concat_through_norms():
    found = analyzed('sd15')
    layer = found['up_blocks.1.resnets.0.conv1']
    assert layer.in_sizes == [16, 8]
    assert {(p.kind, p.activation) for p in layer.inputs} == {('activation', 'silu')}
    layer = analyzed('hunyuan-dit')['blocks.3.skip_linear']
    assert layer.in_sizes == [32, 32] and {p.kind for p in layer.inputs} == {'norm'}


def test_dead_columns():
    found = analyzed('bria-fibo')
    assert found['transformer_blocks.0.ff_context.net.2'].dead == [[16, 16]]


def test_bare_weights_are_listed():
    found = analyzed('controlnet-union')
    assert any('in_proj_weight' in n for n in found.bare_weights)
    assert 'without calling the layer' in str(found.unseen)


# ---- not diffusion ------------------------------------------------------------------------------
def test_llama():
    from transformers import LlamaConfig, LlamaModel
    model = LlamaModel(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
                                   num_attention_heads=4, num_key_value_heads=2)).eval()
    found = analyze(model, dict(input_ids=torch.arange(5)[None], use_cache=False))
    assert found.counts() == {'linears': 14, 'split': 0, 'concat': 0, 'heads': 2, 'activation': 2, 'dual': 0,
                              'unseen': 0}
    down = found['layers.0.mlp.down_proj'].inputs[0]
    assert (down.kind, down.activation, down.producer) == ('glu', 'silu', 'layers.0.mlp.up_proj')
    assert down.gate == 'layers.0.mlp.gate_proj'
    assert found['layers.1.self_attn.o_proj'].heads == (4, 8)
    groups = [found[f'layers.0.self_attn.{n}_proj'].shares_input_with for n in 'qkv']
    assert len(set(groups)) == 1
    assert {p.kind for n in 'qkv' for p in found[f'layers.0.self_attn.{n}_proj'].inputs} == {'norm'}


def test_vit():
    from transformers import ViTConfig, ViTModel
    model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                               intermediate_size=64, image_size=16, patch_size=8)).eval()
    counts = analyze(model, dict(pixel_values=torch.randn(1, 3, 16, 16))).counts()
    assert (counts['split'], counts['concat'], counts['heads'], counts['dual']) == (0, 0, 2, 2)


def test_t5_encoder():
    from transformers import T5Config, T5EncoderModel
    model = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                    feed_forward_proj='gated-gelu')).eval()
    found = analyze(model, dict(input_ids=torch.arange(5)[None]))
    assert (found.counts()['heads'], found.counts()['activation'], found.counts()['split']) == (2, 2, 0)
    part, = found['encoder.block.0.layer.1.DenseReluDense.wo'].inputs
    assert (part.kind, part.activation) == ('glu', 'gelu_tanh')


def test_mlp():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.Mish(), nn.Linear(16, 4))
    found = analyze(model)  # nothing but the first layer is needed to find an input
    assert [[p.activation for p in layer.inputs] for layer in found.values()] == [[None], ['relu'], ['mish']]


def test_pytorchs_own_encoder():
    found = analyze(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(1, 3, 16))
    assert found['linear2'].dual and found['linear2'].inputs[0].activation == 'relu'
    assert 'self_attn.in_proj_weight' in found.bare_weights and len(found.bare_weights) == 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_pytorchs_own_encoder_with_padding():
    "In eval mode this would run as one op on nested tensors"
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, padding = nn.TransformerEncoder(layer, 2).eval(), torch.tensor([[False, False, True]])
    found = analyze(model, dict(src=torch.randn(1, 3, 16), src_key_padding_mask=padding))
    for i in range(2): assert found[f'layers.{i}.linear2'].inputs[0].activation == 'relu'


def test_gpt2_and_transposed_convolutions():
    "transformers' Conv1D is a linear layer; and a guess finds the tokens"
    from transformers import GPT2Config, GPT2Model
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=10, bos_token_id=1, eos_token_id=1))
    found = analyze(model.eval())
    assert found['h.0.attn.c_attn'].out_sizes == [16]*3 and found['h.0.attn.c_proj'].heads == (2, 8)
    assert found['h.0.mlp.c_proj'].inputs[0].activation == 'gelu_tanh'
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), nn.Conv2d(6, 3, 1))
    found = analyze(model, torch.zeros(1, 4, 3, 3))
    assert found['0'].type == 'ConvTranspose2d' and found['2'].inputs[0].producer == '0'


def test_unequal_fused_projections():
    "Grouped queries: q is wider than k and v; and gate and up in one layer"
    from transformers import Phi3Config, Phi3Model
    model = Phi3Model(Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                 num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).eval()
    found = analyze(model, dict(input_ids=torch.arange(6)[None], use_cache=False))
    assert found['layers.0.self_attn.qkv_proj'].out_sizes == [32, 16, 16]
    assert found['layers.0.mlp.gate_up_proj'].out_sizes == [48, 48]


class Routed(nn.Module):
    "Only the first of four experts runs"
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({'up': nn.Linear(8, 16), 'down': nn.Linear(8, 8)})
                                     for _ in range(4))
        self.experts.append(nn.ModuleDict({'up': nn.Linear(8, 32), 'down': nn.Linear(16, 8)}))

    def forward(self, x):
        a, b = self.experts[0]['up'](x).chunk(2, -1)
        return self.experts[0]['down'](F.silu(a)*b)


def test_experts_inherit_only_where_the_code_is_the_same():
    found = analyze(Routed(), torch.randn(1, 3, 8))
    for i in (1, 2, 3):
        assert found[f'experts.{i}.up'].out_sizes == [8, 8]
        part, = found[f'experts.{i}.down'].inputs
        assert (part.kind, part.producer) == ('glu', f'experts.{i}.up')
        assert found[f'experts.{i}.down'].note == 'inherited from experts.0.down'
    assert not found['experts.4.up'].seen and 'did not run' in found['experts.4.up'].note
