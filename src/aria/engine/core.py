"""`EngineCore`: requests of token ids in, tokens out, many together. No text; `Engine` adds that."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import torch

from aria import ops
from aria.engine.adapters import Adapters, Changes
from aria.engine.blocks import BlockPool
from aria.engine.encoder import Encoder
from aria.engine.failures import StepError, failure, free_frames, out_of_memory
from aria.engine.matcher import Matcher
from aria.engine.memory import block_bytes, blocks_beside
from aria.engine.outputs import Stats
from aria.engine.prompt_logprobs import PromptLogprobs
from aria.engine.request import Request, Status
from aria.engine.runner import Launched, LogitsProcessor, Runner, TokenLogprobs
from aria.engine.sampler import EndText
from aria.engine.sampling_params import ParameterError, SamplingParams
from aria.engine.scheduler import Plan, Scheduler
from aria.model import Aria, PagedCache
from aria.processor.image_inputs import ImageSpan

logger = logging.getLogger(__name__)

STEP_TOKENS = 36_864
"""On CUDA, tokens of prompts that one step reads while nothing decodes: a clip of 256 frames and what is asked of it.
The more tokens an expert has, the nearer its products come to the GPU's rate; 76 kB of memory a token are the price."""
STEP_PATCHES = 256 * 35**2
"""On CUDA, patches of images that such a step encodes: of the frames of that clip."""
MIXED_STEP_PATCHES = 70**2
"""On CUDA, the same beside answers that grow: one image of the largest size, whose 14 ms everybody waits for."""


class ContextLengthError(ValueError):
    """A prompt leaves no room for an answer.

    Args:
        limit: tokens of the longest prompt and its answer together.
        prompt: how much there is, such as "4,000 tokens".
        advice: what to do about it.
    """

    def __init__(self, limit: int, prompt: str, advice: str):
        super().__init__(
            f"This model's maximum context length is {limit} tokens (max_model_len). However, the prompt resulted in "
            f"{prompt}, which leaves no room for an answer; {advice}"
        )


class Token(NamedTuple):
    """One more token of a request."""

    request: Request
    token_id: int
    logprobs: TokenLogprobs | None


