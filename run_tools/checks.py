"""Types and names of config values, checked against the signatures that they are passed to."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal

from lightning_modules.backbones.families import family_of
from lightning_modules.options import (
    BackboneOptions,
    KernelOptions,
    LoraOptions,
    MergeOptions,
    OptimizerOptions,
)
from run_tools.plan_options import PlanOptions


@dataclass
class RunOptions:
    """Top-level keys and their types; meanings are in conf/train.yaml."""

    mode: Literal["fit_test", "fit", "validate", "test", "predict", "report", "plan", "merge"]
    seed: int
    run_id: str
    output_dir: str
    name: str
    resume: Literal["auto"] | None
    overwrite: bool
    ckpt_path: str | None
    test_base: bool
    compare: list[str]
    table: list[str]
    table_rows: list[str]
    cache_dir: str
    predictions: str | None


def nearest(name: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` or an empty string."""
    found = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def locate(path: str) -> Any:
    """The object at a dotted path.

    Raises:
        ImportError: There is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(f"{path!r} cannot be imported: {error}") from error


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain config value suits an annotation; what cannot be judged fits."""
    if annotation in (Any, inspect.Parameter.empty) or isinstance(
        annotation, (str, typing.TypeVar)
    ):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if annotation in (None, type(None)):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, str)
    kind = origin or annotation
    if not isinstance(kind, type) or isinstance(value, Mapping) and "_target_" in value:
        return True
    if issubclass(kind, (list, tuple)) or kind is Sequence:
        item = [a for a in arguments if a is not Ellipsis]
        return isinstance(value, (list, tuple)) and (
            not item or all(any(fits(v, one) for one in item) for v in value)
        )
    if issubclass(kind, dict) or kind is Mapping:
        inner = arguments[1] if len(arguments) == 2 else Any
        return isinstance(value, Mapping) and all(fits(v, inner) for v in value.values())
    return value is not None and not (is_dataclass(kind) and not isinstance(value, Mapping))


def describe(annotation: Any) -> str:
    """Readable form of an annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if annotation in (None, type(None)):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if annotation in names:
        return names[annotation]
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, (dict, Mapping)):
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, (list, tuple, Sequence)):
        return "a list"
    return getattr(annotation, "__name__", str(annotation))


def parameters(target: Any) -> tuple[dict[str, Any], bool]:
    """Names and annotations that a class or function takes, and whether it takes any name.

    ``**kwargs`` of a class are followed to the parents' constructors.
    """
    found: dict[str, Any] = {}
    functions = (
        [c.__dict__["__init__"] for c in target.__mro__ if "__init__" in c.__dict__]
        if inspect.isclass(target)
        else [target]
    )
    for function in functions:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return found, True
        try:
            hints = typing.get_type_hints(function)
        except Exception:  # names that exist for type checkers only
            hints = {}
        follows = False
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                follows = True
            elif name != "self" and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                found.setdefault(name, hints.get(name, Any))
        if not follows:
            return found, False
    return found, not inspect.isclass(target)


def _check_values(
    key: str, values: Mapping[str, Any], known: Mapping[str, Any], is_open: bool
) -> list[str]:
    problems = []
    for name, value in values.items():
        if str(name).startswith("_"):
            continue
        if name not in known:
            if not is_open:
                problems.append(f"unknown key '{key}.{name}'{nearest(name, list(known))}")
        elif not fits(value, known[name]):
            hint = ""
            if typing.get_origin(known[name]) is Literal:
                hint = nearest(str(value), [str(a) for a in typing.get_args(known[name])])
            problems.append(f"{key}.{name}={value!r} must be {describe(known[name])}{hint}")
    return problems


def check_node(key: str, node: Any) -> list[str]:
    """Problems of a config node and of every ``_target_`` below it."""
    problems: list[str] = []
    if isinstance(node, Mapping):
        if "_target_" in node:
            try:
                known, is_open = parameters(locate(str(node["_target_"])))
            except ImportError as error:
                return [f"{key}._target_: {error}"]
            problems += _check_values(key, node, known, is_open)
        for name, child in node.items():
            problems += check_node(f"{key}.{name}" if key else str(name), child)
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            problems += check_node(f"{key}[{index}]", child)
    return problems


def check_options(key: str, values: Mapping[str, Any], cls: Any) -> list[str]:
    """Problems of a mapping that becomes the dataclass ``cls``."""
    hints = typing.get_type_hints(cls)
    known = {item.name: hints[item.name] for item in fields(cls)}
    return _check_values(key, values, known, is_open=False)


def check_run(config: Mapping[str, Any]) -> list[str]:
    """Problems of the top-level keys, contradictions among them included."""
    hints = typing.get_type_hints(RunOptions)
    problems = []
    for name, annotation in hints.items():
        value = config.get(name)
        if not fits(value, annotation):
            allowed = typing.get_args(annotation)
            hint = nearest(str(value), [str(a) for a in allowed]) if allowed else ""
            problems.append(f"{name}={value!r} must be {describe(annotation)}{hint}")
    if config.get("resume") and config.get("overwrite"):
        problems.append("resume=auto and overwrite=true contradict each other: give one of them")
    arms = config.get("arms") or {}
    for arm in config.get("compare") or []:
        if arm not in arms:
            known = ", ".join(arms) or "none"
            problems.append(
                f"compare: unknown arm {arm!r}; this model has: {known}"
                f"{nearest(str(arm), list(arms))}"
            )
    mode, path = config.get("mode"), config.get("ckpt_path")
    if mode == "predict" and not path and not (config.get("backbone") or {}).get("path"):
        problems.append(
            "mode=predict needs a trained model: ckpt_path=<run>/checkpoints/last.ckpt or "
            "backbone=hf backbone.path=<run>/export"
        )
    return problems


def trainer_values(values: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The Trainer's own keys; the accumulation window comes from the data unless it is given.

    ``val_check_interval`` counts optimizer steps here and micro-batches in Lightning: a validation
    inside a window would be of no step of its own.
    """
    own = {key: value for key, value in values.items() if key != "num_threads"}
    if own["accumulate_grad_batches"] is None:
        own["accumulate_grad_batches"] = window
    if isinstance(own["val_check_interval"], int):
        own["val_check_interval"] *= window
    return own


def check_config(values: Mapping[str, Any]) -> None:
    """Refuse a config with wrong names, types or contradictions; all problems at once.

    Raises:
        ValueError: Names every key, its value and what is allowed.
    """
    problems = check_run(values)
    values = {**values, "trainer": trainer_values(values["trainer"], window=1)}
    problems += [
        p
        for group in ("data", "model", "callbacks", "logger", "trainer")
        for p in check_node(group, values[group])
    ]
    backbone = dict(values["backbone"])
    try:
        family = family_of(backbone)
    except ValueError as error:
        raise ValueError("; ".join([*problems, str(error)])) from error
    backbone.pop("family", None)
    for name, cls in (
        ("tiny", family.shape),
        ("warm_start", family.warm_start),
        ("merge", MergeOptions),
    ):
        problems += check_options(f"backbone.{name}", backbone.pop(name, None) or {}, cls)
    backbone["path"] = backbone["path"] or ""
    lora = {k: v for k, v in values["lora"].items() if k != "enabled"}
    problems += check_options("backbone", backbone, BackboneOptions)
    problems += check_options("lora", lora, LoraOptions)
    problems += check_options("optimizer", values["optimizer"], OptimizerOptions)
    problems += check_options("kernel", values["kernel"], KernelOptions)
    problems += check_options("plan", values.get("plan") or {}, PlanOptions)
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
