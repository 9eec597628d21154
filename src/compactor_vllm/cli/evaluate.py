"""`compactor-vllm eval`: quality at every retention, from one command, and its report."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compactor_vllm.cli import evaluate_options as own
from compactor_vllm.cli import evaluate_report, options
from compactor_vllm.cli.console import err
from compactor_vllm.cli.env import package_version
from compactor_vllm.cli.evaluate_processes import engine_config, leave_unless, run_processes
from compactor_vllm.cli.many_values import ARGUMENTS, ManyValues
from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import InvalidInputError

if TYPE_CHECKING:
    from compactor_vllm import LLM
    from compactor_vllm.evaluation.run_config import MethodChoice, RunConfig
    from compactor_vllm.evaluation.runner import Shard
    from compactor_vllm.evaluation.suites import SuiteOptions

EPILOG = """
**Examples**

RULER's offline tasks with the built-in model, two methods at three retentions, and the report:

    compactor-vllm eval ruler --method compactor keydiff --ratio 1 0.5 0.25 --samples 10 --out runs/first

    compactor-vllm eval report runs/first

Every method, by four processes that share a GPU:

    compactor-vllm eval ruler --method all --discard 0 0.5 0.75 --samples 50 --batch-size 25 --processes 4

A method of your own, and one with options:

    compactor-vllm eval ruler --method my_file.py:Mine "expected_attention[head_floor=0.2]"

The specification's table, on the samples of kvpress's leaderboard:

    compactor-vllm eval ruler --length 4096 --model Qwen/Qwen3-8B --discard 0 0.25 0.5 0.75 0.9 0.95

A run that was broken off, or stopped by `--time-limit` (exit code 75), goes on when its command is given again.
Methods, retentions, tasks and samples may be added.
"""

RATIOS = (1.0, 0.5, 0.25)
HAS_EFFECT_ON = {
    "prebuilt": ("ruler",),
    "depths": ("needle",),
    "questions": ("questions",),
    "target": ("label-free",),
    "length": ("ruler", "needle", "infinitebench", "questions", "label-free"),
}
"""Suites that read an option, for options that some do not."""

SUITES = {
    "ruler": "RULER: needles, variable tracking, common and frequent words, question answering.",
    "needle": "One needle at every depth of texts of several lengths, for a heat-map.",
    "infinitebench": "InfiniteBench's generated tasks: a pass key, a string of digits, a value in JSON.",
    "questions": "Many questions about each context, which is compressed once.",
    "longbench": "LongBench v1 from the .jsonl files of its archive (--data).",
    "longbench-v2": "LongBench v2, from data.json (--data) or the hub.",
    "label-free": "The model's own predictions: NLL ratio, top-1 agreement, KL, attention error.",
}

app = typer.Typer(
    help="Measure what compression costs in quality.", epilog=EPILOG, no_args_is_help=True, rich_markup_mode="markdown"
)


def open_llm(config: LLMConfig) -> LLM:
    from compactor_vllm import LLM

    return LLM(config)


def run_suite(
    draft: RunConfig,
    config: LLMConfig,
    wanted: SuiteOptions,
    choices: Sequence[MethodChoice],
    out: Path,
    *,
    batch_size: int,
    shard: Shard | None = None,
    apart: bool = False,
    deadline: float | None = None,
    context_nll: bool = False,
) -> bool:
    """Measures what `out` does not have yet; returns whether this share of it is complete.

    Args:
        draft: the run's configuration without what only the samples and the engine tell.
        apart: a call for each method and retention.
        deadline: of `time.monotonic`; nothing begins that would end later.
        context_nll: label-free measures also look at the context itself.
    """
    from compactor_vllm.evaluation.label_free import LabelFree
    from compactor_vllm.evaluation.run_directory import RunDirectory
    from compactor_vllm.evaluation.runner import Answers, ContextAnswers, Measure, run_grid
    from compactor_vllm.evaluation.suites import suite_sources

    for choice in choices:
        choice.resolve()
    with open_llm(config) as llm:
        wanted = replace(wanted, max_length=min(wanted.max_length, llm.max_model_len))
        sources, substitutes = suite_sources(draft.suite, llm.tokenizer, wanted)
        run = replace(
            draft,
            tasks=list(dict.fromkeys(source.task for source in sources)),
            lengths=sorted({source.length for source in sources}),
            samples=max(source.count for source in sources),
            substitutes=substitutes,
            environment={"engine": llm.describe(), "fingerprint": llm.fingerprint, **versions()},
        )
        name = "" if shard is None else f"-{shard.index}-of-{shard.count}"
        directory = RunDirectory.create(out, run, f"predictions{name}.jsonl")
        for task, text in substitutes.items():
            err().print(f"{task}: {text}", style="dim")
        measure: Measure = {"questions": ContextAnswers}.get(run.suite, Answers)(llm, run)
        if run.suite == "label-free":
            measure = LabelFree(llm, run, context_nll=context_nll)
        return run_grid(
            sources,
            run.cells(choices),
            measure,
            directory,
            batch_size=batch_size,
            shard=shard,
            apart=apart,
            time_limit=None if deadline is None else max(0.0, deadline - time.monotonic()),
            show_progress=sys.stderr.isatty() and shard is None,
        )


def versions() -> dict[str, str]:
    names = ("compactor-vllm", "torch", "transformers")
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def retentions(ratio: Sequence[float] | None, discard: Sequence[float] | None) -> tuple[float, ...]:
    """The fractions kept.

    Raises:
        InvalidInputError: both options were given, or a value is out of range.
    """
    if ratio and discard:
        raise InvalidInputError("--ratio is the fraction kept, --discard the fraction removed; give one of them")
    values = [round(1 - d, 6) for d in discard] if discard else list(ratio or RATIOS)
    if any(not 0 < value <= 1 for value in values):
        raise InvalidInputError("--ratio must lie in (0, 1], --discard in [0, 1)")
    return tuple(dict.fromkeys(values))


def check_effects(suite: str, **given: Any) -> None:
    """Raises InvalidInputError for an option that has no effect on the suite."""
    for name, value in given.items():
        if value and suite not in HAS_EFFECT_ON[name]:
            raise InvalidInputError(
                f"--{name} has no effect on {suite}; it is an option of {', '.join(HAS_EFFECT_ON[name])}"
            )


def method_choices(given: Sequence[str] | None) -> list[MethodChoice]:
    """The methods, each once; "all" is every registered or installed one but the full cache.

    Raises:
        InvalidInputError: one of them cannot be read.
    """
    from compactor_vllm.compression import method_names
    from compactor_vllm.evaluation.run_config import FULL_CACHE, MethodChoice

    every = [name for name in method_names() if name != FULL_CACHE]
    names = [name for text in given or ["compactor"] for name in (every if text == "all" else [text])]
    return [MethodChoice.parse(name) for name in dict.fromkeys(names)]


def takes_prebuilt(model: str, lengths: Sequence[int], tasks: Sequence[str], data: Path | None) -> bool:
    """Whether samples of kvpress's leaderboard are meant: `data` has them, or the promised table is asked for."""
    from compactor_vllm.evaluation.report import promised_model

    if data is not None:
        return any((data / f"ruler-{n}{suffix}").exists() for n in lengths or (4096,) for suffix in (".jsonl", ".json"))
    return promised_model(model) is not None and list(lengths) == [4096] and not tasks


