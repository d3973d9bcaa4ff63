"""Tiny configurations of the denoisers and ControlNets of diffusers, as one readable table.

A row is `case(name, model class, config, inputs)`. Widths are as small as the models allow, but never
with one head or one token: what has length one cannot be told apart.
"""
from collections import namedtuple

import torch

Case = namedtuple('Case', 'name model config inputs')
CASES = {}


def case(name, model, config, inputs):
    assert name not in CASES, name
    CASES[name] = Case(name, model, config, inputs)


def f(*shape):  # values
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def one(n=1, value=1.):  # time steps, guidance
    return torch.full((n,), value)


def ids(*shape, top=2):  # integers: tokens, positions, labels
    return torch.arange(int(torch.Size(shape).numel())).reshape(shape) % top


def mask(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def build(row: Case):
    "The model of a row with seeded random weights, and its inputs"
    import diffusers
    torch.manual_seed(0)
    if callable(row.config):
        model = row.config()
    else:
        model = getattr(diffusers, row.model, None) or hidden_class(row.model)
        model = model(**row.config)
    return model.eval(), row.inputs()


def hidden_class(name):
    "Some denoisers are not exported at the top"
    import importlib
    import pkgutil
    import diffusers.models.transformers as folder
    for module in pkgutil.iter_modules(folder.__path__):
        found = getattr(importlib.import_module(f'{folder.__name__}.{module.name}'), name, None)
        if found is not None:
            return found
    raise LookupError(name)


# ---- FLUX and its relatives: [text | image] tokens, fused single blocks -------------------------
FLUX = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=[4, 4, 8])
POOLED = dict(pooled_projection_dim=32)


def flux(**more):
    return dict(hidden_states=f(1, 4, 4), encoder_hidden_states=f(1, 3, 32), timestep=one(),
                img_ids=f(4, 3), txt_ids=torch.zeros(3, 3)) | more


case('flux', 'FluxTransformer2DModel', FLUX | POOLED, lambda: flux(pooled_projections=f(1, 32)))
case('flux-guidance', 'FluxTransformer2DModel', FLUX | POOLED | dict(guidance_embeds=True),
     lambda: flux(pooled_projections=f(1, 32), guidance=one()))
case('flux-controlnet', 'FluxControlNetModel', FLUX | POOLED,
     lambda: flux(pooled_projections=f(1, 32), controlnet_cond=f(1, 4, 4)))
case('flux-controlnet-union', 'FluxControlNetModel', FLUX | POOLED | dict(num_mode=2),
     lambda: flux(pooled_projections=f(1, 32), controlnet_cond=f(1, 4, 4), controlnet_mode=ids(1, 1)))
case('bria', 'BriaTransformer2DModel', FLUX, flux)
case('bria-fibo', 'BriaFiboTransformer2DModel', FLUX | dict(text_encoder_dim=16),
     lambda: flux(text_encoder_layers=[f(1, 3, 16)]*3))
case('bria-fibo2', 'BriaFibo2Transformer2DModel', dict(
    in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16,
    injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8,
    gist_step=4, gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 4, 8), axes_lens=(64, 32, 32)),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), encoder_hidden_states=f(1, 2, 6, 16)))
case('chroma', 'ChromaTransformer2DModel', FLUX | dict(
    approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1), flux)
case('flux2', 'Flux2Transformer2DModel', dict(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4)), lambda: flux(img_ids=f(4, 4), txt_ids=torch.zeros(3, 4), guidance=one()))
case('flux3', 'Flux3Transformer2DModel', dict(
    in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4)),
    lambda: flux(img_ids=f(4, 4), txt_ids=torch.zeros(3, 4)))
case('longcat-image', 'LongCatImageTransformer2DModel', FLUX | dict(pooled_projection_dim=32), flux)
case('ovis', 'OvisImageTransformer2DModel', FLUX | dict(out_channels=4), flux)

# ---- Stable Diffusion 3 and other multimodal transformers ---------------------------------------
SD3 = dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
           num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
           pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8)


def sd3(**more):
    return dict(hidden_states=f(1, 4, 8, 8), encoder_hidden_states=f(1, 3, 32),
                pooled_projections=f(1, 32), timestep=one()) | more


case('sd3', 'SD3Transformer2DModel', SD3, sd3)
case('sd35', 'SD3Transformer2DModel', SD3 | dict(qk_norm='rms_norm', dual_attention_layers=(0,)), sd3)
case('sd3-controlnet', 'SD3ControlNetModel', SD3, lambda: sd3(controlnet_cond=f(1, 4, 8, 8)))
case('sd35-controlnet', 'SD3ControlNetModel', SD3 | dict(
    pos_embed_type=None, use_pos_embed=False, qk_norm='rms_norm', joint_attention_dim=None),
    lambda: sd3(hidden_states=f(1, 16, 32), encoder_hidden_states=None, controlnet_cond=f(1, 4, 8, 8)))
