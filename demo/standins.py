"""Train the tiny models that stand in for downloaded checkpoints, in the very formats that their libraries load.

    python -m demo.standins --data runs/demo/shapes --output runs/demo/standins

OUTPUT/clip loads as `open_clip.create_model_and_transforms("local-dir:OUTPUT/clip")`, and OUTPUT/gpt2 through
transformers' `AutoModelForCausalLM` and `AutoTokenizer`. Both learn from the drawn training scenes alone, in about
two and a half minutes on one CPU core; a folder made from the same scenes with the same settings is left as it is.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from common import UserError, check, run, seed_everything, write_json
from demo.shapes import CELL, is_made, made_whole, named_pairs

CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32, "pool_type": "avg"},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
GPT2 = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256}
VOCABULARY = 512
EOS = "<|endoftext|>"
IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Config:
    data: Path
    """Folder that `python -m demo.shapes` has drawn."""
    output: Path
    """Folder to write `clip/` and `gpt2/` into."""
    things_steps: PositiveInt = 250
    """First training steps of the CLIP, 64 single things each."""
    scenes_steps: PositiveInt = 150
    """Last training steps of the CLIP, 64 whole scenes each."""
    gpt2_steps: PositiveInt = 200
    """Training steps of the GPT-2, 64 captions each."""
    seed: NonNegativeInt = 0
    """Seed of the weights and of the order of the scenes."""
    overwrite: bool = False
    """Train anew where the models are there already."""


def read_split(root: Path, split: str) -> tuple[list[Path], list[list[str]]]:
    """Photos of a split and the captions of each; a UserError names what is missing."""
    file = root / f"{split}.json"
    if not file.is_file():
        raise UserError(f"data: expected {file}, as `python -m demo.shapes` draws it; it is not there")
    content = json.loads(file.read_text(encoding="utf-8"))
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    photos = [root / "images" / split / image["file_name"] for image in content["images"]]
    check([f"data: {photo} is not there" for photo in photos if not photo.is_file()])
    return photos, list(captions.values())


def fit(model: torch.nn.Module, loss_of: Callable, count: int, steps: int, lr: float, label: str) -> None:
    """Minimise `loss_of(batch)` over shuffled batches of 64 indices below `count`, behind a progress bar.

    AdamW; the learning rate rises to `lr` over the first tenth of the steps and falls along a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    size = min(64, count)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    with tqdm(range(steps), desc=label, unit="step") as bar:
        for _ in bar:
            if len(order) < size:
                order = torch.randperm(count)
            batch, order = order[:size], order[size:]
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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


class KeptPatches(torch.nn.Module):
    """Stands where open_clip drops random patches: lets the tokens `keep` (B, K) through, or all where it is None."""

    keep: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, 1 + P, D) -> (B, K, D)
        if self.keep is None:
            return tokens
        return tokens.gather(1, self.keep[..., None].expand(-1, -1, tokens.shape[-1]))


def read_things(root: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """The N things of the training scenes: indices of their scenes, of the tokens around them (N, 10), of their names.

    The tokens are the class token, 0, and the 3 x 3 patches about the middle of the thing's box. Last come the names.
    """
    content = json.loads((root / "instances_train.json").read_text(encoding="utf-8"))
    scene = {image["id"]: i for i, image in enumerate(content["images"])}
    names = {category["id"]: i for i, category in enumerate(content["categories"])}
    side = CLIP["vision_cfg"]["image_size"] // CLIP["vision_cfg"]["patch_size"]
    around = torch.tensor([row * side + column for row in (-1, 0, 1) for column in (-1, 0, 1)])
    boxes = torch.tensor([annotation["bbox"] for annotation in content["annotations"]])
    column, row = ((boxes[:, :2] + boxes[:, 2:] / 2) // CELL).long().unbind(dim=1)
    patches = 1 + (row * side + column)[:, None] + around
    return (
        torch.tensor([scene[annotation["image_id"]] for annotation in content["annotations"]]),
        F.pad(patches, (1, 0)),
        torch.tensor([names[annotation["category_id"]] for annotation in content["annotations"]]),
        [category["name"] for category in content["categories"]],
    )


def train_clip(folder: Path, root: Path, things_steps: int, scenes_steps: int) -> None:
    """Train a CLIP (Radford et al. 2021) on the training scenes; write open_clip's `local-dir:` form.

    A photo tower of 4 layers and width 128 over 8 px patches, a smaller text tower, CLIP's own tokenizer. It learns
    first to tell single things by the patches around them: whole scenes teach so small a model the colours long
    before the shapes. Then it learns scenes against captions, one caption a scene and step.
    """
    import open_clip
    from safetensors.torch import save_file

    normal = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    write_json(folder / "open_clip_config.json", {"model_cfg": CLIP, "preprocess_cfg": normal})
    model = open_clip.model.CLIP(**CLIP)
    model.visual.patch_dropout = patches = KeptPatches()
    preprocess = open_clip.image_transform(CLIP["vision_cfg"]["image_size"], is_train=False, **normal)
    tokenize = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])

    photos, captions = read_split(root, "train")
    pixels = torch.stack([preprocess(Image.open(photo)) for photo in tqdm(photos, desc="reading", unit="scene")])
    scene, around, label, names = read_things(root)
    name_tokens = tokenize([f"a {name}" for name in names])
    caption_tokens = [tokenize(texts) for texts in captions]  # (captions of the scene, 32) each
    contents = [frozenset(pair for text in texts for pair in named_pairs(text)) for texts in captions]

    def things_loss(batch: torch.Tensor) -> torch.Tensor:
        patches.keep = around[batch]
        image_features, text_features, scale = model(pixels[scene[batch]], name_tokens)
        return F.cross_entropy(scale * image_features @ text_features.T, label[batch])

    def scenes_loss(batch: torch.Tensor) -> torch.Tensor:
        texts = torch.stack([caption_tokens[i][torch.randint(len(caption_tokens[i]), ())] for i in batch])
        image_features, text_features, scale = model(pixels[batch], texts)
        return contrastive_loss(scale * image_features @ text_features.T, [contents[i] for i in batch])

    fit(model, things_loss, len(scene), things_steps, lr=1e-3, label="CLIP, things")
    patches.keep = None
    fit(model, scenes_loss, len(photos), scenes_steps, lr=5e-4, label="CLIP, scenes")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


