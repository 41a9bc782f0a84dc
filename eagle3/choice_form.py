"""How a pass chooses its tokens, as far as its operations depend on it and not on their numbers.

Rounds of one form are the same operations on tables of the same shapes, whatever the requests: so
a round that was captured in one form is right for every round whose own form it covers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from operator import or_

from aerie.eagle3.sampling import SamplingParams


@dataclass(frozen=True)
class RuleForm:
    """Which rules are on, and the room that their tables need: all that a pass's shape tells."""

    has_bias: bool = False
    num_words: int = 0
    longest_beginning: int = 0  # of a bad word, its last token left out
    num_ends: int = 0  # that min_tokens holds back
    has_repetition: bool = False
    has_output_penalties: bool = False

    @classmethod
    def of(cls, params: SamplingParams, end_ids: Iterable[int]) -> "RuleForm":
        """Of one request, whose `end_ids` are those besides its own stop ids."""
        words = params.bad_words_ids
        return cls(
            bool(params.logit_bias),
            len(words),
            max((len(word) - 1 for word in words), default=0),
            len({*end_ids, *params.stop_token_ids}) if params.min_tokens > 0 else 0,
            params.repetition_penalty != 1.0,
            params.presence_penalty != 0.0 or params.frequency_penalty != 0.0,
        )

    def __bool__(self) -> bool:
        return self != NO_RULES

    def __or__(self, other: "RuleForm") -> "RuleForm":
        """Room for both."""
        names = [field.name for field in fields(self)]
        return RuleForm(*(max(getattr(self, name), getattr(other, name)) for name in names))


NO_RULES = RuleForm()


@dataclass(frozen=True)
class ChoiceForm:
    """Whether anything is drawn, by which filters, and the rules before. A filter that is on for
    one sequence keeps everything of the others'; drawing takes the likeliest of a greedy one."""

    is_greedy: bool = True
    has_top_k: bool = False
    has_top_p: bool = False
    has_min_p: bool = False
    rules: RuleForm = NO_RULES

    @classmethod
    def of(cls, params: SamplingParams, end_ids: Iterable[int]) -> "ChoiceForm":
        """Of one request, logits processors left out."""
        return cls(
            params.is_greedy,
            params.top_k > 0,
            params.top_p < 1,
            params.min_p > 0,
            RuleForm.of(params, end_ids),
        )

    def __or__(self, other: "ChoiceForm") -> "ChoiceForm":
        """What covers both."""
        return ChoiceForm(
            self.is_greedy and other.is_greedy,
            self.has_top_k or other.has_top_k,
            self.has_top_p or other.has_top_p,
            self.has_min_p or other.has_min_p,
            self.rules | other.rules,
        )

    def covers(self, other: "ChoiceForm") -> bool:
        return self | other == self


GREEDY = ChoiceForm()
EVERY_FILTER = ChoiceForm(False, True, True, True)


def common_form(forms: Iterable[ChoiceForm]) -> ChoiceForm:
    """What covers all of them."""
    return reduce(or_, forms, GREEDY)
