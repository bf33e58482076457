"""Train the tiny models that stand in for downloaded checkpoints, in the very formats that their libraries load.

    python -m demo.standins --data runs/demo/shapes --output runs/demo/standins

OUTPUT/clip loads as `open_clip.create_model_and_transforms("local-dir:OUTPUT/clip")`, OUTPUT/gpt2 through transformers'
`AutoModelForCausalLM` and `AutoTokenizer`, OUTPUT/llava through `AutoModelForImageTextToText` and `AutoProcessor`. They
learn from the drawn training scenes alone, in about five minutes on two CPU cores; a folder made from the same scenes
with the same settings is left as it is.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common.config import run
from common.files import write_json
from data.annotations import find_data, read_annotations
from data.instances import read_instances
from demo.shapes import make_folder, named_pairs
from metrics.grounding import cover_on_grid
from models.packing import pack_rows, packed_hidden
from models.vlm import PROMPT, chat_prompt

VISION = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32, "pool_type": "avg"}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
CLIP = {"embed_dim": 128, "vision_cfg": VISION, "text_cfg": TEXT}
GPT2 = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256}
LLAMA = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
# LLaVA-1.5's, but for the line break behind the image, which so small a vocabulary does not hold
TURN = "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
TURNS = "{% for message in messages %}USER: {% for part in message['content'] %}" + TURN + "{% endfor %}{% endfor %}"
CHAT_TEMPLATE = TURNS + " ASSISTANT:"
VOCABULARY, EOS, IGNORED = 512, "<|endoftext|>", -100  # IGNORED is the label that cross-entropy leaves out


@dataclass(frozen=True)
class Config:
    data: Path
    """Folder that `python -m demo.shapes` has drawn."""
    output: Path
    """Folder to write `clip/`, `gpt2/` and `llava/` into."""
    clip_steps: PositiveInt = 400
    """Training steps of the CLIP, 64 scenes each."""
    gpt2_steps: PositiveInt = 200
    """Training steps of the GPT-2, 64 captions each."""
    llava_steps: PositiveInt = 700
    """Training steps of the LLaVA, all captions of 16 scenes each."""
    seed: NonNegativeInt = 0
    """Seed of the weights and of the order of the scenes."""
    overwrite: bool = False
    """Train anew where the models are there already."""


def read_split(root: Path) -> tuple[list[Path], list[list[str]]]:
    """The training photos and the captions of each. Raises UserError for what is missing."""
    photos = read_annotations(*find_data(root, "train"))
    return [photo.path for photo in photos], [list(photo.captions) for photo in photos]


def fit(model: nn.Module, loss_of: Callable, count: int, steps: int, lr: float, label: str, batch_size: int = 64):
    """Minimise `loss_of(batch)` over shuffled batches of indices below `count`, behind a progress bar.

    AdamW; the learning rate rises to `lr` over the first tenth of the steps and falls along a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    size = min(batch_size, count)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in (bar := tqdm(range(steps), desc=label, unit="step")):
        if len(order) < size:
            order = torch.randperm(count)
        batch, order = order[:size], order[size:]
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


# ------------------------------------------------------------------------------------------- CLIP


def contrastive_loss(logits: torch.Tensor, scenes: list[frozenset]) -> torch.Tensor:
    """CLIP's symmetric loss over (N, N) logits; photos that show the same things are not held against each other."""
    same = torch.tensor([[one == two for two in scenes] for one in scenes]).fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def read_patches(root: Path) -> tuple[torch.Tensor, list[str]]:
    """What each patch of the training scenes shows, (scenes, P) indices of names, and the names, background last.

    A patch shows a thing that covers two fifths of it; patches that it covers less are left out of the loss.
    """
    instances = read_instances(root / "instances_train.json")
    place = {name: number for number, name in enumerate(instances.categories)}
    side = VISION["image_size"] // VISION["patch_size"]
    shows = np.full((len(instances.objects), side * side), len(place))
    for row, stem in zip(shows, tqdm(instances.objects, desc="masks", unit="scene")):
        for name, mask in instances.masks(stem).items():
            cover = cover_on_grid(mask, (0, 0, *mask.shape[::-1]), (side, side))
            row[cover > 0] = np.where(cover >= 0.4, place[name], IGNORED)[cover > 0]
    return torch.from_numpy(shows), [*place, "background"]


