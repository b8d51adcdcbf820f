"""Tasks for the command line: a model with its data, loss and metric. Adding one means one file and one entry."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tracequant.core.errors import TaskError
from tracequant.core.settings import TaskOptions
from tracequant.model.task import TaskSetup

# Task name → module with a function `build(options: TaskOptions) -> TaskSetup`, imported when it is asked for.
TASKS = {
    "digits": "tracequant.tasks.digits",
    "cifar10": "tracequant.tasks.cifar10",
    "imagenet": "tracequant.tasks.imagenet",
    "detection": "tracequant.tasks.detection",
}


def load_task(spec: str, options: TaskOptions) -> TaskSetup:
    """The setup of a named task, or of `path/to/file.py:function`.

    A function of a user's file gets the fields of `TaskOptions` that have a value, and must have parameters for them.
    It returns a `TaskSetup`. Raises `TaskError` for names, files and functions that do not exist, and for a function
    that returns something else.
    """
    if spec in TASKS:
        build: Callable[[TaskOptions], TaskSetup] = importlib.import_module(TASKS[spec]).build
        return build(options)
    if ":" not in spec:
        raise TaskError(
            f"unknown task {spec!r}; choose {', '.join(sorted(TASKS))}, or give path/to/file.py:function for your own"
        )
    function = _load_function(spec)
    values = {name: value for name, value in asdict(options).items() if value is not None}
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = values if takes_all else {name: value for name, value in values.items() if name in parameters}
    ignored = [f"{name}={value!r}" for name, value in values.items() if name not in arguments and name != "seed"]
    if ignored:
        raise TaskError(f"{spec} has no parameter for {', '.join(ignored)}; leave it out, or add it to the function")
    needed = [
        name
        for name, p in parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in arguments
    ]
    if needed:
        raise TaskError(f"{spec} needs a value for {', '.join(needed)}; pass it, or give the parameter a default")
    setup = function(**arguments)
    if not isinstance(setup, TaskSetup):
        raise TaskError(f"{spec} returned a {type(setup).__name__}, expected a tracequant.TaskSetup")
    return setup


def refuse(options: TaskOptions, task: str, names: Sequence[str]) -> None:
    """Raise `TaskError` if one of the options `names` has a value: the task has no use for it."""
    useless = [f"{name}={getattr(options, name)!r}" for name in names if getattr(options, name) is not None]
    if useless:
        raise TaskError(f"the {task} task has no use for {', '.join(useless)}; leave it out")


def _load_function(spec: str) -> Callable[..., Any]:
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise TaskError(f"task file {file} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"tracequant_user_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise TaskError(f"task file {file} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # As in a script, modules in the same folder can be imported, and dataclasses of the file can find their module.
    sys.modules[module_spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise TaskError(f"{file} has no function {name!r}; it has {', '.join(functions) or 'none'}")
    result: Callable[..., Any] = function
    return result
