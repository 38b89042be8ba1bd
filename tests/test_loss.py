"""Target assignment and the loss, compared with plain loops."""

import math

import pytest
import torch
from torchvision.ops import box_iou, complete_box_iou_loss

from src.config import Config
from src.model.boxes import cxcywh_to_xyxy, decode
from src.model.network import ANCHORS
from src.training.loss import YOLOLoss, assign_targets, complete_iou_loss

ANCHOR = torch.tensor(ANCHORS)
GRIDS = [3, 6, 12]


def random_targets(count: int, images: int, classes: int = 4, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    size = torch.rand(count, 2, generator=random) * 0.6 + 0.02
    centre = size / 2 + torch.rand(count, 2, generator=random) * (1 - size)
    image = torch.randint(images, (count, 1), generator=random).sort(dim=0).values
    label = torch.randint(classes, (count, 1), generator=random)
    return torch.cat((image, label, centre, size), dim=1)


def random_logits(images: int, seed: int = 0, grids=GRIDS, anchors: int = 3) -> list[torch.Tensor]:
    """Logits of four classes, which take gradients."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(images, anchors, grid, grid, 9) for grid in grids]
    return [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]


def count_objects(targets: torch.Tensor, images: int) -> list[int]:
    """Objects of each image, as `collate` counts them."""
    return targets[:, 0].long().bincount(minlength=images).tolist()


def compute_loss(logits, targets, anchors=ANCHOR, **settings) -> dict[str, torch.Tensor]:
    counts = count_objects(targets, len(logits[0]))
    return YOLOLoss(Config(**settings))(logits, targets, counts, anchors)


def loop_assign(targets, grid, anchors):
    """Assign by the definition -> {(image, anchor, row, column): target}, set of the ignored."""
    positives, above = {}, set()
    for number, (image, _, cx, cy, w, h) in enumerate(targets.tolist()):
        row, column = min(int(cy * grid), grid - 1), min(int(cx * grid), grid - 1)
        ious = []
        for aw, ah in anchors.tolist():
            intersection = min(w, aw) * min(h, ah)
            ious.append(intersection / (w * h + aw * ah - intersection))
        best = max(range(len(ious)), key=lambda a: ious[a])
        positives[int(image), best, row, column] = number
        above |= {(int(image), a, row, column) for a, iou in enumerate(ious) if iou > 0.5}
    return positives, above - set(positives)


@pytest.mark.parametrize("seed", range(8))
def test_assignment_equals_the_loop(seed):
    targets = random_targets(40, images=3, seed=seed)  # crowded: several match the same anchor
    targets = torch.cat((targets, torch.tensor([[2, 1, 0.999, 1.0, 0.01, 0.01]])))  # at the border
    collisions = 0
    for scale, assigned in enumerate(assign_targets(targets, GRIDS, ANCHOR, batch=3)):
        positives, ignored = loop_assign(targets, GRIDS[scale], ANCHOR[scale])
        fields = assigned.image, assigned.anchor, assigned.row, assigned.column
        places = zip(*(field.tolist() for field in fields), strict=True)
        valid = {p: n for n, p in enumerate(places) if assigned.valid[n]}
        assert valid == positives
        assert set(map(tuple, assigned.positive.nonzero().tolist())) == set(positives)
        assert set(map(tuple, assigned.ignored.nonzero().tolist())) == ignored
        collisions += len(targets) - len(positives)
    assert collisions > 0


def test_objectness_is_trained_alone():
    """The IoU is a target of the objectness: no gradient goes through it."""
    logits = random_logits(1)
    terms = compute_loss(logits, random_targets(10, 1), box_weight=0.0, class_weight=0.0)
    terms["loss"].backward()
    for level in logits:
        assert level.grad[..., 0].abs().sum() > 0 and (level.grad[..., 1:] == 0).all()


def test_no_loss_for_a_prediction_that_fits_an_object_from_another_cell():
    """A cell beside the object's own predicts the object's box: it is not background."""
    target = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.2]])
    logits = [torch.full((1, 3, g, g, 9), -12.0) for g in GRIDS]
    offset = 0.5 * 12 - 5  # from the left edge of column 5 to the object's centre, in cells
    logits[2][0, 0, 6, 5, 1:3] = torch.tensor([12.0 * offset, -12.0])
    logits[2][0, 0, 6, 5, 3:5] = (target[0, 4:] / ANCHOR[2, 0]).log()
    baseline = compute_loss(logits, target)["background"]
    logits[2][0, 0, 6, 5, 0] = 12.0
    assert compute_loss(logits, target)["background"] <= baseline
    logits[2][0, 0, 2, 5] = logits[2][0, 0, 6, 5]  # the same box, four cells higher
    assert compute_loss(logits, target)["background"] > 1


def cross_entropy(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


@pytest.mark.parametrize(
    "grids, anchors", [(GRIDS, ANCHOR), ([2, 4, 8, 16], ANCHOR[[0, 1, 2, 2], :2])]
)
def test_loss_equals_the_loop(grids, anchors):
    """Also with four scales of two anchors."""
    targets = random_targets(30, images=2, seed=3)  # some share a cell and an anchor
    logits = random_logits(2, seed=1, grids=grids, anchors=anchors.shape[1])
    boxes, _ = decode(logits, anchors)
    sums = dict.fromkeys(("box", "objectness", "background", "class"), 0.0)
    first = 0
    for level, grid, sizes in zip(logits, grids, anchors, strict=True):
        positives, _ = loop_assign(targets, grid, sizes)
        for image, anchor, row, column in torch.ones(level.shape[:4]).nonzero().tolist():
            place = image, anchor, row, column
            prediction = level[place].tolist()
            box = boxes[image, first + (anchor * grid + row) * grid + column].detach()
            objects = cxcywh_to_xyxy(targets[targets[:, 0] == image, 2:])
            if place in positives:
                target = targets[positives[place]]
                corners = cxcywh_to_xyxy(target[2:])
                sums["box"] += complete_box_iou_loss(box, corners).item()
                iou = box_iou(box[None], corners[None]).item()
                sums["objectness"] += cross_entropy(prediction[0], iou)
                classes = [label == int(target[1]) for label in range(4)]
                sums["class"] += sum(map(cross_entropy, prediction[5:], classes))
            elif not (box_iou(box[None], objects) > 0.5).any():
                sums["background"] += cross_entropy(prediction[0], 0)
        first += level[0, ..., 0].numel()
    terms = compute_loss(logits, targets, anchors)
    for name, value in sums.items():
        mean = value / (len(grids) * len(targets))
        assert terms[name].item() == pytest.approx(mean, rel=1e-3), name
    total = 2 * terms["box"] + 2 * terms["objectness"] + terms["background"] + terms["class"]
    torch.testing.assert_close(terms["loss"], total)


def test_complete_iou_equals_torchvision_with_its_gradient():
    random = torch.Generator().manual_seed(0)
    targets = torch.rand(50, 4, generator=random) * 0.5 + 0.1
    predictions = (torch.rand(50, 4, generator=random) * 0.5 + 0.1).requires_grad_()
    ours, _ = complete_iou_loss(predictions, targets)
    theirs = complete_box_iou_loss(cxcywh_to_xyxy(predictions), cxcywh_to_xyxy(targets))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), predictions) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_half_precision_logits_stay_finite():
    shapes = [(1, 3, g, g, 9) for g in GRIDS]
    logits = [torch.full(s, 6e4, dtype=torch.float16, requires_grad=True) for s in shapes]
    loss = compute_loss(logits, random_targets(5, 1))["loss"]
    loss.backward()
    assert loss.isfinite() and all(level.grad.isfinite().all() for level in logits)


def test_batch_without_objects_trains_the_background():
    logits = [torch.zeros(2, 3, g, g, 9, requires_grad=True) for g in GRIDS]
    terms = compute_loss(logits, torch.zeros(0, 6))
    terms["loss"].backward()
    assert terms["box"] == 0 and terms["background"] > 0 and logits[0].grad[..., 0].min() > 0
    for assigned in assign_targets(torch.zeros(0, 6), GRIDS, ANCHOR, batch=2):
        assert not assigned.positive.any() and not assigned.ignored.any()
