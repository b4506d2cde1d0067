"""Turns errors of the user's making into one line that says what to type."""

from __future__ import annotations

import re
from pathlib import Path

from run_tools.checks import nearest

USER_ERRORS = (ValueError, FileExistsError, FileNotFoundError, IsADirectoryError, OSError)


def explain(error: BaseException, conf: Path) -> str | None:
    """One line for an error, None where it is a fault of ours and the traceback is wanted.

    Args:
        error: What was raised.
        conf: Folder of the config groups.
    """
    kind, text = type(error).__name__, str(error).strip()
    if kind == "InstantiationException" and error.__cause__ is not None:
        return explain(error.__cause__, conf) or text.splitlines()[0]
    if kind == "MissingConfigException":
        return _missing_option(text, conf)
    if kind == "ConfigCompositionException":
        return _composition(text + " " + str(error.__cause__ or ""), conf)
    if kind == "MissingMandatoryValue":
        key = text.split(":")[-1].strip()
        return f"{key} is required: add {key}=<value> to the command"
    if kind in (
        "OverrideParseException",
        "ConfigAttributeError",
        "ConfigKeyError",
        "InterpolationKeyError",
        "ValidationError",
    ):
        return " ".join(text.split())
    if isinstance(error, USER_ERRORS) or kind in ("MisconfigurationException", "RuntimeError"):
        if kind == "RuntimeError" and "bad_batch.pt" not in text:
            return None
        return " ".join(text.split()) if text else None
    return None


def _missing_option(text: str, conf: Path) -> str:
    found = re.search(r"'([\w/]+)/([\w.-]+)'", text)
    if not found:
        return text.splitlines()[0]
    group, option = found.groups()
    options = sorted(p.stem for p in (conf / group).glob("*.yaml") if not p.stem.startswith("_"))
    return (
        f"{group}={option} is unknown{nearest(option, options)} {group} has: "
        f"{', '.join(options) or 'no options'}"
    )


def _composition(text: str, conf: Path) -> str:
    key = re.search(r"Could not override '([\w./@-]+)'", text)
    if key:
        name = key.group(1)
        known = known_keys(conf)
        return (
            f"unknown key '{name}'{nearest(name, known) or _by_leaf(name, known)} "
            f"(--cfg job prints all keys; +{name}=... adds a new one)"
        )
    missing = re.search(r"Could not find '([\w/.-]+)'", text)
    if missing:
        return _missing_option(f"'{missing.group(1)}'", conf)
    return " ".join(text.split())


def _by_leaf(name: str, known: list[str]) -> str:
    leaf = name.rsplit(".", 1)[-1]
    for key in known:
        if key.rsplit(".", 1)[-1] == leaf:
            return f"; did you mean {key!r}?"
    return ""


def known_keys(conf: Path) -> list[str]:
    """Dotted keys of all group files, read from their lines (indentation gives the nesting)."""
    keys: dict[str, None] = {}
    for path in sorted(conf.rglob("*.yaml")):
        group = path.parent.relative_to(conf).as_posix()
        lines = path.read_text().splitlines()
        is_global = any("@package _global_" in line for line in lines)
        prefix = [] if is_global or group == "." else group.split("/")[:1]
        stack: list[tuple[int, str]] = []
        for line in lines:
            match = re.match(r"^( *)([A-Za-z_]\w*):", line)
            if not match:
                continue
            indent = len(match.group(1))
            stack = [item for item in stack if item[0] < indent] + [(indent, match.group(2))]
            keys[".".join(prefix + [part for _, part in stack])] = None
    return [key for key in keys if "_target_" not in key and not key.startswith("hydra")]
