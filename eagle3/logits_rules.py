"""Rules that change the logits of every verified row by the row's own prefix.

What requests ask are rows of numbers in tables on the device (`RuleColumns`), and a pass goes
through the same operations whatever the numbers: so all sequences are judged at once, and a
captured round judges requests that came after it. A row is changed by nothing but its logits and
its prefix, so a token is judged alike whether its position is verified in a tree or decoded alone.
Logits processors are Python and stay outside (`logits_processors`).

On one rank of several a row has that rank's columns, `own_ids`; rules change those and leave the
others to the other ranks. Letters: B sequences, N rows of each, W bad words, X columns of a row and
one more for the ids of other ranks.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from aerie.eagle3.choice_form import NO_RULES, RuleForm
from aerie.eagle3.prefixes import Prefixes
from aerie.eagle3.sampling import SamplingParams
from aerie.llama4.kv_pool import rows_of
from aerie.llama4.upload import upload

ANY = -2  # stands before a bad word's beginning where others have a longer one; no id


class RuleColumns:
    """The rules of `capacity` sequences, one row of every table each; off until a request joins."""

    def __init__(self, capacity: int, own_ids: range, device: torch.device) -> None:
        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((capacity,), value, dtype=dtype, device=device)

        self._capacity, self._own_ids, self._device = capacity, own_ids, device
        self.form = NO_RULES
        self._repetition_B = column(1.0)
        self._presence_B, self._frequency_B = column(0.0), column(0.0)
        self._min_tokens_B, self.num_prompt_B = column(0, torch.int64), column(0, torch.int64)
        self._allot(NO_RULES)

    @property
    def columns(self) -> list[Tensor]:
        """All tables."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def reserve(self, form: RuleForm) -> None:
        """Makes room for `form`; where there was too little, the tables are others afterwards."""
        if self.form | form == self.form:
            return
        before = self._bias_BV, self._lasts_BW, self._ends_BE, self._beginnings_BWC
        self._allot(self.form | form)
        bias_BV, lasts_BW, ends_BE, beginnings_BWC = before
        self._bias_BV[:, : bias_BV.shape[1]] = bias_BV
        self._lasts_BW[:, : lasts_BW.shape[1]] = lasts_BW
        self._ends_BE[:, : ends_BE.shape[1]] = ends_BE
        _, words, beginning = beginnings_BWC.shape
        longest = self._beginnings_BWC.shape[2]
        self._beginnings_BWC[:, :words, longest - beginning :] = beginnings_BWC

    def join(
        self, row: int, params: SamplingParams, end_ids: Iterable[int], num_prompt: int
    ) -> None:
        """Row `row` is judged as `params` say from now on."""
        self.reserve(RuleForm.of(params, end_ids))
        self._repetition_B[row] = params.repetition_penalty
        self._presence_B[row] = params.presence_penalty
        self._frequency_B[row] = params.frequency_penalty
        self._min_tokens_B[row] = params.min_tokens
        self.num_prompt_B[row] = num_prompt
        self._set_ids(row, params, {*end_ids, *params.stop_token_ids})

    def move(self, source: int, target: int) -> None:
        for column in self.columns:
            column[target] = column[source]

    def judged(self, logits_BNV: Tensor, prefixes: Prefixes, first: int, form: RuleForm) -> Tensor:
        """Float32 logits of the sequences from row `first` on, by the rules that `form` names."""
        sequences = len(logits_BNV)
        if form.has_bias:
            logits_BNV = logits_BNV + rows_of(self._bias_BV, first, sequences)[:, None]
        if form.num_words or form.num_ends:
            logits_BNV = logits_BNV + self._banned(prefixes, first, form)
        if form.has_repetition:
            penalty_B11 = rows_of(self._repetition_B, first, sequences)[:, None, None]
            nothing_B = torch.zeros_like(prefixes.num_prompt_B)
            is_seen_BNV = self._counts(prefixes, nothing_B) > 0
            divided_BNV, multiplied_BNV = logits_BNV / penalty_B11, logits_BNV * penalty_B11
            scaled_BNV = torch.where(logits_BNV > 0, divided_BNV, multiplied_BNV)
            logits_BNV = torch.where(is_seen_BNV, scaled_BNV, logits_BNV)
        if form.has_output_penalties:
            counts_BNV = self._counts(prefixes, prefixes.num_prompt_B)
            presence_B11 = rows_of(self._presence_B, first, sequences)[:, None, None]
            frequency_B11 = rows_of(self._frequency_B, first, sequences)[:, None, None]
            logits_BNV = logits_BNV - frequency_B11 * counts_BNV - presence_B11 * (counts_BNV > 0)
        return logits_BNV

    def _allot(self, form: RuleForm) -> None:
        def table(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((self._capacity, *shape), value, dtype=dtype, device=self._device)

        self.form, whole, elsewhere = form, torch.int64, len(self._own_ids)
        self._bias_BV = table(0.0, torch.float32, elsewhere if form.has_bias else 0)
        self._lasts_BW = table(elsewhere, whole, form.num_words)
        self._ends_BE = table(elsewhere, whole, form.num_ends)
        self._beginnings_BWC = table(ANY, whole, form.num_words, form.longest_beginning)

    def _set_ids(self, row: int, params: SamplingParams, ends: set[int]) -> None:
        elsewhere, longest = len(self._own_ids), self.form.longest_beginning
        self._bias_BV[row] = 0.0
        self._lasts_BW[row] = self._ends_BE[row] = elsewhere
        self._beginnings_BWC[row] = ANY
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            padded_X = torch.zeros(elsewhere + 1, device=self._device)
            values_A = upload(values, torch.float32, self._device)
            padded_X[self._at(self._whole(ids))] = values_A
            self._bias_BV[row] = padded_X[:elsewhere]
        for number, (*beginning, last) in enumerate(params.bad_words_ids):
            self._lasts_BW[row, number : number + 1] = self._at(self._whole([last]))
            self._beginnings_BWC[row, number, longest - len(beginning) :] = self._whole(beginning)
        if params.min_tokens > 0:
            self._ends_BE[row, : len(ends)] = self._at(self._whole(sorted(ends)))

    def _whole(self, ids: Sequence[int]) -> Tensor:
        return upload(list(ids), torch.int64, self._device)

    def _at(self, ids: Tensor) -> Tensor:
        """Columns of ids; those of other ranks share the one behind the last."""
        own = self._own_ids
        return torch.where((ids >= own.start) & (ids < own.stop), ids - own.start, len(own))

    def _banned(self, prefixes: Prefixes, first: int, form: RuleForm) -> Tensor:
        """-inf for the ends of words that have begun and for ends that come too early, else 0."""
        (sequences, rows), elsewhere = prefixes.tokens_BN.shape, len(self._own_ids)
        banned_BNX = torch.zeros(sequences, rows, elsewhere + 1, device=self._device)

        def ban(is_banned: Tensor, ids: Tensor) -> None:
            values = torch.where(is_banned, -torch.inf, 0.0)
            columns = rows_of(ids, first, sequences)[:, None].expand(-1, rows, -1)
            banned_BNX.scatter_add_(2, columns, values.expand(columns.shape))

        if form.num_words:
            beginnings_B1WC = rows_of(self._beginnings_BWC, first, sequences)[:, None]
            tails_BN1C = prefixes.last_tokens(self.form.longest_beginning)[:, :, None]
            is_same = (tails_BN1C == beginnings_B1WC) | (beginnings_B1WC == ANY)
            ban(is_same.all(dim=3), self._lasts_BW)
        if form.num_ends:
            least_B1 = rows_of(self._min_tokens_B, first, sequences)[:, None]
            ban((prefixes.num_output_BN < least_B1)[:, :, None], self._ends_BE)
        return banned_BNX[:, :, :elsewhere]

    def _counts(self, prefixes: Prefixes, since_B: Tensor) -> Tensor:
        """How often each own id stands at known positions from `since_B` on and on a row's path."""
        (sequences, rows), elsewhere = prefixes.tokens_BN.shape, len(self._own_ids)
        known_BX = torch.zeros(sequences, elsewhere + 1, device=self._device)
        is_known_BS = prefixes.known_since(since_B).float()
        known_BX.scatter_add_(1, self._at(prefixes.ids_BS), is_known_BS)
        tokens_BNN = self._at(prefixes.tokens_BN)[:, None].expand(-1, rows, -1)
        counts_BNX = known_BX[:, None].expand(-1, rows, -1).clone()
        counts_BNX.scatter_add_(2, tokens_BNN, prefixes.drafted_BNN().float())
        return counts_BNX[:, :, :elsewhere]
