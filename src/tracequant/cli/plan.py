"""The commands `plan` and `presets`, and what presets do to the options of other commands."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tracequant.allocation.solve import solve
from tracequant.allocation.stability import plan_stability
from tracequant.cli.options import AsJson, Quiet
from tracequant.cli.presets import PRESETS
from tracequant.cli.printing import note, open_run, print_json, print_plan
from tracequant.cli.requests import bad_parameter, parse_bits
from tracequant.core.errors import TracequantError
from tracequant.core.plan import BitPlan
from tracequant.core.settings import PlanSettings
from tracequant.core.tables import read_sensitivity
from tracequant.run import stages
from tracequant.run.directory import RunDirectory

# Budgets of weights and of activations: one on the command line replaces that of a preset.
WEIGHT_BUDGETS = (
    "max_size_mib", "compression", "average_bits", "max_bops_g", "max_latency_ms", "max_accuracy_drop",
    "max_loss_increase",
)  # fmt: skip
ACTIVATION_BUDGETS = ("average_activation_bits", "activation_compression", "max_activation_mib")
ACTIVATION_RIVALS = (*ACTIVATION_BUDGETS, "activation_bits")


def _use_preset(context: typer.Context, name: str | None) -> str | None:
    """Make a preset's values the defaults of the command's options."""
    if name is not None:
        if name not in PRESETS:
            bad_parameter(f"unknown preset {name!r}; choose {', '.join(PRESETS)}")
        context.default_map = PRESETS[name].defaults(str(context.info_name))
    return name


PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help=f"defaults for the other options: {', '.join(PRESETS)} (see tracequant presets)",
        metavar="NAME",
        is_eager=True,
        callback=_use_preset,
        rich_help_panel="Model and data",
    ),
]


def without_replaced_budgets(context: typer.Context, budget: PlanSettings) -> PlanSettings:
    """The budget without those limits of a preset that a limit on the command line replaces."""

    def source(name: str) -> str:
        return getattr(context.get_parameter_source(name), "name", "")

    replaced = [
        name
        for group, rivals in ((WEIGHT_BUDGETS, WEIGHT_BUDGETS), (ACTIVATION_BUDGETS, ACTIVATION_RIVALS))
        if any(source(rival) == "COMMANDLINE" for rival in rivals)
        for name in group
        if source(name) == "DEFAULT_MAP"
    ]
    cleared: dict[str, Any] = dict.fromkeys(replaced)
    return replace(budget, **cleared)


def plan(
    context: typer.Context,
    budget: PlanSettings,
    run_path: Annotated[Path | None, typer.Argument(help="run directory", metavar="RUN")] = None,
    preset: PresetName = None,
    weight_bits: Annotated[
        str | None, typer.Option(help="use only these weight bits", metavar="LIST", rich_help_panel="Rules")
    ] = None,
    activation_bits: Annotated[
        str | None, typer.Option(help="use only these activation bits", metavar="LIST", rich_help_panel="Rules")
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            help="in place of RUN: a sensitivity.json or a table (docs/tables.md)",
            metavar="FILE",
            rich_help_panel="Model and data",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="save the plan here too (JSON)", metavar="FILE", rich_help_panel="Output")
    ] = None,
    apply: Annotated[
        bool,
        typer.Option("--apply", help="make it the run's plan even if a later stage is done", rich_help_panel="Output"),
    ] = False,
    stability: Annotated[
        bool,
        typer.Option(
            "--stability",
            help="say how often each layer keeps its bits if samples are drawn anew",
            rich_help_panel="Output",
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Choose bits for one or several budgets, in a second.

    The model is not needed. --max-accuracy-drop and --max-loss-increase evaluate a dozen plans instead, after
    calibration and without fine-tuning, and give the smallest plan that keeps to them.

    The first plan becomes the run's plan, and a later one replaces it. Once the run was quantized, further plans are
    only shown, unless --apply is given. With --sensitivity FILE there is no run, only the answer.
    """
    if (run_path is None) == (sensitivity is None):
        bad_parameter("give a run directory or --sensitivity FILE, one of the two")
    settings = _narrowed(without_replaced_budgets(context, budget), weight_bits, activation_bits)
    run: RunDirectory | None = None
    if sensitivity is None:
        assert run_path is not None
        run = open_run(run_path, quiet)
        solved, table = stages.solve(run, settings), run.sensitivity_by(settings.criterion)
    else:
        if apply or stability:
            bad_parameter("--apply and --stability need a run directory")
        if settings.by_accuracy or settings.criterion is not None:
            bad_parameter("--criterion, --max-accuracy-drop and --max-loss-increase need a run directory")
        table = read_sensitivity(sensitivity)
        solved = solve(table, settings)
    if out is not None:
        solved.save(out)
    before: BitPlan | None = None
    if run is not None and run.done("plan"):
        with suppress(TracequantError):  # a damaged plan is replaced
            before = run.plan()
    keep = run is not None and (apply or before is None or not run.was_quantized())
    if run is not None and keep:
        stages.keep_plan(run, settings, solved)
    if as_json:
        print_json(solved.to_json())
    elif not quiet:
        stable = plan_stability(table, solved, run.curvature(), settings) if run is not None and stability else None
        print_plan(table, solved, settings, stable)
        if run is not None:
            _print_place(run, before, solved, keep)


def presets(as_json: AsJson = False) -> None:
    """List the presets, and the options that each stands for."""
    if as_json:
        print_json({name: asdict(preset) for name, preset in PRESETS.items()})
        return
    for name, preset in PRESETS.items():
        options = (f"--{key.replace('_', '-')} {value}" for key, value in preset.defaults("run").items())
        print(f"{name}: {preset.about}\n  {' '.join(options)}\n")


def _narrowed(settings: PlanSettings, weight_bits: str | None, activation_bits: str | None) -> PlanSettings:
    """The settings with rules that allow only these bits, for all layers and for all activations."""
    rules = {"allowed_bits": settings.allowed_bits, "allowed_activation_bits": settings.allowed_activation_bits}
    for field, text, flag in (
        ("allowed_bits", weight_bits, "--weight-bits"),
        ("allowed_activation_bits", activation_bits, "--activation-bits"),
    ):
        if text is not None:
            bits, narrowed = parse_bits(text, flag), dict(rules[field] or {})
            if not bits:
                bad_parameter(
                    f"a plan chooses from the {flag} that were analysed; to keep activations in float, analyze with"
                    f" {flag} none"
                )
            narrowed["*"] = tuple(b for b in bits if b in narrowed["*"]) if "*" in narrowed else bits
            rules[field] = narrowed
    return replace(
        settings,
        allowed_bits=rules["allowed_bits"],
        allowed_activation_bits=rules["allowed_activation_bits"],
    )


def _print_place(run: RunDirectory, before: BitPlan | None, solved: BitPlan, keep: bool) -> None:
    """Print what became of the run's plan, `before` being the earlier one, and the command that comes next."""
    if not keep:
        assert before is not None
        by = "is quantized by" if run.done("quantize") else "has"
        if _same_bits(before, solved):
            note(f"The run {by} this very plan.")
        else:
            note(f"The run {by} another plan and keeps it; add --apply to replace it.")
        return
    if before is not None and not _same_bits(before, solved):
        note(f"This is the run's plan now. It replaces the one for {before.budget}.")
    if not run.done("quantize"):
        print(f"Next: tracequant quantize {run.path}")


def _same_bits(one: BitPlan, other: BitPlan) -> bool:
    """Whether two plans have the same bits."""
    return (one.weight_bits, one.activation_bits) == (other.weight_bits, other.activation_bits)
