"""How long prompts and completions are: measured on the task where that is possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.experience import Prompt

#: Records that are rendered to learn how long prompts are [our choice].
RENDERED = 256

#: Tokens of a prompt, most new tokens, and its record.
Row = tuple[int, int | None, Any]


@dataclass
class Lengths:
    """Prompts of one kind.

    Args:
        longest: Tokens of the longest prompt.
        mean: Mean tokens.
        limit: Most new tokens; None leaves the model's bound.
        source: Where the numbers come from.
        record: That of the longest prompt, where the task was at hand.
    """

    longest: int
    mean: float
    limit: int | None
    source: str
    record: Any = None


def prompt_lengths(data: Any, given: int | None, why_not: str, seed: int) -> dict[str, Lengths]:
    """Lengths by domain; ``""`` is all together.

    Args:
        data: A ``RolloutDataModule`` whose task has its tokenizer, where there is one.
        given: ``plan.prompt_tokens``; replaces what is measured.
        why_not: Why there is no tokenizer, or empty.
        seed: Of the demonstrations.

    Raises:
        ValueError: Nothing is given, nothing can be measured, and the task has no bound.
    """
    task = data.task
    rows: dict[str, list[Row]] = {}
    reason = why_not
    if not reason:
        try:
            for record in list(task.records("train"))[:RENDERED]:
                prompt = task.prompt(record)
                row = (len(prompt.token_ids), prompt.max_new_tokens, record)
                rows.setdefault(prompt.domain, []).append(row)
            # kinds of prompts that training makes of the model's own outputs
            shown: dict[str, list[Row]] = {}
            for one in task.demonstrations(seed, 0, RENDERED):
                row = (len(one.prompt_ids), len(one.completion_ids), None)
                shown.setdefault(one.domain, []).append(row)
            rows = shown | rows
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
    bound = getattr(task, "max_prompt_tokens", None)
    if given is None and not rows and bound is None:
        raise ValueError(
            f"plan.prompt_tokens=null, and the task's own prompts are not at hand ({reason}): give "
            f"plan.prompt_tokens=<tokens of the longest prompt>"
        )
    if rows:
        rows[""] = [row for kind in rows.values() for row in kind]
        found = {domain: _summary(values, given) for domain, values in rows.items()}
    else:
        longest = int(given or bound or 0)
        source = "plan.prompt_tokens" if given else f"data.task.max_prompt_tokens; {reason[:90]}"
        limit = getattr(task, "max_new_tokens", None)
        found = {"": Lengths(longest, float(longest), limit, source)}
    return found


def _summary(rows: list[Row], given: int | None) -> Lengths:
    sizes = [size for size, _, _ in rows]
    limits = [limit for _, limit, _ in rows if limit is not None]
    most = max(limits) if limits else None
    record = max(rows, key=lambda row: row[0])[2]
    if given is not None:
        return Lengths(given, float(given), most, "plan.prompt_tokens", record)
    mean = sum(sizes) / len(sizes)
    return Lengths(max(sizes), mean, most, f"{len(sizes)} prompts of the task", record)


def draw(
    data: Any, lengths: Mapping[str, Lengths], gpus: int, notes: list[str]
) -> tuple[list[Prompt], float]:
    """Prompts of one rollout on one GPU, all of a domain as long as its longest.

    Args:
        data: The ``RolloutDataModule``.
        lengths: By domain; empty for data without rollouts.
        gpus: Processes that share a draw.
        notes: What is taken differently from what was asked is added here.

    Returns:
        The prompts, and the mean length of a prompt as a share of their length.
    """
    if not lengths:
        return [], 1.0
    prompts: list[Prompt] = []
    mean = longest = 0.0
    for domain, asked in data.prompts_per_rollout.items():
        local = -(-asked // gpus)
        if local * gpus != asked:
            key = f"data.prompts_per_rollout{'.' + domain if domain else ''}"
            notes.append(
                f"{key}={asked} is taken as {local * gpus} on {gpus} GPUs: all draw equally many"
            )
        own = lengths.get(domain) or lengths[""]
        mean, longest = mean + local * own.mean, longest + local * own.longest
        prompts += [
            Prompt(
                uid=f"plan/{domain}/{number}",
                token_ids=(1,) * own.longest,
                task=data.task,
                domain=domain or "default",
                record=own.record,
                label=1,
                max_new_tokens=own.limit,
            )
            for number in range(local * data.prompts_per_record)
        ]
    return prompts, mean / max(1.0, longest)
