"""The cost of attention records: ours, those of `output_attentions=True`, and a forward pass without any.

    python -m benchmarks.p3_attention

One caption of 20 tokens behind 576 image tokens and a prompt, 616 in all, through 32 layers of 32 heads with random
weights, narrow on a CPU and as wide as LLaVA-1.5-7B on a GPU, in float32. `kept` is the memory that the records take
after the pass; ours are compared with those of `output_attentions=True`.
"""

from functools import partial

import torch

from benchmarks.measure import Rounds, by_device, interleaved, report
from common.config import run
from common.device import pick_device
from models.attention import record_attention

TOKENS, IMAGE, CAPTION, FIRST = 616, 576, 20, 10  # the image tokens begin behind 10 tokens of the prompt
LAYERS, HEADS = 32, 32
WIDTHS = {"cpu": (1024, 2048), "cuda": (4096, 11008)}  # of the hidden states and of the MLPs


@torch.inference_mode()
def main(cfg: Rounds) -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    device = pick_device(cfg.device)
    width, mlp = by_device(WIDTHS, device)
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    with device:
        model = LlamaModel(LlamaConfig(vocab_size=100, **shape)).eval()
    ids = torch.randint(100, (1, TOKENS), device=device)
    rows = torch.arange(TOKENS - CAPTION, TOKENS, device=device)[None]
    columns = torch.arange(FIRST, FIRST + IMAGE, device=device)[None]

    sdpa = partial(model, input_ids=ids, use_cache=False)

    def probe() -> tuple[torch.Tensor, int]:
        with record_attention(model, rows, columns) as recorder:
            sdpa()
        kept = recorder.mean + recorder.peak
        return torch.stack(recorder.mean)[:, 0], sum(one.numel() * one.element_size() for one in kept)

    def eager() -> tuple[torch.Tensor, int]:
        model.set_attn_implementation("eager")
        attentions = sdpa(output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        own = torch.stack([one[0].mean(dim=0)[rows[0]][:, columns[0]] for one in attentions])
        return own, sum(one.numel() * one.element_size() for one in attentions)

    model.set_attn_implementation("sdpa")
    seconds, results = interleaved({"sdpa": sdpa, "probe": probe, "output_attentions": eager}, cfg.rounds)
    (maps, kept), (expected, kept_eager) = results["probe"], results["output_attentions"]
    plain, ours, theirs = seconds.values()
    figures = {"kept_ratio": kept_eager / kept, "time_ratio": ours / plain}
    figures |= {"output_attentions_time_ratio": theirs / plain, "kept_mb": kept / 1e6}
    figures |= {"output_attentions_kept_mb": kept_eager / 1e6, "agree": torch.allclose(maps, expected, atol=1e-5)}
    report(f"{TOKENS} tokens, {LAYERS} layers of {HEADS} heads", seconds, figures)


if __name__ == "__main__":
    run(main, Rounds)
