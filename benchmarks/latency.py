"""Where the time of an answer goes: ``python -m benchmarks.latency [--model DIR | --random 7b]``.

Each figure is a median after a warm-up, with the middle half of the runs, and beside it the
roofline: what reading the bytes or computing the products would take at the chip's best
(``--bandwidth`` and ``--tflops`` where the chip is not in the table). The last line is JSON.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import stream_generate as lm_stream_generate
from mlx_lm.generate import generation_stream
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper

from ferret_mlx import Box, Session, load
from ferret_mlx.config import SamplerConfig
from ferret_mlx.coreml_tower import COMPUTE_UNITS
from ferret_mlx.errors import ArgumentParser

from .measure import Machine, Timing, alternate, machine_line, measure, summary
from .random_model import SIZES, random_model
from .sampler import draw_points, multiplications
from .vision_towers import coreml_towers, report_towers

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "examples" / "rocket.png"
FIRST = ("What is [region0]? Give its box.", [Box(233, 95, 316, 165)])
FOLLOW_UP = ("And what is [region0]?", [Box(16, 189, 139, 313)])


class Report:
    """Prints figures as they come and keeps them for the JSON."""

    def __init__(self, machine: Machine):
        self.machine, self.results = machine, {}

    def time(self, name: str, timing: Timing, nbytes: float = 0, operations: float = 0) -> None:
        roofline = ""
        if nbytes or operations:
            roofline = f"   [{self.machine.share(timing.median, nbytes, operations)}]"
            least = self.machine.least(nbytes, operations)
            self.results[f"{name}, roofline"] = least and round(least, 6)
        print(f"{name:<42} {timing}{roofline}", flush=True)
        self.results[name] = timing.as_dict()

    def value(self, name: str, value: float, unit: str) -> None:
        print(f"{name:<42} {value:.4g} {unit}", flush=True)
        self.results[f"{name} ({unit})"] = round(value, 4)


def parameters(module) -> int:
    """Numbers of a module's matrices, quantized ones counted as the numbers they stand for."""
    count = 0
    for _, part in module.named_modules():
        weight = part.get("weight") if hasattr(part, "get") else None
        if isinstance(weight, mx.array):
            bits = getattr(part, "bits", None)
            count += weight.size * 32 // bits if bits else weight.size
    return count


def nbytes(module) -> int:
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))


def first_chunk(chunks):
    """Wait for the first token of an answer, and end it."""
    chunk = next(chunks)
    chunks.close()
    return chunk


def measure_stages(report: Report, model, processor, repeats: int, regions: list[int]) -> None:
    session = Session(model, processor, PICTURE)
    report.time("picture to pixels", measure(lambda: Session(model, processor, PICTURE), repeats))
    tower, text = model.vision_tower, model.language_model
    rows, columns = model.config.vision.grid
    pixels = session.pixel_values
    report.time(
        "image encode", measure(lambda: mx.eval(model.encode_image(pixels)), repeats),
        nbytes(tower), 2 * parameters(tower) * rows * columns,
    )  # fmt: skip
    features = model.encode_image(pixels)
    mx.eval(features)
    width, output = features.shape[-1], model.config.text["hidden_size"]
    for count in regions:
        points = mx.array(draw_points(count))
        counted = multiplications(width, output, rows, count, SamplerConfig())
        report.time(
            f"sampler, {count} regions",
            measure(lambda points=points: mx.eval(model.region_sampler(features, points)), repeats),
            nbytes(model.region_sampler), 2 * counted["folded"],
        )  # fmt: skip
    inputs = processor(PICTURE, *FIRST)
    ids = model.expand_ids(inputs.input_ids)
    rows_in = model.embed_inputs(inputs.input_ids, pixels, inputs.region_points)
    mx.eval(rows_in)

    def prefill() -> None:
        cache = model.make_cache()
        mx.eval(model.next_logits(ids[None], cache, rows_in))

    embedding = text.model.embed_tokens
    matrices = parameters(text) - parameters(embedding)
    report.time(
        f"prefill, {ids.size} tokens", measure(prefill, repeats),
        nbytes(text) - nbytes(embedding), 2 * matrices * ids.size,
    )  # fmt: skip


