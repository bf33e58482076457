"""Real shape, real scripts: GPT-2 small random, ViT-L/14 random, photos of noise."""
import json, random, subprocess, sys, time
from pathlib import Path
import torch
from PIL import Image
sys.path.insert(0, ".")
from demo.standins import train_tokenizer
small = "--small" in sys.argv
dev = "cpu" if small else "cuda"
root = Path("/tmp/e2e"); (root/"images/train").mkdir(parents=True, exist_ok=True); (root/"images/val").mkdir(parents=True, exist_ok=True)
rng = random.Random(0)
words = "a the red blue dog cat man runs sits on grass water with ball and two of white black big small".split()
texts = []
for split, n in (("train", 8 if small else 1024), ("val", 4 if small else 128)):
    images, ann = [], []
    for i in range(n):
        px = torch.randint(256, (30, 40, 3), dtype=torch.uint8)
        Image.fromarray(px.numpy()).resize((500, 375)).save(root/f"images/{split}/{split}{i}.jpg")
        images.append({"id": i, "file_name": f"{split}{i}.jpg"})
        for _ in range(5):
            t = " ".join(rng.choices(words, k=rng.randint(6, 14))); texts.append(t)
            ann.append({"image_id": i, "caption": t})
    (root/f"{split}.json").write_text(json.dumps({"images": images, "annotations": ann}))
from transformers import GPT2Config, GPT2LMHeadModel
tok = train_tokenizer(texts)
lm = GPT2LMHeadModel(GPT2Config(bos_token_id=tok.eos_token_id, eos_token_id=tok.eos_token_id, **({"n_layer": 2, "n_embd": 64, "n_head": 2} if small else {})))
lm.save_pretrained(root/"gpt2"); tok.save_pretrained(root/"gpt2")
import open_clip
torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), "/tmp/e2e/clip.pt")
def run(*args):
    t = time.time(); print("\n$", *args, flush=True)
    p = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True)
    out = (p.stdout[-900:] + "\n" + p.stderr.replace("\r", "\n")[-700:])
    print(out, "rc", p.returncode, f"{time.time()-t:.1f} s", flush=True)
common = ["--data", root, "--device", dev, "--features", "/tmp/e2e/features", "--decoder.model", root/"gpt2", "--encoder.weights", "random", "--encoder.model", "ViT-B-32-quickgelu" if small else "ViT-L-14-quickgelu",
  "--captions_per_row", 5, "--batch_size", 20 if small else 320, "--align.epochs", 2, "--finetune.epochs", 1 if small else 6, "--overwrite"]
run("p2_train.py", *common, "--output", "/tmp/e2e/bf16", "--precision", "bf16")
if not small:
    run("p2_train.py", *common, "--output", "/tmp/e2e/float32", "--precision", "float32")
    run("p2_train.py", *common, "--output", "/tmp/e2e/fp16", "--precision", "fp16", "--align.epochs", 1, "--finetune.epochs", 1)
    run("p2_train.py", *common, "--output", "/tmp/e2e/compile", "--precision", "bf16", "--compile", "--align.epochs", 0, "--finetune.epochs", 3)
run("p2_inference.py", "--checkpoint", "/tmp/e2e/bf16", "--images", root/"images/train", "--output", "/tmp/e2e/c.json", "--precision", "bf16" , "--batch_size", 128, "--device", dev, "--features", "/tmp/none", "--workers", 8, "--overwrite")
run("p2_inference.py", "--checkpoint", "/tmp/e2e/bf16", "--images", root/"images/train", "--output", "/tmp/e2e/c.json", "--precision", "bf16" , "--batch_size", 128, "--device", dev, "--features", "/tmp/e2e/features", "--overwrite")
run("p3_visualize.py", "--checkpoint", "/tmp/e2e/bf16", "--images", root/"images/val", "--output", "/tmp/e2e/maps", "--device", dev, "--limit", 32, "--overwrite")
run("evaluate.py", "--predictions", "/tmp/e2e/c.json", "--annotations", root/"train.json", "--images", root/"images/train", "--metrics", "clipscore", "--device", dev, "--clip_pretrained", "/tmp/e2e/clip.pt", "--output", "/tmp/e2e/s.json", "--overwrite")
