"""Loading from model hubs: no minute of retries where no hub can be reached, no log messages of the libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the libraries log below the level of an exception: it is raised, and then said once."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def hub_or_cache(seconds: float = 5.0) -> Iterator[bool]:
    """Give True where the hub answers; else the block looks in local caches alone, and fails at once if they lack it.

    huggingface_hub by itself retries for 20 s a file.
    """
    from huggingface_hub import constants, get_session

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception:  # the kinds of its errors differ between its releases; all of them mean no answer
            constants.HF_HUB_OFFLINE = True
    try:
        with quiet():
            yield not constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = offline


def means_folder(model: str) -> bool:
    """Whether a model's name can only mean a local folder, or is one: a hub id is NAME or OWNER/NAME."""
    return Path(model).is_dir() or model.startswith((".", "~", "/")) or model.count("/") > 1


def why(error: Exception, hub: bool) -> str:
    """The reason why loading failed, in one line."""
    if not hub and isinstance(error, (OSError, RuntimeError, ValueError)):
        return "the hub does not answer and no local cache has it; a local folder can be given instead"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