def measure_session(report: Report, model, processor, repeats: int) -> None:
    options = {"max_tokens": 8}

    def first() -> None:
        first_chunk(Session(model, processor, PICTURE).ask(*FIRST, **options))

    report.time("first question, first token", measure(first, repeats))
    first_seconds = report.results["first question, first token"]["median"]

    session = Session(model, processor, PICTURE)
    follow_ups, bare = [], []
    for turn in range(repeats + 1):
        session.reset()
        for _ in session.ask(*FIRST, **options):
            pass
        mx.synchronize(generation_stream)  # mlx-lm starts one token more than it gives
        start = time.perf_counter()
        count = first_chunk(session.ask(*FOLLOW_UP, **options)).prompt_tokens
        seconds = time.perf_counter() - start
        # The least it could take: one call on as many tokens over the same cache, and the sampler.
        cache, points = session.prompt_cache, mx.array(np.stack(session.exchanges[-1].points))
        new = cache.ids[-count:]
        cache.trim(len(cache.ids) - count)
        ids = model.expand_ids(new)[None]
        start = time.perf_counter()
        vectors = model.region_sampler(session.features, points)
        rows = model.embed_part(new, session.features, vectors)
        mx.eval(model.next_logits(ids, cache.layers, rows).argmax(axis=-1))
        if turn:
            bare.append(time.perf_counter() - start)
            follow_ups.append(seconds)
        # What the bare call wrote.
        cache.trim(len(cache.ids))
    report.time("follow-up, first token", summary(follow_ups))
    report.time(f"bare call on its {count} tokens and region", summary(bare))
    report.value("follow-up / bare call", summary(follow_ups).median / summary(bare).median, "x")
    report.value("first question / follow-up", first_seconds / summary(follow_ups).median, "x")
    report.value("keys and values", session.kv_nbytes / 1e6, "MB")


class BareTokenizer(TokenizerWrapper):
    """What `mlx_lm.stream_generate` asks of a tokenizer; it never stops an answer."""

    def __init__(self, tokenizer):
        self._tokenizer, self._eos_token_ids = tokenizer, set()
        self._detokenizer = SPMStreamingDetokenizer(tokenizer)


def tokens_per_second(chunks) -> float:
    """From the first token on, so that what comes before it does not count."""
    next(chunks)
    start, count = time.perf_counter(), 0
    for _ in chunks:
        count += 1
    return count / (time.perf_counter() - start)


def measure_decoding(report: Report, model, processor, repeats: int, tokens: int) -> None:
    session = Session(model, processor, PICTURE)
    for _ in session.ask(*FIRST, max_tokens=1):
        pass
    length = session.tokens
    bare_tokenizer = BareTokenizer(processor.tokenizer)
    # The same language model on as many tokens of text.
    prompt = mx.array(np.random.default_rng(0).integers(3, 1000, length))
    ours, theirs = [], []
    for turn in range(repeats + 1):
        session.reset()
        ours.append(tokens_per_second(session.ask(*FIRST, max_tokens=tokens)))
        stream = lm_stream_generate(model.language_model, bare_tokenizer, prompt, max_tokens=tokens)
        theirs.append(tokens_per_second(stream))
        if not turn:
            ours, theirs = [], []
    step = summary([1 / speed for speed in ours])
    text = model.language_model
    embedding = nbytes(text.model.embed_tokens)
    read = nbytes(text) - embedding + session.kv_nbytes
    report.time(f"decode, per token at {length} tokens", step, read)
    report.value("decode", float(np.median(ours)), "tokens/s")
    report.value("mlx_lm.stream_generate, same weights", float(np.median(theirs)), "tokens/s")
    report.value("decode / mlx_lm", 100 * float(np.median(ours) / np.median(theirs)), "%")


