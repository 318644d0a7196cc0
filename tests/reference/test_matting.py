"""Matting errors against the values of RobustVideoMatting's evaluation."""

import pytest
import torch
from torch.testing import assert_close

from acetate.metrics.matting import MattingErrors, connectivity_error, gradient_error

UNITS = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def cases(golden):
    vectors = golden("alpha_metrics")
    return {
        name: (
            vectors[f"{name}/prediction_u8"].float() / 255,
            vectors[f"{name}/target_u8"].float() / 255,
            vectors.under(name),
        )
        for name in vectors.metadata["cases"]
    }


def test_errors_of_every_frame(cases):
    for prediction, target, values in cases.values():
        assert_close(gradient_error(prediction, target, normalised=True), values["grad"], **UNITS)
        assert_close(connectivity_error(prediction, target), values["conn"], **UNITS)


def test_means_over_frames(cases):
    for prediction, target, values in cases.values():
        metric = MattingErrors(normalised=True)
        metric.update(prediction[None, None], target[None, None])
        figures = metric.compute()
        for name in ("mad", "mse", "grad", "conn", "dtssd"):
            assert_close(figures[name].float(), values[name].mean(), **UNITS)


def test_pieces_of_a_clip_are_one_clip(cases):
    for prediction, target, _ in cases.values():
        whole, pieces = MattingErrors(), MattingErrors()
        whole.update(prediction[None, None], target[None, None])
        for start, end in ((0, 2), (2, 3), (3, len(target))):
            piece = (matte[None, None, start:end] for matte in (prediction, target))
            pieces.update(*piece, goes_on=start > 0)
        assert_close(pieces.compute(), whole.compute())
        assert torch.isfinite(torch.stack(list(whole.compute().values()))).all()