def train_clip(folder: Path, root: Path, steps: int) -> None:
    """Train a CLIP (Radford et al. 2021) on the training scenes; write open_clip's `local-dir:` form.

    A photo tower of 4 layers and width 128 over 8 px patches, a smaller text tower, CLIP's own tokenizer. Scenes learn
    against captions, one caption a scene and step, and patches against the names of what they show: a CLIP of 400
    million photos has patches that know what they show, one of 3,000 must be told.
    """
    import open_clip
    from safetensors.torch import save_file

    normal = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    write_json(folder / "open_clip_config.json", {"model_cfg": CLIP, "preprocess_cfg": normal})
    model = open_clip.model.CLIP(**CLIP)
    model.visual.output_tokens = True
    preprocess = open_clip.image_transform(VISION["image_size"], is_train=False, **normal)
    tokenize = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])

    photos, captions = read_split(root)
    pixels = torch.stack([preprocess(Image.open(photo)) for photo in tqdm(photos, desc="reading", unit="scene")])
    shows, names = read_patches(root)
    name_tokens = tokenize([f"a {name}" for name in names])
    caption_tokens = [tokenize(texts) for texts in captions]  # (captions of the scene, 32) each
    contents = [frozenset(pair for text in texts for pair in named_pairs(text)) for texts in captions]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        own = torch.stack([caption_tokens[i][torch.randint(len(caption_tokens[i]), ())] for i in batch])
        texts = model.encode_text(torch.cat([own, name_tokens]), normalize=True)
        photo, patches = model.visual(pixels[batch])  # (B, D), (B, P, width)
        scale, known = model.logit_scale.exp(), shows[batch] != IGNORED
        logits = scale * F.normalize(photo, dim=-1) @ texts[: len(batch)].T
        of_scenes = contrastive_loss(logits, [contents[i] for i in batch])
        seen, right = F.normalize(patches[known] @ model.visual.proj, dim=-1), shows[batch][known]
        of_patches = F.cross_entropy(scale * seen @ texts[len(batch) :].T, right, reduction="none")
        empty = right == len(names) - 1
        return of_scenes + of_patches[~empty].mean() + 0.3 * of_patches[empty].mean()  # most patches are empty

    fit(model, loss_of, len(photos), steps, lr=1e-3, label="CLIP")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


# ------------------------------------------------------------------------------------------- GPT-2


def train_tokenizer(captions: list[str]):
    """GPT-2's kind of tokenizer, byte-level BPE, with its merges learnt from the captions; EOS also pads."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe, ends = ByteLevelBPETokenizer(), {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
    bpe.train_from_iterator(captions, VOCABULARY, min_frequency=2, special_tokens=[EOS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **ends)


def train_gpt2(folder: Path, captions: list[str], steps: int) -> None:
    """Train a GPT-2 (Radford et al. 2019) on `EOS caption EOS`; write transformers' own form, tokenizer included.

    Captions start at random positions, so that every position embedding is learnt: behind an image they start late.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = train_tokenizer(captions)
    eos = tokenizer.eos_token_id
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **GPT2))
    model.generation_config.pad_token_id = eos
    rows = tokenizer(captions)["input_ids"]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        packed = pack_rows([[rows[i]] for i in batch], eos)
        starts = torch.randint(GPT2["n_positions"] - packed.positions.shape[1], (len(batch), 1))
        logits = model(input_ids=packed.input_ids, position_ids=starts + packed.positions).logits  # (B, L, V)
        return F.cross_entropy(logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)

    fit(model, loss_of, len(rows), steps, lr=2e-3, label="GPT-2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------- LLaVA


def train_llava_tokenizer(captions: list[str]):
    """Llama's kind of tokenizer, SentencePiece BPE, with its merges learnt from the captions and the prompt."""
    from tokenizers import SentencePieceBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    texts = captions + [f"USER: {PROMPT} ASSISTANT:"] * 200  # often enough for whole words
    bpe, names = SentencePieceBPETokenizer(), [*special.values(), "<image>"]
    bpe.train_from_iterator(texts, VOCABULARY, special_tokens=names, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, additional_special_tokens=["<image>"], **special)


def llava_processor(tokenizer, image_size: int, patch_size: int, **normal):
    """LLaVA-1.5's processor: short edge to `image_size`, centre crop, and an image token for every patch."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    crop = {"height": image_size, "width": image_size}
    images = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop, **normal)
    counts = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, patch_size=patch_size, chat_template=CHAT_TEMPLATE, **counts)


def build_llava(tokenizer, vision: dict, text: dict, layer: int = -2):
    """A LLaVA with random weights: a CLIP tower and a Llama of these shapes; patch features from its `layer`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"vocab_size": len(tokenizer)} | text | ids
    parts = {"vision_config": CLIPVisionConfig(**vision), "text_config": LlamaConfig(**text)}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(**parts, image_token_index=image, vision_feature_layer=layer)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(**ids)
    return model


