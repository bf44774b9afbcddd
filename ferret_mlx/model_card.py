"""README.md of a converted model: where it came from, how, and under which terms."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

_DELTA_TERMS = """\
## Terms

These weights are a merge of the Ferret delta weights and Vicuna v1.3. They are for research use
only, under the terms of both: the Ferret deltas are CC BY-NC 4.0, and Vicuna falls under the
license of LLaMA (non-commercial).
"""

_USE = """\
## Use

```python
from ferret_mlx import Point, generate, load

model, processor = load("path/to/this/folder")
print(generate(model, processor, "photo.jpg", "What is [region0]?", regions=[Point(120, 80)]))
```
"""


def write_model_card(
    folder: Path,
    source: Path,
    name: str,
    base_model: str | None,
    command: str,
    precision: str,
    is_merge: bool,
) -> None:
    """Write `folder`/README.md.

    source: the converted folder; the metadata (license included) and text of its own card, if it
        has one, are kept.
    base_model: its Hub id, if it came from the Hub.
    command: the command line that repeats the conversion.
    precision: quantization or dtype, in words.
    is_merge: whether a delta was merged, whose terms then apply.
    """
    original = _read_card(source / "README.md")
    card = original or ModelCard("---\nlanguage: en\n---\n")
    card.data.library_name = "mlx"
    card.data.pipeline_tag = "image-text-to-text"
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), "mlx", "ferret"]))
    if base_model is not None:
        card.data.base_model = base_model
    if is_merge:
        card.data.license = "cc-by-nc-4.0"
    sections = [
        f"# {name}",
        f"Converted from {base_model or source.resolve().name} for ferret-mlx: {precision}.",
        f"```\n{command}\n```",
        _USE.strip(),
    ]
    if is_merge:
        sections.append(_DELTA_TERMS.strip())
    if original is not None and original.text.strip():
        sections += ["The card of the original model:", original.text.strip()]
    card.text = "\n\n".join(sections) + "\n"
    card.save(folder / "README.md")


def _read_card(path: Path) -> ModelCard | None:
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    # Someone else's front matter: a card that cannot be parsed is kept as text.
    except Exception:
        return ModelCard("---\nlanguage: en\n---\n" + text.replace("---", "", 2))
