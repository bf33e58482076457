import sys; sys.path.insert(0, ".")
import torch
from benchmarks.p2_training import build, draw, our_step
from models.training import prepare_training
from torch.profiler import profile, ProfilerActivity
d = torch.device("cuda"); c = build("gpt2", d); prepare_training(c, torch.bfloat16, d)
f, k = draw("gpt2", d, 64)
import time
def t(label):
    for _ in range(3): our_step(c, f, k)
    torch.cuda.synchronize(); s = time.time()
    for _ in range(5): our_step(c, f, k)
    torch.cuda.synchronize(); print(label, (time.time() - s) / 5, flush=True)
t("our step, LoraProduct, sdpa mask")
with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
    our_step(c, f, k)
print(p.key_averages().table(sort_by="self_device_time_total", row_limit=22, max_name_column_width=60)[:6000])
from models.decoder import causal_lm
causal_lm(c.decoder).set_attn_implementation("eager"); t("eager attention")
import models.captioner as mc
c2 = build("gpt2", d)
from models.training import parts_of
for _, q in parts_of(c2)["decoder"]: q.data = q.data.to(torch.bfloat16)
causal_lm(c2.decoder).set_attn_implementation("sdpa")
c = c2; t("peft's LoRA, unfused GELU, sdpa")
from models.decoder import fuse_gelu
fuse_gelu(c.decoder); t("peft's LoRA, fused GELU, sdpa")
mc.ChunkedCrossEntropy.CHUNK = 4096
c = build("gpt2", d); prepare_training(c, torch.bfloat16, d); t("ours, cross entropy chunks of 4096")
mc.ChunkedCrossEntropy.CHUNK = 256
# flex attention
try:
    from torch.nn.attention.flex_attention import create_block_mask
    import transformers
    lm = causal_lm(c.decoder); lm.set_attn_implementation("flex_attention")
    seg_mask = mc.prefix_mask
    def flex_mask(segments, P, dtype):
        full = torch.nn.functional.pad(segments, (P, 0), value=0); L = full.shape[1]
        def m(b, h, q, kv):
            return (kv <= q) & ((full[b, kv] == 0) | (full[b, kv] == full[b, q]))
        return create_block_mask(m, len(full), None, L, L, device=full.device, _compile=True)
    mc.prefix_mask = flex_mask
    t("flex attention")
    mc.prefix_mask = seg_mask
except Exception as e:
    print("flex:", type(e).__name__, str(e)[:600])
