"Pipelines of every kind with networks of a few thousand weights: a folder of configurations, or one with random weights and tokenizers."
import json
from importlib import import_module
from pathlib import Path

import torch

from devsky_nb.hub.load import build_network
from devsky_nb.hub.locate import bundled_folder
from devsky_nb.hub.models import KNOWN
from devsky_nb.memory.configs import network_class

SIDE = 64  # pixels of an image


def clip_text(dim=32, projected=False, cls=None, **more):
    return ("transformers", cls or ("CLIPTextModelWithProjection" if projected else "CLIPTextModel"),
            {"hidden_size": dim, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1000,
             "projection_dim": dim, "max_position_embeddings": 77, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1} | more)


def t5(cls="T5EncoderModel", dim=32):
    return ("transformers", cls, {"d_model": dim, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1000})


def vision(cls="CLIPVisionModelWithProjection", dim=32, **more):
    return ("transformers", cls, {"hidden_size": dim, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
                                  "image_size": 224, "patch_size": 32, "projection_dim": dim} | more)


def llm(cls, dim=32, layers=2, **more):
    return ("transformers", cls, {"hidden_size": dim, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4,
                                  "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1000, "pad_token_id": 1,
                                  "bos_token_id": 2, "eos_token_id": 3} | more)


def qwen_vl(cls="Qwen2_5_VLForConditionalGeneration", dim=32):
    return ("transformers", cls, {
        "text_config": {"hidden_size": dim, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "vocab_size": 152000, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}},
        "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": dim,
                          "fullatt_block_indexes": [1], "patch_size": 14}})


def kl(channels=4, blocks=(32, 64), cls="AutoencoderKL", **more):
    n = len(blocks)
    return ("diffusers", cls, {"block_out_channels": list(blocks), "down_block_types": ["DownEncoderBlock2D"] * n, "layers_per_block": 1,
                               "up_block_types": ["UpDecoderBlock2D"] * n, "latent_channels": channels, "sample_size": 64} | more)


KL8 = (32, 32, 32, 32)


def wan_vae(cls="AutoencoderKLWan", **more):
    return ("diffusers", cls, {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
                               "temperal_downsample": [False, True, True]} | more)


