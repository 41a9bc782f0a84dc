"""A text that grows turn by turn, and keeps its keys and values between the turns.

A turn runs only what is new. Both caches are resumed at one position: behind the last row whose
successor was known to the draft when it saw the row, for the row of a text's last token needs the
token after it (successor-token rule). Rows further on, a round's at most, run again.

With FP8 linears a turn of more than 128 tokens meets their weights as codes (`quantises_rows`).
Behind rounds, as with an FP8 cache, last bits may become other codes: equal ids are not promised.
"""

from collections.abc import Sequence

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.ends import Detokenize
from aerie.eagle3.engine import Engine
from aerie.eagle3.generate import Speculation
from aerie.eagle3.interface import Target
from aerie.eagle3.policies import Chain, Policy
from aerie.eagle3.rows import Pair, Rows
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Decoded, Request, check_draft_takes_images
from aerie.eagle3.streams import Generation, SingleStream, Stream
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_scales import KVCacheDtype


class Session:
    """`max_length` tokens of one text, prompts and outputs of all turns, allocated at once."""

    def __init__(
        self,
        target: Target,
        max_length: int,
        draft: Eagle3Llama4ForCausalLM | None = None,
        *,
        policy: Policy | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
    ) -> None:
        """Raises ValueError where the memory does not suffice."""
        self._target = target.get_language_model()
        self.max_length = max_length
        pair = Pair(self._target, draft, policy or Chain())
        rows = Rows(pair, [max_length], 1, kv_cache_dtype)
        self._draft, self._place = draft, _HeldRow(rows, max_length)
        self._engine = Engine(Speculation(pair, rows), self._place, pair.lag)
        self._turn: Decoded | None = None

    @property
    def tokens(self) -> list[int]:
        """The text so far."""
        turn = self._turn
        return [] if turn is None else turn.request.prompt_ids + turn.tokens

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        *,
        sampling: SamplingParams | None = None,
        detokenize: Detokenize | None = None,
        images: ImageFeatures | None = None,
    ) -> SingleStream:
        """Appends `ids` to the text and goes on behind them; iterate over what is returned.

        The next turn ends this one where it stands. `images` stand at placeholders of `ids`.
        Raises ValueError as `generate`, and for more than `max_length`.
        """
        text, num_cached = self.tokens, 0
        images = None if images is None else images.moved(len(text))
        if self._turn is not None:
            self._engine.cancel(self._turn)
            num_cached = self._turn.num_cached
            images = _not_yet_run(self._turn.request.images, num_cached, images)
        request = Request.checked(
            self._target, [*text, *ids], max_new_tokens, eos_token_ids, sampling, detokenize, images
        )
        if request.max_length > self.max_length:
            raise ValueError(
                f"max_length: text, prompt and output of this turn take {request.max_length} "
                f"tokens, the session has room for {self.max_length}"
            )
        if images is not None and self._draft is not None:
            check_draft_takes_images(self._draft, self._target)
        self._turn = self._engine.add(request, num_cached, num_known=len(text))
        return SingleStream(Stream(self._engine, [self._turn]))

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        *,
        sampling: SamplingParams | None = None,
        detokenize: Detokenize | None = None,
        images: ImageFeatures | None = None,
    ) -> Generation:
        """A whole turn (`stream`)."""
        stream = self.stream(
            ids,
            max_new_tokens,
            eos_token_ids,
            sampling=sampling,
            detokenize=detokenize,
            images=images,
        )
        for _ in stream:
            pass
        return Generation.of(stream.decoded)


def _not_yet_run(
    earlier: ImageFeatures | None, num_cached: int, images: ImageFeatures | None
) -> ImageFeatures | None:
    """`images` behind those of the turn before that run again, or that it did not come to."""
    left = None if earlier is None else earlier.since(num_cached)
    return images if left is None else left.followed_by(images)


class _HeldRow:
    """The only row, whose pages are kept when a request leaves it."""

    capacity = 1

    def __init__(self, rows: Rows, max_length: int) -> None:
        self._rows, self._max_length = rows, max_length
        self._is_new = True

    def has_room_for(self, request: Request) -> bool:
        return True

    def join(self, row: int, request: Request, num_cached: int) -> None:
        if self._is_new:
            self._rows.allot(row, self._max_length)
            self._is_new = False
        self._rows.begin(row, request, num_cached)

    def move(self, source: int, target: int) -> None:
        raise AssertionError("a single row never moves")

    def leave(self, row: int) -> None:
        self._rows.idle(row)