case('auraflow', 'AuraFlowTransformer2DModel', dict(
    sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
    attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
    out_channels=4, pos_embed_max_size=16),
    lambda: dict(hidden_states=f(1, 4, 8, 8), encoder_hidden_states=f(1, 3, 32), timestep=one()))
case('qwen-image', 'QwenImageTransformer2DModel', dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8)),
    lambda: dict(hidden_states=f(1, 4, 16), encoder_hidden_states=f(1, 3, 32), timestep=one(),
                 encoder_hidden_states_mask=mask(1, 3), img_shapes=[(1, 2, 2)]))
case('qwen-image21', 'QwenImage21Transformer2DModel', dict(
    patch_size=1, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, context_in_dim=32, axes_dims_rope=(4, 4, 8)),
    lambda: dict(hidden_states=f(1, 16, 16), encoder_hidden_states=f(1, 3, 32), timestep=one(),
                 img_shapes=[[(1, 4, 4)]], img_mask=torch.tensor([[False]*3 + [True]*4])))
case('qwen-image-controlnet', 'QwenImageControlNetModel', dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8)),
    lambda: dict(hidden_states=f(1, 4, 16), controlnet_cond=f(1, 4, 16), timestep=one(),
                 encoder_hidden_states=f(1, 3, 32), encoder_hidden_states_mask=mask(1, 3),
                 img_shapes=[(1, 2, 2)]))
COGVIEW = dict(patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
               num_attention_heads=2, text_embed_dim=32, time_embed_dim=16, condition_dim=8)


def cogview():
    return dict(hidden_states=f(1, 4, 8, 8), encoder_hidden_states=f(1, 3, 32), timestep=one(),
                original_size=f(1, 2), target_size=f(1, 2), crop_coords=f(1, 2))


case('cogview3', 'CogView3PlusTransformer2DModel', COGVIEW | dict(pos_embed_max_size=8, sample_size=8), cogview)
case('cogview4', 'CogView4Transformer2DModel', COGVIEW | dict(
    pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8)), cogview)
case('glm-image', 'GlmImageTransformer2DModel', COGVIEW | dict(prior_vq_quantizer_codebook_size=16),
     lambda: {k: v for k, v in cogview().items() if k != 'original_size'} | dict(
         prior_token_id=ids(1, 16), prior_token_drop=torch.zeros(1, 16, dtype=torch.bool)))
case('hidream', 'HiDreamImageTransformer2DModel', dict(
    patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=4,
    num_activated_experts=2, axes_dims_rope=(4, 4, 8), max_resolution=(8, 8), llama_layers=[0, 1]),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timesteps=one(), encoder_hidden_states_t5=f(1, 3, 16),
                 encoder_hidden_states_llama3=f(2, 1, 3, 16), pooled_embeds=f(1, 16)))
case('prx', 'PRXTransformer2DModel', dict(
    in_channels=4, patch_size=2, context_in_dim=16, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16)))
case('z-image', 'ZImageTransformer2DModel', dict(
    in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
    axes_dims=[4, 4, 8], axes_lens=[64, 32, 32]),
    lambda: dict(x=[f(4, 1, 8, 8)], t=one(), cap_feats=[f(3, 16)]))
case('nucleus-dense', 'NucleusMoEImageTransformer2DModel', dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8), moe_enabled=False, mlp_ratio=16.0,
    capacity_factors=[8.0]*2),
    lambda: dict(hidden_states=f(1, 4, 16), img_shapes=[(1, 2, 2)], encoder_hidden_states=f(1, 3, 32),
                 encoder_hidden_states_mask=mask(1, 3), timestep=one()))
case('krea2', 'Krea2Transformer2DModel', dict(
    in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=3,
    text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=48,
    num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8)),
    lambda: dict(hidden_states=f(1, 4, 16), encoder_hidden_states=f(1, 3, 3, 32), timestep=one(),
                 position_ids=f(7, 3)))
case('ideogram4', 'Ideogram4Transformer2DModel', dict(
    in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=48,
    adaln_dim=16, llm_features_dim=32, mrope_section=(4, 2, 2)),
    lambda: dict(hidden_states=f(1, 7, 16), timestep=one(), encoder_hidden_states=f(1, 7, 32),
                 position_ids=ids(1, 7, 3), segment_ids=torch.ones(1, 7, dtype=torch.long),
                 indicator=torch.tensor([[3, 3, 3, 2, 2, 2, 2]])))
