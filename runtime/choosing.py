"""How a row's next token is chosen: constraint, then sampler; and what is told about it."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.constraint import Constraint
from runtime.detokenize import TokenBytes
from runtime.logprobs import TokenLogprob, token_logprob
from runtime.options import GenerationOptions
from runtime.sampling import Ids, Logits, Sampler, likeliest, make_samplers


class Chooser:
    """A `runtime.sampling.Sampler` for one row.

    Args:
        sampler: draws, or takes the likeliest.
        constraint: what may come; None allows everything.
        logprobs: how many of the likeliest tokens to tell with each token; None tells nothing.
        tokenizer: for what is told.

    Attributes:
        last_told: what was told about the last token.
    """

    def __init__(
        self,
        sampler: Sampler,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        tokenizer: TokenBytes | None = None,
    ) -> None:
        self.constraint = constraint
        self._sampler = sampler
        self._logprobs = logprobs
        self._tokenizer = tokenizer
        self._told: dict[int, TokenLogprob] = {}
        self.last_told: TokenLogprob | None = None

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing but the largest logit is looked at."""
        return self._sampler is likeliest and self.constraint is None and self._logprobs is None

    def __call__(self, logits: Logits, prompt_ids: Ids, generated_ids: Ids) -> int:
        """The next id. `generated_ids` may be shorter than at the last call, or others: places are told anew."""
        allowed = logits
        if self.constraint is not None:
            self.constraint.follow(generated_ids)
            allowed = self.constraint.restrict(logits)
        token = self._sampler(allowed, prompt_ids, generated_ids)
        if self.constraint is not None:
            self.constraint.take(token)
        if self._logprobs is not None:
            self.last_told = token_logprob(logits, token, self._logprobs, self._tokenizer)
            self._told[len(generated_ids)] = self.last_told
        return token

    @property
    def complete(self) -> bool:
        """Whether the constraint leaves nothing to say."""
        return self.constraint is not None and self.constraint.complete

    def told(self, tokens: int) -> list[TokenLogprob] | None:
        """What was told about the first `tokens` tokens; None where nothing was asked for."""
        return None if self._logprobs is None else [self._told[place] for place in range(tokens)]


def make_choosers(
    options: GenerationOptions, constraints: Sequence[Constraint | None], tokenizer: TokenBytes | None
) -> list[Chooser]:
    """One chooser for each row, with independent streams."""
    samplers = make_samplers(options, len(constraints))
    return [
        Chooser(sampler, constraint, options.logprobs, tokenizer)
        for sampler, constraint in zip(samplers, constraints, strict=True)
    ]
