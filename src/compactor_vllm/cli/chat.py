"""`compactor-vllm chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from compactor_vllm.cli import options, runtime
from compactor_vllm.cli.console import err, print_error
from compactor_vllm.config import SamplingParams
from compactor_vllm.errors import InvalidInputError

if TYPE_CHECKING:
    from compactor_vllm import LLM

EPILOG = """
**While chatting**

    /stats   what the last answer took
    /reset   forget the conversation
    /exit    leave (as does Ctrl-D); Ctrl-C stops an answer

Earlier turns are compressed, the latest message is kept whole:

    compactor-vllm chat --ratio 0.5

Each line of a pipe is a message:

    printf 'Name a river.\\nName another one.\\n' | compactor-vllm chat
"""

HELP = "/stats, /reset, /exit; anything else is a message"


class Conversation:
    """Messages so far, and how the next one is answered."""

    def __init__(self, llm: LLM, sampling: SamplingParams, compression: runtime.Compression, system: str | None):
        self.llm, self.sampling, self.compression = llm, sampling, compression
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self.last: runtime.Answer | None = None

    def reset(self) -> None:
        self.messages, self.last = list(self._start), None

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces. A message whose answer fails or is broken off leaves no trace."""
        messages = [*self.messages, {"role": "user", "content": text}]
        context_end = len(messages) - 1 if len(messages) > 1 else None
        streamed = runtime.StreamedAnswer(self.llm, messages, self.sampling, self.compression.up_to(context_end))
        yield from streamed
        self.last = streamed.answer
        assert self.last is not None
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]


def read_lines(interactive: bool) -> Iterator[str]:
    """Lines of the terminal or of a pipe, stripped, until the end of input."""
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()  # the shell's prompt begins on a line of its own
            return
        yield line.strip()


def converse(conversation: Conversation, lines: Iterator[str], interactive: bool) -> None:
    """Answers every line until /exit or the end of input."""
    for line in lines:
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line == "/stats":
            last = conversation.last
            err().print("nothing was answered yet" if last is None else last.statistics(), style="dim")
        elif line.startswith("/") and " " not in line:
            err().print(HELP, style="dim")
        elif line:
            _print_answer(conversation, line, interactive)


def _print_answer(conversation: Conversation, line: str, interactive: bool) -> None:
    pieces = conversation.ask(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print()
    except InvalidInputError as error:
        if not interactive:
            raise
        print_error(error)


def chat(
    system: Annotated[str | None, typer.Option("--system", help="System message of the conversation.")] = None,
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
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    debug: options.Debug = False,
) -> None:
    """Talk to a model; answers stream, and earlier turns can be compressed."""
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
    interactive = sys.stdin.isatty()
    with runtime.open_llm(
        model,
        path=path,
        revision=revision,
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
    ) as llm:
        if interactive:
            err().print(f"{model}: {HELP}", style="dim")
        converse(Conversation(llm, sampling, compression, system), read_lines(interactive), interactive)
