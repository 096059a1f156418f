"""Position tables at another resolution (C1.7)."""

import numpy as np
import pytest
import torch

from ssl_vit.encoders.positions import resize


def table(rows: int, columns: int) -> torch.Tensor:
    """A random table [1, 1 + rows * columns, 5]."""
    return torch.randn(1, 1 + rows * columns, 5, generator=torch.Generator().manual_seed(0))


def test_the_same_grid_is_the_identity():
    given = table(3, 4)
    assert resize(given, (3, 4), (3, 4), 1) is given


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((7, 7), (12, 12)), ((24, 24), (14, 14)), ((3, 5), (6, 4))]
)
def test_equals_the_zoom_of_the_authors_code(old, new):
    from scipy.ndimage import zoom

    given = table(*old)
    grid = given[0, 1:].reshape(*old, 5).double().numpy()
    want = np.asarray(zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1))
    got = resize(given.double(), old, new, 1)
    assert torch.equal(got[:, :1].float(), given[:, :1])  # the class token's row
    np.testing.assert_allclose(got[0, 1:].reshape(*new, 5).numpy(), want, rtol=0, atol=1e-5)


def test_a_linear_table_stays_linear_and_corners_stay():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    linear = torch.cat([torch.zeros(1, 1, 2), torch.stack([rows, columns], -1).reshape(1, 24, 2)], 1)
    got = resize(linear, (4, 6), (7, 11), 1)[0, 1:].reshape(7, 11, 2)
    want = torch.stack(torch.meshgrid(torch.linspace(0, 3, 7), torch.linspace(0, 5, 11), indexing="ij"), -1)
    torch.testing.assert_close(got, want)
