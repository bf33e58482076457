"""What it costs to see where words looked: the probe, `output_attentions=True`, and a plain forward pass.

    python -m benchmarks.p3_attention

One caption of 20 tokens behind 576 image tokens and a prompt, 616 in all, through 32 layers of 32 heads, narrow, with
random weights, in float32. Kept is what is left in memory when the pass is over; the probe's maps are held against
those of eager attention.
"""

import torch

from benchmarks.measure import Rounds, interleaved, report
from common.config import run
from common.device import pick_device, seed_everything
from models.attention import probing

TOKENS, IMAGE, CAPTION, FIRST = 616, 576, 20, 10  # the image's tokens begin behind a few of the prompt's
LAYERS, HEADS = 32, 32
WIDTHS = {"cpu": (1024, 2048), "cuda": (4096, 11008)}  # of a state and between its layers; LLaVA-1.5-7B's on a GPU


@torch.inference_mode()
def main(cfg: Rounds) -> None:
    from transformers import LlamaConfig, LlamaModel

    seed_everything(0)
    device = pick_device(cfg.device)
    width, between = WIDTHS.get(device.type, WIDTHS["cpu"])
    shape = {"hidden_size": width, "intermediate_size": between, "num_hidden_layers": LAYERS}
    with device:
        model = LlamaModel(LlamaConfig(vocab_size=100, num_attention_heads=HEADS, **shape)).eval()
    ids = torch.randint(100, (1, TOKENS), device=device)
    rows = torch.arange(TOKENS - CAPTION, TOKENS, device=device)[None]
    columns = torch.arange(FIRST, FIRST + IMAGE, device=device)[None]

    def sdpa() -> None:
        model(input_ids=ids, use_cache=False)

    def probe() -> tuple[torch.Tensor, int]:
        with probing(model, rows, columns) as recorder:
            model(input_ids=ids, use_cache=False)
        kept = recorder.mean + recorder.peak
        return torch.stack(recorder.mean)[:, 0], sum(one.numel() * one.element_size() for one in kept)

    def eager() -> tuple[torch.Tensor, int]:
        model.set_attn_implementation("eager")
        attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        own = torch.stack([one[0].mean(dim=0)[rows[0]][:, columns[0]] for one in attentions])
        return own, sum(one.numel() * one.element_size() for one in attentions)

    model.set_attn_implementation("sdpa")
    seconds, results = interleaved({"sdpa": sdpa, "probe": probe, "output_attentions": eager}, cfg.rounds)
    (maps, kept), (expected, kept_eager) = results["probe"], results["output_attentions"]
    report(
        f"{TOKENS} tokens, {LAYERS} layers of {HEADS} heads",
        seconds,
        kept_ratio=kept_eager / kept,
        time_ratio=seconds["probe"] / seconds["sdpa"],
        output_attentions_time_ratio=seconds["output_attentions"] / seconds["sdpa"],
        kept_mb=kept / 1e6,
        output_attentions_kept_mb=kept_eager / 1e6,
        agree=torch.allclose(maps, expected, atol=1e-5),
    )


if __name__ == "__main__":
    run(main, Rounds)
