"""Real diffusers pipelines with tiny random parts, made without the network."""
import string

import torch


def clip_tokenizer():
    from transformers import CLIPTokenizer
    letters = [*string.ascii_lowercase, *(c + '</w>' for c in string.ascii_lowercase)]
    words = [*letters, '<|startoftext|>', '<|endoftext|>']
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer():
    from transformers import T5Tokenizer
    pieces = [('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.), ('▁', -1.)]
    return T5Tokenizer(vocab=pieces + [(c, -1.) for c in string.ascii_lowercase], extra_ids=0)


def clip(projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(vocab_size=54, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                            num_attention_heads=2, projection_dim=16, bos_token_id=52, eos_token_id=53)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5():
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=24, num_layers=1, num_heads=2)).eval()


def vae(channels):
    from diffusers import AutoencoderKL
    return AutoencoderKL(block_out_channels=(8, 8, 8, 8), latent_channels=channels, norm_num_groups=2,
                         down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4,
                         shift_factor=0., use_quant_conv=False, use_post_quant_conv=False).eval()


def sd3_pipeline(**more):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**dict(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=64, qk_norm='rms_norm',
        dual_attention_layers=(0,)) | more).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4),
        text_encoder=clip(True), tokenizer=clip_tokenizer(), text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(), tokenizer_3=t5_tokenizer())


def flux_pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True).eval()
    return FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4),
                        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(),
                        tokenizer_2=t5_tokenizer())


def sdxl_pipeline():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=32, attention_head_dim=2, use_linear_projection=True,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), transformer_layers_per_block=(1, 2),
        addition_embed_type='text_time', addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64).eval()
    return StableDiffusionXLPipeline(
        unet=unet, scheduler=EulerDiscreteScheduler(), vae=vae(4), text_encoder=clip(),
        tokenizer=clip_tokenizer(), text_encoder_2=clip(True), tokenizer_2=clip_tokenizer())


def controlnet_pipeline():
    from diffusers import StableDiffusionXLControlNetPipeline
    pipe = sdxl_pipeline()
    return StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=sdxl_controlnet())


def image_pipeline(kind):
    import diffusers
    return getattr(diffusers, kind)(**sdxl_pipeline().components)


def sdxl_controlnet():
    from diffusers import ControlNetModel
    return ControlNetModel.from_unet(sdxl_pipeline().unet, conditioning_channels=3).eval()
