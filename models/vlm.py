"""Vision-language models of transformers: zero-shot captions, several decodings from one prefill, attention records.

LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744) is the one of the published report. The photos are encoded and the prompt
is prefilled once; all decodings and all captions that are looked into go on from that cache of keys and values.
"""

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError
from data.photos import LoadedPhoto
from models.attention import AttentionRecord, randomize, read_records, record_attention
from models.decoding import CACHE, Decoding, choose_candidates, generate_all, prefill, with_candidates
from models.encoder import PatchGrid, PhotoTransform
from models.hub import hub_or_cache, means_folder, quiet, why

# What LLaVA-1.5 was asked for captions in training (Liu et al. 2023).
PROMPT = "Provide a one-sentence caption for the provided image."

Quantize = Literal["none", "4bit", "8bit"]


def chat_prompt(processor, prompt: str) -> str:
    """What the model reads before it answers: the image's place and `prompt`, in its chat template."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True)


class VisionLanguageModel(nn.Module):
    """A `models.interface.CaptionModel`: a model of transformers, its processor, and one prompt for all photos."""

    def __init__(self, model: nn.Module, processor, prompt: str):
        super().__init__()
        self.model, self.processor, self.tokenizer = model.eval(), processor, processor.tokenizer
        self.tokenizer.padding_side = "left"  # generation goes on at the right end of each row
        self.prompt = chat_prompt(processor, prompt)

    @property
    def eos(self) -> int | list[int]:
        """The token, or tokens, that end a caption."""
        eos = self.model.generation_config.eos_token_id
        return self.tokenizer.eos_token_id if eos is None else eos

    def inputs(self, photos: Sequence[LoadedPhoto]) -> dict[str, Tensor]:
        """B photos -> input_ids and attention_mask (B, L), pixel_values and what else the model reads."""
        images = [photo.image for photo in photos]
        inputs = self.processor(images=images, text=[self.prompt] * len(images), padding=True, return_tensors="pt")
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _prefill(self, inputs: dict[str, Tensor]):
        """Cache and final states of all but the prompt's last token: captions begin with that one."""
        short, mask = dict(inputs), inputs["attention_mask"]
        for name, value in inputs.items():  # ids, mask and token types, but no pixels
            if value.shape == mask.shape:
                short[name] = value[:, :-1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1]  # padding on the left takes no position
        return prefill(self.model.model, **short, position_ids=positions)

    def _whole(self, photos: Sequence[LoadedPhoto], captions: Tensor, mask: Tensor) -> dict:
        """For `generate`, which then reads photos, prompts and captions (B, T) in one pass, and adds one token."""
        inputs = self.inputs(photos)
        prompt = inputs["attention_mask"].shape
        for name, value in inputs.items():  # ids, mask and token types, but no pixels
            if value.shape == prompt:
                inputs[name] = F.pad(value, (0, captions.shape[1]))
        filler = inputs["input_ids"][:, prompt[1] - 1 : prompt[1]]  # `generate` warns of padding on the right
        inputs["input_ids"][:, prompt[1] :] = captions.where(mask[:, prompt[1] :] > 0, filler)
        return inputs | {"attention_mask": mask, "max_new_tokens": 1, "do_sample": False, "num_beams": 1}

    @torch.inference_mode()
    def generate(
        self, photos: Sequence[LoadedPhoto], decodings: dict[str, Decoding], seeds: dict[str, Sequence[int]]
    ) -> dict[str, list[list[int]]]:
        """Token ids of B captions for each decoding; see `models.interface`."""
        inputs = self.inputs(photos)
        cache, _ = self._prefill(inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        language_model, pad = self.model.model.language_model, self.tokenizer.pad_token_id
        wanted = with_candidates(decodings, seeds)
        drawn = generate_all(self.model, language_model, [cache], ids, mask, *wanted, self.eos, pad)
        return choose_candidates(drawn, decodings, self.text)

    @torch.no_grad()
    def attend(
        self, photos: Sequence[LoadedPhoto], captions: Sequence[Sequence[list[int]]], extra: Collection[str] = ()
    ) -> list[list[AttentionRecord]]:
        """What each token of each of a photo's captions attended to, the closing EOS last."""
        inputs = self.inputs(photos)
        cache, states = self._prefill(inputs)
        image = inputs["input_ids"][:, :-1] == self.model.config.image_token_id
        columns = image.nonzero()[:, 1].view(len(photos), -1)  # (B, P)
        patches = states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))
        owner = torch.tensor([b for b, own in enumerate(captions) for _ in own], device=columns.device)
        cache.batch_select_indices(owner)  # each caption goes on from its own photo's prompt
        flat = [list(caption) for own in captions for caption in own]
        longest, pad = max(map(len, flat)), self.tokenizer.pad_token_id
        ids = torch.tensor([caption + [pad] * (longest - len(caption)) for caption in flat], device=owner.device)
        real = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in flat], device=owner.device)
        ids = torch.cat([inputs["input_ids"][owner, -1:], ids.view(len(flat), longest).long()], dim=1)
        mask = inputs["attention_mask"][owner]
        mask = torch.cat([mask, real.view(len(flat), longest).to(mask.dtype)], dim=1)
        positions = (mask.cumsum(dim=1) - 1)[:, -ids.shape[1] :]
        rows = torch.arange(ids.shape[1], device=owner.device).expand(len(flat), -1)
        model = self.model.model
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True, CACHE: cache}
        if extra:
            call, rows = self._whole([photos[b] for b in owner], ids[:, 1:], mask), rows + mask.shape[1] - ids.shape[1]
        with record_attention(model.language_model, rows, columns[owner], extra=extra) as recorder:
            (self.model.generate if extra else model)(**call)
        states = recorder.out.last_hidden_state[:, -ids.shape[1] :]
        closed = [[[*caption, self.tokenizer.eos_token_id]] for caption in flat]
        head = self.model.get_output_embeddings()
        records = iter(read_records(recorder, states, patches[owner], head, closed))
        return [[next(records)[0] for _ in own] for own in captions]

    @cached_property
    def _square(self) -> tuple[int, PhotoTransform]:
        """Patches a side, and how the processor crops a photo."""
        config, processor = self.model.config, self.processor.image_processor
        size, crop = getattr(processor, "size", None) or {}, getattr(processor, "crop_size", None) or {}
        crops = getattr(processor, "do_center_crop", False) and "shortest_edge" in size and "height" in crop
        if config.model_type != "llava" or not crops or config.vision_feature_select_strategy != "default":
            raise UserError(
                "model: expected a LLaVA that crops photos to one square, so that its patches can be placed; this is "
                f"{config.model_type}"
            )
        side = crop["height"] // config.vision_config.patch_size
        return side, PhotoTransform(crop["height"], size["shortest_edge"], (), (), "")

    def patch_grid(self, width: int, height: int) -> PatchGrid:
        """Where the patches lie on a photo of `width` x `height` pixels. Raises UserError where that is not known."""
        side, transform = self._square
        return PatchGrid(side, side, transform.seen_box(width, height))

    def text(self, ids: Sequence[int]) -> str:
        """Token ids -> caption, white space collapsed."""
        return " ".join(self.processor.decode(ids, skip_special_tokens=True).split())

    def ids(self, text: str) -> list[int]:
        """Caption -> token ids; what is written like a special token stays text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def check_room(self, text_tokens: int, key: str) -> None:
        """The positions of these models reach further than a caption."""

    def randomize(self) -> None:
        """Draw all weights anew."""
        randomize(self.model)


def check_model(model: str) -> list[str]:
    """What can be seen to be wrong with a model's name before anything loads."""
    if means_folder(model) and not (Path(model) / "config.json").is_file():
        return [f"model: {Path(model)}: expected a hub id or a model folder, found no config.json in it"]
    return []


