"""Devices, precision, and the versions of the libraries that results depend on."""

import hashlib
import os
import typing
from importlib.metadata import version

import psutil
import torch

from common.config import UserError

Precision = typing.Literal["float32", "bf16", "fp16"]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on, for files that say how they were made."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "timm", "open_clip_torch")}


def pick_device(name: str):
    """`auto` is CUDA where it is there, else Apple's MPS, else the CPU; any other name is torch's own.

    Of several processes on a machine, each gets a GPU of its own for `cuda`.

    Raises UserError where torch does not know the name or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=name).cpu()  # `meta` has no values
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device: {name!r} is not available on this machine") from None


def memory_used(device: torch.device) -> float:
    """GB of memory: on CUDA the most that this process has held on the GPU, elsewhere what it holds now."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held / 1e9


def module_hash(about: str, module) -> str:
    """Hash of every weight of a torch module and of `about`, which says what else decides its output."""
    digest = hashlib.blake2b(about.encode(), digest_size=10)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def torch_dtype(precision: Precision):
    """The torch dtype of a `precision` setting."""
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