@torch.no_grad()
def retrieval(folder: Path, photos: list[Path], captions: list[list[str]], group: int = 64) -> float:
    """Share of photos whose own first caption is the nearest among `group` photos' first captions (a fraction)."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    right = 0
    for start in range(0, len(photos), group):
        images = torch.stack([preprocess(Image.open(photo)) for photo in photos[start : start + group]])
        texts = tokenize([texts[0] for texts in captions[start : start + group]])
        near = (model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T).argmax(dim=1)
        right += int((near == torch.arange(len(near))).sum())
    return right / len(photos)


# ------------------------------------------------------------------------------------------- GPT-2


def train_tokenizer(captions: list[str]):
    """GPT-2's kind of tokenizer, byte-level BPE, with its merges learnt from the captions; EOS also pads."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bytes_and_merges = ByteLevelBPETokenizer()
    bytes_and_merges.train_from_iterator(
        captions, VOCABULARY, min_frequency=2, special_tokens=[EOS], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_merges._tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS
    )


def language_batch(rows: list[list[int]], eos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (N, L) of `EOS caption EOS`, padded with EOS whose label is left out.

    >>> language_batch([[5, 6], [7]], eos=0)[1].tolist()
    [[-100, 5, 6, 0], [-100, 7, 0, -100]]
    """
    longest = max(map(len, rows))
    inputs = [[eos, *row, eos] + [eos] * (longest - len(row)) for row in rows]
    labels = [[IGNORED, *row, eos] + [IGNORED] * (longest - len(row)) for row in rows]
    return torch.tensor(inputs), torch.tensor(labels)


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
        inputs, labels = language_batch([rows[i] for i in batch], eos)
        starts = torch.randint(GPT2["n_positions"] - inputs.shape[1], (len(inputs), 1))
        logits = model(input_ids=inputs, position_ids=starts + torch.arange(inputs.shape[1])).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    fit(model, loss_of, len(rows), steps, lr=2e-3, label="GPT-2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> None:
    _, captions = read_split(cfg.data, "train")
    val_photos, val_captions = read_split(cfg.data, "val")
    drawn = hashlib.sha256((cfg.data / "train.json").read_bytes()).hexdigest()
    made_from = {"scenes": drawn, "seed": cfg.seed}
    clip_settings = made_from | {"steps": [cfg.things_steps, cfg.scenes_steps], "model": CLIP}
    gpt2_settings = made_from | {"steps": cfg.gpt2_steps, "model": GPT2, "vocabulary": VOCABULARY}

    if cfg.overwrite or not is_made(cfg.output / "clip", clip_settings):
        seed_everything(cfg.seed)
        with made_whole(cfg.output / "clip", clip_settings, cfg.overwrite) as folder:
            train_clip(folder, cfg.data, cfg.things_steps, cfg.scenes_steps)
    nearest = retrieval(cfg.output / "clip", val_photos, val_captions)
    print(f"{cfg.output / 'clip'}: finds a new photo's caption among 64 in {nearest:.0%} of cases")

    if cfg.overwrite or not is_made(cfg.output / "gpt2", gpt2_settings):
        seed_everything(cfg.seed)
        with made_whole(cfg.output / "gpt2", gpt2_settings, cfg.overwrite) as folder:
            train_gpt2(folder, [text for texts in captions for text in texts], cfg.gpt2_steps)
    print(f"{cfg.output / 'gpt2'}: writes captions of scenes")


if __name__ == "__main__":
    run(main, Config)
