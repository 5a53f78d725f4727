"""Objects from plain configuration. Imports nothing heavy."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hmm_speech.errors import UserError, check_size

ALLOWED_TARGETS = ("hmm_speech", "lightning", "torch.nn", "torch.optim")
CLONE = Path(__file__).resolve().parent.parent

OmegaConf.register_new_resolver("clone", lambda: str(CLONE), replace=True)


def plain(config: Any) -> Any:
    """A configuration node as plain dicts, lists, strings and numbers, every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def check_targets(config: Any, allowed: Sequence[str] = ALLOWED_TARGETS, where: str = "config") -> None:
    """Refuse a ``_target_`` outside the allowed packages, anywhere in a plain configuration, before it is imported."""
    if isinstance(config, Mapping):
        if "_target_" in config and not _inside(config["_target_"], allowed):
            raise UserError(
                f"{where}._target_ is {config['_target_']!r}, which lies outside the packages of allow_targets "
                f"({', '.join(allowed)}). If you trust it, add its package to allow_targets"
            )
        for key, value in config.items():
            check_targets(value, allowed, f"{where}.{key}")
    elif isinstance(config, (list, tuple)):
        for index, value in enumerate(config):
            check_targets(value, allowed, f"{where}[{index}]")


def instantiate(
    config: Mapping[str, Any],
    *args: Any,
    kind: type | None = None,
    allowed: Sequence[str] = ALLOWED_TARGETS,
    where: str = "config",
    **extra: Any,
) -> Any:
    """Call the class that ``_target_`` names with the other keys (and ``extra``) as arguments.

    Nested mappings with a ``_target_`` are built first. The class must be defined in an allowed package (so that no
    path can lead through one into another, as ``hmm_speech.cli.os.system`` would) and be a ``kind``.

    Raises:
        UserError: the target is missing, not allowed, not found or of another kind, or refuses its arguments.
    """
    target = find_class(config, kind=kind, allowed=allowed, where=where)
    name = config["_target_"]
    values = {
        key: instantiate(value, allowed=allowed, where=f"{where}.{key}")
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for key, value in config.items()
        if key != "_target_"
    }
    values.update(extra)
    try:
        inspect.signature(target).bind(*args, **values)
        return target(*args, **values)
    except UserError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{where}: {name} refuses its arguments: {error}") from error


def find_class(
    config: Mapping[str, Any], *, kind: type | None = None, allowed: Sequence[str], where: str = "config"
) -> type:
    """The class that ``_target_`` names; see :func:`instantiate`."""
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise UserError(f"{where} is {config!r}; expected a mapping with a _target_")
    check_targets(config, allowed, where)
    name = config["_target_"]
    target = _locate(name, where)
    if not inspect.isclass(target) or not _inside(target.__module__, allowed):
        raise UserError(f"{where}._target_ {name!r} is no class of the allowed packages ({', '.join(allowed)})")
    if kind is not None and not issubclass(target, kind):
        raise UserError(f"{where}._target_ {name!r} is no {kind.__name__}")
    return target


def _inside(name: Any, packages: Sequence[str]) -> bool:
    return isinstance(name, str) and any(name == package or name.startswith(package + ".") for package in packages)


def _locate(name: str, where: str) -> Any:
    """Import the longest module prefix of a dotted name, then follow attributes."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue
            raise UserError(f"{where}: importing {module} failed: {error}") from error
        try:
            for part in parts[cut:]:
                found = getattr(found, part)
        except AttributeError:
            break
        return found
    raise UserError(f"{where}._target_ {name!r} does not exist; check its spelling")


def instantiate_all(configs: Mapping[str, Any] | None, *, where: str, **options: Any) -> list[Any]:
    """Every entry of a mapping of configurations, in order; an entry of null is left out."""
    return [
        instantiate(config, where=f"{where}.{name}", **options)
        for name, config in (configs or {}).items()
        if config is not None
    ]


def check_run(config: Mapping[str, Any], mode: Any) -> tuple[str, ...]:
    """Refuse what could not work before anything heavy is imported; returns the allowed packages.

    Raises:
        UserError: a ``_target_`` lies outside ``allow_targets``, max_epochs is no number of epochs, or a multirun would
            start processes of its own.
    """
    allowed = config["allow_targets"]
    if not isinstance(allowed, list) or not all(isinstance(name, str) and name for name in allowed):
        raise UserError(f"allow_targets is {allowed!r}; expected a list of package names")
    check_targets({key: value for key, value in config.items() if key != "allow_targets"}, allowed)
    seed = config["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}; expected an integer from 0 to 4294967295")
    trainer = config["trainer"]
    epochs = trainer.get("max_epochs")
    if epochs is not None:
        check_size("trainer.max_epochs", epochs)
    if getattr(mode, "name", None) == "MULTIRUN" and "ddp" in str(trainer.get("strategy")):
        raise UserError(
            "--multirun with trainer.strategy=ddp: the processes that DDP starts would run the sweep themselves. "
            "Start one run after another, or sweep with trainer=cpu or trainer=gpu"
        )
    return tuple(allowed)