case('ernie-image', 'ErnieImageTransformer2DModel', dict(
    hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=4,
    out_channels=4, text_in_dim=16, rope_axes_dim=(4, 4, 8)),
    lambda: dict(hidden_states=f(1, 4, 4, 4), timestep=one(), text_bth=f(1, 3, 16), text_lens=torch.tensor([3])))
case('joyimage', 'JoyImageEditTransformer3DModel', dict(
    in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 4, 8]),
    lambda: dict(hidden_states=f(1, 1, 4, 2, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16)))
case('omnigen', 'OmniGenTransformer2DModel', dict(
    in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=48, num_layers=2, pad_token_id=0, vocab_size=32, max_position_embeddings=64,
    original_max_position_embeddings=64, pos_embed_max_size=8, time_step_dim=16,
    rope_scaling=dict(short_factor=[1.]*8, long_factor=[1.]*8)),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), input_ids=ids(1, 5, top=9),
                 input_img_latents=[], input_image_sizes={}, attention_mask=mask(1, 22),
                 position_ids=ids(1, 22, top=64)))

# ---- DiT, PixArt, Sana and their relatives ------------------------------------------------------
DIT = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, norm_num_groups=2)
case('dit', 'DiTTransformer2DModel', DIT | dict(sample_size=8, num_embeds_ada_norm=10, out_channels=8),
     lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), class_labels=ids(1)))
PIXART = DIT | dict(sample_size=8, cross_attention_dim=32, caption_channels=16, out_channels=8)


def pixart(**more):
    return dict(hidden_states=f(1, 4, 8, 8), encoder_hidden_states=f(1, 3, 16), timestep=one(),
                added_cond_kwargs=dict(resolution=None, aspect_ratio=None)) | more


case('pixart-sigma', 'PixArtTransformer2DModel', PIXART | dict(use_additional_conditions=False), pixart)
case('pixart-alpha', 'PixArtTransformer2DModel', PIXART | dict(
    attention_head_dim=24, cross_attention_dim=48, use_additional_conditions=True),
    lambda: pixart(added_cond_kwargs=dict(resolution=f(1, 2), aspect_ratio=f(1, 1))))
case('hunyuan-dit', 'HunyuanDiT2DModel', dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8,
    hidden_size=32, num_layers=4, cross_attention_dim=16, cross_attention_dim_t5=16,
    pooled_projection_dim=16, text_len=3, text_len_t5=3),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16),
                 text_embedding_mask=mask(1, 3), encoder_hidden_states_t5=f(1, 3, 16),
                 text_embedding_mask_t5=mask(1, 3), image_meta_size=f(1, 6), style=ids(1),
                 image_rotary_emb=(f(16, 16), f(16, 16))))
case('hunyuan-dit-controlnet', 'HunyuanDiT2DControlNetModel', dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8,
    hidden_size=32, transformer_num_layers=4, cross_attention_dim=16, cross_attention_dim_t5=16,
    pooled_projection_dim=16, text_len=3, text_len_t5=3),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), controlnet_cond=f(1, 4, 8, 8),
                 encoder_hidden_states=f(1, 3, 16), text_embedding_mask=mask(1, 3),
                 encoder_hidden_states_t5=f(1, 3, 16), text_embedding_mask_t5=mask(1, 3),
                 image_meta_size=f(1, 6), style=ids(1), image_rotary_emb=(f(16, 16), f(16, 16))))
case('latte', 'LatteTransformer3DModel', dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, out_channels=8,
    sample_size=8, patch_size=2, cross_attention_dim=32, caption_channels=16,
    activation_fn='gelu-approximate', num_embeds_ada_norm=10, norm_type='ada_norm_single',
    norm_elementwise_affine=False, video_length=2),
    lambda: dict(hidden_states=f(1, 4, 2, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16)))
case('lumina-next', 'LuminaNextDiT2DModel', dict(
    sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=2,
    multiple_of=16, cross_attention_dim=16),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16),
                 encoder_mask=mask(1, 3), cross_attention_kwargs={},
                 image_rotary_emb=torch.polar(torch.ones(4, 4, 8), f(4, 4, 8))))
case('lumina2', 'Lumina2Transformer2DModel', dict(
    sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
    num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8),
    axes_lens=(64, 32, 32), cap_feat_dim=16),
    lambda: dict(hidden_states=f(1, 4, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16),
                 encoder_attention_mask=mask(1, 3)))
SANA = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
            caption_channels=16, sample_size=8)


def sana(**more):
    return dict(hidden_states=f(1, 4, 8, 8), encoder_hidden_states=f(1, 3, 16), timestep=one()) | more


