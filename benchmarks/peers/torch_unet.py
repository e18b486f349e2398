"""A common good recipe in plain PyTorch, nothing of this project.

    python benchmarks/peers/torch_unet.py FOLDER MINUTES [--filters 16]

The U-Net with batch normalisation instead of dropout, AdamW with a warm-up and a cosine to the end of the time,
cross-entropy, and for each batch mirroring, scale, rotation, shift, brightness and contrast; batch 16, channels last,
bfloat16 where `--precision` says so. The last line is JSON: minutes trained, and the test mean IoU of the last weights.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from arrays import Clock, arguments, load, mean_iou
from torch import nn


def block(channels: int, width: int) -> nn.Sequential:
    found: list[nn.Module] = []
    for before in (channels, width):
        found += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*found)


class UNet(nn.Module):
    def __init__(self, filters: int, classes: int = 3):
        super().__init__()
        widths = [filters * 2**level for level in range(5)]
        self.down = nn.ModuleList([block(b, w) for b, w in zip([3, *widths[:-1]], widths, strict=True)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1])])
        self.join = nn.ModuleList([block(2 * w, w) for w in reversed(widths[:-1])])
        self.head = nn.Conv2d(filters, classes, 1)

    def forward(self, x):
        skips = []
        for i, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips[:-1]), strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.head(x)


def augmented(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float (N, 3, S, S) and masks (N, S, S) under one random map, the images in other light."""
    n = len(images)
    draw = lambda low, high: torch.empty(n).uniform_(low, high)  # noqa: E731
    angle, scale, mirror = draw(-0.26, 0.26), torch.exp(draw(-0.3, 0.3)), (draw(0, 1) < 0.5) * 2.0 - 1
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos * mirror, -sin, draw(-0.2, 0.2), sin * mirror, cos, draw(-0.2, 0.2)], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    moved = F.grid_sample(masks[:, None].float(), grid, "nearest", "reflection", align_corners=False)
    mean = images.mean((1, 2, 3), keepdim=True)
    contrast, brightness = torch.exp(draw(-0.3, 0.3)).view(n, 1, 1, 1), draw(-0.2, 0.2).view(n, 1, 1, 1)
    return ((images - mean) * contrast + mean + brightness).clamp(0, 1), moved[:, 0].long()


def main() -> None:
    args = arguments(__doc__, 16)
    torch.manual_seed(args.seed)
    order = np.random.default_rng(args.seed)
    images, masks = (torch.from_numpy(a.copy()) for a in load(args.folder, "train"))
    model = UNet(args.filters).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    low = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "mixed_bfloat16")
    clock, end, step, warmup = Clock(), 60 * args.minutes, 0, 100
    while clock() < end:
        for rows in np.array_split(order.permutation(len(images)), len(images) // 16):
            share = min(1.0, clock() / end)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * share))
            x, y = augmented(images[rows].permute(0, 3, 1, 2).float() / 255, masks[rows])
            with low:
                logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), y, ignore_index=255)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if clock() >= end:
                break
    minutes = clock() / 60
    model.eval()

    @torch.no_grad()
    def predict(x: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(x.copy()).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy()

    score = mean_iou(predict, *load(args.folder, "test"))
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"minutes": minutes, "mean_iou": score, "parameters": parameters}))


if __name__ == "__main__":
    main()
