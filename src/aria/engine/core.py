"""`EngineCore`: continuous batching of requests made of token ids. `Engine` adds text and images."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import torch

from aria import ops
from aria.engine.adapters import Adapters, AdapterWeights
from aria.engine.blocks import BlockPool
from aria.engine.encoder import ImageEncoder
from aria.engine.failures import StepError, failure, free_frames, out_of_memory
from aria.engine.matcher import Matcher
from aria.engine.memory import block_bytes, blocks_beside
from aria.engine.outputs import Stats
from aria.engine.prompt_logprobs import PromptLogprobs
from aria.engine.request import Request, Status
from aria.engine.runner import Launched, LogitsProcessor, Runner, TokenLogprobs
from aria.engine.sampler import EndText
from aria.engine.sampling_params import ParameterError, SamplingParams
from aria.engine.scheduler import Scheduler, StepPlan
from aria.model import Aria, PagedCache
from aria.processor.image_inputs import ImageSpan

logger = logging.getLogger(__name__)

STEP_TOKENS = 36_864
"""Token budget of a step without decodes, on CUDA: a clip of 256 frames and a question. The more tokens an expert gets,
the closer its matrix products come to the GPU's peak rate; a token costs 76 kB of memory."""
STEP_PATCHES = 256 * 35**2
"""Image patches that such a step encodes, on CUDA: the frames of that clip."""
MIXED_STEP_PATCHES = 70**2
"""The same in a step with decodes, which wait for it: one image of the largest size, 14 ms."""


class ContextLengthError(ValueError):
    """A prompt leaves no room for an answer.

    Args:
        limit: Maximum number of tokens of a prompt and its answer together.
        prompt: Length of the prompt in words, such as "4,000 tokens".
        advice: What to do about it.
    """

    def __init__(self, limit: int, prompt: str, advice: str):
        super().__init__(
            f"This model's maximum context length is {limit} tokens (max_model_len). However, the prompt resulted in "
            f"{prompt}, which leaves no room for an answer; {advice}"
        )


class Token(NamedTuple):
    """A generated token."""

    request: Request
    token_id: int
    logprobs: TokenLogprobs | None


