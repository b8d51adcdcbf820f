"""The stages of a run as commands, and `run` and `demo`, which go through all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tracequant.allocation.request import check_request
from tracequant.cli.options import AsJson, Out, Quiet, RunPath, Without
from tracequant.cli.plan import PresetName, without_replaced_budgets
from tracequant.cli.printing import (
    open_run,
    print_json,
    print_packed,
    print_plan,
    print_results,
    print_sensitivity,
)
from tracequant.cli.requests import absolute, absolute_task
from tracequant.core.evaluations import with_unit
from tracequant.core.settings import (
    AnalysisSettings,
    FinetuneSettings,
    PlanSettings,
    RunSettings,
    SensitivitySettings,
    TaskOptions,
)
from tracequant.run import stages
from tracequant.run.directory import RunDirectory

# In `run` the criterion is that of the analysis.
_Budget = Annotated[PlanSettings, Without(("criterion",))]


def analyze(
    analysis: AnalysisSettings, out: Out, preset: PresetName = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Measure the curvature and sensitivity of every layer.

    This takes minutes. Every budget after it takes a second.
    """
    run = open_run(out, quiet)
    if not _analyze_together(run, _resolved(analysis)):
        return
    if as_json:
        print_json(run.sensitivity().to_json())
    elif not quiet:
        print_sensitivity(run)


def quantize(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Quantize by the run's plan and uniformly, and evaluate."""
    run = open_run(run_path, quiet)
    stages.quantize(run)
    print_results(run, quiet, as_json)


def finetune(
    run_path: RunPath,
    recipe: FinetuneSettings,
    preset: PresetName = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the quantized model.

    If it is interrupted, the same command resumes from the last checkpoint.
    """
    from tracequant.model import distributed

    run = open_run(run_path, quiet)
    with distributed.process_group(run.settings().analysis.device):
        first = distributed.rank() == 0
        if not first:
            run.be_silent()
        stages.finetune(run, recipe)
    if first:
        print_results(run, quiet, as_json)


def pack(run_path: RunPath, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Write RUN/model.safetensors, load it back and evaluate it."""
    run = open_run(run_path, quiet)
    stages.pack(run)
    if as_json:
        print_json(run.pack_result().to_json())
    elif not quiet:
        print_packed(run)


def evaluate(
    run_path: RunPath,
    file: Annotated[Path | None, typer.Option(help="a packed file [RUN/model.safetensors]", metavar="FILE")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Load the packed file and measure it on the evaluation data."""
    run = open_run(run_path, quiet)
    result = stages.evaluate_file(run, file)
    path = run.packed_file(file)
    size = path.stat().st_size
    if as_json:
        print_json({"file": path.name, "metric": result.metric, "loss": result.loss, "size_bytes": size})
    elif not quiet:
        metric = with_unit(result.metric_name, result.metric)
        print(f"{path.name}: {metric}, loss {result.loss:.6f}, {size:,} bytes on disk")


def run(
    context: typer.Context,
    analysis: AnalysisSettings,
    budget: _Budget,
    recipe: FinetuneSettings,
    out: Out,
    preset: PresetName = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """All stages: analyze, plan, quantize, fine-tune, pack, report.

    \b
    Examples:
      tracequant run --task cifar10 --data-dir DIR --weights FILE --average-bits 3 --out RUN
      tracequant run --task path/to/file.py:function --max-size-mib 8 --out RUN
      tracequant run --task imagenet --model torchvision:resnet50 --data-dir DIR --compression 12 --out RUN

    Run again, the same command resumes at the first stage that is not finished.
    """
    budget = without_replaced_budgets(context, budget)
    _run_stages(open_run(out, quiet), _resolved(analysis), budget, recipe, quiet=quiet, as_json=as_json)


def demo(
    out: Out = Path("demo-run"),
    average_bits: Annotated[
        float, typer.Option(help="bits for each weight, on average", metavar="BITS", rich_help_panel="Budget")
    ] = 2.0,
    finetune_steps: Annotated[int, typer.Option(min=0, help="fine-tuning steps", rich_help_panel="Training")] = 20,
    seed: Annotated[int, typer.Option(help="seed of random vectors and of fine-tuning")] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The whole flow on scikit-learn's digits: no data to bring.

    Weights have 2 bits on average, chosen from 1, 2, 3, 4 and 8, and activations 3 bits. The table compares mixed bits
    with 2 bits everywhere, before and after fine-tuning. It takes under a minute on two cores.
    """
    import torch

    # So small a network is fastest on one thread, and on a busy machine it waits for no other.
    torch.set_num_threads(1)
    offered = SensitivitySettings(weight_bits=(1, 2, 3, 4, 8), activation_bits=(3,))
    _run_stages(
        open_run(out, quiet),
        AnalysisSettings("digits", TaskOptions(seed=seed), sensitivity=offered),
        PlanSettings(average_bits=average_bits),
        FinetuneSettings(steps=finetune_steps, uniform_too=True),
        quiet=quiet,
        as_json=as_json,
    )


def _run_stages(
    run: RunDirectory,
    analysis: AnalysisSettings,
    budget: PlanSettings,
    recipe: FinetuneSettings,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """All stages up to the report, and what they print."""
    from tracequant.model import distributed
    from tracequant.report.html import write_report

    check_request(budget)  # a bad budget should not cost an analysis
    asked = recipe if recipe.steps else None
    with distributed.process_group(analysis.device):
        first = _analyze_together(run, analysis, budget, asked)
        if first:
            solved = stages.solve(run, budget)  # a budget that cannot be met leaves the run as it was
            run.ask(RunSettings(analysis, budget, asked))
            if not run.done("plan"):
                stages.keep_plan(run, budget, solved)
            if not (quiet or as_json):
                print_plan(run.sensitivity(), run.plan(), budget, stages.stability(run))
            stages.quantize(run)
        if asked is not None:
            stages.finetune(run, asked)
    if not first:
        return
    stages.pack(run)
    path = write_report(run)
    print_results(run, quiet, as_json)
    if not (quiet or as_json):
        print_packed(run)
        print(f"Report: {path}")


def _analyze_together(
    run: RunDirectory,
    analysis: AnalysisSettings,
    budget: PlanSettings | None = None,
    recipe: FinetuneSettings | None = None,
) -> bool:
    """Whether this process is the first, which plans alone; all processes of `torchrun` have analysed before."""
    from tracequant.model import distributed

    with distributed.process_group(analysis.device):
        first = distributed.rank() == 0
        if first:
            run.adopt(analysis)
            if budget is not None and analysis.target_stability is not None and not run.done("analyze"):
                run.ask(replace(run.settings(), plan=budget))  # the analysis ends once this plan is stable
        else:
            run.be_silent()
        distributed.gather(None)  # the others start when the settings are there
        stages.analyze(run)
    return first


def _resolved(analysis: AnalysisSettings) -> AnalysisSettings:
    """The same settings with paths that hold from any folder."""
    options = replace(
        analysis.options, data_dir=absolute(analysis.options.data_dir), weights=absolute(analysis.options.weights)
    )
    return replace(analysis, task=absolute_task(analysis.task), options=options)
