"""A conversation about a picture in the terminal: python -m ferret_mlx.chat --image FILE"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .arguments import (
    STROKE_WIDTH,
    add_sampling_options,
    join_negative,
    number,
    region_type,
    sampling_options,
)
from .errors import ArgumentParser, one_line, run_command
from .terminal import join_ranks, load_model, report, report_loaded

if TYPE_CHECKING:
    from PIL import Image

    from .model import Model
    from .processor import Processor
    from .regions import Region
    from .session import Session

HELP = """\
/point X,Y  /box X1,Y1,X2,Y2  /mask FILE  /polygon X,Y X,Y ...  /stroke X,Y X,Y ...
                  give a region; it keeps its name, [region0], [region1], ..., for the whole
                  conversation. A question that names none is about those given since the last
/regions          list them
/image FILE       another picture, a new conversation
/save OUT.png     the picture with the last answer's boxes and the regions it was asked about
/reset            forget turns and regions, keep the picture
/help  /quit      also Ctrl-D; Ctrl-C stops an answer"""
FORMS = {
    "point": "X,Y", "box": "X1,Y1,X2,Y2", "mask": "FILE", "polygon": "X,Y X,Y X,Y ...",
    "stroke": "X,Y X,Y ...",
}  # fmt: skip
_NAME = re.compile(r"\[region([0-9]+)\]")


class Chat:
    """What a line does; answers go to stdout, everything else to stderr.

    options: of `Session.ask`.
    """

    def __init__(
        self, model: Model, processor: Processor, stroke_width: float, options: dict[str, Any]
    ):
        self.model, self.processor = model, processor
        self.stroke_width, self.options = stroke_width, options
        self.picture: Image.Image
        self.path: str
        self.session: Session
        self.regions: list[Region] = []
        self.fresh = 0  # the first region that no question was asked about yet
        self.last: tuple[str, list[Region]] = ("", [])

    def image(self, path: str) -> None:
        from .image import open_image
        from .session import Session

        picture = open_image(path)
        self.session = Session(self.model, self.processor, picture)
        self.picture, self.path = picture, path
        self._forget()
        report(f"{path}: {picture.width} x {picture.height} pixels.")

    def region(self, kind: str, text: str) -> None:
        try:
            flag = region_type(kind, FORMS[kind])(text)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"/{kind}: {error}.") from None
        region = flag.build(self.picture.size, self.stroke_width)
        shown = region.text(self.picture.size)
        self.regions.append(region)
        report(f"[region{len(self.regions) - 1}] is the {kind} {shown}.")

    def list_regions(self, _: str) -> None:
        for index, region in enumerate(self.regions):
            report(f"[region{index}] {region}")
        if not self.regions:
            report("No region was given.")

    def save(self, path: str) -> None:
        from .boxes import parse_boxes
        from .draw import check_target, draw_answer, save_picture

        target = check_target(path)
        if target.exists() and target.samefile(self.path):
            raise ValueError(f"/save {path} would overwrite the picture; choose another name.")
        text, regions = self.last
        boxes = parse_boxes(text, self.picture.size)
        save_picture(draw_answer(self.picture, boxes, regions), path)
        report(f"Saved {path} with {len(boxes)} box{'' if len(boxes) == 1 else 'es'}.")

    def reset(self, _: str) -> None:
        self.session.reset()
        self._forget()

    def ask(self, text: str) -> None:
        """Stream the answer; Ctrl-C ends it, and it stays as far as it was said."""
        question, regions = self._regions_of(text)
        turns = len(self.session.exchanges)
        chunks = self.session.ask(question, regions, drop_oldest=True, **self.options)
        said = ""
        with _interrupts() as interrupted:
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
                said += chunk.text
                if interrupted():
                    chunks.close()
        print(flush=True)
        self.fresh, self.last = len(self.regions), (said, regions)
        session = self.session
        dropped = turns + 1 - len(session.exchanges)
        if dropped:
            which = "turn was" if dropped == 1 else f"{dropped} turns were"
            report(f"note: the context is full, the oldest {which} forgotten.")
        report(
            f"({session.tokens} of {self.processor.config.context} tokens, keys and values "
            f"{session.kv_nbytes / 1e6:.1f} MB)"
        )

    def line(self, line: str) -> None:
        """Do what a line says. Raises ValueError, OSError for what cannot be done."""
        if not line.startswith("/"):
            self.ask(line)
            return
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "image": self.image, "save": self.save, "reset": self.reset,
            "regions": self.list_regions, "help": lambda _: report(HELP),
        }  # fmt: skip
        rest = rest.strip()
        if name in FORMS:
            self.region(name, rest)
        elif name not in commands:
            raise ValueError(f"There is no /{name}; /help lists what there is.")
        elif not rest and name in ("image", "save"):
            raise ValueError(f"/{name} needs a file.")
        else:
            commands[name](rest)

    def _regions_of(self, text: str) -> tuple[str, list[Region]]:
        """The question with its regions counted within it, and those regions."""
        named = sorted({int(index) for index in _NAME.findall(text)})
        if not named:
            return text, self.regions[self.fresh :]
        if named[-1] >= len(self.regions):
            raise ValueError(
                f"There is no [region{named[-1]}], {len(self.regions)} were given; "
                "/regions lists them."
            )
        question = _NAME.sub(lambda match: f"[region{named.index(int(match[1]))}]", text)
        return question, [self.regions[index] for index in named]

    def _forget(self) -> None:
        self.regions, self.fresh, self.last = [], 0, ("", [])


@run_command
def chat_main(argv: Sequence[str] | None = None) -> None:
    """Read questions and commands from the terminal, or from stdin, until it ends."""
    args = _parser().parse_args(join_negative(sys.argv[1:] if argv is None else argv))
    ranks = join_ranks()
    with ranks.agree():
        if ranks.count > 1:
            raise ValueError("A conversation has one process; start it without mlx.launch.")
    from .image import open_image

    open_image(args.image)  # refused before the model is loaded
    model, processor, seconds = load_model(args.model)
    chat = Chat(model, processor, args.stroke_width, sampling_options(args))
    chat.image(args.image)
    report_loaded(args.model, seconds)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        report("Ask, or /help.")
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() its history and editing
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        if line == "/quit":
            break
        try:
            if line:
                chat.line(line)
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except (ValueError, OSError) as error:
            report(f"error: {one_line(error)}")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising in the middle of a step; a second one raises."""
    noted = False

    def note(*_: Any) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, previous)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="ferret_mlx.chat",
        description="Talk with a Ferret model about a picture and regions of it.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--image", required=True, metavar="FILE", help="picture to talk about")
    add("--model", metavar="PATH|HUB_ID", help="converted model (default: the small bundled one)")
    add("--stroke-width", type=number(1, None), default=STROKE_WIDTH, metavar="N",
        help="of all strokes, in pixels (default: %(default)g)")  # fmt: skip
    add_sampling_options(parser)
    return parser


if __name__ == "__main__":
    chat_main()
