"""Auto-PGD in torch, one image at a time, from algorithm 1 of arXiv 2003.01690; and its losses."""

import math

import torch


def cross_entropy(logits, label):
    return torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]))


def dlr(logits, label):
    ordered = logits.sort(descending=True).values
    other = torch.cat([logits[:label], logits[label + 1 :]]).max()
    return -(logits[label] - other) / (ordered[0] - ordered[2])


def targeted_dlr(logits, label, target):
    ordered = logits.sort(descending=True).values
    return -(logits[label] - logits[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


def checkpoints(steps):
    shares = [0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(p * steps, 6)) for p in shares]


def apgd(loss, clean, start, eps, steps):
    """(best point, best loss) of one run from `start`; `loss` maps an image to a number."""

    def value_and_gradient(x):
        x = x.clone().requires_grad_()
        value = loss(x)
        return value.item(), torch.autograd.grad(value, x)[0]

    def project(x):
        return torch.clamp(torch.min(torch.max(x, clean - eps), clean + eps), 0, 1)

    marks = checkpoints(steps)
    step, previous, x = 2 * eps, start, start
    values, gradients = zip(*[value_and_gradient(start)], strict=True)
    value, gradient = values[0], gradients[0]
    best, best_value, best_gradient = start, value, gradient
    rises, mark = 0, 1
    step_then, best_then = 2 * eps, best_value
    # Before the first checkpoint there is none at which the step could have stayed the same.
    first = True
    for k in range(1, steps + 1):
        z = project(x + step * gradient.sign())
        alpha = 1 if k == 1 else 0.75
        moved = project(x + alpha * (z - x) + (1 - alpha) * (x - previous))
        previous, x = x, moved
        new_value, gradient = value_and_gradient(x)
        rises += new_value > value
        value = new_value
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        if mark < len(marks) and k == marks[mark]:
            few = rises < 0.75 * (marks[mark] - marks[mark - 1])
            stuck = not first and step_then == step and best_then == best_value
            step_then, best_then, first = step, best_value, False
            if few or stuck:
                step, x, value, gradient = step / 2, best, best_value, best_gradient
            rises, mark = 0, mark + 1
    return best, best_value
