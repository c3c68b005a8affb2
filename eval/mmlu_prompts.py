"""The subjects and the prompts of MMLU, as the tasks `mmlu` and `mmlu_continuation` of
lm-evaluation-harness have them. Loads no torch.

letter: the four choices are part of the question, the answer is " A", " B", " C" or " D".
continuation: the question alone, the answer is the text of the choice.
Examples come from the dev split, the first ones in file order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scoring = Literal["letter", "continuation"]
LETTERS = ("A", "B", "C", "D")
HARNESS_VERSIONS = {"task": "1.0", "group": "2"}
"""Of the harness's tasks and groups that the prompts and averages here are those of."""

GROUPS: dict[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry",
        "college_computer_science", "college_mathematics", "college_physics", "computer_security",
        "conceptual_physics", "electrical_engineering", "elementary_mathematics",
        "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history",
        "high_school_world_history", "international_law", "jurisprudence", "logical_fallacies",
        "moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law",
        "world_religions",
    ),
    "social sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics",
        "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology",
        "human_sexuality", "professional_psychology", "public_relations", "security_studies",
        "sociology", "us_foreign_policy",
    ),
    "other": (
        "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
        "management", "marketing", "medical_genetics", "miscellaneous", "nutrition",
        "professional_accounting", "professional_medicine", "virology",
    ),
}  # fmt: skip
"""The 57 subjects by group."""
SUBJECTS: dict[str, str] = {
    subject: group
    for subject, group in sorted((s, group) for group, members in GROUPS.items() for s in members)
}
"""Subject to group, in alphabetical order."""

_DESCRIPTIONS: dict[Scoring, str] = {
    "letter": "The following are multiple choice questions (with answers) about {subject}.\n\n",
    "continuation": "The following are questions (with answers) about {subject}.\n\n",
}
_QUESTIONS: dict[Scoring, str] = {
    "letter": "{question}\nA. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:",
    "continuation": "Question: {question}\nAnswer:",
}
_BEFORE_ANSWER, _BETWEEN = " ", "\n\n"


@dataclass(frozen=True)
class MmluItem:
    """One question.

    Args:
        question: text, white space around it is not used.
        choices: four texts.
        answer: index of the right one.
        subject: label, by the standard names one of the 57.
        where: file and row, for messages; unique in a data set.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    where: str


def prefix_text(subject: str, shots: Sequence[MmluItem], scoring: Scoring) -> str:
    """What all prompts of a subject begin with: the description and the answered examples."""
    examples = (
        question_text(item, scoring)
        + _BEFORE_ANSWER
        + _answers(item, scoring)[item.answer]
        + _BETWEEN
        for item in shots
    )
    description = _DESCRIPTIONS[scoring].format(subject=subject.replace("_", " "))
    return description + "".join(examples)


def question_text(item: MmluItem, scoring: Scoring) -> str:
    """A question as it stands in the prompt, up to "Answer:"."""
    return _QUESTIONS[scoring].format(*item.choices, question=item.question.strip())


def continuations(item: MmluItem, scoring: Scoring) -> tuple[str, ...]:
    """The four texts whose log-likelihoods after the prompt are compared."""
    return tuple(_BEFORE_ANSWER + answer for answer in _answers(item, scoring))


def template_sha256(scoring: Scoring) -> str:
    """Hash of everything a prompt consists of besides the data."""
    parts = (_DESCRIPTIONS[scoring], _QUESTIONS[scoring], _BEFORE_ANSWER, _BETWEEN, *LETTERS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _answers(item: MmluItem, scoring: Scoring) -> tuple[str, ...]:
    return LETTERS if scoring == "letter" else item.choices
