"Tiny random pipelines of every kind, saved as folders: networks of some thousand weights, tokenizers of a few words."
from pathlib import Path
from typing import Any

import torch
from devsky_nb.hub.locate import bundled_folder
from devsky_nb.hub.models import KNOWN

SIDE = 64  # pixels
BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 32}


def text_tokenizer() -> Any:
    "A tokenizer such as T5's, which knows a few letters."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import T5TokenizerFast
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), *((piece, -2.) for piece in "▁ a b c d e f g h i k l m n o p r s t u ▁a ▁red ▁dress".split())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512)


def t5(kind: str = "T5") -> Any:
    import transformers
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip_text(projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    tokenizer = clip_tokenizer()
    options = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if projection is None: return CLIPTextModel(CLIPTextConfig(**options))
    return CLIPTextModelWithProjection(CLIPTextConfig(**options, projection_dim=projection))


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(bundled_folder(KNOWN["tiny-sdxl"]) / "tokenizer")


def vae(latents: int = 4, **options: Any) -> Any:
    from diffusers import AutoencoderKL
    blocks = len(BLOCKS["block_out_channels"])
    return AutoencoderKL(latent_channels=latents, down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
                         sample_size=SIDE, **BLOCKS, **options)


def unet(channels: int = 4, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(in_channels=channels, out_channels=4, sample_size=SIDE // 2, cross_attention_dim=32, attention_head_dim=8,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                                **BLOCKS, **options)


def stable_diffusion(kind: str, channels: int = 4, **more: Any) -> Any:
    import diffusers
    parts = {"vae": vae(), "unet": unet(channels), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(), "scheduler": diffusers.DDIMScheduler(),
             "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, kind)(**parts | {name: make(parts["unet"]) for name, make in more.items()})


def xl(kind: str, **more: Any) -> Any:
    import diffusers
    net = unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32)
    net.register_to_config(cross_attention_dim=32)
    parts = {"vae": vae(force_upcast=True), "unet": net, "text_encoder": None, "text_encoder_2": clip_text(32), "tokenizer": None,
             "tokenizer_2": clip_tokenizer(), "scheduler": diffusers.EulerDiscreteScheduler()}
    return getattr(diffusers, kind)(**parts | {name: make(net) for name, make in more.items()})


def controlnet(net: Any) -> Any:
    from diffusers import ControlNetModel
    return ControlNetModel.from_unet(net, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32))


def flux(kind: str, channels: int = 16, **more: Any) -> Any:
    import diffusers
    net = diffusers.FluxTransformer2DModel(patch_size=1, in_channels=channels, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                           joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True)
    parts = {"vae": vae(shift_factor=0., scaling_factor=1., use_quant_conv=False, use_post_quant_conv=False), "transformer": net,
             "text_encoder": clip_text(), "tokenizer": clip_tokenizer(), "text_encoder_2": t5(), "tokenizer_2": text_tokenizer(),
             "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return getattr(diffusers, kind)(**parts | {name: make(net) for name, make in more.items()})


def sd3(kind: str) -> Any:
    import diffusers
    net = diffusers.SD3Transformer2DModel(sample_size=SIDE // 2, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
                                          joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4, pos_embed_max_size=64)
    parts = {"vae": vae(shift_factor=0., scaling_factor=1., use_quant_conv=False, use_post_quant_conv=False), "transformer": net,
             "text_encoder": clip_text(32), "text_encoder_2": clip_text(32), "text_encoder_3": t5(), "tokenizer": clip_tokenizer(),
             "tokenizer_2": clip_tokenizer(), "tokenizer_3": text_tokenizer(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return getattr(diffusers, kind)(**parts)


def pixart(kind: str) -> Any:
    import diffusers
    net = diffusers.PixArtTransformer2DModel(sample_size=SIDE // 2, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
                                             caption_channels=32, cross_attention_dim=32, out_channels=8, use_additional_conditions=False)
    return getattr(diffusers, kind)(transformer=net, vae=vae(), text_encoder=t5(), tokenizer=text_tokenizer(), scheduler=diffusers.DPMSolverMultistepScheduler())


def wan(kind: str) -> Any:
    import diffusers
    net = diffusers.WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
                                          freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32)
    decoder = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    return getattr(diffusers, kind)(transformer=net, vae=decoder, text_encoder=t5("UMT5"), tokenizer=text_tokenizer(),
                                    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.))


KINDS = {  # what a call takes: how a pipeline of that kind is made
    "text, SD": lambda: stable_diffusion("StableDiffusionPipeline"), "image, SD": lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
    "mask, SD": lambda: stable_diffusion("StableDiffusionInpaintPipeline", 9),
    "control image, SD": lambda: stable_diffusion("StableDiffusionControlNetPipeline", controlnet=controlnet),
    "text, SDXL": lambda: xl("StableDiffusionXLPipeline"), "image, SDXL": lambda: xl("StableDiffusionXLImg2ImgPipeline"),
    "mask, SDXL": lambda: xl("StableDiffusionXLInpaintPipeline"), "control image, SDXL": lambda: xl("StableDiffusionXLControlNetPipeline", controlnet=controlnet),
    "text, FLUX": lambda: flux("FluxPipeline"), "image, FLUX": lambda: flux("FluxImg2ImgPipeline"), "mask, FLUX": lambda: flux("FluxInpaintPipeline"),
    "edit, FLUX": lambda: flux("FluxKontextPipeline"),
    "text, SD3": lambda: sd3("StableDiffusion3Pipeline"), "text, PixArt": lambda: pixart("PixArtAlphaPipeline"), "video, Wan": lambda: wan("WanPipeline")}


def save(kind: str, folder: Path) -> Path:
    "A pipeline of a kind, as a folder."
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    return folder
