"""Detection learns: a small model from random weights finds things that it has not seen."""

from dataclasses import replace

import numpy as np
import torch
from small import Given, rng
from test_task_detection import CONFIG, LABELS, given, learner_with, pictured, placed, small

from beitctl.data.batch import Portion, collate

STEPS, SAMPLES, PEAK = 60, 4, 3e-3


def scene(number):
    """A picture with one thing anywhere."""
    draw = rng(number)
    width, height = (int(side) for side in draw.integers(14, 30, 2))
    left, top = int(draw.integers(0, 60 - width)), int(draw.integers(0, 40 - height))
    return pictured(placed(left, top, width, height, LABELS[int(draw.integers(2))]), id=f"scene{number}")


def test_unseen_things_are_found_far_better_than_by_one_fixed_box():
    made = given(model=replace(CONFIG, width=32, heads=2, ffn=64, patch_px=4))
    task, seen, draw = (
        small(scale_jitter=(0.8, 1.25), channels=16, hidden=32),
        list(map(scene, range(64))),
        rng(),
    )
    learner = learner_with(task, made).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=PEAK)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = PEAK * min(1, (step + 1) / 10, 2 * (1 - step / STEPS))
        items = [task.prepare(seen[i], draw, made) for i in draw.integers(len(seen), size=SAMPLES).tolist()]
        sums = learner(collate([Portion("task", "image", items)], made.model))
        optimizer.zero_grad()
        (torch.stack([total for total, _ in sums.values()]).sum() / SAMPLES).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    held, asked = [scene(number) for number in range(1000, 1016)], replace(made, train=False)
    with torch.no_grad():
        found = task.infer(learner.eval(), [(one, task.prepare(one, rng(), asked)) for one in held], asked)
    metrics = task.score([found], held, asked, Given(examples=tuple(seen)).open()).metrics
    assert metrics["box_map50"] > 0.3, metrics
    assert metrics["mask_map50"] > 0.3, metrics
    assert metrics["trivial_box_map50"] < 0.1
    assert np.isfinite(list(metrics.values())).all()
