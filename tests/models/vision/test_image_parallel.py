"""Images of a micro-batch, dealt to ranks."""

from __future__ import annotations

from megatron_vppo.models.vision.image_parallel import assign_images


def test_images_are_assigned_by_size() -> None:
    grids = ((1, 4, 4), (1, 40, 40), (1, 8, 8), (1, 8, 10), (1, 6, 4))
    assert assign_images(grids, ranks=2) == ((1,), (0, 2, 3, 4))
    assert assign_images(grids[:2], ranks=3) == ((1,), (0,), ())
    assert assign_images(grids[:2], ranks=3, held=(2000, 0, 1599)) == ((), (1,), (0,))
