"""Canvases of several windows: cut and joined, and what a UNet sees of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmedit_cli.drawing.models.canvas import Canvas, in_windows


@pytest.mark.parametrize(
    ("side", "scale", "count", "width", "common"),
    [
        (512, 8, 2, 960, 64),
        (1024, 8, 3, 2816, 128),
        (64, 4, 2, 120, 8),
        (16, 2, 2, 24, 8),
        (8, 2, 2, 16, 0),
    ],
)
def test_neighbours_share_an_eighth_and_the_width_is_one_diffusers_takes(
    side, scale, count, width, common
):
    canvas = Canvas.of(count, side, scale)
    assert (canvas.width * scale, canvas.overlap * scale) == (width, common)
    assert width % 8 == 0
    assert canvas.starts[-1] + canvas.size == canvas.width


@pytest.mark.parametrize(
    "canvas", [Canvas(2, 16, 2), Canvas(3, 8, 3), Canvas(2, 8, 0), Canvas(1, 8, 2)]
)
def test_what_is_cut_and_joined_is_as_before(canvas):
    wide = torch.randn(2, 4, 8, canvas.width)
    windows = canvas.cut(wide)
    assert windows.shape == (2 * canvas.count, 4, 8, canvas.size)
    assert torch.equal(windows[canvas.count - 1], wide[0, ..., -canvas.size :])
    torch.testing.assert_close(canvas.join(windows), wide)


def test_a_seam_goes_over_from_one_window_to_the_other():
    canvas = Canvas(2, 8, 3)
    joined = canvas.join(torch.stack([torch.zeros(1, 1, 8), torch.ones(1, 1, 8)]))[
        0, 0, 0
    ]
    torch.testing.assert_close(
        joined, torch.tensor([0.0] * 5 + [0.25, 0.5, 0.75] + [1.0] * 5)
    )


class Recorder(nn.Module):
    """Doubles what it is given, and keeps it."""

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states=None,
        timestep_cond=None,
        added_cond_kwargs=None,
    ):
        self.seen = (
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond,
            added_cond_kwargs,
        )
        return (sample * 2,)


def test_a_unet_sees_windows_and_returns_canvases():
    unet, canvas = Recorder(), Canvas(2, 8, 2)
    wide, hidden = torch.randn(3, 4, 8, canvas.width), torch.randn(6, 5, 7)
    options = {
        "encoder_hidden_states": hidden[::2],
        "timestep_cond": torch.arange(3.0)[:, None],
    }
    with in_windows(unet, canvas, hidden, lambda windows: {"sizes": windows.shape}):
        (found,) = unet(wide, 7, **options, added_cond_kwargs=None)
    torch.testing.assert_close(found, 2 * wide)
    sample, time, told, embedded, added = unet.seen
    assert torch.equal(sample, canvas.cut(wide))
    assert time == 7
    assert told is hidden
    assert embedded[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert added == {"sizes": (6, 4, 8, 8)}
    assert torch.equal(unet(wide, 7, **options)[0], 2 * wide), "as before, outside"
    assert torch.equal(unet.seen[0], wide)
