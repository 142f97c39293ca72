"""A step's plan -> tensors -> tokens: the device's state by row, and CUDA graphs for decoding.

R rows (places for running requests), N sequences that decode, T tokens of a step, M blocks of a block table,
V vocabulary, Q image tokens, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aria import ops
from aria.engine import prompt_logprobs
from aria.engine.adapters import Adapters
from aria.engine.encoder import Encoder
from aria.engine.failures import free_frames
from aria.engine.graphs import Graphs, Work, batch_size
from aria.engine.matcher import fill_masks
from aria.engine.prompt_logprobs import ScoredTokens
from aria.engine.request import Request
from aria.engine.sampler import SamplerState, mask_logits
from aria.engine.scheduler import Chunk, Plan
from aria.model import Aria, Paged, PagedCache
from aria.model.decoder import DecoderLayer
from aria.model.multi_lora import AdapterBatch
from aria.processor.image_inputs import ImageSpan

logger = logging.getLogger(__name__)

MOST_GRAPHS = 256
GRAPH_TOKENS = 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048
"""Prompts that are alone run as graphs, filled up to the next of these sizes."""


LogitsProcessor = Callable[[Sequence[Request], Tensor, Tensor], Tensor]
"""Requests, logits ``(N, V)``, and logits after penalties -> logits to sample from. Called once the tokens of the
previous step are known."""


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one place, before temperature and truncation."""

    chosen: float
    likeliest: list[tuple[int, float]]


