"""Runs a step's plan on the device: inputs -> logits -> tokens, with per-row state and CUDA graphs.

R rows (places for running requests), N sequences that decode, C chunks of prompts, T tokens of a step, M blocks of a
block table, V vocabulary, Q image tokens, D hidden.
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
from aria.engine.encoder import ImageEncoder
from aria.engine.failures import free_frames
from aria.engine.graphs import Graphs, Work, batch_size
from aria.engine.matcher import fill_masks
from aria.engine.prompt_logprobs import ScoredTokens
from aria.engine.request import Request
from aria.engine.sampler import SamplerState, mask_logits
from aria.engine.scheduler import Chunk, StepPlan
from aria.engine.step_inputs import Columns, RowTracker, RowUpdates, StepInputs, aligned, row_of
from aria.model import Aria, Paged, PagedCache
from aria.model.decoder import DecoderLayer
from aria.model.multi_lora import AdapterBatch
from aria.processor.image_inputs import ImageSpan

logger = logging.getLogger(__name__)

MOST_GRAPHS = 256
GRAPH_TOKENS = 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048
"""A prefill of one prompt alone runs as a CUDA graph, padded to the next of these sizes."""


LogitsProcessor = Callable[[Sequence[Request], Tensor, Tensor], Tensor]
"""Requests, logits ``(N, V)``, and logits after penalties -> logits to sample from. Called once the tokens of the
previous step are known."""


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one position, before temperature and truncation."""

    chosen: float
    likeliest: list[tuple[int, float]]