def print_results(out: Path, as_json: bool) -> None:
    """Writes the metrics of a run, and prints them as JSON or its tables."""
    from compactor_vllm.evaluation.report import Results, markdown, tables
    from compactor_vllm.evaluation.run_directory import RunDirectory

    directory = RunDirectory.load(out)
    metrics = directory.write_metrics()
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    for title, table in tables(Results([directory])):
        print(f"{title}\n\n{markdown(table)}\n")
    err().print(f"written to {out}; `compactor-vllm eval report {out}` draws it", style="dim")


def _suite_command(suite: str) -> Callable[..., None]:
    def command(
        ctx: typer.Context,
        model: options.Model = options.BUILT_IN_MODEL,
        path: options.ModelPath = None,
        revision: options.Revision = None,
        max_model_len: options.MaxModelLen = None,
        method: own.Methods = None,
        ratio: own.Ratios = None,
        discard: own.Discards = None,
        protected_first: options.ProtectedFirst = 8,
        protected_last: own.ProtectedLast = 4,
        task: own.Tasks = None,
        length: own.Lengths = None,
        samples: own.Samples = None,
        seed: own.SampleSeed = 0,
        data: own.Data = None,
        prebuilt: own.Prebuilt = None,
        depths: own.Depths = None,
        questions: own.Questions = None,
        target: own.Target = None,
        query_aware: own.QueryAware = False,
        compression_type: own.CompressionType = "layer",
        chunk_size: own.ChunkSize = None,
        max_new_tokens: own.AnswerTokens = None,
        batch_size: own.BatchSize = 8,
        processes: own.Processes = 1,
        shard: own.ShardText = None,
        time_limit: own.TimeLimit = None,
        throughput: own.Throughput = False,
        out: own.Out = None,
        as_json: options.AsJson = False,
        device: options.Device = "auto",
        dtype: options.Dtype = "auto",
        debug: options.Debug = False,
    ) -> None:
        from compactor_vllm.evaluation.run_config import RunConfig
        from compactor_vllm.evaluation.runner import Shard
        from compactor_vllm.evaluation.suites import SuiteOptions

        deadline = None if time_limit is None else time.monotonic() + time_limit
        share = None if shard is None else Shard.parse(shard)
        if suite == "ruler" and prebuilt is None:
            prebuilt = takes_prebuilt(model, length or (), task or (), data)
        check_effects(suite, prebuilt=prebuilt, depths=depths, questions=questions, target=target, length=length)
        config = engine_config(model, path, revision, max_model_len, device, dtype, processes)
        choices = method_choices(method)
        draft = RunConfig(
            suite=suite,
            model=model,
            dtype=dtype,
            methods=[choice.label for choice in choices],
            retentions=retentions(ratio, discard),
            seed=seed,
            query_aware=query_aware,
            protected_first=protected_first,
            protected_last=protected_last,
            compression_type=compression_type,
            chunk_size=chunk_size,
            max_new_tokens=max_new_tokens,
            data=str(data) if data is not None else "prebuilt" if prebuilt else "generated",
        )
        wanted = SuiteOptions(
            tasks=task or (),
            lengths=tuple(dict.fromkeys(length or ())),
            samples=samples,
            seed=seed,
            data=data,
            prebuilt=bool(prebuilt),
            depths=depths or 11,
            questions=questions or 8,
            target=target or 64,
        )
        where = out or Path("runs") / f"{suite}-{model.strip('/').replace('/', '--')}"
        if processes > 1 and shard is None:
            complete = run_processes(["eval", suite, *ctx.meta[ARGUMENTS]], processes)
        else:
            complete = run_suite(
                draft,
                config,
                wanted,
                choices,
                where,
                batch_size=batch_size,
                shard=share,
                apart=throughput,
                deadline=deadline,
            )
        leave_unless(complete)
        if shard is None:
            print_results(where, as_json)

    command.__doc__ = SUITES[suite]
    return command


for _suite in SUITES:
    app.command(_suite, cls=ManyValues, epilog=EPILOG)(_suite_command(_suite))


app.command("report")(evaluate_report.report)
app.command("pack")(evaluate_report.pack)