@dataclass
class Launched:
    """A step that was given to the device; its tokens may not be there yet."""

    plan: Plan
    requests: Sequence[Request]
    """Those that get a token."""
    failed: list[tuple[Request, int, Exception]] = field(default_factory=list)
    """Requests with an image that could not be encoded, from which place on they are wrong, and why."""
    _computed: _Computed | None = None
    """Until tokens are drawn from it."""
    logits: Tensor | None = None
    """``(len(requests), V)``, before penalties; None where a graph did not keep it, overwritten by the next step."""
    scored: list[tuple[Request, int, ScoredTokens]] = field(default_factory=list)
    """Tokens of prompts: whose they are, the first of them, and what is known of them once :meth:`wait` is over."""
    _tokens: Tensor | None = None
    _logprobs: tuple[Tensor, ...] | None = None
    _done: torch.cuda.Event | None = None

    @property
    def drawn(self) -> bool:
        """Whether its tokens are chosen already, or on their way. If not, `Runner.draw` wants to be called."""
        return not self.requests or self._tokens is not None

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The tokens, and log-probabilities where they were asked for."""
        assert self.drawn, "a step was waited for before its tokens were drawn"
        if self._done is not None:
            self._done.synchronize()
        if self._tokens is None:
            return [], []
        tokens = self._tokens.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if self._logprobs is not None:
            for i, (chosen, ids, values) in enumerate(zip(*(x.tolist() for x in self._logprobs), strict=True)):
                k = self.requests[i].params.logprobs
                if k is not None:
                    logprobs[i] = TokenLogprobs(chosen, list(zip(ids[:k], values[:k], strict=True)))
        return tokens, logprobs


class _Computed(NamedTuple):
    """What a step gives of each of the N requests that sample."""

    rows: Tensor
    positions: Tensor
    """Of the last tokens read."""
    logits: Tensor | None
    tokens: Tensor | None
    """None where they are still to be drawn."""
    extras: bool = False
    """Whether any of them has penalties or biases."""


class Runner:
    """Keeps what the device has to know of each running request, and runs plans.

    Args:
        model: in evaluation mode, laid out for inference.
        cache: the paged cache; its last index into a block table is ``max_model_len``.
        encoder: of images.
        adapters: that requests may name.
        max_rows: the most requests that run together.
        max_model_len: tokens of the longest sequence.
    """

    def __init__(
        self,
        model: Aria,
        cache: PagedCache,
        encoder: Encoder,
        adapters: Adapters,
        *,
        max_rows: int,
        max_model_len: int,
    ):
        weight = model.language_model.lm_head.weight
        device, vocabulary = weight.device, weight.shape[0]
        self.device = device
        self.encoder = encoder
        self._model, self._cache, self._adapters = model, cache, adapters
        self._vocab_size = vocabulary
        self._scratch_row = max_rows
        blocks = -(-max_model_len // cache.block_size)
        # One more row, for the places that fill up a graph's batch.
        self._blocks = torch.zeros(max_rows + 1, blocks, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self._owners: list[tuple[int, int] | None] = [None] * max_rows
        self._known_blocks = [0] * max_rows
        self._sampler = SamplerState(max_rows + 1, vocabulary, device, (model.config.image_token_index,))
        self._can: dict[tuple[int, bool, bool], bool] = {}
        self.logits_processor: LogitsProcessor | None = None
        kv = cache.layers[0]
        with torch.inference_mode():
            self._graphs = Graphs(device, MOST_GRAPHS) if ops.inference_kernels(weight) else None
            # Kernels read of a table what a sequence has; plain operations all of it.
            self._narrow = not (ops.chunks_are_graph_safe(kv.keys[0], kv) and ops.paged_kernel(kv.keys[0], kv))

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step. Returns at once on CUDA, where work is queued on the current stream.

        With a grammar or a :attr:`logits_processor`, tokens are not sampled yet, because both depend on the tokens of
        the previous step: call :meth:`draw` once these are known.
        """
        self._update_rows(plan.requests)
        sampling = [*plan.decodes, *(chunk.request for chunk in plan.chunks if chunk.samples)]
        places = [request.computed for request in sampling]
        extras = self._sampler.extras([_row(request) for request in sampling], places)
        late = self.logits_processor is not None or any(request.matcher is not None for request in sampling)
        # Penalties, grammars and log-probabilities need the logits, so sampling then stays out of the graph.
        draw = not extras and not late and all(request.params.logprobs is None for request in sampling)
        launched = Launched(plan, sampling)
        computed = self._prefill_step(launched) if plan.chunks else self._decode_step(plan.decodes, draw)
        launched._computed = computed._replace(extras=extras)
        if launched.scored and self.device.type == "cuda":
            launched.scored = [(one, first, ScoredTokens(*map(_fetch, of))) for one, first, of in launched.scored]
            launched._done = torch.cuda.Event()
            launched._done.record()
        if sampling and not late:
            self._sample(launched)
        return launched

    @torch.inference_mode()
    def draw(self, launched: Launched) -> None:
        """Choose the tokens of a step that waited for the ones before. Requests that have ended since may get any."""
        places = [i for i, request in enumerate(launched.requests) if request.matcher is not None and not request.over]
        matchers = [matcher for i in places if (matcher := launched.requests[i].matcher) is not None]
        self._sample(launched, (places, fill_masks(matchers, self._vocab_size)) if places else None)

    def restore(self, plan: Plan) -> None:
        """Make ready to launch a plan again that failed on its way, all tokens before which are known by now."""
        for request in plan.requests:
            if request.row is not None:
                self._owners[request.row] = None
        decodes = [request for request in plan.decodes if not request.over]
        if decodes:
            rows, tokens = self._upload([_row(one) for one in decodes], [one.outputs[-1] for one in decodes])
            self._tokens.index_copy_(0, rows.long(), tokens.long())

    def _decode_step(self, decodes: Sequence[Request], draw: bool) -> _Computed:
        """A step in which every request decodes, filled up to a size that there is a graph for."""
        N = len(decodes)
        places = [request.computed - 1 for request in decodes]
        width = self._width(max(places))
        size = batch_size(N, self._scratch_row) if self._graphs else N
        adapter_ids = self._adapter_ids_of(decodes)
        table = np.zeros((3, _aligned(size)), dtype=np.int32)
        table[0] = self._scratch_row
        table[:, :N] = [_row(request) for request in decodes], places, adapter_ids

        def work(table: Tensor) -> tuple[Tensor | None, ...]:
            rows_N, positions_N, adapter_ids_N = table[:, :size]
            adapters = self._adapters.step(adapter_ids_N) if any(adapter_ids) else None
            blocks_NM = self._blocks[:, :width].index_select(0, rows_N)
            context = Paged(self._cache, positions_N, blocks_NM, adapters=adapters)
            hidden_ND = self._model(self._tokens.index_select(0, rows_N), context).hidden
            logits_NV = self._logits(hidden_ND, adapters)
            tokens_N = self._draw(logits_NV, rows_N, positions_N) if draw else None
            # Scores that nobody asks for are not kept, so that graphs may share their memory.
            return table, None if draw and self._graphs else logits_NV, tokens_N

        key = (
            ("decode", size, width, draw, any(adapter_ids))
            if self._capturable(size, adapted=any(adapter_ids))
            else None
        )
        used, logits, tokens = self._run(key, work, torch.from_numpy(table))
        assert used is not None, "the table comes back"
        return _Computed(*used[:2, :N], *(None if x is None else x[:N] for x in (logits, tokens)))

    def _prefill_step(self, launched: Launched) -> _Computed:
        """A step with chunks of prompts: decodes and chunks in one pass. Notes which prompts it scored, and which have
        images that could not be encoded."""
        plan, sampling = launched.plan, launched.requests
        chunks, N = plan.chunks, len(plan.decodes)
        # A short prompt alone runs as a graph, because launching its operations takes longer than they do.
        filled = next((size for size in GRAPH_TOKENS if size >= plan.tokens), 0)
        reading = [*plan.decodes, *(chunk.request for chunk in chunks)]
        adapter_ids = self._adapter_ids_of(reading)
        adapted = any(adapter_ids)
        scoring = any(_unscored(chunk) for chunk in chunks)
        alone = (
            filled > 0
            and not N
            and not scoring
            and len(chunks) == 1
            and self._capturable(filled, chunks=True, adapted=adapted)
        )
        T = filled if alone else plan.tokens
        ends = list(accumulate((chunk.count for chunk in chunks), initial=N))
        last = {id(chunk.request): end - 1 for chunk, end in zip(chunks, ends[1:], strict=True)}
        last.update((id(request), i) for i, request in enumerate(plan.decodes))
        decoding = [request.computed - 1 for request in plan.decodes]
        places = [np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks]
        # One by one, because all blocks of a long answer would have to become an array for the sake of the last.
        slots = [self._slot(request, place) for request, place in zip(plan.decodes, decoding, strict=True)]
        chunk_slots = [self._slots(chunk.request, p) for chunk, p in zip(chunks, places, strict=True)]
        # What fills up stands at place 0, in slot 0 of the block that is nobody's.
        fill = np.zeros(T - plan.tokens, dtype=np.int64)
        lengths = [T] if alone else [chunk.count for chunk in chunks]
        ids, slots_T, positions_T, index, rows_N, rows_C, spans, rows, positions, adapter_ids_T = self._upload(
            np.concatenate([*(c.request.tokens(c.start, c.start + c.count) for c in chunks), fill]),
            np.concatenate([np.array(slots, dtype=np.int64), *chunk_slots, fill]),
            np.concatenate([np.array(decoding, dtype=np.int64), *places, fill]),
            [last[id(request)] for request in sampling],
            [_row(request) for request in plan.decodes],
            [_row(chunk.request) for chunk in chunks],
            [x for c, first, T in zip(chunks, ends, lengths, strict=False) for x in (first - N, T, c.start)],
            [_row(request) for request in sampling],
            [request.computed - 1 for request in sampling],
            np.concatenate([np.repeat(adapter_ids, [1] * N + [len(p) for p in places]), fill]) if adapted else [],
        )
        x_TD = self._model.embed(torch.cat([self._tokens.index_select(0, rows_N), ids.long()]))
        self._place_images(x_TD, launched, ends)
        width = self._width(max(decoding, default=0))
        most = self._width(max(chunk.start + chunk.count for chunk in chunks) - 1)
        widest = max(width, most)
        pasts = None if alone else [chunk.start for chunk in chunks]

        def work(
            x_TD: Tensor, positions_T: Tensor, slots: Tensor, index: Tensor, *rest: Tensor
        ) -> tuple[Tensor | None, ...]:
            rows_N, rows_C, rows, positions, spans, adapter_ids_T = rest
            blocks_NM = self._blocks[:, :width].index_select(0, rows_N)
            blocks_CM = self._blocks[:, :most].index_select(0, rows_C)
            sampled_blocks = self._blocks[:, :widest].index_select(0, rows)
            adapters = self._adapters.step(adapter_ids_T) if adapted else None
            context = Paged(
                self._cache, positions_T, blocks_NM, slots, blocks_CM, lengths, pasts, spans.view(-1, 3),
                None if scoring else index, sampled_blocks, positions + 1, adapters,
            )  # fmt: skip
            sampled = None if adapters is None else adapters.at(index)
            hidden = self._model.decode(x_TD, context).hidden
            hidden_RD = hidden.index_select(0, index) if scoring else hidden
            return self._logits(hidden_RD, sampled), hidden if scoring else None

        key = ("read", T, most, len(sampling), adapted) if alone else None
        inputs = x_TD, positions_T, slots_T, index, rows_N, rows_C, rows, positions, spans, adapter_ids_T
        logits, hidden_TD = self._run(key, work, *inputs)
        if hidden_TD is not None:
            for chunk, start in zip(chunks, ends[:-1], strict=True):
                if count := _unscored(chunk):
                    place = slice(start, start + count)
                    adapter_ids_N = adapter_ids_T[place] if adapted else None
                    launched.scored.append(
                        (chunk.request, chunk.start + 1, self._score(chunk, hidden_TD[place], adapter_ids_N))
                    )
        return _Computed(rows, positions, logits, None)

    def _score(self, chunk: Chunk, hidden_ND: Tensor, adapter_ids_N: Tensor | None) -> ScoredTokens:
        """The tokens of a prompt that come behind the first N of a chunk, some at a time: the logits of a long prompt
        would not fit into memory."""
        k = chunk.request.params.prompt_logprobs
        assert k is not None, "nobody asks for log-probabilities of this prompt"
        [tokens_N] = self._upload(chunk.request.prompt[chunk.start + 1 : chunk.start + 1 + len(hidden_ND)])
        parts = []
        for start in range(0, len(hidden_ND), prompt_logprobs.TOGETHER):
            some = slice(start, start + prompt_logprobs.TOGETHER)
            adapters = None if adapter_ids_N is None else self._adapters.step(adapter_ids_N[some])
            parts.append(ScoredTokens.of(self._logits(hidden_ND[some], adapters), tokens_N[some], k))
        return ScoredTokens.cat(parts)

    def _run(self, key: Hashable | None, work: Work, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        """By a graph, where there are graphs and the work has a key."""
        if self._graphs is not None and key is not None:
            return self._graphs.run(key, work, *(x if x.is_cuda else x.pin_memory() for x in inputs))
        return work(*(x.to(self.device) for x in inputs))

    @torch.inference_mode()
    def plan_attention(self, step_tokens: int, max_model_len: int) -> None:
        """Let cuDNN plan the attention of all chunks up to ``step_tokens``, where it is used."""
        config, kv = self._model.config.text, self._cache.layers[0]
        if ops.chunks_are_graph_safe(kv.keys[0], kv):
            ops.plan_chunks(kv, config.num_attention_heads, min(step_tokens, max_model_len), max_model_len)

    def forget_graphs(self) -> None:
        """Drop the graphs of steps and images: they hold adapters that may be gone."""
        self._can.clear()
        if self._graphs is not None:
            self._graphs.clear()
        self.encoder.forget_graphs()

    def _adapter_ids_of(self, requests: Sequence[Request]) -> list[int]:
        """The number of each request's adapter, 0 for none."""
        return [self._adapters.number(request.adapter) for request in requests]

    def _logits(self, hidden_ND: Tensor, adapters: AdapterBatch | None) -> Tensor:
        logits_NV = self._model.logits(hidden_ND)
        return logits_NV if adapters is None else adapters.head(logits_NV, hidden_ND)

    def _capturable(self, tokens: int, *, chunks: bool = False, adapted: bool = False) -> bool:
        """Whether a step of so many tokens can be a graph: older GPUs and unusual widths have operations that wait."""
        if self._graphs is None:
            return False
        decoder = self._model.language_model.model
        # Experts with adapters, a step's or the model's own, may pass the fused kernels by: many ranks, many tokens.
        key = tokens, chunks, decoder.has_lora or (adapted and self._adapters.loras.on_experts)
        if key not in self._can:
            layer, kv = decoder.layers[0], self._cache.layers[0]
            assert isinstance(layer, DecoderLayer), "layers hold a mixture of experts"
            weights = layer.moe_weights()
            x_TD = weights.fc1.new_empty(tokens, weights.fc1.shape[1])
            self._can[key] = ops.moe_is_graph_safe(x_TD, weights, adapted=key[2]) and (
                not chunks or ops.chunks_are_graph_safe(kv.keys[0], kv)
            )
        return self._can[key]

    def _draw(self, logits_NV: Tensor, rows_N: Tensor, positions_N: Tensor) -> Tensor:
        tokens_N = self._sampler.sample(logits_NV, rows_N, positions_N + 1)
        self._tokens.index_copy_(0, rows_N.long(), tokens_N)
        return tokens_N

    def _place_images(self, x_TD: Tensor, launched: Launched, starts: Sequence[int]) -> None:
        """Put image tokens over the embeddings of their places, as far as the chunks reach."""
        wanted: list[tuple[Chunk, ImageSpan, int, int, int]] = []
        for chunk, at in zip(launched.plan.chunks, starts[:-1], strict=True):
            for image in chunk.request.images_between(chunk.start, chunk.start + chunk.count):
                low = max(image.start, chunk.start)
                high = min(image.end, chunk.start + chunk.count)
                wanted.append((chunk, image, at + low - chunk.start, low - image.start, high - low))
        for adapter in dict.fromkeys(chunk.request.adapter for chunk, *_ in wanted):
            alike = [one for one in wanted if one[0].request.adapter == adapter]
            features = self._encode([image for _, image, *_ in alike], adapter)
            for (chunk, image, place, first, count), features_QD in zip(alike, features, strict=True):
                if isinstance(features_QD, Exception):
                    launched.failed.append((chunk.request, max(image.start, chunk.start), features_QD))
                else:
                    x_TD[place : place + count] = features_QD[first : first + count]

    def _encode(self, images: Sequence[ImageSpan], adapter: str | None) -> Sequence[Tensor | Exception]:
        """Image tokens of each, or why there are none: one that fails must not fail the others."""
        try:
            return self.encoder.features(images, adapter)
        except Exception as error:
            logger.warning("images could not be encoded together: %s", error)
            free_frames(error)
        return [self._encode_alone(image, adapter) for image in images]

    def _encode_alone(self, image: ImageSpan, adapter: str | None) -> Tensor | Exception:
        try:
            return self.encoder.features([image], adapter)[0]
        except Exception as error:
            logger.error("an image could not be encoded", exc_info=error)
            free_frames(error)
            return error

    def _sample(self, launched: Launched, masks: tuple[Sequence[int], np.ndarray] | None = None) -> None:
        """Draw tokens from what was computed. ``masks``: places in the step, and what each of them allows."""
        assert launched._computed is not None, "tokens were drawn already"
        rows, positions, logits, tokens, extras = launched._computed
        sampling = launched.requests
        if tokens is None:
            assert logits is not None, "a step has neither tokens nor logits"
            adjusted = logits
            if extras:
                last = self._tokens.index_select(0, rows)
                adjusted = self._sampler.adjust_logits(logits, rows, positions + 1, last)
            if masks is not None:
                adjusted = mask_logits(adjusted, *(self._send(torch.as_tensor(x)) for x in masks))
            if self.logits_processor is not None:
                adjusted = self.logits_processor(sampling, logits, adjusted)
            tokens = self._draw(adjusted, rows, positions)
            if extras:
                self._sampler.count(rows, tokens)
        top = [request.params.logprobs for request in sampling if request.params.logprobs is not None]
        if top:
            assert logits is not None, "log-probabilities need logits"
            launched._logprobs = self._sampler.logprobs(logits, tokens, max(top))
        launched._computed, launched.logits, launched._tokens = None, logits, tokens
        if self.device.type == "cuda":
            launched._tokens = _fetch(tokens)
            launched._logprobs = None if launched._logprobs is None else tuple(map(_fetch, launched._logprobs))
            launched._done = torch.cuda.Event()
            launched._done.record()

    def _update_rows(self, requests: Sequence[Request]) -> None:
        """Tell the device of requests that are new in their rows, and of blocks that were added."""
        places: list[int] = []
        values: list[int] = []
        for request in requests:
            row = _row(request)
            # A request that lost its blocks and came back, be it to the same row, is a new one here.
            # By number: a row should not keep the images of one that is over.
            owner = (request.id, request.runs)
            if self._owners[row] != owner:
                self._owners[row] = owner
                self._known_blocks[row] = 0
                self._sampler.set_row(
                    row, request.params, request.seed, request.prompt, request.outputs,
                    end_ids=request.end_token_ids, end_text=request.end_text,
                )  # fmt: skip
                if request.end_text is not None:
                    self._tokens[row] = request.tokens(request.known - 1, request.known)[0]
            fresh = request.blocks[self._known_blocks[row] :]
            start = row * self._blocks.shape[1] + self._known_blocks[row]
            places += range(start, start + len(fresh))
            values += fresh
            self._known_blocks[row] += len(fresh)
        if places:
            index, blocks = self._upload(places, values)
            self._blocks.view(-1).index_copy_(0, index.long(), blocks)

    def _slot(self, request: Request, place: int) -> int:
        size = self._cache.block_size
        return request.blocks[place // size] * size + place % size

    def _slots(self, request: Request, places: np.ndarray) -> np.ndarray:
        size = self._cache.block_size
        return np.array(request.blocks)[places // size] * size + places % size

    def _width(self, position: int) -> int:
        """Blocks of the tables for sequences up to ``position``: few values, because graphs are made by it."""
        if not self._narrow:
            return self._blocks.shape[1]
        needed, width = position // self._cache.block_size + 1, 16
        while width < needed:
            width *= 4
        return min(width, self._blocks.shape[1])

    def _upload(self, *columns: Sequence[int] | np.ndarray) -> list[Tensor]:
        """Whole numbers as int32 tensors on the device, sent in one piece. Each begins on a multiple of 16 bytes: where
        it does not, Triton compiles another kernel."""
        sizes = [_aligned(len(column)) for column in columns]
        flat = np.zeros(sum(sizes), dtype=np.int32)
        for column, start in zip(columns, accumulate(sizes, initial=0), strict=False):
            flat[start : start + len(column)] = column
        parts = self._send(torch.from_numpy(flat)).split(sizes)
        return [part[: len(column)] for part, column in zip(parts, columns, strict=True)]

    def _send(self, x: Tensor) -> Tensor:
        """To the device, without waiting for it."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x


def _aligned(count: int) -> int:
    """Numbers of four bytes that fill up 16 bytes."""
    return -(-count // 4) * 4


def _row(request: Request) -> int:
    assert request.row is not None, f"request {request.id} runs without a row"
    return request.row


def _unscored(chunk: Chunk) -> int:
    """Leading tokens of a chunk from which the prompt's next ones are to be scored."""
    logprobs = chunk.request.prompt_logprobs
    if logprobs is None or logprobs.complete:
        return 0
    return max(0, min(chunk.count, len(chunk.request.prompt) - 1 - chunk.start))


def _fetch(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
