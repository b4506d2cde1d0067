"""Plots that a claim asks for: the key ``scatter`` of its ``report.json``.

A list of plots, each an object with the fields of ``Scatter``:

    {"name": "paradox", "x": "mem/params", "y": ["test/pc/ce", "test/cf/fact_fidelity"],
     "twin": true, "log_x": true, "group": {"700 steps": ["w16", "w32", "w64"]}}
    {"name": "rank", "x": "test/pc/rank_z/erank", "y": ["test/cf/knowledge_overwriting"]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from run_tools.checks import nearest

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Scatter:
    """One plot.

    Args:
        name: Of the file, ``<claim>_<name>.png``: letters, digits, ``_`` and ``-``; not
            ``curves``, which is taken.
        x: Tag, or ``arm`` for the first number in the arm's name, ``arm:<word>`` for the number
            that stands behind that word (``arm:s`` gives 700 for ``w16_s700``).
        y: Tags: one panel each, or with ``twin`` two, the left and the right axis.
        label_by: What has a colour of its own where points are runs: ``arm`` or ``group``; None
            takes groups where there are some. Lines of ``twin`` always are groups.
        log_x: A logarithmic x axis.
        twin: Lines through the means of arms, with standard errors over seeds.
        group: Title -> arms; None is one group of all arms.
        control: Tag that partial correlations hold fixed.
    """

    name: str
    x: str
    y: list[str]
    label_by: str | None = None
    log_x: bool = False
    twin: bool = False
    group: dict[str, list[str]] | None = None
    control: str = "test/pc/ce"


def scatter_problems(values: Any, arms: Sequence[str]) -> list[str]:
    """What is wrong with the key ``scatter``, one message each.

    Args:
        values: As it stands in the file.
        arms: Names that groups may use.

    Example:
        >>> scatter_problems([{"name": "a", "x": "arm", "y": ["t"], "twin": True}], [])
        ["scatter[0].y=['t'] must be two tags where twin is true"]
    """
    if not isinstance(values, list):
        return [f"scatter={values!r} must be a list of objects"]
    problems = []
    for index, value in enumerate(values):
        problems += _plot_problems(f"scatter[{index}]", value, arms)
    names = [value.get("name") for value in values if isinstance(value, dict)]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    return problems + [f"scatter: two plots are named {name!r}" for name in twice]


def _plot_problems(key: str, value: Any, arms: Sequence[str]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{key}={value!r} must be an object"]
    problems = key_problems(key, value, Scatter, texts=("name", "x", "control"))
    title = value.get("name")
    if title == "curves" or (isinstance(title, str) and title and not _NAME.fullmatch(title)):
        problems.append(f"{key}.name={title!r} must be letters, digits, '_' and '-', not curves")
    for name in ("log_x", "twin"):
        if not isinstance(value.get(name, False), bool):
            problems.append(f"{key}.{name}={value[name]!r} must be true or false")
    if (by := value.get("label_by")) not in (None, "arm", "group"):
        problems.append(f"{key}.label_by={by!r} must be 'arm' or 'group'")
    return problems + _tag_problems(key, value) + _group_problems(key, value.get("group"), arms)


def key_problems(
    key: str, value: Mapping[str, Any], kind: type[Any], *, texts: Sequence[str]
) -> list[str]:
    """Unknown keys of an object, those that it lacks, and those that are no text.

    Args:
        key: Of the object, for messages.
        value: The object.
        kind: Dataclass of its keys; those without a default must be there.
        texts: Keys whose values are texts.
    """
    known = [one.name for one in fields(kind)]
    needed = [one.name for one in fields(kind) if one.default is MISSING]
    problems = [
        f"{key}: unknown key {name!r}{nearest(name, known)} (keys: {', '.join(known)})"
        for name in value
        if name not in known
    ]
    problems += [f"{key} needs {name!r}" for name in needed if name not in value]
    for name in texts:
        if name in value and not (isinstance(value[name], str) and value[name]):
            problems.append(f"{key}.{name}={value[name]!r} must be a text")
    return problems


def _tag_problems(key: str, value: Mapping[str, Any]) -> list[str]:
    tags = value.get("y", [""])
    if not _are_texts(tags) or not tags or len(set(tags)) < len(tags):
        return [f"{key}.y={tags!r} must be a list of different tags"]
    if value.get("twin") is True and "y" in value and len(tags) != 2:
        return [f"{key}.y={tags!r} must be two tags where twin is true"]
    return []


def _group_problems(key: str, group: Any, arms: Sequence[str]) -> list[str]:
    if group is None:
        return []
    if not isinstance(group, dict) or not group or not all(map(_are_texts, group.values())):
        return [f"{key}.group={group!r} must be an object of lists of arms"]
    return [
        f"{key}.group: unknown arm {arm!r}{nearest(arm, arms)} (arms: {', '.join(arms)})"
        for own in group.values()
        for arm in own
        if arm not in arms
    ]


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