class EngineCore:
    """Runs requests of token ids together: paged cache, continuous batching, prefix cache.

    Args:
        model: the model; its weights are rearranged in memory, on CUDA, as the kernels read them.
        max_batch: the most requests that run together.
        max_model_len: tokens of the longest prompt with its answer; None means what the model was made for, or what
            fits into the cache if that is less.
        cache_blocks: blocks of the cache; None means what fits, see :meth:`blocks_for`.
        memory_utilization: share of the GPU's memory to use.
        step_tokens: tokens of prompts that one step reads while nothing decodes; None means the device's default.
        mixed_step_tokens: the same while something decodes and waits for the step.
        image_bytes: memory for encoded images.
        image_mean, image_std: what pixels of images are normalised with.
        adapters: low-rank changes by names of modules, of each adapter that requests may name.

    Raises:
        ValueError: ``max_model_len`` is more than the model was made for or than fits, or an adapter does not fit.
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
        adapters: Mapping[str, Changes] | None = None,
    ):
        self.model = model
        weight = model.language_model.lm_head.weight
        self.device, on_cuda = weight.device, weight.is_cuda
        self.block_size = _block_size(self.device)
        self.max_batch = max_batch
        with ops.current(self.device):
            if on_cuda:
                ops.has_kernels(self.device)  # warns of a GPU that runs none before the first step
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
                text, blocks, self.block_size, self.max_model_len, max_batch, weight.dtype, self.device
            )  # fmt: skip
            encoder = Encoder(self.adapters.encoding, image_bytes, image_mean, image_std)
            self.runner = Runner(
                model, cache, encoder, self.adapters, max_rows=max_batch, max_model_len=self.max_model_len
            )  # fmt: skip
            if on_cuda:
                # Steps may run on another stream than the one that this was made on.
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
        """Whether a step starts before the tokens of the one before are read, which pays where the two run at once."""
        self.failing = False
        """Whether a step failed, and none has brought tokens since."""
        self._launched: Launched | None = None
        self._at_stake: Plan | None = None
        """What fails where an error is raised now; None: everything."""
        self._failed: dict[Request, Exception] = {}
        self._unfinished: set[Request] = set()
        self._prompt_tokens = self._completion_tokens = 0

    @staticmethod
    def blocks_for(device: torch.device, tokens: int) -> int:
        """Blocks that a sequence of so many tokens takes."""
        return -(-tokens // _block_size(device))

    def _longest(self, asked: int | None, blocks: int) -> int:
        made_for = self.model.config.text.max_position_embeddings
        fits = (blocks - 1) * self.block_size
        if asked is not None and not 1 <= asked <= made_for:
            raise ValueError(f"max_model_len is {asked}; expected 1 to {made_for}, which the model was made for")
        if fits < min(asked or self.block_size, made_for):
            per_token = block_bytes(self.model, self.block_size) / self.block_size
            raise ValueError(
                f"the cache has room for {max(fits, 0)} tokens, but max_model_len is {asked or made_for} "
                f"({per_token / 1000:.0f} kB a token); lower it, give the cache more tokens, or free memory"
            )
        if asked is None and fits < made_for:
            logger.warning("max_model_len is %d, which fits into the cache; the model was made for %d", fits, made_for)
        return min(asked or made_for, fits)

    def check(self, prompt_tokens: int, image_tokens: int = 0) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises:
            ContextLengthError: it says how long the prompt is, how much images take, and what to do.
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
            prompt: token ids, those of images in their places.
            params: how to sample; a seed that is None is drawn from torch's global generator.
            images: where images lie in the prompt.
            digests: of the prompt's blocks, from :func:`~aria.engine.request.block_digests`; what is missing is made
                here.
            end_token_ids: tokens at which an answer ends, beside those of ``params``; not if ``params.ignore_eos``.
            end_text: what ends a turn as text, which is not drawn before ``params.min_tokens``. The caller finds it.
            matchers: one for each answer if ``params.constraint`` is set. They end it then.
            priority: lower runs first.
            adapter: the name of one, or None for the model as it is.

        Returns:
            One request for each of ``params.n`` answers.

        Raises:
            ValueError: the prompt leaves no room for an answer, or there is no such adapter.
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
        # One token is drawn in any case; where none was asked for it is dropped.
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
                # A large odd step keeps the copies of one seed and of its neighbours apart.
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
    def add_adapter(self, name: str, changes: Changes) -> None:
        """Load an adapter between steps, in place of the one of this name if there is one. Requests that have that one
        keep it.

        Raises:
            ValueError: it does not fit the model, or the memory of the device. Nothing has changed then.
        """
        try:
            self.adapters.add(name, changes)
        except Exception as error:
            if not out_of_memory(error):
                raise
            free_frames(error)
            raise ValueError(f"the adapter {name!r} does not fit into the memory that is left: {error}") from error
        self.runner.forget_graphs()
        self._drop_adapters()

    @ops.on_own_device
    def remove_adapter(self, name: str) -> None:
        """Let no more requests ask for an adapter; those that have it keep it, and its memory is freed after them.

        Raises:
            ValueError: there is no such adapter.
        """
        self.adapters.remove(name)
        self._drop_adapters()

    @ops.on_own_device
    def _drop_adapters(self) -> None:
        """Free adapters that were removed and that no request has any more."""
        if not self.adapters.retired:
            return
        try:
            dropped = self.adapters.drop_unused({request.adapter for request in self._unfinished})
        except Exception as error:
            if not out_of_memory(error):
                raise
            # What stays is stacked anew before the old is freed.
            free_frames(error)
            logger.warning("an adapter that was removed is kept for now: %s", error)
            return
        if dropped:
            self.runner.forget_graphs()

    def finish(self, request: Request) -> None:
        """A request's answer is complete: take no more tokens for it. One that has ended already is left alone."""
        if request in self._unfinished:
            self._unfinished.remove(request)
            self.scheduler.finish(request)
            self._drop_adapters()

    def cancel(self, request: Request) -> None:
        """Give a request up, at any moment; one that has ended already is left alone."""
        if request in self._unfinished:
            self._unfinished.remove(request)
            self.scheduler.cancel(request)
            self._drop_adapters()

    def stats(self) -> Stats:
        """How it is doing. Any thread may ask; a step that goes on meanwhile may be counted in part."""
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
        """Changes the logits of every step before tokens are sampled from them."""
        return self.runner.logits_processor

    @logits_processor.setter
    def logits_processor(self, processor: LogitsProcessor | None) -> None:
        self.runner.logits_processor = processor

    @property
    def unfinished(self) -> bool:
        """Whether any request still takes tokens."""
        return bool(self._unfinished)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do: requests to serve, or a launched step to wait for."""
        return self.unfinished or self._launched is not None

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @ops.on_own_device
    def step(self) -> list[Token]:
        """Start the next step and give the tokens of the one before; on the CPU, of the step itself.

        So the device goes from step to step without a pause: the host reads, decides and answers while it computes.

        Raises:
            StepError: some requests failed: all that the step computed, or those with an image that could not be
                encoded. The next call serves the others. Anything that is no `Exception`, as an interrupt from the
                keyboard, ends all requests.
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
        """Plan, launch and collect. ``tokens`` receives what comes, also where something fails later."""
        plan = self.scheduler.plan()
        if plan.drain:
            # A request that has to give up its blocks waits for the value of its last token.
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
            assert self.pool.used == 0, f"{self.pool.used} blocks are held by nobody"

    def _launch(self, plan: Plan, tokens: list[Token]) -> Launched | None:
        """Launch a step. One that lacks memory is computed at once in two halves instead."""
        try:
            return self._compute(plan, tokens)
        except Exception as error:
            if not out_of_memory(error):
                raise
            logger.warning("a step of %d tokens ran out of memory and is tried again in halves: %s", plan.tokens, error)
            free_frames(error)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._collect(tokens)
        self.runner.restore(plan)
        for half in plan.halves(self.block_size):
            self._launched = self._compute(half, tokens)
            self._collect(tokens)
        return None

    def _compute(self, plan: Plan, tokens: list[Token]) -> Launched:
        self._at_stake = plan
        launched = self.runner.launch(plan)
        for request, place, error in launched.failed:
            if not request.over:
                self._fail(self.scheduler.fail(request, place), "an image could not be encoded", error)
        if not launched.drawn:
            # What a grammar allows depends on the token before; the device computes logits meanwhile.
            self._collect(tokens)
            self._at_stake = plan
            self.runner.draw(launched)
        self._at_stake = None
        return launched

    def _collect(self, tokens: list[Token]) -> None:
        """Tokens of the launched step, once they are there. What came for requests that have ended is dropped."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        self._at_stake = launched.plan
        drawn = launched.wait()
        for request, first, scored in launched.scored:
            assert request.prompt_logprobs is not None, "log-probabilities that no request asked for"
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
                    logger.warning("an answer was ended by the limits of its grammar: %s", request.matcher.error)
            if request.end or token in request.end_token_ids or len(request.outputs) >= request.max_tokens:
                self.finish(request)
        self._at_stake = None
        self.failing = self.failing and not tokens

    def _recover(self, error: Exception, tokens: list[Token]) -> None:
        """After a step that failed: end the requests that it computed, and let all others wait for the next one.

        Nobody knows what of the cache has been written, so it starts empty. What others have computed is lost, and
        their answers are not: they are computed again to the same tokens.
        """
        logger.error("a step of the model failed", exc_info=error)
        free_frames(error)
        # Where nothing was being computed it is the books that are wrong, and no request can continue.
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
        """End all requests and forget what is cached, in whatever state a step was left."""
        for request in self._unfinished:
            request.leave(Status.CANCELLED)
        self._unfinished.clear()
        self._failed.clear()
        self._launched = self._at_stake = None
        self.scheduler.reset()
        self._drop_adapters()

    @ops.on_own_device
    def plan_attention(self) -> None:
        """Let libraries plan the attention of all chunks that steps can read, which their first calls would do."""
        self.runner.plan_attention(self.scheduler.step_tokens, self.max_model_len)

    @ops.on_own_device
    def close(self) -> None:
        """End all requests and wait for the device."""
        for request in list(self._unfinished):
            self.cancel(request)
        self._collect([])


def _block_size(device: torch.device) -> int:
    # Large blocks keep kernels busy; small ones waste less where memory is small and arithmetic slow.
    return 64 if device.type == "cuda" else 16
