"""A tiny random model and its processor for each family of vision-language models, built in a tenth of a second."""

from collections.abc import Callable

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from models.vlm import PROMPT

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = SHAPE | {"num_key_value_heads": 2, "initializer_range": 0.3}
GEMMA = TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 4}
VISION = SHAPE | {"num_hidden_layers": 2, "image_size": 56, "patch_size": 14}
SIGLIP = VISION | {"vision_use_head": False}
QWEN_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
INTERLEAVED = ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
TILES = [[height, width] for height in (56, 112, 168) for width in (56, 112, 168)]
WORDS = f"{PROMPT} User: Assistant: . a red green blue yellow box wall dog cat man woman on in with street".split()


def tokenizer(*others: str, **special: str) -> t.PreTrainedTokenizerFast:
    """Words as tokens; `special` ones {attribute: token}, and `others` that have no attribute."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = dict.fromkeys([*names.values(), *special.values(), *others, *(f"▁{word}" for word in WORDS)])
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = t.PreTrainedTokenizerFast(tokenizer_object=core, **names, extra_special_tokens=special or None)
    made.add_tokens([*others], special_tokens=True)
    return made


def template(image: str) -> dict:
    """A chat template with `image` in the image's place."""
    part = "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
    turn = "{% for part in message['content'] %}" + part + "{% endfor %}"
    return {"chat_template": "{% for message in messages %}User: " + turn + "{% endfor %} Assistant:"}


def ids(tok) -> dict:
    return {"vocab_size": len(tok), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def square(side: int) -> dict:
    return {"size": {"height": side, "width": side}}


def llava(kind="Llava", **parts):
    tok, tiled = tokenizer(image_token="<image>"), kind == "LlavaNext"
    crop = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    look = t.LlavaNextImageProcessor(**crop, **parts) if tiled else t.CLIPImageProcessor(**crop)
    counts = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = (t.LlavaNextProcessor if tiled else t.LlavaProcessor)(look, tok, **counts, **template("<image>"))
    config = getattr(t, f"{kind}Config")(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT, **ids(tok)),
        image_token_index=tok.image_token_id, **parts,
    )  # fmt: skip
    return f"{kind}ForConditionalGeneration", config, processor


def llava_onevision():
    tok = tokenizer(image_token="<image>", video_token="<video>")
    processor = t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(**square(56), image_grid_pinpoints=TILES), tok, t.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
        **template("<image>"),
    )  # fmt: skip
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**SIGLIP), text_config=t.Qwen2Config(**TEXT, **ids(tok)),
        image_grid_pinpoints=TILES, image_token_index=tok.image_token_id, video_token_index=tok.video_token_id,
    )  # fmt: skip
    return "LlavaOnevisionForConditionalGeneration", config, processor


def mistral(kind="Mistral3", **parts):
    tok = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    merge = {"spatial_merge_size": 2} if kind == "Mistral3" else {}
    look = t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = t.PixtralProcessor(look, tok, patch_size=14, **merge, **template("[IMG]"))
    config = getattr(t, f"{kind}Config")(
        vision_config=t.PixtralVisionConfig(**VISION | {"image_size": 112}, head_dim=8), tie_word_embeddings=False,
        text_config=t.MistralConfig(**TEXT, head_dim=8, **ids(tok), sliding_window=None),
        image_token_index=processor.image_token_id, **merge, **parts,
    )  # fmt: skip
    return f"{kind}ForConditionalGeneration", config, processor


def idefics(kind="Idefics3"):
    tags = (f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
    special = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
    tok = tokenizer("<end_of_utterance>", *tags, **special, global_image_token="<global-img>")
    look = getattr(t, f"{kind}ImageProcessor")(size={"longest_edge": 168}, max_image_size={"longest_edge": 56})
    video = [t.SmolVLMVideoProcessor()] if kind == "SmolVLM" else []
    processor = getattr(t, f"{kind}Processor")(look, tok, *video, image_seq_len=4, **template("<image>"))
    config = getattr(t, f"{kind}Config")(
        vision_config=VISION, text_config=t.LlamaConfig(**TEXT, **ids(tok)), scale_factor=2, pad_token_id=3,
        image_token_id=processor.image_token_id,
    )  # fmt: skip
    return f"{kind}ForConditionalGeneration", config, processor


def internvl():
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = tokenizer(**special, video_token="<video>")
    look = t.GotOcr2ImageProcessor(**square(56), crop_to_patches=True, max_patches=6)
    place = template("<IMG_CONTEXT>")
    processor = t.InternVLProcessor(look, tok, t.InternVLVideoProcessor(), image_seq_length=4, **place)
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**VISION | {"image_size": (56, 56), "patch_size": (14, 14)}),
        text_config=t.Qwen2Config(**TEXT, **ids(tok)), image_token_id=tok.context_image_token_id, image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return "InternVLForConditionalGeneration", config, processor