case('sana', 'SanaTransformer2DModel', SANA, sana)
case('sana-sprint', 'SanaTransformer2DModel', SANA | dict(guidance_embeds=True, qk_norm='rms_norm_across_heads'),
     lambda: sana(guidance=one()))
case('sana-controlnet', 'SanaControlNetModel', SANA, lambda: sana(controlnet_cond=f(1, 4, 8, 8)))
case('sana-video', 'SanaVideoTransformer3DModel', SANA | dict(patch_size=(1, 2, 2)),
     lambda: sana(hidden_states=f(1, 4, 2, 8, 8)))
case('prior', 'PriorTransformer', dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=16, num_embeddings=3),
    lambda: dict(hidden_states=f(1, 16), timestep=one(), proj_embedding=f(1, 16),
                 encoder_hidden_states=f(1, 3, 16)))
case('transformer2d', 'Transformer2DModel', DIT | dict(
    in_channels=32, cross_attention_dim=16, sample_size=8),
    lambda: dict(hidden_states=f(1, 32, 4, 4), encoder_hidden_states=f(1, 3, 16)))
case('transformer-temporal', 'TransformerTemporalModel', DIT | dict(in_channels=32),
     lambda: dict(hidden_states=f(2, 32, 4, 4), num_frames=2))
case('t5-film', 'T5FilmDecoder', dict(
    input_dims=8, targets_length=4, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=48),
    lambda: dict(encodings_and_masks=[(f(1, 3, 32), torch.ones(1, 3))], decoder_input_tokens=f(1, 4, 8),
                 decoder_noise_time=one(1, .5)))

# ---- video --------------------------------------------------------------------------------------
COGVIDEO = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8,
                sample_frames=5, max_text_seq_length=3)


def cogvideo(**more):
    return dict(hidden_states=f(1, 2, 4, 8, 8), encoder_hidden_states=f(1, 3, 16), timestep=one()) | more


case('cogvideox', 'CogVideoXTransformer3DModel', COGVIDEO, cogvideo)
case('cogvideox-1.5', 'CogVideoXTransformer3DModel', COGVIDEO | dict(
    patch_size_t=2, use_rotary_positional_embeddings=True, ofs_embed_dim=8),
    lambda: cogvideo(ofs=one(), image_rotary_emb=(f(16, 16), f(16, 16))))
case('consisid', 'ConsisIDTransformer3DModel', COGVIDEO | dict(
    is_train_face=True, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=2, LFE_vit_dim=2,
    LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=2,
    LFE_output_dim=21, LFE_ff_mult=2, LFE_num_scale=5),
    lambda: cogvideo(id_cond=f(1, 2), id_vit_hidden=[f(1, 2, 2)]*5))
case('allegro', 'AllegroTransformer3DModel', dict(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
    cross_attention_dim=48, sample_height=8, sample_width=8, sample_frames=2, caption_channels=16),
    lambda: dict(hidden_states=f(1, 4, 2, 8, 8), encoder_hidden_states=f(1, 3, 16), timestep=one(),
                 attention_mask=torch.ones(1, 2, 8, 8), encoder_attention_mask=torch.ones(1, 3),
                 image_rotary_emb=allegro_rope()))


def allegro_rope():
    cos_sin = tuple(f(4, 8) for _ in range(3)), tuple(f(4, 8) for _ in range(3))
    positions = ids(1, 32, top=2), ids(1, 32, top=4), ids(1, 32, top=4)
    return (*((c, s) for c, s in zip(*cos_sin)),), positions


WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
           out_channels=4, text_dim=16, freq_dim=16, ffn_dim=48, num_layers=2, rope_max_seq_len=32)


def wan(**more):
    return dict(hidden_states=f(1, 4, 2, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16)) | more


IMAGE = dict(image_dim=8, added_kv_proj_dim=24)
case('wan', 'WanTransformer3DModel', WAN, wan)
case('wan-i2v', 'WanTransformer3DModel', WAN | IMAGE, lambda: wan(
    encoder_hidden_states=f(1, 512, 16), encoder_hidden_states_image=f(1, 4, 8)))
case('wan-ti2v', 'WanTransformer3DModel', WAN, lambda: wan(timestep=torch.ones(1, 32)))
case('wan-vace', 'WanVACETransformer3DModel', WAN | dict(vace_layers=[0], vace_in_channels=6),
     lambda: wan(control_hidden_states=f(1, 6, 2, 8, 8)))
