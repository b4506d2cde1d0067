"""Turns errors of the user's making into one line that says what to type."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch.distributed as dist

from run_tools.checks import nearest

USER_ERRORS = (ValueError, FileExistsError, FileNotFoundError, IsADirectoryError, OSError)
#: What gloo, NCCL and the store say when another process is gone, or no longer answers.
LOST = re.compile(
    r"connection (closed|reset|refused|was closed)|broken pipe|timed out|timeout|pair closure|"
    r"remote process exited|recv failed|failed to recv|could not receive|unhandled system error",
    re.IGNORECASE,
)


def explain(error: BaseException, conf: Path) -> str | None:
    """One line for an error, None where it is a fault of ours and the traceback is wanted.

    Args:
        error: What was raised.
        conf: Folder of the config groups.
    """
    kind, text = type(error).__name__, str(error).strip()
    if lost := _lost_process(error, text):
        return lost
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        where = error.filename or "a file of the run folder, such as tensorboard/"
        return (
            f"cannot write {where} ({error.strerror}); the last checkpoint is intact: free space "
            f"and go on with resume=auto"
        )
    if kind == "InstantiationException" and error.__cause__ is not None:
        return explain(error.__cause__, conf) or " ".join(text.split())
    if kind == "InstantiationException":
        return " ".join(text.split())
    if kind == "MissingConfigException":
        return _missing_option(text, conf)
    if kind == "ConfigCompositionException":
        return _composition(text + " " + str(error.__cause__ or ""), conf)
    if kind in ("MissingMandatoryValue", "InterpolationToMissingValueError"):
        found = re.search(r"Missing mandatory value: ([\w.]+\.\w+)", text)
        found = found or re.search(r"full_key: ([\w.]+)", text)
        key = found.group(1) if found else text.split(":")[-1].strip()
        return f"{key} is required: add {key}=<value> to the command"
    if kind in (
        "OverrideParseException",
        "ConfigAttributeError",
        "ConfigKeyError",
        "InterpolationKeyError",
        "ValidationError",
    ):
        return " ".join(text.split())
    if kind == "InterpolationResolutionError":  # of our own resolvers: they say it well
        text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text.splitlines()[0])
    if isinstance(error, USER_ERRORS) or kind in ("MisconfigurationException", "RuntimeError"):
        if kind == "RuntimeError" and "bad_batch.pt" not in text:
            return None
        if "custom code" in text or "inspect the repository content" in text:
            text = f"{text} It is not run unless you give backbone.trust_remote_code=true"
        return " ".join(text.split()) if text else None
    return None


def _lost_process(error: BaseException, text: str) -> str | None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    found = LOST.search(text)
    if not isinstance(error, RuntimeError) or not found:
        return None
    return (
        f"rank {dist.get_rank()} lost another process of this run ({found.group(0)}): that one's "
        f"lines say why it ended; the last checkpoint is whole, go on with resume=auto"
    )


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
        having = _options_with(name, conf) if name in known else []
        if having:
            return f"{name} is no key of what is chosen here; it goes with {' or '.join(having)}"
        return (
            f"unknown key '{name}'{nearest(name, known) or _by_leaf(name, known)} "
            f"(--cfg job prints all keys; +{name}=... adds a new one)"
        )
    missing = re.search(r"Could not find '([\w/.-]+)'", text)
    if missing:
        return _missing_option(f"'{missing.group(1)}'", conf)
    return " ".join(text.split())


def _options_with(name: str, conf: Path) -> list[str]:
    """Options (``group=option``) whose file has a key of its group."""
    group = name.split(".")[0]
    files = sorted(path for path in (conf / group).glob("*.yaml") if not path.stem.startswith("_"))
    return [f"{group}={path.stem}" for path in files if name in _keys_of(path, [group])]


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
        keys |= dict.fromkeys(_keys_of(path, [] if group == "." else group.split("/")[:1]))
    return [key for key in keys if "_target_" not in key and not key.startswith("hydra")]


def _keys_of(path: Path, prefix: list[str]) -> list[str]:
    lines = path.read_text().splitlines()
    if any("@package _global_" in line for line in lines):
        prefix = []
    keys = []
    stack: list[tuple[int, str]] = []
    for line in lines:
        match = re.match(r"^( *)([A-Za-z_]\w*):", line)
        if not match:
            continue
        indent = len(match.group(1))
        stack = [item for item in stack if item[0] < indent] + [(indent, match.group(2))]
        keys.append(".".join(prefix + [part for _, part in stack]))
    return keys
