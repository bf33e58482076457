"""LLaVA: zero-shot captions of photos, several decodings for one look at them (Liu et al. 2023, arXiv 2310.03744).

The photos are encoded and the prompt prefilled once; each decoding goes on from a copy of the cache of keys and values.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from common import UserError
from models.captioner import Decoding
from models.hub import hub_or_cache, means_folder, quiet, why
from models.sampling import generate_arguments

# Published settings of the three decodings.
PRESETS = {
    "best": Decoding(),
    "moderate": Decoding(do_sample=True, temperature=0.7, top_p=0.9, top_k=50),
    "diverse": Decoding(do_sample=True, temperature=0.9, top_p=0.95, top_k=100),
}

Quantize = Literal["none", "4bit", "8bit"]


class Llava(nn.Module):
    """An image-text-to-text model of transformers with its processor and one prompt for all photos."""

    def __init__(self, model: nn.Module, processor, prompt: str):
        super().__init__()
        self.model, self.processor = model.eval(), processor
        processor.tokenizer.padding_side = "left"  # generation goes on at the right end of each row
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        self.prompt = processor.apply_chat_template([turn], add_generation_prompt=True)

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """B photos -> input_ids and attention_mask (B, L), pixel_values and what else the model reads."""
        inputs = self.processor(
            images=list(images), text=[self.prompt] * len(images), padding=True, return_tensors="pt"
        )
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def caption(
        self, images: Sequence[Image.Image], decodings: dict[str, Decoding], seeds: dict[str, Sequence[int]]
    ) -> dict[str, list[str]]:
        """B photos -> B captions for each decoding's name; `seeds[name]` are the B seeds that sampling draws by."""
        inputs = self.inputs(images)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cache = self._prefill(inputs)
        eos, pad = self.model.generation_config.eos_token_id, self.processor.tokenizer.pad_token_id
        eos = self.processor.tokenizer.eos_token_id if eos is None else eos
        captions = {}
        for name, decoding in decodings.items():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=copy.deepcopy(cache),
                **generate_arguments(decoding, seeds[name], eos, pad),
            )
            own = out[:, ids.shape[1] :]  # by position: a prompt's text may come back in a caption
            texts = self.processor.batch_decode(own, skip_special_tokens=True)
            captions[name] = [" ".join(text.split()) for text in texts]
        return captions

    def _prefill(self, inputs: dict[str, Tensor]):
        """The cache of keys and values of all but the prompt's last token, by which each decoding begins."""
        short = dict(inputs)
        mask = short["attention_mask"]
        for name, value in inputs.items():  # ids, mask and token types, but no pixels
            if value.shape == mask.shape:
                short[name] = value[:, :-1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1]  # left padding takes no place
        return self.model(**short, position_ids=positions, use_cache=True, logits_to_keep=1).past_key_values


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
