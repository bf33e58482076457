"""LLaVA: zero-shot captions of photos, several decodings for one look at them (Liu et al. 2023, arXiv 2310.03744).

The photos are encoded and the prompt prefilled once; all decodings go on from the cache of keys and values, side by
side as rows of one batch, so that each step reads the weights once for all of them.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LogitsProcessorList

from common.config import UserError
from models.decoding import Decoding, InTurn, generation_config, one_query_attention, samplers, until_eos, with_room
from models.hub import hub_or_cache, means_folder, quiet, why

# Published settings of the three decodings.
PRESETS = {
    "best": Decoding(),
    "moderate": Decoding(do_sample=True, temperature=0.7, top_p=0.9, top_k=50),
    "diverse": Decoding(do_sample=True, temperature=0.9, top_p=0.95, top_k=100),
}

# What LLaVA-1.5 was asked for captions in training (Liu et al. 2023).
PROMPT = "Provide a one-sentence caption for the provided image."

Quantize = Literal["none", "4bit", "8bit"]


def chat_prompt(processor, prompt: str) -> str:
    """What the model reads before it answers: the image's place and `prompt`, in its chat template."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True)


class Llava(nn.Module):
    """An image-text-to-text model of transformers with its processor and one prompt for all photos."""

    def __init__(self, model: nn.Module, processor, prompt: str):
        super().__init__()
        self.model, self.processor = model.eval(), processor
        processor.tokenizer.padding_side = "left"  # generation goes on at the right end of each row
        self.prompt = chat_prompt(processor, prompt)

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """B photos -> input_ids and attention_mask (B, L), pixel_values and what else the model reads."""
        inputs = self.processor(
            images=list(images), text=[self.prompt] * len(images), padding=True, return_tensors="pt"
        )
        return inputs.to(self.model.device, self.model.dtype)

    @property
    def eos(self) -> int | list[int]:
        """The token, or tokens, that end a caption."""
        eos = self.model.generation_config.eos_token_id
        return self.processor.tokenizer.eos_token_id if eos is None else eos

    def text(self, ids: Sequence[int]) -> str:
        """Token ids -> caption, white space collapsed."""
        return " ".join(self.processor.decode(ids, skip_special_tokens=True).split())

    def caption(
        self, images: Sequence[Image.Image], decodings: dict[str, Decoding], seeds: dict[str, Sequence[int]]
    ) -> dict[str, list[str]]:
        """The captions of `generate` as text."""
        return {
            name: [self.text(ids) for ids in captions]
            for name, captions in self.generate(images, decodings, seeds).items()
        }

    @torch.inference_mode()
    def generate(
        self, images: Sequence[Image.Image], decodings: dict[str, Decoding], seeds: dict[str, Sequence[int]]
    ) -> dict[str, list[list[int]]]:
        """B photos -> token ids of B captions, without EOS, for each decoding's name, drawn by `seeds[name]`."""
        inputs = self.inputs(images)
        cache = self._prefill(inputs)
        together: dict[tuple, list[str]] = {}  # decodings that take the same steps go as rows of one batch
        for name, decoding in decodings.items():
            alone = name if decoding.num_beams > 1 else ""
            together.setdefault((decoding.max_new_tokens, alone), []).append(name)
        captions = {}
        for number, names in enumerate(together.values(), start=1):
            own = cache if number == len(together) else copy.deepcopy(cache)
            captions |= self._decode(inputs, own, {name: (decodings[name], seeds[name]) for name in names})
        return {name: captions[name] for name in decodings}

    def _decode(
        self, inputs: dict[str, Tensor], cache, chosen: dict[str, tuple[Decoding, Sequence[int]]]
    ) -> dict[str, list[list[int]]]:
        """Go on from the prompt's `cache`, which is used up, with every photo once for each of the decodings."""
        ids, mask, count = inputs["input_ids"], inputs["attention_mask"], len(chosen)
        first, *_ = (decoding for decoding, _ in chosen.values())
        with one_query_attention(self.model.model.language_model):
            out = self.model.generate(
                input_ids=ids.repeat_interleave(count, dim=0),
                attention_mask=mask.repeat_interleave(count, dim=0),
                cache=with_room([cache], count * first.num_beams, first.max_new_tokens),
                generation_config=generation_config(first, self.eos, self.processor.tokenizer.pad_token_id),
                logits_processor=LogitsProcessorList([InTurn([samplers(*one) for one in chosen.values()])]),
            )
        new = until_eos(out[:, ids.shape[1] :], self.eos)  # by position: a prompt's text may come back in a caption
        return {name: new[place::count] for place, name in enumerate(chosen)}

    def _prefill(self, inputs: dict[str, Tensor]):
        """The cache of keys and values of all but the prompt's last token, by which each decoding begins."""
        short = dict(inputs)
        mask = short["attention_mask"]
        for name, value in inputs.items():  # ids, mask and token types, but no pixels
            if value.shape == mask.shape:
                short[name] = value[:, :-1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1]  # left padding takes no place
        return self.model(**short, position_ids=positions, use_cache=True, logits_to_keep=1).cache


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


def load_llava(model: str, prompt: str, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none") -> Llava:
    """Load a hub id or a local folder onto `device`. Raises UserError where it is not to be had."""
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
    return Llava(lm, processor, prompt)
