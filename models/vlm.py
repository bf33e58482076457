"""Vision-language models of transformers: zero-shot captions, several decodings from one prefill, attention records.

LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744) is the one of the published report. The photos are encoded and the prompt
is prefilled once; all decodings go on from that cache of keys and values.
docs/grounding.md lists the families of models.
"""

import os
import re
from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from PIL import ImageOps
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, DynamicCache

from common.config import UserError, say
from data.photos import LoadedPhoto
from models.attention import AttentionRecord, randomize, read_records, record_attention
from models.decoding import CACHE, Decodings, Seeds, TokenIds, generate_all, generate_plainly
from models.encoder import PatchGrid
from models.hub import load_whole, loading, means_folder, time_limit
from models.patch_boxes import grid_of, measure_boxes, on_grid

# What LLaVA-1.5 was asked for captions in training (Liu et al. 2023).
PROMPT = "Provide a one-sentence caption for the provided image."

# Families, by `model_type`, whose captions were compared with those of transformers' plain `generate`.
PLACED = (  # several decodings from one prefill, and heatmaps
    "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
COMPARED = (*PLACED, "blip-2", "gemma4", "instructblip", "lfm2_vl", "qwen3_5")
OWN_PROMPT = ("blip-2", "instructblip", "paligemma")  # without a chat template; the processor adds the image's place

ONE_PASS = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}  # `generate` as a pass that prepares its inputs

Quantize = Literal["none", "4bit", "8bit"]
Fit = Literal["processor", "pad"]