def unet(cross=32, cls="UNet2DConditionModel", **more):
    return ("diffusers", cls, {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 32, "in_channels": 4, "out_channels": 4,
                               "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                               "cross_attention_dim": cross, "attention_head_dim": 8} | more)


def xl_unet(**more):
    return unet(64, attention_head_dim=[2, 4], use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=80, transformer_layers_per_block=[1, 2], **more)


def controlnet(cross=32, **more):
    return ("diffusers", "ControlNetModel", {"block_out_channels": [32, 64], "layers_per_block": 1, "in_channels": 4, "cross_attention_dim": cross,
                                             "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": 8,
                                             "conditioning_embedding_out_channels": [16, 32]} | more)


def flux(channels=16, **more):
    return ("diffusers", "FluxTransformer2DModel", {"in_channels": channels, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8], "guidance_embeds": True} | more)


def scheduler(cls, **more): return ("diffusers", cls, more)
EULER, FLOW = scheduler("EulerDiscreteScheduler"), scheduler("FlowMatchEulerDiscreteScheduler")
SHIFTED = scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
DDIM = scheduler("DDIMScheduler", steps_offset=1, clip_sample=False)
CLIP_TOKENS, T5_TOKENS = ("transformers", "CLIPTokenizer"), ("transformers", "T5TokenizerFast")
ANY_TOKENS = ("transformers", "Qwen2Tokenizer")
PIXELS = ("transformers", "CLIPImageProcessor")
NONE = (None, None)

SD = {"vae": kl(), "text_encoder": clip_text(), "tokenizer": CLIP_TOKENS, "unet": unet(), "scheduler": DDIM, "safety_checker": NONE,
      "feature_extractor": NONE, "image_encoder": NONE, "requires_safety_checker": False}
SDXL = {"vae": kl(), "text_encoder": clip_text(), "text_encoder_2": clip_text(projected=True), "tokenizer": CLIP_TOKENS,
        "tokenizer_2": CLIP_TOKENS, "unet": xl_unet(), "scheduler": EULER, "image_encoder": NONE, "feature_extractor": NONE,
        "force_zeros_for_empty_prompt": True}


def sd3(channels=8):
    return ("diffusers", "SD3Transformer2DModel", {"sample_size": 32, "patch_size": 2, "in_channels": channels, "out_channels": channels, "num_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 32,
            "pooled_projection_dim": 64, "pos_embed_max_size": 96})


SD3 = {"transformer": sd3(),
       "scheduler": FLOW, "vae": kl(8, KL8, shift_factor=0.0), "text_encoder": clip_text(projected=True), "tokenizer": CLIP_TOKENS,
       "text_encoder_2": clip_text(projected=True), "tokenizer_2": CLIP_TOKENS, "text_encoder_3": t5(dim=64), "tokenizer_3": T5_TOKENS,
       "image_encoder": NONE, "feature_extractor": NONE}
FLUX = {"scheduler": FLOW, "vae": kl(4, (32, 32), shift_factor=0.0), "text_encoder": clip_text(), "tokenizer": CLIP_TOKENS,
        "text_encoder_2": t5(), "tokenizer_2": T5_TOKENS, "transformer": flux(), "image_encoder": NONE, "feature_extractor": NONE}
FLUX2 = {"scheduler": FLOW, "vae": kl(4, (32, 32), "AutoencoderKLFlux2", use_quant_conv=False, use_post_quant_conv=False),
         "transformer": ("diffusers", "Flux2Transformer2DModel", {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                         "num_attention_heads": 2, "joint_attention_dim": 96, "axes_dims_rope": [4, 4, 4, 4]})}
QWEN = {"scheduler": FLOW, "vae": wan_vae("AutoencoderKLQwenImage"), "text_encoder": qwen_vl(), "tokenizer": ANY_TOKENS,
        "transformer": ("diffusers", "QwenImageTransformer2DModel", {"in_channels": 64, "num_layers": 1, "attention_head_dim": 16,
                        "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [8, 4, 4]})}
WAN = {"tokenizer": T5_TOKENS, "text_encoder": t5("UMT5EncoderModel"), "vae": wan_vae(),
       "scheduler": scheduler("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)}


def wan(**more):
    return ("diffusers", "WanTransformer3DModel", {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
            "text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32} | more)


def hunyuan(**more):
    return ("diffusers", "HunyuanVideoTransformer3DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
            "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 32, "pooled_projection_dim": 32,
            "rope_axes_dim": [2, 4, 4]} | more)


HUNYUAN_VAE = ("diffusers", "AutoencoderKLHunyuanVideo", {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4})
LTX = {"scheduler": FLOW, "text_encoder": t5(), "tokenizer": T5_TOKENS,
       "vae": ("diffusers", "AutoencoderKLLTXVideo", {"latent_channels": 8, "block_out_channels": [8, 8, 8, 8], "decoder_block_out_channels": [8, 8, 8, 8],
               "layers_per_block": [1, 1, 1, 1, 1], "decoder_layers_per_block": [1, 1, 1, 1, 1]}),
       "transformer": ("diffusers", "LTXVideoTransformer3DModel", {"in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8,
                       "cross_attention_dim": 32, "num_layers": 1, "caption_channels": 32})}


def cogvideo(channels=4, **more):
    return {"tokenizer": ("transformers", "T5Tokenizer"), "text_encoder": t5(), "scheduler": scheduler("CogVideoXDDIMScheduler"),
            "vae": ("diffusers", "AutoencoderKLCogVideoX", {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}),
            "transformer": ("diffusers", "CogVideoXTransformer3DModel", {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": channels,
                            "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": 32, "num_layers": 1, "sample_width": 8, "sample_height": 8,
                            "sample_frames": 9, "max_text_seq_length": 226} | more)}


DC = ("diffusers", "AutoencoderDC", {"latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
      "decoder_block_types": ["ResBlock", "EfficientViTBlock"], "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
      "encoder_qkv_multiscales": [[], [5]], "decoder_qkv_multiscales": [[], [5]], "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1],
      "downsample_block_type": "conv", "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 0.41})
SANA = {"tokenizer": ANY_TOKENS, "text_encoder": llm("Gemma2Model"), "vae": DC, "scheduler": FLOW,
        "transformer": ("diffusers", "SanaTransformer2DModel", {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
                        "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8,
                        "caption_channels": 32, "sample_size": 32})}
PIXART = {"tokenizer": ("transformers", "T5Tokenizer"), "text_encoder": t5(), "scheduler": DDIM, "vae": kl(4, KL8),
          "transformer": ("diffusers", "PixArtTransformer2DModel", {"sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8,
                          "num_attention_heads": 3, "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8,
                          "norm_type": "ada_norm_single"})}
KANDINSKY5 = {"scheduler": FLOW, "text_encoder": qwen_vl(), "tokenizer": ("transformers", "Qwen2VLProcessor"), "text_encoder_2": clip_text(),
              "tokenizer_2": CLIP_TOKENS,
              "transformer": ("diffusers", "Kandinsky5Transformer3DModel", {"in_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 32,
                              "out_visual_dim": 4, "model_dim": 64, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": [8, 12, 12]})}
KANDINSKY22 = {"scheduler": scheduler("DDPMScheduler", beta_schedule="linear"),
               "movq": ("diffusers", "VQModel", {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
                        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "latent_channels": 4, "layers_per_block": 1,
                        "num_vq_embeddings": 12, "vq_embed_dim": 4, "norm_type": "spatial", "norm_num_groups": 8}),
               "unet": ("diffusers", "UNet2DConditionModel", {"in_channels": 4, "out_channels": 8, "addition_embed_type": "image",
                        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
                        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"], "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                        "block_out_channels": [32, 64], "layers_per_block": 1, "encoder_hid_dim": 32, "encoder_hid_dim_type": "image_proj",
                        "cross_attention_dim": 32, "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift"})}
PRIOR = {"prior": ("diffusers", "PriorTransformer", {"num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": 32, "num_layers": 1}),
         "image_encoder": vision(), "text_encoder": clip_text(projected=True), "tokenizer": CLIP_TOKENS,
         "scheduler": scheduler("UnCLIPScheduler", variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample=True,
                                clip_sample_range=10.0), "image_processor": PIXELS}
SVD = {"vae": ("diffusers", "AutoencoderKLTemporalDecoder", {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4}),
       "image_encoder": vision(), "scheduler": scheduler("EulerDiscreteScheduler", prediction_type="v_prediction", use_karras_sigmas=True,
                                                          interpolation_type="linear", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0),
       "feature_extractor": PIXELS,
       "unet": ("diffusers", "UNetSpatioTemporalConditionModel", {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 32,
                "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"], "num_attention_heads": [2, 4],
                "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"], "cross_attention_dim": 32,
                "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96})}
ANIMATED = SD | {"scheduler": scheduler("DDIMScheduler", beta_schedule="linear", clip_sample=False, steps_offset=1),
                 "motion_adapter": ("diffusers", "MotionAdapter", {"block_out_channels": [32, 64], "motion_layers_per_block": 1,
                                    "motion_norm_num_groups": 2, "motion_num_attention_heads": 4})}
for name in ("safety_checker", "requires_safety_checker"): del ANIMATED[name]
XL_CONTROL = controlnet(64, attention_head_dim=[2, 4], use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                        projection_class_embeddings_input_dim=80, transformer_layers_per_block=[1, 2])

PIPELINES = {  # class -> components, and what is asked
    "StableDiffusionPipeline": SD, "StableDiffusionImg2ImgPipeline": SD, "StableDiffusionInpaintPipeline": SD | {"unet": unet(in_channels=9)},
    "StableDiffusionInstructPix2PixPipeline": SD | {"unet": unet(in_channels=8)},
    "StableDiffusionControlNetPipeline": SD | {"controlnet": controlnet()},
    "LatentConsistencyModelPipeline": SD | {"unet": unet(time_cond_proj_dim=32), "scheduler": scheduler("LCMScheduler")},
    "StableDiffusionXLPipeline": SDXL, "StableDiffusionXLImg2ImgPipeline": SDXL | {"unet": xl_unet(), "requires_aesthetics_score": False},
    "StableDiffusionXLInpaintPipeline": SDXL | {"unet": xl_unet(in_channels=9), "requires_aesthetics_score": False},
    "StableDiffusionXLControlNetPipeline": SDXL | {"controlnet": XL_CONTROL},
    "StableDiffusion3Pipeline": SD3, "StableDiffusion3Img2ImgPipeline": SD3, "StableDiffusion3InpaintPipeline": SD3 | {"vae": kl(16, KL8, shift_factor=0.0), "transformer": sd3(16)},
    "FluxPipeline": FLUX, "FluxImg2ImgPipeline": FLUX, "FluxInpaintPipeline": FLUX, "FluxKontextPipeline": FLUX | {"vae": kl(4, KL8, shift_factor=0.0)},
    "FluxFillPipeline": FLUX | {"transformer": flux(48, out_channels=16)}, "FluxControlPipeline": FLUX | {"transformer": flux(32, out_channels=16)},
    "FluxControlNetPipeline": FLUX | {"controlnet": ("diffusers", "FluxControlNetModel", flux(num_layers=1, num_single_layers=0)[2])},
    "Flux2Pipeline": FLUX2 | {"tokenizer": ("transformers", "PixtralProcessor"), "text_encoder": ("transformers", "Mistral3ForConditionalGeneration", {
        "text_config": llm("", layers=31)[2] | {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 64, "patch_size": 4}})},
    "Flux2KleinPipeline": FLUX2 | {"tokenizer": ANY_TOKENS, "text_encoder": llm("Qwen3ForCausalLM", layers=28), "is_distilled": False},
    "QwenImagePipeline": QWEN, "QwenImageImg2ImgPipeline": QWEN, "QwenImageInpaintPipeline": QWEN,
    "QwenImageEditPipeline": QWEN | {"processor": ("transformers", "Qwen2VLProcessor")},
    "QwenImageEditPlusPipeline": QWEN | {"processor": ("transformers", "Qwen2VLProcessor")},
    "ZImagePipeline": {"scheduler": FLOW, "vae": kl(16, KL8, shift_factor=0.0), "text_encoder": llm("Qwen3Model"), "tokenizer": ANY_TOKENS,
                       "transformer": ("diffusers", "ZImageTransformer2DModel", {"in_channels": 16, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
                                       "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]})},
    "ChromaPipeline": {"scheduler": FLOW, "vae": kl(4, (32, 32), shift_factor=0.0), "text_encoder": t5(), "tokenizer": T5_TOKENS,
                       "transformer": ("diffusers", "ChromaTransformer2DModel", {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                                       "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8], "approximator_num_channels": 8,
                                       "approximator_hidden_dim": 16, "approximator_layers": 1}), "image_encoder": NONE, "feature_extractor": NONE},
    "HiDreamImagePipeline": {"scheduler": scheduler("FlowMatchLCMScheduler"), "vae": kl(4, (32, 32, 32, 32), shift_factor=0.0),
        "text_encoder": clip_text(projected=True, max_position_embeddings=248), "tokenizer": CLIP_TOKENS,
        "text_encoder_2": clip_text(projected=True, max_position_embeddings=248), "tokenizer_2": CLIP_TOKENS, "text_encoder_3": t5(),
        "tokenizer_3": T5_TOKENS, "text_encoder_4": llm("LlamaForCausalLM"), "tokenizer_4": ("transformers", "PreTrainedTokenizerFast"),
        "transformer": ("diffusers", "HiDreamImageTransformer2DModel", {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
                        "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [32, 32], "text_emb_dim": 64, "axes_dims_rope": [4, 2, 2],
                        "max_resolution": [32, 32], "llama_layers": [0, 1], "num_routed_experts": 2, "num_activated_experts": 2})},
    "SanaPipeline": SANA, "SanaSprintPipeline": SANA | {"transformer": (*SANA["transformer"][:2], SANA["transformer"][2] | {"guidance_embeds": True}), "scheduler": scheduler("SCMScheduler")},
    "AuraFlowPipeline": {"scheduler": FLOW, "vae": kl(4, KL8), "tokenizer": T5_TOKENS, "text_encoder": t5("UMT5EncoderModel"),
                         "transformer": ("diffusers", "AuraFlowTransformer2DModel", {"sample_size": 32, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
                                         "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
                                         "joint_attention_dim": 32, "pos_embed_max_size": 256})},
    "CogView4Pipeline": {"scheduler": SHIFTED, "vae": kl(4, KL8), "tokenizer": ("transformers", "PreTrainedTokenizerFast"), "text_encoder": llm("GlmModel"),
                         "transformer": ("diffusers", "CogView4Transformer2DModel", {"patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4,
                                         "num_attention_heads": 4, "out_channels": 4, "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4})},
    "Lumina2Pipeline": {"scheduler": FLOW, "vae": kl(4, KL8, shift_factor=0.0), "tokenizer": ANY_TOKENS, "text_encoder": llm("Gemma2Model"),
                        "transformer": ("diffusers", "Lumina2Transformer2DModel", {"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 8, "num_layers": 1,
                                        "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 16, "cap_feat_dim": 32, "axes_dim_rope": [4, 2, 2],
                                        "axes_lens": [300, 128, 128]})},
    "HunyuanDiTPipeline": {"scheduler": scheduler("DDPMScheduler"), "vae": kl(4, KL8), "tokenizer": ("transformers", "BertTokenizer"),
                           "text_encoder": ("transformers", "BertModel", {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 1000}),
                           "tokenizer_2": ("transformers", "T5Tokenizer"), "text_encoder_2": t5("T5EncoderModel"), "safety_checker": NONE, "feature_extractor": NONE,
                           "requires_safety_checker": False,
                           "transformer": ("diffusers", "HunyuanDiT2DModel", {"sample_size": 16, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
                                           "in_channels": 4, "cross_attention_dim": 24, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16, "hidden_size": 24})},
    "PixArtSigmaPipeline": PIXART,  # the older one takes no other sizes than 32, 64 and 128 latents
    "PixArtAlphaPipeline": PIXART | {"vae": kl(), "transformer": (*PIXART["transformer"][:2], PIXART["transformer"][2] | {"sample_size": 32})},
    "KandinskyV22Pipeline": KANDINSKY22, "KandinskyV22PriorPipeline": PRIOR,
    "KandinskyV22CombinedPipeline": KANDINSKY22 | {f"prior_{name.removeprefix('prior_')}": part for name, part in PRIOR.items()},
    "Kandinsky5T2IPipeline": KANDINSKY5 | {"vae": kl(4, KL8)}, "Kandinsky5T2VPipeline": KANDINSKY5 | {"vae": HUNYUAN_VAE},
    "WanPipeline": WAN | {"transformer": wan(), "transformer_2": wan(), "boundary_ratio": 0.875},
    "WanImageToVideoPipeline": WAN | {"transformer": wan(in_channels=36, image_dim=4, added_kv_proj_dim=24), "image_encoder": vision("CLIPVisionModel", 4, num_attention_heads=2),
                                      "image_processor": PIXELS, "transformer_2": NONE},
    "LTXPipeline": LTX, "LTXImageToVideoPipeline": LTX,
    "HunyuanVideoPipeline": {"text_encoder": llm("LlamaModel"), "tokenizer": ("transformers", "LlamaTokenizerFast"), "transformer": hunyuan(), "vae": HUNYUAN_VAE,
                             "scheduler": FLOW, "text_encoder_2": clip_text(), "tokenizer_2": CLIP_TOKENS},
    "CogVideoXPipeline": cogvideo(), "CogVideoXImageToVideoPipeline": cogvideo(8, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=False),
    "StableVideoDiffusionPipeline": SVD, "AnimateDiffPipeline": ANIMATED,
    "MochiPipeline": {"scheduler": FLOW, "text_encoder": t5(), "tokenizer": T5_TOKENS,
                      "vae": ("diffusers", "AutoencoderKLMochi", {"latent_channels": 12, "out_channels": 3, "encoder_block_out_channels": [32] * 4, "decoder_block_out_channels": [32] * 4,
                              "layers_per_block": [1] * 5}),
                      "transformer": ("diffusers", "MochiTransformer3DModel", {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
                                      "pooled_projection_dim": 16, "in_channels": 12, "text_embed_dim": 32, "time_embed_dim": 4})}}


def network_config(library, cls, settings):
    "The full configuration of a network, as its folder has it."
    found = getattr(import_module(library), cls)
    if library == "transformers": return found.config_class(**settings).to_dict() | {"architectures": [cls]}
    with torch.device("meta"): network = found(**settings)
    return {name: value for name, value in network.config.items()} | {"_class_name": cls}


def write_pipeline(kind, folder):
    "Write the folder of a tiny pipeline."
    folder, index = Path(folder), {"_class_name": kind, "_diffusers_version": "0.42.1"}
    for name, part in PIPELINES[kind].items():
        if not isinstance(part, tuple):
            index[name] = part
            continue
        library, cls, *settings = part
        index[name] = [library, cls]
        if not settings: continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        is_scheduler = "Scheduler" in cls
        config = settings[0] | {"_class_name": cls} if is_scheduler else network_config(library, cls, settings[0])
        file = "scheduler_config.json" if is_scheduler else "config.json"
        (folder / name / file).write_text(json.dumps(config, default=str), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


KINDS = {  # what a call takes: the class of a pipeline
    "text, SD": "StableDiffusionPipeline", "image, SD": "StableDiffusionImg2ImgPipeline", "mask, SD": "StableDiffusionInpaintPipeline",
    "control image, SD": "StableDiffusionControlNetPipeline", "text, SDXL": "StableDiffusionXLPipeline", "image, SDXL": "StableDiffusionXLImg2ImgPipeline",
    "mask, SDXL": "StableDiffusionXLInpaintPipeline", "control image, SDXL": "StableDiffusionXLControlNetPipeline", "text, FLUX": "FluxPipeline",
    "image, FLUX": "FluxImg2ImgPipeline", "mask, FLUX": "FluxInpaintPipeline", "edit, FLUX": "FluxKontextPipeline", "text, SD3": "StableDiffusion3Pipeline",
    "text, PixArt": "PixArtAlphaPipeline", "video, Wan": "WanPipeline"}


def random_network(part):
    "The network of a folder, with random weights."
    torch.manual_seed(0)
    network = build_network(network_class(part), part)
    if hasattr(network, "tie_weights"): network.tie_weights()
    return network.float().eval().requires_grad_(False)


def small_tokenizer(cls):
    "A tokenizer: the one of the small SDXL, or one such as T5's that knows a few letters."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPTokenizer, T5TokenizerFast
    if cls == "CLIPTokenizer": return CLIPTokenizer.from_pretrained(bundled_folder(KNOWN["tiny-sdxl"]) / "tokenizer")
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), *((piece, -2.) for piece in "▁ a b c d e f g h i k l m n o p r s t u ▁a ▁red ▁dress".split())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512)


def save(kind, folder):
    "A pipeline of one of the `KINDS`, or of a class, that can be loaded and called."
    write_pipeline(KINDS.get(kind, kind), folder)
    for name, part in PIPELINES[KINDS.get(kind, kind)].items():
        if not isinstance(part, tuple) or part == NONE or "Scheduler" in part[1]: continue
        made = small_tokenizer(part[1]) if "Tokenizer" in part[1] else random_network(folder / name)
        made.save_pretrained(folder / name)
    return folder


class Processor:
    "A tokenizer, and what a processor of transformers puts around it; the real ones need torchvision."
    def __init__(self, tokenizer): self.tokenizer = tokenizer

    def apply_chat_template(self, chats, padding, max_length, truncation, **_):
        texts = [" ".join(part["text"] for message in chat for part in message["content"]) for chat in chats]
        return self.tokenizer(texts, padding=padding, max_length=max_length, truncation=truncation, return_tensors="pt")

    def __call__(self, text, images=None, videos=None, **options):
        from transformers import BatchFeature
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        if images is None: return self.tokenizer(text, **options)
        seen = Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=56**2)(images, return_tensors="pt")
        before, after = (self.tokenizer(half)["input_ids"] for half in text[0].split("<|image_pad|>"))
        ids = torch.tensor([before + [151655] * (int(seen["image_grid_thw"].prod()) // 4) + after])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)} | dict(seen))


def assemble(kind, folder):
    "A pipeline of a class whose processor is a `Processor`; the folder gets its configurations."
    import diffusers
    write_pipeline(kind, folder)
    parts = {}
    for name, part in PIPELINES[kind].items():
        if not isinstance(part, tuple) or part == NONE: parts[name] = None if part == NONE else part
        elif "Scheduler" in part[1]: parts[name] = getattr(diffusers, part[1])(**part[2])
        elif "Processor" in part[1]: parts[name] = Processor(small_tokenizer("T5TokenizerFast"))
        else: parts[name] = small_tokenizer(part[1]) if "Tokenizer" in part[1] else random_network(folder / name)
    pipeline = getattr(diffusers, kind)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
