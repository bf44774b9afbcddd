"""First stage: ``python -m reference.pretrain`` trains the vision tower on dense labels."""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .config import TwinConfig
from .data import DenseSample, SceneStream, normalise
from .vision import DenseHeads, build_tower, dense_loss, init_tower, tower_features


def schedule(step: int, steps: int, warmup: int = 200, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine down to ``floor`` of the peak learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/vision"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = TwinConfig(vocab_size=0, region_token_id=0)
    tower, heads = build_tower(config), DenseHeads(config.vision_width)
    init_tower(tower, config.grid)
    parts = torch.nn.ModuleList([tower, heads]).to(device)
    optimizer = torch.optim.AdamW(
        parts.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    args.out.mkdir(parents=True, exist_ok=True)
    saved, first, seconds = args.out / "state.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=device)
        parts.load_state_dict(state["parts"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    stream = SceneStream("train", first * args.batch, DenseSample(config.image_size, config.grid))
    loader = DataLoader(stream, args.batch, num_workers=args.workers, prefetch_factor=4)
    average: dict[str, float] = {}
    began = time.time() - seconds
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)
    for step, (pixels, labels, boxes) in zip(bar, loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        with torch.autocast(device, torch.bfloat16):
            features = tower_features(tower, normalise(pixels.to(device)))
        loss, figures = dense_loss(
            heads(features), labels.to(device), boxes.to(device), config.grid
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        figures["loss"] = loss.item()
        for name, value in figures.items():
            average[name] = 0.97 * average.get(name, value) + 0.03 * value
        if step % 25 == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in average.items()}, refresh=False)
            with (args.out / "log.jsonl").open("a") as log:
                log.write(
                    json.dumps({"step": step, "s": round(time.time() - began), **average}) + "\n"
                )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"parts": parts.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "seconds": time.time() - began}
            torch.save(state, args.out / "state.tmp")
            (args.out / "state.tmp").rename(saved)


if __name__ == "__main__":
    main()