VISION_NAMES = (  # open_clip's, transformers'
    ("conv1", "embeddings.patch_embedding"), ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_pre", "pre_layrnorm"),
    ("transformer.resblocks", "encoder.layers"), ("ln_post", "post_layernorm"), ("ln_", "layer_norm"),
    (".attn.", ".self_attn."), ("c_fc", "fc1"), ("c_proj", "fc2"),
)  # fmt: skip


def vision_weights(visual: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of open_clip's photo tower under the names of transformers' CLIPVisionModel."""
    weights = {}
    for name, tensor in visual.state_dict().items():
        for theirs, ours in VISION_NAMES:
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            weights |= {name.replace("in_proj_", f"{part}_proj."): third for part, third in zip("qkv", tensor.chunk(3))}
        elif name != "proj":
            weights[name] = tensor
    return weights


def train_llava(folder: Path, clip: Path, root: Path, steps: int) -> None:
    """Train a LLaVA (Liu et al. 2023) of the CLIP's photo tower, frozen, and a small Llama; write transformers' form.

    Projector and Llama learn at once, from the prompt and all captions of a scene in one row.
    """
    import open_clip

    photos, captions = read_split(root)
    tokenizer = train_llava_tokenizer([text for texts in captions for text in texts])
    image, eos = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id
    width, size = VISION["width"], {name: VISION[name] for name in ("image_size", "patch_size")}
    vision = size | {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": VISION["layers"]}
    vision |= {"num_attention_heads": width // VISION["head_width"], "hidden_act": "gelu"}
    model = build_llava(tokenizer, vision, LLAMA, layer=-1)
    judge, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    parts = model.model
    parts.vision_tower.load_state_dict(vision_weights(judge.visual))
    parts.vision_tower.requires_grad_(False)
    normal = {"image_mean": open_clip.OPENAI_DATASET_MEAN, "image_std": open_clip.OPENAI_DATASET_STD}
    processor = llava_processor(tokenizer, **size, **normal)

    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(photo)) for photo in tqdm(photos, desc="reading", unit="scene")])
        features = torch.cat([parts.vision_tower(some).last_hidden_state[:, 1:] for some in pixels.split(64)])
    prompt = tokenizer(chat_prompt(processor, PROMPT))["input_ids"]
    place, rows = prompt.index(image), [tokenizer(texts)["input_ids"] for texts in captions]
    embed = model.get_input_embeddings()

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        patches = parts.multi_modal_projector(features[batch])  # (B, P, D)
        prefix = embed(torch.tensor(prompt[:-1])).expand(len(batch), -1, -1)
        prefix = torch.cat([prefix[:, :place], patches, prefix[:, place + 1 :]], dim=1)
        packed, length = pack_rows([rows[i] for i in batch], eos, first=prompt[-1]), prefix.shape[1]
        hidden = packed_hidden(parts.language_model, prefix, packed)[:, length:].flatten(0, 1)
        return F.cross_entropy(model.lm_head(hidden[packed.supervised]), packed.labels.flatten()[packed.supervised])

    fit(model, loss_of, len(photos), steps, lr=2e-3, label="LLaVA", batch_size=16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> None:
    every_caption = [text for texts in read_split(cfg.data)[1] for text in texts]
    drawn = {"scenes": hashlib.sha256((cfg.data / "train.json").read_bytes()).hexdigest(), "seed": cfg.seed}
    clip = drawn | {"steps": cfg.clip_steps, "model": CLIP}
    gpt2 = drawn | {"steps": cfg.gpt2_steps, "model": GPT2, "vocabulary": VOCABULARY}
    llava = drawn | {"steps": cfg.llava_steps, "model": LLAMA, "clip": clip}
    for name, settings, train in (
        ("clip", clip, lambda part: train_clip(part, cfg.data, cfg.clip_steps)),
        ("gpt2", gpt2, lambda part: train_gpt2(part, every_caption, cfg.gpt2_steps)),
        ("llava", llava, lambda part: train_llava(part, cfg.output / "clip", cfg.data, cfg.llava_steps)),
    ):
        torch.manual_seed(cfg.seed)
        make_folder(cfg.output / name, settings, cfg.overwrite, train)
        print(f"{cfg.output / name}: trained on the scenes of {cfg.data}")


if __name__ == "__main__":
    run(main, Config)
