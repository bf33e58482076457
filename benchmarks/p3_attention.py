"""The cost of heatmaps: attention records, and the methods that need more; sdpa is a pass without any.

    python -m benchmarks.p3_attention

One caption of 20 tokens behind 576 image tokens and a prompt, 616 in all, through 32 layers of 32 heads with random
weights, narrow on a CPU and as wide as LLaVA-1.5-7B on a GPU, in float32. `kept` is the memory that the records take
after the pass, and that attention takes with `output_attentions=True`, as `heads` and the others run the pass again;
the two agree. Times are ratios to sdpa, peaks are MB above its peak. gradcam and relevancy are made for 2 tokens, for
they go back once for each.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import Rounds, by_device, interleaved, peak_memory, report
from common.config import run
from common.device import pick_device
from models.attention import EXTRAS, explain, record_attention

TOKENS, IMAGE, CAPTION, FIRST = 616, 576, 20, 10  # the image tokens begin behind 10 tokens of the prompt
LAYERS, HEADS = 32, 32
WIDTHS = {"cpu": (1024, 2048), "cuda": (4096, 11008)}  # of the hidden states and of the MLPs
BACKWARD = {"gradcam": 2, "relevancy": 2}  # tokens of the methods that go back for each


def ways(device: str) -> dict[str, Callable]:
    """What is compared, by name."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    device = pick_device(device)
    width, mlp = by_device(WIDTHS, device)
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    with device:
        model, head = LlamaModel(LlamaConfig(vocab_size=100, **shape)).eval(), torch.nn.Linear(width, 100)
        ids, inputs = torch.randint(100, (1, CAPTION)), torch.randn(1, TOKENS, width)
        rows, columns = torch.arange(TOKENS - CAPTION, TOKENS)[None], torch.arange(FIRST, FIRST + IMAGE)[None]
    model.set_attn_implementation("sdpa")
    sdpa = partial(model, inputs_embeds=inputs, use_cache=False)

    @torch.no_grad()
    def probe(extra: tuple[str, ...] = (), tokens: int = CAPTION):
        with record_attention(model, rows[:, :tokens], columns, extra=extra) as recorder:
            sdpa()
        kept = recorder.mean + recorder.peak + recorder.shares
        made = explain(recorder, ids[:, :tokens], head) if extra else torch.stack(recorder.mean)[:, 0]
        return made, sum(one.numel() * one.element_size() for one in kept)

    more = {name: partial(probe, (name,), BACKWARD.get(name, CAPTION)) for name in EXTRAS}
    return {"sdpa": torch.no_grad()(sdpa), "probe": probe} | more


def way(name: str, device: str) -> Callable:
    """One of them, in a process of its own."""
    return ways(device)[name]


def main(cfg: Rounds) -> None:
    seconds, results = interleaved(ways(cfg.device), cfg.rounds)
    peaks = {name: peak_memory(way, name, cfg.device) / 1e6 for name in seconds}
    (maps, kept), kept_eager = results["probe"], 4 * LAYERS * HEADS * TOKENS**2
    figures = {"kept_ratio": kept_eager / kept, "kept_mb": kept / 1e6, "output_attentions_kept_mb": kept_eager / 1e6}
    figures["output_attentions_time_ratio"] = (seconds["heads"] - seconds["probe"]) / seconds["sdpa"]
    for name in list(seconds)[1:]:
        figures[f"{name}_time_ratio".removeprefix("probe_")] = seconds[name] / seconds["sdpa"]
        figures[f"{name}_peak_mb".removeprefix("probe_")] = peaks[name] - peaks["sdpa"]
    figures["agree"] = torch.allclose(maps, results["heads"][0]["heads"][0].mean(dim=1), atol=1e-5)
    report(f"{TOKENS} tokens, {LAYERS} layers of {HEADS} heads", seconds, figures)


if __name__ == "__main__":
    run(main, Rounds)
