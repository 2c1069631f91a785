"""Write the texts of many prompts: JSON lines into a file, or one after the other on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from writer import Writer

from moe.prompts_file import Prompt
from moe.write_texts import WrittenText, write_texts


def write_many(writer: Writer, prompts: Sequence[Prompt], output: Path | None) -> None:
    """Write batch after batch; a batch that is done is on the disk or the terminal."""
    batches = write_texts(
        writer.run.model, [writer.prompt_ids(prompt) for prompt in prompts],
        writer.config.sampling, names=[prompt.where for prompt in prompts],
        stop_ids=writer.stop_ids, num_samples=writer.config.num_samples,
        batch_size=writer.config.batch_size,
    )  # fmt: skip
    if output is None:
        for batch in batches:
            for text in batch:
                _show(writer, prompts[text.prompt], text)
        return
    first = next(batches)  # a prompt that is too long must not cost the file that was there
    with output.open("w", encoding="utf-8") as file:
        _write_records(writer, prompts, first, file)
        for batch in batches:
            _write_records(writer, prompts, batch, file)
    print(f"output: {output}, {len(prompts) * writer.config.num_samples} text(s)")


def _write_records(
    writer: Writer, prompts: Sequence[Prompt], batch: Iterable[WrittenText], file: TextIO
) -> None:
    for text in batch:
        prompt = prompts[text.prompt]
        record = prompt.record | {"sample": text.sample, "ids": text.ids}
        if not isinstance(prompt.given, tuple):
            record["text"] = _decoded(writer, prompt, text.ids)
        record["finish"] = "stop" if text.is_stopped else "length"
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()  # what was written stays, should a later batch be interrupted


def _show(writer: Writer, prompt: Prompt, text: WrittenText) -> None:
    """One text of several, under a line that says which."""
    sample = f", sample {text.sample + 1}" if writer.config.num_samples > 1 else ""
    if isinstance(prompt.given, tuple):
        shown = " ".join(map(str, [*prompt.given, *text.ids]))
    else:
        shown = prompt.start + _decoded(writer, prompt, text.ids)
    sys.stdout.write(f"--- {prompt.where}{sample}\n{shown}\n")
    sys.stdout.flush()


def _decoded(writer: Writer, prompt: Prompt, ids: Sequence[int]) -> str:
    return "".join(writer.tokenizer.decode_stream(ids, starts_text=prompt.starts_text))