case('chronoedit', 'ChronoEditTransformer3DModel', WAN, wan)
case('skyreels', 'SkyReelsV2Transformer3DModel', WAN, wan)
case('skyreels-fps', 'SkyReelsV2Transformer3DModel', WAN | dict(inject_sample_info=True), lambda: wan(fps=ids(1)))
case('anyflow', 'AnyFlowTransformer3DModel', WAN, lambda: wan(hidden_states=f(1, 2, 4, 8, 8), r_timestep=torch.ones(1, 2), timestep=torch.ones(1, 2)))
case('anyflow-far', 'AnyFlowFARTransformer3DModel', WAN | dict(
    compressed_patch_size=(1, 4, 4), full_chunk_limit=3, chunk_partition=(1, 1)),
    lambda: wan(hidden_states=f(1, 2, 4, 8, 8), timestep=torch.ones(1, 2), r_timestep=torch.ones(1, 2),
                chunk_partition=(1, 1)))
case('helios', 'HeliosTransformer3DModel', {
    k: v for k, v in WAN.items() if k != 'rope_max_seq_len'} | dict(attention_head_dim=16, rope_dim=(4, 4, 8)),
    lambda: wan(indices_hidden_states=ids(1, 2), indices_latents_history_short=ids(1, 1),
                indices_latents_history_mid=ids(1, 2), indices_latents_history_long=ids(1, 4),
                latents_history_short=f(1, 4, 1, 8, 8), latents_history_mid=f(1, 4, 2, 8, 8),
                latents_history_long=f(1, 4, 4, 8, 8)))
case('wan-animate', 'WanAnimateTransformer3DModel', WAN | dict(
    in_channels=12, latent_channels=4, image_dim=8, added_kv_proj_dim=24, face_encoder_hidden_dim=16,
    face_encoder_num_heads=2, inject_face_latents_blocks=2, motion_encoder_size=16, motion_style_dim=8,
    motion_dim=4, motion_encoder_dim=16,
    motion_encoder_channel_sizes={'4': 8, '8': 8, '16': 8}),
    lambda: wan(hidden_states=f(1, 12, 3, 8, 8), encoder_hidden_states=f(1, 512, 16), encoder_hidden_states_image=f(1, 4, 8),
                pose_hidden_states=f(1, 4, 2, 8, 8), face_pixel_values=f(1, 3, 5, 16, 16)))
LTX = dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
           cross_attention_dim=32, num_layers=2, caption_channels=16)
case('ltx', 'LTXVideoTransformer3DModel', LTX,
     lambda: dict(hidden_states=f(1, 8, 8), encoder_hidden_states=f(1, 3, 16), timestep=one(),
                  encoder_attention_mask=mask(1, 3), num_frames=2, height=2, width=2))
case('ltx2', 'LTX2VideoTransformer3DModel', LTX | dict(
    audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
    audio_cross_attention_dim=16),
    lambda: dict(hidden_states=f(1, 8, 8), audio_hidden_states=f(1, 5, 4), encoder_hidden_states=f(1, 3, 16),
                 audio_encoder_hidden_states=f(1, 3, 16), timestep=one(),
                 encoder_attention_mask=mask(1, 3), audio_encoder_attention_mask=mask(1, 3),
                 num_frames=2, height=2, width=2, audio_num_frames=5))
case('mochi', 'MochiTransformer3DModel', dict(
    num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
    text_embed_dim=16, time_embed_dim=4, max_sequence_length=16),
    lambda: dict(hidden_states=f(1, 4, 2, 8, 8), encoder_hidden_states=f(1, 16, 16), timestep=one(),
                 encoder_attention_mask=mask(1, 16)))
HUNYUAN = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
               num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, rope_axes_dim=(4, 4, 8))


def hunyuan(**more):
    return dict(hidden_states=f(1, 4, 2, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16),
                encoder_attention_mask=mask(1, 3)) | more


case('hunyuan-video', 'HunyuanVideoTransformer3DModel', HUNYUAN | dict(num_single_layers=2, pooled_projection_dim=8),
     lambda: hunyuan(pooled_projections=f(1, 8), guidance=one()))
case('hunyuan-video-i2v', 'HunyuanVideoTransformer3DModel', HUNYUAN | dict(
    num_single_layers=1, pooled_projection_dim=8, guidance_embeds=False, image_condition_type='token_replace'),
    lambda: hunyuan(pooled_projections=f(1, 8)))