def chat_prompt(processor, prompt: str) -> str:
    """What the model reads before it answers: the image's place and `prompt`, in its chat template."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    with time_limit("model: its chat template"):
        return processor.apply_chat_template([turn], add_generation_prompt=True)


def has_places(config) -> bool:
    """Whether it was tried where the image tokens of a model lie. PaliGemma 2 caps attention, which sdpa cannot."""
    return config.model_type in PLACED and not getattr(config.get_text_config(), "attn_logit_softcapping", None)


class VisionLanguageModel(nn.Module):
    """A `models.interface.CaptionModel`: a model of transformers, its processor, and one prompt for all photos."""

    def __init__(self, model: nn.Module, processor, prompt: str, fit: Fit = "processor"):
        super().__init__()
        self.model, self.processor, self.tokenizer = model.eval(), processor, processor.tokenizer
        self.tokenizer.padding_side = "left"  # generation goes on at the right end of each row
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        template = getattr(processor, "chat_template", None)
        eos = model.generation_config.eos_token_id  # one, several or none
        self.eos = eos if isinstance(eos, list) else [self.tokenizer.eos_token_id if eos is None else eos]
        # a user's settings decide alone, whatever penalties the model's authors set
        model.generation_config.update(repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0)
        self.fit, self.family, self.placed = fit, model.config.model_type, has_places(model.config)
        self.prompt = chat_prompt(processor, prompt) if template else "<image>" * (self.family == "paligemma") + prompt
        # (N, 4) boxes of the image tokens of a photo, by its width and height
        self.patch_boxes = lru_cache(maxsize=1024)(partial(measure_boxes, self.model, self.inputs))

    def inputs(self, photos: Sequence[LoadedPhoto]) -> dict[str, Tensor]:
        """B photos -> input_ids and attention_mask (B, L), pixel_values and what else the model reads."""
        mean = getattr(self.processor.image_processor, "image_mean", None) or [0.5] * 3
        colour, images = tuple(int(255 * value) for value in mean), []
        for size, image in ((photo.image.size, photo.image) for photo in photos):
            least = max(size) // (1 if self.fit == "pad" else 50)  # some processors refuse photos that are thinner
            images.append(ImageOps.pad(image, (max(size[0], least), max(size[1], least)), color=colour))
        bos = self.tokenizer.bos_token  # some chat templates write it, and then the tokenizer shall not
        inputs = self.processor(
            images=[[image] for image in images], text=[self.prompt] * len(images), padding=True, return_tensors="pt",
            add_special_tokens=not (bos and self.prompt.startswith(bos)),
        )  # fmt: skip
        inputs.pop("labels", None)  # PaliGemma's, for training
        return dict(inputs.to(self.model.device, self.model.dtype))

    @torch.inference_mode()
    def generate(self, photos: Sequence[LoadedPhoto], decodings: Decodings, seeds: Seeds) -> dict[str, list[TokenIds]]:
        """Token ids of B captions for each decoding; see `models.interface`."""
        inputs = self.inputs(photos)
        if not self.placed:
            return {key: generate_plainly(self.model, inputs, decodings[key], seeds[key], self.eos) for key in seeds}
        # `generate` prepares what differs between families: positions, masks, token types. It reads the prompt's last
        # token too, by which captions begin, since in PaliGemma all tokens of a prompt see each other
        cache, calls = DynamicCache(), []  # every layer of this cache keeps all tokens
        with self.model.get_decoder().register_forward_hook(lambda *call: calls.append(call[2]), with_kwargs=True):
            self.model.generate(**inputs, **ONE_PASS, **{CACHE: cache})
        cache.crop(-1)
        rows, positions = {"attention_mask": inputs["attention_mask"]}, calls[0]["position_ids"]
        if positions.ndim == 3:  # image tokens have rows and columns; `generate` counts the other kind by itself
            rows["position_ids"] = positions
        return generate_all(self.model, [cache], inputs["input_ids"], decodings, seeds, self.eos, **rows)

    @torch.no_grad()
    def attend(
        self, photos: Sequence[LoadedPhoto], captions: Sequence[Sequence[list[int]]], extra: Collection[str] = ()
    ) -> list[list[AttentionRecord]]:
        """What each token of each of a photo's captions attended to, the closing EOS last.

        Each caption is read in a row of its own, behind its photo and the prompt.
        """
        flat = [[caption] for own in captions for caption in own]
        photos = [photo for photo, own in zip(photos, captions) for _ in own]
        inputs = self.inputs(photos)
        prompt = inputs["input_ids"]
        places = [(row == self.model.config.image_token_id).nonzero()[:, 0] for row in prompt]
        columns = nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)  # (B, P) of the most tokens
        columns = columns.where(columns >= 0, columns[:, :1])
        # what fills up shorter captions lies behind them, where they do not see it
        words = [torch.tensor(caption, dtype=torch.long, device=prompt.device) for (caption,) in flat]
        words = nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=self.eos[0])
        rows = (prompt.shape[1] - 1 + torch.arange(words.shape[1] + 1, device=prompt.device)).expand(len(flat), -1)
        with record_attention(self.model.get_decoder(), rows, columns, extra) as recorder:
            self.model.generate(**self._with_captions(inputs, words), **ONE_PASS)
        found = read_records(recorder, self.model.get_output_embeddings(), flat, self.tokenizer.eos_token_id)
        shares = [grid_of(self.patch_boxes(*photo.image.size))[1] for photo in photos]
        records = (on_grid(record, share) for (record,), share in zip(found, shares))
        return [[next(records) for _ in own] for own in captions]

    def _with_captions(self, inputs: dict[str, Tensor], captions: Tensor) -> dict[str, Tensor]:
        """Inputs of B prompts, and captions (B, T) behind them."""
        prompt, image = inputs["input_ids"].shape, self.model.config.image_token_id
        kinds = torch.full_like(captions, self.family == "paligemma")  # there all of kind 0, the prompt, see each other
        words = captions.where(captions != image, self.eos[0])  # or the photo would not fit the places for it
        more = {"input_ids": words, "attention_mask": torch.ones_like(captions)}
        for name, value in inputs.items():  # ids, mask and token types, but no pixels
            if value.shape == prompt:
                inputs[name] = torch.cat([value, more.get(name, kinds)], dim=1)
        return inputs

    def patch_grid(self, width: int, height: int) -> PatchGrid:
        """The grid of the attention records of a photo of `width` x `height` pixels."""
        return grid_of(self.patch_boxes(width, height))[0]

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


def load_vlm(
    model: str, prompt: str, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none",
    fit: Fit = "processor", heatmaps: bool = False,
) -> VisionLanguageModel:  # fmt: skip
    """Load a hub id or a local folder onto `device`. Raises UserError where it cannot be loaded.

    What can be seen to be wrong is seen before the weights are read: with `heatmaps`, a family without places, too.
    Says on stderr where several decodings cannot go on from one prefill, and where captions were never compared with
    those of plain `generate`.
    """
    if re.search(r"<\S*image\S*>", prompt):
        raise UserError(f"prompt: expected the question alone, without the photo's place, got {prompt!r:.60}")
    if means_folder(model) and not os.path.isfile(f"{model}/config.json"):
        raise UserError(f"model: {Path(model)}: expected a hub id or a model folder, found no config.json in it")
    options = {"dtype": dtype, "device_map": {"": device}}  # straight there: 7B need not pass through the CPU's memory
    if quantize != "none":
        bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype} if quantize == "4bit" else {"load_in_8bit": True}
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    with loading(f"model: could not load {model}", os.path.isdir(model)):
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        family = config.model_type
        if not hasattr(processor, "image_processor"):
            raise UserError(f"model: the processor of {model} does not take photos and text; expected one that does")
        if heatmaps and not has_places(config):
            families = ", ".join(PLACED) + " (without version 2 of PaliGemma)"
            raise UserError(f"model: heatmaps need one of the families {families}; this is {family}")
        if family not in OWN_PROMPT:
            if getattr(processor, "chat_template", None) is None:
                raise UserError(f"model: the processor of {model} has no chat template to put the prompt into")
            chat_prompt(processor, prompt)  # a broken template is seen now
        lm = load_whole(f"model: {model}", AutoModelForImageTextToText, model, **options)
        vlm = VisionLanguageModel(lm, processor, prompt, fit)
    if not vlm.placed:
        compared = "" if family in COMPARED else ", and its captions were never compared with those of plain generate"
        say(f"model: {family} reads the photos anew for each decoding{compared}")
    return vlm
