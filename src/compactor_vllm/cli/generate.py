"""`compactor-vllm generate`: one prompt, one answer, one line of statistics."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compactor_vllm.cli import options, runtime
from compactor_vllm.cli.console import err
from compactor_vllm.config import SamplingParams
from compactor_vllm.errors import InvalidInputError

if TYPE_CHECKING:
    from compactor_vllm import LLM

EPILOG = """
**Examples**

A prompt, as text or through a pipe:

    compactor-vllm generate "Name three rivers of France."

    echo "Name three rivers of France." | compactor-vllm generate

A question about a document. The document is compressed to a quarter, the question is kept whole:

    compactor-vllm generate "What was decided?" --file minutes.txt --ratio 0.25

The same with another method and its option, with a method of your own, and with a fixed budget:

    compactor-vllm generate "What was decided?" --file minutes.txt --ratio 0.25 --method snapkv --method-param window=16

    compactor-vllm generate "What was decided?" --file minutes.txt --ratio 0.25 --method my_file.py:Mine

    compactor-vllm generate "What was decided?" --file minutes.txt --max-kept-tokens 512

As much of the document as 95 % of the full cache's quality needs (`calibrate` fits it to a model):

    compactor-vllm generate "What was decided?" --file minutes.txt --ratio auto --quality 0.95

For a program: `--json`. To continue a text instead of answering it: `--raw`.
"""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the command was given: a text to answer or continue, and a document before it, if any."""

    text: str
    document: str | None = None


def read_inputs(prompt: str | None, file: Path | None) -> Inputs:
    """PROMPT alone; FILE alone; PROMPT about FILE; standard input when neither is given ("-" names it as FILE).

    Raises:
        InvalidInputError: nothing was given, or a file cannot be read as text.
    """
    if file is None and prompt is None and sys.stdin.isatty():
        raise InvalidInputError("nothing to answer: give a PROMPT, --file FILE, or pipe text in (see --help)")
    if file is None and prompt is not None:
        return Inputs(text=prompt)
    content = sys.stdin.read() if file is None else runtime.read_text(file)
    return Inputs(text=content) if prompt is None else Inputs(text=prompt, document=content)


def build_prompt(llm: LLM, inputs: Inputs, *, chat: bool, system: str | None) -> tuple[runtime.Prompt, int | None]:
    """The prompt, and where its compressed part ends (`context_end`: a message's index in chat, a token's in raw)."""
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        if inputs.document is not None:
            messages.append({"role": "user", "content": inputs.document})
        messages.append({"role": "user", "content": inputs.text})
        return messages, len(messages) - 1 if inputs.document is not None else None
    if inputs.document is None:
        return inputs.text, None
    context = llm.tokenizer(inputs.document)["input_ids"]
    return context + llm.tokenizer("\n" + inputs.text, add_special_tokens=False)["input_ids"], len(context)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to answer, or a question about --file.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help='Text to answer; with PROMPT, its context. "-" is standard input.'),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Use the model's chat template, or continue the text as it is.")
    ] = True,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is drawn.")] = False,
    as_json: options.AsJson = False,
    model: options.Model = options.BUILT_IN_MODEL,
    path: options.ModelPath = None,
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    method: options.Method = None,
    method_param: options.MethodParam = None,
    ratio: options.Ratio = 1.0,
    quality: options.Quality = None,
    max_kept_tokens: options.MaxKeptTokens = None,
    protected_first: options.ProtectedFirst = 16,
    protected_last: options.ProtectedLast = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    debug: options.Debug = False,
) -> None:
    """Answer one prompt, or a question about a document, with a compressed KV cache.

    The answer goes to standard output, a line of statistics to standard error.
    """
    if stream and as_json:
        raise InvalidInputError("--stream and --json exclude each other: JSON is printed when the answer is complete")
    if system and not chat:
        raise InvalidInputError("--system is part of the chat template, which --raw does not use")
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    compression = runtime.Compression.from_options(
        method=method,
        method_param=method_param,
        ratio=ratio,
        quality=quality,
        max_kept_tokens=max_kept_tokens,
        protected_first=protected_first,
        protected_last=protected_last,
    )
    inputs = read_inputs(prompt, file)
    with runtime.open_llm(
        model,
        path=path,
        revision=revision,
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
    ) as llm:
        request, context_end = build_prompt(llm, inputs, chat=chat, system=system)
        compression = compression.up_to(context_end)
        if stream:
            streamed = runtime.StreamedAnswer(llm, request, sampling, compression)
            for text in streamed:
                print(text, end="", flush=True)
            print()
            answer = streamed.answer
            assert answer is not None
        else:
            answer = runtime.answer(llm, request, sampling, compression)
            print(json.dumps(report(answer, model, compression)) if as_json else answer.text)
    err().print(answer.statistics(), style="dim")


def report(answer: runtime.Answer, model: str, compression: runtime.Compression) -> dict[str, object]:
    """What --json prints."""
    return {
        "model": model,
        "method": compression.method_name,
        "compression_ratio": compression.sequence.compression_ratio,
        "quality": compression.sequence.wanted_quality,
        "max_kept_tokens": compression.sequence.max_kept_tokens,
        **answer.as_dict(),
    }
