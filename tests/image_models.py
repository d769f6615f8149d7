"Small random checkpoints of every family that embeds images, saved as the Hub holds them."
import json
from pathlib import Path

import torch, transformers as T
from tokenizers import models, pre_tokenizers, processors, Tokenizer

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SEEING = dict(SMALL, image_size=32, patch_size=8)
WORDS = ["a", "red", "blue", "dress", "jeans", "photo", "of", "this", "is", "coat", "green", "hat", "."]


def save_tokenizer(folder, begin=None, end="</s>", pad="<pad>", tokenizer_class=None, **more):
    "A tokenizer that knows a few words; the end of a text has the highest number, as CLIP's has."
    special = [pad, "<unk>", *([begin] if begin else [])]
    vocabulary = {word: n for n, word in enumerate([*special, *WORDS, end])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{begin or ''} $A {end}".strip()
    named = [(name, vocabulary[name]) for name in (begin, end) if name]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    fast = T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad, unk_token="<unk>", bos_token=begin, **more)
    fast.save_pretrained(folder)
    if tokenizer_class:
        file = Path(folder, "tokenizer_config.json")
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": tokenizer_class}), encoding="utf-8")
    return len(vocabulary)


def clip(folder, config=T.CLIPConfig, model=T.CLIPModel, **text):
    n = save_tokenizer(folder, begin="<s>")
    text_config = dict(SMALL, vocab_size=n, eos_token_id=n - 1, bos_token_id=2, pad_token_id=0, max_position_embeddings=20,
                       projection_dim=24) | text
    network = model(config(text_config=text_config, vision_config=dict(SEEING, projection_dim=24), projection_dim=24))
    save(network, folder)
    T.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


def clip_vision_model(folder):
    save(T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**SEEING, projection_dim=24)), folder)
    T.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


def metaclip_2(folder): clip(folder, T.MetaClip2Config, T.MetaClip2Model)


def altclip(folder): clip(folder, T.AltCLIPConfig, T.AltCLIPModel, project_dim=24, max_position_embeddings=21)


def chinese_clip(folder):
    clip(folder, T.ChineseCLIPConfig, T.ChineseCLIPModel)
    T.ChineseCLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)


def siglip(folder, tokenizer_class=None):
    n = save_tokenizer(folder, tokenizer_class=tokenizer_class, model_input_names=["input_ids"])
    config = T.SiglipConfig(text_config=dict(SMALL, vocab_size=n, max_position_embeddings=16), vision_config=SEEING)
    save(T.SiglipModel(config), folder)
    T.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def siglip_vision_model(folder):
    save(T.SiglipVisionModel(T.SiglipVisionConfig(**SEEING)), folder)
    T.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def siglip2(folder):
    "NaFlex: images in their own proportions; a tokenizer of letters, of the class that its family has."
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz.", "▁"]
    tokenizer = T.Siglip2Tokenizer(vocab={letter: n for n, letter in enumerate(letters)}, merges=[], padding_side="right")
    tokenizer.save_pretrained(folder)
    n = len(letters)
    config = T.Siglip2Config(text_config=dict(SMALL, vocab_size=n, max_position_embeddings=32),
                             vision_config=dict(SMALL, patch_size=8, num_patches=16))
    save(T.Siglip2Model(config), folder)
    T.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20).save_pretrained(folder)


def dinov2(folder, config=T.Dinov2Config, model=T.Dinov2Model):
    save(model(config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14)), folder)
    T.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def dinov2_with_registers(folder): dinov2(folder, T.Dinov2WithRegistersConfig, T.Dinov2WithRegistersModel)


def dinov3_vit(folder):
    save(T.DINOv3ViTModel(T.DINOv3ViTConfig(**SEEING, num_register_tokens=4)), folder)
    described = {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "size": {"height": 32, "width": 32},
                 "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                 "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    Path(folder, "preprocessor_config.json").write_text(json.dumps(described), encoding="utf-8")


def vit(folder):
    "As most of them are published: a classifier, without the pooler that the bare network would want."
    save(T.ViTForImageClassification(T.ViTConfig(**SEEING)), folder)
    T.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def save(network, folder):
    "Weights that differ from each other, so that no layer is without effect."
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 1 and "logit" not in name: weight.add_(torch.randn_like(weight) * .1)
    network.eval().save_pretrained(folder)


SAVED = {function.__name__: function for function in (clip, clip_vision_model, metaclip_2, altclip, chinese_clip, siglip,
                                                      siglip_vision_model, siglip2, dinov2, dinov2_with_registers, dinov3_vit, vit)}


def save_model(kind, folder):
    "A checkpoint of a kind, always the same."
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    SAVED[kind](Path(folder))
    return Path(folder)
