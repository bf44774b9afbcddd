"""One language model in several processes: ``mlx.launch -n 2 -- python -m benchmarks.sharding``.

The first process answers the questions of ``benchmarks.accuracy`` alone, with the whole model; then
all answer them together, each with its part. Prints how many answers are the same, tokens per
second, and the memory of each process. On one machine set OPENBLAS_NUM_THREADS=1 before.
"""

import argparse
import json
import resource
import sys
import time

import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from ferret_mlx import Session, load
from ferret_mlx.distribution import Ranks
from ferret_mlx.errors import run_command

from .accuracy import MAX_TOKENS, table
from .measure import machine_line
from .scene_questions import load_scenes, questions


def ask(model: tuple, scenes: list, count: int, label: str | None) -> tuple[list[str], float]:
    """The first ``count`` answers, greedy, and tokens per second; label: of a progress bar."""
    texts: list[str] = []
    tokens, seconds = 0, 0.0
    for number, scene in tqdm(scenes, label, disable=label is None):
        asked = [(q.text, q.regions) for q in questions(scene, number)][: count - len(texts)]
        if not asked:
            break
        session = Session(*model, scene.image)
        start = time.perf_counter()
        answers = sorted(session.ask_many(asked, max_tokens=MAX_TOKENS), key=lambda a: a.index)
        seconds += time.perf_counter() - start
        texts += [answer.text for answer in answers]
        tokens += sum(answer.generation_tokens for answer in answers)
    return texts, tokens / seconds


def weights(model) -> int:
    """Bytes."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def peak_memory() -> int:
    """Bytes of the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


@run_command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="MLX folder; default: the bundled model")
    parser.add_argument("--questions", type=int, default=100)
    args = parser.parse_args(argv)
    ranks = Ranks()
    scenes = load_scenes(args.questions)  # each has more than one question
    alone, row = [], {}
    if ranks.leads:
        model = load(args.model)
        alone, speed = ask(model, scenes, args.questions, "alone")
        row = {"weights": weights(model[0]), "peak": peak_memory(), "speed": speed}
        del model
        mx.clear_cache()
    ranks.gather(None)  # nobody else computes meanwhile
    model = load(args.model, tensor_group=ranks.group)
    label = "together" if ranks.leads else None
    together, speed = ask(model, scenes, args.questions, label)
    parts = ranks.gather({"weights": weights(model[0]), "peak": peak_memory(), "speed": speed})
    said = ranks.gather(together)
    if not ranks.leads:
        return
    rows = {"one process": row, **{f"process {rank}": part for rank, part in enumerate(parts)}}
    # The first one's peak is that of the whole model.
    rows["process 0"].pop("peak")
    print(table({name: shown(row) for name, row in rows.items()}))
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    print(f"{same} of {len(alone)} answers are the same; all processes gave the same answers: "
          f"{'yes' if all(texts == together for texts in said) else 'NO'}.")  # fmt: skip
    result = {"machine": machine_line(), "same": same, "of": len(alone), "rows": rows}
    print(json.dumps(result))


def shown(row: dict) -> dict:
    cells = {"weights, GB": row["weights"] / 1e9, "tokens/s": row["speed"]}
    if "peak" in row:
        cells["peak memory, GB"] = row["peak"] / 1e9
    return {name: f"{value:.3g}" for name, value in cells.items()}


if __name__ == "__main__":
    main()
