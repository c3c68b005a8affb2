"""Multiple-choice items of a run: cut from its held-out text, answered by what it serves."""

from __future__ import annotations

from typing import Any

from fissile.errors import UsageError
from fissile.eval.choices import Item, choices, read_items
from fissile.eval.continuations import build_choices
from fissile.eval.tokens import load_tokenizer
from fissile.run.context import RunContext
from fissile.run.gates import AnswerScore
from fissile.run.ledger import Event


class Answers:
    """The items of one run.

    Args:
        context: of the run.

    Attributes:
        items: made of the held-out text; none if it is too short or none are wanted.
        events: says so in the ledger where the text is too short.
    """

    def __init__(self, context: RunContext) -> None:
        self.recipe, self.source = context.recipe, context.source
        self.items: list[Item] = []
        self.events: list[Event] = []
        wanted = self.recipe.evaluate.choices
        if wanted == 0:
            return
        text = context.data("heldout.jsonl", self.recipe.evaluate.data)
        path = context.out / "journal" / "choices.jsonl"
        seed = self.recipe.seed
        try:
            build_choices(text, path, items_per_domain=wanted, shots=0, seed=seed)
        except UsageError as err:
            # Perplexity is measured all the same; a gate on choices then is missed, loudly.
            self.events.append(Event("choices_skipped", "evaluate", None, "", str(err)))
            return
        self.items = read_items(path)

    def score(self, model: Any) -> dict[str, Any]:
        """The field `choices` of a `Score` row of metrics.json, or nothing without items.

        Args:
            model: Hugging Face style causal model in evaluation mode.
        """
        if not self.items:
            return {}
        settings = self.recipe.evaluate
        found = choices(
            model,
            load_tokenizer(self.source.folder),
            self.items,
            context=min(settings.context, self.source.config.max_position_embeddings),
            batch_tokens=settings.batch_tokens,
        )
        score = AnswerScore(
            accuracy=found.accuracy,
            stderr=found.stderr,
            by_subject=found.by_subject,
            credit=list(found.credit),
            documents=[f"{item.subject}/{item.document}" for item in self.items],
        )
        return {"choices": score.model_dump()}
