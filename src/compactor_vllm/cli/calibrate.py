"""`compactor-vllm calibrate`: how much of a context has to stay, learnt once for a model and a method."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from compactor_vllm.cli import evaluate_options as own
from compactor_vllm.cli import options
from compactor_vllm.cli.console import err
from compactor_vllm.cli.evaluate_processes import engine_config, leave_unless

EPILOG = """
**Examples**

    compactor-vllm calibrate --model Qwen/Qwen3-8B --method compactor

Afterwards `SequenceCompressionParams(compression_ratio="auto", quality=0.95)` keeps as much of a context as the model
needs for 95 % of the full cache's quality. A calibration that was broken off goes on when its command is given again.
"""


def calibrate(
    model: options.Model = options.BUILT_IN_MODEL,
    path: options.ModelPath = None,
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    method: own.Methods = None,
    task: own.Tasks = None,
    length: own.Lengths = None,
    samples: own.Samples = None,
    ratio: own.Ratios = None,
    seed: own.SampleSeed = 0,
    data: own.Data = None,
    batch_size: own.BatchSize = 8,
    time_limit: own.TimeLimit = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory of the measurements. [default: runs/calibrate-MODEL]")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Where the calibration is written. [default: where engines look]")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    debug: options.Debug = False,
) -> None:
    """Measure samples of RULER's tasks at many ratios, and fit what decides how much of a context has to stay."""
    from compactor_vllm.cli.evaluate import method_choices, retentions, run_suite
    from compactor_vllm.compression.calibration import save_calibrations
    from compactor_vllm.evaluation.calibrate import RETENTIONS, TASKS, fit_methods
    from compactor_vllm.evaluation.run_config import RunConfig
    from compactor_vllm.evaluation.run_directory import RunDirectory
    from compactor_vllm.evaluation.suites import SuiteOptions

    deadline = None if time_limit is None else time.monotonic() + time_limit
    config = engine_config(model, path, revision, max_model_len, device, dtype)
    choices = method_choices(method)
    draft = RunConfig(
        suite="label-free",
        model=model,
        dtype=dtype,
        methods=[choice.label for choice in choices],
        retentions=retentions(ratio or RETENTIONS, None),
        seed=seed,
        data="generated" if data is None else str(data),
    )
    wanted = SuiteOptions(
        tasks=task or TASKS, lengths=tuple(length or (2048,)), samples=samples or 8, seed=seed, data=data
    )
    where = out or Path("runs") / f"calibrate-{model.strip('/').replace('/', '--')}"
    complete = run_suite(
        draft, config, wanted, choices, where, batch_size=batch_size, deadline=deadline, context_nll=True
    )
    leave_unless(complete)
    run = RunDirectory.load(where)
    found = fit_methods(choices, run.records)
    about = {name: run.config[name] for name in ("tasks", "lengths", "samples", "seed", "dtype", "protected_last")}
    target = save_calibrations(model, run.config["environment"]["fingerprint"], found, about, file)
    for one in found:
        print(
            f"{one.method}: alpha {one.alpha:.4g}, beta {one.beta:.4g} from {one.triples} triples, "
            f"NLL(context) {one.lowest:.2f} to {one.highest:.2f}, error {one.error:.3f}"
        )
    err().print(f"written to {target}", style="dim")
