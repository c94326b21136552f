"""Every error that Graftwork raises on purpose, and who pays for it.

    GraftworkError
    |-- ConfigError          a setting is missing, misspelt or contradicts another      -> the command stops
    |-- BadRunId             a folder or flag does not name a run                       -> that folder is left alone
    |-- StoreError           files on disk
    |   |-- Busy             another live process holds the folder                      -> the command stops
    |   |-- Damaged          bytes differ from what their manifest says                 -> whoever needed them stops
    |   `-- Conflict         something else is already published under that name        -> whoever wrote stops
    |-- AdapterError         a saved adapter cannot be used; nothing is written
    |   |-- UnreadableAdapter    its files are not what they claim to be
    |   |-- UnsupportedAdapter   it is whole, but its function is not a plain LoRA's
    |   `-- MisfitAdapter        it is a plain LoRA, but not one for this base or slot
    |-- ModelError           the base model cannot be loaded or cannot carry slots      -> the command stops
    |-- RunError             ends one run, never the trainer
    |   |-- BadBatch         a batch is malformed or was sampled from an unknown adapter
    |   |-- StaleBatch       a batch was sampled from too old a version
    |   `-- CannotResume     a run asked to go on and there is nothing whole to go on from
    |-- InferenceError       the inference server
    |   |-- ServerGone       it does not answer
    |   |-- WrongAdapter     it answers a version's name with something else
    |   |-- Refused          it answered, and said no (the embedded engine's kinds are in inference/requests.py)
    |   `-- EngineFault      the embedded engine broke; every request that waited gets this (inference/engine.py)
    `-- ProgramFailed        a process that this one started ended badly

    RankLost                 a rank of the trainer died, hangs or broke                 -> the job ends, starts again

RankLost stands apart, as KeyboardInterrupt does: it is no fault of the run in whose turn it strikes, so no handler of
such faults may hold it.

A message says what went wrong, where (run, file, tensor or key; expected and found), and what happens next.
Anything else that is raised is a bug of ours and keeps its traceback.
"""


class GraftworkError(Exception):
    """Root of the tree above. The command line prints the message without a traceback and exits with 1."""


class ConfigError(GraftworkError):
    pass


class BadRunId(GraftworkError):
    pass


class StoreError(GraftworkError):
    pass


class Busy(StoreError):
    pass


class Damaged(StoreError):
    pass


class Conflict(StoreError):
    pass


class AdapterError(GraftworkError):
    pass


class UnreadableAdapter(AdapterError):
    pass


class UnsupportedAdapter(AdapterError):
    pass


class MisfitAdapter(AdapterError):
    pass


class ModelError(GraftworkError):
    pass


class RunError(GraftworkError):
    pass


class BadBatch(RunError):
    pass


class StaleBatch(RunError):
    pass


class CannotResume(RunError):
    pass


class RankLost(BaseException):
    pass


class InferenceError(GraftworkError):
    pass


class ServerGone(InferenceError):
    pass


class WrongAdapter(InferenceError):
    pass


class Refused(InferenceError):
    pass


class ProgramFailed(GraftworkError):
    pass