case('hunyuan-framepack', 'HunyuanVideoFramepackTransformer3DModel', HUNYUAN | dict(
    num_single_layers=1, pooled_projection_dim=8, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
    lambda: hunyuan(pooled_projections=f(1, 8), guidance=one(), image_embeds=f(1, 3, 16),
                    indices_latents=ids(2), latents_clean=f(1, 4, 1, 8, 8), indices_latents_clean=ids(1),
                    latents_history_2x=f(1, 4, 2, 8, 8), indices_latents_history_2x=ids(2),
                    latents_history_4x=f(1, 4, 4, 8, 8), indices_latents_history_4x=ids(4)))
case('hunyuan-video15', 'HunyuanVideo15Transformer3DModel', HUNYUAN | dict(
    patch_size=1, text_embed_2_dim=16, image_embed_dim=16),
    lambda: hunyuan(encoder_hidden_states_2=f(1, 3, 16), encoder_attention_mask_2=mask(1, 3),
                    image_embeds=f(1, 3, 16)))
case('hunyuan-image', 'HunyuanImageTransformer2DModel', {k: v for k, v in HUNYUAN.items() if k != 'patch_size_t'} | dict(
    num_single_layers=2, patch_size=(1, 1), rope_axes_dim=(8, 8)),
    lambda: hunyuan(hidden_states=f(1, 4, 4, 4)))
case('motif', 'MotifVideoTransformer3DModel', {
    k: v for k, v in HUNYUAN.items() if k != 'num_refiner_layers'} | dict(num_single_layers=2), hunyuan)
case('easyanimate', 'EasyAnimateTransformer3DModel', dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
    sample_width=8, sample_height=8, num_layers=2, mmdit_layers=2, time_embed_dim=8, text_embed_dim=16),
    lambda: dict(hidden_states=f(1, 4, 2, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16)))
COSMOS = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
              text_embed_dim=16, adaln_lora_dim=4, max_size=(2, 8, 8), encoder_hidden_states_channels=16,
              crossattn_proj_in_channels=16)
COSMOS['concat_padding_mask'] = False  # resizing the mask needs torchvision (so does CosmosControlNetModel)
case('cosmos', 'CosmosTransformer3DModel', COSMOS, lambda: wan(fps=30))
case('cosmos2', 'CosmosTransformer3DModel', COSMOS | dict(extra_pos_embed_type=None), wan)
case('kandinsky5', 'Kandinsky5Transformer3DModel', dict(
    in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=32,
    ff_dim=48, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 8)),
    lambda: dict(hidden_states=f(1, 2, 8, 8, 4), encoder_hidden_states=f(1, 3, 16), timestep=one(),
                 pooled_projections=f(1, 8), text_rope_pos=torch.arange(3),
                 visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)]))
case('minimax-h3', 'MiniMaxH3Transformer3DModel', dict(
    num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1,
    ffn_dim=48, in_channels=4, audio_in_channels=4, text_dim=16, freq_dim=8, time_embed_hidden_dim=16,
    time_embed_dim=16, rope_freq_dim=2),
    lambda: minimax_h3())


def minimax_h3():
    return dict(hidden_states=f(1, 4, 16), audio_hidden_states=f(1, 3, 4), encoder_hidden_states=f(1, 3, 16),
                timestep=one(2), timestep_indices=ids(10), token_tags=torch.tensor([0]*3 + [1]*4 + [2]*3),
                position_ids=ids(10, 3, top=4), video_indices=torch.arange(3, 7),
                audio_indices=torch.arange(7, 10), text_indices=torch.arange(3))


# ---- sound --------------------------------------------------------------------------------------
case('ace-step', 'AceStepTransformer1DModel', dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4,
    encoder_hidden_size=32),
    lambda: dict(hidden_states=f(1, 8, 4), timestep=one(), timestep_r=one(), encoder_hidden_states=f(1, 3, 32),
                 context_latents=f(1, 8, 8)))
case('stable-audio', 'StableAudioDiTModel', dict(
    sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
    global_states_input_dim=16, cross_attention_input_dim=16),
    lambda: dict(hidden_states=f(1, 4, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16),
                 global_hidden_states=f(1, 1, 16), rotary_embedding=(f(9, 4), f(9, 4))))
case('stable-audio3', 'StableAudio3DiTModel', dict(
    io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=16, global_cond_dim=16,
    local_add_cond_dim=5, timestep_features_dim=8, num_memory_tokens=2),
    lambda: dict(hidden_states=f(1, 4, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16),
                 global_hidden_states=f(1, 16), local_add_cond=f(1, 5, 8)))
case('longcat-audio', 'LongCatAudioDiTTransformer', dict(
    dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4),
    lambda: dict(hidden_states=f(1, 8, 4), encoder_hidden_states=f(1, 3, 16), encoder_attention_mask=mask(1, 3),
                 timestep=one(), attention_mask=mask(1, 8), latent_cond=f(1, 8, 4)))
case('minimax-music3', 'MiniMaxMusic3Transformer1DModel', dict(
    in_channels=4, condition_dim=16, num_layers=2, num_attention_heads=2, attention_head_dim=16,
    ff_inner_dim=48, rotary_dim=8, fourier_embedding_dim=16),
    lambda: dict(hidden_states=f(1, 4, 8), timestep=one(), encoder_hidden_states=f(1, 8, 16)))
