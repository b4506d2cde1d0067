"""How far a decoded text is from its source, whatever facts it holds (drift).

Texts are sequences of words or of token ids; ``words`` cuts a string. Measures (compressor card,
section 2.1; the exact forms are [our choice], since the paper's were not seen):

    edit_drift     insertions, deletions and replacements over n, the source's tokens; above 1 for
                   a decoder that does not stop
    rouge_l        F1 of the longest common subsequence, as in Google's rouge_score
    bleu           sentence BLEU-4, precisions of two tokens and more smoothed by one (Lin and Och
                   2004, "BLEU+1"), times the brevity penalty
    bag_drift      1 - overlap of the two bags of words (Dice): 0 for any change of order
    exact_match    same sequence

``drift_rows`` has one value a text, for paired tests; ``drift_metrics`` their sums and the counts
of n-grams, from which ``corpus_bleu`` takes the BLEU of all texts together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_modules.functional.fidelity import exact_matches
from lightning_modules.functional.sums import Metrics, masked_sum_count

MAX_ORDER = 4  # of BLEU's n-grams

Tokens = Sequence[Hashable]


def words(text: str) -> list[str]:
    """Words of a text, in lower case; punctuation stands apart only if spaces set it apart.

    Example:
        >>> words("The strawberry is  WHITE .")
        ['the', 'strawberry', 'is', 'white', '.']
    """
    return text.lower().split()


def drift_rows(sources: Sequence[Tokens], decoded: Sequence[Tokens]) -> dict[str, Tensor]:
    """All measures of every pair of texts.

    Args:
        sources: N texts of at least one token.
        decoded: N texts that came back; may be empty.

    Returns:
        ``name -> (N,)`` float64: ``exact_match``, ``edit_drift``, ``rouge_l``, ``bleu`` and
        ``bag_drift``. Drifts are 0 for a perfect copy, the others 1.

    Raises:
        ValueError: Lengths differ, a source is empty, or a text is a string.

    Example:
        >>> rows = drift_rows([words("bob hit ann")], [words("ann hit bob")])
        >>> rows["bag_drift"].item(), round(rows["edit_drift"].item(), 3)
        (0.0, 0.667)
    """
    _check(sources, decoded)
    pairs = list(zip(sources, decoded, strict=True))
    rows: dict[str, list[float]] = {
        "edit_drift": [edit_distance(one, two) / len(one) for one, two in pairs],
        "rouge_l": [rouge_l(one, two) for one, two in pairs],
        "bleu": [sentence_bleu(one, two) for one, two in pairs],
        "bag_drift": [bag_drift(one, two) for one, two in pairs],
    }
    found = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    return {"exact_match": exact_matches(sources, decoded).double(), **found}


def drift_metrics(sources: Sequence[Tokens], decoded: Sequence[Tokens]) -> Metrics:
    """Sums of all measures, and what ``corpus_bleu`` needs.

    Args:
        sources: N texts of at least one token.
        decoded: N texts that came back.

    Returns:
        ``name -> (sum, count)``: those of ``drift_rows``; ``ngram_1`` to ``ngram_4``: n-grams of
        the decoded texts that are in their source, over all of them; ``length_ratio``: decoded
        tokens over those of the sources.

    Raises:
        ValueError: As for ``drift_rows``.

    Example:
        >>> drift_metrics([[1, 2, 3]], [[1, 2, 4, 5]])["ngram_2"]
        (1, 3)
    """
    metrics: Metrics = {
        name: masked_sum_count(values) for name, values in drift_rows(sources, decoded).items()
    }
    for order in range(1, MAX_ORDER + 1):
        counts = [_matches(one, two, order) for one, two in zip(sources, decoded, strict=True)]
        metrics[f"ngram_{order}"] = (sum(c[0] for c in counts), sum(c[1] for c in counts))
    metrics["length_ratio"] = (sum(map(len, decoded)), sum(map(len, sources)))
    return metrics


def corpus_bleu(metrics: Metrics) -> float:
    """BLEU-4 of all texts together, not smoothed, from counts that were added up.

    Args:
        metrics: Merged metrics of ``drift_metrics``.

    Returns:
        From 0 to 1. Orders without any n-gram (all texts shorter) are left out of the mean, as
        sacrebleu's "effective order" does; 0 where nothing was decoded or an order has no match.

    Raises:
        KeyError: The metrics are not those of ``drift_metrics``.

    Example:
        >>> corpus_bleu(drift_metrics([[1, 2, 3, 4]], [[1, 2, 3, 4]]))
        1.0
    """
    counts = [metrics[f"ngram_{order}"] for order in range(1, MAX_ORDER + 1)]
    pairs = [(float(hits), float(total)) for hits, total in counts if float(total)]
    made, wanted = map(float, metrics["length_ratio"])
    if not pairs or min(hits for hits, _ in pairs) == 0:
        return 0.0
    logs = [math.log(hits / total) for hits, total in pairs]
    return math.exp(sum(logs) / len(logs)) * _brevity(wanted, made)


def edit_distance(source: Tokens, decoded: Tokens) -> int:
    """Fewest insertions, deletions and replacements of tokens (Levenshtein).

    Bit-parallel (Myers 1999 in Hyyro's form), with one Python integer as a column of the table: a
    pair of 500 tokens takes milliseconds.

    Args:
        source: Any tokens.
        decoded: Any tokens.

    Returns:
        From 0 to the longer length.

    Example:
        >>> edit_distance("kitten", "sitting")
        3
    """
    if not source:
        return len(decoded)
    places = _places(source)
    full, last = (1 << len(source)) - 1, 1 << (len(source) - 1)
    up, down, distance = full, 0, len(source)  # rows where the column rises and falls
    for token in decoded:
        match = places.get(token, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        rise, fall = down | (full & ~(diagonal | up)), diagonal & up
        distance += bool(rise & last) - bool(fall & last)
        rise, fall = (rise << 1 | 1) & full, fall << 1 & full
        up, down = fall | (full & ~(diagonal | rise)), rise & diagonal
    return distance


def common_subsequence(source: Tokens, decoded: Tokens) -> int:
    """Tokens of the longest common subsequence, bit-parallel (Hyyro 2004).

    Args:
        source: Any tokens.
        decoded: Any tokens.

    Returns:
        From 0 to the shorter length.

    Example:
        >>> common_subsequence("abcbdab", "bdcaba")
        4
    """
    places, full = _places(source), (1 << len(source)) - 1
    free = full
    for token in decoded:
        match = free & places.get(token, 0)
        free = ((free + match) | (free - match)) & full
    return len(source) - free.bit_count()


def rouge_l(source: Tokens, decoded: Tokens) -> float:
    """F1 of the longest common subsequence; 0 where nothing is common.

    Args:
        source: At least one token.
        decoded: Any tokens.

    Example:
        >>> round(rouge_l(words("bob hit ann"), words("ann was hit by bob")), 3)
        0.25
    """
    total = len(source) + len(decoded)
    return 2 * common_subsequence(source, decoded) / total if total else 0.0


def sentence_bleu(source: Tokens, decoded: Tokens) -> float:
    """BLEU-4 of one text, precisions of two tokens and more as ``(hits + 1) / (total + 1)``.

    Args:
        source: At least one token.
        decoded: Any tokens; 0 where no token of it is in the source.

    Example:
        >>> sentence_bleu([1, 2, 3], [1, 2, 3]), sentence_bleu([1, 2, 3], [4])
        (1.0, 0.0)
    """
    hits, total = _matches(source, decoded, 1)
    if not hits:
        return 0.0
    logs = [math.log(hits / total)]
    for order in range(2, MAX_ORDER + 1):
        hits, total = _matches(source, decoded, order)
        logs.append(math.log((hits + 1) / (total + 1)))
    return math.exp(sum(logs) / MAX_ORDER) * _brevity(len(source), len(decoded))


def bag_drift(source: Tokens, decoded: Tokens) -> float:
    """``1 - 2 |A and B| / (|A| + |B|)`` of the bags of tokens: blind for order.

    Args:
        source: At least one token.
        decoded: Any tokens.

    Example:
        >>> bag_drift([1, 2], [2, 1]), bag_drift([1, 2], [1, 3])
        (0.0, 0.5)
    """
    total = len(source) + len(decoded)
    return 1 - 2 * _matches(source, decoded, 1)[0] / total if total else 0.0


def semantic_drift_index(cosines: Tensor, overlaps: Tensor) -> Tensor:
    """SDI = cosine of the embeddings of source and decoded text - ROUGE-L.

    High where a text says the same in other words; a perfect copy has 0.

    Args:
        cosines: ``(N,)`` in [-1, 1], of any sentence encoder.
        overlaps: ``(N,)`` ROUGE-L in [0, 1], as ``drift_rows`` has it.

    Returns:
        ``(N,)`` float64, without gradient, on the CPU.

    Raises:
        ValueError: Shapes differ, or a value is out of range (1e-3 is allowed for rounding).

    Example:
        >>> semantic_drift_index(torch.tensor([0.75]), torch.tensor([0.25])).tolist()
        [0.5]
    """
    if cosines.dim() != 1 or cosines.shape != overlaps.shape:
        shapes = f"{tuple(cosines.shape)} and {tuple(overlaps.shape)}"
        raise ValueError(f"cosines and overlaps must be (N,), got {shapes}")
    near, same = (values.detach().to("cpu", torch.float64) for values in (cosines, overlaps))
    for name, values, least in (("cosines", near, -1.0), ("overlaps", same, 0.0)):
        fits = (values >= least - 1e-3) & (values <= 1 + 1e-3)
        if not fits.all():
            place = int((~fits).nonzero()[0])
            raise ValueError(f"{name}[{place}]={values[place]:g} must be in [{least:g}, 1]")
    return near - same


def _places(tokens: Tokens) -> Mapping[Hashable, int]:
    """For every token the bits of the places where it stands."""
    places: dict[Hashable, int] = {}
    for place, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << place
    return places


def _matches(source: Tokens, decoded: Tokens, order: int) -> tuple[int, int]:
    """N-grams of the decoded text that the source has (as often as it has them), and all."""
    one, two = (
        Counter(zip(*(text[shift:] for shift in range(order)), strict=False))
        for text in (source, decoded)
    )
    hits = sum(min(number, one[gram]) for gram, number in two.items() if gram in one)
    return hits, max(0, len(decoded) - order + 1)


def _brevity(wanted: float, made: float) -> float:
    """BLEU's penalty for texts shorter than the source."""
    return 1.0 if made >= wanted else math.exp(1 - wanted / made)


def _check(sources: Sequence[Tokens], decoded: Sequence[Tokens]) -> None:
    """Refuse texts that would be compared letter by letter, or have no drift."""
    if len(sources) != len(decoded):
        raise ValueError(f"{len(sources)} sources have {len(decoded)} decoded texts")
    for name, texts in (("sources", sources), ("decoded", decoded)):
        for place, text in enumerate(texts):
            if isinstance(text, str):
                raise ValueError(f"{name}[{place}] is a string; pass its words or token ids")
            if not len(text) and name == "sources":
                raise ValueError(f"sources[{place}] has no token")