class EngineCore:
    """Runs requests of token ids together: paged KV cache, continuous batching, prefix caching.

    Args:
        model: The model. On CUDA its weights are rearranged in memory for the kernels.
        max_batch: Maximum number of concurrent requests.
        max_model_len: Maximum number of tokens of a prompt and its answer together. None means the model's maximum, or
            what fits into the KV cache if that is less.
        cache_blocks: Blocks of the KV cache; None means as many as fit into memory. See :meth:`blocks_for`.
        memory_utilization: Fraction of the GPU's memory to use.
        step_tokens: Token budget of a step without decodes; None means the device's default.
        mixed_step_tokens: Token budget of a step with decodes; None means the device's default.
        image_bytes: Memory for cached image tokens.
        image_mean, image_std: Normalisation of image pixels.
        adapters: LoRA weights by module name, of each adapter that requests may name.

    Raises:
        ValueError: ``max_model_len`` is more than the model supports or than fits, or an adapter does not fit.
    """

    def __init__(
        self,
        model: Aria,
        *,
        max_batch: int,
        max_model_len: int | None = None,
        cache_blocks: int | None = None,
        memory_utilization: float = 0.9,
        step_tokens: int | None = None,
        mixed_step_tokens: int | None = None,
        image_bytes: int = 512 << 20,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        adapters: Mapping[str, AdapterWeights] | None = None,
    ):
        self.model = model
        self.device = model.device
        on_cuda = self.device.type == "cuda"
        self.block_size = _block_size(self.device)
        self.max_batch = max_batch
        with ops.current(self.device):
            if on_cuda:
                ops.has_kernels(self.device)  # warns now, not in the first step, if the GPU cannot run the kernels
                model.lay_out()
            self.adapters = Adapters(model, adapters)
            text = model.config.text
            step_tokens = min(step_tokens or (STEP_TOKENS if on_cuda else 2048), text.max_position_embeddings)
            if cache_blocks is None:
                most = max_batch * (max_model_len or text.max_position_embeddings)
                blocks = blocks_beside(
                    model, self.block_size, step_tokens=step_tokens, max_rows=max_batch,
                    utilization=memory_utilization, reserved=image_bytes, adapters=self.adapters,
                )  # fmt: skip
                blocks = min(blocks, -(-most // self.block_size) + 1)
            else:
                blocks = cache_blocks + 1
            self.max_model_len = self._longest(max_model_len, blocks)
            cache = PagedCache(
                text, blocks, self.block_size, self.max_model_len, max_batch, model.dtype, self.device
            )  # fmt: skip
            encoder = ImageEncoder(self.adapters.encoding, image_bytes, image_mean, image_std)
            self.runner = Runner(
                model, cache, encoder, self.adapters, max_rows=max_batch, max_model_len=self.max_model_len
            )  # fmt: skip
            if on_cuda:
                # Steps may run on another stream than this constructor.
                torch.cuda.current_stream().synchronize()
        self.scheduler = Scheduler(
            BlockPool(blocks, self.block_size),
            max_rows=max_batch,
            step_tokens=step_tokens,
            mixed_step_tokens=mixed_step_tokens or (2048 if on_cuda else 256),
            step_patches=STEP_PATCHES if on_cuda else 4_900,
            mixed_step_patches=MIXED_STEP_PATCHES if on_cuda else 1_225,
            encoded=encoder.holds,
        )
        self._ids = count()
        self.ahead = on_cuda
        """Whether a step is launched before the previous one's tokens are read back, to overlap host and device."""
        self.failing = False
        """Whether a step failed, and none has produced tokens since."""
        self._launched: Launched | None = None
        self._at_stake: StepPlan | None = None
        """The plan whose requests fail if an error is raised now; None means all requests."""
        self._failed: dict[Request, Exception] = {}
        self._unfinished: set[Request] = set()
        self._prompt_tokens = self._completion_tokens = 0

    @staticmethod
    def blocks_for(device: torch.device, tokens: int) -> int:
        """Number of blocks that a sequence of ``tokens`` tokens takes."""
        return -(-tokens // _block_size(device))

    def _longest(self, asked: int | None, blocks: int) -> int:
        made_for = self.model.config.text.max_position_embeddings
        fits = (blocks - 1) * self.block_size
        if asked is not None and not 1 <= asked <= made_for:
            raise ValueError(f"max_model_len is {asked}; expected 1 to {made_for}, the maximum of the model")
        if fits < min(asked or self.block_size, made_for):
            per_token = block_bytes(self.model, self.block_size) / self.block_size
            raise ValueError(
                f"the KV cache holds {max(fits, 0)} tokens, but max_model_len is {asked or made_for} "
                f"({per_token / 1000:.0f} kB a token); lower it, give the cache more tokens, or free memory"
            )
        if asked is None and fits < made_for:
            logger.warning(
                "max_model_len is %d, what fits into the KV cache; the model's maximum is %d", fits, made_for
            )
        return min(asked or made_for, fits)

    def check(self, prompt_tokens: int, image_tokens: int = 0) -> None:
        """Check that a prompt leaves room for an answer.

        Raises:
            ContextLengthError: It does not; the message says how many of its tokens are for images, and what to do.
        """
        if prompt_tokens < 1:
            raise ValueError("the prompt has no tokens; expected at least one")
        if prompt_tokens >= self.max_model_len:
            images = f", {image_tokens} of them for images" if image_tokens else ""
            advice = "use fewer or smaller images, or less text" if image_tokens else "shorten it"
            raise ContextLengthError(self.max_model_len, f"{prompt_tokens} tokens{images}", advice)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        images: Sequence[ImageSpan] = (),
        digests: Sequence[bytes] = (),
        end_token_ids: Collection[int] = (),
        end_text: EndText | None = None,
        matchers: Sequence[Matcher] = (),
        priority: int = 0,
        adapter: str | None = None,
    ) -> list[Request]:
        """Queue a prompt; nothing is computed before :meth:`step`.

        Args:
            prompt: Token ids, image token ids included.
            params: How to sample. A seed of None is drawn from torch's global generator.
            images: The images of the prompt.
            digests: Content hashes of the prompt's leading blocks, from :func:`~aria.engine.request.block_digests`;
                missing ones are computed here.
            end_token_ids: Tokens that end an answer, beside those of ``params``; ignored with ``params.ignore_eos``.
            end_text: Text that ends a turn, which must not be sampled before ``params.min_tokens``. The caller looks
                for it in the output.
            matchers: One for each answer if ``params.constraint`` is set. They then end it.
            priority: Lower runs first.
            adapter: Name of an adapter; None is the base model.

        Returns:
            One request for each of ``params.n`` answers.

        Raises:
            ValueError: The prompt leaves no room for an answer, or there is no such adapter.
        """
        key = self.adapters.key(adapter)
        params = params or SamplingParams()
        assert len(matchers) == (0 if params.constraint is None else params.n), "each answer has its own matcher"
        self.check(len(prompt), sum(image.tokens for image in images))
        vocabulary = self.model.config.text.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if outside := [token for token in ids or () if token >= vocabulary]:
                raise ParameterError(name, f"names token {outside[0]}, but the vocabulary ends at {vocabulary - 1}")
        ends = frozenset((*(params.stop_token_ids or ()), *(() if params.ignore_eos else end_token_ids)))
        seed = params.seed if params.seed is not None else int(torch.randint(2**62, ()))
        # At least one token is sampled; it is dropped if ``max_tokens`` is 0.
        room = max(1, min(params.max_tokens, self.max_model_len - len(prompt)))
        prompt, images = tuple(prompt), tuple(images)
        requests: list[Request] = []
        for copy in range(params.n):
            request = Request(
                id=next(self._ids),
                prompt=prompt,
                params=params,
                max_tokens=room,
                images=images,
                digests=digests,
                priority=priority,
                adapter=key,
                # A large odd stride keeps the seeds of the n answers apart, also from those of neighbouring seeds.
                seed=(seed + copy * 0x9E3779B97F4A7C15) % 2**63,
                end_token_ids=ends,
                end_text=None if params.ignore_eos else end_text,
                matcher=matchers[copy] if matchers else None,
                leader=requests[0] if requests else None,
            )
            if params.prompt_logprobs is not None and not requests:
                request.prompt_logprobs = PromptLogprobs(len(prompt), params.prompt_logprobs)
            self.scheduler.add(request)
            self._unfinished.add(request)
            requests.append(request)
            self._prompt_tokens += len(prompt)
        return requests

    @ops.on_own_device
    def add_adapter(self, name: str, weights: AdapterWeights) -> None:
        """Load an adapter between steps, replacing one of the same name. Running requests keep the one they have.

        Raises:
            ValueError: It does not fit the model or the device's memory. Nothing has changed then.
        """
        try:
            self.adapters.add(name, weights)
        except Exception as error:
            if not out_of_memory(error):
                raise
            free_frames(error)
            raise ValueError(f"the adapter {name!r} does not fit into the memory that is left: {error}") from error
        self.runner.forget_graphs()
        self._drop_adapters()

    @ops.on_own_device
    def remove_adapter(self, name: str) -> None:
        """Unload an adapter. Requests that use it are finished first, then its memory is freed.

        Raises:
            ValueError: There is no such adapter.
        """
        self.adapters.remove(name)
        self._drop_adapters()

    @ops.on_own_device
    def _drop_adapters(self) -> None:
        """Free removed adapters that no request uses any more."""
        if not self.adapters.retired:
            return
        try:
            dropped = self.adapters.drop_unused({request.adapter for request in self._unfinished})
        except Exception as error:
            if not out_of_memory(error):
                raise
            # The remaining adapters are copied before the old tensors are freed, which takes memory.
            free_frames(error)
            logger.warning("a removed adapter stays in memory for now: %s", error)
            return
        if dropped:
            self.runner.forget_graphs()

    def finish(self, request: Request) -> None:
        """End a request whose answer is complete. One that has already ended is left alone."""
        if request in self._unfinished:
            self._unfinished.remove(request)
            self.scheduler.finish(request)
            self._drop_adapters()

    def cancel(self, request: Request) -> None:
        """Cancel a request, at any moment. One that has already ended is left alone."""
        if request in self._unfinished:
            self._unfinished.remove(request)
            self.scheduler.cancel(request)
            self._drop_adapters()

    def stats(self) -> Stats:
        """Current load and counters. Any thread may call this; a running step may be counted in part."""
        scheduler, pool = self.scheduler, self.pool
        return Stats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            cache_usage=pool.used / pool.total,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_tokens,
            preemptions=scheduler.preemptions,
        )

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache's blocks."""
        return self.pool.total * block_bytes(self.model, self.block_size)

    def encode_images(self, images: Sequence[ImageSpan]) -> None:
        """Encode images into the cache of image tokens."""
        self.runner.encoder.features(images)

    def clear_image_cache(self) -> None:
        """Drop all cached image tokens."""
        self.runner.encoder.cache.clear()

    @property
    def logits_processor(self) -> LogitsProcessor | None:
        """AdapterWeights the logits of every step before tokens are sampled from them."""
        return self.runner.logits_processor

    @logits_processor.setter
    def logits_processor(self, processor: LogitsProcessor | None) -> None:
        self.runner.logits_processor = processor

    @property
    def unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._unfinished)

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has anything to do: unfinished requests, or a launched step to collect."""
        return self.unfinished or self._launched is not None

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @ops.on_own_device
    def step(self) -> list[Token]:
        """Launch the next step and return the tokens of the previous one; on the CPU, of the same step.

        The device thus goes from step to step without a pause: the host plans and answers while it computes.

        Raises:
            StepError: Some requests failed: all that the step computed, or those with an image that could not be
                encoded. The next call serves the others. Anything but an `Exception`, such as a keyboard interrupt,
                ends all requests.
        """
        tokens: list[Token] = []
        try:
            self._step(tokens)
        except Exception as error:
            self._recover(error, tokens)
        except BaseException:
            self.reset()
            raise
        if self._failed:
            failed, self._failed = self._failed, {}
            raise StepError(failed, tokens) from next(iter(failed.values())).__cause__
        return tokens

    def _step(self, tokens: list[Token]) -> None:
        """Plan, launch and collect. Tokens are appended to ``tokens``, so that they survive a later failure."""
        plan = self.scheduler.plan()
        if plan.drain:
            # A request can be preempted only once the value of its last token is known.
            self._collect(tokens)
            plan = self.scheduler.plan()
        launched = self._launch(plan, tokens) if plan else None
        if self.ahead:
            self._collect(tokens)
            self._launched = launched
        else:
            self._launched = launched
            self._collect(tokens)
        if not self.busy:
            assert self.pool.used == 0, f"{self.pool.used} blocks belong to no request"

    def _launch(self, plan: StepPlan, tokens: list[Token]) -> Launched | None:
        """Launch a step. If it runs out of memory, compute it in two halves instead."""
        try:
            return self._compute(plan, tokens)
        except Exception as error:
            if not out_of_memory(error):
                raise
            logger.warning("a step of %d tokens ran out of memory and is retried in halves: %s", plan.tokens, error)
            free_frames(error)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._collect(tokens)
        self.runner.restore(plan)
        for half in plan.halves(self.block_size):
            self._launched = self._compute(half, tokens)
            self._collect(tokens)
        return None

    def _compute(self, plan: StepPlan, tokens: list[Token]) -> Launched:
        self._at_stake = plan
        launched = self.runner.launch(plan)
        for request, place, error in launched.failed:
            if not request.over:
                self._fail(self.scheduler.fail(request, place), "an image could not be encoded", error)
        if not launched.drawn:
            # A grammar's mask depends on the previous token, which is collected while the device computes logits.
            self._collect(tokens)
            self._at_stake = plan
            self.runner.draw(launched)
        self._at_stake = None
        return launched

    def _collect(self, tokens: list[Token]) -> None:
        """Wait for the tokens of the launched step. Those of requests that have ended are dropped."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        self._at_stake = launched.plan
        drawn = launched.wait()
        for request, first, scored in launched.scored:
            assert request.prompt_logprobs is not None, "log-probabilities without a request for them"
            request.prompt_logprobs.put(first, scored)
        for request, token, logprobs in zip(launched.requests, *drawn, strict=True):
            if request not in self._unfinished:
                continue
            self.scheduler.append(request, token)
            self._completion_tokens += request.params.max_tokens > 0
            tokens.append(Token(request, token, logprobs))
            if request.matcher is not None:
                request.end = request.matcher.accept(token)
                if request.matcher.error is not None:
                    logger.warning("an answer was ended by the limits on its grammar: %s", request.matcher.error)
            if request.end or token in request.end_token_ids or len(request.outputs) >= request.max_tokens:
                self.finish(request)
        self._at_stake = None
        self.failing = self.failing and not tokens

    def _recover(self, error: Exception, tokens: list[Token]) -> None:
        """After a failed step: fail the requests that it computed, and requeue all others.

        It is unknown which parts of the KV cache were written, so it is emptied. The other requests keep their outputs
        and are computed again to the same tokens.
        """
        logger.error("a step of the model failed", exc_info=error)
        free_frames(error)
        # If nothing was being computed, the scheduler's state is wrong, and no request can continue.
        failed = list(self._unfinished) if self._at_stake is None else self._at_stake.requests
        if self._launched is not None:
            before = self._launched.plan.requests
            try:
                self._collect(tokens)
            except Exception as another:
                free_frames(another)
                failed += before
        ended = [request for request in dict.fromkeys(failed) if request in self._unfinished]
        self._fail(ended, "a step of the model failed", error)
        self._launched = self._at_stake = None
        self.scheduler.reset(self._unfinished)
        self.failing = True

    def _fail(self, requests: Sequence[Request], what: str, error: Exception) -> None:
        for request in requests:
            self._unfinished.remove(request)
            self._failed[request] = failure(what, error)
            request.leave(Status.FAILED)
        self._drop_adapters()

    def reset(self) -> None:
        """Cancel all requests and empty the prefix cache, whatever state a step was left in."""
        for request in self._unfinished:
            request.leave(Status.CANCELLED)
        self._unfinished.clear()
        self._failed.clear()
        self._launched = self._at_stake = None
        self.scheduler.reset()
        self._drop_adapters()

    @ops.on_own_device
    def plan_attention(self) -> None:
        """Let libraries plan the attention of all possible chunks now, and not in their first calls."""
        self.runner.plan_attention(self.scheduler.step_tokens, self.max_model_len)

    @ops.on_own_device
    def close(self) -> None:
        """Cancel all requests and wait for the device."""
        for request in list(self._unfinished):
            self.cancel(request)
        self._collect([])


def _block_size(device: torch.device) -> int:
    # Large blocks suit the kernels; small ones waste less memory on CPUs.
    return 64 if device.type == "cuda" else 16
