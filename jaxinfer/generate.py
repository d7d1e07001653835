"""What users touch: `load` and `LLM` with generate, stream, chat, score and forward.

Text exists in this file only; everything below sees token ids. Read on in `batch.py` (the host's
side of a batch), `speculative/round.py` (the compiled loop), `model.py` (the forward), `cache.py`,
`sampling.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer import scoring, steps
from jaxinfer.batch import Batch, Model, capacity_of
from jaxinfer.calibrate import measure
from jaxinfer.chat import encode_chat
from jaxinfer.checkpoint.aliases import DEFAULT_MODEL
from jaxinfer.config import ModelConfig
from jaxinfer.drafters import NAMES, check_drafter, make_drafter
from jaxinfer.errors import InvalidArgument, PromptTooLong
from jaxinfer.model import Params
from jaxinfer.outputs import FinishReason, ForwardOutput, GenerationOutput, Piece
from jaxinfer.requests import Request, make_requests
from jaxinfer.sampling import SamplingParams
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.drafter import NoDrafter
from jaxinfer.speculative.speculation import Speculation, Verifier
from jaxinfer.text import TextWriter
from jaxinfer.tokenizer import Tokenizer

STEPS_PER_LOOK = 64  # tokens between two looks of the host at a batch without stop strings
STEPS_PER_LOOK_STOP = 8  # with stop strings: at most this many tokens are made in vain

Prompt = str | Sequence[int]  # text or token ids
Message = Mapping[str, Any]  # {"role": ..., "content": ...}
OneOrEach = SamplingParams | Sequence[SamplingParams] | None  # for all prompts, or one each

DrafterLike = Any  # what LLM.speculation takes: a name, a Drafter, an LLM or None


def load(
    name: str | Path = DEFAULT_MODEL,
    *,
    dtype: str | jnp.dtype | None = None,
    mesh: Mesh | None = None,
    drafter: DrafterLike = None,
    num_draft: int | Literal["auto"] | None = None,
    verifier: Verifier = "auto",
    exact: bool = False,
    max_len: int | None = None,
    max_batch: int = 32,
    cache_dir: str | Path | None = None,
) -> LLM:
    """Load a model by name.

    Args:
      name: an alias (`smollm2-135m-instruct`, `gemma-3-270m`), `hf://org/name[@revision]`, a folder
        (safetensors or Orbax) or a .gguf file.
      dtype: of weights, activations and cache: "float32", "bfloat16" or "float16"; None: what an
        Orbax checkpoint holds, else float32 on CPU and bfloat16 elsewhere.
      mesh: spreads the weights, see `make_mesh`; None: one device.
      drafter: guesses tokens for the model to verify, see `LLM.speculation`; None: plain decoding.
      num_draft: tokens that it offers a round at most; "auto": as many as pay; None: its own.
      verifier: how they are judged, "exact", "rejection" or "block"; "auto": as suits the drafter.
      exact: with and without a drafter the output is the same bits, at the cost of some speed.
      max_len: context in tokens; None: the model's own.
      max_batch: most rows that run at once; more prompts run in turns.
      cache_dir: where downloads and compiled programs are kept; None: JAXINFER_CACHE, else
        ~/.cache/jaxinfer.

    Raises:
      JaxinferError: ModelNotFound, UnsupportedModel, CorruptFile, OutOfMemory or InvalidArgument.
    """
    if max_len is not None and max_len < 2:
        raise InvalidArgument(f"max_len={max_len}: must be 2 or more")
    from jaxinfer.checkpoint import hub
    from jaxinfer.checkpoint.load import load_checkpoint
    from jaxinfer.checkpoint.orbax import is_orbax, stored_dtype

    folder = Path(cache_dir) if cache_dir else hub.cache_dir()
    steps.enable_compile_cache(folder / "compiled")
    path = hub.resolve(str(name), cache=folder)
    kind = _dtype(stored_dtype(path) if dtype is None and is_orbax(path) else dtype, mesh)
    checkpoint = load_checkpoint(path, dtype=kind, mesh=mesh)
    llm = LLM(
        checkpoint.params,
        checkpoint.config,
        checkpoint.tokenizer,
        dtype=kind,
        mesh=mesh,
        max_len=max_len,
        max_batch=max_batch,
        default_params=checkpoint.default_params,
        eos_ids=checkpoint.eos_ids,
    )
    if isinstance(drafter, str | Path) and drafter not in NAMES:
        drafter = load(drafter, dtype=kind, mesh=mesh, cache_dir=cache_dir)
    llm.default_speculation = llm.speculation(drafter, num_draft, verifier, exact)
    return llm


def _dtype(dtype: str | jnp.dtype | None, mesh: Mesh | None) -> jnp.dtype:
    if dtype is None:
        platform = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    known = ("float32", "bfloat16", "float16")
    if str(dtype) not in known and getattr(dtype, "__name__", None) not in known:
        raise InvalidArgument(f"dtype={dtype!r}: one of {', '.join(known)}")
    return jnp.dtype(dtype)


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
        max_len: int | None = None,
        max_batch: int = 32,
        default_params: SamplingParams | None = None,
        eos_ids: Sequence[int] | None = None,
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
        self.model = Model(params, config, jnp.dtype(dtype), mesh, vocab_limit)
        self.default_speculation = Speculation()
        self._costs: dict[Any, Costs] = {}  # measured once a drafter, plan and batch size

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

        Returns:
          A GenerationOutput for one prompt (a list of n where n > 1), a list in order for a list.
          A prompt that ends at the context's end gives fewer than max_tokens.

        Raises:
          InvalidArgument: an empty prompt, a bad id or parameter; PromptTooLong; OutOfMemory.
        """
        ids, single = self._token_ids(prompts)
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
        ids, _ = self._token_ids(prompts)
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
            with fewer layers; an LLM, a second model that drafts; a `Drafter`; "auto", which today
            is n-gram lookup; "default", what `load` was told.
          num_draft, verifier, exact: see `load`; None: what `load` was told.

        Raises:
          InvalidArgument: no such drafter, a draft length or a verifier that does not fit.
        """
        base = self.default_speculation
        found = (
            base.drafter
            if isinstance(drafter, str) and drafter == "default"
            else make_drafter(drafter, self.model, self.tokenizer)
        )
        if num_draft is not None and not isinstance(found, NoDrafter):
            found = found.replace(num_draft=num_draft)
        return Speculation(
            found,
            base.verifier if verifier is None else verifier,
            base.exact if exact is None else exact,
        )

    def _costs_of(self, speculation: Speculation, rows: Sequence[Request]) -> Costs:
        """Measured on first use; plain decoding needs none."""
        if isinstance(speculation.drafter, NoDrafter):
            return Costs()
        size = self.model.rows(len(rows))
        plan = speculation.plan(self.model.narrow(size))
        key = (jax.tree.structure(speculation.drafter), plan, size)
        if key not in self._costs:
            capacity = capacity_of(rows, speculation)
            check_drafter(self.model, speculation, size, capacity)
            self._costs[key] = measure(self.model, speculation, size, capacity)
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
                    yield row, _output(batch, row, writer, reason)

    # ---------------------------------------------------------------- research

    def score(self, texts: Prompt | Sequence[Prompt]) -> Any:
        """Log-probability (natural) of each token of a text given those before it.

        Returns:
          np.ndarray [T-1] f32 for a text of T tokens, BOS included where the tokenizer adds one; a
          list of them for a list.
        """
        ids, single = self._token_ids(texts)
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
        ids, _ = self._token_ids(token_ids)
        self._check_lengths(ids)
        return scoring.forward(self.model, ids, layers)

    def _check_lengths(self, ids: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, ids))
        if longest > self.max_len:
            raise PromptTooLong(f"{longest} tokens; the context has {self.max_len}")

    def _token_ids(self, prompts: Any) -> tuple[list[list[int]], bool]:
        """Ids of each prompt, and whether there was one prompt instead of a list."""
        if not isinstance(prompts, str | Sequence):  # an array of ids, of one row or of several
            prompts = np.asarray(prompts).tolist()
        if not isinstance(prompts, str | Sequence):
            raise InvalidArgument(f"a prompt is text or token ids, not {prompts!r:.40}")
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            return [self._encode(prompts)], True
        if not len(prompts):
            raise InvalidArgument("no prompt: give a text or a list of at least one")
        return [self._encode(p) for p in prompts], False

    def _encode(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            prompt = np.asarray(prompt).tolist() if hasattr(prompt, "__array__") else prompt
            if not isinstance(prompt, Sequence):
                raise InvalidArgument(f"a prompt is text or token ids, not {prompt!r:.40}")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt
        if not len(ids):
            raise InvalidArgument("the prompt is empty: give at least one character or token id")
        if isinstance(prompt, str):
            return list(ids)
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int | np.integer):
                kind = type(i).__name__
                raise InvalidArgument(f"a prompt is text or a list of token ids, not of {kind}")
            if not 0 <= i < self.config.vocab_size:
                raise InvalidArgument(f"token id {i}: must be 0 to {self.config.vocab_size - 1}")
        return [int(i) for i in ids]

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


def _output(batch: Batch, row: int, writer: TextWriter, reason: FinishReason) -> GenerationOutput:
    count = len(writer.token_ids)
    return GenerationOutput(
        writer.text,
        writer.token_ids,
        reason,
        batch.stats(row, count),
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
