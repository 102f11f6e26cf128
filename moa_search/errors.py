"""Every error that a user can meet, as one tree.

Command-line programs print such an error as one line and exit with status 2; anything outside this tree
is a defect and keeps its traceback.
"""


class MoAError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(MoAError, ValueError):
    """An option, a YAML key or an argument has a value that can't be used."""


class FileFormatError(MoAError, ValueError):
    """A file is truncated, foreign, newer than this library or broken by hand."""


class PlanFormatError(FileFormatError):
    """A plan file can't be read as a plan."""


class PlanVersionError(PlanFormatError):
    """A plan file uses a schema that this version doesn't know."""


class ProfileFormatError(FileFormatError):
    """A profile file can't be read as a profile."""


class ProfileVersionError(ProfileFormatError):
    """A profile file uses a schema that this version doesn't know."""


class CacheFormatError(FileFormatError):
    """A file can't be read as a saved cache."""


class CacheVersionError(CacheFormatError):
    """A saved cache uses a schema that this version doesn't know."""


class HubError(MoAError):
    """A repository of the hub can't be read or written."""


class ModelNotFoundError(MoAError):
    """A model specification names nothing that can be loaded."""


class ModelUnsupportedError(MoAError):
    """A model's attention can't be observed or replaced."""


class ModelMismatchError(MoAError):
    """A plan or profile was made for another model."""


class CalibrationError(MoAError):
    """Calibration samples can't be built as asked."""


class ProfilingError(MoAError):
    """Profiling met a value it can't go on with, such as a loss that isn't finite."""


class BudgetInfeasibleError(MoAError):
    """No choice of rules meets a budget."""


class SolverError(MoAError):
    """The solver ended without a usable solution."""


class TuningError(MoAError):
    """No worker of a study could go on."""


class BackendUnavailableError(MoAError):
    """The implementation asked for can't run on this device or with these versions."""


class UnsupportedInputError(MoAError):
    """A forward pass under a plan got a mask, cache or argument that the plan can't honour."""


class VerificationError(MoAError):
    """What was about to be measured gives another result than its reference."""
