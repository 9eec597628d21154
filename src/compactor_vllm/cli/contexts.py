"""`compactor-vllm compress` and `compactor-vllm ask`: a document compressed into a file, and questions about it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compactor_vllm.cli import options, runtime
from compactor_vllm.cli.console import err, format_bytes, format_seconds
from compactor_vllm.config import SamplingParams
from compactor_vllm.errors import InvalidInputError

if TYPE_CHECKING:
    from compactor_vllm import LLM, Context

COMPRESS_EPILOG = """
**Examples**

    compactor-vllm compress book.txt -o book.kv --ratio 0.2

    compactor-vllm compress book.txt -o book.kv --ratio auto --quality 0.9

    compactor-vllm ask book.kv "Who is the captain?"

The file holds the kept keys and values, and works with the same weights only, on any machine.
"""
ASK_EPILOG = """
**Examples**

    compactor-vllm ask book.kv "Who is the captain?" "Where does he sail?"

    cat questions.txt | compactor-vllm ask book.kv --json

Questions are lines of standard input where none are given. All of them share the document's pages.
"""


def compress(
    file: Annotated[Path, typer.Argument(help='Text to compress; "-" is standard input.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the compressed context goes.")],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="As a user's message, or as it is. [default: chat where there is a template]"
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message before the document.")] = None,
    model: options.Model = options.BUILT_IN_MODEL,
    path: options.ModelPath = None,
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    method: options.Method = None,
    method_param: options.MethodParam = None,
    ratio: options.Ratio = 0.25,
    quality: options.Quality = None,
    max_kept_tokens: options.MaxKeptTokens = None,
    protected_first: options.ProtectedFirst = 16,
    protected_last: options.ProtectedLast = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    debug: options.Debug = False,
) -> None:
    """Compress a document into a file that `ask` answers questions from."""
    compression = runtime.Compression.from_options(
        method=method,
        method_param=method_param,
        ratio=ratio,
        quality=quality,
        max_kept_tokens=max_kept_tokens,
        protected_first=protected_first,
        protected_last=protected_last,
    )
    text = runtime.read_text(file)
    with runtime.open_llm(
        model,
        path=path,
        revision=revision,
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
    ) as llm:
        began = time.perf_counter()
        with llm.compress(_document(llm, text, chat, system), compression.batch, compression.sequence) as context:
            seconds = time.perf_counter() - began
            context.save(output)
            err().print(_summary(context, output, seconds), style="dim")


def _document(llm: LLM, text: str, chat: bool | None, system: str | None) -> Any:
    has_template = bool(getattr(llm.tokenizer, "chat_template", None))
    if not (has_template if chat is None else chat):
        if system:
            raise InvalidInputError("--system is part of the chat template, which a raw context does not use")
        return text
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


def _summary(context: Context, output: Path, seconds: float) -> str:
    share = 100 * context.kv_bytes / context.kv_bytes_full
    parts = [
        f"{context.num_tokens} tokens, {context.kept_tokens} kept per layer and head on average",
        *runtime.choice(context.chosen_ratio, context.predicted_quality),
        f"KV cache {format_bytes(context.kv_bytes)} of {format_bytes(context.kv_bytes_full)} ({share:.0f} %)",
        format_seconds(seconds),
        f"{output}: {format_bytes(output.stat().st_size)}",
    ]
    return " | ".join(parts)


def ask(
    context_file: Annotated[Path, typer.Argument(metavar="CONTEXT", help="A file that `compress` wrote.")],
    questions: Annotated[list[str] | None, typer.Argument(help="Questions; none: lines of standard input.")] = None,
    as_json: options.AsJson = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="[default: the model that the file names]")] = None,
    path: options.ModelPath = None,
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    debug: options.Debug = False,
) -> None:
    """Answer questions about a compressed document; the document itself is not needed any more."""
    asked = list(questions or [])
    if not asked:
        if sys.stdin.isatty():
            raise InvalidInputError("nothing to answer: give a QUESTION, or pipe one a line in")
        asked = [line.strip() for line in sys.stdin if line.strip()]
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    from compactor_vllm.contexts.file_format import model_of

    with runtime.open_llm(
        model or model_of(context_file),
        path=path,
        revision=revision,
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
    ) as llm:
        began = time.perf_counter()
        with llm.load_context(context_file) as context:
            loaded = time.perf_counter() - began
            answers = _answers(llm, context, asked, sampling)
    for question, answer in zip(asked, answers, strict=True):
        print(json.dumps({"question": question, **answer.as_dict()}) if as_json else answer.text.strip())
    err().print(f"context loaded in {format_seconds(loaded)} | {answers[-1].statistics()}", style="dim")


def _answers(llm: LLM, context: Context, questions: list[str], sampling: SamplingParams) -> list[runtime.Answer]:
    began = time.perf_counter()
    if context.chat_suffix is None:
        sequences = llm.generate(questions, sampling, return_sequences=True, context=context)
    else:
        messages = [[{"role": "user", "content": question}] for question in questions]
        sequences = llm.generate_chat(messages, sampling, return_sequences=True, context=context)
    seconds = time.perf_counter() - began
    return [runtime.Answer.from_sequence(sequence, seconds) for sequence in sequences]
