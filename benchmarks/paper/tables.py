"""The paper's Tables 1 to 5 as Markdown: its numbers, and next to them what was run here.

    python benchmarks/paper/tables.py [--run TABLE:ROW=RUN ...] [--results DIR]

The paper's numbers are in hawq_v2.json, copied from its text. What was run here comes from the files that the other
benchmarks leave in benchmarks/results; a cell whose data is not there stays empty. The columns "here" are for the
paper's own network and data, which no benchmark has: they are filled from run directories of your own, such as
--run 1a:HAWQ-V2=runs/resnet50 (TABLE:ROW is the row's method, or its number from 1 where methods repeat). Other
networks stand in columns or tables of their own, which say which they are.

Table 4 compares hours of the paper's machines, which are not here. The column next to them shows how long our analysis
takes, as a multiple of a plain forward and backward pass over the same images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracequant.core.plan import MIB
from tracequant.run.directory import RunDirectory

HERE = Path(__file__).parent
PAPER = HERE / "hawq_v2.json"
RESULTS = HERE.parent / "results"
# What a row is, as opposed to what was measured of it.
LABELS = ("Model", "Method", "Metric")
CRITERIA = ("Top-1", "mAP")
# The layer of ResNet20 that reads the image, whose 8 bits the paper does not count.
IMAGE_READER = "conv1"
METRICS_NOTE = "12 times smaller, not fine-tuned, 1,000 test images, by draws of calibration images (metrics.py)"

Cells = dict[str, str]


@dataclass
class Columns:
    """Measured columns next to the paper's: `rows` holds the cells of some rows, by the row's number from 0.

    `label` stands before the columns' names, `title` says below the table what was measured.
    """

    label: str
    title: str
    names: tuple[str, ...]
    rows: dict[int, Cells] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One table of the paper."""

    number: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def measured(self) -> tuple[str, ...]:
        """The columns that hold measurements."""
        return tuple(name for name in self.columns if name not in LABELS)

    def row(self, name: str) -> int:
        """A row's number from 0, by its method or by its number from 1; `SystemExit` if that is not one row."""
        if name.isdecimal() and 1 <= int(name) <= len(self.rows):
            return int(name) - 1
        methods = [row[self.columns.index("Method")] for row in self.rows]
        if methods.count(name) != 1:
            raise SystemExit(f"table {self.number} has {methods.count(name)} rows {name!r}: {', '.join(methods)}")
        return methods.index(name)


def paper_tables(path: Path = PAPER) -> list[Table]:
    """The paper's tables, every number as the paper prints it."""
    return [
        Table(own["table"], own["title"], tuple(own["columns"]), tuple(map(tuple, own["rows"])))
        for own in json.loads(path.read_text(encoding="utf-8"))["tables"]
    ]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def side_by_side(table: Table, beside: Sequence[Columns]) -> str:
    """The paper's table with further columns on its right, and below it what these are."""
    head = [*table.columns, *(f"{group.label}: {name}" for group in beside for name in group.names)]
    rows = [
        [*row, *(group.rows.get(number, {}).get(name, "") for group in beside for name in group.names)]
        for number, row in enumerate(table.rows)
    ]
    notes = "".join(f"\n- {group.label}: {group.title}." for group in beside)
    return f"**Table {table.number}: {table.title}**\n\n{markdown(head, rows)}\n{notes}\n"


# Cells from what was measured


def width(bits: Iterable[int]) -> str:
    """Bits as the paper writes them: "4", or "2 MP" for mixed precision whose least is 2."""
    used = set(bits)
    return str(*used) if len(used) == 1 else f"{min(used)} MP"


