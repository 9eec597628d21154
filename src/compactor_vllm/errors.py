"""Exceptions of compactor_vllm.

::

    CompactorError
    ├── InvalidInputError (ValueError)        what a caller can get wrong; nothing has been done
    │   ├── ConfigError                       an LLMConfig that cannot work here
    │   ├── CheckpointError                   a model that is missing, damaged or not supported
    │   ├── UnknownMethodError                a compression method that cannot be found or loaded
    │   ├── NoCalibrationError                compression_ratio="auto" of a model and method that have no calibration
    │   └── RequestError                      one input of a call; `.index` says which
    ├── MissingDependencyError (ImportError)  an optional package or device that the option needs
    ├── OutOfPagesError (RuntimeError)        the page pool cannot serve an operation; it took nothing
    ├── EngineClosedError (RuntimeError)      the engine was closed
    └── WorkerDiedError (RuntimeError)        a process of a tensor-parallel engine has died; make a new engine
"""

from __future__ import annotations


class CompactorError(Exception):
    """Base class of every exception that this package raises on purpose."""


class InvalidInputError(CompactorError, ValueError):
    """An argument is wrong; the message says what is wrong and what would be right."""


class ConfigError(InvalidInputError):
    """An engine configuration that cannot work."""


class CheckpointError(InvalidInputError):
    """A model that is missing, unreadable, inconsistent or not supported."""


class UnknownMethodError(InvalidInputError):
    """A compression method that is not registered or cannot be loaded."""


class NoCalibrationError(InvalidInputError):
    """compression_ratio="auto" needs a calibration that was not made; the message names the command that makes it."""


class RequestError(InvalidInputError):
    """One input of a call is wrong. `index` is its place in the call's list of inputs."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message if index is None else f"input {index}: {message}")
        self.index = index


class MissingDependencyError(CompactorError, ImportError):
    """Something optional is needed and not installed; the message says how to get it."""


class OutOfPagesError(CompactorError, RuntimeError):
    """The page pool cannot serve an operation. The operation has changed nothing."""


class EngineClosedError(CompactorError, RuntimeError):
    """The engine was closed; make a new one."""


class WorkerDiedError(CompactorError, RuntimeError):
    """A process of a tensor-parallel engine has died or failed, and the engine with it; make a new one."""
