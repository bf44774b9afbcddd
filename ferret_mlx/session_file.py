"""A session's state on disk: one of mlx-lm's prompt-cache files.

Its caches are those of the layers and, last, one of arrays: the image features and the points of
all regions. Its metadata hold one JSON text under "ferret".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, load_prompt_cache, save_prompt_cache

from .conversation import Exchange
from .processor import stack_points
from .prompt import TEMPLATES

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

SUFFIX = ".safetensors"
_VALUES_HASHED = 64  # of each parameter


def save_session(session: Session, path: str | os.PathLike[str]) -> None:
    """See `Session.save`. The file appears complete or not at all."""
    target = _checked(path)
    session.end_answer()
    session.prefill_prefix(session.prompt_cache)
    points = [points for exchange in session.exchanges for points in exchange.points]
    extra = ArraysCache(2)
    extra[0], extra[1] = session.encode_image(), mx.array(stack_points(points))
    state = {
        "key": _key(session),
        "cached_ids": session.prompt_cache.ids,
        "kv_bits": session.prompt_cache.kv_bits,
        "seed": session.seed,
        "rng": session.rng.bit_generator.state,
        "exchanges": [
            {"question": e.question, "region_texts": e.region_texts, "answer": e.answer}
            for e in session.exchanges
        ],
    }
    partial = target.with_name(f".{target.stem}.partial-{os.getpid()}{SUFFIX}")
    try:
        save_prompt_cache(
            str(partial), [*session.prompt_cache.layers, extra], {"ferret": json.dumps(state)}
        )
        partial.replace(target)
    except RuntimeError as error:
        raise ValueError(f"{target} cannot be written ({error}).") from None
    finally:
        partial.unlink(missing_ok=True)


def load_session(session: Session, path: str | os.PathLike[str]) -> None:
    """See `Session.load`."""
    source = _checked(path)
    if not source.is_file():
        raise FileNotFoundError(f"There is no saved session at {source}; check the path.")
    try:
        caches, metadata = load_prompt_cache(str(source), return_metadata=True)
        state = json.loads(metadata["ferret"])
        *layers, extra = caches
        features, points = extra.cache
        exchanges = _exchanges(state["exchanges"], np.array(points))
        rng = np.random.default_rng()
        rng.bit_generator.state = state["rng"]
        saved, own = dict(state["key"]), _key(session)
        ids = [int(index) for index in state["cached_ids"]]
        seed, kv_bits = state["seed"], state["kv_bits"]
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{source} is not a saved session ({type(error).__name__}); give a file that "
            "Session.save wrote."
        ) from error
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{source} was saved with another {name}; load it into a session with the same "
                "model and picture, or ask anew."
            )
    session.end_answer()
    session.forget_keys(kv_bits)
    session.prompt_cache.layers, session.prompt_cache.ids = layers, ids
    session.features, session.exchanges = features, exchanges
    session.seed, session.rng = seed, rng


def _key(session: Session) -> dict[str, str]:
    """What has to be the same for keys and values to mean the same."""
    config = session.processor.config
    pixels = hashlib.sha256(np.array(session.pixel_values).tobytes())
    pixels.update(repr(session.image_size).encode())
    return {
        "model": fingerprint(session.model),
        "picture": pixels.hexdigest(),
        "template": repr((TEMPLATES[config.prompt_template], config.use_im_start_end)),
    }


def fingerprint(model: Model, counts: Callable[[str], bool] = lambda name: True) -> str:
    """A hash of names, shapes, dtypes and some values of the parameters, and of the config.

    counts: which parameters do, by their names; all.

    Whole weights would take seconds to hash.
    """
    digest = hashlib.sha256()
    config = {name: value for name, value in vars(model.config).items() if name != "raw"}
    digest.update(repr(config).encode())
    digest.update(getattr(model.vision_tower, "identity", "").encode())
    for name, value in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        if not counts(name):
            continue
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        step = max(1, value.size // _VALUES_HASHED)
        sample = value.reshape(-1)[::step]
        # NumPy has no bfloat16; float32 holds every half and is exact.
        exact = mx.float32 if mx.issubdtype(value.dtype, mx.floating) else value.dtype
        digest.update(np.array(sample.astype(exact)).tobytes())
    return digest.hexdigest()


def _exchanges(saved: list[dict[str, Any]], points: np.ndarray) -> list[Exchange]:
    exchanges, first = [], 0
    for values in saved:
        count = len(values["region_texts"])
        exchanges.append(Exchange(**values, points=list(points[first : first + count])))
        first += count
    if first != len(points):
        raise ValueError(f"{len(points)} regions' points for {first} regions")
    return exchanges


def _checked(path: str | os.PathLike[str]) -> Path:
    target = Path(path).expanduser()
    if target.suffix != SUFFIX:
        raise ValueError(f"{target} is no name of a saved session; let it end in {SUFFIX}.")
    return target