case('minimax-rvq', 'MiniMaxMusic3RVQDepthDecoder', dict(
    hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=48, audio_vocab_size=16, num_codebooks=3),
    lambda: dict(inputs_embeds=f(1, 3, 32)))

# ---- UNets --------------------------------------------------------------------------------------
UNET = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=16, attention_head_dim=2,
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))
XL = dict(addition_embed_type='text_time', addition_time_embed_dim=8, use_linear_projection=True,
          transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=64)


def unet(**more):
    return dict(sample=f(1, 4, 8, 8), timestep=one(), encoder_hidden_states=f(1, 3, 16)) | more


def added():
    return dict(added_cond_kwargs=dict(text_embeds=f(1, 16), time_ids=f(1, 6)))


case('sd15', 'UNet2DConditionModel', UNET, unet)
case('sd21', 'UNet2DConditionModel', UNET | dict(use_linear_projection=True), unet)
case('sdxl', 'UNet2DConditionModel', UNET | XL, lambda: unet(**added()))
case('sd-scale-shift', 'UNet2DConditionModel', UNET | dict(resnet_time_scale_shift='scale_shift'), unet)
case('sd-class', 'UNet2DConditionModel', UNET | dict(class_embed_type='timestep'), lambda: unet(class_labels=one()))
case('sd-dual-cross', 'UNet2DConditionModel', UNET | dict(upcast_attention=True, only_cross_attention=True), unet)
case('deepfloyd-if', 'UNet2DConditionModel', UNET | dict(
    down_block_types=('ResnetDownsampleBlock2D', 'SimpleCrossAttnDownBlock2D'),
    mid_block_type='UNetMidBlock2DSimpleCrossAttn',
    up_block_types=('SimpleCrossAttnUpBlock2D', 'ResnetUpsampleBlock2D'), act_fn='gelu',
    resnet_time_scale_shift='scale_shift', attention_head_dim=4, encoder_hid_dim=12, encoder_hid_dim_type='text_proj'),
    lambda: unet(encoder_hidden_states=f(1, 3, 12)))
case('unet2d', 'UNet2DModel', dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
    norm_num_groups=4, attention_head_dim=4, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
    up_block_types=('AttnUpBlock2D', 'UpBlock2D')), lambda: dict(sample=f(1, 4, 8, 8), timestep=one()))
case('unet1d', 'UNet1DModel', dict(
    sample_size=16, in_channels=14, out_channels=14, time_embedding_type='positional', use_timestep_embedding=True,
    flip_sin_to_cos=False, freq_shift=1.0, block_out_channels=(8, 16), norm_num_groups=4,
    out_block_type='OutConv1DBlock', mid_block_type='MidResTemporalBlock1D', act_fn='mish',
    down_block_types=('DownResnetBlock1D', 'DownResnetBlock1D'), up_block_types=('UpResnetBlock1D',)),
    lambda: dict(sample=f(1, 14, 16), timestep=one()))
case('unet1d-attention', 'UNet1DModel', dict(
    sample_size=16, in_channels=2, out_channels=2, extra_in_channels=16, block_out_channels=(8, 32, 32),
    down_block_types=('DownBlock1DNoSkip', 'DownBlock1D', 'AttnDownBlock1D'),
    up_block_types=('AttnUpBlock1D', 'UpBlock1D', 'UpBlock1DNoSkip')),
    lambda: dict(sample=f(1, 2, 32), timestep=one()))
UNET3D = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
              cross_attention_dim=16, attention_head_dim=4,
              down_block_types=('CrossAttnDownBlock3D', 'DownBlock3D'),
              up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D'))
case('unet3d', 'UNet3DConditionModel', UNET3D, lambda: unet(sample=f(1, 4, 2, 8, 8)))
case('i2vgen', 'I2VGenXLUNet', UNET3D, lambda: unet(
    sample=f(1, 4, 2, 8, 8), fps=one(), image_latents=f(1, 4, 2, 8, 8), image_embeddings=f(1, 1, 16)))
MOTION = UNET | dict(num_attention_heads=2, motion_num_attention_heads=2,
                     down_block_types=('DownBlockMotion', 'CrossAttnDownBlockMotion'),
                     up_block_types=('CrossAttnUpBlockMotion', 'UpBlockMotion'))
MOTION.pop('attention_head_dim')
case('motion', 'UNetMotionModel', MOTION, lambda: unet(sample=f(1, 4, 2, 8, 8), encoder_hidden_states=f(2, 3, 16)))
case('svd', 'UNetSpatioTemporalConditionModel', dict(
    sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
    cross_attention_dim=16, num_attention_heads=(2, 4), num_frames=2, addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
    down_block_types=('CrossAttnDownBlockSpatioTemporal', 'DownBlockSpatioTemporal'),
    up_block_types=('UpBlockSpatioTemporal', 'CrossAttnUpBlockSpatioTemporal')),
    lambda: dict(sample=f(1, 2, 8, 8, 8), timestep=one(), encoder_hidden_states=f(1, 1, 16), added_time_ids=f(1, 3)))