def check_quantize(quantize: Quantize, device: torch.device) -> None:
    """Raise a UserError where weights cannot be quantised here."""
    from importlib.util import find_spec

    if quantize == "none":
        return
    if device.type != "cuda":
        raise UserError(f"quantize: {quantize} needs a CUDA GPU, the device is {device}; expected none")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantize: {quantize} needs bitsandbytes, which is not installed; pip install bitsandbytes")


def load_vlm(
    model: str, prompt: str, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none"
) -> VisionLanguageModel:
    """Load a hub id or a local folder onto `device`. Raises UserError where it cannot be loaded."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    options = {}
    if quantize != "none":
        bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype} if quantize == "4bit" else {"load_in_8bit": True}
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    local = Path(model).is_dir()
    hub = True
    try:
        with quiet() if local else hub_or_cache() as hub:
            processor = AutoProcessor.from_pretrained(model)
            # straight onto the device: 7B in 16 bits need not pass through the CPU's memory as a whole
            lm = AutoModelForImageTextToText.from_pretrained(
                model, dtype=dtype, attn_implementation="sdpa", device_map={"": device}, **options
            )
    except Exception as error:  # hub clients raise all sorts; the user needs one line
        raise UserError(f"model: could not load {model}: {why(error, hub or local)}") from error
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"model: the processor of {model} has no chat template to put the prompt into")
    return VisionLanguageModel(lm, processor, prompt)
