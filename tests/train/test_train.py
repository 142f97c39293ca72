"""Training: losses against hand-computed and naive values, shapes that stay; a tiny model learns."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from aria import ops
from aria.config import AriaConfig, TextConfig, VisionConfig
from aria.model import Aria, Packed, pack_patches
from aria.ops import Segments
from aria.train.loss import linear_cross_entropy, router_losses
from recipes.nano.train.fixed_shapes import TrainingContext, bounded_segments, fixed_patches
from recipes.nano.train.learner import Learner, Stages, _some, next_token_labels
from recipes.nano.train.model import area_weights, nano_config, tiny_config
from recipes.nano.train.prefetch import prefetch

IMAGE = 9


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Losses


@pytest.mark.parametrize("chunk_elements", [1, 50, 10**6])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy_is_the_naive_one(chunk_elements: int, weighted: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    parameters = [hidden, weight.requires_grad_(), bias.requires_grad_()]
    labels = torch.randint(0, 7, (13,))
    labels[::4] = -100
    weights = torch.rand(13) if weighted else None
    ours = linear_cross_entropy(hidden, weight, labels, bias_V=bias, weights_T=weights, chunk_elements=chunk_elements)
    each = nn.functional.cross_entropy(hidden @ weight.t() + bias, labels, reduction="none")
    used = (labels != -100).double() * (1.0 if weights is None else weights.double())
    naive = (each * used).sum() / used.sum()
    torch.testing.assert_close(ours.loss.double(), naive, rtol=1e-5, atol=1e-6)
    hits = (hidden @ weight.t() + bias).argmax(-1) == labels
    torch.testing.assert_close(ours.accuracy.double(), (hits * used).sum() / used.sum(), rtol=1e-5, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(3.0 * ours.loss, parameters), torch.autograd.grad(3.0 * naive, parameters), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_cross_entropy_without_labels_is_zero() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 3), torch.full((4,), -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and not hidden.grad.any()


def test_cross_entropy_refuses_labels_of_another_length() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(torch.randn(4, 3), torch.randn(5, 3), torch.zeros(3, dtype=torch.long))


def test_labels_never_cross_sequences() -> None:
    labels = torch.tensor([-100, 1, 2, 3, 4, -100, 6])
    shifted = next_token_labels(labels, torch.tensor([0, 3, 7], dtype=torch.int32))
    assert shifted.tolist() == [1, 2, -100, 4, -100, 6, -100]


def test_router_losses_by_hand() -> None:
    # Two experts, top-1. Token 0 scores (ln 3, 0): probabilities 3/4 and 1/4; token 1 scores (0, 0): a half each.
    logits = torch.tensor([[math.log(3.0), 0.0], [0.1, 0.0], [50.0, -50.0]])
    counted = torch.tensor([True, True, False])
    losses = router_losses(logits, 1, counted_T=counted)
    tenth = math.exp(0.1) / (1.0 + math.exp(0.1))
    assert losses.load.tolist() == [1.0, 0.0]
    assert losses.z.item() == pytest.approx(1e-5 * (math.log(4.0) ** 2 + math.log(1 + math.exp(0.1)) ** 2) / 2)
    # E / (T k) x mean probability of expert 0 x both assignments
    assert losses.balance.item() == pytest.approx(1e-4 * 2 / 2 * (0.75 + tenth) / 2 * 2)


def test_perfect_balance_costs_exactly_its_coefficient() -> None:
    losses = router_losses(torch.eye(4) * 2.0, 1, balance_coefficient=0.01)
    assert losses.balance.item() == pytest.approx(0.01)
    assert losses.load.tolist() == [0.25] * 4


def test_balance_loss_pushes_away_from_the_busy_expert() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    router_losses(logits, 1, z_coefficient=0.0).balance.backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_routed_experts_have_the_reference_gradients() -> None:
    torch.manual_seed(0)
    x, fc1, fc2 = (torch.randn(shape, dtype=torch.float64) for shape in ((17, 6), (8, 6, 10), (8, 5, 6)))
    weights, index = ops.route(torch.randn(17, 8, dtype=torch.float64), 3)
    inputs = [tensor.requires_grad_() for tensor in (x, fc1, fc2, weights)]
    outer = torch.randn(17, 6, dtype=torch.float64)
    ours = torch.autograd.grad(ops.expert_mlp(x, ops.ExpertWeights(fc1, fc2), weights, index), inputs, outer)
    with ops.use("reference"):
        reference = torch.autograd.grad(ops.expert_mlp(x, ops.ExpertWeights(fc1, fc2), weights, index), inputs, outer)
    for got, want in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, want)


# Fixed shapes


def test_fixed_patches_are_the_packed_ones_with_the_padding_behind() -> None:
    config = tiny_config(400).vision
    pixels = torch.rand(3, 3, 224, 224)
    valid = torch.tensor([[224, 224], [100, 213], [1, 15]])
    place = torch.arange(224)
    mask = (place < valid[:, :1])[:, :, None] & (place < valid[:, 1:])[:, None, :]
    packed, fixed = pack_patches(pixels, mask, config), fixed_patches(pixels, valid, config)
    assert fixed.packed.segments.lengths[::2] == packed.segments.lengths
    assert sum(fixed.packed.segments.lengths) == 3 * 256
    real = torch.cat([torch.arange(n) + 256 * i for i, n in enumerate(packed.segments.lengths)])
    assert torch.equal(fixed.packed.pixels[real], packed.pixels)
    assert torch.equal(fixed.packed.positions[real], packed.positions)
    assert sorted(fixed.order[1].tolist()) == list(range(256))


def test_fixed_shapes_give_the_loss_of_the_model_itself() -> None:
    torch.manual_seed(0)
    learner = Learner(Aria(tiny_config(400)), num_classes=8)
    batch = make_batch(3, squares=False)
    patches, hidden = learner.encode(batch)
    tokens = learner.project(patches, hidden)
    model = learner.aria
    features = model.encode_images(pack_patches(batch["pixel_values"], batch["pixel_mask"], model.config.vision))
    torch.testing.assert_close(tokens, features)
    segments = Segments.of(batch["cu_seqlens"].diff().tolist())
    out = model(batch["input_ids"], Packed(model.config.text, segments), features)
    logits = model.logits(out.hidden)
    naive = nn.functional.cross_entropy(logits[:-1], batch["labels"][1:])
    loss, metrics = learner.answer(batch, tokens)
    torch.testing.assert_close(metrics["answer loss"], naive)
    assert loss > metrics["answer loss"], "the router's losses are part of what is descended"


def test_training_context_attends_as_packed() -> None:
    config = TextConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    segments = bounded_segments(torch.tensor([0, 5, 6, 16], dtype=torch.int32), bound=10, total=16)
    q, k, v = torch.randn(3, 16, 2, 32)
    ours = TrainingContext(config, segments, segments.positions(), torch.float32).attend(0, q, k, v)
    torch.testing.assert_close(ours, Packed(config, segments).attend(0, q, k, v))


def test_area_weights_count_things_by_the_root_of_their_area() -> None:
    weights = area_weights(torch.tensor([[0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 5, -100]]), 6)[0]
    assert weights[-1] == 0
    assert weights[0].item() == pytest.approx(0.5) and weights[4].item() == pytest.approx(1 / 3)
    assert weights[-2].item() == 1.0


def test_prefetch_keeps_order_and_structure() -> None:
    batches = [{"a": torch.tensor(n), "b": [torch.tensor(n), "x"], "n": n} for n in range(3)]
    assert [(b["a"].item(), b["b"][0].item(), b["b"][1], b["n"]) for b in prefetch(batches, "cpu")] == [
        (n, n, "x", n) for n in range(3)
    ]


def test_prefetch_prepares_ahead_in_a_thread_that_ends_with_it() -> None:
    prepared = []

    def prepare(batch: dict) -> dict:
        prepared.append(threading.current_thread().name)
        return {"n": batch["n"] + 1}

    batches = prefetch(({"n": n} for n in itertools.count()), "cpu", prepare)
    assert [next(batches)["n"] for _ in range(3)] == [1, 2, 3]
    batches.close()
    assert set(prepared) == {"prefetch"} and len(prepared) <= 6
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_prefetch_raises_what_its_thread_met() -> None:
    def broken():
        yield {"n": 1}
        raise ValueError("row 2 is broken")

    batches = prefetch(broken(), "cpu")
    assert next(batches) == {"n": 1}
    with pytest.raises(ValueError, match="row 2 is broken"):
        next(batches)


# Nano


def test_nano_fits_its_forty_mebibytes() -> None:
    config = nano_config(422)
    assert config.num_parameters() <= 20_900_000
    assert sum(p.numel() for p in Aria(config).parameters()) == config.num_parameters()


def test_stages_teach_seeing_before_speaking() -> None:
    stages = Stages()
    assert stages.weights(0.0) == (1.0, 0.0, 0.0)
    assert stages.weights(stages.queries) == (1.0, 1.0, 0.0)
    assert stages.weights(stages.answers) == (1.0, 1.0, 1.0)
    assert stages.weights(1.0) == pytest.approx((0.3, 0.3, 1.0))
    assert stages.share(0.2) == 1.0 and stages.share(stages.settled) == 0.5


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_dense_losses_on_some_rows_keep_rows_and_labels_together(share: float) -> None:
    torch.manual_seed(0)
    labels = torch.arange(3 * 8 * 4).view(3, 8, 4)
    hidden = torch.arange(3 * 8).float()[:, None].requires_grad_()
    rows, kept = _some(hidden, labels, share)
    count = max(1, round(8 * share))
    assert rows.shape == (3 * count, 1) and kept.shape == (3, count, 4)
    assert torch.equal(kept.flatten(0, 1)[:, 0], rows.detach()[:, 0].long() * 4)
    assert [len(set(picture)) for picture in (kept[:, :, 0] // 32).tolist()] == [1, 1, 1], "each from its own picture"
    rows.sum().backward()
    assert hidden.grad is not None and hidden.grad.sum() == 3 * count and hidden.grad.max() == 1


@pytest.mark.parametrize("size", [224, 448])
def test_queries_start_at_the_patches_of_their_cells(size: int) -> None:
    config = nano_config(422)
    learner = Learner(Aria(config), num_classes=8)
    side, cell = size // 14, size // 14 // 8
    patches = pack_patches(torch.rand(1, 3, size, size), None, config.vision)
    with torch.no_grad():
        hidden = learner.aria.vision_tower(patches)
        attention = learner.aria.multi_modal_projector.cross_attn
        q = attention.q_proj(attention.layer_norm(learner.aria.multi_modal_projector.query))
        k = attention.k_proj(attention.layer_norm_kv(hidden))
        wq, wk, _ = attention.multihead_attn.in_proj_weight.chunk(3)
        q, k = ((t @ w.t()).unflatten(1, (5, 64)) for t, w in ((q, wq), (k, wk)))
        mass = (torch.einsum("qhk,phk->hqp", q, k) / 8).softmax(-1)
    queries = {224: 64, 448: 128}[size]
    q_row, q_column = torch.arange(queries) % 64 // 8, torch.arange(queries) % 8
    p_row, p_column = (
        (torch.arange(side)[:, None] // cell).expand(side, side),
        (torch.arange(side) // cell).expand(side, side),
    )
    inside = (p_row.flatten() == q_row[:, None]) & (p_column.flatten() == q_column[:, None])
    assert (mass[:, :queries] * inside).sum(-1).mean() > 0.7


def make_batch(pictures: int, squares: bool = True, words: int = 3) -> dict:
    """Pictures of one colour each; the answer to each is its own few letters, so only looking can tell."""
    generator = torch.Generator().manual_seed(3)
    colours = torch.rand(pictures, 3, generator=generator) * 2 - 1
    valid = torch.full((pictures, 2), 224)
    if not squares:
        valid = torch.randint(60, 225, (pictures, 2), generator=generator)
    place = torch.arange(224)
    mask = (place < valid[:, :1])[:, :, None] & (place < valid[:, 1:])[:, None, :]
    pixels = torch.where(mask[:, None], colours[:, :, None, None], -1.0)
    ids: list[int] = []
    labels: list[int] = []
    starts = [0]
    for _ in range(pictures):
        answer = [*torch.randint(300, 390, (words,), generator=generator).tolist(), 25]
        prompt = [23, *[IMAGE] * 64, 24]
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
        starts.append(len(ids))
    filler = 40
    ids, labels = ids + [2] * filler, labels + [-100] * filler
    starts.append(len(ids))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    real = mask.view(pictures, 16, 14, 16, 14).any(4).any(2).flatten(1)
    classes = torch.arange(pictures)[:, None] % 8
    return {
        "kind": "small",
        "size": 224,
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "weights": torch.ones(len(labels)),
        "positions": Segments.of(cu_seqlens.diff().tolist()).positions(),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": 288,
        "num_tokens": starts[-2],
        "pixel_values": pixels,
        "pixel_mask": mask,
        "patch_labels": torch.where(real, classes, -100),
        "query_labels": classes[:, :, None].expand(-1, 64, 4),
    }


@pytest.mark.slow
def test_a_tiny_model_learns_twenty_pictures_by_heart() -> None:
    tiny = tiny_config(400)
    vision = VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=448
    )
    config = AriaConfig(
        vision=vision,
        text=tiny.text,
        projector=type(tiny.projector)(
            patch_to_query=tiny.projector.patch_to_query, hidden_size=32, num_attention_heads=2, output_size=64
        ),
    )
    learner = Learner(Aria(config), num_classes=8, stages=Stages(queries=0.0, answers=0.0, settled=0.01))
    batch = make_batch(20)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 5) * (1 - step / 60)
        optimizer.zero_grad()
        learner.loss(batch, step / 60)[0].backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        _, metrics = learner.loss(batch, 1.0)
    assert metrics["answer loss"] < 0.1 and metrics["answer accuracy"] == 1.0
    assert metrics["query accuracy"] > 0.99
