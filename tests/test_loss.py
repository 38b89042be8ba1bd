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


def loop_assign(targets, grid, anchors):
    """Assign by the definition. Returns {(image, anchor, row, column): target} and the set of ignored predictions."""
    positives, above = {}, set()
    for number, (image, _, cx, cy, w, h) in enumerate(targets.tolist()):
        row, column = min(int(cy * grid), grid - 1), min(int(cx * grid), grid - 1)
        ious = []
        for aw, ah in anchors.tolist():
            intersection = min(w, aw) * min(h, ah)
            ious.append(intersection / (w * h + aw * ah - intersection))
        best = max(range(3), key=lambda a: ious[a])
        positives[int(image), best, row, column] = number
        above |= {(int(image), a, row, column) for a in range(3) if ious[a] > 0.5}
    return positives, above - set(positives)


@pytest.mark.parametrize("seed", range(8))
def test_assignment_equals_the_loop(seed):
    targets = random_targets(
        40, images=3, seed=seed
    )  # crowded, so that objects match the same cell and anchor
    collisions = 0
    for scale, assigned in enumerate(assign_targets(targets, GRIDS, ANCHOR, batch=3)):
        positives, ignored = loop_assign(targets, GRIDS[scale], ANCHOR[scale])
        places = zip(
            *(v.tolist() for v in (assigned.image, assigned.anchor, assigned.row, assigned.column)),
            strict=True,
        )
        assert {
            place: number for number, place in enumerate(places) if assigned.valid[number]
        } == positives
        assert {tuple(i) for i in assigned.positive.nonzero().tolist()} == set(positives)
        assert {tuple(i) for i in assigned.ignored.nonzero().tolist()} == ignored
        collisions += len(targets) - len(positives)
    assert collisions > 0


def test_objectness_trains_no_boxes():
    """The IoU is a target of objectness: no gradient goes through it."""
    logits = [
        torch.randn(
            1, 3, grid, grid, 9, generator=torch.Generator().manual_seed(grid)
        ).requires_grad_()
        for grid in GRIDS
    ]
    loss = YOLOLoss(Config(box_weight=0.0, class_weight=0.0))
    loss(logits, random_targets(10, images=1), ANCHOR)["loss"].backward()
    for level in logits:
        assert level.grad[..., 0].abs().sum() > 0 and (level.grad[..., 1:] == 0).all()


def test_every_object_has_one_positive_per_scale():
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.3], [1, 2, 0.999, 1.0, 0.01, 0.01]])
    for assigned in assign_targets(targets, GRIDS, ANCHOR, batch=2):
        assert assigned.valid.all() and assigned.positive.sum() == 2


def test_no_objects():
    for assigned in assign_targets(torch.zeros(0, 6), GRIDS, ANCHOR, batch=2):
        assert not assigned.positive.any() and not assigned.ignored.any()


def loop_ignore_mask(boxes, targets):
    """boxes [B, K, 4] xyxy -> bool [B, K]: the boxes that have an IoU above 0.5 with an object of their image."""
    mask = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for image, _, *box in targets.tolist():
        mask[int(image)] |= (
            box_iou(boxes[int(image)], cxcywh_to_xyxy(torch.tensor([box])))[:, 0] > 0.5
        )
    return mask


def test_no_loss_for_a_prediction_that_fits_an_object_from_another_cell():
    """A cell beside the object's own predicts the object's box: it is not background, whatever its objectness."""
    target = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.2]])
    logits = [torch.full((1, 3, g, g, 9), -12.0) for g in GRIDS]
    offset = 0.5 * 12 - 5  # from the left edge of column 5 to the object's centre, in cells
    anchors = ANCHOR[2]
    logits[2][0, 0, 6, 5, 1:3] = torch.tensor([12.0 * offset, -12.0])
    logits[2][0, 0, 6, 5, 3:5] = (target[0, 4:] / anchors[0]).log()
    baseline = YOLOLoss(Config())(logits, target, ANCHOR)["background"]
    logits[2][0, 0, 6, 5, 0] = 12.0
    assert YOLOLoss(Config())(logits, target, ANCHOR)["background"] <= baseline
    logits[2][0, 0, 2, 5] = logits[2][0, 0, 6, 5]  # the same box, four cells higher
    assert YOLOLoss(Config())(logits, target, ANCHOR)["background"] > 1


def complete_iou(one, two):
    """Return 1 - CIoU of two xyxy boxes (Zheng et al. 2020, equations 8 to 11), and their IoU."""
    left, top, right, bottom = (
        max(one[0], two[0]),
        max(one[1], two[1]),
        min(one[2], two[2]),
        min(one[3], two[3]),
    )
    intersection = max(0, right - left) * max(0, bottom - top)
    sizes = [(b[2] - b[0], b[3] - b[1]) for b in (one, two)]
    iou = intersection / (sizes[0][0] * sizes[0][1] + sizes[1][0] * sizes[1][1] - intersection)
    diagonal = (max(one[2], two[2]) - min(one[0], two[0])) ** 2 + (
        max(one[3], two[3]) - min(one[1], two[1])
    ) ** 2
    distance = (
        (one[0] + one[2] - two[0] - two[2]) ** 2 + (one[1] + one[3] - two[1] - two[3]) ** 2
    ) / 4
    v = (
        4
        / math.pi**2
        * (math.atan(sizes[1][0] / sizes[1][1]) - math.atan(sizes[0][0] / sizes[0][1])) ** 2
    )
    return 1 - iou + distance / diagonal + v * v / (1 - iou + v + 1e-7), iou


