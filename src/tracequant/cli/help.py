"""How a command's help is laid out: options in panels, those for experts behind `--help-all`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

# The order of the panels; options without one come last.
PANELS = ("Model and data", "Budget", "Rules", "Analysis", "Quantization", "Training", "Output")


class SettingsCommand(TyperCommand):
    """A command whose help groups its options by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then each panel's options under its name."""
        panels: dict[str, list[tuple[str, str]]] = {}
        hidden = 0
        for parameter in self.get_params(ctx):
            hidden += bool(getattr(parameter, "hidden", False))
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
                panels.setdefault(panel, []).append(record)
        known = [panel for panel in ("Arguments", *PANELS, "Options") if panel in panels]
        for panel in [*known, *(panel for panel in panels if panel not in known)]:
            with formatter.section(panel):
                formatter.write_dl(panels[panel])
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} more options for experts: --help-all shows them.")
