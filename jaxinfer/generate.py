"""What users touch: `LLM` with generate, stream, chat, score and forward; `loading.py` makes one.

Text is met here and not below. Read on in `batch.py` (the host's side of a batch),
`speculative/round.py` (the compiled loop), `model.py` (the forward), `cache.py`, `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import scoring
from jaxinfer.attend import Store, check_store
from jaxinfer.batch import Batch, Model, capacity_of
from jaxinfer.calibrate import measure
from jaxinfer.chat import encode_chat
from jaxinfer.config import ModelConfig
from jaxinfer.distributed import agree
from jaxinfer.drafters import as_self, check_drafter, make_drafter, make_speculation
from jaxinfer.errors import InvalidArgument, PromptTooLong
from jaxinfer.model import Params
from jaxinfer.outputs import FinishReason, ForwardOutput, GenerationOutput, Piece
from jaxinfer.prompts import Prompt, prompt_ids
from jaxinfer.requests import Request, make_requests
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import Rules, fit_config, make_layout
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.drafter import Drafter, NoDrafter
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.self_drafter import SelfDrafter
from jaxinfer.speculative.speculation import Speculation, Verifier
from jaxinfer.text import TextWriter
from jaxinfer.tokenizer import Tokenizer
from pallas_kernels import Impl

STEPS_PER_LOOK = 64  # tokens between two looks of the host at a batch without stop strings
STEPS_PER_LOOK_STOP = 8  # with stop strings: at most this many tokens are made in vain

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
OneOrEach = SamplingParams | Sequence[SamplingParams] | None  # for all prompts, or one each
# See LLM.speculation; a path, and a name that is none of its own, for `load` alone.
DrafterLike: TypeAlias = "LLM | Drafter | str | Path | None"


class LLM:
    """A model ready to generate. Every call is a function of its arguments."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        dtype: jnp.dtype,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        kernels: Impl = "xla",
        cache_dtype: Store | None = None,
        max_len: int | None = None,
        max_batch: int = 32,
        default_params: SamplingParams | None = None,
        eos_ids: Sequence[int] | None = None,
        drafter: DrafterLike = None,
        num_draft: int | Literal["auto"] | None = None,
        verifier: Verifier = "auto",
        exact: bool = False,
    ) -> None:
        if max_batch < 1:
            raise InvalidArgument(f"max_batch={max_batch}: must be 1 or more")
        if max_len is not None and not 1 < max_len <= config.max_len:
            raise InvalidArgument(
                f"max_len={max_len}: must be 2 to {config.max_len}, the model's own"
            )
        self.tokenizer = tokenizer
        self.max_len = max_len or config.max_len
        self.max_batch = max_batch
        self.default_params = default_params or SamplingParams()
        self.eos_ids = tuple(tokenizer.eos_ids if eos_ids is None else eos_ids)
        vocab_limit = min(config.vocab_size, tokenizer.vocab_size)
        check_store(cache_dtype)
        layout = make_layout(mesh, rules)
        if fit_config(config, layout) != config:
            raise InvalidArgument(
                "the heads do not divide over the mesh: jaxinfer.load spreads them"
            )
        there = layout.sharding().device_set
        if mesh and any(x.sharding.device_set != there for x in jax.tree.leaves(params)):
            raise InvalidArgument(
                "the params do not lie on the mesh: jaxinfer.load puts them there"
            )
        self.model = Model(
            params, config, jnp.dtype(dtype), layout, vocab_limit, kernels, cache_dtype
        )
        self.model.check_kernels()
        self.num_draft = num_draft
        self._by_self: dict[SelfDrafter, Drafter] = {}
        self._by_model: WeakKeyDictionary[LLM, Drafter] = WeakKeyDictionary()
        own = self._drafter(drafter)
        self.default_speculation = make_speculation(own, num_draft, verifier, exact)
        self._costs: dict[Any, Costs] = {}  # measured once, see `_costs_of`

    @property
    def params(self) -> Params:
        """The weights, a nested dict of arrays."""
        return self.model.params

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.model.config

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(x.nbytes for x in jax.tree.leaves(self.params))

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self.tokenizer.chat_template is not None

    # ---------------------------------------------------------------- generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: OneOrEach = None,
        *,
        drafter: DrafterLike = "default",
        num_draft: int | Literal["auto"] | None = None,
        verifier: Verifier | None = None,
        exact: bool | None = None,
        **overrides: Any,
    ) -> Any:
        """Continue prompts.

        Args:
          prompts: text or token ids, or a list of them.
          params: one for all prompts or one each; None: the model's defaults. Under one `params`
            with a seed, the prompts of a list draw different random numbers; under a list of
            `params`, a row's text depends on its own alone.
          drafter, num_draft, verifier, exact: as for `load`, for this call; left out, they are what
            `load` was told.
          **overrides: fields of `SamplingParams` that replace those of `params`.

        With a seed the text is always the same under exact=True or a fixed num_draft. How much
        num_draft="auto" drafts depends on time: the text is then the same up to rounding, and under
        verifier="rejection" or "block" of the same distribution.

        Returns:
          A GenerationOutput for one prompt (a list of n where n > 1), a list in order for a list.
          A prompt that ends at the context's end gives fewer than max_tokens.

        Raises:
          InvalidArgument: an empty prompt, a bad id or parameter; PromptTooLong; OutOfMemory.
        """
        ids, single = self._ids(prompts)
        rows = self._requests(ids, params, overrides)
        speculation = self.speculation(drafter, num_draft, verifier, exact)
        outputs: list[GenerationOutput | None] = [None] * len(rows)
        # Rows of like length share a batch: padding is the only cost of raggedness.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        for first in range(0, len(order), self.max_batch):
            members = order[first : first + self.max_batch]
            run = self._run([rows[i] for i in members], speculation, streaming=False)
            for index, piece_or_output in run:
                if isinstance(piece_or_output, GenerationOutput):
                    outputs[members[index]] = piece_or_output
        return _regroup(outputs, rows, len(ids), single)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: OneOrEach = None,
        *,
        drafter: DrafterLike = "default",
        num_draft: int | Literal["auto"] | None = None,
        verifier: Verifier | None = None,
        exact: bool | None = None,
        **overrides: Any,
    ) -> Iterator[Piece]:
        """`generate`, a piece of text at a time.

        Yields:
          `Piece`, a str whose `row` tells the row; for one prompt they join to the whole text.
          Every row ends with a piece that has a `finish_reason`.
        """
        ids, _ = self._ids(prompts)
        rows = self._requests(ids, params, overrides)
        if len(rows) > self.max_batch:
            raise InvalidArgument(f"{len(rows)} rows to stream at once; max_batch={self.max_batch}")
        run = self._run(rows, self.speculation(drafter, num_draft, verifier, exact), streaming=True)
        return (item for _, item in run if isinstance(item, Piece))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: OneOrEach = None,
        *,
        template: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> Any:
        """Answer a conversation, or each of a list of them; returns as `generate` does.

        `template` holds further variables of the chat template: tools, add_generation_prompt, and
        what the model's own takes, such as {"enable_thinking": False}.
        """
        return self.generate(self.chat_ids(messages, **(template or {})), params, **overrides)

    def chat_ids(self, messages: Any, **template: Any) -> Any:
        """Token ids of a conversation (or of each) behind the model's chat template."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise InvalidArgument("a conversation is a list of at least one message")
        if isinstance(messages[0], Mapping):
            return encode_chat(self.tokenizer, messages, **template)
        return [encode_chat(self.tokenizer, m, **template) for m in messages]

    def speculation(
        self,
        drafter: DrafterLike = "default",
        num_draft: int | Literal["auto"] | None = None,
        verifier: Verifier | None = None,
        exact: bool | None = None,
    ) -> Speculation:
        """How tokens are to be made.

        Args:
          drafter: None, plain decoding; "ngram", lookup in prompt and output; "self", the model
            with fewer layers; "self:int8" or another recipe, the model in fewer bits; an LLM, a
            second model that drafts; a `Drafter`; "auto", which today is n-gram lookup; "default",
            what `load` was told.
          num_draft, verifier, exact: see `load`; None: what `load` was told.

        Raises:
          InvalidArgument: no such drafter, a draft length or a verifier that does not fit.
        """
        base = self.default_speculation
        default = isinstance(drafter, str) and drafter == "default"
        if verifier is None:  # asking for exact mode asks for its verifier
            verifier = "auto" if exact else base.verifier
        return make_speculation(
            base.drafter if default else self._drafter(drafter),
            self.num_draft if num_draft is None else num_draft,
            verifier,
            base.exact if exact is None else exact,
        )

    def _drafter(self, wanted: DrafterLike) -> Drafter:
        """As `make_drafter`; what takes its time, matching vocabularies and quantizing, is done
        once, and kept. The two of a FallbackDrafter may be named in the same way."""
        if isinstance(wanted, FallbackDrafter):
            first, second = self._drafter(wanted.first), self._drafter(wanted.second)
            if isinstance(first, NoDrafter) or isinstance(second, NoDrafter):
                raise InvalidArgument(
                    f"FallbackDrafter(first={wanted.first!r:.40}, second={wanted.second!r:.40}):"
                    " name two drafters, or use the one that there is"
                )
            return wanted.replace(first=first, second=second)
        if own := as_self(wanted):
            made: Any = self._by_self
            wanted = own.replace(num_draft="auto")
        elif isinstance(wanted, LLM):
            made = self._by_model
        else:
            return make_drafter(wanted, self.model, self.tokenizer)
        if wanted not in made:
            made[wanted] = make_drafter(wanted, self.model, self.tokenizer)
        drafter: Drafter = made[wanted]
        return drafter.replace(num_draft=own.num_draft) if own else drafter

    def _costs_of(self, speculation: Speculation, rows: Sequence[Request]) -> Costs:
        """Measured on first use; plain decoding needs none."""
        if isinstance(speculation.drafter, NoDrafter):
            return Costs()
        size = self.model.rows(len(rows))
        plan = speculation.plan(self.model.narrow(size))
        capacity = capacity_of(rows, speculation)
        leaves, structure = jax.tree.flatten(speculation.drafter)
        key: Any = (structure, tuple(map(jnp.shape, leaves)), plan, size)
        # A length is chosen by the price of a round, and a round reads all of the cache. A batch
        # that grows keeps the prices that it began with.
        if speculation.drafter.num_draft == "auto":
            key = (*key, capacity)
        if key not in self._costs:
            check_drafter(self.model, speculation, size, capacity, self.max_len)
            # Processes that judged by times of their own would run different programs.
            self._costs[key] = Costs(*agree(measure(self.model, speculation, size, capacity).pair))
        return self._costs[key]

    def _run(
        self, rows: Sequence[Request], speculation: Speculation, *, streaming: bool
    ) -> Iterator[tuple[int, Piece | GenerationOutput]]:
        """Run rows together: (row, Piece) as text comes, (row, GenerationOutput) at its end."""
        batch = Batch(self.model, rows, speculation, self._costs_of(speculation, rows))
        writers = [TextWriter(self.tokenizer.stream(continues=True), r.params.stop) for r in rows]
        running = set(range(len(rows)))
        batch.prefill()
        shown = [0] * len(rows)  # tokens that a piece has already spoken of
        marks: list[list[bool]] = [[] for _ in rows]  # which tokens were drafted
        look = STEPS_PER_LOOK_STOP if any(r.params.stop for r in rows) else STEPS_PER_LOOK
        max_new = 1  # the first round alone, so that its time is known
        while running:
            new = batch.advance(max_new)
            max_new = 1 if streaming else look
            for row in sorted(running):
                request, writer = rows[row], writers[row]
                text = ""
                marks[row] += new[row].drafted
                for token in new[row].token_ids:
                    text += writer.push(token, silent=token in request.stop_ids)
                    if writer.stopped:
                        batch.stop(row)
                        break
                reason = _finish_reason(request, writer)
                if reason:
                    running.discard(row)
                    text += writer.finish()
                if text or reason:
                    ids = writer.token_ids[shown[row] :]
                    yield row, Piece(text, row, ids, marks[row][shown[row] :][: len(ids)], reason)
                    shown[row] = len(writer.token_ids)
                if reason:
                    yield row, _output(batch, row, writer, marks[row], reason)

    # ---------------------------------------------------------------- research

    def score(self, texts: Prompt | Sequence[Prompt]) -> Any:
        """Log-probability (natural) of each token of a text given those before it.

        Returns:
          np.ndarray [T-1] f32 for a text of T tokens, BOS included where the tokenizer adds one; a
          list of them for a list.
        """
        ids, single = self._ids(texts)
        self._check_lengths(ids)
        groups = [ids[i : i + self.max_batch] for i in range(0, len(ids), self.max_batch)]
        scores = [row for group in groups for row in scoring.score(self.model, group)]
        return scores[0] if single else scores

    def forward(
        self, token_ids: Sequence[int] | Sequence[Sequence[int]], *, layers: Sequence[int] = ()
    ) -> ForwardOutput:
        """Logits of every position, and on request the residual stream behind chosen layers.

        Args:
          token_ids: one list of ids or a ragged list of lists; B rows of at most T ids.
          layers: layer numbers; negative ones count from the last.

        A new length may compile a slice of the result; the model itself runs in buckets.
        """
        ids, _ = self._ids(token_ids)
        self._check_lengths(ids)
        return scoring.forward(self.model, ids, layers)

    def _check_lengths(self, ids: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, ids))
        if longest > self.max_len:
            raise PromptTooLong(f"{longest} tokens; the context has {self.max_len}")

    def _ids(self, prompts: Any) -> tuple[list[list[int]], bool]:
        return prompt_ids(prompts, self.tokenizer, self.config.vocab_size)

    def _requests(
        self, prompts: list[list[int]], params: OneOrEach, overrides: Mapping[str, Any]
    ) -> list[Request]:
        return make_requests(
            prompts,
            self.default_params if params is None else params,
            overrides,
            eos_ids=self.eos_ids,
            max_len=self.max_len,
            vocab_size=self.config.vocab_size,
        )


def _finish_reason(request: Request, writer: TextWriter) -> FinishReason | None:
    ids = writer.token_ids
    if writer.stopped or (ids and ids[-1] in request.stop_ids):
        return "stop"
    return "length" if len(request.prompt) + len(ids) >= request.limit else None


def _output(
    batch: Batch, row: int, writer: TextWriter, marks: Sequence[bool], reason: FinishReason
) -> GenerationOutput:
    count = len(writer.token_ids)
    return GenerationOutput(
        writer.text,
        writer.token_ids,
        reason,
        batch.stats(row, marks[:count]),
        batch.logprobs(row, count),
    )


def _regroup(outputs: list, rows: Sequence[Request], num_prompts: int, single: bool) -> Any:
    """One output a prompt, or a list of n where its n > 1."""
    grouped, at = [], 0
    for _ in range(num_prompts):
        n = rows[at].params.n
        grouped.append(outputs[at] if n == 1 else outputs[at : at + n])
        at += n
    return grouped[0] if single else grouped