def cross_entropy(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def test_loss_equals_the_loop():
    config = Config()
    targets = random_targets(6, images=2, seed=3)
    random = torch.Generator().manual_seed(1)
    logits = [torch.randn(2, 3, g, g, 9, generator=random) for g in GRIDS]
    boxes, _ = decode(logits, ANCHOR)
    ignored = loop_ignore_mask(boxes, targets)
    sums = dict.fromkeys(("box", "objectness", "background", "class"), 0.0)
    first = 0
    for scale, level in enumerate(logits):
        grid = GRIDS[scale]
        positives, _ = loop_assign(targets, grid, ANCHOR[scale])
        for image, anchor, row, column in torch.ones(level.shape[:4]).nonzero().tolist():
            place, prediction = (
                (image, anchor, row, column),
                level[image, anchor, row, column].tolist(),
            )
            number = first + (anchor * grid + row) * grid + column
            if place in positives:
                target = targets[positives[place]]
                box_loss, iou = complete_iou(
                    boxes[image, number].tolist(), cxcywh_to_xyxy(target[2:]).tolist()
                )
                sums["box"] += box_loss
                sums["objectness"] += cross_entropy(prediction[0], iou)
                classes = [label == int(target[1]) for label in range(4)]
                sums["class"] += sum(map(cross_entropy, prediction[5:], classes))
            elif not ignored[image, number]:
                sums["background"] += cross_entropy(prediction[0], 0)
        first += 3 * grid * grid
    terms = YOLOLoss(config)(logits, targets, ANCHOR)
    for name, value in sums.items():
        assert terms[name].item() == pytest.approx(value / (3 * len(targets)), rel=1e-3), name
    total = 2.0 * terms["box"] + 2.0 * terms["objectness"] + terms["background"] + terms["class"]
    torch.testing.assert_close(terms["loss"], total)


def test_loss_of_a_perfect_prediction_and_of_a_wrong_box():
    target = torch.tensor([[0, 2, 0.51, 0.48, 0.3, 0.2]])
    logits = [torch.full((1, 3, g, g, 9), -12.0) for g in GRIDS]
    for level, assigned, anchors in zip(
        logits, assign_targets(target, GRIDS, ANCHOR, 1), ANCHOR, strict=True
    ):
        place = assigned.image, assigned.anchor, assigned.row, assigned.column
        grid = level.shape[2]
        x, y = (target[0, 2] * grid) % 1, (target[0, 3] * grid) % 1
        level[place] = torch.tensor([12.0, x.logit(), y.logit(), 0, 0, -12, -12, 12, -12])
        level[(*place, slice(3, 5))] = (target[:, 4:] / anchors[assigned.anchor]).log()
    loss = YOLOLoss(Config())
    assert loss(logits, target, ANCHOR)["loss"] < 0.01
    moved = target.clone()
    moved[0, 4] *= 1.5
    assert loss(logits, moved, ANCHOR)["box"] > 0.2


def test_complete_iou_equals_torchvision_with_its_gradient():
    random = torch.Generator().manual_seed(0)
    targets = torch.rand(50, 4, generator=random) * 0.5 + 0.1
    results = []
    for loss in (
        lambda a, b: complete_iou_loss(a, b)[0],
        lambda a, b: complete_box_iou_loss(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)),
    ):
        predictions = (
            torch.rand(50, 4, generator=random.manual_seed(1)) * 0.5 + 0.1
        ).requires_grad_()
        value = loss(predictions, targets)
        results.append((value, *torch.autograd.grad(value.sum(), predictions)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_half_precision_logits_stay_finite():
    logits = [
        torch.full((1, 3, g, g, 9), 60000.0, dtype=torch.float16, requires_grad=True) for g in GRIDS
    ]
    terms = YOLOLoss(Config())(logits, random_targets(5, 1), ANCHOR)
    terms["loss"].backward()
    assert terms["loss"].isfinite() and all(level.grad.isfinite().all() for level in logits)


def test_batch_without_objects_trains_the_background():
    logits = [torch.zeros(1, 3, g, g, 9, requires_grad=True) for g in GRIDS]
    terms = YOLOLoss(Config())(logits, torch.zeros(0, 6), ANCHOR)
    terms["loss"].backward()
    assert terms["box"] == 0 and terms["background"] > 0 and logits[0].grad[..., 0].min() > 0