def measure_many(report: Report, model, processor, repeats: int, count: int, tokens: int) -> None:
    session = Session(model, processor, PICTURE)
    places = np.random.default_rng(0).integers(0, 130, (count, 2)).tolist()
    questions = [("What is [region0]?", [Box(x, y, x + 90, y + 60)]) for x, y in places]

    def one_by_one() -> None:
        for prompt, regions in questions:
            session.reset()
            for _ in session.ask(prompt, regions, max_tokens=tokens):
                pass

    def together() -> None:
        for _ in session.ask_many(questions, max_tokens=tokens, batch_size=count):
            pass

    times = alternate({"one by one": one_by_one, "together": together}, repeats)
    for name, timing in times.items():
        report.time(f"{count} questions {name}", timing)
    factor = times["one by one"].median / times["together"].median
    report.value(f"throughput of ask_many, {count} questions", factor, "x")


def measure_cold_start(report: Report, model: str | None, repeats: int) -> None:
    """From the start of a process to the first byte of its answer."""
    command = [sys.executable, str(ROOT / "generate.py"), "--image", str(PICTURE)]
    command += ["--prompt", "What is [region0]?", "--box", "233,95,316,165"]
    command += ["--model", model] if model else []

    def help_only() -> None:
        subprocess.run([*command[:2], "--help"], stdout=subprocess.DEVNULL, check=True)

    report.time("generate.py --help", measure(help_only, repeats))
    seconds = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.read(1)
        if turn:
            seconds.append(time.perf_counter() - start)
        process.communicate()
    report.time("cold process, first byte of the answer", summary(seconds))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="converted model (default: the bundled one)")
    add("--random", choices=SIZES, help="random weights of the released sizes instead")
    add("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of these")
    add("--bits", type=int, choices=(4, 8), help="quantize their language model")
    add("--regions", type=int, nargs="+", default=[1, 8, 32])
    add("--questions", type=int, default=16, help="asked together")
    add("--tokens", type=int, default=64, help="of each answer")
    add("--repeats", type=int, default=7)
    add("--vision", default="mlx", help="comma-separated: mlx, coreml or paths of packages (macOS)")
    add("--coreml-compute-units", nargs="+", choices=COMPUTE_UNITS, default=COMPUTE_UNITS)
    add("--bandwidth", type=float, help="of the memory, GB/s")
    add("--tflops", type=float, help="of the GPU")
    args = parser.parse_args()
    packages = [vision for vision in args.vision.split(",") if vision != "mlx"]
    if packages and args.random:
        parser.error("--vision coreml needs the packages of a --model, --random has none")
    try:
        towers = coreml_towers(args.model, packages, args.coreml_compute_units)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.random:
        model, processor = random_model(args.random, getattr(mx, args.dtype), args.bits)
        name = f"random {args.random}, {args.dtype}" + (f", {args.bits} bits" if args.bits else "")
    else:
        model, processor = load(args.model)
        name = args.model or "ferret-tiny"
    processor.tokenizer.eos_token_ids = set()  # answers of equal length
    report = Report(Machine.find(args.bandwidth, args.tflops))
    print(f"{name} on {machine_line()}")
    mx.reset_peak_memory()
    measure_stages(report, model, processor, args.repeats, args.regions)
    if towers:
        pixels = Session(model, processor, PICTURE).pixel_values
        report_towers(report, {"mlx": model.vision_tower, **towers}, pixels, args.repeats)
    measure_session(report, model, processor, args.repeats)
    measure_decoding(report, model, processor, args.repeats, args.tokens)
    measure_many(report, model, processor, args.repeats, args.questions, args.tokens)
    if not args.random:
        measure_cold_start(report, args.model, min(args.repeats, 3))
    report.value("peak memory", mx.get_peak_memory() / 1e9, "GB")
    print(json.dumps({"machine": machine_line(), "model": name, "results": report.results}))


if __name__ == "__main__":
    main()