def qwen(kind: str, patch: int, rope: dict, vision: dict, processor: str = "", video: str = "", **text):
    tok = tokenizer("<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    sizes = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (2 * patch) ** 2 * 40}
    look = t.Qwen2VLImageProcessor(size=sizes, patch_size=patch)
    made = getattr(t, processor or f"{kind}Processor")(
        look, tok, getattr(t, video or f"{kind}VideoProcessor")(),
        **template("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    at = tok.convert_tokens_to_ids
    config = getattr(t, f"{kind}Config")(
        text_config=TEXT | ids(tok) | {"rope_parameters": rope} | text, vision_config=vision,
        image_token_id=tok.image_token_id, video_token_id=tok.video_token_id,
        vision_start_token_id=at("<|vision_start|>"), vision_end_token_id=at("<|vision_end|>"),
    )  # fmt: skip
    return f"{kind}ForConditionalGeneration", config, made


def paligemma(text=t.GemmaConfig, **shape):
    tok = tokenizer(image_token="<image>")
    look = t.SiglipImageProcessor(**square(56))
    look.image_seq_length = 16
    config = t.PaliGemmaConfig(
        text_config=text(**TEXT, head_dim=8, **shape, **ids(tok)), projection_dim=32, hidden_size=32,
        vocab_size=len(tok), image_token_index=tok.image_token_id, tie_word_embeddings=False,
        vision_config=t.SiglipVisionConfig(**SIGLIP, projection_dim=32),
    )  # fmt: skip
    return "PaliGemmaForConditionalGeneration", config, t.PaliGemmaProcessor(look, tok)


def gemma3():
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tok = tokenizer(image_token="<image_soft_token>", **special)
    look = t.Gemma3ImageProcessor(**square(112))
    processor = t.Gemma3Processor(look, tok, image_seq_length=16, **template("<start_of_image>"))
    text = GEMMA | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**text, **ids(tok)), mm_tokens_per_image=16, initializer_range=0.3,
        vision_config=t.SiglipVisionConfig(**SIGLIP | {"image_size": 112}), image_token_index=tok.image_token_id,
        boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return "Gemma3ForConditionalGeneration", config, processor


def gemma4():
    special = {"boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>", "boa_token": "<|audio>"}
    tok = tokenizer(image_token="<|image|>", eoa_token="<audio|>", **special)
    look = t.Gemma4ImageProcessor(max_soft_tokens=70, patch_size=8, pooling_kernel_size=2)
    others = t.Gemma4AudioFeatureExtractor(), look, tok, t.Gemma4VideoProcessor()
    processor = t.Gemma4Processor(*others, image_seq_length=70, **template("<|image|>"))
    text = GEMMA | {"global_head_dim": 16, "sliding_window": 24, "hidden_size_per_layer_input": 4}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "use_bidirectional_attention": "vision"}
    vision = SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 8}
    config = t.Gemma4Config(
        text_config=t.Gemma4TextConfig(**text, vocab_size_per_layer_input=len(tok), **ids(tok)), audio_config=None,
        vision_config=t.Gemma4VisionConfig(**vision, pooling_kernel_size=2, position_embedding_size=64),
        boi_token_id=tok.boi_token_id, eoi_token_id=tok.eoi_token_id, image_token_id=tok.image_token_id,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return "Gemma4ForConditionalGeneration", config, processor


def lfm2():
    tags = (f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    special = {"image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    tok = tokenizer(*tags, image_token="<image>", image_thumbnail_token="<|img_thumbnail|>", **special)
    look = t.Lfm2VlImageProcessor(**square(64), tile_size=64, min_image_tokens=2, max_image_tokens=4, max_tiles=6)
    text = TEXT | {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "block_multiple_of": 16}
    vision = SHAPE | {"num_hidden_layers": 2, "patch_size": 16, "num_patches": 16, "vision_use_head": False}
    config = t.Lfm2VlConfig(
        vision_config=t.Siglip2VisionConfig(**vision), text_config=t.Lfm2Config(**text, **ids(tok)),
        image_token_id=tok.image_token_id, projector_hidden_size=48,
    )  # fmt: skip
    return "Lfm2VlForConditionalGeneration", config, t.Lfm2VlProcessor(look, tok, **template("<image>"))


def blip(kind="Blip2"):
    tok = tokenizer()
    toks = [tok] * (2 if kind == "InstructBlip" else 1)
    processor = getattr(t, f"{kind}Processor")(t.BlipImageProcessor(**square(56)), *toks, num_query_tokens=8)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
    opt = t.OPTConfig(**shape, word_embed_proj_dim=32, max_position_embeddings=256, init_std=0.3, **ids(tok))
    reader = SHAPE | {"num_hidden_layers": 2, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    config = getattr(t, f"{kind}Config")(
        vision_config=VISION, qformer_config=reader | {"vocab_size": len(tok)}, num_query_tokens=8,
        text_config=opt if kind == "Blip2" else t.LlamaConfig(**TEXT, **ids(tok)),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return f"{kind}ForConditionalGeneration", config, processor


QWEN3 = {"head_dim": 8}
QWEN3_5 = {
    "head_dim": 32, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
QWEN2_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2}
WINDOWS, DEEP = {"window_size": 56, "fullatt_block_indexes": [1]}, {"deepstack_visual_indexes": [0, 1]}
POSITIONS = {"num_position_embeddings": 64}
FAMILIES: dict[str, Callable] = {
    "llava": llava,
    "pixtral": lambda: mistral("Llava", vision_feature_layer=-1, vision_feature_select_strategy="full"),
    "llava_next": lambda: llava("LlavaNext", image_grid_pinpoints=TILES),
    "llava_onevision": llava_onevision,
    "mistral3": mistral,
    "idefics3": idefics,
    "smolvlm": lambda: idefics("SmolVLM"),
    "internvl": internvl,
    "qwen2_vl": lambda: qwen("Qwen2VL", 14, ROPE, QWEN2_VISION),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL", 14, ROPE, QWEN_VISION | WINDOWS, video="Qwen2VLVideoProcessor"),
    "qwen3_vl": lambda: qwen("Qwen3VL", 16, INTERLEAVED, QWEN_VISION | POSITIONS | DEEP, **QWEN3),
    "paligemma": paligemma,
    "gemma3": gemma3,
    "paligemma2": lambda: paligemma(t.Gemma2Config, query_pre_attn_scalar=8, sliding_window=64),
    "gemma4": gemma4,
    "qwen3_5": lambda: qwen(
        "Qwen3_5", 16, INTERLEAVED | {"partial_rotary_factor": 0.25}, QWEN_VISION | POSITIONS,
        "Qwen3VLProcessor", "Qwen3VLVideoProcessor", **QWEN3_5,
    ),
    "lfm2_vl": lfm2,
    "blip2": blip,
    "instructblip": lambda: blip("InstructBlip"),
    "vipllava": lambda: llava("VipLlava", vision_feature_layers=[-2, -1]),
}  # fmt: skip
HEATMAPS = tuple(FAMILIES)[:13]


def build(name: str) -> tuple[nn.Module, t.ProcessorMixin]:
    """The family's model, whose captions differ by photo, and its processor."""
    torch.manual_seed(0)
    kind, config, processor = FAMILIES[name]()
    model = getattr(t, kind)(config).eval()
    wide = ("projector", "connector", "merger", "language_projection", "embed_vision", "query_tokens")
    for part, weight in model.named_parameters():
        if weight.ndim > 1 and any(word in part for word in wide):
            nn.init.normal_(weight, std=1.0 if part.startswith("query") or "embed_vision" in part else 0.3)
        elif weight.ndim > 1 and "Blip" in kind and "language_model" not in part:  # its queries read little of a photo
            nn.init.normal_(weight, std=0.5)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return model, processor
