"""Each config builds what its lines name: networks without weights, hub ids of models that the libraries load."""

from pathlib import Path

import pytest
import timm
import transformers
import yaml

import p2_train
from common.config import parse_config
from models.captioner import CaptionerConfig, build_captioner
from models.training import parts_of

CONFIGS = {file.stem: file for file in Path("configs").glob("*.yaml")}
TRAIN = sorted(name for name in CONFIGS if "p2_train.py" in CONFIGS[name].read_text().splitlines()[0])
SHAPES = {  # what the hub's config.json says of the language models
    "HuggingFaceTB/SmolLM2-135M": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}, 134_515_008),
    "Qwen/Qwen2.5-0.5B": ("qwen2", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}, 494_032_768),
    "gpt2": ("gpt2", {}, 124_439_808),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TRAIN if name.startswith("today")])
def test_configs_of_today_build_and_their_weights_are_known_to_the_libraries(name, monkeypatch):
    cfg = parse_config(p2_train.Config, ["--config", str(CONFIGS[name])])
    p2_train.training.check_stage("align", cfg.align)
    assert f"{cfg.encoder.model}.{cfg.encoder.weights}" in timm.list_pretrained(cfg.encoder.model)
    kind, shape, parameters = SHAPES[cfg.decoder.model]
    assert kind in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    lm = transformers.AutoConfig.for_model(kind, **shape)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: lm)
    captioner = build_captioner(CaptionerConfig(cfg.encoder, cfg.projector, cfg.decoder, cfg.lora), load_weights=False)
    counts = {part: sum(p.numel() for _, p in found) for part, found in parts_of(captioner).items()}
    assert counts["decoder"] == parameters
    assert all(parameter.is_meta for parameter in captioner.parameters())
    width = lm.hidden_size
    assert counts["projector"] == (captioner.encoder.width + 1) * width + (width + 1) * width
    assert captioner.encoder.tokens == {"today_siglip_smollm2": 196, "today_dinov2_smollm2": 1370}.get(name, 261)


def test_the_published_names_are_known_to_the_libraries():
    import open_clip

    assert ("ViT-L-14-quickgelu", "openai") in open_clip.list_pretrained()
    assert ("ViT-B-32-quickgelu", "openai") in open_clip.list_pretrained()
    names = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert names["llava"] == "LlavaForConditionalGeneration"
    assert yaml.safe_load(CONFIGS["p1_llava"].read_text())["model"] == "llava-hf/llava-1.5-7b-hf"


def test_the_configs_of_ranks_differ_in_their_rank_alone():
    for start, published in (("p2_lora_r", True), ("shapes_r", False)):
        ranks = {rank: yaml.safe_load(CONFIGS[f"{start}{rank}"].read_text()) for rank in (8, 16, 32)}
        assert all(config["lora"].pop("rank") == rank for rank, config in ranks.items()), published
        assert ranks[8] == ranks[16] == ranks[32] and ranks[8]["lora"]["alpha"] == 64
