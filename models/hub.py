"""Loading from model hubs: no minute of retries where no hub can be reached, no log messages of the libraries."""

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from common.config import UserError


@contextmanager
def loading(what: str, local: bool, unavailable: type[Exception] = UserError) -> Iterator[None]:
    """Load something from a local place or else from a hub; an error of the block is raised anew as one line on `what`.

    It is a UserError; or `unavailable` where a hub was asked. Where no hub answers within 5 s, the block looks in local
    caches alone: huggingface_hub by itself retries for 20 s a file. What the libraries log is kept back, since the
    error says it once; and they get no standard input, where some ask whether to run a stranger's code.
    """
    from huggingface_hub import constants, get_session

    level, stdin, offline = logging.root.manager.disable, sys.stdin, constants.HF_HUB_OFFLINE
    if not (local or offline):
        try:
            get_session().head(constants.ENDPOINT, timeout=5.0)
        except Exception:  # the kinds of its errors differ between its releases; all of them mean no answer
            constants.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)
    sys.stdin = None
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # hub clients and loaders raise all sorts; the user needs one line
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own (trust_remote_code), which is never run"
        elif not local and constants.HF_HUB_OFFLINE and isinstance(error, (OSError, RuntimeError, ValueError)):
            reason = f"the hub does not answer, no local cache has it ({reason}); a local folder can be given instead"
        raise (UserError if local else unavailable)(f"{what}: {reason}") from error
    finally:
        logging.disable(level)
        sys.stdin, constants.HF_HUB_OFFLINE = stdin, offline


@contextmanager
def time_limit(what: str, seconds: int = 5) -> Iterator[None]:
    """End a block that a stranger's file keeps busy by a UserError; where there is no SIGALRM (Windows) it goes on."""

    def late(*_: object) -> None:
        raise UserError(f"{what} takes more than {seconds} s")

    with suppress(AttributeError, ValueError):  # ValueError: signals come to the main thread alone
        signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
    try:
        yield
    finally:
        getattr(signal, "alarm", int)(0)  # Windows has none; int(0) does nothing


# What some files hold beside the weights: classifiers, and constants that earlier releases of transformers saved.
SPARE = r"(classifier|score)\.|.*\.(masked_bias|attn\.attention\.bias|position_ids|inv_freq)$"


def load_whole(what: str, kind: type, where: str | None, **options: Any):
    """A model of transformers, `kind.from_pretrained(where)`; no code beside its weights is run.

    Raises UserError, which begins with `what`, where a tensor is missing, left over (but see SPARE) or misshapen.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    model, report = kind.from_pretrained(where, **options)
    for problem in ("missing", "unexpected", "mismatched"):
        names = map(str, report[f"{problem}_keys"])
        if names := [name for name in names if problem != "unexpected" or not re.match(SPARE, name)]:
            raise UserError(f"{what}: its weights do not fit: {len(names)} {problem}, such as {min(names)}")
    return model


def check_open_clip(key: str, model: str, tag: str) -> None:
    """Raise a UserError where a model of open_clip lets a stranger's code run, or does not fit the weights of `tag`.

    open_clip only warns of another activation: it would run the right weights with the wrong one.
    """
    import open_clip

    config, weights = open_clip.get_model_config(model) or {}, open_clip.get_pretrained_cfg(model, tag)
    if '"trust_remote_code"' in json.dumps(config):
        raise UserError(f"{key}: {model}: its open_clip_config.json asks for trust_remote_code; such code is never run")
    if weights and weights.get("quick_gelu", False) != config.get("quick_gelu", False):
        raise UserError(f"{key}: {tag} was trained with another activation than {model}; add or drop -quickgelu")


def means_folder(model: str) -> bool:
    """Whether a model's name can only mean a local folder, or is one: a hub id is NAME or OWNER/NAME."""
    return os.path.isdir(model) or model.startswith((".", "~", "/")) or model.count("/") > 1
