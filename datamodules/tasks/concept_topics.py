"""Concepts and topics: a world of retrieval in several domains, each with words of its own.

A topic is a set of concepts, the same in every domain; a domain has two words for each concept.
So what one domain teaches about topics helps in others only as far as the encoder links their
words. The sizes are those of the BOOM card's miniature (section 9) [our choice]:

    what        concepts                                 noise words    place
    document    6 of one topic, one word each            8              shuffled
    query       3 of the document's, words drawn anew    3              shuffled

Domains are of three kinds: trained from the start, arriving later, and never trained (``ood``).
The warm start sees all of them, so that the backbone knows every word.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

from datamodules.tasks.base import Split
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, PairRow, PairSet, RetrievalSet

SURFACES = "ab"  # endings of the words of one concept
NUM_NOISE = 60  # words that all domains share
DOCUMENT_CONCEPTS, DOCUMENT_NOISE = 6, 8
QUERY_CONCEPTS, QUERY_NOISE = 3, 3
NOISE = tuple(f"n{i:02d}" for i in range(NUM_NOISE))

Part = Literal["train", "val", "test", "pretrain"]


def concept_word(domain: int, concept: int, surface: int) -> str:
    """A domain's word for a concept.

    Args:
        domain: Number of the domain.
        concept: Number of the concept.
        surface: 0 or 1: which of its two words.

    Returns:
        A short name.

    Example:
        >>> concept_word(0, 17, 0)
        'd0c17a'
    """
    return f"d{domain}c{concept}{SURFACES[surface]}"


class ConceptTopics(EmbeddingTask):
    """Pairs and retrieval sets of several domains; see the module's docstring.

    A pair is a pure function of ``(seed, split, domain, index)``, topics are one of the seed, so
    other counts of pairs leave both as they are. Only label noise depends on ``num_train``.
    ``predict`` is the split ``test``.

    Args:
        num_domains: Domains of the world [card: 6].
        train_domains: Those that are trained from the start [card: 0 to 3].
        new_domains: Those that arrive later [card: 4]; all others are ``ood``.
        num_train: Training pairs of each of these domains [card: 1280].
        num_pretrain: Pairs of every domain for the warm start [card: 480]; 0 for no warm start.
        num_val: Pairs of every domain in ``val``.
        num_test: Pairs of every domain in ``test`` [card: 300].
        label_noise: Share of a domain's training positives that are permuted among themselves, so
            that none of them keeps its own [card: 0.1].
        num_concepts: Concepts of the world [card: 120].
        num_topics: Topics of the world [card: 60].
        concepts_per_topic: Concepts of a topic [card: 12]; topics overlap.
        seed: Of the topics and the pairs.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> [pairs.name for pairs in ConceptTopics(train_domains=[0, 1]).pairs("val")]
        ['domain_0', 'domain_1', 'domain_4']
    """

    name = "concept_topics"

    def __init__(
        self,
        *,
        num_domains: int = 6,
        train_domains: Sequence[int] = (0, 1, 2, 3),
        new_domains: Sequence[int] = (4,),
        num_train: int = 1280,
        num_pretrain: int = 480,
        num_val: int = 100,
        num_test: int = 300,
        label_noise: float = 0.1,
        num_concepts: int = 120,
        num_topics: int = 60,
        concepts_per_topic: int = 12,
        seed: int = 0,
    ) -> None:
        self.num_domains, self.label_noise, self.seed = num_domains, label_noise, seed
        self.train_domains, self.new_domains = list(train_domains), list(new_domains)
        self.num_concepts, self.num_topics = num_concepts, num_topics
        self.concepts_per_topic = concepts_per_topic
        self.sizes: dict[Part, int] = {
            "train": num_train,
            "val": num_val,
            "test": num_test,
            "pretrain": num_pretrain,
        }
        problems = [
            f"data.task.{key}={value} must be at least {least}"
            for key, value, least in (
                ("num_domains", num_domains, 1),
                ("num_train", num_train, 1),
                ("num_pretrain", num_pretrain, 0),
                ("num_val", num_val, 0),
                ("num_test", num_test, 0),
                ("num_topics", num_topics, 1),
                ("concepts_per_topic", concepts_per_topic, DOCUMENT_CONCEPTS),
                ("num_concepts", num_concepts, concepts_per_topic),
            )
            if value < least
        ]
        if not 0 <= label_noise <= 1:
            problems.append(f"data.task.label_noise={label_noise} must be in [0, 1]")
        if problems := [*problems, *self._domain_problems()]:
            raise ValueError("\n".join(problems))
        self.topics = [
            Random(f"{self.name}/{seed}/topic/{topic}").sample(
                range(num_concepts), concepts_per_topic
            )
            for topic in range(num_topics)
        ]
        self._drawn: dict[tuple[Part, int], tuple[PairRow, ...]] = {}

    def _domain_problems(self) -> list[str]:
        problems = []
        keys = {"train_domains": self.train_domains, "new_domains": self.new_domains}
        for key, domains in keys.items():
            if not all(0 <= domain < self.num_domains for domain in domains):
                allowed = f"numbers from 0 to {self.num_domains - 1} (data.task.num_domains)"
                problems.append(f"data.task.{key}={domains} must be {allowed}")
            if len(set(domains)) < len(domains):
                problems.append(f"data.task.{key}={domains} must name a domain once")
        if not self.train_domains:
            problems.append("data.task.train_domains=[] must name a domain at least")
        if both := sorted({*self.train_domains} & {*self.new_domains}):
            problems.append(
                f"data.task.new_domains={self.new_domains} must not name domains of "
                f"data.task.train_domains={self.train_domains}: both have {both}"
            )
        return problems

    def vocabulary(self) -> list[str]:
        """All words: those of concepts by domain, then noise."""
        words = [
            concept_word(domain, concept, surface)
            for domain in range(self.num_domains)
            for concept in range(self.num_concepts)
            for surface in range(len(SURFACES))
        ]
        return [*words, *NOISE]

    def pairs(self, split: Split) -> list[PairSet]:
        """One set a domain, ``domain_<number>``: trained domains, then new ones.

        Args:
            split: Only ``train`` has label noise.

        Returns:
            The sets; none where the split has no pairs.
        """
        part: Part = "test" if split == "predict" else split
        domains = [*self.train_domains, *self.new_domains] if self.sizes[part] else []
        sets = []
        for domain in domains:
            rows = list(self._rows(part, domain))
            sets.append(
                PairSet(f"domain_{domain}", self._noisy(domain, rows) if part == "train" else rows)
            )
        return sets

    def evaluations(self, split: Split) -> list[EvalSet]:
        """Every domain's queries against all its documents of the split, without label noise.

        Args:
            split: ``train`` too has pairs of every domain here.

        Returns:
            One set a domain, of group ``in_domain``, ``new`` or ``ood``; none where the split has
            no pairs. A query's answers are its own document and identical ones.
        """
        part: Part = "test" if split == "predict" else split
        domains = range(self.num_domains) if self.sizes[part] else ()
        return [self._retrieval(part, domain) for domain in domains]

    def warm_start_pairs(self) -> list[PairSet]:
        """Pairs of all domains without label noise, drawn apart from all others."""
        domains = range(self.num_domains) if self.sizes["pretrain"] else ()
        return [PairSet(f"domain_{d}", list(self._rows("pretrain", d))) for d in domains]

    def _group(self, domain: int) -> str:
        if domain in self.train_domains:
            return "in_domain"
        return "new" if domain in self.new_domains else "ood"

    def _retrieval(self, part: Part, domain: int) -> RetrievalSet:
        rows = self._rows(part, domain)
        places: dict[object, list[int]] = {}
        for index, row in enumerate(rows):
            places.setdefault(row.positive, []).append(index)
        return RetrievalSet(
            name=f"domain_{domain}",
            queries=[row.query for row in rows],
            corpus=[row.positive for row in rows],
            relevant=[places[row.positive] for row in rows],
            group=self._group(domain),
        )

    def _rows(self, part: Part, domain: int) -> tuple[PairRow, ...]:
        if (part, domain) not in self._drawn:
            rows = (self._draw(part, domain, index) for index in range(self.sizes[part]))
            self._drawn[part, domain] = tuple(rows)
        return self._drawn[part, domain]

    def _draw(self, part: Part, domain: int, index: int) -> PairRow:
        uid = f"{self.name}/{self.seed}/{part}/{domain}/{index}"
        rng = Random(uid)
        concepts = rng.sample(self.topics[rng.randrange(self.num_topics)], DOCUMENT_CONCEPTS)
        document = self._text(rng, domain, concepts, DOCUMENT_NOISE)
        asked = rng.sample(concepts, QUERY_CONCEPTS)
        return PairRow(uid, self._text(rng, domain, asked, QUERY_NOISE), document)

    @staticmethod
    def _text(rng: Random, domain: int, concepts: Sequence[int], noise: int) -> str:
        words = [concept_word(domain, c, rng.randrange(len(SURFACES))) for c in concepts]
        words += rng.choices(NOISE, k=noise)
        rng.shuffle(words)
        return " ".join(words)

    def _noisy(self, domain: int, rows: list[PairRow]) -> list[PairRow]:
        """The rows, some of which have handed their positives on in a circle."""
        count = round(self.label_noise * len(rows))
        if count < 2:
            return rows
        picked = Random(f"{self.name}/{self.seed}/noise/{domain}").sample(range(len(rows)), count)
        noisy = list(rows)
        for place, source in zip(picked, [*picked[1:], picked[0]], strict=True):
            noisy[place] = PairRow(rows[place].uid, rows[place].query, rows[source].positive)
        return noisy
