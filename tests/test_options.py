"""Settings classes: every field checked against its type and range, errors that name it, doors that list it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from torch import nn

import tracequant as tq
from tracequant.core.errors import ArtifactError, SettingsError
from tracequant.core.files import Saveable
from tracequant.core.options import Option, option, options, resolve, takes, validate
from tracequant.core.settings import FinetuneSettings, SensitivitySettings
from tracequant.core.weight_grid import WeightGrid


@dataclass(frozen=True)
class Settings(Saveable):
    """A field of every kind."""

    count: int = option(3, "how many", minimum=1, flag="--number", metavar="N", panel="Sizes", expert=True)
    rate: float = option(0.5, "how fast", minimum=0, below=1)
    budget: float | None = option(None, "how much", above=0)
    name: str | None = option(None, "what it is called")
    fast: bool = option(False, "whether it hurries")
    mode: Literal["exact", "pareto", 2] = option("exact", "by which method")
    bits: tuple[int, ...] = option((2, 4), "widths on offer", minimum=1, maximum=8)
    fixed: dict[str, int] | None = option(None, "widths by layer", minimum=1, maximum=8)
    nested: dict[str, dict[int, float]] | None = option(None, "numbers by name and number", minimum=0)
    allowed: dict[str, tuple[int, ...]] | None = option(None, "widths on offer by layer", minimum=1, maximum=8)
    grid: WeightGrid = option(WeightGrid(), "how grids are made")
    anything: Any = option(None, "no rule at all")
    plain: int = 7

    def __post_init__(self) -> None:
        validate(self)


def test_defaults_ranges_and_help_stand_in_one_place() -> None:
    assert Settings().count == 3
    assert options(Settings)["count"] == Option("how many", 1, None, None, None, "--number", "N", "Sizes", True)
    assert list(options(Settings)) == [f.name for f in dataclasses.fields(Settings)][:-1]
    assert hash(Settings()) == hash(Settings())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count must be an integer >= 1, got 0"),
        ({"count": 2.0}, "count must be an integer >= 1, got 2.0"),
        ({"count": True}, "count must be an integer >= 1, got True"),
        ({"count": "3"}, "count must be an integer >= 1, got '3'"),
        ({"count": None}, "count must be an integer >= 1, got None"),
        ({"plain": 7.5}, "plain must be an integer, got 7.5"),
        ({"rate": -0.1}, "rate must be a number >= 0 and < 1, got -0.1"),
        ({"rate": 1}, "rate must be a number >= 0 and < 1, got 1"),
        ({"rate": False}, "rate must be a number >= 0 and < 1, got False"),
        ({"rate": math.nan}, "rate must be a finite number >= 0 and < 1, got nan"),
        ({"budget": math.inf}, "budget must be a finite number > 0 or None, got inf"),
        ({"budget": 0}, "budget must be a number > 0 or None, got 0"),
        ({"budget": "8 MB"}, "budget must be a number > 0 or None, got '8 MB'"),
        ({"name": 5}, "name must be a string or None, got 5"),
        ({"fast": 1}, "fast must be True or False, got 1"),
        ({"fast": "yes"}, "fast must be True or False, got 'yes'"),
        ({"mode": "exakt"}, "mode must be 'exact', 'pareto' or 2, got 'exakt'; did you mean 'exact'?"),
        ({"mode": "other"}, "mode must be 'exact', 'pareto' or 2, got 'other'"),
        ({"mode": 2.0}, "mode must be 'exact', 'pareto' or 2, got 2.0"),
        ({"mode": ["exact"]}, "mode must be 'exact', 'pareto' or 2, got ['exact']"),
        ({"bits": (2, 9)}, "bits must be a sequence whose every item is an integer >= 1 and <= 8, got (2, 9)"),
        ({"bits": 4}, "bits must be a sequence whose every item is an integer >= 1 and <= 8, got 4"),
        ({"bits": "24"}, "bits must be a sequence whose every item is an integer >= 1 and <= 8, got '24'"),
        ({"fixed": {"conv1": 9}}, "fixed must be a dictionary from a string to an integer >= 1 and <= 8 or None"),
        ({"fixed": {1: 4}}, "fixed must be a dictionary from a string to an integer >= 1 and <= 8 or None, got {1: 4}"),
        ({"fixed": ["conv1"]}, "fixed must be a dictionary from a string to an integer"),
        ({"nested": {"conv1": {8: -1.0}}}, "nested must be a dictionary from a string to a dictionary from an integer"),
        ({"allowed": {"*": 4}}, "allowed must be a dictionary from a string to a sequence whose every item is"),
        ({"grid": "per_tensor"}, "grid must be a WeightGrid, got 'per_tensor'"),
        ({"grid": None}, "grid must be a WeightGrid, got None"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_the_field_what_is_expected_and_what_came(fields: dict[str, Any], message: str) -> None:
    (name,) = fields
    for attempt in (lambda: Settings(**fields), lambda: resolve(Settings, None, fields)):
        with pytest.raises(SettingsError) as error:
            attempt()
        assert str(error.value).startswith(message)
        assert error.value.argument == name
    if message.endswith(f"got {fields[name]!r}"):
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rate": 0}, 0.0),
        ({"budget": 8}, 8.0),
        ({"budget": None}, None),
        ({"rate": np.float32(0.25)}, 0.25),
        ({"count": np.int64(5)}, 5),
        ({"bits": [2, 3]}, (2, 3)),
        ({"bits": []}, ()),
        ({"bits": (np.int32(2),)}, (2,)),
        ({"mode": 2}, 2),
        ({"fixed": {"conv1": np.int64(8)}}, {"conv1": 8}),
        ({"nested": {"conv1": {8: 1}}}, {"conv1": {8: 1.0}}),
        ({"nested": {"conv1": {32: 1.5}}}, {"conv1": {32: 1.5}}),
        ({"allowed": {"*": [2, 4]}}, {"*": (2, 4)}),
        ({"anything": {1, 2}}, {1, 2}),
    ],
)
def test_values_take_the_exact_type_of_their_field(fields: dict[str, Any], expected: object) -> None:
    (name,) = fields
    value = getattr(Settings(**fields), name)
    assert value == expected
    assert repr(value) == repr(expected)


def test_settings_are_equal_however_they_were_written_and_read(tmp_path: Any) -> None:
    written = Settings(rate=0, bits=[2, 3], budget=np.float64(8), fixed={"conv1": 4})  # type: ignore[arg-type]
    written.save(tmp_path / "settings.json")
    assert Settings.load(tmp_path / "settings.json") == written == copy.deepcopy(written)
    assert Settings(rate=0.0).to_json() == Settings(rate=0).to_json()


def test_a_file_with_a_wrong_value_is_named(tmp_path: Any) -> None:
    path = tmp_path / "settings.json"
    Settings(rate=0.25).save(path)
    path.write_text(path.read_text().replace("0.25", "1.25"))
    with pytest.raises(ArtifactError, match=r"settings\.json: rate must be a number >= 0 and < 1, got 1\.25"):
        Settings.load(path)


# From the arguments of a call to settings


def test_fields_replace_those_of_the_settings() -> None:
    settings = Settings(count=5, rate=0.25)
    assert resolve(Settings, settings, {}) == settings
    assert resolve(Settings, settings, {"rate": 0.75}) == Settings(count=5, rate=0.75)
    assert resolve(Settings, None, {"rate": 0.75}) == Settings(rate=0.75)
    assert resolve(Settings, None, {}) == Settings()
    assert settings == Settings(count=5, rate=0.25)


def test_an_unknown_field_is_refused_with_what_is_known() -> None:
    for settings in (None, Settings()):
        with pytest.raises(SettingsError) as error:
            resolve(Settings, settings, {"budgt": 8.0})
        assert str(error.value).startswith(
            "budgt is not an argument here; Settings has count, rate, budget, name, fast"
        )
        assert str(error.value).endswith("; did you mean 'budget'?")
        assert error.value.argument == "budgt"
    with pytest.raises(SettingsError, match=r"^wholly_other is not an argument here; Settings has count, .*, plain$"):
        resolve(Settings, None, {"wholly_other": 1})


@pytest.mark.parametrize("value", [1000, {"count": 5}, FinetuneSettings()])
def test_settings_of_another_kind_are_refused(value: Any) -> None:
    """An integer is what a caller of an older version passes there."""
    with pytest.raises(SettingsError, match=r"^settings must be a Settings, got .*; pass single values by keyword"):
        resolve(Settings, value, {})


def test_errors_survive_the_way_between_processes() -> None:
    with pytest.raises(SettingsError) as error:
        Settings(count=0)
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.argument) == (str(error.value), "count")


# What a door says about itself


@takes(Settings)
def door(model: str, settings: Settings | None = None, *, seed: int = 0, **fields: object) -> Settings:
    """Return the settings.

    More about them.
    """
    return resolve(Settings, settings, fields)


def test_a_door_lists_every_field_with_its_default() -> None:
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(door).parameters
    names = [field.name for field in dataclasses.fields(Settings)]
    assert list(parameters) == ["model", "settings", "seed", *names]
    for field in dataclasses.fields(Settings):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].annotation == field.type
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["seed"].default == 0
    assert inspect.getdoc(door) == (
        "Return the settings.\n\nMore about them.\n\nFields of Settings:\n\n"
        + "\n".join(
            f"    {name}: {described.help}" + (f" ({described.range})" if described.range else "")
            for name, described in options(Settings).items()
        )
    )
    assert door("model", rate=0.75) == Settings(rate=0.75)
    assert door.__name__ == "door"


def test_a_door_leaves_out_what_it_ignores() -> None:
    assert "uniform_too" not in str(inspect.signature(tq.finetune))
    assert "uniform_too" not in str(tq.finetune.__doc__)
    with pytest.raises(SettingsError, match="uniform_too is not an argument here"):
        tq.finetune(nn.Identity(), [], tq.ClassificationTask(), uniform_too=True)


def test_bit_widths_are_a_set() -> None:
    """The order in which they are given is no other request."""
    one, other = SensitivitySettings(weight_bits=(8, 4, 8)), SensitivitySettings(weight_bits=(4, 8))
    assert one == other
    assert one.weight_bits == (4, 8)
    assert SensitivitySettings(activation_bits=(8, 4, 4)) == SensitivitySettings()
    assert SensitivitySettings(activation_bits=()).activation_bits == ()
    with pytest.raises(SettingsError, match="weight_bits is empty"):
        SensitivitySettings(weight_bits=())


def test_a_required_field_has_no_default_in_a_door() -> None:
    @dataclass(frozen=True)
    class Required:
        task: str
        count: int = option(1, "how many")

    @takes(Required)
    def run(**fields: object) -> None:
        """Run."""

    parameters = inspect.signature(run).parameters
    assert parameters["task"].default is inspect.Parameter.empty
    assert parameters["count"].default == 1


def test_a_door_cannot_have_a_parameter_with_the_name_of_a_field() -> None:
    def clash(count: int, **fields: object) -> None:
        """Clash."""

    with pytest.raises(ValueError, match="duplicate parameter name: 'count'"):
        takes(Settings)(clash)


@pytest.mark.parametrize(("annotation", "value"), [(tuple[int, int], (1, 2)), (list[int], [1])])
def test_a_type_that_cannot_be_checked_is_an_error_of_the_class(annotation: Any, value: object) -> None:
    kind = dataclasses.make_dataclass("Odd", [("field", annotation, option(None, "odd"))], frozen=True)
    with pytest.raises(TypeError, match=r"is not supported; declare|cannot have the type"):
        validate(kind(value))
