"""The text of `measure.quality`, as windows of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.schema import ConfigError
from launcher.prompts.prompts import encode
from shards.untrusted_files import read_bytes

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

TEXTS = {"builtin": Path(__file__).with_name("quality.txt")}
WINDOW_TOKENS = 256
MOST_WINDOWS = 16
MOST_TEXT_BYTES = 1 << 20


def windows(config: RunConfig, folder: Path | None, context: int | None) -> tuple[tuple[int, ...], ...]:
    """The first 4,096 tokens of the text in windows of 256 tokens, or of the model's context if that is shorter.

    Empty without `measure.quality`; ConfigError for a text of fewer than two tokens, or a model without a tokenizer.
    """
    text = config.measure.quality
    if text is None:
        return ()
    if folder is None:
        raise ConfigError(f"measure.quality={text} needs the tokenizer of the model.", "measure.quality=null")
    words = read_bytes(TEXTS.get(text, Path(text)), MOST_TEXT_BYTES).decode(errors="replace")
    [prompt] = encode([words], folder)
    ids, size = prompt.token_ids, min(WINDOW_TOKENS, context or WINDOW_TOKENS)
    cut = [tuple(ids[first : first + size]) for first in range(0, len(ids), size)][:MOST_WINDOWS]
    if len(cut[0]) < 2:
        raise ConfigError(f"measure.quality={text} has {len(ids)} tokens.", "measure.quality=builtin")
    return tuple(window for window in cut if len(window) > 1)
