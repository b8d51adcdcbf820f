"""Every error that tracequant raises on purpose.

All of them derive from `TracequantError`, so that `except tq.TracequantError` catches what the library can explain and
nothing else. The command line prints the message and exits with code 2.
"""


class TracequantError(Exception):
    """Base of all errors whose message says what was expected, what came and what to try."""


class SettingsError(TracequantError):
    """An argument is unknown or has a wrong value; `argument` is its name in Python, None where there is no single one.

    The message begins with that name, so that a command line can put the name of its own option there.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class DataError(TracequantError):
    """The batches cannot be used: none came, values are not finite, targets do not fit the outputs."""


class ModelError(TracequantError):
    """The model cannot be analysed or quantized as asked; the message names the layer."""


class SecondDerivativeError(ModelError):
    """An operation of the model, for Hutchinson's method, or of the loss, for any, cannot be differentiated twice."""


class GaussNewtonError(ModelError):
    """Gauss-Newton's method cannot take this model or loss, Hutchinson's may: samples that interact, for instance."""


class TaskError(TracequantError):
    """A task is unknown, cannot be loaded, or returns something that is not a loss."""


class BudgetError(TracequantError):
    """No plan fits the budget; the message names the nearest that one does."""


class ResourceError(TracequantError):
    """The machine cannot do what was asked: memory is short, a device or an arithmetic is not there."""


class ArtifactError(TracequantError):
    """A file is missing, damaged, or of another kind or version than expected."""


class RunError(TracequantError):
    """A run directory does not belong to this request, or a stage that is needed has not been run."""