case('kandinsky3', 'Kandinsky3UNet', dict(
    time_embedding_dim=16, groups=4, attention_head_dim=8, layers_per_block=3,
    block_out_channels=(16, 32, 32), cross_attention_dim=16, encoder_hid_dim=16),
    lambda: unet(encoder_attention_mask=mask(1, 3)))
case('stable-cascade', 'StableCascadeUNet', dict(
    in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=32,
    block_out_channels=(32, 32), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1), clip_text_in_channels=16, clip_text_pooled_in_channels=16,
    clip_image_in_channels=16, clip_seq=2, switch_level=(False,)),
    lambda: dict(sample=f(1, 4, 8, 8), timestep_ratio=one(), clip_text_pooled=f(1, 1, 16),
                 clip_text=f(1, 3, 16), clip_img=f(1, 1, 16)))
case('uvit', 'UVit2DModel', dict(
    hidden_size=32, cond_embed_dim=16, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
    encoder_hidden_size=16, vocab_size=16, codebook_size=16, in_channels=32, block_out_channels=32,
    num_res_blocks=1, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, sample_size=8),
    lambda: dict(input_ids=ids(1, 4, 4), encoder_hidden_states=f(1, 3, 16), pooled_text_emb=f(1, 16), micro_conds=f(1, 5)))
DREAM = dict(
    sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=4,
    cross_attention_dim=16, attention_head_dim=8, transformer_layers_per_block=1)
case('dreamlite', 'DreamLiteUNetModel', DREAM, unet)

# ---- ControlNets of UNets -----------------------------------------------------------------------
CONTROL = {k: v for k, v in UNET.items() if k not in ('sample_size', 'up_block_types')} | dict(
    conditioning_embedding_out_channels=(4, 8))


def control(**more):
    return unet(controlnet_cond=f(1, 3, 16, 16)) | more


case('controlnet', 'ControlNetModel', CONTROL, control)
case('controlnet-xl', 'ControlNetModel', CONTROL | XL, lambda: control(**added()))
case('controlnet-union', 'ControlNetUnionModel', CONTROL | XL | dict(
    num_control_type=2, num_trans_channel=8, num_trans_head=2, num_proj_channel=8,
    conditioning_embedding_out_channels=(4, 8)),
    lambda: control(**added()) | dict(controlnet_cond=[f(1, 3, 16, 16)], control_type=ids(1, 2),
                                      control_type_idx=[1]))
case('sparse-controlnet', 'SparseControlNetModel', {k: v for k, v in CONTROL.items() if k != 'down_block_types'} | dict(
    down_block_types=('DownBlockMotion', 'CrossAttnDownBlockMotion'), motion_num_attention_heads=2),
    lambda: unet(sample=f(1, 4, 2, 8, 8), encoder_hidden_states=f(2, 3, 16), controlnet_cond=f(1, 4, 2, 8, 8), conditioning_mask=f(1, 1, 2, 8, 8)))
case('controlnet-xs', 'UNetControlNetXSModel', dict(
    sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
    num_attention_heads=2, ctrl_conditioning_embedding_out_channels=(4, 8), ctrl_block_out_channels=(4, 8),
    ctrl_num_attention_heads=2, ctrl_max_norm_num_groups=2,
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D')),
    lambda: control())


def several(model, name):
    import diffusers
    return getattr(diffusers, model)([build(CASES[name])[0] for _ in range(2)])


case('multi-controlnet', 'MultiControlNetModel', lambda: several('MultiControlNetModel', 'controlnet'),
     lambda: control(return_dict=False, controlnet_cond=[f(1, 3, 16, 16)]*2, conditioning_scale=[1., 1.]))
case('sd3-multi-controlnet', 'SD3MultiControlNetModel', lambda: several('SD3MultiControlNetModel', 'sd3-controlnet'),
     lambda: sd3(return_dict=False, controlnet_cond=[f(1, 4, 8, 8)]*2, conditioning_scale=[1., 1.]))
case('flux-multi-controlnet', 'FluxMultiControlNetModel', lambda: several('FluxMultiControlNetModel', 'flux-controlnet'),
     lambda: flux(return_dict=False, pooled_projections=f(1, 32), controlnet_cond=[f(1, 4, 4)]*2,
                  controlnet_mode=[ids(1)]*2, conditioning_scale=[1., 1.]))
