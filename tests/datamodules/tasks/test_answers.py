"""Final answers: found in texts, brought to one form, compared; nothing raises, nothing hangs."""

from __future__ import annotations

import random
import threading
import time

import pytest

from datamodules.tasks import answers
from datamodules.tasks.answers import agree, find_answer, has_math_verify, normalise, number_of

needs_math_verify = pytest.mark.skipif(not has_math_verify(), reason="needs the extra math")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {4}", "4"),
        (r"$\boxed 5$ indeed", "5"),
        (r"\fbox{6}", "6"),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
        (r"\boxedx", None),
        ("7", None),
        (r"\boxed{" + "1" * 301 + "}", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert find_answer(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 4", "4"),
        ("#### 4\n#### 1,200 \nmore", "1,200"),
        ("####5.", "5"),
        ("####", None),
        ("#### \n4", None),
        ("### 4", None),
    ],
)
def test_after_hashes(text: str, answer: str | None) -> None:
    assert find_answer(text, "hashes") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("3 apples, 1,234.50 pears.", "1,234.50"), ("x = -7", "-7"), ("none", None), ("\u0663", None)],
)
def test_last_number(text: str, answer: str | None) -> None:
    assert find_answer(text, "number") == answer


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        (r"-1/2", r"-\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\left( 1, 2 \right]", "(1,2]"),
        (r"\leftarrow", r"\leftarrow"),
        (r"x = 5", "5"),
        (r"12\text{ cm}", "12"),
        (r"\text{even}", "even"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        ("1,234,567", "1234567"),
        ("1,2", "1,2"),
        (".5", "0.5"),
        ("5.", "5"),
        ("\u22125", "-5"),
        ("", ""),
    ],
)
def test_normalise(text: str, form: str) -> None:
    assert normalise(text) == form
    assert normalise(form) == form


@pytest.mark.parametrize(
    ("one", "other", "how"),
    [
        (r"\dfrac{3}{4}", r"\frac{3}{4}", "exact"),
        ("1,000", "1000", "exact"),
        ("0.50", r"\frac{1}{2}", "numeric"),
        ("1/2", "2/4", "numeric"),
        ("72.0", "72", "numeric"),
        ("+3", "3", "numeric"),
        ("-0", "0", "numeric"),
        ("0.3333", "1/3", None),
        ("4", "5", None),
        ("1/0", "1", None),
        ("", "", None),
        ("x", "y", None),
        ("1" * 301, "1" * 301, None),
    ],
)
def test_agree(one: str, other: str, how: str | None) -> None:
    assert agree(one, other, "numeric") == how
    assert agree(other, one, "numeric") == how
    assert agree(one, other, "exact") == ("exact" if how == "exact" else None)


def test_number_of() -> None:
    assert number_of(r"-\frac{1}{-2}") == 0.5
    assert number_of("1e3") is None and number_of("\u0663") is None and number_of("") is None


def test_noise_never_raises_and_is_fast() -> None:
    rng, began = random.Random(0), time.process_time()
    letters = "\\{}$%,.^_/#- 0123456789abxfrcdtsqo\ud800\u0663\n"
    for case in range(2000):
        text = "".join(rng.choices(letters, k=case % 300))
        text = rng.choice(("", "\\boxed{", "#### ", "\\frac")) + text
        for style in ("boxed", "hashes", "number"):
            find_answer(text, style)  # type: ignore[arg-type]
        agree(text, "1/2", "numeric")
    for text in ("{" * 200_000, "\\boxed{" * 50_000, "#" * 200_000, "1," * 100_000):
        for style in ("boxed", "hashes", "number"):
            find_answer(text, style)  # type: ignore[arg-type]
    assert time.process_time() - began < 10


def test_symbolic_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "has_math_verify", lambda: False)
    with pytest.raises(ImportError, match=r"\.\[math\]"):
        agree("x + p", "p + x", "symbolic")
    assert agree("x + p", "p + x", "auto") is None


@needs_math_verify
@pytest.mark.slow
def test_symbolic_agreement() -> None:
    assert agree(r"(x+1)^2", "x^2 + 2x + 1") == "symbolic"
    assert agree(r"\sqrt{8}", r"2\sqrt2") == "symbolic"
    assert agree(r"\{1,2\}", r"\{2,1\}", "numeric") is None
    assert agree("x + 1", "x + 2") is None
    assert agree("x + 1", "1 + x", "numeric") is None


@needs_math_verify
@pytest.mark.slow
def test_towers_end_and_other_threads_may_ask() -> None:
    began = time.monotonic()
    assert agree(r"9^{9^{9^{9}}}", "x + 1") is None
    said: list[object] = []
    thread = threading.Thread(target=lambda: said.append(agree("a + b", "b + a")))
    thread.start()
    thread.join(60)
    assert said == ["symbolic"]
    assert time.monotonic() - began < 60