@dataclass
class Launched:
    """A step that was given to the device; its tokens may not be there yet."""

    plan: StepPlan
    requests: Sequence[Request]
    """Requests that get a token."""
    failed: list[tuple[Request, int, Exception]] = field(default_factory=list)
    """Requests with an image that could not be encoded, the position from which they are wrong, and the error."""
    _computed: _Computed | None = None
    """Results to draw tokens from; None once they are drawn."""
    logits: Tensor | None = None
    """``(len(requests), V)``, before penalties; the next step overwrites them. None if a CUDA graph dropped them."""
    scored: list[tuple[Request, int, ScoredTokens]] = field(default_factory=list)
    """Log-probabilities of prompts: the request, the first token, and the values, valid after :meth:`wait`."""
    _tokens: Tensor | None = None
    _logprobs: tuple[Tensor, ...] | None = None
    _done: torch.cuda.Event | None = None

    @property
    def drawn(self) -> bool:
        """Whether its tokens are drawn, or will be by queued work. If not, call `Runner.draw` next."""
        return not self.requests or self._tokens is not None

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Wait for the device, and return tokens and requested log-probabilities."""
        assert self.drawn, "the tokens of this step were not drawn yet"
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
    """Results of a step for the N requests that sample."""

    rows: Tensor
    positions: Tensor
    """Of the last token that each of them has read."""
    logits: Tensor | None
    tokens: Tensor | None
    """None if they are yet to be drawn."""
    extras: bool = False
    """Whether any of them has penalties or biases."""


class Runner:
    """Holds the device's state of running requests, one row each, and runs plans.

    Args:
        model: in evaluation mode, laid out for inference.
        cache: the paged KV cache.
        encoder: encodes images.
        adapters: those that requests may name.
        max_rows: maximum number of concurrent requests.
        max_model_len: tokens of the longest sequence.
    """

    def __init__(
        self,
        model: Aria,
        cache: PagedCache,
        encoder: ImageEncoder,
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
        self._padding_row = max_rows
        """One more row, for the padding of CUDA graphs."""
        blocks = -(-max_model_len // cache.block_size)
        self._blocks = torch.zeros(max_rows + 1, blocks, dtype=torch.int32, device=device)
        """Block table ``(R + 1, M)``."""
        self._tokens = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        """Last token of each row ``(R + 1,)``, which the host may not know yet."""
        self._rows = RowTracker(max_rows, blocks)
        self._sampler = SamplerState(max_rows + 1, vocabulary, device, (model.config.image_token_index,))
        self._can: dict[tuple[int, bool, bool], bool] = {}
        self.logits_processor: LogitsProcessor | None = None
        kv = cache.layers[0]
        with torch.inference_mode():
            self._graphs = Graphs(device, MOST_GRAPHS) if ops.inference_kernels(weight) else None
            # Kernels read as much of a block table as a sequence uses; plain operations read all of it.
            self._narrow = not (ops.chunks_are_graph_safe(kv.keys[0], kv) and ops.paged_kernel(kv.keys[0], kv))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Start a step. Returns at once on CUDA, where work is queued on the current stream.

        With a grammar or a :attr:`logits_processor`, tokens are not drawn yet, because both depend on the tokens of
        the previous step: call :meth:`draw` once these are known.
        """
        updates = self._rows.update(plan.requests)
        self._update_rows(updates)
        sampling = plan.sampling
        extras = self._sampler.extras([row_of(one) for one in sampling], [one.computed for one in sampling])
        late = self.logits_processor is not None or any(request.matcher is not None for request in sampling)
        # Penalties, grammars and log-probabilities need the logits, so sampling then stays out of the graph.
        draw = not extras and not late and all(request.params.logprobs is None for request in sampling)
        adapter_ids = [self._adapters.number(request.adapter) for request in plan.requests]
        inputs = StepInputs.of(
            plan, updates, adapter_ids, self._cache.block_size,
            padded=self._padded_size(plan, any(adapter_ids)), padding_row=self._padding_row,
        )  # fmt: skip
        launched = Launched(plan, sampling)
        computed = self._prefill_step(launched, inputs) if plan.chunks else self._decode_step(inputs, draw)
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
        """Draw the tokens of a step that waited for those of the previous one; requests that have ended get any."""
        places = [i for i, request in enumerate(launched.requests) if request.matcher is not None and not request.over]
        matchers = [matcher for i in places if (matcher := launched.requests[i].matcher) is not None]
        self._sample(launched, (places, fill_masks(matchers, self._vocab_size)) if places else None)

    def restore(self, plan: StepPlan) -> None:
        """Prepare to launch a failed plan again, once all tokens before it are known."""
        for request in plan.requests:
            if request.row is not None:
                self._rows.forget(request.row)
        decodes = [request for request in plan.decodes if not request.over]
        if decodes:
            rows, tokens = self._upload([row_of(one) for one in decodes], [one.outputs[-1] for one in decodes])
            self._tokens.index_copy_(0, rows.long(), tokens.long())

    def _padded_size(self, plan: StepPlan, adapted: bool) -> int:
        """Tokens that a step is padded to, to run as a CUDA graph; 0 if it is not padded."""
        if self._graphs is None:
            return 0
        if not plan.chunks:
            return batch_size(len(plan.decodes), self._padding_row)
        # Launching the operations of a short prompt takes longer than they do. Other prefills have too many shapes.
        if plan.decodes or len(plan.chunks) > 1 or _unscored(plan.chunks[0]):
            return 0
        size = next((size for size in GRAPH_TOKENS if size >= plan.tokens), 0)
        return size if size and self._capturable(size, chunks=True, adapted=adapted) else 0

    def _decode_step(self, inputs: StepInputs, draw: bool) -> _Computed:
        """A step in which every request decodes. With ``draw``, tokens are drawn within the CUDA graph."""
        columns, adapted, N, width = inputs.columns, inputs.adapted, inputs.decodes, self._width(inputs.decode_length)

        def work(flat: Tensor) -> tuple[Tensor | None, ...]:
            rows_N, positions_N = flat[columns.decode_rows], flat[columns.positions]
            adapters = self._adapters.step(flat[columns.adapter_ids]) if adapted else None
            blocks_NM = self._blocks[:, :width].index_select(0, rows_N)
            context = Paged(self._cache, positions_N, blocks_NM, adapters=adapters)
            hidden_ND = self._model(self._tokens.index_select(0, rows_N), context).hidden
            logits_NV = self._logits(hidden_ND, adapters)
            tokens_N = self._draw(logits_NV, rows_N, positions_N) if draw else None
            # Logits that no request needs are not returned, so that graphs can share their memory.
            return flat, None if draw and self._graphs else logits_NV, tokens_N

        size = inputs.tokens
        key = ("decode", size, width, draw, adapted) if self._capturable(size, adapted=adapted) else None
        flat, logits, tokens = self._run(key, work, torch.from_numpy(inputs.flat))
        assert flat is not None, "the inputs come back"
        rows, positions = flat[columns.decode_rows][:N], flat[columns.positions][:N]
        logits, tokens = (None if x is None else x[:N] for x in (logits, tokens))
        return _Computed(rows, positions, logits, tokens)

    def _prefill_step(self, launched: Launched, inputs: StepInputs) -> _Computed:
        """A step with chunks of prompts: decodes and chunks in one forward pass.

        Adds to ``launched`` the prompts' log-probabilities, and the requests whose images could not be encoded.
        """
        chunks, columns, adapted = launched.plan.chunks, inputs.columns, inputs.adapted
        scoring = any(_unscored(chunk) for chunk in chunks)
        flat = self._send(torch.from_numpy(inputs.flat))
        decoded = self._tokens.index_select(0, flat[columns.decode_rows])
        x_TD = self._model.embed(torch.cat([decoded, flat[columns.ids].long()]))
        self._place_images(x_TD, launched, inputs.starts)
        widths = self._width(inputs.decode_length), self._width(inputs.chunk_length)
        lengths, pasts = inputs.chunk_lengths, inputs.chunk_pasts

        def work(x_TD: Tensor, flat: Tensor) -> tuple[Tensor | None, ...]:
            part = Columns(*(flat[column] for column in columns))
            blocks_NM = self._blocks[:, : widths[0]].index_select(0, part.decode_rows)
            blocks_CM = self._blocks[:, : widths[1]].index_select(0, part.chunk_rows)
            sampled_blocks = self._blocks[:, : max(widths)].index_select(0, part.sampled_rows)
            adapters = self._adapters.step(part.adapter_ids) if adapted else None
            context = Paged(
                self._cache, part.positions, blocks_NM, part.slots, blocks_CM, lengths, pasts, part.spans.view(-1, 3),
                None if scoring else part.sampled, sampled_blocks, part.sampled_positions + 1, adapters,
            )  # fmt: skip
            sampled = None if adapters is None else adapters.at(part.sampled)
            hidden = self._model.decode(x_TD, context).hidden
            hidden_RD = hidden.index_select(0, part.sampled) if scoring else hidden
            return self._logits(hidden_RD, sampled), hidden if scoring else None

        key = ("prefill", inputs.tokens, widths[1], inputs.samples, adapted) if pasts is None else None
        logits, hidden_TD = self._run(key, work, x_TD, flat)
        if hidden_TD is not None:
            adapter_ids_T = flat[columns.adapter_ids] if adapted else None
            for chunk, start in zip(chunks, inputs.starts, strict=True):
                if count := _unscored(chunk):
                    place = slice(start, start + count)
                    ids = None if adapter_ids_T is None else adapter_ids_T[place]
                    launched.scored.append((chunk.request, chunk.start + 1, self._score(chunk, hidden_TD[place], ids)))
        return _Computed(flat[columns.sampled_rows], flat[columns.sampled_positions], logits, None)

    def _score(self, chunk: Chunk, hidden_ND: Tensor, adapter_ids_N: Tensor | None) -> ScoredTokens:
        """Log-probabilities of the prompt's tokens that follow the first N of a chunk, in portions: the logits of a
        long prompt would not fit into memory."""
        k = chunk.request.params.prompt_logprobs
        assert k is not None, "no request asks for log-probabilities of this prompt"
        [tokens_N] = self._upload(chunk.request.prompt[chunk.start + 1 : chunk.start + 1 + len(hidden_ND)])
        parts = []
        for start in range(0, len(hidden_ND), prompt_logprobs.TOGETHER):
            some = slice(start, start + prompt_logprobs.TOGETHER)
            adapters = None if adapter_ids_N is None else self._adapters.step(adapter_ids_N[some])
            parts.append(ScoredTokens.of(self._logits(hidden_ND[some], adapters), tokens_N[some], k))
        return ScoredTokens.cat(parts)

    def _run(self, key: Hashable | None, work: Work, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        """Run work as a CUDA graph if it has a key."""
        if self._graphs is not None and key is not None:
            return self._graphs.run(key, work, *(x if x.is_cuda else x.pin_memory() for x in inputs))
        return work(*(x.to(self.device) for x in inputs))

    @torch.inference_mode()
    def plan_attention(self, step_tokens: int, max_model_len: int) -> None:
        """Let cuDNN, where it is used, plan the attention of all chunks up to ``step_tokens``."""
        config, kv = self._model.config.text, self._cache.layers[0]
        if ops.chunks_are_graph_safe(kv.keys[0], kv):
            ops.plan_chunks(kv, config.num_attention_heads, min(step_tokens, max_model_len), max_model_len)

    def forget_graphs(self) -> None:
        """Drop the CUDA graphs of steps and of the encoder, which hold adapters that may be unloaded."""
        self._can.clear()
        if self._graphs is not None:
            self._graphs.clear()
        self.encoder.forget_graphs()

    def _logits(self, hidden_ND: Tensor, adapters: AdapterBatch | None) -> Tensor:
        logits_NV = self._model.logits(hidden_ND)
        return logits_NV if adapters is None else adapters.head(logits_NV, hidden_ND)

    def _capturable(self, tokens: int, *, chunks: bool = False, adapted: bool = False) -> bool:
        """Whether a step of this size can be a CUDA graph: on older GPUs, and with unusual widths, some operations wait
        for the host."""
        if self._graphs is None:
            return False
        decoder = self._model.language_model.model
        # Adapters on experts, a step's or the model's own, may bypass the fused kernels: many ranks, many tokens.
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
        """Write image tokens over the embeddings at their positions, as far as the chunks reach."""
        wanted: list[tuple[Chunk, ImageSpan, int, int, int]] = []
        for chunk, at in zip(launched.plan.chunks, starts, strict=True):
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
        """Image tokens of each image, or its error: one that fails must not fail the others."""
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
        """Draw tokens from the logits. ``masks``: indices into the step's requests, and the tokens that each allows."""
        assert launched._computed is not None, "the tokens of this step are already drawn"
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

    def _update_rows(self, updates: RowUpdates) -> None:
        """Upload the settings of requests that are new in their rows, and blocks that were allocated."""
        for request in updates.requests:
            row = row_of(request)
            self._sampler.set_row(
                row, request.params, request.seed, request.prompt, request.outputs,
                end_ids=request.end_token_ids, end_text=request.end_text,
            )  # fmt: skip
            if request.end_text is not None:
                self._tokens[row] = request.tokens(request.known - 1, request.known)[0]
        if updates.places:
            index, blocks = self._upload(updates.places, updates.blocks)
            self._blocks.view(-1).index_copy_(0, index.long(), blocks)

    def _width(self, tokens: int) -> int:
        """Width of a block table for sequences of up to ``tokens``: one of few values, because graphs depend on it."""
        if not self._narrow:
            return self._blocks.shape[1]
        needed, width = -(-tokens // self._cache.block_size), 16
        while width < needed:
            width *= 4
        return min(width, self._blocks.shape[1])

    def _upload(self, *columns: Sequence[int]) -> list[Tensor]:
        """Numbers as int32 tensors on the device, copied in one piece; each begins on a multiple of 16 bytes."""
        sizes = [aligned(len(column)) for column in columns]
        flat = np.zeros(sum(sizes), dtype=np.int32)
        for column, start in zip(columns, accumulate(sizes, initial=0), strict=False):
            flat[start : start + len(column)] = column
        parts = self._send(torch.from_numpy(flat)).split(sizes)
        return [part[: len(column)] for part, column in zip(parts, columns, strict=True)]

    def _send(self, x: Tensor) -> Tensor:
        """Copy to the device without waiting for it."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x


def _unscored(chunk: Chunk) -> int:
    """Leading tokens of a chunk from which the prompt's next ones are yet to be scored."""
    logprobs = chunk.request.prompt_logprobs
    if logprobs is None or logprobs.complete:
        return 0
    return max(0, min(chunk.count, len(chunk.request.prompt) - 1 - chunk.start))


def _fetch(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