def mean(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation and number."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def megabytes(size_bytes: float) -> str:
    """Bytes in MB of 2^20, three digits."""
    return f"{size_bytes / MIB:.3g}"


def read(results: Path, name: str) -> dict[str, Any]:
    """A result file; empty where there is none."""
    path = results / name
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def from_run(path: str, baseline: bool) -> Cells:
    """A row from a run directory: the float model, or the mixed one as last evaluated, fine-tuned if it was."""
    run = RunDirectory(path)
    run.settings()
    rows = run.result_rows()
    if not rows:
        raise SystemExit(f"{path} has no results yet; run `tracequant quantize {path}` first")
    if baseline:
        cells = dict.fromkeys(CRITERIA, f"{rows[0].metric:.2f}") | {"w-bits": "32", "a-bits": "32"}
        return cells | {"W-Comp": "1.00×", "A-Comp": "1.00×", "Size(MB)": megabytes(rows[0].size_bytes)}
    plan = run.plan()
    cells = dict.fromkeys(CRITERIA, f"{rows[-1].metric:.2f}")
    cells |= {"w-bits": width(plan.weight_bits.values()), "W-Comp": f"{plan.compression:.2f}×"}
    cells["a-bits"] = "32"
    points = [point for point in run.sensitivity().points.activations if not point.is_model_input]
    if plan.activation_bits and points:
        used = sum(point.numel * plan.activation_bits[point.name] for point in points)
        cells["a-bits"] = width(plan.activation_bits[point.name] for point in points)
        cells["A-Comp"] = f"{32 * sum(point.numel for point in points) / used:.2f}×"
    return cells | {"Size(MB)": megabytes(plan.size_bytes), "Perturb.": f"{plan.omega:.3g}"}


def cifar_cells(items: Sequence[dict[str, Any]]) -> Cells:
    """A row of cifar10_resnet20.json, over its seeds."""
    first = items[0]
    return {
        "w-bits": width(first["weight_bits"].values()),
        "a-bits": width(b for name, b in first["activation_bits"].items() if name != IMAGE_READER),
        "Top-1": mean([item["after"] for item in items]),
        "W-Comp": f"{first['compression']:.2f}×",
        "Size(MB)": megabytes(first["file_bytes"]),
    }


def cifar_rows(results: Path) -> dict[int, dict[str, Cells]]:
    """Fine-tuning steps → plan → cells of ResNet20 on CIFAR-10, longest training first, the common recipe alone."""
    document = read(results, "cifar10_resnet20.json")
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for item in document.get("rows", ()):
        if item["recipe"] == "ours":
            found.setdefault(item["steps"], {}).setdefault(item["row"], []).append(item)
    baseline: Cells = {"w-bits": "32", "a-bits": "32", "W-Comp": "1.00×"}
    if found:
        baseline |= {
            "Top-1": f"{document['float_accuracy']:.2f}",
            "Size(MB)": megabytes(document["float_bytes"]),
        }
    return {
        steps: {"float32": baseline} | {name: cifar_cells(items) for name, items in found[steps].items()}
        for steps in sorted(found, reverse=True)
    }


def metric_rows(results: Path) -> dict[str, Cells]:
    """Criterion → cells of metrics.json: plans of one size on ResNet20, calibrated and not fine-tuned."""
    ablation = read(results, "metrics.json").get("ablation")
    if ablation is None:
        return {}
    cells = {
        metric: {
            "w-bits": width(rows[0]["weight_bits"]), "a-bits": "8", "Top-1": mean([row["metric"] for row in rows]),
            "W-Comp": f"{rows[0]['compression']:.2f}×", "Size(MB)": megabytes(rows[0]["size_bytes"]),
        }
        for metric, rows in ablation["rows"].items()
    }  # fmt: skip
    return {"float32": {"w-bits": "32", "a-bits": "32", "Top-1": f"{ablation['float_metric']:.2f}"}} | cells


def imagenet_rows(results: Path) -> dict[str, dict[str, Cells]]:
    """Network → plan → cells of imagenet_small.json: real networks, calibrated and not fine-tuned."""
    document = read(results, "imagenet_small.json")
    tables: dict[str, dict[str, Cells]] = {}
    for network, seeds in document.get("networks", {}).items():
        title = f"{network} on {seeds[0]['samples']} ImageNet images"
        tables[title] = {"float32": {"w-bits": "32", "a-bits": "32", "Top-1": f"{seeds[0]['float']['top1']:.2f}"}}
        for label in seeds[0]["rows"]:
            rows = [seed["rows"][label] for seed in seeds]
            tables[title][label] = {
                "w-bits": width(rows[0]["weight_bits"].values()), "a-bits": str(document["activation_bits"]),
                "Top-1": mean([row["top1"] for row in rows]), "W-Comp": f"{rows[0]['compression']:.2f}×",
                "Size(MB)": f"{rows[0]['size_mib']:.3g}",
            }  # fmt: skip
    return tables


def detection_rows(results: Path) -> dict[str, Cells]:
    """Row → cells of bccd_retinanet.json."""
    cells: dict[str, Cells] = {}
    for name, row in read(results, "bccd_retinanet.json").get("rows", {}).items():
        runs = [run["AP"] for run in row.get("seeds", {}).values()]
        own = {"w-bits": row.get("w_bits", ""), "a-bits": row.get("a_bits", "")}
        own |= {key: f"{row[key]:.2f}×" for key in ("W-Comp", "A-Comp") if key in row}
        if "size_mib" in row:
            own["Size(MB)"] = f"{row['size_mib']:.3g}"
        if runs or "mAP" in row:
            own["mAP"] = mean(runs or [row["mAP"]])
        cells[name] = own
    return cells


# The tables


def beside(table: Table, results: Path) -> list[Columns]:
    """What was run here of a table's rows."""
    if table.number == "2":
        found = detection_rows(results)
        # FQN and HAWQ are other methods, which were not run.
        names = {
            0: "float32", 1: "direct", 4: "mixed weights", 5: "mixed weights and activations",
            6: "mixed weights, 6-bit activations",
        }  # fmt: skip
        title = "a small RetinaNet on BCCD, 364 microscope images (bccd_retinanet.py)"
        return [_columns("A", title, table.measured, names, found)] if found else []
    if table.number == "4":
        return [_analysis_times(table, results)]
    ablations = {
        "3a": {0: "float32", 1: "inverted", 2: "trace"},
        "3b": {0: "float32", 1: "l2", 2: "trace"},
        "5": {0: "float32", 1: "eigenvalue", 2: "eigenvalue_alone", 3: "trace"},
    }.get(table.number)
    if ablations is None:
        return []
    plans = {
        "float32": "float32", "inverted": "inverted, 13.1x", "trace": "HAWQ-V2, 13.1x", "l2": "l2, 13.1x",
        "eigenvalue": "HAWQ's eigenvalue / n, 13.1x",
    }  # fmt: skip
    found = [(f"ResNet20 on CIFAR-10, {METRICS_NOTE}", ablations, metric_rows(results))]
    by_plan = {number: plans[metric] for number, metric in ablations.items() if metric in plans}
    for steps, rows in cifar_rows(results).items():
        if len(rows.keys() & set(by_plan.values()) - {"float32"}) > 1:  # a plan alone compares nothing
            found.append((f"ResNet20 on CIFAR-10, {steps:,} steps (cifar10_resnet20.py)", by_plan, rows))
    return [
        _columns(label, title, table.measured, names, rows)
        for label, (title, names, rows) in zip("ABCDEF", ((t, n, r) for t, n, r in found if r), strict=False)
    ]


def _columns(
    label: str, title: str, names: tuple[str, ...], rows: Mapping[int, str], found: Mapping[str, Cells]
) -> Columns:
    return Columns(label, title, names, {number: found[name] for number, name in rows.items() if name in found})


def _analysis_times(table: Table, results: Path) -> Columns:
    name = "analysis"
    title = "time of the analysis over that of a forward and backward pass over the same images (curvature.py)"
    columns = Columns("here", title, (name,))
    for model, file in (("ResNet50", "curvature_resnet50.json"), ("InceptionV3", "curvature_inception_v3.json")):
        times = {row["method"]: row["time"] for row in read(results, file).get("rows", ())}
        if "gauss_newton, 2 draws" in times:
            number = next(i for i, row in enumerate(table.rows) if row[:2] == (model, "HAWQ-V2"))
            columns.rows[number] = {name: f"{times['gauss_newton, 2 draws']:.2f}"}
    return columns


def further_tables(results: Path) -> list[str]:
    """In the shape of Table 1, networks that are not in the paper."""
    names = ("w-bits", "a-bits", "Top-1", "W-Comp", "Size(MB)")
    found = {f"ResNet20 on CIFAR-10, {steps:,} fine-tuning steps": rows for steps, rows in cifar_rows(results).items()}
    found |= {f"{title}, not fine-tuned": rows for title, rows in imagenet_rows(results).items()}
    return [
        f"**Not in the paper, in the shape of Table 1: {title}**\n\n"
        + markdown(("Method", *names), ([name, *(cells.get(n, "") for n in names)] for name, cells in rows.items()))
        + "\n"
        for title, rows in found.items()
    ]


def document(results: Path = RESULTS, runs: Sequence[str] = ()) -> str:
    """All tables as Markdown; `runs` are TABLE:ROW=RUN."""
    tables = paper_tables()
    own = {
        table.number: Columns("here", "the same network and data (--run)", table.measured)
        for table in tables
        if table.number != "4"
    }
    for text in runs:
        place, equals, path = text.partition("=")
        number, colon, row = place.partition(":")
        if not (equals and colon and number in own):
            raise SystemExit(f"--run takes TABLE:ROW=RUN, with a table of {', '.join(own)}, got {text!r}")
        table = next(table for table in tables if table.number == number)
        index = table.row(row)
        own[number].rows[index] = from_run(path, baseline=index == 0)
    parts = []
    for table in tables:
        groups = ([own[table.number]] if table.number in own else []) + beside(table, results)
        parts.append(side_by_side(table, groups))
        if table.number == "1c":
            parts += further_tables(results)
    parts.append(
        "Of several runs: mean ± standard deviation (number). In Table 5 our traces are by layer, not by block.\n"
    )
    return "\n".join(parts)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", action="append", default=[], metavar="TABLE:ROW=RUN", help="fill a row from a run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the benchmarks' results")
    given = parser.parse_args()
    print(document(given.results, given.run))


if __name__ == "__main__":
    main()
