"""Second stage: ``python -m reference.train`` trains ferret-tiny on conversations about scenes.

The vision tower comes from ``reference.pretrain``; it stays frozen unless ``--vision-lr`` is given.
Stops and resumes at any checkpoint; ``--init`` starts from a released-layout folder instead.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ferret_mlx.tokenizer import Tokenizer

from .align import init_attention, init_projector, init_words
from .config import TwinConfig
from .data import SceneStream, normalise
from .glyphs import NAMES
from .layout import copy_tokenizer, read_released, write_released
from .model import Twin
from .objective import answer_states, figures, region_loss, token_loss
from .pretrain import schedule
from .samples import ConversationSample, collate, prefix_ids
from .vision import DenseHeads
from .vocabulary import write_tokenizer

HERE = Path(__file__).parent
SHOWN = ("loss", "region", "gaze", "name", "yes_no", "find_off", "count", "relate")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, default=HERE / "data" / "vision.pt")
    parser.add_argument("--init", type=Path, help="released-layout folder to go on from")
    parser.add_argument("--out", type=Path, default=Path("runs/ferret-tiny"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="end the schedule after this time instead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--budget", type=int, default=240, help="text tokens per picture")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vision-lr", type=float, default=0.0)
    parser.add_argument("--spread", type=float, nargs=2, default=(10.0, 2.0), help="first and last")
    parser.add_argument("--likeness", type=float, default=0.2, help="weight of region_loss")
    parser.add_argument("--gaze", type=float, default=0.3, help="weight of gaze_loss")
    parser.add_argument("--chained", type=float, default=0.15, help="share of real conversations")
    parser.add_argument("--first-scene", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument(
        "--compile", action="store_true", help="fuse sampler and LLM layers (needs g++)"
    )
    return parser.parse_args()


def build(args, tokenizer: Tokenizer, numbers: range) -> Twin:
    if args.init:
        return read_released(args.init).train()
    twin = Twin(TwinConfig(vocab_size=len(tokenizer), region_token_id=tokenizer.region_token_id))
    heads = DenseHeads(twin.config.vision_width)
    parts = torch.nn.ModuleList([twin.tower, heads])
    parts.load_state_dict(torch.load(args.vision, weights_only=True, map_location="cpu")["parts"])
    init_words(twin, numbers)
    init_attention(twin)
    init_projector(twin, heads, tokenizer)
    return twin


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.out / "tokenizer"
    if not folder.exists():  # never anew: other ids for the same pieces would go unnoticed
        if args.init:
            copy_tokenizer(args.init, folder)
        else:
            write_tokenizer(folder)
    tokenizer = Tokenizer(folder)
    zero = tokenizer.get_vocab()["0"]
    numbers = range(zero, zero + 1000)
    twin = build(args, tokenizer, numbers).to(device)
    if args.compile:
        # One version of a layer per place in the cache and per length of the batch.
        torch._dynamo.config.recompile_limit = 64
        sampler = twin.region_geo_sampler
        sampler._pool = torch.compile(sampler._pool, dynamic=True)
        for layer in twin.llama.model.layers:
            layer.forward = torch.compile(layer.forward)
    groups = [{"params": [p for n, p in twin.named_parameters() if not n.startswith("tower.")]}]
    groups[0]["peak"] = args.lr
    if args.vision_lr:
        groups.append({"params": list(twin.tower.parameters()), "peak": args.vision_lr})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    saved, first, spent = args.out / "state.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=device)
        twin.load_state_dict(state["twin"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    make = ConversationSample(
        folder, twin.config.image_size, twin.config.grid, args.turns, args.budget, args.chained
    )
    stream = SceneStream("train", args.first_scene + first * args.batch, make)
    loader = DataLoader(
        stream, args.batch, num_workers=args.workers, prefetch_factor=2, collate_fn=collate
    )
    prefix = torch.tensor(prefix_ids(tokenizer), device=device)
    words = torch.tensor([tokenizer.get_vocab()["\u2581" + n] for n in NAMES], device=device)
    average: dict[str, float] = {}
    began = time.time() - spent
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=15)
    for step, batch in zip(bar, loader, strict=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        seconds = time.time() - began
        done = seconds / (60 * args.minutes) if args.minutes else step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / 200, schedule(int(done * 1000), 1000, 0))
        with torch.autocast(device, torch.bfloat16):
            with torch.set_grad_enabled(args.vision_lr > 0):
                features = twin.encode_image(normalise(batch["pixels"]))
            vectors = twin.region_geo_sampler(features, batch["points"], batch["picture"])
            states = answer_states(twin, batch, features, vectors, prefix)
            logits = twin.llama.lm_head(states.hidden)
        targets = states.targets
        spread = args.spread[0] * (args.spread[1] / args.spread[0]) ** min(1.0, done)
        likeness = region_loss(vectors, batch["named"], twin.embed_tokens(words))
        loss = token_loss(logits, targets, numbers, spread)
        loss = loss + args.likeness * likeness + args.gaze * states.gaze
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        for name, value in {
            "loss": loss.item(),
            "region": likeness.item(),
            "gaze": states.gaze.item(),
            **figures(logits, targets, batch, numbers),
        }.items():
            average[name] = 0.97 * average.get(name, value) + 0.03 * value
        if step % 25 == 0:
            bar.set_postfix({k: f"{average[k]:.3f}" for k in SHOWN if k in average}, refresh=False)
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "s": round(seconds), **average}) + "\n")
        finished = step + 1 == args.steps or done >= 1
        if (step + 1) % args.save_every == 0 or finished:
            state = {"twin": twin.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(
                state | {"step": step + 1, "seconds": time.time() - began}, args.out / "new.pt"
            )
            (args.out / "new.pt").rename(saved)
        if finished:
            break
    write_released(twin, args.out / "released", folder)


if __name__ == "__main__":
    main()
